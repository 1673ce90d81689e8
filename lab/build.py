"""Kernels from trees: one build at a time, incremental, with a percentage."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Container, Sequence

from lab import base, host, kconfig, lock, paths, proc, say, series, tree, upto
from lab.cells import Kernel
from lab.errors import LabError

STEPS = 1360  # lines that a first build prints, until one has been counted
COUNT = "lab.steps"  # in the object folder: lines of its first build
LOG = "lab.log"  # in the object folder: everything that make said last


@dataclass(frozen=True)
class Built:
    """A kernel that is ready to be booted."""

    kernel: Kernel
    image: Path
    vmlinux: Path
    config: Path
    objdir: Path
    srctree: Path


def build(kernel: Kernel, source: base.Source) -> Built:
    """Bring `kernel`, made from `source`, up to date.

    Raises LabError with the compiler's messages when that fails.
    """
    host.require("build", *(["clang"] if kernel.by_clang else []))
    with lock.held(paths.CACHE / "build.lock", "the compiler"):
        srctree = tree.patched(source) if kernel.patched else source.tree
        objdir = object_folder(kernel, source)
        if not (objdir / "vmlinux").exists():
            host.check_disk(host.DISK_MORE)
            host.check_memory()
        with say.phase(f"building kernel {kernel.name}"):
            configure(kernel, srctree, objdir, _later(source), source.base.config)
            make(srctree, objdir, ["Image"], kernel.by_clang)
    return find(kernel, source)


def _later(source: base.Source) -> set[str]:
    """The options that groups add which this run is without."""
    if not upto.chosen():
        return set()
    the_series = series.load(source.base)
    return kconfig.of_series().keys() - series.options(
        series.result(the_series, source.tree, the_series.count(upto.chosen())))


def find(kernel: Kernel, source: base.Source) -> Built:
    """The kernel that build() made."""
    srctree = tree.home(source) / tree.TREE if kernel.patched else source.tree
    objdir = object_folder(kernel, source)
    return Built(kernel, objdir / "arch/arm64/boot/Image", objdir / "vmlinux", objdir / ".config", objdir, srctree)


def object_folder(kernel: Kernel, source: base.Source) -> Path:
    """Where the objects of `kernel` are. Beside its tree, so that compiler results can be shared."""
    return (tree.home(source) if kernel.patched else source.home) / "build" / kernel.name


def configure(kernel: Kernel, srctree: Path, objdir: Path, later: Container[str] = (), overlay: str = "") -> Path:
    """Configure `objdir` for `kernel`, without the options `later`, which `srctree` does not have yet.

    `overlay` is the base's file in lab/config/, if it has one.

    Raises LabError naming options that were dropped.
    """
    objdir.mkdir(parents=True, exist_ok=True)
    return kconfig.configure(kernel, srctree, objdir,
                             lambda arguments: make(srctree, objdir, arguments, kernel.by_clang), later, overlay)


def environment() -> dict[str, str]:
    """Nothing of the caller's make or compiler settings; the same kernel whoever builds it."""
    env = {name: value for name, value in os.environ.items()
           if name in ("PATH", "HOME", "TMPDIR", "USER", "LOGNAME")}
    return env | {
        "LC_ALL": "C",
        "KBUILD_BUILD_TIMESTAMP": "Fri Nov 20 12:00:00 UTC 2026",
        "KBUILD_BUILD_USER": "lab",
        "KBUILD_BUILD_HOST": "lab",
        "CCACHE_DIR": str(paths.CACHE / "ccache"),
        "CCACHE_BASEDIR": str(paths.CACHE),  # trees in different folders share results
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_MAXSIZE": "5G",
    }


def command(srctree: Path, objdir: Path, arguments: Sequence[str], by_clang: bool = False) -> list[str]:
    """The make command for `arguments`. clang only compiles: its linker is GNU's, like everybody's."""
    compiler = host.CLANG if by_clang else f"{host.CROSS_COMPILE}gcc"
    return ["make", "-C", str(srctree), f"O={objdir}", f"-j{host.cores()}", "ARCH=arm64",
            f"CROSS_COMPILE={host.CROSS_COMPILE}", f"CC=ccache {compiler}", *arguments]


def make(srctree: Path, objdir: Path, arguments: Sequence[str], by_clang: bool = False) -> list[str]:
    """Run make, one at a time on this machine, and return what it printed, which is also in LOG below `objdir`.

    Raises LabError with the lines that matter when it fails.
    """
    first = not (objdir / "vmlinux").exists()
    counted = objdir / COUNT
    total = (int(counted.read_text()) if counted.exists() else STEPS) if first else 0
    lines: list[str] = []
    steps = 0
    with lock.held(paths.CACHE / "build.lock", "the compiler"), open(objdir / LOG, "w") as log:
        def seen(line: str) -> None:
            nonlocal steps
            lines.append(line)
            log.write(line + "\n")
            if re.match(r"  [A-Z]+ ", line):
                steps += 1
                say.progress(steps, total, "compiled" if total else "steps")

        status = proc.stream(command(srctree, objdir, arguments, by_clang), seen, env=environment())
    if status != 0:
        raise LabError(f"'make {' '.join(arguments)}' failed in {objdir}:\n{errors(lines)}",
                       f"everything it said: {objdir / LOG}")
    if first and "Image" in arguments:
        counted.write_text(str(steps))
    return lines


def errors(lines: Sequence[str], limit: int = 30) -> str:
    """What the compiler complained about, or the end of the log when it did not."""
    wanted = re.compile(r"(error|warning|undefined reference|multiple definition|\*\*\*)[: ]|^ld: |: Assertion|ASSERT")
    hits = [line for line in lines if wanted.search(line) and not line.startswith("make")]
    return "\n".join(f"  {line}" for line in (hits or lines)[:limit] if line) if hits else \
        "\n".join(f"  {line}" for line in lines[-limit:])

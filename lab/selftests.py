"""The kernel's own selftests of kexec and its users: built, installed and run as upstream does it."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Iterator, Sequence

from lab import base, build, host, lock, paths, proc, qemu, tree
from lab.errors import LabError
from lab.machine import Machine

TARGET = "kexec"
IN_GUEST = "/tmp/selftests"


@dataclass(frozen=True)
class Ktap:
    """A report: what passed, failed and was skipped, by name, and how many results were announced."""

    passed: tuple[str, ...]
    failed: tuple[str, ...]
    skipped: tuple[str, ...]
    planned: int | None

    @property
    def complete(self) -> bool:
        """As many results as were announced."""
        return self.planned == len(self.passed) + len(self.failed) + len(self.skipped)


def parse_ktap(text: str, prefix: str = "") -> Ktap:
    """The results in `text`; of a test that run_kselftest.sh ran, these have the `prefix` "# "."""
    passed: list[str] = []
    failed: list[str] = []
    skipped: list[str] = []
    planned = None
    for line in text.replace("\r", "").splitlines():
        if not line.startswith(prefix):
            continue
        line = line[len(prefix):]
        if plan := re.match(r"1\.\.(\d+)", line):
            planned = int(plan[1])
        elif result := re.match(r"(ok|not ok) \d+ (.*?) ?(# SKIP ?(.*))?$", line):
            kind = failed if result[1] == "not ok" else skipped if result[3] else passed
            kind.append(result[2] or result[4])
    return Ktap(tuple(passed), tuple(failed), tuple(skipped), planned)


@cache
def install() -> Path:
    """Build the tests from the patched tree and install them; the folder with run_kselftest.sh.

    Raises LabError with the compiler's messages when that fails.
    """
    host.require("build")
    source = base.source()
    with lock.held(paths.CACHE / "lock", "the cache"):
        srctree = tree.patched(source)
        objdir = tree.home(source) / "build" / "selftests"
        folder = objdir / "install"
        shutil.rmtree(folder, ignore_errors=True)
        objdir.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        # Not the laboratory's own make(): this is the command that people are told to use.
        status = proc.stream(["make", "-C", str(srctree / "tools/testing/selftests"), f"TARGETS={TARGET}",
                              "ARCH=arm64", f"CROSS_COMPILE={host.CROSS_COMPILE}", f"O={objdir}",
                              f"KSFT_INSTALL_PATH={folder}", "USERCFLAGS=-Werror", "install"],
                             lines.append, env=build.environment())
    if status or not (folder / "run_kselftest.sh").is_file():
        raise LabError(f"the selftests of {TARGET} do not build:\n{build.errors(lines)}")
    return folder


@cache
def program(name: str) -> bytes:
    """One of the installed tests' programs."""
    with _installed() as folder:
        return (folder / TARGET / name).read_bytes()


@cache
def _archive() -> bytes:
    """The installed tests, packed."""
    data = io.BytesIO()
    with _installed() as folder, tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(folder, arcname=".")
    return data.getvalue()


@contextmanager
def _installed() -> Iterator[Path]:
    """The folder of install(), while no other process begins its own by emptying it."""
    with lock.held(paths.CACHE / "lock", "the cache"):
        yield install()


def vmtest(suite: str, srctree: Path, folder: Path, arguments: Sequence[str], virtualization: bool) -> Ktap:
    """Have the vmtest.sh of `suite` in `srctree` build a kernel in `folder` and run it; what it reports.

    The script stays as it is. Programs that it finds before others are: the compiler with a cache; timeout with ten
    times the time, as it is meant for KVM; QEMU with `virtualization` if asked for, and its console kept in `folder`.
    """
    host.require("build", "boot")
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    console = folder / "console.log"
    console.unlink(missing_ok=True)
    _program(programs / f"{host.CROSS_COMPILE}gcc", f'exec ccache {shutil.which(host.CROSS_COMPILE + "gcc")} "$@"')
    _program(programs / "timeout", f'exec {shutil.which("timeout")} 300s "${{@:2}}"')
    _program(programs / qemu.QEMU, f"""\
for word; do
    shift
    case $word in
    virt) word=virt{',virtualization=on' if virtualization else ''} ;;
    file:*) serial=${{word#file:}} ;;
    esac
    set -- "$@" "$word"
done
{shutil.which(qemu.QEMU)} "$@"
cp "$serial" {console}""")
    env = build.environment() | {"CROSS_COMPILE": host.CROSS_COMPILE}
    env["PATH"] = f"{programs}:{env['PATH']}"
    lines: list[str] = []
    with lock.held(paths.CACHE / "build.lock", "the compiler"):
        proc.stream(["bash", str(srctree / "tools/testing/selftests" / suite / "vmtest.sh"), "-t", "aarch64",
                     "-d", str(folder), "-j", str(host.cores()), *arguments], lines.append, env=env)
    report = parse_ktap("\n".join(lines))
    if not report.complete or not console.exists():
        raise LabError(f"{suite}/vmtest.sh got nowhere:\n{build.errors(lines)}")
    return report


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def put(m: Machine) -> None:
    """Unpack the installed tests in a guest, at IN_GUEST."""
    m.put("/tmp/selftests.tgz", _archive())
    m.sh(f"mkdir -p {IN_GUEST} && tar xzf /tmp/selftests.tgz -C {IN_GUEST} && rm /tmp/selftests.tgz")


def run(m: Machine) -> str:
    """What run_kselftest.sh says in a guest. Raises LabError if it finds no test to run."""
    # It appends to /dev/stdout, which an initramfs has not, and which must not be a file.
    text = m.run(f"ln -sf /proc/self/fd/1 /dev/stdout; {IN_GUEST}/run_kselftest.sh | cat", timeout=300).out
    if "1.." not in text:
        raise LabError(f"run_kselftest.sh ran nothing:\n{text}")
    return text

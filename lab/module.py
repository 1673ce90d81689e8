"""The module that provokes a guest's kernel, built for that kernel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lab import build, lock, paths
from lab.build import Built
from lab.machine import Machine, Result

SOURCE = Path(__file__).resolve().parent / "module"
IN_GUEST = "/tmp/provoke.ko"


@cache
def module(built: Built) -> bytes:
    """Bring the module for a kernel up to date. Raises LabError with the compiler's messages when that fails."""
    folder = built.objdir / "lab.module"
    folder.mkdir(exist_ok=True)
    with lock.held(paths.CACHE / "build.lock", "the compiler"):  # until it is read: others bring it up to date, too
        for what in ["modules"], [f"M={SOURCE}", f"MO={folder}", "modules"]:  # the former tells what the kernel exports
            build.make(built.srctree, built.objdir, what, built.kernel.by_clang)
        return (folder / "provoke.ko").read_bytes()


def put(m: Machine) -> None:
    """Have the module at hand in a guest."""
    m.put(IN_GUEST, module(m.built))


def insert(arguments: str) -> str:
    """The command that makes a guest's kernel do what the module's source says."""
    return f"insmod {IN_GUEST} {arguments}"


def touch(m: Machine, how: str, ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """Have the kernel "write" to or "read" each page of ranges, physical address and size: pages, and faults."""
    words = ",".join(f"{word:#x}" for one in ranges for word in one)
    result: Result = m.run(f"{insert(f'how={how} ranges={words}')} 2>/dev/null; dmesg | tail -20 | grep 'provoke: '",
                           timeout=300)
    *_, line = result.out.splitlines()
    found = line.rpartition("provoke: ")[2].split()
    return int(found[0]), int(found[2])

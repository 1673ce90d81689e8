"""`./kexec-lab hibernate`: a guest hibernates, is switched off and on, and resumes with its memory as it was."""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, Sequence

from lab import base, build, cells, guest, host, lock, paths, qemu, say
from lab.build import Built
from lab.cells import Cell
from lab.guest import Guest
from lab.handover import BadHandover, verify_first
from lab.machine import Machine, find_complaints

MEMORY = 768  # MiB
DISK = "for disk in /sys/block/vd*; do [ $(cat $disk/serial) = swap ] && swap=/dev/${disk##*/}; done\n"


class BadResume(BadHandover):
    """A kernel resumed, and something is wrong with it."""


@dataclass(frozen=True)
class Cycle:
    """Hibernated and resumed. `seconds` for both together."""

    number: int
    seconds: float


def machine_for(cell: Cell, **fields: object) -> Cell:
    """`cell` with as little memory as fits.

    Without an ITS: v7.3 does not program a redistributor's LPI tables again when it resumes, and warns. But QEMU 7.2
    has one in its ACPI tables in any case.
    """
    fields = {"memory": MEMORY, "its": cell.efi} | fields
    return replace(cell, name=f"{cell.name}-hibernate", **fields)  # type: ignore[arg-type]


@contextmanager
def machine(cell: Cell, built: Built, archives: Guest, *, accel: str = "tcg", name: str = "",
            report: Callable[[str], None] = say.info, extra: Sequence[str] = ()) -> Iterator[Machine]:
    """A guest that can hibernate, with its first kernel up and swap on."""
    with tempfile.TemporaryDirectory(prefix="lab.") as folder:
        with Machine(cell, built, archives, accel=accel, name=name, report=report,
                     extra=[*qemu.scratch_disk("swap", Path(folder) / "swap", cell), *extra]) as m:
            verify_first(m, m.hello())
            m.sh(DISK + "mkswap $swap && swapon $swap && echo shutdown >/sys/power/disk")
            yield m


def fill(m: Machine, seed: int, share: int = 2) -> None:
    """Fill one part in `share` of the memory with a pattern."""
    m.sh(f"mount -o remount,size=75% /tmp && pattern fill /tmp/pattern {m.boot.cell.memory // share} {seed}", timeout=300)


def cycle(m: Machine, number: int, seed: int, share: int = 2) -> Cycle:
    """Hibernate and resume, and check what fill() wrote. Raises BadResume, or whatever else goes wrong."""
    begin = time.monotonic()
    since = len(m.log())
    before = m.sh("cat /proc/sys/kernel/random/boot_id")
    result = m.sleep("echo disk >/sys/power/state")
    if result.rc:
        raise BadResume(f"hibernation failed: {result.out}", m)
    seconds = time.monotonic() - begin
    wrong = find_complaints(m.log()[since:])
    if m.sh("cat /proc/sys/kernel/random/boot_id") != before:
        wrong.append("this is not the kernel that hibernated")
    check = m.run(f"pattern check /tmp/pattern {m.boot.cell.memory // share} {seed}", timeout=300)
    if check.rc:
        wrong.append(f"the pattern is spoilt: {check.out}")
    if wrong:
        raise BadResume("; ".join(wrong), m)
    return Cycle(number, seconds)


def main(args: argparse.Namespace) -> int:
    """Hibernate and resume a guest some times; returns 0 if its memory was whole each time."""
    cell = machine_for(cells.cell(args.cell))
    host.require("base", "build", "boot")
    built = build.build(cell.kernel, base.source())
    archives = guest.build()
    with lock.held(paths.OUT_LOCK, "this checkout's out/"), \
            machine(cell, built, archives, accel=args.accel, name=f"hibernate.{cell.name}") as m:
        fill(m, 1)
        for number in range(1, args.cycles + 1):
            done = cycle(m, number, 1)
            say.info(f"   cycle {done.number}: hibernated and resumed in {done.seconds:.1f} s, "
                     f"{cell.memory // 2} MiB of memory are what they were")
    return 0

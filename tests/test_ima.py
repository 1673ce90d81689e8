"""The measurements of IMA reach the next kernel, and no memory but that of the image that is executed.

Each is also shown on the base, which writes to memory of images that are gone, or of others.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import pytest

from conftest import Lab, name_of
from lab.cells import CELLS, Cell, on_base
from lab.gdb import Gdb, options
from lab.handover import verify
from lab.kload import IMAGE_SIZE, MIB, NO_CMA, Segment, call, file_statements, kload, next_image
from lab.machine import GuestFailure, Machine
from lab.qemu import RAM_BASE
from lab.stage import PATIENCE, read_symbols
from lab.vmcore import MAGIC

pytestmark = pytest.mark.neighbours

PAGE = 4096
PLAIN, CMA = CELLS["4k-va48-ima-vhe"], CELLS["4k-va48-ima-el1"]
HEADER = struct.Struct("<HHIQQ")  # struct ima_kexec_hdr: version, two that are reserved, bytes, records
RECORD = b"\x06\0\0\0ima-ng"  # a record has the name of its template
SPARE, SEED = 24, 19  # MiB that are left when memory is filled; of the pattern that it is filled with
PATTERN = struct.Struct("<QQ")
GROWTH = 300  # records, of some 300 bytes each
LIST = "/sys/kernel/security/integrity/ima/ascii_runtime_measurements"


@pytest.fixture
def stopped(cell: Cell, lab: Lab, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A guest that can be stopped, with its first kernel up."""
    assert lab.guest
    with Machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel, name=name_of(request), report=lab.report,
                 extra=options(tmp_path / "gdb")) as m:
        m.hello()
        yield m


# What is measured, and where it is

def measurements(m: Machine) -> list[str]:
    """The records of the running kernel."""
    return m.sh(f"[ -e {LIST} ] || mount -t securityfs securityfs /sys/kernel/security\ncat {LIST}").splitlines()


def grow(m: Machine) -> None:
    """Execute what has not been measured before, under long names."""
    m.sh(f"""
        name=/tmp/$(printf '%0200d' 0)
        for n in $(seq {GROWTH}); do
            printf '#!/bin/sh\\n: %d\\n' $n >$name.$n && chmod +x $name.$n && $name.$n || exit
            rm $name.$n
        done""", timeout=300)


def load_measured(m: Machine, flags: int = 0) -> range:
    """kexec_file_load() of the next kernel; returns the physical addresses of the segment for the measurements."""
    assert call(m, next_image(m, flags)) == "0"
    said = m.sh("dmesg")
    start = int(re.findall(r"measurement buffer for the loaded kernel at (0x\w+)", said)[-1], 16)
    size = int(re.findall(rf"segment\[\d+\]: .* mem={start:#x} memsz=(0x\w+)", said)[-1], 16)
    return range(start, start + size)


def load_refused(m: Machine) -> None:
    """The same for a kernel that is larger than memory, which is found out once the measurements have a segment."""
    with open(m.built.image, "rb") as file:
        head = bytearray(file.read(64))
    struct.pack_into("<Q", head, IMAGE_SIZE, 1 << 40)
    m.put("/tmp/image", head.ljust(8192, b"\0"))
    assert call(m, file_statements("/tmp/image")) == "EADDRNOTAVAIL"
    assert m.sh("cat /sys/kernel/kexec_loaded").strip() == "1"


def load_another(m: Machine) -> None:
    """kexec_load() of what will not be entered."""
    assert kload(m, [Segment(RAM_BASE + m.boot.cell.memory * MIB // 2, 64 << 10)]) == "0"


def fill(m: Machine) -> int:
    """Give most of what is free to a file, the pages of which are numbered; returns how many these are.

    They can't be moved, like those of an image, so they are taken from where these were.
    """
    size = int(m.sh("awk '/^MemFree:/ { print $2 }' /proc/meminfo")) // 1024 - SPARE
    m.sh(f"mkdir /fill && mount -t ramfs ramfs /fill && pattern fill /fill/file {size} {SEED}", timeout=300)
    return size * MIB // PAGE


@dataclass(frozen=True)
class Memory:
    """A guest's memory. Addresses are physical."""

    content: bytes

    def at(self, where: range) -> bytes:
        return self.content[where.start - RAM_BASE:where.stop - RAM_BASE]

    def records(self) -> list[int]:
        """Addresses of what a list of measurements that is handed over consists of, wherever it is."""
        return [RAM_BASE + match.start() for match in re.finditer(re.escape(RECORD), self.content)]

    def numbered(self) -> int:
        """How many pages of a file that fill() made are whole."""
        found = set()
        for start in range(0, len(self.content), PAGE):
            word, number = PATTERN.unpack_from(self.content, start)
            if word == MAGIC ^ SEED and self.content[start:start + PAGE] == PATTERN.pack(word, number) * 256:
                found.add(number)
        return len(found)


def leave(m: Machine, folder: Path) -> Memory:
    """Execute what is loaded; the memory when the last reboot notifier has been called. The guest goes on."""
    machine_kexec = read_symbols(m.built.vmlinux)["machine_kexec"]
    with Gdb(folder / "gdb") as gdb:
        gdb.run_to(machine_kexec, PATIENCE, str(m.console), lambda: m.begin("kexec -e"))
        dump = folder / "memory"
        m.qmp("pmemsave", val=RAM_BASE, size=m.boot.cell.memory * MIB, filename=str(dump))
        memory = Memory(dump.read_bytes())
        dump.unlink()
        gdb.resume()
    return memory


def arrive(m: Machine, before: list[str], since: int) -> int:
    """Wait for the next kernel; how many records it was given, which are those of `before`, and what came after."""
    m.generation += 1
    verify(m, m.hello(), since)
    after = measurements(m)
    count = max(n for n, line in enumerate(after) if "boot_aggregate" in line)  # its own begin there
    both = min(count, len(before))
    assert after[:both] == before[:both]
    m.report(f"   {m.boot.cell.name}: {count} records arrived, {len(before)} there were before kexec -e")
    return count


@pytest.mark.parametrize("flags", [0, NO_CMA], ids=["in.place", "copied"])
@pytest.mark.cells(PLAIN, CMA, on_base(PLAIN))  # the base misplaces kernels in CMA
def test_measurements_arrive(machine: Machine, flags: int) -> None:
    """All of them, in two kernels in a row, and what is measured while the first ones are shut down."""
    for generation in (1, 2):
        grow(machine)
        load_measured(machine, flags)
        before, since = measurements(machine), len(machine.log())
        assert len(before) > generation * GROWTH
        machine.begin("kexec -e")
        count = arrive(machine, before, since)
        assert count > len(before)
        assert sum(" kexec_execute " in line for line in measurements(machine)) == generation


@pytest.mark.parametrize("how", ["replaced", "unloaded"])
@pytest.mark.cells(PLAIN, on_base(PLAIN))
def test_nothing_is_written_to_an_image_that_is_gone(cell: Cell, stopped: Machine, how: str, tmp_path: Path) -> None:
    """Its memory has become a part of a file meanwhile."""
    grow(stopped)
    load_measured(stopped)
    if how == "unloaded":
        assert kload(stopped, []) == "0"
        pages = fill(stopped)
    load_another(stopped)
    if how == "replaced":
        pages = fill(stopped)
    memory = leave(stopped, tmp_path)
    lost = pages - memory.numbered()
    stopped.report(f"   {cell.name}: {len(memory.records())} records in memory; {lost} of {pages} pages of a file lost")
    if cell.kernel.patched:
        assert not memory.records() and not lost
    else:
        assert memory.records() and lost


@pytest.mark.parametrize("flags", [0, NO_CMA], ids=["in.place", "copied"])
@pytest.mark.cells(CMA, on_base(CMA))
def test_a_load_that_is_refused_changes_nothing(cell: Cell, stopped: Machine, flags: int, tmp_path: Path) -> None:
    """What is loaded is given as much as it has room for, however much there was room for in what was refused."""
    segment = load_measured(stopped, flags)
    grow(stopped)
    load_refused(stopped)
    before, since = measurements(stopped), len(stopped.log())
    if flags and not cell.kernel.patched:
        with pytest.raises(GuestFailure):
            stopped.exec()
        said = stopped.log()[since:]
        assert "Unable to handle kernel paging request" in said and "ima_update_kexec_buffer" in said
        return
    memory = leave(stopped, tmp_path)
    outside = [at for at in memory.records() if at not in segment]
    behind = [at for at in outside if at in range(segment.stop, segment.stop + GROWTH * 200)]
    stopped.report(f"   {cell.name}: the segment is {segment.start:#x}-{segment.stop:#x}; {len(behind)} records right "
                   f"behind it, {len(outside)} outside")
    if not cell.kernel.patched:
        assert len(behind) > GROWTH // 2
        return
    if not flags:
        _, _, _, size, records = HEADER.unpack_from(memory.at(segment))
        assert size <= len(segment) and records < len(before)
        assert not outside
    assert 1 < arrive(stopped, before, since) < len(before)

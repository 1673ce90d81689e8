"""What cannot be executed is refused when it is loaded, and costs nothing."""

from __future__ import annotations

import pytest

from lab import qemu
from lab.cells import CELLS, Cell
from lab.handover import load, reserved_pages, verify
from lab.kload import Segment, kload
from lab.machine import Machine

pytestmark = pytest.mark.badload

MIB = 1 << 20
UART, GIC = 0x09000000, 0x08000000
AARCH64, PPC64 = 183 << 16, 21 << 16
NOMAP = "EACCES"
HOLES = [cell for cell in CELLS.values() if cell.holes]

Request = tuple[str, list[Segment], int | None]  # errno, segments, flags


def requests(cell: Cell) -> dict[str, Request]:
    """What is asked for, and what has to be answered."""
    page = cell.kernel.pages * 1024
    ram, end = qemu.RAM_BASE, qemu.RAM_BASE + cell.memory * MIB
    good = ram + cell.memory * MIB // 4
    holes = qemu.holes(cell.memory)

    def at(mem: int, memsz: int = page, contents: str = "fill 0x5a 4096") -> list[Segment]:
        return [Segment(mem, memsz, contents)]

    wanted: dict[str, Request] = {
        "the GIC": ("EADDRNOTAVAIL", at(GIC), None),
        "the UART": ("EADDRNOTAVAIL", at(UART), None),
        "address 0": ("EADDRNOTAVAIL", at(0), None),
        "just below RAM": ("EADDRNOTAVAIL", at(ram - page), None),
        "across the start of RAM": ("EADDRNOTAVAIL", at(ram - page, 2 * page), None),
        "just above RAM": ("EADDRNOTAVAIL", at(end), None),
        "across the end of RAM": ("EADDRNOTAVAIL", at(end - page, 2 * page), None),
        "far above RAM": ("EADDRNOTAVAIL", at(end + (64 << 30)), None),
        "above 2^48": ("EADDRNOTAVAIL", at(1 << 50), None),
        "the linear map's virtual address": ("EADDRNOTAVAIL", at(0xFFFF000000000000), None),
        "the last page there could be": ("EADDRNOTAVAIL", at((1 << 64) - 2 * page), None),
        "an end that wraps around": ("EADDRNOTAVAIL", at((1 << 64) - page, 2 * page), None),
        "an address within a page": ("EADDRNOTAVAIL", at(good + 1024), None),
        "a size that is no number of pages": ("EADDRNOTAVAIL", at(good, page + 1024), None),
        "a good segment and a bad one": ("EADDRNOTAVAIL", at(good) + at(GIC), None),
        "segments that overlap": ("EINVAL", at(good, 4 * page) + at(good + 2 * page), None),
        "the same segment twice": ("EINVAL", at(good) * 2, None),
        "more contents than room": ("EINVAL", at(good, page, f"fill 1 {page + 1}"), None),
        "more segments than there may be": ("EINVAL", [s for n in range(17) for s in at(good + n * page)], None),
        "more than half of memory": ("EINVAL", at(good, cell.memory * MIB // 8 * 5, "zero"), None),
        "contents that cannot be read": ("EFAULT", at(good, 8 * MIB, f"bad {8 * MIB}"), None),
        "a flag that does not exist": ("EINVAL", at(good), AARCH64 | 0x8000),
        "another architecture": ("EINVAL", at(good), PPC64),
    }
    for start, size in holes:
        wanted[f"the hole at {start:#x}"] = (NOMAP, at(start, max(page, 65536)), None)
        wanted[f"into the hole at {start:#x}"] = (NOMAP, at(start - page, 2 * page), None)
        wanted[f"out of the hole at {start:#x}"] = (NOMAP, at(start + size - page, 2 * page), None)
        wanted[f"around the hole at {start:#x}"] = (NOMAP, at(start - 65536, size + 2 * 65536), None)
    return wanted


@pytest.mark.cells(*HOLES)
def test_refused_and_nothing_lost(cell: Cell, machine: Machine) -> None:
    """Each gets its errno, holds no page, and leaves the image alone that was loaded before."""
    load(machine, "load-nocheck")
    held = reserved_pages(machine)
    bad = requests(cell)
    wrong = {}
    for name, (errno, segments, flags) in bad.items():
        answer = kload(machine, segments, flags=flags)
        if answer != errno:
            wrong[name] = f"{answer} instead of {errno}"
        assert reserved_pages(machine) == held, f"pages were lost or freed by {name}"
        assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "1", name
    assert not wrong
    since = len(machine.log())
    verify(machine, machine.exec(), since)


@pytest.mark.cells(*HOLES)
def test_unloading_frees_everything(machine: Machine) -> None:
    before = reserved_pages(machine)
    for loader in ("load-nocheck", "file"):
        load(machine, loader)
        assert reserved_pages(machine) > before
        machine.sh("kexec -u")
        assert reserved_pages(machine) == before
        assert machine.run("kexec -e").rc != 0

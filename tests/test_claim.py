"""kexec_file_load() claims the memory that it loads into; then there is nothing to move."""

from __future__ import annotations

import pytest

from lab import module
from lab.cells import CELLS, DEFAULT
from lab.handover import Loaded, load, load_by_call, lost_memory, reserved_pages, verify
from lab.kload import MIB, NO_CMA
from lab.machine import Machine

pytestmark = [pytest.mark.handover, pytest.mark.needs("cma-segments")]

# With 64K pages the page allocator gives away no less than what is in 512 MiB that are movable as a whole.
LARGE = CELLS["64k-va52-nvhe"]
IDLE = [LARGE, *(CELLS[name] for name in ("4k-va48-vhe", "4k-va48-nvhe", "4k-va48-el1", "16k-va47-nvhe", "16k-va52-vhe"))]
REPETITIONS = 50  # a page that each of them loses is more than what free memory varies by
ROUNDS = 6


def leave(m: Machine) -> None:
    since = len(m.log())
    verify(m, m.exec(), since)


@pytest.mark.cells(*IDLE)
def test_nothing_is_moved(machine: Machine) -> None:
    """On an idle machine all of an image is where it is to be, in each kernel."""
    for _ in range(2):
        loaded = load(machine, "file")
        assert loaded.bytes_to_move == 0 and loaded.bytes_in_place == loaded.size
        leave(machine)


@pytest.mark.cells(DEFAULT)
def test_large(machine: Machine) -> None:
    """64 MiB beside the kernel; it is only loaded."""
    machine.sh(f"fetch; head -c {64 * MIB} /dev/urandom >/next/initrd", timeout=300)
    loaded = load(machine, "file")
    assert loaded.bytes_to_move == 0 and loaded.bytes_in_place == loaded.size > 64 * MIB


@pytest.mark.cells(DEFAULT, LARGE)
def test_only_where_it_may(machine: Machine) -> None:
    """Whoever rules out CMA rules this out."""
    loaded = load_by_call(machine, NO_CMA)
    assert loaded.bytes_to_move and loaded.bytes_in_place != loaded.size
    leave(machine)


@pytest.mark.parametrize("how", ["hold", "fragment"])
@pytest.mark.cells(CELLS["4k-va48-nvhe"], CELLS["16k-va47-nvhe"])
def test_under_pressure(machine: Machine, how: str) -> None:
    """What a process has is moved out of the way, if there is somewhere else; the image arrives in any case."""
    for part in (4, 2):
        loaded = load_by_call(machine, further=[f"{how} {machine.boot.cell.memory * MIB // part:#x}"])
        machine.report(f"   {machine.boot.cell.name}: {how} 1/{part} of memory: {loaded.bytes_to_move} of "
                       f"{loaded.size} bytes to move")
        if part == 4:
            assert loaded.bytes_to_move == 0
        leave(machine)


def litter(m: Machine) -> Loaded:
    """Load with a page that can't be moved in each MiB of memory."""
    module.put(m)
    m.run(module.insert(f"how=litter ranges=0,{MIB:#x}"))
    return load(m, "file")


@pytest.mark.cells(CELLS["4k-va48-nvhe"], CELLS["64k-va52-el1"])
def test_copied_where_nothing_can_be_had(machine: Machine) -> None:
    """No range is free of pages that are here to stay: the image is copied, and arrives."""
    loaded = litter(machine)
    kernel = max(size for _, size in loaded.segments)
    assert loaded.bytes_to_move and loaded.bytes_to_move >= kernel
    leave(machine)


@pytest.mark.cells(DEFAULT, LARGE)
def test_unloading_gives_it_back(machine: Machine) -> None:
    """All of it, each time."""
    load(machine, "file")
    machine.sh("kexec -u")
    held, limit = reserved_pages(machine), REPETITIONS * machine.boot.cell.kernel.pages
    work = (f"for n in $(seq {REPETITIONS}); do "
            "kexec -s -l /next/Image --initrd=/next/initrd --reuse-cmdline && kexec -u || exit; done")
    lost = lost_memory(machine, lambda: machine.sh(work, timeout=300), limit, ROUNDS)
    machine.report(f"   loaded and unloaded {REPETITIONS} times each: {lost} KiB are lost")
    assert lost[-1] < limit
    assert reserved_pages(machine) == held

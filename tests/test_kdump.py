"""A kernel that crashes leaves a dump, and what it holds is what there was."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from conftest import Lab
from lab import kdump, module, qemu
from lab.cells import CELLS, Cell, core_only, each_with, on_base
from lab.handover import load, log_since, lost_memory, reserved_pages, verify
from lab.kdump import CRASHES, LOADERS, MIB, crash_and_verify, ranges_of
from lab.kload import Segment, kload
from lab.machine import Machine

pytestmark = pytest.mark.kdump

PLAIN = [f"{kernel}-{el}" for kernel in ("4k-va48", "64k-va52", "16k-va47") for el in ("vhe", "nvhe", "el1")]


def cases() -> dict[Cell, tuple[str, str]]:
    """Every crash, loader and machine; in a plain check each crash once, each loader and machine at least once."""
    found = {}
    kinds = list(product(CRASHES, LOADERS))
    for place, name in enumerate(PLAIN):
        for number, (crash, loader) in enumerate(kinds):
            cell = kdump.machine_for(CELLS[name])
            core = CELLS[name].core and (number - 2 * place - place // 3) % len(kinds) == 0
            found[replace(cell, name=f"{cell.name}-{crash}-{loader}", core=core)] = (crash, loader)
    return found


CASES = cases()
ON = kdump.machine_for(CELLS["4k-va48-vhe"])
ON_64K = kdump.machine_for(CELLS["64k-va52-el1"])
# Machines that are written to, and who loads; in a plain check each machine and each loader.
WRITTEN = each_with((ON, ON_64K), LOADERS, lambda cell, loader: (cell is ON) == (loader == "load"))
BLOCKS = replace(kdump.machine_for(CELLS["4k-va48-nvhe"], rodata="noalias"), name="4k-va48-nvhe-kdump-blocks")
BASE = on_base(ON)


@pytest.mark.cells(*CASES)
def test_dump(cell: Cell, lab: Lab, tmp_path: Path) -> None:
    """The crash kernel comes up; the dump has all memory, what it held, and the registers."""
    crash, loader = CASES[cell]
    assert lab.guest
    done = kdump.demonstrate(cell, lab.kernels[cell.kernel], lab.guest, crash, loader, lab.accel, lab.report)
    lab.report(f"   {cell.name}: {done}")


# Protection

def stray_writes(m: Machine, loader: str) -> tuple[int, int]:
    """Pages of a loaded crash kernel that something writes to, and how many of these writes fault."""
    module.put(m)
    loaded = kdump.load_crash_kernel(m, loader)
    return module.touch(m, "write", list(loaded.segments))


@pytest.mark.needs("arm64")
@pytest.mark.cells(*WRITTEN)
def test_stray_writes_fault(cell: Cell, machine: Machine) -> None:
    """None lands, and the crash kernel is what it was."""
    pages, faults = stray_writes(machine, WRITTEN[cell])
    machine.report(f"   {machine.boot.cell.name}: {faults} of {pages} stray writes fault")
    assert pages > 0 and faults == pages
    crash_and_verify(machine)


@pytest.mark.needs("arm64")
@pytest.mark.cells(ON)
def test_a_stray_store_is_an_oops(machine: Machine) -> None:
    """What makes the system crash is reported as what it is, and what it aimed at is unharmed."""
    module.put(machine)
    loaded = kdump.load_crash_kernel(machine, "file")
    machine.sh("echo 1 >/proc/sys/kernel/panic_on_oops")
    start, _ = loaded.segments[0]
    crash_and_verify(machine, module.insert(f"how=store ranges={start:#x},1"))
    assert "Unable to handle kernel paging request" in machine.log()


@pytest.mark.cells(BASE)
def test_stray_writes_land_on_mainline(machine: Machine) -> None:
    """The peer, under the same conditions: every write lands."""
    pages, faults = stray_writes(machine, "load")  # kexec-tools tells where
    machine.report(f"   {machine.boot.cell.name}: {faults} of {pages} stray writes fault")
    assert pages > 0 and faults == 0


@pytest.mark.needs("arm64")
@pytest.mark.cells(BLOCKS)
def test_a_map_of_blocks_is_left_alone(machine: Machine) -> None:
    """Where the linear map cannot be changed one line says so, once, and the rest works."""
    for _ in range(2):
        pages, faults = stray_writes(machine, "file")
        assert pages > 0 and faults == 0
    assert machine.log().count("the loaded crash kernel is not protected") == 1
    kdump.load_crash_kernel(machine, "file")
    crash_and_verify(machine)


@pytest.mark.needs("arm64")
@pytest.mark.cells(*core_only((ON, ON_64K), "4k-va48-vhe"))
def test_life_of_the_protection(machine: Machine) -> None:
    """Loaded, loaded again and unloaded, a hundred times: all of the reservation is readable, nothing is lost."""
    module.put(machine)
    reservation = ranges_of(machine.sh("cat /proc/iomem"), "Crash kernel")
    whole = [(start, end - start) for start, end in reservation]
    kdump.load_crash_kernel(machine, "load")
    held = reserved_pages(machine)
    machine.sh("kexec -p -u")
    pages, faults = module.touch(machine, "read", whole)
    assert pages == sum(size for _, size in whole) // (machine.boot.cell.kernel.pages * 1024) and faults == 0
    page = machine.boot.cell.kernel.pages * 1024
    start = reservation[0][0]
    request = "\\n".join([f"segment {start + 2 * MIB:#x} {64 * page:#x} fill 0x5a 100",
                          f"segment {start + 16 * MIB:#x} {page:#x} zero",
                          f"entry {start + 2 * MIB:#x}", f"flags {0xb70001:#x}"])
    work = (f"for n in $(seq 100); do printf '{request}\\n' | kload || exit; "
            f"printf '{request}\\n' | kload || exit; kexec -p -u || exit; done")
    limit = 100 * machine.boot.cell.kernel.pages
    lost = lost_memory(machine, lambda: machine.sh(work, timeout=300), limit, 3)
    machine.report(f"   loaded, again, and unloaded 100 times each: {lost} KiB are lost")
    assert lost[-1] < limit
    for load_again in range(2):
        pages, faults = module.touch(machine, "read", whole)
        assert faults == 0
        kdump.load_crash_kernel(machine, ("load", "file")[load_again])
        _, faults = module.touch(machine, "read", whole)
        assert faults > 0
        assert reserved_pages(machine) == held
        machine.sh("kexec -p -u")
    kdump.load_crash_kernel(machine, "file")
    crash_and_verify(machine)


@pytest.mark.needs("arm64")
@pytest.mark.cells(ON)
def test_a_failed_load_leaves_nothing_invalid(machine: Machine) -> None:
    """A crash kernel that can't be loaded takes the one before with it, as everywhere; no page stays invalid."""
    module.put(machine)
    (start, end), = ranges_of(machine.sh("cat /proc/iomem"), "Crash kernel")
    kdump.load_crash_kernel(machine, "file")
    for segments in ([Segment(end - 4096, 8192)], [Segment(start - 4096, 4096)], [Segment(qemu.RAM_BASE, 4096)]):
        assert kload(machine, segments, flags=0xB70001) == "EADDRNOTAVAIL"
    assert module.touch(machine, "read", [(start, end - start)])[1] == 0
    kdump.load_crash_kernel(machine, "file")
    crash_and_verify(machine)


# The reservation

RESERVATIONS = {
    # parameters: sizes in MiB of what has to be reserved; where, if that is given
    "crashkernel=320M": ([320], None),
    "crashkernel=320M@1280M": ([320], 1280 * MIB),
    "crashkernel=320M,high": ([320, 128], None),
    "crashkernel=320M,high crashkernel=64M,low": ([320, 64], None),
    "crashkernel=320M,high crashkernel=0M,low": ([320], None),
    "crashkernel=320M crashkernel=64M,cma": ([320], None),
    "crashkernel=0-1G:64M,1G-:352M": ([352], None),
}
PLACES = {replace(kdump.machine_for(CELLS["4k-va48-vhe"], reserve, memory=6144, kaslr=False),
                  name=f"4k-va48-vhe-{re.sub('[^0-9A-Za-z]+', '-', reserve)}"): expected
          for reserve, expected in RESERVATIONS.items()}


@pytest.mark.cells(*PLACES)
def test_reservation(cell: Cell, machine: Machine) -> None:
    """Where mainline makes it, it is made; what is loaded there comes up; and it can be made smaller."""
    sizes, place = PLACES[cell]
    found = ranges_of(machine.sh("cat /proc/iomem"), "Crash kernel")
    assert sorted((end - start) // MIB for start, end in found) == sorted(sizes)
    if place is not None:
        assert found[0][0] == place
    if ",high" in cell.append[-1]:
        assert max(found)[0] >= 4 << 30
    total = sum(sizes) * MIB
    assert int(machine.sh("cat /sys/kernel/kexec_crash_size")) == total
    kdump.load_crash_kernel(machine, "file")
    assert machine.run(f"echo {total - 32 * MIB} >/sys/kernel/kexec_crash_size").rc != 0  # not while it is loaded
    machine.sh("kexec -p -u")
    machine.sh(f"echo {total - 32 * MIB} >/sys/kernel/kexec_crash_size")
    left = ranges_of(machine.sh("cat /proc/iomem"), "Crash kernel")
    assert sum(end - start for start, end in left) == total - 32 * MIB
    kdump.load_crash_kernel(machine, "file")
    crash_and_verify(machine)


@pytest.mark.needs("arm64")
@pytest.mark.cells(ON)
def test_over_the_reservation(machine: Machine) -> None:
    """An image may be sent to where the crash kernel waits: that one goes with the rest of the system."""
    since = len(machine.log())
    kdump.load_crash_kernel(machine, "file")
    (start, end), = ranges_of(machine.sh("cat /proc/iomem"), "Crash kernel")
    machine.sh("echo lab: over >/dev/kmsg")
    loaded = load(machine, "load-nocheck", f"--mem-min={start:#x} --mem-max={end - 1:#x}")
    assert all(start <= mem and mem + size <= end for mem, size in loaded.segments), \
        log_since(machine, "lab: over")
    verify(machine, machine.exec(), since)

"""A machine that UEFI firmware boots, with ACPI tables instead of a device tree."""

from __future__ import annotations

import re
from typing import Iterator

import pytest

from conftest import Lab
from lab import hibernate, kdump
from lab.cells import CELLS, Cell
from lab.faults import BEYOND, LIMIT, differences
from lab.handover import handover
from lab.kdump import crash_and_verify
from lab.machine import BOOTING, Machine
from lab.stage import Stage

pytestmark = pytest.mark.neighbours

EFI = tuple(CELLS[f"4k-va48-efi-{el}"] for el in ("vhe", "nvhe", "el1"))
KDUMP = tuple(kdump.machine_for(cell, kaslr=False) for cell in EFI[:2])
HIBERNATE = tuple(hibernate.machine_for(cell, kaslr=False, cpus=2) for cell in EFI[:2])


def firmware(m: Machine) -> None:
    """ACPI it is, and EFI, with the console that SPCR names."""
    m.sh("[ -e /sys/firmware/efi/systab ] && [ -e /sys/firmware/acpi/tables/SPCR ] && ! [ -e /proc/device-tree/cpus ]")
    assert "ACPI: SPCR: console: pl011" in m.sh("dmesg")


@pytest.mark.cells(*EFI)
def test_handover(machine: Machine) -> None:
    """By both system calls, one after the other; the LPI tables go along by way of EFI."""
    firmware(machine)
    table = re.search(r"LPI property table @(\w+)", machine.sh("dmesg"))
    assert table
    for loader in ("load-nocheck", "file", "file", "load-nocheck"):
        handover(machine, loader)
        firmware(machine)
        own = machine.log().rpartition(BOOTING)[2]
        assert "Using preallocated redistributor tables" in own and table[0] in own
        assert machine.sh("cat /proc/sys/kernel/tainted").strip() == "0"


@pytest.mark.parametrize("loader", ["load", "file"])
@pytest.mark.cells(*KDUMP)
def test_kdump(machine: Machine, loader: str) -> None:
    """A crash kernel comes up, and has the firmware's tables."""
    kdump.load_crash_kernel(machine, loader)
    crash_and_verify(machine)
    firmware(machine)


@pytest.mark.cells(*HIBERNATE)
def test_hibernate(cell: Cell, lab: Lab) -> None:
    """Half of memory is what it was."""
    assert lab.guest
    with hibernate.machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel, name=f"efi.{cell.name}",
                           report=lab.report) as m:
        firmware(m)
        for number in (1, 2):
            hibernate.fill(m, number)
            hibernate.cycle(m, number, number)


@pytest.fixture
def stage(cell: Cell, lab: Lab) -> Iterator[Stage]:
    assert lab.guest
    with Stage(cell, lab.kernels[cell.kernel], lab.guest, name=f"efi.faults.{cell.name}", report=lab.report) as s:
        yield s


@pytest.mark.needs("arm64")
@pytest.mark.cells(*EFI)
def test_a_fault_is_reported(stage: Stage) -> None:
    """On the UART that SPCR names; and the reset goes through the PSCI that the FADT tells about."""
    fault = next(fault for fault in BEYOND if fault.name == "text-undefined")
    for panic in (0, 1):
        scene = stage.scene(fault, panic)
        expected = fault.inject(scene)
        outcome = stage.watch(scene, LIMIT + 1)
        assert not differences(expected, outcome, panic), outcome.text[:600]

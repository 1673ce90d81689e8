"""Handovers of special kinds: onto the running kernel, many in a row, of something broken."""

from __future__ import annotations

import pytest

from lab.cells import CELLS, DEFAULT
from lab.handover import BadHandover, handover, load, verify
from lab.kload import load_over_running_kernel
from lab.machine import Machine

pytestmark = pytest.mark.handover

COVERED = ("4k-va48-vhe", "4k-va48-nvhe", "4k-va48-el1", "64k-va52-vhe", "64k-va52-nvhe", "64k-va52-el1")


@pytest.mark.needs("arm64")
@pytest.mark.cells(*(CELLS[name] for name in COVERED))
def test_onto_the_running_kernel(machine: Machine, request: pytest.FixtureRequest) -> None:
    """Every page that the running kernel uses is overwritten: text, data, page tables, stacks."""
    for _ in range(2 if request.config.getoption("--all") else 1):
        segments = load_over_running_kernel(machine)
        machine.report(f"   {sum(s.memsz for s in segments) >> 20} MiB in {len(segments)} segments")
        since = len(machine.log())
        verify(machine, machine.exec(by_init=True), since)


@pytest.mark.parametrize("loader", ["file", pytest.param("load-nocheck", marks=pytest.mark.long)])
@pytest.mark.cells(DEFAULT)
def test_ten_in_a_row(machine: Machine, loader: str) -> None:
    """Each kernel loads the next, and memory does not dwindle.

    By one loader throughout: the device tree that kexec_file_load() makes
    reserves the initrd, and kexec-tools passes that on for ever.
    """
    free = {}
    for _ in range(10):
        since = len(machine.log())
        load(machine, loader)
        hello = machine.exec()
        verify(machine, hello, since)
        free[hello.generation] = hello.mem_free
    machine.report(f"   MemFree in KiB: {free}")
    assert free[10] == pytest.approx(free[2], rel=0.01)


@pytest.mark.cells(DEFAULT)
def test_one_changed_bit_is_noticed(machine: Machine) -> None:
    """The laboratory itself: a payload with one byte changed is not a success."""
    at = machine.guest.next.stat().st_size - machine.guest.size // 2
    machine.sh(f"fetch && printf x | dd of=/next/initrd bs=1 seek={at} conv=notrunc")
    with pytest.raises(BadHandover, match="payload"):
        handover(machine, "file")

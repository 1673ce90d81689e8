"""What goes wrong on the way to the next kernel is refused, or reported and over within seconds."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Callable, Iterator

import pytest

from conftest import LAB, Lab
from lab import qemu
from lab.cells import BENCHED, CELLS, Cell, core_only
from lab.crc import crc32c
from lab.downtime import measure
from lab.faults import (BEYOND, CALL, CALL_LIST, IN_PLACE, LIMIT, MACHINES, NOTHING, REFUSAL, REPORT, SERROR, SLOTS,
                        UDF, CutShort, Fault, Taken, at_slot, become_realm, differences, differences_corrupt,
                        serror_in_kernel, serror_of, written_to_16550)
from lab.handover import handover
from lab.kload import Segment, kload
from lab.stage import PAGE, PARK, Scene, Stage

pytestmark = [pytest.mark.faults, pytest.mark.needs("arm64")]

PL011 = 0x09000000  # where QEMU has it
SPOILT = "kexec: the image was overwritten while the system was shut down"

on_every_machine = pytest.mark.cells(*(CELLS[name] for name in MACHINES))


def names(faults: list[Fault]) -> dict[str, object]:
    return {"argvalues": faults, "ids": [fault.name for fault in faults]}


@pytest.fixture(scope="module")
def stages(request: pytest.FixtureRequest) -> Iterator[Callable[[Cell], Stage]]:
    """One machine per cell, for all tests that can put it back to where they want it."""
    lab: Lab = request.config.stash[LAB]
    running: dict[str, Stage] = {}
    with ExitStack() as stack:
        def stage(cell: Cell) -> Stage:
            if cell.name not in running:
                running[cell.name] = stack.enter_context(new_stage(lab, cell))
            return running[cell.name]

        yield stage


def new_stage(lab: Lab, cell: Cell, **options: str) -> Stage:
    assert lab.guest
    return Stage(cell, lab.kernels[cell.kernel], lab.guest, report=lab.report, **options)


# Before the point of no return

def refused(stage: Stage, fault: Fault) -> Scene:
    """A fault before the reboot call makes it fail with EIO, and the log names the segment."""
    scene = stage.at_call()
    expected = fault.inject(scene)
    answer = stage.answer()
    assert answer is not None, "kexec -e does not return"
    rc, said = answer
    assert rc != 0 and "Input/output error" in said
    *_, match = REFUSAL.finditer(stage.machine.sh("dmesg"))
    assert not differences_corrupt(expected, match)
    return scene


@on_every_machine
def test_refused(cell: Cell, lab: Lab) -> None:
    """A loaded page was overwritten: the call fails, the system stays up, and once reloaded it goes."""
    with new_stage(lab, cell, name=f"faults.refused.{cell.name}") as stage:
        for fault in CALL:
            refused(stage, fault)
            stage.reload()
        handover(stage.machine, "load-nocheck")


@on_every_machine
def test_refused_list(cell: Cell, lab: Lab) -> None:
    """The same for the list. It is mended before it is used to free the pages it names."""
    with new_stage(lab, cell, name=f"faults.refused-list.{cell.name}") as stage:
        for fault in CALL_LIST:
            scene = refused(stage, fault)
            stage.gdb.interrupt()
            for entry in (scene.middle, scene.destination(1), scene.destination(2)):
                scene.put(entry.at, entry.value)
            stage.gdb.resume()
            stage.reload()
        handover(stage.machine, "load-nocheck")


@pytest.mark.needs("cma-segments")
@pytest.mark.cells(CELLS["4k-va48-vhe-cma"])
def test_refused_in_place(cell: Cell, lab: Lab) -> None:
    """The same for an image that kexec_file_load() put where it is executed."""
    with new_stage(lab, cell, loader="file", name=f"faults.refused.{cell.name}") as stage:
        assert stage.loaded.bytes_to_move == 0
        refused(stage, IN_PLACE)
        handover(stage.machine, "file")


@pytest.mark.needs("claim")
@on_every_machine
def test_panics_in_place(cell: Cell, lab: Lab) -> None:
    """What spoils such an image while the system is shut down ends in a panic, and in what panic= says."""
    with new_stage(lab, cell, loader="file", name=f"faults.in-place.{cell.name}") as stage:
        assert stage.loaded.bytes_to_move == 0
        for panic in (0, 1):
            scene = stage.at_end(panic)
            expected = IN_PLACE.inject(scene)
            outcome = stage.watch(scene, LIMIT / 2)
            assert not differences_corrupt(expected, REFUSAL.search(outcome.text)), outcome.text[:600]
            assert f"Kernel panic - not syncing: {SPOILT}" in outcome.text
            assert not outcome.hello and outcome.reset == (panic != 0)

        outcome = stage.watch(stage.at_end(0), 180)  # the flipped bit was all that was in its way
        assert outcome.hello and outcome.hello["payload"] == stage.machine.guest.payload


@pytest.mark.needs("claim", "timing")
@pytest.mark.cells(CELLS["4k-va48-nvhe-a57"])
def test_serror_in_place(cell: Cell, lab: Lab) -> None:
    """An SError that waits while such an image is about to be entered is this kernel's, which reports it."""
    with new_stage(lab, cell, loader="file", name=f"faults.in-place-serror.{cell.name}") as stage:
        assert stage.loaded.bytes_to_move == 0
        for panic in (0, 1):
            scene = stage.at_end(panic)
            serror_in_kernel(scene, "kexec_timing_leave")
            outcome = stage.watch(scene, LIMIT / 2)
            assert "Kernel panic - not syncing: Asynchronous SError Interrupt" in outcome.text, outcome.text[:600]
            assert not outcome.hello and outcome.reset == (panic != 0)


@on_every_machine
def test_crc_of_the_last_segment(cell: Cell, stages: Callable[[Cell], Stage]) -> None:
    """The CRC32C in the control page is that of the pages that were loaded."""
    scene = stages(cell).at_entry(0)
    last = scene.last.segment
    pages = [e.address for e in scene.entries if e.segment == last][1:]
    assert crc32c(b"".join(scene.gdb.read(page, PAGE) for page in pages)) == scene.crc(last)


# Beyond it

def check(stage: Stage, fault: Fault, panic: int) -> None:
    scene = stage.scene(fault, panic)
    expected = fault.inject(scene)
    outcome = stage.watch(scene, LIMIT + 1)
    wrong = differences(expected, outcome, panic)
    assert not wrong, f"{fault.what}:\n{outcome.text[:600]}"


@pytest.mark.parametrize("panic", (0, 1))
@pytest.mark.parametrize("fault", **names([f for f in BEYOND if len(f.els) == 3]))
@on_every_machine
def test_reported(cell: Cell, fault: Fault, panic: int, stages: Callable[[Cell], Stage]) -> None:
    """Reported, and then the machine parks or is reset, as panic_timeout says."""
    check(stages(cell), fault, panic)


@pytest.mark.parametrize("panic", (0, 1))
@pytest.mark.parametrize("fault", **names([f for f in BEYOND if "vhe" not in f.els]))
@pytest.mark.cells(CELLS["4k-va48-nvhe-a57"])
def test_reported_nvhe(cell: Cell, fault: Fault, panic: int, stages: Callable[[Cell], Stage]) -> None:
    """What only a kernel at EL1 with EL2 below it can meet."""
    check(stages(cell), fault, panic)


@pytest.mark.parametrize("panic", (0, 1))
@pytest.mark.parametrize("fault", **names([f for f in BEYOND if f.els == ("nvhe", "vhe")]))
@pytest.mark.cells(CELLS["4k-va48-nvhe-a57"], CELLS["4k-va48-vhe"])
def test_reported_el2(cell: Cell, fault: Fault, panic: int, stages: Callable[[Cell], Stage]) -> None:
    """What only a machine with EL2 can meet."""
    check(stages(cell), fault, panic)


@pytest.mark.parametrize("slot", SLOTS)
@on_every_machine
def test_every_vector_names_itself(cell: Cell, slot: str, stages: Callable[[Cell], Stage]) -> None:
    """A CPU that comes to a slot reports its name and parks there."""
    if slot == "lower sync" and cell.el != "vhe":
        slot = "spx sync"  # at EL1 it must not look at EL2's registers: that is another exception
    check(stages(cell), at_slot(slot), 0)


SEVERITIES = {"uncontainable": (0, False), "unrecoverable": (1, False), "restartable": (2, True),
              "recoverable": (3, False), "corrected": (6, True)}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.cells(CELLS["4k-va48-nvhe"])
def test_serrors_of_all_severities(cell: Cell, severity: str, stages: Callable[[Cell], Stage]) -> None:
    """Those that the kernel would go on after do no harm here either."""
    aet, goes_on = SEVERITIES[severity]
    scene = stages(cell).at_entry(0)
    back = serror_of(scene, aet)
    outcome = scene.stage.watch(scene, LIMIT)
    if goes_on:
        assert outcome.parked and outcome.pc == scene.control + back, outcome.text
        assert not REPORT.search(outcome.text)
    else:
        assert not differences(Taken("spx serror", SERROR), outcome, 0), outcome.text


UARTS = [replace(CELLS["4k-va48-vhe"], name=f"4k-va48-vhe-16550-{shift}-{width}", uart=(shift, width))
         for shift, width in ((0, 1), (1, 2), (2, 4))]  # in a plain check the widest


@pytest.mark.cells(*core_only(UARTS, "4k-va48-vhe-16550-2-4"))
def test_reported_on_a_16550(cell: Cell, stages: Callable[[Cell], Stage]) -> None:
    """Registers are as far apart and as wide as the device tree says; and it has to have room."""
    stage = stages(cell)
    assert cell.uart
    scene = stage.at_entry(0)
    scene.patch(scene.next, UDF)
    text, first = written_to_16550(scene, ready=True)
    assert REPORT.search(text), text
    assert first == b"\r".ljust(cell.uart[1], b"\0")

    scene = stage.at_entry(0)
    scene.patch(scene.next, UDF)
    assert written_to_16550(scene, ready=False) == ("", b"")
    assert scene.word(scene.gdb.register("pc"), 4) == PARK


@pytest.mark.cells(*core_only([replace(one, name=f"{one.name}-unused") for one in UARTS], "4k-va48-vhe-16550-2-4"))
def test_no_report_on_another_uart(cell: Cell, lab: Lab) -> None:
    """A console elsewhere does not make the UART that firmware names one that may be written to."""
    with new_stage(lab, cell, name=f"faults.unused-uart.{cell.name}") as stage:
        stage.machine.sh("echo N >/sys/class/tty/ttyS0/console")
        scene = stage.at_entry(0)
        scene.patch(scene.next, UDF)
        assert written_to_16550(scene, ready=True) == ("", b"")


@on_every_machine
def test_no_report_without_a_console(cell: Cell, lab: Lab) -> None:
    """A UART that no console uses may have no clock: it is left alone, and the machine resets all the same."""
    with new_stage(lab, cell, name=f"faults.no-console.{cell.name}") as stage:
        stage.machine.sh("echo N >/sys/class/tty/ttyAMA0/console")
        for panic in (0, 1):
            scene = stage.at_entry(panic)
            assert scene.argument_of("UART", 8) == 0
            scene.patch(scene.next, UDF)
            assert not differences(CutShort("spx sync", NOTHING), stage.watch(scene, LIMIT + 1), panic)


@pytest.mark.parametrize("protected", (False, True))
@on_every_machine
def test_uart_of_a_realm(cell: Cell, protected: bool, stages: Callable[[Cell], Stage]) -> None:
    """In a Realm a UART that the host emulates is written to at its shared address, one that was assigned is not."""
    uart = stages(cell).at_entry(0).argument_of("UART", 8)
    scene = stages(cell).at_entry(0, lambda scene: become_realm(scene, 39, protected))
    assert uart == PL011 and scene.argument_of("UART", 8) == uart | (0 if protected else 1 << 39)


@on_every_machine
def test_without_a_fault(cell: Cell, stages: Callable[[Cell], Stage]) -> None:
    """All that is in the way of the next kernel here is the fault."""
    stage = stages(cell)
    outcome = stage.watch(stage.copying(0), 180)
    assert outcome.hello and outcome.hello["payload"] == stage.machine.guest.payload


# What verification costs

@pytest.mark.cells(CELLS["4k-va48-vhe"])
def test_cost_before_shutdown(cell: Cell, lab: Lab) -> None:
    """The check of an image takes a time that grows with its size, and not much else."""
    with new_stage(lab, cell, name=f"faults.cost.{cell.name}") as stage:
        seconds = {mib: seconds_to_check(stage, mib) for mib in (16, 64, 256)}
        per_mib = (seconds[256] - seconds[64]) / 192
        stage.machine.report(f"   check before shutdown, emulated: {per_mib * 1e3:.2f} ms per MiB, "
                             + ", ".join(f"{mib} MiB in {took * 1e3:.0f} ms" for mib, took in seconds.items()))
    assert per_mib < 0.01


@pytest.mark.cells(BENCHED)
def test_cost_after_shutdown(cell: Cell, lab: Lab) -> None:
    """The check of what is in place executes a quarter of an instruction per byte: CRC32C, and little else."""
    assert lab.guest
    built, took = lab.kernels[cell.kernel], {}
    for copied in (False, True):  # the latter has nothing in place that would be checked
        one = measure("", built, lab.guest, copied)
        assert one.said
        took[copied] = one.said.shutdown_ms - one.shutdown  # from machine_kexec() to the end of shutdown
    size = one.said.copied_mib
    ms = took[False] - took[True]
    lab.report(f"   check after shutdown: {ms:.1f} ms for {size} MiB, at one instruction per nanosecond")
    assert 0.2 < ms / size < 0.4


def seconds_to_check(stage: Stage, mib: int) -> float:
    """How long an image of that size takes to be checked, and refused."""
    memory = Segment(qemu.RAM_BASE + (1 << 30), mib << 20, f"fill 0x5a {mib << 20}")
    assert kload(stage.machine, [memory]) == "0"
    scene = stage.at_call()
    scene.flip(scene.last, 0, 0)
    seconds = stage.seconds_in("machine_kexec_verify")
    answer = stage.answer()
    assert answer and answer[0] != 0
    return seconds

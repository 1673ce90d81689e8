"""All CPUs but one leave the kernel that is to be overwritten, at once, or nothing is overwritten."""

from __future__ import annotations

import re
import struct
import time
from dataclasses import replace
from typing import Callable

import pytest

from conftest import Lab
from lab import fuzz, kdump, module
from lab.cells import CELLS, Cell, core_only
from lab.fuzz import Arena
from lab.handover import handover, load, log_since, verify
from lab.machine import Machine
from lab.stage import Stage

pytestmark = pytest.mark.cpus

LEVELS = ("el1", "nvhe", "vhe")
FEW = [replace(CELLS[f"4k-va48-{el}"], name=f"4k-va48-{el}-4", cpus=4, memory=2048, core=el == "nvhe") for el in LEVELS]
MANY = [replace(CELLS[f"4k-va48-{el}"], name=f"4k-va48-{el}-{cpus}", cpus=cpus, memory=2048,
                core=(el, cpus) == ("vhe", 32)) for el in LEVELS for cpus in (32, 64)]
NMI = replace(FEW[1], name="4k-va48-nvhe-nmi", core=False, append=(*FEW[1].append, "irqchip.gicv3_pseudo_nmi=1"))
STAGED = core_only([CELLS["4k-va48-nvhe"], CELLS["4k-va48-vhe"], CELLS["4k-va48-el1-a72"]], "4k-va48-vhe")
SYSFS = "/sys/devices/system/cpu"
OPERATIONS = ("get_version", "cpu_suspend", "cpu_off", "cpu_on", "migrate", "affinity_info")  # of psci_ops, in order
NOTHING = "cpu_psci_cpu_disable"  # returns 0: success, and ON
BRANCH_TO_SELF = (0x14000000).to_bytes(4, "little")
DAIF = 0x3C0  # in PSTATE
PATIENCE = 60.0  # seconds, for what a kernel bounds by eleven of its own


def online(m: Machine) -> int:
    return int(m.sh(f"cat {SYSFS}/cpu[0-9]*/online | grep -c 1"))


def cpus_ms(m: Machine, loader: str = "file") -> float:
    """Hand over; how long it took until all CPUs but one were off."""
    done = handover(m, loader)
    assert done.timing
    return done.timing.cpus_ms


@pytest.mark.cells(*MANY)
def test_many(machine: Machine) -> None:
    """They all leave, by both calls and whether or not anything is moved, and come up again."""
    cell = machine.boot.cell
    assert online(machine) == cell.cpus
    took = cpus_ms(machine)
    machine.report(f"   {cell.name}: CPUs left in {took:.1f} ms")
    handover(machine, "load-nocheck")
    assert online(machine) == cell.cpus


@pytest.mark.long
@pytest.mark.cells(*MANY[::2])
def test_ten_in_a_row(machine: Machine) -> None:
    for number in range(10):
        handover(machine, ("file", "load-nocheck")[number % 2])
        assert online(machine) == machine.boot.cell.cpus


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.cells(*MANY)
def test_fuzzed(cell: Cell, lab: Lab) -> None:
    assert lab.guest
    with Arena(cell, lab.kernels[cell.kernel], lab.guest, name=f"fuzz.{cell.name}", report=lab.report) as arena:
        tally = fuzz.fuzz(arena, 20261128, range(200))
        assert tally.verdicts["good"] > 150


@pytest.mark.long
@pytest.mark.cells(*(kdump.machine_for(one, memory=2048) for one in MANY[::2]))
def test_dump(cell: Cell, lab: Lab) -> None:
    """The registers of each of them are in the dump."""
    assert lab.guest
    kdump.demonstrate(cell, lab.kernels[cell.kernel], lab.guest, "sysrq", "file", lab.accel, lab.report)


BUSY = "for i in $(seq 8); do while :; do :; done & done"
# What CPUs may do when kexec is called, and how many are online then
DOING = {
    "nothing": (":", 4),
    "user processes": (BUSY, 4),
    "guests": ("vms 4 >/tmp/vms 2>&1 & for i in $(seq 300); do grep -q . /tmp/vms && break; sleep 0.1; done", 4),
    "one is offline": (f"echo 0 >{SYSFS}/cpu2/online", 3),
    "another reboots": ("echo 2 >/sys/kernel/reboot/cpu", 4),
    "the boot CPU is offline": (f"echo 0 >{SYSFS}/cpu0/online", 3),
}


@pytest.mark.cells(FEW[1], *FEW[::2], NMI)
def test_whatever_they_do(machine: Machine) -> None:
    """Nobody is waited for who has no reason, and the next kernel has all of them."""
    took = {}
    for name, (script, left) in DOING.items():
        machine.sh(script)
        assert online(machine) == left, name
        took[name] = cpus_ms(machine)
        assert online(machine) == 4, name
    machine.report(f"   {machine.boot.cell.name}: CPUs left in ms: {took}")
    assert max(took.values()) < 1000


@pytest.mark.cells(replace(FEW[1], name="4k-va48-nvhe-maxcpus", append=(*FEW[1].append, "maxcpus=2")))
def test_some_never_came(machine: Machine) -> None:
    assert online(machine) == 2
    handover(machine, "file")
    assert online(machine) == 2


def provoke(m: Machine, arguments: str) -> None:
    """Have a CPU do what the module says, in the background, from now on."""
    module.put(m)
    m.sh(f"{module.insert(arguments)} >/dev/null 2>&1 &\nsleep 0.5")


@pytest.mark.cells(FEW[1])
def test_spinlock(machine: Machine) -> None:
    """No CPU leaves with a spinlock that another one waits for with interrupts off."""
    for _ in range(3):
        load(machine, "file")
        provoke(machine, "how=lock cpu=1 ranges=0,60000")
        since = len(machine.log())
        verify(machine, machine.exec(), since)
        assert "still waiting" not in machine.log()[since:]


# CPU hotplug meanwhile

TOGGLE = f"""for cpu in 1 2 3; do while :; do
  echo 0 >{SYSFS}/cpu$cpu/online; echo 1 >{SYSFS}/cpu$cpu/online; done 2>/dev/null & done; sleep 0.$((RANDOM % 9))"""


@pytest.mark.timeout(3600)
@pytest.mark.cells(FEW[1], *FEW[::2])
def test_hotplug_meanwhile(machine: Machine, request: pytest.FixtureRequest) -> None:
    """CPUs go offline and come online in a loop while kexec is called."""
    for _ in range(100 if request.config.getoption("--all") else 5):
        load(machine, "file")
        machine.sh(TOGGLE)
        since = len(machine.log())
        verify(machine, machine.exec(), since)
        assert online(machine) == 4


def leaving(cell: Cell, lab: Lab, name: str) -> Stage:
    """A machine on which everything happens while kexec leaves it."""
    assert lab.guest
    return Stage(cell, lab.kernels[cell.kernel], lab.guest, name=f"cpus.{name}.{cell.name}", loader="file", report=lab.report)


# A CPU that takes no interrupt

def hold(stage: Stage) -> Callable[[], None]:
    """Have CPU 1 spin with exceptions masked, from now on until what this returns is called."""
    gdb, at = stage.gdb, stage.symbols["panic_smp_self_stop"]
    gdb.select("2")
    pc, cpsr = gdb.register("pc"), gdb.register("cpsr")
    gdb.write(at, BRANCH_TO_SELF, virtual=True)
    gdb.set_register("pc", at)
    gdb.set_register("cpsr", cpsr | DAIF)

    def release() -> None:
        gdb.select("2")
        gdb.set_register("pc", pc)
        gdb.set_register("cpsr", cpsr)

    return release


@pytest.mark.cells(*STAGED)
def test_interrupts_off(cell: Cell, lab: Lab) -> None:
    """It is waited for, and named."""
    with leaving(cell, lab, "held") as stage:
        scene = stage.at_end(0)
        since = len(stage.machine.log())
        release = hold(stage)
        stage.gdb.resume()
        time.sleep(4)
        stage.gdb.interrupt()
        text = stage.machine.log()[since:]
        assert "kexec: still waiting for CPUs 1 to stop" in text and "Bye!" not in text
        release()
        outcome = stage.watch(scene, PATIENCE)
        assert outcome.hello and outcome.hello["payload"] == stage.machine.guest.payload


@pytest.mark.cells(*STAGED)
def test_interrupts_off_for_good(cell: Cell, lab: Lab) -> None:
    """It ends in what panic= says, with nothing overwritten."""
    with leaving(cell, lab, "stuck") as stage:
        for panic in (0, 1):
            scene = stage.at_end(panic)
            hold(stage)
            outcome = stage.watch(scene, 25 if panic == 0 else PATIENCE)
            assert "Kernel panic - not syncing: kexec: CPUs 1 do not stop" in outcome.text, outcome.text[-2000:]
            assert "Bye!" not in outcome.text
            assert not outcome.hello and outcome.reset == (panic != 0)


# Firmware that does not do what it is asked for

class Firmware:
    """The operations of PSCI as a kernel on a stage sees them, one of which does nothing meanwhile."""

    def __init__(self, stage: Stage, operation: str) -> None:
        self.gdb = stage.gdb
        self.at = stage.symbols["psci_ops"] + 8 * OPERATIONS.index(operation)
        self.nothing = struct.pack("<Q", stage.symbols[NOTHING])
        self.proper = self.gdb.read(self.at, 8, virtual=True)

    def break_it(self) -> None:
        self.gdb.write(self.at, self.nothing, virtual=True)

    def mend_it(self) -> None:
        self.gdb.write(self.at, self.proper, virtual=True)


@pytest.mark.parametrize("operation", ["cpu_off", "affinity_info"])
@pytest.mark.cells(*STAGED)
def test_not_off(cell: Cell, lab: Lab, operation: str) -> None:
    """A CPU that firmware does not switch off, or says is on, is not overwritten: a panic names it."""
    with leaving(cell, lab, operation) as stage:
        for panic in (0, 1):
            scene = stage.at_end(panic)
            Firmware(stage, operation).break_it()
            outcome = stage.watch(scene, 8 if panic == 0 else PATIENCE)
            assert re.search(r"Kernel panic - not syncing: kexec: firmware does not switch CPU[123] off", outcome.text), \
                outcome.text[-2000:]
            assert "Bye!" not in outcome.text
            assert not outcome.hello and outcome.reset == (panic != 0)


@pytest.mark.cells(*STAGED)
def test_late(cell: Cell, lab: Lab) -> None:
    """One that is slow is waited for."""
    with leaving(cell, lab, "late") as stage:
        scene = stage.at_end(0)
        firmware = Firmware(stage, "affinity_info")
        firmware.break_it()
        stage.gdb.resume()
        time.sleep(0.5)
        stage.gdb.interrupt()
        assert "Bye!" not in stage.machine.tail()
        firmware.mend_it()
        outcome = stage.watch(scene, PATIENCE)
        assert outcome.hello and outcome.hello["payload"] == stage.machine.guest.payload


@pytest.mark.cells(*STAGED)
def test_offline_but_not_off(cell: Cell, lab: Lab) -> None:
    """One that went offline before, and is not off, is named when something is loaded, and nothing is lost."""
    with leaving(cell, lab, "offline") as stage:
        m = stage.machine
        stage.gdb.interrupt()
        firmware = Firmware(stage, "affinity_info")
        firmware.break_it()
        stage.gdb.resume()
        m.sh(f"echo 0 >{SYSFS}/cpu1/online")
        m.sh("echo 'lab: refused' >/dev/kmsg")
        for arguments in ("-s -l", "-c -l"):
            result = m.run(f"fetch; kexec {arguments} /next/Image --initrd=/next/initrd --reuse-cmdline", timeout=300)
            assert result.rc, arguments
        said = log_since(m, "lab: refused")
        assert said.count("CPU1 is offline, but firmware has not switched it off") >= 2
        assert m.sh("cat /sys/kernel/kexec_loaded") == "1\n"
        stage.gdb.interrupt()
        firmware.mend_it()
        stage.gdb.resume()
        load(m, "file")  # firmware says by now that it is off
        m.sh(f"echo 1 >{SYSFS}/cpu1/online")
        handover(m, "file")

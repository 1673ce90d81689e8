"""Guests of KVM's that run while `kexec -e` is called do not keep the machine from leaving in silence."""

from __future__ import annotations

import pytest

from lab import upto
from lab.cells import CELLS, core_only
from lab.handover import handover
from lab.machine import Machine

pytestmark = pytest.mark.neighbours

VCPUS = 4
NAMES = ("4k-va48-nvhe", "4k-va48-nvhe-a57", "64k-va52-nvhe-a72", "4k-va48-vhe")


@pytest.mark.cells(*core_only([CELLS[name] for name in NAMES], "4k-va48-nvhe", "4k-va48-vhe"))
def test_vcpus_that_run(machine: Machine) -> None:
    """No vCPU is entered once KVM has left a CPU: the kernel does not warn, the next one comes up."""
    machine.sh(f"vms {VCPUS} >/tmp/vms 2>&1 &\n"
               "for i in $(seq 300); do grep -q . /tmp/vms && break; sleep 0.1; done")
    assert machine.sh("cat /tmp/vms") == f"{VCPUS} vCPUs run\n"
    done = handover(machine, "file")
    if upto.has("timing"):
        assert done.timing
        machine.report(f"   {machine.boot.cell.name}: shutdown with {VCPUS} vCPUs running {done.timing.shutdown_ms:.1f} ms")

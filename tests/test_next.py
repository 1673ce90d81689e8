"""Machines that come next, under a newer QEMU; and kernels that are older than what such a machine can do."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator

import pytest

import conftest
from conftest import Lab, name_of
from lab import fuzz, hibernate, inspector, kdump, qemu, stock
from lab.cells import CELLS, NEW, VERSAL, Cell, on_base
from lab.errors import LabError, UsageError
from lab.fuzz import Arena
from lab.handover import handover, load
from lab.machine import GuestFailure, Machine, TimeoutFailure
from test_inspector import Wrong, reported

CURRENT = [cell for cell in CELLS.values() if cell.qemu == NEW]
YOUNG = [CELLS[f"4k-va48-{el}-new"] for el in ("vhe", "nvhe", "el1")]  # CPUs with all that QEMU knows
PEERS = [on_base(cell) for cell in YOUNG]
GIC = CELLS["4k-va48-el1-gicv5"]
GICS = (GIC, replace(GIC, name=f"{GIC.name}-8", cpus=8))

# Of an IRS: registers, and the bits that matter
CR0, IST_BASER = 0x80, 0x180
IRSEN, VALID = 1, 1
IST = 0xFFFFFFFFFFFFC0  # the address in IST_BASER
L2 = 0xFFFFFFFFFFF000  # the address in an entry of a two-level IST
L1_ENTRIES = 64
GIVEN_UP = "Giving up the IST"
MINUTE, LIMIT = 60, 60.0  # seconds
MIB = 1 << 20


# All of them

@pytest.mark.kdump
@pytest.mark.long
@pytest.mark.parametrize("loader", kdump.LOADERS)
@pytest.mark.cells(*CURRENT)
def test_kdump(cell: Cell, lab: Lab, loader: str) -> None:
    """With memory in both banks, where a machine has two."""
    assert lab.guest
    memory = {"memory": qemu.LOW_MEMORY + 256} if cell.board == VERSAL else {}
    done = kdump.demonstrate(kdump.machine_for(cell, **memory), lab.kernels[cell.kernel], lab.guest, "null", loader,
                             lab.accel, lab.report)
    lab.report(f"   {cell.name}: {done}")


@pytest.mark.fuzz
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.cells(*CURRENT)
def test_fuzz(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> None:
    assert lab.guest
    with Arena(cell, lab.kernels[cell.kernel], lab.guest, name=f"fuzz.{name_of(request)}", report=lab.report) as arena:
        tally = fuzz.fuzz(arena, 20261128, range(200))
    lab.report("   " + tally.text().replace("\n", "\n   "))
    assert tally.verdicts["good"] > 150


# Kernels that know less

@pytest.fixture
def older(cell: Cell, release: str, lab: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[Machine, stock.Stock]]:
    """A guest of `cell` with the kernel of a Debian release to hand over to."""
    assert lab.guest
    kernel = stock.fetch(release, lab.guest)
    m = Machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel, name=name_of(request), report=lab.report)
    stock.offer(m, kernel)
    with m:
        m.hello()
        yield m, kernel


@pytest.mark.handover
@pytest.mark.long
@pytest.mark.parametrize("loader", ["load-nocheck", "file"])
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
@pytest.mark.cells(*YOUNG)
def test_older_kernels(older: tuple[Machine, stock.Stock], loader: str) -> None:
    """Debian's 6.1 and 6.12: the former does not know permission indirection."""
    stock.hand_over(*older, loader)


@pytest.mark.handover
@pytest.mark.long
@pytest.mark.parametrize("loader", ["load-nocheck", "file"])
@pytest.mark.parametrize("release", ["bookworm"])
@pytest.mark.cells(*PEERS)
def test_older_kernels_after_mainline(older: tuple[Machine, stock.Stock], loader: str) -> None:
    """The peer: nothing is heard of a kernel that does not know permission indirection."""
    with pytest.raises(TimeoutFailure):
        stock.hand_over(*older, loader, timeout=40.0)
    assert older[0].log().rstrip().endswith("Bye!")


@pytest.mark.inspector
@pytest.mark.cells(*YOUNG)
def test_the_inspector_sees_what_is_left_on(cell: Cell, machine: Machine, tmp_path: Path) -> None:
    """In each register that an older kernel may come to use."""
    registers = {"el1": ("s3_0_c2_c0_3",), "nvhe": ("s3_0_c2_c0_3",), "vhe": ("s3_5_c2_c0_3",)}[cell.el]
    code = "mov x9, #2; " + "; ".join(f"msr {register}, x9" for register in registers) + "; isb"
    reported(machine, cell, Wrong(code, ("TCR2 is 0 at EL1 and EL2, or there is none",), "found 0x2"), tmp_path)


# GICv5

def irs(m: Machine) -> int:
    """Physical address of the registers of the (only) IRS."""
    [base] = re.findall(r"^ *(\w+)-\w+ : .*irs", m.sh("cat /proc/iomem"), re.M)
    return int(base, 16)


def words(m: Machine, address: int, count: int) -> list[int]:
    """Physical memory, or registers, as QEMU has them, in units of 8 bytes."""
    said = m.monitor(f"xp /{count}gx {address:#x}")
    return [int(word, 16) for line in said.splitlines() for word in line.partition(":")[2].split()]


def tables(m: Machine) -> list[int]:
    """Physical addresses of the pages of the IST that the IRS uses: of both levels."""
    [baser] = words(m, irs(m) + IST_BASER, 1)
    assert baser & VALID
    l1 = baser & IST
    return [l1 & ~0xFFF, *(entry & L2 for entry in words(m, l1, L1_ENTRIES) if entry & VALID)]


def keep_busy(m: Machine) -> None:
    """From here to the end of this kernel, interrupts of a PCI device and of a disk, and IPIs."""
    m.sh("(while :; do dd if=/dev/hwrng of=/dev/null bs=64 count=10000; done >/dev/null 2>&1 &)\n"
         "(while :; do echo 3 >/proc/sys/vm/drop_caches; cat /dev/vda; done >/dev/null 2>&1 &)")


# QEMU 11 has no ITS for it: this one uses a wire.
DEVICE = ("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng,romfile=")


@pytest.mark.neighbours
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("loader", ["load-nocheck", "file"])
@pytest.mark.cells(*GICS)
def test_gicv5_generations(start: Callable[..., Machine], loader: str) -> None:
    """Ten handovers while interrupts come in."""
    m = start(*DEVICE)
    for _ in range(10):
        keep_busy(m)
        since = len(m.log())
        handover(m, loader)
        assert GIVEN_UP not in m.log()[since:]
        assert not re.search("GICv5.*(timeout|Failed)", m.log()[since:])


@pytest.mark.neighbours
@pytest.mark.long
@pytest.mark.cells(GIC)
def test_gicv5_is_off(start: Callable[..., Machine]) -> None:
    """When the next image is entered, the IRS is disabled, and no IST is valid."""
    m = start()
    at, _ = qemu.first_bank(GIC)
    frame = irs(m)
    assert words(m, frame + IST_BASER, 1)[0] & VALID and words(m, frame + CR0, 1)[0] & IRSEN
    inspector.put(m)
    m.put("/tmp/request", inspector.statements(GIC, at + 256 * MIB, [], ["end park"]).encode())
    m.begin("kload </tmp/request")
    deadline = time.monotonic() + LIMIT
    while "# inspector: parked" not in m.log() and time.monotonic() < deadline:
        time.sleep(0.1)
    report = inspector.parse(m.log())
    assert report.good and report.end == "parked", report.text
    assert words(m, frame + IST_BASER, 1)[0] & VALID == 0
    assert words(m, frame + CR0, 1)[0] & IRSEN == 0


@pytest.mark.neighbours
@pytest.mark.long
@pytest.mark.cells(GIC)
def test_gicv5_memory_is_let_go(start: Callable[..., Machine]) -> None:
    """Where the IST was, the next kernel has what it likes, and still has it after a minute of interrupts."""
    m = start(*DEVICE)
    keep_busy(m)
    old = tables(m)
    handover(m, "file")
    assert not set(old) & set(tables(m))
    # All memory that can be had: what is free now, the old tables among it, holds a pattern then.
    mib = int(m.sh("awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo")) * 7 // 8
    m.sh(f"mount -o remount,size=95% /tmp && pattern fill /tmp/pattern {mib} 7", timeout=300)
    before = [words(m, page, 512) for page in old]
    m.sh(f"timeout {MINUTE} dd if=/dev/hwrng of=/dev/null bs=64 || [ $? = 143 ] || [ $? = 124 ]", timeout=2 * MINUTE)
    m.sh(f"pattern check /tmp/pattern {mib} 7", timeout=300)
    assert [words(m, page, 512) for page in old] == before
    m.report(f"   {m.boot.cell.name}: {len(old)} pages of the old IST, {sum(any(page) for page in before)} not empty")


@pytest.mark.neighbours
@pytest.mark.long
@pytest.mark.cells(on_base(GIC))
def test_gicv5_on_mainline(start: Callable[..., Machine]) -> None:
    """The peer: the next kernel has no interrupt controller."""
    m = start()
    load(m, "load-nocheck")
    m.silence = 20.0
    with pytest.raises(GuestFailure):
        m.exec()
    assert "IST is marked as valid already; cannot allocate" in m.log()


@pytest.mark.hibernate
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.cells(*(cell for cell in CURRENT if cell is not GIC))  # which does not resume, here as on mainline
def test_hibernate(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> None:
    """Five times in a row, then a handover."""
    assert lab.guest
    small = hibernate.machine_for(cell)
    with hibernate.machine(small, lab.kernels[cell.kernel], lab.guest, accel=lab.accel, name=name_of(request),
                           report=lab.report) as m:
        for number in range(1, 6):
            hibernate.fill(m, number, 4)
            m.report(f"   {m.boot.cell.name}: {hibernate.cycle(m, number, number, 4)}")
        m.sh("rm /tmp/pattern")
        handover(m, "file")


# The laboratory

def test_a_qemu_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes it is left out, with a line; the rest is not."""
    def program(*wanted: int) -> tuple[str, ...]:
        raise LabError("no network", "at all")

    monkeypatch.setattr(conftest.qemu, "program", program)
    items = [conftest_item(CELLS["4k-va48-vhe"]), conftest_item(GIC), conftest_item(YOUNG[0])]
    said: list[str] = []
    assert conftest.with_a_qemu(items, said.append) == items[:1]  # type: ignore[arg-type]
    assert said == [f"left out is what takes QEMU {NEW}: no network"]


def conftest_item(cell: Cell) -> object:
    class Item:
        class callspec:
            params = {"cell": cell}

    return Item()


def test_the_qemu_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It comes first where its version will do, and is refused where not; who needs none gets the machine's own."""
    for version, fits in ((NEW, True), (NEW - 1, False)):
        named = tmp_path / f"qemu-{version}"
        named.write_text(f"#!/bin/sh\necho QEMU emulator version {version}.0.50\n")
        named.chmod(0o755)
        monkeypatch.setenv("QEMU", str(named))
        qemu.program.cache_clear()
        assert qemu.program(0) == (qemu.QEMU,)
        if fits:
            assert qemu.program(NEW) == (str(named),)
        else:
            with pytest.raises(UsageError, match=f"version {version}, and a cell needs {NEW}"):
                qemu.program(NEW)
    qemu.program.cache_clear()

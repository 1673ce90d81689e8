"""LPIs of a GICv3: whoever handed over left no interrupt table where the next kernel has something else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator

import pytest

from conftest import Lab, name_of
from lab import kdump
from lab.cells import CELLS, DEFAULT, Cell, core_only, each_with, on_base
from lab.gdb import Gdb, options
from lab.handover import BadHandover, handover, load, verify, verify_first
from lab.kdump import crash_and_verify
from lab.kload import MIB, kernel_and_initrd, kload, pages_of, tree_before
from lab.machine import BOOTING, GuestFailure, Machine
from lab.stage import read_symbols

pytestmark = pytest.mark.neighbours

ON = core_only([CELLS[name] for name in ("4k-va48-vhe", "4k-va48-nvhe", "4k-va48-el1-a72", "64k-va52-vhe")],
               "4k-va48-nvhe", "4k-va48-el1-a72", "64k-va52-vhe")
# Machines and what is loaded onto their tables; in a plain check each machine and each of the two.
ONTO = each_with(ON, ("initrd", "image"), lambda cell, what: cell.core and (cell.el == "el1") == (what == "image"))
KDUMP = (kdump.machine_for(DEFAULT), kdump.machine_for(CELLS["64k-va52-el1"]))
BASE = on_base(replace(DEFAULT, name="4k-va48-vhe-its", its=True))
PLAIN = replace(DEFAULT, name="4k-va48-vhe-nokaslr", kaslr=False)  # to find functions by their address

TABLE = 64 << 10  # bytes of the property table, and of each pending table
LEFT_ON = "Booted with LPIs enabled"
PREALLOCATED = "Using preallocated redistributor tables"
HAS_CES = 48  # offset of has_ces in struct rdists

# A device on PCI, whose MSI-X are LPIs: one for each read. Not a disk with a queue per CPU, which requests can keep
# from going down once the disk has been shut down, here and in mainline.
DEVICE = ("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng,vectors=2,romfile=")


def own_log(m: Machine) -> str:
    """What the running kernel has on the console."""
    return m.log().rpartition(BOOTING)[2]


def tables(m: Machine) -> tuple[int, dict[int, int]]:
    """Physical addresses of the property table and of each CPU's pending table, as the running kernel says."""
    text = m.sh("dmesg")
    match = re.search(r"using LPI property table @(0x\w+)", text)
    assert match
    pending = re.findall(r"CPU(\d+): using \w+ LPI pending table @(0x\w+)", text)
    return int(match[1], 16), {int(cpu): int(address, 16) for cpu, address in pending}


def lpis(m: Machine) -> int:
    """How many LPIs of the device's the running kernel has taken, after some more reading."""
    m.sh("dd if=/dev/hwrng of=/dev/null bs=64 count=200 2>/dev/null")
    counts = re.findall(r"^ *\d+:((?: +\d+)+) +ITS-.*virtio\d+-input", m.sh("cat /proc/interrupts"), re.M)
    assert counts
    return sum(int(count) for line in counts for count in line.split())


def clean(m: Machine) -> None:
    """The running kernel has found LPIs switched off, and has tables of its own for all CPUs."""
    assert LEFT_ON not in own_log(m) and PREALLOCATED not in own_log(m)
    assert m.sh("dmesg").count("using allocated LPI pending table") == m.boot.cell.cpus
    assert m.sh("cat /proc/sys/kernel/tainted").strip() == "0"


def keep_busy(m: Machine) -> None:
    """From here to the end of this kernel the device is asked for more."""
    m.sh("(while :; do dd if=/dev/hwrng of=/dev/null bs=64 count=10000; done >/dev/null 2>&1 &)")


def load_onto_the_tables(m: Machine, what: str) -> None:
    """Load the next kernel so that the property table of this one lies in the middle of it, or of its payload."""
    table, _ = tables(m)
    initrd_size = pages_of(m, m.guest.next.stat().st_size)
    if what == "image":
        kernel, initrd = kernel_and_initrd(m, (table - 2 * MIB) & ~(2 * MIB - 1))
        assert kernel.mem < table < kernel.end
    else:
        at = (table - initrd_size + m.guest.size - 2 * MIB) & ~(TABLE - 1)  # what it ends in is the payload
        kernel, initrd = kernel_and_initrd(m, (at + initrd_size + 4 * MIB) & ~(2 * MIB - 1), at)
        assert initrd.end - m.guest.size < table < initrd.end - MIB
    end = max(kernel.end, initrd.end)
    dtb = tree_before(m, kernel, initrd, end + 2 * MIB)
    error = kload(m, [kernel, initrd, dtb], entry=dtb.mem)
    assert error == "0", f"{error}: {kernel} {initrd} {dtb}"


# What mainline does

@pytest.mark.parametrize("loader", ["load-nocheck", "file"])
@pytest.mark.cells(BASE)
def test_mainline_does_not_come_up(machine: Machine, loader: str) -> None:
    """The peer, with the very same machine and the same tools as our own: the image lands on the tables."""
    load(machine, loader)
    machine.silence = 20.0
    with pytest.raises(GuestFailure):
        verify(machine, machine.exec())
    assert PREALLOCATED in own_log(machine)


@pytest.mark.cells(BASE)
def test_mainline_wipes_its_initrd(machine: Machine) -> None:
    """The peer: a kernel takes its own initrd for the LPI tables of the one before."""
    load_onto_the_tables(machine, "initrd")
    since = len(machine.log())
    hello = machine.exec()
    assert PREALLOCATED in own_log(machine)
    with pytest.raises(BadHandover, match="payload"):
        verify(machine, hello, since)


@pytest.mark.cells(BASE)
def test_mainline_wipes_its_image(machine: Machine) -> None:
    """The peer: a kernel takes its own text for the tables, and is gone."""
    load_onto_the_tables(machine, "image")
    machine.silence = 20.0
    with pytest.raises(GuestFailure):
        machine.exec()
    assert PREALLOCATED in own_log(machine)


# What we do

@pytest.mark.cells(*ONTO)
def test_onto_the_tables(cell: Cell, machine: Machine) -> None:
    """The memory that the tables were in is memory like any other for the next kernel, and the one after that."""
    load_onto_the_tables(machine, ONTO[cell])
    since = len(machine.log())
    verify(machine, machine.exec(), since)
    clean(machine)
    handover(machine, "file")
    clean(machine)


@pytest.mark.cells(*ON)
def test_generations(start: Callable[..., Machine], request: pytest.FixtureRequest) -> None:
    """Kernel after kernel, by both system calls, while LPIs come in."""
    m = start(*DEVICE)
    loaders = ("load-nocheck", "file", "file", "load-nocheck", "load-nocheck")
    for loader in loaders if request.config.getoption("--all") else loaders[:2]:
        assert lpis(m) > 0
        keep_busy(m)
        handover(m, loader)
        clean(m)
    m.report(f"   {m.boot.cell.name}: kernel {m.generation} has taken {lpis(m)} LPIs")


@pytest.mark.parametrize("loader", ["load", "file"])
@pytest.mark.cells(*KDUMP)
def test_kdump(start: Callable[..., Machine], loader: str) -> None:
    """The crash kernel uses the tables of the one that crashed, and gets its LPIs."""
    m = start(*DEVICE)
    assert lpis(m) > 0
    before, _ = tables(m)
    keep_busy(m)
    kdump.load_crash_kernel(m, loader)
    crash_and_verify(m)
    assert tables(m)[0] == before and PREALLOCATED in own_log(m)
    m.report(f"   {m.boot.cell.name}: the crash kernel has taken {lpis(m)} LPIs")


# Where LPIs can't be switched off, and kernels that do not do it

@pytest.fixture
def stopped(cell: Cell, lab: Lab, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Machine, Gdb]]:
    """A guest of `cell` that has not begun yet, with QEMU's gdb server."""
    assert lab.guest
    with Machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel, name=name_of(request), report=lab.report,
                 extra=[*DEVICE, "-S", *options(tmp_path / "gdb")]) as m, Gdb(tmp_path / "gdb") as gdb:
        yield m, gdb


def deny_ces(m: Machine, gdb: Gdb, address: int, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Have the kernel that is about to start find redistributors that keep their tables for good.

    `meanwhile` is what starts it.
    """
    gdb.run_to(address, 60, str(m.console), meanwhile)
    rdists = gdb.register("x1")
    assert gdb.read(rdists + HAS_CES, 1, virtual=True) == b"\1"
    gdb.write(rdists + HAS_CES, b"\0", virtual=True)
    gdb.resume()


def leave(m: Machine) -> None:
    """Hand over, without waiting for what comes of it."""
    m.begin("kexec -e")
    m.generation += 1


@pytest.mark.needs("lpi-tables")
@pytest.mark.cells(PLAIN)
def test_lpis_that_stay_on(stopped: tuple[Machine, Gdb], lab: Lab) -> None:
    """The tables are kept out of what is loaded, and are what every later kernel uses, whoever loads it."""
    m, gdb = stopped
    its_init = read_symbols(m.built.vmlinux)["its_init"]
    deny_ces(m, gdb, its_init)
    verify_first(m, m.hello())
    first = tables(m)
    free = []
    for loader in ("load-nocheck", "load-nocheck", "file", "file"):  # kexec-tools wants KASLR's seed to have been used
        assert lpis(m) > 0
        reserved = kdump.ranges_of(m.sh("cat /proc/iomem"), "reserved")
        for table in (first[0], *first[1].values()):
            assert any(start <= table and table + TABLE <= end for start, end in reserved)
        keep_busy(m)
        load(m, loader)
        since = len(m.log())
        deny_ces(m, gdb, its_init, lambda: leave(m))
        hello = m.hello()
        verify(m, hello, since)
        assert PREALLOCATED in own_log(m) and LEFT_ON not in own_log(m)
        assert m.sh("dmesg").count("using reserved LPI pending table") == m.boot.cell.cpus
        assert tables(m) == first
        assert m.sh("cat /proc/sys/kernel/tainted").strip() == "0"
        free.append(hello.mem_free)
    m.report(f"   kernel {m.generation} has taken {lpis(m)} LPIs; MemFree in KiB: {free}")
    assert free[-1] == pytest.approx(free[0], rel=0.01)


RET = 0xD65F03C0.to_bytes(4, "little")


@pytest.mark.parametrize("what", ["initrd", "image"])
@pytest.mark.cells(PLAIN)
def test_lpis_that_were_left_on(stopped: tuple[Machine, Gdb], what: str) -> None:
    """After a kernel that does not switch them off, as mainline's, ours still knows what is its own."""
    m, gdb = stopped
    gdb.resume()
    verify_first(m, m.hello())
    load_onto_the_tables(m, what)
    since = len(m.log())
    symbols = read_symbols(m.built.vmlinux)
    gdb.interrupt()
    for name in ("its_shutdown", "its_cpu_exit"):
        gdb.write(symbols[name], RET, virtual=True)
    gdb.resume()
    leave(m)
    verify(m, m.hello(), since)
    assert LEFT_ON in own_log(m) and PREALLOCATED not in own_log(m)
    assert lpis(m) > 0

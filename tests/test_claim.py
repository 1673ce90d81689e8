"""kexec_file_load() claims the memory that it loads into; then there is nothing to move."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conftest import Lab, name_of
from lab import kdump, module, qemu
from lab.cells import CELLS, DEFAULT, Cell
from lab.handover import Loaded, load, load_by_call, lost_memory, reserved_pages, verify, verify_first
from lab.kload import MIB, NO_CMA
from lab.machine import Machine

pytestmark = [pytest.mark.handover, pytest.mark.needs("cma-segments", "claim")]

# With 64K pages the page allocator gives away no less than what is in 512 MiB that are movable as a whole.
LARGE = CELLS["64k-va52-nvhe"]
IDLE = [LARGE, *(CELLS[name] for name in ("4k-va48-vhe", "4k-va48-nvhe", "4k-va48-el1", "16k-va47-nvhe", "16k-va52-vhe"))]
GIB4 = 4 << 30  # where ZONE_DMA ends
# Some of their memory is above that.
HIGH = replace(DEFAULT, name=f"{DEFAULT.name}-4g", memory=4096)
LARGE_INITRD = replace(DEFAULT, name=f"{DEFAULT.name}-8g", memory=8192, core=False)
SMALL = replace(DEFAULT, name=f"{DEFAULT.name}-1g", memory=1024, core=False)  # minutes
CRASHING = kdump.machine_for(DEFAULT, memory=2048)
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


@pytest.mark.cells(DEFAULT)
def test_slabs_are_passed_by(machine: Machine) -> None:
    """In the lower half of memory each pageblock has a slab: no time is wasted there, and nothing is copied."""
    middle = qemu.RAM_BASE + machine.boot.cell.memory * MIB // 2
    module.put(machine)
    machine.run(module.insert(f"how=slabs ranges={middle:#x},{MIB:#x}"))
    assert load(machine, "file").bytes_to_move == 0


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


# Zones


@dataclass(frozen=True)
class Zone:
    """A populated zone, in pages: what is free, and what has to stay so."""

    free: int
    high: int  # watermark
    managed: int
    reserve: int  # from those who could have had memory of the highest zone

    @property
    def kept(self) -> int:
        return self.high + self.reserve


def zones(m: Machine) -> dict[str, Zone]:
    """/proc/zoneinfo, caches aside."""
    text = m.sh("sync; echo 3 >/proc/sys/vm/drop_caches; cat /proc/zoneinfo")
    found = {}
    for part in re.split(r"^Node \d+, zone +", text, flags=re.M)[1:]:
        def number(name: str) -> int:
            match = re.search(rf"\b{name} +(\d+)", part)
            assert match, part
            return int(match.group(1))

        protection = re.search(r"protection: \((.*)\)", part)
        if protection and number("managed"):
            found[part.split()[0]] = Zone(number("pages free"), number("high"), number("managed"),
                                          max(map(int, protection.group(1).split(","))))
    return found


def make_larger(m: Machine, size: int) -> None:
    """Make the next initrd as large, with a hole that takes no memory."""
    m.sh(f"fetch; truncate -s {size} /next/initrd", timeout=300)


def tell(m: Machine, before: dict[str, Zone], after: dict[str, Zone]) -> None:
    for name in before:
        m.report(f"   {m.boot.cell.name}: {name}: {before[name].free} pages free before, {after[name].free} after, "
                 f"{after[name].kept} to be kept")


@pytest.mark.cells(HIGH)
def test_low_zone_is_left_alone(machine: Machine) -> None:
    """What is claimed lies above 4 GiB where there is memory, and the next kernel comes up from there."""
    before = zones(machine)
    loaded = load(machine, "file")
    tell(machine, before, zones(machine))
    assert loaded.bytes_to_move == 0
    assert [start for start, _ in loaded.segments if start < GIB4] == []
    leave(machine)


@pytest.mark.cells(LARGE_INITRD)
def test_driver_finds_memory_during_a_large_load(machine: Machine) -> None:
    """2 GiB of 8 are claimed while a driver, whose device reaches 4 GiB, allocates: it always can."""
    module.put(machine)
    make_larger(machine, 2048 * MIB)
    before = zones(machine)
    insert = module.insert(f"how=dma ranges=0,{64 * MIB:#x}")
    machine.sh(f"while [ ! -e /tmp/done ]; do {insert}; done >/dev/null 2>&1 &")
    loaded = load(machine, "file")
    said = re.findall(r"provoke: (\d+) pages, (\d+) faults", machine.sh("touch /tmp/done; sleep 2; dmesg"))
    after = zones(machine)
    tell(machine, before, after)
    machine.report(f"   {machine.boot.cell.name}: the driver allocated {len(said)} times")
    assert len(said) > 2 and {int(faults) for _, faults in said} == {0}
    assert loaded.bytes_to_move == 0 and loaded.bytes_in_place == loaded.size > 2048 * MIB
    assert before["DMA"].free - after["DMA"].free < 64 * MIB // 4096
    assert all(zone.free > zone.kept for zone in after.values())


@pytest.mark.cells(DEFAULT)
def test_watermarks_are_kept(machine: Machine) -> None:
    """An initrd that would leave less than the high watermark is copied; one for which there is room is claimed."""
    size = 256 * MIB
    make_larger(machine, size)
    pages, (zone,) = size // 4096, zones(machine).values()
    # The file is in memory once more while it is loaded. `high` is 1.5 times `min`.
    high = zone.free - pages - pages // 2
    old = machine.sh(f"cd /proc/sys/vm; cat min_free_kbytes; echo {high * 2 // 3 * 4} >min_free_kbytes").strip()
    before = zones(machine)
    loaded = load(machine, "file")
    after = zones(machine)
    tell(machine, before, after)
    assert loaded.bytes_to_move  # what is copied may happen to have most of its pages where they are to be
    machine.sh(f"kexec -u; echo {old} >/proc/sys/vm/min_free_kbytes")
    loaded = load(machine, "file")
    assert loaded.bytes_to_move == 0


def with_disk(lab: Lab, cell: Cell, name: str, path: Path, limits: str = "") -> Machine:
    """A machine with an empty disk that memory fits on; `limits` are QEMU's throttling options."""
    assert lab.guest
    drive, options, *device = qemu.scratch_disk("scratch", path, cell)
    return Machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel, name=name, report=lab.report,
                   extra=[drive, options + limits, *device])


# The disk stays open, and with it its cache: who closes it last writes and drops that.
OPEN = ("for disk in /sys/block/vd*; do [ $(cat $disk/serial) = scratch ] && scratch=/dev/${disk##*/}; done\n"
        "exec 5<>$scratch; sleep 10000 &\n")


@pytest.mark.cells(DEFAULT)
def test_caches_make_room(cell: Cell, lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On a system that has been up for long, memory is full of caches: they go, and nothing has to be moved."""
    with with_disk(lab, cell, name_of(request), tmp_path / "disk") as m:
        verify_first(m, m.hello())
        m.sh(f"fetch\n{OPEN}cat $scratch >/dev/null", timeout=300)
        free = int(m.sh("awk '/^MemFree:/ { print $2 }' /proc/meminfo"))
        loaded = load(m, "file")
        m.report(f"   {cell.name}: {free // 1024} MiB free before, {loaded.size // MIB} MiB loaded, "
                 f"{loaded.bytes_to_move} bytes to move")
        assert free < cell.memory * 1024 // 10
        assert loaded.bytes_to_move == 0
        leave(m)


# How long a load takes, and what it is in the way of meanwhile

SLOW = 2 * MIB  # bytes per second
DIRTY = 260  # MiB that are to be written
PATIENCE = 30  # seconds: a fraction of what the disk takes
# All of memory but a bit is filled, a MiB at a time; what is to be written takes the place of every third one.
SPREAD = ("fetch; mkdir /tmp/fill; mount -t tmpfs -o size=95% tmpfs /tmp/fill\n"
          "free=$(awk '/^MemFree:/ { print int($2 / 1024) }' /proc/meminfo)\n"
          "for n in $(seq $((free - 80))); do head -c 1048576 /dev/zero >/tmp/fill/$n; done\n"
          "for n in $(seq 1 3 $free); do rm -f /tmp/fill/$n; done")


@pytest.mark.cells(SMALL)
def test_slow_disk_is_not_waited_for(cell: Cell, lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What a slow disk has yet to take is wherever memory could be claimed: it is not, and the load is over soon."""
    with with_disk(lab, cell, name_of(request), tmp_path / "disk", f",throttling.bps-write={SLOW}") as m:
        verify_first(m, m.hello())
        m.sh(SPREAD, timeout=300)
        m.sh(f"cd /proc/sys/vm; echo 95 >dirty_ratio; echo {MIB} >dirty_background_bytes\n{OPEN}"
             f"dd if=/dev/zero of=$scratch bs=1M count={DIRTY} conv=notrunc 2>/dev/null &\n"
             "sleep 8; rm /tmp/fill/*", timeout=300)
        begin = time.monotonic()
        loaded = load_by_call(m)  # kexec-tools syncs
        seconds = time.monotonic() - begin
        written = int(m.sh("awk '/^Writeback:/ { print $2 }' /proc/meminfo"))
        m.report(f"   {cell.name}: loaded in {seconds:.1f} s with {written // 1024} MiB still under writeback, "
                 f"{loaded.bytes_to_move} bytes to move")
        assert written * 1024 > PATIENCE * SLOW
        assert seconds < PATIENCE


# A load that takes seconds goes on in the background: another one is refused, as it is under way.
BUSY = ("kexec -s -l /next/Image --initrd=/next/initrd --reuse-cmdline >/dev/null 2>&1 &\n"
        "sleep 0.7; until kexec -s -l /next/Image --reuse-cmdline 2>&1 | grep -qi busy; do\n"
        "kill -0 $! || exit 3; sleep 0.2; done\n")


def make_slow(m: Machine) -> None:
    """Make the next load take seconds; what came before keeps its initrd."""
    m.sh("fetch; cp /next/initrd /next/small")
    make_larger(m, 640 * MIB)


@pytest.mark.cells(CRASHING)
def test_panic_during_a_load_takes_a_dump(machine: Machine) -> None:
    """The crash kernel was loaded before, and is entered while another kernel is being loaded."""
    kdump.load_crash_kernel(machine, "file")
    make_slow(machine)
    kdump.crash_and_verify(machine, f"{BUSY}echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")
    assert int(machine.sh("stat -c %s /proc/vmcore")) > CRASHING.memory * MIB // 2


@pytest.mark.cells(CRASHING)
def test_crash_kernel_is_loaded_during_a_load(machine: Machine) -> None:
    """Both of them end up loaded."""
    make_slow(machine)
    machine.sh(f"{BUSY}kexec -s -p /next/Image --initrd=/next/small --reuse-cmdline && kill -0 $!\n"
               "wait; grep -q 1 /sys/kernel/kexec_loaded && grep -q 1 /sys/kernel/kexec_crash_loaded", timeout=300)

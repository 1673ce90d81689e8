"""A machine that is switched off and on again has its memory as it was."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator

import pytest

from conftest import Lab, name_of
from lab import hibernate, kdump, module, upto
from lab.cells import CELLS, HARDENED, Cell, core_only, each_with, on_base
from lab.faults import SLOTS
from lab.gdb import Gdb, options
from lab.handover import handover, load, verify
from lab.kdump import CRASHES, crash_and_verify, ranges_of
from lab.machine import Machine
from lab.stage import PARK, enter, read_symbols

pytestmark = pytest.mark.hibernate

PLAIN = [f"{kernel}-{el}" for kernel in ("4k-va48", "64k-va52", "16k-va47") for el in ("vhe", "nvhe", "el1")]
LONG = [hibernate.machine_for(CELLS[name], append=(*CELLS[name].append, "crashkernel=288M"), memory=1024,
                              kaslr=True, rodata="on", cpus=2) for name in PLAIN]
HOLES = [hibernate.machine_for(CELLS[name], memory=1024) for name in
         ("4k-va48-vhe-holes", "64k-va52-el1-holes", "16k-va47-nvhe-holes")]
# The image has no tags of the kernel's own memory: with KASAN_HW_TAGS v7.3 does not come back either.
GUARDED = [hibernate.machine_for(cell, append=(*cell.append, *(["kasan=off"] if cell.mte else [])))
           for cell in CELLS.values() if cell.kernel in HARDENED]
CYCLES = {False: 1, True: 10}  # in a plain check, and with --all
SHARE = {False: 16, True: 2}  # of memory that is filled, one part in so many


@pytest.fixture
def cycles(request: pytest.FixtureRequest) -> int:
    return CYCLES[request.config.getoption("--all")]


@pytest.fixture
def share(request: pytest.FixtureRequest) -> int:
    return SHARE[request.config.getoption("--all")]


@pytest.fixture
def start(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Callable[[Cell], Machine]]:
    """Start a machine that can hibernate."""
    with ExitStack() as stack:
        def one(cell: Cell) -> Machine:
            assert lab.guest
            return stack.enter_context(hibernate.machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel,
                                                         name=name_of(request), report=lab.report))

        yield one


def several(m: Machine, cycles: int, share: int) -> None:
    """Hibernate and resume some times in a row, a part of memory filled with something new each time."""
    seconds = []
    for number in range(1, cycles + 1):
        hibernate.fill(m, number, share)
        seconds.append(hibernate.cycle(m, number, number, share).seconds)
    m.report(f"   {m.boot.cell.name}: {cycles} cycles of {', '.join(f'{one:.1f}' for one in seconds)} s")


@pytest.mark.cells(*core_only(LONG, "4k-va48-nvhe", "64k-va52-vhe", "64k-va52-el1"))
def test_again_and_again(cell: Cell, cycles: int, share: int, start: Callable[[Cell], Machine]) -> None:
    """Some cycles in a row; then a handover, and after another cycle a crash, still work."""
    m = start(cell)
    several(m, cycles, share)
    m.sh("rm /tmp/pattern")
    handover(m, "file")
    m.sh(hibernate.DISK + "mkswap $swap && swapon $swap && echo shutdown >/sys/power/disk")
    hibernate.fill(m, 99, share)
    hibernate.cycle(m, 99, 99, share)
    m.sh("rm /tmp/pattern")
    kdump.load_crash_kernel(m, "file")
    crash_and_verify(m)


@pytest.mark.cells(*HOLES)
def test_with_holes_in_memory(cell: Cell, cycles: int, share: int, start: Callable[[Cell], Machine]) -> None:
    several(start(cell), cycles, share)


@pytest.mark.cells(*GUARDED)
def test_hardened(cell: Cell, share: int, start: Callable[[Cell], Machine]) -> None:
    """Neither type hashes, nor signed or shadowed return addresses, nor tags are lost on the way."""
    several(start(cell), 2, share)


@pytest.mark.cells(*core_only(LONG, "4k-va48-vhe"), on_base(LONG[0]))
def test_with_a_crash_kernel_loaded(cell: Cell, share: int, start: Callable[[Cell], Machine]) -> None:
    """It is saved and restored with the rest, protected before and after, and comes up when it is needed.

    Mainline does not clean it, and does not save the page that VMCOREINFO is in: its dump can't be read.
    """
    m = start(cell)
    module.put(m)
    loaded = kdump.load_crash_kernel(m, "load")
    segments = list(loaded.segments)
    hibernate.fill(m, 5, share)
    hibernate.cycle(m, 1, 5, share)
    assert ("crash image cleaned after hibernation" in m.sh("dmesg")) == cell.kernel.patched
    if cell.kernel.patched and upto.has("arm64"):
        pages, faults = module.touch(m, "write", segments)
        assert faults == pages > 0
        (begin, end), = ranges_of(m.sh("cat /proc/iomem"), "Crash kernel")
        _, faults = module.touch(m, "read", [(begin, end - begin)])
        assert faults in (pages, pages + 1)  # and the page for VMCOREINFO
    crash_and_verify(m)
    said = m.sh("vmcore-dmesg /proc/vmcore 2>&1 || :", timeout=300)
    m.report(f"   {cell.name}: vmcore-dmesg says '{said.strip().splitlines()[-1]}'")
    assert (CRASHES["sysrq"][1] in said) == cell.kernel.patched


# Machines and what is loaded there; in a plain check each loader.
LOADED = each_with([hibernate.machine_for(CELLS[name]) for name in PLAIN], ("file", "load-nocheck"),
                   lambda cell, loader: f"{cell.name}-{loader}" in ("4k-va48-nvhe-hibernate-file",
                                                                    "64k-va52-el1-hibernate-load-nocheck"))


@pytest.mark.cells(*LOADED)
def test_what_is_loaded_comes_back(cell: Cell, share: int, start: Callable[[Cell], Machine]) -> None:
    """It is cleaned to the PoC again, as nothing but caches (which are not emulated) may hold it, and is executed."""
    loader, m = LOADED[cell], start(cell)
    loaded = load(m, loader)
    if upto.has("claim"):
        assert (loaded.bytes_to_move == 0) == (loader == "file" and "64k" not in cell.name)
    hibernate.fill(m, 7, share)
    hibernate.cycle(m, 1, 7, share)
    in_place = f", {loaded.bytes_in_place} bytes in place" if upto.has("timing") else ""
    assert f"loaded image cleaned after hibernation{in_place}\n" in m.sh("dmesg")
    since = len(m.log())
    verify(m, m.exec(), since)


@pytest.mark.needs("arm64")
@pytest.mark.cells(LONG[0])
def test_given_up(cell: Cell, start: Callable[[Cell], Machine]) -> None:
    """Hibernation that fails for want of swap leaves the crash kernel protected."""
    m = start(cell)
    module.put(m)
    loaded = kdump.load_crash_kernel(m, "file")
    m.sh(hibernate.DISK + "swapoff $swap && mkswap $swap 4096 && swapon $swap")
    words = ",".join(f"{word:#x}" for segment in loaded.segments for word in segment)
    # Once devices were suspended a kernel that was not switched off does not hear the host (see Machine._connect).
    since = len(m.log())
    crash_and_verify(m, "echo disk >/sys/power/state && exit\n"
                        f"{module.insert(f'how=write ranges={words}')}; echo c >/proc/sysrq-trigger")
    log = m.log()
    assert "PM: Image saving failed: -28" in log[since:]
    pages, faults = map(int, re.findall(r"provoke: (\d+) pages, (\d+) faults", log[since:])[0])
    assert faults == pages > 0


# What goes wrong

class Parked(Exception):
    """The machine is where it was to end."""


FAULTY = [replace(hibernate.machine_for(CELLS[name], kaslr=False), name=f"{name}-hibernate-fault")
          for name in ("4k-va48-vhe", "4k-va48-nvhe-a57", "4k-va48-el1", "64k-va52-el1")]


@pytest.mark.needs("arm64")
@pytest.mark.cells(*FAULTY)
def test_fault_while_resuming(cell: Cell, lab: Lab, tmp_path: Path) -> None:
    """An exception on the way into the kernel that hibernated parks in its vector, beside the code that runs there."""
    built = lab.kernels[cell.kernel]
    symbols = read_symbols(built.vmlinux)
    resume = symbols["swsusp_arch_resume"]

    def provoke() -> None:
        with Gdb(tmp_path / "gdb") as gdb:
            gdb.set_break(resume)
            gdb.resume()
            assert gdb.wait(240), "nothing resumes"
            gdb.clear_break(resume)
            page = enter(gdb, symbols, "swsusp_arch_resume", str(m.console))
            gdb.write(page, bytes(4))  # an undefined instruction
            slot = page + 0x800 + SLOTS.index("spx sync") * 0x80 + 0x70
            end = time.monotonic() + 60
            while gdb.register("pc") != slot and time.monotonic() < end:
                gdb.resume()
                time.sleep(0.5)
                gdb.interrupt()
            assert gdb.register("pc") == slot
            assert int.from_bytes(gdb.read(page + 0xA70, 4), "little") == PARK
            raise Parked

    assert lab.guest
    with hibernate.machine(cell, built, lab.guest, name=f"fault.{cell.name}", report=lab.report,
                           extra=options(tmp_path / "gdb")) as m:
        with pytest.raises(Parked):
            m.sleep("echo disk >/sys/power/state", meanwhile=provoke)


# What it takes

SIZES = {hibernate.machine_for(CELLS["4k-va48-vhe"], memory=memory, kaslr=False): 16 for memory in (2048, 16384)}
SIZES = {replace(cell, name=f"4k-va48-vhe-resume-{cell.memory}", core=cell.memory == 2048): most
         for cell, most in SIZES.items()}
PEERS = {on_base(cell): None for cell in SIZES}


@pytest.mark.needs("arm64")
@pytest.mark.cells(*SIZES, *PEERS)
def test_pages_that_resuming_takes(cell: Cell, lab: Lab, tmp_path: Path) -> None:
    """A few for page tables, whatever the memory; mainline takes one per 2 MiB."""
    built = lab.kernels[cell.kernel]
    allocator = read_symbols(built.vmlinux)["hibernate_page_alloc"]
    counted = 0

    def count() -> None:
        nonlocal counted
        since = len(m.log())
        with Gdb(tmp_path / "gdb") as gdb:
            gdb.set_break(allocator)
            end = time.monotonic() + 120
            gdb.resume()
            while not m.resumed(since) and time.monotonic() < end:
                if gdb.wait(0.2):
                    counted += 1
                    gdb.clear_break(allocator)
                    gdb.step()
                    gdb.set_break(allocator)
                    gdb.resume()
            gdb.interrupt()
            gdb.clear_break(allocator)
            gdb.resume()

    assert lab.guest
    with hibernate.machine(cell, built, lab.guest, name=f"resume.{cell.name}", report=lab.report,
                           extra=options(tmp_path / "gdb")) as m:
        m.sh("pattern fill /tmp/pattern 64 1")
        m.sleep("echo disk >/sys/power/state", meanwhile=count)
        m.sh("pattern check /tmp/pattern 64 1")
    lab.report(f"   {cell.name}: {counted} pages of tables to resume")
    if cell.kernel.patched:
        assert 0 < counted <= SIZES[cell]
    else:
        assert counted >= cell.memory // 2

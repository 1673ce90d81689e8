"""What bench counts is exact, and within what the copy loop is to take."""

from __future__ import annotations

import struct
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Iterator

import pytest

from conftest import Lab
from lab import bench, downtime, host, model, plugin, proc, qemu, timing
from lab.cells import Cell
from lab.plugin import Counts
from lab.stage import PATIENCE, Stage

pytestmark = [pytest.mark.bench, pytest.mark.needs("arm64")]

MIB = 1 << 20
AT = 0x40200000
TURNS = 1000
LOOP = f"""
start:	mov	x6, #3 << 20			// q0 may be used
	msr	cpacr_el1, x6
	isb
	ldr	x6, ={AT + 4096:#x}
	br	x6
	.ltorg
	.balign 4096
enter:	mov	x9, #77
	ldr	x8, =0x41000000
	mov	x2, #{TURNS}
	dsb	sy
	dmb	ish
	isb
1:	ldp	x0, x1, [x8]			// 12 in the loop
	ldrb	w3, [x8, #1]
	prfm	pldl1strm, [x8, #512]
	stp	x0, x1, [x8]			// two lines
	str	q0, [x8, #64]
	dc	civac, x8
	dc	cvac, x8
	crc32cx	w4, w4, x0
	add	x8, x8, #128
	mrs	x5, ctr_el0
	subs	x2, x2, #1
	b.ne	1b
	add	x9, x8, #256
	add	x10, x9, #64
	dc	zva, x9				// two lines, and a store to one
	dc	zva, x10
	stp	x0, x1, [x9]
	tlbi	vmalle1
	ic	iallu
	ldr	x7, =0x09000000			// the UART
	ldr	w0, [x7, #24]
	msr	sctlr_el1, x5
	ldr	x5, ={AT + 8192:#x}
	br	x5
	.ltorg
	.balign 4096
leave:	mov	x11, #99
2:	wfi
	b	2b
"""


def count_loop(folder: Path) -> Counts:
    """Have the plugin count LOOP."""
    (folder / "loop.S").write_text(LOOP)
    proc.run([f"{host.CROSS_COMPILE}as", "-march=armv8-a+crc", "-o", folder / "loop.o", folder / "loop.S"])
    proc.run([f"{host.CROSS_COMPILE}objcopy", "-O", "binary", folder / "loop.o", folder / "loop"])
    code = (folder / "loop").read_bytes()
    first, last = struct.unpack_from("<2I", code, 4096), struct.unpack_from("<I", code, 8192)
    out = folder / "counts"
    command = [qemu.QEMU, "-machine", "virt", "-cpu", "max", "-m", "64", "-nodefaults", "-display", "none",
               "-serial", "null", "-device", f"loader,file={folder / 'loop'},addr={AT:#x},cpu-num=0,force-raw=on",
               *plugin.options(first, last, out)]
    with subprocess.Popen(command, preexec_fn=proc.die_with_parent) as machine:
        end = time.monotonic() + 30
        while not plugin.read(out) and time.monotonic() < end:
            time.sleep(0.05)
        machine.kill()
    (counts,) = plugin.read(out)
    return counts


def test_arithmetic(tmp_path: Path) -> None:
    """A loop whose every instruction is known."""
    c = count_loop(tmp_path)
    assert c.classes == {
        "load": 2 * TURNS + 4, "store": 2 * TURNS + 1, "prefetch": TURNS, "crc": TURNS, "data": 2 * TURNS + 4,
        "branch": TURNS + 1, "system": TURNS + 1, "dc_zva": 2, "dc_civac": TURNS, "dc_cvac": TURNS, "dc_cvau": 0,
        "dc_ivac": 0, "dc_other": 0, "ic_iallu": 1, "ic_other": 0, "tlbi": 1, "dsb": 1, "dmb": 1, "isb": 1}
    assert c.instructions == sum(c.classes.values()) == 12 * TURNS + 18
    assert c.barriers == 3 and c.device == 1
    # The last load stands behind the instruction that writes to SCTLR_EL1.
    assert (c.loads_cacheable, c.loads_uncached) == (2 * TURNS + 3, 1)
    assert (c.stores_cacheable, c.stores_uncached) == (2 * TURNS + 1, 0)
    assert (c.bytes_loaded, c.bytes_stored) == (17 * TURNS + 24, 32 * TURNS + 16)
    assert (c.lines_fetched, c.lines_owned, c.zeroed_rest) == (2 * TURNS, 1, 64)


@pytest.mark.cells(replace(bench.CELL, name="4k-va48-el1-bench"))
def test_relocation(cell: Cell, lab: Lab) -> None:
    """The figures that the copy loop is to reach, the same twice, and with it every line accounted for."""
    assert lab.guest
    built = lab.kernels[cell.kernel]
    mib = 16
    lines = mib * MIB // 64
    for verify, limit in ((False, 16), (True, 26)):
        c = bench.relocate(built, lab.guest, mib, verify, False)
        lab.report(f"   {'verified' if verify else 'not verified'}: {c.instructions / lines:.2f} per line, {c}")
        if verify:
            assert c == bench.relocate(built, lab.guest, mib, verify, False)
        assert c.instructions == sum(c.classes.values())
        assert c.instructions <= limit * lines
        assert c.lines_fetched == 0 and c.lines_owned == lines and c.zeroed_rest == 0
        assert c.bytes_stored == mib * MIB and c.loads_uncached == c.stores_uncached == c.device == 0
        assert c.classes["dc_zva"] == c.classes["dc_civac"] == c.classes["prefetch"] == lines
        assert c.barriers < 16 and c.classes["tlbi"] == 1
        assert (c.classes["crc"] > 8 * lines) if verify else (c.classes["crc"] == 0)


@pytest.mark.cells(replace(bench.CELL, name="4k-va48-el1-bench-a64fx", cpu="a64fx"))
def test_other_blocks(cell: Cell, lab: Lab) -> None:
    """DC ZVA zeroes 256 bytes here, as many as a line has; where it may not be used all is stored to all the same."""
    assert lab.guest
    built = lab.kernels[cell.kernel]
    mib = 16
    lines = mib * MIB // 64
    c = bench.relocate(built, lab.guest, mib, True, False, cell=cell, block=256)
    assert c.classes["dc_zva"] == c.classes["dc_civac"] == lines // 4
    assert (c.lines_fetched, c.lines_owned, c.zeroed_rest) == (0, lines, 0)
    c = bench.relocate(built, lab.guest, mib, True, True, cell=cell, zva=False)
    assert c.classes["dc_zva"] == 0
    assert (c.lines_fetched, c.lines_owned, c.bytes_stored) == (lines, 0, mib * MIB)


@pytest.mark.needs("claim", "timing")
@pytest.mark.cells(replace(bench.CELL, name="4k-va48-el1-downtime"))
def test_downtime(cell: Cell, lab: Lab) -> None:
    """The phases as they are read off from outside are those that the next kernel tells; nothing copied takes no time."""
    assert lab.guest
    built = lab.kernels[cell.kernel]
    copied, in_place = (downtime.measure(bench.OURS, built, lab.guest, which) for which in (True, False))
    lab.report(f"   {copied}\n   {in_place}")
    assert in_place.said and copied.said
    assert in_place.total < copied.total and in_place.said.copy_ms < copied.said.copy_ms / 10
    for one in (copied, in_place):
        assert one.said
        assert one.said.seconds * 1000 == pytest.approx(one.total, rel=0.02)
    # Seen from outside, shutdown ends with the call of machine_kexec(), which checks what is in place before it ends it.
    assert copied.said.shutdown_ms == pytest.approx(copied.shutdown, rel=0.02)
    assert in_place.said.shutdown_ms > in_place.shutdown


ZEROED, CLEANED = 0xD50B7420, 0xD50B7E20  # DC ZVA and DC CIVAC of x0


@pytest.mark.cells(replace(bench.CELL, name="4k-va48-el1-lines"),
                   replace(bench.CELL, name="4k-va48-el1-lines-a64fx", cpu="a64fx"))
def test_lines(cell: Cell, lab: Lab) -> None:
    """Every line of a page is zeroed, and then cleaned, and no other: a plugin of QEMU 7.2 isn't told which."""
    assert lab.guest
    line = 256 if cell.cpu == "a64fx" else 64
    with Stage(cell, lab.kernels[cell.kernel], lab.guest, name=cell.name, report=lab.report) as stage:
        scene = stage.at_entry(0)
        gdb, end = scene.gdb, scene.control + scene.next
        at = {scene.control + 4 * index: (word & ~31, f"x{word & 31}") for index, word in enumerate(scene.text)
              if word & ~31 in (ZEROED, CLEANED)}
        for address in (*at, end):
            gdb.set_break(address)

        def operations() -> Iterator[tuple[int, int]]:
            """What is done for one word of the list, and to which addresses."""
            while True:
                gdb.resume()
                assert gdb.wait(PATIENCE)
                pc = gdb.register("pc")
                if pc != end:
                    operation, register = at[pc]
                    yield operation, gdb.register(register)
                gdb.step()
                if pc == end:
                    return

        for page in scene.sources(0)[:2]:
            while ZEROED not in dict(done := list(operations())):  # nothing was moved for this word
                pass
            lines = range(scene.virtual(page.dest), scene.virtual(page.dest) + 4096, line)
            assert done == [(operation, each) for operation in (ZEROED, CLEANED) for each in lines]


# What the figures are made of

def counts(lines: int, **others: int) -> Counts:
    """As many instructions as there are lines, and `others`; what is not named is 0."""
    classes = {name: others.pop(name, 0) for name in ("dsb", "dmb", "isb", "prefetch", "dc_zva", "dc_civac")}
    zero = {member.name: 0 for member in fields(Counts) if member.name not in ("instructions", "classes")}
    return Counts(lines * 16, classes, **(zero | others))


def relocation(kernel: str, verify: bool = False, **others: int) -> bench.Relocation:
    """64 MiB."""
    return bench.Relocation(kernel, 64, verify, False, counts(64 * MIB // 64, **others))


LINES = 64 * MIB // 64
OLD = relocation("v5.10", loads_uncached=4 * LINES, stores_uncached=4 * LINES)
THEIRS = relocation(bench.MAINLINE, lines_fetched=LINES, dc_civac=LINES, dsb=16384)
OURS = [relocation(bench.OURS, verify, dc_zva=LINES, dc_civac=LINES, prefetch=LINES, dsb=8) for verify in (False, True)]


def test_model() -> None:
    """What the constants are from comes out as it went in; the other figures by arithmetic."""
    says = {(one.what, one.of): one for one in model.figures([*OURS, THEIRS, OLD])}
    counted = [one for (_, of), one in says.items() if of.endswith("counted")]
    assert len(counted) == 4 and all(abs(one.error) < 1e-9 for one in counted)
    assert {one.published for one in counted} == {7.489539915, 0.03946095, 0.440510736, 0.022158152}
    others = {one.what: one for one in says.values() if one.of == "Stingray"}
    assert others["Stingray, 380 MiB, whole reboot, MMU off"].says == pytest.approx(0.0221 + 0.4405 * 15.2 + 0.2947, abs=1e-3)
    assert others["Stingray, 380 MiB, whole reboot, MMU on"].error == pytest.approx(101.5, abs=0.1)
    assert others["Stingray, 380 MiB, saved"].published == 3.57
    assert others["not named, ~120 MB, MMU on"].says == pytest.approx(0.02216 * 120 / (25 * 1.048576), rel=1e-3)
    assert len(says) == 4 + 3 + 4
    # A third of what passes between memory and caches is gone when nothing is read for ownership.
    assert model.seconds(model.STINGRAY, OURS[0]) == pytest.approx(2 / 3 * model.seconds(model.STINGRAY, THEIRS))


def test_targets() -> None:
    """Each figure is told from one that misses it."""
    def found(relocations: list[bench.Relocation], pages: int = 6, slower: float = 1.0, copied: float = 0.0,
              seen: float = 1000.0) -> dict[str, bool]:
        loads = [bench.Load(name, memory, loader, 100 * (slower if memory > 512 else 1), 100, pages if loader == "load" else None)
                 for name in (bench.OURS, bench.MAINLINE) for memory in (512, 65536, 131072)
                 for loader in ("load", "file")]
        down = [downtime.Downtime(bench.OURS, which, 200.0, seen - 200, timing.Timing(200.0, 1.0, mib, 100.0, 700.0))
                for which, mib in ((True, 40.0), (False, copied))]
        return {one.what: one.reached for one in bench.targets(relocations, loads, down)}

    good = found([*OURS, THEIRS])
    assert len(good) == 11 and all(good.values())
    worse = {"lines read": relocation(bench.OURS, lines_fetched=1, prefetch=LINES),
             "prefetched": relocation(bench.OURS, prefetch=LINES // 2),
             "barriers": relocation(bench.OURS, prefetch=LINES, isb=16)}
    for word, one in worse.items():
        missed = [what for what, reached in found([*OURS, one, THEIRS]).items() if not reached]
        assert len(missed) == 1 and word in missed[0]
    assert sum(not reached for reached in found([*OURS, THEIRS], pages=17).values()) == 2
    assert sum(not reached for reached in found([*OURS, THEIRS], slower=1.2).values()) == 2
    assert sum(not reached for reached in found([*OURS, THEIRS], copied=0.1).values()) == 1
    assert sum(not reached for reached in found([*OURS, THEIRS], seen=1030.0).values()) == 1
    slow = [replace(one, counts=replace(one.counts, instructions=27 * LINES)) for one in OURS]
    assert sum(not reached for reached in found([*slow, THEIRS]).values()) == 2


def test_no_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that the host has no room for is left out."""
    monkeypatch.setattr(host, "available_memory", lambda: 4.5)
    assert bench.carried() == [512, 2048, 8192, 16384, 65536, 131072]
    monkeypatch.setattr(host, "available_memory", lambda: 8.0)
    assert bench.carried() == list(bench.MEMORIES)

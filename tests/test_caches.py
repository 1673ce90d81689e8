"""No kernel reads what is not the newest value, or loses it. And does the model see?"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Callable

import pytest

from conftest import Lab, name_of
from lab import caches, host, proc, qemu
from lab.caches import Finding, Kernel, Names, Seen, describe, machine_for
from lab.cells import A72, CELLS, Cell

pytestmark = pytest.mark.caches


# The model itself: programs of a few instructions

AT, MEMORY = 0x40200000, 64  # MiB
# x20 is a line that nobody has touched, x21 another; x19 is what the latter is mapped at besides
START = """
	.arch	armv8.2-a
	.macro	cached
	msr	sctlr_el1, x11
	isb
	.endm
	.macro	uncached
	msr	sctlr_el1, x10
	isb
	.endm
	.macro	code				// a function, with the MMU on
	stp	w14, w15, [x20]
	.endm
start:	mov	x0, #0xff			// normal memory, written back
	msr	mair_el1, x0
	ldr	x0, =0x803519			// 39 bits of 4 KiB pages, tables cached, TTBR0 only
	msr	tcr_el1, x0
	adr	x0, table
	msr	ttbr0_el1, x0
	isb
	mrs	x10, sctlr_el1
	mov	x0, #0x1005			// M, C, I
	orr	x11, x10, x0
	ldr	w14, =0xd2800020		// mov x0, #1
	ldr	w15, =0xd65f03c0		// ret
	ldr	x20, =0x41000000
	ldr	x21, =0x41000040
	ldr	x19, =0x81000040
"""
END = """
	ldr	x0, =0x84000008			// PSCI: off
	hvc	#0
	.ltorg
	.balign 4096
table:	.quad	0, 0x40000705, 0x40000705
	.fill	509, 8, 0
"""

RIGHT = {
    "cleaned before it is read": "cached; str x0, [x20]; dc civac, x20; dsb sy; uncached; ldr x0, [x20]",
    "cleaned by another address": "cached; str x0, [x21]; dc cvac, x19; dsb sy; uncached; ldr x0, [x21]",
    "a neighbour in the line": "cached; str w0, [x20]; uncached; ldr w0, [x20, #4]",
    "written before, and invalidated": "uncached; str x0, [x20]; dc ivac, x20; dsb sy; cached; ldr x0, [x20]",
    "written anew": "uncached; str x0, [x20]; cached; str x0, [x20]; ldr x0, [x20]",
    "written over, and invalidated": "cached; str x0, [x20]; uncached; str x0, [x20]; dc ivac, x20; dsb sy; "
                                     "ldr x0, [x20]; cached; ldr x0, [x20]",
    "an instruction by address": "cached; code; dc cvau, x20; dsb ish; ic ivau, x20; dsb ish; isb; blr x20",
    "an instruction by all": "cached; code; dc cvac, x20; dsb ish; ic iallu; dsb nsh; isb; blr x20",
    "an instruction, with the MMU off": "cached; code; dc cvac, x20; dsb sy; uncached; blr x20",
}
WRONG = {
    "load with the MMU off of what only caches hold": "cached; str x0, [x20]; uncached; ldr x0, [x20]",
    "load with the MMU off of what was cleaned without a DSB":
        "cached; str x0, [x20]; dc cvac, x20; uncached; ldr x0, [x20]",
    "fetch with the MMU off of what only caches hold": "cached; code; dc cvau, x20; dsb sy; uncached; blr x20",
    "fetch with the MMU off of what was cleaned without a DSB": "cached; code; dc cvac, x20; uncached; blr x20",
    "load with the MMU on of what memory holds newer": "uncached; str x0, [x20]; cached; ldr x0, [x20]",
    "load with the MMU off of what a dirty line may have undone":
        "cached; str x0, [x20]; uncached; str x0, [x20]; ldr x0, [x20]",
    "invalidated before it was cleaned": "cached; str x0, [x20]; dc ivac, x20; dsb sy",
    "cleaned over what memory holds newer":
        "cached; str x0, [x20]; uncached; str x0, [x20]; dc civac, x20; dsb sy",
    "store with the MMU off beside a dirty word": "cached; str w0, [x20]; uncached; str w0, [x20, #60]",
    "fetch of what was not cleaned to the PoU": "cached; code; ic iallu; dsb nsh; isb; blr x20",
    "fetch of what the I-cache may hold older": "cached; code; dc cvau, x20; dsb ish; isb; blr x20",
    "fetch of new instructions without an ISB":
        "cached; code; dc cvau, x20; dsb ish; ic ivau, x20; dsb ish; blr x20",
    "no ISB behind a change of SCTLR": "msr sctlr_el1, x11; nop; isb",
    "maintenance by set and way": "dc cisw, xzr",
}
# More ways to the same: what is done, and what it is found to be
MORE = {
    "zeroed by DC ZVA": ("cached; dc zva, x20; uncached; ldr x0, [x20, #32]",
                         "load with the MMU off of what only caches hold"),
    "cleaned to the PoU only": ("cached; str x0, [x20]; dc cvau, x20; dsb sy; uncached; ldr x0, [x20]",
                                "load with the MMU off of what only caches hold"),
    "a barrier for stores alone": ("cached; str x0, [x20]; dc cvac, x20; dsb st; uncached; ldr x0, [x20]",
                                   "load with the MMU off of what was cleaned without a DSB"),
    "a barrier for this CPU alone": ("cached; str x0, [x20]; dc cvac, x20; dsb nsh; uncached; ldr x0, [x20]",
                                     "load with the MMU off of what was cleaned without a DSB"),
    "an instruction, and a barrier for this CPU alone": (
        "cached; code; dc cvau, x20; dsb ish; ic ialluis; dsb nsh; isb; blr x20", "fetch of what the I-cache may hold older"),
    "stored to after it was cleaned": ("cached; str x0, [x20]; dc cvac, x20; str x0, [x20]; dsb sy; uncached; "
                                       "ldr x0, [x20]", "load with the MMU off of what only caches hold"),
    "the line before it": ("cached; str x0, [x21]; dc cvac, x20; dsb sy; uncached; ldr x0, [x21]",
                           "load with the MMU off of what only caches hold"),
    "a pair, of which the second is dirty": ("cached; str x0, [x20, #8]; uncached; ldp x0, x1, [x20]",
                                             "load with the MMU off of what only caches hold"),
    "a byte": ("cached; strb w0, [x20, #3]; uncached; ldrb w0, [x20, #1]",
               "load with the MMU off of what only caches hold"),
    "the D-cache is off": ("mov x0, #4; bic x1, x11, x0; cached; str x0, [x20]; msr sctlr_el1, x1; isb; ldr x0, [x20]",
                           "load with the MMU off of what only caches hold"),
    "cleaned before it is stored to with the MMU off": (
        "cached; str x0, [x20]; dc cvac, x20; dsb sy; uncached; str x0, [x20]; cached; ldr x0, [x20]",
        "load with the MMU on of what memory holds newer"),
}


def execute(folder: Path, body: str, strict: bool = True) -> Seen:
    """What is seen of a program, statements separated by semicolons."""
    (folder / "program.S").write_text(START + body.replace("; ", "\n") + END)
    proc.run([f"{host.CROSS_COMPILE}as", "-o", folder / "program.o", folder / "program.S"])
    proc.run([f"{host.CROSS_COMPILE}objcopy", "-O", "binary", folder / "program.o", folder / "program"])
    cell = machine_for(CELLS["4k-va48-el1-a72"], memory=MEMORY)
    subprocess.run([*qemu.program(*qemu.versions(cell)), "-machine", "virt", "-cpu", A72, "-m", str(MEMORY), "-nodefaults",
                    "-display", "none", "-device",
                    f"loader,file={folder / 'program'},addr={AT:#x},cpu-num=0,force-raw=on",
                    *caches.options(cell, folder / "out", strict)], check=True, timeout=60)
    return caches.read(folder / "out")


@pytest.mark.parametrize("body", RIGHT.values(), ids=list(RIGHT))
def test_nothing_is_found_where_it_is_right(body: str, tmp_path: Path) -> None:
    assert execute(tmp_path, body) == Seen((), ())


@pytest.mark.parametrize("kind, body", WRONG.items(), ids=list(WRONG))
def test_each_kind_is_found(kind: str, body: str, tmp_path: Path) -> None:
    assert {one.kind for one in execute(tmp_path, body).findings} == {kind}


@pytest.mark.parametrize("body, kind", MORE.values(), ids=list(MORE))
def test_it_is_found_this_way_too(body: str, kind: str, tmp_path: Path) -> None:
    assert {one.kind for one in execute(tmp_path, body).findings} == {kind}


def test_where_and_by_whom(tmp_path: Path) -> None:
    """A finding names the instruction, the address, and the last that stored there."""
    (found,) = execute(tmp_path, "first: cached; str w0, [x20, #8]; uncached; last: ldr w0, [x20, #8]").findings
    symbols = {line.split()[2]: int(line.split()[0], 16) for line in
               proc.run([f"{host.CROSS_COMPILE}nm", tmp_path / "program.o"]).stdout.decode().splitlines()}
    assert found == Finding(found.kind, 0, AT + symbols["last"], AT + symbols["last"], 0x41000008,
                            AT + symbols["first"] + 8, ())


def test_what_nothing_has_brought_to_a_cache(tmp_path: Path) -> None:
    """Only speculation can have: whoever is not strict does not see it. What was read before is there."""
    stale = "load with the MMU on of what memory holds newer"
    assert execute(tmp_path, "uncached; str x0, [x20]; cached; ldr x0, [x20]", strict=False).findings == ()
    (tmp_path / "out").unlink(missing_ok=True)
    (found,) = execute(tmp_path, "cached; ldr x0, [x20]; uncached; str x0, [x20]; cached; ldr x0, [x20]",
                       strict=False).findings
    assert found.kind == stale


def test_every_kind_has_its_program() -> None:
    text = (Path(caches.plugin.SOURCES) / "caches.c").read_text()
    names = text[text.index("names[KINDS] = {"):]
    assert [line.split('"')[1] for line in names[:names.index("};")].splitlines()[1:]] == list(WRONG)


# Kernels

CHAIN = ("load-nocheck", "in place", "resume, crash")
PLAIN = {replace(cell, core=label == "VHE"): ("load", *CHAIN[1:]) if label == "EL1" else CHAIN
         for label, cell in caches.machines().items()}
# Everything else, one machine each.
STEPS = [step for step in caches.STEPS if step != "resume"]
SINGLE = {replace(cell, name=f"{cell.name}-{step.replace(', ', '-').replace(' ', '-')}", core=False):
          ("cpus", "file") if step == "cpus" else (step,) for cell in caches.machines().values() for step in STEPS}
# The same on the CPU that has everything, and a linear map of blocks.
WIDE = {replace(cell, name=f"{cell.name}-blocks"): ("load-nocheck", "file", "resume, crash")
        for cell in (machine_for(CELLS[f"4k-va48-{el}"], rodata="noalias", cpus=2, core=False)
                     for el in ("el1", "nvhe", "vhe"))}
RUNS = PLAIN | SINGLE | WIDE


def check(seen: Seen, names: Names, report: Callable[[str], None]) -> None:
    """Nothing was found, although there was something to be seen."""
    lines = [describe(one, names) for one in seen.findings]
    report(f"   {len(seen.kernels)} kernels were entered, {len(lines)} findings")
    last = seen.kernels[-1].counts
    assert all(last[what] for what in ("stores_off", "loads_off", "blocks_off", "completed"))
    assert not lines, "\n".join(lines[:100])


@pytest.mark.cells(*RUNS)
def test_kernels(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> None:
    """Handovers, crashes and resumes."""
    assert lab.guest
    built = lab.kernels[cell.kernel]
    seen = caches.observe(cell, built, lab.guest, RUNS[cell], name=name_of(request), report=lab.report)
    check(seen, Names(built.vmlinux), lab.report)

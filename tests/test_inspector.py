"""What a kernel would find: registers as booting.rst has them, memory byte for byte. And does the inspector see?"""

from __future__ import annotations

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import host, inspector, qemu
from lab.cells import CELLS, Cell, core_only, each_with
from lab.inspector import HEAD, RANGE, SIZE, Report, inspect, parse
from lab.kload import Segment, kernel_base
from lab.machine import Machine, find_complaints

pytestmark = [pytest.mark.inspector, pytest.mark.needs("arm64")]

MIB = 1 << 20

# Who is entered by kexec_file_load() in a plain check: each exception level, and where the image is in place
BY_FILE = ("4k-va48-vhe-cma", "4k-va48-vhe-new", "4k-va48-nvhe-a57", "4k-va48-el1-a72", "64k-va52-vhe-nolva", "64k-va52-nvhe-cma",
           "64k-va52-el1-holes")


def pattern(mem: int, memsz: int, seed: int, bufsz: int | None = None) -> Segment:
    return Segment(mem, memsz, f"pattern {seed} {memsz if bufsz is None else bufsz:#x}")


def good(report: Report) -> None:
    """Every check passed, and none was skipped."""
    assert report.good and not report.ktap.skipped and not report.differences, report.text
    assert report.end == "off"


def test_on_every_cell(cell: Cell, machine: Machine) -> None:
    """Segments over the running kernel, beside each other, of one page, with less contents than room."""
    page = cell.kernel.pages * 1024
    start, size = qemu.first_bank(cell)
    middle, kernel = start + size // 2, kernel_base(machine)
    # KASLR may have put the kernel anywhere; what is about it may be a hole.
    far = [start for start in (middle + 32 * MIB, middle - 96 * MIB) if abs(start - kernel) > 64 * MIB][0]
    segments = [pattern(kernel, 8 * MIB, 1),
                pattern(far, 4 * MIB, 2, 4 * MIB - page - 13), pattern(far + 4 * MIB, page, 3),
                pattern(far + 4 * MIB + page, page, 4, 1), Segment(far + 4 * MIB + 3 * page, 2 * page),
                Segment(far + 8 * MIB, MIB, "fill 0x5a 1000")]
    since = len(machine.log())
    good(inspect(machine, inspector.statements(cell, far - 2 * MIB, segments, [f"watch {16 * MIB} 9"])))
    assert not find_complaints(machine.log()[since:])


@pytest.mark.cells(*core_only(CELLS.values(), *BY_FILE))
def test_by_kexec_file_load(cell: Cell, machine: Machine) -> None:
    """The same contract with a device tree in x0 and an address that the kernel chose."""
    report = inspect(machine, inspector.file_statements(cell))
    assert report.good and report.end == "off", report.text
    assert set(report.ktap.skipped) == {"destinations hold what was sent", "watched memory is untouched"}
    assert "x0 points to a device tree" in report.ktap.passed and "at a multiple of 2 MiB" in report.ktap.passed


# The inspector is entered by way of something that is wrong on purpose.

INSPECTOR = qemu.RAM_BASE + 256 * MIB
DATA = INSPECTOR + 16 * MIB
DATA_SIZE = 4 * MIB
TRAMPOLINE = INSPECTOR + 32 * MIB
TABLE = TRAMPOLINE + 4096
ELSEWHERE = INSPECTOR + 64 * MIB
FLIPPED = DATA + 3 * MIB + 0x1235
WATCHED_OFFSET = 0x3C7


@dataclass(frozen=True)
class Wrong:
    """Instructions that make something wrong; which results fail then, and what else is said."""

    code: str
    failed: tuple[str, ...]
    says: str = ""


FLIP = "ldrb w10, [x9]; eor w10, w10, #4; strb w10, [x9]"
ANYWHERE = {
    "x0": Wrong("mov x0, #0x1234", ("x0 is what it was to be",), "found 0x1234 expected 0x0"),
    "x1": Wrong("mov x1, #1", ("x1 to x3 are 0",)),
    "x3": Wrong("mov x3, #1 << 40", ("x1 to x3 are 0",)),
    "FIQ": Wrong("msr daifclr, #1", ("all exceptions are masked",), "found 0x380 expected 0x3c0"),
    "debug": Wrong("msr daifclr, #8", ("all exceptions are masked",)),
    "D-cache": Wrong("mrs x9, sctlr_elX; orr x9, x9, #1 << 2; msr sctlr_elX, x9; isb", ("D-cache is off",)),
    "endianness": Wrong("mrs x9, sctlr_elX; orr x9, x9, #1 << 25; msr sctlr_elX, x9; isb", ("little endian",)),
    "place": Wrong(f"ldr x9, ={INSPECTOR}; ldr x10, ={ELSEWHERE}; mov x11, x10; add x12, x9, #0x20, lsl #12\n"
                   "1: ldr x13, [x9], #8; str x13, [x11], #8; cmp x9, x12; b.ne 1b; ic iallu; dsb sy; isb; br x10",
                   ("at the address it was sent to",), f"found {ELSEWHERE:#x} expected {INSPECTOR:#x}"),
    "GIC": Wrong("mov x9, #0xf0; msr s3_0_c4_c6_0, x9; mov x9, #1; msr s3_0_c12_c12_7, x9; isb\n"
                 "mov x9, #1; msr s3_0_c12_c11_5, x9; isb; mov x10, #0x10000\n"
                 "1: subs x10, x10, #1; b.ne 1b; mrs x9, s3_0_c12_c12_0; isb", ("GIC: no interrupt is active",)),
    "arguments": Wrong(f"ldr x9, ={INSPECTOR + SIZE + HEAD + RANGE + 8}; {FLIP}", ("its arguments are whole",)),
    "inspector": Wrong(f"ldr x9, ={INSPECTOR + 8}; {FLIP}", ("the inspector itself is whole",)),
    "byte": Wrong(f"ldr x9, ={FLIPPED}; {FLIP}", ("destinations hold what was sent",)),
    "watched": Wrong(f"ldr x9, ={INSPECTOR + SIZE + HEAD}\n1: ldrh w10, [x9, #26]; cmp w10, #1; b.eq 2f\n"
                     f"add x9, x9, #{RANGE}; b 1b\n2: ldr x9, [x9]; add x9, x9, #{WATCHED_OFFSET}; {FLIP}",
                     ("watched memory is untouched",)),
}
AT_EL1 = {
    # 1 GiB blocks, device memory first, at their physical addresses
    "MMU": Wrong(f"ldr x9, ={TABLE}; msr ttbr0_el1, x9; ldr x9, =0x500803519; msr tcr_el1, x9\n"
                 "mov x9, #0xff00; msr mair_el1, x9; isb; tlbi vmalle1; dsb sy; isb\n"
                 "mrs x9, sctlr_el1; orr x9, x9, #1; msr sctlr_el1, x9; isb", ("MMU is off",)),
}
AT_EL2 = {
    "timer": Wrong("msr cntfrq_el0, xzr", ("the timer runs, its frequency is known",), "CNTFRQ 0x0"),
    "level": Wrong("mov x9, #0x3c5; msr spsr_el2, x9; adr x9, 1f; msr elr_el2, x9\n"
                   "mov x9, #1 << 31; msr hcr_el2, x9; mov x9, #0x800; movk x9, #0x30d0, lsl #16; msr sctlr_el1, x9\n"
                   "isb; eret\n1: nop", ("exception level",), "found 0x1 expected 0x2"),
}
MACHINES = (CELLS["4k-va48-el1"], CELLS["4k-va48-vhe"], CELLS["4k-va48-nvhe-a57"])
# Machines and what is wrong on them; in a plain check each of it once.
WRONG = each_with(MACHINES, ANYWHERE, lambda cell, name: cell is MACHINES[list(ANYWHERE).index(name) % len(MACHINES)])


def assemble(code: str, el: int, folder: Path) -> bytes:
    """Machine code for `code`, followed by a branch to the inspector. "elX" is the exception level that it runs at."""
    source, program, flat = folder / "code.S", folder / "code.o", folder / "code.bin"
    source.write_text(f".arch armv8.2-a\nldr x18, ={INSPECTOR}\n{code.replace('elX', f'el{el}')}\nbr x18\n.ltorg\n")
    for command in (["gcc", "-c", source, "-o", program], ["objcopy", "-O", "binary", "-j", ".text", program, flat]):
        subprocess.run([host.CROSS_COMPILE + str(command[0]), *command[1:]], check=True, timeout=60)
    data = flat.read_bytes()
    assert len(data) <= 4096
    # Block descriptors of 1 GiB for MMU: device memory first (MAIR's index 0), then normal memory
    blocks = [n << 30 | (0x401 if n == 0 else 0x705) for n in range(512)]
    return data.ljust(4096, b"\0") + struct.pack("<512Q", *blocks)


def enter_by(machine: Machine, cell: Cell, wrong: Wrong, folder: Path, further: tuple[str, ...] = ()) -> Report:
    machine.put("/tmp/code", assemble(wrong.code, cell.entered_at, folder))
    segments = [pattern(DATA, DATA_SIZE, 5), Segment(TRAMPOLINE, 2 * 4096, "file /tmp/code")]
    return inspect(machine, inspector.statements(cell, INSPECTOR, segments, [f"watch {4 * MIB} 6", *further],
                                                 entry=TRAMPOLINE))


def reported(machine: Machine, cell: Cell, wrong: Wrong, folder: Path) -> Report:
    """What is wrong is found, by name, and nothing else is; the machine is reset instead of turned off."""
    report = enter_by(machine, cell, wrong, folder)
    assert report.ktap.failed == wrong.failed and report.ktap.complete, report.text
    assert wrong.says in report.text and report.end == "reset"
    return report


@pytest.mark.cells(*WRONG)
def test_what_is_wrong_is_reported(cell: Cell, machine: Machine, tmp_path: Path) -> None:
    name = WRONG[cell]
    report = reported(machine, cell, ANYWHERE[name], tmp_path)
    places = [(d.kind, d.number, d.address, d.words) for d in report.differences]
    if name == "byte":
        assert places == [("destination", 1, FLIPPED, 1)]
    elif name == "watched":
        first = report.differences[0]
        assert places == [("watched", 0, first.start + WATCHED_OFFSET, 1)]
    elif name != "inspector":
        assert not places


@pytest.mark.parametrize("name", AT_EL1)
@pytest.mark.cells(CELLS["4k-va48-el1"])
def test_what_is_wrong_at_el1(cell: Cell, machine: Machine, name: str, tmp_path: Path) -> None:
    reported(machine, cell, AT_EL1[name], tmp_path)


@pytest.mark.parametrize("name", AT_EL2)
@pytest.mark.cells(CELLS["4k-va48-vhe"], CELLS["4k-va48-nvhe-a57"])
def test_what_is_wrong_at_el2(cell: Cell, machine: Machine, name: str, tmp_path: Path) -> None:
    reported(machine, cell, AT_EL2[name], tmp_path)


@pytest.mark.cells(*MACHINES)
def test_any_stack_pointer_will_do(cell: Cell, machine: Machine, tmp_path: Path) -> None:
    """An SP of nonsense, and the other one selected, is allowed: booting.rst does not speak of it."""
    code = "msr spsel, #1; mov x9, #0x123; movk x9, #0xdead, lsl #48; mov sp, x9; msr spsel, #0; mov sp, x9"
    good(enter_by(machine, cell, Wrong(code, ()), tmp_path))


@pytest.mark.cells(*MACHINES)
def test_an_exception_is_reported(cell: Cell, machine: Machine, tmp_path: Path) -> None:
    """The inspector is told of a GICv2 where nothing is: an external abort."""
    report = enter_by(machine, cell, Wrong("nop", ()), tmp_path, ("gicc 0xfc000000",))
    assert report.ktap.failed == ("no exception",) and report.end == "reset", report.text
    assert re.search(r"^# vector 0x4 ESR 0x9[67]\w{4}10 ELR, .* FAR 0xfc000014$", report.text, re.M), report.text


@pytest.mark.cells(CELLS["4k-va48-el1"])
@pytest.mark.parametrize("end, found", [("off", "off"), ("reset", "reset")])
def test_the_end_that_was_asked_for(cell: Cell, machine: Machine, end: str, found: str) -> None:
    report = inspect(machine, inspector.statements(cell, INSPECTOR, [], [f"end {end}"]))
    assert report.good and report.end == found


def test_reports_are_understood() -> None:
    text = ("junk\r\nTAP version 13\r\n1..16\r\n# EL1 ...\r\nok 1 a\r\n"
            "# destination 3 at 0x40000000 size 0x1000 first difference at 0x40000123 found 0x1 expected 0x2, "
            "words that differ: 7\r\nnot ok 2 b\r\n# inspector: resetting\r\n")
    report = parse(text)
    assert report.ktap.failed == ("b",) and not report.good and report.end == "reset"
    assert [(d.kind, d.number, d.start, d.address, d.words) for d in report.differences] == \
        [("destination", 3, 0x40000000, 0x40000123, 7)]
    assert parse("a panic").end is None and not parse("a panic").good

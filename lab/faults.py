"""What can go wrong on the way to the next kernel, done on purpose through QEMU's gdb server.

A Fault changes something in a Scene and says what has to come out of it. The
same can be done to mainline. Run as a program this prints what both make of
each, as a table for the documentation: python3 -m lab.faults --table
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
from dataclasses import dataclass, replace
from typing import Callable

from lab import base, build, cells, guest, qemu, say
from lab.build import Built
from lab.cells import Cell
from lab.crc import change
from lab.errors import LabError
from lab.guest import Guest
from lab.stage import DESTINATION, DONE, PAGE, PARK, SOURCE, Entry, Outcome, Scene, Stage

MACHINES = ("4k-va48-el1", "4k-va48-nvhe-a57", "4k-va48-vhe")
LIMIT = 20.0  # seconds after the fault until it is over and done with

# Exception classes, and of aborts: what kind, and WnR
UNKNOWN, HVC64, ABORT, BRK64, SERROR = 0x00, 0x16, 0x25, 0x3C, 0x2F
TRANSLATION, PERMISSION, EXTERNAL, WRITE = 0x04, 0x0C, 0x10, 1 << 6
KIND = 0x3C  # mask: all of DFSC but the level

ROOM = 1000  # characters, more than a report has

# Instructions
UDF = 0x00000000
HVC = 0xD4000002
SCTLR = 0xD5181000  # msr sctlr_el1, x0
BRK = 0xD4202000  # brk #FAULT_BRK_IMM
BAD_CALL = 0xD2800EE0  # mov x0, #0x77: a hypercall that nobody serves
LOAD_NULL = (0xAA1F03E0, 0xF9400000)  # mov x0, xzr; ldr x0, [x0]
SELF_IRQ = (0xD2800020, 0xD518CCE0, 0xD518CBA0, 0xD5033FDF, 0xD50342FF)
#          mov x0, #1; msr icc_igrpen1_el1, x0; msr icc_sgi1r_el1, x0; isb; msr daifclr, #2: an SGI to itself
TO_EL2 = (
    0x10000061,  # adr x1, .+12
    0xD2800020,  # mov x0, #HVC_SOFT_RESTART
    0xD4000002)  # hvc #0: on from the next instruction, at EL2
VIRTUAL_SERROR = (
    0xD53C1100,  # mrs x0, hcr_el2
    0xD2802402,  # mov x2, #HCR_VSE | HCR_AMO
    0xAA020000,  # orr x0, x0, x2
    0xD51C1100,  # msr hcr_el2, x0
    0x10000081,  # adr x1, .+16
    0xD51C4021,  # msr elr_el2, x1
    0xD5033FDF,  # isb
    0xD69F03E0,  # eret: SErrors are masked or not as they were at the HVC
    PARK)

HCR_VSE, HCR_AMO = 1 << 8, 1 << 5
AT_EL2 = (
    0xD4000002,  # hvc #0: x0 is HVC_SOFT_RESTART, x1 the next instruction
    0xD53C1106,  # mrs x6, hcr_el2
    0xAA0700C6,  # orr x6, x6, x7
    0xD51C1106,  # msr hcr_el2, x6
    0xD51C4025,  # msr elr_el2, x5: behind the eret
    0xD5033FDF,  # isb
    0xD69F03E0,  # eret
    PARK)

LABELS = {"el1": "EL1", "nvhe": "nVHE", "vhe": "VHE"}
SLOTS = tuple(f"{group} {kind}" for group in ("sp0", "spx", "lower", "lower32")
              for kind in ("sync", "irq", "fiq", "serror"))


# What has to come out

@dataclass(frozen=True)
class Corrupt:
    """A segment that is reported as such: its CRC32C at load, and how that differs from what is found.

    None where they can't be foretold. Without a segment it is the list of pages.
    """

    segment: int | None
    at_load: int | None
    change: int | None


@dataclass(frozen=True)
class Taken:
    """An exception that is reported.

    `ec` and, of the bits in `mask`, `iss` are what ESR has to hold. `elr` is an
    offset in the control page; `far` a range; `source` and `dest` are physical.
    None where it can't be foretold. Without a segment none was being moved.
    """

    vector: str
    ec: int | None
    elr: int | None = None
    mask: int = 0
    iss: int = 0
    far: range | None = None
    segment: int | None = None
    source: int | None = None
    dest: int | None = None
    resets: bool = True  # unless panic=0


@dataclass(frozen=True)
class CutShort:
    """A fault in the middle of the report of another in `vector`. `text` is a pattern for what is written."""

    vector: str
    text: str


Expected = Corrupt | Taken | CutShort


REPORT = re.compile(
    r"kexec: fault while relocating: (?P<vector>\w+ \w+), ESR (?P<esr>\w+) FAR (?P<far>\w+) SPSR (?P<spsr>\w+)\n"
    r"kexec: ELR (?P<elr>\w+), control page \+ (?P<offset>\w+)"
    r"(?:\nkexec: segment (?P<segment>\w+), page (?P<source>\w+) to (?P<dest>\w+))?\n"
    r"kexec: (?P<end>parked|resetting)\n")
MISMATCH = re.compile(r"kexec: corrupt image: (?:segment (?P<segment>\w+)|list of pages), CRC32C at load (?P<at_load>\w+), "
                      r"now (?P<now>\w+)\nkexec: (?P<end>parked|resetting)\n")
REFUSAL = re.compile(r"kexec: (?:segment (?P<segment>\d+)|the list of pages) was overwritten: "
                     r"CRC32C at load (?P<at_load>\w+), now (?P<now>\w+)")
NOTHING = r"(?s)(?!.*kexec: )"
END = re.compile(r"^kexec: (parked|resetting)$", re.MULTILINE)
ENDED = re.compile(r"^kexec: (parked|resetting)\r\n", re.MULTILINE)  # the whole line, as it is written


A_LIST = Corrupt(None, None, None)


# What is done, and what has to come of it

def source_bit(s: Scene) -> Corrupt:
    e = s.middle
    return Corrupt(e.segment, s.crc(e.segment), s.flip(e, 0x123, 3))


def source_last_byte(s: Scene) -> Corrupt:
    e = s.last
    return Corrupt(e.segment, s.crc(e.segment), s.flip(e, PAGE - 1, 7))


def in_place_bit(s: Scene) -> Corrupt:
    start, size = s.stage.loaded.segments[1]
    s.flip_byte(start + size // 2, 5)
    return Corrupt(1, None, change(1 << 5, size - size // 2 - 1))


def list_source(s: Scene) -> Taken:
    e = s.middle
    s.put(e.at, s.unmapped | SOURCE)
    far = s.virtual(s.unmapped)
    return Taken("spx sync", ABORT, None, KIND | WRITE, TRANSLATION, range(far, far + PAGE),
                 e.segment, s.unmapped, e.dest)


def list_destination(s: Scene) -> Taken:
    e = s.destination(1)
    s.put(e.at, s.unmapped | DESTINATION)
    far = s.virtual(s.unmapped)
    first = next(x for x in s.entries if x.segment == 1 and x.value & SOURCE)
    return Taken("spx sync", ABORT, None, KIND | WRITE, TRANSLATION | WRITE, range(far, far + PAGE),
                 1, first.address, s.unmapped)


def list_flag(s: Scene) -> Taken:
    e = s.middle
    s.put(e.at, e.address | 0x20)
    return Taken("spx sync", BRK64, s.find(BRK) if s.args else None, 0xFFFF, 0x100, None, e.segment)


def list_ends_early(s: Scene) -> Corrupt:
    e = s.middle
    s.put(e.at, DONE)
    return Corrupt(e.segment, s.crc(e.segment), None)


def list_ends_between(s: Scene) -> Corrupt:
    s.put(s.destination(2).at, DONE)
    return A_LIST


def list_elsewhere(s: Scene) -> Corrupt:
    e = s.destination(1)
    s.put(e.at, e.value + (s.unmapped - (1 << 30) - e.address) // 2 // PAGE * PAGE)
    return A_LIST


def list_onto_control(s: Scene) -> Corrupt:
    s.put(s.destination(1).at, s.control | DESTINATION)
    return A_LIST


def before_moving(inject: Callable[[Scene], Expected]) -> Callable[[Scene], Corrupt]:
    """What `inject` does to the list is found before the list is followed."""
    def noticed(s: Scene) -> Corrupt:
        inject(s)
        return A_LIST

    return noticed


def text_undefined(s: Scene) -> Taken:
    s.patch(s.next, UDF)
    return Taken("spx sync", UNKNOWN, s.next)


def text_null(s: Scene) -> Taken:
    s.patch(s.next, *LOAD_NULL)
    return Taken("spx sync", ABORT, s.next + 4, KIND | WRITE, TRANSLATION, range(0, 1))


def text_mmu_off(s: Scene) -> Taken:
    at = s.find(SCTLR, 0xFFFFFFE0) + 8  # behind the isb
    s.patch(at, UDF)
    last = s.last
    return Taken("spx sync", UNKNOWN, at, segment=last.segment, source=last.address, dest=last.dest + PAGE)


def text_irq(s: Scene) -> Taken:
    s.patch(s.next, *SELF_IRQ)
    return Taken("spx irq", None)


def first_moved(s: Scene) -> Entry:
    """The first page that is written by moving."""
    return next(e for e in s.entries if e.value & SOURCE and e.address != e.dest)


def table_cleared(s: Scene) -> Taken:
    leaf = s.leaf(first_moved(s).dest)
    s.put(leaf.at, 0)
    return Taken("spx sync", ABORT, None, KIND, TRANSLATION, leaf.range)


def table_read_only(s: Scene) -> Taken:
    e = first_moved(s)
    leaf = s.leaf(e.dest)
    s.put(leaf.at, leaf.value | 1 << 7)  # AP[2]
    far = s.virtual(e.dest)
    return Taken("spx sync", ABORT, None, KIND | WRITE, PERMISSION | WRITE, range(far, far + 1),
                 e.segment, e.address, e.dest)


def table_nowhere(s: Scene) -> Taken:
    leaf = s.leaf(first_moved(s).dest)
    s.put(leaf.at, leaf.value | 1 << 38)
    return Taken("spx sync", ABORT, None, KIND, EXTERNAL, leaf.range)


def hvc_stray(s: Scene) -> Taken:
    s.patch(s.next, BAD_CALL, HVC)
    return Taken("lower sync" if s.stage.cell.el == "nvhe" else "spx sync", HVC64, s.next + 8)


def hvc_wrong(s: Scene) -> Taken:
    at = s.find(HVC)
    s.patch(at - 4, BAD_CALL)
    last = s.last
    return Taken("lower sync", HVC64, at + 4, segment=last.segment, source=last.address, dest=last.dest + PAGE)


def serror(s: Scene) -> Taken:
    s.patch(s.next, *TO_EL2, *VIRTUAL_SERROR)
    return Taken("spx serror", SERROR)


def serror_of(s: Scene, aet: int) -> int:
    """The same on a CPU with RAS, which tells how bad it is. Returns where the CPU is to be found if it goes on."""
    iss = aet << 10 | 0x11
    code = (*TO_EL2, 0xD2800002 | iss << 5, 0xD51C5262, *VIRTUAL_SERROR)  # mov x2, #iss; msr vsesr_el2, x2
    s.patch(s.next, *code)
    return s.next + 4 * (len(code) - 1)


def serror_in_kernel(s: Scene, symbol: str) -> None:
    """Have a virtual SError pending, and masked, when a function of a kernel without VHE is called.

    Nobody but EL2 can do that. The hyp-stub branches there, to instructions that
    overwrite a function which is not called any more.
    """
    gdb, symbols = s.gdb, s.stage.symbols
    gdb.run_to(symbols[symbol], LIMIT, str(s.stage.machine.console))
    kept = {name: gdb.register(name) for name in ("pc", *(f"x{n}" for n in range(31)))}
    start = symbols["machine_halt"]
    physical = start - int.from_bytes(gdb.read(symbols["kimage_voffset"], 8, virtual=True), "little")
    code = struct.pack(f"<{len(AT_EL2)}I", *AT_EL2)
    gdb.write(physical, code)
    end = start + len(code) - 4
    for name, value in {"pc": start, "x0": 1, "x1": physical + 4, "x5": end, "x7": HCR_VSE | HCR_AMO}.items():
        gdb.set_register(name, value)
    gdb.run_to(end, LIMIT, str(s.stage.machine.console))
    for name, value in kept.items():
        gdb.set_register(name, value)


def become_realm(s: Scene, shared: int, protected: bool) -> None:
    """Have the code about reports believe that it runs in a Realm whose shared addresses have this bit.

    `protected` is what is said of all of them. Of the branches on whether it is a Realm only those in that code are
    taken: the rest of the kernel knows better.
    """
    gdb, symbols = s.gdb, s.stage.symbols
    gdb.write(symbols["prot_ns_shared"], (1 << shared).to_bytes(8, "little"), virtual=True)
    answer = struct.pack("<2I", 0x52800000 | protected << 5, 0xD65F03C0)  # mov w0, #protected; ret
    gdb.write(symbols["arm64_rsi_is_protected"], answer, virtual=True)
    start, stop = symbols["__start___jump_table"], symbols["__stop___jump_table"]
    table = gdb.read(start, stop - start, virtual=True)
    for offset, (code, target, key) in zip(range(0, len(table), 16), struct.iter_unpack("<iiq", table)):
        at = start + offset
        if at + 8 + key & ~3 == symbols["rsi_present"] and _symbol_at(symbols, at + code).startswith("kexec_report"):
            branch = 0x14000000 | (target + 4 - code) // 4 & 0x3FFFFFF
            gdb.write(at + code, branch.to_bytes(4, "little"), virtual=True)


def _symbol_at(symbols: dict[str, int], address: int) -> str:
    return max((value, name) for name, value in symbols.items() if value <= address)[1]


def report_breaks(s: Scene) -> CutShort:
    s.patch(s.next, UDF)
    s.patch(s.find(0xD3492B40), UDF)  # ubfx x0, x26, #9, #2: it is about to name the vector
    return CutShort("spx sync", r"(?s)\nkexec: fault while relocating: (?!.*kexec: )")


def report_cannot_write(s: Scene) -> CutShort:
    s.patch(s.next, UDF)
    s.patch(s.symbol("kexec_putc"), UDF)
    return CutShort("spx sync", NOTHING)


def uart_gone(s: Scene) -> CutShort:
    s.patch(s.next, UDF)
    s.argument("UART", s.unmapped, 8)
    return CutShort("spx sync", NOTHING)


def uart_busy(s: Scene) -> CutShort:
    s.patch(s.next, UDF)
    s.argument("UART_STATUS", 0x18 | 0 << 32, 8)  # busy is what was ready
    return CutShort("spx sync", NOTHING)


def uart_none(s: Scene) -> CutShort:
    s.patch(s.next, UDF)
    s.argument("UART", 0, 8)
    return CutShort("spx sync", NOTHING)


def no_psci(s: Scene) -> Taken:
    s.argument("PSCI", 0, 4)
    return replace(text_undefined(s), resets=False)


@dataclass(frozen=True)
class Fault:
    """`what` is done, `when`: "call" (before the reboot call), "entry" (to the control page) or
    "copying" (part of the initrd is moved). `els` are the kinds of machines that can; `peer`
    tells whether mainline has the like of what is broken.
    """

    name: str
    what: str
    when: str
    inject: Callable[[Scene], Expected]
    els: tuple[str, ...] = ("el1", "nvhe", "vhe")
    peer: bool = True


CALL = (
    Fault("source-bit", "A bit of a loaded page flips before the reboot call", "call", source_bit),
    Fault("source-last-byte", "... in the last byte of the last segment", "call", source_last_byte),
)
CALL_LIST = (
    Fault("list-source", "List: a source is not mapped", "call", before_moving(list_source)),
    Fault("list-elsewhere", "List: another destination", "call", list_elsewhere),
    Fault("list-ends-between", "List: ends between two segments", "call", list_ends_between),
)
IN_PLACE = Fault("in-place-bit", "... of a segment that is in place", "call", in_place_bit)
BEYOND = (
    Fault("source-bit", "A bit of a loaded page flips during shutdown", "entry", source_bit),
    Fault("source-last-byte", "... in the last byte of the last segment", "entry", source_last_byte),
    Fault("source-bit-copying", "... while pages are moved", "copying", source_bit),
    Fault("list-source", "List: a source is not mapped", "entry", before_moving(list_source)),
    Fault("list-source-copying", "... while pages are moved", "copying", list_source),
    Fault("list-destination", "List: a destination is not mapped", "entry", before_moving(list_destination)),
    Fault("list-flag", "List: a flag that does not exist", "entry", before_moving(list_flag)),
    Fault("list-flag-copying", "... while pages are moved", "copying", list_flag),
    Fault("list-ends-early", "List: ends in the middle of a segment", "entry", before_moving(list_ends_early)),
    Fault("list-ends-early-copying", "... while pages are moved", "copying", list_ends_early),
    Fault("list-ends-between", "... between two segments", "entry", list_ends_between),
    Fault("list-elsewhere", "List: another destination, mapped memory", "entry", list_elsewhere),
    Fault("list-onto-control", "... the control page", "entry", list_onto_control),
    Fault("text-undefined", "Control page: an undefined instruction", "entry", text_undefined),
    Fault("text-undefined-copying", "... while pages are moved", "copying", text_undefined),
    Fault("text-null", "Control page: a load from address 0", "entry", text_null),
    Fault("text-mmu-off", "Control page: an undefined instruction behind the end of the MMU", "entry", text_mmu_off),
    Fault("text-irq", "Control page: an interrupt is let in", "entry", text_irq),
    Fault("table-cleared", "Tables: an entry is cleared", "entry", table_cleared),
    Fault("table-read-only", "Tables: an entry is read-only", "entry", table_read_only),
    Fault("table-nowhere", "Tables: an entry leads to no memory", "entry", table_nowhere),
    Fault("hvc-stray", "A stray HVC", "entry", hvc_stray, ("nvhe", "vhe")),
    Fault("hvc-wrong", "The HVC to EL2 asks for something else", "entry", hvc_wrong, ("nvhe",)),
    Fault("serror", "An SError (virtual)", "entry", serror, ("nvhe",)),
    Fault("report-breaks", "The report itself faults", "entry", report_breaks, peer=False),
    Fault("report-cannot-write", "... as soon as it writes", "entry", report_cannot_write, peer=False),
    Fault("uart-gone", "The UART does not answer (external abort)", "entry", uart_gone, peer=False),
    Fault("uart-busy", "The UART never has room", "entry", uart_busy, peer=False),
    Fault("uart-none", "No UART is known", "entry", uart_none, peer=False),
    Fault("no-psci", "There is no PSCI to reset with", "entry", no_psci, peer=False),
)


def written_to_16550(scene: Scene, ready: bool) -> tuple[str, bytes]:
    """Let a machine whose report goes to a 16550 in memory run until it has nothing more to write.

    What it wrote, and the first eight bytes of the registers after it wrote the first
    character, which were 0xaa each. `ready` is what the UART's status says all the time.
    """
    cell, gdb = scene.stage.machine.boot.cell, scene.gdb
    assert cell.uart
    base, (shift, width) = qemu.uart(cell.memory), cell.uart
    gdb.write(base, b"\xaa" * 64)
    scene.put(base + (qemu.LSR << shift), qemu.THRE if ready else 0, width)
    status = gdb.read(base, 8)
    gdb.set_watch(base, 1)
    text, first = "", b""
    gdb.resume()
    while not ENDED.search(text) and len(text) < ROOM and gdb.wait(LIMIT / 2):
        text += chr(gdb.register("x2") & 0xFF)
        gdb.clear_watch(base, 1)
        gdb.step()  # QEMU stops in front of the store, and would do so again
        gdb.set_watch(base, 1)
        first = first or gdb.read(base, 8)
        gdb.resume()
    gdb.interrupt()
    gdb.clear_watch(base, 1)
    return text.replace("\r", ""), bytes(a for a, b in zip(first, status) if a != b)


def at_slot(name: str) -> Fault:
    """The CPU finds itself in a slot of the vectors, as if that exception had been taken."""
    def inject(s: Scene) -> Taken:
        s.gdb.set_register("pc", s.control + 0x800 + SLOTS.index(name) * 0x80)
        return Taken(name, None)

    return Fault(name, f"Vector: {name}", "copying", inject)


# How it comes out

def differences(expected: Expected, outcome: Outcome, panic: int) -> list[str]:
    """What in an outcome beyond the reboot call is not as it must be."""
    wrong: list[str] = []
    resets, place = panic != 0, None
    said = END.findall(outcome.text)
    if isinstance(expected, Taken):
        wrong += _differences_taken(expected, outcome.text)
        resets, place = resets and expected.resets, _parking(expected.vector)
    elif isinstance(expected, Corrupt):
        wrong += differences_corrupt(expected, MISMATCH.search(outcome.text))
        place = "kexec_corrupt_park"
    else:
        place = _parking(expected.vector)
        if not re.match(expected.text, outcome.text):
            wrong.append(f"this is not what had to be written: {shorten(outcome.text)!r}")

    end = "resetting" if resets else "parked"
    if not isinstance(expected, CutShort) and said[:1] != [end]:
        wrong.append(f"it says {said[:1]}, not '{end}'")
    if outcome.reset != resets:
        wrong.append(f"the machine was {'' if outcome.reset else 'not '}reset")
    elif not resets and (not outcome.parked or place not in (None, outcome.place)):
        wrong.append(f"the PC is {outcome.pc:#x} ({outcome.place or 'outside'}), not parked at {place}")
    if outcome.hello:
        wrong.append("the next kernel came up")
    if outcome.seconds > LIMIT:
        wrong.append(f"it took {outcome.seconds:.1f} s")
    return wrong


def _parking(vector: str) -> str:
    return f"trans_pgd_{vector.replace(' ', '_')}+0x70"


def shorten(text: str, lines: int = 6) -> str:
    """The first lines of what a machine wrote."""
    return "\n".join(text.strip().splitlines()[:lines])


def _differences_taken(expected: Taken, text: str) -> list[str]:
    match = REPORT.search(text)
    if not match:
        return [f"no report of an exception: {shorten(text)!r}"]
    wrong = []
    esr, far, offset = (int(match.group(name), 16) for name in ("esr", "far", "offset"))
    if match.group("vector") != expected.vector:
        wrong.append(f"the vector is '{match.group('vector')}', not '{expected.vector}'")
    if expected.ec is not None and (esr >> 26 != expected.ec or esr & expected.mask != expected.iss):
        wrong.append(f"ESR {esr:#x} does not have class {expected.ec:#x} and {expected.iss:#x} in {expected.mask:#x}")
    if expected.elr is not None and offset != expected.elr:
        wrong.append(f"ELR is at {offset:#x}, not {expected.elr:#x}")
    if expected.far is not None and far not in expected.far:
        wrong.append(f"FAR {far:#x} is not in {expected.far.start:#x}-{expected.far.stop:#x}")
    for name in ("segment", "source", "dest"):
        value = getattr(expected, name)
        found = match.group(name)
        if value is not None and (found is None or int(found, 16) != value):
            wrong.append(f"{name} is {found}, not {value:#x}")
    return wrong


def differences_corrupt(expected: Corrupt, match: re.Match[str] | None) -> list[str]:
    """What in a line that names a segment, matched by MISMATCH or REFUSAL, is not as it must be."""
    if not match:
        return ["no corrupt segment is reported"]
    at_load, now = (int(match.group(name), 16) for name in ("at_load", "now"))
    wrong = []
    segment = match.group("segment")
    if (None if segment is None else int(segment, 0)) != expected.segment:
        wrong.append(f"segment {segment}, not {expected.segment}")
    if expected.at_load not in (None, at_load):
        wrong.append(f"CRC32C at load {at_load:#x}, not {expected.at_load:#x}")
    if now == at_load or expected.change not in (None, at_load ^ now):
        wrong.append(f"CRC32C {at_load:#x}, now {now:#x}: that is not a change by {expected.change}")
    return wrong


# What ours and mainline make of it

QUIET = 8.0  # seconds after which a machine that shows nothing hangs


def try_call(cell: Cell, built: Built, archives: Guest, fault: Fault) -> str:
    """What becomes of a fault before the reboot call, in a word or two."""
    with Stage(cell, built, archives) as stage:
        scene = stage.at_call()
        fault.inject(scene)
        outcome = stage.watch(scene, QUIET)
        if outcome.hello or outcome.reset:
            return describe(outcome, cell, archives)
        answer = stage.answer()
        return "refused" if answer and answer[0] else "?"


def describe(outcome: Outcome, cell: Cell, archives: Guest) -> str:
    """What a machine did beyond the reboot call, in a word or two."""
    if REPORT.search(outcome.text) or MISMATCH.search(outcome.text):
        said = "reported"
    elif "kexec: fault" in outcome.text:
        said = "cut short"
    else:
        said = "silent"
    if outcome.hello:
        if outcome.hello["el"] != cell.entered_at:
            return "booted at the wrong EL"
        return "booted, not noticed" if outcome.hello["payload"] == archives.payload else "booted corrupt"
    if "Kernel panic" in outcome.text:
        return "booted corrupt, panics"
    if outcome.reset or outcome.parked:
        return f"{said}, {'reset' if outcome.reset else 'parked'}"
    return "hung" if said == "silent" else f"{said}, hung"


def try_all(cell: Cell, built: Built, archives: Guest) -> dict[Fault, str]:
    """What becomes of each fault that a cell can have, with panic=0 and, after a slash, panic=1."""
    results = {fault: try_call(cell, built, archives, fault) for fault in CALL}
    with Stage(cell, built, archives) as stage:
        for number, fault in enumerate(BEYOND):
            say.progress(number, len(BEYOND), f"faults on {stage.cell.name}, {built.kernel.name}")
            if cell.el not in fault.els:
                continue
            if not stage.ours and not fault.peer:
                results[fault] = "(has no such thing)"
                continue
            ends = []
            for panic in (0, 1) if stage.ours else (0,):  # mainline does not look at it there
                scene = stage.scene(fault, panic)
                fault.inject(scene)
                ends.append(describe(stage.watch(scene, QUIET), cell, archives))
            results[fault] = " / ".join(dict.fromkeys(ends))
    return results


def summary(results: dict[str, str]) -> str:
    """What becomes of one fault on the kinds of machines: said once where it is the same."""
    if len(set(results.values())) == 1:
        return next(iter(results.values()))
    kinds: dict[str, list[str]] = {}
    for kind, result in results.items():
        kinds.setdefault(result, []).append(kind)
    return "; ".join(f"{', '.join(names)}: {result}" for result, names in kinds.items())


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as a simple table in reStructuredText; the first one is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    line = "  ".join("=" * width for width in widths)
    text = say.columns(rows)
    return "\n".join([line, text[0], line, *text[1:], line])


def compare(source: base.Source) -> str:
    """Every fault on every kind of machine, once with our kernel and once with mainline's: a table."""
    archives = guest.build()
    ours = cells.kernel("4k-va48")
    results = []
    for kernel in (ours, cells.kernel("4k-va48-base")):
        built = build.build(kernel, source)
        results.append({cells.cell(name).el: try_all(cells.cell(name), built, archives) for name in MACHINES})
    rows = [("Fault", "This series (panic=0 / panic=1)", "Mainline")]
    for fault in (*CALL, *BEYOND):
        sides = [summary({LABELS[el]: done[fault] for el, done in side.items() if fault in done}) for side in results]
        rows.append((fault.what, *sides))
    return table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m lab.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", action="store_true", required=True,
                        help="do every fault to our kernel and to mainline's, and print what becomes of it")
    parser.parse_args()
    try:
        print(compare(base.source()))
    except LabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

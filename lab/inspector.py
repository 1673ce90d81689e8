"""The inspector of tools/testing/selftests/kexec/arm64 in place of the next kernel, and what it reports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

from lab import kload, qemu, selftests
from lab.cells import Cell
from lab.kload import Segment
from lab.machine import Machine
from lab.selftests import Ktap, parse_ktap

FILE = "/tmp/inspector"  # in the guest
SIZE = 0x10000  # of the inspector in memory; its arguments follow
HEAD = 80  # bytes of the arguments, which the ranges follow
RANGE = 32  # bytes of a range
RESULTS = 16

ENDS = {"powering off": "off", "resetting": "reset", "parked": "parked"}
DIFFERENCE = re.compile(
    r"^# (destination|watched|inspector) (\d+) at (0x\w+) size (0x\w+) "
    r"(?:first difference at (0x\w+) found (0x\w+) expected (0x\w+), words that differ: (\d+)|CRC32C.*)$", re.M)


@dataclass(frozen=True)
class Difference:
    """Memory that is not as it has to be: where it begins, and the first byte that differs."""

    kind: str
    number: int
    start: int
    address: int | None  # None where only a CRC is known
    words: int


@dataclass(frozen=True)
class Report:
    """What the inspector said, and how it left: "off", "reset", "parked" or None, if it came to no end."""

    ktap: Ktap
    differences: tuple[Difference, ...]
    end: str | None
    text: str

    @property
    def good(self) -> bool:
        """Everything that there was to be looked at is as it should be."""
        return self.ktap.complete and self.ktap.planned == RESULTS and not self.ktap.failed


def parse(console: str) -> Report:
    """The report on a console."""
    text = console.replace("\r", "").rpartition("TAP version 13\n")[2] if "TAP version 13" in console else ""
    found = [Difference(kind, int(number), int(start, 16), int(address, 16) if address else None, int(words or 0))
             for kind, number, start, _, address, _, _, words in DIFFERENCE.findall(text)]
    ends = [name for words, name in ENDS.items() if f"# inspector: {words}" in text]
    return Report(parse_ktap(text), tuple(found), ends[0] if ends else None, text)


def room(page: int, ranges: int = 1000) -> int:
    """Size of a segment for the inspector with arguments for that many ranges. `page` in bytes."""
    return -(-(SIZE + HEAD + RANGE * ranges) // page) * page


def put(m: Machine) -> None:
    """Have the inspector at hand in a guest, at FILE."""
    m.put(FILE, selftests.program("inspector"))


def expected(cell: Cell) -> list[str]:
    """What kload has to be told of a cell's machine: where the report goes, and which EL is to be entered.

    And how to call firmware, where there is no device tree to ask.
    """
    psci = ["psci " + ("hvc" if cell.el == "el1" else "smc")] if cell.efi else []
    return [f"uart pl011 {qemu.PL011[cell.board]:#x}", f"el {cell.entered_at}", *psci]


def statements(cell: Cell, at: int, segments: Sequence[Segment], further: Sequence[str] = (), ranges: int = 1000,
               entry: int | None = None) -> str:
    """What kload has to be told to have the inspector at physical address `at` look at `segments`."""
    page = cell.kernel.pages * 1024
    own = Segment(at, room(page, ranges), f"inspector {FILE}")
    return "\n".join([kload.statements([own, *segments], at if entry is None else entry), *expected(cell), *further,
                      "exec", ""])


def file_statements(cell: Cell) -> str:
    """The same for kexec_file_load(), which puts it where it likes, with a device tree."""
    return "\n".join([f"kernel inspector {FILE}", "cmdline 1", *expected(cell), "exec", ""])


def inspect(m: Machine, text: str) -> Report:
    """Load what `text` tells kload, and leave for it; the guest has ended then.

    Raises CommandFailed if it is refused, TimeoutFailure if there is no end of it.
    """
    put(m)
    m.put("/tmp/request", text.encode())
    return parse(m.leave("kload </tmp/request"))

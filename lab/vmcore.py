"""What a crash dump holds: the ELF core that a capture kernel shows as /proc/vmcore."""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Iterator

from lab.errors import LabError
from lab.kload import merge

PT_LOAD, PT_NOTE = 1, 4
NT_PRSTATUS = 1
REGISTERS = 112  # offset of pr_reg in struct elf_prstatus
NAMES = (*(f"x{n}" for n in range(31)), "sp", "pc", "pstate")

PAGE = 4096
MAGIC = 0x6E72657474617021  # as in guest/pattern.c


@dataclass(frozen=True)
class Load:
    """A range of memory in a dump: offset in the file, physical address, size in bytes."""

    offset: int
    physical: int
    size: int

    @property
    def end(self) -> int:
        return self.physical + self.size


class Dump:
    """A dump in a file, or on a disk, from `with` to the end of its block. Raises LabError if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "Dump":
        with open(self.path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:6] != b"\x7fELF\x02\x01":
            raise LabError(f"{self.path} is no dump: it begins with {self._data[:8].hex(' ')}")
        self.loads: list[Load] = []
        self.registers: list[dict[str, int]] = []
        self.vmcoreinfo: dict[str, str] = {}
        start, = struct.unpack_from("<Q", self._data, 32)
        size, count = struct.unpack_from("<HH", self._data, 54)
        for number in range(count):
            kind, _, offset, _, physical, length = struct.unpack_from("<IIQQQQ", self._data, start + number * size)
            if kind == PT_LOAD:
                self.loads.append(Load(offset, physical, length))
            elif kind == PT_NOTE:
                self._read_notes(offset, offset + length)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._data.close()

    def _read_notes(self, at: int, end: int) -> None:
        while at + 12 <= end:
            name_size, size, kind = struct.unpack_from("<III", self._data, at)
            if not name_size:
                break
            name = self._data[at + 12:at + 12 + name_size].rstrip(b"\0")
            at += 12 + -(-name_size // 4) * 4
            if name == b"CORE" and kind == NT_PRSTATUS:
                values = struct.unpack_from("<34Q", self._data, at + REGISTERS)
                self.registers.append(dict(zip(NAMES, values)))
            elif name == b"VMCOREINFO":
                text = self._data[at:at + size].rstrip(b"\0").decode(errors="replace")
                self.vmcoreinfo = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            at += -(-size // 4) * 4

    def ranges(self) -> list[tuple[int, int]]:
        """Start and end of the memory in it, without overlaps."""
        return merge([(load.physical, load.end) for load in self.loads], 0)

    def pages(self) -> Iterator[tuple[int, memoryview]]:
        """The physical address and contents of each page of 4 KiB."""
        with memoryview(self._data) as view:
            for load in self.loads:
                for at in range(0, load.size, PAGE):
                    with view[load.offset + at:load.offset + at + PAGE] as page:
                        yield load.physical + at, page

    def pattern(self, mib: int, seed: int) -> tuple[int, int]:
        """How many pages of a pattern are in it, each counted once, and how many look like some but are not."""
        begin = struct.pack("<Q", MAGIC ^ seed)
        found, spoilt = set(), 0
        for _, page in self.pages():
            if page[:8] != begin:
                continue
            number, = struct.unpack_from("<Q", page, 8)
            if number < mib * (1 << 20) // PAGE and page == (begin + struct.pack("<Q", number)) * (PAGE // 16):
                found.add(number)
            else:
                spoilt += 1
        return len(found), spoilt


def parse_oops(console: str) -> dict[str, int]:
    """The registers that a kernel's last oops or warning shows."""
    text = console[console.rfind("pc : "):]
    registers = {"sp": int(match.group(1), 16)} if (match := re.search(r"sp : (\w{16})", text)) else {}
    for name, value in re.findall(r"\b(x\d+) *: (\w{16})\b", text.partition("Call trace")[0]):
        registers.setdefault(name, int(value, 16))
    return registers

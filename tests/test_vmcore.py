"""The reader of crash dumps, on a dump made by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.kdump import memory_differences, ranges_of
from lab.kload import merge
from lab.vmcore import MAGIC, NT_PRSTATUS, PAGE, PT_LOAD, PT_NOTE, REGISTERS, Dump, Load, parse_oops

SEED = 7
IOMEM = """\
09000000-09000fff : pl011@9000000
40000000-40003fff : System RAM
  40000000-40000fff : Kernel code
  40002000-40002fff : Crash kernel
"""
OOPS = """\
[    1.0] pc : earlier+0x0/0x4
[    1.0] sp : 1111111111111111
[    1.0] x29: 2222222222222222 x28: 3333333333333333
[    1.0] Call trace:
[    2.0] pc : dereference+0x10/0x1c [provoke]
[    2.0] lr : work_for_cpu_fn+0x1c/0x2c
[    2.0] sp : ffff800080c3bd50
[    2.0] x29: ffff800080c3bd50 x28: 0000000000000000 x27: 0000000000000001
[    2.0] x2 : 0000000000000002 x1 : 0000000000000003 x0 : 0000000000000004
[    2.0] Call trace:
[    2.0]  x9: not a register
"""


def note(name: bytes, kind: int, content: bytes) -> bytes:
    padded = content + bytes(-len(content) % 4)
    return struct.pack("<III", len(name), len(content), kind) + name + bytes(-len(name) % 4) + padded


def pattern(number: int) -> bytes:
    return struct.pack("<QQ", MAGIC ^ SEED, number) * (PAGE // 16)


def write(path: Path, pages: dict[int, bytes], loads: list[tuple[int, int]]) -> None:
    """A dump with `loads` (physical address, size), and `pages` in them."""
    status = bytes(REGISTERS) + struct.pack("<34Q", *range(34)) + bytes(8)
    notes = note(b"CORE\0", NT_PRSTATUS, status) + note(b"VMCOREINFO\0", 0, b"KERNELOFFSET=1f0000\nPAGESIZE=4096\n")
    headers = [struct.pack("<IIQQQQQQ", PT_NOTE, 0, 0x1000, 0, 0, len(notes), len(notes), 0)]
    offset, body = 0x2000, b""
    for start, size in loads:
        headers.append(struct.pack("<IIQQQQQQ", PT_LOAD, 7, offset, 0, start, size, size, 0))
        body += b"".join(pages.get(at, bytes(PAGE)) for at in range(start, start + size, PAGE))
        offset += size
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = ident + struct.pack("<HHIQQQIHHHHHH", 4, 183, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0)
    path.write_bytes((head + b"".join(headers)).ljust(0x1000, b"\0") + notes.ljust(0x1000, b"\0") + body + bytes(PAGE))


def test_what_is_in_a_dump(tmp_path: Path) -> None:
    pages = {0x40000000: pattern(0), 0x40003000: pattern(1)}
    write(tmp_path / "dump", pages, [(0x40000000, 0x2000), (0x40003000, 0x1000)])
    with Dump(tmp_path / "dump") as dump:
        assert dump.loads == [Load(0x2000, 0x40000000, 0x2000), Load(0x4000, 0x40003000, 0x1000)]
        assert dump.vmcoreinfo == {"KERNELOFFSET": "1f0000", "PAGESIZE": "4096"}
        assert len(dump.registers) == 1
        assert (dump.registers[0]["x30"], dump.registers[0]["sp"], dump.registers[0]["pc"]) == (30, 31, 32)
        assert dump.pattern(1, SEED) == (2, 0)
        assert dump.pattern(1, SEED + 1) == (0, 0)
        assert memory_differences(dump, IOMEM) == []


@pytest.mark.parametrize("loads", [[(0x40000000, 0x2000)], [(0x40000000, 0x4000)], [(0x40000000, 0x1000)]])
def test_memory_that_is_missing_or_too_much(tmp_path: Path, loads: list[tuple[int, int]]) -> None:
    write(tmp_path / "dump", {}, loads)
    with Dump(tmp_path / "dump") as dump:
        assert memory_differences(dump, IOMEM)


def test_a_pattern_that_is_spoilt_or_there_twice(tmp_path: Path) -> None:
    spoilt = bytearray(pattern(1))
    spoilt[4095] ^= 1
    write(tmp_path / "dump", {0x40000000: pattern(0), 0x40001000: bytes(spoilt), 0x40002000: pattern(0),
                              0x40003000: pattern(256)}, [(0x40000000, 0x4000)])
    with Dump(tmp_path / "dump") as dump:
        assert dump.pattern(1, SEED) == (1, 2)


def test_what_is_no_dump(tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(bytes(4096))
    with pytest.raises(LabError, match="no dump"):
        Dump(tmp_path / "dump").__enter__()


def test_ranges() -> None:
    assert merge([(5, 6), (0, 2), (2, 3), (5, 9)], 0) == [(0, 3), (5, 9)]
    assert ranges_of(IOMEM, "Crash kernel") == [(0x40002000, 0x40003000)]
    assert ranges_of(IOMEM, "System RAM") == [(0x40000000, 0x40004000)]


def test_registers_of_the_last_oops() -> None:
    assert parse_oops(OOPS) == {"sp": 0xFFFF800080C3BD50, "x29": 0xFFFF800080C3BD50, "x28": 0, "x27": 1,
                                "x2": 2, "x1": 3, "x0": 4}
    assert parse_oops("nothing") == {}

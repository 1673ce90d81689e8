"""What is read from logs and messages, tried on stored ones."""

from __future__ import annotations

import pytest

from lab import fdt
from lab.cells import CELLS
from lab.handover import Loaded, check_facts, parse_log
from lab.kload import merge, subtract
from lab.machine import Hello, find_complaints, find_panic, parse_hello, parse_message

OURS = """\
[    2.263128] kexec: segment 0: 0x0000000040200000-0x0000000040930000, 7536640 bytes
[    2.263130] kexec: segment 1: 0x0000000040930000-0x0000000040940000, 65536 bytes
[    2.263132] kexec: 7471104 bytes to move
[    2.263134] kexec: 131072 bytes in place
[    2.263136] kexec: 5 table pages
"""

TOOLS = """\
kexec_load: entry = 0x43d86730 flags = 0xb70000
nr_segments = 2
segment[0].buf   = 0xffff9a8b0010
segment[0].bufsz = 0x6b9808
segment[0].mem   = 0x40a00000
segment[0].memsz = 0x730000
segment[1].buf   = 0xaaaafbd6c2a0
segment[1].bufsz = 0x3130
segment[1].mem   = 0x43d86000
segment[1].memsz = 0x4000
"""

BOOT = """\
[    0.452920] kvm [1]: VHE mode initialized successfully
[    0.645255] Run /init as init process
"""

PANIC = """\
[    0.614296] Starting init: /bin/sh exists but couldn't execute it (error -8)
[    0.614516] Kernel panic - not syncing: No working init found.  Try passing init= option to kernel.\r
[    0.615630] CPU: 1 UID: 0 PID: 1 Comm: swapper/0 Not tainted 7.3.4+ #1 PREEMPTLAZY
[    0.616078]  show_stack+0x14/0x1c (C)
"""

OOPS = """\
[    1.200000] Unable to handle kernel paging request at virtual address ffff800080000000
[    1.200100] Internal error: Oops: 0000000096000047 [#1]  SMP
[    1.200200] CPU: 0 UID: 0 PID: 51 Comm: kexec Not tainted 7.3.4 #1 PREEMPT
"""

WARNING = """\
[    1.100000] ------------[ cut here ]------------
[    1.100100] WARNING: arch/arm64/kernel/machine_kexec.c:210 at machine_kexec+0x1c/0x100, CPU#0: kexec/51
"""

HELLO = {"hello": 2, "release": "7.3.4", "el": 2,
         "kvm": "kvm [1]: IPA Size Limit: 52 bits; kvm [1]: VHE mode initialized successfully",
         "kaslr": "KASLR enabled", "mem_total": 507232, "mem_free": 418868, "uptime": 1.32,
         "cmdline": 'console=ttyAMA0 dyndbg="file machine_kexec.c +p"', "payload": None}


def test_load_as_our_kernel_logs_it() -> None:
    loaded = parse_log(OURS)
    assert loaded == Loaded(((0x40200000, 7536640), (0x40930000, 65536)), 7471104, 131072, 5)
    assert loaded.size == 7471104 + 131072


def test_load_as_kexec_tools_prints_it() -> None:
    assert parse_log(TOOLS) == Loaded(((0x40A00000, 0x730000), (0x43D86000, 0x4000)), None, None, None)


def test_the_kernels_word_counts_where_both_speak() -> None:
    assert parse_log(TOOLS + OURS).segments == parse_log(OURS).segments


def test_silence() -> None:
    assert parse_log(BOOT) == Loaded((), None, None, None)


@pytest.mark.parametrize("log, panic", [(BOOT, None), (OOPS, None), (PANIC, "No working init found")])
def test_panics(log: str, panic: str | None) -> None:
    found = find_panic(log)
    assert found is None if panic is None else panic in str(found) and "\r" not in str(found)


@pytest.mark.parametrize("log, complaints", [(BOOT, 0), (OURS, 0), (OOPS, 2), (WARNING, 1)])
def test_complaints(log: str, complaints: int) -> None:
    assert len(find_complaints(log)) == complaints


def test_messages_are_taken_one_by_one_whatever_they_carry() -> None:
    stream = b'tail of an ear\n\n{"id": 1, "rc": 0, "size": 8}\n{"id":9}{"id": 2, "rc": 1, "size": 0}\n'
    first, rest, strays = parse_message(stream)
    assert first is not None and (first["id"], first["out"]) == (1, '{"id":9}')
    assert strays == [b"tail of an ear"]
    second, rest, strays = parse_message(rest)
    assert second is not None and (second["id"], second["rc"], rest, strays) == (2, 1, b"", [])
    assert parse_message(b"") == (None, b"", [])


def test_a_message_is_not_taken_before_it_is_whole() -> None:
    whole = b'{"id": 1, "rc": 0, "size": 4}\nab\n\xff'
    for length in range(len(whole)):
        message, rest, strays = parse_message(whole[:length])
        assert message is None and rest == whole[:length] and not strays
    message, rest, strays = parse_message(whole)
    assert message is not None and message["out"] == "ab\n�" and rest == b""


def hello(**changes: object) -> Hello:
    return parse_hello({**HELLO, **changes}, 2.1)


def test_hello() -> None:
    assert (hello().generation, hello().el, hello().mem_free, hello().seconds) == (2, 2, 418868, 2.1)
    with pytest.raises(KeyError):
        parse_hello({"hello": 1}, 1.0)


@pytest.mark.parametrize("changes, wrong", [
    ({}, 0), ({"el": 1}, 1), ({"el": None}, 1), ({"kvm": None}, 1), ({"kvm": "kvm [1]: HYP mode not available"}, 1),
    ({"kvm": "kvm [1]: Hyp nVHE mode initialized successfully"}, 1), ({"kaslr": "KASLR disabled on command line"}, 1)])
def test_facts(changes: dict[str, object], wrong: int) -> None:
    assert len(check_facts(CELLS["4k-va48-vhe"], hello(**changes))) == wrong


def test_device_tree_survives_reading_and_writing() -> None:
    tree = fdt.Tree(fdt.Node(), bytes(16), 0)
    tree.root.node("chosen").properties |= {"bootargs": fdt.string("a=b"), "linux,initrd-start": fdt.pairs(1 << 40)}
    tree.root.node("reserved-memory").node("hole@1").properties |= {"reg": fdt.pairs(1, 2), "no-map": b""}
    again = fdt.parse(fdt.flatten(tree))
    assert again == tree
    assert fdt.flatten(again) == fdt.flatten(tree)
    with pytest.raises(ValueError):
        fdt.parse(bytes(64))


def test_ranges() -> None:
    assert merge([(10, 20), (22, 30), (50, 60)], 2) == [(10, 30), (50, 60)]
    assert subtract([(10, 30), (50, 60)], [(0, 12), (20, 25), (55, 99)]) == [(12, 20), (25, 30), (50, 55)]

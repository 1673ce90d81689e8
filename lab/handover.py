"""One kernel hands over to the next, and the next is found to be whole."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Callable, Sequence

from lab import timing, upto
from lab.cells import Cell
from lab.kload import call, next_image
from lab.machine import CommandFailed, GuestFailure, Hello, Machine, find_complaints

# How kexec-tools is asked to load: with purgatory's checksums, without, and by kexec_file_load().
LOADERS = {
    "load": "kexec -d -c -l",
    "load-nocheck": "kexec -d -c -l -i",
    "file": "kexec -d -s -l",
}

KVM = {"el1": "HYP mode not available", "nvhe": "nVHE mode initialized", "vhe": "VHE mode initialized"}

# CPUs without RNDR take so long to gather entropy that kexec may have no seed to pass on.
KASLR = {True: r"KASLR (enabled|disabled due to lack of seed)", False: r"KASLR disabled"}

# What /proc/meminfo accounts for; the rest is what the kernel took page by page, and firmware.
ACCOUNTED = "MemFree|Buffers|Cached|AnonPages|SReclaimable|PageTables|VmallocUsed|Percpu"


class BadHandover(GuestFailure):
    """A kernel came up, but something is wrong with it."""


@dataclass(frozen=True)
class Loaded:
    """What a kernel logged when it loaded an image. None where it says nothing about it, as mainline does."""

    segments: tuple[tuple[int, int], ...]  # physical address and size in bytes
    bytes_to_move: int | None
    bytes_in_place: int | None
    table_pages: int | None

    @property
    def size(self) -> int:
        """Bytes in all segments."""
        return sum(size for _, size in self.segments)


@dataclass(frozen=True)
class Handover:
    """A handover that was verified. `seconds` from the start of loading to the verdict.

    `timing` is what the new kernel says about it, if it does.
    """

    loader: str
    ok: bool
    seconds: float
    table_pages: int | None
    bytes_moved: int | None
    bytes_in_place: int | None
    timing: timing.Timing | None


def parse_log(text: str) -> Loaded:
    """What was loaded, from the kernel's log, and from what `kexec -d` printed where the kernel is silent."""
    segments: list[tuple[int, int]] = []
    for first, last in re.findall(r"kexec: segment \d+: (0x\w+)-(0x\w+), ", text):
        segments.append((int(first, 16), int(last, 16) - int(first, 16)))
    if not segments:
        listed = re.findall(r"^segment\[\d+\]\.mem +(?:= )?(0x\w+)\nsegment\[\d+\]\.memsz +(?:= )?(0x\w+)", text, re.M)
        segments = [(int(start, 16), int(size, 16)) for start, size in listed]

    def number(what: str) -> int | None:
        match = re.search(rf"kexec: (\d+) {what}", text)
        return int(match.group(1)) if match else None

    return Loaded(tuple(segments), number("bytes to move"), number("bytes in place"), number("table pages"))


def log_since(m: Machine, mark: str) -> str:
    """The kernel's log after the line that `mark` was written to it as."""
    return m.sh(f"dmesg | sed '1,/{mark}/d'")


def load(m: Machine, loader: str, options: str = "") -> Loaded:
    """Load the next kernel with kexec-tools; returns what it and the running one said meanwhile.

    `options` go to kexec as they are. Raises CommandFailed when loading fails.
    """
    m.sh("fetch", timeout=300)
    mark = _mark(m)
    # dyndbg's value has blanks in it: the command line goes through as one word.
    said = m.sh(f"line=$(sed 's/ *lab\\.gen=[0-9]*//' /proc/cmdline)\n"
                f'{LOADERS[loader]} /next/Image --initrd=/next/initrd {options} '
                f'--command-line="$line lab.gen={m.generation + 1}"', timeout=300)
    return parse_log(said + log_since(m, mark))


def load_by_call(m: Machine, flags: int = 0, further: Sequence[str] = ()) -> Loaded:
    """Load the next kernel by kexec_file_load() with these flags; `further` is what else kload is told.

    Raises CommandFailed when loading fails.
    """
    request, mark = next_image(m, flags, further), _mark(m)
    answer = call(m, request)
    if answer != "0":
        raise CommandFailed(f"kexec_file_load() answers {answer}", m)
    return parse_log(log_since(m, mark))


def _mark(m: Machine) -> str:
    """Write a line to the kernel's log that nothing else there is like."""
    mark = f"lab: loading for generation {m.generation + 1}, {time.monotonic_ns()}"
    m.sh(f"echo '{mark}' >/dev/kmsg")
    return mark


def verify_first(m: Machine, hello: Hello) -> None:
    """Check the kernel that QEMU booted: that it is what the cell says. Raises BadHandover."""
    wrong = [*check_facts(m.boot.cell, hello), *find_complaints(m.log())]
    if wrong:
        raise BadHandover("the first kernel: " + "; ".join(wrong), m)


def verify(m: Machine, hello: Hello, since: int = 0) -> None:
    """Check a kernel that was handed over to. Raises BadHandover.

    Its payload is the right one, it runs at the EL it should, KVM is up, and no
    kernel complained on the console, whose first `since` characters are old.
    """
    wrong = [*check_facts(m.boot.cell, hello), *find_complaints(m.log()[since:])]
    if hello.payload != m.guest.payload:
        wrong.append(f"the payload's SHA-256 is {hello.payload}, not {m.guest.payload}")
    if wrong:
        raise BadHandover("; ".join(wrong), m)


def check_facts(cell: Cell, hello: Hello) -> list[str]:
    """What about a kernel is not as its cell demands, whoever booted it."""
    wrong = []
    expected = cell.entered_at
    if hello.el != expected:
        wrong.append(f"the CPUs started at EL{hello.el}, not EL{expected}")
    mode = re.compile(rf"\b{KVM[cell.el]}")
    if not mode.search(hello.kvm or ""):
        wrong.append(f"KVM says '{hello.kvm}', not '{KVM[cell.el]}'")
    if not re.search(KASLR[cell.kaslr] if cell.kernel.randomized else "^$", hello.kaslr or ""):
        wrong.append(f"the kernel says '{hello.kaslr}'")
    return wrong


def handover(m: Machine, loader: str, options: str = "", count_pages: bool = False) -> Handover:
    """Load, execute and verify the next kernel.

    `count_pages` counts the table pages from outside, see count_tables(), and
    checks them against the log. Raises a GuestFailure for whatever goes wrong.
    """
    begin = time.monotonic()
    since = len(m.log())
    before = reserved_pages(m) if count_pages else 0
    loaded = load(m, loader, options)
    check_log(m, loaded)
    tables = loaded.table_pages
    if count_pages:
        tables = count_tables(m, loaded, reserved_pages(m) - before)
        if loaded.table_pages not in (None, tables):
            raise BadHandover(f"the kernel logged {loaded.table_pages} table pages and holds {tables}", m)
    verify(m, m.exec(), since)
    seconds = time.monotonic() - begin
    said = timing.find(m.log()[since:])
    return Handover(loader, True, seconds, tables, loaded.bytes_to_move, loaded.bytes_in_place,
                    said[0] if said else None)


def check_log(m: Machine, loaded: Loaded) -> None:
    """Our own kernel tells about every load, and its figures add up. Raises BadHandover."""
    if not m.boot.cell.kernel.patched or not upto.has("arm64"):
        return
    if None in (loaded.bytes_to_move, loaded.bytes_in_place, loaded.table_pages):
        raise BadHandover(f"the kernel's log does not tell about the load: {loaded}", m)
    if loaded.bytes_to_move + loaded.bytes_in_place != loaded.size:  # type: ignore[operator]
        raise BadHandover(f"bytes to move and in place are not those of the segments: {loaded}", m)


def reserved_pages(m: Machine) -> int:
    """How many pages are marked reserved, as those are that kexec holds."""
    return int(m.sh("kpages", timeout=300))


def taken_memory(m: Machine) -> int:
    """Memory in KiB that is in use and accounted for by nobody, or in objects that are not reclaimed."""
    text = m.sh("sync; echo 3 >/proc/sys/vm/drop_caches; sleep 1\n"
                f"awk '/^MemTotal:/ {{ n += $2 }} /^({ACCOUNTED}):/ {{ n -= $2 }} END {{ print n }}' /proc/meminfo\n"
                "awk '/^ +count:/ { n += $2 } END { print n }' /proc/zoneinfo")  # free, but kept by CPUs
    rest, kept = map(int, text.split())
    return rest - kept * m.boot.cell.kernel.pages


def lost_memory(m: Machine, work: Callable[[], object], limit: int, rounds: int) -> list[int]:
    """KiB that each round of `work` takes, the last one less than `limit`, unless all of them take more.

    Caches take memory once, a leak does each time.
    """
    lost: list[int] = []
    for _ in range(rounds):
        before = taken_memory(m)
        work()
        lost.append(taken_memory(m) - before)
        if lost[-1] < limit:
            break
    return lost


def control_pages(m: Machine) -> int:
    """Pages of the control page's allocation, from KEXEC_CONTROL_PAGE_SIZE."""
    header = (m.built.srctree / "arch/arm64/include/asm/kexec.h").read_text()
    match = re.search(r"#define\s+KEXEC_CONTROL_PAGE_SIZE\s+(\w+)", header)
    size, page = (int(match.group(1), 0) if match else 4096), m.boot.cell.kernel.pages * 1024
    pages = 1
    while pages * page < size:
        pages *= 2
    return pages


def count_tables(m: Machine, loaded: Loaded, held: int) -> int | None:
    """Of `held` pages, those that are neither source, list, swap nor control page: page tables.

    Needs no help from the kernel, so it works for mainline too, where kexec-tools
    knows the segments. The list has an entry per segment and per page, and its
    pages end in a link. Segments in contiguous memory are not marked reserved: not for those.
    None when the segments are not known.
    """
    if not loaded.segments:
        return None
    page = m.boot.cell.kernel.pages * 1024
    source = sum(size // page for _, size in loaded.segments)
    entries = source + len(loaded.segments)
    lists = -(-entries // (page // 8 - 1))
    swap = 1
    return held - source - lists - swap - control_pages(m)

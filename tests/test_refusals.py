"""Each load that is refused leaves one line in the log: kexec-tools makes a few words of all errnos."""

from __future__ import annotations

import gzip
import random
import struct
from dataclasses import replace

import pytest

from lab import kdump, qemu
from lab.cells import CELLS
from lab.handover import load, reserved_pages, verify
from lab.kload import IMAGE_SIZE, MIB, Segment, call, file_statements, statements
from lab.machine import Machine
from lab.refusals import NOBODY, Refusal, check, lines, mark, table

pytestmark = pytest.mark.badload

RESERVED = 64  # MiB for a crash kernel
WIDE = 120  # MiB, twice of which are more than half of memory, and more than there is between two holes of it
CELL = replace(kdump.machine_for(CELLS["4k-va48-vhe-holes"], f"crashkernel={RESERVED}M", memory=512), core=True)
NARROW = CELLS["4k-va48-el1-a72"]  # its CPU has no 16K pages
PAGE, GIB = 4096, 1 << 30
UART = 0x09000000
ON_CRASH, AARCH64, PPC64 = 1, 183 << 16, 21 << 16
COMMAND_LINE_SIZE = 2048  # with the NUL
CALLS = 60  # some seconds' worth
SEED, HEADERS, HEADER_FILE = 23, 300, 512  # random PE headers, and the bytes of the file of each

NOT_AVAILABLE = "syscall kexec_file_load not available"
FILE_FAILED = "kexec_file_load failed: "
LOAD_FAILED = "kexec_load failed: "
NO_TYPE = "Cannot determine the file type of "

# The parts of an Image's header, and of a PE header, that matter: offset and format
CODE0, PE_OFFSET, FLAGS = (0, "<H"), (60, "<I"), (24, "<Q")
PE_HEADER = struct.Struct("<IHHIIIHH")  # magic, machine, sections, three others, size of what follows, flags
SECTION = struct.Struct("<8sIIII16s")  # name, bytes and address in memory, bytes and offset in the file
MZ, PE = 0x5A4D, 0x4550


# Files

def image(m: Machine, size: int = 8192, **fields: tuple[tuple[int, str], int]) -> bytearray:
    """The head of a real Image, with another image_size, and `fields` changed."""
    with open(m.built.image, "rb") as file:
        head = bytearray(file.read(size))
    struct.pack_into("<Q", head, IMAGE_SIZE, 65536)
    for (offset, form), value in fields.values():
        struct.pack_into(form, head, offset, value)
    return head


def add_pe(head: bytearray, sections: list[tuple[int, int]], claimed: int | None = None, optional: int = 0,
           at: int = 64) -> bytearray:
    """Give an Image a PE header `at` an offset, with `sections` of these offsets and bytes in the file.

    `claimed` is how many it says there are; `optional` bytes stand before them.
    """
    struct.pack_into(CODE0[1], head, CODE0[0], MZ)
    struct.pack_into(PE_OFFSET[1], head, PE_OFFSET[0], at)
    parts = PE_HEADER.pack(PE, 0xAA64, len(sections) if claimed is None else claimed, 0, 0, 0, optional, 0)
    parts += bytes(optional)
    parts += b"".join(SECTION.pack(b".text", 0, 0, size, offset, bytes(16)) for offset, size in sections)
    room = max(0, len(head) - at)
    head[at:at + len(parts)] = parts[:room]
    return head


def efi_program(magic: bytes = b"") -> bytes:
    """The head of an EFI program that is no Image; `magic` is what it has behind MZ."""
    data = bytearray(4096)
    struct.pack_into("<H", data, 0, MZ)
    data[4:4 + len(magic)] = magic
    struct.pack_into(PE_OFFSET[1], data, PE_OFFSET[0], 128)
    data[128:128 + PE_HEADER.size] = PE_HEADER.pack(PE, 0xAA64, 0, 0, 0, 0, 0, 0)
    return bytes(data)


def put_files(m: Machine) -> None:
    good = image(m)
    files = {
        "good": good,
        "text": b"#!/bin/sh\necho 'a script that is longer than the header of an Image'; exit 1\n" * 2,
        "gzip": gzip.compress(bytes(image(m, 65536)), 0),
        "zboot": efi_program(b"zimg"),
        "efi": efi_program(),
        "short": good[:40],
        "empty": b"",
        "cut": add_pe(image(m), [(1024, 1024), (4096, 10 * MIB)]),
        "cuthead": add_pe(image(m), [], at=MIB),
        "nosize": image(m, size_=((IMAGE_SIZE, "<Q"), 0)),
        "large": image(m, size_=((IMAGE_SIZE, "<Q"), 1 << 40)),
        "wide": image(m, size_=((IMAGE_SIZE, "<Q"), WIDE * MIB)),
        "offset": image(m, offset=((8, "<Q"), (1 << 64) - 4096)),
    }
    for name, data in files.items():
        m.put(f"/tmp/{name}", bytes(data))
    initrds = {"large": GIB, "huge": 5 * GIB, "wide": WIDE * MIB, "wider": 2 * WIDE * MIB,
               "crash": (RESERVED + 2) * MIB, "full": RESERVED * MIB - 256 * 1024}
    m.sh("\n".join(f"truncate -s {size} /tmp/initrd.{name}" for name, size in initrds.items()))
    m.sh("echo nobody:x:65534:65534::/:/bin/sh >/etc/passwd")


# The table

HALF = r"\d+ pages in {} segments, more than half of the \d+ that there are"


def files(m: Machine) -> list[Refusal]:
    """Refused by kexec_file_load(), or by kexec-tools before it comes to that."""
    def one(what: str, errno: str, line: str, name: str = "good", printed: str = "", initrd: str = "",
            cmdline: int = 1, calls: bool = True) -> Refusal:
        kexec = f"kexec -s -l /tmp/{name}" + (f" --initrd={initrd}" if initrd else "")
        text = f"$(printf '%0{cmdline - 1}d' 0)" if cmdline > 1 else "x"
        return Refusal(what, errno, line, file_statements(f"/tmp/{name}", initrd or None, cmdline),
                       f"{kexec} --command-line={text}" if printed else "", printed, calls)

    no_image, unread = "the file is no arm64 Image: ", "the file with the {} can't be read, or may not be"
    return [
        one("text", "ENOEXEC", no_image + "it has not the magic number of one", "text", NO_TYPE, calls=False),
        one("gzip", "ENOEXEC", no_image + "it is compressed by gzip: unpack it", "gzip"),  # kexec-tools unpacks it
        one("zboot", "ENOEXEC", no_image + r"it is compressed for EFI \(zboot\): unpack it", "zboot", NO_TYPE,
            calls=False),
        one("EFI program", "ENOEXEC", no_image + "it is an EFI program: if it is a unified kernel image, "
            "take the Image out of it", "efi", NO_TYPE, calls=False),
        one("40 bytes", "ENOEXEC", no_image + "it ends after 40 bytes", "short", NO_TYPE, calls=False),
        one("an empty file", "EINVAL", unread.format("kernel"), "empty", "Cannot read /tmp/empty", calls=False),
        one("cut short", "ENOEXEC", rf"the Image was cut short: 8192 of {4096 + 10 * MIB} bytes", "cut",
            NOT_AVAILABLE),
        one("cut in its header", "ENOEXEC", rf"the Image was cut short: 8192 of {MIB + PE_HEADER.size} bytes",
            "cuthead", NOT_AVAILABLE),
        one("no image_size", "EINVAL", "the Image does not tell its size, as before v3.17", "nosize", NOT_AVAILABLE),
        one("wrong text_offset", "EINVAL", "a text_offset of 0xfffffffffffff000 is too large", "offset",
            NOT_AVAILABLE),
        one("larger than memory", "EADDRNOTAVAIL",
            rf"no room for the kernel in memory \(kernel {1 << 40} bytes, initrd 0\)", "large",
            FILE_FAILED + "Cannot assign requested address"),
        one("an initrd larger than memory", "ENOMEM", unread.format("initrd"),
            printed=FILE_FAILED + "Cannot allocate memory", initrd="/tmp/initrd.large"),
        one("an initrd of 5 GiB", "EFBIG", unread.format("initrd"), initrd="/tmp/initrd.huge"),
        one("an initrd without room in one piece", "EADDRNOTAVAIL",
            rf"no room for the initrd in memory \(kernel 65536 bytes, initrd {2 * WIDE * MIB}\)",
            printed=FILE_FAILED + "Cannot assign requested address", initrd="/tmp/initrd.wider"),
        one("more than half of memory in all", "EINVAL", HALF.format(3), "wide", NOT_AVAILABLE, "/tmp/initrd.wide"),
        one("a long command line", "E2BIG",
            "a command line of 2048 characters, of which an arm64 kernel takes 2047 at most",
            printed=FILE_FAILED + "Argument list too long", cmdline=COMMAND_LINE_SIZE + 1),
        Refusal("a directory", "EINVAL", unread.format("kernel"), file_statements("/tmp"),
                "kexec -s -l /tmp --command-line=x", "Is a directory", calls=False),
        Refusal("a flag that does not exist", "EINVAL", "flags 0x8004, of which 0x8000 are unknown",
                file_statements("/tmp/good") + "\nflags 0x8000"),
    ]


def segments(m: Machine) -> list[Refusal]:
    """Refused by kexec_load()."""
    memory = m.boot.cell.memory
    good, half = qemu.RAM_BASE + memory * MIB // 4, memory * MIB // 2
    hole, hole_size = qemu.holes(memory)[0]

    def one(what: str, errno: str, line: str, *parts: Segment, flags: int = AARCH64) -> Refusal:
        return Refusal(what, errno, line, statements(parts, flags=flags))

    def at(mem: int, memsz: int = PAGE, contents: str = "fill 0x5a 4096") -> Segment:
        return Segment(mem, memsz, contents)

    return [
        one("a device", "EADDRNOTAVAIL", f"segment 1: {UART:#018x}-{UART + PAGE:#018x} is not all memory",
            at(good), at(UART)),
        one("no-map memory", "EACCES",
            rf"segment 0: {hole - PAGE:#018x}-{hole + PAGE:#018x} has memory that firmware keeps \(no-map\)",
            at(hole - PAGE, 2 * PAGE)),
        one("an end that wraps around", "EADDRNOTAVAIL",
            "segment 0: 0x2000 bytes at 0xfffffffffffff000 end beyond all memory", at((1 << 64) - PAGE, 2 * PAGE)),
        one("an address within a page", "EADDRNOTAVAIL",
            f"segment 0: {good + 1024:#x}-{good + 1024 + PAGE:#x} is not made of pages of 4096 bytes", at(good + 1024)),
        one("overlap", "EINVAL", f"segment 1: {good + PAGE:#x}-{good + 2 * PAGE:#x} overlaps segment 0",
            at(good, 4 * PAGE), at(good + PAGE)),
        one("more contents than room", "EINVAL", "segment 0: 4097 bytes for 4096 bytes of memory",
            at(good, PAGE, "fill 1 4097")),
        one("more than half of memory", "EINVAL",
            rf"segment 0: {half // PAGE} pages, more than half of the \d+ that there are", at(good, half, "zero")),
        one("half of memory in two segments", "EINVAL",
            HALF.format(2),
            at(qemu.RAM_BASE, half // 2, "zero"), at(good + half, half // 2, "zero")),
        one("contents that can't be read", "EFAULT", "segment 0: its contents could not be stored",
            at(good, 8 * MIB, f"bad {8 * MIB}")),
        one("17 segments", "EINVAL", "17 segments, where there can be 16", *(at(good + n * PAGE) for n in range(17))),
        one("a flag that does not exist", "EINVAL", "flags 0xb78000, of which 0x8000 are unknown", at(good),
            flags=AARCH64 | 0x8000),
        one("another architecture", "EINVAL", "segments for architecture 21, on 183", at(good), flags=PPC64),
    ]


def crash_kernels(m: Machine) -> list[Refusal]:
    """Refused as crash kernels. One that was loaded before is gone then."""
    (start, end), = kdump.ranges_of(m.sh("cat /proc/iomem"), "Crash kernel")
    kept = f"{start:#018x}-{end - 1:#018x}, which is the crash kernel's"
    outside = qemu.RAM_BASE
    no_room = r"no room for the {} in what crashkernel= reserves \(kernel 65536 bytes, initrd {}\)"

    def by_kexec(part: str, initrd: str, size: int) -> Refusal:
        return Refusal(f"a crash kernel without room for its {part}", "EADDRNOTAVAIL", no_room.format(part, size),
                       file_statements("/tmp/good", initrd) + "\nflags 2",
                       f"kexec -s -p /tmp/good --initrd={initrd} --command-line=x",
                       FILE_FAILED + "Cannot assign requested address")

    return [
        Refusal("a crash kernel's entry elsewhere", "EADDRNOTAVAIL",
                f"entry {outside:#x} is not in {kept}: see crashkernel=",
                statements([Segment(outside, PAGE)], flags=AARCH64 | ON_CRASH)),
        Refusal("a crash kernel's segment elsewhere", "EADDRNOTAVAIL",
                f"segment 1: {outside:#x}-{outside + PAGE - 1:#x} is not in {kept}",
                statements([Segment(start, PAGE), Segment(outside, PAGE)], flags=AARCH64 | ON_CRASH)),
        by_kexec("initrd", "/tmp/initrd.crash", (RESERVED + 2) * MIB),
        by_kexec("device tree", "/tmp/initrd.full", RESERVED * MIB - 256 * 1024),
    ]


def by_both(m: Machine, what: str, errno: str, line: str, printed: str, **fields: object) -> list[Refusal]:
    """A good kernel that is refused, whoever is asked."""
    good = qemu.RAM_BASE + m.boot.cell.memory * MIB // 4
    return [
        Refusal(f"{what}, kexec_file_load()", errno, line, file_statements("/tmp/good"),
                "kexec -s -l /tmp/good --command-line=x", FILE_FAILED + printed, **fields),  # type: ignore[arg-type]
        Refusal(f"{what}, kexec_load()", errno, line, statements([Segment(good, PAGE)]),
                "kexec -c -l -i /tmp/good --command-line=x", LOAD_FAILED + printed, **fields),  # type: ignore[arg-type]
    ]


def others(m: Machine) -> list[Refusal]:
    """Refused whatever the image is. The last ones can't be taken back."""
    large = statements([Segment(qemu.RAM_BASE + 2 * MIB, 96 * MIB)])  # below all holes but the first
    busy = by_both(m, "another load is under way", "EBUSY", "another call loads, unloads or executes an image",
                   "Device or resource busy", busy=large)
    nobody = by_both(m, "no CAP_SYS_BOOT", "EPERM", "this takes CAP_SYS_BOOT", "Operation not permitted", nobody=True)
    nobody[1] = replace(nobody[1], command="")  # kexec-tools reads addresses that it gets no more then
    limit = "kernel.kexec_load_limit_{} is used up, until the next boot"
    proc = "cd /proc/sys/kernel; grep -qx {0} kexec_load_{1} || echo {0} >kexec_load_{1}"
    return [
        *busy, *nobody,
        Refusal("kexec_load_limit_panic", "EPERM", limit.format("panic"), file_statements("/tmp/good") + "\nflags 2",
                "kexec -s -p /tmp/good --command-line=x", FILE_FAILED + "Operation not permitted",
                before=proc.format(0, "limit_panic")),
        *by_both(m, "kexec_load_limit_reboot", "EPERM", limit.format("reboot"), "Operation not permitted",
                 before=proc.format(0, "limit_reboot")),
        *by_both(m, "kexec_load_disabled", "EPERM", "kernel.kexec_load_disabled is set, until the next boot",
                 "Operation not permitted", before=proc.format(1, "disabled")),
    ]


@pytest.mark.cells(CELL)
def test_each_with_its_line(machine: Machine) -> None:
    """By kexec-tools and by the system call; what was loaded before is still there, whole, and nothing else is held."""
    put_files(machine)
    load(machine, "file")
    held, wrong = reserved_pages(machine), []
    lost = [*files(machine), *segments(machine), *crash_kernels(machine)]
    for one in lost:
        wrong += check(machine, one)
        assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "1", one.what
    assert reserved_pages(machine) == held
    ends = others(machine)
    for one in ends:
        wrong += check(machine, one)
    table(machine, [*lost, *ends])
    assert not wrong, "\n".join(wrong)


@pytest.mark.cells(CELL)
def test_what_was_loaded_is_entered(machine: Machine) -> None:
    """Refusals that can't be taken back keep nobody from executing what is there."""
    put_files(machine)
    loaded = load(machine, "file")
    assert loaded.bytes_to_move == 0
    for one in others(machine)[2:]:
        assert not check(machine, one)
    since = len(machine.log())
    verify(machine, machine.exec(), since)


@pytest.mark.cells(CELL)
def test_the_limits_count(machine: Machine) -> None:
    """Two loads are let through by each call, and no third one; the limit can be made lower only."""
    put_files(machine)
    sysctl = "/proc/sys/kernel/kexec_load_limit_reboot"
    good = qemu.RAM_BASE + machine.boot.cell.memory * MIB // 4
    machine.sh(f"echo 4 >{sysctl}")
    assert machine.run(f"echo 5 >{sysctl}").rc
    for _ in range(2):
        assert call(machine, file_statements("/tmp/good")) == "0"
        assert call(machine, statements([Segment(good, PAGE)])) == "0"
    assert machine.sh(f"cat {sysctl}").strip() == "0"
    for one in (file_statements("/tmp/good"), statements([Segment(good, PAGE)]), statements([])):
        assert call(machine, one) == "EPERM"
    assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "1"


@pytest.mark.cells(CELL)
def test_nobody_can_fill_the_log(machine: Machine) -> None:
    """Lines for those who may not load are limited in rate, and take none away from those who may."""
    put_files(machine)
    machine.put("/tmp/request", f"{file_statements('/tmp/good')}\n".encode())
    since = mark(machine)
    machine.run(f"for n in $(seq {CALLS}); do {NOBODY.format(program='kload')} </tmp/request; done", timeout=300)
    count = len(lines(machine, since))
    machine.report(f"   {count} lines for {CALLS} calls")
    assert 0 < count <= CALLS // 2
    assert not check(machine, files(machine)[0])


@pytest.mark.cells(NARROW)
def test_pages_that_the_cpu_has_not(machine: Machine) -> None:
    head = image(machine)
    flags = struct.unpack_from(FLAGS[1], head, FLAGS[0])[0]
    struct.pack_into(FLAGS[1], head, FLAGS[0], flags & ~6 | 2 << 1)
    machine.put("/tmp/good", bytes(head))
    assert not check(machine, Refusal("16K pages", "EINVAL", "the Image has pages of 16 KiB, which this CPU has not",
                                      file_statements("/tmp/good"), "kexec -s -l /tmp/good --command-line=x",
                                      NOT_AVAILABLE))


# Headers that nobody can rely upon

def random_header(m: Machine, source: random.Random) -> bytearray:
    """A small Image whose PE header has numbers that are small, at an edge, or anything."""
    def number(limit: int) -> int:
        edges = (0, 1, HEADER_FILE - 1, HEADER_FILE, HEADER_FILE + 1, limit - HEADER_FILE, limit)
        return source.choice((source.choice(edges), source.randint(0, HEADER_FILE), source.randint(0, limit))) & limit

    sections = [(number(0xFFFFFFFF), number(0xFFFFFFFF)) for _ in range(source.randint(0, 3))]
    head = add_pe(image(m, HEADER_FILE), sections, source.choice((None, None, number(0xFFFF))),
                  source.choice((0, 0, 112, number(0xFFFF))), source.choice((64, 64, 65, max(64, number(0xFFFFFFFF)))))
    if source.random() < 0.1:
        head[source.randrange(64, HEADER_FILE)] ^= source.randrange(256)
    return head


def is_whole(image_: bytes) -> bool:
    """The same by a parser that can't overflow: are all sections of an Image in it?"""
    at, = struct.unpack_from(PE_OFFSET[1], image_, PE_OFFSET[0])
    header = image_[at:at + PE_HEADER.size]
    if len(header) < PE_HEADER.size:
        return False
    magic, _, count, _, _, _, optional, _ = PE_HEADER.unpack(header)
    if magic != PE:
        return True
    first = at + PE_HEADER.size + optional
    if first + count * SECTION.size > len(image_):
        return False
    found = (SECTION.unpack_from(image_, first + n * SECTION.size) for n in range(count))
    return all(not size or offset + size <= len(image_) for _, _, _, size, offset, _ in found)


@pytest.mark.cells(CELL)
def test_random_pe_headers(machine: Machine) -> None:
    """What the kernel takes is what another parser finds whole, whatever the numbers are; the kernel stays up."""
    source = random.Random(SEED)
    images = [bytes(random_header(machine, source)) for _ in range(HEADERS)]
    expected = ["0" if is_whole(one) else "ENOEXEC" for one in images]
    machine.put("/tmp/images", gzip.compress(b"".join(images)))
    answers = machine.sh(f"gzip -dc </tmp/images >/tmp/all; for n in $(seq 0 {HEADERS - 1}); do\n"
                         f"dd if=/tmp/all of=/tmp/one bs={HEADER_FILE} skip=$n count=1 2>/dev/null\n"
                         "printf 'kernel /tmp/one\\ncmdline 1\\n' | kload; done; true", timeout=600).split()
    machine.report(f"   {expected.count('0')} of {HEADERS} are whole")
    assert HEADERS // 10 < expected.count("0") < HEADERS * 9 // 10
    wrong = {n: (answer, wanted) for n, (answer, wanted) in enumerate(zip(answers, expected)) if answer != wanted}
    assert len(answers) == HEADERS and not wrong
    assert call(machine, file_statements("/tmp/one")) == answers[-1]

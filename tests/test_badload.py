"""What cannot be executed is refused when it is loaded, and costs nothing."""

from __future__ import annotations

import struct

import pytest

from lab import qemu
from lab.cells import CELLS, Cell, each_with
from lab.handover import load, log_since, lost_memory, reserved_pages, taken_memory, verify
from lab.kload import IMAGE_SIZE, NO_CMA, Segment, call, file_statements, kload, statements
from lab.machine import Machine

pytestmark = [pytest.mark.badload, pytest.mark.needs("arm64")]

MIB = 1 << 20
UART, GIC = 0x09000000, 0x08000000
AARCH64, PPC64 = 183 << 16, 21 << 16
NOMAP = "EACCES"
COMMAND_LINE_SIZE = 2048  # bytes, with the NUL at the end
REPETITIONS = 200
CLAIMED = 32 * MIB  # bytes, more than memory varies by
HOLES = [cell for cell in CELLS.values() if cell.holes]
# Machines and what is loaded there; in a plain check each machine and each loader.
BY_LOADER = each_with(HOLES, ("load", "file"),
                      lambda cell, loader: cell.core and (cell.kernel.pages == 4) == (loader == "load"))

Request = tuple[str, list[Segment], int | None]  # errno, segments, flags


def requests(cell: Cell) -> dict[str, Request]:
    """What is asked for, and what has to be answered."""
    page = cell.kernel.pages * 1024
    ram, end = qemu.RAM_BASE, qemu.RAM_BASE + cell.memory * MIB
    good = ram + cell.memory * MIB // 4
    holes = qemu.holes(cell.memory)

    def at(mem: int, memsz: int = page, contents: str = "fill 0x5a 4096") -> list[Segment]:
        return [Segment(mem, memsz, contents)]

    wanted: dict[str, Request] = {
        "the GIC": ("EADDRNOTAVAIL", at(GIC), None),
        "the UART": ("EADDRNOTAVAIL", at(UART), None),
        "address 0": ("EADDRNOTAVAIL", at(0), None),
        "just below RAM": ("EADDRNOTAVAIL", at(ram - page), None),
        "across the start of RAM": ("EADDRNOTAVAIL", at(ram - page, 2 * page), None),
        "just above RAM": ("EADDRNOTAVAIL", at(end), None),
        "across the end of RAM": ("EADDRNOTAVAIL", at(end - page, 2 * page), None),
        "far above RAM": ("EADDRNOTAVAIL", at(end + (64 << 30)), None),
        "above 2^48": ("EADDRNOTAVAIL", at(1 << 50), None),
        "the linear map's virtual address": ("EADDRNOTAVAIL", at(0xFFFF000000000000), None),
        "the last page there could be": ("EADDRNOTAVAIL", at((1 << 64) - 2 * page), None),
        "an end that wraps around": ("EADDRNOTAVAIL", at((1 << 64) - page, 2 * page), None),
        "an address within a page": ("EADDRNOTAVAIL", at(good + 1024), None),
        "a size that is no number of pages": ("EADDRNOTAVAIL", at(good, page + 1024), None),
        "a good segment and a bad one": ("EADDRNOTAVAIL", at(good) + at(GIC), None),
        "segments that overlap": ("EINVAL", at(good, 4 * page) + at(good + 2 * page), None),
        "the same segment twice": ("EINVAL", at(good) * 2, None),
        "more contents than room": ("EINVAL", at(good, page, f"fill 1 {page + 1}"), None),
        "more segments than there may be": ("EINVAL", [s for n in range(17) for s in at(good + n * page)], None),
        "more than half of memory": ("EINVAL", at(good, cell.memory * MIB // 8 * 5, "zero"), None),
        "contents that cannot be read": ("EFAULT", at(good, 8 * MIB, f"bad {8 * MIB}"), None),
        "a flag that does not exist": ("EINVAL", at(good), AARCH64 | 0x8000),
        "another architecture": ("EINVAL", at(good), PPC64),
    }
    for start, size in holes:
        wanted[f"the hole at {start:#x}"] = (NOMAP, at(start, max(page, 65536)), None)
        wanted[f"into the hole at {start:#x}"] = (NOMAP, at(start - page, 2 * page), None)
        wanted[f"out of the hole at {start:#x}"] = (NOMAP, at(start + size - page, 2 * page), None)
        wanted[f"around the hole at {start:#x}"] = (NOMAP, at(start - 65536, size + 2 * 65536), None)
    return wanted


@pytest.mark.cells(*HOLES)
def test_refused_and_nothing_lost(cell: Cell, machine: Machine) -> None:
    """Each gets its errno, holds no page, and leaves the image alone that was loaded before."""
    load(machine, "load-nocheck")
    held = reserved_pages(machine)
    bad = requests(cell)
    wrong = {}
    for name, (errno, segments, flags) in bad.items():
        answer = kload(machine, segments, flags=flags)
        if answer != errno:
            wrong[name] = f"{answer} instead of {errno}"
        assert reserved_pages(machine) == held, f"pages were lost or freed by {name}"
        assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "1", name
    assert not wrong
    since = len(machine.log())
    verify(machine, machine.exec(), since)


@pytest.mark.cells(*HOLES)
def test_unloading_frees_everything(machine: Machine) -> None:
    before = reserved_pages(machine)
    for loader in ("load-nocheck", "file"):
        load(machine, loader)
        assert reserved_pages(machine) > before
        machine.sh("kexec -u")
        assert reserved_pages(machine) == before
        assert machine.run("kexec -e").rc != 0


def small_image(m: Machine, **fields: int) -> bytes:
    """The head of a real Image, good enough to be loaded, with members of its header changed."""
    with open(m.built.image, "rb") as file:
        image = bytearray(file.read(8192))
    values = {"image_size": 65536} | fields
    for name, value in values.items():
        offset, size = {"text_offset": (8, 8), "image_size": (IMAGE_SIZE, 8), "flags": (24, 8), "magic": (56, 4)}[name]
        image[offset:offset + size] = value.to_bytes(size, "little")
    return bytes(image)


def page_size_flag(m: Machine, pages: int) -> int:
    """The flags of the Image, for another page size in KiB."""
    with open(m.built.image, "rb") as file:
        flags = struct.unpack_from("<Q", file.read(64), 24)[0]
    return flags & ~6 | {4: 1, 16: 2, 64: 3}[pages] << 1


def bad_files(m: Machine) -> dict[str, tuple[str, str]]:
    """What kexec_file_load() is asked for: errno, and what kload is told."""
    memory = m.boot.cell.memory
    images = {
        "good": small_image(m),
        "truncated": small_image(m)[:40],
        "empty": b"",
        "magic": small_image(m, magic=0x644D5242),
        "nosize": small_image(m, image_size=0),
        "large": small_image(m, image_size=(memory + 1) * MIB),
        "huge": small_image(m, image_size=1 << 63),
        "offset": small_image(m, text_offset=1 << 62),
    }
    for name, data in images.items():
        m.put(f"/tmp/{name}", data)
    m.sh(f"truncate -s {memory * 2}M /tmp/initrd.large; truncate -s 5G /tmp/initrd.huge")
    return {
        "an Image of 40 bytes": ("ENOEXEC", file_statements("/tmp/truncated")),
        "an empty Image": ("EINVAL", file_statements("/tmp/empty")),
        "an Image with another magic": ("ENOEXEC", file_statements("/tmp/magic")),
        "an Image that does not tell its size": ("EINVAL", file_statements("/tmp/nosize")),
        "an Image that is larger than memory": ("EADDRNOTAVAIL", file_statements("/tmp/large")),
        "an Image of half the address space": ("EADDRNOTAVAIL", file_statements("/tmp/huge")),
        "an Image that is to be far from its start": ("EADDRNOTAVAIL", file_statements("/tmp/offset")),
        "an initrd that is larger than memory": ("ENOMEM", file_statements("/tmp/good", "/tmp/initrd.large")),
        "an initrd of 5 GiB": ("EFBIG", file_statements("/tmp/good", "/tmp/initrd.huge")),
        "a command line that would be cut": ("E2BIG", file_statements("/tmp/good", cmdline=COMMAND_LINE_SIZE + 1)),
        "a command line of a megabyte": ("E2BIG", file_statements("/tmp/good", cmdline=MIB)),
        "a directory": ("EINVAL", file_statements("/tmp")),
    }


@pytest.mark.cells(*HOLES)
def test_files_refused_and_nothing_lost(machine: Machine) -> None:
    """The same for kexec_file_load()."""
    load(machine, "file")
    held = reserved_pages(machine)
    wrong = {}
    for name, (errno, text) in bad_files(machine).items():
        answer = call(machine, text)
        if answer != errno:
            wrong[name] = f"{answer} instead of {errno}"
        assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "1", name
    assert not wrong
    assert reserved_pages(machine) == held
    since = len(machine.log())
    verify(machine, machine.exec(), since)


@pytest.mark.cells(CELLS["4k-va48-el1-a72"], CELLS["4k-va48-nvhe-a57"])
def test_page_size_of_the_image(machine: Machine) -> None:
    """These CPUs have no 16K pages, but 64K ones; all of them do both byte orders."""
    for pages, answer in ((16, "EINVAL"), (64, "0"), (4, "0")):
        machine.put("/tmp/image", small_image(machine, flags=page_size_flag(machine, pages)))
        assert call(machine, file_statements("/tmp/image")) == answer, f"{pages}K pages"


@pytest.mark.cells(*HOLES)
def test_what_is_allowed(cell: Cell, machine: Machine) -> None:
    """The longest command line; an entry outside of all segments, with a warning; no segments, to unload."""
    page = cell.kernel.pages * 1024
    good = qemu.RAM_BASE + cell.memory * MIB // 4
    machine.put("/tmp/good", small_image(machine))
    assert call(machine, file_statements("/tmp/good", cmdline=COMMAND_LINE_SIZE)) == "0"
    machine.sh("echo lab: entry >/dev/kmsg")
    assert kload(machine, [Segment(good, page)], entry=good + page) == "0"
    assert f"kexec: entry {good + page:#x} is not in a segment" in log_since(machine, "lab: entry")
    machine.sh("echo lab: inside >/dev/kmsg")
    assert kload(machine, [Segment(good, page)], entry=good + page - 4) == "0"
    assert "is not in a segment" not in log_since(machine, "lab: inside")
    assert kload(machine, []) == "0"
    assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "0"


# Loads that are given up half way

FAIL = """
mount -t debugfs none /sys/kernel/debug 2>/dev/null
cd /sys/kernel/debug
for attribute in failslab fail_page_alloc; do
	echo N >$attribute/ignore-gfp-wait
	echo 0 >$attribute/verbose
done
echo N >fail_page_alloc/ignore-gfp-highmem
echo 0 >fail_page_alloc/min-order
"""

SWEEP = """
n={first}
while :; do
	answer=$( (cat /tmp/request; echo fail $n) | kload)
	echo "$n $answer $(cat /sys/kernel/kexec_loaded)"
	case $answer in
	0*) break ;;
	esac
	n=$((n + 1))
done
"""


def small_request(m: Machine, loader: str) -> str:
    """A load that has all the parts of a large one, and takes few pages."""
    if loader == "file":
        m.put("/tmp/good", small_image(m))
        return file_statements("/tmp/good", "/bin/fetch", 100) + f"\nflags {NO_CMA:#x}"
    page = m.boot.cell.kernel.pages * 1024
    good = qemu.RAM_BASE + m.boot.cell.memory * MIB // 4
    return statements([Segment(good, 4 * page, "fill 0x5a 4096"), Segment(good + 16 * page, 4 * page)])


def sweep(m: Machine, request: str) -> tuple[list[int], list[int]]:
    """Have each allocation that a load makes fail once; which make it fail, and which it can do without."""
    m.sh(FAIL)
    m.put("/tmp/request", (request + "\n").encode())
    failed, without, first = [], [], 1
    while True:
        *lines, last = m.sh(SWEEP.format(first=first), timeout=300).splitlines()
        for line in lines:
            n, answer, loaded = line.split()
            assert (answer, loaded) == ("ENOMEM", "1"), line
            failed.append(int(n))
        if "spared" in last:
            break
        # It went on without: that has taken the place of the image that was loaded.
        without.append(int(last.split()[0]))
        first = without[-1] + 1
        load(m, "file")
    m.report(f"   {m.boot.cell.name}: {len(failed)} allocations that fail the call, {len(without)} that it can do without")
    return failed, without


@pytest.mark.cells(*BY_LOADER)
def test_without_memory(cell: Cell, machine: Machine) -> None:
    """Each allocation that a load makes fails once: ENOMEM, or done without; nothing lost, nothing leaked."""
    load(machine, "file")
    held = reserved_pages(machine)
    failed, _ = sweep(machine, small_request(machine, BY_LOADER[cell]))
    assert len(failed) >= 15

    load(machine, "file")
    assert reserved_pages(machine) == held
    n = failed[-4]  # one of the tables, which come last

    def again() -> None:
        assert machine.sh(AGAIN.format(n=n, times=REPETITIONS), timeout=300).split() == [str(REPETITIONS), "ENOMEM"]

    limit = REPETITIONS * cell.kernel.pages
    lost = lost_memory(machine, again, limit, 3)
    machine.report(f"   {REPETITIONS} loads that failed at allocation {n} each time: {lost} KiB are lost")
    assert lost[-1] < limit, "a page or more is lost each time"
    assert reserved_pages(machine) == held
    since = len(machine.log())
    verify(machine, machine.exec(), since)


@pytest.mark.needs("claim")
@pytest.mark.cells(CELLS["4k-va48-vhe-holes"])
def test_without_memory_in_place(machine: Machine) -> None:
    """The same where memory is claimed, or copied to after all: what was claimed is given back."""
    load(machine, "file")
    machine.put("/tmp/good", small_image(machine, image_size=CLAIMED))
    before = taken_memory(machine)
    failed, without = sweep(machine, file_statements("/tmp/good", "/bin/fetch", 100))
    assert failed and without
    load(machine, "file")
    lost = taken_memory(machine) - before
    machine.report(f"   {lost} KiB are lost")
    assert lost < CLAIMED // 1024 // 2
    since = len(machine.log())
    verify(machine, machine.exec(), since)


AGAIN = """
n=0
while [ $n -lt {times} ]; do
	(cat /tmp/request; echo fail {n}) | kload
	n=$((n + 1))
done | sort | uniq -c
"""


@pytest.mark.cells(*HOLES)
def test_killed(cell: Cell, machine: Machine) -> None:
    """A loader that is killed leaves all of its image or nothing, and no lock behind."""
    held = reserved_pages(machine)
    size = cell.memory * MIB // 8
    request = statements([Segment(qemu.RAM_BASE + cell.memory * MIB // 2 + 64 * MIB, size, f"fill 0x5a {size}")])
    machine.put("/tmp/request", (request + "\nannounce\n").encode())
    began = 0
    for tick in range(10):
        said = machine.sh("rm -f /tmp/calling; kload </tmp/request 2>/tmp/calling & pid=$!\n"
                          "until grep -q calling /tmp/calling 2>/dev/null; do :; done\n"
                          f"sleep {tick / 40}; kill -9 $pid && echo in time; wait $pid\n"
                          "cat /sys/kernel/kexec_loaded").split("\n")
        began += said[0] == "in time"
        assert kload(machine, []) == "0"
        assert reserved_pages(machine) == held
    machine.report(f"   {cell.name}: {began} of 10 were killed in the middle of the call")
    assert began >= 3
    load(machine, "file")
    since = len(machine.log())
    verify(machine, machine.exec(), since)

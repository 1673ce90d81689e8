"""kexec_load() with segments of our own choice, and kexec_file_load(), through the guest's kload."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Callable, Sequence

from lab import fdt, qemu
from lab.machine import Machine

MIB = 1 << 20
MAX_RANGES = 10  # kexec_load() takes 16 segments
IMAGE_SIZE = 16  # offset of image_size in an arm64 Image (booting.rst)

# Flags of kexec_file_load()
DEBUG = 0x8  # KEXEC_FILE_DEBUG
NO_CMA = 0x10  # KEXEC_FILE_NO_CMA: nothing contiguous, so everything is copied

SEED = 0x6B657865632D6C61  # for KASLR: any number but 0

# Enters a kernel as booting.rst has it: x0 is the device tree, x1 to x3 are 0.
TRAMPOLINE = struct.pack("<8I",
                         0x58000100,  # ldr x0, .+32
                         0x58000124,  # ldr x4, .+36
                         0xAA1F03E1,  # mov x1, xzr
                         0xAA1F03E2,  # mov x2, xzr
                         0xAA1F03E3,  # mov x3, xzr
                         0xD61F0080,  # br x4
                         0xD503201F, 0xD503201F)  # nop, and then two addresses
TRAMPOLINE_SIZE = 64  # bytes, keeps what follows aligned

# Further properties of /chosen, in a device tree at a physical address
Chosen = Callable[[int], dict[str, bytes]]


@dataclass(frozen=True)
class Segment:
    """Destination (physical address, size in bytes) and contents, as kload's source describes them."""

    mem: int
    memsz: int
    contents: str = "zero"

    @property
    def end(self) -> int:
        return self.mem + self.memsz


def statements(segments: Sequence[Segment], entry: int | None = None, flags: int | None = None) -> str:
    """What kload has to be told for a kexec_load(). `entry` None is the first segment."""
    lines = [f"segment {s.mem:#x} {s.memsz:#x} {s.contents}" for s in segments]
    if entry is None and segments:
        entry = segments[0].mem
    lines.append(f"entry {entry or 0:#x}")
    if flags is not None:
        lines.append(f"flags {flags:#x}")
    return "\n".join(lines)


def file_statements(kernel: str, initrd: str | None = None, cmdline: int | str = 1) -> str:
    """The same for a kexec_file_load(): paths in the guest, and the command line, or its bytes with its end."""
    return "\n".join([f"kernel {kernel}", *([f"initrd {initrd}"] if initrd else []),
                      f"line {cmdline}" if isinstance(cmdline, str) else f"cmdline {cmdline}"])


def next_image(m: Machine, flags: int = 0, further: Sequence[str] = ()) -> str:
    """What kload has to be told for a kexec_file_load() of the next kernel, which is fetched."""
    m.sh("fetch", timeout=300)
    return "\n".join([file_statements("/next/Image", "/next/initrd", next_parameters(m)), f"flags {DEBUG | flags:#x}",
                      *further])


def call(m: Machine, text: str) -> str:
    """Have kload do what `text` says; returns the name of the error, or "0"."""
    result = m.run(f"kload <<EOF\n{text}\nEOF", timeout=300)
    if result.rc > 1:
        raise ValueError(f"kload: {result.out}")
    return result.out.strip()


def kload(m: Machine, segments: Sequence[Segment], entry: int | None = None, flags: int | None = None) -> str:
    """Call kexec_load(); returns the name of the error, or "0". `entry` None is the first segment."""
    return call(m, statements(segments, entry, flags))


def used_ranges(m: Machine) -> list[tuple[int, int]]:
    """Start and end of the ranges of memory that the running kernel uses for itself."""
    ranges: list[tuple[int, int]] = []
    for line in m.sh("kpages used", timeout=300).splitlines():
        start, size = (int(word, 16) for word in line.split())
        ranges.append((start, start + size))
    return ranges


def kernel_base(m: Machine) -> int:
    """Physical address of the running kernel's Image."""
    for line in m.sh("cat /proc/iomem").splitlines():
        if "Kernel code" in line:
            return int(line.strip().split("-")[0], 16) & ~(2 * MIB - 1)
    raise ValueError("no 'Kernel code' in /proc/iomem")


def merge(ranges: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Ranges with those that are at most `gap` apart made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(ranges: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of `ranges` lies in none of `taken`."""
    left = list(ranges)
    for low, high in taken:
        left = [piece for start, end in left
                for piece in ((start, min(end, low)), (max(start, high), end)) if piece[0] < piece[1]]
    return left


def next_parameters(m: Machine) -> str:
    """The command line of the next kernel."""
    return f"{qemu.parameters(m.boot.cell)} lab.gen={m.generation + 1}"


def device_tree(m: Machine, initrd_start: int, initrd_end: int, chosen: dict[str, bytes]) -> bytes:
    """The running kernel's device tree, with the next one's command line and initrd, and `chosen` besides."""
    tree = fdt.parse(m.get("/sys/firmware/fdt"))
    tree.root.node("chosen").properties |= {
        "bootargs": fdt.string(next_parameters(m)),
        "linux,initrd-start": fdt.pairs(initrd_start),
        "linux,initrd-end": fdt.pairs(initrd_end),
        "kaslr-seed": fdt.pairs(SEED),  # a kernel wipes the one it was given
    } | chosen
    return fdt.flatten(tree)


def pages_of(m: Machine, size: int) -> int:
    """`size` in bytes, up to the next page of the kernel."""
    page = m.boot.cell.kernel.pages * 1024
    return -(-size // page) * page


def kernel_and_initrd(m: Machine, kernel_at: int, initrd_at: int | None = None) -> tuple[Segment, Segment]:
    """The next kernel's Image and initrd; the latter behind the Image if it is not told where."""
    m.sh("fetch", timeout=300)
    with open(m.boot.next_image, "rb") as image:
        image_size = struct.unpack_from("<Q", image.read(64), IMAGE_SIZE)[0]
    kernel = Segment(kernel_at, pages_of(m, image_size), "file /next/Image")
    size = pages_of(m, m.guest.next.stat().st_size)
    return kernel, Segment(kernel.end if initrd_at is None else initrd_at, size, "file /next/initrd")


def tree_before(m: Machine, kernel: Segment, initrd: Segment, end: int, chosen: Chosen = lambda at: {}) -> Segment:
    """The next kernel's device tree, behind code that enters that kernel, in the last pages before `end`."""
    def tree(at: int) -> bytes:
        return device_tree(m, initrd.mem, initrd.mem + m.guest.next.stat().st_size, chosen(at))

    size = pages_of(m, TRAMPOLINE_SIZE + len(tree(0)))
    at = end - size + TRAMPOLINE_SIZE
    code = TRAMPOLINE + struct.pack("<2Q", at, kernel.mem)
    m.put("/tmp/dtb", code.ljust(TRAMPOLINE_SIZE, b"\0") + tree(at))
    return Segment(end - size, size, "file /tmp/dtb")


def load_over_running_kernel(m: Machine, chosen: Chosen = lambda at: {}) -> list[Segment]:
    """Load the next kernel onto everything that the running one uses.

    The Image goes where the running one is, with the initrd behind it; segments
    of zeros cover whatever else the kernel uses: its page tables, stacks and
    data of every kind. `chosen` are further properties for the device tree at
    an address. Returns the segments. Raises AssertionError if the kernel
    refuses them.
    """
    used = used_ranges(m)
    kernel, initrd = kernel_and_initrd(m, kernel_base(m))
    gap = MIB
    while len(merge(used, gap)) > MAX_RANGES:
        gap *= 2
    rest = subtract(merge(used, gap), [(kernel.mem, kernel.end), (initrd.mem, initrd.end)])
    # The device tree takes the place of something, too: the end of the last.
    dtb = tree_before(m, kernel, initrd, rest[-1][1], chosen)
    zeros = [Segment(start, end - start) for start, end in subtract(rest, [(dtb.mem, dtb.end)])]
    # What the next kernel cannot do without comes last, down to its last page.
    segments = [kernel, initrd, *zeros, dtb]
    assert not subtract(used, [(s.mem, s.end) for s in segments])
    error = kload(m, segments, entry=dtb.mem)
    assert error == "0", f"{error}: {segments}"
    return segments

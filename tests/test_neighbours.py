"""What fails a kexec although it is not kexec's, or not arm64's: contiguous memory, CPUs that do not stop.

With --all each is also shown on the base, which fails.
"""

from __future__ import annotations

import re
import struct
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conftest import Lab, name_of
from lab import upto
from lab.cells import CELLS, DEFAULT, HARDENED, KERNELS, Cell, on_base
from lab.gdb import Gdb, options
from lab.handover import handover, load, verify
from lab.kload import DEBUG, IMAGE_SIZE, MIB, Segment, call, file_statements, kload, next_image
from lab.machine import Crashed, Machine, Panicked, TimeoutFailure
from lab.qemu import RAM_BASE
from lab.stage import read_symbols

pytestmark = pytest.mark.neighbours
in_cma_segments = pytest.mark.needs("cma-segments")

ALIGNMENT = 2 * MIB  # of an Image, whatever the page size (booting.rst)
TEXT_OFFSET = 0x80000  # of every Image before v5.8
PORTION = 64 * MIB  # of 256 MiB
COUNT = 256 * MIB // PORTION  # of these fill it

LARGE = CELLS["4k-va48-vhe-cma"]  # room for everything
SMALL = replace(LARGE, name="4k-va48-vhe-cma-small", append=("cma=16M",))  # ... for a kernel without an initrd
LOW = replace(LARGE, name="4k-va48-vhe-cma-low", append=("cma=8M@0x41000000",))  # ... for a device tree, below all
PROTECTED = [replace(CELLS[name], name=f"{name}-protected", append=("kvm-arm.mode=protected",))
             for name in ("4k-va48-vhe", "4k-va48-nvhe-a57")]
SPIN_TABLE = replace(DEFAULT, name="4k-va48-vhe-spin-table", spin_table=DEFAULT.cpus)
SILENT_CPU = replace(DEFAULT, name="4k-va48-vhe-silent-cpu", spin_table=1)
TRUSTED_OS = replace(DEFAULT, name="4k-va48-vhe-trusted-os", kaslr=False)
ONE_CPU = replace(SPIN_TABLE, name="4k-va48-vhe-spin-table-one", append=("nr_cpus=1",))


def with_base(*cells: Cell) -> tuple[Cell, ...]:
    """These, and the same with mainline's own kernel, where there is one."""
    return cells + tuple(on_base(cell) for cell in cells if f"{cell.kernel.name}-base" in KERNELS)


# Loading, with the kernel telling where

@dataclass(frozen=True, repr=False)
class Placed:
    """Where kexec_file_load() put a part of the image. Bytes; `bufsz` of them come from a file."""

    mem: int
    bufsz: int
    memsz: int

    @property
    def end(self) -> int:
        return self.mem + self.memsz

    def __repr__(self) -> str:
        return f"{self.mem:#x}-{self.end:#x}"


def load_next(m: Machine) -> str:
    """kexec_file_load() of the next kernel; returns the name of the error, or "0"."""
    return call(m, next_image(m))


def load_image(m: Machine, image_size: int, text_offset: int = 0) -> str:
    """The same for the head of a real Image, with this in its header, and no initrd."""
    m.put("/tmp/image", header(m, image_size, text_offset).ljust(8192, b"\0"))
    return call(m, file_statements("/tmp/image") + f"\nflags {DEBUG:#x}")


def header(m: Machine, image_size: int, text_offset: int = 0) -> bytes:
    """The header of the real Image, with another size and text_offset."""
    with open(m.built.image, "rb") as file:
        head = bytearray(file.read(64))
    struct.pack_into("<QQ", head, 8, text_offset, image_size)
    return bytes(head)


def image_size(m: Machine) -> int:
    """Bytes that the real Image takes in memory."""
    with open(m.built.image, "rb") as file:
        return struct.unpack_from("<Q", file.read(64), IMAGE_SIZE)[0]


def unload(m: Machine) -> None:
    assert kload(m, []) == "0"


def placed(m: Machine) -> dict[str, Placed]:
    """The parts of the image that was loaded last: kernel, initrd and dtb."""
    found = re.findall(r"Loaded (\w+) at (0x\w+) bufsz=(0x\w+) memsz=(0x\w+)", m.sh("dmesg"))
    return {name: Placed(int(mem, 16), int(bufsz, 16), int(memsz, 16)) for name, mem, bufsz, memsz in found}


def cma(m: Machine) -> tuple[int, int]:
    """Start and end of the contiguous area."""
    match = re.search(r"cma: Reserved (\d+) MiB at (0x\w+)", m.sh("dmesg"))
    assert match
    start = int(match.group(2), 16)
    return start, start + int(match.group(1)) * MIB


def in_cma(m: Machine, part: Placed) -> bool:
    start, end = cma(m)
    return start <= part.mem and part.end <= end


def has_room(m: Machine, size: int) -> bool:
    """Does an image of `size` bytes still find room in the contiguous area?"""
    assert load_image(m, size) == "0"
    where = placed(m)["kernel"]
    unload(m)
    return in_cma(m, where)


# Contiguous memory

@in_cma_segments
@pytest.mark.cells(*with_base(LARGE, CELLS["64k-va52-nvhe-cma"]))
def test_aligned_in_cma(cell: Cell, machine: Machine) -> None:
    """All of an image fits, stays in place, and the kernel and the device tree are aligned."""
    assert load_next(machine) == "0"
    parts = placed(machine)
    machine.report(f"   {cell.name}: {parts}")
    assert all(in_cma(machine, part) for part in parts.values())
    since = len(machine.log())
    verify(machine, machine.exec(), since)
    complained = "misaligned at boot" in machine.log()[since:]
    if cell.kernel.patched:
        assert parts["kernel"].mem % ALIGNMENT == parts["dtb"].mem % ALIGNMENT == 0
        assert not complained
    else:
        assert parts["kernel"].mem % ALIGNMENT
        assert complained


@in_cma_segments
@pytest.mark.cells(*with_base(LOW))
def test_limits_in_cma(cell: Cell, machine: Machine) -> None:
    """Mainline places the device tree below the kernel, where CMA has room, although it says that it may not be there.

    With the series it may be, as long as booting.rst permits it, and is found there.
    """
    assert load_next(machine) == "0"
    parts = placed(machine)
    machine.report(f"   {cell.name}: {parts}")
    assert cma(machine)[1] <= parts["kernel"].mem
    assert cell.kernel.patched or parts["dtb"].mem < parts["kernel"].mem
    since = len(machine.log())
    verify(machine, machine.exec(), since)


@in_cma_segments
@pytest.mark.cells(*with_base(SMALL))
def test_cma_for_the_kernel_only(cell: Cell, machine: Machine) -> None:
    """A kernel that gets room in CMA, and an initrd that does not: it goes elsewhere, and nothing is lost."""
    size = image_size(machine)
    assert has_room(machine, size)
    if not cell.kernel.patched:
        assert load_next(machine) == "EADDRNOTAVAIL"
        assert not has_room(machine, size)
        assert "Could not find any suitable kernel location!" in machine.log()
        return
    for _ in range(3):
        assert load_next(machine) == "0"
        assert not in_cma(machine, placed(machine)["initrd"])
        unload(machine)
        assert has_room(machine, size)
    handover(machine, "file")


@in_cma_segments
@pytest.mark.cells(*with_base(LARGE))
def test_refused_images_leave_cma(cell: Cell, machine: Machine) -> None:
    """A load that fails once it has memory gives that back."""
    assert has_room(machine, PORTION)
    for _ in range(COUNT):
        assert load_image(machine, PORTION, text_offset=16) == "EADDRNOTAVAIL"  # not a number of pages
    assert has_room(machine, PORTION) == cell.kernel.patched


@in_cma_segments
@pytest.mark.cells(*with_base(LARGE))
def test_text_offset_leaves_cma(cell: Cell, machine: Machine) -> None:
    """What lies between the boundary and a kernel that has a text_offset is given back, too."""
    assert has_room(machine, PORTION)
    for _ in range(COUNT):
        assert load_image(machine, MIB, text_offset=PORTION) == "0"
        unload(machine)
    assert has_room(machine, PORTION) == cell.kernel.patched


@in_cma_segments
@pytest.mark.cells(*with_base(LARGE))
def test_text_offset_in_cma(cell: Cell, machine: Machine) -> None:
    """An Image with a text_offset is where its entry is.

    It is the real one behind a branch to it: the sum of text_offset and what
    the branch skips is a boundary that today's kernels accept.
    """
    machine.sh("fetch", timeout=300)
    skip = ALIGNMENT - TEXT_OFFSET
    head = bytearray(header(machine, image_size(machine) + skip, TEXT_OFFSET))
    struct.pack_into("<II", head, 0, 0x14000000 | skip // 4, 0)  # b .+skip
    machine.put("/tmp/head", bytes(head))
    machine.sh(f"{{ cat /tmp/head; head -c {skip - len(head)} /dev/zero; cat /next/Image; }} >/next/shifted\n"
               "mv /next/shifted /next/Image")
    assert load_next(machine) == "0"
    kernel = placed(machine)["kernel"]
    machine.report(f"   {cell.name}: {kernel}")
    assert in_cma(machine, kernel) and kernel.mem % MIB == TEXT_OFFSET
    since = len(machine.log())
    if cell.kernel.patched:
        verify(machine, machine.exec(), since)
        return
    machine.silence = 10
    with pytest.raises(TimeoutFailure):
        machine.exec()
    assert "Booting Linux" not in machine.log()[since:]


@in_cma_segments
@pytest.mark.cells(*with_base(LARGE))
def test_text_offset_that_wraps(cell: Cell, machine: Machine) -> None:
    """The size and the text_offset are a sum that fits, or an Image that is refused."""
    answer = load_image(machine, 4 * MIB, text_offset=(1 << 64) - MIB)
    assert answer == ("EINVAL" if cell.kernel.patched else "0")


@in_cma_segments
@pytest.mark.cells(*with_base(LARGE))
def test_end_of_a_segment_in_cma(cell: Cell, machine: Machine, tmp_path: Path) -> None:
    """What the Image does not fill of the kernel's segment is zero, whatever CMA was used for before."""
    machine.put("/tmp/head", header(machine, PORTION))
    machine.sh(f"{{ cat /tmp/head; tr '\\0' Z </dev/zero | head -c {PORTION // 2}; }} >/tmp/image")
    assert call(machine, file_statements("/tmp/image") + f"\nflags {DEBUG:#x}") == "0"
    before = placed(machine)["kernel"]
    unload(machine)
    assert load_next(machine) == "0"
    kernel = placed(machine)["kernel"]
    assert in_cma(machine, kernel)
    assert before.mem <= kernel.mem and kernel.end <= before.mem + before.bufsz
    dump = tmp_path / "end"
    start = kernel.mem + kernel.bufsz
    machine.qmp("pmemsave", val=start, size=kernel.end - start, filename=str(dump))
    left = len(dump.read_bytes().replace(b"\0", b""))
    machine.report(f"   {cell.name}: {left} of {kernel.end - start} bytes behind the Image are not zero")
    assert (left == 0) == cell.kernel.patched


# Kernels that are hardened

def never_begins(m: Machine) -> None:
    """What loads without a word does not come up."""
    load(m, "load-nocheck")
    m.silence = 10
    since = len(m.log())
    with pytest.raises((TimeoutFailure, Panicked, Crashed)):
        m.exec()
    assert "Booting Linux" not in m.log()[since:]


@pytest.mark.cells(*with_base(*(cell for cell in CELLS.values() if cell.kernel in HARDENED)))
def test_hardened(cell: Cell, machine: Machine) -> None:
    """What guards a kernel does not keep it from leaving."""
    if cell.kernel.patched:
        handover(machine, "load-nocheck")
        handover(machine, "file")
        return
    never_begins(machine)


# CPUs that do not stop

def refused(m: Machine) -> str:
    """Both system calls are refused; what the kernel had to say about it."""
    m.sh("fetch; echo lab: refused >/dev/kmsg", timeout=300)
    segment = Segment(RAM_BASE + m.boot.cell.memory * MIB // 2, 65536)
    assert kload(m, [segment]) == "EBUSY"
    assert load_image(m, MIB) == "EBUSY"
    assert m.sh("cat /sys/kernel/kexec_loaded").strip() == "0"
    return m.sh("dmesg | sed '1,/lab: refused/d'")


@pytest.mark.needs("arm64")
@pytest.mark.cells(*with_base(*PROTECTED))
def test_protected_kvm(cell: Cell, lab: Lab) -> None:
    """kexec and hibernate are refused, and say what to boot without."""
    with lab.machine(cell, cell.name) as m:
        hello = m.hello()
        assert "Protected" in (hello.kvm or "")
        said = refused(m)
        # It takes devices down, the port to here among them, before it finds out.
        m.begin("echo disk >/sys/power/state")
        begin = time.monotonic()
        while not (hibernated := re.search(r"Can't hibernate: .*(?=\n)", m.log())):
            assert time.monotonic() - begin < 60
            time.sleep(0.5)
        m.report(f"{said}{hibernated.group()}")
        for text in (said, hibernated.group()):
            assert ("boot without kvm-arm.mode=protected" in text) == cell.kernel.patched


@pytest.mark.cells(*with_base(SPIN_TABLE, SILENT_CPU))
def test_spin_table(cell: Cell, machine: Machine) -> None:
    """Refused, with the way out: where no CPU can be stopped, and where one can't be told from one that hangs."""
    said = refused(machine)
    machine.report(said)
    way_out = "boot with nr_cpus=1" if cell.spin_table == cell.cpus else "leave it out by maxcpus="
    assert (way_out in said) == (cell.kernel.patched and upto.has("arm64"))


@pytest.mark.cells(*with_base(TRUSTED_OS))
def test_trusted_os(cell: Cell, lab: Lab, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Refused while the last CPU has to stay online, unless that is the one that reboots.

    No firmware here says so: a debugger does, in the variable that keeps its answer.
    """
    last, built = cell.cpus - 1, lab.kernels[cell.kernel]
    assert last > 0 and lab.guest
    with Machine(cell, built, lab.guest, accel=lab.accel, name=name_of(request), report=lab.report,
                 extra=options(tmp_path / "gdb")) as m:
        m.hello()
        with Gdb(tmp_path / "gdb") as gdb:
            gdb.write(read_symbols(built.vmlinux)["resident_cpu"], struct.pack("<i", last), virtual=True)
            gdb.resume()
        if cell.kernel.patched:
            assert ("make it the one in /sys/kernel/reboot/cpu" in refused(m)) == upto.has("arm64")
            m.sh(f"echo {last} >/sys/kernel/reboot/cpu")
            handover(m, "load-nocheck")
            return
        never_begins(m)


@pytest.mark.cells(ONE_CPU)
def test_spin_table_and_one_cpu(machine: Machine) -> None:
    """That way out."""
    handover(machine, "file")
    handover(machine, "load-nocheck")

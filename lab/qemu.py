"""QEMU's command line for a cell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lab import apt, fdt, host, lock, paths, proc, say
from lab.cells import VERSAL, VIRT, Cell
from lab.errors import LabError, UsageError

QEMU = "qemu-system-aarch64"
VARIABLE = "QEMU"  # in the environment: a program for cells that need a newer one than the machine's own
# The version where memory tags work and plugins can read registers. With 7.2 a kernel finds other tags than it set; what
# lies between was not tried. 11 takes no plugin that is made for 10.
RECENT = 10
NEWEST = "trixie"  # the release whose backports have the newest QEMU of Debian
FIRMWARE = "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd"
RAM_BASE = 0x40000000
PL011 = {VIRT: 0x09000000, VERSAL: 0xFF000000}  # physical address of the UART that is the console, by board
LOW_MEMORY = 2048  # MiB from address 0 that Versal has; the rest is at 32 GiB
MANY = 8  # CPUs, beyond which they run in turns
REALTIME_CPUS = 2  # of Versal's, which are counted as well, but are of no concern to Linux
MIB = 1 << 20
PORT = "lab"  # name of the virtio-serial port that the guest's init looks for


@dataclass(frozen=True)
class Boot:
    """What QEMU is told to boot: a cell with its files. `dtb` only where the cell asks for one."""

    cell: Cell
    image: Path
    initrd: Path
    next_image: Path
    next_initrd: Path
    accel: str = "tcg"
    dtb: Path | None = None


@cache
def version(program: tuple[str, ...] = (QEMU,)) -> int:
    """The major version of a QEMU, by default the machine's own. Raises LabError when it can't be run."""
    try:
        return int(re.findall(r"version (\d+)", proc.run([*program, "--version"]).stdout.decode())[0])
    except IndexError:
        raise LabError(f"{program[-1]} is no QEMU that runs here", "Debian's package is qemu-system-arm") from None


def versions(cell: Cell) -> tuple[int, int]:
    """The oldest and the newest major version of QEMU that `cell` will do with; 0: any."""
    return max(cell.qemu, RECENT if cell.mte or cell.modelled else 0), RECENT if cell.modelled else 0


@cache
def program(oldest: int = 0, newest: int = 0) -> tuple[str, ...]:
    """The command that is a QEMU of the major version `oldest` or later, and no later than `newest` unless that is 0.

    Any is the machine's own. Where that is too old it is what QEMU= names, the
    machine's own being newer than thought, or the newest that Debian has; with a
    `newest`, what the backports of the machine's release have. Raises UsageError if
    what QEMU= names is too old, LabError if there is none to be had.
    """
    if newest:
        return (QEMU,) if oldest <= version() <= newest else _backported(oldest, newest)
    named = os.environ.get(VARIABLE)
    if oldest and named:
        if version((named,)) < oldest:
            raise UsageError(f"{VARIABLE}={named} is version {version((named,))}, and a cell needs {oldest}",
                             f"leave {VARIABLE} unset to have Debian's newest fetched")
        return (named,)
    if not oldest or shutil.which(QEMU) and version() >= oldest:
        return (QEMU,)
    found = _newest()
    if version(found) < oldest:
        raise LabError(f"Debian's newest QEMU is version {version(found)}, and a cell needs {oldest}", VARIABLE + "=")
    return found


def _backported(oldest: int, newest: int) -> tuple[str, ...]:
    """The QEMU that the backports of the machine's release have, unpacked below the cache. Raises LabError."""
    debs = apt.fetch(["qemu-system-arm", "qemu-system-common", "qemu-system-data"], host.architecture(),
                     f"{host.release()}-backports")
    home = _unpacked(debs)
    found = str(home / "usr/bin" / QEMU), "-L", str(home / "usr/share/qemu")
    if not oldest <= version(found) <= newest:
        raise LabError(f"{host.release()}-backports have QEMU {version(found)}, and a cell needs {oldest} to {newest}")
    return found


def _newest() -> tuple[str, ...]:
    """The newest QEMU of Debian, unpacked below the cache, with the libraries that it was built for.

    These may be newer than the machine's own, so it is their dynamic linker that runs it. Raises LabError.
    """
    debs = apt.fetch(["qemu-system-arm"], host.architecture(), f"{NEWEST}-backports", deps=True, upon=NEWEST)
    home = _unpacked(debs)
    [linker] = home.glob("usr/lib*/ld-linux-*.so.*")
    [libc] = home.glob("usr/lib/*/libc.so.6")
    return (str(linker), "--library-path", str(libc.parent), str(home / "usr/bin" / QEMU),
            "-L", str(home / "usr/share/qemu"))


def _unpacked(debs: dict[str, Path]) -> Path:
    """The folder of the cache that has what is in the packages of a QEMU."""
    home = paths.CACHE / debs["qemu-system-arm"].stem
    with lock.held(paths.CACHE / "lock", "the cache"):
        if not home.exists():
            with say.phase("unpacking QEMU"), paths.whole(home) as folder:
                for deb in debs.values():
                    proc.run(["dpkg-deb", "-x", deb, folder])
    return home


def machine(cell: Cell, accel: str) -> list[str]:
    """CPUs and memory. Raises UsageError where KVM cannot do what the cell is about."""
    if accel == "kvm" and cell.el != "el1":
        raise UsageError(f"{cell.name} needs a guest with EL2, which KVM does not give it",
                         "leave out --accel kvm, or take one of the el1 cells")
    # In turns, CPUs that wait for a lock give way to the one that holds it. With a thread for each, and fewer CPUs of
    # the host's, a scheduler that knows nothing of locks was seen to take minutes for what takes seconds.
    turns = ",thread=single" if accel == "tcg" and cell.cpus > MANY else ""
    return ["-machine", f"{_board(cell)},memory-backend=ram",
            "-object", f"memory-backend-ram,id=ram,size={cell.memory}M,reserve=off",
            "-m", f"{cell.memory}M",
            "-accel", accel + turns,
            "-cpu", "host" if accel == "kvm" else cell.cpu,
            "-smp", str(cell.cpus + (REALTIME_CPUS if cell.board == VERSAL else 0)),
            *(["-bios", FIRMWARE] if cell.efi else []),
            "-nodefaults", "-display", "none", "-no-reboot"]


def _board(cell: Cell) -> str:
    """The machine, and what it has that not each cell has."""
    if cell.board != VIRT:
        return cell.board
    el2 = ",virtualization=on" if cell.el != "el1" else ""
    its = "" if cell.has_its else ",its=off"
    mte = ",mte=on" if cell.mte else ""
    seed = "" if cell.has_seed else ",dtb-randomness=off"
    smmu = ",iommu=smmuv3" if cell.smmu else ""
    return f"{VIRT},gic-version={cell.gic}{its}{el2}{mte}{seed}{smmu}"


# Of a 16550: number of the line status register; there is room, and all is sent
LSR, THRE, TEMT = 5, 0x20, 0x40


def parameters(cell: Cell) -> str:
    """The kernel's command line. Whoever hands over adds lab.gen=<number of the next kernel>."""
    # The last one is what init writes to; what passes for a 16550 has to have a console to be written to.
    words = [*(["console=ttyS0"] if cell.uart else []), "console=ttyAMA0", "earlycon", "panic=-1",
             'dyndbg="file machine_kexec.c +p"', f"rodata={cell.rodata}", *cell.append]
    if cell.kernel.randomized and not cell.kaslr:
        words.append("nokaslr")
    return " ".join(words)


def arguments(boot: Boot) -> list[str]:
    """All that a boot by hand and one by the laboratory have in common."""
    def disk(name: str, path: Path) -> list[str]:
        return ["-drive", f"if=none,id={name},file={path},format=raw,readonly=on",
                "-device", f"{_disk(boot.cell)},drive={name},serial={name}"]

    return [*program(*versions(boot.cell)), *machine(boot.cell, boot.accel),
            *(["-dtb", str(boot.dtb)] if boot.dtb else []),
            "-kernel", str(boot.image), "-initrd", str(boot.initrd), "-append", parameters(boot.cell),
            *disk("Image", boot.next_image), *disk("initrd", boot.next_initrd), *_always_ready(boot.cell)]


def _disk(cell: Cell) -> str:
    """A disk that is behind the SMMU, where there is one."""
    return "virtio-blk-pci,iommu_platform=on,romfile=" if cell.smmu else "virtio-blk-device"


def _always_ready(cell: Cell) -> list[str]:
    """Options that have the line status register of what passes for a 16550 say for ever that there is room."""
    if not cell.uart:
        return []
    shift, width = cell.uart
    return ["-device", f"loader,addr={uart(cell.memory) + (LSR << shift):#x},data={THRE | TEMT:#x},data-len={width}"]


def on_terminal(boot: Boot) -> list[str]:
    """The same with the console, and a shell, on the terminal."""
    return [*arguments(boot), "-serial", "mon:stdio"]


def by_hand(boot: Boot) -> str:
    """That as a line to paste."""
    return shlex.join(on_terminal(boot))


def channels(console: Path, port: str, qmp_fd: int) -> list[str]:
    """Console to a file; verdicts over the socket that `port` describes, QEMU's monitor over a connected one."""
    return ["-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console",
            "-chardev", f"socket,id=port,{port}",
            "-device", "virtio-serial-device", "-device", f"virtserialport,chardev=port,name={PORT}",
            "-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"]


def scratch_disk(name: str, path: Path, cell: Cell) -> list[str]:
    """Options for an empty disk with the serial `name`, made at `path`, that the memory of `cell` fits on."""
    with open(path, "wb") as file:
        file.truncate((cell.memory + 64) * MIB)
    return ["-drive", f"if=none,id={name},file={path},format=raw,cache=unsafe",
            "-device", f"{_disk(cell)},drive={name},serial={name}"]


def snapshots(path: Path) -> list[str]:
    """Options for a disk, made at `path`, that snapshots of the machine go to."""
    proc.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"])
    return ["-drive", f"if=none,id=snapshots,format=qcow2,file={path},cache=unsafe"]


def holes(memory: int) -> list[tuple[int, int]]:
    """Physical address and size of the no-map holes in a machine with `memory` MiB.

    Multiples of 64 KiB, the largest page; clear of what QEMU loads.
    """
    middle, end = RAM_BASE + memory * MIB // 2, RAM_BASE + memory * MIB
    return [(RAM_BASE + 0x10000, 0x10000),  # one page beside the first of RAM
            (middle + 0x130000, 0x10000),  # one page in the middle of nowhere
            (middle + 4 * MIB - 0x20000, 0x50000),  # across a block boundary, with ragged ends
            (middle + 8 * MIB, 2 * MIB),  # exactly one block of 4 KiB pages
            (middle + 16 * MIB + 0x50000, 11 * MIB),  # some blocks and a bit
            (end - 0x30000, 0x10000)]  # two pages short of the end


def first_bank(cell: Cell) -> tuple[int, int]:
    """Physical address and size in bytes of the memory that a cell has in one piece."""
    if cell.board == VERSAL:
        return 0, min(cell.memory, LOW_MEMORY) * MIB
    return RAM_BASE, cell.memory * MIB


def uart(memory: int) -> int:
    """Physical address of what passes for a 16550 in a machine with `memory` MiB: memory that is left alone."""
    return RAM_BASE + memory * MIB // 2 + 32 * MIB


def device_tree(cell: Cell, path: Path, accel: str = "tcg") -> fdt.Tree:
    """The tree that QEMU makes for a cell. `path` is for a file that is left there."""
    options = machine(cell, accel)
    options[1] += f",dumpdtb={path}"
    proc.run([*program(*versions(cell)), *options])
    return fdt.parse(path.read_bytes())


def prepare(boot: Boot, path: Path) -> Boot:
    """`boot`, with a device tree at `path` if its cell asks for one: QEMU's own with what the cell has different."""
    if not (boot.cell.holes or boot.cell.uart or boot.cell.spin_table):
        return boot
    tree = device_tree(boot.cell, path, boot.accel)
    reserved = tree.root.node("reserved-memory")
    reserved.properties |= {"#address-cells": fdt.cell(2), "#size-cells": fdt.cell(2), "ranges": b""}
    for start, size in holes(boot.cell.memory) if boot.cell.holes else ():
        reserved.node(f"hole@{start:x}").properties |= {"reg": fdt.pairs(start, size), "no-map": b""}
    if boot.cell.uart:
        start, (shift, width) = uart(boot.cell.memory), boot.cell.uart
        reserved.node(f"uart@{start:x}").properties |= {"reg": fdt.pairs(start, 0x10000), "no-map": b""}
        tree.root.node(f"serial@{start:x}").properties |= {
            "compatible": fdt.string("ns16550a"), "reg": fdt.pairs(start, 0x100),
            "reg-shift": fdt.cell(shift), "reg-io-width": fdt.cell(width), "clock-frequency": fdt.cell(1843200)}
        tree.root.node("chosen").properties["stdout-path"] = fdt.string(f"/serial@{start:x}")
    if boot.cell.spin_table:
        start = RAM_BASE + 0x10000
        reserved.node(f"spin-table@{start:x}").properties["reg"] = fdt.pairs(start, 0x10000)
        for number in range(boot.cell.cpus - boot.cell.spin_table, boot.cell.cpus):
            cpu = tree.root.node("cpus").node(f"cpu@{number}")
            cpu.properties |= {"enable-method": fdt.string("spin-table"), "cpu-release-addr": fdt.pairs(start)}
    path.write_bytes(fdt.flatten(tree))
    return replace(boot, dtb=path)

"""The matrix: which kernels are built, and which machines they are run on.

A Kernel is what has to be compiled, a Cell is a machine with a kernel on it.
Every kernel runs at EL1, at EL2 without VHE and at EL2 with VHE; the other
dimensions are spread over these cells so that each value meets every exception
level (tests/test_cells.py holds the list to that). Cells for one question each
(a memory size, holes in RAM, CMA, the debug kernel) follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Collection, Iterable

from lab.errors import UsageError

MAX = "max,pauth-impdef=on"  # the architected pointer authentication is slow to emulate
MAX_NOLPA2 = "max,pauth-impdef=on,lpa2=off"
A57 = "cortex-a57"
VIRT = "virt"
VERSAL = "xlnx-versal-virt"
GICV5 = "x-5"  # as QEMU has it, for now
A72 = "cortex-a72"

VA_BITS = {4: (39, 48, 52), 16: (47, 52), 64: (42, 48, 52)}  # KiB per page -> VA bits


@dataclass(frozen=True)
class Kernel:
    """What is compiled. `pages` is in KiB; unpatched means the base without the series."""

    pages: int
    va: int
    flavour: str = "lab"  # or the name of a file in config/
    patched: bool = True

    @property
    def name(self) -> str:
        flavour = "" if self.flavour == "lab" else f"-{self.flavour}"
        base = "" if self.patched else "-base"
        return f"{self.pages}k-va{self.va}{flavour}{base}"

    @property
    def by_clang(self) -> bool:
        """Compiled by clang, as control-flow integrity wants it."""
        return self.flavour == "cfi"

    @property
    def randomized(self) -> bool:
        """It has KASLR, unless it is told not to."""
        return self.flavour != "ima"


@dataclass(frozen=True)
class Cell:
    """A machine with a kernel on it. `memory` is in MiB."""

    name: str
    kernel: Kernel
    el: str  # "el1", "nvhe" or "vhe"
    cpu: str = MAX  # QEMU's -cpu
    cpus: int = 2
    memory: int = 2048
    rodata: str = "on"  # the linear map consists of pages; or "noalias": of blocks
    kaslr: bool = True
    # The boot loader gives it a seed for KASLR; None: but not to mainline's without KASLR, which leave the seed where
    # it is, and kexec-tools then refuses to load
    seed: bool | None = None
    append: tuple[str, ...] = ()  # kernel parameters beyond those the fields stand for
    holes: bool = False  # reserved-memory nodes with no-map in odd places
    uart: tuple[int, int] | None = None  # stdout-path names a 16550, in memory, with this reg-shift and reg-io-width
    spin_table: int = 0  # CPUs, the last ones, that the device tree has started by spin-table: QEMU never does
    efi: bool = False  # booted by UEFI firmware, with ACPI instead of a device tree
    modelled: bool = False  # its caches are, see lab/caches.py
    board: str = VIRT  # QEMU's -machine
    gic: str = "3"  # QEMU's gic-version
    smmu: bool = False  # an SMMUv3, with the disks behind it
    qemu: int = 0  # the major version of QEMU that it takes at least; 0: the machine's own will do
    its: bool | None = None  # a GICv3 ITS; None: only with our kernels, as mainline may hang after a handover
    core: bool = False  # part of a plain `check`

    @property
    def has_its(self) -> bool:
        return self.kernel.patched if self.its is None else self.its

    @property
    def has_seed(self) -> bool:
        return self.kaslr or self.kernel.patched if self.seed is None else self.seed

    @property
    def mte(self) -> bool:
        """Memory has tags."""
        return self.kernel.flavour == "mte"

    @property
    def entered_at(self) -> int:
        """The exception level at which a kernel has to be entered: the highest there is."""
        return 1 if self.el == "el1" else 2


K4_39, K4_48, K4_52 = (Kernel(4, va) for va in VA_BITS[4])
K16_47, K16_52 = (Kernel(16, va) for va in VA_BITS[16])
K64_42, K64_48, K64_52 = (Kernel(64, va) for va in VA_BITS[64])
DEBUG = Kernel(4, 48, flavour="debug")
EFI = Kernel(4, 48, flavour="efi")
CFI = Kernel(4, 48, flavour="cfi")
MTE = Kernel(4, 48, flavour="mte")
IMA = Kernel(4, 48, flavour="ima")
HARDENED = (CFI, MTE)

MIB512, MIB1537, GIB2, GIB4, GIB16, GIB64 = 512, 1537, 2048, 4096, 16384, 65536
NEW = 11  # a QEMU that has permission indirection and a GICv5

# On a CPU with VHE the kernel has to be told to leave it alone.
NVHE = ("kvm-arm.mode=nvhe",)
# No VA beyond 48 bits for a kernel that could use them.
NOLVA = ("arm64.nolva",)
# What is executed, and when kexec is.
MEASURED = ("ima_policy=tcb|critical_data",)


def _cell(kernel: Kernel, el: str, suffix: str = "", **fields: object) -> Cell:
    append = tuple(fields.pop("append", ()))  # type: ignore[arg-type]
    if el == "nvhe" and str(fields.get("cpu", MAX)).startswith("max"):
        append = NVHE + append
    name = f"{kernel.name}-{el}" + (f"-{suffix}" if suffix else "")
    return Cell(name, kernel, el, append=append, **fields)  # type: ignore[arg-type]


def _all() -> list[Cell]:
    return [
        # Every kernel at every exception level.
        _cell(K4_48, "vhe", core=True),
        _cell(K4_48, "el1", cpus=1, memory=MIB1537, rodata="noalias", kaslr=False, core=True),
        _cell(K4_48, "nvhe", cpus=4, memory=MIB512, core=True),
        _cell(K64_52, "vhe", cpus=4, memory=MIB1537, rodata="noalias", core=True),
        _cell(K64_52, "el1", cpus=2, memory=GIB2, core=True),
        _cell(K64_52, "nvhe", cpus=1, memory=GIB16, kaslr=False, core=True),
        _cell(K4_39, "vhe", cpus=1, memory=GIB16, rodata="noalias", kaslr=False),
        _cell(K4_39, "el1", cpus=4, memory=MIB512, kaslr=False),
        _cell(K4_39, "nvhe", cpus=2, memory=GIB64, rodata="noalias"),
        _cell(K4_52, "vhe", cpus=4, memory=GIB64),
        _cell(K4_52, "el1", cpus=2, memory=GIB16, kaslr=False),
        _cell(K4_52, "nvhe", cpus=1, memory=GIB2, rodata="noalias"),
        _cell(K16_47, "vhe", cpus=2, memory=MIB512, kaslr=False),
        _cell(K16_47, "el1", cpus=1, memory=GIB64, rodata="noalias"),
        _cell(K16_47, "nvhe", cpus=4, memory=MIB1537),
        _cell(K16_52, "vhe", cpus=1, memory=GIB2),
        _cell(K16_52, "el1", cpus=4, memory=MIB1537, rodata="noalias"),
        _cell(K16_52, "nvhe", cpus=2, memory=MIB512, kaslr=False),
        _cell(K64_42, "vhe", cpus=2, memory=GIB64, rodata="noalias"),
        _cell(K64_42, "el1", cpus=1, memory=GIB2, kaslr=False),
        _cell(K64_42, "nvhe", cpus=4, memory=GIB16),
        _cell(K64_48, "vhe", cpus=1, memory=MIB512),
        _cell(K64_48, "el1", cpus=4, memory=GIB64),
        _cell(K64_48, "nvhe", cpus=2, memory=MIB1537, rodata="noalias"),
        # CPUs that were sold, without VHE, LVA, LPA2 or 16K pages.
        _cell(K4_48, "nvhe", "a57", cpu=A57, rodata="noalias", core=True),
        _cell(K4_48, "el1", "a72", cpu=A72, cpus=4, core=True),
        _cell(K64_52, "nvhe", "a72", cpu=A72, core=True),
        _cell(K4_39, "nvhe", "a72", cpu=A72, cpus=1, kaslr=False),
        _cell(K4_52, "nvhe", "a57", cpu=A57, cpus=4),
        _cell(K4_52, "el1", "a72", cpu=A72, memory=MIB512, rodata="noalias"),
        _cell(K64_42, "el1", "a57", cpu=A57, rodata="noalias"),
        _cell(K64_48, "nvhe", "a72", cpu=A72, cpus=1),
        # A 52-bit kernel on a machine that has fewer.
        _cell(K64_52, "vhe", "nolva", cpu=MAX_NOLPA2, append=NOLVA, core=True),
        _cell(K4_52, "vhe", "nolpa2", cpu=MAX_NOLPA2),
        _cell(K4_52, "el1", "nolpa2", cpu=MAX_NOLPA2, cpus=1, kaslr=False),
        _cell(K16_52, "vhe", "nolpa2", cpu=MAX_NOLPA2, rodata="noalias"),
        _cell(K16_52, "nvhe", "nolpa2", cpu=MAX_NOLPA2, cpus=4),
        # Memory sizes, everything else alike: what the tables cost.
        _cell(K4_48, "vhe", "512m", memory=MIB512, core=True),
        _cell(K4_48, "vhe", "1537m", memory=MIB1537, core=True),
        _cell(K4_48, "vhe", "16g", memory=GIB16, core=True),
        _cell(K4_48, "vhe", "64g", memory=GIB64, core=True),
        # RAM with no-map holes.
        _cell(K4_48, "vhe", "holes", holes=True, core=True),
        _cell(K64_52, "el1", "holes", holes=True, core=True),
        _cell(K16_47, "nvhe", "holes", holes=True, rodata="noalias"),
        # Room for kexec_file_load() to place segments in CMA.
        _cell(K4_48, "vhe", "cma", append=("cma=256M",), core=True),
        _cell(K64_52, "nvhe", "cma", append=("cma=512M",), core=True),
        _cell(K16_52, "el1", "cma", append=("cma=256M",)),
        # Firmware as servers and clouds have it.
        _cell(EFI, "vhe", efi=True),
        _cell(EFI, "nvhe", efi=True, cpus=4),
        _cell(EFI, "el1", efi=True, cpu=A57),
        # Kernels hardened by what the compiler and the CPU can do.
        _cell(CFI, "vhe"),
        _cell(CFI, "nvhe", cpus=4),
        _cell(CFI, "el1"),
        _cell(MTE, "vhe"),
        _cell(MTE, "nvhe", cpus=4),
        _cell(MTE, "el1"),
        # What only a newer QEMU has: permission indirection and other registers, a GICv5.
        _cell(K4_48, "vhe", "new", qemu=NEW, core=True),
        _cell(K4_48, "nvhe", "new", qemu=NEW, cpus=4),
        _cell(K4_48, "el1", "new", qemu=NEW),
        _cell(K4_48, "el1", "gicv5", qemu=NEW, gic=GICV5),
        # Other machines.
        _cell(K4_48, "vhe", "gicv4", qemu=NEW, gic="4"),
        _cell(K4_48, "nvhe", "versal", qemu=NEW, board=VERSAL, cpu=A72, memory=GIB4),
        # Measurements that the next kernel gets; no KASLR.
        _cell(IMA, "vhe", cpus=1, memory=MIB512, kaslr=False, append=MEASURED),
        _cell(IMA, "el1", cpus=1, memory=MIB512, kaslr=False, append=(*MEASURED, "cma=64M")),
        # lockdep, DEBUG_PAGEALLOC, DEBUG_VIRTUAL, KFENCE, UBSAN; a warning is a panic.
        _cell(DEBUG, "vhe", append=("panic_on_warn=1",)),
        _cell(DEBUG, "el1", cpu=A57, kaslr=False, append=("panic_on_warn=1",)),
        _cell(DEBUG, "nvhe", cpus=4, rodata="noalias", append=("panic_on_warn=1",)),
    ]


CELLS: dict[str, Cell] = {cell.name: cell for cell in _all()}
DEFAULT = CELLS["4k-va48-vhe"]
# A CPU that was sold: its lines, and what DC ZVA zeroes, have 64 bytes.
BENCHED = CELLS["4k-va48-el1-a72"]
FUZZED = CELLS["4k-va48-nvhe"]  # its exit is the longest

KERNELS: dict[str, Kernel] = {cell.kernel.name: cell.kernel for cell in CELLS.values()}
# Mainline's own implementation, to measure against.
KERNELS |= {kernel.name: kernel for kernel in (replace(one, patched=False) for one in (K4_48, IMA, *HARDENED))}


def on_base(one: Cell) -> Cell:
    """The same machine with mainline's own kernel, which has to be one of KERNELS; never part of a plain `check`."""
    return replace(one, name=f"{one.name}-base", kernel=KERNELS[f"{one.kernel.name}-base"], core=False)


def core_only(ones: Iterable[Cell], *names: str) -> list[Cell]:
    """The same machines, of which a plain `check` has those alone whose names begin with one of `names` and a dash."""
    starts = tuple(f"{name}-" for name in names)
    return [replace(one, core=one.core and f"{one.name}-".startswith(starts)) for one in ones]


def each_with(ones: Iterable[Cell], words: Collection[str], core: Callable[[Cell, str], bool]) -> dict[Cell, str]:
    """The same machines, each once with each word, which ends its name; a plain `check` has those that `core` picks."""
    return {replace(one, name=f"{one.name}-{word}", core=core(one, word)): word for one in ones for word in words}


def cell(name: str) -> Cell:
    """The cell called `name`. Raises UsageError, with the names there are."""
    try:
        return CELLS[name]
    except KeyError:
        raise UsageError(f"no cell is called '{name}'", "cells: " + " ".join(CELLS)) from None


def kernel(name: str) -> Kernel:
    """The kernel called `name`. Raises UsageError, with the names there are."""
    try:
        return KERNELS[name]
    except KeyError:
        raise UsageError(f"no kernel is called '{name}'", "kernels: " + " ".join(KERNELS)) from None

"""A machine that is stopped on its way to the next kernel, to be looked into and changed.

A Stage is a machine with an image loaded, which can be stopped at certain
moments of that way. A Scene is the stopped machine at such a moment: the list
of pages, the control page, the tables. Mainline's are found by its own names.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Iterator

from lab import host, proc, qemu, say
from lab.build import Built
from lab.cells import Cell
from lab.crc import change
from lab.errors import LabError
from lab.gdb import Gdb, options
from lab.guest import Guest
from lab.handover import load
from lab.machine import Machine

if TYPE_CHECKING:
    from lab.faults import Fault

PAGE = 4096  # the cells here have 4 KiB pages
ARGS = 4096  # KEXEC_ARGS_OFFSET
MIB = 1 << 20
GIB = 1 << 30
TABLE = 0x0000_FFFF_FFFF_F000  # address in a descriptor or a TTBR, 4 KiB pages

# Flags of an entry in the kimage list
DESTINATION, INDIRECTION, DONE, SOURCE = 1, 2, 4, 8

PARK = 0x14000000  # b .
BOOT_CPU = "1"  # by gdb's numbers, which begin there
PATIENCE = 60.0  # seconds until a guest has done what takes it one: the host may be busy
BLR, BLR_MASK = 0xD63F0000, 0xFFFFFC1F


@dataclass(frozen=True)
class Outcome:
    """What a machine did. `text` is from its console; `seconds` until it was over."""

    text: str
    reset: bool
    hello: dict[str, Any] | None  # of the next kernel
    pc: int
    place: str  # of the PC: a symbol and an offset, or "" if it isn't in the control page
    parked: bool
    seconds: float


@dataclass(frozen=True)
class Entry:
    """A word of the list: physical address and value; the page of a segment that it is about."""

    at: int
    value: int
    segment: int = -1
    page: int = 0  # number in the segment
    dest: int = 0  # physical address

    @property
    def address(self) -> int:
        return self.value & ~(PAGE - 1)


@dataclass(frozen=True)
class Leaf:
    """The last descriptor of a translation: its physical address, its value, and the virtual addresses it is for."""

    at: int
    value: int
    range: range


@dataclass
class Scene:
    """A machine that is stopped with an image loaded.

    `control`, `ttbr1` and `args` (physical) are 0 where the control page was not entered yet;
    mainline has no arguments in it.
    """

    stage: "Stage"
    head: int
    va_offset: int = 0
    control: int = 0
    ttbr1: int = 0
    args: int = 0
    text: tuple[int, ...] = ()  # instructions in the control page
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gdb = self.stage.gdb
        self.entries = list(self._walk())
        unmapped = qemu.RAM_BASE + self.stage.machine.boot.cell.memory * MIB
        self.unmapped = -(-unmapped // GIB) * GIB + GIB

    # The list

    def _walk(self) -> Iterator[Entry]:
        value, at, segment, number, dest = self.head, 0, -1, 0, 0
        pages: dict[int, bytes] = {}
        while value & DONE == 0:
            address = value & ~(PAGE - 1)
            if value & SOURCE:
                yield Entry(at, value, segment, number, dest)
                number, dest = number + 1, dest + PAGE
            elif value & DESTINATION:
                segment, number, dest = segment + 1, 0, address
                yield Entry(at, value, segment, 0, dest)
            pointer = address if value & INDIRECTION else at + 8
            start = pointer & ~(PAGE - 1)
            if start not in pages:
                pages[start] = self.gdb.read(start, PAGE)
            at, value = pointer, struct.unpack_from("<Q", pages[start], pointer - start)[0]

    def sources(self, segment: int) -> list[Entry]:
        """The pages of a segment that have to be moved."""
        return [e for e in self.entries if e.segment == segment and e.value & SOURCE and e.address != e.dest]

    def destination(self, segment: int) -> Entry:
        """The word that begins a segment."""
        return next(e for e in self.entries if e.segment == segment and e.value & DESTINATION)

    @property
    def middle(self) -> Entry:
        """A page to be moved in the middle of the payload, which the initrd ends in."""
        _, size = self.stage.loaded.segments[1]
        payload = [e for e in self.sources(1) if e.page * PAGE >= size - self.stage.machine.guest.size]
        return payload[len(payload) // 2]

    @property
    def last(self) -> Entry:
        """The last page of the last segment."""
        return self.entries[-1]

    def crc(self, segment: int) -> int | None:
        """CRC32C of a segment at load, from the arguments in the control page, if there are any."""
        if not self.args:
            return None
        return self.word(self.args + self.stage.offsets["KEXEC_ARGS_LIST"] + 8 * (segment + 1), 4)

    def flip(self, entry: Entry, offset: int, bit: int) -> int:
        """Flip a bit in a source page; returns how the CRC32C of its segment changes."""
        self.flip_byte(entry.address + offset, bit)
        pages = max(e.page for e in self.entries if e.segment == entry.segment) + 1
        return change(1 << bit, (pages - entry.page) * PAGE - offset - 1)

    # Memory

    def flip_byte(self, address: int, bit: int) -> None:
        """Flip a bit of a byte."""
        self.gdb.write(address, bytes([self.gdb.read(address, 1)[0] ^ 1 << bit]))

    def word(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.gdb.read(address, size), "little")

    def put(self, address: int, value: int, size: int = 8) -> None:
        self.gdb.write(address, value.to_bytes(size, "little"))

    def argument_of(self, name: str, size: int) -> int:
        """One of the arguments in our control page."""
        return self.word(self.args + self.stage.offsets[f"KEXEC_ARGS_{name}"], size)

    def argument(self, name: str, value: int, size: int) -> None:
        """Change one of the arguments in our control page."""
        self.put(self.args + self.stage.offsets[f"KEXEC_ARGS_{name}"], value, size)

    def virtual(self, address: int) -> int:
        """Where the linear map has a physical address."""
        return address + self.va_offset & (1 << 64) - 1

    def leaf(self, address: int) -> Leaf:
        """What maps a physical address in the tables that are used while pages are moved."""
        virtual, table = self.virtual(address), self.ttbr1 & 0x0000_FFFF_FFFF_F000
        for level in range(4):
            shift = 39 - 9 * level
            at = table + (virtual >> shift & 511) * 8
            value = self.word(at)
            if level == 3 or value & 3 != 3:
                start = virtual >> shift << shift
                return Leaf(at, value, range(start, start + (1 << shift)))
            table = value & 0x0000_FFFF_FFFF_F000
        raise AssertionError("unreachable")

    # The control page

    def find(self, word: int, mask: int = 0xFFFFFFFF) -> int:
        """Offset of the first instruction that is `word` in the bits of `mask`. Raises LabError."""
        for index, instruction in enumerate(self.text):
            if instruction & mask == word:
                return index * 4
        raise LabError(f"no instruction {word:#x} in the control page", "its code changed: adapt lab/faults.py")

    @property
    def next(self) -> int:
        """Offset of the instruction that loads the next word of the list."""
        return self.find(0xF84086B6 if self.args else 0xF84085D0)  # ldr x22, [x21], #8; ldr x16, [x14], #8

    def patch(self, offset: int, *instructions: int) -> None:
        """Overwrite instructions in the control page."""
        self.gdb.write(self.control + offset, struct.pack(f"<{len(instructions)}I", *instructions))

    def symbol(self, name: str) -> int:
        """Offset in the control page of a symbol of its code. Mainline has none."""
        symbols = self.stage.symbols
        return symbols[name] - symbols["arm64_relocate_new_kernel"]


class Events:
    """QEMU's events, from a monitor of their own."""

    def __init__(self, path: Path) -> None:
        self._end = socket.socket(socket.AF_UNIX)
        self._end.connect(str(path))
        self._end.sendall(b'{"execute": "qmp_capabilities"}\n')
        self._end.setblocking(False)
        self._buffer = b""

    def take(self) -> list[str]:
        """The names of what happened since the last time."""
        try:
            while data := self._end.recv(65536):
                self._buffer += data
        except BlockingIOError:
            pass
        *lines, self._buffer = self._buffer.split(b"\n")
        return [message["event"] for message in map(json.loads, lines) if "event" in message]

    def close(self) -> None:
        self._end.close()


class Stage:
    """A cell with the next kernel loaded, without KASLR, from `with` to the end of its block.

    The scenes stop it before the reboot call is served, when everything is shut
    down, at the entry to the control page, or while pages are moved. All but the
    first put the machine back to an earlier time, so any number of them can follow
    each other. (Not so the first: QEMU 7.2 does not put back the timers that a
    kernel uses at EL2.)
    """

    def __init__(self, cell: Cell, built: Built, archives: Guest, name: str = "", loader: str = "load-nocheck",
                 report: Callable[[str], None] = say.info) -> None:
        self.cell, self.built, self.loader = replace(cell, kaslr=False), built, loader
        self.ours = built.kernel.patched
        self._guest, self._name, self._report = archives, name or f"faults.{built.kernel.name}.{cell.name}", report
        self.symbols = read_symbols(built.vmlinux)
        self.offsets = read_offsets(built.objdir / "include/generated/asm-offsets.h")
        self._saved = False

    def __enter__(self) -> "Stage":
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lab.")))
            extra = [*options(folder / "gdb"), *qemu.snapshots(folder / "snapshots"),
                     "-chardev", f"socket,id=events,path={folder / 'events'},server=on,wait=off",
                     "-mon", "chardev=events,mode=control"]
            self.machine = stack.enter_context(Machine(self.cell, self.built, self._guest, name=self._name,
                                                       report=self._report, extra=extra))
            self.machine.hello()
            self.reload()
            self.events = Events(folder / "events")
            stack.callback(self.events.close)
            self.gdb = stack.enter_context(Gdb(folder / "gdb"))
            self.machine.qmp("set-action", reboot="reset")  # -no-reboot ends QEMU
            self.gdb.resume()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.close()

    def reload(self) -> None:
        """Load the next kernel (again)."""
        self.loaded = load(self.machine, self.loader)

    # Scenes

    def at_call(self) -> Scene:
        """The reboot call was made and is about to be served. There is no way back to this."""
        self._leave("kernel_kexec")
        image = self._read("kexec_image")
        return Scene(self, int.from_bytes(self.gdb.read(image, 8, virtual=True), "little"))

    def at_end(self, panic: int) -> Scene:
        """Everything is shut down, machine_kexec() is about to be called.

        `panic` is panic_timeout, in seconds. From the first time on, this is
        all that the machine is good for, and at_entry() and copying().
        """
        if not self._saved:
            self.machine.sh("echo 0 >/proc/sys/kernel/panic")
            self._leave("machine_kexec")
            self.machine.snapshot("savevm leaving")
            self._saved = True
        self.gdb.interrupt()
        self.machine.snapshot("loadvm leaving")
        self.gdb.select(BOOT_CPU)  # another one may have stopped last
        self.events.take()
        if panic:
            self.gdb.write(self.symbols["panic_timeout"], struct.pack("<i", panic), virtual=True)
        return Scene(self, int.from_bytes(self.gdb.read(self.gdb.register("x0"), 8, virtual=True), "little"))

    def at_entry(self, panic: int, first: Callable[[Scene], None] = lambda scene: None) -> Scene:
        """The same, the PC is at the first instruction of the control page. `first` is done at_end()."""
        first(self.at_end(panic))
        self._enter()
        return self._look()

    def copying(self, panic: int) -> Scene:
        """The same, after half of what comes before the middle page was moved."""
        scene = self.at_entry(panic)
        pages = scene.sources(1)
        address = scene.virtual(pages[pages.index(scene.middle) // 2].dest)
        self.gdb.set_watch(address, 8)
        self.gdb.resume()
        if not self.gdb.wait(PATIENCE):
            raise LabError("the page that was waited for is not written", str(self.machine.console))
        self.gdb.clear_watch(address, 8)
        return scene

    def scene(self, fault: Fault, panic: int) -> Scene:
        """The one that a fault wants."""
        if fault.when == "call":
            return self.at_call()
        return self.at_entry(panic) if fault.when == "entry" else self.copying(panic)

    def _leave(self, symbol: str) -> None:
        """Have the guest execute the image, up to a function of its kernel."""
        # In the background: the answer to this comes first. answer() sees the status whole or not at all.
        script = ("rm -f /tmp/rc; (sleep 1; kexec -e; echo $? >/tmp/rc.new; mv /tmp/rc.new /tmp/rc) "
                  ">/tmp/said 2>&1 &")
        self._run_to(self.symbols[symbol], lambda: self.machine.sh(script))

    def _enter(self) -> None:
        """From machine_kexec() to the control page."""
        enter(self.gdb, self.symbols, "machine_kexec", str(self.machine.console))

    def _look(self) -> Scene:
        """The scene at the entry to the control page."""
        control = self.gdb.register("pc")
        text = struct.unpack("<512I", self.gdb.read(control, 2048))
        if not self.ours:
            image = self.gdb.register("x0")

            def member(name: str) -> int:
                return int.from_bytes(self.gdb.read(image + self.offsets[f"KIMAGE_{name}"], 8, virtual=True), "little")

            return Scene(self, member("HEAD"), -member("ARCH_PHYS_OFFSET"), control, member("ARCH_TTBR1"), 0, text)
        args = control + ARGS
        ttbr1, _, va_offset, head = struct.unpack("<4Q", self.gdb.read(args, 32))
        return Scene(self, head, va_offset, control, ttbr1, args, text)

    # What comes of it

    def watch(self, scene: Scene, limit: float) -> Outcome:
        """Let it run until it resets, parks or starts another kernel, `limit` seconds at most."""
        since = len(self.machine.log())
        begin = time.monotonic()
        reset, hello, parked, pc = False, None, False, 0
        while not (reset or hello or parked) and time.monotonic() - begin < limit:
            self.gdb.resume()
            hello = self.machine.heard(0.1)
            self.gdb.interrupt()
            reset = "RESET" in self.events.take()
            before, pc = pc, self.gdb.register("pc")
            parked = pc == before and scene.control <= pc < scene.control + PAGE and scene.word(pc, 4) == PARK
        seconds = time.monotonic() - begin
        return Outcome(self.machine.log()[since:], reset, hello, pc, self.place(scene, pc), parked, seconds)

    def place(self, scene: Scene, pc: int) -> str:
        """The symbol that a PC in our control page stands for, with the offset from it if there is any."""
        offset = pc - scene.control
        if not self.ours or not 0 <= offset < PAGE:
            return ""
        symbols = self.symbols
        if offset >= 0x800:
            address, first, last = symbols["trans_pgd_vectors"] + offset - 0x800, "trans_pgd_", ""
        else:
            address, first, last = symbols["arm64_relocate_new_kernel"] + offset, "", "__relocate_new_kernel_start"
        name = max((value, name) for name, value in symbols.items()
                   if value <= address and name.startswith(first) and name not in (last, "trans_pgd_vectors"))
        return name[1] if name[0] == address else f"{name[1]}+{address - name[0]:#x}"

    def seconds_in(self, symbol: str) -> float:
        """Let the guest run into and through a function of its kernel; how long the latter took."""
        self._run_to(self.symbols[symbol])
        back = self.gdb.register("x30")
        begin = time.monotonic()
        self._run_to(back)
        return time.monotonic() - begin

    def _run_to(self, address: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.gdb.run_to(address, PATIENCE, str(self.machine.console), meanwhile)

    def answer(self, limit: float = PATIENCE) -> tuple[int, str] | None:
        """Let the guest run; exit status and words of `kexec -e`, or None if it did not come back."""
        self.gdb.resume()
        end = time.monotonic() + limit
        while time.monotonic() < end:
            result = self.machine.run("cat /tmp/rc && cat /tmp/said", PATIENCE)
            if result.rc == 0:
                rc, _, said = result.out.partition("\n")
                return int(rc), said
            time.sleep(0.1)
        return None

    def _read(self, symbol: str) -> int:
        return int.from_bytes(self.gdb.read(self.symbols[symbol], 8, virtual=True), "little")


def enter(gdb: Gdb, symbols: dict[str, int], function: str, console: str) -> int:
    """From the start of a kernel's function to where it branches to an address that the kernel does not have.

    Returns that (physical) address, which is the PC now. Other CPUs may run, elsewhere.
    """
    start = symbols[function]
    size = min(address for address in symbols.values() if address > start) - start & ~3
    words = struct.unpack(f"<{size // 4}I", gdb.read(start, size, virtual=True))
    branches = {start + 4 * index: word for index, word in enumerate(words) if word & BLR_MASK == BLR}
    for address in branches:
        gdb.set_break(address)
    while True:
        gdb.resume()
        if not gdb.wait(PATIENCE):
            raise LabError("the guest does not come to the page that it is to leave by", console)
        branch = branches[gdb.register("pc")]
        target = gdb.register(f"x{branch >> 5 & 31}")
        if target >> 48 == 0:
            break
    for address in branches:
        gdb.clear_break(address)
    gdb.step()
    if gdb.register("pc") != target:
        raise LabError(f"the PC is {gdb.register('pc'):#x} instead of {target:#x}", console)
    return target


def read_symbols(vmlinux: Path) -> dict[str, int]:
    """Names and addresses of a kernel's symbols."""
    symbols = {}
    for line in proc.run([f"{host.CROSS_COMPILE}nm", vmlinux]).stdout.decode().splitlines():
        address, kind, name = line.split()
        if kind not in "aA" and not name.startswith(("$", ".L", "__pi_")):
            symbols[name] = int(address, 16)
    return symbols


def read_offsets(header: Path) -> dict[str, int]:
    """The offsets of structure members that a kernel's assembly uses."""
    return {name: int(value) for name, value in re.findall(r"^#define (\w+) (-?\d+) ", header.read_text(), re.M)}

"""A client of QEMU's gdb server: stops a guest, looks into it, changes it.

Speaks gdb's remote serial protocol over a unix socket, as far as QEMU for
AArch64 needs. Give QEMU options() and connect while it runs. QEMU stops the
guest as soon as a client connects.
"""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Callable

from lab.errors import LabError

ANSWER = 10.0  # seconds that QEMU has for an answer
MRS_X0_CNTVCT = (0xD53BE040).to_bytes(4, "little")
CHUNK = 1024  # bytes of memory in a packet, which QEMU limits to 4 KiB of hex
INTERRUPT = b"\x03"
REGISTERS = {f"x{n}": n for n in range(31)} | {"sp": 31, "pc": 32, "cpsr": 33}


class GdbError(LabError):
    """QEMU's gdb server refused something, or does not answer."""


def options(path: Path) -> list[str]:
    """What QEMU needs to be told to serve gdb on a socket at `path`."""
    return ["-chardev", f"socket,id=gdb,path={path},server=on,wait=off", "-gdb", "chardev:gdb"]


class Gdb:
    """A connection; the guest is stopped when it is made, and stays so until resume().

    Registers are those of the vCPU that stopped last, or that select() chose.
    Addresses are physical unless `virtual` is set. Every method raises GdbError.
    """

    def __init__(self, path: Path) -> None:
        self._end = self._connect(str(path))
        self._buffer = b""
        self._virtual = True
        self.stopped = True
        # Once it has sent this, QEMU reads and writes single registers. It may tell first that it has stopped.
        self._send("qXfer:features:read:target.xml:0,800")
        while (reply := self._receive(ANSWER)) and reply[0] not in "lm":
            pass
        if not reply:
            raise GdbError("QEMU's gdb server does not answer")

    @staticmethod
    def _connect(path: str) -> socket.socket:
        begin = time.monotonic()
        while True:
            end = socket.socket(socket.AF_UNIX)
            try:
                end.connect(path)
                return end
            except (FileNotFoundError, ConnectionRefusedError):  # QEMU has only just been started
                end.close()
                if time.monotonic() - begin > ANSWER:
                    raise GdbError(f"QEMU does not serve gdb at {path}") from None
                time.sleep(0.05)

    def __enter__(self) -> "Gdb":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end.close()

    # Running

    def resume(self) -> None:
        """Let all vCPUs run."""
        self._send("c")
        self.stopped = False

    def wait(self, seconds: float) -> bool:
        """Wait until the guest stops by itself; False if it does not within `seconds`."""
        reply = self._receive(seconds)
        if reply is None:
            return False
        self._stop(reply)
        return True

    def interrupt(self) -> None:
        """Stop the guest, if it runs."""
        if not self.stopped:
            self._end.sendall(INTERRUPT)
            if not self.wait(ANSWER):
                raise GdbError("the guest does not stop")

    def run_to(self, address: int, seconds: float, console: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Let the guest run to an address, and have `meanwhile` done that leads there.

        Raises GdbError, which names the file of its `console`, if it does not come there within `seconds`.
        """
        self.interrupt()
        self.set_break(address)
        self.resume()
        meanwhile()
        if not self.wait(seconds):
            raise GdbError(f"the guest does not come to {address:#x}", console)
        self.clear_break(address)

    def step(self) -> None:
        """Execute one instruction on the selected vCPU, which does not branch to itself."""
        before = self.register("pc")
        for _ in range(3):  # QEMU was seen to stop once more where it was
            self._send("s")
            if not self.wait(ANSWER):
                raise GdbError("the guest does not step")
            if self.register("pc") != before:
                return
        raise GdbError(f"the guest does not step from {before:#x}")

    def _stop(self, reply: str) -> None:
        self.stopped = True
        thread = re.search(r"thread:([^;]+)", reply)
        if thread:
            self.select(thread.group(1))

    # vCPUs

    def select(self, thread: str) -> None:
        """Registers, virtual addresses and step() are those of this vCPU from now on."""
        self._order(f"Hg{thread}")
        self._order(f"Hc{thread}")

    # State

    def register(self, name: str) -> int:
        """The value of x0 to x30, sp, pc or cpsr."""
        reply = self._ask(f"p{REGISTERS[name]:x}")
        if len(reply) < 8 or reply.startswith("E"):
            raise GdbError(f"no register {name}: '{reply}'")
        return int.from_bytes(bytes.fromhex(reply), "little")

    def set_register(self, name: str, value: int) -> None:
        """Change x0 to x30, sp, pc or cpsr."""
        size = 4 if name == "cpsr" else 8
        self._order(f"P{REGISTERS[name]:x}={value.to_bytes(size, 'little').hex()}")

    def counter(self) -> int:
        """CNTVCT_EL0 of a vCPU that is in the kernel, in its ticks: the next instruction is made an MRS for a moment."""
        pc, x0 = self.register("pc"), self.register("x0")
        instruction = self.read(pc, 4, virtual=True)
        self.write(pc, MRS_X0_CNTVCT, virtual=True)
        self.set_break(pc + 4)  # and no step(): QEMU 7.2 has none where time goes by instructions
        self.resume()
        if not self.wait(ANSWER):
            raise GdbError(f"the guest does not go on from {pc:#x}: has its kernel set up the timer?")
        self.clear_break(pc + 4)
        ticks = self.register("x0")
        self.write(pc, instruction, virtual=True)
        self.set_register("x0", x0)
        self.set_register("pc", pc)
        return ticks

    def read(self, address: int, size: int, virtual: bool = False) -> bytes:
        """`size` bytes of memory."""
        self._mode(virtual)
        data = b""
        while len(data) < size:
            reply = self._ask(f"m{address + len(data):x},{min(CHUNK, size - len(data)):x}")
            if reply.startswith("E") or not reply:
                raise GdbError(f"can't read memory at {address + len(data):#x}: '{reply}'")
            data += bytes.fromhex(reply)
        return data

    def write(self, address: int, data: bytes, virtual: bool = False) -> None:
        """Change memory, read-only pages and code that was translated included."""
        self._mode(virtual)
        for offset in range(0, len(data), CHUNK):
            chunk = data[offset:offset + CHUNK]
            self._order(f"M{address + offset:x},{len(chunk):x}:{chunk.hex()}")

    def _mode(self, virtual: bool) -> None:
        if virtual != self._virtual:
            self._order(f"Qqemu.PhyMemMode:{0 if virtual else 1}")
            self._virtual = virtual

    # What stops it: virtual addresses, on every vCPU

    def set_break(self, address: int) -> None:
        """Stop before the instruction at `address` is executed."""
        self._order(f"Z1,{address:x},4")

    def clear_break(self, address: int) -> None:
        self._order(f"z1,{address:x},4")

    def set_watch(self, address: int, size: int) -> None:
        """Stop behind an instruction that writes to the `size` bytes (a power of 2) at `address`."""
        self._order(f"Z2,{address:x},{size:x}")

    def clear_watch(self, address: int, size: int) -> None:
        self._order(f"z2,{address:x},{size:x}")

    # Packets

    def _order(self, text: str) -> None:
        reply = self._ask(text)
        if reply != "OK":
            raise GdbError(f"QEMU's gdb server says '{reply}' to '{text[:40]}'")

    def _ask(self, text: str) -> str:
        self._send(text)
        reply = self._receive(ANSWER)
        if reply is None:
            raise GdbError(f"QEMU's gdb server does not answer '{text[:40]}'")
        return reply

    def _send(self, text: str) -> None:
        data = text.encode()
        self._end.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))

    def _receive(self, seconds: float) -> str | None:
        """The next packet, acknowledged; None if none comes within `seconds`."""
        end = time.monotonic() + seconds
        while True:
            packet = re.search(rb"\$([^#]*)#..", self._buffer, re.DOTALL)
            if packet:
                self._buffer = self._buffer[packet.end():]
                self._end.sendall(b"+")
                return packet.group(1).decode(errors="replace")
            self._end.settimeout(max(end - time.monotonic(), 0.001))
            try:
                data = self._end.recv(65536)
            except TimeoutError:
                return None
            if not data:
                raise GdbError("QEMU is gone")
            self._buffer += data

"""A running guest: what it says about itself, what it is told to do, how it fails."""

from __future__ import annotations

import base64
import json
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Sequence

from lab import paths, proc, qemu, say
from lab.build import Built
from lab.cells import Cell
from lab.errors import LabError
from lab.guest import Guest

SILENCE = 120.0  # seconds without a sign of life from a booting kernel, at most
SILENCE_DEBUG = 240.0  # the same for a kernel that checks everything it does
BOOT = 600.0  # seconds that a boot takes at most, whatever it says meanwhile
TAIL = 25  # lines of the console that a failure shows
STRAYS = 5  # of the lines over the port that are no messages

BOOTING = "Booting Linux on physical CPU"  # the first line of every kernel
RESUMED = re.compile(r"PM: hibernation: (hibernation exit|resume failed)|PM: Image not found")
PANIC = re.compile(r"Kernel panic - not syncing: .*")
COMPLAINT = re.compile(r"^(?:\[[^]]*\] ?)?((?:WARNING|BUG|UBSAN|KFENCE): .*|Internal error: .*|Unable to handle .*|"
                       r"INFO: (?:task|rcu|possible).*|=+ WARNING.*|watchdog: BUG.*)", re.MULTILINE)


class GuestFailure(LabError):
    """Something went wrong in a guest; shows the console and how to boot it by hand."""

    def __init__(self, what: str, machine: "Machine") -> None:
        super().__init__(f"{machine.boot.cell.name}: {what}",
                         f"the console's end ({machine.keep_console()}):\n{indent(machine.tail())}\n"
                         f"{machine.strays()}"
                         f"  by hand: {qemu.by_hand(machine.boot)}")


class TimeoutFailure(GuestFailure):
    """Nothing was heard from the guest for too long."""


class Crashed(GuestFailure):
    """QEMU ended, and no panic was seen before."""


class Panicked(GuestFailure):
    """The guest's kernel panicked."""


class CommandFailed(GuestFailure):
    """A command in the guest that should have succeeded did not."""


@dataclass(frozen=True)
class Hello:
    """What a kernel says once it is up. `seconds` from start or handover until it said so; memory in KiB."""

    generation: int
    release: str
    el: int | None
    kvm: str | None
    kaslr: str | None
    mem_total: int
    mem_free: int
    uptime: float
    cmdline: str
    payload: str | None
    seconds: float


@dataclass(frozen=True)
class Result:
    """How a command in the guest ended, and what it wrote."""

    rc: int
    out: str


class _Port:
    """The host's end of the virtio-serial port: messages, one JSON object each.

    `strays` are the lines that were no messages, the last STRAYS of them.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._buffer = b""
        self.strays: deque[bytes] = deque(maxlen=STRAYS)

    def send(self, text: str) -> None:
        self._end.sendall(text.encode())

    def receive(self, seconds: float) -> bytes:
        """What arrived within `seconds`; b'' if nothing did."""
        if select.select([self._end], [], [], seconds)[0]:
            try:
                return self._end.recv(65536)
            except ConnectionResetError:
                pass
        return b""

    def poll(self, seconds: float) -> dict[str, Any] | None:
        """The next message, with its output as "out", or None if `seconds` pass without one."""
        message = self._message()
        if message is None:
            self._buffer += self.receive(seconds)
            message = self._message()
        return message

    def _message(self) -> dict[str, Any] | None:
        message, self._buffer, strays = parse_message(self._buffer)
        self.strays.extend(strays)
        return message


def parse_message(buffer: bytes) -> tuple[dict[str, Any] | None, bytes, list[bytes]]:
    """Take one message off `buffer`: a line of JSON and as many bytes as its "size" says.

    Returns it, or None when there is no whole one yet, what is left of `buffer`,
    and the lines before it that are no messages. The last words of an earlier
    kernel are such lines.
    """
    strays: list[bytes] = []
    while b"\n" in buffer:
        line, rest = buffer.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            strays += [line] if line.strip() else []
            buffer = rest
            continue
        size = message.get("size", 0)
        if len(rest) < size:
            return None, buffer, strays
        message["out"] = rest[:size].decode(errors="replace")
        return message, rest[size:], strays
    return None, buffer, strays


def parse_hello(message: dict[str, Any], seconds: float) -> Hello:
    """The facts in a "hello" message. Raises KeyError when one is missing."""
    return Hello(message["hello"], message["release"], message["el"], message["kvm"], message["kaslr"],
                 message["mem_total"], message["mem_free"], message["uptime"], message["cmdline"],
                 message["payload"], seconds)


def find_panic(console: str) -> str | None:
    """The first panic on a console, as its one line."""
    match = PANIC.search(console)
    return match.group(0).rstrip() if match else None


def find_complaints(console: str) -> list[str]:
    """Warnings, oopses and reports of the kernel's own checkers on a console."""
    return [match.group(1).rstrip() for match in COMPLAINT.finditer(console.replace("\r", ""))]


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


class Machine:
    """A cell under QEMU, from `with` to the end of its block.

    `report` gets a line per kernel that came up; `name` is for the files in
    out/logs, by default that of the cell; `extra` are more options for QEMU.
    Failures of the guest raise TimeoutFailure, Crashed, Panicked or
    CommandFailed.
    """

    boots = 0  # kernels that came up since the laboratory was started
    starts = 0  # times that QEMU was started

    def __init__(self, cell: Cell, built: Built, guest: Guest, *, accel: str = "tcg", name: str = "",
                 report: Callable[[str], None] = say.info, extra: Sequence[str] = ()) -> None:
        self.built, self.guest = built, guest
        self.boot = qemu.Boot(cell, built.image, guest.initrd, built.image, guest.next, accel)
        self.report, self.extra = report, extra
        self.generation = 1
        self.silence = SILENCE_DEBUG if cell.kernel.flavour == "debug" else SILENCE
        logs = paths.OUT / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.console = logs / f"{name or cell.name}.log"
        self._ids = 0
        self._begin = 0.0
        self._sockets: list[socket.socket] = []
        self._crashing = False
        self._qemu: subprocess.Popen[bytes] | None = None

    # Start and end

    def __enter__(self) -> "Machine":
        self.boot = qemu.prepare(self.boot, self.console.with_suffix(".dtb"))
        self.console.write_bytes(b"")
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop()

    def _start(self, resuming: Path | None = None) -> None:
        """Start QEMU. `resuming` is a name for the socket that the port gets connected to later, see _connect()."""
        qmp, qmp_theirs = socket.socketpair()
        self._sockets, theirs = [qmp], [qmp_theirs]
        self._qmp = qmp.makefile("rw")
        self._negotiated = False
        if resuming:
            channel = f"path={resuming},server=on,wait=off"
        else:
            port, port_theirs = socket.socketpair()
            self._port = _Port(port)
            self._sockets.append(port)
            theirs.append(port_theirs)
            channel = f"fd={port_theirs.fileno()}"
        channels = qemu.channels(self.console, channel, qmp_theirs.fileno())
        self._errors = self.console.with_suffix(".qemu")
        self._begin = time.monotonic()
        with open(self._errors, "wb") as errors:
            try:
                # In a process group of its own: a Ctrl-C is for the laboratory, which then ends QEMU.
                self._qemu = subprocess.Popen([*qemu.arguments(self.boot), *channels, *self.extra],
                                              stdin=subprocess.DEVNULL,
                                              stdout=errors, stderr=errors, preexec_fn=proc.die_with_parent,
                                              start_new_session=True,
                                              pass_fds=[end.fileno() for end in theirs])
            except FileNotFoundError:
                raise LabError(f"{qemu.QEMU}: no such program", "Debian's package is qemu-system-arm") from None
            finally:
                for end in theirs:
                    end.close()
        Machine.starts += 1

    def resumed(self, since: int) -> bool:
        """Has a kernel resumed, or failed to, in what the console shows behind `since`?"""
        return RESUMED.search(self.log()[since:]) is not None

    def _connect(self, path: Path, since: int, timeout: float) -> None:
        """Connect the port once a kernel has resumed, or failed to: what the console shows behind `since`.

        Not earlier: a kernel that resumes asks whether its port is connected
        before it can hear the answer (v7.3), so it has to be told afterwards.
        """
        begin = time.monotonic()
        while not self.resumed(since):
            self._check()
            if time.monotonic() - begin > timeout:
                raise TimeoutFailure(f"nothing has resumed after {timeout:.0f} s", self)
            time.sleep(0.1)
        port = socket.socket(socket.AF_UNIX)
        port.connect(str(path))
        self._port = _Port(port)
        self._sockets.append(port)

    def _stop(self) -> None:
        if self._qemu:
            self._qemu.kill()
            self._qemu.wait()
        for end in self._sockets:
            end.close()

    # What it shows

    def log(self) -> str:
        """Everything on the console so far."""
        return self.console.read_text(errors="replace").replace("\r", "")

    def tail(self) -> str:
        """The end of the console, and whatever QEMU itself said."""
        said = self._errors.read_text(errors="replace").strip()
        lines = self.log().splitlines()[-TAIL:] + ([f"QEMU: {said}"] if said else [])
        return "\n".join(lines) or "(nothing)"

    def strays(self) -> str:
        """What came over the port and is no message, as lines of a failure; '' if nothing did."""
        lines = "\n".join(line.decode(errors="replace") for line in self._port.strays)
        return f"  over the port came what is no message:\n{indent(lines)}\n" if lines else ""

    def keep_console(self) -> Path:
        """Copy the console to a file that only another failure of the same test overwrites."""
        return Path(shutil.copy(self.console, self.console.with_suffix(".failed.log")))

    def heard(self, seconds: float) -> dict[str, Any] | None:
        """The next message from the guest, if one comes within `seconds`, whatever it is about."""
        return self._port.poll(seconds)

    def ended(self) -> bool:
        """Has QEMU ended?"""
        return self._qemu is None or self._qemu.poll() is not None

    # What it is told

    def hello(self) -> Hello:
        """Wait for the kernel that is booting and hear what it is."""
        message = self._wait(f"kernel {self.generation} to come up", self.silence, BOOT)
        self._crashing = False
        if "hello" not in message:
            raise CommandFailed(f"'{message['out'].strip()}' instead of a new kernel (exit {message['rc']})", self)
        hello = parse_hello(message, time.monotonic() - self._begin)
        if hello.generation != self.generation:
            raise GuestFailure(f"kernel {hello.generation} came up instead of kernel {self.generation}", self)
        Machine.boots += 1
        self.report(f"   {self.boot.cell.name}: kernel {hello.generation} is up after {hello.seconds:.1f} s")
        return hello

    def run(self, script: str, timeout: float = 120.0) -> Result:
        """Run a shell script in the guest, for `timeout` seconds at most."""
        self._send(script)
        return self._result(script.splitlines()[0], timeout)

    def _result(self, what: str, timeout: float) -> Result:
        message = self._wait(f"'{what}'", timeout, timeout)
        if message.get("id") != self._ids:
            raise Crashed(f"a kernel started while '{what}' ran: {message}", self)
        return Result(message["rc"], message["out"])

    def sh(self, script: str, timeout: float = 120.0) -> str:
        """The same for a script that has to succeed: what it wrote. Raises CommandFailed."""
        result = self.run(script, timeout)
        if result.rc:
            raise CommandFailed(f"'{script}' failed (exit {result.rc}):\n{indent(result.out)}", self)
        return result.out

    def begin(self, script: str) -> None:
        """Run a script that leaves this kernel for good. Nobody waits for what it says: it may be gone before that."""
        self._send(script)

    def put(self, path: str, data: bytes) -> None:
        """Write a (small) file in the guest."""
        text = base64.b64encode(data).decode()
        self.sh(f"base64 -d >{path} <<EOF\n{text}\nEOF")

    def get(self, path: str) -> bytes:
        """Read a (small) file of the guest."""
        return base64.b64decode(self.sh(f"base64 {path}"))

    def exec(self, by_init: bool = False) -> Hello:
        """Leave for the kernel that was loaded, and wait until it is up.

        `by_init` has the guest's first process do it, which cannot be told if that fails.
        """
        self.generation += 1
        self._begin = time.monotonic()
        if by_init:
            self._send_line("0 leave")
        else:
            self._send("kexec -e")
        return self.hello()

    def crash(self, script: str) -> Hello:
        """Run a script that makes the guest crash, and wait until its crash kernel is up."""
        self.generation += 1
        self._begin = time.monotonic()
        self._crashing = True
        self._send(script)
        return self.hello()

    def leave(self, script: str, timeout: float = 120.0) -> str:
        """Run a script that has the guest end for good, by kexec or not: what the console showed meanwhile."""
        since = len(self.log())
        begin = time.monotonic()
        self._send(script)
        while not self.ended():
            message = self._port.poll(0.1)
            if message:
                raise CommandFailed(f"'{script}' came back (exit {message.get('rc')}): {message['out']}", self)
            if time.monotonic() - begin > timeout:
                raise TimeoutFailure(f"it has not ended after {timeout:.0f} s", self)
        return self.log()[since:]

    def sleep(self, script: str, timeout: float = 400.0, meanwhile: Callable[[], None] = lambda: None) -> Result:
        """Run a script that has the guest hibernate, switch it on again, and wait for the end of the script.

        `meanwhile` is called once QEMU was started again.
        """
        self._send(script)
        what = script.splitlines()[0]
        assert self._qemu
        try:
            status = self._qemu.wait(timeout)
        except subprocess.TimeoutExpired:
            message = self._port.poll(0) or {"out": ""}
            raise TimeoutFailure(f"'{what}' has not switched it off after {timeout:.0f} s: {message['out']}",
                                 self) from None
        if status or find_panic(self._latest()):
            self._check()
        self._stop()
        since = len(self.log())
        with tempfile.TemporaryDirectory(prefix="lab.") as folder:
            self._start(Path(folder) / "port")
            meanwhile()
            self._connect(Path(folder) / "port", since, timeout)
        return self._result(what, timeout)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Have QEMU execute a monitor command and return its answer. Raises LabError if it refuses."""
        if not self._negotiated:
            self._answer()  # its greeting
            self._ask("qmp_capabilities", {})
            self._negotiated = True
        return self._ask(command, arguments)

    def monitor(self, command: str) -> str:
        """What QEMU says to a command of its monitor for people, where QMP has none as handy."""
        return self.qmp("human-monitor-command", **{"command-line": command}).strip()

    def snapshot(self, command: str) -> None:
        """Save ("savevm NAME") or put back ("loadvm NAME") a machine that has qemu.snapshots(). Raises LabError."""
        if said := self.monitor(command):
            raise LabError(f"QEMU says '{said}' to '{command}'", str(self.console))
        if command.startswith("loadvm"):
            while self.heard(0):  # what was said before
                pass

    def _ask(self, command: str, arguments: dict[str, Any]) -> Any:
        print(json.dumps({"execute": command, "arguments": arguments}), file=self._qmp, flush=True)
        while True:
            answer = self._answer()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise LabError(f"QEMU refuses '{command}': {answer['error']['desc']}")

    def _answer(self) -> dict[str, Any]:
        return json.loads(self._qmp.readline() or '{"error": {"desc": "it is gone"}}')

    def _send(self, script: str) -> None:
        self._ids += 1
        self._send_line(f"{self._ids} {base64.b64encode(script.encode()).decode()}")

    def _send_line(self, line: str) -> None:
        try:
            self._port.send(line + "\n")
        except (BrokenPipeError, ConnectionResetError):
            self._check()

    def _wait(self, what: str, silence: float, limit: float) -> dict[str, Any]:
        """The next message, `silence` seconds after the last sign of life, and `limit` in all, at the latest."""
        begin = heard = said = time.monotonic()
        size = -1
        while True:
            message = self._port.poll(0.2)
            if message:
                return message
            self._check()
            now = time.monotonic()
            if self.console.stat().st_size != size:
                size, heard = self.console.stat().st_size, now
            if now - said > say.INTERVAL:
                said = now
                self.report(f"   {self.boot.cell.name}: waiting for {what}, {now - begin:.0f} s")
            if now - heard > silence:
                raise TimeoutFailure(f"silent for {now - heard:.0f} s, waiting for {what}", self)
            if now - begin > limit:
                raise TimeoutFailure(f"{now - begin:.0f} s were not enough for {what}", self)

    def _latest(self) -> str:
        """The console since a kernel booted last."""
        return self.log().rpartition(BOOTING)[2]

    def _check(self) -> None:
        """Raise what happened, if the guest has ended or panicked."""
        assert self._qemu
        ended = self._qemu.poll()
        panic = find_panic(self._latest())
        if panic and ended is None and self._crashing:
            return  # as it should: what comes of it is not over yet
        if panic and ended is None:
            try:
                self._qemu.wait(5)  # panic=-1: for the rest of its report
            except subprocess.TimeoutExpired:
                pass
            panic = find_panic(self._latest())  # the whole line
        if panic:
            raise Panicked(panic, self)
        if ended is not None:
            raise Crashed(f"QEMU ended ({ended})", self)

"""How long it takes until all CPUs but one have left the kernel, by their number, here and on mainline.

Once as time, which is that of an emulator whose host has fewer CPUs than the
guest, so only the shape of the curve says something; and once as the
instructions that all CPUs together execute, which are exact, as they run in
turns then.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

from lab import cells, plugin, qemu, say
from lab.build import Built
from lab.errors import LabError
from lab.guest import Guest
from lab.handover import load, verify
from lab.machine import Machine
from lab.stage import read_symbols

NUMBERS = (1, 2, 4, 8, 16, 32, 64)
MEMORY = 2048  # MiB
SILENCE = 600.0  # seconds that CPUs which run in turns may take for anything
LEAVING = "lab: leaving"
# Where nobody but the last CPU is in the kernel any more
ALONE = {True: "kexec_verify_in_place", False: "machine_kexec"}


@dataclass(frozen=True)
class Left:
    """One handover: milliseconds from `kexec -e` to the last line of the kernel, and of these with devices shut down.

    Instructions are millions: of all CPUs from there to where they have left; and what
    the verification before shutdown takes, that of all and that of the CPU which does most.
    """

    kernel: str
    cpus: int
    shutdown: float
    stopping: float
    instructions: float
    verified: float
    verified_most: float


def _machine(built: Built, cpus: int) -> cells.Cell:
    return replace(cells.DEFAULT, name=f"cpus-{cpus}-{built.kernel.name}", kernel=built.kernel, cpus=cpus,
                   memory=MEMORY, kaslr=False)


def _leave(m: Machine) -> str:
    """Hand over; what the console showed of it."""
    m.silence = SILENCE
    m.hello()
    load(m, "file")
    m.sh(f"echo '{LEAVING}' >/dev/kmsg")
    since = len(m.log())
    verify(m, m.exec(), since)
    return m.log()


def _times(console: str) -> tuple[float, float]:
    """Shutdown, and of that with devices shut down, in milliseconds, by the time stamps of the log."""
    found = [re.search(rf"^\[ *([\d.]+)\] .*{words}", console, re.M)
             for words in (LEAVING, "Starting new kernel", "Bye!")]
    if None in found:
        raise LabError("the console does not show when CPUs were stopped", console[-2000:])
    first, second, last = (float(match.group(1)) * 1e3 for match in found if match)
    return last - first, last - second


def _counted(built: Built, archives: Guest, cpus: int, begin: str, end: str) -> list[int]:
    """What each CPU executes from one function to another one, of which both are executed once."""
    symbols = read_symbols(built.vmlinux)
    with tempfile.TemporaryDirectory(prefix="lab.") as folder:
        out = Path(folder) / "counts"
        library = plugin.build("total", qemu.version())
        extra = ["-icount", "shift=0,sleep=off",
                 "-plugin", f"file={library},from={symbols[begin]:x},to={symbols[end]:x},out={out}"]
        with Machine(_machine(built, cpus), built, archives, extra=extra, report=lambda text: None) as m:
            _leave(m)
        line, *_ = out.read_text().splitlines()
    return list(map(int, json.loads(line)))


def measure(label: str, built: Built, archives: Guest, cpus: int) -> Left:
    """Load by kexec_file_load(), execute and verify, three times: for the time, and for two counts.

    Raises LabError.
    """
    with Machine(_machine(built, cpus), built, archives, report=lambda text: None) as m:
        shutdown, stopping = _times(_leave(m))
    left = _counted(built, archives, cpus, "machine_shutdown", ALONE[built.kernel.patched])
    verified = _counted(built, archives, cpus, "kexec_verify", "kernel_restart_prepare") if built.kernel.patched else [0]
    return Left(label, cpus, shutdown, stopping, sum(left) / 1e6, sum(verified) / 1e6, max(verified) / 1e6)


def measure_all(compared: dict[str, Built], archives: Guest, numbers: tuple[int, ...] = NUMBERS) -> Iterator[Left]:
    """Each kernel with each number of CPUs."""
    for number in numbers:
        for label, built in compared.items():
            one = measure(label, built, archives, number)
            say.info(f"   {one}")
            yield one


def table(left: list[Left]) -> str:
    """By the number of CPUs, one kernel beside the other."""
    rows = [("CPUS", "KERNEL", "SHUTDOWN MS", "OF THIS CPUS", "MILLION INSTRUCTIONS", "TO VERIFY", "BY ONE CPU")]
    rows += [(str(one.cpus), one.kernel, f"{one.shutdown:.0f}", f"{one.stopping:.0f}", f"{one.instructions:.2f}",
              *((f"{one.verified:.2f}", f"{one.verified_most:.2f}") if one.verified else ("-", "-"))) for one in left]
    return ("Until all CPUs but one have left (time is the emulator's; instructions are exact)\n\n"
            + "\n".join(say.columns(rows, 2)))

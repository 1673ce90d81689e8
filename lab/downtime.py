"""How long nothing runs: from the reboot call to the next kernel's init, phase by phase.

By the guest's own counter, which goes by instructions here, one per
nanosecond, and is read from outside: so a kernel that says nothing about it
can be compared. It is what is executed that is compared, not what caches and
memory make of it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

from lab import cells, say, timing
from lab.build import Built
from lab.errors import LabError
from lab.gdb import Gdb, options
from lab.guest import Guest
from lab.handover import verify
from lab.kload import NO_CMA, call, next_image
from lab.machine import Machine
from lab.stage import read_symbols

MEMORY = 2048  # MiB
FREQUENCY = 62.5e6  # Hz, of the counter of QEMU's CPUs
PATIENCE = 300.0  # seconds for each phase


@dataclass(frozen=True)
class Downtime:
    """One handover: milliseconds until all is shut down, and from there to the next kernel's init.

    `said` is what that one says itself, if it does.
    """

    kernel: str
    copied: bool
    shutdown: float
    rest: float
    said: timing.Timing | None

    @property
    def total(self) -> float:
        return self.shutdown + self.rest


def measure(label: str, built: Built, archives: Guest, copied: bool) -> Downtime:
    """Load by kexec_file_load(), so that all is `copied` or so that it need not be, execute and verify.

    Raises LabError.
    """
    cell = replace(cells.BENCHED, name=f"downtime-{built.kernel.name}", kernel=built.kernel, memory=MEMORY, cpus=1,
                   kaslr=False)
    symbols = read_symbols(built.vmlinux)
    with tempfile.TemporaryDirectory(prefix="lab.") as folder:
        extra = [*options(Path(folder) / "gdb"), "-icount", "shift=0,sleep=off"]
        with Machine(cell, built, archives, extra=extra, report=lambda text: None) as m:
            m.silence = PATIENCE
            m.hello()
            answer = call(m, next_image(m, NO_CMA if copied else 0))
            if answer != "0":
                raise LabError(f"kexec_file_load() answers {answer}", str(m.console))
            since = len(m.log())
            with Gdb(Path(folder) / "gdb") as gdb:
                gdb.run_to(symbols["kernel_kexec"], PATIENCE, str(m.console), lambda: m.begin("kexec -e"))
                times = [gdb.counter()]
                for name in ("machine_kexec", "rcu_end_inkernel_boot"):
                    gdb.run_to(symbols[name], PATIENCE, str(m.console))
                    times.append(gdb.counter())
                gdb.resume()
            m.generation += 1
            verify(m, m.hello(), since)
            said = timing.find(m.log()[since:])
    shutdown, rest = ((after - before) / FREQUENCY * 1e3 for before, after in zip(times, times[1:]))
    return Downtime(label, copied, shutdown, rest, said[0] if said else None)


def measure_all(compared: dict[str, Built], archives: Guest) -> Iterator[Downtime]:
    """Every kernel with an image that is copied, and ours with one that is where it has to be."""
    for name, built in compared.items():
        for copied in (True, False) if built.kernel.patched else (True,):
            one = measure(name, built, archives, copied)
            say.info(f"   {name}, {'copied' if copied else 'in place'}: {one.total:.1f} ms")
            yield one


def table(down: list[Downtime]) -> str:
    """The phases, and what the next kernel says about them."""
    rows = [("DOWNTIME", "IMAGE", "TOTAL MS", "SHUTDOWN MS", "THE REST MS", "SAID: SHUTDOWN", "COPY", "STARTUP")]
    for one in down:
        said = (one.said.shutdown_ms, one.said.copy_ms, one.said.startup_ms) if one.said else ()
        rows.append((one.kernel, "copied" if one.copied else "in place",
                     *(f"{value:.1f}" for value in (one.total, one.shutdown, one.rest)),
                     *([f"{value:.1f}" for value in said] or ["-"] * 3)))
    return "\n".join(say.columns(rows, 2))

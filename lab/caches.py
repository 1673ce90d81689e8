"""Where the newest value of each word of RAM is: a model of the caches beside QEMU (lab/plugin/caches.c).

A machine that is modelled goes through some STEPS. Each place in the code that
reads what is not the newest value, or loses it, is a Finding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Sequence

from lab import base, build, cells, guest, hibernate, host, inspector, kdump, plugin, proc, qemu, say
from lab.build import Built
from lab.cells import Cell
from lab.errors import LabError
from lab.guest import Guest
from lab.handover import BadHandover, handover, load, load_by_call, verify, verify_first
from lab.kload import NO_CMA, load_over_running_kernel
from lab.machine import Machine

MEMORY = 1024  # MiB
CRASH_KERNEL = f"crashkernel={kdump.RESERVED}M"
# Stores by some instructions reach no plugin.
PARAMETERS = ("arm64.nomops", "arm64.nosve")
OTHERS = "for cpu in /sys/devices/system/cpu/cpu[1-9]*; do echo {} >$cpu/online || exit 1; done"


@dataclass(frozen=True)
class Kernel:
    """One that was entered with the MMU off. What the plugin had seen of each kind by then is in `counts`."""

    number: int
    at: int  # physical address of its Image
    counts: dict[str, int]


@dataclass(frozen=True)
class Finding:
    """A place that reads what is not the newest value, or loses it; addresses are physical, 0 if there is none."""

    kind: str
    cpu: int
    pc: int  # virtual
    at: int  # the same, physical
    address: int
    writer: int  # the instruction that stored there last
    kernels: tuple[Kernel, ...]  # that were entered by then, the last one first


@dataclass(frozen=True)
class Seen:
    """What came of a run. A machine that was switched off and on counts its kernels from 1 again."""

    kernels: tuple[Kernel, ...]
    findings: tuple[Finding, ...]


def read(out: Path) -> Seen:
    """What the plugin has written so far."""
    kernels: list[Kernel] = []
    findings = []
    lines = out.read_text().splitlines(keepends=True) if out.exists() else []
    for row in (json.loads(line) for line in lines if line.endswith("\n")):
        if "entered" in row:
            kernels.append(Kernel(row.pop("entered"), row.pop("at"), row))
        else:
            findings.append(Finding(row["kind"], row["cpu"], row["pc"], row["pc_at"], row["address"], row["writer_at"],
                                    tuple(reversed(kernels))))
    return Seen(tuple(kernels), tuple(findings))


class Names:
    """The symbols of a kernel, by offset from its beginning."""

    def __init__(self, vmlinux: Path) -> None:
        lines = proc.run([f"{host.CROSS_COMPILE}nm", vmlinux]).stdout.decode().splitlines()
        symbols = {name: int(value, 16) for value, _, name in map(str.split, lines) if not name.startswith(("$", ".L"))}
        start, end = symbols["_text"], symbols["_end"]
        self.size = end - start
        known = sorted((value - start, name) for name, value in symbols.items() if start <= value < end)
        self._offsets, self._names = [offset for offset, _ in known], [name for _, name in known]

    def name(self, address: int, kernels: Sequence[Kernel]) -> str:
        """What is at a physical address: in the last of `kernels` that covers it, or in none."""
        for kernel in kernels:
            offset = address - kernel.at
            if 0 <= offset < self.size:
                index = bisect_right(self._offsets, offset) - 1
                return f"{self._names[index]}+{offset - self._offsets[index]:#x}"
        return f"{address:#x}" if address else "?"


def describe(finding: Finding, names: Names) -> str:
    """A finding as a line."""
    pc, address, writer = (names.name(one, finding.kernels) for one in (finding.at, finding.address, finding.writer))
    number = finding.kernels[0].number if finding.kernels else 0
    return (f"{finding.kind}: kernel {number}, CPU {finding.cpu}, {pc} (PC {finding.pc:#x}), "
            f"{finding.address:#x} = {address}, stored to by {writer}")


def options(cell: Cell, out: Path, strict: bool = True) -> list[str]:
    """What QEMU needs to be told to have the caches of `cell` modelled. `strict`: see lab/plugin/caches.c."""
    library = plugin.build("caches", qemu.version(qemu.program(*qemu.versions(cell))))
    return ["-plugin", f"file={library},out={out},size={cell.memory * qemu.MIB}" + ("" if strict else ",strict=off")]


def machine_for(cell: Cell, **fields: object) -> Cell:
    """`cell` with its caches modelled, and room for a crash kernel."""
    fields = {"memory": MEMORY, "its": cell.efi, "modelled": True} | fields
    return replace(cell, name=f"{cell.name}-caches", append=(*cell.append, CRASH_KERNEL, *PARAMETERS),
                   **fields)  # type: ignore[arg-type]


# Whose findings are none, and why.
HARMLESS = {
    # Hibernation copies all memory that is in use, and with it what early boot has left on its stack.
    ("load with the MMU on of what memory holds newer", "swsusp_save"),
}


def is_harmless(finding: Finding, names: Names) -> bool:
    return (finding.kind, names.name(finding.at, finding.kernels).partition("+")[0]) in HARMLESS


# What a machine goes through

def _hand_over(loader: str) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        handover(m, loader)

    return step


def _in_place(m: Machine) -> None:
    done = handover(m, "file")
    if m.boot.cell.kernel.patched and done.bytes_moved:
        raise BadHandover(f"{done.bytes_moved} bytes were moved instead of none", m)


def _copied(m: Machine) -> None:
    """By kexec_file_load(), which is told not to put anything in place."""
    loaded = load_by_call(m, NO_CMA)
    if loaded.bytes_in_place and loaded.bytes_in_place > loaded.size // 2:
        raise BadHandover(f"{loaded.bytes_in_place} bytes are in place", m)
    _leave(m)


def _over(m: Machine) -> None:
    load_over_running_kernel(m)
    _leave(m, by_init=True)


def _leave(m: Machine, by_init: bool = False) -> None:
    since = len(m.log())
    verify(m, m.exec(by_init), since)


def _resume(m: Machine) -> None:
    m.sh(hibernate.DISK + "mkswap $swap && swapon $swap && echo shutdown >/sys/power/disk\n"
         "rm -rf /next; echo 3 >/proc/sys/vm/drop_caches; echo 0 >/sys/power/image_size")
    result = m.sleep("echo disk >/sys/power/state")
    if result.rc:
        raise BadHandover(f"hibernation failed: {result.out}", m)


def _load_and_resume(loader: str) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        load(m, loader)
        _resume(m)
        _leave(m)

    return step


def _crash(loader: str, resumed: bool = False) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        kdump.load_crash_kernel(m, loader)
        if resumed:
            _resume(m)
        kdump.crash_and_verify(m)

    return step


def _cpus(m: Machine) -> None:
    """All CPUs but the first go, and come again."""
    m.sh(f"{OTHERS.format(0)}; {OTHERS.format(1)}")


def _inspect(m: Machine) -> None:
    """Every byte is looked at with the MMU off."""
    report = inspector.inspect(m, inspector.file_statements(m.boot.cell))
    if not report.good:
        raise BadHandover(f"the inspector found: {report.text}", m)


STEPS: dict[str, Callable[[Machine], None]] = {
    "load": _hand_over("load"),
    "file": _hand_over("file"),
    "load-nocheck": _hand_over("load-nocheck"),
    "copied": _copied,
    "in place": _in_place,
    "over": _over,
    "resume": _resume,
    "resume, load-nocheck": _load_and_resume("load-nocheck"),
    "resume, file": _load_and_resume("file"),
    "crash, load": _crash("load"),
    "crash, file": _crash("file"),
    "resume, crash": _crash("file", resumed=True),
    "cpus": _cpus,
    "inspector": _inspect,
}


def observe(cell: Cell, built: Built, archives: Guest, steps: Sequence[str], *, name: str = "", strict: bool = True,
            report: Callable[[str], None] = say.info) -> Seen:
    """Have a machine go through `steps` with its caches modelled, and tell what was seen.

    What is_harmless() is left out. Raises a GuestFailure for what goes wrong otherwise.
    """
    names = Names(built.vmlinux)
    with tempfile.TemporaryDirectory(prefix="lab.") as folder:
        out, extra = Path(folder) / "out", []
        if any("resume" in step for step in steps):
            extra = qemu.scratch_disk("swap", Path(folder) / "swap", cell)
        with Machine(cell, built, archives, name=name or f"caches.{cell.name}", report=report,
                     extra=[*extra, *options(cell, out, strict)]) as m:
            verify_first(m, m.hello())
            for step in steps:
                STEPS[step](m)
        seen = read(out)
    return replace(seen, findings=tuple(one for one in seen.findings if not is_harmless(one, names)))


# Ours and mainline's, side by side

A76 = "cortex-a76"  # has VHE, and an I-cache that has to be invalidated, which "max" has not
MACHINES = {"EL1": ("4k-va48-el1-a72", cells.A72), "nVHE": ("4k-va48-nvhe-a57", cells.A57), "VHE": ("4k-va48-vhe", A76)}
ROWS = {
    "kexec -l -i": "load-nocheck",
    "kexec -l": "load",
    "kexec -s -l, copied": "copied",
    "Crash": "crash, file",
    "kexec after a resume": "resume, load-nocheck",
    "Crash after a resume": "resume, crash",
}


def machines() -> dict[str, Cell]:
    """One for each exception level, by what it is called in the table."""
    return {label: machine_for(replace(cells.cell(name), cpu=cpu), cpus=2, rodata="on")
            for label, (name, cpu) in MACHINES.items()}


def compare(source: base.Source, rows: Sequence[str]) -> list[str]:
    """How much is found in each of `rows` at each exception level, with mainline's kernel and with ours: a table."""
    archives = guest.build()
    lines = [("Scenario", *(f"{who}, {label}" for who in ("mainline", "this series") for label in MACHINES))]
    kernels = [build.build(cells.kernel(name), source) for name in ("4k-va48-base", "4k-va48")]
    for row in rows:
        found = [str(len(observe(replace(cell, kernel=built.kernel), built, archives, (ROWS[row],)).findings))
                 for built in kernels for cell in machines().values()]
        lines.append((row, *found))
    return say.columns(lines, numbers_from=1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m lab.caches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--table", action="store_true", required=True, help="compare mainline's kernel with ours")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help=f"one of: {', '.join(ROWS)}")
    args = parser.parse_args()
    try:
        host.require("base", "build", "boot")
        print("\n".join(compare(base.source(), args.only or list(ROWS))))
    except LabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

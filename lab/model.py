"""What relocation would take on machines that somebody has measured, from counts.

QEMU has no caches, so a count is all that it gives. The published runs (the
cover letter of "arm64: MMU enabled kexec relocation", v15, 2021) have one time
with the MMU off and one with it on for two machines. That is enough for two
constants each, and they fit by construction:

- MMU off: each load and store goes to memory. v5.10 copies a line of 64 bytes
  by 4 LDP and 4 STP: 8 accesses.
- MMU on: each line of the destination is read for ownership, read from the
  source and cleaned: 1 fetched, 1 read, 1 cleaned. They are taken to cost the
  same, as the published runs cannot tell them apart.

What is counted of v5.10 and of mainline is put beside the figures that the
constants are from, which tells how near these kernels are to what was measured
then. Not by construction at all is what the model says about the other figures that
were published there, another size on one of the two and another machine, which
is not named, and about code that moves fewer lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab import say

if TYPE_CHECKING:
    from lab.bench import Relocation

MIB = 1 << 20
LINE = 64
ACCESSES_OFF = 8  # per line, v5.10
MOVED_ON = 3  # lines that pass between cache and memory per line copied, as v5.16 to v7.3 do it


@dataclass(frozen=True)
class Published:
    """A machine and its relocation: MiB, seconds with the MMU off, and with it on."""

    machine: str
    mib: float
    off: float
    on: float

    @property
    def lines(self) -> float:
        return self.mib * MIB / LINE

    @property
    def access_ns(self) -> float:
        """Of one uncached load or store."""
        return self.off / (self.lines * ACCESSES_OFF) * 1e9

    @property
    def line_ns(self) -> float:
        """Of one line between cache and memory."""
        return self.on / (self.lines * MOVED_ON) * 1e9


THUNDERX2 = Published("ThunderX2", 84, 7.489539915, 0.03946095)
STINGRAY = Published("Stingray", 25, 0.440510736, 0.022158152)
MACHINES = (THUNDERX2, STINGRAY)

# "With bigger userland (fitImage 380M), the reboot time is improved by 3.57s, and is reduced from 3.9s down to
# 0.33s", on Stingray; shutdown and startup are given for the smaller image, with the MMU off and on.
BIGGER_MIB, BIGGER_OFF, BIGGER_ON, BIGGER_SAVED = 380, 3.9, 0.33, 3.57
AROUND_OFF, AROUND_ON = 0.022131328 + 0.294706768, 0.032066576 + 0.296055880

# "~60 ms instead of ~580 ms with an initramfs size of ~120MB": somebody else, on a machine that is not named
OTHER = Published("not named", 120e6 / MIB, 0.58, 0.06)


@dataclass(frozen=True)
class Figure:
    """What the model says beside what was published, in seconds; `of` is whose counts or constants it is from."""

    what: str
    of: str
    says: float
    published: float

    @property
    def error(self) -> float:
        """In percent of what was published."""
        return (self.says / self.published - 1) * 100


def seconds(machine: Published, one: "Relocation") -> float:
    """A counted relocation: accesses that go to memory, or lines between it and the cache."""
    c = one.counts
    uncached = c.loads_uncached + c.stores_uncached
    if uncached:
        return uncached * machine.access_ns / 1e9
    read = one.lines  # each line of the source once
    return (read + c.lines_fetched + c.classes["dc_civac"]) * machine.line_ns / 1e9


def _counted(machine: Published, one: "Relocation") -> Figure:
    """What was counted of a kernel says for the size that was published."""
    uncached = one.counts.loads_uncached > 0
    return Figure(f"{machine.machine}, {machine.mib} MiB, MMU {'off' if uncached else 'on'}", f"{one.kernel}, counted",
                  seconds(machine, one) * machine.mib / one.mib, machine.off if uncached else machine.on)


def _bigger() -> list[Figure]:
    off, on = (time * BIGGER_MIB / STINGRAY.mib for time in (STINGRAY.off, STINGRAY.on))
    what = f"{STINGRAY.machine}, {BIGGER_MIB} MiB"
    return [Figure(f"{what}, whole reboot, MMU off", STINGRAY.machine, off + AROUND_OFF, BIGGER_OFF),
            Figure(f"{what}, whole reboot, MMU on", STINGRAY.machine, on + AROUND_ON, BIGGER_ON),
            Figure(f"{what}, saved", STINGRAY.machine, off + AROUND_OFF - on - AROUND_ON, BIGGER_SAVED)]


def _other(machine: Published) -> list[Figure]:
    what = f"{OTHER.machine}, ~120 MB"
    scale = OTHER.mib / machine.mib
    return [Figure(f"{what}, MMU off", machine.machine, machine.off * scale, OTHER.off),
            Figure(f"{what}, MMU on", machine.machine, machine.on * scale, OTHER.on)]


def figures(counted: "list[Relocation]") -> list[Figure]:
    """Every published figure, by the counts of kernels that move lines as those did, or by a machine's constants."""
    single = [one for one in counted if one.mib == 64 and not one.scattered and not one.counts.classes["dc_zva"]]
    return ([_counted(machine, one) for one in single for machine in MACHINES] + _bigger()
            + [figure for machine in MACHINES for figure in _other(machine)])


def table(counted: "list[Relocation]") -> str:
    """The constants, what they say, and how far that is from what was published."""
    lines = ["COST MODEL (see lab/model.py)"]
    for machine in MACHINES:
        lines.append(f"{machine.machine}: {machine.mib} MiB in {machine.off:.3f} s with the MMU off: "
                     f"{machine.access_ns:.0f} ns per access; in {machine.on:.4f} s with it on: "
                     f"{machine.line_ns:.1f} ns per line moved")
    rows = [("PUBLISHED", "BY", "MODEL S", "PUBLISHED S", "ERROR")]
    rows += [(one.what, one.of, f"{one.says:.4f}", f"{one.published:.4f}", f"{one.error:+.1f}%")
             for one in figures(counted)]
    lines += ["", *say.columns(rows, 2), ""]
    rows = [("64 MIB, AS THEY COME", *(f"{machine.machine.upper()} MS" for machine in MACHINES))]
    rows += [(f"{one.kernel}{', verified' if one.verify else ''}",
              *(f"{seconds(machine, one) * 1000:.1f}" for machine in MACHINES))
             for one in counted if one.mib == 64 and not one.scattered]
    return "\n".join(lines + say.columns(rows, 1))

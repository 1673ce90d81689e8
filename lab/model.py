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
then. The claim that is not by construction at all is what the model says about
the third figure that was published there, and about code that moves fewer lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    mib: int
    off: float
    on: float

    @property
    def lines(self) -> int:
        return self.mib * MIB // LINE

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

# "With bigger userland (fitImage 380M), the reboot time is improved by 3.57s", on Stingray
BIGGER_MIB, BIGGER_SAVED = 380, 3.57


def seconds(machine: Published, one: "Relocation") -> float:
    """A counted relocation: accesses that go to memory, or lines between it and the cache."""
    c = one.counts
    uncached = c.loads_uncached + c.stores_uncached
    if uncached:
        return uncached * machine.access_ns / 1e9
    read = one.lines  # each line of the source once
    return (read + c.lines_fetched + c.classes["dc_civac"]) * machine.line_ns / 1e9


def beside_published(machine: Published, one: "Relocation") -> str:
    """What a counted relocation says for the size that was published, and the error."""
    uncached = one.counts.loads_uncached > 0
    says = seconds(machine, one) * machine.mib / one.mib
    published = machine.off if uncached else machine.on
    return (f"{one.kernel}, {machine.machine}, {machine.mib} MiB, MMU {'off' if uncached else 'on'}: {says:.4f} s, "
            f"published {published:.4f} s: {(says / published - 1) * 100:+.1f}%")


def saved(machine: Published, mib: int) -> float:
    """What the MMU saves for `mib` MiB, in seconds."""
    return (machine.off - machine.on) * mib / machine.mib


def table(counted: "list[Relocation]") -> str:
    """The constants, what they say, and how far that is from what was published."""
    lines = ["COST MODEL (see lab/model.py)"]
    for machine in (THUNDERX2, STINGRAY):
        lines.append(f"{machine.machine}: {machine.mib} MiB in {machine.off:.3f} s with the MMU off: "
                     f"{machine.access_ns:.0f} ns per access; in {machine.on:.4f} s with it on: "
                     f"{machine.line_ns:.1f} ns per line moved")
    said = saved(STINGRAY, BIGGER_MIB)
    lines.append(f"{STINGRAY.machine}, {BIGGER_MIB} MiB: {said:.2f} s saved, published {BIGGER_SAVED} s: "
                 f"{(said / BIGGER_SAVED - 1) * 100:+.0f}%")
    single = [one for one in counted if one.mib == 64 and not one.scattered]
    lines += [beside_published(machine, one) for one in single if not one.counts.classes["dc_zva"]
              for machine in (THUNDERX2, STINGRAY)]
    for one in single:
        times = ", ".join(f"{machine.machine} {seconds(machine, one) * 1000:.1f} ms"
                          for machine in (THUNDERX2, STINGRAY))
        lines.append(f"{one.kernel}{', verified' if one.verify else ''}, {one.mib} MiB: {times}")
    return "\n".join(lines)

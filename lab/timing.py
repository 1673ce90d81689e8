"""What a kernel says about how long the kexec took that started it, and the property it knows that from."""

from __future__ import annotations

import re
import struct
from dataclasses import astuple, dataclass

from lab.machine import Machine

PROPERTY = "linux,kexec-timing"
VERSION = 1
TABLE = "/tmp/debug/kexec_timing"  # in the guest, after DEBUGFS

DEBUGFS = "mkdir -p /tmp/debug; grep -q ' /tmp/debug ' /proc/mounts || mount -t debugfs debugfs /tmp/debug"
LINE = re.compile(r"kexec: shutdown ([\d.]+) ms \(CPUs ([\d.]+)\), copied ([\d.]+) MiB in ([\d.]+) ms, "
                  r"startup ([\d.]+) ms")


@dataclass(frozen=True)
class Timing:
    """The line that a kernel prints: milliseconds, and MiB with one decimal."""

    shutdown_ms: float
    cpus_ms: float  # of these, until all CPUs but one were off
    copied_mib: float
    copy_ms: float
    startup_ms: float

    @property
    def seconds(self) -> float:
        """From the reboot call to the start of init."""
        return (self.shutdown_ms + self.copy_ms + self.startup_ms) / 1000


@dataclass(frozen=True)
class Property:
    """The value of PROPERTY. Times in ticks of the counter, sizes in bytes."""

    fdt: int
    version: int
    frequency: int  # Hz
    begin: int
    devices: int
    cpus: int
    shutdown: int
    copied: int
    in_place: int
    copy_start: int
    copy_end: int

    @classmethod
    def good(cls, fdt: int, frequency: int) -> Property:
        """One that a kernel believes: 0.1 ms of shutdown, all for devices, and 0.2 ms until 23.3 MiB are copied."""
        tenth = frequency // 10_000  # of a millisecond
        return cls(fdt, VERSION, frequency, begin=1, devices=tenth + 1, cpus=tenth + 1, shutdown=tenth + 1,
                   copied=24_536_678, in_place=4096, copy_start=tenth + 2, copy_end=3 * tenth + 1)

    def value(self) -> bytes:
        """As the device tree has it."""
        fdt, version, frequency, *rest = astuple(self)
        return struct.pack(">11Q", version, frequency, fdt, *rest)


def find(console: str) -> list[Timing]:
    """The lines on a console, in order."""
    return [Timing(*map(float, match.groups())) for match in LINE.finditer(console)]


def table(m: Machine) -> dict[str, int]:
    """The same from the running kernel's debugfs, in microseconds and bytes; empty if there is none."""
    text = m.sh(f"{DEBUGFS}; [ ! -e {TABLE} ] || cat {TABLE}")
    return {name: int(value) for name, value, _ in map(str.split, text.splitlines())}

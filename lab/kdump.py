"""`./kexec-lab kdump`: a guest crashes, its crash kernel saves the dump, and the dump is looked at."""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

from lab import base, build, cells, guest, host, lock, module, paths, qemu, say
from lab.build import Built
from lab.cells import Cell
from lab.guest import Guest
from lab.handover import BadHandover, Loaded, log_since, parse_log, verify, verify_first
from lab.kload import merge, subtract
from lab.machine import BOOTING, Hello, Machine
from lab.stage import read_symbols
from lab.vmcore import Dump, parse_oops

MIB = 1 << 20
MEMORY = 768  # MiB, so that a dump is copied in seconds
RESERVED = 288  # MiB
PATTERN, SEED = 64, 0xC0FFEE  # MiB of a file that has to be in the dump

LOADERS = {"load": "kexec -d -c -p", "file": "kexec -d -s -p"}

# How a guest is made to crash: a command, and what the log has to show. {cpu} is its last CPU.
CRASHES = {
    "sysrq": ("echo c >/proc/sysrq-trigger", "Kernel panic - not syncing: sysrq triggered crash"),
    "null": (module.insert("how=null cpu=0"), "Unable to handle kernel NULL pointer dereference"),
    "secondary": (module.insert("how=null cpu={cpu}"), "Unable to handle kernel NULL pointer dereference"),
    "interrupt": (module.insert("how=interrupt cpu=0"), "Unable to handle kernel NULL pointer dereference"),
    "spin": (module.insert("how=spin cpu={cpu}"), "Kernel panic - not syncing: provoked"),
    "warn": (f"echo 1 >/proc/sys/kernel/panic_on_warn; {module.insert('how=warn')}", "panic_on_warn set"),
}
# These come with the registers of an exception, the others call panic() by themselves.
WITH_REGISTERS = ("null", "secondary", "interrupt")


class BadDump(BadHandover):
    """A dump was saved, and something is wrong with it."""


@dataclass(frozen=True)
class Saved:
    """A dump that was looked at. `seconds` until the crash kernel was up, and until the dump was saved."""

    crash: str
    loader: str
    up: float
    seconds: float
    mib: int
    headline: str


def machine_for(cell: Cell, reserve: str = f"crashkernel={RESERVED}M", **fields: object) -> Cell:
    """`cell` with a reservation for a crash kernel, and as little memory as that allows."""
    fields = {"memory": MEMORY, "cpus": max(cell.cpus, 2), "rodata": "on"} | fields
    return replace(cell, name=f"{cell.name}-kdump", append=(*cell.append, reserve), **fields)  # type: ignore[arg-type]


def load_crash_kernel(m: Machine, loader: str) -> Loaded:
    """Load the crash kernel; returns what it and the running one said meanwhile."""
    m.sh("fetch", timeout=300)
    mark = f"lab: loading a crash kernel, {time.monotonic_ns()}"
    said = m.sh(f"echo '{mark}' >/dev/kmsg\n"
                "line=$(sed 's/ *\\(lab\\.gen=[0-9]*\\|crashkernel=[^ ]*\\)//g' /proc/cmdline)\n"
                f"{LOADERS[loader]} /next/Image --initrd=/next/initrd "
                f'--command-line="$line lab.gen={m.generation + 1} nr_cpus=1 reset_devices"', timeout=300)
    return parse_log(said + log_since(m, mark))


def ranges_of(iomem: str, name: str) -> list[tuple[int, int]]:
    """Start and end of the ranges that /proc/iomem has under a name."""
    found = re.findall(rf"^ *(\w+)-(\w+) : {name}$", iomem, re.M)
    return [(int(first, 16), int(last, 16) + 1) for first, last in found]


def crash_and_verify(m: Machine, script: str = CRASHES["sysrq"][0]) -> Hello:
    """Have a guest crash by a script; its crash kernel comes up, and nothing is wrong with that one."""
    hello = m.crash(script)
    verify(m, hello, m.log().rfind(BOOTING))
    return hello


def crash(m: Machine, how: str, loader: str, dump: Path) -> Saved:
    """Have a guest crash and its dump saved on the disk that is `dump`, and look at it.

    Raises BadDump, or whatever else went wrong.
    """
    command, expected = CRASHES[how]
    module.put(m)
    m.sh(f"pattern fill /tmp/pattern {PATTERN} {SEED}")
    load_crash_kernel(m, loader)
    iomem = m.sh("cat /proc/iomem")
    m.sh("echo 1 >/proc/sys/kernel/panic_on_oops; echo 1 >/proc/sys/kernel/sysrq")
    begin = time.monotonic()
    hello = crash_and_verify(m, command.format(cpu=m.boot.cell.cpus - 1))
    before = m.log().rpartition(BOOTING)[0]
    if expected not in before:
        raise BadDump(f"the kernel that crashed did not say '{expected}'", m)
    said = save(m)
    seconds = time.monotonic() - begin
    with Dump(dump) as saved:
        wrong = [*memory_differences(saved, iomem), *register_differences(m, saved, how, before)]
        pages, spoilt = saved.pattern(PATTERN, SEED)
        if pages != PATTERN * MIB // 4096 or spoilt:
            wrong.append(f"{pages} of {PATTERN * MIB // 4096} pages of the pattern are in it, {spoilt} are spoilt")
        size = sum(end - start for start, end in saved.ranges()) // MIB
    if expected not in said:
        wrong.append(f"vmcore-dmesg does not show '{expected}'")
    if wrong:
        raise BadDump("; ".join(wrong), m)
    return Saved(how, loader, hello.seconds, seconds, size, expected)


def save(m: Machine) -> str:
    """Have the crash kernel copy the dump to its disk; returns what vmcore-dmesg makes of it."""
    return m.sh("for disk in /sys/block/vd*; do [ $(cat $disk/serial) = dump ] && to=/dev/${disk##*/}; done\n"
                "dd if=/proc/vmcore of=$to bs=1M conv=fsync 2>/dev/null && vmcore-dmesg /proc/vmcore", timeout=600)


def memory_differences(dump: Dump, iomem: str) -> list[str]:
    """A dump has all memory but the reservation."""
    memory = subtract(ranges_of(iomem, "System RAM"), ranges_of(iomem, "Crash kernel"))
    if dump.ranges() == merge(memory, 0):
        return []
    return [f"the dump has {show(dump.ranges())}, memory is {show(memory)}"]


def show(ranges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{start:#x}-{end:#x}" for start, end in ranges)


def register_differences(m: Machine, dump: Dump, how: str, console: str) -> list[str]:
    """Each CPU that could be stopped has its registers in the dump.

    Those of the CPU that crashed are those of the oops; without one, it is in __crash_kexec().
    """
    stopped = m.boot.cell.cpus - (how == "spin")
    if len(dump.registers) != stopped:
        return [f"the dump has the registers of {len(dump.registers)} CPUs, not of {stopped}"]
    if how in WITH_REGISTERS:
        oops = parse_oops(console)
        if len(oops) < 31:
            return [f"the oops shows {len(oops)} registers"]
        if not any(all(cpu[name] == value for name, value in oops.items()) for cpu in dump.registers):
            return [f"no CPU in the dump has the registers of the oops: {oops}"]
        return []
    start = read_symbols(m.built.vmlinux)["__crash_kexec"] + int(dump.vmcoreinfo["KERNELOFFSET"], 16)
    if not any(start <= cpu["pc"] < start + 0x400 for cpu in dump.registers):
        return [f"no CPU in the dump is in __crash_kexec(): {[hex(cpu['pc']) for cpu in dump.registers]}"]
    return []


def demonstrate(cell: Cell, built: Built, archives: Guest, how: str, loader: str, accel: str,
                report: Callable[[str], None] = say.info) -> Saved:
    """One crash, from the first kernel to the verdict."""
    with tempfile.TemporaryDirectory(prefix="lab.") as folder:
        dump = Path(folder) / "dump"
        with Machine(cell, built, archives, accel=accel, name=f"kdump.{cell.name}", report=report,
                     extra=qemu.scratch_disk("dump", dump, cell)) as m:
            verify_first(m, m.hello())
            return crash(m, how, loader, dump)


def main(args: argparse.Namespace) -> int:
    """Crash a guest by each loader that was asked for; returns 0 if every dump was whole."""
    cell = machine_for(cells.cell(args.cell))
    host.require("base", "build", "boot")
    built = build.build(cell.kernel, base.source())
    archives = guest.build()
    with lock.held(paths.OUT_LOCK, "this checkout's out/"):
        for loader in LOADERS if args.loader == "both" else (args.loader,):
            with say.phase(f"{LOADERS[loader]}, then a crash by {args.crash}"):
                done = demonstrate(cell, built, archives, args.crash, loader, args.accel)
            say.info(f"   '{done.headline}'; crash kernel up after {done.up:.1f} s, {done.mib} MiB saved after "
                     f"{done.seconds:.1f} s")
            say.info("   all memory but the reservation is in the dump, the pattern is whole, the registers are right")
    return 0

"""A kernel tells how long the kexec took that started it, and keeps silent when it cannot know."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Lab
from lab import fdt, qemu
from lab.cells import CELLS, DEFAULT, Cell, core_only
from lab.gdb import Gdb, options
from lab.handover import load, load_by_call, verify
from lab.kload import NO_CMA, load_over_running_kernel
from lab.machine import Machine
from lab.stage import read_symbols
from lab.timing import PROPERTY, Property, find, table

pytestmark = [pytest.mark.timing, pytest.mark.needs("timing")]

NAMES = ("4k-va48-vhe", "4k-va48-nvhe", "4k-va48-el1", "4k-va48-vhe-cma", "64k-va52-vhe", "64k-va52-nvhe-a72")
LINES = [replace(CELLS[name], name=f"{name}-timing") for name in NAMES]
NODE = f"/proc/device-tree/chosen/{PROPERTY}"

BOOT_ARGUMENT = qemu.RAM_BASE + 0x18  # where QEMU's own boot code has the address of the device tree
RTC = 0x09010000  # data register of the PL031: seconds
NS = 9  # an instruction takes 2^NS nanoseconds
WALL = 50  # seconds: the clock that is looked at from outside has whole ones, and 2 % are asked for


def cleared(m: Machine) -> bool:
    """Does nobody who copies this kernel's device tree get the times that it was handed?"""
    m.sh("[ -e /sys/firmware/fdt ]")
    return m.sh(f"[ ! -e {NODE} ] || tr -d '\\0' <{NODE} | wc -c").strip() in ("", "0")


@pytest.mark.cells(*core_only(LINES, "4k-va48-nvhe", "4k-va48-el1", "64k-va52-vhe"))
def test_the_line(machine: Machine) -> None:
    """By kexec_file_load() it is there, and true; by kexec_load() it is not, whoever was before."""
    assert find(machine.log()) == [] and table(machine) == {}
    for loader in ("file", "load-nocheck", "copied", "file"):
        loaded = load_by_call(machine, NO_CMA) if loader == "copied" else load(machine, loader)
        since, begin = len(machine.log()), time.monotonic()
        verify(machine, machine.exec(), since)
        wall = time.monotonic() - begin
        said, rows = find(machine.log()[since:]), table(machine)
        assert cleared(machine)
        if loader == "load-nocheck":
            assert said == [] and rows == {}
            continue
        (line,) = said
        machine.report(f"   {machine.boot.cell.name}: {line} {rows}")
        assert rows["copied"] == loaded.bytes_to_move and rows["in_place"] == loaded.bytes_in_place
        assert line.copied_mib == rows["copied"] * 10 // (1 << 20) / 10
        assert (line.shutdown_ms, line.cpus_ms, line.copy_ms, line.startup_ms) == \
            tuple(rows[name] / 1000 for name in ("shutdown", "cpus", "copy", "startup"))
        assert rows["devices"] and rows["startup"] and rows["devices"] + rows["cpus"] <= rows["shutdown"]
        assert (rows["copy"] > 1000) == (rows["copied"] > 1 << 20)
        assert rows["copied"] or loader == "file"
        assert line.seconds < wall


def counter_frequency(m: Machine) -> int:
    """In Hz: QEMU 7.2 counts at 62.5 MHz, and QEMU 10, for some CPUs, at 1 GHz."""
    (mhz,) = re.findall(r"arch_timer: cp15 timer.* running at ([\d.]+)MHz", m.sh("dmesg"))
    return round(float(mhz) * 1e6)


def at_boot(at: int, frequency: int) -> dict[str, tuple[bytes | None, bool]]:
    """Values of the property in a device tree at an address, and whether a kernel is to believe them.

    `frequency` is that of the machine's counter, in Hz.
    """
    good = Property.good(at, frequency)
    hour = 3600 * good.frequency
    return {
        "right": (good.value(), True),
        "absent": (None, False),
        "empty": (b"", False),
        "short": (good.value()[:-4], False),
        "long": (good.value() + bytes(4), False),
        "another version": (replace(good, version=2).value(), False),
        "another frequency": (replace(good, frequency=good.frequency + 1).value(), False),
        "another device tree": (replace(good, fdt=at + 4096).value(), False),
        "not filled in": (replace(good, begin=0, devices=0, cpus=0, shutdown=0, copied=0, in_place=0, copy_start=0,
                                  copy_end=0).value(), False),
        "not filled in by the control page": (replace(good, copy_start=0, copy_end=0).value(), False),
        "shut down before it began": (replace(good, begin=good.shutdown + 1).value(), False),
        "CPUs off before they were stopped": (replace(good, devices=2, cpus=1).value(), False),
        "shut down before CPUs were off": (replace(good, cpus=good.shutdown + 1).value(), False),
        "copied before it began": (replace(good, copy_start=good.copy_end + 1).value(), False),
        "in the future": (replace(good, copy_end=hour).value(), False),
        "all ones": (b"\xff" * len(good.value()), False),
    }


@pytest.mark.cells(DEFAULT)
def test_what_is_not_believed(cell: Cell, lab: Lab, tmp_path: Path) -> None:
    """From a property that is malformed, or cannot be about this boot, nothing is printed."""
    assert lab.guest
    tree = qemu.device_tree(cell, tmp_path / "dtb")
    chosen = tree.root.node("chosen").properties
    boot = ["-dtb", str(tmp_path / "dtb")]

    def machine(*extra: str) -> Machine:
        return Machine(cell, lab.kernels[cell.kernel], lab.guest, extra=[*boot, *extra])  # type: ignore[arg-type]

    with machine("-S") as m:
        said = m.monitor(f"xp /1gx {BOOT_ARGUMENT:#x}")
    at = int(said.split(":")[1], 16)
    with lab.machine(cell, f"{cell.name}-frequency") as m:
        m.hello()
        frequency = counter_frequency(m)
    wrong, whole = [], Property.good(at, frequency).value()
    for name, (value, believed) in at_boot(at, frequency).items():
        chosen.pop(PROPERTY, None)
        if value is not None:
            chosen[PROPERTY] = value
        (tmp_path / "dtb").write_bytes(fdt.flatten(tree))
        with machine() as m:
            m.hello()
            said = re.findall(r"kexec: shutdown.*", m.sh("dmesg"))
            wanted = ["kexec: shutdown 0.100 ms (CPUs 0.000), copied 23.3 MiB in 0.200 ms"] if believed else []
            if [line.partition(", startup")[0] for line in said] != wanted or bool(table(m)) != believed:
                wrong.append(f"{name}: {said} {table(m)}")
            if value is not None and len(value) == len(whole) and not cleared(m):
                wrong.append(f"{name}: not cleared")
    assert not wrong


@pytest.mark.cells(DEFAULT)
def test_stale(machine: Machine) -> None:
    """What is right but for its age: a kernel that does not know the property handed it on."""
    time.sleep(3)
    frequency = counter_frequency(machine)
    load_over_running_kernel(machine, lambda at: {PROPERTY: Property.good(at, frequency).value()})
    since = len(machine.log())
    verify(machine, machine.exec(by_init=True), since)
    assert find(machine.log()[since:]) == [] and table(machine) == {}
    assert cleared(machine)


@pytest.mark.cells(replace(CELLS["4k-va48-el1"], name="4k-va48-el1-icount"))
def test_the_phases_are_all_there_is(cell: Cell, lab: Lab, tmp_path: Path) -> None:
    """They add up to what a clock outside of the CPU shows, when an instruction takes so many nanoseconds."""
    assert lab.guest
    symbols = read_symbols(lab.kernels[cell.kernel].vmlinux)

    def clock() -> int:
        return int(m.monitor(f"xp /1wx {RTC:#x}").split(":")[1], 16)

    def run_to(symbol: str, script: str = "") -> int:
        gdb.run_to(symbols[symbol], 300, str(m.console), lambda: m.begin(script) if script else None)
        return clock()

    extra = [*options(tmp_path / "gdb"), "-icount", f"shift={NS},sleep=off", "-rtc", "clock=vm"]
    with Machine(cell, lab.kernels[cell.kernel], lab.guest, extra=extra) as m:
        m.silence = 300
        m.hello()
        load_by_call(m, NO_CMA)
        since = len(m.log())
        with Gdb(tmp_path / "gdb") as gdb:
            wall = -run_to("kernel_kexec", "kexec -e")
            wall += run_to("kexec_timing_report")
            gdb.resume()
            m.generation += 1
            verify(m, m.hello(), since)
        (line,) = find(m.log()[since:])
    lab.report(f"   {line}: {line.seconds:.3f} s, from outside {wall} s")
    assert wall >= WALL
    assert line.seconds == pytest.approx(wall, rel=0.02)

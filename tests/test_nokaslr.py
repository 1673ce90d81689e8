"""The seed for KASLR is wiped where it is not used, and not handed on where it will not be.

kexec-tools refuses to make a device tree from one that has a seed. With --all this is also shown on the base.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lab import fdt
from lab.cells import CELLS, Cell, on_base
from lab.handover import handover, load, verify
from lab.kload import DEBUG, call, file_statements
from lab.machine import CommandFailed, Machine

pytestmark = pytest.mark.neighbours

OFF = CELLS["4k-va48-el1"]  # nokaslr
NEVER = CELLS["4k-va48-ima-vhe"]  # CONFIG_RANDOMIZE_BASE is not set
BASE = [replace(on_base(cell), seed=True) for cell in (OFF, NEVER)]

# The end of a command line, and whether the kernel that it is for may use a seed
LINES = {"": True, "nokaslr": False, "a\tnokaslr b": False, "nokaslr=0": True, "nonokaslr": True, "-- nokaslr": True,
         "--nokaslr nokaslr --": False}


def seed(tree: bytes) -> bytes | None:
    return fdt.parse(tree).root.node("chosen").properties.get("kaslr-seed")


@pytest.mark.parametrize("by", ["boot.loader", "kexec_file_load"])
@pytest.mark.cells(OFF, NEVER, *BASE)
def test_kexec_tools_load_without_kaslr(cell: Cell, machine: Machine, by: str) -> None:
    """Whoever made the tree of the running kernel."""
    if by == "kexec_file_load":
        load(machine, "file")
        since = len(machine.log())
        verify(machine, machine.exec(), since)
    left = seed(machine.get("/sys/firmware/fdt"))
    if not cell.kernel.patched:
        assert left and any(left)
        with pytest.raises(CommandFailed, match="kaslr-seed is not wiped to 0"):
            load(machine, "load-nocheck")
        return
    # kexec_file_load() knows about nokaslr, but not how the next kernel was configured.
    assert left == (None if by == "kexec_file_load" and cell.kernel.randomized else bytes(8))
    handover(machine, "load-nocheck")


@pytest.mark.needs("claim")
@pytest.mark.cells(OFF)
def test_only_who_may_use_it_is_given_a_seed(machine: Machine, tmp_path: Path) -> None:
    """By kexec_file_load(), which looks for a word on the command line."""
    machine.sh("fetch", timeout=300)
    dump = tmp_path / "dtb"
    for line, used in LINES.items():
        assert call(machine, file_statements("/next/Image", None, f"quiet {line}") + f"\nflags {DEBUG:#x}") == "0"
        start, size = re.findall(r"Loaded dtb at (0x\w+) bufsz=(0x\w+)", machine.sh("dmesg"))[-1]
        machine.qmp("pmemsave", val=int(start, 16), size=int(size, 16), filename=str(dump))  # it is in place
        given = seed(dump.read_bytes())
        assert (given is not None and any(given)) == used, line

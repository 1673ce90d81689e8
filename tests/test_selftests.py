"""The tests that live in the tree, built as upstream builds them, run as upstream runs them."""

from __future__ import annotations

import pytest

from lab import selftests
from lab.cells import CELLS, Cell, on_base
from lab.machine import Machine, find_complaints
from lab.selftests import Ktap, parse_ktap

pytestmark = pytest.mark.selftests

NAMES = ("4k-va48-vhe", "4k-va48-el1", "4k-va48-nvhe", "64k-va52-vhe", "64k-va52-el1", "64k-va52-nvhe",
         "4k-va48-vhe-holes", "64k-va52-el1-holes")
BASE = on_base(CELLS["4k-va48-el1"])
CHECKS = 58

# What mainline lets pass, to fault beyond the point of no return, or to be cut
IMPOSSIBLE = {
    "address 0", "the page below memory", "across the start of memory", "a device", "the page above memory",
    "across the end of memory", "far above memory", "above 2^48", "a virtual address of the linear map",
    "the last page that ends below 2^64", "a good segment and one that is not memory"}
CUT = {
    "a command line that would be cut", "the same without its last byte", "an Image with a section that ends beyond 4 GiB",
    "an Image that ends among its sections", "an Image that ends in its PE header"}
NO_IMAGE = {"an Image that ends in its header", "an Image with another magic"}  # EINVAL there, ENOEXEC here
NOMAP = {"no-map memory", "into no-map memory"}


def arguments(m: Machine) -> tuple[Ktap, Ktap]:
    """The report of run_kselftest.sh, and that of the test of arguments in it."""
    selftests.put(m)
    text = selftests.run(m)
    return parse_ktap(text), parse_ktap(text, "# ")


@pytest.mark.needs("tests")
@pytest.mark.cells(*(CELLS[name] for name in NAMES))
def test_arguments(cell: Cell, machine: Machine) -> None:
    """All that can be tried on a machine is as documented; nothing stays loaded."""
    whole, checks = arguments(machine)
    assert not checks.failed
    assert whole == Ktap(("selftests: kexec: test_kexec_arguments",), (), (), 1)
    assert checks.complete and checks.planned == CHECKS
    assert set(checks.skipped) == (set() if cell.holes else {f"{name}: there is none" for name in NOMAP})
    assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "0"
    assert not find_complaints(machine.log())


@pytest.mark.cells(BASE)
def test_arguments_on_mainline(machine: Machine) -> None:
    """Without the series what can't be executed is accepted, and nothing else fails."""
    whole, checks = arguments(machine)
    assert set(checks.failed) == IMPOSSIBLE | CUT | NO_IMAGE
    assert checks.complete and len(whole.failed) == 1


@pytest.mark.needs("tests")
@pytest.mark.cells(CELLS["4k-va48-vhe"])
def test_an_image_that_is_loaded_is_left_alone(machine: Machine) -> None:
    """The tests would replace it: they skip themselves."""
    selftests.put(machine)
    machine.sh("fetch; kexec -s -l /next/Image --initrd=/next/initrd --reuse-cmdline", timeout=300)
    assert parse_ktap(selftests.run(machine)).skipped == ("selftests: kexec: test_kexec_arguments",)
    assert machine.sh("cat /sys/kernel/kexec_loaded").strip() == "1"


REPORT = """TAP version 13
1..1
# 1..3
# ok 1 good
# # errno 0 instead of 99
# not ok 2 bad
# ok 3 # SKIP none: why
not ok 1 selftests: kexec: x # exit=1
"""


def test_reports_are_understood() -> None:
    assert parse_ktap(REPORT, "# ") == Ktap(("good",), ("bad",), ("none: why",), 3)
    assert parse_ktap(REPORT).failed == ("selftests: kexec: x # exit=1",)
    assert parse_ktap(REPORT).complete
    assert not parse_ktap(REPORT.replace("1..3", "1..4"), "# ").complete

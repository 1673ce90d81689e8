"""The matrix covers what it says it covers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest

import conftest
from lab import cells, upto
from lab.cells import A57, A72, CELLS, KERNELS, MAX, MAX_NOLPA2, VA_BITS, Cell, Kernel
from lab.errors import UsageError

ALL = list(CELLS.values())
LEVELS = ("el1", "nvhe", "vhe")
MEMORY = (512, 1537, 2048, 16384, 65536)


def test_every_kernel_at_every_exception_level() -> None:
    met = {(cell.kernel, cell.el) for cell in ALL}
    kernels = {Kernel(pages, va) for pages, all_va in VA_BITS.items() for va in all_va}
    assert {(kernel, el) for kernel in kernels for el in LEVELS} <= met


@pytest.mark.parametrize("field, values", [
    ("cpu", (A57, A72, MAX, MAX_NOLPA2)), ("cpus", (1, 2, 4)), ("memory", MEMORY), ("rodata", ("on", "noalias")),
    ("kaslr", (True, False))])
def test_every_value_several_times_and_at_every_level_that_can(field: str, values: tuple[object, ...]) -> None:
    for value in values:
        having = [cell for cell in ALL if getattr(cell, field) == value]
        levels = ("el1", "nvhe") if value in (A57, A72) else LEVELS
        assert len(having) >= 3
        assert {cell.el for cell in having} == set(levels), f"{field}={value}"


def test_every_pair_of_small_dimensions() -> None:
    dimensions = {"el": LEVELS, "cpus": (1, 2, 4), "rodata": ("on", "noalias"), "kaslr": (True, False)}
    for one, other in combinations(dimensions, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in ALL}
        missing = {(a, b) for a in dimensions[one] for b in dimensions[other]} - met
        assert not missing, f"{one} x {other}"


def test_special_machines() -> None:
    assert {cell.memory for cell in ALL if cell.rodata == "on"} >= set(MEMORY)
    assert {cell.el for cell in ALL if cell.holes} == set(LEVELS)
    assert {cell.el for cell in ALL if any(word.startswith("cma=") for word in cell.append)} == set(LEVELS)
    assert {cell.el for cell in ALL if cell.kernel.flavour == "ima"} == {"el1", "vhe"}
    for flavour in ("cfi", "mte", "efi"):
        assert {cell.el for cell in ALL if cell.kernel.flavour == flavour} == set(LEVELS)
    assert all(cell.mte == (cell.kernel.flavour == "mte") for cell in ALL)
    debug = [cell for cell in ALL if cell.kernel.flavour == "debug"]
    assert {cell.el for cell in debug} == set(LEVELS)
    assert all("panic_on_warn=1" in cell.append for cell in debug)
    assert any("arm64.nolva" in cell.append for cell in ALL if cell.kernel == Kernel(64, 52))


@pytest.mark.parametrize("entry", ALL, ids=list(CELLS))
def test_a_cpu_can_do_what_its_cell_asks(entry: Cell) -> None:
    assert CELLS[entry.name] is entry
    assert entry.name.startswith(entry.kernel.name + "-" + entry.el)
    if entry.cpu in (A57, A72):
        assert entry.el != "vhe"
        assert entry.kernel.pages != 16
    if entry.cpu.startswith("max"):
        assert ("kvm-arm.mode=nvhe" in entry.append) == (entry.el == "nvhe")


def test_a_plain_check_needs_two_kernels_and_meets_every_level() -> None:
    core = [cell for cell in ALL if cell.core]
    assert {cell.kernel.name for cell in core} == {"4k-va48", "64k-va52"}
    assert {(cell.kernel.name, cell.el) for cell in core} == {(k, el) for k in ("4k-va48", "64k-va52") for el in LEVELS}
    assert cells.DEFAULT in core


@pytest.mark.parametrize("name", ["4k-va48", "4k-va48-cfi", "4k-va48-mte"])
def test_the_unpatched_kernel_is_there_to_compare_with(name: str) -> None:
    assert KERNELS[f"{name}-base"] == replace(KERNELS[name], patched=False)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no cell is called 'nope'") as raised:
        cells.cell("nope")
    assert cells.DEFAULT.name in raised.value.hint
    with pytest.raises(UsageError, match="no kernel is called '8k-va48'") as raised:
        cells.kernel("8k-va48")
    assert "64k-va52" in raised.value.hint


def item(*marks: pytest.MarkDecorator) -> SimpleNamespace:
    """As much of a test as on_this_base() looks at."""
    return SimpleNamespace(iter_markers=lambda name: (one.mark for one in marks if one.name == name))


@pytest.mark.parametrize("lacks, left", [((), True), (("cma-segments",), False), (("kho",), True)])
def test_what_a_base_lacks_is_left_out(lacks: tuple[str, ...], left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest.base, "source", lambda: SimpleNamespace(base=SimpleNamespace(lacks=lacks)))
    there = [item(), item(pytest.mark.needs("cma-segments")), item(pytest.mark.needs("liveupdate"), pytest.mark.cells())]
    assert conftest.on_this_base(there) == (there if left else [there[0], there[2]])


@pytest.mark.parametrize("group, left", [("", 4), ("1-fixes", 2), ("2-arm64", 3), ("6-tests", 4)])
def test_what_needs_a_later_group_is_left_out(group: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(upto.CHOSEN, group)
    monkeypatch.setattr(conftest.base, "source", lambda: SimpleNamespace(base=SimpleNamespace(lacks=())))
    there = [item(), item(pytest.mark.needs("fixes")), item(pytest.mark.needs("arm64", "cma-segments")),
             item(pytest.mark.needs("claim"), pytest.mark.needs("arm64"))]
    assert conftest.on_this_base(there) == there[:left]
    assert upto.has("arm64") == (left > 2)
    with pytest.raises(AssertionError, match="what there is not"):
        conftest.on_this_base([item(pytest.mark.needs("arm46"))])


@pytest.mark.parametrize("name", ["2-arm64", "2", "arm64"])
def test_a_group_is_found(name: str) -> None:
    assert upto.find(name) == "2-arm64"
    with pytest.raises(UsageError, match="no group is called 'arm46'") as raised:
        upto.find("arm46")
    assert "1-fixes 2-arm64" in raised.value.hint

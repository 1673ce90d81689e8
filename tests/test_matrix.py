"""Every kind of machine hands over, some times in a row."""

from __future__ import annotations

from typing import Iterable

import pytest

from lab.cells import CELLS, Cell, on_base
from lab.handover import LOADERS, Handover, handover
from lab.machine import Machine

TABLES = 16  # pages, whatever the memory
PLAIN = ("4k-va48-vhe", "4k-va48-nvhe", "4k-va48-el1", "64k-va52-vhe", "64k-va52-nvhe", "64k-va52-el1")
MAINLINE = [on_base(CELLS[name]) for name in ("4k-va48-vhe-512m", "4k-va48-vhe-1537m", "4k-va48-vhe",
                                              "4k-va48-vhe-16g", "4k-va48-vhe-64g")]


def has_cma(cell: Cell) -> bool:
    return any(word.startswith("cma=") for word in cell.append)


def chain(m: Machine, loaders: Iterable[str] = LOADERS) -> list[Handover]:
    """Hand over by each loader in turn; the tables are also counted from outside where that can be done."""
    done = []
    for loader in loaders:
        one = handover(m, loader, count_pages=loader == "load-nocheck" and not has_cma(m.boot.cell))
        m.report(f"   {m.boot.cell.name}: {one}")
        done.append(one)
    return done


@pytest.mark.needs("arm64")
@pytest.mark.handover
@pytest.mark.matrix
@pytest.mark.cells(*(CELLS[name] for name in PLAIN))
def test_every_loader_at_every_exception_level(machine: Machine) -> None:
    for one in chain(machine):
        assert one.table_pages is not None and one.table_pages <= TABLES


@pytest.mark.needs("arm64")
@pytest.mark.matrix
@pytest.mark.cells(*(cell for cell in CELLS.values() if cell.name not in PLAIN))
def test_every_machine(cell: Cell, machine: Machine, request: pytest.FixtureRequest) -> None:
    """By each loader; in a plain check by the one that moves most, and where there is CMA by the one that is for."""
    plain = ["load-nocheck", *["file"] * has_cma(cell)]
    for one in chain(machine, LOADERS if request.config.getoption("--all") else plain):
        assert one.table_pages is not None and one.table_pages <= TABLES


@pytest.mark.matrix
@pytest.mark.cells(*MAINLINE)
def test_what_mainline_needs(cell: Cell, machine: Machine) -> None:
    """The peer, under the same conditions: a page of tables per 2 MiB, and our counting sees them."""
    one = handover(machine, "load-nocheck", count_pages=True)
    machine.report(f"   {cell.name}: {one.table_pages} table pages")
    assert one.table_pages is not None and one.table_pages >= cell.memory // 2

"""Options, cells, and guests for the tests.

A test that takes `cell` runs once per cell: those named by its `cells` mark,
or all; of these the core ones, or with --all every one. Kernels for them are
built before the first test.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Callable, ContextManager, Iterator

import pytest

from lab import base, build, cells, guest, host, lock, say
from lab.build import Built
from lab.cells import Cell, Kernel
from lab.guest import Guest
from lab.handover import verify_first
from lab.machine import OUT_LOCK, Machine


@dataclass
class Lab:
    """What was built for the tests that were selected."""

    accel: str
    report: Callable[[str], None]
    kernels: dict[Kernel, Built] = field(default_factory=dict)
    guest: Guest | None = None

    def machine(self, cell: Cell, name: str) -> Machine:
        """A machine for `cell`, to be started by `with`; its log gets `name`."""
        assert self.guest
        return Machine(cell, self.kernels[cell.kernel], self.guest, accel=self.accel, name=name, report=self.report)


LAB: pytest.StashKey[Lab] = pytest.StashKey()
HELD: pytest.StashKey[ExitStack] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kexec-lab")
    group.addoption("--all", action="store_true", help="every cell instead of two kernels' worth")
    group.addoption("--accel", choices=("tcg", "kvm"), default="tcg", help="how QEMU runs the guests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cells(*cells): the cells that a test may run on")
    config.addinivalue_line("markers", "long: too long for a plain check, runs with --all")
    config.stash[HELD] = ExitStack()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[HELD].close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("cells")
    chosen = [cell for cell in (mark.args if mark else cells.CELLS.values())
              if (cell.core or metafunc.config.getoption("--all"))
              and (cell.el == "el1" or metafunc.config.getoption("--accel") == "tcg")]
    metafunc.parametrize("cell", [pytest.param(cell, id=cell.name) for cell in chosen])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    # Without cells in this run pytest leaves a parametrized test behind, to be skipped.
    items[:] = [item for item in items
                if "cell" not in getattr(item, "fixturenames", ()) or isinstance(_cell(item), Cell)]


def _cell(item: pytest.Item) -> object:
    return item.callspec.params.get("cell") if hasattr(item, "callspec") else None


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    wanted = [cell for cell in map(_cell, session.items) if isinstance(cell, Cell)]
    if config.option.collectonly or not wanted:
        return
    with _uncaptured(config):
        print()
        host.require("boot")
        config.stash[HELD].enter_context(lock.held(OUT_LOCK, "this checkout's out/"))
        lab = config.stash[LAB] = Lab(config.getoption("--accel"), lambda text: _report(config, text))
        source = base.source()
        for kernel in dict.fromkeys(cell.kernel for cell in wanted):
            lab.kernels[kernel] = build.build(kernel, source)
        lab.guest = guest.build()


def _uncaptured(config: pytest.Config) -> ContextManager[None]:
    return config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled()


def _report(config: pytest.Config, text: str) -> None:
    with _uncaptured(config):
        print()
        say.info(text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Machine.starts:
        terminalreporter.write_line(f"{Machine.boots} kernels came up, in {Machine.starts} starts of QEMU")


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Lab:
    return request.config.stash[LAB]


@pytest.fixture
def machine(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A guest of `cell` with its first kernel up."""
    with lab.machine(cell, re.sub(r"[^\w.-]+", ".", request.node.name).strip(".")) as m:
        verify_first(m, m.hello())
        yield m

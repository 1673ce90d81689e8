"""Options, cells, and guests for the tests.

A test that takes `cell` runs once per cell: those named by its `cells` mark,
or all; of these the core ones, or with --all every one. Kernels for them are
built before the first test: by the process that runs the tests, or, when
several do (pytest -n), by a run with --build-only before them.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Callable, ContextManager, Iterator

import pytest

from lab import base, build, cells, guest, host, lock, paths, qemu, say, upto
from lab.base import Source
from lab.build import Built
from lab.cells import Cell, Kernel
from lab.errors import LabError, UsageError
from lab.guest import Guest
from lab.handover import verify_first
from lab.machine import Machine


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
SAID: pytest.StashKey[list[str]] = pytest.StashKey()  # by the test that runs, where nobody sees it being said
COUNTS = ("boots", "starts")  # of Machine
SMALL = 8 << 20  # bytes of payload in a plain check: a quarter, so that more can be handed over in the same time


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kexec-lab")
    group.addoption("--all", action="store_true", help="every cell instead of two kernels' worth")
    group.addoption("--accel", choices=("tcg", "kvm"), default="tcg", help="how QEMU runs the guests")
    group.addoption("--build-only", action="store_true", help="build what the tests need, and run none")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cells(*cells): the cells that a test may run on")
    config.addinivalue_line("markers", "needs(*what): of lab.bases.FEATURES, or groups of patches, without which a test "
                            "is left out")
    config.addinivalue_line("markers", "long: too long for a plain check, runs with --all")
    config.stash[HELD] = ExitStack()
    config.stash[SAID] = []
    if not _is_worker(config) and not config.option.collectonly:
        config.stash[HELD].enter_context(lock.held(paths.OUT_LOCK, "this checkout's out/"))


def _is_worker(config: pytest.Config) -> bool:
    """Is this one of several processes that run the tests, which another one starts?"""
    return hasattr(config, "workerinput")


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


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks at the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items[:] = on_this_base(items)
    if upto.chosen():  # the rest was tested without a kernel, or with none of ours
        items[:] = [item for item in items if isinstance(_cell(item), Cell) and _cell(item).kernel.patched]
    if not config.option.collectonly:
        items[:] = with_a_qemu(items, lambda text: _is_worker(config) or say.info(text))
    # Without cells in this run pytest leaves a parametrized test behind, to be skipped.
    items[:] = [item for item in items
                if "cell" not in getattr(item, "fixturenames", ()) or isinstance(_cell(item), Cell)]
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
    # The long ones first, so that nobody waits for the last of them.
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("xdist_group", "long"))))


def on_this_base(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests that need nothing which the base, or this part of the series, lacks."""
    needs = [{feature for mark in item.iter_markers("needs") for feature in mark.args} for item in items]
    assert not set().union(*needs) - set(upto.marks()), "a mark needs what there is not"
    lacks = set(base.source().base.lacks) | upto.lacking() if any(needs) else set()
    return [item for item, features in zip(items, needs) if not features & lacks]


def with_a_qemu(items: list[pytest.Item], tell: Callable[[str], object]) -> list[pytest.Item]:
    """The tests for whose cells a QEMU is to be had; `tell` gets a line for each version that is not.

    Raises UsageError when QEMU= names one that is too old.
    """
    without = set()
    for wanted in sorted({qemu.versions(cell) for cell in map(_cell, items) if isinstance(cell, Cell)} - {(0, 0)}):
        try:
            qemu.program(*wanted)
        except UsageError:
            raise
        except LabError as error:
            without.add(wanted)
            tell(f"left out is what takes QEMU {wanted[0]}: {error.message}")
    return [item for item in items
            if not isinstance(cell := _cell(item), Cell) or qemu.versions(cell) not in without]


def _group(item: pytest.Item) -> str:
    """What one process has to run because it shares a machine or a tree; '' for any process."""
    if "source" in getattr(item, "fixturenames", ()) and (item.get_closest_marker("series") or item.get_closest_marker("lint")):
        return "trees"
    cell = _cell(item)
    return f"faults.{cell.name}" if item.get_closest_marker("faults") and isinstance(cell, Cell) else ""


def _cell(item: pytest.Item) -> object:
    return item.callspec.params.get("cell") if hasattr(item, "callspec") else None


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    wanted = [cell for cell in map(_cell, session.items) if isinstance(cell, Cell)]
    if config.option.collectonly or not wanted:
        return
    make = build.find if _is_worker(config) else build.build
    with _uncaptured(config):
        print()
        host.require("boot")
        lab = config.stash[LAB] = Lab(config.getoption("--accel"), lambda text: _report(config, text))
        source = base.source()
        say.info(str(source))
        for kernel in dict.fromkeys(cell.kernel for cell in wanted):
            lab.kernels[kernel] = make(kernel, source)
        lab.guest = guest.build(guest.PAYLOAD if config.getoption("--all") else SMALL)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    return True if session.config.getoption("--build-only") else None


def _uncaptured(config: pytest.Config) -> ContextManager[None]:
    return config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled()


def _report(config: pytest.Config, text: str) -> None:
    if _is_worker(config):
        config.stash[SAID].append(text)
        return
    with _uncaptured(config):
        print()
        say.info(text)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A worker's words travel with the report of the test that said them."""
    outcome = yield
    said = item.config.stash[SAID]
    outcome.get_result().user_properties.extend(("said", text) for text in said)  # type: ignore[attr-defined]
    said.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not hasattr(report, "node"):
        return  # was said when it happened
    for text in (value for name, value in report.user_properties if name == "said"):
        print()
        say.info(text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_worker(session.config):
        session.config.workeroutput |= {name: getattr(Machine, name) for name in COUNTS}  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    for name in COUNTS:
        setattr(Machine, name, getattr(Machine, name) + getattr(node, "workeroutput", {}).get(name, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Machine.starts:
        terminalreporter.write_line(f"{Machine.boots} kernels came up, in {Machine.starts} starts of QEMU")


@pytest.fixture(scope="session")
def source() -> Source:
    """The base."""
    return base.source()


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Lab:
    return request.config.stash[LAB]


def name_of(request: pytest.FixtureRequest) -> str:
    """What a machine of this test, with these parameters, is called. Two of one name would share a console."""
    return re.sub(r"[^\w.-]+", ".", request.node.name).strip(".")


@pytest.fixture
def start(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Starts a guest of `cell` with the options that it is given; its first kernel is up."""
    with ExitStack() as stack:
        def machine(*extra: str) -> Machine:
            assert lab.guest
            m = stack.enter_context(Machine(cell, lab.kernels[cell.kernel], lab.guest, accel=lab.accel,
                                            name=name_of(request), report=lab.report, extra=extra))
            verify_first(m, m.hello())
            return m

        yield machine


@pytest.fixture
def machine(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A guest of `cell` with its first kernel up."""
    with lab.machine(cell, name_of(request)) as m:
        verify_first(m, m.hello())
        yield m

"""Suites of others that exercise kexec on arm64: with the series they end as they do without it."""

from __future__ import annotations

import pytest

from lab import selftests, tree
from lab.base import Source

CASES = {"kho": ("kho",)} | {name: ("liveupdate", "-T", name) for name in (
    "luo_kexec_simple", "luo_multi_session", "luo_stress_files", "luo_stress_sessions")}


@pytest.mark.selftests
@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.xdist_group("upstream")  # which shares a folder per suite
@pytest.mark.parametrize("virtualization", (False, True), ids=("el1", "el2"))
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs("kho" if name == "kho" else "liveupdate"))
                                  for name in CASES])
def test_same_as_mainline(name: str, virtualization: bool, source: Source) -> None:
    """Also at EL2, where upstream never runs them."""
    suite, *arguments = CASES[name]
    base, ours = (selftests.vmtest(suite, srctree, home / "build" / f"upstream-{suite}", arguments, virtualization)
                  for srctree, home in ((source.tree, source.home), (tree.patched(source), tree.home(source))))
    assert base == ours
    assert len(ours.passed) == 1

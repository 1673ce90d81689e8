"""The mutants fit the code that they break."""

from __future__ import annotations

import pytest

from lab import mutants, paths
from lab.errors import LabError, UsageError
from lab.mutants import MUTANTS, VARIABLE, Mutant
from lab.series import File, read

FEWEST = 25


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_it_changes_one_place(mutant: Mutant) -> None:
    content = read(paths.ROOT / mutant.path).content
    assert mutant.apply(content) != content


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= FEWEST


def test_only_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {mutant.path: read(paths.ROOT / mutant.path) for mutant in MUTANTS.values()}
    monkeypatch.delenv(VARIABLE, raising=False)
    assert mutants.mutate(files) == files
    monkeypatch.setenv(VARIABLE, "wrong-el")
    changed = {path for path, file in mutants.mutate(files).items() if file != files[path]}
    assert changed == {MUTANTS["wrong-el"].path}


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nope")
    with pytest.raises(UsageError, match="no mutant is called 'nope'"):
        mutants.mutate({})
    monkeypatch.setenv(VARIABLE, "wrong-el")
    with pytest.raises(LabError, match="wrong-el.*stands 0 times"):
        mutants.mutate({MUTANTS["wrong-el"].path: File(b"something else\n")})

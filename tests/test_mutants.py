"""The mutants fit the code that they break."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Sequence

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


@pytest.mark.parametrize("line, test", [
    ("FAILED tests/test_bench.py::test_relocation[4k-va48-el1-bench] - assert 1 == 0",
     "tests/test_bench.py::test_relocation[4k-va48-el1-bench]"),
    ("FAILED tests/test_faults.py::test_every_vector_names_itself[4k-va48-el1-sp0 serror]@faults.4k-va48-el1",
     "tests/test_faults.py::test_every_vector_names_itself[4k-va48-el1-sp0 serror]"),
    ("ERROR tests/test_crc.py::test_change - LabError: no", "tests/test_crc.py::test_change"),
    ("1 passed", "")])
def test_what_failed_is_named_as_it_is_asked_for(line: str, test: str) -> None:
    assert mutants.first_failure(f"some\nwords\n{line}\nand more") == test


class Runs:
    """In place of the laboratory's own commands: what each of them finds, in turn."""

    def __init__(self, *findings: str) -> None:
        self.findings, self.asked = list(findings), []

    def __call__(self, words: Sequence[str], *_: object) -> str:
        self.asked.append(" ".join(words))
        return self.findings.pop(0)


def test_what_does_not_build_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="unused"))
    with pytest.raises(LabError, match="the mutant wrong-el does not build"):
        mutants.judge(MUTANTS["wrong-el"])


def test_what_fails_once_is_no_killer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out from then on, and another test has to notice; or nobody does."""
    monkeypatch.setattr(mutants.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(mutants, "_first_failure", runs := Runs("tests/a", "", "tests/b", "tests/b"))
    death = mutants.judge(MUTANTS["wrong-el"])
    assert (death.killer, death.once) == ("tests/b", ("tests/a",))
    assert runs.asked[1] == "--jobs 1 tests/a" and runs.asked[2].endswith("--deselect=tests/a")
    monkeypatch.setattr(mutants, "_first_failure", runs := Runs("tests/a", "", "", ""))
    death = mutants.judge(MUTANTS["wrong-el"])
    assert (death.killer, death.once) == ("", ("tests/a",)) and len(runs.asked) == 4

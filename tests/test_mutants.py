"""The mutants fit the code that they break."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Sequence

import pytest

from lab import mutants, operations, paths, series
from lab.base import Source
from lab.errors import LabError, UsageError
from lab.mutants import MUTANTS, VARIABLE, Mutant
from lab.series import File

FEWEST = 25


@pytest.fixture(scope="module")
def files(source: Source) -> dict[str, File]:
    """What the series makes of the files that it touches."""
    made = series.result(series.load(source.base), source.tree)
    return {path: file for path, file in made.items() if file}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_it_changes_one_place(mutant: Mutant, files: dict[str, File]) -> None:
    content = files[mutant.path].content
    assert mutant.apply(content) != content


ASSEMBLY = """
/* a dsb sy in a comment */
1:	ic	iallu			// the isb is not here
	dsb	nsh
	isb
	msr	sctlr_el1, x0
	isb				// again
	dcache_by_myline_op_nosync civac, x8, x1, x24, x0
	raw_dcache_line_size x24, x0
"""
C = """
static void f(void)
{
	/* dsb(sy); */
	dcache_clean_inval_poc((unsigned long)page,
			       (unsigned long)(page + 1));
	dsb(ishst);
	isb();
}
"""


@pytest.mark.parametrize("path, text, whats, instead", [
    ("a.S", ASSEMBLY, ["ic iallu", "dsb nsh", "isb", "isb", "dcache_by_myline_op_nosync civac, x8, x1, x24, x0"], "nop"),
    ("a.c", C, ["dcache_clean_inval_poc", "dsb", "isb"], "")])
def test_every_operation_is_found_by_itself(path: str, text: str, whats: list[str], instead: str) -> None:
    found = list(operations.find(path, text))
    assert [one.what for one in found] == whats
    for one in found:
        assert text.count(one.old) == 1 and one.new.rstrip().endswith(instead)
        assert len(list(operations.find(path, text.replace(one.old, one.new)))) == len(found) - 1


def test_those_of_the_series_are_found() -> None:
    """In owned files all that a plain search for the words finds, and what patches add to a file of upstream's."""
    found = operations.everywhere(paths.ROOT)
    assert len({one.name for one in found}) == len(found)
    by_path = Counter(one.path for one in found)
    copied = (paths.ROOT / mutants.ASM).read_text()
    assert by_path[mutants.ASM] == len(re.findall(
        r"^(?:\w+:)?\t(?:isb|dsb|dmb|dc|ic|tlbi|dcache_by|break_before|pre_disable_mmu)", copied, re.MULTILINE))
    assert by_path["arch/arm64/kvm/arm.c"] == 1 and by_path["drivers/irqchip/irq-gic-v3-its.c"] == 2


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= FEWEST


def test_only_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, files: dict[str, File]) -> None:
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

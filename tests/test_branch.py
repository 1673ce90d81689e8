"""The series in a git repository, edited there as people do, and read back."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Callable

import pytest

import toy
from lab import branch, paths, series
from lab.base import Source
from lab.errors import LabError

pytestmark = pytest.mark.series

THIRD: toy.Files = {toy.NEW: (toy.FIRST[toy.NEW] or "").replace("line 5\n", "line 5\nof the third\n"),
                    toy.HOOKED: (toy.FIRST[toy.HOOKED] or "") + "end\n"}
STEPS = (*toy.STEPS, ("0003-later", "arm64: mm: Go on\n\nBecause.\n", THIRD))
Toys = tuple[Source, Path, Path]


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toys:
    """A base, a checkout with three patches for it, and a repository made from that."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    root, folder = tmp_path / "checkout", tmp_path / "branch"
    source = toy.make(tmp_path / "linux", root, STEPS)
    (source.tree / ".gitignore").write_text("*.o\n/*\n!/debian/\n")  # as Debian has it
    branch.to(series.load(root=root), source, folder)
    return source, root, folder


def to(toys: Toys) -> str:
    return branch.to(series.load(root=toys[1]), toys[0], toys[2])


def back(toys: Toys) -> list[str]:
    """Read the branch, and check that the checkout is then as it should be."""
    changes = branch.back(series.load(root=toys[1]), toys[0], toys[2])
    the_series = series.load(root=toys[1])
    series.check(the_series, toys[0].tree)
    for path in the_series.owned:
        assert series.read_if_there(toys[2] / path) == series.read_if_there(toys[1] / path), path
    assert "up to date" in to(toys) and "nothing but the series" in to(toys)
    return changes


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and ".git" not in path.parts}


def rebase(folder: Path, *edits: str) -> subprocess.CompletedProcess[str]:
    """git rebase -i from the base with the list of commits edited by sed."""
    editor = "sed -i " + " ".join(f"-e '{edit}'" for edit in edits)
    env = os.environ | {"GIT_SEQUENCE_EDITOR": editor, "GIT_AUTHOR_NAME": "Jane", "GIT_AUTHOR_EMAIL": "jane@localhost",
                        "GIT_COMMITTER_NAME": "Jane", "GIT_COMMITTER_EMAIL": "jane@localhost"}
    return subprocess.run(["git", "rebase", "-i", "base"], cwd=folder, env=env, text=True, capture_output=True)


def amend(folder: Path, files: toy.Files, *options: str) -> None:
    toy.write(folder, files)
    toy.git(folder, "add", "-A")
    toy.git(folder, "commit", "-q", "--amend", *(options or ("--no-edit",)))


def subjects(root: Path) -> list[str]:
    return [patch.subject for patch in series.load(root=root).patches]


def test_the_repository(toys: Toys) -> None:
    source, root, folder = toys
    assert toy.git(folder, "log", "--reverse", "--format=%s", "base..series").splitlines() == ["arm64: A toy", *subjects(root)]
    assert toy.git(folder, "log", "-1", "--format=%B%an", "series").strip() == "arm64: mm: Go on\n\nBecause.\nPatch Series"
    assert toy.git(folder, "status", "--porcelain") == ""
    for path, text in {**toy.BASE, **toy.FIRST, **toy.SECOND, **THIRD}.items():
        assert ((folder / path).read_text() if (folder / path).is_file() else None) == text


def test_a_round_trip_changes_nothing(toys: Toys) -> None:
    before, tip = content(toys[1]), toy.git(toys[2], "rev-parse", "series")
    assert back(toys) == []
    assert "up to date" in to(toys)
    assert content(toys[1]) == before and toy.git(toys[2], "rev-parse", "series") == tip


@pytest.mark.timeout(900)
def test_a_round_trip_of_the_real_series_changes_nothing(source: Source, tmp_path: Path) -> None:
    """On the files that it touches, as a whole tree takes a minute; each commit made anew by git am."""
    root = tmp_path / "checkout"
    the_series = series.load(source.base)
    for name in (*the_series.owned, *(str(path.relative_to(paths.ROOT)) for top in ("series", source.base.patches)
                                      for path in (paths.ROOT / top).rglob("*") if path.is_file())):
        toy.write(root, {name: (paths.ROOT / name).read_text()})
        (root / name).chmod((paths.ROOT / name).stat().st_mode)
    few = tmp_path / "few"
    for path in ("Makefile", *the_series.touched):
        if (source.tree / path).is_file():
            toy.write(few, {path: (source.tree / path).read_text()})
            (few / path).chmod((source.tree / path).stat().st_mode)
    part = Source(source.base, few, source.version, source.package, source.key, source.home)
    before = content(root)
    branch.to(series.load(source.base, root), part, tmp_path / "branch")
    toy.git(tmp_path / "branch", "reset", "-q", "--hard", "base")
    for group in the_series.groups:
        toy.git(tmp_path / "branch", "commit", "-q", "--allow-empty", "-m", group.message)
        toy.git(tmp_path / "branch", "am", "-q", *(str(root / source.base.patches / f"{patch.name}.patch")
                                                   for patch in group.patches))
    assert branch.back(series.load(source.base, root), part, tmp_path / "branch") == []
    assert content(root) == before


def test_a_patch_in_the_middle_is_amended(toys: Toys) -> None:
    _, root, folder = toys
    assert rebase(folder, "2s/pick/edit/").returncode == 0
    amend(folder, {toy.NEW: (toy.FIRST[toy.NEW] or "").replace("line 9", "line nine")})
    toy.git(folder, "rebase", "--continue")
    assert back(toys) == ["1-toy/0001-hook: changed", f"{toy.NEW}: changed"]
    assert "line nine" in (root / toy.NEW).read_text()
    assert "+line nine" in (root / "patches/1-toy/0001-hook.patch").read_text()


def test_a_patch_is_reworded(toys: Toys) -> None:
    _, root, folder = toys
    toy.git(folder, "commit", "-q", "--amend", "-m", "arm64: mm: Go further\n\nFor a reason.")
    assert back(toys) == ["1-toy/0003-later: reworded"]
    assert (root / "series/1-toy/0003-later/message").read_text() == "arm64: mm: Go further\n\nFor a reason.\n"


def test_patches_are_swapped(toys: Toys) -> None:
    _, root, folder = toys
    assert rebase(folder, "3{h;d}", "4{G}").returncode == 0
    assert len(back(toys)) == 1
    assert subjects(root) == ["arm64: mm: Hook in", "arm64: mm: Go on", "arm64: mm: Replace"]
    assert sorted(path.name for path in (root / "series/1-toy").glob("0*")) == ["0001-hook", "0002-later", "0003-replace"]


def test_a_patch_in_the_middle_adds_a_file(toys: Toys) -> None:
    _, root, folder = toys
    assert rebase(folder, "2s/pick/edit/").returncode == 0
    toy.write(folder, {"arch/arm64/mm/more.c": "more\n"})
    toy.git(folder, "add", "-A")
    toy.git(folder, "commit", "-q", "-m", "arm64: mm: Add more, and more\n\nThere was room.")
    toy.git(folder, "rebase", "--continue")
    assert back(toys) == ["1-toy/0002-add-more-and-more: new", "arch/arm64/mm/more.c: new"]
    assert (root / "arch/arm64/mm/more.c").read_text() == "more\n"
    message = (root / "series/1-toy/0002-add-more-and-more/message").read_text()
    assert message == "arm64: mm: Add more, and more\n\nFrom: Jane <jane@localhost>\n\nThere was room.\n"
    mail = (root / "patches/1-toy/0002-add-more-and-more.patch").read_text()
    assert "\nFrom: Jane <jane@localhost>\n" in mail and mail.count("From: Jane") == 1
    assert toy.git(folder, "log", "-1", "--format=%an%n%b", "series~2").split() == ["Jane", "There", "was", "room."]


def test_a_patch_is_dropped(toys: Toys) -> None:
    _, root, folder = toys
    assert rebase(folder, "3d").returncode == 0
    assert back(toys) == ["1-toy/0002-replace: gone", f"{toy.OLD}: gone"]
    assert not (root / toy.OLD).exists() and [patch.slug for patch in series.load(root=root).patches] == ["hook", "later"]


def test_a_group_begins_with_its_cover_letter(toys: Toys) -> None:
    """A second group, a patch that changes over to it, and a letter that is reworded."""
    source, root, folder = toys
    assert rebase(folder, "4s/^/break\\n/").returncode == 0
    toy.git(folder, "commit", "-q", "--allow-empty", "-m", "[RFC] arm64: More of it\n\nMay we?")
    toy.git(folder, "rebase", "--continue")
    assert back(toys) == ["2-more-of-it: new", "2-more-of-it/0001-later: moved, was 1-toy/0003-later"]
    assert [group.name for group in series.load(root=root).groups] == ["1-toy", "2-more-of-it"]
    mail = (root / "patches/2-more-of-it/0001-later.patch").read_text()
    assert "Subject: [RFC PATCH 1/1] arm64: mm: Go on\n" in mail
    assert "Subject: [PATCH 2/2] " in (root / "patches/1-toy/0002-replace.patch").read_text()
    cover = (root / "patches/2-more-of-it" / series.COVER_LETTER).read_text()
    assert "Subject: [RFC PATCH 0/1] arm64: More of it\n\nMay we?\n\nPatches (1):\n  arm64: mm: Go on\n" in cover
    assert " 2 files changed, 2 insertions(+)" in cover

    assert rebase(folder, "4d").returncode == 0
    assert back(toys) == ["2-more-of-it: gone", "1-toy/0003-later: moved, was 2-more-of-it/0001-later"]
    assert not (root / "patches/2-more-of-it").exists() and not (root / "series/2-more-of-it").exists()


def test_a_fixup_is_squashed(toys: Toys) -> None:
    _, root, folder = toys
    toy.write(folder, {toy.NEW: (folder / toy.NEW).read_text().replace("line 1\n", "line one\n")})
    toy.git(folder, "commit", "-q", "-a", "--fixup", ":/Hook in")
    toy.git(folder, "-c", "sequence.editor=true", "rebase", "-q", "-i", "--autosquash", "base")
    assert back(toys) == ["1-toy/0001-hook: changed", f"{toy.NEW}: changed"]


def test_an_edit_in_the_checkout_comes_to_the_branch(toys: Toys) -> None:
    """Before patches/ is regenerated, too."""
    _, root, folder = toys
    (root / toy.NEW).write_text((root / toy.NEW).read_text().replace("line 1\n", "line one\n"))
    assert "has the 3 patches" in to(toys)
    assert "line one" in toy.git(folder, "show", f"series~2:{toy.NEW}")


def test_both_sides_have_changed(toys: Toys) -> None:
    """The branch stays as it is, and gets the other beside it; who has brought them together says so."""
    _, root, folder = toys
    (root / toy.NEW).write_text((root / toy.NEW).read_text().replace("line 1\n", "line one\n"))
    toy.git(folder, "commit", "-q", "--amend", "-m", "arm64: mm: Go further\n\nFor a reason.")
    before, tip = content(root), toy.git(folder, "rev-parse", "series")
    with pytest.raises(LabError, match="older state of the series") as raised:
        back(toys)
    assert "--to" in raised.value.hint
    with pytest.raises(LabError, match="which stays as it is") as raised:
        to(toys)
    assert content(root) == before and toy.git(folder, "rev-parse", "series") == tip
    range_diff, update = re.findall(r"git (range-diff [^']+)'|git (update-ref .*)$", raised.value.hint)
    assert "line one" in toy.git(folder, *range_diff[0].split()) and "Go further" in toy.git(folder, *range_diff[0].split())

    toy.git(folder, "rebase", "-q", "--onto", "series-now~1", "series~1", "series")
    toy.git(folder, *update[1].split())
    assert back(toys) == ["1-toy/0003-later: reworded"]
    assert "line one" in (root / toy.NEW).read_text()


def unfinished(folder: Path) -> None:
    (folder / toy.NEW).write_text("unfinished\n")


def stopped(folder: Path) -> None:
    assert rebase(folder, "1s/pick/break\\npick/").returncode == 0


def elsewhere(folder: Path) -> None:
    toy.git(folder, "checkout", "-q", "-b", "other")


def merged(folder: Path) -> None:
    toy.git(folder, "checkout", "-q", "-b", "side", "base")
    toy.git(folder, "commit", "-q", "--allow-empty", "-m", "aside")
    toy.git(folder, "checkout", "-q", "series")
    toy.git(folder, "merge", "-q", "-m", "merge", "side")


def emptied(folder: Path) -> None:
    toy.git(folder, "commit", "-q", "--allow-empty", "-m", "arm64: mm: Do nothing")


def headless(folder: Path) -> None:
    assert rebase(folder, "1d").returncode == 0


def nameless(folder: Path) -> None:
    amend(folder, {}, "-m", "subject\ntext right below it", "--cleanup=verbatim")


@pytest.mark.parametrize("work, complaint", [
    (unfinished, "not committed:\n.*new.c"), (stopped, "rebase is under way"), (elsewhere, "has other checked out"),
    (merged, "no line of patches"), (emptied, "without patches behind it"), (headless, "in front of all cover letters"), (nameless, "does not begin with a subject")])
def test_what_is_not_read(toys: Toys, work: Callable[[Path], None], complaint: str) -> None:
    _, root, folder = toys
    work(folder)
    before, there = content(root), (content(folder), toy.git(folder, "rev-parse", "series"))
    with pytest.raises(LabError, match=complaint):
        back(toys)
    assert content(root) == before and (content(folder), toy.git(folder, "rev-parse", "series")) == there


@pytest.mark.parametrize("work", [unfinished, stopped, elsewhere])
def test_what_is_not_written_to(toys: Toys, work: Callable[[Path], None]) -> None:
    _, root, folder = toys
    work(folder)
    (root / toy.NEW).write_text((root / toy.NEW).read_text().replace("line 1\n", "line one\n"))
    there = content(folder), toy.git(folder, "rev-parse", "series")
    with pytest.raises(LabError):
        to(toys)
    assert (content(folder), toy.git(folder, "rev-parse", "series")) == there


def test_no_such_repository(toys: Toys, tmp_path: Path) -> None:
    toy.write(tmp_path / "mine", {"notes": "keep\n"})
    for work in (branch.to, branch.back):
        with pytest.raises(LabError, match="is no repository that"):
            work(series.load(root=toys[1]), toys[0], tmp_path / "mine")
    assert content(tmp_path / "mine") == {"notes": b"keep\n"}


def test_another_base(toys: Toys, tmp_path: Path) -> None:
    source, root, folder = toys
    newer = Source(source.base, source.tree, "7.3.5", source.package, source.key, source.home)
    with pytest.raises(LabError, match="is on Linux 7.3.4 .* now on Linux 7.3.5"):
        branch.to(series.load(root=root), newer, folder)

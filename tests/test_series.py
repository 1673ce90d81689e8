"""patches/ is what series/ and the owned files give, applies, and builds patch by patch."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from lab import base, build, kconfig, paths, proc, series, tree
from lab.base import Source
from lab.cells import KERNELS
from lab.errors import LabError

pytestmark = pytest.mark.series

KERNEL = KERNELS["4k-va48"]
COLUMNS = 75  # of a patch message


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "whole" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all", default=False)
        metafunc.parametrize("whole", [False, True] if every else [False], ids=["touched", "whole"][:1 + every])


def copy_of_the_checkout(target: Path) -> Path:
    """What the series is made of, to be broken."""
    for name in ("series", "patches", *series.KERNEL_FOLDERS):
        if (paths.ROOT / name).is_dir():
            shutil.copytree(paths.ROOT / name, target / name)
    return target


# The committed series

def test_patches_are_what_the_series_gives(source: Source) -> None:
    series.check(source.tree)


def test_generating_twice_gives_the_same_bytes(source: Source) -> None:
    the_series = series.load()
    assert series.generate(the_series, source.tree) == series.generate(the_series, source.tree)


def test_an_owned_file_edited_without_regenerating_is_found(source: Source, tmp_path: Path) -> None:
    root = copy_of_the_checkout(tmp_path)
    series.check(source.tree, root)
    patch = next(p for p in series.load(root).patches if p.owned)
    with open(root / patch.owned[0], "a") as file:
        file.write("/* edited */\n")
    with pytest.raises(LabError, match=f"stale: .*{patch.name}.patch"):
        series.check(source.tree, root)


def test_the_base_is_the_recorded_one(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(base.ANY_BASE, raising=False)
    base.check_originals(source, series.load().owned)


@pytest.mark.timeout(1200)
def test_git_am_applies_to_a_pristine_base(source: Source, tmp_path: Path, whole: bool) -> None:
    the_series = series.load()
    repository = tmp_path / "linux"
    if whole:
        proc.run(["cp", "-a", source.tree, repository])
    touched = dict.fromkeys(path for patch in the_series.patches for path in patch.touched)
    for path in touched:
        if (source.tree / path).is_file() and not whole:
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source.tree / path, repository / path)
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "gc.auto=0"]
    proc.run([*git, "init", "-q"])
    proc.run([*git, "add", "--all", "--force"])
    proc.run([*git, "commit", "-q", "-m", "base"])
    mails = sorted((paths.ROOT / "patches").glob("*.patch"))
    assert len(mails) == len(the_series.patches)
    output = proc.run([*git, "am", *mails]).stdout.decode()
    assert [line.removeprefix("Applying: ") for line in output.splitlines()] == [p.subject for p in the_series.patches]
    for path in the_series.owned:
        if (paths.ROOT / path).is_file():
            assert series.read(repository / path) == series.read(paths.ROOT / path), path
        else:
            assert not (repository / path).exists(), path
    # Hooked files come out as the generator has them.
    for path, file in series.result(the_series, source.tree).items():
        assert (series.read(repository / path) if file else None) == file, path


def options_after(the_series: series.Series, source: Source, count: int) -> set[str]:
    """The configuration options in the files that the first `count` patches touch."""
    files = series.result(the_series, source.tree, count)
    return {name for path, file in files.items() if file and os.path.basename(path).startswith("Kconfig")
            for name in re.findall(r"^(?:menu)?config (\w+)", file.content.decode(), re.M)}


def targets(patches: tuple[series.Patch, ...], srctree: Path) -> list[str]:
    """What the series can break: its folders below arch/arm64, and what it touches elsewhere."""
    files = {path for patch in patches for path in patch.touched
             if path.endswith((".c", ".S")) and (srctree / path).is_file()
             and not path.startswith(("arch/", "tools/", "Documentation/"))}
    return ["arch/arm64/kernel/", "arch/arm64/mm/", *sorted(path[:-2] + ".o" for path in files)]


@pytest.mark.timeout(3600)
def test_every_patch_builds_on_its_own(source: Source, request: pytest.FixtureRequest) -> None:
    """In order, in one tree. The last step is the kernel that every other test boots."""
    every = request.config.getoption("--all", default=False)
    the_series = series.load()
    objdir = tree.home(source, "-steps") / "build" / KERNEL.name
    try:
        for count, patch in enumerate(the_series.patches, 1):
            srctree = tree.patched(source, upto=count, variant="-steps")
            if count == 1 or any("Kconfig" in path for path in patch.touched):
                later = kconfig.of_series().keys() - options_after(the_series, source, count)
                build.configure(KERNEL, srctree, objdir, later)
            if every:
                build.make(srctree, objdir, ["Image"])
            build.make(srctree, objdir, targets(the_series.patches, srctree))
    except LabError as error:
        pytest.fail(f"{patch.name}: {error}")
    assert not later
    assert build.build(KERNEL, source).image.is_file()


@pytest.mark.timeout(900)
def test_a_patch_that_does_not_build_is_found(source: Source, tmp_path: Path) -> None:
    root = copy_of_the_checkout(tmp_path)
    path = next(p for p in series.load(root).owned if p.startswith("arch/arm64/kernel/") and p.endswith(".c"))
    with open(root / path, "a") as file:
        file.write("int unfinished(void) { return nothing_like_it; }\n")
    objdir = tree.home(source, "-steps") / "build" / KERNEL.name
    srctree = tree.patched(source, root, variant="-steps")
    build.configure(KERNEL, srctree, objdir)
    with pytest.raises(LabError, match="nothing_like_it"):
        build.make(srctree, objdir, [path.removesuffix(".c") + ".o"])


def message_faults(subject: str, body: str) -> list[str]:
    """What a maintainer would send a message back for."""
    faults = [f"longer than {COLUMNS} columns: {line}" for line in [subject, *body.splitlines()]
              if len(line) > COLUMNS and not line.startswith((" ", "Link: "))]
    match = re.fullmatch(r"(?:[A-Za-z0-9_/.-]+: )+([A-Z]\w+)\b.*[^.]", subject)
    if not match:
        faults.append(f"not 'subsystem: Verb ...' without a full stop: {subject}")
    elif re.search(r"(?:ed|ing|[^s]s)$", match[1]):
        faults.append(f"not imperative: {match[1]}")
    if not body.strip():
        faults.append("says nothing but its subject")
    for word in ("Signed-off-by", "Change-Id", "Co-developed-by"):
        if word in body:
            faults.append(f"has a {word}")
    return faults


def test_messages() -> None:
    for patch in series.load().patches:
        assert message_faults(patch.subject, patch.body) == [], patch.name


@pytest.mark.parametrize("subject, body", [
    ("arm64: kexec: Adds tables", "Text."), ("arm64: kexec: Added tables", "Text."), ("Add tables", "Text."),
    ("arm64: kexec: Add tables.", "Text."), ("arm64: kexec: Add tables", ""), ("arm64: kexec: Add " + "x" * 70, "Text."),
    ("arm64: kexec: Add tables", "x" * 76), ("arm64: kexec: Add tables", "Text.\n\nSigned-off-by: A <a@localhost>")])
def test_messages_that_are_sent_back(subject: str, body: str) -> None:
    assert len(message_faults(subject, body)) == 1
    assert message_faults("arm64: kexec: Add tables", "Text.") == []


# A toy series on a toy base: what goes wrong is named

HOOK = """\
--- a/arch/arm64/mm/Makefile
+++ b/arch/arm64/mm/Makefile
@@ -1,3 +1,4 @@
 one
+inserted
 two
 three
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Source, Path]:
    """A base, and a checkout with two patches for it: a hook with a new file, then a replacement and a removal."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    top, root = tmp_path / "linux", tmp_path / "checkout"
    for name, text in {
            "linux/Makefile": "VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\nEXTRAVERSION =\n",
            "linux/arch/arm64/Kconfig": "", "linux/arch/arm64/mm/Makefile": "one\ntwo\nthree\n",
            "linux/arch/arm64/mm/old.c": "old\n" * 30, "linux/arch/arm64/mm/gone.c": "gone\n",
            "checkout/series/cover-letter": "arm64: A toy\n\nWhy.\n",
            "checkout/series/0001-hook/message": "arm64: mm: Hook in\n\nBecause.\n",
            "checkout/series/0001-hook/owned": "arch/arm64/mm/new.c\n",
            "checkout/series/0001-hook/hooks.patch": HOOK,
            "checkout/series/0002-replace/message": "arm64: mm: Replace\n\nBecause.\n",
            "checkout/series/0002-replace/owned": "arch/arm64/mm/old.c\n- arch/arm64/mm/gone.c\n",
            "checkout/arch/arm64/mm/new.c": "new\n", "checkout/arch/arm64/mm/old.c": "rewritten\n" * 20}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    source = base.source(top)
    base.record(source, series.load(root).owned, root)
    return source, root


def test_toy_patches(toy: tuple[Source, Path]) -> None:
    source, root = toy
    files = series.generate(series.load(root), source.tree)
    assert list(files) == ["0001-hook.patch", "0002-replace.patch", series.COVER_LETTER]
    first = files["0001-hook.patch"].decode()
    assert first.startswith("From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\nFrom: Patch Series")
    assert "Subject: [PATCH 1/2] arm64: mm: Hook in\n\nBecause.\n---\n" in first
    assert " 2 files changed, 2 insertions(+)\n" in first
    second = files["0002-replace.patch"].decode()
    assert "-old\n" * 30 + "+rewritten\n" * 20 in second
    assert "deleted file mode 100644" in second
    assert "[PATCH 0/2] arm64: A toy" in files[series.COVER_LETTER].decode()
    assert series.write(files, root / "patches") == sorted(files)
    assert series.write(files, root / "patches") == []
    (root / "patches/0003-stray.patch").write_text("")
    with pytest.raises(LabError, match="stale: 0003-stray.patch"):
        series.check(source.tree, root)


def test_a_hook_that_does_not_apply_is_named_with_its_file(toy: tuple[Source, Path]) -> None:
    source, root = toy
    (source.tree / "arch/arm64/mm/Makefile").write_text("one\nfuzz\ntwo\nthree\n")
    with pytest.raises(LabError, match="series/0001-hook/hooks.patch does not apply to arch/arm64/mm/Makefile"):
        series.result(series.load(root), source.tree)
    (source.tree / "arch/arm64/mm/Makefile").unlink()
    with pytest.raises(LabError, match="0001-hook/hooks.patch does not apply to arch/arm64/mm/Makefile"):
        series.result(series.load(root), source.tree)


@pytest.mark.parametrize("breakage, complaint", [
    (lambda root: (root / "series/0002-replace/owned").write_text("arch/arm64/mm/new.c\narch/arm64/mm/old.c\n"),
     "new.c is listed by 0001-hook and by 0002-replace"),
    (lambda root: (root / "arch/arm64/mm/new.c").unlink(), "0001-hook/owned lists arch/arm64/mm/new.c, which is not"),
    (lambda root: (root / "arch/arm64/mm/stray.c").write_text(""), "stray.c is in the repository, but no patch"),
    (lambda root: (root / "series/0001-hook/message").unlink(), "0001-hook/message is missing"),
    (lambda root: (root / "series/0001-hook/message").write_text("a\nb\n"), "subject and a blank line"),
    (lambda root: (root / "series/0002-replace/owned").unlink(), "0002-replace changes nothing")])
def test_an_incomplete_series_is_refused(toy: tuple[Source, Path], breakage: object, complaint: str) -> None:
    _, root = toy
    breakage(root)  # type: ignore[operator]
    with pytest.raises(LabError, match=re.escape(complaint)):
        series.load(root)


LATER = """\
--- a/arch/arm64/mm/new.c
+++ b/arch/arm64/mm/new.c
@@ -1 +1,2 @@
 new
+later
"""


def test_an_owned_file_lands_without_the_hunks_of_later_patches(toy: tuple[Source, Path]) -> None:
    source, root = toy
    (root / "series/0002-replace/hooks.patch").write_text(LATER)
    (root / "arch/arm64/mm/new.c").write_text("new\nlater\n")
    files = series.generate(series.load(root), source.tree)
    assert "+new\n" in files["0001-hook.patch"].decode() and "later" not in files["0001-hook.patch"].decode()
    assert " new\n+later\n" in files["0002-replace.patch"].decode()
    last = series.result(series.load(root), source.tree)["arch/arm64/mm/new.c"]
    assert last == series.read(root / "arch/arm64/mm/new.c")

    (root / "arch/arm64/mm/new.c").write_text("new\nsomething else\n")
    with pytest.raises(LabError, match="0002-replace/hooks.patch does not apply to arch/arm64/mm/new.c"):
        series.generate(series.load(root), source.tree)


# The cached tree

def times(top: Path) -> dict[str, int]:
    return {str(p.relative_to(top)): p.stat().st_mtime_ns for p in top.rglob("*") if p.is_file()}


def test_only_what_changed_is_rewritten_and_never_the_base(toy: tuple[Source, Path]) -> None:
    source, root = toy
    pristine = {path: path.read_bytes() for path in source.tree.rglob("*") if path.is_file()}
    patched = tree.patched(source, root)
    mm = patched / "arch/arm64/mm"
    assert mm.joinpath("Makefile").read_text() == "one\ninserted\ntwo\nthree\n"
    assert mm.joinpath("old.c").read_text() == "rewritten\n" * 20
    assert not mm.joinpath("gone.c").exists()
    before = times(patched)
    assert times(tree.patched(source, root)) == before

    (root / "arch/arm64/mm/new.c").write_text("newer\n")
    after = times(tree.patched(source, root))
    assert {path for path in after if after[path] != before.get(path)} == {"arch/arm64/mm/new.c"}

    # Back to the first patch: the base's file again, with a time that make notices.
    tree.patched(source, root, upto=1)
    assert mm.joinpath("old.c").read_text() == "old\n" * 30
    assert mm.joinpath("old.c").stat().st_mtime_ns > after["arch/arm64/mm/old.c"]
    assert mm.joinpath("gone.c").exists()
    assert {path: path.read_bytes() for path in source.tree.rglob("*") if path.is_file()} == pristine


def test_changes_in_a_tree_given_by_hand_are_followed(toy: tuple[Source, Path]) -> None:
    source, root = toy
    patched = tree.patched(source, root)
    extra = source.tree / "arch/arm64/mm/extra.c"
    extra.write_text("1\n")
    tree.patched(source, root)
    assert (patched / "arch/arm64/mm/extra.c").read_text() == "1\n"
    extra.unlink()
    tree.patched(source, root)
    assert not (patched / "arch/arm64/mm/extra.c").exists()
    assert (patched / "arch/arm64/mm/new.c").read_text() == "new\n"


def test_another_base_is_refused_before_anything_is_laid_out(toy: tuple[Source, Path]) -> None:
    source, root = toy
    (source.tree / "arch/arm64/mm/old.c").write_text("upstream changed it\n")
    with pytest.raises(LabError, match="arch/arm64/mm/old.c"):
        tree.patched(source, root)
    assert not tree.home(source).exists()


def test_export(toy: tuple[Source, Path], tmp_path: Path) -> None:
    source, root = toy
    target = tmp_path / "exported"
    tree.export(source, target, root)
    assert (target / "arch/arm64/mm/old.c").read_text() == "rewritten\n" * 20
    assert (target / "Makefile").stat().st_nlink == 1
    with pytest.raises(LabError, match="exists"):
        tree.export(source, target, root)

"""patches/ is what series/ and the owned files give, applies, and builds patch by patch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import toy
from lab import base, build, kconfig, paths, proc, recipients, series, tree
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

def is_recorded(source: Source) -> bool:
    """Is this the very version that the series was made on, or another of that release?"""
    return source.version == source.base.version


def test_patches_are_what_the_series_gives(source: Source) -> None:
    series.check(series.load(source.base), source.tree, exact=is_recorded(source))


def test_generating_twice_gives_the_same_bytes(source: Source) -> None:
    the_series = series.load(source.base)
    assert series.generate(the_series, source.tree) == series.generate(the_series, source.tree)


def test_what_was_edited_without_regenerating_is_found(source: Source, tmp_path: Path) -> None:
    root = copy_of_the_checkout(tmp_path)
    the_series = series.load(source.base, root)
    patch = next(p for p in the_series.patches if "arch/arm64/kernel/relocate_kernel.S" in p.added + p.touched)
    edited = root / "arch/arm64/kernel/relocate_kernel.S"
    text = edited.read_text()
    edited.write_text(text.replace("crc_line - fold the 64 bytes", "crc_line - fold 64 bytes"))
    assert edited.read_text() != text
    with pytest.raises(LabError, match="stale: .*verify-while-copied.patch"):
        series.check(series.load(source.base, root), source.tree, exact=False)
    edited.write_text(text)
    message = root / "series" / patch.name / "message"
    message.write_text(message.read_text() + "\nOne more line.\n")
    with pytest.raises(LabError, match=f"stale: {patch.name}.patch\n"):
        series.check(series.load(source.base, root), source.tree, exact=False)


def test_the_base_is_the_recorded_one(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(base.ANY_BASE, raising=False)
    base.check_originals(source, series.load(source.base).owned)


@pytest.mark.timeout(1200)
def test_git_am_applies_to_a_pristine_base(source: Source, tmp_path: Path, whole: bool) -> None:
    the_series = series.load(source.base)
    repository = tmp_path / "linux"
    if whole:
        proc.run(["cp", "-a", source.tree, repository])
    for path in the_series.touched:
        if (source.tree / path).is_file() and not whole:
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source.tree / path, repository / path)
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "gc.auto=0"]
    proc.run([*git, "init", "-q"])
    proc.run([*git, "add", "--all", "--force"])
    proc.run([*git, "commit", "-q", "-m", "base"])
    mails = sorted((paths.ROOT / source.base.patches).glob("*/*.patch"))
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


# What no configuration of the laboratory's builds.
ELSEWHERE = ("mm/memory_hotplug.c", "security/integrity/ima/ima_kexec.c")  # not in the configuration that is built here


def targets(patches: tuple[series.Patch, ...], srctree: Path) -> list[str]:
    """What the series can break: two folders below arch/arm64, and what it touches elsewhere."""
    folders = ["arch/arm64/kernel/", "arch/arm64/mm/"]
    files = {path for patch in patches for path in patch.touched
             if path.endswith((".c", ".S")) and (srctree / path).is_file() and path not in ELSEWHERE
             and not path.startswith((*folders, "arch/loongarch/", "tools/", "Documentation/"))}
    return [*folders, *sorted(path[:-2] + ".o" for path in files)]


@pytest.mark.timeout(3600)
def test_every_patch_builds_on_its_own(source: Source, request: pytest.FixtureRequest) -> None:
    """In order, in one tree. The last step is the kernel that every other test boots."""
    every = request.config.getoption("--all", default=False)
    the_series = series.load(source.base)
    objdir = tree.home(source, "-steps") / "build" / KERNEL.name
    try:
        for count, patch in enumerate(the_series.patches, 1):
            srctree = tree.patched(source, upto=count, variant="-steps")
            if count == 1 or any("Kconfig" in path for path in patch.touched):
                later = kconfig.of_series().keys() - series.options(series.result(the_series, source.tree, count))
                build.configure(KERNEL, srctree, objdir, later, source.base.config)
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
    path = next(p for p in series.load(source.base, root).owned if p.startswith("arch/arm64/kernel/") and p.endswith(".c"))
    with open(root / path, "a") as file:
        file.write("int unfinished(void) { return nothing_like_it; }\n")
    objdir = tree.home(source, "-steps") / "build" / KERNEL.name
    srctree = tree.patched(source, root, variant="-steps")
    build.configure(KERNEL, srctree, objdir, overlay=source.base.config)
    with pytest.raises(LabError, match="nothing_like_it"):
        build.make(srctree, objdir, [path.removesuffix(".c") + ".o"])


def message_faults(subject: str, body: str) -> list[str]:
    """What a maintainer would send a message back for."""
    faults = [f"longer than {COLUMNS} columns: {line}" for line in [subject, *body.splitlines()]
              if len(line) > COLUMNS and not line.startswith((" ", "Link: ", "Fixes: "))]
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


# Recipients

def test_recipients_are_those_that_the_script_names(source: Source) -> None:
    the_series = series.load(source.base)
    if is_recorded(source):
        assert recipients.ask(the_series, source.tree) == {group.name: group.recipients for group in the_series.groups}
    files = series.generate(the_series, source.tree)
    for group in the_series.groups:
        assert re.match(r"(?:To: .+@.+\n)+(?:Cc: .+@.+\n)+\Z", group.recipients), group.name
        assert f"\n\n{group.recipients}\n" in files[f"{group.name}/{series.COVER_LETTER}"].decode()


def test_recipients_by_role() -> None:
    assert recipients.lines(maintainers='Two <two@example.org>\nOne <one@example.org>\n',
                            reviewers="Two <two@example.org>\nThree <three@example.org>\n",
                            lists="list@example.org\n") == (
        "To: One <one@example.org>\nTo: Two <two@example.org>\n"
        "Cc: Three <three@example.org>\nCc: list@example.org\n")


# A toy series on a toy base: what goes wrong is named

HOOK, REPLACE, LATER = (f"{toy.GROUP}/{name}.patch" for name in ("0001-hook", "0002-replace", "0003-later"))
COVER = f"{toy.GROUP}/{series.COVER_LETTER}"


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Source, Path]:
    """A base, and a checkout with two patches for it: a hook with a new file, then a replacement and a removal."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    root = tmp_path / "checkout"
    return toy.make(tmp_path / "linux", root), root


def load(root: Path) -> series.Series:
    return series.load(root=root)


def test_toy_patches(toys: tuple[Source, Path]) -> None:
    source, root = toys
    files = series.generate(load(root), source.tree)
    assert list(files) == [HOOK, REPLACE, COVER]
    first = files[HOOK].decode()
    assert first.startswith("From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\nFrom: Patch Series")
    assert "Subject: [PATCH 1/2] arm64: mm: Hook in\n\nBecause.\n---\n" in first
    assert " 2 files changed, 13 insertions(+)\n" in first
    second = files[REPLACE].decode()
    assert "-old\n" * 30 + "+rewritten\n" * 20 in second
    assert "deleted file mode 100644" in second
    assert "[PATCH 0/2] arm64: A toy" in files[COVER].decode()
    assert series.write(files, root / "patches") == []
    (root / "patches/1-toy/0003-stray.patch").write_text("")
    with pytest.raises(LabError, match="stale: 1-toy/0003-stray.patch"):
        series.check(load(root), source.tree)
    assert series.write(files, root / "patches") == ["1-toy/0003-stray.patch"]
    series.check(load(root), source.tree)


def test_what_is_owned_and_what_is_hooked(toys: tuple[Source, Path]) -> None:
    the_series = load(toys[1])
    assert the_series.owned == [toy.NEW, toy.GONE, toy.OLD] and the_series.hooked == [toy.HOOKED]


def test_a_patch_that_does_not_apply_is_named_with_its_file(toys: tuple[Source, Path]) -> None:
    source, root = toys
    (source.tree / toy.HOOKED).write_text(toy.ABOVE + "one\nfuzz\ntwo\nthree\n")
    with pytest.raises(LabError, match="patches/1-toy/0001-hook.patch does not apply to arch/arm64/mm/Makefile"):
        series.result(load(root), source.tree)
    (source.tree / toy.HOOKED).unlink()
    with pytest.raises(LabError, match="0001-hook.patch does not apply to arch/arm64/mm/Makefile"):
        series.result(load(root), source.tree)


def test_an_update_of_the_base_may_move_lines(toys: tuple[Source, Path]) -> None:
    """What stands around a change may be elsewhere, and nothing else may differ."""
    source, root = toys
    (source.tree / toy.HOOKED).write_text("zero\n" + toy.BASE[toy.HOOKED])
    series.check(load(root), source.tree, exact=False)
    with pytest.raises(LabError, match="stale: 1-toy/0001-hook.patch"):
        series.check(load(root), source.tree)
    (root / toy.NEW).write_text("other\n")
    with pytest.raises(LabError, match="stale: .*0001-hook.patch"):
        series.check(load(root), source.tree, exact=False)


@pytest.mark.parametrize("breakage, complaint", [
    (lambda root: (root / toy.NEW).unlink(), "patches/1-toy/0001-hook.patch lands arch/arm64/mm/new.c, which is not in"),
    (lambda root: (root / "arch/arm64/mm/stray.c").write_text(""), "stray.c is in the repository, but no patch"),
    (lambda root: (root / "series/1-toy/0001-hook/message").unlink(), "0001-hook/message is missing"),
    (lambda root: (root / "series/1-toy/0001-hook/message").write_text("a\nb\n"), "subject and a blank line"),
    (lambda root: (root / "patches/1-toy/0002-replace.patch").unlink(), "0002-replace has 0 patches called *-replace.patch"),
    (lambda root: (root / "patches/1-toy/0002-replace.patch").write_text("text\n"), "0002-replace.patch changes nothing")])
def test_an_incomplete_series_is_refused(toys: tuple[Source, Path], breakage: object, complaint: str) -> None:
    _, root = toys
    breakage(root)  # type: ignore[operator]
    with pytest.raises(LabError, match=re.escape(complaint)):
        load(root)


# Edits of owned files

BETWEEN = {toy.NEW: "\n".join([*toy.LINES[:5], "of the third", *toy.LINES[5:11], "changed by the third"]) + "\n"}


@pytest.fixture
def three(tmp_path: Path) -> tuple[Source, Path]:
    """The toys with a third patch, which changes the file that the first one adds."""
    root = tmp_path / "checkout"
    return toy.make(tmp_path / "linux", root, (*toy.STEPS, ("0003-later", "arm64: mm: Go on\n\nBecause.\n", BETWEEN))), root


def changed(source: Source, root: Path, name: str) -> list[str]:
    """The lines that a patch, as it would be generated, adds to or takes from the file that was edited."""
    mail = series.generate(load(root), source.tree)[name].decode()
    part = mail[mail.index(f"diff --git a/{toy.NEW}"):] if f"diff --git a/{toy.NEW}" in mail else ""
    return [line for line in part.splitlines() if re.match(r"[+-](?![+-])", line)]


def test_an_edit_goes_to_the_patch_that_its_lines_are_from(three: tuple[Source, Path]) -> None:
    source, root = three
    file = root / toy.NEW
    file.write_text(file.read_text().replace("line 2\n", "line two\n").replace("of the third", "of the last"))
    added = [f"+{line}" for line in toy.LINES]
    assert changed(source, root, HOOK) == [*added[:2], "+line two", *added[3:]]
    assert changed(source, root, LATER) == ["+of the last", "-line 11", "+changed by the third"]
    assert series.write(series.generate(load(root), source.tree), root / "patches") == [HOOK, LATER]
    series.check(load(root), source.tree)
    assert series.result(load(root), source.tree)[toy.NEW] == series.read(file)


@pytest.mark.parametrize("old, new, patch", [
    ("line 0\n", "first\nline 0\n", HOOK), ("line 7\n", "", HOOK),
    ("of the third\n", "of the third\nand more\n", LATER), ("changed by the third\n", "", LATER),
    ("line 4\nof the third\n", "both\n", LATER)])
def test_an_edit_anywhere(three: tuple[Source, Path], old: str, new: str, patch: str) -> None:
    source, root = three
    file = root / toy.NEW
    file.write_text(file.read_text().replace(old, new))
    names = series.stale(series.generate(load(root), source.tree), root / "patches")
    assert patch in names and REPLACE not in names
    series.write(series.generate(load(root), source.tree), root / "patches")
    series.check(load(root), source.tree)
    assert series.result(load(root), source.tree)[toy.NEW] == series.read(file)


def test_an_edit_of_the_mode(three: tuple[Source, Path]) -> None:
    source, root = three
    (root / toy.NEW).chmod(0o755)
    series.write(series.generate(load(root), source.tree), root / "patches")
    assert series.result(load(root), source.tree, 3)[toy.NEW] == series.read(root / toy.NEW)


def test_an_edit_that_conflicts_is_told(three: tuple[Source, Path]) -> None:
    """A line of the first patch beside one that the third adds: where one ends and the other begins, git cannot tell."""
    source, root = three
    file = root / toy.NEW
    file.write_text(file.read_text().replace("line 4\n", "line four\n"))
    with pytest.raises(LabError, match=f"{toy.NEW} can't be folded into 1-toy/0001-hook: later patches") as raised:
        series.generate(load(root), source.tree)
    assert "git stash" in raised.value.hint and "series --to DIR" in raised.value.hint
    assert series.result(load(root), source.tree)[toy.NEW] == series.read(file)  # it can be built and tried all the same


# The cached tree

def times(top: Path) -> dict[str, int]:
    return {str(p.relative_to(top)): p.stat().st_mtime_ns for p in top.rglob("*") if p.is_file()}


def test_only_what_changed_is_rewritten_and_never_the_base(toys: tuple[Source, Path]) -> None:
    source, root = toys
    pristine = {path: path.read_bytes() for path in source.tree.rglob("*") if path.is_file()}
    patched = tree.patched(source, root)
    mm = patched / "arch/arm64/mm"
    assert mm.joinpath("Makefile").read_text() == toy.FIRST[toy.HOOKED]
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


def test_changes_in_a_tree_given_by_hand_are_followed(toys: tuple[Source, Path]) -> None:
    source, root = toys
    patched = tree.patched(source, root)
    extra = source.tree / "arch/arm64/mm/extra.c"
    extra.write_text("1\n")
    tree.patched(source, root)
    assert (patched / "arch/arm64/mm/extra.c").read_text() == "1\n"
    extra.unlink()
    tree.patched(source, root)
    assert not (patched / "arch/arm64/mm/extra.c").exists()
    assert (patched / "arch/arm64/mm/new.c").read_text() == toy.FIRST[toy.NEW]


def test_another_base_is_refused_before_anything_is_laid_out(toys: tuple[Source, Path]) -> None:
    source, root = toys
    (source.tree / "arch/arm64/mm/old.c").write_text("upstream changed it\n")
    with pytest.raises(LabError, match="arch/arm64/mm/old.c"):
        tree.patched(source, root)
    assert not tree.home(source).exists()


def test_export(toys: tuple[Source, Path], tmp_path: Path) -> None:
    source, root = toys
    target = tmp_path / "exported"
    tree.export(source, target, root)
    assert (target / "arch/arm64/mm/old.c").read_text() == "rewritten\n" * 20
    assert (target / "Makefile").stat().st_nlink == 1
    with pytest.raises(LabError, match="exists"):
        tree.export(source, target, root)

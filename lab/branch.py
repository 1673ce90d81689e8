"""The series as a git branch: written to a repository, edited there, and read back.

The repository has the base as one commit, tagged "base", and each patch as one
commit on the branch "series"; an empty commit, as b4 makes one for the cover letter,
begins each group. SHARED is what the branch and the checkout had in
common last. Where both have changed since, the branch "series-now" is the series
as the checkout has it, and a person brings the two together.
"""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Sequence

from lab import paths, proc, say, series
from lab.base import Source
from lab.errors import LabError
from lab.series import File, Group, Patch, Series

BASE = "base"
BRANCH = "series"
SHOWN = 10  # changed files that an error names
NOW = "series-now"
SHARED, NEW = "refs/kexec-lab/shared", "refs/kexec-lab/new"
UNDER_WAY = {"rebase-merge": "rebase", "rebase-apply": "rebase or an am", "CHERRY_PICK_HEAD": "cherry-pick",
             "MERGE_HEAD": "merge", "REVERT_HEAD": "revert"}


@dataclass(frozen=True)
class _Repository:
    """A git repository with a work tree; commands in it don't see the user's configuration."""

    folder: Path

    def git(self, *arguments: str, stdin: bytes | None = None, accept: tuple[int, ...] = (0,),
            env: Mapping[str, str] = {}) -> bytes:
        return self.run(*arguments, stdin=stdin, accept=accept, env=env)[1]

    def run(self, *arguments: str, stdin: bytes | None = None, accept: tuple[int, ...] = (0,),
            env: Mapping[str, str] = {}) -> tuple[int, bytes]:
        done = proc.run([*series.GIT, "-C", str(self.folder), *arguments], stdin=stdin, accept=accept,
                        env={**series.GIT_ENV, **series.identity(series.IDENTITY), **env})
        return done.returncode, done.stdout

    def text(self, *arguments: str, **options: object) -> str:
        return self.git(*arguments, **options).decode(errors="surrogateescape").strip()  # type: ignore[arg-type]

    def ref(self, name: str) -> str:
        """The commit that `name` stands for, '' if there is no such name."""
        return self.text("rev-parse", "-q", "--verify", f"{name}^{{commit}}", accept=(0, 1, 128))


def to(the_series: Series, source: Source, folder: Path) -> str:
    """Write the series to the repository at `folder`, which is made if it is not there; returns what was done.

    Raises LabError, with the branch as it was, when it is no repository of this
    kind, is on another base, has something unfinished in it, or when a person's
    changes of the branch would be lost.
    """
    if not folder.exists() or not any(folder.iterdir()):
        _create(folder, source)
    repository = _opened(folder, source)
    _check_settled(repository)
    tip = _commit_all(repository, the_series, source)
    there, shared = repository.ref(BRANCH), repository.ref(SHARED)
    if tip == shared:
        return f"{folder} is up to date; its branch '{BRANCH}' has " + (
            "changes that the series has not" if there != shared else "nothing but the series")
    if there == shared:
        repository.git("reset", "-q", "--hard", tip)
        repository.git("update-ref", SHARED, tip)
        return f"{folder}: branch '{BRANCH}' has the {len(the_series.patches)} patches on '{BASE}', {source.version}"
    repository.git("update-ref", f"refs/heads/{NOW}", tip)
    raise LabError(f"the series has changed, and so has branch '{BRANCH}' of {folder}, which stays as it is",
                   f"branch '{NOW}' is the series now; in {folder}, 'git range-diff {BASE}..{NOW} {BASE}..{BRANCH}' "
                   f"shows how they differ. Once '{BRANCH}' has what it should of both: git update-ref {SHARED} {NOW}")


def back(the_series: Series, source: Source, folder: Path) -> list[str]:
    """Read the branch of the repository at `folder` into the series; returns a line per change.

    Raises LabError, with nothing changed, when there is something unfinished,
    when the series has changed since the repository was made, or when the
    branch is no line of patches.
    """
    repository = _opened(folder, source)
    _check_settled(repository)
    there, shared = repository.ref(BRANCH), repository.ref(SHARED)
    if _commit_all(repository, the_series, source) != shared:
        raise LabError(f"{folder} is from an older state of the series, which has changed since",
                       f"'./kexec-lab series --to {folder}' brings that there, beside what the branch has")
    if there == shared:
        return []
    read = [_read(repository, commit) for commit in _commits(repository)]
    the_series = _regenerated(the_series, source)  # edits in the checkout are no changes of the branch
    groups = _named(read, the_series)
    patches = [patch for group in groups for patch in group.patches]
    final = _final(repository, the_series, patches)
    changes = _changes(the_series, groups, final)
    _write(the_series, groups, final)
    tip = _commit_all(repository, _regenerated(series.load(the_series.base, the_series.root), source), source)
    assert repository.ref(f"{tip}^{{tree}}") == repository.ref(f"{there}^{{tree}}")
    repository.git("reset", "-q", "--soft", tip)
    repository.git("update-ref", SHARED, tip)
    return changes


def _regenerated(the_series: Series, source: Source) -> Series:
    """Bring the patches' folder up to date, and load the series again."""
    series.write(series.generate(the_series, source.tree), the_series.mails)
    return series.load(the_series.base, the_series.root)


# The repository

def _create(folder: Path, source: Source) -> None:
    with say.phase(f"making a git repository of {source.version} at {folder}"):
        if folder.exists():
            folder.rmdir()
        with paths.whole(folder) as new:
            proc.run(["cp", "-a", "--reflink=auto", source.tree, new])
            shutil.rmtree(new / ".git", ignore_errors=True)
            _track_new_files(new)
            repository = _Repository(new)
            repository.git("init", "-q", f"--initial-branch={BRANCH}")
            repository.git("add", "--all", "--force")
            tree = repository.text("write-tree")
            commit = repository.text("commit-tree", tree, "-m", _base_title(source))
            for name in (f"refs/tags/{BASE}", f"refs/heads/{BRANCH}", SHARED):
                repository.git("update-ref", name, commit)
            # 100,000 loose objects would have git collect garbage, for minutes, at the first rebase.
            repository.git("config", "gc.auto", "0")


def _track_new_files(tree: Path) -> None:
    """Debian's source packages have git ignore all that is new: `git add` would leave out the file that a patch adds."""
    ignored = tree / ".gitignore"
    if ignored.exists():
        lines = ignored.read_text().splitlines(keepends=True)
        ignored.unlink()  # the base may share it
        ignored.write_text("".join(line for line in lines if line.strip() != "/*"))


def _base_title(source: Source) -> str:
    return f"Linux {source.version} ({source.package or source.tree})"


def _opened(folder: Path, source: Source) -> _Repository:
    repository = _Repository(folder)
    if not (folder / ".git").exists() or not repository.ref(f"refs/tags/{BASE}"):
        raise LabError(f"{folder} is no repository that './kexec-lab series --to' made", "name another folder")
    title = repository.text("log", "-1", "--format=%s", f"refs/tags/{BASE}")
    if title != _base_title(source):
        raise LabError(f"{folder} is on {title}, and the series is now on {_base_title(source)}",
                       "make a new repository in another folder")
    return repository


def _check_settled(repository: _Repository) -> None:
    """Raises LabError when something in the repository is not finished."""
    folder = repository.folder
    for name, what in UNDER_WAY.items():
        if (folder / ".git" / name).exists():
            raise LabError(f"a {what} is under way in {folder}", "finish it, or abort it, there")
    changed = repository.git("status", "--porcelain", "--untracked-files=no").decode(errors="replace").splitlines()
    if changed:
        raise LabError(f"{folder} has changes that are not committed:\n" + "\n".join(changed[:SHOWN]),
                       "commit or stash them there")
    head = repository.text("symbolic-ref", "-q", "--short", "HEAD", accept=(0, 1))
    if head != BRANCH:
        raise LabError(f"{folder} has {head or 'a detached HEAD'} checked out, not '{BRANCH}'",
                       f"'git checkout {BRANCH}' there; the series is what that branch has")


def _commit_all(repository: _Repository, the_series: Series, source: Source) -> str:
    """A commit per patch on the base, in the repository, on no branch yet; the last one. The same series gives the same."""
    with series.as_commits(the_series, source.tree) as (scratch, commits):
        repository.git("fetch", "-q", "--no-tags", str(scratch), "folded")
    stream = f"reset {NEW}\nfrom {repository.ref(f'refs/tags/{BASE}')}\n\n"
    when = f"{series.DATE.timestamp():.0f} +0000"

    def commit(author: str, text: str) -> str:
        return (f"commit {NEW}\nauthor {author} {when}\ncommitter {series.IDENTITY} {when}\n"
                f"data {len(text.encode())}\n{text}\n")

    first = {group.patches[0].name: group for group in the_series.groups}
    for patch, before, after in zip(the_series.patches, commits, commits[1:]):
        if patch.name in first:
            stream += commit(series.IDENTITY, first[patch.name].message + "\n")
        stream += commit(patch.author, patch.text)
        # :100644 100644 <blob before> <blob after> M<tab>path
        for line in repository.text("diff-tree", "-r", "--no-renames", before, after).splitlines():
            _, mode, _, blob, _, path = line.split(maxsplit=5)
            stream += f"M {mode} {blob} {path}\n" if mode.strip("0") else f"D {path}\n"
    repository.git("fast-import", "--quiet", "--force", "--date-format=raw", stdin=stream.encode())
    return repository.ref(NEW)


# Reading it back

def _commits(repository: _Repository) -> list[str]:
    """The commits of the branch in order. Raises LabError when they are no line on the base."""
    base = repository.ref(f"refs/tags/{BASE}")
    lines = repository.text("rev-list", "--reverse", "--parents", f"{base}..{BRANCH}").splitlines()
    previous = base
    for line in lines:
        commit, *parents = line.split()
        if parents != [previous]:
            raise LabError(f"branch '{BRANCH}' is no line of patches on '{BASE}': {commit[:12]} has other parents",
                           f"'git rebase {BASE}' in {repository.folder} makes one of it")
        previous = commit
    if not lines:
        raise LabError(f"branch '{BRANCH}' has no commit on '{BASE}'", f"'git reflog {BRANCH}' shows what it had")
    return [line.split()[0] for line in lines]


def _read(repository: _Repository, commit: str) -> Patch:
    """A commit as a patch, without a name; without a diff it is a cover letter."""
    author, message = repository.text("log", "-1", "--format=%an <%ae>%n%B", commit).split("\n", 1)
    subject, body = series.split_message(message, f"the message of {commit[:12]}")
    if author != series.IDENTITY:
        body = f"From: {author}\n\n{body}"
    diff = repository.git(*series.DIFF, "--patch", f"{commit}^", commit).partition(b"\ndiff --git ")[2]
    return Patch("", subject, body, b"diff --git " + diff if diff else b"")


def _named(read: Sequence[Patch], old: Series) -> list[Group]:
    """What was read as groups, with names: of the old ones with that subject, or else that diff, or else made of the subject.

    Raises LabError when a patch belongs to no group, or a group has none.
    """
    patches = [patch for patch in read if patch.diff]
    slugs = _match([(patch.subject, patch.diff, patch.touched) for patch in patches],
                   [(one.slug, one.subject, one.diff, one.touched) for one in old.patches])
    covers = [patch for patch in read if not patch.diff]
    names = _match([(cover.subject, b"", ()) for cover in covers],
                   [(group.name.partition("-")[2], group.subject, b"", ()) for group in old.groups])
    recipients = {group.name.partition("-")[2]: group.recipients for group in old.groups}
    groups: list[Group] = []
    for patch in read:
        if not patch.diff:
            body = patch.body.removeprefix(f"From: {patch.author}\n\n")
            name = names.pop(0)
            groups.append(Group(f"{len(groups) + 1}-{name}", patch.subject, body, (), recipients.get(name, "")))
            continue
        if not groups:
            raise LabError(f"'{patch.subject}' stands in front of all cover letters",
                           "each group begins with an empty commit whose message is its cover letter")
        group = groups[-1]
        name = f"{group.name}/{len(group.patches) + 1:04d}-{slugs.pop(0)}"
        groups[-1] = replace(group, patches=(*group.patches, replace(patch, name=name)))
    for group in groups:
        if not group.patches:
            raise LabError(f"'{group.subject}' is an empty commit without patches behind it",
                           "an empty commit is the cover letter of a group; drop it, or give it a change or patches")
    return groups


def _match(new: Sequence[tuple[str, bytes, tuple[str, ...]]],
           old: Sequence[tuple[str, str, bytes, tuple[str, ...]]]) -> list[str]:
    """A name for each of `new`: that of the one of `old` which it is, or one made of its subject."""
    names: list[str] = [""] * len(new)
    for same in (lambda one, index: one[1] == new[index][0],
                 lambda one, index: one[2:] == new[index][1:],
                 lambda one, index: len(old) == len(new) and old[index] is one and one[3] == new[index][2]):
        for index in range(len(new)):
            for one in old:
                if not names[index] and one[0] not in names and same(one, index):
                    names[index] = one[0]
    for index, (subject, *_) in enumerate(new):
        name = names[index] or _slug_of(subject)
        while name in names[:index] or (not names[index] and name in names):
            name += "-again"
        names[index] = name
    return names


def _slug_of(subject: str) -> str:
    """A short name made of what a subject says behind its prefixes."""
    words = "".join(c if c.isalnum() else " " for c in subject.rpartition(": ")[2].lower()).split()
    return "-".join(words)[:40].strip("-")


def _final(repository: _Repository, old: Series, patches: Sequence[Patch]) -> dict[str, File | None]:
    """The owned files as the branch leaves them, by path; None where one is no longer there."""
    added = {path for patch in patches for path in patch.added}
    ours = set(series.owned_files(old.root)) & {path for patch in patches for path in patch.touched} | added
    gone = set(series.owned_files(old.root)) - ours
    final: dict[str, File | None] = {path: None for path in gone}
    for path in ours:
        entry = repository.text("ls-tree", BRANCH, "--", path).split()
        final[path] = File(repository.git("cat-file", "blob", entry[2]), entry[0] == "100755") if entry else None
    return final


def _changes(old: Series, groups: Sequence[Group], final: Mapping[str, File | None]) -> list[str]:
    """What is different, a line for each group, patch and file."""
    letters = {group.name: group.message for group in old.groups}
    lines = [f"{group.name}: {'cover letter reworded' if group.name in letters else 'new'}" for group in groups
             if letters.get(group.name) != group.message]
    lines += [f"{name}: gone" for name in letters if name not in {group.name for group in groups}]
    patches = [patch for group in groups for patch in group.patches]
    before = {patch.slug: patch for patch in old.patches}
    order, now = list(before), [patch.slug for patch in patches if patch.slug in before]
    blocks = difflib.SequenceMatcher(None, order, now, autojunk=False).get_matching_blocks()
    stayed = {slug for block in blocks for slug in order[block.a:block.a + block.size]}
    for patch in patches:
        one = before.pop(patch.slug, None)
        what = ["new"] if one is None else [
            *(["reworded"] if one.message != patch.message else []),
            *(["changed"] if _lines(one.diff) != _lines(patch.diff) else []),
            *([f"moved, was {one.name}"] if patch.slug not in stayed or _group(one) != _group(patch) else [])]
        if what:
            lines.append(f"{patch.name}: {', '.join(what)}")
    lines += [f"{patch.name}: gone" for patch in before.values()]
    for path, file in sorted(final.items()):
        was = series.read_if_there(old.root / path)
        if was != file:
            lines.append(f"{path}: " + ("new" if was is None else "gone" if file is None else "changed"))
    return lines


def _group(patch: Patch) -> str:
    return patch.name.partition("/")[0].partition("-")[2]


def _lines(diff: bytes) -> list[bytes]:
    """What a diff adds and takes away, wherever that stands."""
    return [line for line in diff.split(b"\n") if line.startswith((b"+", b"-"))]


def _write(old: Series, groups: Sequence[Group], final: Mapping[str, File | None]) -> None:
    """Replace messages, patches and owned files in the repository of the series."""
    for group in old.groups:
        shutil.rmtree(old.root / "series" / group.name)
        shutil.rmtree(old.mails / group.name)
    for group in groups:
        _put(old.root / "series" / group.name / "cover-letter", File(f"{group.message}\n".encode()))
        if group.recipients:
            _put(old.root / "series" / group.name / series.RECIPIENTS, File(group.recipients.encode()))
        for patch in group.patches:
            _put(old.root / "series" / patch.name / "message", File(f"{patch.message}\n".encode()))
            _put(old.mails / f"{patch.name}.patch", File(b"\n" + patch.diff))
    for path, file in final.items():
        _put(old.root / path, file)


def _put(target: Path, file: File | None) -> None:
    if file is None:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.content)
    target.chmod(0o755 if file.executable else 0o644)

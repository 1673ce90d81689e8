"""The series: what is mailed, in order, and the owned files as it leaves them.

    series/1-group/cover-letter         subject ("[RFC] " in front of it marks one), blank line, text
    series/1-group/recipients           who it is mailed to, see lab/recipients.py
    series/1-group/0001-slug/message    subject, blank line, text
    patches/1-group/0001-slug.patch     the mail of that patch, and the one place where its diff is

A group is what is mailed at once, to the same people.
Owned files stand whole at their in-tree paths in the repository, as the last
patch of all leaves them. What a person edits there is folded into the patches that the
lines are from (generate()); everything else is edited in a branch (lab/branch.py).
The same input gives the same bytes of patches/.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from lab import bases, paths, proc
from lab.bases import Base
from lab.errors import LabError

IDENTITY = "Patch Series <series@localhost>"
DATE = datetime(2026, 11, 20, 12, 0, 0, tzinfo=timezone.utc)
RFC = "[RFC] "
RECIPIENTS = "recipients"
COVER_LETTER = "0000-cover-letter.txt"  # not *.patch: git am takes patches/*/*.patch
KERNEL_FOLDERS = ("Documentation", "arch", "drivers", "include", "init", "kernel", "lib", "mm",
                  "samples", "scripts", "tools", "virt")

# Nothing of the caller's configuration: the same bytes whoever runs this.
GIT = ("git", "-c", "core.autocrlf=false", "-c", "core.fileMode=true", "-c", "gc.auto=0")
GIT_ENV = {"PATH": os.environ.get("PATH", ""), "HOME": "/nonexistent", "LC_ALL": "C",
           "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": "/"}
# A file written afresh is shown as such (-B), not as a patchwork of common lines.
DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-renames", "-B50%/60%", "--abbrev=12", "--diff-algorithm=myers",
        "--stat=72", "--summary")


@dataclass(frozen=True)
class File:
    """A file as a tree holds it."""

    content: bytes
    executable: bool = False


Files = dict[str, File | None]  # in-tree path -> what is there, None for nothing


@dataclass(frozen=True)
class Patch:
    """One mailed patch; `name` has its group's in front. A body may begin with "From: " and an author other than IDENTITY."""

    name: str
    subject: str
    body: str
    diff: bytes

    @property
    def slug(self) -> str:
        """The part of its name that stays when its number changes."""
        return self.name.rpartition("/")[2].partition("-")[2]

    @property
    def message(self) -> str:
        return f"{self.subject}\n\n{self.body}" if self.body else self.subject

    @property
    def text(self) -> str:
        """The message as a commit has it: without the author."""
        return self.message.replace(f"\n\nFrom: {self.author}\n\n", "\n\n", 1) + "\n"

    @property
    def author(self) -> str:
        match = re.match(r"From: (.+)\n\n", self.body)
        return match[1] if match else IDENTITY

    @property
    def touched(self) -> tuple[str, ...]:
        """In-tree paths of the files that it changes, adds or removes."""
        return self._paths(rb"^diff --git a/(\S+) b/\1$")

    @property
    def added(self) -> tuple[str, ...]:
        return self._paths(rb"^diff --git a/(\S+) b/\1\nnew file mode")

    @property
    def removed(self) -> tuple[str, ...]:
        return self._paths(rb"^diff --git a/(\S+) b/\1\ndeleted file mode")

    def _paths(self, pattern: bytes) -> tuple[str, ...]:
        return tuple(match.decode() for match in re.findall(pattern, self.diff, re.M))


@dataclass(frozen=True)
class Group:
    """Patches that are mailed together, with their cover letter's subject and text."""

    name: str
    subject: str
    body: str
    patches: tuple[Patch, ...]
    recipients: str = ""  # lines that begin with "To: " or "Cc: "

    @property
    def message(self) -> str:
        return f"{self.subject}\n\n{self.body}" if self.body else self.subject


@dataclass(frozen=True)
class Series:
    """The groups for one base in order, and the root of the repository that they are in."""

    root: Path
    base: Base
    groups: tuple[Group, ...]

    @property
    def patches(self) -> tuple[Patch, ...]:
        return tuple(patch for group in self.groups for patch in group.patches)

    def count(self, group: str) -> int:
        """How many patches there are up to the last one of `group`."""
        return sum(len(one.patches) for one in self.groups if one.name <= group)

    @property
    def mails(self) -> Path:
        """The folder of the patches."""
        return self.root / self.base.patches

    @property
    def touched(self) -> list[str]:
        """In-tree paths of the files that any patch touches."""
        return list(dict.fromkeys(path for patch in self.patches for path in patch.touched))

    @property
    def owned(self) -> list[str]:
        """Of these, the ones whose upstream copy the series replaces or removes, or that it adds."""
        standing = set(owned_files(self.root))
        removed = {path for patch in self.patches for path in patch.removed}
        return [path for path in self.touched if path in standing or path in removed]

    @property
    def hooked(self) -> list[str]:
        """The others: files of upstream's in which it changes some lines."""
        owned = set(self.owned)
        return [path for path in self.touched if path not in owned]


def load(base: Base | None = None, root: Path = paths.ROOT) -> Series:
    """Read the series for `base`, or for the default one, from the repository at `root`.

    Raises LabError when a message or a patch is missing or malformed, or when an
    owned file is missing, or landed by no patch.
    """
    base = base or bases.default(root)
    folders = _numbered(root / "series")
    if not folders:
        raise LabError(f"{root}/series has no patches in it")
    series = Series(root, base, tuple(_load_group(folder, root / base.patches) for folder in folders))
    _check_owned(series)
    return series


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _load_group(folder: Path, mails: Path) -> Group:
    patches = tuple(_load_patch(one, mails) for one in _numbered(folder))
    if not patches:
        raise LabError(f"series/{folder.name} has no patches in it")
    recipients = folder / RECIPIENTS
    return Group(folder.name, *read_message(folder / "cover-letter"), patches,
                 recipients.read_text() if recipients.is_file() else "")


def _load_patch(folder: Path, mails: Path) -> Patch:
    subject, body = read_message(folder / "message")
    slug = folder.name.partition("-")[2]
    found = [path for path in mails.glob(f"*/[0-9]*-{slug}.patch") if path.name.partition("-")[2] == f"{slug}.patch"]
    if len(found) != 1:
        raise LabError(f"series/{folder.parent.name}/{folder.name} has {len(found)} patches called *-{slug}.patch in "
                       f"{mails.name}/, not one",
                       "a patch is added, renamed or taken out in a branch: './kexec-lab series --to DIR'")
    diff = found[0].read_bytes().partition(b"\ndiff --git ")[2]
    if not diff:
        raise LabError(f"{found[0].relative_to(mails.parent)} changes nothing")
    return Patch(f"{folder.parent.name}/{folder.name}", subject, body, b"diff --git " + diff)


def read_message(path: Path) -> tuple[str, str]:
    """Subject and body of a message. Raises LabError when it is missing or has no subject."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise LabError(f"{path.parent.name}/{path.name} is missing") from None
    return split_message(text, str(path))


def split_message(text: str, what: str) -> tuple[str, str]:
    """Subject and body of the message `text`. Raises LabError, naming it as `what`, when it has no subject."""
    lines = text.rstrip("\n").split("\n")
    if not lines[0].strip() or (len(lines) > 1 and lines[1].strip()):
        raise LabError(f"{what} does not begin with a subject and a blank line")
    return lines[0].strip(), "\n".join(lines[2:]).strip("\n")


def _check_owned(series: Series) -> None:
    landed = set(series.touched)
    left = {path for patch in series.patches for path in patch.added}
    left -= {path for patch in series.patches for path in patch.removed}
    for path in owned_files(series.root):
        left.discard(path)
        if path not in landed:
            raise LabError(f"{path} is in the repository, but no patch lands it",
                           "add it to a patch in a branch: './kexec-lab series --to DIR'")
    for path in sorted(left):
        lander = next(patch.name for patch in series.patches if path in patch.added)
        raise LabError(f"{series.base.patches}/{lander}.patch lands {path}, which is not in the repository")


def owned_files(root: Path) -> list[str]:
    """The kernel files that stand in the repository, as in-tree paths."""
    return sorted(str(path.relative_to(root)) for folder in KERNEL_FOLDERS
                  for path in (root / folder).rglob("*") if path.is_file())


def read(path: Path) -> File:
    """The file at `path`."""
    return File(path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR))


def read_if_there(path: Path) -> File | None:
    return read(path) if path.is_file() else None


class Scratch:
    """A git repository that holds the touched files only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "--initial-branch=series")

    def git(self, *arguments: str, stdin: bytes | None = None, accept: tuple[int, ...] = (0,),
            env: Mapping[str, str] = {}) -> tuple[int, str]:
        done = proc.run([*GIT, *arguments], cwd=self.folder, env={**GIT_ENV, **identity(IDENTITY), **env}, stdin=stdin,
                        accept=accept)
        return done.returncode, (done.stdout + done.stderr).decode(errors="surrogateescape")

    def write(self, path: str, file: File) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(0o755 if file.executable else 0o644)

    def tree(self) -> str:
        self.git("add", "--all", "--force")
        return self.git("write-tree")[1].strip()


def identity(author: str) -> dict[str, str]:
    """git's environment for a commit by `author`, the same at any time."""
    name, _, address = author.rstrip(">").partition(" <")
    date = DATE.isoformat()
    return {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": address, "GIT_AUTHOR_DATE": date,
            "GIT_COMMITTER_NAME": "Patch Series", "GIT_COMMITTER_EMAIL": "series@localhost", "GIT_COMMITTER_DATE": date}


@contextmanager
def scratch() -> Iterator[Scratch]:
    """A throw-away git repository for the block."""
    with tempfile.TemporaryDirectory(prefix="kexec-lab-") as name:
        yield Scratch(Path(name))


@contextmanager
def _applied(series: Series, tree: Path, upto: int | None = None) -> Iterator[tuple[Scratch, list[str]]]:
    """A repository after the first `upto` (all) patches, and its tree before and after each.

    Raises LabError naming patch and file when one does not apply.
    """
    with scratch() as repository:
        for path in series.touched:
            if (tree / path).is_file():
                repository.write(path, read(tree / path))
        trees = [repository.tree()]
        for patch in series.patches[:upto]:
            _apply(patch, repository, series.base)
            trees.append(repository.git("write-tree")[1].strip())
        yield repository, trees


def _apply(patch: Patch, repository: Scratch, base: Base) -> None:
    # git apply wants every line of context as it stands: no fuzz, only offsets.
    status, output = repository.git("apply", "--index", "--whitespace=nowarn", "-", stdin=patch.diff, accept=(0, 1, 128))
    if status != 0:
        failed = re.findall(r"^error: (?:patch failed: )?([^\s:]+):", output, re.M)
        names = ", ".join(dict.fromkeys(failed)) or "its files"
        raise LabError(f"{base.patches}/{patch.name}.patch does not apply to {names}",
                       output.strip() + f"\n  the tree differs from v{base.version}, which the patches were made for, or "
                       "one of them was edited by hand: './kexec-lab series --to DIR' on the recorded version is "
                       "the way to edit")


def result(series: Series, tree: Path, upto: int | None = None) -> Files:
    """What the first `upto` (all) patches make of the files that they touch in `tree`.

    After all of them, owned files are as they stand in the repository. Raises
    LabError naming patch and file when one does not apply.
    """
    with _applied(series, tree, upto) as (repository, _):
        files = {path: read_if_there(repository.folder / path)
                 for path in dict.fromkeys(p for patch in series.patches[:upto] for p in patch.touched)}
    return files if upto is not None else files | _standing(series)


def options(files: Files) -> set[str]:
    """The configuration options in those of `files` that are called Kconfig."""
    return {name for path, file in files.items() if file and os.path.basename(path).startswith("Kconfig")
            for name in re.findall(r"^(?:menu)?config (\w+)", file.content.decode(), re.M)}


def _standing(series: Series) -> Files:
    """The owned files as they stand in the repository."""
    return {path: read_if_there(series.root / path) for path in series.owned}


@contextmanager
def as_commits(series: Series, tree: Path) -> Iterator[tuple[Path, list[str]]]:
    """A git repository for the block, and in it a commit before and after each patch, of the touched files only.

    Its branch "folded" ends with the last. What was edited in owned files is folded in.
    """
    with _folded(series, tree) as (repository, trees):
        commits = _chain(repository, trees)
        repository.git("branch", "-f", "folded", commits[-1])
        yield repository.folder, commits


def _file_in(repository: Scratch, tree: str, path: str) -> File | None:
    entry = repository.git("ls-tree", tree, path)[1].split()
    if not entry:
        return None
    content = proc.run([*GIT, "cat-file", "blob", entry[2]], cwd=repository.folder, env=GIT_ENV).stdout
    return File(content, entry[0] == "100755")


# Edits of owned files, folded into the patches that their lines are from

@contextmanager
def _folded(series: Series, tree: Path) -> Iterator[tuple[Scratch, list[str]]]:
    """As _applied(), with the owned files as they stand in the repository after the last patch.

    Raises LabError naming file and patches when an edit cannot be folded.
    """
    with _applied(series, tree) as (repository, trees):
        edited = {path: file for path, file in _standing(series).items()
                  if file and file != read_if_there(repository.folder / path)}
        yield repository, _fold(series, repository, trees, edited) if edited else trees


def _fold(series: Series, repository: Scratch, trees: Sequence[str], edited: Mapping[str, File]) -> list[str]:
    commits = _chain(repository, trees)
    repository.git("reset", "-q", "--hard", commits[-1])
    homes = {path: _homes(repository, commits, path, file) for path, file in edited.items()}
    for home in sorted({number for edits in homes.values() for number, *_ in edits}):
        for path, file in edited.items():
            repository.write(path, _edited(repository, commits[-1], path, file, [e for e in homes[path] if e[0] <= home]))
        repository.git("commit", "-q", "--all", "--allow-empty", "-m", f"fixup! {_title(home)}")
    wanted = repository.tree()
    status, said = repository.git("rebase", "-q", "-i", "--autosquash", commits[0], accept=(0, 1, 128),
                                  env={"GIT_SEQUENCE_EDITOR": "true", "GIT_EDITOR": "true"})
    if status:
        stopped = repository.git("log", "-1", "--format=%s", "REBASE_HEAD", accept=(0, 128))[1].strip()
        name = next((patch.name for number, patch in enumerate(series.patches, 1)
                     if stopped.removeprefix("fixup! ") == _title(number)), "a patch")
        raise LabError(f"what was edited in {', '.join(sorted(edited))} can't be folded into {name}: later patches "
                       "change what is beside it", "keep it aside ('git stash'), make a branch ('./kexec-lab series --to "
                       f"DIR'), and edit that patch there, where git shows the conflict\n  {said.strip().splitlines()[0]}")
    folded = repository.git("log", "--reverse", "--format=%T")[1].split()
    assert len(folded) == len(trees) and folded[-1] == wanted
    return folded


def _chain(repository: Scratch, trees: Sequence[str]) -> list[str]:
    """A commit for each of `trees`, one on the other."""
    commits: list[str] = []
    for number, tree in enumerate(trees):
        parent = ["-p", commits[-1]] if commits else []
        commits.append(repository.git("commit-tree", tree, *parent, "-m", _title(number))[1].strip())
    return commits


def _title(number: int) -> str:
    return f"patch {number:04d}."


Edit = tuple[int, int, int, list[bytes]]  # the patch it belongs to, lines from and to, what they become


def _homes(repository: Scratch, commits: Sequence[str], path: str, file: File) -> list[Edit]:
    """The edits that make `file` of what the last of `commits` has at `path`, each with the patch that its lines are from.

    That is the last patch that wrote one of the lines that go, or of the two that
    something goes between.
    """
    blamed = repository.git("blame", "-s", "-l", "--root", commits[-1], "--", path)[1].rstrip("\n").split("\n")
    numbers = [commits.index(line.split()[0]) for line in blamed]
    touching = [number for number, commit in enumerate(commits) if number and repository.git(
        "diff", "--name-only", f"{commit}^", commit, "--", path)[1]]
    old = _file_in(repository, commits[-1], path)
    assert old
    before, after = old.content.splitlines(True), file.content.splitlines(True)
    edits: list[Edit] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            around = numbers[i1:i2] or numbers[max(i1 - 1, 0):i1 + 1]
            # A line that upstream has, too, in a file that is written afresh belongs to who wrote that.
            edits.append((max([*around, touching[0]]), i1, i2, after[j1:j2]))
    return edits or [(touching[-1], 0, 0, [])]  # its mode


def _edited(repository: Scratch, commit: str, path: str, file: File, edits: Sequence[Edit]) -> File:
    old = _file_in(repository, commit, path)
    assert old
    lines = old.content.splitlines(True)
    for _, i1, i2, new in reversed(edits):
        lines[i1:i2] = new
    return File(b"".join(lines), file.executable)


# The mails

def generate(series: Series, tree: Path) -> dict[str, bytes]:
    """The files of the patches' folder: name -> content.

    Raises LabError naming patch and file when a patch does not apply, or when an
    edit of an owned file cannot be folded in.
    """
    files = {}
    with _folded(series, tree) as (repository, trees):
        number = 0
        for group in series.groups:
            count, first = len(group.patches), number
            for index, patch in enumerate(group.patches, 1):
                number += 1
                changes = repository.git(*DIFF, "--patch", trees[number - 1], trees[number])[1]
                files[f"{patch.name}.patch"] = _mail(_subject(group, index, patch.subject), number, patch, changes)
            listing = "\n".join(f"  {patch.subject}" for patch in group.patches)
            recipients = f"\n{group.recipients}" if group.recipients else ""
            cover = Patch("", group.subject, f"{group.body}\n\nPatches ({count}):\n{listing}\n{recipients}", b"")
            files[f"{group.name}/{COVER_LETTER}"] = _mail(
                _subject(group, 0, group.subject), first, cover, repository.git(*DIFF, trees[first], trees[number])[1], "")
    return files


def _subject(group: Group, number: int, subject: str) -> str:
    count, rfc = len(group.patches), group.subject.startswith(RFC)
    return f"[{'RFC ' * rfc}PATCH {number:0{len(str(count))}d}/{count}] {subject.removeprefix(RFC)}"


def _mail(subject: str, minutes: int, patch: Patch, changes: str, separator: str = "---\n") -> bytes:
    body = patch.text.partition("\n\n")[2]
    headers = ["From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001",
               f"From: {patch.author}",
               f"Date: {format_datetime(DATE + timedelta(minutes=minutes))}",
               f"Subject: {subject}"]
    if not (patch.message + patch.author).isascii():
        headers += ["MIME-Version: 1.0", "Content-Type: text/plain; charset=UTF-8",
                    "Content-Transfer-Encoding: 8bit"]
    text = "\n".join(headers) + "\n\n" + body + separator + changes
    return text.encode(errors="surrogateescape")


def write(files: dict[str, bytes], folder: Path) -> list[str]:
    """Make `folder` hold exactly `files`; returns the names that changed."""
    changed = stale(files, folder)
    for name in changed:
        if name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name])
        else:
            (folder / name).unlink()
    for group in _numbered(folder):
        if not any(group.iterdir()):
            group.rmdir()
    return changed


def stale(files: dict[str, bytes], folder: Path) -> list[str]:
    """Names in `folder` that differ from `files`, are missing, or should not be there."""
    present = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name in files.keys() | present.keys() if files.get(name) != present.get(name))


def check(series: Series, tree: Path, exact: bool = True) -> None:
    """Raises LabError naming the files of the patches' folder that are not what the series gives on `tree`.

    On a version other than the recorded one, what a patch changes may stand elsewhere and among
    other lines: not `exact`, then.
    """
    folder = series.mails
    files = generate(series, tree)
    names = stale(files, folder)
    if not exact:
        names = [name for name in names if name not in files or not (folder / name).is_file()
                 or _essence(files[name]) != _essence((folder / name).read_bytes())]
    if names:
        raise LabError(f"{folder.name}/ is stale: " + ", ".join(names), "'./kexec-lab series' regenerates it")


def _essence(mail: bytes) -> list[bytes]:
    """A mail without what depends on the place and the neighbours of its changes."""
    return [line for line in mail.split(b"\n") if not line.startswith((b"@@", b"index ", b" "))]

"""The series: what is mailed, kept as folders, turned into patches.

    series/cover-letter                 subject, blank line, text
    series/0001-slug/message            subject, blank line, text
    series/0001-slug/owned              in-tree paths of files this patch lands, one per line;
                                        '- path' removes a file of the base
    series/0001-slug/hooks.patch        hunks (-p1) into files that upstream owns

Owned files stand whole at their in-tree paths in the repository, as the last
patch leaves them. A patch after the one that lands a file may change it: its
hunks are in that patch's hooks.patch, and taken back for the patches before.
patches/ is generated from all this, and the same input gives the same bytes.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import format_datetime
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Iterator

from lab import paths, proc
from lab.errors import LabError

IDENTITY = "Patch Series <series@localhost>"
DATE = datetime(2026, 11, 20, 12, 0, 0, tzinfo=timezone.utc)
COVER_LETTER = "0000-cover-letter.txt"  # not *.patch: git am takes patches/*.patch
KERNEL_FOLDERS = ("Documentation", "arch", "drivers", "include", "init", "kernel", "lib", "mm",
                  "samples", "scripts", "tools", "virt")

_GIT_ENV = {"PATH": os.environ.get("PATH", ""), "HOME": "/nonexistent", "LC_ALL": "C",
            "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": "/"}


@dataclass(frozen=True)
class File:
    """A file as a tree holds it."""

    content: bytes
    executable: bool = False


@dataclass(frozen=True)
class Patch:
    """One mailed patch. `hooks` is the text of its hunks, with the files they touch in `hooked`."""

    name: str
    subject: str
    body: str
    owned: tuple[str, ...]
    removed: tuple[str, ...]
    hooks: bytes
    hooked: tuple[str, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        return self.owned + self.removed + self.hooked


@dataclass(frozen=True)
class Series:
    """The patches in order, and the owned files' root."""

    root: Path
    patches: tuple[Patch, ...]

    @property
    def owned(self) -> list[str]:
        """In-tree paths of files whose upstream copy the series replaces or removes, or that it adds."""
        return [path for patch in self.patches for path in patch.owned + patch.removed]


def load(root: Path = paths.ROOT) -> Series:
    """Read series/ below `root`.

    Raises LabError when a folder is incomplete, or when an owned file is
    missing, unlisted or listed twice.
    """
    folders = sorted(path for path in (root / "series").glob("[0-9]*") if path.is_dir())
    if not folders:
        raise LabError(f"{root}/series has no patches in it")
    series = Series(root, tuple(_load_patch(folder) for folder in folders))
    _check_owned(series)
    return series


def _load_patch(folder: Path) -> Patch:
    subject, body = _read_message(folder / "message")
    owned: list[str] = []
    removed: list[str] = []
    listing = folder / "owned"
    for line in listing.read_text().splitlines() if listing.exists() else []:
        if line.startswith("- "):
            removed.append(line[2:].strip())
        elif line.strip():
            owned.append(line.strip())
    hooks = folder / "hooks.patch"
    text = hooks.read_bytes() if hooks.exists() else b""
    if not (owned or removed or text.strip()):
        raise LabError(f"series/{folder.name} changes nothing", "it needs an 'owned' list or a 'hooks.patch'")
    return Patch(folder.name, subject, body, tuple(owned), tuple(removed), text, _hooked(text))


def _read_message(path: Path) -> tuple[str, str]:
    try:
        lines = path.read_text().rstrip("\n").split("\n")
    except FileNotFoundError:
        raise LabError(f"series/{path.parent.name}/{path.name} is missing") from None
    if not lines[0].strip() or (len(lines) > 1 and lines[1].strip()):
        raise LabError(f"{path} does not begin with a subject and a blank line")
    return lines[0].strip(), "\n".join(lines[2:]).strip("\n")


def _hooked(text: bytes) -> tuple[str, ...]:
    names = re.findall(rb"^(?:--- a|\+\+\+ b)/([^\t\n]+)", text, re.M)
    return tuple(dict.fromkeys(name.decode() for name in names))


def _check_owned(series: Series) -> None:
    lander: dict[str, str] = {}
    for patch in series.patches:
        for path in patch.owned + patch.removed:
            if path in lander:
                raise LabError(f"{path} is listed by {lander[path]} and by {patch.name}",
                               "an owned file lands in exactly one patch")
            lander[path] = patch.name
        for path in patch.owned:
            if not (series.root / path).is_file():
                raise LabError(f"series/{patch.name}/owned lists {path}, which is not in the repository")
    for path in owned_files(series.root):
        if path not in lander:
            raise LabError(f"{path} is in the repository, but no patch lands it",
                           "list it in one series/*/owned")


def owned_files(root: Path) -> list[str]:
    """The kernel files that stand in the repository, as in-tree paths."""
    return sorted(str(path.relative_to(root)) for folder in KERNEL_FOLDERS
                  for path in (root / folder).rglob("*") if path.is_file())


class _Scratch:
    """A throw-away git repository that holds the touched files only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "--initial-branch=series")

    def git(self, *arguments: str, stdin: bytes | None = None, accept: tuple[int, ...] = (0,)) -> tuple[int, str]:
        done = proc.run(["git", "-c", "core.autocrlf=false", "-c", "core.fileMode=true", *arguments],
                        cwd=self.folder, env=_GIT_ENV, stdin=stdin, accept=accept)
        return done.returncode, (done.stdout + done.stderr).decode(errors="surrogateescape")

    def write(self, path: str, file: File) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(0o755 if file.executable else 0o644)

    def tree(self) -> str:
        self.git("add", "--all", "--force")
        return self.git("write-tree")[1].strip()


def read(path: Path) -> File:
    """The file at `path`."""
    return File(path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR))


@contextmanager
def _applied(series: Series, base: Path, upto: int) -> Iterator[tuple[_Scratch, list[str]]]:
    """A scratch repository after the first `upto` patches, and its tree before and after each."""
    with tempfile.TemporaryDirectory(prefix="kexec-lab-") as name:
        scratch = _Scratch(Path(name))
        for path in dict.fromkeys(p for patch in series.patches for p in patch.touched):
            if (base / path).is_file():
                scratch.write(path, read(base / path))
        trees = [scratch.tree()]
        landing = _landing(series)
        for patch in series.patches[:upto]:
            _apply(patch, landing, scratch)
            trees.append(scratch.tree())
        yield scratch, trees


def _landing(series: Series) -> dict[str, File]:
    """Each owned file as the patch that lands it leaves it: without the hunks of later patches.

    Raises LabError naming the patch whose hunks are not in the file.
    """
    landing: dict[str, File] = {}
    with tempfile.TemporaryDirectory(prefix="kexec-lab-") as name:
        scratch = _Scratch(Path(name))
        landed = {path for patch in series.patches for path in patch.owned}
        for path in landed:
            scratch.write(path, read(series.root / path))
        for patch in reversed(series.patches):
            landed -= set(patch.owned)
            landing |= {path: read(scratch.folder / path) for path in patch.owned}
            changed = [path for path in patch.hooked if path in landed]
            if changed:
                _git_apply(patch, scratch, "--reverse", *(f"--include={path}" for path in changed))
    return landing


def _apply(patch: Patch, landing: dict[str, File], scratch: _Scratch) -> None:
    for path in patch.owned:
        scratch.write(path, landing[path])
    for path in patch.removed:
        try:
            (scratch.folder / path).unlink()
        except FileNotFoundError:
            raise LabError(f"series/{patch.name} removes {path}, which the base does not have") from None
    if patch.hooks.strip():
        _git_apply(patch, scratch)


def _git_apply(patch: Patch, scratch: _Scratch, *options: str) -> None:
    # git apply wants every line of context as it stands: no fuzz, only offsets.
    status, output = scratch.git("apply", "--whitespace=nowarn", *options, "-", stdin=patch.hooks,
                                 accept=(0, 1, 128))
    if status != 0:
        failed = re.findall(r"^error: (?:patch failed: )?([^\s:]+):", output, re.M)
        names = ", ".join(dict.fromkeys(failed)) or "its files"
        raise LabError(f"series/{patch.name}/hooks.patch does not apply to {names}",
                       output.strip() + "\n  the base, or an owned file, differs from the one the hunks were made "
                       "for: refresh them, or use the recorded base")


def result(series: Series, base: Path, upto: int | None = None) -> dict[str, File | None]:
    """What the first `upto` (all) patches make of the files they touch; None is a removed file.

    Raises LabError naming patch and file when one does not apply.
    """
    count = len(series.patches) if upto is None else upto
    with _applied(series, base, count) as (scratch, _):
        touched = dict.fromkeys(p for patch in series.patches[:count] for p in patch.touched)
        return {path: read(scratch.folder / path) if (scratch.folder / path).is_file() else None
                for path in touched}


def generate(series: Series, base: Path) -> dict[str, bytes]:
    """The files of patches/: name -> content.

    Raises LabError naming patch and file when one does not apply.
    """
    count = len(series.patches)
    with _applied(series, base, count) as (scratch, trees):
        files = {}
        for number, patch in enumerate(series.patches, 1):
            changes = _diff(scratch, trees[number - 1], trees[number], "--patch")
            text = _mail(number, count, patch.subject, patch.body + "\n---\n" if patch.body else "---\n", changes)
            files[f"{number:04d}-{patch.name.split('-', 1)[1]}.patch"] = text
        subject, body = _read_message(series.root / "series" / "cover-letter")
        listing = "\n".join(f"  {patch.subject}" for patch in series.patches)
        changes = _diff(scratch, trees[0], trees[-1])
        files[COVER_LETTER] = _mail(0, count, subject, f"{body}\n\nPatches ({count}):\n{listing}\n\n", changes)
        return files


def _diff(scratch: _Scratch, old: str, new: str, *what: str) -> str:
    # A file written afresh is shown as such (-B), not as a patchwork of common lines.
    return scratch.git("diff", "--no-color", "--no-ext-diff", "--no-renames", "-B50%/60%", "--abbrev=12",
                       "--diff-algorithm=myers", "--stat=72", "--summary", *what, old, new)[1]


def _mail(number: int, count: int, subject: str, text: str, changes: str) -> bytes:
    width = len(str(count))
    headers = ["From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001",
               f"From: {IDENTITY}",
               f"Date: {format_datetime(DATE + timedelta(minutes=number))}",
               f"Subject: [PATCH {number:0{width}d}/{count}] {subject}"]
    if not (subject + text).isascii():
        headers += ["MIME-Version: 1.0", "Content-Type: text/plain; charset=UTF-8",
                    "Content-Transfer-Encoding: 8bit"]
    mail = "\n".join(headers) + "\n\n" + text + changes
    return mail.encode(errors="surrogateescape")


def write(files: dict[str, bytes], folder: Path) -> list[str]:
    """Make `folder` hold exactly `files`; returns the names that changed."""
    folder.mkdir(exist_ok=True)
    changed = stale(files, folder)
    for name in changed:
        if name in files:
            (folder / name).write_bytes(files[name])
        else:
            (folder / name).unlink()
    return changed


def stale(files: dict[str, bytes], folder: Path) -> list[str]:
    """Names in `folder` that differ from `files`, are missing, or should not be there."""
    present = {path.name: path.read_bytes() for path in folder.glob("*")} if folder.is_dir() else {}
    return sorted(name for name in files.keys() | present.keys() if files.get(name) != present.get(name))


def check(base: Path, root: Path = paths.ROOT) -> None:
    """Raises LabError naming the files of patches/ that are not what series/ gives."""
    names = stale(generate(load(root), base), root / "patches")
    if names:
        raise LabError("patches/ is stale: " + ", ".join(names), "'./kexec-lab series' regenerates it")

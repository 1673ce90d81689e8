"""A kernel tree with the series applied.

The cached one is a copy of the base by hard links, in which files that the
series touches are replaced, never written through. Only what changed is
rewritten, so that make rebuilds only what depends on it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from lab import base, lock, mutants, paths, proc, say, series, upto as part
from lab.errors import LabError
from lab.series import File

TREE = "tree"
STATE = "overlay.json"  # beside the tree: the paths at which it is not the base


def home(source: base.Source, variant: str = "") -> Path:
    """Where this checkout's tree on `source`, and the objects built from it, are cached."""
    variant = variant or (part.VARIANT if part.chosen() else "")
    return paths.CACHE / "work" / f"{paths.CHECKOUT_ID}-{source.key}{variant}"


def patched(source: base.Source, root: Path = paths.ROOT, upto: int | None = None, variant: str = "") -> Path:
    """The tree with the first `upto` (all, or those that were chosen: lab/upto.py) patches; quick when nothing changed.

    Raises LabError when the base's originals differ from the recorded ones, or
    when a patch does not apply.
    """
    the_series = series.load(source.base, root)
    base.check_originals(source, the_series.owned, root)
    if part.chosen() and not variant:
        upto = the_series.count(part.chosen())
    wanted = mutants.mutate(series.result(the_series, source.tree, upto))
    folder = home(source, variant)
    with lock.held(paths.CACHE / "lock", "the cache"):
        tree = folder / TREE
        if not tree.exists():
            with say.phase(f"laying out a tree of {source.version}"):
                _lay_out(source.tree, tree)
        elif source.package is None:
            _follow(source.tree, tree, _recorded(folder / STATE))
        _overlay(source.tree, tree, folder / STATE, wanted)
    return tree


def export(source: base.Source, target: Path, root: Path = paths.ROOT) -> None:
    """A whole patched tree at `target`, which must not exist, sharing nothing with the cache.

    Raises LabError like patched().
    """
    if target.exists():
        raise LabError(f"{target} exists", "name a folder that does not")
    the_series = series.load(source.base, root)
    base.check_originals(source, the_series.owned, root)
    wanted = series.result(the_series, source.tree)
    with say.phase(f"copying {source.version} to {target}"), paths.whole(target) as folder:
        proc.run(["cp", "-a", "--reflink=auto", source.tree, folder])
        for path, file in wanted.items():
            _replace(folder / path, file)


def _lay_out(origin: Path, tree: Path) -> None:
    with paths.whole(tree) as folder:
        (tree.parent / STATE).unlink(missing_ok=True)
        same_disk = os.stat(origin).st_dev == os.stat(tree.parent).st_dev
        proc.run(["cp", "-al" if same_disk else "-a", origin, folder])
        if (folder / ".git").is_dir():
            shutil.rmtree(folder / ".git")
        (folder / ".git").unlink(missing_ok=True)  # of a git worktree


def _follow(origin: Path, tree: Path, replaced: set[str]) -> None:
    """Bring changes made in a tree given by hand into its copy, but for the `replaced` paths."""
    ours, theirs = _files(tree), _files(origin)
    for path in ours.keys() | theirs.keys():
        if path in replaced or ours.get(path) == theirs.get(path):
            continue
        target = tree / path
        target.unlink(missing_ok=True)
        if path in theirs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin / path, target, follow_symlinks=False)


def _files(top: Path) -> dict[str, tuple[int, int]]:
    """In-tree path -> size and time of change, of every file below `top`."""
    found: dict[str, tuple[int, int]] = {}

    def walk(folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if prefix or entry.name != ".git":
                        walk(entry.path, f"{prefix}{entry.name}/")
                else:
                    status = entry.stat(follow_symlinks=False)
                    found[prefix + entry.name] = (status.st_size, status.st_mtime_ns)

    walk(str(top), "")
    found.pop(".git", None)  # of a git worktree
    return found


def _overlay(origin: Path, tree: Path, state_file: Path, wanted: dict[str, File | None]) -> None:
    before = _recorded(state_file)
    # Recorded first: after an interruption, whatever may have been replaced is looked at again.
    _record(state_file, before | wanted.keys())
    for path in before | wanted.keys():
        original = origin / path
        file = wanted[path] if path in wanted else series.read_if_there(original)
        target = tree / path
        if series.read_if_there(target) != file:
            _replace(target, file)
    _record(state_file, set(wanted))


def _recorded(state_file: Path) -> set[str]:
    return set(json.loads(state_file.read_text())) if state_file.exists() else set()


def _record(state_file: Path, touched: set[str]) -> None:
    temporary = state_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(sorted(touched), indent=1))
    os.rename(temporary, state_file)


def _replace(target: Path, file: File | None) -> None:
    """Never writes through a hard link: the old name goes, a new file takes its place."""
    target.unlink(missing_ok=True)
    if file:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(0o755 if file.executable else 0o644)

"""A series of two patches on a base of a few files, for tests of what is done with series."""

from __future__ import annotations

import json
from pathlib import Path

from lab import base, proc, series
from lab.base import Source

MAKEFILE = "VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = {}\nEXTRAVERSION =\n"
NEW, OLD, GONE, HOOKED = (f"arch/arm64/mm/{name}" for name in ("new.c", "old.c", "gone.c", "Makefile"))
ABOVE = "".join(f"above {number}\n" for number in range(9))
BASE = {"Makefile": MAKEFILE.format(4), "arch/arm64/Kconfig": "", HOOKED: ABOVE + "one\ntwo\nthree\n", OLD: "old\n" * 30,
        GONE: "gone\n"}

GROUP = "1-toy"
Files = dict[str, str | None]  # None removes a file

LINES = [f"line {number}" for number in range(12)]
FIRST: Files = {HOOKED: ABOVE + "one\ninserted\ntwo\nthree\n", NEW: "\n".join(LINES) + "\n"}
SECOND: Files = {OLD: "rewritten\n" * 20, GONE: None}
STEPS = (("0001-hook", "arm64: mm: Hook in\n\nBecause.\n", FIRST),
         ("0002-replace", "arm64: mm: Replace\n\nBecause.\n", SECOND))


def write(top: Path, files: Files) -> None:
    for name, text in files.items():
        if text is None:
            (top / name).unlink(missing_ok=True)
        else:
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(text)


def diffs(*states: Files) -> list[bytes]:
    """The changes from each of these states of a few files to the next."""
    found = []
    for before, after in zip(states, states[1:]):
        with series.scratch() as repository:
            write(repository.folder, {name: text for name, text in before.items() if text is not None})
            old = repository.tree()
            write(repository.folder, after)
            found.append(repository.git("diff", "--no-renames", "-B50%/60%", old, repository.tree())[1].encode())
    return found


def make(top: Path, root: Path, steps: tuple[tuple[str, str, Files], ...] = STEPS) -> Source:
    """Write a base at `top` and a series for it at `root`; returns the base."""
    write(top, dict(BASE))
    write(root, {f"series/{GROUP}/cover-letter": "arm64: A toy\n\nWhy.\n", "series/bases.json": json.dumps([
        {"name": "7.3", "package": "linux-source-7.3", "suites": [], "version": "7.3.4", "packaged": "", "patches": "patches"}])})
    before: Files = dict(BASE)
    for name, message, files in steps:
        write(root, {f"series/{GROUP}/{name}/message": message})
        (root / "patches" / GROUP).mkdir(parents=True, exist_ok=True)
        (root / f"patches/{GROUP}/{name}.patch").write_bytes(b"\n" + diffs(before, files | {
            path: text for path, text in before.items() if path not in files})[0])
        before |= files
    write(root, {path: text for path, text in before.items() if path in (NEW, OLD)})
    source = base.source(top)
    the_series = series.load(source.base, root)
    base.record(source, the_series.owned, root)
    series.write(series.generate(the_series, top), root / "patches")
    return source


def git(folder: Path, *arguments: str) -> str:
    """git as a person uses it, who is called Jane."""
    return proc.run(["git", "-c", "user.name=Jane", "-c", "user.email=jane@localhost", *arguments],
                    cwd=folder).stdout.decode()

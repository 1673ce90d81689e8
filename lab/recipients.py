"""Who each group of patches is mailed to, as the kernel's own script says.

    series/1-group/recipients    "To: " and "Cc: " lines, as b4 has them at the end of a cover letter

The files are written by './kexec-lab series --recipients', stand at the end of the
cover letters' text in patches/, and a test compares them with what the script says.
"""

from __future__ import annotations

from pathlib import Path

from lab import proc
from lab.errors import LabError
from lab.series import RECIPIENTS, Series

SCRIPT = "scripts/get_maintainer.pl"
# Whoever has signed off changes of a file lately is not asked: the base has no history.
OPTIONS = ("--no-git", "--no-git-fallback", "--no-rolestats")
# One kind at a time: who has two roles is given any of them.
KINDS = {"maintainers": ("--no-r", "--no-l"), "reviewers": ("--no-m", "--no-l"), "lists": ("--no-m", "--no-r")}


def ask(series: Series, tree: Path) -> dict[str, str]:
    """The recipients of each group, by its name, as MAINTAINERS in `tree` has them.

    They are those of all its patches, whose text is looked at as well as the
    files that they touch. Raises LabError when the script fails, or names no maintainer.
    """
    answers = {}
    for group in series.groups:
        mails = [series.mails / f"{patch.name}.patch" for patch in group.patches]
        said = {kind: proc.run(["perl", tree / SCRIPT, *OPTIONS, *only, *mails], cwd=tree).stdout.decode()
                for kind, only in KINDS.items()}
        if not said["maintainers"].strip():
            raise LabError(f"{SCRIPT} names nobody for {group.name}")
        answers[group.name] = lines(**said)
    return answers


def lines(maintainers: str, reviewers: str, lists: str) -> str:
    """What the script printed, an address a line, as lines of a cover letter: the same whatever the order."""
    to = sorted(set(maintainers.splitlines()))
    copies = sorted(set(reviewers.splitlines()) - set(to)) + sorted(set(lists.splitlines()))
    return "".join([*(f"To: {one}\n" for one in to), *(f"Cc: {one}\n" for one in copies)])


def write(series: Series, tree: Path) -> list[str]:
    """Bring the files up to date; returns the names of the groups whose recipients changed."""
    changed = []
    for name, text in ask(series, tree).items():
        file = series.root / "series" / name / RECIPIENTS
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
            changed.append(name)
    return changed

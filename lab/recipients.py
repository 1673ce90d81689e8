"""Who each group of patches is mailed to, as the kernel's own script says.

    series/1-group/recipients    "To: " and "Cc: " lines, as b4 has them at the end of a cover letter

The files are written by './kexec-lab series --recipients', stand at the end of the
cover letters' text in patches/, and a test compares them with what the script says.
"""

from __future__ import annotations

import re
from pathlib import Path

from lab import proc
from lab.errors import LabError
from lab.series import RECIPIENTS, Series

SCRIPT = "scripts/get_maintainer.pl"
# Whoever has signed off changes of a file lately is not asked: the base has no history.
OPTIONS = ("--no-git", "--no-git-fallback")
ASKED = ("maintainer", "supporter")  # roles of those that a group is sent to; the others get a copy


def ask(series: Series, tree: Path) -> dict[str, str]:
    """The recipients of each group, by its name, as MAINTAINERS in `tree` has them.

    They are those of all its patches, whose text is looked at as well as the
    files that they touch. Raises LabError when the script fails, or names nobody.
    """
    answers = {}
    for group in series.groups:
        mails = [series.mails / f"{patch.name}.patch" for patch in group.patches]
        said = proc.run(["perl", tree / SCRIPT, *OPTIONS, *mails], cwd=tree).stdout.decode()
        answers[group.name] = lines(said)
        if not answers[group.name]:
            raise LabError(f"{SCRIPT} names nobody for {group.name}")
    return answers


def lines(said: str) -> str:
    """What the script printed, "address (role)" a line, as lines of a cover letter."""
    found = re.findall(r"^(.+?) \(((?:[a-z]+ )?[a-z]+)\b.*\)$", said, re.M)
    to = [f"To: {address}\n" for address, role in found if role in ASKED]
    return "".join(to + [f"Cc: {address}\n" for address, role in found if role not in ASKED])


def write(series: Series, tree: Path) -> list[str]:
    """Bring the files up to date; returns the names of the groups whose recipients changed."""
    changed = []
    for name, text in ask(series, tree).items():
        file = series.root / "series" / name / RECIPIENTS
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
            changed.append(name)
    return changed

"""A part of the series: its groups up to one of them, built and tested as if there were no more.

`check --upto GROUP` chooses one, through the environment, so that all processes of
a run know. A test says by its mark "needs" which groups it needs: by their names
without the number, beside the features that a base may lack.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

from lab import bases, paths
from lab.errors import UsageError

CHOSEN = "KEXEC_LAB_UPTO"  # the name of a group, with its number
VARIANT = "-upto"  # of the cached tree


def groups(root: Path = paths.ROOT) -> list[str]:
    """The folders of all groups, in order."""
    return sorted(path.name for path in (root / "series").glob("[0-9]*") if path.is_dir())


def slug(group: str) -> str:
    """What a group is called in a mark."""
    return group.partition("-")[2]


def find(name: str) -> str:
    """The group called `name`: its folder, its number or the rest. Raises UsageError, with those there are."""
    for group in groups():
        if name in (group, group.partition("-")[0], slug(group)):
            return group
    raise UsageError(f"no group is called '{name}'", "groups: " + " ".join(groups()))


def chosen() -> str:
    """The last group of this run, '' for all of the series."""
    return os.environ.get(CHOSEN, "")


def lacking() -> set[str]:
    """The groups, as marks name them, that this run is without."""
    return {slug(group) for group in groups() if chosen() and group > chosen()}


def has(group: str) -> bool:
    """Does a kernel with the series have this group, named as in a mark?"""
    return group not in lacking()


def marks() -> Iterator[str]:
    """All that a mark "needs" may name."""
    yield from bases.FEATURES
    yield from map(slug, groups())

"""The bases: kernel releases that the series is written for, as series/bases.json describes them.

The first is the default. A base without patches is there to be compared with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from lab import paths
from lab.errors import UsageError

FEATURES = {  # that a base may lack, and what needs them
    "cma-segments": "kexec_file_load() into CMA, since v6.17",
    "kho": "Kexec HandOver, since v6.16",
    "liveupdate": "the live update orchestrator, since v6.19",
}


@dataclass(frozen=True)
class Base:
    """One release: where it comes from, and what about it is special.

    `suites` of Debian are tried in turn for `package`. `version` and `packaged`
    are upstream's and Debian's version of what `originals` were recorded from:
    the SHA-256 of each file that an owned file replaces. `config` is a file of
    lab/config/ that goes on top of base.config, `patches` the folder of its
    patches, `lacks` names FEATURES that it does not have.
    """

    name: str
    package: str
    suites: tuple[str, ...]
    version: str
    packaged: str
    config: str = ""
    patches: str = ""
    lacks: tuple[str, ...] = ()
    originals: dict[str, str] = field(default_factory=dict, compare=False)


def load(root: Path = paths.ROOT) -> list[Base]:
    """All of them, the default first."""
    return [Base(**one | {"suites": tuple(one["suites"]), "lacks": tuple(one.get("lacks", ()))})
            for one in json.loads(_file(root).read_text())]


def default(root: Path = paths.ROOT) -> Base:
    return load(root)[0]


def find(name: str, root: Path = paths.ROOT) -> Base:
    """The base called `name`. Raises UsageError, with the names there are."""
    known = load(root)
    for base in known:
        if base.name == name:
            return base
    raise UsageError(f"no base is called '{name}'", "bases: " + " ".join(base.name for base in known))


def of_version(version: str, root: Path = paths.ROOT) -> Base:
    """The base that a tree of `version`, such as 7.3.5, is nearest to: that of its release, or the default."""
    return next((base for base in load(root) if f"{version}.".startswith(f"{base.name}.")), default(root))


def record(name: str, version: str, packaged: str, originals: dict[str, str], root: Path = paths.ROOT) -> Path:
    """Write what the base called `name` was recorded from; returns the file."""
    file = _file(root)
    entries = json.loads(file.read_text())
    for one in entries:
        if one["name"] == name:
            one |= {"version": version, "packaged": packaged, "originals": originals}
    file.write_text(json.dumps(entries, indent=2) + "\n")
    return file


def _file(root: Path) -> Path:
    return root / "series" / "bases.json"

"""The kernel tree that the series goes on top of: where it comes from, and what has been unpacked.

A base (lab/bases.py) is looked for in a chain of sources, and the first that has
it wins: what is in the laboratory's cache, each of its Debian suites, the
package cache of the machine's own apt. A version other than the recorded one is
taken only if the series applies to it. KERNEL_SRC or --kernel-src names a kernel
tree, a tarball or a package instead.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

from lab import apt, bases, host, lock, paths, proc, say, series
from lab.bases import Base
from lab.errors import LabError, UsageError

FILES = 101000  # in a kernel tree, for a percentage while unpacking
ANY_BASE = "KEXEC_LAB_ANY_BASE"
CHOSEN = "KEXEC_LAB_BASE"
BY_HAND = "KERNEL_SRC"
PACKED = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".deb")
WAY_OUT = "give a kernel tree, a tarball of it or a linux-source package by hand: --kernel-src or KERNEL_SRC"


@dataclass(frozen=True)
class Source:
    """A kernel tree that is never written to.

    `package` says what it was unpacked from, None for a tree given by hand;
    `home` is where what belongs to this source is cached, `key` names it in
    other folders' names.
    """

    base: Base
    tree: Path
    version: str
    package: str | None
    key: str
    home: Path

    def __str__(self) -> str:
        return f"base {self.base.name}: {self.package or f'{self.tree}, {self.version}'}"


@dataclass(frozen=True)
class _Place:
    """Where a package may be had: `get` returns it as a file, or raises LabError."""

    name: str
    get: Callable[[], Path]


def source(given: Path | None = None, wanted: Base | None = None, root: Path = paths.ROOT) -> Source:
    """The kernel tree to build on: `given` by hand or $KERNEL_SRC, else the base `wanted` or $KEXEC_LAB_BASE, else the default.

    Where the default is not to be had, the next base with patches in the repository
    at `root` is taken, and said so. Raises LabError when there is none, UsageError
    when what was given is no kernel.
    """
    if not wanted and os.environ.get(CHOSEN):
        wanted = bases.find(os.environ[CHOSEN], root)
    if not given and os.environ.get(BY_HAND):
        given = Path(os.environ[BY_HAND])
    if given:
        return _by_hand(given.resolve(), wanted)
    if wanted:
        return _found(wanted, root)
    candidates = [base for base in bases.load(root) if base.patches]
    failures = []
    for number, base in enumerate(candidates):
        try:
            return _found(base, root)
        except LabError as error:
            failures.append(error)
            if number + 1 < len(candidates):
                say.info(f"base {base.name} is not to be had: {error.message}; taking base {candidates[number + 1].name}")
    raise failures[0]


def _by_hand(path: Path, wanted: Base | None) -> Source:
    if path.is_file() and path.name.endswith(PACKED):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        return _unpacked(path, path.name, f"file-{digest}", wanted)
    if not (path / "Makefile").is_file() or not (path / "arch/arm64/Kconfig").is_file():
        raise UsageError(f"{path} is no kernel tree", f"{BY_HAND} and --kernel-src take the top folder of one, or one "
                         f"that is packed ({' '.join(PACKED)})")
    if (path / ".config").exists() or (path / "include/config").exists():
        raise LabError(f"{path} has been built in", "run 'make mrproper' in it, or give another tree")
    key = "tree-" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return Source(wanted or bases.of_version(version(path)), path, version(path), None, key, paths.CACHE / "base" / key)


def _found(base: Base, root: Path) -> Source:
    """`base` from the first place that has it. Raises LabError naming each place, and what was wrong there."""
    host.require("base")
    wrong: list[str] = []
    for place in _places(base):
        try:
            deb = place.get()
            package_version = _version_of(deb)
            source = _unpacked(deb, f"{base.package} {package_version}", re.sub(r"[^\w.-]", "_", package_version), base)
            if package_version != base.packaged and base.patches:
                _check_applies(source, root)
            return source
        except LabError as error:
            wrong.append(f"{place.name}: {error.message}")
            say.info(f"   not from {wrong[-1]}")
    raise LabError(f"{base.package} is not to be had", "\n  ".join([*wrong, WAY_OUT]))


def _places(base: Base) -> Iterator[_Place]:
    """The chain, what needs no network first."""
    known = [suite for suite in base.suites if apt.known([base.package], "arm64", suite)]
    for suite in (*known, *(suite for suite in base.suites if suite not in known)):
        yield _Place(suite, lambda suite=suite: apt.fetch([base.package], "arm64", suite)[base.package])
    debs = sorted(apt.machines_archive().glob(f"{base.package}_*_all.deb"), key=lambda deb: _version_of(deb) != base.packaged)
    for deb in debs:
        yield _Place(str(deb), lambda deb=deb: deb)


def _version_of(deb: Path) -> str:
    return deb.name.split("_")[1].replace("%3a", ":")


def _check_applies(source: Source, root: Path) -> None:
    """Raises LabError, naming patch and file, when the series does not apply to a version that it was not made for."""
    try:
        the_series = series.load(source.base, root)
        check_originals(source, the_series.owned, root)
        series.result(the_series, source.tree)
    except LabError as error:
        raise LabError(f"{source.package}: {error.message}", error.hint) from None


def _unpacked(packed: Path, package: str, key: str, base: Base | None) -> Source:
    """The tree in `packed`, unpacked into the cache when it is not there yet."""
    home = paths.CACHE / "base" / key
    tree = home / "tree"
    with lock.held(paths.CACHE / "lock", "the cache"):
        if not tree.exists():
            host.require("base")
            host.check_disk(host.DISK_FRESH)
            with say.phase(f"unpacking {package}"), paths.whole(tree) as folder:
                _unpack(packed, folder)
    return Source(base or bases.of_version(version(tree)), tree, version(tree), package, key, home)


def _unpack(packed: Path, folder: Path) -> None:
    folder.mkdir()
    if packed.suffix == ".deb":
        tarball = f"./usr/src/{packed.name.split('_')[0]}.tar.xz"
        script = ('set -o pipefail; dpkg-deb --fsys-tarfile "$0" | tar -xO "$2" | xz -dT0 '
                  '| tar -xv --strip-components=1 -C "$1"')
    else:
        tarball, script = "", 'tar -xvaf "$0" --strip-components=1 -C "$1"'
    count = 0
    other: list[str] = []

    def seen(line: str) -> None:
        nonlocal count
        if "/" in line and not line.startswith("tar:"):
            count += 1
            say.progress(count, FILES, f"({count} files)")
        else:
            other.append(line)

    if proc.stream(["bash", "-c", script, packed, folder, tarball], seen) != 0:
        raise LabError(f"unpacking {packed.name} failed", "\n".join(other[-5:]))
    if not (folder / "arch/arm64/Kconfig").is_file():
        raise UsageError(f"{packed} holds no kernel tree", WAY_OUT)


def version(tree: Path) -> str:
    """The version in the Makefile of `tree`, such as '7.3.4'."""
    text = (tree / "Makefile").read_text()
    fields = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) *= *(\S*)", text, re.M))
    try:
        return f"{fields['VERSION']}.{fields['PATCHLEVEL']}.{fields['SUBLEVEL']}{fields['EXTRAVERSION']}"
    except KeyError:
        raise UsageError(f"{tree}/Makefile names no kernel version") from None


def _checksum(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def record(source: Source, owned: Iterable[str], root: Path = paths.ROOT) -> Path:
    """Record the copies that `source` has of the `owned` files, which now agree with them, in series/bases.json."""
    sums = {name: _checksum(source.tree / name) for name in sorted(owned)}
    return bases.record(source.base.name, source.version, (source.package or "").rpartition(" ")[2],
                        {name: checksum for name, checksum in sums.items() if checksum}, root)


def check_originals(source: Source, owned: Iterable[str], root: Path = paths.ROOT) -> None:
    """Compare the files that `owned` replaces with what is recorded of the base.

    Raises LabError naming each that differs, unless KEXEC_LAB_ANY_BASE=1: then
    they are only named.
    """
    recorded = bases.find(source.base.name, root)
    differing = [name for name in sorted(owned) if recorded.originals.get(name) != _checksum(source.tree / name)]
    if not differing:
        return
    message = (f"these files of the base ({source.version}) are not those that the series replaces "
               f"(recorded from {recorded.version}):\n  " + "\n  ".join(differing))
    if os.environ.get(ANY_BASE) == "1":
        say.info(message)
        return
    raise LabError(message, f"see what changed in them; --any-base (or {ANY_BASE}=1) builds all the "
                   "same, './kexec-lab series --record-base' records them anew")

"""The base: the kernel tree that the series goes on top of.

By default Debian's packaged source of the release that the series is written
for, unpacked once into the cache. KERNEL_SRC=DIR or --kernel-src takes any
other tree. series/base.json records a checksum of each upstream file that an
owned file replaces, so that a base whose copy changed is named instead of
silently overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

from lab import apt, host, lock, paths, proc, say
from lab.errors import LabError, UsageError

PACKAGE = "linux-source-7.3"
SUITE = "trixie-backports"
FILES = 101000  # in the package, for a percentage while unpacking
HISTORY = ("linux-source-5.10", "bullseye")  # a long-term kernel that relocates with the MMU off
ANY_BASE = "KEXEC_LAB_ANY_BASE"


@dataclass(frozen=True)
class Source:
    """A kernel tree that is never written to.

    `package` is None for a tree given by hand; `home` is where what belongs to
    this base is cached, `key` names it in other folders' names.
    """

    tree: Path
    version: str
    package: str | None
    key: str
    home: Path


def source(kernel_src: Path | None = None) -> Source:
    """The base: `kernel_src`, else $KERNEL_SRC, else Debian's package.

    Raises LabError when there is none to be had, UsageError when the given
    folder is no kernel tree.
    """
    given = kernel_src or (Path(os.environ["KERNEL_SRC"]) if os.environ.get("KERNEL_SRC") else None)
    return _by_hand(given.resolve()) if given else _packaged(PACKAGE, SUITE)


def history() -> Source:
    """An old kernel to compare with, from Debian. Raises LabError when it is not to be had."""
    return _packaged(*HISTORY)


def _by_hand(tree: Path) -> Source:
    if not (tree / "Makefile").is_file() or not (tree / "arch/arm64/Kconfig").is_file():
        raise UsageError(f"{tree} is no kernel tree", "KERNEL_SRC and --kernel-src take the top folder of one")
    if (tree / ".config").exists() or (tree / "include/config").exists():
        raise LabError(f"{tree} has been built in", "run 'make mrproper' in it, or give another tree")
    key = "tree-" + hashlib.sha256(str(tree).encode()).hexdigest()[:8]
    return Source(tree, version(tree), None, key, paths.CACHE / "base" / key)


def _packaged(package: str, suite: str) -> Source:
    host.require("base")
    deb = apt.fetch([package], "arm64", suite)[package]
    package_version = deb.name.split("_")[1]
    key = re.sub(r"[^\w.-]", "_", package_version)
    home = paths.CACHE / "base" / key
    tree = home / "tree"
    with lock.held(paths.CACHE / "lock", "the cache"):
        if not tree.exists():
            host.check_disk(host.DISK_FRESH)
            with say.phase(f"unpacking {package} {package_version}"):
                with paths.whole(tree) as folder:
                    _unpack(package, deb, folder)
    return Source(tree, version(tree), f"{package} {package_version}", key, home)


def _unpack(package: str, deb: Path, folder: Path) -> None:
    folder.mkdir()
    script = ('set -o pipefail; dpkg-deb --fsys-tarfile "$0" | tar -xO "$1" | xz -dT0 '
              '| tar -xv --strip-components=1 -C "$2"')
    member = f"./usr/src/{package}.tar.xz"
    count = 0
    other: list[str] = []

    def seen(line: str) -> None:
        nonlocal count
        if line.startswith(package):
            count += 1
            say.progress(count, FILES, f"({count} files)")
        else:
            other.append(line)

    if proc.stream(["bash", "-c", script, deb, member, folder], seen) != 0:
        raise LabError(f"unpacking {deb.name} failed", "\n".join(other[-5:]))


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


def record(base: Source, owned: Iterable[str], root: Path = paths.ROOT) -> Path:
    """Write series/base.json for `base`, which `owned` files now agree with."""
    sums = {name: _checksum(base.tree / name) for name in sorted(owned)}
    target = root / "series" / "base.json"
    target.write_text(json.dumps({"version": base.version, "package": base.package, "sha256": sums},
                                 indent=2) + "\n")
    return target


def check_originals(base: Source, owned: Iterable[str], root: Path = paths.ROOT) -> None:
    """Compare the files that `owned` replaces with what series/base.json records.

    Raises LabError naming each that differs, unless KEXEC_LAB_ANY_BASE=1: then
    they are only named.
    """
    path = root / "series" / "base.json"
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        raise LabError("series/base.json is missing", "'./kexec-lab series --record-base' writes it") from None
    differing = [name for name in sorted(owned)
                 if recorded["sha256"].get(name) != _checksum(base.tree / name)]
    if not differing:
        return
    listing = "\n  ".join(differing)
    message = (f"these files of the base ({base.version}) are not those that the series replaces "
               f"(recorded from {recorded['version']}):\n  {listing}")
    if os.environ.get(ANY_BASE) == "1":
        say.info(message)
        return
    raise LabError(message, "see what changed in them; --any-base (or KEXEC_LAB_ANY_BASE=1) builds all the "
                   "same, './kexec-lab series --record-base' records them anew")

"""Kernels that are older than this series, and built by others: Debian's own, to be handed over to."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lab import apt, lock, paths, proc
from lab.guest import Guest, archive
from lab.handover import LOADERS, BadHandover
from lab.machine import Machine

META = "linux-image-arm64"  # the package that depends on the kernel of a release
SECTOR = 512  # bytes: what is on a disk comes in whole ones
UP = "lab: an older kernel is up"
# Console and PSCI are built in, all else is modules: such a kernel says what it is, and turns the machine off.
INIT = f"""#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
echo "{UP}: $(uname -r)" >/dev/kmsg
poweroff -f
"""


@dataclass(frozen=True)
class Stock:
    """A kernel, and an initrd that has it say that it is up."""

    version: str  # as `uname -r` has it
    image: Path
    initrd: Path


def fetch(release: str, archives: Guest) -> Stock:
    """The kernel of a Debian release. Raises LabError when it can't be had."""
    meta = apt.fetch([META], "arm64", release)[META]
    depends = proc.run(["dpkg-deb", "-f", meta, "Depends"]).stdout.decode()
    [package] = re.findall(r"linux-image-\S+-arm64", depends)
    deb = apt.fetch([package], "arm64", release)[package]
    folder = paths.CACHE / "stock" / deb.stem
    version = package.removeprefix("linux-image-")
    with lock.held(paths.CACHE / "lock", "the cache"):
        if not folder.exists():
            with paths.whole(folder) as new:
                new.mkdir()
                packed = proc.run(["dpkg-deb", "--fsys-tarfile", deb]).stdout
                image = proc.run(["tar", "-x", "-O", f"./boot/vmlinuz-{version}"], stdin=packed).stdout
                (new / "vmlinuz").write_bytes(image + bytes(-len(image) % SECTOR))
    return Stock(version, folder / "vmlinuz", initrd(archives))


def initrd(archives: Guest) -> Path:
    """The guest's initramfs, beside it in the cache, with an init that says which kernel this is, and ends."""
    path = archives.initrd.with_name("older")
    content = archives.initrd.read_bytes() + archive({"init": (0o755, INIT.encode())})
    with lock.held(paths.CACHE / "lock", "the cache"):
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    return path


def offer(m: Machine, stock: Stock) -> None:
    """Have a machine that has not been started find this kernel where the next one is."""
    m.boot = replace(m.boot, next_image=stock.image, next_initrd=stock.initrd)


def hand_over(m: Machine, stock: Stock, loader: str, timeout: float = 120.0) -> None:
    """Load the kernel that was offered, and leave for it; the machine has ended then.

    Raises BadHandover if it was another that came up, TimeoutFailure if none did.
    """
    m.sh("fetch", timeout=300)
    m.sh(f'{LOADERS[loader]} /next/Image --initrd=/next/initrd --command-line="console=ttyAMA0 earlycon panic=-1"',
         timeout=300)
    said = m.leave("kexec -e", timeout)
    if f"{UP}: {stock.version}" not in said:
        raise BadHandover(f"no kernel {stock.version} has come up", m)

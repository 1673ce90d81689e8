"""Root file systems of Debian releases, made in folders, and commands that run in them.

As root, mmdebstrap makes one as it is; anybody else gets one in a user
namespace, with the subordinate IDs that Debian gives each user.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Sequence

from lab import apt, host, paths, proc, say
from lab.errors import LabError

CHECKOUT = "kexec-lab"  # where a copy of this checkout is put, below a root
MADE_HERE = (".git", "out", "__pycache__")  # in a checkout, and not part of it

# In namespaces of their own, so that nothing stays mounted, or running, when the command has ended.
ENTER = """\
root=$1; shift
mount --rbind /dev "$root/dev" && mount --rbind /sys "$root/sys" && mount -t proc proc "$root/proc" &&
exec chroot "$root" "$@"
"""


def make(release: str, root: Path) -> None:
    """Make a minimal system of `release`, for this machine's architecture, in the folder `root`, which must not exist.

    It takes packages from where this machine does. Raises LabError when that fails.
    """
    host.require("rootfs")
    output: list[str] = []
    root.parent.mkdir(parents=True, exist_ok=True)
    sources = root.with_name(root.name + ".sources")
    sources.write_text(apt.sources_of(release))
    with say.phase(f"making a root file system of {release}"):
        status = proc.stream(["mmdebstrap", "--variant=apt", "--include=ca-certificates",
                              *(f"--aptopt={line}" for line in apt.proxies()), release, root, sources], output.append)
    sources.unlink()
    if status:
        raise LabError(f"mmdebstrap cannot make a root file system of {release}", "\n".join(output[-proc.TAIL:]))


def remove(root: Path) -> None:
    """Remove a root file system, whoever its files belong to."""
    proc.run([*_owner(), "rm", "-rf", "--one-file-system", root])


def command(root: Path, words: Sequence[str]) -> list[str]:
    """What runs `words` as root of the file system `root`; everything that it started ends with it."""
    return [*_owner(), "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh", str(root),
            "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", *words]


def put_checkout(root: Path) -> Path:
    """Copy this checkout, but not what was made in it, into `root`. Returns its path there."""
    target = root.with_name(root.name + ".checkout")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(paths.ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*MADE_HERE))
    # Through a pipe: who owns the root can't always read what belongs to whoever runs this.
    packed = proc.run(["tar", "-C", target, "-c", "."]).stdout
    shutil.rmtree(target)
    inside = Path("/") / CHECKOUT
    proc.run(command(root, ["mkdir", str(inside)]))
    proc.run(command(root, ["tar", "-C", str(inside), "--no-same-owner", "-x"]), stdin=packed)
    return inside


def _owner() -> list[str]:
    """What a command is to begin with to be root, here or in a user namespace."""
    return [] if os.geteuid() == 0 else ["mmdebstrap", "--unshare-helper"]

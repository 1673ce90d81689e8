"""The machine the laboratory runs on: what it has, what it lacks, how to add it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import paths, proc, say
from lab.errors import LabError

GIB = 1 << 30
DISK_FRESH = 12  # GiB: base unpacked, its packed form, objects of all kernels, compiler cache
DISK_MORE = 2  # GiB for one more kernel
MEMORY = 2  # GiB available: two compilers and a link
MEMORY_GUEST = 3  # GiB that a guest uses, whatever it is told that it has

ARM64 = platform.machine() in ("aarch64", "arm64")
CROSS_COMPILE = "" if ARM64 else "aarch64-linux-gnu-"
CLANG = "clang-19"  # v7.3 takes 17 and up, Debian 12 has 16 or this


@dataclass(frozen=True)
class Feature:
    """Debian packages, and programs by which other systems can tell that they have them."""

    packages: tuple[str, ...]
    programs: tuple[str, ...]


_CROSS = () if ARM64 else ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross")
_IDS = () if os.geteuid() == 0 else ("uidmap",)  # for a user namespace

FEATURES: dict[str, Feature] = {
    "base": Feature(("git", "tar", "xz-utils"), ("git", "tar", "xz")),
    "build": Feature(("gcc", "libc6-dev", *_CROSS, "make", "bison", "flex", "bc", "perl", "ccache",
                       "rsync"),  # by which selftests are installed
                     (CROSS_COMPILE + "gcc", "gcc", "make", "bison", "flex", "bc", "perl", "ccache", "rsync")),
    "clang": Feature((CLANG,), (CLANG,)),
    "boot": Feature(("qemu-system-arm", "qemu-utils", "qemu-efi-aarch64"), ("qemu-system-aarch64", "qemu-img")),
    "test": Feature(("python3-pytest", "python3-pytest-timeout", "python3-pytest-xdist"), ()),
    "plot": Feature(("gnuplot-nox",), ("gnuplot",)),
    "rootfs": Feature(("mmdebstrap", *_IDS), ("mmdebstrap", "unshare")),
    "lint": Feature(("sparse", "perl", "patch", "dt-schema"), ("sparse", "perl", "patch", "dt-validate")),
}


def is_debian() -> bool:
    return all(map(shutil.which, ("dpkg-query", "apt-get", "apt-config")))


def release() -> str:
    """The code name of the Debian release that runs here, or ''."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    return ""


def architecture() -> str:
    """What Debian calls the architecture of this machine."""
    return proc.run(["dpkg", "--print-architecture"]).stdout.decode().strip()


def missing_packages(*features: str) -> list[str]:
    """The Debian packages of `features` that are not installed."""
    wanted = list(dict.fromkeys(p for f in features for p in FEATURES[f].packages))
    query = proc.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted],
                     accept=(0, 1))
    present = {line.split()[0] for line in query.stdout.decode().splitlines()
               if line.endswith(" installed")}
    return [package for package in wanted if package not in present]


def require(*features: str) -> None:
    """Install what `features` need and is missing, after saying so.

    Raises LabError when it cannot be installed, or, on a system other than
    Debian, when programs are missing.
    """
    if not is_debian():
        _require_programs(features)
        return
    missing = missing_packages(*features)
    if not missing:
        return
    with say.phase("installing " + " ".join(missing)):
        if not _apt_get("install", "-y", "--no-install-recommends", *missing):
            _apt_get("update")
            _apt_get("install", "-y", "--no-install-recommends", *missing)
        still = missing_packages(*features)
        if still:
            raise LabError(f"could not install {' '.join(still)}",
                           f"run 'apt-get install {' '.join(still)}' as root and see what it says")


def _require_programs(features: tuple[str, ...]) -> None:
    missing = {p for f in features for p in FEATURES[f].programs if not shutil.which(p)}
    if missing:
        packages = " ".join(dict.fromkeys(p for f in features for p in FEATURES[f].packages))
        raise LabError(f"not a Debian system, and these programs are missing: {' '.join(sorted(missing))}",
                       f"install what Debian calls {packages}")


def _apt_get(*arguments: str) -> bool:
    command = ["apt-get", "-q", *arguments]
    if os.geteuid() != 0:
        # sudo asks for a password on the terminal: stay in the foreground.
        if not shutil.which("sudo"):
            raise LabError("packages are missing, and there is no sudo to install them with",
                           f"as root: {' '.join(command)}")
        command = ["sudo", "env", "DEBIAN_FRONTEND=noninteractive", *command]
    say.info("   " + " ".join(command))
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    return subprocess.run(command, env=env, preexec_fn=proc.die_with_parent).returncode == 0


def cores() -> int:
    return len(os.sched_getaffinity(0))


def guests_at_once() -> int:
    """How many guests can run beside each other without waiting for each other."""
    return max(1, min(cores(), int(available_memory() / MEMORY_GUEST)))


def check_disk(gib: int) -> None:
    """Raises LabError when the cache's file system has less than `gib` GiB free."""
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(paths.CACHE).free / GIB
    if free < gib:
        raise LabError(f"{free:.1f} GiB are free at {paths.CACHE}, {gib} are needed",
                       "make room, run './kexec-lab clean --all', or set XDG_CACHE_HOME to another disk")


def available_memory() -> float:
    """GiB that can be had without swapping."""
    words = Path("/proc/meminfo").read_text().split()
    return int(words[words.index("MemAvailable:") + 1]) * 1024 / GIB


def check_memory() -> None:
    """Raises LabError when less than MEMORY GiB are available for compilers."""
    available = available_memory()
    if available < MEMORY:
        raise LabError(f"{available:.1f} GiB of memory are available, {MEMORY} are needed for a build",
                       "end other programs first")


def has_kvm() -> bool:
    """Whether this host can run arm64 guests natively."""
    return ARM64 and os.access("/dev/kvm", os.R_OK | os.W_OK)

"""Packages as inputs: fetched through apt, signatures checked, nothing added to the system.

A private apt configuration lives below the cache. It takes mirror and keyring
from the machine's own source list, names the suite that is wanted, and has its
own index files, cache and (empty) installation status.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lab import host, lock, paths, proc, say
from lab.errors import LabError

SOURCES = Path("/etc/apt")
INDEX_AGE = 24 * 3600  # seconds after which index files are fetched again
MANIFEST = "debs.json"

# Read after the machine's configuration, so that proxies and the like stay in force
# and hooks and additional index targets of other packages don't.
CONFIGURATION = """\
#clear APT::Update;
#clear DPkg;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{
    MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
    flatMetaKey "Packages";
    ShortDescription "Packages";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
    Optional "0";
}};
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Architectures;
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Dir::Etc::SourceList "{root}/lab.sources";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{root}/state";
Dir::State::Lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Cache::archives "{archives}";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""


@dataclass(frozen=True)
class Origin:
    """One entry of the machine's source list."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str  # keyring, key, or '' for the keys that apt trusts anyway

    def stanza(self, suites: tuple[str, ...]) -> str:
        signed = f"Signed-By: {self.signed_by}\n" if self.signed_by else ""
        return (f"Types: deb\nURIs: {' '.join(self.uris)}\nSuites: {' '.join(suites)}\n"
                f"Components: main\n{signed}")


def origins(etc: Path = SOURCES) -> list[Origin]:
    """All enabled binary entries of the source lists below `etc`, in order."""
    found: list[Origin] = []
    parts = etc / "sources.list.d"
    for path in [etc / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.exists():
            found += _one_line(path.read_text())
    for path in sorted(parts.glob("*.sources")):
        found += _deb822(path.read_text())
    return found


def _one_line(text: str) -> list[Origin]:
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match:
            options, uri, suite, components = match.groups()
            signed = re.search(r"signed-by=(\S+)", options or "")
            found.append(Origin((uri,), (suite,), tuple(components.split()),
                                signed.group(1).replace(",", " ") if signed else ""))
    return found


def _deb822(text: str) -> list[Origin]:
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        lines = "\n".join(line for line in stanza.splitlines() if not line.startswith("#"))
        fields = {key.lower(): value.strip() for key, value in
                  re.findall(r"^([\w-]+):((?:.*)(?:\n[ \t].*)*)", lines, re.M)}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        found.append(Origin(tuple(fields.get("uris", "").split()), tuple(fields.get("suites", "").split()),
                            tuple(fields.get("components", "").split()), fields.get("signed-by", "")))
    return found


def stanzas(suite: str | None, release: str, found: list[Origin], upon: str = "") -> str:
    """The private source list for `suite`, or for `release` with its updates when None.

    `upon` names the release that `suite` adds to, where its packages depend on those of that.
    Raises LabError when no entry of the machine is Debian's archive of `release`.
    """
    kin = _kin(release, found)
    if suite:
        archive = next(o for o in kin if release in o.suites)
        return archive.stanza((upon, suite) if upon else (suite,))
    return "\n".join(o.stanza(tuple(s for s in o.suites if s in _suites(release))) for o in kin)


def sources_of(other: str) -> str:
    """The source list of a machine like this one that runs the release `other`. Raises LabError like stanzas()."""
    release = host.release()
    return "\n".join(o.stanza(tuple(s.replace(release, other) for s in o.suites if s in _suites(release)))
                     for o in _kin(release, origins()))


def proxies() -> list[str]:
    """The lines of this machine's apt configuration that say how the network is reached."""
    dump = proc.run(["apt-config", "dump"]).stdout.decode()
    return [line for line in dump.splitlines() if re.match(r'Acquire::(https?::)+.*Proxy.* "[^"]', line)]


def _suites(release: str) -> tuple[str, ...]:
    return release, f"{release}-updates", f"{release}-security", f"{release}/updates"


def _kin(release: str, found: list[Origin]) -> list[Origin]:
    """The entries of Debian's archive of `release`, its updates and its security updates.

    Raises LabError when there are none.
    """
    debian = [o for o in found if "main" in o.components and set(o.suites) & set(_suites(release))]
    archives = [o for o in debian if release in o.suites]
    # Other vendors use Debian's suite names too; the keyring tells them apart.
    archives.sort(key=lambda o: "debian-archive-keyring" not in o.signed_by)
    if not archives:
        raise LabError(f"no entry for Debian '{release}' main in this machine's apt sources",
                       "add Debian's archive to the apt sources, or give the kernel by hand: KERNEL_SRC")
    return [o for o in debian if o.signed_by == archives[0].signed_by]


def fetch(packages: list[str], arch: str, suite: str | None = None, deps: bool = False,
          upon: str = "") -> dict[str, Path]:
    """Packages as files: name -> .deb. What was fetched once stays, and needs no network.

    `suite` None means the release this machine runs; `deps` adds everything the
    packages depend on, from `suite` or the release `upon`. Raises LabError naming
    what could not be had.
    """
    if not host.is_debian():
        raise LabError(f"{' '.join(packages)} cannot be fetched: this is not a Debian system",
                       "run the laboratory on Debian 12 or 13")
    release = host.release()
    root, folder = _folders(packages, arch, f"{suite}-upon-{upon}" if upon else suite or release, deps)
    with lock.held(paths.CACHE / "lock", "the cache"):
        if there := _known(folder):
            return there
        with say.phase(f"fetching {' '.join(packages)} ({arch}, {suite or release})"):
            configuration = _configure(root, folder, arch, stanzas(suite, release, origins(), upon))
            _update(root, configuration, packages)
            wanted = ["-t", suite] if suite and upon else []
            return _download(folder, configuration, packages, deps, wanted)


def known(packages: list[str], arch: str, suite: str) -> bool:
    """Whether fetch() needs no network for these."""
    return bool(_known(_folders(packages, arch, suite, deps=False)[1]))


def machines_archive() -> Path:
    """The folder in which the machine's own apt keeps packages that it has downloaded."""
    said = proc.run(["apt-config", "shell", "archives", "Dir::Cache::archives/d"]).stdout.decode()
    return Path(shlex.split(said)[0].partition("=")[2])


def _folders(packages: list[str], arch: str, suite: str, deps: bool) -> tuple[Path, Path]:
    """Where what belongs to a suite is cached, and where these packages of it are."""
    root = paths.CACHE / "apt" / f"{suite}-{arch}"
    return root, root / ("-".join(packages) + ("-with-dependencies" if deps else ""))


def _known(folder: Path) -> dict[str, Path]:
    """What an earlier call downloaded; empty when it did not get to its end."""
    try:
        names = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return {}
    debs = {name: folder / file for name, file in names.items()}
    return debs if all(path.exists() for path in debs.values()) else {}


def _configure(root: Path, folder: Path, arch: str, sources: str) -> Path:
    for needed in (root / "lists/partial", root / "cache", root / "state", folder / "partial"):
        needed.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.deb"):
        left_over.unlink()
    (root / "status").touch()
    listing = root / "lab.sources"
    if not listing.exists() or listing.read_text() != sources:
        listing.write_text(sources)
        (root / "updated").unlink(missing_ok=True)
    configuration = folder / "apt.conf"
    configuration.write_text(CONFIGURATION.format(arch=arch, root=root, archives=folder))
    return configuration


def _update(root: Path, configuration: Path, packages: list[str]) -> None:
    stamp = root / "updated"
    if stamp.exists() and time.time() - stamp.stat().st_mtime < INDEX_AGE:
        return
    output: list[str] = []
    status = proc.stream(["apt-get", "-c", configuration, "-q", "update", "-o",
                          "APT::Update::Error-Mode=any"], output.append)
    if status != 0:
        raise LabError(f"the package index for {' '.join(packages)} cannot be fetched",
                       _apt_complaint(output) + "is there a network? With a kernel at hand: KERNEL_SRC")
    stamp.touch()


def _download(folder: Path, configuration: Path, packages: list[str], deps: bool,
              wanted: list[str]) -> dict[str, Path]:
    apt = ["apt-get", "-c", configuration, "-q", "-y", *wanted]
    action = ["install", "--download-only"] if deps else ["download"]
    listing = subprocess.run([*apt, *action, "--print-uris", *packages], text=True, capture_output=True,
                             cwd=folder, preexec_fn=proc.die_with_parent)
    if listing.returncode != 0:
        raise LabError(f"no such package: {' '.join(packages)}", _apt_complaint(listing.stderr.splitlines())
                       + "a kernel can be given by hand: KERNEL_SRC")
    # 'http://...' name_1.0_arm64.deb 1234 SHA256:...
    items = [shlex.split(line) for line in listing.stdout.splitlines() if line.startswith("'")]
    debs = {file.split("_", 1)[0]: folder / file for _, file, *_ in items}
    output: list[str] = []
    with _Growth(list(debs.values()), total=sum(int(size) for _, _, size, *_ in items)):
        status = proc.stream([*apt, *action, *packages], output.append, cwd=folder)
    absent = [name for name, path in debs.items() if not path.exists()]
    if status != 0 or absent:
        raise LabError(f"downloading {' '.join(absent or packages)} failed", _apt_complaint(output)
                       + "is there a network? With a kernel at hand: KERNEL_SRC")
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps({name: path.name for name, path in debs.items()}, indent=1))
    os.rename(temporary, folder / MANIFEST)
    return debs


def _apt_complaint(output: list[str]) -> str:
    lines = [line for line in output if line.startswith(("E:", "W:", "Err:"))][-4:]
    return "".join(f"apt: {line}\n  " for line in lines)


class _Growth:
    """Reports how much of a download has arrived, from the sizes of its files."""

    def __init__(self, files: list[Path], total: int) -> None:
        self._files, self._total = files, total
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            size = 0
            for file in self._files:
                for path in (file, file.parent / "partial" / file.name):
                    try:
                        size += path.stat().st_size
                    except FileNotFoundError:
                        continue
            say.progress(size, self._total, f"of {self._total / 1e6:.0f} MB")

"""Where the base comes from, and what is said when it cannot come."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest

import toy
from lab import apt, base, bases, build, host, paths, proc
from lab.errors import LabError, UsageError

DEB822 = """\
# the archive
Types: deb deb-src
URIs: http://archive.invalid/debian
# a comment inside
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://security.invalid/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://off.invalid/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://sources.invalid/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://vendor.invalid/debian
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abcdef
 -----END PGP PUBLIC KEY BLOCK-----
"""

ONE_LINE = """\
# deb http://commented.invalid/debian bookworm main
deb-src http://sources.invalid/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] http://vendor.invalid/linux bookworm stable
deb http://archive.invalid/debian/ bookworm main contrib # trailing
"""


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822_sources(etc: Path) -> None:
    (etc / "sources.list.d/vendor.sources").write_text(DEB822)
    found = apt.origins(etc)
    assert [o.uris[0] for o in found] == ["http://archive.invalid/debian", "http://security.invalid/debian-security",
                                          "http://vendor.invalid/debian"]
    assert found[0].suites == ("bookworm", "bookworm-updates")
    guest = apt.stanzas(None, "bookworm", found)
    assert "Suites: bookworm bookworm-updates\n" in guest and "Suites: bookworm-security\n" in guest
    assert "vendor" not in guest  # signed by somebody else
    backports = apt.stanzas("trixie-backports", "bookworm", found)
    assert backports == ("Types: deb\nURIs: http://archive.invalid/debian\nSuites: trixie-backports\n"
                         "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n")


def test_one_line_sources(etc: Path) -> None:
    (etc / "sources.list").write_text(ONE_LINE)
    found = apt.origins(etc)
    assert [o.uris[0] for o in found] == ["http://vendor.invalid/linux", "http://archive.invalid/debian/"]
    assert found[0].signed_by == "/usr/share/keyrings/vendor.gpg"
    assert "URIs: http://archive.invalid/debian/\nSuites: trixie-backports" in \
        apt.stanzas("trixie-backports", "bookworm", found)


def test_a_machine_without_debian_in_its_sources(etc: Path) -> None:
    with pytest.raises(LabError, match="no entry for Debian 'bookworm'") as raised:
        apt.stanzas(None, "bookworm", apt.origins(etc))
    assert "KERNEL_SRC" in raised.value.hint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_what_was_fetched_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    source = base.source()
    monkeypatch.setattr(apt, "origins", lambda *_: pytest.fail("asked for the sources"))
    assert base.source() == source


# A chain of sources, in an archive and a package cache made for the test

PACKAGE = "linux-source-7.3"


class Archive:
    """Debian's archive in a folder, and a checkout with a toy series for what is in it."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top, self.machine = top / "archive", top / "machine"
        self.root = top / "checkout"
        self.machine.mkdir()
        toy.make(top / "linux", self.root)
        self.describe(suites=["trixie-backports", "forky", "sid"])
        origin = apt.Origin((f"copy:{self.top}",), (host.release(),), ("main",), "")
        stanza = apt.Origin.stanza
        monkeypatch.setattr(apt.Origin, "stanza", lambda *words: stanza(*words) + "Trusted: yes\n")  # nobody signed it
        monkeypatch.setattr(apt, "origins", lambda: [origin])
        monkeypatch.setattr(apt, "machines_archive", lambda: self.machine)
        monkeypatch.setattr(host, "check_disk", lambda gib: None)
        for variable in (base.BY_HAND, base.CHOSEN, base.ANY_BASE):
            monkeypatch.delenv(variable, raising=False)
        for suite in ("trixie-backports", "forky", "sid"):
            self.publish(suite)

    def describe(self, **changes: object) -> None:
        file = self.root / "series/bases.json"
        entries = json.loads(file.read_text())
        entries[0] |= {"packaged": "7.3.4-1", **changes}
        file.write_text(json.dumps(entries))

    def also(self, name: str, **changes: object) -> None:
        """Describe one more base, which the same patches are for."""
        file = self.root / "series/bases.json"
        entries = json.loads(file.read_text())
        entries.append(entries[0] | {"name": name, **changes})
        file.write_text(json.dumps(entries))

    def package(self, folder: Path, version: str, files: toy.Files = {}, name: str = PACKAGE) -> Path:
        """Make a package with a kernel tree of this version: the toys' base with these files changed."""
        with tempfile.TemporaryDirectory() as temporary:
            tree, deb = Path(temporary) / name, Path(temporary) / "deb"
            release, _, update = version.partition("-")[0].rpartition(".")
            makefile = toy.MAKEFILE.format(update).replace("PATCHLEVEL = 3", f"PATCHLEVEL = {release.split('.')[1]}")
            toy.write(tree, {**toy.BASE, "Makefile": makefile, **files})
            toy.write(deb, {"DEBIAN/control": f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
                            "Maintainer: Nobody <nobody@localhost>\nDescription: a toy\n"})
            (deb / "usr/src").mkdir(parents=True)
            proc.run(["tar", "-C", temporary, "-cJf", deb / f"usr/src/{name}.tar.xz", name])
            folder.mkdir(parents=True, exist_ok=True)
            proc.run(["dpkg-deb", "--root-owner-group", "-b", deb, folder / f"{name}_{version}_all.deb"])
        return folder / f"{name}_{version}_all.deb"

    def publish(self, suite: str, *debs: Path) -> None:
        """Write the index of a suite that holds these packages."""
        index = ""
        for deb in debs:
            control = proc.run(["dpkg-deb", "-f", deb]).stdout.decode()
            digest = hashlib.sha256(deb.read_bytes()).hexdigest()
            index += f"{control}Filename: {deb.relative_to(self.top)}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n\n"
        dists = self.top / "dists" / suite
        toy.write(dists, {"main/binary-arm64/Packages": index})
        digest = hashlib.sha256(index.encode()).hexdigest()
        toy.write(dists, {"Release": f"Suite: {suite}\nCodename: {suite}\nArchitectures: arm64\nComponents: main\n"
                          f"SHA256:\n {digest} {len(index)} main/binary-arm64/Packages\n"})

    def pool(self, version: str, files: toy.Files = {}, name: str = PACKAGE) -> Path:
        return self.package(self.top / "pool", version, files, name)

    def source(self, given: Path | None = None) -> base.Source:
        return base.source(given, root=self.root)


@pytest.fixture
def archive(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    return Archive(tmp_path, monkeypatch)


def test_the_suite_that_it_is_recorded_from(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.publish("trixie-backports", archive.pool("7.3.4-1"))
    source = archive.source()
    assert (source.version, source.package, source.base.name) == ("7.3.4", f"{PACKAGE} 7.3.4-1", "7.3")
    assert "fetching linux-source-7.3 (arm64, trixie-backports)" in capsys.readouterr().out


def test_another_suite_when_that_one_has_moved_on(archive: Archive, capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    archive.publish("trixie-backports", archive.pool("7.4.1-1", name="linux-source-7.4"))
    archive.publish("sid", archive.pool("7.3.4-1"))
    source = archive.source()
    assert source.package == f"{PACKAGE} 7.3.4-1"
    said = capsys.readouterr().out
    assert "not from trixie-backports: no such package: linux-source-7.3" in said and "not from forky: no such" in said
    assert "fetching linux-source-7.3 (arm64, sid)" in said
    # From then on it is there, and nobody asks for it again.
    monkeypatch.setattr(apt, "origins", lambda: pytest.fail("asked for the sources"))
    assert archive.source() == source
    assert "not from" not in capsys.readouterr().out


def test_the_package_cache_of_the_machine(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.package(archive.machine, "7.3.9-1")
    archive.package(archive.machine, "7.3.4-1")
    assert archive.source().version == "7.3.4"
    assert "not from sid: no such package" in capsys.readouterr().out


def test_an_update_is_taken(archive: Archive) -> None:
    archive.publish("trixie-backports", archive.pool("7.3.5-1", {toy.HOOKED: "zero\n" + toy.BASE[toy.HOOKED]}))
    assert archive.source().version == "7.3.5"


@pytest.mark.parametrize("path, text, complaint", [
    (toy.HOOKED, "another\n", "patches/1-toy/0001-hook.patch does not apply to arch/arm64/mm/Makefile"),
    (toy.OLD, "upstream changed it\n", "not those that the series replaces (recorded from 7.3.4):\n")])
def test_an_update_that_a_patch_is_not_for(archive: Archive, capsys: pytest.CaptureFixture[str], path: str, text: str,
                                           complaint: str) -> None:
    """Patch and file are named, and the recorded version is looked for."""
    archive.publish("trixie-backports", archive.pool("7.3.5-1", {path: text}))
    with pytest.raises(LabError, match="linux-source-7.3 is not to be had") as raised:
        archive.source()
    assert complaint in raised.value.hint and path in raised.value.hint
    archive.publish("forky", archive.pool("7.3.4-1"))
    shutil.rmtree(paths.CACHE / "apt/forky-arm64")  # its index is a day old, say
    assert archive.source().version == "7.3.4"
    said = capsys.readouterr().out
    assert f"not from trixie-backports: {PACKAGE} 7.3.5-1: " in said and path in said


def test_the_next_base(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.also("7.2", package="linux-source-7.2", version="7.2.8", packaged="7.2.8-1")
    archive.also("5.10", package="linux-source-5.10", patches="")
    archive.publish("forky", archive.pool("7.2.8-1", name="linux-source-7.2"))
    source = archive.source()
    assert (source.base.name, source.version) == ("7.2", "7.2.8")
    assert "base 7.3 is not to be had: linux-source-7.3 is not to be had; taking base 7.2" in capsys.readouterr().out


def test_a_base_that_was_asked_for_is_not_replaced(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.also("7.2", package="linux-source-7.2", version="7.2.8", packaged="7.2.8-1")
    archive.publish("forky", archive.pool("7.2.8-1", name="linux-source-7.2"))
    monkeypatch.setenv(base.CHOSEN, "7.3")
    with pytest.raises(LabError, match="linux-source-7.3 is not to be had"):
        archive.source()
    monkeypatch.setenv(base.CHOSEN, "7.2")
    assert archive.source().version == "7.2.8"


def test_no_network_names_each_source_and_the_way_around(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = apt.Origin(("http://127.0.0.1:9/debian",), (host.release(),), ("main",), "")
    monkeypatch.setattr(apt, "origins", lambda: [nowhere])
    archive.describe(suites=["trixie-backports", "sid"])
    begin = time.monotonic()
    with pytest.raises(LabError, match="linux-source-7.3 is not to be had") as raised:
        archive.source()
    assert time.monotonic() - begin < 60
    for suite in ("trixie-backports", "sid"):
        assert f"{suite}: the package index for linux-source-7.3 cannot be fetched" in raised.value.hint
    assert "--kernel-src" in raised.value.hint and not (paths.CACHE / "base").exists()


def test_a_package_and_a_tarball_by_hand(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "origins", lambda: pytest.fail("asked for the sources"))
    deb = archive.package(tmp_path, "7.3.4-1")
    by_package = archive.source(deb)
    proc.run(["dpkg-deb", "-x", deb, tmp_path / "out"])
    (tarball,) = (tmp_path / "out").rglob("*.tar.xz")
    monkeypatch.setenv(base.BY_HAND, str(tarball))
    by_tarball = archive.source()
    for source in (by_package, by_tarball):
        assert source.version == "7.3.4" and source.package in (deb.name, tarball.name)
        base.check_originals(source, [toy.OLD], archive.root)
    assert by_package.tree != by_tarball.tree and by_package.base.name == "7.3"
    toy.write(tmp_path / "none", {"README": "no kernel\n"})
    proc.run(["tar", "-C", tmp_path, "-czf", tmp_path / "none.tar.gz", "none"])
    with pytest.raises(UsageError, match="holds no kernel tree"):
        archive.source(tmp_path / "none.tar.gz")


def test_no_such_package(cache: Path) -> None:
    with pytest.raises(LabError, match="no-such-package-anywhere"):
        apt.fetch(["no-such-package-anywhere"], "arm64", "trixie-backports")


def toy_tree(top: Path, files: dict[str, str]) -> Path:
    for name, text in {"Makefile": "VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 5\nEXTRAVERSION =\n",
                       "arch/arm64/Kconfig": "", **files}.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


def test_a_tree_given_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = toy_tree(tmp_path / "linux", {})
    source = base.source(tree)
    assert (source.tree, source.version, source.package) == (tree, "7.3.5", None)
    monkeypatch.setenv("KERNEL_SRC", str(tree))
    assert base.source() == source


def test_no_kernel_tree(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no kernel tree"):
        base.source(tmp_path)


def test_a_tree_that_was_built_in(tmp_path: Path) -> None:
    tree = toy_tree(tmp_path, {".config": ""})
    with pytest.raises(LabError, match="has been built in"):
        base.source(tree)


def test_a_base_that_moved_on_is_named_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(base.ANY_BASE, raising=False)
    root = tmp_path / "checkout"
    source = toy.make(tmp_path / "linux", root)
    owned = [toy.OLD, toy.NEW]
    assert bases.default(root).version == "7.3.4" and list(bases.default(root).originals) == [toy.GONE, toy.OLD]
    base.check_originals(source, owned, root)

    toy.write(source.tree, {toy.OLD: "changed\n", toy.NEW: "upstream has one now\n"})
    with pytest.raises(LabError) as raised:
        base.check_originals(source, [*owned, toy.GONE], root)
    assert toy.OLD in str(raised.value) and toy.NEW in str(raised.value)
    assert toy.GONE not in str(raised.value)
    assert "--any-base" in raised.value.hint

    monkeypatch.setenv(base.ANY_BASE, "1")
    base.check_originals(source, owned, root)
    assert toy.OLD in capsys.readouterr().out


def test_bases_are_found_by_name_and_by_version() -> None:
    known = bases.load()
    assert known[0].patches and (paths.ROOT / known[0].patches).is_dir()
    assert [bases.find(one.name) for one in known] == known
    assert bases.of_version(known[0].version) == known[0] and bases.of_version("99.1") == known[0]
    assert bases.of_version("5.10.240").name == "5.10"
    with pytest.raises(UsageError, match="no base is called '7'") as raised:
        bases.find("7")
    assert known[0].name in raised.value.hint
    assert all(set(one.lacks) <= set(bases.FEATURES) for one in known)


def test_too_little_disk(cache: Path) -> None:
    with pytest.raises(LabError, match="GiB are free"):
        host.check_disk(1 << 40)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MEMORY", 1 << 40)
    with pytest.raises(LabError, match="GiB of memory are available"):
        host.check_memory()


def test_not_debian_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_debian", lambda: False)
    monkeypatch.setitem(host.FEATURES, "build", host.Feature(("gcc-nowhere",), ("no-such-compiler",)))
    with pytest.raises(LabError, match="not a Debian system.*no-such-compiler") as raised:
        host.require("build")
    assert "gcc-nowhere" in raised.value.hint
    with pytest.raises(LabError, match="not a Debian system"):
        apt.fetch(["busybox-static"], "arm64")


def test_a_failing_make_shows_what_the_compiler_said(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("all:\n\t@echo '  CC      x.o'\n\t@echo 'x.c:3:1: error: no such thing'\n"
                                       "\t@for i in `seq 99`; do echo noise; done\n\t@false\n")
    (tmp_path / "obj").mkdir()
    with pytest.raises(LabError, match="x.c:3:1: error: no such thing") as raised:
        build.make(tmp_path, tmp_path / "obj", ["all"])
    assert "noise" not in raised.value.message
    assert "noise" in (tmp_path / "obj" / build.LOG).read_text()


def test_a_program_goes_with_the_command_that_was_interrupted() -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proc.stream(["sh", "-c", "sleep 60 & echo $!; wait"], interrupt)
    for _ in range(50):
        try:
            if " Z " in Path(f"/proc/{pids[0]}/stat").read_text():
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pids[0]} is still there")

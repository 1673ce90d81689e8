"""Where the base comes from, and what is said when it cannot come."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lab import apt, base, build, host, paths, proc
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


def test_no_network_names_the_package_and_the_way_around(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = apt.Origin(("http://127.0.0.1:9/debian",), (host.release(),), ("main",), "")
    monkeypatch.setattr(apt, "origins", lambda: [nowhere])
    with pytest.raises(LabError, match="linux-source-7.3") as raised:
        base.source()
    assert "KERNEL_SRC" in raised.value.hint
    assert not (cache / "base").exists()


def test_no_such_package(cache: Path) -> None:
    with pytest.raises(LabError, match="no-such-package-anywhere"):
        apt.fetch(["no-such-package-anywhere"], "arm64", base.SUITE)


def test_what_was_fetched_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    first = apt.fetch([base.PACKAGE], "arm64", base.SUITE)
    monkeypatch.setattr(apt, "origins", lambda: pytest.fail("asked for the sources"))
    assert apt.fetch([base.PACKAGE], "arm64", base.SUITE) == first
    assert first[base.PACKAGE].is_file()


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
    tree = toy_tree(tmp_path / "linux", {"arch/arm64/mm/old.c": "one\n", "arch/arm64/mm/same.c": "two\n"})
    source = base.source(tree)
    owned = ["arch/arm64/mm/old.c", "arch/arm64/mm/same.c", "arch/arm64/mm/new.c"]
    root = tmp_path / "checkout"
    (root / "series").mkdir(parents=True)
    with pytest.raises(LabError, match="base.json is missing"):
        base.check_originals(source, owned, root)
    base.record(source, owned, root)
    assert json.loads((root / "series/base.json").read_text())["version"] == "7.3.5"
    base.check_originals(source, owned, root)

    (tree / "arch/arm64/mm/old.c").write_text("changed\n")
    (tree / "arch/arm64/mm/new.c").write_text("upstream has one now\n")
    with pytest.raises(LabError) as raised:
        base.check_originals(source, owned, root)
    assert "arch/arm64/mm/old.c" in str(raised.value) and "arch/arm64/mm/new.c" in str(raised.value)
    assert "same.c" not in str(raised.value)
    assert "--any-base" in raised.value.hint

    monkeypatch.setenv(base.ANY_BASE, "1")
    base.check_originals(source, owned, root)
    assert "arch/arm64/mm/old.c" in capsys.readouterr().out


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


def test_a_failing_make_shows_what_the_compiler_said(tmp_path: Path) -> None:
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

"""What depends on the Debian release of the machine: the guest's busybox, and the machine's own programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from lab import apt, guest, host, paths, proc, rootfs
from lab.machine import Hello, parse_hello, parse_message

pytestmark = pytest.mark.releases

MACHINES = ("bookworm", "trixie")  # that the README names

# Quotes and backslashes, one at each end, and letters that a replacement could take for its own.
CMDLINE = r'''console=ttyAMA0 dyndbg="file machine_kexec.c +p" a=\ b=\\ c=\" d=& e=\& f="" lab.gen=3 g="'\n"'''
DMESG = r'''[    0.000000] KASLR enabled
[    0.045678] CPU: All CPU(s) started at EL2
[    0.078901] kvm [1]: "Hyp" nVHE\VHE mode initialized
'''
QUOTING = r'gsub(/["\\]/, "\\\\&", s)'  # in hello.awk
MEMINFO = "MemTotal:        2030108 kB\nMemFree:         1943360 kB\n"


@pytest.fixture(params=MACHINES)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def busybox(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """busybox of a release, for this machine's own architecture."""
    deb = apt.fetch(["busybox-static"], host.architecture(), release)["busybox-static"]
    folder = tmp_path_factory.mktemp(release)
    proc.run(["dpkg-deb", "-x", deb, folder])
    return next(path for path in folder.rglob("busybox") if path.parent.name == "bin")


def awks() -> list[str]:
    return [name for name in ("mawk", "gawk", "original-awk") if shutil.which(name)]


def say_hello(awk: list[str], folder: Path, script: Path = guest.SOURCES / "hello.awk", cmdline: str = CMDLINE,
              dmesg: str = DMESG) -> str:
    """What hello.awk, or another `script`, makes of a kernel with `cmdline` and `dmesg` when `awk` runs it."""
    facts = {"/proc/cmdline": cmdline + "\n", "/proc/uptime": "4.20 3.10\n", "/proc/meminfo": MEMINFO}
    text = script.read_text()
    for name, content in facts.items():
        (folder / Path(name).name).write_text(content)
        text = text.replace(name, str(folder / Path(name).name))
    (folder / "hello.awk").write_text(text)
    return proc.run([*awk, "-v", "release=7.3.4", "-v", "payload=", "-f", folder / "hello.awk",
                     *(folder / Path(name).name for name in facts), "-"], stdin=dmesg.encode()).stdout.decode()


def check_hello(said: str) -> None:
    message, rest, strays = parse_message(said.encode())
    assert message is not None and rest == b"" and strays == [], said
    assert parse_hello(message, 1.0) == Hello(3, "7.3.4", 2, 'kvm [1]: "Hyp" nVHE\\VHE mode initialized',
                                              "KASLR enabled", 2030108, 1943360, 4.2, CMDLINE, None, 1.0)


def test_hello_by_busybox(busybox: Path, tmp_path: Path) -> None:
    check_hello(say_hello([str(busybox), "awk"], tmp_path))


@pytest.mark.parametrize("awk", awks())
def test_hello_by_the_awks_of_this_machine(awk: str, tmp_path: Path) -> None:
    check_hello(say_hello([awk], tmp_path))


@pytest.mark.parametrize("replacement, wrong_on", [(r'"\\\""', MACHINES[1:]), (r'"\\\\\""', MACHINES[:1])])
def test_quoting_that_one_busybox_gets_wrong_is_found(busybox: Path, release: str, tmp_path: Path,
                                                      replacement: str, wrong_on: tuple[str, ...]) -> None:
    """What the quotes were replaced by once, and its obvious mend."""
    script = (guest.SOURCES / "hello.awk").read_text()
    assert script.count(QUOTING) == 1
    (tmp_path / "old.awk").write_text(script.replace(QUOTING, f'gsub(/"/, {replacement}, s)'))
    said = say_hello([str(busybox), "awk"], tmp_path, tmp_path / "old.awk", 'dyndbg="file machine_kexec.c +p"', "")
    message, _, strays = parse_message(said.encode())
    assert (message is None) == (release in wrong_on) == (strays == [said.encode().rstrip(b"\n")])


def test_init_serves_by_busybox(busybox: Path, tmp_path: Path) -> None:
    """The part of init that runs what the host sends, as its shell and its tools have it."""
    for applet in guest.APPLETS:
        (tmp_path / applet).symlink_to(busybox)
    init = (guest.SOURCES / "init").read_text()
    serve = init[init.index("serve() {"):init.index("# Where a kernel hibernated")].replace("/tmp/", f"{tmp_path}/")
    script = "ZWNobyBvbmU7IGVjaG8gdHdvID4mMjsgZXhpdCAzCg=="  # echo one; echo two >&2; exit 3
    done = subprocess.run([tmp_path / "sh", "-c", serve + "serve"], input=f"7 {script}\n", text=True,
                          capture_output=True, env={"PATH": str(tmp_path)}, timeout=60)
    message, rest, strays = parse_message(done.stdout.encode())
    assert message == {"id": 7, "rc": 3, "size": 8, "out": "one\ntwo\n"} and (rest, strays) == (b"", [])
    for name in guest.SCRIPTS:
        if not name.endswith(".awk") and name != "motd":
            proc.run([tmp_path / "sh", "-n", guest.SOURCES / name])


@pytest.fixture
def root(release: str) -> Iterator[Path]:
    """A root file system of `release`, with this checkout in it."""
    folder = paths.CACHE / "roots" / f"{release}-{paths.CHECKOUT_ID}-{os.getpid()}"
    rootfs.make(release, folder)
    try:
        rootfs.put_checkout(folder)
        yield folder
    finally:
        rootfs.remove(folder)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.xdist_group("releases")
@pytest.mark.parametrize("release", [name for name in MACHINES if name != host.release()])
def test_the_first_command(release: str, root: Path) -> None:
    """On a machine of a release that this one is not: from nothing but the checkout and apt."""
    lab = f"/{rootfs.CHECKOUT}/kexec-lab"
    done = subprocess.run(rootfs.command(root, [lab, "run"]), text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(proc.run(rootfs.command(root, ["cat", f"/{rootfs.CHECKOUT}/out/run.json"])).stdout)
    assert report["ok"] and [one["ok"] for one in report["handovers"]] == [True] * 3

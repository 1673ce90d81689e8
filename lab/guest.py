"""The guest's user space: initramfs archives, made from Debian's packages and lab/guest/.

Two of them: the one that QEMU boots, and the one that is handed over to, which
also holds a payload whose checksum the second kernel has to get right.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

from lab import apt, host, lock, paths, proc, say

SOURCES = Path(__file__).resolve().parent / "guest"
PACKAGES = ["busybox-static", "kexec-tools"]
PAYLOAD = 32 << 20  # bytes, unless somebody asks for less
SEED = b"kexec-lab payload"

SCRIPTS = {"init": "init", "hello.awk": "hello.awk", "fetch": "bin/fetch", "motd": "etc/motd"}
SELFTESTS = paths.ROOT / "tools/testing/selftests/kexec/arm64"
# kload is the loader that lives in the tree, linked with a whole libc.
TOOLS = {"kload": SELFTESTS / "inspect.c", "kpages": SOURCES / "kpages.c", "pattern": SOURCES / "pattern.c",
         "vms": SOURCES / "vms.c"}
CFLAGS = ("-static", "-O2", "-Wall", "-Wextra", "-Werror")
# Busybox commands; those that nothing here uses are for people in `shell`.
APPLETS = """
    [ awk base64 basename cat chmod chvt clear cmp cp cttyhack cut date dd df dirname dmesg du echo env expr false find
    free grep gzip head hexdump id insmod kill killall less ln ls mkdir mknod mkswap mount mv nproc od poweroff printf ps
    pwd reboot rm sed seq setsid sh sha256sum sleep sort stat swapoff swapon sync tail tar test top touch tr true
    truncate umount uname uniq uptime vi wc which xxd
""".split()


@dataclass(frozen=True)
class Guest:
    """`initrd` is for QEMU, `next` for kexec: it ends in `size` bytes whose SHA-256 is `payload`."""

    initrd: Path
    next: Path
    payload: str
    size: int


def build(size: int = PAYLOAD) -> Guest:
    """Bring the archives, with `size` bytes of payload, up to date.

    Raises LabError when a package or the compiler fails.
    """
    host.require("build")
    debs = apt.fetch(PACKAGES, "arm64", deps=True)
    payload = hashlib.shake_256(SEED).digest(size)
    folder = paths.CACHE / "guest" / _key(debs.values(), size)
    guest = Guest(folder / "initrd", folder / "next", hashlib.sha256(payload).hexdigest(), size)
    with lock.held(paths.CACHE / "lock", "the cache"):
        if not folder.exists():
            with say.phase("making the guest's initramfs"):
                base = archive(_programs(debs.values()) | _scripts())
                # Archives may follow one another.
                _write(folder, {"initrd": base, "next": base + archive({"payload.bin": (0o644, payload)})})
    return guest


Files = dict[str, tuple[int, bytes]]  # path in the archive -> permissions, contents


def archive(files: Files) -> bytes:
    """`files` as a cpio archive ("newc"), the same bytes for the same files.

    A mode with a type (S_IFLNK, S_IFDIR) makes something other than a file.
    """
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    out = io.BytesIO()
    number = 0

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        nonlocal number
        number += 1
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
        out.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))

    for folder in sorted(folders):
        entry(folder, stat.S_IFDIR | 0o755)
    for name, (mode, data) in sorted(files.items()):
        entry(name, mode if stat.S_IFMT(mode) else stat.S_IFREG | mode, data)
    entry("TRAILER!!!", 0)
    out.write(bytes(-out.tell() % 512))  # to a whole sector: it is read from a disk
    return out.getvalue()


def _key(debs: Iterable[Path], size: int) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes() + b"%d" % size)
    for deb in sorted(debs):
        digest.update(deb.name.encode())
    for source in sorted([*SOURCES.iterdir(), *SELFTESTS.glob("*.[ch]")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="new.") as temporary:
        target = Path(temporary) / "guest"
        target.mkdir()
        for name, data in files.items():
            (target / name).write_bytes(data)
        os.rename(target, folder)


def _scripts() -> Files:
    files: Files = {target: (0o755, (SOURCES / name).read_bytes()) for name, target in SCRIPTS.items()}
    files |= {f"bin/{applet}": (stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS}
    files |= {folder: (stat.S_IFDIR | 0o755, b"") for folder in ("dev", "proc", "sys", "tmp")}
    with tempfile.TemporaryDirectory() as temporary:
        for tool, source in TOOLS.items():
            program = Path(temporary) / tool
            proc.run([f"{host.CROSS_COMPILE}gcc", *CFLAGS, "-o", program, source])
            proc.run([f"{host.CROSS_COMPILE}strip", program])
            files[f"bin/{tool}"] = (0o755, program.read_bytes())
    return files


def _programs(debs: Iterable[Path]) -> Files:
    """busybox, and kexec-tools' programs with the shared libraries they need."""
    members: dict[str, bytes] = {}  # by file name alone: Debian merged /usr between releases
    links: dict[str, str] = {}
    for deb in debs:
        data = proc.run(["dpkg-deb", "--fsys-tarfile", deb]).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                name = Path(member.name).name
                if not re.search(r"/s?bin/(busybox|kexec|vmcore-dmesg)$|/lib/([^/]+/)?(lib|ld-linux)[^/]*\.so[.\d]*$", member.name):
                    continue
                if member.isfile():
                    members[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
                elif member.issym() and Path(member.linkname).name != name:
                    links[name] = Path(member.linkname).name
    files: Files = {f"bin/{name}": (0o755, members[name]) for name in ("busybox", "kexec", "vmcore-dmesg")}
    wanted = ["kexec", "vmcore-dmesg"]
    while wanted:
        for library in _needed(members[_resolve(wanted.pop(), links)]):
            if f"lib/{library}" not in files:
                files[f"lib/{library}"] = (0o755, members[_resolve(library, links)])
                wanted.append(library)
    return files


def _resolve(name: str, links: dict[str, str]) -> str:
    while name in links:
        name = links[name]
    return name


def _needed(program: bytes) -> list[str]:
    """The shared libraries that an ELF file names, its interpreter among them."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(program)
        file.flush()
        text = proc.run([f"{host.CROSS_COMPILE}readelf", "-dlW", file.name]).stdout.decode()
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text) + re.findall(r"interpreter: .*/([^\]]+)\]", text)

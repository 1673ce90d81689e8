"""QEMU's TCG plugins: how they are built, and the one that counts what relocation executes (lab/plugin/count.c)."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from lab import paths, proc, qemu
from lab.build import Built
from lab.stage import read_symbols

SOURCES = Path(__file__).resolve().parent / "plugin"
CFLAGS = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
WORDS = 4  # instructions by which a place is known


@dataclass(frozen=True)
class Counts:
    """What was executed between two places. Loads and stores are instructions; a line has 64 bytes."""

    instructions: int
    classes: dict[str, int]
    loads_cacheable: int
    loads_uncached: int
    stores_cacheable: int
    stores_uncached: int
    device: int  # accesses
    bytes_loaded: int
    bytes_stored: int
    lines_fetched: int  # stored to without a DC ZVA before: hardware reads them first
    lines_owned: int  # stored to behind a DC ZVA
    zeroed_rest: int  # bytes that DC ZVA zeroed and nobody stored to

    @property
    def barriers(self) -> int:
        return sum(self.classes[name] for name in ("dsb", "dmb", "isb"))


def build(name: str, version: int) -> Path:
    """The plugin of that name, compiled for this machine and a QEMU of that major version.

    Raises LabError with the compiler's messages.
    """
    api = 3 if version >= 9 else 1
    text = b"".join((SOURCES / file).read_bytes() for file in (f"{name}.c", "plugin.h"))
    library = paths.CACHE / "plugin" / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}-{api}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            new = Path(folder) / "plugin.so"
            proc.run(["gcc", *CFLAGS, f"-DAPI={api}", "-o", new, SOURCES / f"{name}.c"])
            os.rename(new, library)
    return library


def pattern(words: Sequence[int]) -> str:
    """Instructions as the plugin wants them."""
    return ":".join(f"{word:08x}" for word in words)


def entry(built: Built) -> list[int]:
    """The first instructions of a kernel's control page."""
    symbols = read_symbols(built.vmlinux)
    offset = symbols["arm64_relocate_new_kernel"] - symbols["_text"]
    with open(built.image, "rb") as image:
        image.seek(offset)
        return list(struct.unpack(f"<{WORDS}I", image.read(4 * WORDS)))


def options(enter: Sequence[int], leave: Sequence[int], out: Path, mmu: bool = True, zva: int = 64) -> list[str]:
    """What QEMU needs to be told. `mmu`: is it on where counting begins? `zva`: bytes that DC ZVA zeroes."""
    return ["-plugin", f"file={build('count', qemu.version())},enter={pattern(enter)},leave={pattern(leave)},out={out},zva={zva}"
            + ("" if mmu else ",mmu=off")]


def read(out: Path) -> list[Counts]:
    """What the plugin has written so far."""
    text = out.read_text() if out.exists() else ""
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [Counts(**row) for row in rows]

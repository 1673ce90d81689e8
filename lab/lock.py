"""Locks between commands. The kernel drops them when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from lab import say

_depth: dict[Path, int] = {}  # locks that this process holds, for nested use


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; says that it waits for `what` when another command has it."""
    if _depth.get(path):
        _depth[path] += 1
        try:
            yield
        finally:
            _depth[path] -= 1
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say.info(f"waiting: another kexec-lab command is using {what}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        _depth[path] = 1
        yield
    finally:
        _depth.pop(path, None)
        os.close(fd)

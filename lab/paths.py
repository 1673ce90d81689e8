"""Where things are: the checkout, its output folder, the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kexec-lab"

# Two checkouts share downloads and compiler results, never a tree or an object folder.
CHECKOUT_ID = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]

OUT_LOCK = CACHE / f"out-{CHECKOUT_ID}.lock"  # held by whoever writes below out/


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A name beside `target` for a folder to be made in the block.

    It becomes `target` when the block ends well, and goes when it does not.
    """
    temporary = target.with_name(target.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

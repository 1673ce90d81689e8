"""Where things are: the checkout, its output folder, the user's cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kexec-lab"

# Two checkouts share downloads and compiler results, never a tree or an object folder.
CHECKOUT_ID = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]

"""What the person at the terminal sees: phases, progress, plain lines.

Line oriented, so that it reads the same in a terminal and in a log. Times are
seconds since the command began.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Iterator, Sequence

START = time.monotonic()
INTERVAL = 5.0  # seconds between two progress lines of one task

_last_progress = 0.0


def info(text: str) -> None:
    """Print `text`, each line behind the seconds since the command began."""
    stamp = f"[{time.monotonic() - START:6.1f}]"
    for line in text.splitlines() or [""]:
        print(f"{stamp} {line}", flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Announce `name`, and say how long it took when the block ends, however it ends."""
    global _last_progress
    info(f"== {name} ...")
    begin = _last_progress = time.monotonic()
    outcome = "failed after "
    try:
        yield
        outcome = ""
    finally:
        info(f"   {name}: {outcome}{time.monotonic() - begin:.1f} s")


def columns(rows: Sequence[tuple[str, ...]], numbers_from: int | None = None) -> list[str]:
    """Lines of a table, the first of `rows` its head; from column `numbers_from` on to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    last = len(widths) if numbers_from is None else numbers_from
    return ["  ".join(value.ljust(width) if number < last else value.rjust(width)
                      for number, (value, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def progress(done: int, total: int, what: str) -> None:
    """Say how far a task is, at most once every INTERVAL seconds.

    A `total` of 0 means that the end is not known: `done` is printed as it is.
    """
    global _last_progress
    now = time.monotonic()
    if now - _last_progress < INTERVAL:
        return
    _last_progress = now
    share = f"{min(100, 100 * done // total):3d}%" if total else str(done)
    info(f"   {share} {what}")

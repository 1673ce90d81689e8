"""Running other programs so that none of them outlives the laboratory."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from pathlib import Path
from typing import Callable, Mapping, Sequence

from lab.errors import LabError

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
TAIL = 25  # lines of a failed program's output that are worth showing

Command = Sequence[str | Path]


def die_with_parent() -> None:
    """For preexec_fn: the kernel kills this child when the laboratory is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: Command, *, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        stdin: bytes | None = None, accept: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[bytes]:
    """Run a short program and return it with stdout and stderr.

    Raises LabError, with the end of its output, when the exit status is not in `accept`.
    """
    try:
        done = subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True,
                              preexec_fn=die_with_parent)
    except FileNotFoundError:
        raise LabError(f"{command[0]}: no such program") from None
    if done.returncode not in accept:
        output = (done.stdout + done.stderr).decode(errors="replace").rstrip()
        shown = "\n".join(output.splitlines()[-TAIL:])
        raise LabError(f"'{' '.join(map(str, command))}' failed (exit {done.returncode})", shown)
    return done


def stream(command: Command, on_line: Callable[[str], None], *, cwd: Path | None = None,
           env: Mapping[str, str] | None = None) -> int:
    """Run a long program in a process group of its own and return its exit status.

    Each line of stdout and stderr goes to `on_line`. Whatever ends this call,
    Ctrl-C included, ends the whole group.
    """
    try:
        child = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 errors="replace", start_new_session=True,
                                 preexec_fn=die_with_parent)
    except FileNotFoundError:
        raise LabError(f"{command[0]}: no such program") from None
    assert child.stdout is not None
    try:
        with child.stdout:
            for line in child.stdout:
                on_line(line.rstrip("\n"))
        return child.wait()
    finally:
        if child.poll() is None:
            kill_group(child)


def kill_group(child: subprocess.Popen[str]) -> None:
    """Kill `child`, started with start_new_session, and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()

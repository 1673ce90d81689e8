"""What a person types, and what they are told."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from lab import cells, paths

LAB = paths.ROOT / "kexec-lab"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An empty cache, and no base of the caller's."""
    env = {name: value for name, value in os.environ.items() if name not in ("KERNEL_SRC", "KEXEC_LAB_ANY_BASE")}
    return env | {"XDG_CACHE_HOME": str(tmp_path)}


def lab(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LAB, *arguments], env=env, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("arguments, complaint, valid", [
    (["run", "--cell", "nope"], "no cell is called 'nope'", cells.DEFAULT.name),
    (["shell", "--cell", "nope"], "no cell is called 'nope'", "64k-va52-vhe"),
    (["build", "8k-va48"], "no kernel is called '8k-va48'", "64k-va52"),
    (["build", "4k-va48", "--cell", "4k-va48-el1"], "a kernel and a cell are named", "one of them"),
    (["run", "--loader", "nope"], "invalid choice: 'nope'", "'load', 'file', 'both'"),
    (["run", "--accel", "nope"], "invalid choice: 'nope'", "'tcg', 'kvm'"),
    (["nope"], "invalid choice: 'nope'", "'run', 'check', 'kdump'"),
    (["check", "--jobs", "0"], "--jobs 0 runs nothing", "one or more"),
    (["run", "--nope"], "unknown: --nope", "run --help"),
    (["run", "--base", "7"], "no base is called '7'", "bases: 7.3"),
    (["run", "--base", "5.10"], "no patches for base 5.10", "bench --history"),
    (["series", "--to", "a", "--from", "b"], "not allowed with argument", "series --help"),
    (["--nope", "run"], "unknown: --nope", "--help"),
    (["build", "--kernel-src", "/nowhere"], "/nowhere is no kernel tree", "KERNEL_SRC"),
    (["tree"], "required: DIR", "--help")])
def test_bad_usage(environment: dict[str, str], arguments: list[str], complaint: str, valid: str) -> None:
    done = lab(environment, *arguments)
    assert done.returncode == 2
    said = done.stderr.replace("'", "")  # Python 3.12 took the quotes off argparse's lists
    assert complaint.replace("'", "") in said and valid.replace("'", "") in said
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_two_commands(environment: dict[str, str], arguments: list[str]) -> None:
    done = lab(environment, *arguments)
    assert done.returncode == 0
    assert "./kexec-lab run  " in done.stdout and "./kexec-lab check  " in done.stdout
    for command in ("run", "check", "kdump", "hibernate", "mutants", "bench", "fuzz", "shell", "build", "tree",
                    "series", "bases", "cells", "clean"):
        assert f"    {command} " in done.stdout
        assert lab(environment, command, "--help").returncode == 0


def test_cells_are_listed(environment: dict[str, str]) -> None:
    output = lab(environment, "cells").stdout
    assert all(name in output for name in cells.CELLS)
    assert all(name in output for name in cells.KERNELS)


@pytest.mark.parametrize("command, says", [
    (["run"], ["linux-source-7.3", "kernel 4k-va48", "2048 MiB", "load, load-nocheck, file"]),
    (["run", "--cell", "64k-va52-el1", "--loader", "file"], ["kernel 64k-va52", "load:    file"]),
    (["check", "-m", "series"], ["pytest", "-m series"]),
    (["check", "--all"], ["pytest --all"]),
    (["check", "--jobs", "3"], ["--build-only", "-n 3"]),
    (["shell"], ["kernel 4k-va48"]),
    (["fuzz", "--count", "7"], ["kernel 4k-va48", "inspector", "7 cases"]),
    (["fuzz", "--mainline"], ["kernel 4k-va48-base"]),
    (["build", "16k-va47"], ["kernel 16k-va47"]),
    (["tree", "elsewhere"], ["elsewhere"]),
    (["series"], ["patches"]),
    (["clean"], [])])
def test_a_dry_run_does_nothing(environment: dict[str, str], tmp_path: Path, command: list[str],
                                says: list[str]) -> None:
    for arguments in (["--dry-run", *command], [*command, "--dry-run"]):
        done = lab(environment, *arguments)
        assert done.returncode == 0, done.stderr
        assert all(text in done.stdout for text in says)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout to clean: this one's output is in use."""
    copy = tmp_path / "checkout"
    shutil.copytree(paths.ROOT / "lab", copy / "lab")
    shutil.copy2(LAB, copy)
    return copy


def test_the_second_command_waits_and_says_so_and_ctrl_c_ends_it(environment: dict[str, str], tmp_path: Path,
                                                                 checkout: Path) -> None:
    (tmp_path / "kexec-lab").mkdir()
    command = [checkout / "kexec-lab", "clean"]
    with open(tmp_path / "kexec-lab/build.lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        # Whoever runs the tests in the background may have them ignore the signal.
        second = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        assert second.stdout is not None
        assert "waiting: another kexec-lab command is using the compiler" in second.stdout.readline()
        second.send_signal(signal.SIGINT)
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 130
    assert errors == "kexec-lab: interrupted\n"
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0  # no lock is left behind


def test_clean(environment: dict[str, str], tmp_path: Path, checkout: Path) -> None:
    identity = hashlib.sha256(str(checkout).encode()).hexdigest()[:8]
    cache = tmp_path / "kexec-lab"
    mine, other, base = (cache / name for name in (f"work/{identity}-7.3.4", "work/ffffffff-7.3.4", "base/7.3.4"))
    for folder in (mine, other, base, checkout / "out"):
        folder.mkdir(parents=True)

    def clean(*options: str) -> str:
        return subprocess.run([checkout / "kexec-lab", "clean", *options], env=environment, text=True, check=True,
                              capture_output=True, timeout=60).stdout

    assert str(mine) in clean("--dry-run") and mine.exists()
    clean()
    assert [path.exists() for path in (mine, checkout / "out", other, base)] == [False, False, True, True]
    clean("--all")
    assert not other.exists() and not base.exists()

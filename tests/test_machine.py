"""A guest that fails is told apart from one that hangs, ends, or answers wrongly."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lab.cells import DEFAULT
from lab.machine import CommandFailed, Crashed, Machine, Panicked, TimeoutFailure

pytestmark = pytest.mark.cells(DEFAULT)


def test_commands(machine: Machine) -> None:
    assert machine.sh("echo one; echo two >&2") == "one\ntwo\n"
    assert machine.run("exit 3").rc == 3
    assert machine.sh("head -c 300000 /dev/zero | tr '\\0' x; printf '{\"id\": 7}'") == "x" * 300000 + '{"id": 7}'
    noise = os.urandom(5000)
    machine.put("/tmp/noise", noise)
    assert machine.get("/tmp/noise") == noise
    with pytest.raises(CommandFailed, match="exit 4"):
        machine.sh("exit 4")
    with pytest.raises(CommandFailed, match="instead of a new kernel"):
        machine.exec()  # nothing is loaded


def test_silence_is_a_timeout(machine: Machine) -> None:
    with pytest.raises(TimeoutFailure, match="not enough|silent"):
        machine.run("sleep 60", timeout=1)


def test_a_stopped_guest_is_a_timeout(machine: Machine) -> None:
    machine.qmp("stop")
    assert machine.qmp("query-status")["running"] is False
    with pytest.raises(TimeoutFailure):
        machine.run("true", timeout=1)


def test_a_panic_is_told_with_its_reason(machine: Machine) -> None:
    with pytest.raises(Panicked, match="sysrq triggered crash") as caught:
        machine.run("echo c >/proc/sysrq-trigger")
    assert "Call trace" in caught.value.hint and "qemu-system-aarch64" in caught.value.hint
    kept, = re.findall(r"\((.*\.failed\.log)\)", caught.value.hint)
    assert Path(kept).read_text() == machine.console.read_text()


def test_the_end_of_qemu_is_no_panic(machine: Machine) -> None:
    machine.qmp("quit")
    with pytest.raises(Crashed):
        machine.run("true")


def test_what_is_no_message_is_shown_with_the_failure(machine: Machine) -> None:
    with pytest.raises(TimeoutFailure) as caught:  # 3 is the port, in init and what it runs
        machine.run("echo '{\"hello\": \"a \"quoted\" word\"}' >&3; sleep 60", timeout=5)
    assert 'what is no message:\n    {"hello": "a "quoted" word"}\n' in caught.value.hint

"""Loads that are refused: who asks how, what kexec-tools makes of it, the errno, and the one line in the log."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Sequence

from lab.handover import log_since
from lab.machine import Machine

PREFIX = "kexec_core: refused"
NOBODY = "busybox start-stop-daemon -S -c 65534:65534 -x /bin/{program} -- "  # somebody else than root, who keeps stdin
TRIES = 20  # to meet another load while it is under way


@dataclass(frozen=True)
class Refusal:
    """A load that is refused with `errno`, upon which the log says `line`, a regular expression.

    `request` is what kload is told, and `command` what a user would give to the
    shell, upon which kexec-tools prints `printed`; either can be empty. Where
    kexec-tools refuses by itself, and calls nothing, `calls` is false.
    `before` is run first, and has to succeed.
    """

    what: str
    errno: str
    line: str
    request: str = ""
    command: str = ""
    printed: str = ""
    calls: bool = True
    before: str = ""
    nobody: bool = False  # asked by somebody else than root
    busy: str = ""  # while kload does what this tells it

    def scripts(self) -> list[tuple[str, str, int]]:
        """What to run, what has to be printed, and how many lines that leaves in the log."""
        by_kload = f"{NOBODY.format(program='kload') if self.nobody else 'kload'} <<EOF\n{self.request}\nEOF"
        command = self.command
        if self.nobody:
            command = command.replace("kexec ", NOBODY.format(program="kexec"), 1)
        return [*([(by_kload, self.errno, 1)] if self.request else []),
                *([(command, self.printed, int(self.calls))] if command else [])]


def mark(m: Machine) -> str:
    """Write a line to the kernel's log that nothing else there is like."""
    line = f"lab: to be refused, {time.monotonic_ns()}"
    m.sh(f"echo '{line}' >/dev/kmsg")
    return line


def lines(m: Machine, since: str) -> list[str]:
    """The lines about refusals since a mark, without what stands before them."""
    return re.findall(rf"{PREFIX} \(.*", log_since(m, since))


def ask(m: Machine, refusal: Refusal, script: str) -> str:
    """Run `script`, which has to fail, or has to while another load is under way; returns what it printed."""
    if not refusal.busy:
        result = m.run(script, timeout=300)
        assert result.rc, f"{script} was not refused: {result.out}"
        return result.out
    m.put("/tmp/busy", f"{refusal.busy}\nannounce\n".encode())
    for _ in range(TRIES):
        result = m.run("rm -f /tmp/calling\n"
                       "kload </tmp/busy >/dev/null 2>/tmp/calling & pid=$!\n"
                       "until grep -q calling /tmp/calling 2>/dev/null; do :; done\n"
                       f"({script}\n); rc=$?; wait $pid; exit $rc", timeout=300)
        if result.rc:
            return result.out
    raise AssertionError(f"{script} was never refused in {TRIES} times")


def check(m: Machine, refusal: Refusal) -> list[str]:
    """What is wrong with how a load is refused, by each of those who ask for it."""
    wrong = []
    if refusal.before:
        m.sh(refusal.before, timeout=300)
    for script, printed, count in refusal.scripts():
        since = mark(m)
        said = ask(m, refusal, script)
        found = lines(m, since)
        if printed not in said:
            wrong.append(f"{refusal.what}: '{script}' printed '{said.strip()}', not '{printed}'")
        if len(found) != count:
            wrong.append(f"{refusal.what}: '{script}' left {len(found)} lines, not {count}: {found}")
        wrong += [f"{refusal.what}: '{line}' is not '{refusal.line}'" for line in found
                  if not re.fullmatch(rf"{PREFIX} \(-{refusal.errno}\): {refusal.line}", line)]
    return wrong


def table(m: Machine, refusals: Sequence[Refusal]) -> None:
    """Report what each refusal is: command, what kexec-tools prints, errno, line."""
    for one in refusals:
        command = one.command or "(kload) " + one.request.replace("\n", "; ")
        m.report(f"   {one.what} | {command[:100]} | {one.printed or '-'} | {one.errno} | {one.line}")

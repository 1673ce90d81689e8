"""What KUnit, the kernel's own framework for tests, writes to the console."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

STAMP = re.compile(r"^\[ *(\d+\.\d+)\] ?")
LINE = re.compile(r"(?P<indent> *)(?:# Subtest: (?P<begin>.+)|1\.\.(?P<planned>\d+)|"
                  r"(?P<verdict>ok|not ok) (?P<number>\d+) (?P<name>.*?)(?P<skip> # SKIP.*)?)$")
INDENT = 4  # blanks for each block within another: suites, their cases, runs of a case with different parameters


@dataclass(frozen=True)
class Case:
    """One run of a test case. `param` is '' unless it runs once per parameter; `verdict`: ok, not ok or skip."""

    suite: str
    name: str
    param: str
    verdict: str


@dataclass
class _Block:
    """Results that belong together, under the name of the result that follows them."""

    name: str = ""
    planned: int | None = None  # with parameters, a case may not know beforehand
    results: list[tuple[str, str, "_Block | None"]] = field(default_factory=list)  # name, verdict, what it sums up


def parse(console: str) -> list[Case]:
    """Every run of a test case in the KTAP on a console, which has lines of the kernel's own in between.

    Raises ValueError when there is none, or when results that were announced
    are missing.
    """
    lines = [STAMP.sub("", line) for line in console.replace("\r", "").splitlines()]
    if "KTAP version 1" not in lines:
        raise ValueError("no KTAP on the console: did the tests run?")
    blocks = [_Block()]  # from the outermost one to the one that is being read
    for match in filter(None, map(LINE.match, lines[lines.index("KTAP version 1"):])):
        depth = len(match["indent"]) // INDENT
        if match["begin"] and depth == len(blocks):
            blocks.append(_Block(match["begin"]))
        elif match["planned"] and depth == len(blocks) - 1:
            blocks[depth].planned = int(match["planned"])
        elif match["verdict"] and depth < len(blocks):
            inner = _end(blocks, match["name"]) if depth == len(blocks) - 2 else None
            if depth != len(blocks) - 1 or int(match["number"]) != len(blocks[depth].results) + 1:
                raise ValueError(f"a result is missing before '{match[0].strip()}'")
            verdict = "skip" if match["skip"] else match["verdict"]
            blocks[depth].results.append((match["name"], verdict, inner))
        else:
            raise ValueError(f"'{match[0].strip()}' belongs to nothing")
    suites = _end(blocks, "")
    return [Case(suite, name, param, verdict)
            for suite, _, cases in suites.results if cases
            for name, said, runs in cases.results
            for param, verdict, _ in (runs.results if runs else [("", said, None)])]


def _end(blocks: list[_Block], name: str) -> _Block:
    """Take the innermost block off `blocks`: it has to be whole, and what the result called `name` sums up."""
    block = blocks.pop()
    known = block.planned is not None or len(blocks) < 2
    if block.name != name or (known and block.planned != len(block.results)):
        raise ValueError(f"{block.name or 'the console'} has {len(block.results)} results of {block.planned}, "
                         f"then comes '{name}'")
    return block


def seconds(console: str) -> float:
    """How long all suites took, by the time stamps."""
    times = [float(stamp[1]) for line in console.splitlines()
             if (stamp := STAMP.match(line)) and re.match(r"KTAP version 1|(not )?ok \d+ ", line[stamp.end():])]
    return times[-1] - times[0]

"""Every operation on caches and TLB, and every barrier, that the series adds: found in its source, each taken out once.

In the owned files wherever it stands; in a file that upstream owns where a
patch adds it. Not in tests. What a macro of upstream's does as a whole is one
operation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

ASM = re.compile(r"(?<![\w.])((?:dc|ic|tlbi)[ \t]+\w+(?:, *\w+)?|(?:dsb|dmb)[ \t]+\w+|isb"
                 r"|(?:dcache_by_\w+|break_before_make_\w+|pre_disable_mmu_\w+)(?:[ \t]+\w+(?:, *\w+)*)?)(?=[ \t]*(?://|/\*|$))", re.M)
C = re.compile(r"(?<![\w.])((?:dcache_(?:clean|inval)|icache_inval|caches_clean|flush_(?:tlb|icache|dcache)|kvm_flush_dcache"
               r"|smp_(?:store_release|load_acquire))\w*|(?:dsb|dmb|isb|smp_mb|smp_rmb|smp_wmb|mb|rmb|wmb)(?=\()"
               r"|asm volatile(?=\(\"isb))(\([^;]*\));")


@dataclass(frozen=True)
class Operation:
    """`old`, which stands in `path` once, has the operation, `new` has not. It is the `number`th in `path`."""

    path: str
    number: int
    what: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """What the mutant without it is called."""
        word = "-".join(re.findall(r"\w+", self.what.partition("(")[0]))
        return f"without-{Path(self.path).stem}-{self.number}-{word}"


def find(path: str, text: str, least: int = 0) -> Iterator[Operation]:
    """The operations in a file, each with the lines before it that make it the only such text, and `least` at least."""
    for number, one in enumerate((ASM if path.endswith(".S") else C).finditer(_without_comments(text)), 1):
        instead = "nop" if path.endswith(".S") else _nothing(one[1], one[2]) + ";"
        start = _context(text, one.start(), one.end(), least)
        yield Operation(path, number, " ".join(one[1].split()), text[start:one.end()],
                        text[start:one.start()] + instead)


def everywhere(root: Path) -> list[Operation]:
    """Those in the owned files, and those that patches add to other files."""
    owned = {str(path.relative_to(root)): path for path in sorted(root.glob("arch/**/*.[chS]")) if is_code(path.name)}
    found = [one for name, path in owned.items() for one in find(name, path.read_text())]
    numbers: dict[str, int] = {}
    for path, lines in hunks(root / "patches"):
        if path in owned or not is_code(Path(path).name) or not path.endswith((".c", ".h", ".S")) or path.startswith("tools/"):
            continue
        text = "\n".join(line for _, line in lines)
        for one in find(path, text, least=2):
            number = text[:text.index(one.old) + len(one.old)].count("\n")
            if lines[number][0] == "+":
                numbers[path] = numbers.get(path, 0) + 1
                found.append(replace(one, number=numbers[path]))
    return found


def is_code(name: str) -> bool:
    """Not a test?"""
    return "_test." not in name


def hunks(patches: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """What each hunk of each patch makes of which file: its lines, with a plus where the patch has added them."""
    for patch in sorted(patches.glob("*/*.patch")):
        path, lines = "", []
        for line in [*patch.read_text().splitlines(), "-- "]:
            if line.startswith(("@@ ", "diff --git ", "-- ")):
                if lines:
                    yield path, lines
                lines = []
            elif line.startswith("+++ "):
                path = line.removeprefix("+++ ").removeprefix("b/")
                lines = []
            elif line[:1] in ("+", " ") and path:
                lines.append((line[0], line[1:]))


def _without_comments(text: str) -> str:
    """The same, as long, with blanks for comments."""
    def blanks(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r"/\*.*?\*/|//[^\n]*", blanks, text, flags=re.S)


def _nothing(function: str, arguments: str) -> str:
    """A statement that does nothing, and uses what a call did, so that nobody warns."""
    if function.startswith(("dsb", "dmb", "isb", "asm", "smp_mb", "smp_rmb", "smp_wmb", "mb", "rmb", "wmb")):
        return "barrier()"
    parts, depth = [""], 0
    for character in arguments[1:-1]:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return ", ".join(f"(void)({part.strip()})" for part in parts if part.strip()) or "barrier()"


def _context(text: str, start: int, end: int, least: int) -> int:
    """Where the lines begin that make what ends at `end` unique."""
    begin = text.rfind("\n", 0, start) + 1
    for _ in range(least):
        begin = text.rfind("\n", 0, max(begin - 1, 0)) + 1
    while text.count(text[begin:end]) > 1 and begin:
        begin = text.rfind("\n", 0, begin - 1) + 1
    return begin

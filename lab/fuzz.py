"""`./kexec-lab fuzz`: random lists of segments, with the inspector as the next kernel.

A Case is what is loaded, and under which circumstances; case number N of a seed
is always the same on the same cell. An Arena is a machine that was saved once
it had booted, and is put back for each case. What fails is made smaller as long
as it still fails, and kept in tests/corpus, which the checks run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Callable, Iterator

from lab import base, build, cells, guest, host, inspector, kload, lock, paths, qemu, say
from lab.build import Built
from lab.cells import GICV5, Cell
from lab.errors import LabError, UsageError
from lab.guest import Guest
from lab.kload import Segment
from lab.machine import Machine, find_panic

CORPUS = paths.ROOT / "tests" / "corpus"
MIB = 1 << 20
MAX_PIECES = 15  # and the inspector
MEMORY = 512  # MiB of a machine: half of it is quick to look at
RANGES = 6000  # of watched memory that the inspector is told of, at most
KERNEL = 16 * MIB  # of the running one: its Image, at least
SYSTEM = 48 * MIB  # what the guest needs for itself
LIMIT = 60.0  # seconds until a case is over
TRIES = 60  # smaller cases that are tried when one fails,
PATIENCE = 600.0  # and seconds that this may take
SHAPES = ("scattered", "adjacent", "kernel", "large", "edge")
EXECUTED = re.compile(r"^# inspector: parked$", re.M)
REFUSED = re.compile(r"lab: kload (\d+) ?(.*)\n")
SHORT = re.compile(r"ENOMEM$|memory is short|keeps on moving|Cannot allocate memory")
FAULT = re.compile(r"^kexec: (parked|resetting)", re.M)


@dataclass(frozen=True)
class Piece:
    """A segment: physical address, bytes there, bytes that are given (the rest is zero), and the seed of these."""

    mem: int
    memsz: int
    bufsz: int
    seed: int

    @property
    def end(self) -> int:
        return self.mem + self.memsz

    @property
    def segment(self) -> Segment:
        return Segment(self.mem, self.memsz, f"pattern {self.seed} {self.bufsz:#x}" if self.bufsz else "zero")


@dataclass(frozen=True)
class Case:
    """What is loaded: `pieces`, and the inspector at address `at` as the segment number `place`.

    Bytes of memory that are watched, held, and taken with every other page given back.
    """

    pieces: tuple[Piece, ...]
    at: int
    place: int = 0
    watch: int = 0
    hold: int = 0
    fragment: int = 0
    shapes: tuple[str, ...] = ()  # how the pieces were chosen

    @property
    def size(self) -> int:
        return sum(piece.memsz for piece in self.pieces)


@dataclass(frozen=True)
class World:
    """What cases are made for: pages and RAM in bytes, where the running kernel is."""

    page: int
    start: int
    end: int
    kernel: int

    @property
    def memory(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "good", "refused" (for want of memory) or "bad", and why."""

    verdict: str
    why: str
    seconds: float


# What is tried

def generate(seed: int, number: int, world: World) -> Case:
    """Case `number` of `seed`."""
    rng = random.Random(f"{seed}/{number}")
    page = world.page

    def size(limit: int) -> int:
        """Pages of any order of magnitude up to `limit` bytes."""
        top = max(limit // page, 1)
        return int(min(top, 2 ** rng.uniform(0, top.bit_length()))) * page

    room = inspector.room(page, RANGES)
    taken: list[tuple[int, int]] = []
    at = rng.randrange(world.start // page, (world.end - room) // page) * page
    taken.append((at, at + room))
    # Sources and what they are copied from have to fit beside the system itself, and no more than half may be loaded.
    budget = world.memory // rng.choice((64, 32, 16, 16, 8, 4)) if rng.random() < 0.9 else world.memory * 7 // 16 - room
    given = world.memory // 5  # bytes of contents: they are in memory twice
    pieces: list[Piece] = []
    shapes: list[str] = []
    count = rng.choice((1, 2, 3, rng.randint(1, MAX_PIECES), MAX_PIECES))
    for _ in range(200):
        if len(pieces) == count or budget < page:
            break
        shape = rng.choice(SHAPES)
        memsz = size(budget if shape == "large" else budget // 4)
        if shape == "large":
            memsz = max(memsz, budget // 2 // page * page)
        mem = _address(rng, world, shape, memsz, taken)
        mem, memsz = max(mem, world.start), min(memsz, world.end - mem)
        if memsz < page or any(mem < end and start < mem + memsz for start, end in taken):
            continue
        bufsz = rng.choice((memsz, memsz, 0, rng.randint(1, memsz), max(memsz - rng.randint(0, page), 1)))
        bufsz = min(bufsz, given)
        given -= bufsz
        budget -= memsz
        taken.append((mem, mem + memsz))
        pieces.append(Piece(mem, memsz, bufsz, rng.getrandbits(32)))
        shapes.append(shape)
    rng.shuffle(pieces)
    left = max(world.memory * 3 // 4 - sum(p.memsz + p.bufsz for p in pieces) - SYSTEM, 0)
    watch = rng.choice((0, 1, size(left // 2), left // 4)) // page * page
    pressure = rng.choice((0, 0, left - watch, size(left - watch + page))) // page * page
    fragment = rng.choice((0, pressure, pressure // 2)) // page * page
    return Case(tuple(pieces), at, rng.randint(0, len(pieces)), watch, pressure - fragment, fragment, tuple(shapes))


def _address(rng: random.Random, world: World, shape: str, memsz: int, taken: list[tuple[int, int]]) -> int:
    page = world.page
    if shape == "adjacent":
        start, end = rng.choice(taken)
        gap = rng.choice((0, 0, page))
        return rng.choice((end + gap, start - memsz - gap))
    if shape == "kernel":
        return world.kernel + rng.randrange(-memsz // page + 1, KERNEL // page) * page
    if shape == "edge":
        block = rng.choice((2 * MIB, 32 * MIB))
        edge = rng.choice((world.start, world.end - memsz,
                           rng.randrange(world.start // block, world.end // block) * block))
        return edge + rng.choice((-page, 0, page))
    return rng.randrange(world.start // page, max((world.end - memsz) // page, world.start // page + 1)) * page


def statements(cell: Cell, case: Case) -> str:
    """What kload has to be told."""
    page = cell.kernel.pages * 1024
    segments = [piece.segment for piece in case.pieces]
    segments.insert(case.place, Segment(case.at, inspector.room(page, RANGES), f"inspector {inspector.FILE}"))
    further = [f"{word} {size}" for word, size in (("hold", case.hold), ("fragment", case.fragment)) if size]
    if case.watch:
        further.append(f"watch {case.watch} 99")
    return "\n".join([kload.statements(segments, case.at), *inspector.expected(cell), "end park", *further,
                      "exec", ""])


# Trying it

class Arena:
    """A cell that can be had freshly booted any number of times, from `with` to the end of its block.

    It is saved once it has booted, and put back for each case; where its kernel runs at EL2 it is booted for each,
    because QEMU 7.2 does not put back the timers that such a kernel uses, and with a GICv5, which QEMU can't save. Without KASLR, so that a seed gives the same
    cases; with one CPU, because no other is there when segments are moved; and no more than MEMORY MiB.
    """

    def __init__(self, cell: Cell, built: Built, archives: Guest, name: str = "",
                 report: Callable[[str], None] = say.info) -> None:
        self.cell = replace(cell, kaslr=False, cpus=1, memory=min(cell.memory, MEMORY))
        self._saves = cell.el != "vhe" and cell.gic != GICV5
        self._built, self._guest = built, archives
        self._name, self._report = name or f"fuzz.{cell.name}", report
        self._running = ExitStack()

    def __enter__(self) -> "Arena":
        self._boot()
        start, _ = qemu.first_bank(self.cell)
        self.world = World(self.cell.kernel.pages * 1024, start, start + self.cell.memory * MIB,
                           kload.kernel_base(self.machine))
        if self._saves:
            self.machine.snapshot("savevm booted")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._running.close()

    def _boot(self) -> None:
        self._running.close()
        with ExitStack() as stack:
            disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lab."))) / "snapshots"
            quiet = (lambda text: None) if hasattr(self, "machine") else self._report
            self.machine = m = stack.enter_context(Machine(self.cell, self._built, self._guest, name=self._name,
                                                           report=quiet, extra=qemu.snapshots(disk)))
            m.hello()
            inspector.put(m)
            m.sh("echo 0 >/proc/sys/kernel/panic")  # what fails is to stay
            self._running = stack.pop_all()

    def run(self, case: Case) -> Outcome:
        """Put the machine back, load `case` and leave for it."""
        begin = time.monotonic()
        if self._saves:
            self.machine.snapshot("loadvm booted")
        else:
            self._boot()
        m = self.machine
        since = len(m.log())
        m.begin(f"kload >/tmp/said 2>&1 <<EOF\n{statements(self.cell, case)}\nEOF\n"
                "echo lab: kload $? $(cat /tmp/said) >/dev/kmsg")
        while time.monotonic() - begin < LIMIT:
            text = m.log()[since:]
            verdict = judge(text)
            if verdict:
                return Outcome(*verdict, time.monotonic() - begin)
            time.sleep(0.02)
        return Outcome("bad", f"silent after {LIMIT:.0f} s:\n{text[-600:]}", LIMIT)


def judge(text: str) -> tuple[str, str] | None:
    """What a console tells about a case: verdict and why; None if it is not over."""
    if EXECUTED.search(text):
        report = inspector.parse(text)
        return ("good", "") if report.good else ("bad", report.text)
    if refused := REFUSED.search(text):
        # Killed, or told that there is not enough memory: not what is looked for here.
        if refused[1] == "137" or SHORT.search(refused[2].rstrip()):
            return "refused", refused[0]
        return "bad", refused[0]
    if FAULT.search(text):
        return "bad", text[text.rindex("kexec: Bye!"):] if "kexec: Bye!" in text else text
    panic = find_panic(text)
    return ("bad", panic) if panic else None


def shrink(case: Case, fails: Callable[[Case], bool], tries: int = TRIES) -> Case:
    """The smallest case found within `tries` that still fails."""
    progress = True
    while progress:
        progress = False
        for smaller in simpler(case):
            if tries == 0:
                return case
            tries -= 1
            if fails(smaller):
                case, progress = smaller, True
                break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases with less in them, the simplest first."""
    count = len(case.pieces)
    for length in sorted({1 << n for n in range(count.bit_length())}, reverse=True):
        for first in range(0, count, length):
            left = case.pieces[:first] + case.pieces[first + length:]
            if len(left) < count:
                yield replace(case, pieces=left, place=min(case.place, len(left)), shapes=())
    for name in ("watch", "hold", "fragment"):
        if getattr(case, name):
            yield replace(case, **{name: 0})
    for index, piece in enumerate(case.pieces):
        for pages in (1, piece.memsz // 2 // 4096 // 16 * 16):
            memsz = pages * 4096 if pages > 1 else 65536
            if 0 < memsz < piece.memsz:
                less = replace(piece, memsz=memsz, bufsz=min(piece.bufsz, memsz))
                yield replace(case, pieces=(*case.pieces[:index], less, *case.pieces[index + 1:]))


# Keeping it

def dump(cell: Cell, case: Case, why: str) -> str:
    """A case as a file of the corpus."""
    return json.dumps({"cell": cell.name, "why": why[:2000].splitlines(), "case": asdict(case)}, indent=1) + "\n"


def parse(text: str) -> tuple[str, Case]:
    """The name of the cell, and the case, in a file of the corpus. Raises LabError if it holds none."""
    try:
        data = json.loads(text)
        fields = data["case"]
        fields["pieces"] = tuple(Piece(**piece) for piece in fields["pieces"])
        fields["shapes"] = tuple(fields["shapes"])
        return data["cell"], Case(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"not a case: {error!r}", "tests/corpus has some") from None


# The command

@dataclass
class Tally:
    """What was tried so far, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    segments: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    further: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, outcome: Outcome) -> None:
        self.count += 1
        self.seconds += outcome.seconds
        self.verdicts[outcome.verdict] += 1
        self.segments[_bin(len(case.pieces) + 1, (1, 2, 4, 8, 15, 16))] += 1
        self.shapes.update(case.shapes)
        self.sizes[_bin(case.size // MIB, (0, 1, 16, 64, 128, 256, 1024))] += 1
        self.further.update(name for name in ("watch", "hold", "fragment") if getattr(case, name))
        self.further["bufsz < memsz"] += any(piece.bufsz < piece.memsz for piece in case.pieces)

    def text(self) -> str:
        rows = {"verdicts": self.verdicts, "segments": self.segments, "MiB in all": self.sizes,
                "placed": self.shapes, "with": self.further}
        lines = [f"{name + ':':<12}" + ", ".join(f"{key}: {counter[key]}" for key in sorted(counter, key=_order))
                 for name, counter in rows.items()]
        return "\n".join([*lines, f"{self.count} cases in {self.seconds:.0f} s, "
                                  f"{self.seconds / max(self.count, 1):.2f} s each"])


def _order(key: str) -> tuple[int, str]:
    number = re.match(r"\d+", key)
    return (int(number[0]) if number else 0, key)


def _bin(value: int, edges: tuple[int, ...]) -> str:
    for low, high in zip(edges, edges[1:]):
        if value < high:
            return str(low) if high == low + 1 else f"{low}-{high - 1}"
    return f"{edges[-1]}+"


def fuzz(arena: Arena, seed: int, numbers: range, corpus: Path | None = CORPUS) -> Tally:
    """Try cases of a seed. Raises LabError for the first that fails, made smaller, with the command that repeats it."""
    tally = Tally()
    for number in numbers:
        case = generate(seed, number, arena.world)
        outcome = arena.run(case)
        tally.add(case, outcome)
        say.progress(number - numbers.start + 1, len(numbers), f"cases, {tally.verdicts['refused']} refused")
        if outcome.verdict == "bad":
            raise failure(arena, case, outcome, f"--seed {seed} --start {number} --count 1", corpus)
    return tally


def failure(arena: Arena, case: Case, outcome: Outcome, repeat: str, corpus: Path | None) -> LabError:
    """The error for a case that fails, after it was made smaller and kept in the folder `corpus`."""
    end = time.monotonic() + PATIENCE
    smallest = shrink(case, lambda smaller: time.monotonic() < end and arena.run(smaller).verdict == "bad")
    text = [f"of {len(case.pieces) + 1} segments, {len(smallest.pieces) + 1} are left:",
            statements(arena.cell, smallest), "what became of the whole case:", outcome.why[:3000],
            f"again: ./kexec-lab fuzz --cell {arena.cell.name} {repeat}"]
    if corpus:
        corpus.mkdir(exist_ok=True)
        digest = hashlib.sha256(statements(arena.cell, smallest).encode()).hexdigest()[:8]
        path = corpus / f"{arena.cell.name}-{digest}.json"
        path.write_text(dump(arena.cell, smallest, outcome.why))
        shown = path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path
        text.append(f"the small one: ./kexec-lab fuzz --case {shown}")
    return LabError(f"{arena.cell.name}: a case fails ({repeat})", "\n".join(text))


def main(args: argparse.Namespace) -> int:
    """Try random cases, or one that was kept. Raises LabError for the first that fails."""
    kept = None
    if args.case:
        try:
            name, kept = parse(args.case.read_text())
        except OSError as error:
            raise UsageError(f"{args.case}: {error.strerror}") from None
        args.cell = name
    cell = cells.cell(args.cell)
    if args.mainline:
        cell = replace(cell, kernel=replace(cell.kernel, patched=False))
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    with lock.held(paths.OUT_LOCK, "this checkout's out/"):
        host.require("base", "build", "boot")
        built = build.build(cell.kernel, base.source())
        with Arena(cell, built, guest.build()) as arena:
            if kept:
                outcome = arena.run(kept)
                say.info(f"{outcome.verdict} after {outcome.seconds:.1f} s {outcome.why}")
                return 1 if outcome.verdict == "bad" else 0
            say.info(f"   seed {seed}")
            tally = fuzz(arena, seed, range(args.start, args.start + args.count))
    print(tally.text())
    return 0

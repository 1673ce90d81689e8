"""Random lists of segments arrive whole; and one that does not is found, made smaller and kept."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import pytest

from conftest import Lab, name_of
from lab import fuzz
from lab.build import Built
from lab.cells import CELLS, FUZZED, Cell
from lab.errors import LabError
from lab.fuzz import CORPUS, Arena, Case, Piece, World, generate, judge, shrink
from lab.stage import read_symbols

pytestmark = [pytest.mark.fuzz, pytest.mark.needs("arm64")]

SEED = 20261121
WORLD = World(4096, 1 << 30, (1 << 30) + (512 << 20), (1 << 30) + (2 << 20))
KEPT = sorted(CORPUS.glob("*.json"))


@pytest.fixture
def arena(cell: Cell, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Arena]:
    assert lab.guest
    with Arena(cell, lab.kernels[cell.kernel], lab.guest, name=f"fuzz.{name_of(request)}", report=lab.report) as a:
        yield a


@pytest.mark.timeout(1800)
@pytest.mark.cells(FUZZED)
def test_fixed(arena: Arena, request: pytest.FixtureRequest) -> None:
    """The same cases every time. Most of them fit, so that something is executed."""
    count = 200 if request.config.getoption("--all") else 60
    tally = fuzz.fuzz(arena, SEED, range(count))
    arena.machine.report("   " + tally.text().replace("\n", "\n   "))
    assert tally.verdicts["good"] > count * 3 // 4


@pytest.mark.timeout(900)
@pytest.mark.cells(CELLS["4k-va48-el1"])
def test_fresh(arena: Arena, request: pytest.FixtureRequest) -> None:
    """Cases that nobody has seen; a failure prints the seed."""
    count = 50 if request.config.getoption("--all") else 20
    fuzz.fuzz(arena, random.randrange(1 << 32), range(count))


@pytest.mark.timeout(900)
@pytest.mark.cells(CELLS["4k-va48-vhe"], CELLS["64k-va52-nvhe"], CELLS["64k-va52-el1"])
def test_other_pages_and_levels(arena: Arena) -> None:
    fuzz.fuzz(arena, SEED, range(10))


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
@pytest.mark.cells(FUZZED)
def test_corpus(arena: Arena, path: Path) -> None:
    """What failed once, on whatever kernel."""
    _, case = fuzz.parse(path.read_text())
    outcome = arena.run(case)
    assert outcome.verdict == "good", outcome.why


# A bug that is planted

PRFM = 0xF9810101  # prfm pldl1strm, [x8, #512]: twice in the plain copy loop, once in the one that verifies
CBNZ = 0xB500000F  # cbnz x15, ...


def skip_last_page(built: Built, folder: Path) -> Built:
    """A kernel whose control page leaves out the last page of each segment, unseen by its CRC.

    The loop that does not verify is not used on these CPUs: its place holds the bug. It looks at what follows the
    page in the list, and has the last one copied onto its own source.
    """
    symbols = read_symbols(built.vmlinux)
    image = bytearray(built.image.read_bytes())
    start = symbols["arm64_relocate_new_kernel"] - symbols["_text"]
    words = list(struct.unpack_from("<512I", image, start))
    plain, _, verifying = [index for index, word in enumerate(words) if word == PRFM]
    assert words[plain - 1] & 0xFF00001F == CBNZ
    words[plain - 1] = 0xD503201F  # nop
    words[plain:plain + 6] = [0xF94002A0,  # ldr x0, [x21]: the next entry
                              0x37180000 | verifying - plain - 1 << 5,  # tbnz x0, #IND_SOURCE_BIT
                              0x37080000 | verifying - plain - 2 << 5,  # tbnz x0, #IND_INDIRECTION_BIT
                              0xAA0803E9,  # mov x9, x8
                              0x9140050B,  # add x11, x8, #4096: the end of the loop
                              0x14000000 | verifying - plain - 5]  # b
    struct.pack_into("<512I", image, start, *words)
    path = folder / "Image"
    path.write_bytes(image)
    return replace(built, image=path)


@pytest.mark.timeout(600)
@pytest.mark.cells(FUZZED)
def test_finds_what_is_planted(cell: Cell, lab: Lab, tmp_path: Path) -> None:
    """Found within a few cases, down to the inspector and one segment at most, kept, and repeated from there."""
    assert lab.guest
    bad = skip_last_page(lab.kernels[cell.kernel], tmp_path)
    with Arena(cell, bad, lab.guest, name="fuzz.planted", report=lab.report) as a:
        with pytest.raises(LabError) as found:
            fuzz.fuzz(a, SEED, range(20), corpus=tmp_path)
        said = str(found.value)
        assert "destinations hold what was sent" in said and f"fuzz --cell {cell.name} --seed {SEED} --start" in said
        [path] = tmp_path.glob("*.json")
        assert str(path) in said
        name, case = fuzz.parse(path.read_text())
        assert name == cell.name and len(case.pieces) == 1 and case.pieces[0].memsz <= 65536
        assert not case.watch and not case.hold and not case.fragment
        outcome = a.run(case)
        assert outcome.verdict == "bad"
        last = case.pieces[0].end - a.world.page
        assert f"first difference at {last:#x}"[:-4] in outcome.why
    with Arena(cell, lab.kernels[cell.kernel], lab.guest, name="fuzz.mended", report=lab.report) as a:
        assert a.run(case).verdict == "good"


# What is generated, and what is made of it

def test_cases_are_the_same_every_time_and_legal() -> None:
    kinds: set[str] = set()
    for number in range(2000):
        case = generate(SEED, number, WORLD)
        assert case == generate(SEED, number, WORLD)
        ranges = sorted([(p.mem, p.end) for p in case.pieces] + [(case.at, case.at + 65536)])
        assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))
        assert WORLD.start <= ranges[0][0] and ranges[-1][1] <= WORLD.end
        assert all(p.mem % 4096 == p.memsz % 4096 == 0 < p.memsz and p.bufsz <= p.memsz for p in case.pieces)
        assert case.size <= WORLD.memory // 2 and len(case.pieces) <= 15
        kinds.update(case.shapes)
        if any(p.mem < WORLD.kernel < p.end for p in case.pieces):
            kinds.add("over the kernel")
        if case.size > WORLD.memory * 2 // 5:
            kinds.add("nearly half")
        if any(p.memsz == 4096 for p in case.pieces):
            kinds.add("one page")
        if any(0 < p.bufsz < p.memsz for p in case.pieces):
            kinds.add("less contents")
        if len(case.pieces) == 15:
            kinds.add("16 segments")
        kinds.update(word for word in ("watch", "hold", "fragment") if getattr(case, word))
    assert kinds == {*fuzz.SHAPES, "over the kernel", "nearly half", "one page", "less contents", "16 segments",
                     "watch", "hold", "fragment"}


def test_seeds_differ() -> None:
    assert generate(1, 0, WORLD) != generate(2, 0, WORLD) != generate(2, 1, WORLD)


def test_shrinking_keeps_what_matters() -> None:
    pieces = tuple(Piece((1 << 30) + (n << 24), 1 << 20, 1 << 20, n) for n in range(15))
    whole = Case(pieces, 1 << 31, 7, 4096, 4096, 4096, ("scattered",) * 15)
    small = shrink(whole, lambda case: any(piece.seed == 11 for piece in case.pieces), tries=200)
    assert [piece.seed for piece in small.pieces] == [11] and small.pieces[0].memsz == 4096 * 16
    assert small.place <= 1 and not (small.watch or small.hold or small.fragment)
    tried: list[Case] = []
    assert shrink(whole, lambda case: bool(tried.append(case)), tries=9) == whole and len(tried) == 9


def test_the_corpus_holds_what_was_put_in() -> None:
    case = generate(3, 3, WORLD)
    assert fuzz.parse(fuzz.dump(FUZZED, case, "why\nnot")) == (FUZZED.name, case)
    for text in ("", "{}", '{"cell": "x", "case": {"pieces": [1]}}'):
        with pytest.raises(LabError, match="not a case"):
            fuzz.parse(text)


@pytest.mark.parametrize("console, verdict", [
    ("[ 1.0] kexec: Bye!\n", None),
    ("[ 1.0] lab: kload 1 ENOMEM\n", "refused"),
    ("[ 1.0] lab: kload 137 \n", "refused"),
    ("[ 1.0] lab: kload 1 EADDRNOTAVAIL\n", "bad"),
    ("[ 1.0] lab: kload 2 kexec_inspect: x: y\n", "bad"),
    ("[ 1.0] kexec: Bye!\nkexec: corrupt image: segment 0x1, CRC\nkexec: parked\n", "bad"),
    ("Kernel panic - not syncing: x\n", "bad"),
    ("TAP version 13\n1..16\nok 1 a\n# inspector: parked\n", "bad"),
    ("TAP version 13\n1..16\n" + "".join(f"ok {n} a\n" for n in range(1, 17)) + "# inspector: parked\n", "good"),
    ("TAP version 13\n1..16\n" + "".join(f"ok {n} a\n" for n in range(1, 16)) +
     "not ok 16 b\n# inspector: parked\n", "bad")])
def test_verdicts(console: str, verdict: str | None) -> None:
    found = judge(console)
    assert (found[0] if found else None) == verdict

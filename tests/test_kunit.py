"""The suites that live in the kernel, run at boot."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from conftest import Lab
from lab import base, build, host, kunit, lock, paths, proc, tree
from lab.cells import CELLS, VA_BITS, Cell
from lab.handover import verify_first
from lab.kunit import Case

# Each kind of page table with a CPU that has what it needs, and with one that lacks it.
MACHINES = (
    "4k-va48-vhe", "4k-va48-el1", "64k-va52-nvhe", "64k-va52-vhe-nolva",  # part of a plain check
    "4k-va39-vhe", "4k-va52-vhe", "4k-va52-el1", "4k-va52-vhe-nolpa2", "4k-va52-nvhe-a57",
    "16k-va47-el1", "16k-va52-nvhe", "16k-va52-vhe-nolpa2", "64k-va42-nvhe", "64k-va48-el1", "4k-va48-vhe-holes",
    "4k-va48-debug-vhe", "4k-va48-debug-nvhe")

# Suite -> test cases, and how often they run in all, with parameters.
SUITES = {"arm64_trans_pgd": (17, 91), "arm64_kexec_verify": (14, 14)}


@pytest.mark.needs("tests")
@pytest.mark.kunit
@pytest.mark.timeout(900)
@pytest.mark.cells(*(CELLS[name] for name in MACHINES))
def test_all_pass_at_boot(cell: Cell, lab: Lab) -> None:
    with lab.machine(replace(cell, append=(*cell.append, "kunit.enable=1")), f"kunit-{cell.name}") as m:
        verify_first(m, m.hello())
        console = m.sh("dmesg")  # not m.log(): a console may be behind
        tainted = int(m.sh("cat /proc/sys/kernel/tainted"))
    cases = kunit.parse(console)
    wrong = [case for case in cases if case.verdict != "ok"]
    assert not wrong, "\n".join(map(str, wrong))
    found = {suite: (len({case.name for case in cases if case.suite == suite}),
                     sum(case.suite == suite for case in cases)) for suite in {case.suite for case in cases}}
    assert found == SUITES
    assert tainted & 1 << 18, f"TAINT_TEST is not set: {tainted:#x}"
    lab.report(f"   {cell.name}: {len(cases)} runs of KUnit cases passed, "
               f"{kunit.seconds(console):.2f} s of the boot")


@pytest.mark.needs("tests")
@pytest.mark.kunit
@pytest.mark.timeout(300)
@pytest.mark.cells(CELLS["4k-va48-vhe"])
def test_nothing_runs_unless_asked_for(cell: Cell, lab: Lab) -> None:
    with lab.machine(cell, f"kunit-off-{cell.name}") as m:
        verify_first(m, m.hello())
        assert "TAP version" not in m.log()
        assert int(m.sh("cat /proc/sys/kernel/tainted")) == 0


IMA = 1  # case for a kernel with CONFIG_IMA_KEXEC, which .kunitconfig asks for and ours have not


@pytest.mark.kunit
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pages", VA_BITS)
def test_upstreams_own_runner(pages: int) -> None:
    """kunit.py, with a kernel of the options that it chooses."""
    host.require("build", "boot")
    source = base.source()
    objdir = tree.home(source) / "build" / f"kunit-{pages}k"
    command = [sys.executable, "-B", "tools/testing/kunit/kunit.py", "run", "--arch=arm64",
               f"--cross_compile={host.CROSS_COMPILE}", "--kunitconfig=arch/arm64", f"--build_dir={objdir}",
               f"--kconfig_add=CONFIG_ARM64_{pages}K_PAGES=y", f"--make_options=CC=ccache {host.CROSS_COMPILE}gcc"]
    lines: list[str] = []
    with lock.held(paths.CACHE / "build.lock", "the compiler"):
        status = proc.stream(command, lines.append, cwd=tree.patched(source), env=build.environment())
    runs = sum(runs for _, runs in SUITES.values()) + IMA
    assert status == 0, "\n".join(lines[-40:])
    assert any(line.endswith(f"Testing complete. Ran {runs} tests: passed: {runs}") for line in lines), \
        "\n".join(lines[-10:])


# The parser

LOG = """\
[    0.400000] KTAP version 1
[    0.400001] 1..2
[    0.400002]     KTAP version 1
[    0.400003]     # Subtest: first
[    0.400004]     # module: first
[    0.400005]     1..3
[    0.400006]         KTAP version 1
[    0.400007]         # Subtest: many
[    0.400008]         ok 1 one thing
[    0.400009]         # many: EXPECTATION FAILED at arch/arm64/mm/trans_pgd_test.c:1
[    0.400009]         not ok 2 another
[    0.400010]     # many: pass:1 fail:1 skip:0 total:2
[    0.400010]     not ok 1 many
[    0.400011]     ok 2 plain
[    0.400012] kexec: segment 0 was overwritten: CRC32C at load 0x0, now 0x1
[    0.400013]     ok 3 absent # SKIP no such thing
[    0.400014] # first: pass:1 fail:1 skip:1 total:3
[    0.400015] not ok 1 first
[    0.400016]     KTAP version 1
[    0.400017]     # Subtest: second
[    0.400018]     1..1
[    0.400019]     ok 1 plain
[    0.900000] ok 2 second
[    0.900001] Run /init as init process
"""


@pytest.mark.kunit
def test_parse() -> None:
    assert kunit.parse(LOG) == [
        Case("first", "many", "one thing", "ok"), Case("first", "many", "another", "not ok"),
        Case("first", "plain", "", "ok"), Case("first", "absent", "", "skip"), Case("second", "plain", "", "ok")]
    assert kunit.seconds(LOG) == pytest.approx(0.5)


@pytest.mark.kunit
@pytest.mark.parametrize("line", ["1..3", "ok 2 plain", "ok 2 second", "not ok 1 many", "1..2", "ok 1 one thing"])
def test_what_is_cut_short_is_an_error(line: str) -> None:
    lines = [text for text in LOG.splitlines() if not text.endswith(line)]
    with pytest.raises(ValueError):
        kunit.parse("\n".join(lines))


@pytest.mark.kunit
def test_silence_is_an_error() -> None:
    with pytest.raises(ValueError, match="no KTAP"):
        kunit.parse("[    0.1] Run /init as init process\n")

"""`./kexec-lab bench`: this series and mainline in one run, counted and timed.

Relocation is counted by a plugin of QEMU's (lab/plugin.py), from the entry to
the control page to the entry to the image: the same numbers in every run. The
call that loads is timed in the guest by a clock that goes by instructions, one
per nanosecond: what else runs here makes no difference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Iterator

from lab import base, bases, build, cells, cpus, downtime, guest, host, lock, model, paths, plot, plugin, proc, qemu, say
from lab.build import Built
from lab.cells import Kernel
from lab.downtime import Downtime
from lab.errors import LabError
from lab.gdb import Gdb, options
from lab.guest import Guest
from lab.handover import Loaded, count_tables, reserved_pages
from lab.kload import MIB, Segment, call, file_statements, statements
from lab.machine import Machine
from lab.plugin import Counts
from lab.stage import ARGS, enter, read_offsets, read_symbols

REPORT = paths.OUT / "bench.json"
KEPT = paths.ROOT / "bench"  # the committed copy

OURS, MAINLINE = "this series", "mainline"
CELL = cells.BENCHED

# Relocation: one segment, in memory that the kernel does not take pages from while it has others.
SIZES = (16, 64, 256, 512)  # MiB
MEMORY = 8192  # MiB
DESTINATION = 0x80000000
FILL = 0x14  # an image of 0x14141414: a branch, and how the plugin knows it
PATIENCE = 300.0  # seconds for a relocation

# Load
GIB64 = 65536  # MiB
MEMORIES = (512, 2048, 8192, 16384, GIB64, 131072, 262144)  # MiB
TOUCHED = 1 / 32  # of its memory, that a guest uses to describe it, and for tables
TIMES = 5
PAGE = 4096


@dataclass(frozen=True)
class Relocation:
    """What moving `mib` MiB took."""

    kernel: str
    mib: int
    verify: bool
    scattered: bool
    counts: Counts

    @property
    def lines(self) -> int:
        return self.mib * MIB // 64


@dataclass(frozen=True)
class Load:
    """What loading took on a machine with `memory` MiB.

    `pages` are all that is held for the image beside the memory that it is executed in, tables among them; `tables` is
    None where they cannot be told from the rest.
    """

    kernel: str
    memory: int
    loader: str
    millions: float  # instructions of the call, the median
    pages: int
    tables: int | None


@dataclass(frozen=True)
class Target:
    """A figure of this series, which is to be at most, or with `least` at least, `limit`; mainline's, if it has one."""

    what: str
    mainline: float | None
    ours: float
    limit: float
    least: bool = False

    @property
    def reached(self) -> bool:
        return self.ours >= self.limit if self.least else self.ours <= self.limit


HISTORY = "5.10"  # a base that relocates with the MMU off


def kernels(source: base.Source, history: bool) -> dict[str, Built]:
    """What is compared: this series and its base, and with `history` a kernel that relocates with the MMU off."""
    ours, theirs = Kernel(4, 48), Kernel(4, 48, patched=False)
    built = {OURS: build.build(ours, source), MAINLINE: build.build(theirs, source)}
    if history:
        old = base.source(wanted=bases.find(HISTORY))
        built[f"v{old.version}"] = build.build(theirs, old)
    return built


def relocate(built: Built, archives: Guest, mib: int, verify: bool, scattered: bool, *, zva: bool = True,
             cell: cells.Cell = CELL, block: int = 64, mmu: bool = True) -> Counts:
    """Count one relocation; `zva` may DC ZVA be used, which zeroes `block` bytes on the CPU of `cell`?

    `mmu`: is it on while pages are moved? Raises LabError if it does not come to its end.
    """
    cell = replace(cell, name=f"bench-{built.kernel.name}-{cell.name}", kernel=built.kernel, memory=MEMORY, cpus=1,
                   kaslr=False)
    with tempfile.TemporaryDirectory(prefix="lab.") as folder:
        out, socket = Path(folder) / "counts", Path(folder) / "gdb"
        extra = [*plugin.options(plugin.entry(built), [FILL * 0x01010101], out, mmu, block),
                 *options(socket)]
        with Machine(cell, built, archives, extra=extra, report=lambda text: None) as m:
            m.hello()
            request = statements([Segment(DESTINATION, mib * MIB, f"fill {FILL} {mib * MIB}")])
            answer = call(m, request + (f"\nfragment {(2 * mib + 64) * MIB}" if scattered else ""))
            if answer != "0":
                raise LabError(f"{mib} MiB can't be loaded: {answer}", str(m.console))
            off = (["VERIFY"] if not verify else []) + (["ZVA"] if not zva else [])
            if built.kernel.patched and off:
                _without(off, m, built, socket)
            else:
                m.begin("kexec -e")
            end = time.monotonic() + PATIENCE
            while not plugin.read(out):
                m.heard(0.1)
                if m.ended() or time.monotonic() > end:
                    raise LabError(f"{cell.name} does not finish with {mib} MiB", str(m.console))
        (counts,) = plugin.read(out)
    return counts


def _without(members: list[str], m: Machine, built: Built, socket: Path) -> None:
    """Leave, and set members of the arguments to 0 at the entry to the control page."""
    symbols = read_symbols(built.vmlinux)
    offsets = read_offsets(built.objdir / "include/generated/asm-offsets.h")
    with Gdb(socket) as gdb:
        gdb.run_to(symbols["machine_kexec"], PATIENCE, str(m.console), lambda: m.begin("kexec -e"))
        control = enter(gdb, symbols, "machine_kexec", str(m.console))
        for member in members:
            gdb.write(control + ARGS + offsets[f"KEXEC_ARGS_{member}"], bytes(8))
        gdb.resume()


def relocations(compared: dict[str, Built], archives: Guest, sizes: tuple[int, ...] = SIZES) -> Iterator[Relocation]:
    """Every relocation, the kernels in turn."""
    for mib in sizes:
        for scattered in (False, True):
            for name, built in compared.items():
                for verify in (False, True) if built.kernel.patched else (False,):
                    one = Relocation(name, mib, verify, scattered,
                                     relocate(built, archives, mib, verify, scattered, mmu=name in (OURS, MAINLINE)))
                    say.info(f"   {one.kernel}, {mib} MiB{', verified' * verify}{', scattered' * scattered}: "
                             f"{one.counts.instructions / one.lines:.2f} instructions per line")
                    yield one


def carried() -> list[int]:
    """Those of MEMORIES that this host has room for."""
    room = host.available_memory() * 1024
    left_out = [memory for memory in MEMORIES if memory * TOUCHED > room]
    for memory in left_out:
        say.info(f"   left out: {memory} MiB, for which {memory * TOUCHED:.0f} MiB would have to be available here")
    return [memory for memory in MEMORIES if memory not in left_out]


def loads(name: str, built: Built, archives: Guest, memory: int) -> Iterator[Load]:
    """Both loaders on one machine, TIMES times each."""
    cell = replace(CELL, name=f"bench-{built.kernel.name}-{memory}", kernel=built.kernel, memory=memory,
                   cpus=1)
    clock = ["-icount", "shift=0,sleep=off"]
    with Machine(cell, built, archives, extra=clock, report=lambda text: None) as m:
        m.hello()
        m.sh("fetch", timeout=300)

        def segment(at: int, path: Path) -> Segment:
            return Segment(at, -(-path.stat().st_size // MIB) * MIB, f"file /next/{path.name}")

        at = qemu.RAM_BASE + 256 * MIB
        image = replace(segment(at, built.image), contents="file /next/Image")
        initrd = replace(segment(image.end, archives.next), contents="file /next/initrd")
        requests = {"load": statements([image, initrd]), "file": file_statements("/next/Image", "/next/initrd")}
        before = reserved_pages(m)
        for loader, request in requests.items():
            taken = []
            for _ in range(TIMES):
                error, nanoseconds = call(m, request + "\ntime").split()
                if error != "0":
                    raise LabError(f"{loader} at {memory} MiB: {error}", str(m.console))
                taken.append(int(nanoseconds))
            held = reserved_pages(m) - before
            loaded = Loaded(((image.mem, image.memsz), (initrd.mem, initrd.memsz)), None, None, None)
            tables = count_tables(m, loaded, held) if loader == "load" else None
            one = Load(name, memory, loader, statistics.median(taken) / 1e6, held, tables)
            say.info(f"   {one}")
            yield one


def main(args: argparse.Namespace) -> int:
    """Run all of it, print tables, leave out/bench.json and plots. Raises LabError."""
    host.require("base", "build", "boot", "plot")
    with lock.held(paths.OUT_LOCK, "this checkout's out/"):
        source = base.source()
        compared = kernels(source, args.history)
        archives = guest.build()
        with say.phase("counting relocations"):
            counted = list(relocations(compared, archives))
        # An old kernel is here for its relocation only.
        compared = {name: compared[name] for name in (OURS, MAINLINE)}
        with say.phase("timing loads"):
            timed = [one for memory in carried() for name, built in compared.items()
                     for one in loads(name, built, archives, memory)]
        with say.phase("timing handovers"):
            down = list(downtime.measure_all(compared, archives))
        with say.phase("having CPUs leave"):
            left = list(cpus.measure_all(compared, archives))
        reached = [*targets(counted, timed, down), *cpu_targets(left)]
        text = "\n\n".join([target_table(reached), relocation_table(counted), load_table(timed), downtime.table(down),
                            cpus.table(left), model.table(counted)])
        report = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "base": str(source),
                  "relocation": [asdict(one) for one in counted], "load": [asdict(one) for one in timed],
                  "downtime": [asdict(one) for one in down], "cpus": [asdict(one) for one in left]}
        paths.OUT.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
        (paths.OUT / "bench.txt").write_text(f"{report['date']}, {report['machine']}\n\n{text}\n")
        plot.bench(counted, timed, down, paths.OUT)
        plot.cpus(left, paths.OUT)
        print(text)
        if args.keep:
            KEPT.mkdir(exist_ok=True)
            for path in paths.OUT.glob("bench*"):
                shutil.copy(path, KEPT / path.name)
            say.info(f"kept in {KEPT.relative_to(paths.ROOT)}/")
    return 0


def machine() -> str:
    """What this runs on, in words."""
    version = proc.run([qemu.QEMU, "--version"]).stdout.decode().split("\n")[0]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {version}"


def targets(counted: list[Relocation], timed: list[Load], down: list[Downtime]) -> list[Target]:
    """What this series is to reach: the worst of all that was measured."""
    def moved(name: str, verify: bool = False) -> list[Relocation]:
        return [one for one in counted if one.kernel == name and one.verify == verify]

    def held(name: str, memory: int | None = None) -> float:
        return max(one.tables * PAGE / 1024 for one in timed
                   if one.kernel == name and one.tables is not None and memory in (None, one.memory))

    def growth(name: str, loader: str) -> float:
        calls = {one.memory: one.millions for one in timed if one.kernel == name and one.loader == loader}
        return calls[max(calls)] / calls[min(calls)]

    def worst(of: Callable[[Relocation], float]) -> tuple[float, float]:
        return max(map(of, moved(MAINLINE))), max(map(of, moved(OURS)))

    (in_place,) = (one for one in down if not one.copied and one.said)
    said = max(abs(one.said.seconds * 1e3 / one.total - 1) * 100 for one in down if one.said)
    sizes = sorted({one.memory for one in timed})
    grows = f"instructions, {sizes[-1]} against {sizes[0]} MiB"
    return [
        Target(f"tables at {GIB64} MiB, KiB", held(MAINLINE, GIB64), held(OURS, GIB64), 64),
        Target("tables at any size, KiB", held(MAINLINE), held(OURS), 64),
        Target(f"kexec_load(): {grows}", growth(MAINLINE, "load"), growth(OURS, "load"), 1.1),
        Target(f"kexec_file_load(): {grows}", growth(MAINLINE, "file"), growth(OURS, "file"), 1.1),
        Target("destination lines read for ownership, per MiB", *worst(lambda one: one.counts.lines_fetched / one.mib), 0),
        Target("source lines prefetched, %", *(min(one.counts.classes["prefetch"] / one.lines * 100 for one in moved(name))
                                               for name in (MAINLINE, OURS)), 90, least=True),
        Target("instructions per line", *worst(lambda one: one.counts.instructions / one.lines), 16),
        Target("instructions per line, verified", None,
               max(one.counts.instructions / one.lines for one in moved(OURS, True)), 26),
        Target("barriers per relocation", *worst(lambda one: one.counts.barriers), 15),
        Target("kexec_file_load() of kernel and initrd: MiB copied", None, in_place.said.copied_mib, 0),
        Target("phases that are said against those seen, % off", None, said, 2),
    ]


def cpu_targets(left: list[cpus.Left]) -> list[Target]:
    """The same for CPUs that leave, by their number: how much more it takes with many."""
    def ratio(name: str, of: Callable[[cpus.Left], float], many: int, few: int) -> float:
        found = {one.cpus: of(one) for one in left if one.kernel == name}
        return found[many] / found[few]

    def both(of: Callable[[cpus.Left], float], many: int) -> tuple[float, float]:
        return ratio(MAINLINE, of, many, 2), ratio(OURS, of, many, 2)

    return [
        Target("shutdown with 32 CPUs against 2, time", *both(lambda one: one.shutdown, 32), 2.5),
        Target("shutdown with 64 CPUs against 2, time", *both(lambda one: one.shutdown, 64), 4),
        Target("instructions of all CPUs to leave, 64 against 2", *both(lambda one: one.instructions, 64), 32),
        Target("verification before shutdown, most of 4 CPUs against 1", None,
               ratio(OURS, lambda one: one.verified_most, 4, 1), 0.35),
    ]


def target_table(reached: list[Target]) -> str:
    """Figures, and whether they are what was to be reached."""
    rows = [("FIGURE", "MAINLINE", "THIS SERIES", "TO REACH", "REACHED")]
    rows += [(one.what, "-" if one.mainline is None else f"{one.mainline:.2f}", f"{one.ours:.2f}",
              f"{'at least' if one.least else 'at most'} {one.limit:g}", "yes" if one.reached else "NO")
             for one in reached]
    return "\n".join(say.columns(rows, 1))


def relocation_table(counted: list[Relocation]) -> str:
    """What a line of 64 bytes takes, and what a relocation does."""
    rows = [("RELOCATION", "MIB", "PAGES", "INSNS/LINE", "LOADS", "STORES", "UNCACHED", "FETCHED/MIB", "DC ZVA",
             "CIVAC", "PREFETCH", "BARRIERS", "TLBI", "IC")]
    for one in counted:
        c = one.counts
        rows.append((one.kernel + (", verified" if one.verify else ""), str(one.mib),
                     "single" if one.scattered else "as they come", f"{c.instructions / one.lines:.2f}",
                     str(c.loads_cacheable), str(c.stores_cacheable), str(c.loads_uncached + c.stores_uncached),
                     f"{c.lines_fetched / one.mib:.0f}", str(c.classes["dc_zva"]), str(c.classes["dc_civac"]),
                     str(c.classes["prefetch"]), str(c.barriers), str(c.classes["tlbi"]),
                     str(c.classes["ic_iallu"] + c.classes["ic_other"])))
    return "\n".join(say.columns(rows, 1))


def load_table(timed: list[Load]) -> str:
    """What is held between load and execution, and how long the call takes."""
    rows = [("LOAD", "MEMORY MIB", "LOADER", "M INSNS", "HELD PAGES", "TABLE PAGES", "TABLE BYTES")]
    for one in timed:
        tables = ("-", "-") if one.tables is None else (str(one.tables), str(one.tables * PAGE))
        rows.append((one.kernel, str(one.memory), one.loader, f"{one.millions:.0f}", str(one.pages), *tables))
    return "\n".join([*say.columns(rows, 1), "Pages are held beside the memory that the image is executed in; "
                      "kexec_file_load() of this series claims that, too."])

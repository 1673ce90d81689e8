"""`./kexec-lab run`: see one kernel hand over to the next."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict

from lab import base, build, cells, guest, host, lock, paths, say
from lab.cli import LOADERS
from lab.errors import LabError
from lab.handover import Handover, handover, verify_first
from lab.machine import Machine
from lab.timing import Timing

REPORT = paths.OUT / "run.json"


def main(args: argparse.Namespace) -> int:
    """Run one cell; returns 0 if every handover was verified. Raises LabError for the first that was not."""
    cell = cells.cell(args.cell)
    with lock.held(paths.OUT_LOCK, "this checkout's out/"):
        _write(cell, None, [], ok=False)  # what an earlier run found is not true of this one
        host.require("base", "build", "boot")
        source = base.source()
        say.info(str(source))
        built = build.build(cell.kernel, source)
        handovers: list[Handover] = []
        failure: LabError | None = None
        with Machine(cell, built, guest.build(), accel=args.accel) as m:
            try:
                with say.phase(f"booting {cell.name}"):
                    verify_first(m, m.hello())
                for loader in LOADERS[args.loader]:
                    handovers.append(_one(m, loader, handovers))
            except LabError as error:
                failure = error
        _write(cell, source, handovers, ok=failure is None)
        print(table(handovers))
        if failure:
            raise failure
        say.info(f"every handover verified; {REPORT.relative_to(paths.ROOT)} has the figures")
        return 0


def _one(m: Machine, loader: str, handovers: list[Handover]) -> Handover:
    begin = time.monotonic()
    with say.phase(f"handover by {loader}"):
        try:
            return handover(m, loader)
        except LabError:
            handovers.append(Handover(loader, False, time.monotonic() - begin, None, None, None, None))
            raise


def table(handovers: list[Handover]) -> str:
    """The closing table."""
    rows = [("LOADER", "VERIFIED", "SECONDS", "TABLE PAGES", "BYTES MOVED", "BYTES IN PLACE",
             "SHUTDOWN", "COPY", "STARTUP")]
    for one in handovers:
        figures = (one.table_pages, one.bytes_moved, one.bytes_in_place)
        rows.append((one.loader, "yes" if one.ok else "NO", f"{one.seconds:.1f}",
                     *("-" if figure is None else str(figure) for figure in figures), *_phases(one.timing)))
    return "\n".join(say.columns(rows))


def _phases(said: Timing | None) -> tuple[str, ...]:
    """What the kernel that came up says; only kexec_file_load() has it told."""
    if said is None:
        return ("-",) * 3
    return tuple(f"{ms:.1f} ms" for ms in (said.shutdown_ms, said.copy_ms, said.startup_ms))


def _write(cell: cells.Cell, source: base.Source | None, handovers: list[Handover], ok: bool) -> None:
    report = {"ok": ok, "cell": cell.name, "base": str(source) if source else None, "handovers": [asdict(one) for one in handovers]}
    paths.OUT.mkdir(exist_ok=True)
    temporary = REPORT.with_suffix(".new")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.rename(temporary, REPORT)

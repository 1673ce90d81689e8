"""Plots of what bench found, as SVG, by gnuplot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lab import proc

if TYPE_CHECKING:
    from lab.bench import Load, Relocation
    from lab.cpus import Left
    from lab.downtime import Downtime

HEAD = "set terminal svg size 760,420 font 'sans,12' background 'white'\nset grid ytics\nset key left top\n"


def _draw(script: str) -> None:
    proc.run(["gnuplot", "-"], stdin=script.encode())


def _block(name: str, rows: list[tuple[object, ...]]) -> str:
    lines = "\n".join(" ".join(f'"{cell}"' if isinstance(cell, str) else str(cell) for cell in row) for row in rows)
    return f"${name} << EOD\n{lines}\nEOD\n"


def bench(counted: "list[Relocation]", timed: "list[Load]", down: "list[Downtime]", folder: Path) -> None:
    """bench-lines.svg: events per line that is moved; bench-tables.svg, bench-load.svg: against memory;
    bench-downtime.svg: phases.
    """
    biggest = max(one.mib for one in counted)
    rows: list[tuple[object, ...]] = []
    for one in counted:
        if one.mib == biggest and not one.scattered:
            c, n = one.counts, one.lines
            rows.append((one.kernel + (", verified" if one.verify else ""), c.instructions / n,
                         (c.loads_cacheable + c.stores_cacheable) / n, c.lines_fetched / n,
                         c.classes["dc_civac"] / n, c.classes["prefetch"] / n))
    titles = ["instructions", "loads and stores", "lines fetched", "DC CIVAC", "prefetches"]
    bars = ", ".join(f"$lines using {column}:xtic(1) title '{title}'" for column, title in enumerate(titles, 2))
    _draw(HEAD + _block("lines", rows) + f"set output '{folder}/bench-lines.svg'\n"
          f"set title 'Relocation of {biggest} MiB: events per line of 64 bytes'\n"
          f"set style data histogram\nset style fill solid 0.8\nset yrange [0:*]\nset key outside\nplot {bars}\n")
    kernels = list(dict.fromkeys(one.kernel for one in timed))
    for output, title, label, loader in (
            ("bench-tables.svg", "Page tables held between load and execution", "pages", "load"),
            ("bench-load.svg", "Instructions of kexec_file_load()", "millions", "file")):
        blocks, curves = "", []
        for number, kernel in enumerate(kernels):
            points = [(one.memory / 1024, one.tables if label == "pages" else one.millions)
                      for one in timed if one.kernel == kernel and one.loader == loader]
            blocks += _block(f"k{number}", points)  # type: ignore[arg-type]
            curves.append(f"$k{number} using 1:2 with linespoints lw 2 title '{kernel}'")
        _draw(HEAD + blocks + f"set output '{folder}/{output}'\nset title '{title}'\nset logscale x 2\n"
              f"set logscale y\nset xlabel 'memory, GiB'\nset ylabel '{label}'\nplot {', '.join(curves)}\n")
    phases = [(f"{one.kernel},\\n{'copied' if one.copied else 'in place'}", one.shutdown, one.rest) for one in down]
    top = max(one.total for one in down) * 1.25
    _draw(HEAD + _block("phases", phases) + f"set output '{folder}/bench-downtime.svg'\n"
          "set title 'From the reboot call to init, ms at one instruction per ns'\n"
          "set style data histogram\nset style histogram rowstacked\nset style fill solid 0.8\nset boxwidth 0.6\n"
          f"set yrange [0:{top:.0f}]\nset bmargin 4\nset key inside right top horizontal\nplot $phases using 2:xtic(1) title 'shutdown', "
          "$phases using 3 title 'the rest'\n")


def cpus(left: "list[Left]", folder: Path) -> None:
    """bench-cpus.svg: how long CPUs take to leave, and what they execute for it, against their number."""
    blocks, curves = "", []
    for number, kernel in enumerate(dict.fromkeys(one.kernel for one in left)):
        blocks += _block(f"k{number}", [(one.cpus, one.shutdown, one.instructions) for one in left if one.kernel == kernel])
        curves += [f"$k{number} using 1:2 with linespoints lw 2 title '{kernel}, ms'",
                   f"$k{number} using 1:3 with linespoints lw 2 dt 2 title '{kernel}, million instructions'"]
    _draw(HEAD + blocks + f"set output '{folder}/bench-cpus.svg'\nset title 'From kexec -e until one CPU is left'\n"
          f"set logscale x 2\nset logscale y\nset xlabel 'CPUs'\nplot {', '.join(curves)}\n")

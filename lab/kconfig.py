"""Configurations: allnoconfig plus fragments, and proof that every option asked for is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Container, Sequence

from lab.cells import Kernel
from lab.errors import LabError

FOLDER = Path(__file__).resolve().parent / "config"

Make = Callable[[Sequence[str]], None]


def parse(text: str) -> dict[str, str]:
    """Option -> value of a fragment or a .config; 'is not set' reads as 'n'."""
    options = {}
    for line in text.splitlines():
        if match := re.match(r"CONFIG_(\w+)=(.*)", line):
            options[match[1]] = match[2]
        elif match := re.match(r"# CONFIG_(\w+) is not set", line):
            options[match[1]] = "n"
    return options


def wanted(kernel: Kernel, overlay: str = "") -> dict[str, str]:
    """Every option that `kernel` asks for, with its value; `overlay` is the file in FOLDER for its base."""
    options = parse((FOLDER / "base.config").read_text())
    if overlay:
        options |= parse((FOLDER / overlay).read_text())
    if kernel.patched:
        options |= of_series()
    if kernel.flavour != "lab":
        options |= parse((FOLDER / f"{kernel.flavour}.config").read_text())
    options[f"ARM64_{kernel.pages}K_PAGES"] = "y"
    options[f"ARM64_VA_BITS_{kernel.va}"] = "y"
    return options


def of_series() -> dict[str, str]:
    """The options that the series itself adds."""
    return parse((FOLDER / "series.config").read_text())


def configure(kernel: Kernel, tree: Path, objdir: Path, make: Make, later: Container[str] = (),
              overlay: str = "") -> Path:
    """Write the .config of `kernel` into `objdir` and return it; untouched when nothing changed.

    `make` runs make with the arguments it is given, for `tree` and `objdir`;
    `later` are options that this tree, with a part of the series, does not have yet; for `overlay` see wanted().
    Raises LabError naming each option that the configuration dropped.
    """
    options = {name: value for name, value in wanted(kernel, overlay).items() if name not in later}
    fragment = objdir / "lab.config"
    fragment.write_text("".join(f"CONFIG_{name}={value}\n" for name, value in options.items()))
    make(["allnoconfig", f"KCONFIG_ALLCONFIG={fragment}"])
    config = objdir / ".config"
    require(options, parse(config.read_text()), tree, kernel.name)
    return config


def require(options: dict[str, str], got: dict[str, str], tree: Path, name: str) -> None:
    """Raises LabError naming each of `options` that `got` does not have, and what it depends on."""
    dropped = [option for option, value in options.items() if got.get(option, "n") != value]
    if not dropped:
        return
    lines = [f"CONFIG_{option}: asked for {options[option]}, got {got.get(option, 'n')}; "
             + depends(option, tree) for option in dropped]
    raise LabError(f"the configuration of {name} dropped what was asked for:\n  " + "\n  ".join(lines),
                   "add what is missing to lab/config/, or take the option out")


def depends(option: str, tree: Path) -> str:
    """What `option` depends on, as the Kconfig files of `tree` say."""
    said: list[str] = []
    known = False
    for path in sorted(tree.rglob("Kconfig*")):
        inside = False
        for line in path.read_text(errors="replace").splitlines():
            if re.match(r"\s*(menu)?config\s", line):
                inside = line.split()[1] == option
                known = known or inside
            elif re.match(r"(menu|endmenu|if|endif|source|choice|endchoice|comment)\b", line):
                inside = False
            elif inside and (match := re.match(r"\s*depends on (.*)", line)):
                said.append(match[1].rstrip("\\ "))
    if not known:
        return "the base has no such option"
    return "depends on " + " && ".join(f"({s})" for s in said) if said else "depends on its menu or choice"

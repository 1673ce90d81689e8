"""The property of /chosen, as the message that proposes it describes it: by dt-schema's own tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lab import fdt, paths, series

pytestmark = pytest.mark.lint

PACKAGE = Path("/usr/lib/python3/dist-packages/dtschema")
NAME = "linux,kexec-timing"
NUMBERS = (1, 62500000, 0x48000000, 10, 18, 19, 20, 0, 4096, 20, 20)


def proposal() -> str:
    """The schema of the property, out of the message."""
    body = next(patch.body for patch in series.load().patches if patch.slug == "time-the-reboot")
    match = re.search(rf"^  {NAME}:\n(?:    .*\n|\n(?=    ))+", body, re.M)
    assert match
    return match[0]


def run(schemas: Path, *command: str) -> str:
    """What a program of dt-schema, with its schemas replaced by those below `schemas`, complains about."""
    done = subprocess.run(["/usr/bin/python3", f"/usr/bin/{command[0]}", *command[1:]], text=True, capture_output=True,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(schemas.parent), "LC_ALL": "C.UTF-8"})
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    return said if said.strip() or done.returncode == 0 else f"exit status {done.returncode}"


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dt-schema's package, with the property in its schema of /chosen."""
    copy = tmp_path_factory.mktemp("schemas") / "dtschema"
    shutil.copytree(PACKAGE, copy)
    chosen = copy / "schemas/chosen.yaml"
    before, marker, behind = chosen.read_text().partition("\npatternProperties:\n")
    assert marker and NAME not in before
    chosen.write_text(f"{before}\n{proposal()}{marker}{behind}")
    return copy


def tree(folder: Path, value: bytes, name: str = NAME) -> str:
    """A device tree that dt-schema has nothing else to say about."""
    root = fdt.Node({"compatible": fdt.string("linux,dummy-virt"), "model": fdt.string("linux,dummy-virt"),
                     "#address-cells": fdt.cell(2), "#size-cells": fdt.cell(2)})
    root.node("chosen").properties[name] = value
    file = folder / "tree.dtb"
    file.write_bytes(fdt.flatten(fdt.Tree(root, bytes(16), 0)))
    return str(file)


def complaints(schemas: Path, file: str) -> list[str]:
    """What dt-validate says about /chosen."""
    return [line for line in run(schemas, "dt-validate", file).splitlines() if "chosen" in line]


def test_the_schema_is_one(schemas: Path) -> None:
    assert run(schemas, "dt-doc-validate", str(schemas / "schemas/chosen.yaml")) == ""


def test_what_is_handed_over_is_valid(schemas: Path, tmp_path: Path) -> None:
    assert complaints(schemas, tree(tmp_path, fdt.pairs(*NUMBERS))) == []
    assert complaints(schemas, tree(tmp_path, bytes(88))) == []


@pytest.mark.parametrize("value", [fdt.pairs(*NUMBERS[:-1]), fdt.pairs(*NUMBERS, 0), fdt.pairs(*NUMBERS) + fdt.cell(0)],
                         ids=["ten", "twelve", "eleven.and.a.half"])
def test_what_is_not_is_told(schemas: Path, tmp_path: Path, value: bytes) -> None:
    assert any(NAME in line for line in complaints(schemas, tree(tmp_path, value)))


def test_without_the_proposal_nothing_is_known_of_it(tmp_path: Path) -> None:
    assert any(NAME in line for line in complaints(PACKAGE, tree(tmp_path, fdt.pairs(*NUMBERS))))

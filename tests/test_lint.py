"""What kernel maintainers run over a series, and the hygiene of this repository.

Each check has a companion that breaks a copy and sees the check fail.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import build, paths, proc, series, tree
from lab.base import Source
from lab.cells import KERNELS, Kernel

pytestmark = [pytest.mark.lint, pytest.mark.timeout(900)]

KERNEL, MEASURED = KERNELS["4k-va48"], KERNELS["4k-va48-ima"]
VARIANT = "-lint"

# Debian's sparse does not know the C23 spelling, and the kernel would skip it without a word.
SPARSE = "sparse -D__typeof_unqual__=__typeof__"


@dataclass(frozen=True)
class Waiver:
    """A complaint of checkpatch that stands: its type, where, and why."""

    kind: str
    line: str  # what the complaint says must match this
    reason: str


WAIVERS = (
    Waiver("MISSING_SIGN_OFF", "", "whoever mails the series signs it off"),
    Waiver("CAMELCASE", "<(CurrentEL|SPSel|_Noreturn)>", "names of system registers, and a keyword of C"),
    Waiver("CAMELCASE", "<Lno_tcr2>", "a label of an assembler macro"),
    Waiver("SPACING", r"\| \+\.Lno_tcr2", "the same label, in a header, which passes for C"),
    Waiver("CAMELCASE", "<Unlock>", "a label that kernel_kexec() has"),
    Waiver("LEADING_SPACE", r"\| \+  DEFINE\(", "the way asm-offsets.c is indented"),
    Waiver("DEFINE_ARCH_HAS", "'ARCH_HAS_KIMAGE_ARCH'", "the name by which linux/kexec.h asks for it"),
    Waiver("ARCH_INCLUDE_LINUX", r"\| \+#include <asm/kexec\.h>", "linux/kexec.h includes it with KEXEC_CORE only"),
    Waiver("UNKNOWN_COMMIT_ID", "'(07d24902977e|efc2d0f20a9d|254a41c0ba05|1229384f5b85|9aec2fb0fd5e|9f0ec4b16f2b|aacd149b6238|"
           "054698316d87)'",
           "they are mainline's, which the base has without its history"),
    Waiver("MISSING_FIXES_TAG", r"-(virtio-mmio-irq|text-offset-wraps|no-cfi-check|ask-all-cpus|reserved-for-the-kernel|"
           r"own-memory-is-no-lpi-table|switch-lpis-off|no-kaslr-seed-for-nokaslr|"
           r"kvm-clean-init-params|hibernate-clean-hyp-stub|clear-tcr2)\.patch",
           "the base has no history that would tell which commit it is"),
    Waiver("ENOSYS", r"arguments\.c|error == ENOSYS", "a test that asks whether there is such a system call"),
    Waiver("FILE_PATH_CHANGES", "", "MAINTAINERS covers arch/arm64/, Documentation/arch/arm64/ and "
           "tools/testing/selftests/ as folders"),
)


@pytest.fixture
def patched(source: Source) -> Path:
    return tree.patched(source, variant=VARIANT)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of what the series is made of."""
    for name in ("series", "patches", *series.KERNEL_FOLDERS):
        if (paths.ROOT / name).is_dir():
            shutil.copytree(paths.ROOT / name, tmp_path / name)
    return tmp_path


def touched(*suffixes: str) -> list[str]:
    """In-tree paths of the kernel files that the series touches and leaves behind."""
    return sorted(path for path in series.load().touched if path.endswith(suffixes))


def append(root: Path, text: str) -> str:
    """Add `text` to an owned C file below `root`, to which one patch alone belongs; returns its in-tree path."""
    path = "arch/arm64/kernel/kexec_timing.c"
    with open(root / path, "a") as file:
        file.write(text)
    return path


# checkpatch

def checkpatch(top: Path, mails: list[Path]) -> list[tuple[str, str]]:
    """(type, complaint | line of the patch) of everything that checkpatch has to say."""
    output = proc.run(["perl", "scripts/checkpatch.pl", "--root=.", "--strict", "--show-types", "--terse",
                       "--no-summary", "--max-line-length=100", *mails], cwd=top, accept=(0, 1)).stdout.decode()
    found = re.findall(r"^((.*?):(\d+): (?:ERROR|WARNING|CHECK):(\w+): .*)$", output, re.M)
    return [(kind, f"{Path(mail).name}{line.removeprefix(mail)} | {Path(mail).read_text().splitlines()[int(number) - 1]}")
            for line, mail, number, kind in found]


def standing(complaints: list[tuple[str, str]]) -> list[str]:
    return [line for kind, line in complaints
            if not any(waiver.kind == kind and re.search(waiver.line, line) for waiver in WAIVERS)]


def mails(root: Path) -> list[Path]:
    return sorted((root / "patches").glob("*/*.patch"))


def test_checkpatch(patched: Path) -> None:
    assert mails(paths.ROOT)
    complaints = checkpatch(patched, mails(paths.ROOT))
    left = standing(complaints)
    assert not left, "\n".join(left)
    for waiver in WAIVERS:
        assert any(waiver.kind == kind and re.search(waiver.line, line) for kind, line in complaints), \
            f"nothing needs the waiver for {waiver.kind} {waiver.line}"


def test_checkpatch_finds_what_is_wrong(source: Source, patched: Path, broken: Path) -> None:
    append(broken, "int  bad_style( int a ){\n    return(a);\n}\n")
    changed = series.write(series.generate(series.load(root=broken), source.tree), broken / "patches")
    bad, good = ([root / "patches" / name for name in changed if name.endswith(".patch")] for root in (broken, paths.ROOT))
    assert len(standing(checkpatch(patched, bad))) > len(standing(checkpatch(patched, good)))


# The compiler with W=1, and sparse

def compile_all(source: Source, root: Path, files: list[str]) -> list[str]:
    """The lines with which W=1 and sparse complain about `files`, and everything else that stops make."""
    measured = [path for path in files if path.startswith("security/")]
    rest = [path for path in files if path not in measured]
    return [line for kernel, chosen in ((KERNEL, rest), (MEASURED, measured)) if chosen
            for line in compile_with(kernel, source, root, chosen)]


def compile_with(kernel: Kernel, source: Source, root: Path, files: list[str]) -> list[str]:
    """The same, in the configuration of `kernel`."""
    srctree = tree.patched(source, root, variant=VARIANT)
    objdir = tree.home(source, VARIANT) / "build" / kernel.name
    build.configure(kernel, srctree, objdir, overlay=source.base.config)
    build.make(srctree, objdir, ["prepare"])
    objects = [re.sub(r"\.[cS]$", ".o", path) for path in files if path.endswith((".c", ".S"))]
    for stale in objects:
        (objdir / stale).unlink(missing_ok=True)
    output = build.make(srctree, objdir, ["W=1", "C=2", f"CHECK={SPARSE}", "KCFLAGS=-Wno-error", *objects])
    assert not any("sparse is not available" in line for line in output)
    for path in objects:
        assert (objdir / path).is_file(), f"{path} was not compiled"
    return [line for line in output if re.search(r": (warning|error)", line)
            and any(path in line and is_ours(line, path, source, srctree) for path in files)
            and not sparse_is_wrong(line)]


def is_ours(complaint: str, path: str, source: Source, srctree: Path) -> bool:
    """Is a complaint about a line that the series adds or changes? It need not mend the others."""
    match = re.search(re.escape(path) + r":(\d+):", complaint)
    if not match or not (source.tree / path).is_file():
        return True
    before, after = ((top / path).read_text().splitlines() for top in (source.tree, srctree))
    number = int(match[1]) - 1
    return not any(block.b <= number < block.b + block.size for block in
                   difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks())


def sparse_is_wrong(line: str) -> bool:
    """Debian's sparse takes the strings of MODULE_LICENSE() and the like for no constants, in every module."""
    match = re.match(r"(\S+):(\d+):\d+: error: bad constant expression$", line)
    return bool(match) and Path(match[1]).read_text().splitlines()[int(match[2]) - 1].startswith("MODULE_")


def compiled() -> list[str]:
    """Touched files that arm64's compiler sees: asm-offsets.c and headers through those that use them.

    No configuration of the laboratory's has memory hotplug.
    """
    return [path for path in touched(".c", ".S", ".h")
            if not path.startswith(("tools/", "Documentation/", "arch/loongarch/"))
            and not path.endswith(("/asm-offsets.c", ".lds.S", "mm/memory_hotplug.c"))]


def test_no_warning_from_the_compiler_or_sparse(source: Source) -> None:
    complaints = compile_all(source, paths.ROOT, compiled())
    assert not complaints, "\n".join(complaints)


def test_warnings_are_found(source: Source, broken: Path) -> None:
    """Those of the compiler, of the compiler with W=1, and of sparse."""
    path = append(broken, "int undeclared(int *p)\n{\n\tint unused = 1;\n\n\treturn *p;\n}\n"
                          "int unmarked(int __user *p);\nint unmarked(int __user *p)\n{\n\treturn *p;\n}\n")
    complaints = compile_all(source, broken, [path])
    for complaint in ("unused variable", "no previous prototype", "dereference of noderef"):
        assert any(complaint in line for line in complaints), complaint


# kernel-doc

def kernel_doc(top: Path, files: list[str]) -> list[str]:
    done = proc.run(["/usr/bin/python3", "-B", "scripts/kernel-doc", "-v", "-none", *files], cwd=top,
                    accept=tuple(range(100)))
    lines = (done.stdout + done.stderr).decode().splitlines()
    assert any(line.startswith("Info:") for line in lines), "no kernel-doc comment was read"
    return [line for line in lines if not line.startswith("Info:")]


def without_lines(complaints: list[str]) -> set[str]:
    """Complaints, wherever in a file they are about, and without the line that counts them."""
    return {re.sub(r":\d+", "", line) for line in complaints if not re.match(r"\d+ (errors|warnings)", line)}


def test_kernel_doc(source: Source, patched: Path) -> None:
    """Nothing that upstream's own copies of the files don't have."""
    files = touched(".c", ".h")
    upstream = [path for path in files if (source.tree / path).is_file()]
    assert without_lines(kernel_doc(patched, files)) <= without_lines(kernel_doc(source.tree, upstream))


def test_kernel_doc_finds_what_is_wrong(tmp_path: Path, patched: Path) -> None:
    bad = tmp_path / "bad.c"
    bad.write_text("/**\n * f - does\n * @x: that is not there\n */\nint f(int y)\n{\n}\n")
    assert any("'y' not described" in line for line in kernel_doc(patched, [str(bad)]))


# The repository

HOSTS = ("kernel.org", "gnu.org", "fsf.org", "spdx.org", "debian.org", "w3.org")  # that text may refer to
HOST = re.compile(r"(?<![\w.@/-])(?:https?://)?((?:[a-z0-9][a-z0-9-]*\.)+(?:org|com|net|io|dev|cloud|app))(?=[\s/:)>\"'`,]|$)")
PLACE = re.compile(r"(?<![\w.$}~-])(?:/tmp/|/(?:work|root|home|Users)\b)")


def hygiene(name: str, text: str) -> list[str]:
    """Lines that only make sense on one machine, or that whoever mails the series has to add."""
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        if name.startswith("patches/") and line.startswith("-"):
            continue  # upstream's, on its way out
        for host in HOST.findall(line):
            if not any(host == known or host.endswith("." + known) for known in HOSTS):
                faults.append(f"{name}:{number}: names the host {host}")
        place = PLACE.search(line)
        # The laboratory gives commands to guests, which have a /tmp of their own.
        if place and not (place[0] == "/tmp/" and name.startswith(("lab/", "tests/"))):
            faults.append(f"{name}:{number}: names a place on one machine: {place[0]}")
        if name.startswith(("series/", "patches/")) and "Signed-off-by" in line:
            faults.append(f"{name}:{number}: signs off in somebody's name")
    return faults


def repository() -> list[str]:
    """Every file of the checkout but what is made in it, as paths from its top."""
    found = []
    for folder, below, files in os.walk(paths.ROOT):
        below[:] = [name for name in below if name not in (".git", "out", "__pycache__")]
        found += [os.path.relpath(os.path.join(folder, name), paths.ROOT) for name in files]
    return sorted(set(found) - {".git"})


def test_nothing_in_the_repository_belongs_to_one_machine() -> None:
    names = repository()
    assert "lab/cli.py" in names
    faults = [fault for name in names if name != "tests/test_lint.py"
              for fault in hygiene(name, (paths.ROOT / name).read_text(errors="replace"))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name, line", [
    ("lab/x.py", "see https://packages.example.com/simple"), ("README.md", "mirror.example.net is fast"),
    ("lab/x.py", 'Path("/wo' 'rk/main")'), ("lab/x.py", "cd /home/someone"), ("lab/x.py", "'/ro" "ot/.cache'"),
    ("README.md", "ls /tmp/mine"), ("series/0001-x/message", "Signed-off-by: A <a@localhost>")])
def test_what_belongs_to_one_machine_is_found(name: str, line: str) -> None:
    assert len(hygiene(name, line)) == 1


@pytest.mark.parametrize("line", [
    "https://docs.kernel.org/arch/arm64", "<https://www.gnu.org/licenses/>", "self.network.online = args.command",
    "ls $HOME/work", "Documentation/arch/arm64/kexec.rst", "mail: someone@kernel.org"])
def test_what_is_fine_is_left_alone(line: str) -> None:
    assert hygiene("lab/x.py", line) == []


def test_programs_are_well_formed() -> None:
    proc.run(["sh", "-n", paths.ROOT / "kexec-lab"])
    for name in repository():
        if name.endswith(".py"):
            compile((paths.ROOT / name).read_text(), name, "exec")

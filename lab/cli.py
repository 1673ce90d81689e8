"""The command line."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, NoReturn

from lab import base, bases, branch, build, cells, host, lock, mutants, paths, recipients, say, series, tree, upto
from lab.errors import LabError, UsageError
from lab.kdump import CRASHES
from lab.mutants import MUTANTS

DESCRIPTION = """\
Boots an arm64 Linux kernel that carries this repository's kexec under QEMU,
lets it load a second kernel, and checks that the second one comes up whole.

The two commands to know:

  ./kexec-lab run      see it happen: build, boot, load, hand over, verify
  ./kexec-lab check    run the tests

Whatever is missing on a Debian machine is installed, downloaded and built by
the command that needs it, and kept: the second time is quick.
"""

EXAMPLES = """\
examples:
  ./kexec-lab run --loader file            only kexec_file_load
  ./kexec-lab run --cell 64k-va52-nvhe     another kernel and machine ('cells' lists them)
  ./kexec-lab kdump --crash interrupt      a crash, and what the dump holds
  ./kexec-lab hibernate --cycles 10        half of memory is checked after each
  ./kexec-lab bench                        events and times beside mainline's
  ./kexec-lab fuzz --count 2000            random segments; a failure is made smaller and kept
  ./kexec-lab check -m handover            one kind of test; further words go to pytest
  ./kexec-lab check --upto 1-fixes         the patches up to that group alone, and what can be tested of them
  ./kexec-lab check --all                  every cell: some hours of work
  ./kexec-lab shell                        a prompt in a guest with kexec-tools in it
  ./kexec-lab tree ~/linux-kexec           a patched kernel tree to build yourself
  ./kexec-lab series --to ~/kexec-series   the series as a git branch; --from reads it back
  ./kexec-lab --dry-run run                what 'run' would do, without doing it
"""

LOADERS = {"load": ("load", "load-nocheck"), "file": ("file",), "both": ("load", "load-nocheck", "file")}


class _Parser(argparse.ArgumentParser):
    """Reports bad usage like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"'{self.prog} --help' tells what there is")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="./kexec-lab", description=DESCRIPTION, epilog=EXAMPLES,
                  formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    top.add_argument("--dry-run", action="store_true",
                     help="print what would be installed, fetched, built and run, and do none of it")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, handler: Callable[[argparse.Namespace], int], text: str,
            **options: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                      allow_abbrev=False, **options)  # type: ignore[arg-type]
        command.set_defaults(handler=handler)
        command.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS,
                             help="print what would be done, and do none of it")
        return command

    run = add("run", _module("run"), "boot a kernel, hand over to the next, verify")
    _cell_options(run)
    run.add_argument("--loader", choices=tuple(LOADERS), default="both",
                     help="load: kexec_load with and without purgatory's checks; file: kexec_file_load; "
                          "both: all three (default)")
    _base_options(run)
    check = add("check", _check, "run the tests; options it does not know go to pytest", add_help=True)
    check.add_argument("--all", action="store_true", help="every cell instead of two kernels' worth")
    check.add_argument("--jobs", type=int, metavar="N", default=host.guests_at_once(),
                       help="tests to run beside each other, each with a guest (default: as this machine can: "
                            "%(default)s)")
    check.add_argument("--upto", metavar="GROUP",
                       help="without the groups of patches behind this one, such as 1-fixes, and the tests that need them")
    _accel_option(check)
    _base_options(check)
    kdump = add("kdump", _module("kdump"), "crash a guest, save and check its dump")
    _cell_options(kdump)
    kdump.add_argument("--loader", choices=("load", "file", "both"), default="both",
                       help="load: kexec -p -c; file: kexec -p -s; both (default)")
    kdump.add_argument("--crash", choices=CRASHES, default="sysrq", help="how it crashes (default: sysrq)")
    _base_options(kdump)
    hibernate = add("hibernate", _module("hibernate"), "hibernate and resume a guest, check its memory")
    _cell_options(hibernate)
    hibernate.add_argument("--cycles", type=int, default=2, metavar="N", help="how many times (default: 2)")
    _base_options(hibernate)
    mutate = add("mutants", _module("mutants"), "break the kernel code in small ways, and see which test notices")
    mutate.add_argument("--only", action="append", choices=MUTANTS, metavar="NAME",
                        help="judge this one (may be repeated): " + " ".join(MUTANTS))
    _base_options(mutate)
    bench = add("bench", _module("bench"), "count and time this series and mainline in one run")
    bench.add_argument("--history", action="store_true",
                       help="v5.10, too, which relocates with the MMU off")
    bench.add_argument("--keep", action="store_true", help="copy what was found to bench/")
    _base_options(bench)
    fuzz = add("fuzz", _module("fuzz"), "load random lists of segments, and look at what arrives")
    fuzz.add_argument("--cell", metavar="NAME", default=cells.FUZZED.name,
                      help=f"kernel and machine (default: {cells.FUZZED.name}; './kexec-lab cells' lists them)")
    fuzz.add_argument("--count", type=int, default=200, metavar="N", help="how many (default: 200)")
    fuzz.add_argument("--seed", type=int, metavar="S", help="the same cases for the same number (default: any)")
    fuzz.add_argument("--start", type=int, default=0, metavar="N", help="begin with this one of the seed (default: 0)")
    fuzz.add_argument("--case", type=Path, metavar="FILE", help="one that was kept, see tests/corpus, on its cell")
    fuzz.add_argument("--mainline", action="store_true", help="the base's own implementation, without the series")
    _base_options(fuzz)
    shell = add("shell", _module("shell"), "open a prompt in a guest")
    _cell_options(shell)
    _base_options(shell)
    make = add("build", _build, "build a kernel")
    make.add_argument("kernel", nargs="?", metavar="KERNEL", help="such as 4k-va48 (default)")
    make.add_argument("--cell", metavar="NAME", help="the kernel of this cell")
    _base_options(make)
    export = add("tree", _tree, "write a whole patched kernel tree to a new folder")
    export.add_argument("dir", type=Path, metavar="DIR")
    _base_options(export)
    regenerate = add("series", _series, "regenerate patches/ from messages and owned files, or edit the series in git")
    where = regenerate.add_mutually_exclusive_group()
    where.add_argument("--to", type=Path, metavar="DIR",
                       help="make, or update, a git repository with a commit per patch on branch 'series'")
    where.add_argument("--from", type=Path, metavar="DIR", dest="from_",
                       help="read that branch back: messages, order, owned files and patches/")
    where.add_argument("--record-base", action="store_true",
                       help="record the base's copies of the owned files in series/bases.json first")
    where.add_argument("--recipients", action="store_true",
                       help="ask the base's scripts/get_maintainer.pl who each group is mailed to, and write that down first")
    _base_options(regenerate)
    add("bases", _bases, "list the bases: kernel releases that the series is for")
    add("cells", _cells, "list the cells: kernels, and machines to run them on")
    clean = add("clean", _clean, "remove what this checkout built")
    clean.add_argument("--all", action="store_true", help="the whole cache too: downloads, base, compiler results")
    return top


def _cell_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cell", metavar="NAME", default=cells.DEFAULT.name,
                         help=f"kernel and machine (default: {cells.DEFAULT.name}; './kexec-lab cells' lists them)")
    _accel_option(command)


def _accel_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--accel", choices=("tcg", "kvm"), default="kvm" if host.has_kvm() else "tcg",
                         help="tcg emulates (default on a machine that is not arm64); kvm needs an arm64 host")


def _base_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", metavar="NAME", help="the kernel release to build on (default: the first that 'bases' lists)")
    command.add_argument("--kernel-src", type=Path, metavar="PATH",
                         help=f"use this kernel tree, tarball of one or linux-source package (also: {base.BY_HAND}=PATH)")
    command.add_argument("--any-base", action="store_true",
                         help="accept a base whose copies of the owned files differ from the recorded ones")


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit status: 0, 1 (failed), 2 (bad usage) or 130 (interrupted)."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(arguments)
    except LabError as error:
        print(f"kexec-lab: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("kexec-lab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _dispatch(arguments: list[str]) -> int:
    top = parser()
    if not arguments:
        top.print_help()
        return 0
    args, rest = top.parse_known_args(arguments)
    if rest and args.command != "check":
        raise UsageError(f"unknown: {' '.join(rest)}", f"'./kexec-lab {args.command} --help' tells what there is")
    args.pytest = rest
    _validate(args)
    if args.dry_run:
        _explain(args)
        return 0
    return args.handler(args)


def _validate(args: argparse.Namespace) -> None:
    """What is wrong with a command is said before anything is downloaded or built."""
    if getattr(args, "accel", "tcg") == "kvm" and not host.has_kvm():
        raise UsageError("--accel kvm needs an arm64 host with a usable /dev/kvm", "leave it out, or say --accel tcg")
    if getattr(args, "any_base", False):
        os.environ[base.ANY_BASE] = "1"
    if getattr(args, "kernel_src", None):
        os.environ[base.BY_HAND] = str(args.kernel_src.resolve())
    if getattr(args, "base", None):
        if not bases.find(args.base).patches:
            raise UsageError(f"the series has no patches for base {args.base}",
                             "it is there to be compared with: './kexec-lab bench --history'")
        os.environ[base.CHOSEN] = args.base
    if getattr(args, "upto", None):
        os.environ[upto.CHOSEN] = upto.find(args.upto)
    if getattr(args, "cell", None):
        cells.cell(args.cell)
    if getattr(args, "jobs", 1) < 1:
        raise UsageError(f"--jobs {args.jobs} runs nothing", "one or more")
    if args.command == "build":
        if args.kernel and args.cell:
            raise UsageError("a kernel and a cell are named", "name one of them")
        args.kernel = cells.kernel(args.kernel) if args.kernel else cells.cell(args.cell or cells.DEFAULT.name).kernel


def _module(name: str) -> Callable[[argparse.Namespace], int]:
    """The main() of the module with that name, which is not loaded before it is needed."""
    return lambda args: importlib.import_module(f"lab.{name}").main(args)


def _pytest_commands(args: argparse.Namespace) -> list[list[str]]:
    """What runs the tests: one process, or one that builds and then several that test."""
    selection = [] if any(Path(word.split("::")[0]).exists() for word in args.pytest if word[:1] != "-") \
        else [str(paths.ROOT / "tests")]
    command = ["/usr/bin/python3", "-m", "pytest", *(["--all"] if args.all else []), "--accel", args.accel,
               *selection, *args.pytest]
    if args.jobs == 1:
        return [command]
    return [[*command, "--build-only", "-q", "-q"], [*command, "-n", str(args.jobs), "--dist", "loadgroup"]]


def _check(args: argparse.Namespace) -> int:
    host.require("base", "build", "boot", "test", "lint")
    os.chdir(paths.ROOT)
    *before, command = _pytest_commands(args)
    for preparation in before:
        status = subprocess.run(preparation).returncode
        if status:
            return status
    os.execv(command[0], command)


def _build(args: argparse.Namespace) -> int:
    built = build.build(args.kernel, base.source())
    say.info(f"{built.image}")
    return 0


def _tree(args: argparse.Namespace) -> int:
    tree.export(base.source(), args.dir)
    say.info(f"to build it: make -C {args.dir} ARCH=arm64 CROSS_COMPILE={host.CROSS_COMPILE} defconfig Image")
    return 0


def _series(args: argparse.Namespace) -> int:
    source = base.source()
    the_series = series.load(source.base)
    if args.record_base:
        say.info(f"recorded {source.version} in {base.record(source, the_series.owned)}")
    base.check_originals(source, the_series.owned)
    folder = source.base.patches
    if args.to:
        say.info(branch.to(the_series, source, args.to))
    elif args.from_:
        for line in branch.back(the_series, source, args.from_) or ["nothing changed"]:
            say.info(line)
    else:
        if args.recipients:
            for name in recipients.write(the_series, source.tree):
                say.info(f"series/{name}/{series.RECIPIENTS} changed")
            the_series = series.load(source.base)
        changed = series.write(series.generate(the_series, source.tree), paths.ROOT / folder)
        say.info(f"{folder}/: " + (", ".join(changed) if changed else "nothing changed"))
    return 0


def _bases(args: argparse.Namespace) -> int:
    rows = [("BASE", "PACKAGE", "SUITES", "RECORDED FROM", "PATCHES", "LACKS")]
    rows += [(one.name, one.package, " ".join(one.suites), one.packaged or "-",
              f"{one.patches}/" if one.patches else "none, to compare with", " ".join(one.lacks) or "-")
             for one in bases.load()]
    print("\n".join(say.columns(rows)))
    print(f"\nThe first is the default. A suite that has the package is taken in that order, then the package cache of "
          "this machine's apt.\n" + "\n".join(f"{name}: {what}" for name, what in bases.FEATURES.items()))
    return 0


def _cells(args: argparse.Namespace) -> int:
    rows = [("CELL", "EL", "CPU", "CPUS", "MEMORY", "RODATA", "KASLR", "FURTHER")]
    for cell in cells.CELLS.values():
        further = " ".join(cell.append) + (" holes" if cell.holes else "") + (" (core)" if cell.core else "")
        rows.append((cell.name, cell.el, cell.cpu, str(cell.cpus), f"{cell.memory} MiB", cell.rodata,
                     "on" if cell.kaslr else "off", further.strip()))
    print("\n".join(say.columns(rows)))
    print(f"\nkernels: {' '.join(cells.KERNELS)}\n(core): part of a plain 'check'; the others with 'check --all'")
    return 0


def _clean(args: argparse.Namespace) -> int:
    with ExitStack() as locks:
        locks.enter_context(lock.held(paths.OUT_LOCK, "this checkout's out/"))
        locks.enter_context(lock.held(paths.CACHE / "build.lock", "the compiler"))
        locks.enter_context(lock.held(paths.CACHE / "lock", "the cache"))
        for folder in _cleaned(args):
            say.info(f"removing {folder}")
            shutil.rmtree(folder)
    return 0


def _cleaned(args: argparse.Namespace) -> list[Path]:
    folders = [paths.OUT, *sorted((paths.CACHE / "work").glob(f"{paths.CHECKOUT_ID}-*"))]
    if args.all:
        folders = [paths.OUT, *sorted(path for path in paths.CACHE.glob("*") if path.is_dir())]
    return [folder for folder in folders if folder.is_dir()]


def _explain(args: argparse.Namespace) -> None:
    """What a command would do, in the order in which it would."""
    needs = {**dict.fromkeys(("run", "kdump", "hibernate", "fuzz", "shell"), ("base", "build", "boot")),
             **dict.fromkeys(("check", "mutants"), ("base", "build", "boot", "test", "lint")), "build": ("base", "build"),
             "bench": ("base", "build", "boot", "plot"),
             "tree": ("base",), "series": ("base",)}.get(args.command, ())
    missing = host.missing_packages(*needs) if needs and host.is_debian() else []
    if missing:
        print(f"install: {' '.join(missing)}")
    if needs:
        chosen = bases.find(os.environ[base.CHOSEN]) if os.environ.get(base.CHOSEN) else bases.default()
        suites = f"{chosen.package} from the first of {', '.join(chosen.suites)}, through apt, unpacked below {paths.CACHE}"
        print(f"base:    {os.environ.get(base.BY_HAND) or suites}")
    if args.command == "fuzz":
        kernel = cells.cell(args.cell).kernel.name
        print(f"build:   kernel {f'{kernel}-base' if args.mainline else kernel}, guest initramfs, inspector")
        print(f"boot:    {args.cell} once, and put it back for each of {1 if args.case else args.count} cases")
    if args.command in ("run", "kdump", "hibernate", "shell"):
        cell = cells.cell(args.cell)
        print(f"build:   kernel {cell.kernel.name}, guest initramfs (busybox-static, kexec-tools for arm64)")
        print(f"boot:    {cell.name} under qemu-system-aarch64, {args.accel}: {cell.cpu}, {cell.cpus} CPUs, "
              f"{cell.memory} MiB, {cell.el}")
    if args.command == "bench":
        print(f"build:   kernels 4k-va48 and 4k-va48-base{', and v5.10' if args.history else ''}\nwrite:   {paths.OUT / 'bench.json'}, a table and plots"
              + (", and copies of them in bench/" if args.keep else ""))
    if args.command == "run":
        print(f"load:    {', '.join(LOADERS[args.loader])}; execute and verify each")
        print(f"write:   {paths.OUT / 'run.json'}")
    elif args.command == "check":
        for command in _pytest_commands(args):
            print(f"run:     {' '.join(command)}")
    elif args.command == "mutants":
        print(f"judge:   {' '.join(args.only or MUTANTS)}\nwrite:   {mutants.REPORT}")
    elif args.command == "build":
        print(f"build:   kernel {args.kernel.name}")
    elif args.command == "tree":
        print(f"write:   {args.dir}")
    elif args.command == "series":
        print(f"write:   {args.to or paths.ROOT / 'series'}{'' if args.to else ' and the patches'}")
    elif args.command == "clean":
        for folder in _cleaned(args):
            print(f"remove:  {folder}")

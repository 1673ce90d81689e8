"""`./kexec-lab shell`: a guest on the terminal."""

from __future__ import annotations

import argparse
import subprocess

from lab import base, build, cells, guest, host, lock, paths, proc, qemu, say


def main(args: argparse.Namespace) -> int:
    """Open a prompt in a guest; returns QEMU's exit status."""
    cell = cells.cell(args.cell)
    host.require("base", "build", "boot")
    built = build.build(cell.kernel, base.source())
    space = guest.build()
    boot = qemu.Boot(cell, built.image, space.initrd, built.image, space.next, args.accel)
    with lock.held(paths.OUT_LOCK, "this checkout's out/"):
        paths.OUT.mkdir(exist_ok=True)
        boot = qemu.prepare(boot, paths.OUT / "shell.dtb")
        say.info(qemu.by_hand(boot))
        # In the foreground: the terminal is QEMU's, Ctrl-C goes to the guest.
        return subprocess.run(qemu.on_terminal(boot), preexec_fn=proc.die_with_parent).returncode

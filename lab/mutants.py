"""Small breakages of the kernel code, and which test notices each.

A mutant is one edit of an owned file as the whole series leaves it. It is made
where the patched tree is laid out, so the checkout is never touched; what names
it is an environment variable that every command of the laboratory obeys.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import Mapping, Sequence

from lab import host, operations, paths, say
from lab.cells import CELLS, KERNELS
from lab.errors import LabError, UsageError
from lab.series import File

VARIABLE = "KEXEC_LAB_MUTANT"
REPORT = paths.OUT / "mutants.json"
LIMIT = 2700.0  # seconds that the tests of one mutant may take

ASM = "arch/arm64/kernel/relocate_kernel.S"
VECTORS = "arch/arm64/mm/trans_pgd-asm.S"
TABLES = "arch/arm64/mm/trans_pgd.c"
LOAD = "arch/arm64/kernel/machine_kexec.c"
VERIFY = "arch/arm64/kernel/kexec_verify.c"
CPUS = "arch/arm64/kernel/kexec_cpus.c"
REPORTING = "arch/arm64/kernel/kexec_report.c"
CRASH = "arch/arm64/kernel/machine_kexec_crash.c"
MACROS = "arch/arm64/include/asm/assembler.h"
IRS = "drivers/irqchip/irq-gic-v5-irs.c"


@dataclass(frozen=True)
class Mutant:
    """One edit: `old`, which stands in `path` once, becomes `new`. The tests of the kinds `marks` go first.

    It is judged on the kernel of that name. `where` picks tests by name, as pytest's -k does, from all that there are;
    '' is a plain check.
    """

    name: str
    path: str
    old: str
    new: str
    marks: str
    kernel: str = "4k-va48"
    where: str = ""

    def apply(self, content: bytes) -> bytes:
        """Raises LabError when the file has changed since the mutant was written."""
        old = self.old.encode()
        if content.count(old) != 1:
            raise LabError(f"mutant {self.name}: what it replaces stands {content.count(old)} times in {self.path}",
                           "bring it up to date in lab/mutants.py")
        return content.replace(old, self.new.encode())


@dataclass(frozen=True)
class Death:
    """What became of a mutant: `killer` is the first test that failed twice, or '' if it survived.

    Tests in `once` failed as well, but not when they were run again.
    """

    mutant: str
    killer: str
    seconds: float
    once: tuple[str, ...] = ()


_ALL = (
    # The copy
    Mutant("page-skipped", ASM, "\tmov\tx20, x0\n", "\tmov\tx20, x0\n\ttst\tx19, #0xf0000\n\tb.eq\t.Lclean\n", "handover"),
    Mutant("last-page-skipped", ASM, "\tmov\tx20, x0\n",
           "\tmov\tx20, x0\n\tldr\tx8, [x21]\n\ttbz\tx8, #IND_SOURCE_BIT, .Lclean\n", "handover"),
    Mutant("wrong-stride", ASM, "\tstp\tx0, x1, [\\dst], #64\n", "\tstp\tx0, x1, [\\dst], #128\n", "handover"),
    Mutant("zeroed-behind-the-copy", ASM, "\tdc\tzva, x12\n", "\tdc\tzva, x9\n", "bench"),
    Mutant("line-behind-zeroed", ASM, "\tcmp\tx12, x11\n\tb.lo\t1b\n2:\tcbnz", "\tcmp\tx12, x11\n\tb.ls\t1b\n2:\tcbnz",
           "handover or inspector"),
    Mutant("serrors-all-fatal", ASM, "\ttbz\tx29, #ESR_ELx_AET_SHIFT + 1, 5f", "\tb\t5f", "faults"),
    Mutant("serrors-all-survived", ASM, "\ttbnz\tx29, #ESR_ELx_AET_SHIFT, 5f\n", "", "faults"),
    Mutant("not-cleaned", ASM, "\tdc\tcivac, x9\n", "\tnop\n", "bench"),
    Mutant("one-line-cleaned", ASM, "\tdc\tcivac, x9\n", "\tdc\tcivac, x19\n", "bench"),
    Mutant("no-tlb-maintenance", ASM, "\tbreak_before_make_ttbr_switch x9, x8, x0, x1\n",
           "\tphys_to_ttbr x0, x8\n\tmsr\tttbr1_el1, x0\n\tisb\n", "bench or handover"),
    Mutant("last-line-of-page-skipped", ASM, "\tadd\tx10, x8, #PAGE_SIZE\n",
           "\tadd\tx10, x8, #PAGE_SIZE\n\tsub\tx10, x10, #64\n", "handover"),
    Mutant("a-register-stored-twice", ASM, "\tstp\tx6, x7, [\\dst, #-16]\n", "\tstp\tx6, x6, [\\dst, #-16]\n",
           "handover"),
    Mutant("destination-stays", ASM, "\tmov\tx19, x0\n\n.Lnext:", "\n.Lnext:", "handover"),
    Mutant("next-list-page-ignored", ASM, "\tmov\tx21, x0\n", "\tcbnz\tx21, .Lnext\n\tmov\tx21, x0\n", "handover"),
    # Verification
    Mutant("crc-of-seven-words", ASM, ".irp\tn, 0, 1, 2, 3, 4, 5, 6, 7\n", ".irp\tn, 0, 1, 2, 3, 4, 5, 6\n", "handover"),
    Mutant("crc-never-compared", ASM, "\tcmp\tw8, w16\n\tb.eq\t.Lchecked", "\tcmp\tw8, w8\n\tb.eq\t.Lchecked", "faults"),
    Mutant("list-never-compared", ASM, "\tb.ne\tkexec_corrupt\n\n.Lentry:", "\n.Lentry:", "faults"),
    Mutant("crc-seed", VERIFY, "return crc_of_pages(~0, &pages", "return crc_of_pages(0, &pages", "handover"),
    Mutant("overwritten-and-executed", VERIFY, "n, image->arch.crc[n], crc);\n\treturn -EIO;",
           "n, image->arch.crc[n], crc);\n\treturn 0;", "faults"),
    Mutant("overwritten-list-executed", VERIFY, "image->arch.list_crc, crc);\n\t\treturn -EIO;",
           "image->arch.list_crc, crc);\n\t\treturn 0;", "faults"),
    Mutant("last-segment-unchecked", VERIFY, "i < image->nr_segments; i++)\n\t\tret = compare_crc(",
           "i + 1 < image->nr_segments; i++)\n\t\tret = compare_crc(", "faults"),
    Mutant("share-in-the-wrong-place", VERIFY, "size - end),\n", "size - start),\n", "kunit"),
    Mutant("share-left-out", VERIFY, "end = min(start + SHARE, size);", "end = min(start + SHARE / 2, size);", "kunit"),
    Mutant("in-place-unchecked", LOAD, "\t\tif (kexec_verify_in_place(image))", "\t\tif (false)", "faults"),
    Mutant("in-place-beside-copied-unchecked", VERIFY, "image->arch.relocate && !image->segment_cma[n]",
           "image->arch.relocate", "kunit"),
    # CPUs
    Mutant("firmware-not-waited-for", CPUS, "\tkexec_wait_for_firmware();\n}", "}", "cpus"),
    Mutant("a-cpu-not-waited-for", CPUS, "\t\tif (cpu == smp_processor_id())\n\t\t\tcontinue;\n",
           "\t\tif (cpu == smp_processor_id() || cpu == 1)\n\t\t\tcontinue;\n", "cpus"),
    Mutant("a-cpu-not-asked", CPUS, "&kexec_others)\n\t\tstop_one", "&kexec_others)\n\t\tif (cpu != 1)\n\t\t\tstop_one", "cpus"),
    Mutant("leaves-with-a-lock", CPUS, "\tkexec_ask_cpus_to_leave();\n", "\tkexec_tell_cpus_to_leave();\n", "cpus"),
    Mutant("offline-is-off", CPUS, "if (cpu_online(cpu) || !smp_cpu_is_on(cpu))", "if (true)", "cpus"),
    # The way out
    Mutant("wrong-el", ASM, "\tcbz\tx27, .Lenter\n", "\tb\t.Lenter\n", "handover"),
    Mutant("x0-lost", ASM, ".Lenter:\n\tmov\tx0, x26\n", ".Lenter:\n\tmov\tx0, xzr\n", "handover"),
    Mutant("x0-lost-by-way-of-el2", ASM, "\tmov\tx2, x26\n", "\tmov\tx2, xzr\n", "handover"),
    Mutant("x1-not-zero", ASM, ".Lenter:\n\tmov\tx0, x26\n\tmov\tx1, xzr\n", ".Lenter:\n\tmov\tx0, x26\n\tmov\tx1, x25\n",
           "inspector or handover"),
    Mutant("mmu-left-on", ASM, "\tmsr\tsctlr_el1, x9\n", "\tnop\n", "inspector or handover"),
    Mutant("serror-left-unmasked", ASM, "\tmsr\tdaifset, #PSR_A_BIT >> 6\n", "\tnop\n", "inspector or handover"),
    Mutant("in-place-without-device-tree", LOAD, "image->start, image->arch.dtb_mem, 0, 0);", "image->start, 0, 0, 0);",
           "handover or kdump"),
    Mutant("tcr2-left", MACROS, "\tmsr\tREG_TCR2_EL1, xzr\n", "", "inspector"),
    Mutant("tcr2-el12-left", MACROS, "\tmsr\tREG_TCR2_EL12, xzr\n", "", "inspector"),
    Mutant("tcr2-left-in-place", "arch/arm64/kernel/cpu-reset.S", "\tclear_tcr2\n", "", "inspector"),
    Mutant("tcr2-left-where-pages-are-moved", ASM, "\tclear_tcr2\n", "", "inspector"),
    # A GICv5
    Mutant("ist-left-valid", IRS, "\t\tif (FIELD_GET(GICV5_IRS_IST_BASER_VALID, baser))\n", "\t\tif (!baser)\n", "neighbours",
           where="gicv5"),
    Mutant("irs-left-enabled", IRS,
           "\tlist_for_each_entry(irs_data, &irs_nodes, entry)\n\t\tgicv5_irs_disable(irs_data);\n", "", "neighbours",
           where="gicv5"),
    # Vectors and report
    Mutant("no-vectors", ASM, "\tmsr\tvbar_el1, x0\n", "\tnop\n", "faults"),
    Mutant("no-vectors-at-el2", LOAD, "\t\t\t__hyp_set_vectors(control + TRANS_PGD_VECTORS_OFFSET);",
           "\t\t\tbarrier();", "handover or faults"),
    Mutant("vectors-misaligned", LOAD, "memcpy(page + TRANS_PGD_VECTORS_OFFSET, trans_pgd_vectors,",
           "memcpy(page + TRANS_PGD_VECTORS_OFFSET + 64, trans_pgd_vectors,", "faults"),
    Mutant("a-vector-swapped", VECTORS, "unexpected_vector\ttrans_pgd_spx_irq\n", "hvc_vector\ttrans_pgd_spx_irq\n", "faults"),
    Mutant("serrors-masked", ASM, "\tmsr\tdaifclr, #PSR_A_BIT >> 6", "\tmsr\tdaifset, #PSR_A_BIT >> 6", "faults"),
    Mutant("serrors-masked-in-place", LOAD, "\tlocal_daif_restore(DAIF_PROCCTX_NOIRQ);\n", "", "faults"),
    Mutant("uart-without-a-console", REPORTING, "args->uart && !console_on_uart(args->uart)", "!args->uart", "faults"),
    Mutant("any-console-will-do", REPORTING, " && console_uart(con) == uart)", ")", "faults"),
    Mutant("uart-of-a-realm-private", REPORTING, "__pte_to_phys(__pte(PROT_NS_SHARED))", "0", "faults"),
    Mutant("no-handler", LOAD, "\t*handler = virt_to_phys(page) + (kexec_fault - __relocate_new_kernel_start);",
           "\t*handler = 0;", "faults"),
    Mutant("reset-by-the-wrong-conduit", REPORTING, "\t\treturn KEXEC_PSCI_HVC;\n\tif", "\t\treturn KEXEC_PSCI_SMC;\n\tif",
           "faults"),
    Mutant("uart-busy-when-it-is-not", REPORTING, "\targs->uart_busy = UART_BIT;", "\targs->uart_busy = 0;", "faults"),
    # Tables
    Mutant("read-only", TABLES, "\t\t\t     PAGE_KERNEL);", "\t\t\t     PAGE_KERNEL_RO);", "handover"),
    Mutant("wrong-attribute-index", TABLES, "\tptval_t leaf = pgprot_val(prot) & ~PTE_TYPE_MASK;",
           "\tptval_t leaf = (pgprot_val(prot) & ~(PTE_TYPE_MASK | PTE_ATTRINDX_MASK)) |\n"
           "\t\t       PTE_ATTRINDX(MT_NORMAL_NC);", "kunit"),
    Mutant("block-beyond-the-end", TABLES, "!((va | next | pa) & mask)", "!((va | pa) & mask)", "kunit"),
    Mutant("block-at-the-wrong-address", TABLES, "!((va | next | pa) & mask)", "!((va | next) & mask)", "kunit"),
    Mutant("only-pages", TABLES, "\treturn level >= 2 ||", "\treturn level >= 3 ||", "kunit or matrix"),
    Mutant("entry-replaced", TABLES, "\t\t\tif (!pte_none(*entry))\n\t\t\t\treturn -EEXIST;\n", "", "kunit"),
    Mutant("writable-and-executable", TABLES, "if (writable && executable)", "if (writable && executable && !val)", "kunit"),
    Mutant("idmap-of-48-bits", TABLES, ">> 48 ? 52 : 48;", ">> 52 ? 52 : 48;", "kunit", "4k-va52"),
    Mutant("nomap-mapped", TABLES, "if (memblock_is_nomap(region) || s >= e)", "if (s >= e)", "kunit or badload"),
    Mutant("nearly-adjacent-is-adjacent", TABLES, "\t\tif (s == end) {", "\t\tif (end && s <= end + PAGE_SIZE) {", "kunit"),
    Mutant("tables-from-anywhere", LOAD, "\tstruct page *page = kimage_alloc_control_pages(arg, 0);",
           "\tstruct page *page = alloc_page(GFP_KERNEL);", "badload or fuzz or handover"),
    # What is refused
    Mutant("validation-off-by-a-page", LOAD, "\t\tphys_addr_t end = start + image->segment[i].memsz;\n\t\tbool",
           "\t\tphys_addr_t end = start + image->segment[i].memsz - PAGE_SIZE;\n\t\tbool", "badload"),
    Mutant("no-validation", LOAD, "\tret = kexec_check_segments(image);\n",
           "\tkexec_check_segments(image);\n\tret = 0;\n", "badload"),
    Mutant("any-command-line", LOAD, "\tif (image->cmdline_buf_len > COMMAND_LINE_SIZE)\n",
           "\tif (image->cmdline_buf_len > 2 * COMMAND_LINE_SIZE)\n", "badload"),
    # The crash kernel
    Mutant("not-protected", CRASH, "\tint ret = crash_pages_set_valid(false);", "\tint ret = crash_pages_set_valid(true);", "kdump"),
    Mutant("protected-while-saved", CRASH, "\t\tcrash_protection_paused = true;\n\t\tcrash_pages_set_valid(true);\n",
           "\t\tcrash_protection_paused = true;\n", "hibernate"),
    Mutant("not-cleaned-after-hibernation", LOAD, "\tkexec_clean_again(kexec_image);\n", "", "hibernate"),
    Mutant("crash-kernel-not-saved", CRASH, "|| !crash_image_holds(addr);", "|| !crash_image_holds(addr) || addr;",
           "hibernate"),
    Mutant("registers-not-saved", CRASH, "\tcrash_save_cpu(regs, smp_processor_id());\n", "", "kdump"),
)
# Whatever else there is of maintenance and barriers, each without the operation.
_WITHOUT = tuple(Mutant(one.name, one.path, one.old, one.new, "caches or bench or inspector")
                 for one in operations.everywhere(paths.ROOT))
MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutant in (*_ALL, *_WITHOUT)}


def chosen() -> Mutant | None:
    """The mutant that the environment names. Raises UsageError when there is none of that name."""
    name = os.environ.get(VARIABLE)
    return find(name) if name else None


def find(name: str) -> Mutant:
    try:
        return MUTANTS[name]
    except KeyError:
        raise UsageError(f"no mutant is called '{name}'", "mutants: " + " ".join(MUTANTS)) from None


def mutate(files: Mapping[str, File | None]) -> dict[str, File | None]:
    """What the series makes of a tree, with the chosen mutant's edit in it."""
    mutant, result = chosen(), dict(files)
    if mutant:
        file = result[mutant.path]
        assert file
        result[mutant.path] = File(mutant.apply(file.content), file.executable)
    return result


def judge(mutant: Mutant) -> Death:
    """Build a mutant and run the tests on it: those of its own kinds, and if it survives them, all of them.

    Raises LabError if it does not build.
    """
    begin = time.monotonic()
    kernel = KERNELS[mutant.kernel]
    env = os.environ | {VARIABLE: mutant.name}
    _build(kernel.name, env, f"the mutant {mutant.name}")  # if it fails, no test has noticed anything
    killer, once = "", []
    for marks in (mutant.marks, "not series and not lint"):
        named = f"{kernel.name}- and {mutant.where}" if mutant.where else f"{kernel.name}-"
        while not killer and (failed := _first_failure(["-m", marks, "-k", named,
                                                        *(f"--deselect={test}" for test in once)], mutant, env)):
            # A test that fails for another reason, on a busy machine, say, must not pass for one that noticed.
            if _first_failure(["--jobs", "1", failed], mutant, env):
                killer = failed
            else:
                once.append(failed)
    return Death(mutant.name, killer, time.monotonic() - begin, tuple(once))


def _build(name: str, env: Mapping[str, str], what: str) -> None:
    done = subprocess.run([paths.ROOT / "kexec-lab", "build", name], env=env, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{what} does not build", done.stderr[-2000:])


def first_failure(text: str) -> str:
    """The first test that failed, as pytest is to be told of it; '' if there is none in what it said."""
    match = re.search(r"^(?:FAILED|ERROR) (tests/[^\s\[@]+(?:\[[^]]*\])?)", text, re.MULTILINE)
    return match[1] if match else ""


def _first_failure(words: Sequence[str], mutant: Mutant, env: Mapping[str, str]) -> str:
    plain = not mutant.where and any(cell.core for cell in CELLS.values() if cell.kernel.name == mutant.kernel)
    everything = [] if plain else ["--all"]
    command = [paths.ROOT / "kexec-lab", "check", *everything, *words, "-x", "-q", "--durations=0", "--tb=line"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise LabError(f"the tests have not ended after {LIMIT:.0f} s: {' '.join(map(str, command))}") from None
    if failed := first_failure(done.stdout):
        return failed
    if done.returncode:
        raise LabError(f"the tests ended with {done.returncode}, and none failed", done.stdout[-2000:] + done.stderr)
    return ""


def main(args: argparse.Namespace) -> int:
    """Judge the mutants that were asked for, or all; 0 when none survived."""
    host.require("base", "build", "boot", "test", "lint")
    wanted = [find(name) for name in args.only] if args.only else list(MUTANTS.values())
    deaths = []
    for number, mutant in enumerate(wanted, 1):
        death = judge(mutant)
        deaths.append(death)
        once = f"; failed once: {', '.join(death.once)}" if death.once else ""
        say.info(f"{number:3d}/{len(wanted)} {mutant.name:36} {death.killer or 'SURVIVED'}{once} ({death.seconds:.0f} s)")
        paths.OUT.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps([asdict(one) for one in deaths], indent=1) + "\n")
    # Nobody who takes a kernel from where it was built is to get a mutant.
    for name in sorted({mutant.kernel for mutant in wanted}):
        _build(name, os.environ, name)
    survivors = [death.mutant for death in deaths if not death.killer]
    say.info(f"{len(deaths) - len(survivors)} of {len(deaths)} killed; {REPORT.relative_to(paths.ROOT)} has the table")
    if survivors:
        say.info(f"survived, so a test is missing: {' '.join(survivors)}")
    return 1 if survivors else 0

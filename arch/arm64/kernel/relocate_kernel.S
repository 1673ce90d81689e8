/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The code in the control page of kexec
 *
 * Replaces the implementation by Geoff Levand and Pavel Tatashin.
 */

#include <linux/kexec.h>
#include <linux/linkage.h>

#include <asm/asm-offsets.h>
#include <asm/assembler.h>
#include <asm/brk-imm.h>
#include <asm/kexec.h>
#include <asm/page.h>
#include <asm/sysreg.h>
#include <asm/trans_pgd.h>
#include <asm/virt.h>

/*
 * arm64_relocate_new_kernel - put the segments of an image in place, enter it
 *
 * This is never executed where it was linked: machine_kexec_post_load() copies
 * everything between __relocate_new_kernel_start and _end to the control page,
 * fills in the arguments behind the code and puts the vectors where
 * TRANS_PGD_VECTORS_OFFSET says. So it is position independent, and the control
 * page and the transitional tables are all that it uses once the first byte is
 * copied: the destinations may cover everything else of the old kernel.
 *
 * On entry:
 *  - EL1, or EL2 with VHE; all exceptions masked; the other CPUs are off;
 *  - MMU and caches on, TTBR0 maps the control page at its physical address,
 *    read-only, and the PC is there; TTBR1 is the kernel's own;
 *  - no register holds an argument, there is no stack.
 * It does not return.
 *
 * Registers:
 *  x19	destination of the next page, linear map
 *  x20	source page, linear map
 *  x21	next entry of the list, linear map
 *  x22	current entry
 *  x23	from a physical address to the linear map
 *  x24	size of a D-cache line, bytes
 *  x25	entry to the image, physical
 *  x26	device tree, physical, or 0
 *  x27	not 0: leave through EL2
 *  x0 - x9	scratch
 */
	.section ".kexec_relocate.text", "ax"
SYM_CODE_START(arm64_relocate_new_kernel)
	/* With VHE, this is VBAR_EL2 */
	adr	x0, arm64_relocate_new_kernel
	add	x0, x0, #TRANS_PGD_VECTORS_OFFSET
	msr	vbar_el1, x0
	isb				// no exception may find the old vectors

	adr	x9, kexec_control_args
	ldp	x6, x7, [x9, #KEXEC_ARGS_TTBR1]	// and the reserved one
	ldp	x23, x22, [x9, #KEXEC_ARGS_VA_OFFSET]	// and the head
	ldp	x25, x26, [x9, #KEXEC_ARGS_START]	// and the device tree
	ldr	x27, [x9, #KEXEC_ARGS_EL2]
	raw_dcache_line_size x24, x0

	/*
	 * From the kernel's tables to the transitional ones. Blocks there and
	 * pages here map the same addresses and must never be live together,
	 * so this goes by way of tables without entries and invalidates the
	 * TLB in between.
	 */
	break_before_make_ttbr_switch x7, x6, x0, x1

.Lentry:
	and	x0, x22, #PAGE_MASK
	add	x0, x0, x23

	tbnz	x22, #IND_SOURCE_BIT, .Lsource
	tbnz	x22, #IND_INDIRECTION_BIT, .Lindirection
	tbnz	x22, #IND_DESTINATION_BIT, .Ldestination
	tbnz	x22, #IND_DONE_BIT, .Ldone
	brk	#FAULT_BRK_IMM		// not a list: stop in the vectors

.Lindirection:
	mov	x21, x0
	b	.Lnext

.Ldestination:
	mov	x19, x0
	b	.Lnext

.Lsource:
	mov	x20, x0
	mov	x9, x19
	cmp	x19, x20		// the page may be in place already
	b.eq	.Lclean
	copy_page x9, x20, x0, x1, x2, x3, x4, x5, x6, x7

	/*
	 * The image is entered with the MMU off, so it has to be clean to the
	 * PoC. Invalidated as well: no line must be left that hides what the
	 * image stores before it turns on its caches. Nothing waits here for
	 * this to complete, see .Ldone.
	 */
.Lclean:
	mov	x9, x19
	add	x19, x19, #PAGE_SIZE
	mov	x1, x19
	dcache_by_myline_op_nosync civac, x9, x1, x24, x0

.Lnext:
	ldr	x22, [x21], #8
	b	.Lentry

.Ldone:
	/*
	 * Order the cache maintenance of all pages before everything that
	 * follows: instruction fetches and accesses that bypass the caches.
	 */
	dsb	sy
	ic	iallu			// the I-cache may hold what was there
	dsb	nsh			// complete before the next fetch
	isb

	/* With VHE, this is SCTLR_EL2 */
	mov_q	x9, INIT_SCTLR_EL1_MMU_OFF
	pre_disable_mmu_workaround
	msr	sctlr_el1, x9
	isb				// fetch from the physical address now

	cbz	x27, .Lenter
	mov	x0, #HVC_SOFT_RESTART	// served by our own vectors
	mov	x1, x25
	mov	x2, x26
	mov	x3, xzr
	mov	x4, xzr
	hvc	#0

.Lenter:
	mov	x0, x26
	mov	x1, xzr
	mov	x2, xzr
	mov	x3, xzr
	br	x25
SYM_CODE_END(arm64_relocate_new_kernel)

	/* struct kexec_control_args, filled in by machine_kexec_post_load() */
	.balign	8
SYM_DATA_START(kexec_control_args)
	.skip	KEXEC_ARGS_SIZE
SYM_DATA_END(kexec_control_args)

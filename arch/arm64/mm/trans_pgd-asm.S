/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Exception vectors for the time between two kernels
 *
 * Replaces the implementation by James Morse and Pavel Tatashin.
 */

#include <linux/linkage.h>

#include <asm/assembler.h>
#include <asm/esr.h>
#include <asm/sysreg.h>
#include <asm/trans_pgd.h>
#include <asm/virt.h>

/*
 * While kexec copies segments or hibernate restores memory, the kernel's own
 * vectors may be overwritten at any moment. This table is copied to a page
 * that is not, and serves as VBAR_EL1 and, on a machine that was booted at EL2
 * without VHE, as VBAR_EL2 as well: EL1 takes its exceptions to the first two
 * groups of slots, HVCs from EL1 arrive in the third. It is position
 * independent.
 *
 * A slot that nobody expects to be used hands over to the handler whose
 * physical address whoever made the copy wrote to trans_pgd_handler, with the
 * address of the slot in x30. Where there is none, it spins: whoever looks at
 * the PC sees which exception it was. The handler may do the same later, by a
 * branch to TRANS_PGD_VECTOR_PARK behind the beginning of the slot.
 *
 * Corrupts x29 and x30.
 */

	.macro	to_handler, slot
	adr	x30, \slot
	ldr	x29, trans_pgd_handler
	cbz	x29, .Lpark\@
	br	x29
	.org	\slot + TRANS_PGD_VECTOR_PARK
.Lpark\@:
	b	.
	.endm

	.macro	unexpected_vector, name
	.balign	SZ_128
SYM_INNER_LABEL(\name, SYM_L_LOCAL)
	to_handler \name
	.endm

/*
 * hvc_vector - the calls that the hyp-stub serves too, see asm/virt.h
 *
 * x0:		HVC_SET_VECTORS		x1: physical address of the vectors
 *		HVC_SOFT_RESTART	x1: address to branch to at EL2,
 *					x2-x4: its arguments
 *
 * HVC_SET_VECTORS returns with x0 = 0, HVC_SOFT_RESTART does not return.
 * Any other call, and anything that is not an HVC, is unexpected.
 *
 * Corrupts x9, as any stub call may; HVC_SOFT_RESTART x0 - x4 as well.
 */
	.macro	hvc_vector, name
	.balign	SZ_128
SYM_INNER_LABEL(\name, SYM_L_LOCAL)
	mrs	x9, esr_el2
	ubfx	x9, x9, #ESR_ELx_EC_SHIFT, #ESR_ELx_EC_WIDTH
	cmp	x9, #ESR_ELx_EC_HVC64
	b.ne	3f

	cmp	x0, #HVC_SET_VECTORS
	b.ne	1f
	msr	vbar_el2, x1
	mov	x0, xzr
	eret				// synchronises VBAR_EL2, too

1:	cmp	x0, #HVC_SOFT_RESTART
	b.ne	3f
	/*
	 * The hyp-stub runs with the MMU off, but whatever booted this kernel
	 * may have left the I-cache or alignment checks on.
	 */
	mov_q	x9, INIT_SCTLR_EL2_MMU_OFF
	pre_disable_mmu_workaround
	msr	sctlr_el2, x9
	isb				// before the first fetch of the image
	mov	x9, x1
	mov	x0, x2
	mov	x1, x3
	mov	x2, x4
	mov	x3, xzr
	br	x9
3:	to_handler \name
	.endm

	.pushsection	".rodata", "a"
	.balign	SZ_2K
SYM_DATA_START(trans_pgd_vectors)
	unexpected_vector	trans_pgd_sp0_sync	// Current EL with SP_EL0
	unexpected_vector	trans_pgd_sp0_irq
	unexpected_vector	trans_pgd_sp0_fiq
	unexpected_vector	trans_pgd_sp0_serror

	unexpected_vector	trans_pgd_spx_sync	// Current EL with SP_ELx
	unexpected_vector	trans_pgd_spx_irq
	unexpected_vector	trans_pgd_spx_fiq
	unexpected_vector	trans_pgd_spx_serror

	hvc_vector	trans_pgd_lower_sync	// Lower EL, AArch64
	unexpected_vector	trans_pgd_lower_irq
	unexpected_vector	trans_pgd_lower_fiq
	unexpected_vector	trans_pgd_lower_serror

	unexpected_vector	trans_pgd_lower32_sync	// Lower EL, AArch32
	unexpected_vector	trans_pgd_lower32_irq
	unexpected_vector	trans_pgd_lower32_fiq
	unexpected_vector	trans_pgd_lower32_serror

	/*
	 * In what the last slot leaves free. Moving the location counter
	 * backwards is an error: all 16 slots fit.
	 */
	.org	trans_pgd_vectors + TRANS_PGD_HANDLER_OFFSET
SYM_INNER_LABEL(trans_pgd_handler, SYM_L_LOCAL)
	.quad	0
SYM_DATA_END_LABEL(trans_pgd_vectors, SYM_L_LOCAL, trans_pgd_vectors_end)
	.popsection

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The inspector's entry: an arm64 Image (Documentation/arch/arm64/booting.rst)
 */
#include "inspector.h"

#define SCTLR_M		(1 << 0)
#define SCTLR_C		(1 << 2)
#define SCTLR_EE	(1 << 25)

	.macro	addr_of, reg, symbol
	adrp	\reg, \symbol
	add	\reg, \reg, :lo12:\symbol
	.endm

	.section .head, "ax"
	.global	inspector_start
inspector_start:
	b	1f
	.long	0
	.quad	0			// text_offset
	.quad	INSPECTOR_SIZE		// image_size: the loader adds the arguments
	.quad	1 << 3			// little endian, any page size, any place
	.quad	0, 0, 0
	.ascii	"ARM\x64"
	.long	0

/*
 * Everything is as whoever left found fit, SP included: it is not used before
 * it is set. Any register but x0 to x3 is scratch. What would be in the way of
 * a report is put right once it is known: exceptions that are not masked, MMU,
 * D-cache and endianness.
 *
 *  x4	struct entry_state
 *  x5	SCTLR, x6 HCR_EL2 or 0, x7 CurrentEL, x8 DAIF
 */
1:	mrs	x8, daif
	msr	daifset, #15
	mrs	x7, CurrentEL
	mov	x9, #SCTLR_M | SCTLR_C
	orr	x9, x9, #SCTLR_EE
	addr_of	x4, inspector_vectors
	cmp	x7, #2 << 2
	b.eq	2f
	mrs	x5, sctlr_el1
	mov	x6, xzr
	bic	x9, x5, x9
	msr	sctlr_el1, x9
	msr	vbar_el1, x4
	b	3f
2:	mrs	x5, sctlr_el2
	mrs	x6, hcr_el2
	bic	x9, x5, x9
	msr	sctlr_el2, x9
	msr	vbar_el2, x4
3:	isb				// before any access, and any exception
	addr_of	x4, entry_state
	stp	x0, x1, [x4]
	stp	x2, x3, [x4, #16]
	mov	x9, sp
	stp	x9, x7, [x4, #32]
	mrs	x9, spsel
	stp	x8, x9, [x4, #48]
	stp	x5, x6, [x4, #64]
	mrs	x7, isr_el1
	adr	x8, inspector_start
	stp	x7, x8, [x4, #80]
	msr	spsel, #1
	addr_of	x5, inspector_stack + INSPECTOR_STACK
	mov	sp, x5
	mov	x0, x4
	bl	inspect
	b	.

/*
 * An exception, from whatever the inspector looked at: report it, on a stack
 * that is as good as new. It does not go on from there.
 */
	.macro	vector, number
	.balign	128
	msr	spsel, #1
	addr_of	x5, inspector_stack + INSPECTOR_STACK
	mov	sp, x5
	mov	x0, #\number
	b	exception
	.endm

	.text
	.balign	2048
inspector_vectors:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	vector	\n
	.endr

	.balign	128
exception:
	mrs	x4, CurrentEL
	cmp	x4, #2 << 2
	b.eq	1f
	mrs	x1, esr_el1
	mrs	x2, elr_el1
	mrs	x3, far_el1
	b	unexpected
1:	mrs	x1, esr_el2
	mrs	x2, elr_el2
	mrs	x3, far_el2
	b	unexpected

	.bss
	.balign	16
inspector_stack:
	.skip	INSPECTOR_STACK
entry_state:
	.skip	96

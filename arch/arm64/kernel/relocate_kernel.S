/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The code in the control page of kexec
 *
 * Replaces the implementation by Geoff Levand and Pavel Tatashin.
 */

#include <linux/kexec.h>
#include <linux/linkage.h>
#include <linux/sizes.h>
#include <uapi/linux/psci.h>

#include <asm/asm-offsets.h>
#include <asm/assembler.h>
#include <asm/brk-imm.h>
#include <asm/esr.h>
#include <asm/kexec.h>
#include <asm/page.h>
#include <asm/ptrace.h>
#include <asm/sysreg.h>
#include <asm/trans_pgd.h>
#include <asm/virt.h>

	.arch_extension crc

	.section ".kexec_relocate.text", "ax"

/*
 * crc_line - fold the 64 bytes in x0 to x7 into the CRC32C of the segment
 */
	.macro	crc_line, crc
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7
	crc32cx	\crc, \crc, x\n
	.endr
	.endm

/*
 * check_crc - has the segment that ends here passed through unchanged?
 *
 * Expects x14 to x16 and x19 as in arm64_relocate_new_kernel, x19 still 0 before
 * the first segment. Corrupts x8 and x9.
 */
	.macro	check_crc
	cbz	x15, .Lchecked\@
	cbz	x19, .Lchecked\@
	ldp	w8, w9, [x14]		// expected; number and ignore
	cmp	w8, w16
	b.eq	.Lchecked\@
	lsr	w8, w9, #16
	cbz	w8, kexec_corrupt
.Lchecked\@:
	.endm

/*
 * load_line, store_line - 64 bytes from memory to x0 to x7, or back; the address
 * moves on
 */
	.macro	load_line, src
	ldp	x0, x1, [\src], #64
	ldp	x2, x3, [\src, #-48]
	ldp	x4, x5, [\src, #-32]
	ldp	x6, x7, [\src, #-16]
	.endm

	.macro	store_line, dst
	stp	x0, x1, [\dst], #64
	stp	x2, x3, [\dst, #-48]
	stp	x4, x5, [\dst, #-32]
	stp	x6, x7, [\dst, #-16]
	.endm

/*
 * arm64_relocate_new_kernel - put the segments of an image in place, enter it
 *
 * This is never executed where it was linked: machine_kexec_post_load() copies
 * everything between __relocate_new_kernel_start and _end to the control page,
 * puts the vectors where TRANS_PGD_VECTORS_OFFSET says and the arguments where
 * KEXEC_ARGS_OFFSET does. So it is position independent, and the control
 * page and the transitional tables are all that it uses once the first byte is
 * copied: the destinations may cover everything else of the old kernel.
 *
 * On entry:
 *  - EL1, or EL2 with VHE; all exceptions masked; the other CPUs are off;
 *  - MMU and caches on, TTBR0 maps the control page at its physical address,
 *    read-only, and the PC is there; TTBR1 is the kernel's own;
 *  - no register holds an argument, there is no stack.
 * It does not return. Whatever goes wrong ends in kexec_fault.
 *
 * Registers:
 *  x14	expected CRC and number of the current segment: kexec_control_crc
 *  x15	not 0: verify
 *  w16	CRC32C of the current segment so far
 *  x17	size of what DC ZVA zeroes, bytes, or 0
 *  x18	the counter when this was entered
 *  x19	destination of the next page, linear map
 *  x20	source of the page, linear map
 *  x21	next entry of the list, linear map
 *  x22	current entry
 *  x23	from a physical address to the linear map
 *  x24	size of a D-cache line, bytes
 *  x25	entry to the image, physical
 *  x26	device tree, physical, or 0
 *  x27	not 0: leave through EL2
 *  x28	struct kexec_control_args, physical
 *  x0 - x12 scratch
 *  x29, x30 belong to the vectors: some SErrors come back
 */
SYM_CODE_START(arm64_relocate_new_kernel)
	mrs	x18, cntvct_el0

	/* With VHE, this is VBAR_EL2 */
	adr	x0, arm64_relocate_new_kernel
	add	x0, x0, #TRANS_PGD_VECTORS_OFFSET
	msr	tpidrro_el0, xzr	// no fault so far, see kexec_fault
	msr	vbar_el1, x0
	isb				// no exception may find the old vectors

	adr	x28, arm64_relocate_new_kernel + KEXEC_ARGS_OFFSET
	ldp	x8, x9, [x28, #KEXEC_ARGS_TTBR1]	// and the reserved one
	ldp	x23, x22, [x28, #KEXEC_ARGS_VA_OFFSET]	// and the head
	ldp	x25, x26, [x28, #KEXEC_ARGS_START]	// and the device tree
	ldr	x27, [x28, #KEXEC_ARGS_EL2]
	ldp	x15, x17, [x28, #KEXEC_ARGS_VERIFY]	// and the block of DC ZVA
	add	x14, x28, #KEXEC_ARGS_LIST
	mov	x19, xzr
	mov	x20, xzr
	raw_dcache_line_size x24, x0
	msr	daifclr, #PSR_A_BIT >> 6	// report SErrors, don't bequeath them

	/*
	 * From the kernel's tables to the transitional ones. Blocks there and
	 * pages here map the same addresses and must never be live together,
	 * so this goes by way of tables without entries and invalidates the
	 * TLB in between.
	 */
	break_before_make_ttbr_switch x9, x8, x0, x1

	/*
	 * Where to write is as important as what. Follow the list once, up to
	 * the length it had, before anything is written.
	 */
	cbz	x15, .Lentry
	ldr	x10, [x28, #KEXEC_ARGS_LIST_ENTRIES]
	mov	w16, #~0
	mov	x9, x22
1:	crc32cx	w16, w16, x9
	tbnz	x9, #IND_DONE_BIT, 3f
	tbz	x9, #IND_INDIRECTION_BIT, 2f
	and	x8, x9, #PAGE_MASK
	add	x8, x8, x23
2:	sub	x10, x10, #1
	cbz	x10, kexec_corrupt
	ldr	x9, [x8], #8
	b	1b
3:	ldr	w8, [x14]
	cmp	w8, w16
	b.ne	kexec_corrupt

.Lentry:
	and	x0, x22, #PAGE_MASK
	add	x0, x0, x23

	tbnz	x22, #IND_SOURCE_BIT, .Lsource
	tbnz	x22, #IND_INDIRECTION_BIT, .Lindirection
	tbnz	x22, #IND_DESTINATION_BIT, .Ldestination
	tbnz	x22, #IND_DONE_BIT, .Ldone
	brk	#FAULT_BRK_IMM		// the list is broken

.Lindirection:
	mov	x21, x0
	b	.Lnext

	/* A segment ends where the next one or the end of the list begins */
.Ldestination:
	check_crc
	mov	x19, x0
	mov	w16, #~0
	add	x14, x14, #KEXEC_CRC_SIZE
	b	.Lnext

.Lsource:
	mov	x20, x0
	mov	x8, x0
	mov	x9, x19
	add	x10, x8, #PAGE_SIZE
	cmp	x19, x20		// the page may be in place already
	b.eq	.Lin_place

	/*
	 * A line that is stored to word by word gets read first. One that was
	 * zeroed as a whole is in the cache without, and stays there if this is
	 * done 4 KiB at a time.
	 */
.Lchunk:
	add	x11, x9, #SZ_4K
	cbz	x17, 2f
	mov	x12, x9
1:	.rept	4			// their size divides 1 KiB
	dc	zva, x12
	add	x12, x12, x17
	.endr
	cmp	x12, x11
	b.lo	1b
2:	cbnz	x15, .Lcopy_crc

.Lcopy:
	.rept	2
	prfm	pldl1strm, [x8, #512]	// beyond the page it does no harm
	load_line x8
	store_line x9
	.endr
	cmp	x9, x11
	b.ne	.Lcopy
	b	.Lcopied

.Lcopy_crc:
	prfm	pldl1strm, [x8, #512]
	load_line x8
	crc_line w16
	store_line x9
	cmp	x9, x11
	b.ne	.Lcopy_crc

.Lcopied:
	cmp	x8, x10
	b.ne	.Lchunk
	b	.Lclean

.Lin_place:
	cbz	x15, .Lclean
1:	load_line x8
	crc_line w16
	cmp	x8, x10
	b.ne	1b

	/*
	 * The image is entered with the MMU off, so it has to be clean to the
	 * PoC. Invalidated as well: a line that stays could hide what the image
	 * stores before it turns on its caches. (One may come back by
	 * speculation; no image relies on that, see booting.rst.) Nothing waits
	 * here for this to complete, see .Ldone.
	 */
.Lclean:
	mov	x1, #1
alternative_if ARM64_WORKAROUND_4311569
	mov	x1, #2			// twice
alternative_else_nop_endif
	add	x0, x19, #PAGE_SIZE
1:	mov	x9, x19
2:	.rept	4			// a page has at least as many lines
	dc	civac, x9
	add	x9, x9, x24
	.endr
	cmp	x9, x0
	b.lo	2b
	subs	x1, x1, #1
	b.ne	1b
	mov	x19, x0

.Lnext:
	ldr	x22, [x21], #8
	b	.Lentry

.Ldone:
	check_crc

	/*
	 * Order the cache maintenance of all pages before everything that
	 * follows: instruction fetches and accesses that bypass the caches.
	 */
	dsb	sy

	/*
	 * Tell the image how long it took, in its device tree: a page that was
	 * copied, or is in place, and that nobody verifies any more.
	 */
	ldr	x8, [x28, #KEXEC_ARGS_TIMING]
	cbz	x8, 1f
	add	x8, x8, x23
	isb				// don't read the counter before the dsb
	mrs	x1, cntvct_el0
CPU_LE(	rev	x0, x18		)	// big-endian, as all of a device tree
CPU_LE(	rev	x1, x1		)
CPU_BE(	mov	x0, x18		)
	ldp	x2, x3, [x28, #KEXEC_ARGS_TIMING_VALUES]
	ldp	x4, x5, [x28, #KEXEC_ARGS_TIMING_VALUES + 16]
	ldp	x6, x7, [x28, #KEXEC_ARGS_TIMING_VALUES + 32]
	stp	x2, x3, [x8]
	stp	x4, x5, [x8, #16]
	stp	x6, x7, [x8, #32]
	stp	x0, x1, [x8, #48]
	add	x1, x8, #KEXEC_TIMING_SIZE
	dcache_by_myline_op_nosync civac, x8, x1, x24, x0
	dsb	sy			// as above, for these lines
1:	ic	iallu			// the I-cache may hold what was there
	dsb	nsh			// complete before the next fetch
	isb

	msr	daifset, #PSR_A_BIT >> 6

	/* With VHE, this is SCTLR_EL2 */
	mov_q	x9, INIT_SCTLR_EL1_MMU_OFF
	pre_disable_mmu_workaround
	msr	sctlr_el1, x9
	isb				// fetch from the physical address now
	clear_tcr2

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

/*
 * say - write a string, and then a register in hex if one is given
 *
 * Corrupts x0 to x7, x9 to x11 and x30.
 */
	.macro	say, text, value
	.ifnb	\value
	mov	x1, \value
	.endif
	adr	x0, .Ltext\@
	.ifnb	\value
	bl	kexec_puts_hex
	.else
	bl	kexec_puts
	.endif
	.subsection 1
.Ltext\@:
	.asciz	"\text"
	.balign	4
	.previous
	.endm

/*
 * kexec_corrupt - report a segment or list whose CRC is not what it was at load
 *
 * x14, x28 and w16 as above: what was expected and what was found. Does not
 * return.
 */
SYM_CODE_START_LOCAL_NOALIGN(kexec_corrupt)
	msr	daifset, #PSR_A_BIT >> 6	// x30 is needed from here on
	ldr	w13, [x14]
	ldrh	w17, [x14, #4]
	mov	w16, w16		// what say prints has 64 bits
	mov	x26, xzr		// there is no vector
	mov	x0, #1
	msr	tpidrro_el0, x0		// as if a fault had been taken
	bl	kexec_mmu_off
	say	"\r\nkexec: corrupt image: "
	add	x8, x28, #KEXEC_ARGS_LIST
	cmp	x14, x8
	b.ne	1f
	say	"list of pages"
	b	2f
1:	say	"segment ", x17
2:	say	", CRC32C at load ", x13
	say	", now ", x16
	b	kexec_give_up
SYM_CODE_END(kexec_corrupt)

/*
 * kexec_fault - report an exception: the handler of trans_pgd_vectors
 *
 * x30: address of the slot; x14, x19, x20 and x23 as above, if the registers
 * can still be trusted. Returns from an SError that the CPU can go on from, with
 * x29 and x30 changed; otherwise does not return.
 *
 * tpidrro_el0, which no image relies on, counts the exceptions: one that is
 * taken while the first is reported is not reported, one while giving up
 * parks.
 */
SYM_CODE_START_NOALIGN(kexec_fault)
	/* Go on where do_serror() would: corrected, or not consumed yet */
	ubfx	x29, x30, #7, #2
	cmp	x29, #3			// the slots for SError
	b.ne	5f
	mrs	x29, CurrentEL
	cmp	x29, #CurrentEL_EL2
	b.eq	4f
	mrs	x29, esr_el1
	b	6f
4:	mrs	x29, esr_el2
6:	tbnz	x29, #ESR_ELx_IDS_SHIFT, 5f
	tbz	x29, #ESR_ELx_AET_SHIFT + 1, 5f	// CE is 0b110, UEO 0b010
	tbnz	x29, #ESR_ELx_AET_SHIFT, 5f
	and	x29, x29, #ESR_ELx_FSC
	cmp	x29, #ESR_ELx_FSC_SERROR
	b.ne	5f
	eret

5:	mov	x26, x30
	adr	x28, arm64_relocate_new_kernel + KEXEC_ARGS_OFFSET
	mrs	x0, tpidrro_el0
	add	x1, x0, #1
	msr	tpidrro_el0, x1
	cbnz	x0, 3f

	mrs	x0, CurrentEL
	cmp	x0, #CurrentEL_EL2
	b.eq	1f
	mrs	x13, esr_el1
	mrs	x17, elr_el1
	mrs	x18, far_el1
	mrs	x27, spsr_el1
	b	2f
1:	mrs	x13, esr_el2
	mrs	x17, elr_el2
	mrs	x18, far_el2
	mrs	x27, spsr_el2
2:	bl	kexec_mmu_off

	say	"\r\nkexec: fault while relocating: "
	ubfx	x0, x26, #9, #2		// slots come in groups of four
	adr	x1, kexec_vector_group
	add	x0, x1, x0, lsl #3
	bl	kexec_puts
	ubfx	x0, x26, #7, #2
	adr	x1, kexec_vector_kind
	add	x0, x1, x0, lsl #3
	bl	kexec_puts
	say	", ESR ", x13
	say	" FAR ", x18
	say	" SPSR ", x27
	say	"\r\nkexec: ELR ", x17
	adr	x8, arm64_relocate_new_kernel
	sub	x8, x17, x8
	say	", control page + ", x8
	cbz	x19, kexec_give_up	// before the first segment
	ldrh	w8, [x14, #4]
	say	"\r\nkexec: segment ", x8
	sub	x8, x20, x23
	say	", page ", x8
	sub	x8, x19, x23
	say	" to ", x8
	b	kexec_give_up

3:	cmp	x0, #1
	b.hi	kexec_park
	bl	kexec_mmu_off
	b	kexec_give_up
SYM_CODE_END(kexec_fault)

/*
 * kexec_give_up - do what panic_timeout says: 0 parks, anything else resets
 *
 * x26: slot of the exception, 0 if there was none, in a register that firmware
 * preserves; x28 as above. The MMU is off. Does not return.
 */
SYM_CODE_START_LOCAL_NOALIGN(kexec_give_up)
	ldr	w8, [x28, #KEXEC_ARGS_TIMEOUT]
	cbz	w8, 2f
	ldr	w8, [x28, #KEXEC_ARGS_PSCI]
	cbz	w8, 2f
	say	"\r\nkexec: resetting\r\n"
	mov_q	x0, PSCI_0_2_FN_SYSTEM_RESET
	cmp	w8, #KEXEC_PSCI_HVC
	b.eq	1f
	smc	#0
	b	2f
1:	hvc	#0
2:	say	"\r\nkexec: parked\r\n"	// no reset wanted, or none to be had
SYM_INNER_LABEL(kexec_park, SYM_L_LOCAL)
	cbz	x26, kexec_corrupt_park
	add	x26, x26, #TRANS_PGD_VECTOR_PARK
	br	x26
SYM_INNER_LABEL(kexec_corrupt_park, SYM_L_LOCAL)
	b	.
SYM_CODE_END(kexec_give_up)

/*
 * kexec_mmu_off - turn off the MMU and the caches of the current EL
 *
 * The tables do not map the UART, and may be what is broken. What is read from
 * the control page from here on was cleaned to the PoC. Corrupts x0.
 */
SYM_CODE_START_LOCAL_NOALIGN(kexec_mmu_off)
	mrs	x0, CurrentEL
	cmp	x0, #CurrentEL_EL2
	b.eq	1f
	mov_q	x0, INIT_SCTLR_EL1_MMU_OFF
	pre_disable_mmu_workaround
	msr	sctlr_el1, x0
	b	2f
1:	mov_q	x0, INIT_SCTLR_EL2_MMU_OFF
	pre_disable_mmu_workaround
	msr	sctlr_el2, x0
2:	isb				// fetch from the physical address now
	ret
SYM_CODE_END(kexec_mmu_off)

/*
 * kexec_puts_hex - write a string and a number
 *
 * x0: string, x1: number, x28 as above. Corrupts x0 to x7 and x9 to x11.
 */
SYM_CODE_START_LOCAL_NOALIGN(kexec_puts_hex)
	mov	x5, x30
	mov	x6, x1
	bl	kexec_puts
	mov	w2, #'0'
	bl	kexec_putc
	mov	w2, #'x'
	bl	kexec_putc
	clz	x7, x6			// skip leading zeros, except the last
	and	x7, x7, #~3
	mov	x2, #60
	cmp	x7, x2
	csel	x7, x7, x2, lo
	lsl	x6, x6, x7
1:	lsr	x2, x6, #60
	lsl	x6, x6, #4
	add	w3, w2, #'0'
	cmp	w2, #10
	add	w2, w2, #'a' - 10
	csel	w2, w3, w2, lo
	bl	kexec_putc
	add	x7, x7, #4
	cmp	x7, #64
	b.ne	1b
	ret	x5
SYM_CODE_END(kexec_puts_hex)

/*
 * kexec_puts - write a string
 *
 * After a second exception this writes nothing: writing may be what caused it.
 *
 * x0: string, x28 as above. Corrupts x0 to x4, x9 to x11 and the flags.
 */
SYM_CODE_START_LOCAL_NOALIGN(kexec_puts)
	mov	x4, x30
	mrs	x2, tpidrro_el0
	cmp	x2, #1
	b.hi	2f
1:	ldrb	w2, [x0], #1
	cbz	w2, 2f
	bl	kexec_putc
	b	1b
2:	ret	x4
SYM_CODE_END(kexec_puts)

/*
 * kexec_putc - write a character to the UART, if there is one
 *
 * The flag that tells whether there is room is bit 5 of a register, set by one
 * kind of UART (16550: LSR.THRE) and clear on the other (PL011: FR.TXFF). A
 * UART that does not get room is given up.
 *
 * w2: character, x28 as above. Corrupts x1, x3 and x9 to x11.
 */
SYM_CODE_START_LOCAL_NOALIGN(kexec_putc)
	ldr	x9, [x28, #KEXEC_ARGS_UART]
	cbz	x9, 9f
	ldp	w1, w10, [x28, #KEXEC_ARGS_UART_STATUS]	// and the busy level
	add	x9, x9, x1
	ldr	w11, [x28, #KEXEC_ARGS_UART_WIDTH]
	mov	w3, #1 << 20
1:	cbz	w3, 8f
	sub	w3, w3, #1
	tbnz	w11, #2, 3f		// 4 bytes
	tbnz	w11, #1, 2f		// 2 bytes
	ldrb	w1, [x9]
	b	4f
2:	ldrh	w1, [x9]
	b	4f
3:	ldr	w1, [x9]
4:	eor	w1, w1, w10
	tbz	w1, #5, 1b		// at the level that means busy

	ldr	x9, [x28, #KEXEC_ARGS_UART]
	tbnz	w11, #2, 6f
	tbnz	w11, #1, 5f
	strb	w2, [x9]
	ret
5:	strh	w2, [x9]
	ret
6:	str	w2, [x9]
	ret
8:	str	xzr, [x28, #KEXEC_ARGS_UART]	// don't wait for each character
9:	ret
SYM_CODE_END(kexec_putc)

	/* Eight bytes each, in the order of the slots */
SYM_DATA_LOCAL(kexec_vector_group, .ascii "sp0\0\0\0\0\0spx\0\0\0\0\0lower\0\0\0lower32\0")
SYM_DATA_LOCAL(kexec_vector_kind, .ascii " sync\0\0\0 irq\0\0\0\0 fiq\0\0\0\0 serror\0")

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Transitional page tables for kexec and hibernate
 *
 * Replaces the implementation by James Morse and Pavel Tatashin.
 */
#ifndef __ASM_TRANS_PGD_H
#define __ASM_TRANS_PGD_H

#include <linux/sizes.h>

/*
 * The page that holds the code of a transition holds the exception vectors as
 * well, in its first 4 KiB: VBAR_ELx wants them aligned to their 2 KiB, so the
 * code has to do with the first half.
 */
#define TRANS_PGD_VECTORS_OFFSET	SZ_2K

/* Where in the vectors the physical address of a handler goes, if there is one */
#define TRANS_PGD_HANDLER_OFFSET	(SZ_2K - 8)
/* Where in each slot the CPU spins when there is nothing left to do */
#define TRANS_PGD_VECTOR_PARK		0x70

#ifndef __ASSEMBLER__

#include <linux/types.h>

#include <asm/pgtable-types.h>

/**
 * struct trans_pgd - a set of translation tables under construction
 * @alloc_table:	Returns the linear map address of one zeroed page, NULL where
 *		there is none. The pages belong to the allocator: whoever
 *		started a build that failed gets them back from there. Without
 *		an allocator nothing is built, the table pages are only counted.
 * @alloc_arg:	Handed to @alloc_table.
 * @root:	Root table, NULL before the first range and while counting.
 * @va_bits:	Size of the input address that @root resolves, in bits.
 * @nr_pages:	Table pages so far, the root included.
 * @counted:	While counting: for each level from 0 to 3, the first address
 *		that the last table counted there resolves.
 */
struct trans_pgd {
	void *(*alloc_table)(void *arg);
	void *alloc_arg;
	pte_t *root;
	unsigned int va_bits;
	unsigned int nr_pages;
	u64 counted[4];
};

int trans_pgd_map(struct trans_pgd *trans, u64 va, phys_addr_t pa, u64 size,
		  pgprot_t prot);
int trans_pgd_create_linear(struct trans_pgd *trans);
int trans_pgd_create_idmap(struct trans_pgd *trans, phys_addr_t pa, u64 size);
bool trans_pgd_linear_covers(phys_addr_t start, phys_addr_t end);

#if IS_ENABLED(CONFIG_KUNIT)
struct memblock_type *trans_pgd_memory(void);
#endif

/* One vector table for EL1 and EL2, ARM64_VECTOR_TABLE_LEN bytes */
extern char trans_pgd_vectors[];

#endif /* __ASSEMBLER__ */

#endif /* __ASM_TRANS_PGD_H */

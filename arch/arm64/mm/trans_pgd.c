// SPDX-License-Identifier: GPL-2.0-only
/*
 * Transitional page tables for kexec and hibernate
 *
 * While kexec copies the segments of an image, and while hibernate restores
 * memory, the tables of the running kernel may be overwritten. Both then run
 * on tables of their own: one set for TTBR1 that maps all memory where the
 * linear map has it, and one for TTBR0 that maps the code which does the
 * copying at its physical address.
 *
 * Nothing here reads swapper_pg_dir. What has to be mapped is memory, and
 * memblock knows where that is; attributes that the linear map has gathered at
 * run time (read-only text aliases, pages that DEBUG_PAGEALLOC or
 * memfd_secret() made invalid) are what a copy would have to undo again.
 *
 * Replaces the implementation by James Morse and Pavel Tatashin.
 */

#include <kunit/static_stub.h>
#include <kunit/visibility.h>

#include <linux/align.h>
#include <linux/bits.h>
#include <linux/errno.h>
#include <linux/memblock.h>
#include <linux/minmax.h>
#include <linux/pgtable.h>
#include <linux/sizes.h>
#include <linux/string.h>

#include <asm/barrier.h>
#include <asm/memory.h>
#include <asm/trans_pgd.h>

/*
 * Descriptors have one format on all levels (Arm ARM, "Translation table
 * descriptor formats"), so one type serves for all of them. The p?d_offset()
 * helpers end at VA_BITS, an identity map may have to go beyond that: see
 * trans_pgd_create_idmap().
 */
static int root_level(unsigned int va_bits)
{
	return 4 - ARM64_HW_PGTABLE_LEVELS(va_bits);
}

/*
 * Blocks that every CPU has, whatever its address size: 1 GiB and 2 MiB with
 * 4K pages, 32 MiB with 16K, 512 MiB with 64K (Arm ARM, "Block descriptor and
 * Page descriptor formats").
 */
static bool level_has_leaves(int level)
{
	return level >= 2 || (level == 1 && PAGE_SIZE == SZ_4K);
}

/*
 * Memory that is copied must never be executable, code that is executed never
 * writable, and both must be Normal write-back: a cacheable alias of anything
 * else may corrupt it.
 */
static bool prot_is_safe(pgprot_t prot)
{
	ptval_t val = pgprot_val(prot);
	bool writable = !(val & PTE_RDONLY) || (val & PTE_WRITE);
	bool executable = (val & (PTE_PXN | PTE_UXN)) != (PTE_PXN | PTE_UXN);

	if (writable && executable)
		return false;

	return (val & PTE_ATTRINDX_MASK) == PTE_ATTRINDX(MT_NORMAL);
}

/*
 * Count the table that resolves @va at @level, unless it was the last one
 * counted there. Ranges come in ascending order, so none is counted twice.
 */
static void count_table(struct trans_pgd *trans, int level, u64 va)
{
	u64 first = ALIGN_DOWN(va, BIT_ULL(ARM64_HW_PGTABLE_LEVEL_SHIFT(level - 1)));

	if (trans->counted[level] == first)
		return;

	trans->counted[level] = first;
	trans->nr_pages++;
}

static pte_t *new_table(struct trans_pgd *trans)
{
	pte_t *table = trans->alloc_table(trans->alloc_arg);

	if (table)
		trans->nr_pages++;

	return table;
}

/* The table that @entry points to: an existing one, or else a new one */
static int next_table(struct trans_pgd *trans, pte_t *entry, pte_t **table)
{
	if (pte_none(*entry)) {
		*table = new_table(trans);
		if (!*table)
			return -ENOMEM;

		/* The AF of a table is ignored without FEAT_HAFT */
		*entry = __pte(__phys_to_pte_val(__pa(*table)) |
			       PMD_TYPE_TABLE | PMD_TABLE_AF);
		return 0;
	}

	if ((pte_val(*entry) & PMD_TYPE_MASK) != PMD_TYPE_TABLE)
		return -EEXIST;

	*table = __va(__pte_to_phys(*entry));
	return 0;
}

/*
 * Map [@va, @end) to @pa in @table, a table of @level that resolves @va; or,
 * while counting, where @table is NULL, count the tables below it.
 */
static int map_level(struct trans_pgd *trans, pte_t *table, int level, u64 va,
		     u64 end, phys_addr_t pa, pgprot_t prot)
{
	unsigned int shift = ARM64_HW_PGTABLE_LEVEL_SHIFT(level);
	ptval_t leaf = pgprot_val(prot) & ~PTE_TYPE_MASK;
	u64 mask = BIT_ULL(shift) - 1;
	u64 next;
	int ret;

	leaf |= level == 3 ? PTE_TYPE_PAGE : PMD_TYPE_SECT;

	for (; va < end; pa += next - va, va = next) {
		pte_t *entry = table ? &table[(va >> shift) % PTRS_PER_PTE] : NULL;
		pte_t *below = NULL;

		next = min((va | mask) + 1, end);

		if (level_has_leaves(level) && !((va | next | pa) & mask)) {
			if (!entry)
				continue;
			if (!pte_none(*entry))
				return -EEXIST;
			*entry = __pte(__phys_to_pte_val(pa) | leaf);
			continue;
		}

		if (entry) {
			ret = next_table(trans, entry, &below);
			if (ret)
				return ret;
		} else {
			count_table(trans, level + 1, va);
		}

		ret = map_level(trans, below, level + 1, va, next, pa, prot);
		if (ret)
			return ret;
	}

	return 0;
}

/**
 * trans_pgd_map() - map one range, with blocks wherever they fit
 * @trans: tables to add the range to; @trans->va_bits is set, @trans->root is
 *         NULL before the first range
 * @va: first virtual address, page aligned; the bits above @trans->va_bits
 *      select TTBR0 or TTBR1 and are not looked at
 * @pa: first physical address, page aligned
 * @size: bytes, a multiple of PAGE_SIZE
 * @prot: attributes, which must be Normal write-back and must not make the
 *        range both writable and executable
 *
 * An entry that exists is never replaced. After a failure the tables are
 * incomplete and must not be used.
 *
 * Context: any that the allocator allows. The tables must not be live: no TLB
 * maintenance is done.
 *
 * Return: 0, -EINVAL for arguments that can't be mapped, -EEXIST where a part
 * of the range is mapped already, -ENOMEM if the allocator gave no page.
 */
int trans_pgd_map(struct trans_pgd *trans, u64 va, phys_addr_t pa, u64 size,
		  pgprot_t prot)
{
	u64 limit = BIT_ULL(trans->va_bits);
	int level = root_level(trans->va_bits);
	int ret;

	va &= limit - 1;

	if (!size || ((va | pa | size) & ~PAGE_MASK))
		return -EINVAL;
	if (size > limit - va || !prot_is_safe(prot))
		return -EINVAL;
	/* What does not fit into a descriptor would become attributes */
	if (pa > PHYS_MASK || size - 1 > PHYS_MASK - pa)
		return -EINVAL;

	if (!trans->nr_pages) {
		if (trans->alloc_table) {
			trans->root = new_table(trans);
			if (!trans->root)
				return -ENOMEM;
		} else {
			memset(trans->counted, 0xff, sizeof(trans->counted));
			trans->nr_pages = 1;
		}
	}

	ret = map_level(trans, trans->root, level, va, va + size, pa, prot);

	/*
	 * Order the stores to the tables before the walks of them that start
	 * once the caller has written a TTBR.
	 */
	dsb(ishst);

	return ret;
}

/*
 * Where memory is. A KUnit test has it made up.
 */
VISIBLE_IF_KUNIT struct memblock_type *trans_pgd_memory(void)
{
	KUNIT_STATIC_STUB_REDIRECT(trans_pgd_memory);

	return &memblock.memory;
}

/*
 * Call @fn for each run of whole pages of memory, in ascending order, until it
 * returns something else than 0. Neighbouring regions (of two nodes, say) are
 * one run; memory that is marked nomap belongs to none.
 */
static int walk_memory_runs(int (*fn)(phys_addr_t start, phys_addr_t end,
				      void *arg), void *arg)
{
	const struct memblock_type *memory = trans_pgd_memory();
	struct memblock_region *region;
	phys_addr_t start = 0, end = 0;
	int ret;

	for (region = memory->regions; region < memory->regions + memory->cnt; region++) {
		phys_addr_t s = ALIGN(region->base, PAGE_SIZE);
		phys_addr_t e = ALIGN_DOWN(region->base + region->size, PAGE_SIZE);

		if (memblock_is_nomap(region) || s >= e)
			continue;

		if (s == end) {
			end = e;
			continue;
		}

		if (end) {
			ret = fn(start, end, arg);
			if (ret)
				return ret;
		}
		start = s;
		end = e;
	}

	return end ? fn(start, end, arg) : 0;
}

static int map_memory_run(phys_addr_t start, phys_addr_t end, void *arg)
{
	return trans_pgd_map(arg, __phys_to_virt(start), start, end - start,
			     PAGE_KERNEL);
}

/**
 * trans_pgd_create_linear() - map all memory where the linear map has it
 * @trans: tables to build, only the allocator set
 *
 * All memory that memblock holds is mapped writable and never executable,
 * except what is marked nomap: an agreement with firmware that a cacheable
 * mapping would break. The tables take a few pages, whatever the amount of
 * memory: what counts is how many ragged edges it has.
 *
 * The root is one that load_ttbr1 takes: for 52-bit addresses with 64K pages
 * it has all entries even on a CPU that only resolves 48 bits.
 *
 * Context: memory must not come or go meanwhile: either get_online_mems() is
 * held or nothing else runs.
 *
 * Return: 0, or what trans_pgd_map() returned.
 */
int trans_pgd_create_linear(struct trans_pgd *trans)
{
	if (IS_ENABLED(CONFIG_ARM64_VA_BITS_52) && !IS_ENABLED(CONFIG_ARM64_LPA2))
		trans->va_bits = VA_BITS;
	else
		trans->va_bits = vabits_actual;

	return walk_memory_runs(map_memory_run, trans);
}

/**
 * trans_pgd_create_idmap() - map code at its physical address
 * @trans: tables to build, only the allocator set; @trans->va_bits is what
 *         TCR_EL1.T0SZ must be set up for
 * @pa: physical address of the code, page aligned
 * @size: bytes, a multiple of PAGE_SIZE
 *
 * Memory may lie where neither VA_BITS nor 48 bits reach [1], so the depth of
 * these tables follows from @pa. A physical address above 48 bits implies
 * that the CPU resolves 52 bits of input address as well (Arm ARM, FEAT_LPA
 * requires FEAT_LVA; FEAT_LPA2 brings both).
 *
 * [1] commit dd006da21646 ("arm64: mm: increase VA range of identity map")
 *
 * Return: 0, or what trans_pgd_map() returned.
 */
int trans_pgd_create_idmap(struct trans_pgd *trans, phys_addr_t pa, u64 size)
{
	trans->va_bits = (pa + size - 1) >> 48 ? 52 : 48;

	return trans_pgd_map(trans, pa, pa, size, PAGE_KERNEL_ROX);
}

struct memory_range {
	phys_addr_t start;
	phys_addr_t end;
};

static int range_in_run(phys_addr_t start, phys_addr_t end, void *arg)
{
	struct memory_range *range = arg;

	return range->start >= start && range->end <= end;
}

/**
 * trans_pgd_linear_covers() - would trans_pgd_create_linear() map a range?
 * @start: first physical address
 * @end: physical address behind the last one
 *
 * Context: see trans_pgd_create_linear().
 *
 * Return: true if every byte of the range gets mapped, or there is none.
 */
bool trans_pgd_linear_covers(phys_addr_t start, phys_addr_t end)
{
	struct memory_range range = { .start = start, .end = end };

	return start == end || walk_memory_runs(range_in_run, &range);
}

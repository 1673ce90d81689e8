// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit suite for the builder of transitional page tables
 *
 * Tables are built over made-up memory and read back by a walker of its own:
 * translate() knows the architecture's descriptors, not the kernel's helpers
 * for them. Where the mapped memory is real, the CPU is asked as well.
 */

#include <kunit/static_stub.h>
#include <kunit/test.h>

#include <linux/align.h>
#include <linux/bitfield.h>
#include <linux/bits.h>
#include <linux/gfp.h>
#include <linux/memblock.h>
#include <linux/mm.h>
#include <linux/mmu_context.h>
#include <linux/pgtable.h>
#include <linux/sizes.h>

#include <asm/daifflags.h>
#include <asm/memory.h>
#include <asm/sysreg.h>
#include <asm/trans_pgd.h>

/* The largest and the smallest block that every CPU has */
#if defined(CONFIG_ARM64_4K_PAGES)
#define BIG	((u64)SZ_1G)
#define SMALL	((u64)SZ_2M)
#elif defined(CONFIG_ARM64_16K_PAGES)
#define BIG	((u64)SZ_32M)
#define SMALL	((u64)SZ_32M)
#else
#define BIG	((u64)SZ_512M)
#define SMALL	((u64)SZ_512M)
#endif
#define PAGE	((u64)PAGE_SIZE)

/* How many bits of an address the tables may have to resolve, in any kernel */
static const unsigned int depths[] = { 36, 39, 42, 47, 48, 52 };

struct span {
	u64 va;
	u64 pa;
	u64 size;
};

/* The allocator: counts, and fails when it is told to */

#define POOL_PAGES	256

struct pool {
	unsigned int calls;
	unsigned int fail_at;	/* the call that fails, 0 for none */
	unsigned int nr;
	void *page[POOL_PAGES];
	bool reached[POOL_PAGES];
	/* What was looked at last, shown if it is wrong */
	unsigned int va_bits;
	struct span first;
};

static void *pool_alloc(void *arg)
{
	struct pool *pool = arg;
	void *page;

	if (++pool->calls == pool->fail_at || pool->nr == POOL_PAGES)
		return NULL;

	page = (void *)get_zeroed_page(GFP_KERNEL);
	if (page)
		pool->page[pool->nr++] = page;
	return page;
}

static void pool_empty(struct pool *pool)
{
	while (pool->nr)
		free_page((unsigned long)pool->page[--pool->nr]);
	memset(pool, 0, sizeof(*pool));
}

/* Where @pa is if it is a page of the pool */
static u64 *pool_find(struct pool *pool, u64 pa)
{
	for (unsigned int i = 0; i < pool->nr; i++) {
		if (virt_to_phys(pool->page[i]) == pa) {
			pool->reached[i] = true;
			return pool->page[i];
		}
	}

	return NULL;
}

static unsigned int pool_reached(const struct pool *pool)
{
	unsigned int n = 0;

	for (unsigned int i = 0; i < pool->nr; i++)
		n += pool->reached[i];
	return n;
}

static int trans_pgd_test_init(struct kunit *test)
{
	test->priv = kunit_kzalloc(test, sizeof(struct pool), GFP_KERNEL);
	return test->priv ? 0 : -ENOMEM;
}

static void trans_pgd_test_exit(struct kunit *test)
{
	struct pool *pool = test->priv;

	if (!pool)
		return;

	if (test->status == KUNIT_FAILURE)
		kunit_err(test, "%u bits, first range: VA %#llx, PA %#llx, %#llx bytes\n",
			  pool->va_bits, pool->first.va, pool->first.pa, pool->first.size);
	pool_empty(pool);
}

/* Tables without a page in them, which come from an empty pool */
static struct trans_pgd new_tables(struct kunit *test)
{
	pool_empty(test->priv);
	return (struct trans_pgd) {
		.alloc_table = pool_alloc,
		.alloc_arg = test->priv,
	};
}

/*
 * The walker. Field positions are those of the Arm ARM, "VMSAv8-64 translation
 * table format descriptors".
 */

struct translation {
	const char *bad;	/* what a CPU would not make sense of, or NULL */
	bool valid;
	u64 pa;			/* what the address translates to */
	u64 size;		/* bytes of the leaf, or of the hole from here on */
	u8 type;		/* of memory: the byte of MAIR_EL1 */
	bool write;
	bool exec;
};

static u64 field(u64 desc, int high, int low)
{
	return (desc >> low) & GENMASK_ULL(high - low, 0);
}

/* Are descriptors in the format for addresses of more than 48 bits? */
static bool wide_format(void)
{
	if (IS_ENABLED(CONFIG_ARM64_64K_PAGES))
		return IS_ENABLED(CONFIG_ARM64_PA_BITS_52);

	return field(read_sysreg(tcr_el1), 59, 59); /* DS */
}

/* The address in a descriptor, with all bits that can be part of it */
static u64 output_address(u64 desc)
{
	u64 pa;

	if (!wide_format())
		return field(desc, 47, 12) << 12;

	if (IS_ENABLED(CONFIG_ARM64_64K_PAGES))
		return field(desc, 47, 16) << 16 | field(desc, 15, 12) << 48;

	pa = field(desc, 49, 12) << 12;
	return pa | field(desc, 9, 8) << 50;
}

static const char *decode_leaf(u64 desc, struct translation *t)
{
	bool rdonly = field(desc, 7, 7), dbm = field(desc, 51, 51);
	bool ds = !IS_ENABLED(CONFIG_ARM64_64K_PAGES) && wide_format();

	t->valid = true;
	t->type = read_sysreg(mair_el1) >> (8 * field(desc, 4, 2));
	t->write = !rdonly;
	t->exec = !field(desc, 53, 53);

	if (field(desc, 5, 5))
		return "non-secure bit";
	if (field(desc, 6, 6))
		return "EL0 has access";
	if (!field(desc, 54, 54))
		return "EL0 may execute";
	/* Hardware that knows permission indirection looks at DBM alone */
	if (rdonly == dbm)
		return "read-only by one bit, writable by the other";
	if (!ds && field(desc, 9, 8) != 3)
		return "not inner shareable";
	if (!field(desc, 10, 10))
		return "access flag is clear";
	if (field(desc, 50, 50))
		return "guarded";
	if (field(desc, 52, 52))
		return "contiguous";
	if (field(desc, 63, 59))
		return "bits 63 to 59";

	return NULL;
}

/* What does @va translate to, and how? */
static struct translation translate(struct pool *pool,
				    const struct trans_pgd *trans, u64 va)
{
	unsigned int page_bits = __ffs(PAGE), stride = page_bits - 3;
	unsigned int levels = DIV_ROUND_UP(trans->va_bits - page_bits, stride);
	struct translation t = { };
	u64 *table = pool_find(pool, trans->root ? virt_to_phys(trans->root) : 0);

	va = field(va, trans->va_bits - 1, 0);

	for (int level = 4 - levels; ; level++) {
		unsigned int low = page_bits + stride * (3 - level);
		unsigned int high = level == 4 - levels ? trans->va_bits : low + stride;
		u64 index = field(va, high - 1, low), last = field(~0ULL, high - 1, low);
		u64 desc, below = field(va, low - 1, 0);

		if (!table) {
			t.bad = "a table that nobody allocated";
			return t;
		}

		desc = READ_ONCE(table[index]);
		t.size = 1ULL << low;
		if (!desc) {
			/* Up to the next entry of this table */
			while (++index <= last && !READ_ONCE(table[index]))
				t.size += 1ULL << low;
			t.size -= below;
			return t;
		}

		t.pa = output_address(desc);
		switch (field(desc, 1, 0) | (level == 3) << 2) {
		case 3:
			if (field(desc, 63, 59))
				t.bad = "a table that limits what is below";
			else if (t.pa & (PAGE - 1))
				t.bad = "a table that is not aligned";
			else
				break;
			return t;
		case 1:
			if (t.size != BIG && t.size != SMALL) {
				t.bad = "a block that not every CPU has";
				return t;
			}
			fallthrough;
		case 7:
			t.bad = decode_leaf(desc, &t);
			if (t.pa & (t.size - 1))
				t.bad = "a leaf that is not aligned";
			t.pa += below;
			return t;
		default:
			t.bad = "an entry that means nothing";
			return t;
		}

		table = pool_find(pool, t.pa);
	}
}

/* What the tables should be */

/* The largest leaf that has @va in it and lies in @range */
static u64 largest_leaf(const struct span *range, u64 va)
{
	static const u64 sizes[] = { BIG, SMALL };

	for (unsigned int i = 0; i < ARRAY_SIZE(sizes); i++) {
		u64 start = ALIGN_DOWN(va, sizes[i]);

		if ((range->va - range->pa) % sizes[i] == 0 && start >= range->va &&
		    start - range->va + sizes[i] <= range->size)
			return sizes[i];
	}

	return PAGE;
}

/*
 * Do the tables map these ranges, in ascending order, and nothing else, with
 * leaves as large as can be? An incomplete table may have holes in them.
 */
static void expect_tables(struct kunit *test, const struct trans_pgd *trans,
			  const struct span *ranges, unsigned int nr,
			  bool code, bool incomplete)
{
	struct pool *pool = test->priv;
	unsigned int i = 0;
	u64 va = 0;

	pool->va_bits = trans->va_bits;
	pool->first = ranges[0];
	KUNIT_ASSERT_PTR_EQ(test, (void *)trans->root, pool->page[0]);

	while (va < BIT_ULL(trans->va_bits)) {
		u64 start = i < nr ? ranges[i].va : BIT_ULL(trans->va_bits);
		u64 end = i < nr ? start + ranges[i].size : 0;
		struct translation t = translate(pool, trans, va);

		KUNIT_ASSERT_TRUE_MSG(test, !t.bad, "%#llx: %s", va, t.bad);
		if (!t.valid) {
			while (incomplete && i < nr && ranges[i].va + ranges[i].size <= va + t.size)
				i++;
			start = i < nr ? ranges[i].va : BIT_ULL(trans->va_bits);
			KUNIT_ASSERT_TRUE_MSG(test, incomplete || va + t.size <= start,
					      "hole at %#llx, %#llx bytes, range %u begins at %#llx",
					      va, t.size, i, start);
			va += t.size;
			continue;
		}

		KUNIT_ASSERT_TRUE_MSG(test, va >= start && va < end,
				      "%#llx is mapped, range %u begins at %#llx",
				      va, i, start);
		KUNIT_ASSERT_EQ_MSG(test, t.pa, ranges[i].pa + (va - start), "at %#llx", va);
		KUNIT_ASSERT_EQ_MSG(test, t.size, largest_leaf(&ranges[i], va), "at %#llx", va);
		/* Normal memory, inner and outer write-back, allocating */
		KUNIT_ASSERT_EQ_MSG(test, t.type, 0xff, "at %#llx", va);
		KUNIT_ASSERT_EQ_MSG(test, t.write, !code, "at %#llx", va);
		KUNIT_ASSERT_EQ_MSG(test, t.exec, code, "at %#llx", va);

		va += t.size;
		if (va >= end)
			i++;
	}

	KUNIT_ASSERT_TRUE_MSG(test, incomplete || i == nr, "%u of %u ranges", i, nr);
	KUNIT_ASSERT_EQ(test, trans->nr_pages, pool->nr);
	KUNIT_ASSERT_EQ_MSG(test, pool_reached(pool), pool->nr,
			    "pages that are no tables: nobody would ever find them");
}

static int map_all(struct trans_pgd *trans, const struct span *ranges,
		   unsigned int nr, pgprot_t prot)
{
	int ret = 0;

	for (unsigned int i = 0; i < nr && !ret; i++)
		ret = trans_pgd_map(trans, ranges[i].va, ranges[i].pa,
				    ranges[i].size, prot);
	return ret;
}

/* Count, build, and look at the result */
static void expect_mapped(struct kunit *test, unsigned int va_bits,
			  const struct span *ranges, unsigned int nr)
{
	struct trans_pgd trans = new_tables(test), count = { };

	trans.va_bits = va_bits;
	count.va_bits = va_bits;
	KUNIT_ASSERT_EQ(test, map_all(&count, ranges, nr, PAGE_KERNEL), 0);
	KUNIT_ASSERT_EQ(test, map_all(&trans, ranges, nr, PAGE_KERNEL), 0);
	KUNIT_ASSERT_EQ(test, count.nr_pages, trans.nr_pages);
	KUNIT_ASSERT_PTR_EQ(test, count.root, NULL);
	expect_tables(test, &trans, ranges, nr, false, false);
}

/*
 * Ranges around an edge of each level
 */

struct shape {
	const char *name;
	/* From the edge to start and end */
	s64 start;
	s64 end;
};

static const struct shape shapes[] = {
	{ "a page before", -PAGE, 0 },
	{ "a page behind", 0, PAGE },
	{ "a page on either side", -PAGE, PAGE },
	{ "a page, one page away", PAGE, 2 * PAGE },
	{ "a block before", -SMALL, 0 },
	{ "a block behind", 0, SMALL },
	{ "a block on either side", -SMALL, SMALL },
	{ "a block and a page before", -SMALL - PAGE, 0 },
	{ "a block and a page behind", 0, SMALL + PAGE },
	{ "a block and a page on either side", -SMALL - PAGE, SMALL + PAGE },
	{ "a block but a page before", -SMALL, -PAGE },
	{ "a block but a page behind", PAGE, SMALL },
	{ "a block but a page on either side", -SMALL + PAGE, SMALL - PAGE },
	{ "two blocks but a page", -SMALL + PAGE, SMALL },
	{ "a big block before", -BIG, 0 },
	{ "a big block behind", 0, BIG },
	{ "a big block on either side", -BIG, BIG },
	{ "a big block but a page", PAGE, BIG },
	{ "big blocks, a block, a page", -BIG - SMALL - PAGE, BIG + SMALL + PAGE },
	{ "big blocks but a block and a page", -2 * BIG + SMALL + PAGE, 2 * BIG - SMALL - PAGE },
};

KUNIT_ARRAY_PARAM_DESC(shape, shapes, name);

static void expect_shape(struct kunit *test, unsigned int va_bits, u64 edge)
{
	/* How VA and PA are out of step: it limits the blocks */
	static const u64 skews[] = { 0, SMALL, PAGE };
	const struct shape *shape = test->param_value;
	u64 size = shape->end - shape->start;

	for (unsigned int i = 0; i < ARRAY_SIZE(skews); i++) {
		u64 va = edge + shape->start;
		struct span range = { va, 8 * BIG + va % BIG + skews[i], size };

		/* A big block of pages takes hundreds of tables */
		if (skews[i] == PAGE && size > 2 * (SMALL + PAGE))
			continue;

		expect_mapped(test, va_bits, &range, 1);
	}
}

static void one_range_at_an_edge(struct kunit *test)
{
	const struct shape *shape = test->param_value;
	unsigned int stride = __ffs(PAGE) - 3;

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++) {
		u64 limit = BIT_ULL(depths[i]);

		for (unsigned int shift = __ffs(PAGE); shift < depths[i]; shift += stride) {
			u64 edge = ALIGN(4 * BIG, BIT_ULL(shift)) + BIT_ULL(shift);

			if (edge + 4 * BIG <= limit)
				expect_shape(test, depths[i], edge);
		}

		if (shape->start >= 0)
			expect_shape(test, depths[i], 0);
		if (shape->end <= 0)
			expect_shape(test, depths[i], limit);
	}
}

/*
 * More than one range, in one set of tables
 */

struct layout {
	const char *name;
	struct span ranges[4];
};

static const struct layout layouts[] = {
	{ "adjacent pages", { { 0, PAGE, PAGE }, { PAGE, 2 * PAGE, PAGE } } },
	{ "adjacent pages of another order", { { 0, PAGE, PAGE }, { PAGE, 0, PAGE } } },
	{ "adjacent blocks", { { BIG, BIG, BIG }, { 2 * BIG, 2 * BIG, BIG } } },
	{ "adjacent within a block", {
		{ BIG, BIG, SMALL / 2 }, { BIG + SMALL / 2, BIG + SMALL / 2, SMALL / 2 } } },
	{ "adjacent within a big block", {
		{ BIG, BIG, SMALL + PAGE },
		{ BIG + SMALL + PAGE, BIG + SMALL + PAGE, 2 * BIG - SMALL - PAGE } } },
	{ "one page between them", {
		{ BIG, BIG, SMALL - PAGE }, { BIG + SMALL, BIG + SMALL, SMALL } } },
	{ "one page between them within a block", {
		{ BIG, BIG, SMALL / 2 },
		{ BIG + SMALL / 2 + PAGE, BIG + SMALL / 2 + PAGE, SMALL / 2 - PAGE } } },
	{ "one block between them", { { BIG, 0, BIG }, { 3 * BIG, BIG, BIG } } },
	{ "every second page", {
		{ BIG, 0, PAGE }, { BIG + 2 * PAGE, 2 * PAGE, PAGE },
		{ BIG + 4 * PAGE, 4 * PAGE, PAGE }, { BIG + 6 * PAGE, 6 * PAGE, PAGE } } },
	{ "the same memory twice", { { BIG, 0, BIG }, { 2 * BIG + PAGE, PAGE, SMALL } } },
	{ "far from each other", {
		{ 0, 0, PAGE }, { 7 * BIG, BIG, BIG }, { BIT_ULL(35), SMALL, SMALL + PAGE },
		{ BIT_ULL(36) - PAGE, BIT_ULL(36) - PAGE, PAGE } } },
};

KUNIT_ARRAY_PARAM_DESC(layout, layouts, name);

static unsigned int layout_size(const struct layout *layout)
{
	unsigned int nr = 0;

	while (nr < ARRAY_SIZE(layout->ranges) && layout->ranges[nr].size)
		nr++;
	return nr;
}

static void several_ranges(struct kunit *test)
{
	const struct layout *layout = test->param_value;

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++)
		expect_mapped(test, depths[i], layout->ranges, layout_size(layout));
}

/* The bits that select TTBR1 make no difference */
static void upper_bits_are_not_looked_at(struct kunit *test)
{
	struct span low = { BIG + PAGE, BIG + PAGE, 2 * SMALL };

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++) {
		struct trans_pgd trans = new_tables(test);

		trans.va_bits = depths[i];
		KUNIT_ASSERT_EQ(test, trans_pgd_map(&trans, low.va | GENMASK_ULL(63, depths[i]),
						    low.pa, low.size, PAGE_KERNEL), 0);
		expect_tables(test, &trans, &low, 1, false, false);
	}
}

/*
 * Memory as memblock has it
 */

struct piece {
	u64 start;
	u64 end;
	enum memblock_flags flags;
};

struct memory {
	const char *name;
	/* From some place on that the linear map reaches */
	struct piece regions[4];
	struct piece runs[4];
};

static const struct memory memories[] = {
	{ "one page",
	  { { PAGE, 2 * PAGE, 0 } },
	  { { PAGE, 2 * PAGE } } },
	{ "a block, ragged at both ends",
	  { { SMALL - PAGE, 2 * SMALL + PAGE, 0 } },
	  { { SMALL - PAGE, 2 * SMALL + PAGE } } },
	{ "two nodes that meet within a block",
	  { { 0, SMALL + PAGE, 0 }, { SMALL + PAGE, 3 * SMALL, 0 } },
	  { { 0, 3 * SMALL } } },
	{ "neighbours of several kinds",
	  { { 0, PAGE, 0 }, { PAGE, SMALL, MEMBLOCK_HOTPLUG },
	    { SMALL, 2 * SMALL, MEMBLOCK_MIRROR },
	    { 2 * SMALL, 4 * BIG, MEMBLOCK_DRIVER_MANAGED } },
	  { { 0, 4 * BIG } } },
	{ "a hole of one page",
	  { { 0, SMALL - PAGE, 0 }, { SMALL, 3 * SMALL, 0 } },
	  { { 0, SMALL - PAGE }, { SMALL, 3 * SMALL } } },
	{ "a page that is marked nomap",
	  { { 0, BIG - PAGE, 0 }, { BIG - PAGE, BIG, MEMBLOCK_NOMAP },
	    { BIG, 2 * BIG, 0 } },
	  { { 0, BIG - PAGE }, { BIG, 2 * BIG } } },
	{ "a block that is marked nomap",
	  { { 0, SMALL, 0 }, { SMALL, 2 * SMALL, MEMBLOCK_NOMAP },
	    { 2 * SMALL, 3 * SMALL, 0 } },
	  { { 0, SMALL }, { 2 * SMALL, 3 * SMALL } } },
	{ "nomap at both ends",
	  { { 0, PAGE, MEMBLOCK_NOMAP }, { PAGE, SMALL, 0 },
	    { SMALL, SMALL + BIG, MEMBLOCK_NOMAP } },
	  { { PAGE, SMALL } } },
	{ "parts of pages",
	  { { 1, SMALL - 1, 0 }, { SMALL + 1, SMALL + PAGE - 1, 0 },
	    { 2 * SMALL - 1, 2 * SMALL + PAGE + 1, 0 } },
	  { { PAGE, SMALL - PAGE }, { 2 * SMALL, 2 * SMALL + PAGE } } },
	{ "small, large, far",
	  { { 0, PAGE, 0 }, { BIG - PAGE, 3 * BIG + SMALL + PAGE, 0 },
	    { 7 * BIG, 7 * BIG + PAGE, 0 }, { 8 * BIG - PAGE, 8 * BIG, 0 } },
	  { { 0, PAGE }, { BIG - PAGE, 3 * BIG + SMALL + PAGE },
	    { 7 * BIG, 7 * BIG + PAGE }, { 8 * BIG - PAGE, 8 * BIG } } },
};

KUNIT_ARRAY_PARAM_DESC(memory, memories, name);

static struct memblock_region made_up_regions[4];
static struct memblock_type made_up_memory = {
	.regions = made_up_regions,
	.max = ARRAY_SIZE(made_up_regions),
	.name = "kunit",
};

static struct memblock_type *get_made_up_memory(void)
{
	return &made_up_memory;
}

/* Replace memblock's memory for this test; returns how many @runs that makes */
static unsigned int make_up_memory(struct kunit *test, const struct memory *memory,
				   struct span *runs)
{
	/* Not 0, which has nothing in front of it */
	u64 base = ALIGN(memblock_start_of_DRAM() + 1, BIG), nr = 0;

	made_up_memory.cnt = 0;
	for (unsigned int i = 0; i < ARRAY_SIZE(memory->regions); i++) {
		const struct piece *piece = &memory->regions[i];

		if (!piece->end)
			break;
		made_up_regions[i] = (struct memblock_region) {
			.base = base + piece->start,
			.size = piece->end - piece->start,
			.flags = piece->flags,
		};
		made_up_memory.cnt++;
	}

	for (; nr < ARRAY_SIZE(memory->runs) && memory->runs[nr].end; nr++) {
		runs[nr].pa = base + memory->runs[nr].start;
		runs[nr].size = memory->runs[nr].end - memory->runs[nr].start;
	}

	kunit_activate_static_stub(test, trans_pgd_memory, get_made_up_memory);
	return nr;
}

/* Where the linear map has @runs, in bits that the tables resolve */
static void set_linear(const struct trans_pgd *trans, struct span *runs, unsigned int nr)
{
	for (unsigned int i = 0; i < nr; i++)
		runs[i].va = field((u64)__va(runs[i].pa), trans->va_bits - 1, 0);
}

static void create_linear(struct kunit *test, struct trans_pgd *trans)
{
	struct trans_pgd count = { };

	KUNIT_ASSERT_EQ(test, trans_pgd_create_linear(&count), 0);
	if (count.nr_pages > POOL_PAGES)
		kunit_skip(test, "this memory takes %u pages of tables", count.nr_pages);
	KUNIT_ASSERT_EQ(test, trans_pgd_create_linear(trans), 0);
	KUNIT_ASSERT_EQ(test, count.nr_pages, trans->nr_pages);
}

static void expect_linear(struct kunit *test, struct span *runs, unsigned int nr)
{
	struct trans_pgd trans = new_tables(test);

	create_linear(test, &trans);
	KUNIT_ASSERT_GE(test, trans.va_bits, vabits_actual);
	set_linear(&trans, runs, nr);
	expect_tables(test, &trans, runs, nr, false, false);
}

static void memory_in_the_linear_map(struct kunit *test)
{
	struct span runs[4];
	unsigned int nr = make_up_memory(test, test->param_value, runs);

	expect_linear(test, runs, nr);

	for (unsigned int i = 0; i < nr; i++) {
		u64 start = runs[i].pa, end = start + runs[i].size;

		KUNIT_EXPECT_TRUE(test, trans_pgd_linear_covers(start, end));
		KUNIT_EXPECT_TRUE(test, trans_pgd_linear_covers(start, start + PAGE));
		KUNIT_EXPECT_TRUE(test, trans_pgd_linear_covers(end - PAGE, end));
		KUNIT_EXPECT_FALSE(test, trans_pgd_linear_covers(start - PAGE, end));
		KUNIT_EXPECT_FALSE(test, trans_pgd_linear_covers(start, end + PAGE));
		KUNIT_EXPECT_FALSE(test, trans_pgd_linear_covers(start - PAGE, start));
		KUNIT_EXPECT_FALSE(test, trans_pgd_linear_covers(end, end + PAGE));
		KUNIT_EXPECT_TRUE(test, trans_pgd_linear_covers(end, end));
	}
	KUNIT_EXPECT_TRUE(test, nr < 2 || !trans_pgd_linear_covers(runs[0].pa, runs[1].pa + PAGE));
}

/*
 * Code at its physical address
 */

struct code {
	const char *name;
	u64 pa;
	u64 size;
};

static const struct code codes[] = {
	{ "the first page", 0, PAGE },
	{ "the second page", PAGE, PAGE },
	{ "at 4 GiB", SZ_4G, PAGE },
	{ "across 4 GiB", SZ_4G - PAGE, 2 * PAGE },
	{ "a whole block", BIG, SMALL },
	{ "behind 36 bits", BIT_ULL(36), PAGE },
	{ "behind 39 bits", BIT_ULL(39), PAGE },
	{ "across 39 bits", BIT_ULL(39) - PAGE, 2 * PAGE },
	{ "behind 42 bits", BIT_ULL(42) + PAGE, PAGE },
	{ "behind 47 bits", BIT_ULL(47), PAGE },
	{ "the last page of 48 bits", BIT_ULL(48) - PAGE, PAGE },
	{ "across 48 bits", BIT_ULL(48) - PAGE, 2 * PAGE },
	{ "the first page behind 48 bits", BIT_ULL(48), PAGE },
	{ "in the middle of 52 bits", BIT_ULL(51) + BIT_ULL(49) + 3 * PAGE, PAGE },
	{ "the last page of 52 bits", BIT_ULL(52) - PAGE, PAGE },
	{ "across 52 bits", BIT_ULL(52) - PAGE, 2 * PAGE },
	{ "behind 52 bits", BIT_ULL(52), PAGE },
	{ "the last page of 64 bits", -PAGE, PAGE },
};

KUNIT_ARRAY_PARAM_DESC(code, codes, name);

/* How many bits of a physical address fit into a descriptor */
static unsigned int pa_limit(void)
{
	return wide_format() ? 52 : 48;
}

static void code_in_the_identity_map(struct kunit *test)
{
	const struct code *code = test->param_value;
	struct trans_pgd trans = new_tables(test), count = { };
	struct span range = { code->pa, code->pa, code->size };
	u64 last = code->pa + (code->size - 1);

	if (last >> pa_limit()) {
		KUNIT_EXPECT_EQ(test, -EINVAL,
				trans_pgd_create_idmap(&count, code->pa, code->size));
		KUNIT_EXPECT_EQ(test, -EINVAL,
				trans_pgd_create_idmap(&trans, code->pa, code->size));
		KUNIT_EXPECT_EQ(test, count.nr_pages, 0);
		KUNIT_EXPECT_EQ(test, trans.nr_pages, 0);
		KUNIT_EXPECT_PTR_EQ(test, trans.root, NULL);
		return;
	}

	KUNIT_ASSERT_EQ(test, trans_pgd_create_idmap(&count, code->pa, code->size), 0);
	KUNIT_ASSERT_EQ(test, trans_pgd_create_idmap(&trans, code->pa, code->size), 0);
	KUNIT_ASSERT_EQ(test, count.nr_pages, trans.nr_pages);
	KUNIT_ASSERT_EQ(test, trans.va_bits, last >> 48 ? 52 : 48);
	expect_tables(test, &trans, &range, 1, true, false);

	/* One table per level */
	if (code->size != PAGE)
		return;
	if (IS_ENABLED(CONFIG_ARM64_64K_PAGES))
		KUNIT_EXPECT_EQ(test, trans.nr_pages, 3);
	else if (IS_ENABLED(CONFIG_ARM64_4K_PAGES) && last >> 48)
		KUNIT_EXPECT_EQ(test, trans.nr_pages, 5);
	else
		KUNIT_EXPECT_EQ(test, trans.nr_pages, 4);
}

/*
 * An allocator that fails
 */

static int build_again(struct trans_pgd *trans, const struct layout *layout)
{
	if (layout) {
		trans->va_bits = 48;
		return map_all(trans, layout->ranges, layout_size(layout), PAGE_KERNEL);
	}

	return trans_pgd_create_linear(trans);
}

static void expect_failures(struct kunit *test, const struct layout *layout,
			    struct span *ranges, unsigned int nr)
{
	struct pool *pool = test->priv;
	struct trans_pgd trans = new_tables(test);
	unsigned int calls;

	KUNIT_ASSERT_EQ(test, build_again(&trans, layout), 0);
	calls = pool->calls;
	KUNIT_ASSERT_EQ(test, calls, trans.nr_pages);

	for (unsigned int n = 1; n <= calls + 1; n++) {
		trans = new_tables(test);
		pool->fail_at = n;
		KUNIT_ASSERT_EQ_MSG(test, build_again(&trans, layout), n <= calls ? -ENOMEM : 0,
				    "call %u of %u fails", n, calls);
		KUNIT_ASSERT_EQ_MSG(test, pool->calls, min(n, calls), "asked again after %u", n);
		KUNIT_ASSERT_EQ(test, trans.nr_pages, min(n - 1, calls));
		KUNIT_ASSERT_EQ(test, trans.nr_pages, pool->nr);
		if (n == 1) {
			KUNIT_ASSERT_PTR_EQ(test, trans.root, NULL);
			continue;
		}

		if (!layout)
			set_linear(&trans, ranges, nr);
		/* All pages are in the tables, and what is mapped is right */
		expect_tables(test, &trans, ranges, nr, false, n <= calls);
	}
}

static void allocator_fails_for_ranges(struct kunit *test)
{
	const struct layout *layout = test->param_value;
	struct span ranges[4];

	memcpy(ranges, layout->ranges, sizeof(ranges));
	expect_failures(test, layout, ranges, layout_size(layout));
}

static void allocator_fails_for_memory(struct kunit *test)
{
	struct span runs[4];
	unsigned int nr = make_up_memory(test, test->param_value, runs);

	expect_failures(test, NULL, runs, nr);
}

static void allocator_fails_for_code(struct kunit *test)
{
	struct span range = { BIT_ULL(47) - PAGE, BIT_ULL(47) - PAGE, 2 * PAGE };
	struct pool *pool = test->priv;
	unsigned int calls = 0;

	for (unsigned int n = 1; n == 1 || n <= calls; n++) {
		struct trans_pgd trans = new_tables(test);

		KUNIT_ASSERT_EQ(test, trans_pgd_create_idmap(&trans, range.pa, range.size), 0);
		calls = pool->calls;

		trans = new_tables(test);
		pool->fail_at = n;
		KUNIT_ASSERT_EQ(test, -ENOMEM,
				trans_pgd_create_idmap(&trans, range.pa, range.size));
		KUNIT_ASSERT_EQ(test, pool->calls, n);
		KUNIT_ASSERT_EQ(test, trans.nr_pages, n - 1);
		KUNIT_ASSERT_EQ(test, pool->nr, n - 1);
		if (n > 1)
			expect_tables(test, &trans, &range, 1, true, true);
	}
	KUNIT_EXPECT_GE(test, calls, 3);
}

/*
 * What is refused
 */

static void expect_refused(struct kunit *test, unsigned int va_bits, u64 va, u64 pa,
			   u64 size, pgprot_t prot, const char *what)
{
	struct trans_pgd trans = new_tables(test), count = { };
	struct pool *pool = test->priv;

	trans.va_bits = va_bits;
	count.va_bits = va_bits;
	KUNIT_EXPECT_EQ_MSG(test, trans_pgd_map(&count, va, pa, size, prot), -EINVAL, "%s", what);
	KUNIT_EXPECT_EQ_MSG(test, trans_pgd_map(&trans, va, pa, size, prot), -EINVAL, "%s", what);
	KUNIT_EXPECT_EQ_MSG(test, count.nr_pages, 0, "%s", what);
	KUNIT_EXPECT_EQ_MSG(test, trans.nr_pages, 0, "%s", what);
	KUNIT_EXPECT_EQ_MSG(test, pool->calls, 0, "%s", what);
}

static void writable_and_executable_is_refused(struct kunit *test)
{
	u64 rw = pgprot_val(PAGE_KERNEL), rox = pgprot_val(PAGE_KERNEL_ROX);
	const struct {
		const char *name;
		u64 prot;
	} prots[] = {
		{ "PAGE_KERNEL_EXEC", pgprot_val(PAGE_KERNEL_EXEC) },
		{ "PAGE_SHARED_EXEC", pgprot_val(PAGE_SHARED_EXEC) },
		{ "memory without PXN", rw & ~BIT_ULL(53) },
		{ "memory without UXN", rw & ~BIT_ULL(54) },
		{ "memory without both", rw & ~(BIT_ULL(53) | BIT_ULL(54)) },
		{ "read-only memory with DBM, without PXN", (rw | BIT_ULL(7)) & ~BIT_ULL(53) },
		{ "code that is not read-only", rox & ~BIT_ULL(7) },
		{ "code with DBM", rox | BIT_ULL(51) },
	};

	for (unsigned int i = 0; i < ARRAY_SIZE(prots); i++)
		for (unsigned int j = 0; j < ARRAY_SIZE(depths); j++)
			expect_refused(test, depths[j], BIG, BIG, SMALL,
				       __pgprot(prots[i].prot), prots[i].name);
}

static void other_than_normal_memory_is_refused(struct kunit *test)
{
	expect_refused(test, 48, BIG, BIG, PAGE, pgprot_noncached(PAGE_KERNEL), "nGnRnE");
	expect_refused(test, 48, BIG, BIG, PAGE, pgprot_device(PAGE_KERNEL), "nGnRE");
	expect_refused(test, 48, BIG, BIG, PAGE, pgprot_writecombine(PAGE_KERNEL), "not cacheable");
	expect_refused(test, 48, BIG, BIG, PAGE, pgprot_tagged(PAGE_KERNEL), "tagged");
}

static void impossible_ranges_are_refused(struct kunit *test)
{
	u64 pa_end = BIT_ULL(pa_limit());

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++) {
		unsigned int bits = depths[i];
		u64 end = BIT_ULL(bits);

		expect_refused(test, bits, BIG, BIG, 0, PAGE_KERNEL, "nothing");
		expect_refused(test, bits, BIG + 1, BIG, PAGE, PAGE_KERNEL, "VA");
		expect_refused(test, bits, BIG, BIG + PAGE / 2, PAGE, PAGE_KERNEL, "PA");
		expect_refused(test, bits, BIG, BIG, PAGE + 8, PAGE_KERNEL, "size");
		expect_refused(test, bits, end - PAGE, 0, 2 * PAGE, PAGE_KERNEL, "across the end");
		expect_refused(test, bits, 0, 0, end + PAGE, PAGE_KERNEL, "more than there is");
		expect_refused(test, bits, PAGE, 0, -PAGE, PAGE_KERNEL, "nearly 64 bits");
		expect_refused(test, bits, 0, -PAGE, 2 * PAGE, PAGE_KERNEL, "PA wraps");
		expect_refused(test, bits, 0, pa_end, PAGE, PAGE_KERNEL, "no such PA");
		expect_refused(test, bits, 0, pa_end - PAGE, 2 * PAGE, PAGE_KERNEL,
			       "across the last PA");
		expect_refused(test, bits, 0, BIT_ULL(53), PAGE, PAGE_KERNEL, "PA in the PXN bit");
	}
}

static void the_last_physical_page(struct kunit *test)
{
	u64 pa_end = BIT_ULL(pa_limit());
	struct span page = { BIG, pa_end - PAGE, PAGE };
	struct span block = { BIG, pa_end - BIG, BIG };

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++) {
		expect_mapped(test, depths[i], &page, 1);
		expect_mapped(test, depths[i], &block, 1);
	}
}

/* A table full of the largest blocks: only FEAT_LPA or FEAT_LPA2 have one for it */
static void no_larger_blocks(struct kunit *test)
{
	u64 size = BIG * (PAGE / 8);
	struct span range = { size, size, size };

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++)
		if (2 * size <= BIT_ULL(depths[i]))
			expect_mapped(test, depths[i], &range, 1);
}

static void entries_are_never_replaced(struct kunit *test)
{
	/* A big block, a block, two pages: not where the others would have them */
	static const struct span there[] = {
		{ 4 * BIG, 0, BIG },
		{ 6 * BIG, SMALL, SMALL },
		{ 8 * BIG + PAGE, 5 * PAGE, 2 * PAGE },
	};
	/* The pages in front of what is hit are mapped, then it ends */
	static const struct {
		struct span range;
		u64 before;
	} others[] = {
		{ { 4 * BIG, 0, BIG }, 0 },			/* the same again */
		{ { 4 * BIG, BIG, BIG }, 0 },			/* block on block */
		{ { 4 * BIG, BIG, SMALL }, 0 },			/* block in a block */
		{ { 5 * BIG - PAGE, BIG, PAGE }, 0 },		/* its last page */
		{ { 6 * BIG, 0, BIG }, 0 },			/* block on a table */
		{ { 6 * BIG, 0, PAGE }, 0 },			/* page in a block */
		{ { 6 * BIG + SMALL - PAGE, 0, 2 * PAGE }, 0 },	/* from its last page on */
		{ { 8 * BIG, 0, SMALL }, 0 },			/* block on a table of pages */
		{ { 8 * BIG + 2 * PAGE, 0, PAGE }, 0 },		/* page on page */
		{ { 8 * BIG, 0, 2 * PAGE }, PAGE },		/* page beside page */
		{ { 6 * BIG - PAGE, 0, 2 * PAGE }, PAGE },	/* into the block */
	};

	for (unsigned int i = 0; i < ARRAY_SIZE(depths); i++) {
		for (unsigned int j = 0; j < ARRAY_SIZE(others); j++) {
			struct trans_pgd trans = new_tables(test);
			struct span all[ARRAY_SIZE(there) + 1];
			unsigned int nr = 0;

			trans.va_bits = depths[i];
			KUNIT_ASSERT_EQ(test, map_all(&trans, there, ARRAY_SIZE(there),
						      PAGE_KERNEL), 0);
			KUNIT_ASSERT_EQ_MSG(test, map_all(&trans, &others[j].range, 1,
							  PAGE_KERNEL), -EEXIST, "case %u", j);

			for (unsigned int k = 0; k < ARRAY_SIZE(there); k++) {
				all[nr] = others[j].range;
				all[nr].size = others[j].before;
				if (all[nr].size && all[nr].va < there[k].va &&
				    (!k || all[nr].va > there[k - 1].va))
					nr++;
				all[nr++] = there[k];
			}
			expect_tables(test, &trans, all, nr, false, false);
		}
	}
}

/*
 * Real memory: this machine's, as memblock has it, and the CPU's own opinion
 */

/*
 * All memory of this machine that may be mapped, without a helper that the
 * builder has. Nobody plugs memory while suites run at boot.
 */
static struct span *memory_of_this_machine(struct kunit *test, unsigned int *nr)
{
	struct memblock_region *region;
	struct span *runs;
	u64 end = 0;

	runs = kunit_kcalloc(test, memblock.memory.cnt, sizeof(*runs), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, runs);

	*nr = 0;
	for_each_mem_region(region) {
		u64 start = ALIGN(region->base, PAGE);

		if (region->flags & MEMBLOCK_NOMAP ||
		    start >= ALIGN_DOWN(region->base + region->size, PAGE))
			continue;
		if (!*nr || start != end)
			runs[(*nr)++].pa = start;
		end = ALIGN_DOWN(region->base + region->size, PAGE);
		runs[*nr - 1].size = end - runs[*nr - 1].pa;
	}

	return runs;
}

static void memory_of_this_machine_in_the_linear_map(struct kunit *test)
{
	unsigned int nr;
	struct span *runs = memory_of_this_machine(test, &nr);

	expect_linear(test, runs, nr);
}

/*
 * Have the CPU walk the tables, as it would for a read or a write by EL1.
 * Returns PAR_EL1. Only for tables that map real memory: while they are in
 * TTBR0, the CPU may speculate.
 */
static u64 ask_cpu(const struct trans_pgd *trans, u64 va, bool write)
{
	u64 ttbr = virt_to_phys(trans->root);
	unsigned int bits = trans->va_bits;
	unsigned long flags;
	u64 par;

	/* With 64K pages, a CPU with fewer bits enters a 52-bit root further up */
	if (IS_ENABLED(CONFIG_ARM64_64K_PAGES) && bits == 52 && vabits_actual == 48) {
		ttbr += 8 * (BIT_ULL(52 - 42) - BIT_ULL(48 - 42));
		bits = 48;
	}

	flags = local_daif_save();
	cpu_install_ttbr0(phys_to_ttbr(ttbr), TCR_T0SZ(bits));
	if (write)
		asm volatile("at s1e1w, %0" : : "r" (field(va, bits - 1, 0)));
	else
		asm volatile("at s1e1r, %0" : : "r" (field(va, bits - 1, 0)));
	/* The translation is in PAR_EL1 only after this */
	isb();
	par = read_sysreg_par();
	cpu_uninstall_idmap();
	local_daif_restore(flags);

	return par;
}

static void expect_cpu_agrees(struct kunit *test, const struct trans_pgd *trans, u64 va, u64 pa)
{
	struct translation t = translate(test->priv, trans, va);
	u64 read = ask_cpu(trans, va, false);
	u64 write = ask_cpu(trans, va, true);

	KUNIT_ASSERT_EQ_MSG(test, field(read, 0, 0), !t.valid, "PAR %#llx at %#llx", read, va);
	if (!t.valid) {
		/* Translation fault, level 0 to 3 or -1 */
		KUNIT_EXPECT_TRUE_MSG(test, field(read, 6, 3) == 1 || field(read, 6, 1) == 0x2b,
				      "PAR %#llx at %#llx", read, va);
		return;
	}

	KUNIT_EXPECT_EQ(test, t.pa, pa);
	KUNIT_EXPECT_EQ_MSG(test, field(read, 51, 12) << 12, ALIGN_DOWN(pa, SZ_4K), "at %#llx", va);
	KUNIT_EXPECT_EQ_MSG(test, field(read, 63, 56), 0xff, "type at %#llx", va);
	KUNIT_EXPECT_EQ_MSG(test, field(read, 8, 7), 3, "shareability at %#llx", va);
	KUNIT_EXPECT_EQ_MSG(test, field(write, 0, 0), !t.write, "PAR %#llx at %#llx", write, va);
	if (!t.write) /* Permission fault, level 0 to 3 */
		KUNIT_EXPECT_EQ_MSG(test, field(write, 6, 3), 3, "PAR %#llx at %#llx", write, va);
}

static void the_cpu_agrees_about_memory(struct kunit *test)
{
	struct trans_pgd trans = new_tables(test);
	unsigned int nr;
	struct span *runs = memory_of_this_machine(test, &nr);

	create_linear(test, &trans);
	set_linear(&trans, runs, nr);

	for (unsigned int i = 0; i < nr; i++) {
		const struct span *run = &runs[i];
		u64 step = ALIGN(run->size / 16 + 1, PAGE) + SZ_4K;

		for (u64 offset = 0; offset < run->size; offset += step)
			expect_cpu_agrees(test, &trans, run->va + offset, run->pa + offset);
		expect_cpu_agrees(test, &trans, run->va + run->size - 1, run->pa + run->size - 1);
		expect_cpu_agrees(test, &trans, run->va + run->size, 0);
		expect_cpu_agrees(test, &trans, run->va - 1, 0);
	}
}

static void the_cpu_agrees_about_code(struct kunit *test)
{
	struct trans_pgd trans = new_tables(test);
	void *page = kunit_kzalloc(test, PAGE, GFP_KERNEL);
	u64 pa;

	KUNIT_ASSERT_NOT_NULL(test, page);
	pa = virt_to_phys(page);
	KUNIT_ASSERT_TRUE(test, IS_ALIGNED(pa, PAGE));
	KUNIT_ASSERT_EQ(test, trans_pgd_create_idmap(&trans, pa, PAGE), 0);

	expect_cpu_agrees(test, &trans, pa, pa);
	expect_cpu_agrees(test, &trans, pa + PAGE - 1, pa + PAGE - 1);
	expect_cpu_agrees(test, &trans, pa + PAGE, 0);
	expect_cpu_agrees(test, &trans, pa - 1, 0);
	expect_cpu_agrees(test, &trans, 0, 0);
	expect_cpu_agrees(test, &trans, BIT_ULL(47), 0);
}

static struct kunit_case trans_pgd_test_cases[] = {
	KUNIT_CASE_PARAM(one_range_at_an_edge, shape_gen_params),
	KUNIT_CASE_PARAM(several_ranges, layout_gen_params),
	KUNIT_CASE(upper_bits_are_not_looked_at),
	KUNIT_CASE_PARAM(memory_in_the_linear_map, memory_gen_params),
	KUNIT_CASE_PARAM(code_in_the_identity_map, code_gen_params),
	KUNIT_CASE(the_last_physical_page),
	KUNIT_CASE(no_larger_blocks),
	KUNIT_CASE_PARAM(allocator_fails_for_ranges, layout_gen_params),
	KUNIT_CASE_PARAM(allocator_fails_for_memory, memory_gen_params),
	KUNIT_CASE(allocator_fails_for_code),
	KUNIT_CASE(writable_and_executable_is_refused),
	KUNIT_CASE(other_than_normal_memory_is_refused),
	KUNIT_CASE(impossible_ranges_are_refused),
	KUNIT_CASE(entries_are_never_replaced),
	KUNIT_CASE(memory_of_this_machine_in_the_linear_map),
	KUNIT_CASE(the_cpu_agrees_about_memory),
	KUNIT_CASE(the_cpu_agrees_about_code),
	{ }
};

static struct kunit_suite trans_pgd_test_suite = {
	.name = "arm64_trans_pgd",
	.init = trans_pgd_test_init,
	.exit = trans_pgd_test_exit,
	.test_cases = trans_pgd_test_cases,
};

kunit_test_suite(trans_pgd_test_suite);

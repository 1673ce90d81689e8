// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit suite for the verification of images that kexec executes
 *
 * Images are made up: a list of pages as the core of kexec lays it down, with
 * destinations that nobody ever writes to. What is computed from them is
 * compared with a CRC32C that goes bit by bit.
 */

#include <kunit/test.h>

#include <linux/cpufeature.h>
#include <linux/gfp.h>
#include <linux/kexec.h>
#include <linux/mm.h>
#include <linux/random.h>

#define PAGES	160
#define ENTRIES	(PAGE_SIZE / sizeof(kimage_entry_t))

/* The list goes on in another page after so many entries, to have several */
#define LIST_BREAK	5

struct made_up {
	struct kimage image;
	struct kexec_control_args args;
	kimage_entry_t *next;
	kimage_entry_t *last;
	unsigned int nr_entries;
	kimage_entry_t *entry[4 * PAGES];
	unsigned int nr_pages;
	void *page[2 * PAGES];
	/* For each segment its pages, in their order */
	unsigned int nr_sources[KEXEC_SEGMENT_MAX];
	void *source[KEXEC_SEGMENT_MAX][PAGES];
};

static void *new_page(struct kunit *test)
{
	struct made_up *m = test->priv;
	void *page;

	KUNIT_ASSERT_LT(test, m->nr_pages, ARRAY_SIZE(m->page));
	page = (void *)get_zeroed_page(GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, page);
	m->page[m->nr_pages++] = page;
	return page;
}

static int kexec_verify_test_init(struct kunit *test)
{
	struct made_up *m = kunit_kzalloc(test, sizeof(*m), GFP_KERNEL);

	if (!m)
		return -ENOMEM;

	m->next = &m->image.head;
	m->last = &m->image.head;
	test->priv = m;
	return 0;
}

static void kexec_verify_test_exit(struct kunit *test)
{
	struct made_up *m = test->priv;

	while (m && m->nr_pages)
		free_page((unsigned long)m->page[--m->nr_pages]);
}

/* Without the CPU's CRC32 instructions nothing is verified, and nothing refused */
static bool no_crc(struct kunit *test)
{
	struct made_up *m = test->priv;

	if (cpus_have_final_cap(ARM64_HAS_CRC32))
		return false;

	kexec_verify_init(&m->image, &m->args);
	KUNIT_EXPECT_FALSE(test, m->image.arch.verify);
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
	kunit_mark_skipped(test, "this CPU has no CRC32 instructions");
	return true;
}

static void put_entry(struct made_up *m, kimage_entry_t entry)
{
	m->entry[m->nr_entries++] = m->next;
	*m->next++ = entry;
}

static void add_entry(struct kunit *test, kimage_entry_t entry)
{
	struct made_up *m = test->priv;

	/* As the core does it: at the end of a page is the way to the next one */
	if (m->next == m->last) {
		kimage_entry_t *list = new_page(test);

		put_entry(m, virt_to_phys(list) | IND_INDIRECTION);
		m->next = list;
		m->last = list + LIST_BREAK - 1;
	}

	put_entry(m, entry);
}

/* A segment of random bytes that has to be moved to @mem */
static void add_segment(struct kunit *test, unsigned long n, unsigned long mem, unsigned int pages)
{
	struct made_up *m = test->priv;

	KUNIT_ASSERT_LE(test, pages, PAGES);
	m->image.segment[n].mem = mem;
	m->image.segment[n].memsz = pages * PAGE_SIZE;
	m->image.segment[n].bufsz = pages * PAGE_SIZE;
	if (m->image.nr_segments <= n)
		m->image.nr_segments = n + 1;

	add_entry(test, mem | IND_DESTINATION);
	for (unsigned int i = 0; i < pages; i++) {
		void *page = new_page(test);

		get_random_bytes(page, PAGE_SIZE);
		m->source[n][m->nr_sources[n]++] = page;
		add_entry(test, virt_to_phys(page) | IND_SOURCE);
	}
}

/* A segment that is where it will be executed */
static void add_cma_segment(struct kunit *test, unsigned long n)
{
	struct made_up *m = test->priv;
	void *page = new_page(test);

	get_random_bytes(page, PAGE_SIZE);
	m->source[n][m->nr_sources[n]++] = page;
	m->image.segment[n].mem = virt_to_phys(page);
	m->image.segment[n].memsz = PAGE_SIZE;
	m->image.segment[n].bufsz = PAGE_SIZE;
	m->image.segment_cma[n] = virt_to_page(page);
	if (m->image.nr_segments <= n)
		m->image.nr_segments = n + 1;
}

static void end_list(struct kunit *test)
{
	add_entry(test, IND_DONE);
}

/* CRC32C, bit by bit, without the inversion at the end */
static u32 reference(u32 crc, const void *p, size_t bytes)
{
	const u8 *byte = p;

	while (bytes--) {
		crc ^= *byte++;
		for (int i = 0; i < 8; i++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
	}

	return crc;
}

static u32 reference_of_segment(const struct made_up *m, unsigned long n)
{
	u32 crc = ~0;

	for (unsigned int i = 0; i < m->nr_sources[n]; i++)
		crc = reference(crc, m->source[n][i], PAGE_SIZE);
	return crc;
}

static u32 reference_of_list(const struct made_up *m)
{
	u32 crc = ~0;

	for (unsigned int i = 0; i < m->nr_entries; i++)
		crc = reference(crc, m->entry[i], sizeof(kimage_entry_t));
	return crc;
}

/* Compute, compare with the reference, and verify what nobody has touched */
static void expect_right(struct kunit *test)
{
	struct made_up *m = test->priv;
	const struct kimage_arch *arch = &m->image.arch;

	kexec_verify_init(&m->image, &m->args);
	KUNIT_ASSERT_TRUE(test, arch->verify);
	for (unsigned long n = 0; n < m->image.nr_segments; n++)
		KUNIT_EXPECT_EQ_MSG(test, arch->crc[n], reference_of_segment(m, n),
				    "segment %lu", n);
	KUNIT_EXPECT_EQ(test, arch->list_entries, m->nr_entries);
	KUNIT_EXPECT_EQ(test, arch->list_crc, reference_of_list(m));

	KUNIT_EXPECT_NE(test, m->args.verify, 0);
	KUNIT_EXPECT_EQ(test, m->args.list_entries, arch->list_entries);
	KUNIT_EXPECT_EQ(test, m->args.list.crc, arch->list_crc);

	KUNIT_ASSERT_EQ(test, kexec_verify(&m->image), 0);
}

static void reference_is_crc32c(struct kunit *test)
{
	/* RFC 3720, B.4 */
	static const u8 zeroes[32];

	KUNIT_EXPECT_EQ(test, ~reference(~0, "123456789", 9), 0xe3069283);
	KUNIT_EXPECT_EQ(test, ~reference(~0, zeroes, sizeof(zeroes)), 0x8a9136aa);
}

static void one_page(struct kunit *test)
{
	add_segment(test, 0, SZ_1G, 1);
	end_list(test);
	if (!no_crc(test))
		expect_right(test);
}

static void several_segments(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_segment(test, 0, SZ_1G, 1);
	add_segment(test, 1, SZ_1G + PAGE_SIZE, LIST_BREAK);
	add_segment(test, 2, SZ_2G, 7);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	for (unsigned int n = 0; n < 3; n++) {
		KUNIT_EXPECT_EQ(test, m->args.crc[n].crc, m->image.arch.crc[n]);
		KUNIT_EXPECT_EQ(test, m->args.crc[n].ignore, 0);
	}
}

/* Whatever follows the last entry of a segment in the list */
static void all_segments_there_can_be(struct kunit *test)
{
	for (unsigned long n = 0; n < KEXEC_SEGMENT_MAX; n++)
		add_segment(test, n, SZ_1G + n * SZ_1M, 1 + n % 3);
	end_list(test);
	if (!no_crc(test))
		expect_right(test);
}

/* Nothing says that userspace sorts them */
static void segments_in_another_order(struct kunit *test)
{
	add_segment(test, 2, SZ_2G, 3);
	add_segment(test, 0, SZ_1G, 2);
	add_segment(test, 1, SZ_1G + SZ_1M, 4);
	end_list(test);
	if (!no_crc(test))
		expect_right(test);
}

static void segments_in_place(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_cma_segment(test, 0);
	add_segment(test, 1, SZ_1G, 2);
	add_cma_segment(test, 2);
	add_segment(test, 3, SZ_2G, 3);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	/* The control page only sees what is moved */
	KUNIT_EXPECT_EQ(test, m->args.crc[0].crc, m->image.arch.crc[1]);
	KUNIT_EXPECT_EQ(test, m->args.crc[1].crc, m->image.arch.crc[3]);

	*(u8 *)m->source[2][0] ^= 1;
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), -EIO);
}

/* Each segment is checked after shutdown, by machine_kexec() or by the control page */
static void after_shutdown(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_cma_segment(test, 0);
	add_segment(test, 1, SZ_1G, 2);
	add_cma_segment(test, 2);
	end_list(test);
	if (no_crc(test))
		return;

	m->image.arch.relocate = true;
	expect_right(test);
	for (unsigned int n = 0; n < 3; n++) {
		u8 *byte = m->source[n][0];

		KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), 0);
		*byte ^= 1;
		KUNIT_EXPECT_EQ_MSG(test, kexec_verify_in_place(&m->image),
				    n == 1 ? 0 : -EIO, "segment %u", n);
		*byte ^= 1;
	}

	/* A list that names what is in place has nobody else to check it */
	m->image.arch.relocate = false;
	KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), 0);
	*(u8 *)m->source[1][0] ^= 1;
	KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), -EIO);
	*(u8 *)m->source[1][0] ^= 1;
	*m->entry[1] ^= PAGE_SIZE;
	KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), -EIO);
}

static void nothing_to_move(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_cma_segment(test, 0);
	end_list(test);
	if (no_crc(test))
		return;

	/* There is no control page then */
	kexec_verify_init(&m->image, NULL);
	KUNIT_ASSERT_TRUE(test, m->image.arch.verify);
	KUNIT_EXPECT_EQ(test, m->image.arch.crc[0], reference_of_segment(m, 0));
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
	KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), 0);
	*(u8 *)m->source[0][0] ^= 0x80;
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), -EIO);
	KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), -EIO);
}

/* More than one CPU takes at a time, and an end that is less: each has its place in the sum */
static void many_shares(struct kunit *test)
{
	struct made_up *m = test->priv;
	unsigned int pages = 2 * SZ_256K / PAGE_SIZE + 3;

	add_segment(test, 0, SZ_1G, pages);
	add_segment(test, 1, SZ_2G, 1);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	for (unsigned int i = 0; i < pages; i++) {
		u8 *byte = m->source[0][i] + i;

		*byte ^= 1;
		KUNIT_EXPECT_EQ_MSG(test, kexec_verify(&m->image), -EIO, "page %u", i);
		*byte ^= 1;
	}
}

static void crash_images_are_not_verified(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_segment(test, 0, SZ_1G, 1);
	end_list(test);
	m->image.type = KEXEC_TYPE_CRASH;
	kexec_verify_init(&m->image, &m->args);
	KUNIT_EXPECT_FALSE(test, m->image.arch.verify);
	KUNIT_EXPECT_EQ(test, m->args.verify, 0);
	*(u8 *)m->source[0][0] ^= 1;
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
	KUNIT_EXPECT_EQ(test, kexec_verify_in_place(&m->image), 0);
}

static void a_flipped_bit_is_noticed(struct kunit *test)
{
	static const unsigned int bytes[] = { 0, 1, 7, 8, 4095, PAGE_SIZE / 2, PAGE_SIZE - 1 };
	struct made_up *m = test->priv;

	add_segment(test, 0, SZ_1G, 1);
	add_segment(test, 1, SZ_2G, 6);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	for (unsigned int n = 0; n < 2; n++) {
		for (unsigned int i = 0; i < m->nr_sources[n]; i++) {
			for (unsigned int j = 0; j < ARRAY_SIZE(bytes); j++) {
				u8 *byte = m->source[n][i] + bytes[j];

				*byte ^= 1 << (j & 7);
				KUNIT_EXPECT_EQ_MSG(test, kexec_verify(&m->image), -EIO,
						    "segment %u, page %u, byte %u", n, i, bytes[j]);
				*byte ^= 1 << (j & 7);
			}
		}
	}
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
}

static void exchanged_pages_are_noticed(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_segment(test, 0, SZ_1G, 2);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	/* head, destination, the two */
	KUNIT_ASSERT_EQ(test, m->nr_entries, 5);
	swap(*m->entry[2], *m->entry[3]);
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), -EIO);
}

#ifdef CONFIG_IMA_KEXEC
/* The list of measurements that IMA hands over grows until the system is shut down */
static void what_ima_adds_is_no_corruption(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_segment(test, 0, SZ_1G, 2);
	add_segment(test, 1, SZ_2G, 2);
	end_list(test);
	if (no_crc(test))
		return;

	m->image.ima_segment_index = 1;
	m->image.is_ima_segment_index_set = true;
	expect_right(test);
	KUNIT_EXPECT_EQ(test, m->args.crc[0].ignore, 0);
	KUNIT_EXPECT_NE(test, m->args.crc[1].ignore, 0);

	*(u8 *)m->source[1][1] ^= 1;
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
	*(u8 *)m->source[0][1] ^= 1;
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), -EIO);
}
#endif

/*
 * Entries that were overwritten: whatever they are now, the list is refused
 * without being followed to where no memory is, and not for ever.
 */
static void an_overwritten_list_is_noticed(struct kunit *test)
{
	struct made_up *m = test->priv;
	phys_addr_t self;

	add_segment(test, 0, SZ_1G, 3);
	add_segment(test, 1, SZ_2G, 9);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	self = virt_to_phys(m->entry[1]) & PAGE_MASK;
	for (unsigned int i = 0; i < m->nr_entries; i++) {
		const kimage_entry_t was = *m->entry[i], others[] = {
			0,
			IND_DONE,
			was ^ BIT(20),				/* another page */
			was ^ IND_SOURCE,			/* another kind */
			was ^ BIT(63),
			(PHYS_MASK & PAGE_MASK) | IND_INDIRECTION,	/* no memory */
			PAGE_MASK | IND_INDIRECTION,
			self | IND_INDIRECTION,			/* round and round */
			virt_to_phys(m->entry[i]) | IND_SOURCE,
			~0UL,
		};

		for (unsigned int j = 0; j < ARRAY_SIZE(others); j++) {
			if (others[j] == was)
				continue;
			/* The way to another page of memory may lead anywhere in it */
			if (j == 2 && was & IND_INDIRECTION)
				continue;
			*m->entry[i] = others[j];
			KUNIT_EXPECT_EQ_MSG(test, kexec_verify(&m->image), -EIO,
					    "entry %u of %u is %#lx, was %#lx", i, m->nr_entries,
					    others[j], was);
			*m->entry[i] = was;
		}
	}
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
}

/* What follows the end of the list has no meaning */
static void behind_the_list(struct kunit *test)
{
	struct made_up *m = test->priv;

	add_segment(test, 0, SZ_1G, 1);
	end_list(test);
	if (no_crc(test))
		return;

	expect_right(test);
	*m->next = ~0UL;
	KUNIT_EXPECT_EQ(test, kexec_verify(&m->image), 0);
}

static struct kunit_case kexec_verify_test_cases[] = {
	KUNIT_CASE(reference_is_crc32c),
	KUNIT_CASE(one_page),
	KUNIT_CASE(several_segments),
	KUNIT_CASE(all_segments_there_can_be),
	KUNIT_CASE(segments_in_another_order),
	KUNIT_CASE(segments_in_place),
	KUNIT_CASE(after_shutdown),
	KUNIT_CASE(nothing_to_move),
	KUNIT_CASE(many_shares),
	KUNIT_CASE(crash_images_are_not_verified),
	KUNIT_CASE(a_flipped_bit_is_noticed),
	KUNIT_CASE(exchanged_pages_are_noticed),
#ifdef CONFIG_IMA_KEXEC
	KUNIT_CASE(what_ima_adds_is_no_corruption),
#endif
	KUNIT_CASE(an_overwritten_list_is_noticed),
	KUNIT_CASE(behind_the_list),
	{ }
};

static struct kunit_suite kexec_verify_test_suite = {
	.name = "arm64_kexec_verify",
	.init = kexec_verify_test_init,
	.exit = kexec_verify_test_exit,
	.test_cases = kexec_verify_test_cases,
};

kunit_test_suite(kexec_verify_test_suite);

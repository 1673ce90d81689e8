// SPDX-License-Identifier: GPL-2.0-only
/*
 * Is what kexec is about to execute what was loaded?
 *
 * Each segment gets a CRC32C when it is loaded. It is checked when the image is
 * to be executed, as long as that can still be refused, and again when nothing
 * else runs any more: by the code in the control page as the words pass through,
 * or by machine_kexec() where a segment is in place already.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/atomic.h>
#include <linux/bits.h>
#include <linux/cpufeature.h>
#include <linux/cpumask.h>
#include <linux/crc32.h>
#include <linux/crc32poly.h>
#include <linux/irqflags.h>
#include <linux/kexec.h>
#include <linux/math.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

/*
 * The CRC32C of the entries in the list, which stand in pages that may have
 * been overwritten as well: it is not followed to where nothing can be read, nor
 * for more than @entries, which is set to what was found.
 */
static u32 crc_of_list(const struct kimage *image, u64 *entries)
{
	const kimage_entry_t *ptr = &image->head;
	kimage_entry_t entry;
	u64 limit = *entries;
	u32 crc = ~0;

	for (*entries = 0; *entries < limit; ++*entries) {
		if (get_kernel_nofault(entry, ptr))
			break;

		ptr++;
		crc = crc32c(crc, &entry, sizeof(entry));
		if (entry & IND_DONE) {
			++*entries;
			break;
		}

		if (entry & IND_INDIRECTION)
			ptr = phys_to_virt(entry & PAGE_MASK);
	}

	return crc;
}

/**
 * struct segment_pages - the pages that a segment was loaded into, in order
 * @image: image that the segment is a part of
 * @n: number of the segment
 * @entry: what comes next in the list, unless the segment is in place
 * @found: the list has come to the segment
 * @at: how far into the segment the next page is, bytes
 */
struct segment_pages {
	const struct kimage *image;
	unsigned long n;
	const kimage_entry_t *entry;
	bool found;
	unsigned long at;
};

static struct segment_pages pages_of_segment(const struct kimage *image, unsigned long n)
{
	return (struct segment_pages) {
		.image	= image,
		.n	= n,
		.entry	= &image->head,
	};
}

/* The next page; NULL if the list, which has been verified, ends before */
static void *next_page(struct segment_pages *pages)
{
	unsigned long mem = pages->image->segment[pages->n].mem;
	kimage_entry_t entry;

	if (pages->image->segment_cma[pages->n]) {
		pages->at += PAGE_SIZE;
		return phys_to_virt(mem + pages->at - PAGE_SIZE);
	}

	while ((entry = *pages->entry) && !(entry & IND_DONE)) {
		void *page = phys_to_virt(entry & PAGE_MASK);

		pages->entry++;
		if (entry & IND_INDIRECTION) {
			pages->entry = page;
		} else if (entry & IND_DESTINATION) {
			pages->found = (entry & PAGE_MASK) == mem;
		} else if (pages->found) {
			pages->at += PAGE_SIZE;
			return page;
		}
	}

	return NULL;
}

static void skip_pages(struct segment_pages *pages, unsigned long end)
{
	while (pages->at < end && next_page(pages))
		;
}

/* What @crc becomes by the pages up to @end, bytes from the segment's start */
static u32 crc_of_pages(u32 crc, struct segment_pages *pages, unsigned long end)
{
	void *page;

	while (pages->at < end && (page = next_page(pages))) {
		crc = crc32c(crc, page, PAGE_SIZE);
		/* A segment may have gigabytes */
		if (!irqs_disabled())
			cond_resched();
	}

	return crc;
}

/* IMA writes to its segment until the system is shut down */
static bool may_change(const struct kimage *image, unsigned long n)
{
#ifdef CONFIG_IMA_KEXEC
	return image->is_ima_segment_index_set && n == image->ima_segment_index;
#else
	return false;
#endif
}

static u32 crc_of_segment(const struct kimage *image, unsigned long n)
{
	struct segment_pages pages = pages_of_segment(image, n);

	return crc_of_pages(~0, &pages, image->segment[n].memsz);
}

/**
 * kexec_verify_init() - compute what is to be verified later
 * @image: image with all its segments loaded
 * @args: arguments in the control page, or NULL if there is nothing to move
 *
 * A crash kernel is entered whatever has become of it: there is nothing to go
 * back to.
 *
 * Without FEAT_CRC32 it would take a table, and many times as long: verification
 * is off then, and the log says so.
 *
 * Context: process context.
 */
void kexec_verify_init(struct kimage *image, struct kexec_control_args *args)
{
	struct kexec_control_crc *crc = args ? args->crc : NULL;
	unsigned long i;

	BUILD_BUG_ON(ARRAY_SIZE(image->arch.crc) < KEXEC_SEGMENT_MAX);
	BUILD_BUG_ON(ARRAY_SIZE(args->crc) < KEXEC_SEGMENT_MAX);

	if (image->type == KEXEC_TYPE_CRASH)
		return;

	image->arch.verify = cpus_have_final_cap(ARM64_HAS_CRC32);
	if (!image->arch.verify) {
		pr_info_once("images are not verified: this CPU has no FEAT_CRC32\n");
		return;
	}

	for (i = 0; i < image->nr_segments; i++) {
		image->arch.crc[i] = crc_of_segment(image, i);
		if (crc && !image->segment_cma[i]) {
			crc->crc = image->arch.crc[i];
			crc->ignore = may_change(image, i);
			crc++;
		}
	}

	image->arch.list_entries = U64_MAX;
	image->arch.list_crc = crc_of_list(image, &image->arch.list_entries);

	if (args) {
		args->list.crc = image->arch.list_crc;
		args->list_entries = image->arch.list_entries;
		args->verify = true;
	}
}

/* The control page checks what it moves, and the list that it follows */
static bool passes_through(const struct kimage *image, unsigned long n)
{
	return image->arch.relocate && !image->segment_cma[n];
}

static int verify_list(const struct kimage *image)
{
	u64 entries = image->arch.list_entries;
	u32 crc = crc_of_list(image, &entries);

	if (crc != image->arch.list_crc) {
		pr_err("the list of pages was overwritten: CRC32C at load %#x, now %#x\n",
		       image->arch.list_crc, crc);
		return -EIO;
	}

	return 0;
}

static int compare_crc(const struct kimage *image, unsigned long n, u32 crc)
{
	if (may_change(image, n) || crc == image->arch.crc[n])
		return 0;

	pr_err("segment %lu was overwritten: CRC32C at load %#x, now %#x\n",
	       n, image->arch.crc[n], crc);
	return -EIO;
}

/* What a CPU takes of a segment at a time, bytes: pages of any size */
#define SHARE	SZ_256K

/*
 * What CPUs work on together. The lock of kexec is held: there is one image.
 *
 * @next: how much of the segment has been taken, bytes, a multiple of SHARE
 * @crc: the sum of what every CPU has found, and of what the CRC begins with
 */
static struct {
	const struct kimage *image;
	struct {
		atomic_long_t next;
		atomic_t crc;
	} segment[KEXEC_SEGMENT_MAX];
} shared;

/* The product of two polynomials modulo that of CRC32C. Bit 31 is the factor of x^0. */
static u32 crc32c_multiply(u32 a, u32 b)
{
	u32 product = 0;

	for (; a; a <<= 1) {
		if (a & BIT(31))
			product ^= b;
		b = (b >> 1) ^ (b & 1 ? CRC32C_POLY_LE : 0);
	}

	return product;
}

/* What @crc becomes by @bytes of zeroes: each multiplies it by x^8 */
static u32 crc32c_zeroes(u32 crc, unsigned long bytes)
{
	u32 power = BIT(31 - 8);

	for (; bytes; bytes >>= 1) {
		if (bytes & 1)
			crc = crc32c_multiply(crc, power);
		power = crc32c_multiply(power, power);
	}

	return crc;
}

/*
 * CRCs are linear: that of a segment is the sum of those of its parts, each with
 * zeroes in the place of what follows, if they begin with 0 instead of ~0.
 */
static void work_on_shares(struct work_struct *unused)
{
	const struct kimage *image = shared.image;
	unsigned long i, start, end, size;

	for (i = 0; i < image->nr_segments; i++) {
		struct segment_pages pages = pages_of_segment(image, i);

		size = image->segment[i].memsz;
		while ((start = atomic_long_fetch_add(SHARE, &shared.segment[i].next)) < size) {
			end = min(start + SHARE, size);
			skip_pages(&pages, start);
			atomic_xor(crc32c_zeroes(crc_of_pages(0, &pages, end), size - end),
				   &shared.segment[i].crc);
		}
	}
}

/*
 * Nobody is waited for who has not begun: a CPU may have other things to do, and
 * this one does all the work if it has to.
 */
static void share_work(const struct kimage *image)
{
	unsigned long i, helpers = 0;
	struct work_struct *work;

	shared.image = image;
	for (i = 0; i < image->nr_segments; i++) {
		unsigned long size = image->segment[i].memsz;

		atomic_long_set(&shared.segment[i].next, 0);
		atomic_set(&shared.segment[i].crc, crc32c_zeroes(~0, size));
		helpers += DIV_ROUND_UP(size, SHARE);
	}

	helpers = clamp(helpers, 1, num_online_cpus()) - 1;
	work = kmalloc_array(helpers, sizeof(*work), GFP_KERNEL | __GFP_NOWARN);
	if (!work)
		helpers = 0;

	for (i = 0; i < helpers; i++) {
		INIT_WORK(&work[i], work_on_shares);
		queue_work(system_dfl_wq, &work[i]);
	}

	work_on_shares(NULL);

	for (i = 0; i < helpers; i++)
		cancel_work_sync(&work[i]);

	kfree(work);
}

/**
 * kexec_verify() - is the image still what was loaded?
 * @image: image that is about to be executed
 *
 * All CPUs that have nothing else to do take a share.
 *
 * Context: process context, kexec lock held, before anything is shut down.
 *
 * Return: 0, or -EIO with a line in the log that names the segment, or the list.
 */
int kexec_verify(const struct kimage *image)
{
	unsigned long i;
	int ret;

	if (!image->arch.verify)
		return 0;

	ret = verify_list(image);
	if (ret)
		return ret;

	share_work(image);
	for (i = 0; !ret && i < image->nr_segments; i++)
		ret = compare_crc(image, i, atomic_read(&shared.segment[i].crc));

	return ret;
}

/**
 * kexec_verify_in_place() - is what the control page will not see what was loaded?
 * @image: image that is about to be entered
 *
 * The segments in place, and all of an image that has nothing to be moved.
 *
 * Context: the last CPU that is online, interrupts disabled, devices shut down.
 *
 * Return: 0, or -EIO with a line in the log that names the segment, or the list.
 */
int kexec_verify_in_place(const struct kimage *image)
{
	unsigned long i;
	int ret = 0;

	if (!image->arch.verify)
		return 0;

	/* Segments that are not in contiguous memory are found by the list */
	if (!image->arch.relocate)
		ret = verify_list(image);
	for (i = 0; !ret && i < image->nr_segments; i++) {
		if (!passes_through(image, i))
			ret = compare_crc(image, i, crc_of_segment(image, i));
	}

	return ret;
}

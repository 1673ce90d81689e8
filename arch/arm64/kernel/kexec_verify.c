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

#include <linux/cpufeature.h>
#include <linux/crc32.h>
#include <linux/irqflags.h>
#include <linux/kexec.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

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

static u32 crc_of_pages(u32 crc, const void *p, unsigned long bytes)
{
	/* A segment may have gigabytes */
	for (; bytes; p += PAGE_SIZE, bytes -= PAGE_SIZE) {
		crc = crc32c(crc, p, PAGE_SIZE);
		if (!irqs_disabled())
			cond_resched();
	}

	return crc;
}

/*
 * Segment @n was not loaded where it will be executed: go through the list, of
 * which is known that it is what it was
 */
static u32 crc_of_sources(const struct kimage *image, unsigned long n)
{
	unsigned long left = image->segment[n].memsz;
	const kimage_entry_t *ptr = &image->head;
	kimage_entry_t entry;
	bool found = false;
	u32 crc = ~0;

	while (left && (entry = *ptr++) && !(entry & IND_DONE)) {
		void *page = phys_to_virt(entry & PAGE_MASK);

		if (entry & IND_INDIRECTION) {
			ptr = page;
		} else if (entry & IND_DESTINATION) {
			found = (entry & PAGE_MASK) == image->segment[n].mem;
		} else if (found) {
			crc = crc_of_pages(crc, page, PAGE_SIZE);
			left -= PAGE_SIZE;
		}
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
	const struct kexec_segment *segment = &image->segment[n];

	if (image->segment_cma[n])
		return crc_of_pages(~0, phys_to_virt(segment->mem),
				    segment->memsz);

	return crc_of_sources(image, n);
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

static int verify_segment(const struct kimage *image, unsigned long n)
{
	u32 crc;

	if (may_change(image, n))
		return 0;

	crc = crc_of_segment(image, n);
	if (crc != image->arch.crc[n]) {
		pr_err("segment %lu was overwritten: CRC32C at load %#x, now %#x\n",
		       n, image->arch.crc[n], crc);
		return -EIO;
	}

	return 0;
}

/**
 * kexec_verify() - is the image still what was loaded?
 * @image: image that is about to be executed
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
	for (i = 0; !ret && i < image->nr_segments; i++)
		ret = verify_segment(image, i);

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
			ret = verify_segment(image, i);
	}

	return ret;
}

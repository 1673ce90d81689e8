// SPDX-License-Identifier: GPL-2.0-only
/*
 * kexec for arm64, see Documentation/arch/arm64/kexec.rst
 *
 * Everything that can fail happens when an image is loaded; machine_kexec()
 * only executes what was prepared then.
 *
 * Replaces the implementation by Geoff Levand, James Morse, AKASHI Takahiro
 * and Pavel Tatashin.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/align.h>
#include <linux/build_bug.h>
#include <linux/cacheflush.h>
#include <linux/cpu_pm.h>
#include <linux/cpufeature.h>
#include <linux/errno.h>
#include <linux/irqflags.h>
#include <linux/kexec.h>
#include <linux/list.h>
#include <linux/memblock.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mmu_context.h>
#include <linux/panic.h>
#include <linux/pgtable.h>
#include <linux/printk.h>
#include <linux/sizes.h>
#include <linux/smp.h>
#include <linux/stdarg.h>
#include <linux/string.h>

#include <asm/barrier.h>
#include <asm/daifflags.h>
#include <asm/memory.h>
#include <asm/sections.h>
#include <asm/setup.h>
#include <asm/trans_pgd.h>
#include <asm/virt.h>

/*
 * What `kexec -d` shows. kexec_load() has no flag to ask for it, so there it
 * takes dynamic debug.
 */
static __printf(1, 2) void kexec_info(const char *fmt, ...)
{
	struct va_format vaf = { .fmt = fmt };
	va_list args;

	va_start(args, fmt);
	vaf.va = &args;
	if (kexec_file_dbg_print)
		pr_info("%pV", &vaf);
	else
		pr_debug("%pV", &vaf);
	va_end(args);
}

/**
 * machine_kexec_cleanup() - forget what was prepared for an image
 * @image: image that is about to be freed
 *
 * All that machine_kexec_post_load() allocates are control pages of the image,
 * and the core frees those.
 */
void machine_kexec_cleanup(struct kimage *image)
{
}

static bool kexec_is_destination(const struct kimage *image, phys_addr_t start,
				 phys_addr_t size)
{
	unsigned long i;

	for (i = 0; i < image->nr_segments; i++) {
		const struct kexec_segment *segment = &image->segment[i];

		if (start < segment->mem + segment->memsz &&
		    segment->mem < start + size)
			return true;
	}

	return false;
}

static bool kexec_is_nomap(phys_addr_t start, phys_addr_t end)
{
	struct memblock_region *region;

	for_each_mem_region(region) {
		if (memblock_is_nomap(region) && start < region->base + region->size &&
		    region->base < end)
			return true;
	}

	return false;
}

/*
 * The segments are copied, or flushed, through mappings of memory. An address
 * that has none would be a fault beyond the point of no return.
 */
static int kexec_check_segments(const struct kimage *image)
{
	unsigned long i;

	for (i = 0; i < image->nr_segments; i++) {
		phys_addr_t start = image->segment[i].mem;
		phys_addr_t end = start + image->segment[i].memsz;
		bool covered, nomap;

		get_online_mems();
		covered = trans_pgd_linear_covers(start, end);
		nomap = kexec_is_nomap(start, end);
		put_online_mems();
		if (covered)
			continue;

		if (nomap) {
			return kexec_refuse(-EACCES,
					    "segment %lu: %pa-%pa has memory that firmware keeps (no-map)",
					    i, &start, &end);
		}

		return kexec_refuse(-EADDRNOTAVAIL, "segment %lu: %pa-%pa is not all memory",
				    i, &start, &end);
	}

	if (!kexec_is_destination(image, image->start, 4))
		pr_warn("entry %#lx is not in a segment\n", image->start);

	return 0;
}

/*
 * An arm64 kernel drops what is beyond this length, and boots without the
 * parameters that stood there.
 */
static int kexec_check_cmdline(const struct kimage *image)
{
#ifdef CONFIG_KEXEC_FILE
	/* Both count the NUL at the end */
	if (image->cmdline_buf_len > COMMAND_LINE_SIZE)
		return kexec_refuse(-E2BIG,
				    "a command line of %lu characters, of which an arm64 kernel takes %d at most",
				    image->cmdline_buf_len - 1, COMMAND_LINE_SIZE - 1);
#endif
	return 0;
}

/**
 * machine_kexec_prepare() - refuse what could not be executed
 * @image: image with its segments known, but not loaded yet
 *
 * Context: process context, kexec lock held.
 *
 * Return: 0, -EBUSY if a CPU could not leave the kernel that is about to be
 * overwritten, -EADDRNOTAVAIL if a destination is not memory, -EACCES if it is
 * memory that must not be mapped, -E2BIG if the command line is too long.
 */
int machine_kexec_prepare(struct kimage *image)
{
	int ret;

	if (image->type != KEXEC_TYPE_CRASH) {
		ret = kexec_check_cpus();
		if (ret)
			return ret;
	}

	ret = kexec_check_segments(image);
	if (ret)
		return ret;

	return kexec_check_cmdline(image);
}

static void *kexec_alloc_table(void *arg)
{
	struct page *page = kimage_alloc_control_pages(arg, 0);

	if (!page)
		return NULL;

	clear_page(page_address(page));
	return page_address(page);
}

/* How many pages the transitional tables take, without building them */
static unsigned int kexec_count_tables(phys_addr_t control_page)
{
	struct trans_pgd linear = { }, idmap = { };

	get_online_mems();
	trans_pgd_create_linear(&linear);
	put_online_mems();
	trans_pgd_create_idmap(&idmap, control_page,
			       PAGE_ALIGN(KEXEC_CONTROL_PAGE_SIZE));

	return linear.nr_pages + idmap.nr_pages;
}

/* How much of the image is not where it has to be yet, in bytes */
static unsigned long kexec_bytes_to_move(const struct kimage *image)
{
	const kimage_entry_t *ptr = &image->head;
	unsigned long dest = 0, bytes = 0;
	kimage_entry_t entry;

	while ((entry = *ptr++) && !(entry & IND_DONE)) {
		unsigned long addr = entry & PAGE_MASK;

		if (entry & IND_INDIRECTION) {
			ptr = phys_to_virt(addr);
		} else if (entry & IND_DESTINATION) {
			dest = addr;
		} else if (entry & IND_SOURCE) {
			if (addr != dest)
				bytes += PAGE_SIZE;
			dest += PAGE_SIZE;
		}
	}

	return bytes;
}

/* Tell what was loaded, and remember how much of it has to be moved */
static void kexec_image_info(struct kimage *image)
{
	unsigned long i, total = 0, bytes = kexec_bytes_to_move(image);

	for (i = 0; i < image->nr_segments; i++) {
		phys_addr_t start = image->segment[i].mem;
		phys_addr_t end = start + image->segment[i].memsz;

		kexec_info("segment %lu: %pa-%pa, %zu bytes\n", i, &start, &end,
			   image->segment[i].memsz);
		total += image->segment[i].memsz;
	}

	kexec_info("%lu bytes to move\n", bytes);
	kexec_info("%lu bytes in place\n", total - bytes);

	image->arch.bytes_to_move = bytes;
	image->arch.bytes_in_place = total - bytes;
	image->arch.relocate = bytes;
}

/*
 * Segments that were loaded where they will be executed never pass through the
 * control page, which would clean them to the PoC and drop what the I-cache holds
 * of them. Nobody writes to them any more, so now is as good a time. (IMA still
 * does, to the list that it hands over, but that is read with the MMU and the
 * caches on.)
 */
static void kexec_flush_in_place(const struct kimage *image, bool all)
{
	unsigned long i;

	for (i = 0; i < image->nr_segments; i++) {
		unsigned long start;

		if (!all && !image->segment_cma[i])
			continue;

		start = (unsigned long)phys_to_virt(image->segment[i].mem);
		dcache_clean_inval_poc(start, start + image->segment[i].memsz);
	}

	icache_inval_all_pou();
}

/* The arguments in the control page of @image, in the linear map */
static struct kexec_control_args *kexec_args(const struct kimage *image)
{
	return page_address(image->control_code_page) + KEXEC_ARGS_OFFSET;
}

/*
 * The block that DC ZVA zeroes, if it may be used. The control page zeroes four
 * of them at a time, and 4 KiB in a row.
 */
static u64 kexec_zva_block(void)
{
	u64 dczid = read_sanitised_ftr_reg(SYS_DCZID_EL0);
	u64 size = 4ULL << SYS_FIELD_GET(DCZID_EL0, BS, dczid);

	return SYS_FIELD_GET(DCZID_EL0, DZP, dczid) || size > SZ_1K ? 0 : size;
}

static void kexec_fill_control_page(struct kimage *image, u64 ttbr1)
{
	struct kexec_control_args *args = kexec_args(image);
	char *page = page_address(image->control_code_page);
	unsigned long start = (unsigned long)page;
	struct kexec_control_crc *crc = args->crc;
	unsigned long i;
	u64 *handler;

	BUILD_BUG_ON(KEXEC_ARGS_OFFSET + sizeof(*args) > KEXEC_CONTROL_PAGE_SIZE);

	memcpy(page, __relocate_new_kernel_start,
	       __relocate_new_kernel_end - __relocate_new_kernel_start);
	memcpy(page + TRANS_PGD_VECTORS_OFFSET, trans_pgd_vectors,
	       ARM64_VECTOR_TABLE_LEN);

	handler = (u64 *)(page + TRANS_PGD_VECTORS_OFFSET + TRANS_PGD_HANDLER_OFFSET);
	*handler = virt_to_phys(page) + (kexec_fault - __relocate_new_kernel_start);

	*args = (struct kexec_control_args) {
		.ttbr1		= ttbr1,
		.reserved_ttbr1	= __pa_symbol(reserved_pg_dir),
		.va_offset	= PAGE_OFFSET - PHYS_OFFSET,
		.head		= image->head,
		.start		= image->start,
		.dtb_mem	= image->arch.dtb_mem,
		.el2		= is_hyp_nvhe(),
		.zva		= kexec_zva_block(),
	};
	/* Segments in place are not in the list */
	for (i = 0; i < image->nr_segments; i++) {
		if (!image->segment_cma[i])
			(crc++)->segment = i;
	}

	kexec_report_init(args);
	kexec_verify_init(image, args);

	/*
	 * Clean to the PoC: its end is executed with the MMU off, and so are
	 * the vectors at EL2. Then drop what the I-cache holds of the page.
	 */
	dcache_clean_inval_poc(start, start + KEXEC_CONTROL_PAGE_SIZE);
	icache_inval_pou(start, start + KEXEC_CONTROL_PAGE_SIZE);
}

/*
 * What relocation still has to read must not be overwritten by it. The core
 * allocates pages accordingly; that it did costs little to check. And it has to
 * be mapped, which memory is not that firmware kept, and that was added later.
 */
static int kexec_check_pages(const struct kimage *image)
{
	const kimage_entry_t *ptr = &image->head;
	struct page *page;
	kimage_entry_t entry;
	phys_addr_t dest = 0;

	while ((entry = *ptr++) && !(entry & IND_DONE)) {
		phys_addr_t addr = entry & PAGE_MASK;
		bool clash = false;

		if (entry & IND_INDIRECTION) {
			ptr = phys_to_virt(addr);
			clash = kexec_is_destination(image, addr, PAGE_SIZE);
		} else if (entry & IND_DESTINATION) {
			dest = addr;
		} else if (entry & IND_SOURCE) {
			clash = addr != dest &&
				kexec_is_destination(image, addr, PAGE_SIZE);
			dest += PAGE_SIZE;
		}

		if (clash)
			return kexec_refuse(-EADDRINUSE,
					    "page %pa is still needed while it is overwritten",
					    &addr);

		if (entry & (IND_INDIRECTION | IND_SOURCE) &&
		    !memblock_is_map_memory(addr))
			return kexec_refuse(-EADDRNOTAVAIL,
					    "page %pa is in memory that relocation does not map",
					    &addr);
	}

	list_for_each_entry(page, &image->control_pages, lru) {
		phys_addr_t addr = page_to_phys(page);
		phys_addr_t size = PAGE_SIZE << page_private(page);

		if (kexec_is_destination(image, addr, size))
			return kexec_refuse(-EADDRINUSE,
					    "control page %pa would be overwritten", &addr);
	}

	return 0;
}

/**
 * machine_kexec_post_load() - prepare everything that relocation needs
 * @image: image with all its segments loaded; the control page and the table
 *         pages become its control pages, outside of every destination
 *
 * An image with nothing to move (a crash kernel, segments in contiguous memory
 * that was claimed for good) gets flushed and CRCs (a crash kernel has none).
 *
 * Context: process context, kexec lock held.
 *
 * Return: 0; -ENOMEM; -EADDRINUSE if a page of the image itself lies in a
 * destination; -EADDRNOTAVAIL if one is in memory that relocation does not map.
 * What was loaded before @image stays loaded, unless it is a crash kernel: the
 * core frees one before it loads another into the same memory.
 */
int machine_kexec_post_load(struct kimage *image)
{
	void *page = page_address(image->control_code_page);
	struct trans_pgd linear = {
		.alloc_table	= kexec_alloc_table,
		.alloc_arg	= image,
	};
	struct trans_pgd idmap = linear;
	int ret;

	kexec_image_info(image);
	kexec_flush_in_place(image, !image->arch.relocate);
	if (!image->arch.relocate) {
		kexec_info("0 table pages\n");
		kexec_verify_init(image, NULL);
		return 0;
	}

	get_online_mems();
	ret = trans_pgd_create_linear(&linear);
	put_online_mems();
	if (!ret)
		ret = trans_pgd_create_idmap(&idmap, virt_to_phys(page),
					     PAGE_ALIGN(KEXEC_CONTROL_PAGE_SIZE));
	if (ret)
		return kexec_refuse(ret, "no transitional page tables, but %u of %u pages",
				    linear.nr_pages + idmap.nr_pages,
				    kexec_count_tables(virt_to_phys(page)));

	kexec_info("%u table pages\n", linear.nr_pages + idmap.nr_pages);

	get_online_mems();
	ret = kexec_check_pages(image);
	put_online_mems();
	if (ret)
		return ret;

	image->arch.ttbr0 = phys_to_ttbr(virt_to_phys(idmap.root));
	image->arch.t0sz = TCR_T0SZ(idmap.va_bits);
	kexec_fill_control_page(image, virt_to_phys(linear.root));

	return 0;
}

#ifdef CONFIG_HIBERNATION
static void kexec_clean_again(const struct kimage *image)
{
	unsigned long start;

	if (!image)
		return;

	kexec_flush_in_place(image, !image->arch.relocate);
	if (image->arch.relocate) {
		start = (unsigned long)page_address(image->control_code_page);
		dcache_clean_inval_poc(start, start + KEXEC_CONTROL_PAGE_SIZE);
	}

	pr_debug("%s image cleaned after hibernation, %lu bytes in place\n",
		 image == kexec_crash_image ? "crash" : "loaded",
		 image->arch.bytes_in_place);
}

/**
 * machine_kexec_resumed() - clean what is loaded to the PoC again
 *
 * Once loaded, this was cleaned, so that it can be read with the MMU off. But
 * hibernate has written it anew, through the caches, and has cleaned it no
 * further than to the PoU.
 *
 * Context: resuming from hibernation, one CPU, interrupts masked; the crash
 * kernel is not protected yet.
 */
void machine_kexec_resumed(void)
{
	kexec_clean_again(kexec_image);
	kexec_clean_again(kexec_crash_image);
}
#endif /* CONFIG_HIBERNATION */

/*
 * An error that an access of this kernel, or of a device that it shut down, led
 * to is not the next kernel's. Take it while there are vectors that report it;
 * the control page does so by itself. Those that can be gone on after come back.
 */
static void kexec_take_serrors(void)
{
	dsb(sy);		/* what has not failed by now will not */
	local_daif_restore(DAIF_PROCCTX_NOIRQ);
	isb();			/* one that is pending is taken here */
	local_daif_mask();
}

/**
 * machine_kexec_verify() - the image is to be executed: may it be?
 * @image: image that was loaded
 *
 * Context: process context, kexec lock held, before anything is shut down.
 *
 * Return: 0, or -EIO if @image is not what it was when it was loaded.
 */
int machine_kexec_verify(const struct kimage *image)
{
	kexec_timing_mark(KEXEC_TIMING_BEGIN);

	return kexec_verify(image);
}

/**
 * machine_kexec() - leave this kernel and enter @image
 * @image: image that was loaded
 *
 * The code that is called here has no type hash in front of it that CFI could
 * check: the control page begins with it, and the identity map may.
 *
 * Context: process context on the CPU that stays, devices shut down, CPU hotplug
 * disabled; or the crashing CPU. Does not return.
 */
void __nocfi machine_kexec(struct kimage *image)
{
	bool crash = image == kexec_crash_image;
	bool stuck = cpus_are_stuck_in_kernel();

	WARN(crash && (stuck || smp_crash_stop_failed()),
	     "Some CPUs may be stale, kdump will be unreliable.\n");

	if (!crash) {
		/* A CPU may have got stuck, or come online, after the image was loaded */
		if (stuck)
			panic("kexec: this kernel can't be replaced: %s\n",
			      cpus_stuck_reason());
		kexec_timing_mark(KEXEC_TIMING_DEVICES);
		kexec_stop_cpus();
		kexec_timing_mark(KEXEC_TIMING_CPUS);

		/*
		 * Nothing is overwritten yet and this kernel is whole, so what is
		 * wrong with the image can be told by a panic(). Interrupt handlers,
		 * and the interrupt controller itself, are the last that could have
		 * written to it.
		 */
		local_irq_disable();
		machine_kexec_shutdown_irqchip();
		if (kexec_verify_in_place(image))
			panic("kexec: the image was overwritten while the system was shut down\n");
	}

	pr_info("Bye!\n");

	local_daif_mask();
	/* As the other CPUs did, and for what they share with this one */
	if (!crash)
		cpu_pm_enter();

	/* Neither way returns */
	if (image->arch.relocate) {
		struct kexec_control_args *args = kexec_args(image);
		phys_addr_t control = page_to_phys(image->control_code_page);
		void (*relocate)(void) = (void *)control;

		/* What ends a fault reads it with the MMU off */
		args->panic_timeout = panic_timeout;
		kexec_report_leave(args);
		kexec_timing_leave(image, args);
		dcache_clean_inval_poc((unsigned long)args,
				       (unsigned long)(args + 1));

		if (is_hyp_nvhe())
			__hyp_set_vectors(control + TRANS_PGD_VECTORS_OFFSET);
		cpu_install_ttbr0(image->arch.ttbr0, image->arch.t0sz);
		relocate();
	} else {
		typeof(cpu_soft_restart) *restart;

		restart = (void *)__pa_symbol(cpu_soft_restart);
		kexec_timing_leave(image, NULL);
		if (!crash)
			kexec_take_serrors();
		cpu_install_idmap();
		restart(is_hyp_nvhe(), image->start, image->arch.dtb_mem, 0, 0);
	}
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * The way into the crash kernel, and what hibernate has to know about it
 *
 * Replaces the implementation by AKASHI Takahiro and James Morse.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/cleanup.h>
#include <linux/init.h>
#include <linux/ioport.h>
#include <linux/irq.h>
#include <linux/irqflags.h>
#include <linux/kexec.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pfn.h>
#include <linux/printk.h>
#include <linux/reboot.h>
#include <linux/set_memory.h>
#include <linux/smp.h>
#include <linux/suspend.h>
#include <linux/vmalloc.h>
#include <linux/vmcore_info.h>

/**
 * machine_crash_shutdown() - stop the other CPUs, save this one's registers
 * @regs: registers for the dump, see crash_setup_regs()
 *
 * Context: the crashing CPU, in whatever state the crash left it.
 */
void machine_crash_shutdown(struct pt_regs *regs)
{
	local_irq_disable();

	/* Each of them saves its own registers before it stops */
	crash_smp_send_stop();

	crash_save_cpu(regs, smp_processor_id());
	machine_kexec_mask_interrupts();

	pr_info("Starting crashdump kernel...\n");
}

/*
 * The pages that hold the loaded crash kernel, and the one of the reservation
 * that the kernel itself writes to when it crashes, through another mapping. They
 * are remembered, as hibernate asks for them when the image may be exchanged.
 */
static struct {
	unsigned long address;	/* in the linear map */
	unsigned long nr_pages;
} crash_pages[KEXEC_SEGMENT_MAX + 1];

static unsigned int nr_crash_pages;
static bool crash_protection_paused;
static DEFINE_MUTEX(crash_pages_lock);

static void crash_pages_add(void *address, unsigned long bytes)
{
	if (!bytes)
		return;

	crash_pages[nr_crash_pages].address = (unsigned long)address;
	crash_pages[nr_crash_pages++].nr_pages = PFN_UP(bytes);
}

static int crash_pages_set_valid(bool valid)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; i < nr_crash_pages; i++) {
		int err = set_memory_valid(crash_pages[i].address,
					   crash_pages[i].nr_pages, valid);

		if (err)
			ret = err;
	}

	return ret;
}

static void crash_pages_protect(void)
{
	int ret = crash_pages_set_valid(false);

	if (ret) {
		pr_warn("the loaded crash kernel is not protected: error %d\n", ret);
		crash_pages_set_valid(true);
	}
}

/**
 * arch_kexec_protect_crashkres() - keep stray writes out of the crash kernel
 *
 * What was loaded becomes invalid in the linear map. Nothing needs it there to
 * enter the crash kernel: that was cleaned to the PoC when it was loaded. The
 * map is not made any finer for this than the configuration has it anyway:
 * page mappings cost every other access.
 *
 * Context: process context, a crash image is loaded and stays so.
 */
void arch_kexec_protect_crashkres(void)
{
	const struct kexec_segment *segment = kexec_crash_image->segment;
	void *note = kexec_crash_image->vmcoreinfo_data_copy;
	unsigned long i;

	if (!can_set_direct_map()) {
		pr_info_once("the loaded crash kernel is not protected: the linear map is made of blocks (see rodata=)\n");
		return;
	}

	guard(mutex)(&crash_pages_lock);

	nr_crash_pages = 0;
	for (i = 0; i < kexec_crash_image->nr_segments; i++, segment++)
		crash_pages_add(phys_to_virt(segment->mem), segment->memsz);
	if (note)
		crash_pages_add(page_address(vmalloc_to_page(note)), VMCOREINFO_BYTES);

	if (!crash_protection_paused)
		crash_pages_protect();
}

/**
 * arch_kexec_unprotect_crashkres() - let the crash kernel be accessed again
 *
 * To be loaded anew, unloaded, or read.
 *
 * Context: process context.
 */
void arch_kexec_unprotect_crashkres(void)
{
	guard(mutex)(&crash_pages_lock);

	crash_pages_set_valid(true);
	nr_crash_pages = 0;
}

#ifdef CONFIG_HIBERNATION
/*
 * Hibernate takes a reserved page for a hole if the linear map does not have
 * it, and counts pages long before it saves them. So it gets to see the loaded
 * crash kernel from its beginning to its end.
 */
static int crash_pm_notify(struct notifier_block *nb, unsigned long mode,
			   void *unused)
{
	guard(mutex)(&crash_pages_lock);

	switch (mode) {
	case PM_HIBERNATION_PREPARE:
		crash_protection_paused = true;
		crash_pages_set_valid(true);
		break;
	case PM_POST_HIBERNATION:
		crash_protection_paused = false;
		crash_pages_protect();
		break;
	}

	return NOTIFY_DONE;
}

static struct notifier_block crash_pm_notifier = {
	.notifier_call = crash_pm_notify,
};

static int __init crash_pm_init(void)
{
	return register_pm_notifier(&crash_pm_notifier);
}
core_initcall(crash_pm_init);

static bool reservation_holds(const struct resource *res, phys_addr_t addr)
{
	return res->end && addr >= res->start && addr <= res->end;
}

static bool crash_image_holds(phys_addr_t addr)
{
	const struct kexec_segment *segment = kexec_crash_image->segment;
	void *note = kexec_crash_image->vmcoreinfo_data_copy;
	unsigned long i;

	if (note && PHYS_PFN(addr) == vmalloc_to_pfn(note))
		return true;

	for (i = 0; i < kexec_crash_image->nr_segments; i++, segment++) {
		if (addr - segment->mem < segment->memsz)
			return true;
	}

	return false;
}

/**
 * crash_is_nosave() - may hibernate leave out this page of the reservation?
 * @pfn: page frame number of any page
 *
 * The crashkernel reservation holds nothing but the loaded crash kernel, if
 * there is one, and the page that a crash writes VMCOREINFO to. The pages are
 * marked reserved, as firmware's are, and those hibernate would save.
 *
 * Context: any; the crash image does not change while hibernate asks.
 *
 * Return: true for a page of the reservation that holds neither.
 */
bool crash_is_nosave(unsigned long pfn)
{
	phys_addr_t addr = PFN_PHYS(pfn);

	if (!reservation_holds(&crashk_res, addr) &&
	    !reservation_holds(&crashk_low_res, addr))
		return false;

	return !kexec_crash_image || !crash_image_holds(addr);
}
#endif /* CONFIG_HIBERNATION */

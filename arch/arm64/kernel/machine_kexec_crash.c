// SPDX-License-Identifier: GPL-2.0-only
/*
 * The way into the crash kernel, and what hibernate has to know about it
 *
 * Replaces the implementation by AKASHI Takahiro and James Morse.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/ioport.h>
#include <linux/irq.h>
#include <linux/irqflags.h>
#include <linux/kexec.h>
#include <linux/mm.h>
#include <linux/pfn.h>
#include <linux/printk.h>
#include <linux/reboot.h>
#include <linux/set_memory.h>
#include <linux/smp.h>
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
 * The linear map has the loaded crash kernel, and the page of the reservation
 * that the kernel itself writes to when it crashes, through another mapping.
 */
static int crash_image_set_valid(bool valid)
{
	const struct kexec_segment *segment = kexec_crash_image->segment;
	void *note = kexec_crash_image->vmcoreinfo_data_copy;
	unsigned long i;
	int ret = 0;

	for (i = 0; !ret && i < kexec_crash_image->nr_segments; i++, segment++)
		ret = set_memory_valid((unsigned long)phys_to_virt(segment->mem),
				       PFN_UP(segment->memsz), valid);

	if (!ret && note)
		ret = set_memory_valid((unsigned long)page_address(vmalloc_to_page(note)),
				       PFN_UP(VMCOREINFO_BYTES), valid);

	return ret;
}

/**
 * arch_kexec_protect_crashkres() - keep stray writes out of the crash kernel
 *
 * What was loaded becomes invalid in the linear map. Nothing needs it there to
 * enter the crash kernel: that was cleaned to the PoC when it was loaded. The
 * map is not made any finer for this than the configuration has it anyway:
 * page mappings cost every other access.
 *
 * Context: process context, kexec lock held, a crash image is loaded; or the
 * last CPU that is online, on its way out of hibernation.
 */
void arch_kexec_protect_crashkres(void)
{
	int ret;

	if (!can_set_direct_map()) {
		pr_info_once("the loaded crash kernel is not protected: the linear map is made of blocks (see rodata=)\n");
		return;
	}

	ret = crash_image_set_valid(false);
	if (ret) {
		pr_warn("the loaded crash kernel is not protected: error %d\n", ret);
		crash_image_set_valid(true);
	}
}

/**
 * arch_kexec_unprotect_crashkres() - let the crash kernel be accessed again
 *
 * To be loaded anew, unloaded, updated, or saved by hibernate.
 *
 * Context: see arch_kexec_protect_crashkres().
 */
void arch_kexec_unprotect_crashkres(void)
{
	if (can_set_direct_map())
		crash_image_set_valid(true);
}

#ifdef CONFIG_HIBERNATION
/**
 * crash_prepare_suspend() - let hibernate read the loaded crash kernel
 *
 * Context: the last CPU that is online, interrupts off.
 */
void crash_prepare_suspend(void)
{
	if (kexec_crash_image)
		arch_kexec_unprotect_crashkres();
}

/**
 * crash_post_resume() - protect the loaded crash kernel again
 *
 * Context: see crash_prepare_suspend().
 */
void crash_post_resume(void)
{
	if (kexec_crash_image)
		arch_kexec_protect_crashkres();
}

static bool reservation_holds(const struct resource *res, phys_addr_t addr)
{
	return res->end && addr >= res->start && addr <= res->end;
}

static bool crash_image_holds(phys_addr_t addr)
{
	const struct kexec_segment *segment = kexec_crash_image->segment;
	unsigned long i;

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
 * there is one. The pages are marked reserved, as firmware's are, and those
 * hibernate would save.
 *
 * Context: any; the crash image does not change while hibernate asks.
 *
 * Return: true for a page of the reservation that no segment covers.
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

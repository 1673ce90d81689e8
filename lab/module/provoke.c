// SPDX-License-Identifier: GPL-2.0-only
/*
 * provoke - do to a kernel what it should survive, or crash from
 *
 *   how=null cpu=N       dereference NULL in process context on CPU N
 *   how=interrupt cpu=N  the same in an interrupt
 *   how=spin cpu=N       panic while CPU N spins with its interrupts masked
 *   how=warn             a warning
 *   how=write ranges=START,SIZE,...
 *                        write to each page of these physical ranges through the
 *                        linear map, and tell how many writes landed
 *   how=read ranges=...  the same, reading
 *   how=litter ranges=0,STEP
 *                        take one page in each STEP bytes of memory, for good
 *   how=slabs ranges=END,STEP
 *                        the same below END, and have them look like slabs
 *   how=dma ranges=0,SIZE
 *                        allocate SIZE bytes, one MiB at a time, as a driver does
 *                        whose device reaches 4 GiB, and give them back
 *   how=store ranges=START,1
 *                        a plain store to the first of them
 *   how=lock cpu=N ranges=0,MS
 *                        have CPU N hold a spinlock most of that time, with
 *                        interrupts enabled, which another one takes with
 *                        interrupts disabled
 *
 * Never stays loaded.
 */
#include <linux/bitmap.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/irq_work.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/sizes.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#define MAX_RANGES 32

static char *how = "";
module_param(how, charp, 0);
static int cpu;
module_param(cpu, int, 0);
static unsigned long ranges[2 * MAX_RANGES];
static unsigned int range_words;
module_param_array(ranges, ulong, &range_words, 0);

static volatile int *nowhere;

static noinline long dereference(void *unused)
{
	return *nowhere = 1;
}

static void in_interrupt_do(struct irq_work *unused)
{
	dereference(NULL);
}

static DEFINE_IRQ_WORK(work, in_interrupt_do);

static long interrupt(void *unused)
{
	irq_work_queue(&work);
	mdelay(1000);
	return 0;
}

static void spin(void *unused)
{
	local_irq_disable();
	for (;;)
		cpu_relax();
}

/* Not on the CPU that is to spin */
static long panic_beside(void *unused)
{
	smp_call_function_single(cpu, spin, NULL, 0);
	mdelay(100);
	panic("provoked");
}

static bool touch(unsigned long address, bool write)
{
	u8 *byte = phys_to_virt(address), old;

	__get_kernel_nofault(&old, byte, u8, unreadable);
	if (!write)
		return true;
	old ^= 0xff;
	__put_kernel_nofault(byte, &old, u8, unwritable);
	return true;

unreadable:
	/* What can't be read may still take a write */
	old = 0xff;
	if (write)
		__put_kernel_nofault(byte, &old, u8, unwritable);
	return write;
unwritable:
	return false;
}

static void touch_ranges(bool write)
{
	unsigned long i, at, done = 0, faults = 0;

	for (i = 0; i + 1 < range_words; i += 2) {
		for (at = ranges[i]; at < ranges[i] + ranges[i + 1]; at += PAGE_SIZE) {
			if (touch(at, write))
				done++;
			else
				faults++;
		}
	}

	pr_info("provoke: %lu pages, %lu faults\n", done + faults, faults);
}

/* All free memory is taken for a moment: a page that is kept may be anywhere */
static void litter(unsigned long end, unsigned long step, bool slabs)
{
	static DECLARE_BITMAP(littered, 1 << 16);
	struct page *page, *next;
	unsigned long kept = 0;
	LIST_HEAD(pages);

	while ((page = alloc_page(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN)))
		list_add(&page->lru, &pages);

	list_for_each_entry_safe(page, next, &pages, lru) {
		list_del(&page->lru);
		if (page_to_phys(page) >= end ||
		    test_and_set_bit(page_to_phys(page) / step % (1 << 16), littered)) {
			__free_page(page);
			continue;
		}
		kept++;
		if (slabs) {
			__SetPageSlab(page);
			page_ref_freeze(page, 1);
		}
	}
	pr_info("provoke: %lu pages, 0 faults\n", kept);
}

/* "pages" are buffers, "faults" those that could not be had */
static int dma(unsigned long size)
{
	unsigned long i, count = size / SZ_1M, faults = 0;
	struct platform_device *pdev;
	dma_addr_t *addresses;
	void **buffers;

	buffers = kvcalloc(count, sizeof(*buffers), GFP_KERNEL);
	addresses = kvcalloc(count, sizeof(*addresses), GFP_KERNEL);
	pdev = platform_device_register_simple("provoke", PLATFORM_DEVID_NONE, NULL, 0);
	if (!buffers || !addresses || IS_ERR(pdev) ||
	    dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(32)))
		return -EINVAL;

	for (i = 0; i < count; i++) {
		buffers[i] = dma_alloc_coherent(&pdev->dev, SZ_1M, &addresses[i],
						GFP_KERNEL | __GFP_NOWARN);
		if (!buffers[i] || addresses[i] + SZ_1M > SZ_4G)
			faults++;
	}
	for (i = 0; i < count; i++)
		if (buffers[i])
			dma_free_coherent(&pdev->dev, SZ_1M, buffers[i], addresses[i]);

	platform_device_unregister(pdev);
	kvfree(addresses);
	kvfree(buffers);
	pr_info("provoke: %lu pages, %lu faults\n", count, faults);
	return 0;
}

static DEFINE_SPINLOCK(contended);

static void take_and_give(struct work_struct *unused)
{
	unsigned long end = jiffies + msecs_to_jiffies(ranges[1]);

	while (time_before(jiffies, end)) {
		spin_lock(&contended);
		mdelay(5);
		spin_unlock(&contended);
		cond_resched();
	}
}

static DECLARE_WORK(taker, take_and_give);

static long wait_for_it(void *unused)
{
	unsigned long end = jiffies + msecs_to_jiffies(ranges[1]);
	unsigned long flags;

	while (time_before(jiffies, end)) {
		spin_lock_irqsave(&contended, flags);
		spin_unlock_irqrestore(&contended, flags);
		cond_resched();
	}
	return 0;
}

static void contend(void)
{
	schedule_work_on(cpu, &taker);
	work_on_cpu(cpumask_any_but(cpu_online_mask, cpu), wait_for_it, NULL);
	flush_work(&taker);
}

static int __init provoke(void)
{
	if (!strcmp(how, "null")) {
		work_on_cpu(cpu, dereference, NULL);
	} else if (!strcmp(how, "interrupt")) {
		work_on_cpu(cpu, interrupt, NULL);
	} else if (!strcmp(how, "spin")) {
		work_on_cpu(cpumask_any_but(cpu_online_mask, cpu), panic_beside, NULL);
	} else if (!strcmp(how, "warn")) {
		WARN(1, "provoked\n");
	} else if (!strcmp(how, "write") || !strcmp(how, "read")) {
		touch_ranges(how[0] == 'w');
	} else if (!strcmp(how, "litter") && range_words == 2) {
		litter(ULONG_MAX, ranges[1], false);
	} else if (!strcmp(how, "slabs") && range_words == 2) {
		litter(ranges[0], ranges[1], true);
	} else if (!strcmp(how, "dma") && range_words == 2) {
		if (dma(ranges[1]))
			return -EINVAL;
	} else if (!strcmp(how, "lock") && range_words == 2) {
		contend();
	} else if (!strcmp(how, "store") && range_words) {
		WRITE_ONCE(*(u8 *)phys_to_virt(ranges[0]), 0);
	} else {
		return -EINVAL;
	}

	/* Everything is done: there is no need to stay */
	return -ECANCELED;
}
module_init(provoke);

MODULE_DESCRIPTION("The laboratory's ways to crash a kernel");
MODULE_LICENSE("GPL");

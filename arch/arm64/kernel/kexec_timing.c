// SPDX-License-Identifier: GPL-2.0-only
/*
 * How long did the kexec take that started this kernel?
 *
 * The device tree that kexec_file_load() builds has a property for the times at
 * which things happened. The kernel that leaves fills it in as the last thing,
 * after the image was verified, and the one that comes up tells about it. The
 * property is described in Documentation/arch/arm64/kexec.rst.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/build_bug.h>
#include <linux/cacheflush.h>
#include <linux/debugfs.h>
#include <linux/init.h>
#include <linux/kexec.h>
#include <linux/libfdt.h>
#include <linux/math64.h>
#include <linux/printk.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/string.h>
#include <linux/time64.h>

#include <asm/arch_timer.h>
#include <asm/byteorder.h>
#include <asm/memory.h>

static const char kexec_timing_name[] = "linux,kexec-timing";

#define KEXEC_TIMING_VERSION	1

/*
 * An image is entered as soon as it was copied. Whoever finds times that are
 * older than this many seconds was not started by the kernel that wrote them:
 * one that does not know the property handed it on.
 */
#define KEXEC_TIMING_MAX_AGE	2

/**
 * struct kexec_timing - value of the property
 * @version: KEXEC_TIMING_VERSION, 0 once it was read
 * @frequency: of the counter, Hz
 * @fdt: physical address of the device tree that this is a part of
 * @values: filled in when the image is executed, 0 until then
 */
struct kexec_timing {
	__be64 version;
	__be64 frequency;
	__be64 fdt;
	struct kexec_timing_values values;
} __packed __aligned(4);

/* As libfdt has it: cells, so properties are aligned to 4 bytes only */
static_assert(sizeof(struct kexec_timing) == 88);

/* Of the reboot call that is under way, counter ticks */
static u64 kexec_timing_marks[KEXEC_TIMING_MARKS];

/* What the previous kernel handed over; @frequency is 0 if it was nothing */
static struct {
	u64 frequency;
	u64 begin;
	u64 devices;
	u64 cpus;
	u64 shutdown;
	u64 copied;
	u64 in_place;
	u64 copy_start;
	u64 copy_end;
} kexec_timing_past __ro_after_init;

/* When init was about to be started, counter ticks */
static u64 kexec_timing_init_at;

/**
 * kexec_timing_mark() - the reboot call has come this far
 * @mark: what has just ended; or KEXEC_TIMING_BEGIN
 *
 * Context: kexec lock held.
 */
void kexec_timing_mark(enum kexec_timing_mark mark)
{
	kexec_timing_marks[mark] = __arch_counter_get_cntvct();
}

/**
 * kexec_timing_add() - make room in a device tree that is being built
 * @image: image that it is for
 * @fdt: device tree with KEXEC_TIMING_FDT_SIZE bytes to spare and a /chosen
 *
 * A crash kernel gets none: nobody shuts anything down before it. @fdt may have
 * inherited the property from the tree that this kernel was started with.
 *
 * Context: process context.
 *
 * Return: 0, or -EINVAL if libfdt can't do it.
 */
int kexec_timing_add(const struct kimage *image, void *fdt)
{
	u32 frequency = arch_timer_get_cntfrq();
	struct kexec_timing timing = {
		.version	= cpu_to_be64(KEXEC_TIMING_VERSION),
		.frequency	= cpu_to_be64(frequency),
	};
	int chosen = fdt_path_offset(fdt, "/chosen");
	int ret;

	if (image->type == KEXEC_TYPE_CRASH || !frequency) {
		ret = fdt_delprop(fdt, chosen, kexec_timing_name);
		return ret && ret != -FDT_ERR_NOTFOUND ? -EINVAL : 0;
	}

	ret = fdt_setprop(fdt, chosen, kexec_timing_name, &timing, sizeof(timing));

	return ret ? -EINVAL : 0;
}

/**
 * kexec_timing_locate() - remember where the values have to go
 * @image: image whose device tree, arch.dtb, has got its address but was not
 *         loaded yet
 *
 * Context: process context.
 */
void kexec_timing_locate(struct kimage *image)
{
	void *fdt = image->arch.dtb;
	struct kexec_timing *timing;

	timing = fdt_getprop_w(fdt, fdt_path_offset(fdt, "/chosen"),
			       kexec_timing_name, NULL);
	if (!timing)
		return;

	timing->fdt = cpu_to_be64(image->arch.dtb_mem);
	image->arch.timing = image->arch.dtb_mem + ((void *)&timing->values - fdt);
}

/**
 * kexec_timing_leave() - fill in what this kernel knows
 * @image: image that is about to be executed
 * @args: arguments in the control page, or NULL if it is not used
 *
 * The control page adds the rest, behind the last check of what it copied. If
 * there is nothing to copy, this is the end: the device tree is where it
 * belongs, and the last check was before shutdown.
 *
 * Context: exceptions masked. Can't fail.
 */
void kexec_timing_leave(const struct kimage *image, struct kexec_control_args *args)
{
	__be64 now = cpu_to_be64(__arch_counter_get_cntvct());
	struct kexec_timing_values values = {
		.begin		= cpu_to_be64(kexec_timing_marks[KEXEC_TIMING_BEGIN]),
		.devices	= cpu_to_be64(kexec_timing_marks[KEXEC_TIMING_DEVICES]),
		.cpus		= cpu_to_be64(kexec_timing_marks[KEXEC_TIMING_CPUS]),
		.shutdown	= now,
		.copied		= cpu_to_be64(image->arch.bytes_to_move),
		.in_place	= cpu_to_be64(image->arch.bytes_in_place),
		.copy_start	= now,
		.copy_end	= now,
	};
	void *dest;

	if (!image->arch.timing)
		return;

	if (args) {
		args->timing = image->arch.timing;
		args->timing_values = values;
		return;
	}

	dest = phys_to_virt(image->arch.timing);
	memcpy(dest, &values, sizeof(values));
	/* The next kernel reads it with the MMU off first, as it does all of it */
	dcache_clean_inval_poc((unsigned long)dest,
			       (unsigned long)dest + sizeof(values));
}

/**
 * kexec_timing_scan() - take the times out of the device tree
 * @fdt: device tree that this kernel was started with, writable, or NULL
 * @fdt_phys: its physical address
 *
 * What was read is cleared, so that nobody takes it for his own who gets a copy
 * of the tree. What can't be true is not believed: then there is no frequency.
 *
 * Context: early boot, before anybody took a checksum of the tree.
 */
void __init kexec_timing_scan(void *fdt, phys_addr_t fdt_phys)
{
	u64 now = __arch_counter_get_cntvct();
	u64 frequency = arch_timer_get_cntfrq();
	struct kexec_timing *found, timing;
	int chosen, len;

	if (!fdt || fdt_check_header(fdt))
		return;

	chosen = fdt_path_offset(fdt, "/chosen");
	if (chosen < 0)
		return;

	found = fdt_getprop_w(fdt, chosen, kexec_timing_name, &len);
	if (!found || len != sizeof(timing))
		return;

	timing = *found;
	memset(found, 0, sizeof(*found));

	if (be64_to_cpu(timing.version) != KEXEC_TIMING_VERSION ||
	    be64_to_cpu(timing.frequency) != frequency ||
	    be64_to_cpu(timing.fdt) != fdt_phys)
		return;

	kexec_timing_past.begin = be64_to_cpu(timing.values.begin);
	kexec_timing_past.devices = be64_to_cpu(timing.values.devices);
	kexec_timing_past.cpus = be64_to_cpu(timing.values.cpus);
	kexec_timing_past.shutdown = be64_to_cpu(timing.values.shutdown);
	kexec_timing_past.copied = be64_to_cpu(timing.values.copied);
	kexec_timing_past.in_place = be64_to_cpu(timing.values.in_place);
	kexec_timing_past.copy_start = be64_to_cpu(timing.values.copy_start);
	kexec_timing_past.copy_end = be64_to_cpu(timing.values.copy_end);

	if (!kexec_timing_past.begin ||
	    kexec_timing_past.begin > kexec_timing_past.devices ||
	    kexec_timing_past.devices > kexec_timing_past.cpus ||
	    kexec_timing_past.cpus > kexec_timing_past.shutdown ||
	    kexec_timing_past.shutdown > kexec_timing_past.copy_start ||
	    kexec_timing_past.copy_start > kexec_timing_past.copy_end ||
	    kexec_timing_past.copy_end > now ||
	    now - kexec_timing_past.copy_end > KEXEC_TIMING_MAX_AGE * frequency)
		return;

	kexec_timing_past.frequency = frequency;
}

static u64 microseconds(u64 from, u64 to)
{
	return mul_u64_u64_div_u64(to - from, USEC_PER_SEC,
				   kexec_timing_past.frequency);
}

static u64 shutdown_us(void)
{
	return microseconds(kexec_timing_past.begin, kexec_timing_past.shutdown);
}

static u64 cpus_us(void)
{
	return microseconds(kexec_timing_past.devices, kexec_timing_past.cpus);
}

/* From the end of shutdown: the switch of tables is a part of it */
static u64 copy_us(void)
{
	return microseconds(kexec_timing_past.shutdown, kexec_timing_past.copy_end);
}

static u64 startup_us(void)
{
	return microseconds(kexec_timing_past.copy_end, kexec_timing_init_at);
}

static int kexec_timing_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "shutdown %llu us\n", shutdown_us());
	seq_printf(file, "devices  %llu us\n",
		   microseconds(kexec_timing_past.begin, kexec_timing_past.devices));
	seq_printf(file, "cpus     %llu us\n", cpus_us());
	seq_printf(file, "copy     %llu us\n", copy_us());
	seq_printf(file, "copied   %llu bytes\n", kexec_timing_past.copied);
	seq_printf(file, "in_place %llu bytes\n", kexec_timing_past.in_place);
	seq_printf(file, "startup  %llu us\n", startup_us());

	return 0;
}
DEFINE_SHOW_ATTRIBUTE(kexec_timing);

/**
 * kexec_timing_report() - init is about to be started: tell how long it took
 *
 * Context: process context, once.
 */
void kexec_timing_report(void)
{
	u64 shutdown, cpus, copy, startup, tenths;

	if (!kexec_timing_past.frequency)
		return;

	kexec_timing_init_at = __arch_counter_get_cntvct();
	shutdown = shutdown_us();
	cpus = cpus_us();
	copy = copy_us();
	startup = startup_us();
	tenths = kexec_timing_past.copied * 10 / SZ_1M;

	pr_info("shutdown %llu.%03llu ms (CPUs %llu.%03llu), copied %llu.%llu MiB in %llu.%03llu ms, startup %llu.%03llu ms\n",
		shutdown / 1000, shutdown % 1000, cpus / 1000, cpus % 1000,
		tenths / 10, tenths % 10, copy / 1000, copy % 1000, startup / 1000, startup % 1000);
	debugfs_create_file("kexec_timing", 0400, NULL, NULL, &kexec_timing_fops);
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * CPUs leave the kernel that kexec is about to overwrite
 *
 * A CPU has left it when firmware says that it is off, and not before.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/arm_sdei.h>
#include <linux/cpu.h>
#include <linux/cpu_pm.h>
#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/errno.h>
#include <linux/kexec.h>
#include <linux/panic.h>
#include <linux/percpu.h>
#include <linux/preempt.h>
#include <linux/printk.h>
#include <linux/smp.h>
#include <linux/stop_machine.h>
#include <linux/time64.h>

#include <asm/cpu_ops.h>
#include <asm/daifflags.h>

#define KEXEC_POLL_US		10U
/* How long a CPU may go on with what it holds */
#define KEXEC_PATIENCE_US	USEC_PER_SEC
/* One that has had interrupts disabled for so long will not enable them any more */
#define KEXEC_LEAVE_TIMEOUT_US	(10 * USEC_PER_SEC)
/* How long firmware may take to switch off CPUs that have left the kernel */
#define KEXEC_OFF_TIMEOUT_US	USEC_PER_SEC

/* CPUs that are to leave and are still online */
static struct cpumask kexec_others;

/**
 * kexec_check_cpus() - could all CPUs but one leave this kernel?
 *
 * A CPU that went offline but was not switched off goes on running in memory that
 * is about to be overwritten.
 *
 * Context: process context.
 *
 * Return: 0, or -EBUSY with a line in the log.
 */
int kexec_check_cpus(void)
{
	unsigned int cpu;
	int ret = 0;

	if (cpus_are_stuck_in_kernel())
		return kexec_refuse(-EBUSY, "this kernel can't be replaced: %s",
				    cpus_stuck_reason());

	/* A CPU that comes online, or goes offline, is on for a while */
	cpus_read_lock();
	for_each_possible_cpu(cpu) {
		if (cpu_online(cpu) || !smp_cpu_is_on(cpu))
			continue;

		ret = kexec_refuse(-EBUSY,
				   "this kernel can't be replaced: CPU%u is offline, but firmware has not switched it off",
				   cpu);
		break;
	}
	cpus_read_unlock();

	return ret;
}

/* Does not return */
static int kexec_leave(void *unused)
{
	unsigned int cpu = smp_processor_id();

	local_daif_mask();
	/* For what has state in this CPU's power domain, which loses its power */
	cpu_pm_enter();
	/* The CPU that stays waits for this, and then for firmware */
	set_cpu_online(cpu, false);
	sdei_mask_local_cpu();
#ifdef CONFIG_HOTPLUG_CPU
	get_cpu_ops(cpu)->cpu_die(cpu);
#endif
	/* Firmware refused. Where this CPU is still on, that is found out. */
	cpu_park_loop();

	return 0;
}

static DEFINE_PER_CPU(struct cpu_stop_work, kexec_leave_work);

/*
 * A CPU leaves in its stopper, which nothing has precedence over, so where it holds
 * no spinlock: another CPU that waits for one with interrupts off could not leave.
 */
static void kexec_ask_cpus_to_leave(void)
{
	unsigned int cpu;

	for_each_cpu(cpu, &kexec_others)
		stop_one_cpu_nowait(cpu, kexec_leave, NULL,
				    per_cpu_ptr(&kexec_leave_work, cpu));
}

static void kexec_leave_at_once(void *unused)
{
	kexec_leave(NULL);
}

static DEFINE_PER_CPU(call_single_data_t, kexec_leave_csd) =
	CSD_INIT(kexec_leave_at_once, NULL);

/*
 * A CPU whose stopper does not get to run may wait, with preemption disabled, for one
 * that has left. So it leaves in an interrupt, whatever it holds.
 */
static void kexec_tell_cpus_to_leave(void)
{
	unsigned int cpu;

	for_each_cpu(cpu, &kexec_others)
		smp_call_function_single_async(cpu, per_cpu_ptr(&kexec_leave_csd, cpu));
}

static void kexec_find_others(void)
{
	cpumask_copy(&kexec_others, cpu_online_mask);
	cpumask_clear_cpu(smp_processor_id(), &kexec_others);
}

/* See all CPUs off but this one, or panic(): nothing has been overwritten yet */
static void kexec_wait_for_firmware(void)
{
	unsigned int cpu, us = 0;

	for_each_possible_cpu(cpu) {
		if (cpu == smp_processor_id())
			continue;

		for (; smp_cpu_is_on(cpu); us += KEXEC_POLL_US) {
			if (us >= KEXEC_OFF_TIMEOUT_US)
				panic("kexec: firmware does not switch CPU%u off, which runs in what is to be overwritten\n",
				      cpu);
			udelay(KEXEC_POLL_US);
		}
	}
}

/**
 * kexec_stop_cpus() - have all CPUs but this one leave this kernel
 *
 * All at the same time, where CPU hotplug takes one after the other. They are off
 * when this returns. Where one isn't, this is a panic(): nothing has been
 * overwritten yet.
 *
 * Context: process context on the CPU that stays, CPU hotplug disabled, devices
 * shut down. Returns with preemption disabled.
 */
void kexec_stop_cpus(void)
{
	unsigned int us;

	/* Interrupts stay enabled: others may wait for this CPU to take one */
	preempt_disable();

	kexec_find_others();
	kexec_ask_cpus_to_leave();

	for (us = 0; num_online_cpus() > 1; us += KEXEC_POLL_US) {
		if (us == KEXEC_PATIENCE_US) {
			kexec_find_others();
			pr_warn("still waiting for CPUs %*pbl to stop\n",
				cpumask_pr_args(&kexec_others));
			kexec_tell_cpus_to_leave();
		}

		if (us == KEXEC_LEAVE_TIMEOUT_US) {
			kexec_find_others();
			panic("kexec: CPUs %*pbl do not stop, and run in what is to be overwritten\n",
			      cpumask_pr_args(&kexec_others));
		}

		udelay(KEXEC_POLL_US);
	}

	kexec_wait_for_firmware();
}

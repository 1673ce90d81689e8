// SPDX-License-Identifier: GPL-2.0-only
/*
 * total - how many instructions the vCPUs of a machine execute between two addresses
 *
 *   from=ADDRESS  virtual (hexadecimal); counting begins anew when it is executed
 *   to=ADDRESS    and ends when this is
 *   out=PATH      a line of JSON is appended there each time it ends: what each vCPU
 *                 executed, in their order
 *
 * Both are at the beginning of a function, so a translation block begins there. It
 * is exact where one vCPU runs at a time (-icount); otherwise what others execute at
 * the moment of either end may be on the wrong side of it.
 */
#include "plugin.h"

#include <stdio.h>
#include <stdlib.h>

#define MAX_VCPUS 512

static uint64_t from, to, executed[MAX_VCPUS], at_start[MAX_VCPUS];
static unsigned int vcpus;
static bool counting;
static const char *out;

static void begin(unsigned int vcpu, void *data)
{
	memcpy(at_start, executed, sizeof(executed));
	counting = true;
}

static void end(unsigned int vcpu, void *data)
{
	FILE *file;

	if (!counting)
		return;

	counting = false;
	file = fopen(out, "a");
	if (!file)
		return;

	for (unsigned int i = 0; i < vcpus; i++)
		fprintf(file, "%s%llu", i ? ", " : "[", (unsigned long long)(executed[i] - at_start[i]));
	fprintf(file, "]\n");
	fclose(file);
}

static void count(unsigned int vcpu, void *data)
{
	executed[vcpu] += (uintptr_t)data;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	if (qemu_plugin_tb_vaddr(tb) == from)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, begin, QEMU_PLUGIN_CB_NO_REGS, NULL);
	if (qemu_plugin_tb_vaddr(tb) == to)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, end, QEMU_PLUGIN_CB_NO_REGS, NULL);
	qemu_plugin_register_vcpu_tb_exec_cb(tb, count, QEMU_PLUGIN_CB_NO_REGS,
					     (void *)qemu_plugin_tb_n_insns(tb));
}

static void started(qemu_plugin_id_t id, unsigned int vcpu)
{
	if (vcpu >= MAX_VCPUS)
		abort();
	if (vcpu >= vcpus)
		vcpus = vcpu + 1;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "from=", 5))
			from = strtoull(argv[i] + 5, NULL, 16);
		else if (!strncmp(argv[i], "to=", 3))
			to = strtoull(argv[i] + 3, NULL, 16);
		else if (!strncmp(argv[i], "out=", 4))
			out = argv[i] + 4;
		else
			return 1;
	}

	if (!from || !to || !out)
		return 1;

	qemu_plugin_register_vcpu_init_cb(id, started);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * count - what an arm64 machine executes between two places, for QEMU's TCG
 *
 *   enter=WORD[:WORD...]  counting begins where a page in the lower half of the
 *                         address space that begins with these instructions
 *                         (hexadecimal) is entered
 *   leave=WORD[:WORD...]  and ends where one is entered that begins with these
 *   out=PATH              a line of JSON is appended there each time it ends
 *   mmu=off               the MMU is off when counting begins
 *   zva=BYTES             what DC ZVA zeroes; 64 if it is not given
 *
 * Every instruction is in one class, by its encoding. Loads and stores are
 * instructions, too; what they move is counted in bytes. They are cacheable
 * until an instruction writes to SCTLR_ELx: nothing that is counted here turns
 * the MMU on, and the API cannot read registers. What goes to a device is
 * counted apart.
 *
 * A line is 64 bytes. A line that is stored to for the first time is an
 * "owned" one if DC ZVA has zeroed it before, and a "fetched" one, which
 * hardware would read for ownership, if not. The API does not tell which
 * address DC ZVA was given: it counts for the lines that are stored to next. A
 * block that was zeroed and not stored to is in "zeroed_rest", which has to be 0.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

enum class {
	LOAD, STORE, PREFETCH, DC_ZVA, DC_CIVAC, DC_CVAC, DC_CVAU, DC_IVAC, DC_OTHER, IC_IALLU, IC_OTHER,
	TLBI, DSB, DMB, ISB, CRC, BRANCH, SYSTEM, DATA, CLASSES
};

static const char *const names[CLASSES] = {
	"load", "store", "prefetch", "dc_zva", "dc_civac", "dc_cvac", "dc_cvau", "dc_ivac", "dc_other",
	"ic_iallu", "ic_other", "tlbi", "dsb", "dmb", "isb", "crc", "branch", "system", "data"
};

#define WORDS 8
#define LINE_SHIFT 6
#define CHUNK_SHIFT 21 /* bytes whose lines are kept together */
#define CHUNK_LINES (1UL << (CHUNK_SHIFT - LINE_SHIFT))
#define CHUNKS (1UL << 20) /* hashed by address: 2 TiB */

struct pattern {
	uint32_t words[WORDS];
	size_t count;
};

static struct pattern enter, leave;
static const char *out;
static bool mmu_off;
static uint64_t zva_block = 64;

static uint64_t classes[CLASSES];
static uint64_t loads[2], stores[2], bytes_loaded, bytes_stored, device;
static uint64_t fetched, owned, zeroed; /* lines, lines, bytes */
static bool counting, uncached;
static uint8_t *chunks[CHUNKS];

static bool is_load_store(uint32_t w)
{
	return (w & 0x0a000000) == 0x08000000;
}

static enum class class_of_load_store(uint32_t w)
{
	/* Single register: opc in bits 23:22; prefetch is opc 2 with size 3, or the literal form 3 */
	if ((w & 0x3b000000) == 0x18000000)
		return (w >> 30) == 3 && !(w & 1 << 26) ? PREFETCH : LOAD;
	if ((w & 0x38000000) == 0x38000000) {
		if (!(w & 1 << 26) && (w >> 30) == 3 && (w >> 22 & 3) == 2)
			return PREFETCH;
		/* A vector register of 16 bytes: size 0, opc 2 stores and 3 loads */
		if (w & 1 << 26 && w >> 30 == 0 && (w >> 22 & 3) == 2)
			return STORE;
		return (w >> 22 & 3) ? LOAD : STORE;
	}
	return w & 1 << 22 ? LOAD : STORE; /* pairs, exclusives */
}

static enum class class_of_sys(uint32_t w)
{
	unsigned int op1 = w >> 16 & 7, crn = w >> 12 & 15, crm = w >> 8 & 15, op2 = w >> 5 & 7;

	if (crn == 8)
		return TLBI;
	if (crn != 7 || crm == 8)
		return SYSTEM;
	if (crm == 1 || crm == 5)
		return op1 == 0 && crm == 5 ? IC_IALLU : IC_OTHER;
	if (op1 == 3 && op2 == 1) {
		switch (crm) {
		case 4:
			return DC_ZVA;
		case 10:
			return DC_CVAC;
		case 11:
			return DC_CVAU;
		case 14:
			return DC_CIVAC;
		}
	}
	return op1 == 0 && crm == 6 && op2 == 1 ? DC_IVAC : DC_OTHER;
}

static enum class class_of(uint32_t w)
{
	if (is_load_store(w))
		return class_of_load_store(w);
	if ((w & 0xfff80000) == 0xd5080000)
		return class_of_sys(w);
	if ((w & 0xfffff01f) == 0xd503301f) {
		switch (w >> 5 & 7) {
		case 4:
			return DSB;
		case 5:
			return DMB;
		case 6:
			return ISB;
		}
		return SYSTEM;
	}
	if ((w & 0xffc00000) == 0xd5000000)
		return SYSTEM;
	if ((w & 0x1c000000) == 0x14000000)
		return BRANCH;
	if ((w & 0x7fe0e000) == 0x1ac04000)
		return CRC;
	return DATA;
}

static bool is_msr_sctlr(uint32_t w)
{
	/* MSR SCTLR_ELx, Xt: op0 3, CRn 1, CRm 0, op2 0 */
	return (w & 0xfff8ffe0) == 0xd5181000;
}

/* Is this the first store to a line since counting began? */
static bool first_store(uint64_t vaddr)
{
	uint64_t chunk = vaddr >> CHUNK_SHIFT & (CHUNKS - 1);
	uint64_t line = vaddr >> LINE_SHIFT & (CHUNK_LINES - 1);

	if (!chunks[chunk])
		chunks[chunk] = calloc(1, CHUNK_LINES / 8);
	if (!chunks[chunk])
		abort();
	if (chunks[chunk][line / 8] & 1 << line % 8)
		return false;
	chunks[chunk][line / 8] |= 1 << line % 8;
	return true;
}

static void on_memory(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *data)
{
	struct qemu_plugin_hwaddr *hwaddr = qemu_plugin_get_hwaddr(info, vaddr);
	uint64_t bytes = 1 << qemu_plugin_mem_size_shift(info);

	if (!counting)
		return;
	if (hwaddr && qemu_plugin_hwaddr_is_io(hwaddr)) {
		device++;
		return;
	}
	if (!qemu_plugin_mem_is_store(info)) {
		bytes_loaded += bytes;
		return;
	}
	bytes_stored += bytes;
	if (!first_store(vaddr))
		return;
	if (zeroed >= 1 << LINE_SHIFT) {
		zeroed -= 1 << LINE_SHIFT;
		owned++;
	} else {
		fetched++;
	}
}

static void on_load(unsigned int vcpu, void *data)
{
	loads[uncached]++;
}

static void on_store(unsigned int vcpu, void *data)
{
	stores[uncached]++;
}

static void on_instruction(unsigned int vcpu, void *data)
{
	++*(uint64_t *)data;
}

static void on_zva(unsigned int vcpu, void *data)
{
	zeroed += zva_block;
}

static void on_sctlr(unsigned int vcpu, void *data)
{
	uncached = true;
}

static void on_enter(unsigned int vcpu, void *data)
{
	uint64_t i;

	bytes_loaded = bytes_stored = device = fetched = owned = zeroed = 0;
	memset(classes, 0, sizeof(classes));
	memset(loads, 0, sizeof(loads));
	memset(stores, 0, sizeof(stores));
	for (i = 0; i < CHUNKS; i++) {
		free(chunks[i]);
		chunks[i] = NULL;
	}
	counting = true;
	uncached = mmu_off;
}

static void on_leave(unsigned int vcpu, void *data)
{
	uint64_t insns = 0;
	FILE *file;
	int i;

	if (!counting)
		return;
	counting = false;

	file = fopen(out, "a");
	if (!file) {
		perror(out);
		abort();
	}
	for (i = 0; i < CLASSES; i++)
		insns += classes[i];
	fprintf(file, "{\"instructions\": %lu, \"classes\": {", insns);
	for (i = 0; i < CLASSES; i++)
		fprintf(file, "%s\"%s\": %lu", i ? ", " : "", names[i], classes[i]);
	fprintf(file, "}, \"loads_cacheable\": %lu, \"loads_uncached\": %lu, ", loads[0], loads[1]);
	fprintf(file, "\"stores_cacheable\": %lu, \"stores_uncached\": %lu, ", stores[0], stores[1]);
	fprintf(file, "\"device\": %lu, \"bytes_loaded\": %lu, \"bytes_stored\": %lu, ", device,
		bytes_loaded, bytes_stored);
	fprintf(file, "\"lines_fetched\": %lu, \"lines_owned\": %lu, \"zeroed_rest\": %lu}\n", fetched,
		owned, zeroed);
	fclose(file);
}

/* Does a block begin as the pattern does? Who matches too early begins to count again. */
static bool matches(const struct pattern *pattern, struct qemu_plugin_tb *tb)
{
	size_t i, count = qemu_plugin_tb_n_insns(tb);

	/* QEMU 10 leaves a breakpoint with a block of one instruction */
	for (i = 0; i < pattern->count && i < count; i++) {
		if (word_of(qemu_plugin_tb_get_insn(tb, i)) != pattern->words[i])
			return false;
	}
	return true;
}

static bool entered; /* translated at least once: the pages that follow may be counted */

static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	uint64_t vaddr = qemu_plugin_tb_vaddr(tb);
	size_t i, count = qemu_plugin_tb_n_insns(tb);

	/* Kernels run in the upper half; control pages, and all without an MMU, in the lower one */
	if (vaddr >> 63)
		return;
	if (!(vaddr & 0xfff) && matches(&enter, tb)) {
		entered = true;
		qemu_plugin_register_vcpu_tb_exec_cb(tb, on_enter, QEMU_PLUGIN_CB_NO_REGS, NULL);
	} else if (!(vaddr & 0xfff) && matches(&leave, tb)) {
		qemu_plugin_register_vcpu_tb_exec_cb(tb, on_leave, QEMU_PLUGIN_CB_NO_REGS, NULL);
		entered = false;
		return;
	}
	if (!entered)
		return;

	for (i = 0; i < count; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint32_t word = word_of(insn);
		enum class class = class_of(word);
		exec_cb also = NULL;

		qemu_plugin_register_vcpu_insn_exec_cb(insn, on_instruction, QEMU_PLUGIN_CB_NO_REGS,
						       &classes[class]);
		if (class == LOAD)
			also = on_load;
		else if (class == STORE)
			also = on_store;
		else if (class == DC_ZVA)
			also = on_zva;
		else if (is_msr_sctlr(word))
			also = on_sctlr;
		if (also)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, also, QEMU_PLUGIN_CB_NO_REGS, NULL);
		if (class == LOAD || class == STORE)
			qemu_plugin_register_vcpu_mem_cb(insn, on_memory, QEMU_PLUGIN_CB_NO_REGS,
							 QEMU_PLUGIN_MEM_RW, NULL);
	}
}

static bool parse(struct pattern *pattern, const char *text)
{
	char *end;

	for (pattern->count = 0; pattern->count < WORDS; text = end + 1) {
		pattern->words[pattern->count++] = strtoul(text, &end, 16);
		if (*end != ':')
			return end != text && !*end;
	}
	return false;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	int i;

	for (i = 0; i < argc; i++) {
		bool good = true;

		if (!strncmp(argv[i], "enter=", 6))
			good = parse(&enter, argv[i] + 6);
		else if (!strncmp(argv[i], "leave=", 6))
			good = parse(&leave, argv[i] + 6);
		else if (!strncmp(argv[i], "out=", 4))
			out = argv[i] + 4;
		else if (!strcmp(argv[i], "mmu=off"))
			mmu_off = true;
		else if (!strncmp(argv[i], "zva=", 4))
			zva_block = strtoul(argv[i] + 4, NULL, 0);
		else
			good = false;
		if (!good) {
			fprintf(stderr, "count: '%s' is not understood\n", argv[i]);
			return 1;
		}
	}
	if (!enter.count || !leave.count || !out) {
		fprintf(stderr, "count: enter=, leave= and out= are needed\n");
		return 1;
	}
	out = strdup(out);
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
	return 0;
}

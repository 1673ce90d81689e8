// SPDX-License-Identifier: GPL-2.0-only
/*
 * caches - where the newest value of each word of RAM is, for QEMU's TCG
 *
 *   out=PATH      a line of JSON is appended there for each place in the code that
 *                 reads what is not the newest value, or loses it; and for each
 *                 kernel that is entered
 *   size=BYTES    of RAM, which begins at 1 GiB
 *   strict=off    a line is held by a cache only if something was seen to bring it
 *                 there; by default any line may be, by speculation
 *
 * QEMU executes without caches, so that what it executes is right whatever the
 * maintenance. Beside it, this keeps for each word whether a cache that is written
 * back later, memory, or both have the newest value. CPUs run in threads of their own
 * (QEMU 10 tells plugins the wrong CPU where one thread runs several): what they do
 * to one word at the same time, without synchronising, is in no order here either.
 * What it takes for granted:
 *
 * - With the MMU and SCTLR_ELx.C on, all accesses to RAM are cacheable. With either
 *   off none is, nor are fetches. Lines of the I-cache, and what DC ZVA zeroes, have 64
 *   bytes.
 * - Caches are coherent with each other and with devices. Nothing is ever evicted:
 *   what is not cleaned stays in the cache.
 * - Maintenance by address takes effect with the DSB of more than this CPU (not NSH)
 *   that follows it, that of the I-cache with such a DSB, unless it is for this CPU
 *   alone, and then, for the CPU that issued it, a context synchronisation event.
 * - The tables' own walks see everything. So do devices.
 * - Stores by the CPU's memory-copy instructions, and some by SVE, are not seen:
 *   boot with arm64.nomops arm64.nosve.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "plugin.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#define RAM 0x40000000UL
#define CPUS 64
#define REPORTS 10000 /* and no more */
#define MAGIC 0x644d5241 /* of an arm64 Image, 56 bytes behind its beginning: "ARM\x64" */

/*
 * State of a word. The rest of it is the number of the instruction that stored to it
 * last.
 */
#define DIRTY	 (1U << 31) /* newer in the caches than in memory */
#define UNFETCHED (1U << 30) /* newer in the D-cache than at the PoU */
#define CLEANING (1U << 29) /* what makes it the same in memory and caches waits for a DSB */
#define UNIFYING (1U << 28) /* the same for the PoU */
#define NEWER	 (1U << 27) /* newer in memory than in a line that a cache may hold */
#define UNDONE	 (1U << 26) /* and that line is dirty: writing it back undoes the store */
#define STATE	 (DIRTY | UNFETCHED | CLEANING | UNIFYING | NEWER | UNDONE)
#define PLACES	 (1U << 26)

/* An instruction that loads, stores or maintains caches. Number 0 is none. */
struct place {
	uint64_t pc, at; /* virtual, physical; the latter 0 where it is not in RAM */
	uint32_t kernel;
	uint32_t word;
};

/* A block that may be executed with the MMU off */
struct block {
	uint64_t vaddr, at;
	size_t count;
	bool isb; /* is the first instruction */
};

enum kind {
	LOAD_OFF, LOAD_NO_DSB, FETCH_OFF, FETCH_NO_DSB, LOAD_STALE, LOAD_UNDONE, LOST, OVERWRITTEN, BESIDE,
	FETCH_UNCLEAN, FETCH_OLD, FETCH_NO_ISB, NO_ISB, SET_WAY, KINDS
};

static const char *const names[KINDS] = {
	[LOAD_OFF] = "load with the MMU off of what only caches hold",
	[LOAD_NO_DSB] = "load with the MMU off of what was cleaned without a DSB",
	[FETCH_OFF] = "fetch with the MMU off of what only caches hold",
	[FETCH_NO_DSB] = "fetch with the MMU off of what was cleaned without a DSB",
	[LOAD_STALE] = "load with the MMU on of what memory holds newer",
	[LOAD_UNDONE] = "load with the MMU off of what a dirty line may have undone",
	[LOST] = "invalidated before it was cleaned",
	[OVERWRITTEN] = "cleaned over what memory holds newer",
	[BESIDE] = "store with the MMU off beside a dirty word",
	[FETCH_UNCLEAN] = "fetch of what was not cleaned to the PoU",
	[FETCH_OLD] = "fetch of what the I-cache may hold older",
	[FETCH_NO_ISB] = "fetch of new instructions without an ISB",
	[NO_ISB] = "no ISB behind a change of SCTLR",
	[SET_WAY] = "maintenance by set and way",
};

static FILE *out;
static uint64_t ram_size;
static bool strict = true;

static uint32_t *words; /* of RAM */
static uint8_t *held; /* lines that a cache holds, where not strict */
static _Atomic uint64_t newer; /* words that are NEWER */
static uint64_t line_size = 64;
static bool idc, dic; /* caches need no cleaning to the PoU, the I-cache no invalidation */
static uint8_t *ram; /* the guest's, in this process */
static uint32_t kernel;

static struct place *places[PLACES >> 16];
static uint32_t count = 1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of places, and of what is reported */

/*
 * The I-cache. Time passes with what synchronises anything. For each word: when it
 * became new at the PoU, or, with INVALIDATED, when its line was invalidated since.
 */
#define INVALIDATED (1U << 31)
static uint32_t *times;
static _Atomic uint32_t now = 1;

enum reg {
	CPSR, HCR, CTR, CLIDR, SCTLR1, TCR1, TTBR0_1, TTBR1_1, SCTLR2, TCR2, TTBR0_2, TTBR1_2, X0, REGS = X0 + 32
};

static const char *const reg_names[X0] = {
	"cpsr", "HCR_EL2", "CTR_EL0", "CLIDR", "SCTLR", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "SCTLR_EL2", "TCR_EL2",
	"TTBR0_EL2", "TTBR1_EL2"
};

enum { STORES_OFF, LOADS_OFF, BLOCKS_OFF, CLEANED, COMPLETED, INVALIDATIONS, COUNTS };

struct list {
	uint64_t *at;
	size_t count, room;
};

static struct cpu {
	struct qemu_plugin_register *regs[REGS];
	bool known; /* the next two are what the registers say */
	bool cached; /* accesses are cacheable */
	bool fetch_cached;
	uint32_t sctlr_written; /* the number of the instruction, until the next block */
	struct list cleaning; /* lines with a word that waits for a DSB, in RAM */
	struct list invalidating; /* the same for the I-cache */
	bool invalidating_all, shared;
	uint32_t invalidated; /* when all of the I-cache was */
	uint32_t settled; /* the same, before the last synchronisation */
	uint32_t synchronised;
	/* The last page that was translated for maintenance */
	uint64_t page, physical;
	uint64_t counts[COUNTS];
	GByteArray *buffer;
} cpus[CPUS];
static __thread unsigned int current; /* the CPU of this thread */

/* Reports */

static struct place *place(uint32_t number)
{
	return &places[number >> 16][number & 0xffff];
}

static uint32_t new_place(uint64_t pc, uint64_t at, uint32_t word)
{
	uint32_t number = 0;

	pthread_mutex_lock(&mutex);
	if (count < PLACES) {
		number = count++;
		if (!places[number >> 16]) {
			places[number >> 16] = calloc(1 << 16, sizeof(struct place));
			if (!places[number >> 16])
				abort();
		}
		*place(number) = (struct place) { pc, at, kernel, word };
	}
	pthread_mutex_unlock(&mutex);
	return number;
}

/* Is this the first report of its kind from this place in this kernel? */
static bool first(enum kind kind, uint64_t pc)
{
	static uint64_t seen[1 << 16];
	uint64_t key = (pc << 8 | kind) ^ (uint64_t)kernel << 60;
	uint64_t slot = key * 0x9e3779b97f4a7c15 >> 48;

	if (!key)
		key = 1;
	for (; seen[slot] && seen[slot] != key; slot = (slot + 1) & 0xffff)
		;
	if (seen[slot])
		return false;
	seen[slot] = key;
	return true;
}

static void report_at(enum kind kind, unsigned int vcpu, uint64_t pc, uint64_t pc_at, uint64_t address,
		      uint32_t writer)
{
	struct place nobody = { 0 }, *by = writer & (PLACES - 1) ? place(writer & (PLACES - 1)) : &nobody;
	static unsigned int reports;

	pthread_mutex_lock(&mutex);
	if (reports < REPORTS && first(kind, pc)) {
		reports++;
		fprintf(out, "{\"kind\": \"%s\", \"cpu\": %u, \"kernel\": %u, \"pc\": %lu, \"pc_at\": %lu, ",
			names[kind], vcpu, kernel, pc, pc_at);
		fprintf(out, "\"address\": %lu, \"writer\": %lu, \"writer_at\": %lu, \"writer_kernel\": %u}\n",
			address, by->pc, by->at, by->kernel);
		fflush(out);
	}
	pthread_mutex_unlock(&mutex);
}

static void report(enum kind kind, unsigned int vcpu, uint32_t number, uint64_t offset)
{
	report_at(kind, vcpu, place(number)->pc, place(number)->at, RAM + offset, words[offset / 4]);
}

static void on_kernel(uint64_t at)
{
	static const char *const what[COUNTS] = {
		"stores_off", "loads_off", "blocks_off", "cleaned", "completed", "invalidations"
	};
	uint64_t sum;
	int i, n;

	pthread_mutex_lock(&mutex);
	kernel++;
	fprintf(out, "{\"entered\": %u, \"at\": %lu, \"line\": %lu, \"idc\": %d, \"dic\": %d", kernel, at, line_size,
		idc, dic);
	for (i = 0; i < COUNTS; i++) {
		for (sum = 0, n = 0; n < CPUS; n++)
			sum += cpus[n].counts[i];
		fprintf(out, ", \"%s\": %lu", what[i], sum);
	}
	fprintf(out, "}\n");
	fflush(out);
	pthread_mutex_unlock(&mutex);
}

/* Registers, translation */

static uint64_t read_reg(struct cpu *cpu, enum reg reg)
{
	uint64_t value = 0;

	if (!cpu->regs[reg])
		return 0;
	g_byte_array_set_size(cpu->buffer, 0);
	qemu_plugin_read_register(cpu->regs[reg], cpu->buffer);
	memcpy(&value, cpu->buffer->data, cpu->buffer->len < 8 ? cpu->buffer->len : 8);
	return value;
}

static unsigned int current_el(struct cpu *cpu)
{
	return read_reg(cpu, CPSR) >> 2 & 3;
}

/* Of which EL are SCTLR and the tables that count now? */
static bool at_el2(struct cpu *cpu, bool *e2h)
{
	uint64_t hcr = read_reg(cpu, HCR);
	unsigned int el = current_el(cpu);

	*e2h = hcr >> 34 & 1;
	return el == 2 || (!el && *e2h && hcr >> 27 & 1);
}

static void look(struct cpu *cpu)
{
	bool e2h;
	uint64_t sctlr = read_reg(cpu, at_el2(cpu, &e2h) ? SCTLR2 : SCTLR1), ctr = read_reg(cpu, CTR);
	uint64_t clidr = read_reg(cpu, CLIDR);

	line_size = 4UL << (ctr >> 16 & 15);
	/* As the kernel sees it: nothing to be cleaned if there is no level before the PoU */
	idc = ctr >> 28 & 1 || !(clidr >> 24 & 7) || !(clidr >> 21 & 7 || clidr >> 27 & 7);
	dic = ctr >> 29 & 1;
	cpu->cached = sctlr & 1 && sctlr & 4;
	cpu->fetch_cached = cpu->cached && sctlr & 1 << 12;
	cpu->known = true;
}

static uint64_t word64(uint64_t at)
{
	uint64_t value = 0;

	if (at - RAM < ram_size)
		memcpy(&value, ram + (at - RAM), sizeof(value));
	return value;
}

/* The physical address that a virtual one stands for, 0 if none */
static uint64_t walk(struct cpu *cpu, uint64_t vaddr)
{
	static const unsigned int shift_of_tg0[] = { 12, 16, 14, 12 }, shift_of_tg1[] = { 12, 14, 12, 16 };
	bool e2h, el2 = at_el2(cpu, &e2h), upper = vaddr >> 55 & 1;
	uint64_t tcr = read_reg(cpu, el2 ? TCR2 : TCR1), table, entry, mask;
	unsigned int bits, page, stride, shift;

	if (upper && el2 && !e2h)
		return 0;
	page = upper ? shift_of_tg1[tcr >> 30 & 3] : shift_of_tg0[tcr >> 14 & 3];
	bits = 64 - (upper ? tcr >> 16 & 63 : tcr & 63);
	stride = page - 3;
	shift = page + (bits - page - 1) / stride * stride;
	table = read_reg(cpu, el2 ? (upper ? TTBR1_2 : TTBR0_2) : (upper ? TTBR1_1 : TTBR0_1)) & 0xffffffffffc0;
	mask = (1UL << (bits - shift)) - 1;
	for (;; shift -= stride, mask = (1UL << stride) - 1) {
		entry = word64(table + (vaddr >> shift & mask) * 8);
		if (!(entry & 1))
			return 0;
		if (shift == page || !(entry & 2))
			return (entry & 0xffffffffffff & -(1UL << shift)) | (vaddr & ((1UL << shift) - 1));
		table = entry & 0xffffffffffff & -(1UL << page);
	}
}

/*
 * The offset in RAM of a virtual address, at least ram_size if it has none. It is
 * looked up once per page, until something says that the answer may be another.
 */
static uint64_t offset_of(struct cpu *cpu, uint64_t vaddr)
{
	if (cpu->page != vaddr >> 12) {
		bool e2h;

		cpu->page = vaddr >> 12;
		if (read_reg(cpu, at_el2(cpu, &e2h) ? SCTLR2 : SCTLR1) & 1)
			cpu->physical = walk(cpu, vaddr) & -4096UL;
		else
			cpu->physical = vaddr & -4096UL;
	}
	return cpu->physical + (vaddr & 4095) - RAM;
}

static void forget(struct cpu *cpu)
{
	cpu->page = UINT64_MAX;
}

/* Accesses */

static void add(struct list *list, uint64_t at)
{
	if (list->count == list->room) {
		list->room = list->room ? 2 * list->room : 1024;
		list->at = realloc(list->at, list->room * sizeof(*list->at));
		if (!list->at)
			abort();
	}
	list->at[list->count++] = at;
}

/* The offset in RAM of an access, at least ram_size if it is something else */
static inline uint64_t offset_of_access(qemu_plugin_meminfo_t info, uint64_t vaddr)
{
	struct qemu_plugin_hwaddr *hwaddr = qemu_plugin_get_hwaddr(info, vaddr);

	if (!hwaddr || qemu_plugin_hwaddr_is_io(hwaddr))
		return UINT64_MAX;
	return qemu_plugin_hwaddr_phys_addr(hwaddr) - RAM;
}

static inline void store_cached(uint64_t offset, uint64_t size, uint32_t number)
{
	uint32_t *word = &words[offset / 4], *end = &words[(offset + size + 3) / 4];

	for (; word < end; word++) {
		if (unlikely(*word & NEWER))
			newer--;
		if (idc && !dic)
			times[word - words] = now;
		*word = (idc ? DIRTY : DIRTY | UNFETCHED) | number;
	}
	if (!strict)
		held[offset / line_size] = 1;
}

static void store_uncached(unsigned int vcpu, uint64_t offset, uint64_t size, uint32_t number)
{
	uint64_t line = offset & -line_size, at;
	bool maybe = strict || held[offset / line_size];

	cpus[vcpu].counts[STORES_OFF]++;
	for (at = line; at < line + line_size; at += 4) {
		if (words[at / 4] & DIRTY && (at < (offset & -4UL) || at >= offset + size))
			report(BESIDE, vcpu, number, at);
	}
	for (at = offset & -4UL; at < offset + size; at += 4) {
		uint32_t old = words[at / 4];

		newer += maybe - !!(old & NEWER);
		words[at / 4] = (maybe ? NEWER : 0) | (old & (DIRTY | UNDONE) ? UNDONE : 0) | number;
		times[at / 4] = now;
	}
}

static void load_cached(unsigned int vcpu, uint64_t offset, uint64_t size, uint32_t number)
{
	uint64_t at;

	if (!strict)
		held[offset / line_size] = 1;
	for (at = offset & -4UL; newer && at < offset + size; at += 4) {
		if (words[at / 4] & NEWER)
			report(LOAD_STALE, vcpu, number, at);
	}
}

static void load_uncached(unsigned int vcpu, uint64_t offset, uint64_t size, uint32_t number)
{
	uint64_t at;

	cpus[vcpu].counts[LOADS_OFF]++;
	for (at = offset & -4UL; at < offset + size; at += 4) {
		if (words[at / 4] & DIRTY)
			report(words[at / 4] & CLEANING ? LOAD_NO_DSB : LOAD_OFF, vcpu, number, at);
		else if (words[at / 4] & UNDONE)
			report(LOAD_UNDONE, vcpu, number, at);
	}
}

/* Of code that runs with the MMU on only */
static void on_memory(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *data)
{
	bool store = qemu_plugin_mem_is_store(info);
	uint64_t offset;

	if (!store && likely(!newer) && strict)
		return;
	offset = offset_of_access(info, vaddr);
	if (offset >= ram_size)
		return;
	if (store)
		store_cached(offset, 1 << qemu_plugin_mem_size_shift(info), (uintptr_t)data);
	else
		load_cached(vcpu, offset, 1 << qemu_plugin_mem_size_shift(info), (uintptr_t)data);
}

/* Of code that may run with the MMU off */
static void on_memory_either(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *data)
{
	uint64_t offset, size = 1 << qemu_plugin_mem_size_shift(info);

	if (cpus[vcpu].cached) {
		on_memory(vcpu, info, vaddr, data);
		return;
	}
	offset = offset_of_access(info, vaddr);
	if (offset >= ram_size)
		return;
	if (qemu_plugin_mem_is_store(info))
		store_uncached(vcpu, offset, size, (uintptr_t)data);
	else
		load_uncached(vcpu, offset, size, (uintptr_t)data);
}

/* Maintenance */

static inline uint64_t operand(struct cpu *cpu, uint32_t word)
{
	return (word & 31) == 31 ? 0 : read_reg(cpu, X0 + (word & 31));
}

/* The offset of the line, or block, that an instruction names; at least ram_size if it is not RAM */
static uint64_t offset_of_line(unsigned int vcpu, uint32_t number, uint64_t size)
{
	struct cpu *cpu = &cpus[vcpu];

	return offset_of(cpu, operand(cpu, place(number)->word) & -size);
}

static void on_clean(unsigned int vcpu, uint32_t number, bool invalidate)
{
	uint64_t line = offset_of_line(vcpu, number, line_size), at, dirty = 0, fresh = 0;

	if (line >= ram_size)
		return;
	cpus[vcpu].counts[CLEANED]++;
	for (at = line; at < line + line_size; at += 4) {
		if (words[at / 4] & DIRTY)
			dirty = at + 4;
		if (words[at / 4] & UNDONE || words[at / 4] & NEWER)
			fresh = at + 4;
	}
	for (at = line; fresh && at < line + line_size; at += 4) {
		if (words[at / 4] & UNDONE || (words[at / 4] & NEWER && dirty))
			report(OVERWRITTEN, vcpu, number, at);
	}
	for (at = line; at < line + line_size; at += 4) {
		if (words[at / 4] & DIRTY || (words[at / 4] & (NEWER | UNDONE) && invalidate))
			words[at / 4] |= CLEANING;
	}
	if (dirty || fresh)
		add(&cpus[vcpu].cleaning, line);
	if (invalidate && !strict)
		held[line / line_size] = 0;
}

static void on_cvac(unsigned int vcpu, void *data)
{
	on_clean(vcpu, (uintptr_t)data, false);
}

static void on_civac(unsigned int vcpu, void *data)
{
	on_clean(vcpu, (uintptr_t)data, true);
}

static void on_cvau(unsigned int vcpu, void *data)
{
	uint64_t line = offset_of_line(vcpu, (uintptr_t)data, line_size), at;

	if (line >= ram_size)
		return;
	cpus[vcpu].counts[CLEANED]++;
	for (at = line; at < line + line_size; at += 4) {
		if (words[at / 4] & UNFETCHED)
			words[at / 4] |= UNIFYING;
	}
	add(&cpus[vcpu].cleaning, line);
}

static void on_ivac(unsigned int vcpu, void *data)
{
	uint64_t line = offset_of_line(vcpu, (uintptr_t)data, line_size), at;

	if (line >= ram_size)
		return;
	cpus[vcpu].counts[CLEANED]++;
	for (at = line; at < line + line_size; at += 4) {
		if (words[at / 4] & DIRTY)
			report(LOST, vcpu, (uintptr_t)data, at);
		if (words[at / 4] & (DIRTY | NEWER | UNDONE))
			words[at / 4] |= CLEANING;
	}
	add(&cpus[vcpu].cleaning, line);
	if (!strict)
		held[line / line_size] = 0;
}

static void on_zva(unsigned int vcpu, void *data)
{
	uint64_t block = offset_of_line(vcpu, (uintptr_t)data, 64);

	if (block < ram_size)
		store_cached(block, 64, (uintptr_t)data);
}

static void on_set_way(unsigned int vcpu, void *data)
{
	report(SET_WAY, vcpu, (uintptr_t)data, 0);
}

static void on_ivau(unsigned int vcpu, void *data)
{
	uint64_t line = offset_of_line(vcpu, (uintptr_t)data, 64);

	cpus[vcpu].counts[INVALIDATIONS]++;
	if (line < ram_size)
		add(&cpus[vcpu].invalidating, line);
}

static void on_iallu(unsigned int vcpu, void *data)
{
	cpus[vcpu].counts[INVALIDATIONS]++;
	cpus[vcpu].invalidating_all = true;
	cpus[vcpu].shared |= data != NULL;
}

/* What was issued to a line takes effect */
static void complete(struct cpu *cpu, uint64_t line)
{
	uint64_t at;

	for (at = line; at < line + line_size; at += 4) {
		uint32_t *word = &words[at / 4];

		if (*word & CLEANING) {
			newer -= !!(*word & NEWER);
			if (*word & UNFETCHED)
				times[at / 4] = now;
			*word &= ~STATE;
		} else if (*word & UNIFYING) {
			times[at / 4] = now;
			*word &= ~(UNFETCHED | UNIFYING);
		}
	}
	cpu->counts[COMPLETED]++;
}

static void on_dsb(unsigned int vcpu, void *data)
{
	struct cpu *cpu = &cpus[vcpu];
	bool local = (place((uintptr_t)data)->word >> 8 & 12) == 4;
	size_t i;
	int n;

	now++;
	if (cpu->invalidating_all && (!cpu->shared || !local)) {
		for (n = 0; n < CPUS; n++) {
			if (!cpu->shared && n != (int)vcpu)
				continue;
			cpus[n].invalidated = now;
			if (n != (int)vcpu) /* it is not said how they come to know, an interrupt most often */
				cpus[n].settled = now;
		}
	}
	if (!local || !cpu->shared)
		cpu->invalidating_all = cpu->shared = false;
	now++;
	if (local)
		return;

	for (i = 0; i < cpu->invalidating.count; i++) {
		uint32_t *time = &times[cpu->invalidating.at[i] / 4], *end = time + 16;

		for (; time < end; time++) {
			if (*time && !(*time & INVALIDATED))
				*time = now | INVALIDATED;
		}
	}
	cpu->invalidating.count = 0;
	now++;

	for (i = 0; i < cpu->cleaning.count; i++)
		complete(cpu, cpu->cleaning.at[i]);
	cpu->cleaning.count = 0;
}

static void on_synchronise(unsigned int vcpu, void *data)
{
	cpus[vcpu].synchronised = ++now;
	cpus[vcpu].settled = cpus[vcpu].invalidated;
}

/* The EL may be another one, or its SCTLR */
static void on_change(unsigned int vcpu, void *data)
{
	cpus[vcpu].known = false;
	forget(&cpus[vcpu]);
	on_synchronise(vcpu, data);
}

static void on_sctlr(unsigned int vcpu, void *data)
{
	cpus[vcpu].known = false;
	cpus[vcpu].sctlr_written = (uintptr_t)data;
	forget(&cpus[vcpu]);
}

static void on_tables(unsigned int vcpu, void *data)
{
	int i;

	for (i = 0; i < CPUS; i++) /* TLBI may be for all of them */
		forget(&cpus[i]);
}

/* Fetches */

/* What a fetch with the I-cache on finds at an offset: KINDS if it is the newest */
static enum kind fetched(unsigned int vcpu, uint64_t offset)
{
	struct cpu *cpu = &cpus[vcpu];
	uint32_t time = times[offset / 4], since = time & ~INVALIDATED;

	if (words[offset / 4] & UNFETCHED)
		return FETCH_UNCLEAN;
	if (!time || dic)
		return KINDS;
	if (cpu->settled > since)
		return KINDS;
	if (time & INVALIDATED)
		return cpu->synchronised < since ? FETCH_NO_ISB : KINDS;
	return cpu->invalidated > since ? FETCH_NO_ISB : FETCH_OLD;
}

/*
 * May it be replaced by another such one while it is executed? B, BL, NOP, BRK: Arm
 * ARM, "Concurrent modification and execution of instructions".
 */
static bool is_replaceable(uint32_t word)
{
	return (word & 0x7c000000) == 0x14000000 || word == 0xd503201f || (word & 0xffe0001f) == 0xd4200000;
}

static void check_cached(unsigned int vcpu, uint64_t pc, uint64_t at, uint32_t word)
{
	enum kind kind = fetched(vcpu, at - RAM);

	if (kind != KINDS && !is_replaceable(word))
		report_at(kind, vcpu, pc, at, at, words[(at - RAM) / 4]);
}

static void check_uncached(unsigned int vcpu, const struct block *block)
{
	const uint32_t *word = &words[(block->at - RAM) / 4];
	uint32_t any = 0;
	size_t i;

	for (i = 0; i < block->count; i++)
		any |= word[i];
	if (likely(!(any & DIRTY)))
		return;
	for (i = 0; i < block->count; i++) {
		if (word[i] & DIRTY)
			report_at(word[i] & CLEANING ? FETCH_NO_DSB : FETCH_OFF, vcpu, block->vaddr + 4 * i,
				  block->at + 4 * i, block->at + 4 * i, word[i]);
	}
}

/* A block below the kernel's half of the address space, where physical addresses are */
static void on_block(unsigned int vcpu, void *data)
{
	struct cpu *cpu = &cpus[vcpu];
	const struct block *block = data;
	bool before = cpu->cached;
	uint32_t written = cpu->sctlr_written;

	if (likely(cpu->known)) {
		if (!cpu->cached)
			goto off;
		return;
	}
	look(cpu);
	cpu->sctlr_written = 0;
	if (written && place(written)->pc + 4 == block->vaddr && before != cpu->cached && !block->isb)
		report_at(NO_ISB, vcpu, place(written)->pc, place(written)->at, 0, 0);
	if (cpu->cached)
		return;
off:
	cpus[vcpu].counts[BLOCKS_OFF]++;
	if (!block->at)
		return;
	if (block->at + 60 < RAM + ram_size && !(block->at & 4095)) {
		uint32_t magic;

		memcpy(&magic, ram + (block->at - RAM) + 56, sizeof(magic));
		if (magic == MAGIC)
			on_kernel(block->at);
	}
	check_uncached(vcpu, block);
}

/* A block of which it is not to be asked; where the next one is it has to be */
static void on_other(unsigned int vcpu, void *data)
{
	cpus[vcpu].known = false;
	cpus[vcpu].cached = true;
}

/* Translation */

struct operation {
	uint32_t mask, value;
	exec_cb cb;
	bool registers;
};

static const struct operation operations[] = {
	{ 0xffffffe0, 0xd50b7420, on_zva, true },
	{ 0xffffffe0, 0xd50b7a20, on_cvac, true },
	{ 0xffffffe0, 0xd50b7c20, on_cvac, true }, /* CVAP */
	{ 0xffffffe0, 0xd50b7d20, on_cvac, true }, /* CVADP */
	{ 0xffffffe0, 0xd50b7b20, on_cvau, true },
	{ 0xffffffe0, 0xd50b7e20, on_civac, true },
	{ 0xffffffe0, 0xd5087620, on_ivac, true },
	{ 0xffffffe0, 0xd5087640, on_set_way, false }, /* ISW */
	{ 0xffffffe0, 0xd5087a40, on_set_way, false }, /* CSW */
	{ 0xffffffe0, 0xd5087e40, on_set_way, false }, /* CISW */
	{ 0xffffffe0, 0xd50b7520, on_ivau, true },
	{ 0xffffffff, 0xd508751f, on_iallu, false },
	{ 0xffffffff, 0xd508711f, on_iallu, false }, /* IALLUIS */
	{ 0xfffff3ff, 0xd503339f, on_dsb, false }, /* of loads and stores */
	{ 0xfffff0ff, 0xd50330df, on_synchronise, false }, /* ISB */
	{ 0xffe0001f, 0xd4000001, on_change, false }, /* SVC */
	{ 0xffe0001f, 0xd4000002, on_change, false }, /* HVC */
	{ 0xffe0001f, 0xd4000003, on_change, false }, /* SMC */
	{ 0xfffff3ff, 0xd69f03e0, on_change, false }, /* ERET */
	{ 0xfff8ffe0, 0xd5384020, on_synchronise, false }, /* MRS ELR_ELx: an exception was taken */
	{ 0xfff8ffe0, 0xd5181000, on_sctlr, false }, /* MSR SCTLR_ELx */
	{ 0xfff8ff80, 0xd5182000, on_tables, false }, /* MSR TTBRn_ELx, TCR_ELx */
	{ 0xfff8f000, 0xd5088000, on_tables, false }, /* TLBI */
};

static void watch(struct qemu_plugin_insn *insn, uint32_t word, uint32_t number)
{
	size_t i;

	for (i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
		const struct operation *one = &operations[i];

		if ((word & one->mask) != one->value)
			continue;
		qemu_plugin_register_vcpu_insn_exec_cb(insn, one->cb,
						       one->registers ? QEMU_PLUGIN_CB_R_REGS : QEMU_PLUGIN_CB_NO_REGS,
						       one->cb == on_iallu ? (void *)(uintptr_t)(word == 0xd508711f) :
						       (void *)(uintptr_t)number);
		return;
	}
}

static bool is_load_store(uint32_t word)
{
	return (word & 0x0a000000) == 0x08000000;
}

static bool is_system(uint32_t word)
{
	return (word & 0xffc00000) == 0xd5000000 || (word & 0xfe000000) == 0xd4000000 ||
	       (word & 0xfffff3ff) == 0xd69f03e0;
}

/* The physical address of an instruction, 0 if it is not in RAM */
static uint64_t at_of(const struct qemu_plugin_insn *insn)
{
	uint8_t *host = qemu_plugin_insn_haddr(insn);

	return host && ram && host >= ram && host < ram + ram_size ? RAM + (host - ram) : 0;
}

static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	uint64_t vaddr = qemu_plugin_tb_vaddr(tb), at;
	size_t i, length = qemu_plugin_tb_n_insns(tb);
	bool either = vaddr - RAM < ram_size;

	/* What executes first in RAM is what QEMU, or firmware, runs at its physical address */
	if (!ram && either)
		ram = (uint8_t *)qemu_plugin_insn_haddr(qemu_plugin_tb_get_insn(tb, 0)) - (vaddr - RAM);
	at = at_of(qemu_plugin_tb_get_insn(tb, 0));

	if (either) {
		struct block *block = malloc(sizeof(*block));

		if (!block)
			abort();
		*block = (struct block) {
			vaddr, at, length,
			(word_of(qemu_plugin_tb_get_insn(tb, 0)) & 0xfffff0ff) == 0xd50330df
		};
		qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_R_REGS, block);
	} else if (!(vaddr >> 63)) {
		qemu_plugin_register_vcpu_tb_exec_cb(tb, on_other, QEMU_PLUGIN_CB_NO_REGS, NULL);
	}

	for (i = 0; i < length; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint32_t word = word_of(insn), number;

		at = at_of(insn);
		/* With the MMU off this is looked at when it is executed, and is no fetch from the I-cache */
		if (at && (!either || cpus[current].fetch_cached))
			check_cached(current, vaddr + 4 * i, at, word);
		if (!is_load_store(word) && !is_system(word))
			continue;
		number = new_place(vaddr + 4 * i, at, word);
		if (is_load_store(word))
			qemu_plugin_register_vcpu_mem_cb(insn, either ? on_memory_either : on_memory,
							 QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW,
							 (void *)(uintptr_t)number);
		else
			watch(insn, word, number);
	}
}

static void on_cpu(qemu_plugin_id_t id, unsigned int vcpu)
{
	GArray *all = qemu_plugin_get_registers();
	qemu_plugin_reg_descriptor *reg = (qemu_plugin_reg_descriptor *)all->data;
	struct cpu *cpu = &cpus[vcpu];
	unsigned int i, n;

	if (vcpu >= CPUS)
		abort();
	for (i = 0; i < all->len; i++, reg++) {
		for (n = 0; n < X0; n++) {
			if (!strcmp(reg->name, reg_names[n]))
				cpu->regs[n] = reg->handle;
		}
		if (reg->name[0] == 'x' && reg->name[1] >= '0' && reg->name[1] <= '9' && atoi(reg->name + 1) < 31)
			cpu->regs[X0 + atoi(reg->name + 1)] = reg->handle;
	}
	g_array_free(all, 1);
	cpu->buffer = g_byte_array_new();
	current = vcpu;
	forget(cpu);
	for (n = 0; n < X0; n++) {
		if (!cpu->regs[n] && n != HCR && n < SCTLR2) {
			fprintf(stderr, "caches: this QEMU does not show %s\n", reg_names[n]);
			abort();
		}
	}
}

static void *room(uint64_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED) {
		perror("caches");
		exit(1);
	}
	return memory;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	int i;

	for (i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "out=", 4)) {
			out = fopen(argv[i] + 4, "a");
		} else if (!strncmp(argv[i], "size=", 5)) {
			ram_size = strtoul(argv[i] + 5, NULL, 0);
		} else if (!strcmp(argv[i], "strict=off")) {
			strict = false;
		} else {
			fprintf(stderr, "caches: '%s' is not understood\n", argv[i]);
			return 1;
		}
	}
	if (!out || !ram_size) {
		fprintf(stderr, "caches: out= and size= are needed\n");
		return 1;
	}
	words = room(ram_size + 4096);
	times = room(ram_size + 4096);
	held = room(ram_size / 64 + 4096);
	qemu_plugin_register_vcpu_init_cb(id, on_cpu);
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
	return 0;
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * The inspector: is executed by kexec in place of a kernel, and tells whether
 * the state is what a kernel may expect (Documentation/arch/arm64/booting.rst),
 * and memory what was sent
 *
 * It runs with the MMU off all the time. So what it reads is what is behind the
 * caches: the Point of Coherency. It reports to a UART, as KTAP, and then turns
 * the machine off or resets it.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "inspector.h"

#define PSCI_SYSTEM_OFF		0x84000008
#define PSCI_SYSTEM_RESET	0x84000009

#define SCTLR_M			0x1UL
#define SCTLR_C			0x4UL
#define SCTLR_I			0x1000UL
#define SCTLR_EE		0x2000000UL
#define DAIF_ALL		0x3c0UL
#define ISR_A			0x100UL
#define HCR_E2H			0x400000000UL
#define DTB_MAGIC		0xedfe0dd0	/* read as little endian */
#define GICC_RPR		0x14
#define RPR_IDLE		0xff

#define MIB			0x100000UL
#define SHOWN			8	/* ranges of which details are given */
#define TESTS			16

/* What inspector_entry.S found */
struct entry_state {
	uint64_t x[4];
	uint64_t sp, current_el, daif, spsel, sctlr, hcr, isr, pc;
};

static unsigned int number, failed, skipped, exceptions;
static uint32_t crc_of_byte[256];

#define read_reg(name) ({						\
	uint64_t _value;						\
	asm volatile("mrs %0, " name : "=r" (_value) : : "memory");	\
	_value;								\
})

static uint32_t read_device(uint64_t addr, uint32_t width)
{
	uint32_t value;

	if (width == 4)
		asm volatile("ldr %w0, [%1]" : "=r" (value) : "r" (addr) : "memory");
	else if (width == 2)
		asm volatile("ldrh %w0, [%1]" : "=r" (value) : "r" (addr) : "memory");
	else
		asm volatile("ldrb %w0, [%1]" : "=r" (value) : "r" (addr) : "memory");
	return value;
}

static void write_device(uint64_t addr, uint32_t width, uint32_t value)
{
	if (width == 4)
		asm volatile("str %w0, [%1]" : : "r" (value), "r" (addr) : "memory");
	else if (width == 2)
		asm volatile("strh %w0, [%1]" : : "r" (value), "r" (addr) : "memory");
	else
		asm volatile("strb %w0, [%1]" : : "r" (value), "r" (addr) : "memory");
}

static void put_char(char c)
{
	const struct inspector_args *a = &inspector_args;
	unsigned int patience = 1 << 20;

	if (!a->uart)
		return;
	while ((read_device(a->uart + a->uart_status, a->uart_width) & 0x20) == a->uart_busy) {
		if (!--patience)
			return;
	}
	write_device(a->uart, a->uart_width, (uint8_t)c);
}

static void put(const char *s)
{
	while (*s) {
		if (*s == '\n')
			put_char('\r');
		put_char(*s++);
	}
}

static void put_hex(uint64_t value)
{
	int shift = 60;

	put("0x");
	while (shift && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put_char("0123456789abcdef"[value >> shift & 15]);
}

static void put_dec(uint64_t value)
{
	if (value > 9)
		put_dec(value / 10);
	put_char('0' + value % 10);
}

/* " name value" */
static void put_value(const char *name, uint64_t value)
{
	put(" ");
	put(name);
	put(" ");
	put_hex(value);
}

static void result(bool good, const char *what)
{
	put(good ? "ok " : "not ok ");
	put_dec(++number);
	put(" ");
	put(what);
	put("\n");
	if (!good)
		failed++;
}

/* A register that has to have a certain value */
static void check(const char *what, uint64_t found, uint64_t expected)
{
	if (found != expected) {
		put("#");
		put_value("found", found);
		put_value("expected", expected);
		put("\n");
	}
	result(found == expected, what);
}

static void skip(const char *what, const char *why)
{
	put("ok ");
	put_dec(++number);
	put(" ");
	put(what);
	put(" # SKIP ");
	put(why);
	put("\n");
	skipped++;
}

static void call_psci(uint64_t function)
{
	register uint64_t x0 asm("x0") = function;

	if (inspector_args.psci == INSPECT_PSCI_HVC)
		asm volatile("hvc #0" : "+r" (x0) : : "x1", "x2", "x3", "memory");
	else if (inspector_args.psci == INSPECT_PSCI_SMC)
		asm volatile("smc #0" : "+r" (x0) : : "x1", "x2", "x3", "memory");
}

static _Noreturn void end(void)
{
	uint32_t how = inspector_args.end;

	put("# Totals: pass:");
	put_dec(number - failed - skipped);
	put(" fail:");
	put_dec(failed);
	put(" xfail:0 xpass:0 skip:");
	put_dec(skipped);
	put(" error:0\n");

	if (how == INSPECT_VERDICT)
		how = failed ? INSPECT_RESET : INSPECT_OFF;
	if (how != INSPECT_PARK && inspector_args.psci != INSPECT_PSCI_NONE) {
		bool off = how == INSPECT_OFF;

		put(off ? "# inspector: powering off\n" : "# inspector: resetting\n");
		call_psci(off ? PSCI_SYSTEM_OFF : PSCI_SYSTEM_RESET);
		put("# inspector: that failed\n");
	}
	put("# inspector: parked\n");
	for (;;)
		asm volatile("wfi");
}

/* Called by the vectors */
void unexpected(uint64_t vector, uint64_t esr, uint64_t elr, uint64_t far);
void unexpected(uint64_t vector, uint64_t esr, uint64_t elr, uint64_t far)
{
	if (exceptions++) {
		for (;;)
			asm volatile("wfi");	/* while reporting another one */
	}
	put("#");
	put_value("vector", vector);
	put_value("ESR", esr);
	put_value("ELR, from the inspector's start,", elr - (uint64_t)inspector_start);
	put_value("FAR", far);
	put("\n");
	result(false, "no exception");
	end();
}

/* Registers */

static void check_registers(const struct entry_state *s)
{
	const struct inspector_args *a = &inspector_args;
	uint64_t el = s->current_el >> 2;

	put("# EL");
	put_dec(el);
	put_value("SCTLR", s->sctlr);
	put_value("DAIF", s->daif);
	put_value("SPSel", s->spsel);
	put_value("SP", s->sp);
	if (el == 2)
		put_value("HCR", s->hcr);
	put(s->sctlr & SCTLR_I ? ", I-cache on\n" : ", I-cache off\n");

	if (a->el)
		check("exception level", el, a->el);
	else
		skip("exception level", "not told which");
	check("MMU is off", s->sctlr & SCTLR_M, 0);
	check("D-cache is off", s->sctlr & SCTLR_C, 0);
	check("little endian", s->sctlr & SCTLR_EE, 0);
	check("all exceptions are masked", s->daif & DAIF_ALL, DAIF_ALL);
	check("no SError is pending", s->isr & ISR_A, 0);

	if (a->flags & INSPECT_X0_IS_DTB)
		check("x0 points to a device tree",
		      s->x[0] & 7 ? 0 : *(uint32_t *)s->x[0], DTB_MAGIC);
	else
		check("x0 is what it was to be", s->x[0], a->x0);
	check("x1 to x3 are 0", s->x[1] | s->x[2] | s->x[3], 0);

	if (a->flags & INSPECT_PLACED)
		check("at a multiple of 2 MiB", s->pc & (2 * MIB - 1), 0);
	else if (a->entry)
		check("at the address it was sent to", s->pc, a->entry);
	else
		skip("at the address it was sent to", "not told where");
}

/* A field of an ID register */
#define feature(id, shift) (read_reg(id) >> (shift) & 15)

/* A register that older CPUs do not have, if this one has */
#define show(name, encoding, there) do {				\
	if (there)							\
		put_value(name, read_reg(encoding));			\
} while (0)

/*
 * Registers that are younger than many a kernel, which leaves them as they are,
 * and that booting.rst does not ask the boot loader for. Those of them that
 * change what such a kernel does have to be off; all are shown. With HCR_EL2.E2H
 * the names of EL1 are registers of EL2, and those of EL1 end in EL12.
 */
static void check_younger_registers(const struct entry_state *s)
{
	bool el2 = s->current_el >> 2 == 2, vhe = el2 && s->hcr & HCR_E2H;
	bool tcr2 = feature("s3_0_c0_c7_3", 0), sctlr2 = feature("s3_0_c0_c7_3", 4);
	bool pie = feature("s3_0_c0_c7_3", 8), poe = feature("s3_0_c0_c7_3", 16);
	bool gcs = feature("s3_0_c0_c4_1", 44), fgt = feature("s3_0_c0_c7_0", 56);
	bool trace = feature("s3_0_c0_c5_0", 40), mpam = feature("s3_0_c0_c4_0", 40);
	uint64_t on = 0;

	put("# younger:");
	show("CPACR_EL1", "s3_0_c1_c0_2", !vhe);
	show("CNTKCTL_EL1", "s3_0_c14_c1_0", !vhe);
	show("TCR2_EL1", "s3_0_c2_c0_3", tcr2 && !vhe);
	show("SCTLR2_EL1", "s3_0_c1_c0_3", sctlr2 && !vhe);
	show("PIR_EL1", "s3_0_c10_c2_3", pie && !vhe);
	show("PIRE0_EL1", "s3_0_c10_c2_2", pie && !vhe);
	show("POR_EL0", "s3_3_c10_c2_4", poe);
	show("POR_EL1", "s3_0_c10_c2_4", poe && !vhe);
	show("GCSCR_EL1", "s3_0_c2_c5_0", gcs && !vhe);
	show("GCSCRE0_EL1", "s3_0_c2_c5_2", gcs);
	show("FPMR", "s3_3_c4_c4_2", feature("s3_0_c0_c4_2", 32));
	show("TRFCR_EL1", "s3_0_c1_c2_1", trace && !vhe);
	show("MPAM1_EL1", "s3_0_c10_c5_0", mpam && !vhe);
	show("MPAM0_EL1", "s3_0_c10_c5_1", mpam);
	if (tcr2 && !vhe)
		on |= read_reg("s3_0_c2_c0_3");

	if (el2) {
		bool fgt2 = feature("s3_0_c0_c7_0", 56) > 1;

		show("CPTR_EL2", "s3_4_c1_c1_2", true);
		show("MDCR_EL2", "s3_4_c1_c1_1", true);
		show("CNTHCTL_EL2", "s3_4_c14_c1_0", true);
		show("HCRX_EL2", "s3_4_c1_c2_2", feature("s3_0_c0_c7_1", 40));
		show("HFGRTR_EL2", "s3_4_c1_c1_4", fgt);
		show("HFGWTR_EL2", "s3_4_c1_c1_5", fgt);
		show("HFGITR_EL2", "s3_4_c1_c1_6", fgt);
		show("HDFGRTR_EL2", "s3_4_c3_c1_4", fgt);
		show("HDFGWTR_EL2", "s3_4_c3_c1_5", fgt);
		show("HFGRTR2_EL2", "s3_4_c3_c1_2", fgt2);
		show("HFGWTR2_EL2", "s3_4_c3_c1_3", fgt2);
		show("HFGITR2_EL2", "s3_4_c3_c1_7", fgt2);
		show("HDFGRTR2_EL2", "s3_4_c3_c1_0", fgt2);
		show("HDFGWTR2_EL2", "s3_4_c3_c1_1", fgt2);
		show("TCR2_EL2", "s3_4_c2_c0_3", tcr2);
		show("SCTLR2_EL2", "s3_4_c1_c0_3", sctlr2);
		show("PIR_EL2", "s3_4_c10_c2_3", pie);
		show("PIRE0_EL2", "s3_4_c10_c2_2", pie && vhe);
		show("POR_EL2", "s3_4_c10_c2_4", poe);
		show("GCSCR_EL2", "s3_4_c2_c5_0", gcs);
		show("TRFCR_EL2", "s3_4_c1_c2_1", trace);
		show("MPAM2_EL2", "s3_4_c10_c5_0", mpam);
		if (tcr2)
			on |= read_reg("s3_4_c2_c0_3");
	}
	if (vhe) {
		show("CPACR_EL12", "s3_5_c1_c0_2", true);
		show("TCR2_EL12", "s3_5_c2_c0_3", tcr2);
		show("SCTLR2_EL12", "s3_5_c1_c0_3", sctlr2);
		show("PIR_EL12", "s3_5_c10_c2_3", pie);
		show("PIRE0_EL12", "s3_5_c10_c2_2", pie);
		show("POR_EL12", "s3_5_c10_c2_4", poe);
		show("GCSCR_EL12", "s3_5_c2_c5_0", gcs);
		show("MPAM1_EL12", "s3_5_c10_c5_0", mpam);
		if (tcr2)
			on |= read_reg("s3_5_c2_c0_3");
	}
	put("\n");
	check("TCR2 is 0 at EL1 and EL2, or there is none", on, 0);
}

static void check_timer(void)
{
	uint64_t frequency = read_reg("cntfrq_el0");
	uint64_t begin = read_reg("cntvct_el0"), now = begin;
	unsigned int patience = 1 << 24;

	put("#");
	put_value("CNTFRQ", frequency);
	put_value("CNTVCT", begin);
	put("\n");
	while (now == begin && --patience) {
		asm volatile("isb" : : : "memory");	/* read it now, not earlier */
		now = read_reg("cntvct_el0");
	}
	result(frequency && now > begin, "the timer runs, its frequency is known");
}

/*
 * No interrupt may be active: the CPU interface would hold back those that are
 * less important, for ever.
 */
static void check_gic(void)
{
	uint64_t el2 = read_reg("CurrentEL") >> 2 == 2;
	uint64_t sre, rpr;

	if (inspector_args.gicc) {
		check("GIC: no interrupt is active",
		      read_device(inspector_args.gicc + GICC_RPR, 4) & 0xff, RPR_IDLE);
		return;
	}
	/* GICv5: priorities that are active, and whether the interface is enabled */
	if (read_reg("s3_0_c0_c4_2") >> 12 & 15) {
		check("GIC: no interrupt is active",
		      read_reg("s3_1_c12_c0_0") | (read_reg("s3_1_c12_c0_1") & 1) << 32, 0);
		return;
	}
	if (!(read_reg("id_aa64pfr0_el1") >> 24 & 15)) {
		skip("GIC: no interrupt is active", "no registers, and not told where it is");
		return;
	}
	/* At EL2, ICC_SRE_EL1 only counts if ICC_SRE_EL2 lets it */
	sre = el2 ? read_reg("s3_4_c12_c9_5") : read_reg("s3_0_c12_c12_5");
	if (!(sre & 1)) {
		put("#");
		put_value("ICC_SRE", sre);
		put("\n");
		result(false, "GIC: its system registers can be used");
		return;
	}
	rpr = read_reg("s3_0_c12_c11_3");
	check("GIC: no interrupt is active", rpr & 0xff, RPR_IDLE);
}

/* Memory */

static bool check_args(void)
{
	struct inspector_args *a = &inspector_args;
	uint32_t crc = a->crc, found;

	a->crc = 0;
	found = crc32c(crc_of_byte, ~0, a, a->size);
	a->crc = crc;
	check("its arguments are whole", found, crc);
	return found == crc;
}

static uint64_t expected_word(const struct inspector_range *r, uint64_t addr)
{
	return r->contents == INSPECT_PATTERN ? inspector_pattern(addr, r->value) : 0;
}

/* Details of a range that is not as it should be; the word at @addr is */
static void describe(const struct inspector_range *r, uint64_t addr, uint64_t words)
{
	static const char names[][12] = { "destination", "watched", "inspector" };
	uint64_t found, expected;

	put("# ");
	put(names[r->kind]);
	put(" ");
	put_dec(r->number);
	put_value("at", r->start);
	put_value("size", r->size);
	if (r->contents == INSPECT_CRC32C) {
		put_value("CRC32C", addr);
		put_value("expected", r->value);
		put("\n");
		return;
	}
	found = *(uint64_t *)(addr & ~7UL);
	expected = expected_word(r, addr & ~7UL);
	/* From the word to the byte, in which @addr may be already */
	while (((found ^ expected) >> 8 * (addr & 7) & 0xff) == 0)
		addr++;
	put_value("first difference at", addr);
	put_value("found", found >> 8 * (addr & 7) & 0xff);
	put_value("expected", expected >> 8 * (addr & 7) & 0xff);
	put(", words that differ: ");
	put_dec(words);
	put("\n");
}

static uint64_t difference(const struct inspector_range *r, uint64_t addr)
{
	return *(uint64_t *)addr ^ expected_word(r, addr);
}

static bool check_range(const struct inspector_range *r, bool show)
{
	uint64_t addr = r->start, end = r->start + r->size, last = end & ~7UL;
	uint64_t first = 0, words = 0, mask;

	if (r->contents == INSPECT_CRC32C) {
		uint64_t base = r->kind == INSPECT_SELF ? (uint64_t)inspector_start : 0;
		uint32_t crc = crc32c(crc_of_byte, ~0, (void *)(base + r->start), r->size);

		if (crc != r->value && show)
			describe(r, crc, 0);
		return crc == r->value;
	}

	/* Bytes of a word that begins before the range, or ends behind it */
	if (addr & 7) {
		mask = ~0UL << 8 * (addr & 7);
		if ((addr & ~7UL) == last)
			mask &= ~(~0UL << 8 * (end & 7));
		if (difference(r, addr & ~7UL) & mask) {
			first = addr;
			words++;
		}
		addr = (addr & ~7UL) + 8;
	}
	for (; addr < last; addr += 8) {
		if (difference(r, addr) && !words++)
			first = addr;
	}
	if (addr == last && end & 7 && difference(r, last) & ~(~0UL << 8 * (end & 7)) && !words++)
		first = last;

	if (words && show)
		describe(r, first, words);
	return !words;
}

static void check_ranges(enum inspector_kind kind, bool known, const char *what)
{
	const struct inspector_args *a = &inspector_args;
	unsigned int i, bad = 0, looked_at = 0;
	uint64_t bytes = 0;

	for (i = 0; known && i < a->nr_ranges; i++) {
		const struct inspector_range *r = &a->ranges[i];

		if (r->kind != kind)
			continue;
		looked_at++;
		bytes += r->size;
		if (!check_range(r, bad < SHOWN))
			bad++;
	}
	if (!looked_at) {
		skip(what, known ? "there is none" : "it does not know which");
		return;
	}
	put("# ");
	put_dec(looked_at);
	put(" ranges, bytes: ");
	put_dec(bytes);
	put(", ranges that differ: ");
	put_dec(bad);
	put("\n");
	result(!bad, what);
}

/* Called by inspector_entry.S, on a stack of its own */
void inspect(const struct entry_state *s);
void inspect(const struct entry_state *s)
{
	bool memory;

	if (inspector_args.magic != INSPECTOR_MAGIC)
		return;		/* it can't tell where to report that */
	crc32c_table(crc_of_byte);

	put("\nTAP version 13\n1..");
	put_dec(TESTS);
	put("\n");
	check_registers(s);
	check_younger_registers(s);
	check_timer();
	check_gic();
	memory = check_args();
	check_ranges(INSPECT_SELF, memory, "the inspector itself is whole");
	check_ranges(INSPECT_DESTINATION, memory, "destinations hold what was sent");
	check_ranges(INSPECT_WATCHED, memory, "watched memory is untouched");
	end();
}

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the loader hands to the inspector
 *
 * The inspector is a flat binary of less than INSPECTOR_SIZE bytes that can be
 * executed at any multiple of 4 KiB. Its stack and variables are behind it, and
 * at INSPECTOR_SIZE it expects struct inspector_args, in the same segment.
 */
#ifndef KEXEC_ARM64_INSPECTOR_H
#define KEXEC_ARM64_INSPECTOR_H

#define INSPECTOR_SIZE		0x10000
#define INSPECTOR_STACK		0x2000

#define HEADER_IMAGE_SIZE	16	/* offset in an Image, see booting.rst */

/* struct inspector_args, flags */
#define INSPECT_X0_IS_DTB	1	/* as with kexec_file_load() */
#define INSPECT_PLACED		2	/* the kernel chose the address: a multiple of 2 MiB */

#ifndef __ASSEMBLER__
#include <stdint.h>

#define INSPECTOR_MAGIC		0x726f746365707369	/* "ispector", little endian */

enum inspector_psci {
	INSPECT_PSCI_NONE,
	INSPECT_PSCI_HVC,
	INSPECT_PSCI_SMC,
};

/* What it does when it has reported */
enum inspector_end {
	INSPECT_VERDICT,	/* power off if all is well, else reset */
	INSPECT_OFF,
	INSPECT_RESET,
	INSPECT_PARK,
};

/* What memory has to hold */
enum inspector_contents {
	INSPECT_PATTERN,	/* inspector_pattern() of each address and @value */
	INSPECT_ZERO,
	INSPECT_CRC32C,		/* anything that has @value */
};

enum inspector_kind {
	INSPECT_DESTINATION,
	INSPECT_WATCHED,
	INSPECT_SELF,
};

/**
 * struct inspector_range - memory to be looked at
 * @start: physical address, of any alignment; for INSPECT_SELF, offset from the
 *         inspector's own
 * @size: bytes
 * @value: seed of a pattern, or CRC32C
 * @contents: enum inspector_contents
 * @kind: enum inspector_kind
 * @number: of the segment, or of the piece of watched memory
 */
struct inspector_range {
	uint64_t start;
	uint64_t size;
	uint64_t value;
	uint16_t contents;
	uint16_t kind;
	uint32_t number;
};

/**
 * struct inspector_args - what the inspector has to know
 * @magic: INSPECTOR_MAGIC
 * @size: bytes, @ranges included
 * @crc: CRC32C of all these, this member taken for 0
 * @el: exception level that has to be found, 0: any
 * @flags: INSPECT_X0_IS_DTB, INSPECT_PLACED
 * @entry: physical address at which it is to be, 0: any
 * @x0: what x0 has to be, unless INSPECT_X0_IS_DTB
 * @uart: physical address of the UART, 0: none
 * @uart_status: offset of the register that tells whether there is room
 * @uart_busy: bits 5 of it if that is set when there is none, else 0
 * @uart_width: bytes of an access: 1, 2 or 4
 * @psci: enum inspector_psci
 * @gicc: physical address of a GICv2's CPU interface, 0: none
 * @end: enum inspector_end
 * @nr_ranges: number of @ranges
 * @ranges: memory to be looked at
 */
struct inspector_args {
	uint64_t magic;
	uint32_t size;
	uint32_t crc;
	uint32_t el;
	uint32_t flags;
	uint64_t entry;
	uint64_t x0;
	uint64_t uart;
	uint32_t uart_status;
	uint32_t uart_busy;
	uint32_t uart_width;
	uint32_t psci;
	uint64_t gicc;
	uint32_t end;
	uint32_t nr_ranges;
	struct inspector_range ranges[];
};

/* Of the inspector, for itself: where it is, and what it was told */
extern const char inspector_start[];
extern struct inspector_args inspector_args;

/**
 * inspector_pattern() - what a word of memory holds
 * @addr: physical address, a multiple of 8
 * @seed: any number
 *
 * Tells addresses apart, so that a page in another one's place shows.
 *
 * Return: the word, little endian.
 */
static inline uint64_t inspector_pattern(uint64_t addr, uint64_t seed)
{
	uint64_t word = (addr ^ seed) * 0x9e3779b97f4a7c15;

	return word ^ word >> 32;
}

/**
 * crc32c_table() - prepare for crc32c()
 * @table: the CRC of each byte
 */
static inline void crc32c_table(uint32_t table[256])
{
	unsigned int byte, bit;

	for (byte = 0; byte < 256; byte++) {
		uint32_t crc = byte;

		for (bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
		table[byte] = crc;
	}
}

/**
 * crc32c() - fold bytes into a CRC32C, as the CPU's instructions have it
 * @table: from crc32c_table()
 * @crc: of what came before, ~0 to begin with
 * @from: the bytes
 * @size: their number
 *
 * Return: the new CRC.
 */
static inline uint32_t crc32c(const uint32_t table[256], uint32_t crc,
			      const void *from, uint64_t size)
{
	const uint8_t *byte = from;

	while (size--)
		crc = crc >> 8 ^ table[(crc ^ *byte++) & 0xff];
	return crc;
}
#endif
#endif

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kexec and kdump for arm64, see Documentation/arch/arm64/kexec.rst
 *
 * Replaces the implementation by Geoff Levand, James Morse, AKASHI Takahiro
 * and Pavel Tatashin.
 */
#ifndef _ARM64_KEXEC_H
#define _ARM64_KEXEC_H

/* All of memory can be a source, a destination or a control page */
#define KEXEC_SOURCE_MEMORY_LIMIT	(-1UL)
#define KEXEC_DESTINATION_MEMORY_LIMIT	(-1UL)
#define KEXEC_CONTROL_MEMORY_LIMIT	(-1UL)

/* Code, then vectors (see TRANS_PGD_VECTORS_OFFSET), then arguments */
#define KEXEC_CONTROL_PAGE_SIZE		8192
#define KEXEC_ARGS_OFFSET		4096

#define KEXEC_ARCH			KEXEC_ARCH_AARCH64

/* kexec_control_args.psci: how firmware is called, 0 if it can't be */
#define KEXEC_PSCI_SMC			1
#define KEXEC_PSCI_HVC			2

#ifndef __ASSEMBLER__

#include <linux/string.h>
#include <linux/types.h>

#include <asm/ptrace.h>
#include <asm/sysreg.h>

/**
 * crash_setup_regs() - the registers that the crash dump shows for this CPU
 * @newregs: filled in
 * @oldregs: registers at the exception that led here, or NULL if there was
 *           none: then those of the caller are taken, as they are now
 *
 * Context: any, on the crashing CPU.
 */
static __always_inline void crash_setup_regs(struct pt_regs *newregs,
					     struct pt_regs *oldregs)
{
	u64 pstate;

	if (oldregs) {
		memcpy(newregs, oldregs, sizeof(*newregs));
		return;
	}

	/* regs[0] to regs[30], then sp and pc, follow each other in pt_regs */
	asm volatile("stp	x0, x1, [%[regs], #0x00]\n"
		     "stp	x2, x3, [%[regs], #0x10]\n"
		     "stp	x4, x5, [%[regs], #0x20]\n"
		     "stp	x6, x7, [%[regs], #0x30]\n"
		     "stp	x8, x9, [%[regs], #0x40]\n"
		     "stp	x10, x11, [%[regs], #0x50]\n"
		     "stp	x12, x13, [%[regs], #0x60]\n"
		     "stp	x14, x15, [%[regs], #0x70]\n"
		     "stp	x16, x17, [%[regs], #0x80]\n"
		     "stp	x18, x19, [%[regs], #0x90]\n"
		     "stp	x20, x21, [%[regs], #0xa0]\n"
		     "stp	x22, x23, [%[regs], #0xb0]\n"
		     "stp	x24, x25, [%[regs], #0xc0]\n"
		     "stp	x26, x27, [%[regs], #0xd0]\n"
		     "stp	x28, x29, [%[regs], #0xe0]\n"
		     "mov	%[tmp], sp\n"
		     "stp	x30, %[tmp], [%[regs], #0xf0]\n"
		     "adr	%[tmp], .\n"
		     "str	%[tmp], [%[regs], #0x100]\n"
		     : [tmp] "=&r" (pstate)
		     : [regs] "r" (newregs)
		     : "memory");

	/* PSTATE can't be read as a whole, SPSR has these fields where they are */
	pstate = read_sysreg(CurrentEL) | read_sysreg(SPSel) |
		 read_sysreg(daif) | read_sysreg(nzcv);
	newregs->pstate = pstate;
}

#ifdef CONFIG_CRASH_DUMP
void arch_kexec_protect_crashkres(void);
#define arch_kexec_protect_crashkres arch_kexec_protect_crashkres

void arch_kexec_unprotect_crashkres(void);
#define arch_kexec_unprotect_crashkres arch_kexec_unprotect_crashkres
#endif

#if defined(CONFIG_CRASH_DUMP) && defined(CONFIG_HIBERNATION)
bool crash_is_nosave(unsigned long pfn);
#else
static inline bool crash_is_nosave(unsigned long pfn) { return false; }
#endif

struct kimage;

#ifdef CONFIG_KEXEC_CORE
void cpu_soft_restart(unsigned long el2_switch, unsigned long entry,
		      unsigned long arg0, unsigned long arg1,
		      unsigned long arg2);

int machine_kexec_post_load(struct kimage *image);
#define machine_kexec_post_load machine_kexec_post_load

void machine_kexec_resumed(void);
#else
static inline void machine_kexec_resumed(void) { }
#endif

#define ARCH_HAS_KIMAGE_ARCH

/**
 * struct kimage_arch - what arm64 keeps with a loaded image
 * @dtb: device tree of a kexec_file_load() image, kvmalloc()ed
 * @dtb_mem: physical address that @dtb gets copied to; 0 for kexec_load(),
 *           where the image itself knows
 * @bytes_to_move: size of what is not yet where it will be executed
 * @bytes_in_place: size of the rest
 * @relocate: something has to be moved, so the control page is filled in
 * @timing: physical address of struct kexec_timing_values in the device tree
 *          that will be executed, or 0
 * @ttbr0: physical address of the table that maps the control page
 * @t0sz: TCR_EL1.T0SZ that @ttbr0 needs
 * @verify: @crc is valid and checked before and during execution
 * @crc: CRC32C of each segment as it was loaded, in the order of the segments
 * @list_crc: CRC32C of the entries in the kimage list, the last one included
 * @list_entries: how many there are
 */
struct kimage_arch {
	void *dtb;
	phys_addr_t dtb_mem;
	unsigned long bytes_to_move;
	unsigned long bytes_in_place;
	bool relocate;
	phys_addr_t timing;
	phys_addr_t ttbr0;
	unsigned long t0sz;
#ifdef CONFIG_ARM64_KEXEC_VERIFY
	bool verify;
	u32 crc[16];
	u32 list_crc;
	u64 list_entries;
#endif
};

/**
 * struct kexec_control_crc - what a segment that gets moved has to contain
 * @crc: CRC32C, without the customary inversion at the end
 * @segment: its number in the image
 * @ignore: not 0 if it may change after it was loaded, so that @crc means
 *          nothing
 */
struct kexec_control_crc {
	u32 crc;
	u16 segment;
	u16 ignore;
};

/**
 * struct kexec_timing_values - when and how much, as the device tree has it
 * @begin: the reboot call began, ticks of CNTVCT_EL0
 * @devices: the image was verified, and devices were shut down
 * @cpus: all other CPUs were off
 * @shutdown: the system was shut down
 * @copied: how much was not where it is executed, bytes
 * @in_place: how much was, bytes
 * @copy_start: the control page was entered
 * @copy_end: all of the image is where it is executed, and clean to the PoC
 */
struct kexec_timing_values {
	__be64 begin;
	__be64 devices;
	__be64 cpus;
	__be64 shutdown;
	__be64 copied;
	__be64 in_place;
	__be64 copy_start;
	__be64 copy_end;
} __packed __aligned(4);

/**
 * struct kexec_control_args - arguments of the code in the control page
 * @ttbr1: physical address of the transitional linear map
 * @reserved_ttbr1: physical address of a table without entries; it is the
 *                  kernel's own and not used once copying has begun
 * @va_offset: from a physical address to where the linear map has it
 * @head: first entry of the kimage list
 * @start: physical address of the entry to the new image
 * @dtb_mem: physical address of its device tree, or 0
 * @el2: not 0 if EL2 has to be entered from EL1 by an HVC
 * @verify: not 0 if @list and @crc are valid
 * @zva: size of the block that DC ZVA zeroes, bytes; 0 if it must not be used.
 *       Follows @verify
 * @list_entries: number of entries in the kimage list, the last one included
 * @list: what these entries have to be; its segment has no meaning
 * @crc: the segments in the order of the list; follows @list
 * @uart: physical address of the UART's data register, 0 if there is none
 * @uart_status: from there to the status register, bytes
 * @uart_busy: bit 5 as it is in the status register while there is no room
 * @uart_width: width of a register access, bytes
 * @psci: KEXEC_PSCI_SMC or KEXEC_PSCI_HVC, 0 if there is no PSCI
 * @panic_timeout: as it was when the image was executed
 * @timing: physical address of where the values go once all is copied, or 0
 * @timing_values: the values; the control page adds its own. Follows @timing
 *
 * They stand at KEXEC_ARGS_OFFSET in the control page, whose code finds them
 * relative to its PC.
 */
struct kexec_control_args {
	u64 ttbr1;
	u64 reserved_ttbr1;
	u64 va_offset;
	u64 head;
	u64 start;
	u64 dtb_mem;
	u64 el2;
	u64 verify;
	u64 zva;
	u64 list_entries;
	struct kexec_control_crc list;
	struct kexec_control_crc crc[16];
	u64 uart;
	u32 uart_status;
	u32 uart_busy;
	u32 uart_width;
	u32 psci;
	s32 panic_timeout;
	u64 timing;
	struct kexec_timing_values timing_values;
};

extern char kexec_fault[];

int kexec_check_cpus(void);
void kexec_stop_cpus(void);

void kexec_report_init(struct kexec_control_args *args);
void kexec_report_leave(struct kexec_control_args *args);

int machine_kexec_verify(const struct kimage *image);
#define machine_kexec_verify machine_kexec_verify

#ifdef CONFIG_ARM64_KEXEC_VERIFY
void kexec_verify_init(struct kimage *image, struct kexec_control_args *args);
int kexec_verify(const struct kimage *image);
int kexec_verify_in_place(const struct kimage *image);
#else
static inline void kexec_verify_init(struct kimage *image,
				     struct kexec_control_args *args) { }
static inline int kexec_verify(const struct kimage *image) { return 0; }
static inline int kexec_verify_in_place(const struct kimage *image) { return 0; }
#endif

/* What takes the time of a shutdown, by its end */
enum kexec_timing_mark {
	KEXEC_TIMING_BEGIN,
	KEXEC_TIMING_DEVICES,
	KEXEC_TIMING_CPUS,
	KEXEC_TIMING_MARKS,
};

#ifdef CONFIG_KEXEC_FILE
/* What struct kexec_timing takes in a device tree: value, name and header */
#define KEXEC_TIMING_FDT_SIZE	128

void kexec_timing_mark(enum kexec_timing_mark mark);
int kexec_timing_add(const struct kimage *image, void *fdt);
void kexec_timing_locate(struct kimage *image);
void kexec_timing_leave(const struct kimage *image,
			struct kexec_control_args *args);
void kexec_timing_scan(void *fdt, phys_addr_t fdt_phys);
void kexec_timing_report(void);
#define kexec_timing_report kexec_timing_report
#else
static inline void kexec_timing_mark(enum kexec_timing_mark mark) { }
static inline void kexec_timing_leave(const struct kimage *image,
				      struct kexec_control_args *args) { }
static inline void kexec_timing_scan(void *fdt, phys_addr_t fdt_phys) { }
#endif

#ifdef CONFIG_KEXEC_FILE
extern const struct kexec_file_ops kexec_image_ops;

/* Nothing to move is fine, and there is no purgatory that verifies anything */
static inline bool arch_kexec_may_claim(void)
{
	return true;
}

#define arch_kexec_may_claim arch_kexec_may_claim

int arch_kimage_file_post_load_cleanup(struct kimage *image);
#define arch_kimage_file_post_load_cleanup arch_kimage_file_post_load_cleanup

int load_other_segments(struct kimage *image, unsigned long kernel_load_addr,
			unsigned long kernel_size, char *initrd,
			unsigned long initrd_len, char *cmdline,
			const char **part);
#endif

#endif /* __ASSEMBLER__ */

#endif /* _ARM64_KEXEC_H */

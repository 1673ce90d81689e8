// SPDX-License-Identifier: GPL-2.0-only
/*
 * How the control page of kexec reports a fault, and ends it
 *
 * Beyond the point of no return there is no kernel that could look for a
 * console or call firmware. Which registers to write to, and how to reset, is
 * found when the image is loaded; whether these registers may be written to,
 * when it is executed.
 */

#define pr_fmt(fmt) "kexec: " fmt

#include <linux/acpi.h>
#include <linux/cleanup.h>
#include <linux/console.h>
#include <linux/ioport.h>
#include <linux/kexec.h>
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/of.h>
#include <linux/of_address.h>
#include <linux/pgtable.h>
#include <linux/psci.h>
#include <linux/serial_core.h>
#include <linux/serial_reg.h>
#include <linux/sizes.h>
#include <linux/string.h>

#include <asm/rsi.h>

#define PL011_FR	0x18	/* UARTFR, bit 5: TXFF */
#define UART_BIT	BIT(5)

/* All registers that the report uses, of any kind of UART */
#define UART_SIZE	SZ_64

static void uart_is_pl011(struct kexec_control_args *args, u64 base)
{
	args->uart_status = PL011_FR;
	args->uart_busy = UART_BIT;
	args->uart_width = 4;
	args->uart = base;
}

static void uart_is_16550(struct kexec_control_args *args, u64 base,
			  u32 shift, u32 width)
{
	BUILD_BUG_ON(UART_LSR_THRE != UART_BIT);

	args->uart_status = UART_LSR << shift;
	args->uart_busy = 0;
	args->uart_width = width;
	args->uart = base;
}

static const char * const pl011_compatible[] = {
	"arm,pl011", "arm,sbsa-uart", NULL
};

static const char * const ns16550_compatible[] = {
	"ns16550a", "ns16550", "snps,dw-apb-uart", "nvidia,tegra20-uart", NULL
};

static void find_uart_of(struct kexec_control_args *args)
{
	u32 shift = 0, width = 1, offset = 0;
	struct resource res;

	if (!of_stdout || of_address_to_resource(of_stdout, 0, &res))
		return;

	of_property_read_u32(of_stdout, "reg-offset", &offset);

	if (of_device_compatible_match(of_stdout, pl011_compatible)) {
		uart_is_pl011(args, res.start);
	} else if (of_device_compatible_match(of_stdout, ns16550_compatible)) {
		of_property_read_u32(of_stdout, "reg-shift", &shift);
		of_property_read_u32(of_stdout, "reg-io-width", &width);
		uart_is_16550(args, res.start + offset, shift, width);
	}
}

static u32 find_psci_of(void)
{
	static const struct of_device_id psci[] = {
		{ .compatible = "arm,psci-0.2" },
		{ .compatible = "arm,psci-1.0" },
		{ }
	};
	struct device_node *np __free(device_node) =
		of_find_matching_node(NULL, psci);
	const char *method;

	if (!np || of_property_read_string(np, "method", &method))
		return 0;
	if (!strcmp(method, "hvc"))
		return KEXEC_PSCI_HVC;
	if (!strcmp(method, "smc"))
		return KEXEC_PSCI_SMC;

	return 0;
}

#ifdef CONFIG_ACPI
static void find_uart_acpi(struct kexec_control_args *args)
{
	struct acpi_table_header *header;
	struct acpi_generic_address *reg;
	struct acpi_table_spcr *spcr;
	u32 width;

	if (ACPI_FAILURE(acpi_get_table(ACPI_SIG_SPCR, 0, &header)))
		return;

	spcr = container_of(header, struct acpi_table_spcr, header);
	reg = &spcr->serial_port;
	if (reg->space_id != ACPI_ADR_SPACE_SYSTEM_MEMORY || !reg->address)
		goto out;

	switch (spcr->interface_type) {
	case ACPI_DBG2_ARM_PL011:
	case ACPI_DBG2_ARM_SBSA_32BIT:
	case ACPI_DBG2_ARM_SBSA_GENERIC:
		uart_is_pl011(args, reg->address);
		break;
	case ACPI_DBG2_16550_COMPATIBLE:
	case ACPI_DBG2_16550_SUBSET:
	case ACPI_DBG2_16550_WITH_GAS:
		/* As for earlycon, the registers are as far apart as accesses are wide */
		width = in_range(reg->access_width, 1, 3) ? BIT(reg->access_width - 1) : 1;
		uart_is_16550(args, reg->address, ilog2(width), width);
		break;
	}
out:
	acpi_put_table(header);
}

static u32 find_psci_acpi(void)
{
	if (!(acpi_gbl_FADT.arm_boot_flags & ACPI_FADT_PSCI_COMPLIANT))
		return 0;

	return acpi_psci_use_hvc() ? KEXEC_PSCI_HVC : KEXEC_PSCI_SMC;
}
#else
static void find_uart_acpi(struct kexec_control_args *args) { }
static u32 find_psci_acpi(void) { return 0; }
#endif

/**
 * kexec_report_init() - find out how a fault will be reported
 * @args: arguments in the control page; those about the UART and PSCI are set
 *
 * The UART is the one that firmware names for the console: stdout-path of a
 * device tree, or the SPCR of ACPI [1]. Nothing is poked if that is of a kind
 * that is not known here, or if kexec_report_leave() finds no console on it.
 *
 * [1] Documentation/arch/arm64/arm-acpi.rst
 *
 * Context: process context.
 */
void kexec_report_init(struct kexec_control_args *args)
{
	if (acpi_disabled) {
		find_uart_of(args);
		args->psci = find_psci_of();
	} else {
		find_uart_acpi(args);
		args->psci = find_psci_acpi();
	}
}

#ifdef CONFIG_SERIAL_CORE_CONSOLE
/* The registers of the UART that a console writes to, 0 if it is none */
static resource_size_t console_uart(const struct console *con)
{
	const struct uart_driver *driver = con->data;
	const struct uart_port *port;

	/* That is what tells that @data is what it is taken for */
	if (con->device != uart_console_device)
		return 0;
	if (!driver->state || con->index < 0 || con->index >= driver->nr)
		return 0;

	port = driver->state[con->index].uart_port;

	return port ? port->mapbase : 0;
}

static bool console_on_uart(u64 uart)
{
	struct console *con;
	bool found = false;
	int cookie;

	cookie = console_srcu_read_lock();
	for_each_console_srcu(con) {
		short flags = console_srcu_read_flags(con);

		if (console_is_usable(con, flags, false) && console_uart(con) == uart)
			found = true;
	}
	console_srcu_read_unlock(cookie);

	return found;
}
#else
static bool console_on_uart(u64 uart) { return false; }
#endif

/**
 * kexec_report_leave() - the image is about to be entered: may the UART be used?
 * @args: arguments in the control page; without the UART if it may not
 *
 * A UART that no console uses may be without a clock or power. An access to its
 * registers can then stall the bus, and with it the CPU that was to reset the
 * machine. One that a console writes to is powered for as long as that is
 * enabled.
 *
 * Context: the last CPU that is online, exceptions masked. Can't fail.
 */
void kexec_report_leave(struct kexec_control_args *args)
{
	if (args->uart && !console_on_uart(args->uart))
		args->uart = 0;

	/*
	 * A device that the host of a Realm emulates answers at its shared
	 * address. The mappings of consoles have that; with the MMU off there is
	 * nothing but the address.
	 */
	if (args->uart && is_realm_world() &&
	    !arm64_rsi_is_protected(args->uart, UART_SIZE))
		args->uart |= __pte_to_phys(__pte(PROT_NS_SHARED));
}

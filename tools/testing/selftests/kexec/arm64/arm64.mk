# SPDX-License-Identifier: GPL-2.0-only
# kexec tests for arm64, see Documentation/arch/arm64/kexec.rst

TEST_GEN_PROGS := test_kexec_arguments
TEST_GEN_PROGS_EXTENDED := kexec_inspect
TEST_GEN_FILES := inspector

include ../lib.mk

# nolibc, so that they run in an initramfs that has nothing else in it. Headers
# of the kernel come from 'make headers' or, failing that, the compiler's own.
NOLIBC := $(top_srcdir)/tools/include/nolibc
CFLAGS_NOLIBC := -nostdlib -static -ffreestanding -fno-asynchronous-unwind-tables \
		 -fno-ident -fno-stack-protector -Os -Wall -Wextra \
		 -I$(NOLIBC) -include $(NOLIBC)/nolibc.h \
		 $(KHDR_INCLUDES) $(USERCFLAGS)

$(OUTPUT)/test_kexec_arguments: arm64/arguments.c arm64/machine.h
	$(call msg,CC,,$@)
	$(Q)$(CC) $(CFLAGS_NOLIBC) -I$(selfdir) $(filter %.c,$^) -o $@ -lgcc

$(OUTPUT)/kexec_inspect: arm64/inspect.c arm64/inspector.h arm64/machine.h
	$(call msg,CC,,$@)
	$(Q)$(CC) $(CFLAGS_NOLIBC) $(filter %.c,$^) -o $@ -lgcc

ifneq ($(LLVM),)
OBJCOPY := $(LLVM_PREFIX)llvm-objcopy$(LLVM_SUFFIX)
else
OBJCOPY := $(CROSS_COMPILE)objcopy
endif

# Runs with the MMU off: no unaligned access. Without FP, which may be trapped.
CFLAGS_INSPECTOR := -nostdlib -static -ffreestanding -fno-asynchronous-unwind-tables \
		    -fno-ident -fno-stack-protector -fno-pie -no-pie -Os -Wall -Wextra \
		    -mgeneral-regs-only -mstrict-align -mbranch-protection=none \
		    -fno-tree-loop-distribute-patterns -fno-builtin $(USERCFLAGS)

$(OUTPUT)/inspector: arm64/inspector_entry.S arm64/inspector.c arm64/inspector.lds arm64/inspector.h
	$(call msg,CC,,$@)
	$(Q)$(CC) $(CFLAGS_INSPECTOR) $(filter %.S %.c,$^) -o $@.elf \
		-Wl,-T,arm64/inspector.lds,--build-id=none
	$(Q)$(OBJCOPY) -O binary -j .text $@.elf $@

EXTRA_CLEAN := $(OUTPUT)/inspector.elf

// SPDX-License-Identifier: GPL-2.0-only
/*
 * vms N - a virtual machine with N vCPUs that count, for ever
 *
 * Prints a line when each of them has run. A vCPU that comes back is run again,
 * whatever KVM says.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MEMORY 0x80000000UL
#define NOTHING 0x10000000UL /* no memory: a store there ends KVM_RUN */

#define CORE_REG(name) (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | \
			KVM_REG_ARM_CORE_REG(name))

static const uint32_t code[] = {
	0xd2a20001, /* mov x1, #NOTHING */
	0xb9000020, /* str w0, [x1] */
	0x91000400, /* add x0, x0, #1 */
	0x17ffffff, /* b .-4 */
};

static atomic_int running;
static int kvm, vm;

static void check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

static void *run(void *arg)
{
	uint64_t start = MEMORY;
	struct kvm_one_reg pc = { .id = CORE_REG(regs.pc), .addr = (uintptr_t)&start };
	struct kvm_vcpu_init init;
	struct kvm_run *state;
	int vcpu, size;

	vcpu = ioctl(vm, KVM_CREATE_VCPU, (long)arg);
	check(vcpu, "KVM_CREATE_VCPU");
	memset(&init, 0, sizeof(init));
	check(ioctl(vm, KVM_ARM_PREFERRED_TARGET, &init), "KVM_ARM_PREFERRED_TARGET");
	check(ioctl(vcpu, KVM_ARM_VCPU_INIT, &init), "KVM_ARM_VCPU_INIT");
	check(ioctl(vcpu, KVM_SET_ONE_REG, &pc), "KVM_SET_ONE_REG");
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	check(size, "KVM_GET_VCPU_MMAP_SIZE");
	state = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	check(state == MAP_FAILED ? -1 : 0, "mmap");

	check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
	if (state->exit_reason != KVM_EXIT_MMIO) {
		fprintf(stderr, "vms: exit reason %u\n", state->exit_reason);
		exit(1);
	}
	running++;
	for (;;)
		ioctl(vcpu, KVM_RUN, 0);
}

int main(int argc, char **argv)
{
	struct kvm_userspace_memory_region region = {
		.guest_phys_addr = MEMORY,
		.memory_size = 65536, /* a page, whatever their size is */
	};
	long n, vcpus = argc == 2 ? atol(argv[1]) : 1;
	pthread_t thread;
	void *memory;

	memory = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(memory == MAP_FAILED ? -1 : 0, "mmap");
	memcpy(memory, code, sizeof(code));
	region.userspace_addr = (uintptr_t)memory;

	kvm = open("/dev/kvm", O_RDWR);
	check(kvm, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm, "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	for (n = 0; n < vcpus; n++) {
		if (pthread_create(&thread, NULL, run, (void *)n)) {
			fprintf(stderr, "vms: no thread\n");
			return 1;
		}
	}
	while (running < vcpus)
		usleep(1000);
	printf("%ld vCPUs run\n", vcpus);
	fflush(stdout);
	pause();
	return 0;
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * kpages - what the kernel says its pages are used for
 *
 *   kpages         number of pages that are marked reserved, as the pages are
 *                  that kexec holds
 *   kpages used    runs of pages that the kernel itself uses, one per line:
 *                  address and length in bytes, hexadecimal
 *
 * Looks at "System RAM" only.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kernel-page-flags.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define KPF_RESERVED 32 /* kernel-internal, not in the header */
#define BIT(n) (1ULL << (n))

/* Free, or contents of a file or a process: nothing that the kernel needs */
#define NOT_KERNEL (BIT(KPF_BUDDY) | BIT(KPF_NOPAGE) | BIT(KPF_LRU) | BIT(KPF_MMAP) | \
		    BIT(KPF_ANON) | BIT(KPF_SWAPBACKED))

static unsigned long reserved, run_start, run_end;

static void end_run(void)
{
	if (run_end != run_start)
		printf("%lx %lx\n", run_start, run_end - run_start);
	run_start = run_end = 0;
}

static void look_at(uint64_t flags, unsigned long addr, long page_size, bool used)
{
	if (flags & BIT(KPF_RESERVED))
		reserved++;
	if (!used || (flags & NOT_KERNEL))
		return;
	if (addr != run_end) {
		end_run();
		run_start = addr;
	}
	run_end = addr + page_size;
}

static void walk(int fd, unsigned long start, unsigned long end, bool used)
{
	static uint64_t flags[16384];
	long page_size = sysconf(_SC_PAGESIZE);
	unsigned long pfn = start / page_size, last = (end + 1) / page_size;

	while (pfn < last) {
		size_t want = last - pfn;
		ssize_t got, i;

		if (want > sizeof(flags) / sizeof(*flags))
			want = sizeof(flags) / sizeof(*flags);
		got = pread(fd, flags, want * sizeof(*flags), pfn * sizeof(*flags));
		if (got <= 0) {
			fprintf(stderr, "kpages: /proc/kpageflags: %s\n", strerror(errno));
			exit(1);
		}
		got /= sizeof(*flags);
		for (i = 0; i < got; i++)
			look_at(flags[i], (pfn + i) * page_size, page_size, used);
		pfn += got;
	}
}

int main(int argc, char **argv)
{
	bool used = argc == 2 && !strcmp(argv[1], "used");
	int fd = open("/proc/kpageflags", O_RDONLY);
	FILE *iomem = fopen("/proc/iomem", "r");
	unsigned long start, end;
	char line[256];

	if (fd < 0 || !iomem) {
		perror("kpages: /proc/kpageflags or /proc/iomem");
		return 1;
	}
	while (fgets(line, sizeof(line), iomem)) {
		if (line[0] != ' ' && strstr(line, "System RAM") &&
		    sscanf(line, "%lx-%lx", &start, &end) == 2)
			walk(fd, start, end, used);
	}
	if (used)
		end_run();
	else
		printf("%lu\n", reserved);
	return 0;
}

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kexec tests for arm64 have to know about the machine
 */
#ifndef KEXEC_ARM64_MACHINE_H
#define KEXEC_ARM64_MACHINE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A piece of physical memory, end excluded */
struct extent {
	unsigned long start, end;
};

static inline unsigned long round_up_to(unsigned long value, unsigned long unit)
{
	return (value + unit - 1) / unit * unit;
}

/**
 * read_extents() - resources of /proc/iomem that have a certain name
 * @name: what the line has to hold, or NULL for neither of the two below
 * @extents: where to store them, in ascending order
 * @max: room there
 *
 * Only resources that are in no other one are looked at: "System RAM" is what
 * the kernel uses as memory, "reserved" what firmware marked no-map.
 *
 * Return: their number, at most @max; 0 if /proc/iomem can't be read, or shows
 * no addresses, as it does to those who are not root.
 */
static inline int read_extents(const char *name, struct extent *extents, int max)
{
	FILE *iomem = fopen("/proc/iomem", "r");
	char line[256], *end;
	int count = 0;

	if (!iomem)
		return 0;
	while (count < max && fgets(line, sizeof(line), iomem)) {
		bool memory = strstr(line, "System RAM") || strstr(line, "reserved");

		if (line[0] == ' ' || (name ? !strstr(line, name) : memory))
			continue;
		extents[count].start = strtoul(line, &end, 16);
		extents[count].end = strtoul(end + 1, NULL, 16) + 1;
		if (extents[count].end > 1)
			count++;
	}
	fclose(iomem);
	return count;
}

/**
 * is_loaded() - is there an image that kexec would execute?
 *
 * Return: 0 or 1, or -1 if the kernel does not tell.
 */
static inline int is_loaded(void)
{
	int fd = open("/sys/kernel/kexec_loaded", O_RDONLY);
	char digit = 0;

	if (fd < 0)
		return -1;
	if (read(fd, &digit, 1) != 1)
		digit = 0;
	close(fd);
	return digit == '0' || digit == '1' ? digit - '0' : -1;
}

#endif

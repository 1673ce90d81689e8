// SPDX-License-Identifier: GPL-2.0-only
/*
 * pattern - a file whose every 4096 bytes tell what they have to be
 *
 *   pattern fill PATH MIB SEED
 *   pattern check PATH MIB SEED    exits with 1, and the first wrong page
 *
 * Page N consists of 256 times MAGIC ^ SEED and N, 64 bits each, little endian.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAGIC 0x6e72657474617021ULL
#define PAGE 4096UL
#define WORDS (PAGE / sizeof(uint64_t))

int main(int argc, char **argv)
{
	uint64_t page, pages, seed, *words;
	unsigned int i;
	int fill, fd;

	if (argc != 5) {
		fprintf(stderr, "usage: pattern fill|check PATH MIB SEED\n");
		return 2;
	}
	fill = !strcmp(argv[1], "fill");
	pages = strtoul(argv[3], NULL, 0) * 1024 * 1024 / PAGE;
	seed = MAGIC ^ strtoull(argv[4], NULL, 0);

	fd = open(argv[2], fill ? O_RDWR | O_CREAT | O_TRUNC : O_RDONLY, 0600);
	if (fd < 0 || (fill && ftruncate(fd, pages * PAGE))) {
		perror(argv[2]);
		return 2;
	}
	words = mmap(NULL, pages * PAGE, PROT_READ | (fill ? PROT_WRITE : 0),
		     MAP_SHARED, fd, 0);
	if (words == MAP_FAILED) {
		perror(argv[2]);
		return 2;
	}

	for (page = 0; page < pages; page++, words += WORDS) {
		for (i = 0; i < WORDS; i += 2) {
			if (fill) {
				words[i] = seed;
				words[i + 1] = page;
			} else if (words[i] != seed || words[i + 1] != page) {
				printf("page %lu, byte %zu: %lx %lx\n", page,
				       i * sizeof(*words), words[i], words[i + 1]);
				return 1;
			}
		}
	}
	return 0;
}

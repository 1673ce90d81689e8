// SPDX-License-Identifier: GPL-2.0-only
/*
 * kload - call kexec_load() with any list of segments
 *
 * Reads a description from stdin, one statement per line, numbers as C has
 * them:
 *
 *   entry ADDRESS
 *   flags FLAGS                      default: KEXEC_ARCH_AARCH64
 *   segment MEM MEMSZ zero           nothing to copy, MEMSZ bytes of zero
 *   segment MEM MEMSZ fill BYTE BUFSZ
 *   segment MEM MEMSZ file PATH      the whole file
 *   segment MEM MEMSZ bad BUFSZ      a buffer that is not mapped
 *
 * Prints the name of the error ("0" if there was none) and exits with 0 if the
 * call succeeded, 1 if it failed, 2 if the description can't be followed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_SEGMENTS 64 /* more than the kernel takes */

struct segment {
	const void *buf;
	size_t bufsz;
	unsigned long mem;
	size_t memsz;
};

static void fail(const char *what, const char *arg)
{
	fprintf(stderr, "kload: %s: %s\n", what, arg);
	exit(2);
}

static unsigned long number(const char *word)
{
	char *end;
	unsigned long n;

	if (!word)
		fail("number missing", "end of line");
	n = strtoul(word, &end, 0);
	if (*end)
		fail("not a number", word);
	return n;
}

static void *anonymous(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		fail("mmap", strerror(errno));
	return p;
}

static void map_file(struct segment *s, const char *path)
{
	struct stat st;
	int fd;

	if (!path)
		fail("path missing", "end of line");
	fd = open(path, O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		fail(path, strerror(errno));
	s->bufsz = st.st_size;
	s->buf = mmap(NULL, s->bufsz, PROT_READ, MAP_PRIVATE, fd, 0);
	if (s->buf == MAP_FAILED)
		fail(path, strerror(errno));
	close(fd);
}

static void parse_segment(struct segment *s)
{
	const char *kind;

	s->mem = number(strtok(NULL, " "));
	s->memsz = number(strtok(NULL, " "));
	kind = strtok(NULL, " ");
	if (!kind)
		fail("kind of contents missing", "end of line");

	if (!strcmp(kind, "zero")) {
		s->buf = NULL;
		s->bufsz = 0;
	} else if (!strcmp(kind, "fill")) {
		int byte = number(strtok(NULL, " "));

		s->bufsz = number(strtok(NULL, " "));
		s->buf = memset(anonymous(s->bufsz), byte, s->bufsz);
	} else if (!strcmp(kind, "file")) {
		map_file(s, strtok(NULL, " "));
	} else if (!strcmp(kind, "bad")) {
		void *p = anonymous(1);

		munmap(p, 1);
		s->buf = p;
		s->bufsz = number(strtok(NULL, " "));
	} else {
		fail("unknown kind of contents", kind);
	}
}

int main(void)
{
	static struct segment segments[MAX_SEGMENTS];
	unsigned long entry = 0, flags = KEXEC_ARCH_AARCH64, n = 0;
	char line[512];

	while (fgets(line, sizeof(line), stdin)) {
		const char *word;

		line[strcspn(line, "\n")] = 0;
		word = strtok(line, " ");
		if (!word)
			continue;
		if (!strcmp(word, "entry"))
			entry = number(strtok(NULL, " "));
		else if (!strcmp(word, "flags"))
			flags = number(strtok(NULL, " "));
		else if (strcmp(word, "segment"))
			fail("unknown statement", word);
		else if (n == MAX_SEGMENTS)
			fail("too many segments", "for kload itself");
		else
			parse_segment(&segments[n++]);
	}

	if (syscall(SYS_kexec_load, entry, n, segments, flags)) {
		puts(strerrorname_np(errno));
		return 1;
	}
	puts("0");
	return 0;
}

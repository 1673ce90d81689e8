// SPDX-License-Identifier: GPL-2.0-only
/*
 * kload - call kexec_load() with any list of segments, or kexec_file_load()
 *
 * Reads a description from stdin, one statement per line, numbers as C has
 * them:
 *
 *   entry ADDRESS
 *   flags FLAGS                      default: KEXEC_ARCH_AARCH64, or 0
 *   segment MEM MEMSZ zero           nothing to copy, MEMSZ bytes of zero
 *   segment MEM MEMSZ fill BYTE BUFSZ
 *   segment MEM MEMSZ file PATH      the whole file
 *   segment MEM MEMSZ bad BUFSZ      a buffer that is not mapped
 *   kernel PATH                      kexec_file_load() instead
 *   initrd PATH
 *   cmdline LENGTH                   that many bytes, the NUL included
 *   line TEXT                        or this one
 *   fail N                           make the Nth allocation of the call fail
 *   announce                         say "calling" on stderr before the call
 *   scatter MIB                      before the call, hold every other page of that
 *                                    much memory and free the rest
 *   time                             print how long the call took, too: nanoseconds
 *
 * Prints the name of the error ("0" if there was none) and exits with 0 if the
 * call succeeded, 1 if it failed, 2 if the description can't be followed. With
 * "fail", " spared" follows if the call did not come to its Nth allocation.
 */
#define _GNU_SOURCE
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
#include <time.h>
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

static int open_file(const char *path, int flags)
{
	int fd;

	if (!path)
		fail("path missing", "end of line");
	fd = open(path, flags);
	if (fd < 0)
		fail(path, strerror(errno));
	return fd;
}

static void map_file(struct segment *s, const char *path)
{
	int fd = open_file(path, O_RDONLY);
	struct stat st;

	if (fstat(fd, &st))
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

struct request {
	struct segment segments[MAX_SEGMENTS];
	unsigned long entry, flags, segment_count, cmdline_size;
	int kernel, initrd;
	char *cmdline;
};

/* What is allocated next is single pages, none beside another */
static void scatter(size_t mib)
{
	size_t page = sysconf(_SC_PAGESIZE), size = mib << 20, at;
	char *p = anonymous(size);

	for (at = 0; at < size; at += page)
		p[at] = 1;
	for (at = 0; at < size; at += 2 * page)
		madvise(p + at, page, MADV_DONTNEED);
}

static uint64_t nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static void parse_cmdline(struct request *r)
{
	r->cmdline_size = number(strtok(NULL, " "));
	r->cmdline = anonymous(r->cmdline_size + 1);
	if (r->cmdline_size) {
		memset(r->cmdline, 'x', r->cmdline_size);
		r->cmdline[r->cmdline_size - 1] = 0;
	}
}

static void parse_line(struct request *r)
{
	const char *text = strtok(NULL, "");

	r->cmdline = strdup(text ? text : "");
	r->cmdline_size = strlen(r->cmdline) + 1;
}

static long call(const struct request *r)
{
	unsigned long flags = r->flags;

	if (r->kernel < 0)
		return syscall(SYS_kexec_load, r->entry, r->segment_count,
			       r->segments, flags ? flags : KEXEC_ARCH_AARCH64);

	if (r->initrd < 0)
		flags |= KEXEC_FILE_NO_INITRAMFS;
	return syscall(SYS_kexec_file_load, r->kernel, r->initrd,
		       r->cmdline_size, r->cmdline, flags);
}

int main(void)
{
	static struct request r = { .kernel = -1, .initrd = -1 };
	char line[512], left[16] = "0";
	const char *fail_nth = NULL;
	bool announce = false, timed = false;
	uint64_t begin; /* then how long it took */
	int fd = -1, error;

	while (fgets(line, sizeof(line), stdin)) {
		const char *word;

		line[strcspn(line, "\n")] = 0;
		word = strtok(line, " ");
		if (!word)
			continue;
		if (!strcmp(word, "entry"))
			r.entry = number(strtok(NULL, " "));
		else if (!strcmp(word, "flags"))
			r.flags = number(strtok(NULL, " "));
		else if (!strcmp(word, "kernel"))
			r.kernel = open_file(strtok(NULL, " "), O_RDONLY);
		else if (!strcmp(word, "initrd"))
			r.initrd = open_file(strtok(NULL, " "), O_RDONLY);
		else if (!strcmp(word, "cmdline"))
			parse_cmdline(&r);
		else if (!strcmp(word, "line"))
			parse_line(&r);
		else if (!strcmp(word, "announce"))
			announce = true;
		else if (!strcmp(word, "scatter"))
			scatter(number(strtok(NULL, " ")));
		else if (!strcmp(word, "time"))
			timed = true;
		else if (!strcmp(word, "fail"))
			fail_nth = strdup(strtok(NULL, " "));
		else if (strcmp(word, "segment"))
			fail("unknown statement", word);
		else if (r.segment_count == MAX_SEGMENTS)
			fail("too many segments", "for kload itself");
		else
			parse_segment(&r.segments[r.segment_count++]);
	}

	if (announce)
		fputs("calling\n", stderr);
	if (fail_nth) {
		fd = open_file("/proc/thread-self/fail-nth", O_RDWR);
		if (write(fd, fail_nth, strlen(fail_nth)) < 0)
			fail("fail-nth", strerror(errno));
	}
	begin = nanoseconds();
	error = call(&r) ? errno : 0;
	begin = nanoseconds() - begin;
	if (fail_nth && (pread(fd, left, sizeof(left) - 1, 0) < 0 ||
			 pwrite(fd, "0", 1, 0) < 0))
		fail("fail-nth", strerror(errno));

	printf("%s%s", error ? strerrorname_np(error) : "0",
	       atoi(left) ? " spared" : "");
	if (timed)
		printf(" %llu", (unsigned long long)begin);
	putchar('\n');
	return !!error;
}

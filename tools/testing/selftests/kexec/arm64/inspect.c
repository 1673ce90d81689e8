// SPDX-License-Identifier: GPL-2.0-only
/*
 * kexec_inspect - call kexec_load() with any list of segments, the inspector
 * among them, or kexec_file_load()
 *
 * Reads a description from stdin, one statement per line, numbers as C has
 * them, addresses and sizes in bytes:
 *
 *   entry ADDRESS                    default: the inspector, or the first segment
 *   flags FLAGS                      default: KEXEC_ARCH_AARCH64, or 0
 *   segment MEM MEMSZ zero           nothing to copy, MEMSZ bytes of zero
 *   segment MEM MEMSZ fill BYTE BUFSZ
 *   segment MEM MEMSZ pattern SEED BUFSZ    each word tells its address
 *   segment MEM MEMSZ file PATH      the whole file
 *   segment MEM MEMSZ bad BUFSZ      a buffer that is not mapped
 *   segment MEM MEMSZ inspector PATH
 *   kernel PATH                      kexec_file_load() instead
 *   kernel inspector PATH            the same, of the inspector
 *   initrd PATH
 *   cmdline LENGTH                   that many bytes, the NUL included
 *   line TEXT                        or this command line
 *
 * What the inspector has to know:
 *
 *   uart pl011 ADDRESS
 *   uart 16550 ADDRESS [SHIFT [WIDTH]]      registers WIDTH bytes, 1 << SHIFT apart
 *   psci hvc|smc|none                default: what the device tree says
 *   el 1|2                           exception level that it is to find
 *   x0 VALUE                         default: 0; a device tree with "kernel"
 *   gicc ADDRESS                     of a GICv2
 *   end verdict|off|reset|park       default: verdict, power off if all is well, else reset
 *   watch BYTES SEED                 memory of this process that is to be left alone
 *   claim ADDRESS SIZE SEED          tell it that memory holds a pattern, true or not
 *
 * What makes it harder for the kernel:
 *
 *   hold BYTES                       of memory
 *   fragment BYTES                   the same, but every other page is free
 *   fail N                           make the Nth allocation of the call fail
 *
 *   announce                         say "calling" on stderr before the call
 *   time                             tell how long the call took, too: nanoseconds
 *   exec                             and leave this kernel if it succeeded
 *
 * Prints the name of the error ("0" if there was none) and exits with 0 if the call succeeded,
 * 1 if it failed, 2 if the description can't be followed. With "fail",
 * " spared" follows if the call did not come to its Nth allocation.
 *
 * Example, for a machine with a PL011 at 0x9000000 and free memory at 1 GiB:
 *
 *   kexec_inspect <<EOF
 *   segment 0x40000000 0x20000 inspector ./inspector
 *   segment 0x48000000 0x1000000 pattern 1 0xfff123
 *   watch 0x1000000 2
 *   uart pl011 0x9000000
 *   exec
 *   EOF
 */
#include "machine.h"
#include "inspector.h"
#include <sys/reboot.h>
#include <time.h>

#ifndef LINUX_REBOOT_CMD_KEXEC
#include <linux/reboot.h>
#endif

#define MAX_SEGMENTS	64	/* more than the kernel takes */
#define MAX_RANGES	32768
#define TRIES		5
#define PAGEMAP_PRESENT	0x8000000000000000
#define PAGEMAP_PFN	0x007fffffffffffff

#ifndef MAP_POPULATE
#define MAP_POPULATE	0x8000
#endif
#define NO_HUGE_PAGES	15	/* MADV_NOHUGEPAGE */
#define DONT_NEED	4	/* MADV_DONTNEED */

enum contents { ZERO, ANY, PATTERN, UNREADABLE, INSPECTOR };

static struct kexec_segment segments[MAX_SEGMENTS];
static struct {
	enum contents contents;
	unsigned long seed;
} about[MAX_SEGMENTS];
static int nr_segments, inspector = -1;

static unsigned long entry, flags, cmdline_size, page;
static bool have_entry, announce, timed, leave;
static int kernel = -1, initrd = -1;
static char *cmdline, *fail_nth;

static struct inspector_args head = { .magic = INSPECTOR_MAGIC };
static struct inspector_range *ranges;
static bool have_psci;
static size_t inspector_size;	/* of the file */
static void *inspector_file;	/* to be loaded by kexec_file_load() */
static uint32_t table[256];

static uint64_t *watched, watch_seed;
static unsigned long *watched_at;	/* physical address of each page */
static unsigned long nr_watched;

/* Words of the line that is looked at */
static char *rest;

static _Noreturn void die(const char *what, const char *why)
{
	fprintf(stderr, "kexec_inspect: %s: %s\n", what, why);
	exit(2);
}

static char *word(void)
{
	char *begin;

	while (*rest == ' ')
		rest++;
	if (!*rest)
		return NULL;
	begin = rest;
	while (*rest && *rest != ' ')
		rest++;
	if (*rest)
		*rest++ = 0;
	return begin;
}

static char *need_word(const char *what)
{
	char *w = word();

	if (!w)
		die(what, "missing at the end of a line");
	return w;
}

static unsigned long number_of(const char *w)
{
	char *end;
	unsigned long n = strtoul(w, &end, 0);

	if (*end)
		die("not a number", w);
	return n;
}

static unsigned long number(void)
{
	return number_of(need_word("number"));
}

static unsigned long number_or(unsigned long otherwise)
{
	const char *w = word();

	return w ? number_of(w) : otherwise;
}

static void *anonymous(size_t size, int more)
{
	void *p = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | more, -1, 0);

	if (p == MAP_FAILED)
		die("mmap", strerror(errno));
	return p;
}

static int open_file(const char *path, int how)
{
	int fd = open(path, how);

	if (fd < 0)
		die(path, strerror(errno));
	return fd;
}

static size_t file_size(int fd, const char *path)
{
	off_t size = lseek(fd, 0, SEEK_END);

	if (size < 0)
		die(path, strerror(errno));
	return size;
}

static void map_file(struct kexec_segment *s, const char *path)
{
	int fd = open_file(path, O_RDONLY);

	s->bufsz = file_size(fd, path);
	s->buf = mmap(NULL, s->bufsz, PROT_READ, MAP_PRIVATE, fd, 0);
	if (s->buf == MAP_FAILED)
		die(path, strerror(errno));
	close(fd);
}

/* The inspector's file with room for @max ranges behind it */
static char *read_inspector(const char *path, unsigned long max)
{
	int fd = open_file(path, O_RDONLY);
	char *image = anonymous(INSPECTOR_SIZE + sizeof(head) + max * sizeof(*ranges), 0);

	inspector_size = file_size(fd, path);
	if (inspector_size >= INSPECTOR_SIZE ||
	    lseek(fd, 0, SEEK_SET) ||
	    read(fd, image, inspector_size) != (ssize_t)inspector_size)
		die(path, "is not the inspector");
	close(fd);
	return image;
}

static void *patterned(unsigned long mem, uint64_t seed, size_t size)
{
	uint64_t *p = anonymous(round_up_to(size, 8), 0);
	size_t i;

	for (i = 0; i < (size + 7) / 8; i++)
		p[i] = inspector_pattern(mem + 8 * i, seed);
	return p;
}

static void parse_segment(void)
{
	struct kexec_segment *s = &segments[nr_segments];
	const char *kind;

	if (nr_segments == MAX_SEGMENTS)
		die("segment", "too many for this program");
	s->mem = (void *)number();
	s->memsz = number();
	kind = need_word("kind of contents");

	if (!strcmp(kind, "zero")) {
		about[nr_segments].contents = ZERO;
	} else if (!strcmp(kind, "fill")) {
		int byte = number();

		about[nr_segments].contents = ANY;
		s->bufsz = number();
		s->buf = memset(anonymous(s->bufsz, 0), byte, s->bufsz);
	} else if (!strcmp(kind, "pattern")) {
		about[nr_segments].contents = PATTERN;
		about[nr_segments].seed = number();
		s->bufsz = number();
		s->buf = patterned((unsigned long)s->mem, about[nr_segments].seed, s->bufsz);
	} else if (!strcmp(kind, "file")) {
		about[nr_segments].contents = ANY;
		map_file(s, need_word("path"));
	} else if (!strcmp(kind, "bad")) {
		void *p = anonymous(1, 0);

		about[nr_segments].contents = UNREADABLE;
		munmap(p, 1);
		s->buf = p;
		s->bufsz = number();
	} else if (!strcmp(kind, "inspector")) {
		if (s->memsz < INSPECTOR_SIZE + sizeof(head) + sizeof(*ranges))
			die("segment", "too small for the inspector");
		about[nr_segments].contents = INSPECTOR;
		inspector = nr_segments;
		s->buf = read_inspector(need_word("path"), MAX_RANGES);
	} else {
		die("unknown kind of contents", kind);
	}
	nr_segments++;
}

static void parse_kernel(void)
{
	const char *path = need_word("path");

	if (!strcmp(path, "inspector"))
		inspector_file = read_inspector(need_word("path"), 1);
	else
		kernel = open_file(path, O_RDONLY);
}

static void parse_cmdline(void)
{
	cmdline_size = number();
	cmdline = anonymous(cmdline_size + 1, 0);
	if (cmdline_size) {
		memset(cmdline, 'x', cmdline_size);
		cmdline[cmdline_size - 1] = 0;
	}
}

static void parse_line(void)
{
	cmdline = strdup(rest);
	cmdline_size = strlen(cmdline) + 1;
}

static void parse_uart(void)
{
	const char *kind = need_word("kind of UART");

	head.uart = number();
	if (!strcmp(kind, "pl011")) {
		head.uart_status = 0x18;	/* UARTFR, TXFF */
		head.uart_busy = 0x20;
		head.uart_width = 4;
	} else if (!strcmp(kind, "16550")) {
		unsigned long shift = number_or(0);

		head.uart_status = 5 << shift;	/* LSR, THRE */
		head.uart_busy = 0;
		head.uart_width = number_or(1);
	} else {
		die("unknown kind of UART", kind);
	}
}

/* One of the words in @names, each of which is followed by its value */
static uint32_t one_of(const char *const *names, int count)
{
	const char *w = need_word("word");
	int i;

	for (i = 0; i < count; i++) {
		if (!strcmp(w, names[i]))
			return i;
	}
	die("unknown word", w);
}

static const char *const psci_names[] = { "none", "hvc", "smc" };
static const char *const end_names[] = { "verdict", "off", "reset", "park" };

static void psci_of_device_tree(void)
{
	static char method[16];
	int fd = open("/proc/device-tree/psci/method", O_RDONLY);

	if (fd < 0)
		return;
	if (read(fd, method, sizeof(method) - 1) > 0) {
		rest = method;
		head.psci = one_of(psci_names, 3);
	}
	close(fd);
}

/* Memory */

/* Physical address of each of @count pages at @p, in @at */
static void look_up(const void *p, unsigned long count, unsigned long *at)
{
	int fd = open_file("/proc/self/pagemap", O_RDONLY);
	size_t done = 0, size = count * 8;
	unsigned long i;

	while (done < size) {
		long got = syscall(__NR_pread64, fd, (char *)at + done, size - done,
				   (unsigned long)p / page * 8 + done);

		if (got <= 0)
			die("/proc/self/pagemap", strerror(errno));
		done += got;
	}
	close(fd);
	for (i = 0; i < count; i++) {
		if (!(at[i] & PAGEMAP_PRESENT) || !(at[i] & PAGEMAP_PFN))
			die("/proc/self/pagemap", "no address: not root, or memory is short");
		at[i] = (at[i] & PAGEMAP_PFN) * page;
	}
}

static void parse_watch(void)
{
	unsigned long size = round_up_to(number(), page);

	watch_seed = number();
	if (!size)
		return;
	watched = anonymous(size, 0);
	syscall(__NR_madvise, watched, size, NO_HUGE_PAGES);
	memset(watched, 0xff, size);
	syscall(__NR_mlock, watched, size);
	nr_watched = size / page;
	watched_at = anonymous(nr_watched * sizeof(*watched_at), MAP_POPULATE);
}

static void fill_watched(void)
{
	unsigned long i, offset;

	look_up(watched, nr_watched, watched_at);
	for (i = 0; i < nr_watched; i++) {
		for (offset = 0; offset < page; offset += 8)
			watched[(i * page + offset) / 8] =
				inspector_pattern(watched_at[i] + offset, watch_seed);
	}
}

/* Has the kernel given a page another place meanwhile? */
static bool watched_moved(void)
{
	unsigned long *now = anonymous(nr_watched * sizeof(*now), MAP_POPULATE), i;
	bool moved = false;

	look_up(watched, nr_watched, now);
	for (i = 0; i < nr_watched; i++)
		moved |= now[i] != watched_at[i];
	munmap(now, nr_watched * sizeof(*now));
	return moved;
}

/* Memory in single pages, which this process keeps */
static char *hold(unsigned long size)
{
	char *p = anonymous(size, 0);
	unsigned long i;

	syscall(__NR_madvise, p, size, NO_HUGE_PAGES);
	for (i = 0; i < size; i += page)
		p[i] = 1;
	return p;
}

static void fragment(unsigned long size)
{
	char *p = hold(size);
	unsigned long i;

	for (i = 0; i < size; i += 2 * page)
		syscall(__NR_madvise, p + i, page, DONT_NEED);
}

/* What the inspector is told */

static void add_range(unsigned long room, uint64_t start, uint64_t size, uint64_t value,
		      enum inspector_contents contents, enum inspector_kind kind, uint32_t number)
{
	if (!size)
		return;
	if (head.nr_ranges == room)
		die("inspector", "no room for what it has to look at: a larger segment");
	ranges[head.nr_ranges++] = (struct inspector_range) {
		.start = start, .size = size, .value = value,
		.contents = contents, .kind = kind, .number = number,
	};
}

static void add_destination(unsigned long room, int i)
{
	const struct kexec_segment *s = &segments[i];
	uint64_t mem = (uint64_t)s->mem;

	switch (about[i].contents) {
	case PATTERN:
		add_range(room, mem, s->bufsz, about[i].seed,
			  INSPECT_PATTERN, INSPECT_DESTINATION, i);
		break;
	case ANY:
		add_range(room, mem, s->bufsz, crc32c(table, ~0, s->buf, s->bufsz),
			  INSPECT_CRC32C, INSPECT_DESTINATION, i);
		break;
	case ZERO:
		break;
	default:
		return;
	}
	add_range(room, mem + s->bufsz, s->memsz - s->bufsz, 0,
		  INSPECT_ZERO, INSPECT_DESTINATION, i);
}

static bool is_destination(unsigned long start)
{
	int i;

	for (i = 0; i < nr_segments; i++) {
		unsigned long mem = (unsigned long)segments[i].mem;

		if (start < mem + segments[i].memsz && mem < start + page)
			return true;
	}
	return false;
}

/* Pages that follow one another, in whichever direction, make one range */
static void add_watched(unsigned long room)
{
	struct inspector_range *last = NULL;
	unsigned long i, left = 0;

	for (i = 0; i < nr_watched; i++) {
		unsigned long at = watched_at[i];

		if (is_destination(at))
			continue;
		if (last && at == last->start + last->size) {
			last->size += page;
		} else if (last && at + page == last->start) {
			last->start = at;
			last->size += page;
		} else if (head.nr_ranges < room) {
			last = &ranges[head.nr_ranges];
			add_range(room, at, page, watch_seed,
				  INSPECT_PATTERN, INSPECT_WATCHED, i);
		} else {
			left++;
		}
	}
	if (left)
		fprintf(stderr, "%lu of %lu watched pages are too scattered to be looked at\n",
			left, nr_watched);
}

/* Put the arguments behind the inspector at @image, which has room for @room ranges */
static size_t finish_inspector(char *image, unsigned long room, unsigned int nr_claims)
{
	struct inspector_args *args = (void *)(image + INSPECTOR_SIZE);
	int i;

	head.nr_ranges = nr_claims;
	add_range(room, 0, inspector_size, crc32c(table, ~0, image, inspector_size),
		  INSPECT_CRC32C, INSPECT_SELF, 0);
	for (i = 0; i < nr_segments; i++)
		add_destination(room, i);
	add_watched(room);

	head.crc = 0;
	head.size = sizeof(head) + head.nr_ranges * sizeof(*ranges);
	memcpy(args, &head, sizeof(head));
	memcpy(args->ranges, ranges, head.nr_ranges * sizeof(*ranges));
	args->crc = crc32c(table, ~0, args, head.size);
	return INSPECTOR_SIZE + head.size;
}

static void finish(unsigned int nr_claims)
{
	if (inspector >= 0) {
		struct kexec_segment *s = &segments[inspector];
		unsigned long room = (s->memsz - INSPECTOR_SIZE - sizeof(head)) / sizeof(*ranges);

		if (room > MAX_RANGES)
			room = MAX_RANGES;
		head.entry = (unsigned long)s->mem;
		s->bufsz = finish_inspector((char *)s->buf, room, nr_claims);
	} else if (inspector_file) {
		char name[32];
		int fd = syscall(__NR_memfd_create, "inspector", 0);
		size_t size;

		head.flags = INSPECT_X0_IS_DTB | INSPECT_PLACED;
		*(uint64_t *)((char *)inspector_file + HEADER_IMAGE_SIZE) = 2 * INSPECTOR_SIZE;
		size = finish_inspector(inspector_file, 1, 0);
		if (fd < 0 || write(fd, inspector_file, size) != (ssize_t)size)
			die("memfd_create", strerror(errno));
		snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
		kernel = open_file(name, O_RDONLY);
		close(fd);	/* kexec_file_load() wants no writer */
	}
}

/* Doing it */

static int call(void)
{
	unsigned long f = flags;

	if (kernel < 0)
		return syscall(__NR_kexec_load, entry, nr_segments, segments,
			       f ? f : KEXEC_ARCH_AARCH64) ? errno : 0;

	if (initrd < 0)
		f |= KEXEC_FILE_NO_INITRAMFS;
	return syscall(__NR_kexec_file_load, kernel, initrd, cmdline_size, cmdline, f) ? errno : 0;
}

static unsigned long nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000UL + now.tv_nsec;
}

static const char *name_of(int error)
{
	static const struct {
		int number;
		const char *name;
	} names[] = {
#define NAME(n) { n, #n }
		NAME(EPERM), NAME(ENOENT), NAME(EINTR), NAME(EIO), NAME(E2BIG),
		NAME(ENOEXEC), NAME(EBADF), NAME(ENOMEM), NAME(EACCES), NAME(EFAULT),
		NAME(EBUSY), NAME(EINVAL), NAME(ETXTBSY), NAME(EFBIG),
		NAME(EADDRINUSE), NAME(EADDRNOTAVAIL), NAME(EKEYREJECTED),
	};
	static char other[16];
	size_t i;

	for (i = 0; i < sizeof(names) / sizeof(*names); i++) {
		if (names[i].number == error)
			return names[i].name;
	}
	snprintf(other, sizeof(other), "%d", error);
	return other;
}

static int call_with_failure(bool *spared)
{
	int fd = open_file("/proc/thread-self/fail-nth", O_RDWR), error;
	char left[16] = "";

	if (write(fd, fail_nth, strlen(fail_nth)) < 0)
		die("fail-nth", strerror(errno));
	error = call();
	/* This file can't be sought in */
	if (syscall(__NR_pread64, fd, left, sizeof(left) - 1, 0UL) < 0 ||
	    syscall(__NR_pwrite64, fd, "0", 1, 0UL) < 0)
		die("fail-nth", strerror(errno));
	*spared = atoi(left);
	close(fd);
	return error;
}

static void parse(unsigned int *nr_claims)
{
	const char *w = word();

	if (!w)
		return;
	if (!strcmp(w, "entry")) {
		entry = number();
		have_entry = true;
	} else if (!strcmp(w, "flags")) {
		flags = number();
	} else if (!strcmp(w, "segment")) {
		parse_segment();
	} else if (!strcmp(w, "kernel")) {
		parse_kernel();
	} else if (!strcmp(w, "initrd")) {
		initrd = open_file(need_word("path"), O_RDONLY);
	} else if (!strcmp(w, "cmdline")) {
		parse_cmdline();
	} else if (!strcmp(w, "line")) {
		parse_line();
	} else if (!strcmp(w, "uart")) {
		parse_uart();
	} else if (!strcmp(w, "psci")) {
		head.psci = one_of(psci_names, 3);
		have_psci = true;
	} else if (!strcmp(w, "el")) {
		head.el = number();
	} else if (!strcmp(w, "x0")) {
		head.x0 = number();
	} else if (!strcmp(w, "gicc")) {
		head.gicc = number();
	} else if (!strcmp(w, "end")) {
		head.end = one_of(end_names, 4);
	} else if (!strcmp(w, "watch")) {
		parse_watch();
	} else if (!strcmp(w, "claim")) {
		unsigned long start = number(), size = number();

		add_range(MAX_RANGES, start, size, number(), INSPECT_PATTERN,
			  INSPECT_WATCHED, *nr_claims);
		*nr_claims = head.nr_ranges;
	} else if (!strcmp(w, "hold")) {
		hold(number());
	} else if (!strcmp(w, "fragment")) {
		fragment(number());
	} else if (!strcmp(w, "fail")) {
		fail_nth = strdup(need_word("number"));
	} else if (!strcmp(w, "announce")) {
		announce = true;
	} else if (!strcmp(w, "time")) {
		timed = true;
	} else if (!strcmp(w, "exec")) {
		leave = true;
	} else {
		die("unknown statement", w);
	}
}

int main(void)
{
	unsigned long took = 0;
	unsigned int nr_claims = 0, try;
	bool spared = false;
	char line[512];
	int error;

	page = getpagesize();
	ranges = anonymous(MAX_RANGES * sizeof(*ranges), 0);
	while (fgets(line, sizeof(line), stdin)) {
		size_t length = strlen(line);

		if (length && line[length - 1] == '\n')
			line[length - 1] = 0;
		rest = line;
		parse(&nr_claims);
	}

	if (!have_entry && nr_segments)
		entry = (unsigned long)segments[inspector < 0 ? 0 : inspector].mem;
	if (inspector < 0 && nr_watched)
		die("watch", inspector_file ? "where kexec_file_load() puts things is not known" :
					      "there is no inspector");
	if (!have_psci)
		psci_of_device_tree();
	crc32c_table(table);

	for (try = 0; ; try++) {
		if (nr_watched)
			fill_watched();
		finish(nr_claims);
		if (announce)
			fputs("calling\n", stderr);
		took = nanoseconds();
		error = fail_nth ? call_with_failure(&spared) : call();
		took = nanoseconds() - took;
		if (error || !nr_watched || !watched_moved())
			break;
		if (try == TRIES)
			die("watch", "the kernel keeps on moving this memory");
	}

	printf("%s%s", name_of(error), spared ? " spared" : "");
	if (timed)
		printf(" %lu", took);
	printf("\n");
	if (!error && leave) {
		syscall(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
			LINUX_REBOOT_CMD_KEXEC, NULL);
		die("reboot", strerror(errno));
	}
	return !!error;
}

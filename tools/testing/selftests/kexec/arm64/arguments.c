// SPDX-License-Identifier: GPL-2.0-only
/*
 * What kexec_load() and kexec_file_load() refuse on arm64, and with which errno
 *
 * An image is loaded first, and has to be loaded still after each refusal. What
 * is expected is told by Documentation/arch/arm64/kexec.rst ("Loading").
 * Nothing is executed.
 */
#include "machine.h"
#include "kselftest.h"
#include <sys/wait.h>

#define MAX_EXTENTS	256
#define NOBODY		65534
#define COMMAND_LINE_SIZE 2048	/* what an arm64 kernel takes, with its end */

#define MIB		0x100000UL
#define IMAGE_BYTES	8192
#define IMAGE_SIZE	65536

/* The parts of an arm64 Image header that matter here, see booting.rst */
struct header {
	uint32_t code[2];
	uint64_t text_offset;
	uint64_t image_size;
	uint64_t flags;
	uint64_t reserved[3];
	uint32_t magic;
	uint32_t pe_offset;
};

#define MAGIC		0x644d5241

/* The parts of a PE header, as an Image has it, that tell the size of the file */
struct pe {
	uint32_t magic;
	uint16_t machine;
	uint16_t nr_sections;
	uint32_t no_matter[3];
	uint16_t optional_size;
	uint16_t flags;
	struct pe_section {
		char name[8];
		uint32_t memory_size;
		uint32_t address;
		uint32_t size;
		uint32_t offset;
		uint32_t nothing[4];
	} section[2];
};

#define MZ		0x5a4d
#define PE		0x4550

static struct extent ram[MAX_EXTENTS], nomap[MAX_EXTENTS];
static int nr_ram, nr_nomap;
static unsigned long page, memory, good;
static char *contents;

static struct kexec_segment at(unsigned long mem, unsigned long memsz)
{
	return (struct kexec_segment) {
		.buf	= contents,
		.bufsz	= page,
		.mem	= (void *)mem,
		.memsz	= memsz,
	};
}

static int load(unsigned long entry, unsigned long count,
		const struct kexec_segment *segments, unsigned long flags)
{
	return syscall(__NR_kexec_load, entry, count, segments, flags) ? errno : 0;
}

static void check(const char *name, int expected, int got, int loaded)
{
	if (got != expected)
		ksft_print_msg("errno %d instead of %d\n", got, expected);
	if (is_loaded() != loaded)
		ksft_print_msg("%s is loaded\n", loaded ? "nothing" : "something");
	ksft_test_result(got == expected && is_loaded() == loaded, "%s\n", name);
}

/* One segment, and what becomes of it */
static void one(const char *name, int expected, unsigned long mem, unsigned long memsz)
{
	struct kexec_segment s = at(mem, memsz);

	check(name, expected, load(mem, 1, &s, KEXEC_ARCH_AARCH64), 1);
}

static void two(const char *name, int expected, struct kexec_segment a, struct kexec_segment b)
{
	struct kexec_segment s[] = { a, b };

	check(name, expected, load(good, 2, s, KEXEC_ARCH_AARCH64), 1);
}

static bool is_ram(unsigned long start, unsigned long end)
{
	int i;

	for (i = 0; i < nr_ram; i++) {
		if (start < ram[i].end && ram[i].start < end)
			return true;
	}
	return false;
}

/*
 * Destinations that are not memory. Below and above RAM there may be memory
 * that firmware keeps, for which the errno is another one.
 */
static bool is_nomap(unsigned long start, unsigned long end)
{
	int i;

	for (i = 0; i < nr_nomap; i++) {
		if (start < nomap[i].end && nomap[i].start < end)
			return true;
	}
	return false;
}

static void nowhere(const char *name, unsigned long mem, unsigned long memsz)
{
	one(name, is_nomap(mem, mem + memsz) ? EACCES : EADDRNOTAVAIL, mem, memsz);
}

static void test_destinations(void)
{
	unsigned long first = ram[0].start / page * page;
	unsigned long last = round_up_to(ram[nr_ram - 1].end, page);
	struct extent device[1];

	if (!is_ram(0, page))
		nowhere("address 0", 0, page);
	else
		ksft_test_result_skip("address 0: is memory here\n");
	if (first) {
		nowhere("the page below memory", first - page, page);
		nowhere("across the start of memory", first - page, 2 * page);
	} else {
		ksft_test_result_skip("the page below memory: there is none\n");
		ksft_test_result_skip("across the start of memory: it is 0\n");
	}
	if (read_extents(NULL, device, 1) && !is_ram(device[0].start / page * page, device[0].end))
		nowhere("a device", device[0].start / page * page, page);
	else
		ksft_test_result_skip("a device: none is found\n");
	nowhere("the page above memory", last, page);
	nowhere("across the end of memory", last - page, 2 * page);
	nowhere("far above memory", round_up_to(last, 1UL << 40) + (1UL << 40), page);
	nowhere("above 2^48", 1UL << 50, page);
	nowhere("a virtual address of the linear map", 0xffff000000000000, page);
	nowhere("the last page that ends below 2^64", -2 * page, page);
	nowhere("an end that wraps around", -page, 2 * page);
	nowhere("an end at 2^64", -page, page);

	if (nr_nomap && round_up_to(nomap[0].start, page) < nomap[0].end) {
		unsigned long start = round_up_to(nomap[0].start, page);

		one("no-map memory", EACCES, start, page);
		one("into no-map memory", EACCES, start - page, 2 * page);
	} else {
		ksft_test_result_skip("no-map memory: there is none\n");
		ksft_test_result_skip("into no-map memory: there is none\n");
	}
}

static void test_segments(void)
{
	struct kexec_segment s[KEXEC_SEGMENT_MAX + 1];
	int i;

	one("an address within a page", EADDRNOTAVAIL, good + page / 4, page);
	one("a size that is no number of pages", EADDRNOTAVAIL, good, page + page / 4);
	one("a 4K page of a larger one, or half of one", EADDRNOTAVAIL,
	    good + (page > 4096 ? 4096 : 2048), page);
	two("a good segment and one that is not memory", EADDRNOTAVAIL,
	    at(good, page), at(ram[nr_ram - 1].end / page * page + page, page));
	two("segments that overlap", EINVAL,
	    at(good, 4 * page), at(good + 2 * page, 4 * page));
	two("a segment within another", EINVAL,
	    at(good, 4 * page), at(good + page, page));
	two("the same segment twice", EINVAL, at(good, page), at(good, page));

	s[0] = at(good, page);
	s[0].bufsz = page + 1;
	check("more contents than room", EINVAL, load(good, 1, s, KEXEC_ARCH_AARCH64), 1);

	s[0] = at(good, 2 * page);
	s[0].buf = (void *)page;
	check("contents that can't be read", EFAULT, load(good, 1, s, KEXEC_ARCH_AARCH64), 1);
	check("a list that can't be read", EFAULT,
	      load(good, 1, (void *)page, KEXEC_ARCH_AARCH64), 1);

	s[0] = at(good, memory / 8 * 5 / page * page);
	s[0].bufsz = 0;
	check("more than half of memory", EINVAL, load(good, 1, s, KEXEC_ARCH_AARCH64), 1);

	for (i = 0; i <= KEXEC_SEGMENT_MAX; i++)
		s[i] = at(good + i * page, page);
	check("17 segments", EINVAL,
	      load(good, KEXEC_SEGMENT_MAX + 1, s, KEXEC_ARCH_AARCH64), 1);
	check("16 segments", 0, load(good, KEXEC_SEGMENT_MAX, s, KEXEC_ARCH_AARCH64), 1);

	s[0] = at(good, 4 * page);
	s[0].bufsz = 1;
	check("less contents than room", 0, load(good, 1, s, KEXEC_ARCH_AARCH64), 1);
	check("an entry outside of all segments", 0,
	      load(good + 4 * page, 1, s, KEXEC_ARCH_AARCH64), 1);
}

static void test_flags(void)
{
	struct kexec_segment s = at(good, page);

	check("the default architecture", 0, load(good, 1, &s, KEXEC_ARCH_DEFAULT), 1);
	check("arm's architecture", EINVAL, load(good, 1, &s, KEXEC_ARCH_ARM), 1);
	check("ppc64's architecture", EINVAL, load(good, 1, &s, KEXEC_ARCH_PPC64), 1);
	check("a flag that does not exist", EINVAL,
	      load(good, 1, &s, KEXEC_ARCH_AARCH64 | 0x8000), 1);
	check("a way back, which arm64 has not", EINVAL,
	      load(good, 1, &s, KEXEC_ARCH_AARCH64 | KEXEC_PRESERVE_CONTEXT), 1);
}

/* The errno of a call that somebody else than root makes, by way of an exit status */
static int load_as_nobody(void)
{
	struct kexec_segment s = at(good, page);
	int status = 0;
	pid_t child = fork();

	if (child < 0)
		return errno;
	if (!child) {
		if (syscall(__NR_setuid, NOBODY))
			exit(EINTR);
		exit(load(good, 1, &s, KEXEC_ARCH_AARCH64));
	}
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
}

/* A file in memory, opened to be read only: kexec_file_load() wants no writer */
static int make_file(const void *bytes, size_t size)
{
	char name[32];
	int writer = syscall(__NR_memfd_create, "image", 0), reader;

	if (writer < 0 || write(writer, bytes, size) != (ssize_t)size)
		return -1;
	snprintf(name, sizeof(name), "/proc/self/fd/%d", writer);
	reader = open(name, O_RDONLY);
	close(writer);
	return reader;
}

static int load_file(int kernel, const char *cmdline, unsigned long size, unsigned long flags)
{
	return syscall(__NR_kexec_file_load, kernel, -1, size, cmdline,
		       flags | KEXEC_FILE_NO_INITRAMFS) ? errno : 0;
}

static struct header good_header(void)
{
	return (struct header) { .image_size = IMAGE_SIZE, .magic = MAGIC };
}

/* The errno for an Image with this header, of which only @size bytes are there */
static int load_image(const struct header *header, size_t size)
{
	static char image[IMAGE_BYTES];
	int fd, got;

	memcpy(image, header, sizeof(*header));
	fd = make_file(image, size);
	if (fd < 0)
		return errno;
	got = load_file(fd, "", 1, 0);
	close(fd);
	return got;
}

/* The errno for an Image with a second section of @size bytes at @offset of its file */
static int load_pe(unsigned int nr_sections, uint32_t offset, uint32_t size, size_t file_size)
{
	static struct {
		struct header header;
		struct pe pe;
		char rest[IMAGE_BYTES - sizeof(struct header) - sizeof(struct pe)];
	} image;
	int fd, got;

	image.header = good_header();
	image.header.code[0] = MZ;
	image.header.pe_offset = sizeof(image.header);
	image.pe = (struct pe) {
		.magic = PE,
		.nr_sections = nr_sections,
		.section = {
			{ .size = 512, .offset = 512 },
			{ .size = size, .offset = offset },
		},
	};
	fd = make_file(&image, file_size);
	if (fd < 0)
		return errno;
	got = load_file(fd, "", 1, 0);
	close(fd);
	return got;
}

static void test_cut_images(void)
{
	check("an Image that is as long as its PE header says", 0,
	      load_pe(2, 1024, IMAGE_BYTES - 1024, IMAGE_BYTES), 1);
	check("the same without its last byte", ENOEXEC,
	      load_pe(2, 1024, IMAGE_BYTES - 1024, IMAGE_BYTES - 1), 1);
	check("an Image that is longer", 0, load_pe(2, 1024, 512, IMAGE_BYTES), 1);
	check("an Image with a section that is not in its file", 0,
	      load_pe(2, 0xffffffff, 0, IMAGE_BYTES), 1);
	check("an Image with a section that ends beyond 4 GiB", ENOEXEC,
	      load_pe(2, 0xffffff00, 0x200, IMAGE_BYTES), 1);
	check("an Image that ends among its sections", ENOEXEC,
	      load_pe(65535, 1024, 512, IMAGE_BYTES), 1);
	check("an Image that ends in its PE header", ENOEXEC,
	      load_pe(2, 1024, 512, sizeof(struct header) + 20), 1);
}

#define FILE_CHECKS 22

static void test_files(void)
{
	static char cmdline[COMMAND_LINE_SIZE + 1], image[IMAGE_BYTES];
	struct header h = good_header();
	int fd, i, got;

	got = load_image(&h, IMAGE_BYTES);
	if (got) {
		/* Not configured, or signatures are wanted */
		for (i = 0; i < FILE_CHECKS; i++)
			ksft_test_result_skip("kexec_file_load(): errno %d\n", got);
		return;
	}
	check("a good Image", 0, got, 1);

	check("an Image that ends in its header", ENOEXEC, load_image(&h, 40), 1);
	check("an empty Image", EINVAL, load_image(&h, 0), 1);
	h.magic ^= 1;
	check("an Image with another magic", ENOEXEC, load_image(&h, IMAGE_BYTES), 1);
	h = good_header();
	h.image_size = 0;
	check("an Image that does not tell its size", EINVAL, load_image(&h, IMAGE_BYTES), 1);
	h.image_size = round_up_to(ram[nr_ram - 1].end, MIB);
	check("an Image that is larger than memory", EADDRNOTAVAIL, load_image(&h, IMAGE_BYTES), 1);
	h.image_size = 1UL << 63;
	check("an Image of half the address space", EADDRNOTAVAIL, load_image(&h, IMAGE_BYTES), 1);
	test_cut_images();
	h = good_header();
	h.flags = (page == 4096 ? 1 : page == 16384 ? 2 : 3) << 1;
	check("an Image with the running kernel's page size", 0, load_image(&h, IMAGE_BYTES), 1);

	h = good_header();
	memcpy(image, &h, sizeof(h));
	fd = make_file(image, sizeof(image));
	memset(cmdline, 'x', sizeof(cmdline));
	check("a command line that does not end", EINVAL, load_file(fd, cmdline, 16, 0), 1);
	check("a command line that can't be read", EFAULT, load_file(fd, (char *)page, 16, 0), 1);
	cmdline[COMMAND_LINE_SIZE] = 0;
	check("a command line that would be cut", E2BIG,
	      load_file(fd, cmdline, COMMAND_LINE_SIZE + 1, 0), 1);
	cmdline[COMMAND_LINE_SIZE - 1] = 0;
	check("the longest command line", 0, load_file(fd, cmdline, COMMAND_LINE_SIZE, 0), 1);
	check("a flag of kexec_file_load() that does not exist", EINVAL,
	      load_file(fd, "", 1, 0x8000), 1);
	close(fd);
	check("a file that is not open", EBADF, load_file(-1, "", 1, 0), 1);
	fd = open("/", O_RDONLY);
	check("a directory", EINVAL, load_file(fd, "", 1, 0), 1);
	close(fd);
}

int main(void)
{
	unsigned long largest = 0;
	struct kexec_segment s;
	int error, i;

	ksft_print_header();

	page = getpagesize();
	contents = mmap(NULL, page + 1, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	nr_ram = read_extents("System RAM", ram, MAX_EXTENTS);
	nr_nomap = read_extents("reserved", nomap, MAX_EXTENTS);
	if (!nr_ram)
		ksft_exit_skip("/proc/iomem shows no memory: not root?\n");
	if (is_loaded())
		ksft_exit_skip("an image is loaded (see 'kexec -u'), or no kexec configured\n");

	for (i = 0; i < nr_ram; i++) {
		unsigned long size = ram[i].end - ram[i].start;

		memory += size;
		if (size > largest) {
			largest = size;
			good = (ram[i].start + size / 2) / page * page;
		}
	}
	s = at(good, page);
	error = load(good, 1, &s, KEXEC_ARCH_AARCH64);
	if (error == EPERM || error == ENOSYS || error == EBUSY)
		ksft_exit_skip("loading is forbidden, or this kernel can't be replaced: %s\n",
			       strerror(error));
	if (error)
		ksft_exit_fail_msg("a page in the middle of memory can't be loaded: %s\n",
				   strerror(error));

	ksft_set_plan(14 + 15 + 5 + 1 + FILE_CHECKS + 1);
	test_destinations();
	test_segments();
	test_flags();
	check("somebody else than root", EPERM, load_as_nobody(), 1);
	test_files();
	check("no segments, which unloads", 0, load(0, 0, NULL, KEXEC_ARCH_AARCH64), 0);
	ksft_finished();
}

/*
 * The guest that knows which of its frames user processes map. It is the first process: it starts others, each with one
 * thing that page tables can show, waits until all of them stand still, and writes the frames of all user mappings
 * of all processes, as /proc/PID/pagemap tells them, to port 0xe9 (QEMU's isa-debugcon):
 *
 *   "SLPAGES1"  then pairs of LEB128 numbers: frames to skip, frames that are mapped; a pair of zeros ends
 *
 * Then it says "PAGES READY" on the console and does nothing more. Of the command line:
 *   pages.fill_mib=N   ordinary memory, spread over four processes (16)
 *   pages.huge_2m=N    pages of 2 MiB from hugetlbfs (0)
 *   pages.huge_1g=N    pages of 1 GiB, reserved with hugepagesz=1G hugepages=N (0)
 *   pages.high=1       a mapping above 47 bits, where the processor has five levels
 */
#define _GNU_SOURCE
#include <asm/ldt.h>
#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define MIB (1UL << 20)
#define FRAMES_MAX (1UL << 23) /* 32 GiB */
#define HUGE_2M (21 << 26)     /* MAP_HUGE_2MB, MAP_HUGE_1GB of mmap(2) */
#define HUGE_1G (30 << 26)
#define PRESENT (1UL << 63)
#define FRAME ((1UL << 55) - 1)

static char command_line[8192];
static uint8_t frames[FRAMES_MAX / 8];
static uint64_t entries[512];
static volatile int *ready, *go; /* shared by all processes */

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		_exit(3);
}

static unsigned long option(const char *name)
{
	const char *at = strstr(command_line, name);

	return at ? strtoul(at + strlen(name), NULL, 10) : 0;
}

static char *map(size_t size, int flags, void *hint)
{
	char *memory = mmap(hint, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	if (memory == MAP_FAILED) {
		say("PAGES FAILED: no memory\n");
		_exit(1);
	}
	return memory;
}

static void touch(char *memory, size_t size)
{
	for (size_t at = 0; at < size; at += PAGE)
		memcpy(memory + at, "sealane guest page", 19);
}

static char *aligned(size_t size)
{
	char *memory = map(size + 2 * MIB, 0, NULL);

	return (char *)(((uintptr_t)memory + 2 * MIB - 1) & ~(2 * MIB - 1));
}

/* ---- what each process holds */

static void ordinary(void)
{
	size_t size = (option("pages.fill_mib=") ?: 16) * MIB / 4;

	touch(map(size, 0, NULL), size);
}

static void transparent_huge(void)
{
	char *memory = aligned(8 * MIB);

	madvise(memory, 8 * MIB, MADV_HUGEPAGE);
	touch(memory, 8 * MIB);
}

/* How much of this process's memory transparent huge pages hold. */
static int has_huge(void)
{
	char line[256];
	unsigned long kib, all = 0;
	FILE *maps = fopen("/proc/self/smaps", "r");

	while (maps && fgets(line, sizeof line, maps))
		if (sscanf(line, "AnonHugePages: %lu", &kib) == 1)
			all += kib;
	if (maps)
		fclose(maps);
	return all > 0;
}

/* Single pages, and huge ones as a whole, that nothing may touch any more: frame numbers are inverted at both levels. */
static void prot_none(void)
{
	char *small = map(4 * MIB, 0, NULL), *huge = aligned(4 * MIB);

	touch(small, 4 * MIB);
	madvise(huge, 4 * MIB, MADV_HUGEPAGE);
	touch(huge, 4 * MIB);
	if (has_huge())
		say("PAGES HUGE PROT_NONE\n");
	mprotect(small, 2 * MIB, PROT_NONE);
	mprotect(huge, 4 * MIB, PROT_NONE);
}

static void huge_pages(void)
{
	size_t small = option("pages.huge_2m=") * 2 * MIB, large = option("pages.huge_1g=") << 30;
	int file;
	char text[32], *memory;

	if (small) {
		file = open("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", O_WRONLY);
		snprintf(text, sizeof text, "%lu", small / (2 * MIB));
		if (file < 0 || write(file, text, strlen(text)) < 0)
			say("PAGES FAILED: no huge pages\n");
		memory = map(small, MAP_HUGETLB | HUGE_2M, NULL);
		touch(memory, small);
		mprotect(memory, small / 2, PROT_NONE);
	}
	if (large)
		touch(map(large, MAP_HUGETLB | HUGE_1G, NULL), large);
}

static void high(void)
{
	if (option("pages.high=")) {
		char *memory = map(4 * MIB, 0, (void *)(1UL << 50));

		if ((uintptr_t)memory < 1UL << 47)
			say("PAGES FAILED: nothing above 47 bits\n");
		touch(memory, 4 * MIB);
	}
}

static void secret(void)
{
	int file = (int)syscall(447 /* memfd_secret */, 0);

	if (file >= 0 && !ftruncate(file, MIB)) {
		char *memory = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

		if (memory != MAP_FAILED)
			touch(memory, MIB);
	}
}

/* Under page-table isolation the LDT is mapped by an entry of its own in the kernel half of this process's tables. */
static void with_ldt(void)
{
	struct user_desc entry = {.entry_number = 1, .base_addr = 0, .limit = 0xfffff, .seg_32bit = 1, .limit_in_pages = 1};

	if (syscall(SYS_modify_ldt, 1, &entry, sizeof entry))
		say("PAGES FAILED: no LDT\n");
}

static void start(void (*hold)(void), int spins)
{
	if (fork())
		return;
	hold();
	__sync_fetch_and_add(ready, 1);
	while (!spins)
		pause();
	/* so that this process is the one that runs, in user mode, when somebody looks */
	while (!*go)
		sched_yield();
	for (;;)
		;
}

/* ---- the truth */

static void mark_range(int pagemap, uint64_t start, uint64_t end)
{
	while (start < end) {
		uint64_t count = (end - start) / PAGE < 512 ? (end - start) / PAGE : 512;
		ssize_t got = pread(pagemap, entries, count * 8, (off_t)(start / PAGE * 8));

		if (got <= 0)
			return;
		for (ssize_t at = 0; at < got / 8; at++) {
			uint64_t frame = entries[at] & FRAME;

			if (entries[at] & PRESENT && frame < FRAMES_MAX)
				frames[frame / 8] |= (uint8_t)(1 << frame % 8);
		}
		start += (uint64_t)got / 8 * PAGE;
	}
}

static void mark_process(const char *pid)
{
	static char path[64], line[512];
	unsigned long start, end;
	FILE *maps;
	int pagemap;

	snprintf(path, sizeof path, "/proc/%.20s/pagemap", pid);
	pagemap = open(path, O_RDONLY);
	snprintf(path, sizeof path, "/proc/%.20s/maps", pid);
	maps = fopen(path, "r");
	while (maps && pagemap >= 0 && fgets(line, sizeof line, maps))
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && end <= 1UL << 56)
			mark_range(pagemap, start, end);
	if (maps)
		fclose(maps);
	close(pagemap);
}

static void mark_all(void)
{
	DIR *proc = opendir("/proc");

	for (struct dirent *each; proc && (each = readdir(proc));)
		if (each->d_name[0] >= '1' && each->d_name[0] <= '9')
			mark_process(each->d_name);
	closedir(proc);
}

static void put(uint64_t value)
{
	do {
		outb((uint8_t)((value & 0x7f) | (value > 0x7f) << 7), 0xe9);
		value >>= 7;
	} while (value);
}

static int is_marked(uint64_t frame)
{
	return frames[frame / 8] >> frame % 8 & 1;
}

static void tell(void)
{
	uint64_t told = 0, at = 0;

	for (const char *magic = "SLPAGES1"; *magic; magic++)
		outb((uint8_t)*magic, 0xe9);
	while (at < FRAMES_MAX) {
		uint64_t start;

		for (; at < FRAMES_MAX && !is_marked(at); at++)
			;
		for (start = at; at < FRAMES_MAX && is_marked(at); at++)
			;
		if (at > start) {
			put(start - told);
			put(at - start);
			told = at;
		}
	}
	put(0);
	put(0);
}

int main(void)
{
	int file, processes = 0;
	static void (*const holds[])(void) = {ordinary, ordinary, ordinary, ordinary, transparent_huge, prot_none, huge_pages, high, secret};

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	file = open("/proc/cmdline", O_RDONLY);
	if (file < 0 || read(file, command_line, sizeof command_line - 1) < 0 || iopl(3))
		return 2;
	ready = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	go = ready + 1;
	for (; processes < (int)(sizeof holds / sizeof *holds); processes++)
		start(holds[processes], 0);
	start(with_ldt, 1);
	processes++;
	while (*ready < processes)
		sched_yield();
	file = open("/proc/sys/kernel/numa_balancing", O_WRONLY); /* its PROT_NONE entries stay, pages move no more */
	if (file >= 0 && write(file, "0", 1) != 1)
		say("PAGES FAILED: NUMA balancing goes on\n");
	memset(frames, 1, sizeof frames); /* all its own pages are there before they are counted */
	memset(frames, 0, sizeof frames);
	mark_all();
	memset(frames, 0, sizeof frames); /* the first pass has touched what the second will see */
	mark_all();
	tell();
	say("PAGES READY\n");
	*go = 1;
	for (;;)
		pause();
}

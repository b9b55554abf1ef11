/*
 * Fills memory with pages whose content it can tell again at any time, keeps rewriting and checking them, and counts
 * aloud. A migration that loses, repeats or changes a page shows as "CORRUPT"; one that loses or repeats execution
 * shows as a gap in the ticks.
 *
 * Configured on the kernel's command line:
 *   sealane.fill_mib=N            pages to hold (8)
 *   sealane.fill=random|text|zero|mixed
 *                                 what they hold: incompressible, compressible, nothing, or of every eight pages two random,
 *                                 three of text, two of records of pointers and small numbers and one of zeros (random)
 *   sealane.rewrite_kib_per_s=N   how fast to rewrite them (0)
 *   sealane.touch_kib_per_s=N     how fast to write to pages what they hold already: dirty, and the same (0)
 *   sealane.touch_mib=N           how many of the pages to touch, from the first (all)
 *   sealane.tick_ms=N             the pause between ticks (100)
 *   sealane.check_all=N           every N ticks check all pages, not just a few (0: never)
 *   sealane.canary_hex=HEX        a secret to keep on CANARY_PAGES pages; in hex, so that the command line, of which the
 *                                 kernel keeps copies, never holds it in plain form
 *
 * A page's content follows from its index and its generation (how often it was rewritten), so no second copy is needed.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

enum { PAGE = 4096, WORDS = PAGE / 8, CANARY_PAGES = 256, CHECKED_PER_TICK = 16 };
enum fill { FILL_RANDOM, FILL_TEXT, FILL_ZERO, FILL_RECORDS, FILL_MIXED };

static char command_line[8192];
static enum fill fill_kind;
static uint64_t (*pages)[WORDS];
static uint32_t *generations;
static uint64_t page_count;
static char (*canary_pages)[PAGE];
static char canary[512];
static size_t canary_length;

/* The value of a word NAME=VALUE of the command line, or a null pointer. */
static const char *option(const char *name)
{
	static char value[1024];
	size_t length = strlen(name);

	for (const char *at = strstr(command_line, name); at; at = strstr(at + 1, name)) {
		if ((at == command_line || at[-1] == ' ') && at[length] == '=') {
			size_t size = strcspn(at + length + 1, " \n");

			if (size >= sizeof value)
				return NULL;
			memcpy(value, at + length + 1, size);
			value[size] = 0;
			return value;
		}
	}
	return NULL;
}

static uint64_t number(const char *name, uint64_t otherwise)
{
	const char *value = option(name);

	return value ? strtoull(value, NULL, 10) : otherwise;
}

static void say(const char *format, uint64_t first, uint64_t second)
{
	char line[128];
	int size = snprintf(line, sizeof line, format, (unsigned long long)first, (unsigned long long)second);

	/* one write per line; the terminal takes all of it or the machine is gone */
	if (write(1, line, (size_t)size) != size)
		_exit(3);
}

/* Vigna's xorshift64*: a few instructions per word, because the guest may run under an emulator. */
static inline uint64_t next(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return x * 0x2545f4914f6cdd1dULL;
}

static uint64_t seed(uint64_t index, uint32_t generation)
{
	uint64_t x = (index << 32 | generation) + 0x9e3779b97f4a7c15ULL;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x | 1;	/* xorshift must not start at zero */
}

static void make_page(uint64_t *page, uint64_t index)
{
	static const char words[16][9] = {
		"a ship  ", "of lanes", "sails on", "the tide", "between ", "two port", "with its", "holds   ",
		"sealed, ", "and each", "of them ", "is count", "ed twice", "before  ", "anchors ", "rise.\r\n ",
	};
	static const enum fill mixture[8] = {
		FILL_RANDOM, FILL_TEXT, FILL_RECORDS, FILL_TEXT, FILL_ZERO, FILL_RECORDS, FILL_RANDOM, FILL_TEXT,
	};
	enum fill kind = fill_kind == FILL_MIXED ? mixture[index % 8] : fill_kind;
	uint64_t state = seed(index, generations[index]);

	if (kind == FILL_ZERO) {
		memset(page, 0, PAGE);
	} else if (kind == FILL_RANDOM) {
		for (int i = 0; i < WORDS; i++)
			page[i] = next(&state);
	} else if (kind == FILL_RECORDS) {
		/* as a list's nodes lie in a heap: a pointer, a small number, nothing, a counter */
		for (int i = 0; i < WORDS; i += 4) {
			uint64_t word = next(&state);

			page[i] = 0x00007f0000000000ULL | (word & 0xfffff8);
			page[i + 1] = word >> 56;
			page[i + 2] = 0;
			page[i + 3] = index * WORDS + (uint64_t)i;
		}
	} else {
		for (int i = 0; i < WORDS; i += 16) {
			uint64_t picks = next(&state);

			for (int j = 0; j < 16; j++, picks >>= 4)
				memcpy(&page[i + j], words[picks & 15], 8);
		}
	}
}

static void check_page(uint64_t index)
{
	static uint64_t expected[WORDS];

	make_page(expected, index);
	if (memcmp(expected, pages[index], PAGE)) {
		say("CORRUPT page %llu generation %llu\n", index, generations[index]);
		exit(1);
	}
}

static void fill_canary(char *page)
{
	for (size_t at = 0; at < PAGE; at += canary_length)
		memcpy(page + at, canary, at + canary_length > PAGE ? PAGE - at : canary_length);
}

static void check_canary(uint64_t index)
{
	static char expected[PAGE];

	fill_canary(expected);
	if (memcmp(expected, canary_pages[index], PAGE)) {
		say("CORRUPT page canary %llu of %llu\n", index, CANARY_PAGES);
		exit(1);
	}
}

static void *allocate(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED) {
		say("no memory for %llu bytes\n", size, 0);
		exit(2);
	}
	return memory;
}

static void set_up(void)
{
	const char *value = option("sealane.fill");

	fill_kind = !value ? FILL_RANDOM
		: !strcmp(value, "text") ? FILL_TEXT
		: !strcmp(value, "zero") ? FILL_ZERO
		: !strcmp(value, "mixed") ? FILL_MIXED : FILL_RANDOM;
	page_count = number("sealane.fill_mib", 8) * 256;
	generations = allocate(page_count * sizeof *generations + 1);
	pages = allocate(page_count * PAGE + 1);
	for (uint64_t i = 0; i < page_count; i++)
		make_page(pages[i], i);

	value = option("sealane.canary_hex");
	for (unsigned byte; value && canary_length < sizeof canary && sscanf(value, "%2x", &byte) == 1; value += 2) {
		canary[canary_length++] = (char)byte;
		if (!value[1])
			break;
	}
	if (canary_length) {
		canary_pages = allocate(CANARY_PAGES * PAGE);
		for (int i = 0; i < CANARY_PAGES; i++)
			fill_canary(canary_pages[i]);
	}
}

/* Waits for the next tick. After a stop (a migration, a debugger) it goes on from now instead of catching up. */
static void wait_tick(struct timespec *due, uint64_t tick_ms)
{
	struct timespec now;

	due->tv_nsec += (long)(tick_ms % 1000) * 1000000;
	due->tv_sec += (time_t)(tick_ms / 1000) + due->tv_nsec / 1000000000;
	due->tv_nsec %= 1000000000;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (now.tv_sec > due->tv_sec || (now.tv_sec == due->tv_sec && now.tv_nsec > due->tv_nsec))
		*due = now;
	else
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, due, NULL);
}

static void check_all_pages(void)
{
	for (uint64_t i = 0; i < page_count; i++)
		check_page(i);
	for (uint64_t i = 0; canary_length && i < CANARY_PAGES; i++)
		check_canary(i);
	say("checked %llu pages ok\n", page_count, 0);
}

static void run(void)
{
	uint64_t tick_ms = number("sealane.tick_ms", 100), check_all = number("sealane.check_all", 0);
	uint64_t rewrite_bytes_per_s = number("sealane.rewrite_kib_per_s", 0) * 1024;
	uint64_t touch_bytes_per_s = number("sealane.touch_kib_per_s", 0) * 1024;
	uint64_t touch_count = number("sealane.touch_mib", page_count / 256) * 256;
	uint64_t checked = 0, rewritten = 0, owed_bytes_ms = 0, touched = 0, touch_bytes_ms = 0;
	struct timespec due;

	if (touch_count > page_count)
		touch_count = page_count;
	clock_gettime(CLOCK_MONOTONIC, &due);
	for (uint64_t tick = 1;; tick++) {
		say("tick %llu\n", tick, 0);
		for (int i = 0; page_count && i < CHECKED_PER_TICK; i++)
			check_page(checked++ % page_count);
		if (canary_length)
			check_canary(tick % CANARY_PAGES);
		owed_bytes_ms += rewrite_bytes_per_s * tick_ms;
		for (; page_count && owed_bytes_ms >= PAGE * 1000; owed_bytes_ms -= PAGE * 1000) {
			uint64_t index = rewritten++ % page_count;

			check_page(index);
			generations[index]++;
			make_page(pages[index], index);
		}
		touch_bytes_ms += touch_bytes_per_s * tick_ms;
		for (; touch_count && touch_bytes_ms >= PAGE * 1000; touch_bytes_ms -= PAGE * 1000) {
			volatile uint64_t *word = pages[touched++ % touch_count];

			*word = *word;
		}
		if (check_all && tick % check_all == 0)
			check_all_pages();
		wait_tick(&due, tick_ms);
	}
}

int main(void)
{
	int file = open("/proc/cmdline", O_RDONLY);

	if (file < 0 || read(file, command_line, sizeof command_line - 1) < 0)
		return 2;
	close(file);
	set_up();
	say("filled %llu pages\n", page_count, 0);
	run();
}

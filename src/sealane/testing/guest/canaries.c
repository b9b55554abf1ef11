/*
 * The guest of the attack lab, the first process and the only program. It plants distinct secrets, one in each place where a
 * running system keeps bytes, and wipes its own copies; then it counts aloud once a second, and repeats a sentence that it
 * holds in its memory.
 *
 * A secret is the sixteen hexadecimal digits of a number made of the command line's seed and the secret's own number (order of
 * PLACES in sealane.testing.lab.guest), so that no copy of the command line or of this program holds one.
 *
 *   lab.seed=N            sixteen hexadecimal digits
 *   lab.fill_mib=N        ordinary memory of one process: text, records and some noise (8)
 *   lab.rewrite_kib_per_s=N, lab.read_kib_per_s=N
 *                         how fast that memory is written anew, or read (0)
 *
 * On the console tty1, if there is one, it asks for a name and a password as login(1) does, and for another as sudo(8) does.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <pty.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SECRET = 16, EXITED_PAGES = 256 };
enum place {
	HEAP, STACK, ENVIRONMENT, MAPPED_FILE, CLOSED_FILE, TMPFS, PIPE, UNIX_SOCKET, TCP_SOCKET, TTY_INPUT, KEYRING, EXITED,
	KERNEL_LOG, MESSAGE_QUEUE, REGISTERS, FILE_NAME, DOCUMENT, PEM_KEY,
};

static char command_line[4096];
static volatile int *planted; /* shared by all processes */
static char scratch[PAGE];    /* where a secret stands until it is planted */

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		_exit(3);
}

static void check(int worked, const char *what)
{
	if (worked)
		return;
	say("LAB FAILED ");
	say(what);
	say("\n");
	_exit(1);
}

static unsigned long option(const char *name, unsigned long otherwise, int base)
{
	const char *at = strstr(command_line, name);

	return at ? strtoul(at + strlen(name), NULL, base) : otherwise;
}

/* splitmix64 */
static uint64_t mixed(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x ^ x >> 31;
}

static char *make_secret(char *into, unsigned number)
{
	uint64_t word = mixed(mixed(option("lab.seed=", 1, 16)) + number);

	for (int i = 0; i < SECRET; i++, word <<= 4)
		into[i] = "0123456789abcdef"[word >> 60];
	return into;
}

static void wipe(void)
{
	explicit_bzero(scratch, sizeof scratch);
}

static void write_secret(int file, unsigned number)
{
	check(file >= 0 && write(file, make_secret(scratch, number), SECRET) == SECRET, "to write a secret");
	wipe();
}

static void *map(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(memory != MAP_FAILED, "memory");
	return memory;
}

/* ---- what lives in a process's own pages */

static void heap(void)
{
	make_secret(malloc(SECRET), HEAP);
}

static void stack(void)
{
	char here[64];

	make_secret(here, STACK);
	__sync_fetch_and_add(planted, 1);
	for (;;)
		__asm__ volatile("syscall" : : "a"(SYS_pause), "r"(here) : "rcx", "r11", "memory");
}

/* The child shares this process's memory until it is another program, so that no freed copy of the secret is left. */
static void environment(void)
{
	static char *words[] = {"holder", NULL}, *variables[] = {scratch, NULL};

	memcpy(scratch, "API_TOKEN=", 10);
	make_secret(scratch + 10, ENVIRONMENT);
	if (!vfork()) {
		execve("/init", words, variables);
		_exit(1);
	}
	wipe();
}

static void mapped_file(void)
{
	int file = open("/mapped", O_RDWR | O_CREAT, 0600);
	char *memory;

	check(file >= 0 && !ftruncate(file, PAGE), "a mapped file");
	memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	check(memory != MAP_FAILED, "mmap");
	make_secret(memory, MAPPED_FILE);
}

static void registers(void)
{
	make_secret(scratch, REGISTERS);
	__asm__ volatile("movdqu (%0), %%xmm7" : : "r"(scratch) : "xmm7");
	/* by hand: a library call might use the register */
	for (volatile char *at = scratch; at < scratch + SECRET; at++)
		*at = 0;
	__asm__ volatile("lock incl (%0)" : : "r"(planted) : "memory");
	for (;;)
		__asm__ volatile("syscall" : : "a"(SYS_pause) : "rcx", "r11", "memory");
}

static const char document[] =
	"Report to the board, strictly confidential.\n\n"
	"The harbour at the northern end of the bay will be sold before the end of the year. Three buyers have looked at the "
	"quays, the cranes and the two dry docks; the price that all of them were told is eleven million. We shall accept nine. "
	"Nobody outside of this room may know the number, because the second buyer would go home at once if he knew how long we "
	"have been looking for somebody who would take it from us at all.\n\n"
	"The workers will hear of it in the last week of October. The yard stays open until spring; those who have been here for "
	"more than twenty years keep their pensions, and the others will be offered a place on the ferries.\n\n";

/* An editor with an open document, and a program that has loaded its private key. */
static void editor(void)
{
	char *text = map(PAGE), *key = map(PAGE), *at = key;

	at = text + sprintf(text, "%sThe word that the notary will ask for is ", document);
	make_secret(at, DOCUMENT);
	at[SECRET] = '.';
	at = key + sprintf(key, "-----BEGIN PRIVATE KEY-----\n");
	for (int line = 0; line < 12; line++) {
		for (int part = 0; part < 4; part++, at += SECRET)
			make_secret(at, PEM_KEY + (unsigned)(line * 4 + part) * 256);
		*at++ = '\n';
	}
	strcpy(at, "-----END PRIVATE KEY-----\n");
}

static const char *const words[64] = {
	"the ", "of ", "and ", "a ", "to ", "in ", "is ", "that ", "it ", "was ", "for ", "on ", "are ", "with ", "as ", "his ",
	"they ", "at ", "be ", "this ", "from ", "have ", "or ", "by ", "one ", "had ", "not ", "but ", "what ", "all ", "were ", "when ",
	"we ", "there ", "can ", "an ", "your ", "which ", "their ", "said ", "if ", "do ", "will ", "each ", "about ", "how ", "up ", "out ",
	"them ", "then ", "she ", "many ", "some ", "so ", "these ", "would ", "other ", "into ", "has ", "more ", "her ", "two ", "like ", "him. ",
};

/* Of every eight pages four of text, three of records as a heap's lists have them, one of noise. */
static void make_page(uint64_t *page, uint64_t number, uint64_t generation)
{
	uint64_t state = mixed(number << 20 | generation);
	char *at = (char *)page, *end = at + PAGE - 8;

	for (int i = 0; number % 8 == 7 && i < 512; i++)
		page[i] = state = mixed(state);
	for (int i = 0; number % 8 < 7 && number % 8 > 3 && i < 512; i += 4) {
		state = mixed(state);
		page[i] = 0x00007f0000000000ULL | (state & 0xfffff8);
		page[i + 1] = state >> 56;
		page[i + 2] = 0;
		page[i + 3] = generation;
	}
	if (number % 8 > 3)
		return;
	memset(page, 0, PAGE);
	while (at < end) {
		const char *word = words[(state = mixed(state)) & 63];
		size_t length = strlen(word);

		memcpy(at, word, at + length < end ? length : (size_t)(end - at));
		at += length;
	}
}

static void workload(void)
{
	uint64_t count = option("lab.fill_mib=", 8, 10) * 256, at = 0, sum = 0;
	uint64_t writes = option("lab.rewrite_kib_per_s=", 0, 10) / 80, reads = option("lab.read_kib_per_s=", 0, 10) / 80;
	uint64_t (*pages)[512] = map(count * PAGE + 1);
	struct timespec twentieth = {0, 50000000};

	for (uint64_t i = 0; i < count; i++)
		make_page(pages[i], i, 0);
	__sync_fetch_and_add(planted, 1);
	for (uint64_t generation = 1; writes || reads; generation++) {
		for (uint64_t i = 0; i < writes; i++, at++)
			make_page(pages[at % count], at % count, generation);
		for (uint64_t i = 0; i < reads; i++, at++)
			for (int word = 0; word < 512; word++)
				sum += *(volatile uint64_t *)&pages[at % count][word];
		nanosleep(&twentieth, NULL);
	}
	for (;;)
		syscall(SYS_pause);
}

/* A program of the system, mapped and read as a running process's is. */
static void program(void)
{
	struct stat told;
	int file = open("/bin/busybox", O_RDONLY);

	check(file >= 0 && !fstat(file, &told), "busybox");
	check(mmap(NULL, (size_t)told.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0) != MAP_FAILED, "mmap");
}

static void exited(void)
{
	char *memory = map((size_t)EXITED_PAGES * PAGE);

	for (int i = 0; i < EXITED_PAGES; i++) {
		memcpy(memory + i * PAGE, &i, sizeof i); /* no two pages are the same */
		make_secret(memory + i * PAGE + 1024, EXITED);
	}
	_exit(0);
}

/* ---- what lives in the kernel's */

static void files(void)
{
	int file = open("/closed", O_WRONLY | O_CREAT, 0600);

	write_secret(file, CLOSED_FILE);
	close(file);
	file = open("/tmp/note", O_WRONLY | O_CREAT, 0600);
	write_secret(file, TMPFS);
	close(file);
	memcpy(scratch, "/tmp/", 5);
	make_secret(scratch + 5, FILE_NAME);
	close(open(scratch, O_WRONLY | O_CREAT, 0600));
	wipe();
}

static void buffers(void)
{
	int ends[2];
	struct {
		long kind;
		char text[SECRET];
	} *message = (void *)scratch;

	check(!pipe(ends), "pipe");
	write_secret(ends[1], PIPE);
	check(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	write_secret(ends[1], UNIX_SOCKET);
	message->kind = 1;
	make_secret(message->text, MESSAGE_QUEUE);
	check(!msgsnd(msgget(IPC_PRIVATE, 0600), message, SECRET, 0), "msgsnd");
	wipe();
}

static void tcp(void)
{
	int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(4000), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP};

	check(!ioctl(client, SIOCSIFFLAGS, &loopback), "lo");
	check(!bind(listener, (void *)&address, sizeof address) && !listen(listener, 1), "listen");
	check(!connect(client, (void *)&address, sizeof address), "connect");
	check(accept(listener, NULL, NULL) >= 0, "accept");
	write_secret(client, TCP_SOCKET);
}

/* As sshd does: what a user types goes to the master; nobody has read it yet, and nothing is echoed. */
static void terminal(void)
{
	int master, slave;
	struct termios settings;

	check(!openpty(&master, &slave, NULL, NULL, NULL), "openpty");
	tcgetattr(slave, &settings);
	settings.c_lflag &= ~(tcflag_t)ECHO;
	tcsetattr(slave, TCSANOW, &settings);
	make_secret(scratch, TTY_INPUT);
	scratch[SECRET] = '\n';
	check(write(master, scratch, SECRET + 1) == SECRET + 1, "the terminal");
	wipe();
}

static void keyring_and_log(void)
{
	int log = open("/dev/kmsg", O_WRONLY);

	make_secret(scratch, KEYRING);
	check(syscall(SYS_add_key, "user", "lab", scratch, SECRET, -5 /* KEY_SPEC_USER_SESSION_KEYRING */) >= 0
		|| syscall(SYS_add_key, "user", "lab", scratch, SECRET, -4) >= 0, "add_key");
	memcpy(scratch, "<6>mount: the pass phrase was ", 30);
	make_secret(scratch + 30, KERNEL_LOG);
	check(write(log, scratch, 30 + SECRET) > 0, "/dev/kmsg");
	wipe();
	close(log);
}

static void prompt(int console, const char *text, const char *told)
{
	check(write(console, text, strlen(text)) > 0, "tty1");
	say(told);
}

/*
 * A login on the first virtual console. The name is echoed, the password is not; the program keeps what it read, as programs do.
 * Then a document on the screen, and a second question for a password, of which the answer is typed and not read.
 */
static void login(void)
{
	int console = open("/dev/tty1", O_RDWR);
	struct termios settings;
	char *kept = map(PAGE);

	if (console < 0)
		return;
	prompt(console, "\033[2J\033[Hharbour login: ", "LAB LOGIN\n");
	check(read(console, scratch, sizeof scratch) > 0, "to read a name");
	wipe();
	tcgetattr(console, &settings);
	settings.c_lflag &= ~(tcflag_t)ECHO;
	tcsetattr(console, TCSANOW, &settings);
	prompt(console, "Password: ", "LAB PASSWORD\n");
	check(read(console, kept, PAGE) > 0, "to read a password");
	prompt(console, "\nWelcome to harbour.\n# less report.txt\n", "LAB LOGGED IN\n");
	prompt(console, document, "");
	prompt(console, "# sudo -i\n[sudo] password for root: ", "LAB SUDO\n");
	check(poll(&(struct pollfd){.fd = console, .events = POLLIN}, 1, -1) == 1, "poll");
	say("LAB TYPED\n");
}

/* ---- all of it */

static void start(void (*hold)(void))
{
	if (fork())
		return;
	hold();
	__sync_fetch_and_add(planted, 1);
	for (;;)
		pause();
}

static void mount_all(void)
{
	static const char *const wanted[][2] = {
		{"proc", "/proc"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"devpts", "/dev/pts"},
	};

	for (unsigned i = 0; i < sizeof wanted / sizeof *wanted; i++) {
		mkdir(wanted[i][1], 0755);
		mount(wanted[i][0], wanted[i][1], wanted[i][0], 0, NULL);
	}
}

static void count_aloud(void)
{
	char *sentence = map(PAGE), line[160];
	struct timespec pause = {1, 0};

	strcpy(sentence, "pay 100 to alice");
	for (unsigned tick = 1;; tick++) {
		snprintf(line, sizeof line, "tick %u\nsays %.40s\n", tick, sentence);
		say(line);
		nanosleep(&pause, NULL);
	}
}

int main(int count, char **arguments)
{
	static void (*const holds[])(void) = {
		heap, stack, mapped_file, registers, editor, workload, program, buffers, tcp, terminal,
	};
	int file, wanted = sizeof holds / sizeof *holds;

	if (count && !strcmp(arguments[0], "holder")) /* the process with the environment */
		for (;;)
			pause();
	mount_all();
	file = open("/proc/cmdline", O_RDONLY);
	check(file >= 0 && read(file, command_line, sizeof command_line - 1) > 0, "/proc/cmdline");
	close(file);
	planted = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < wanted; i++)
		start(holds[i]);
	environment();
	while (*planted < wanted)
		usleep(1000);
	files();
	keyring_and_log();
	if (!fork())
		exited();
	wait(NULL);
	if (!fork()) {
		login();
		for (;;)
			pause();
	}
	say("LAB READY\n");
	count_aloud();
}

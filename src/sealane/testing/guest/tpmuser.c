/*
 * Uses the machine's TPM 2.0 through /dev/tpm0, and says once a tick whether everything that it made at first still works:
 *
 *   tpm 7 ek=H key=H counter=8 secret=TEXT
 *
 * ek       hash of the public area of the endorsement key at 0x81010001
 * key      hash of the public area of a transient storage key, loaded once at the start
 * counter  an NV counter, one more at each tick
 * secret   what a sealed object gives back, opened by a policy session that was authorised one tick before
 *
 * The secret lies in an NV index too, which is a part of what the TPM keeps on its disk.
 *
 * It ends with "TPM FAILED" and the command's name at the first command that does not succeed. The secret is the word
 * sealane.tpm_secret of the kernel's command line, in hex so that the command line never holds it in plain form.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	NO_SESSIONS = 0x8001, SESSIONS = 0x8002,
	CC_NV_DEFINE = 0x12a, CC_CREATE_PRIMARY = 0x131, CC_NV_INCREMENT = 0x134, CC_NV_WRITE = 0x137, CC_STARTUP = 0x144,
	CC_NV_READ = 0x14e,
	CC_CREATE = 0x153, CC_LOAD = 0x157, CC_UNSEAL = 0x15e, CC_FLUSH = 0x165, CC_POLICY_COMMAND = 0x16c,
	CC_READ_PUBLIC = 0x173, CC_START_SESSION = 0x176, CC_POLICY_DIGEST = 0x189,
	PASSWORD = 0x40000009, OWNER = 0x40000001, NONE = 0x40000007, EK = 0x81010001, COUNTER = 0x01500001, PLACE = 0x01500002,
	NV_DEFINED = 0x14c,
	SHA256 = 0x0b, AES = 6, CFB = 0x43, ECC = 0x23, KEYED_HASH = 8, ALG_NULL = 0x10, P256 = 3,
};

static uint8_t command[4096], answer[4096];
static size_t used, answered;
static int device;

static void put(const void *data, size_t size)
{
	memcpy(command + used, data, size);
	used += size;
}

static void number(uint64_t value, int bytes)
{
	for (int i = bytes - 1; i >= 0; i--)
		command[used++] = (uint8_t)(value >> (8 * i));
}

static uint32_t read_number(size_t at, int bytes)
{
	uint32_t value = 0;

	for (int i = 0; i < bytes; i++)
		value = value << 8 | answer[at + i];
	return value;
}

static void begin(int tag, uint32_t code)
{
	used = 0;
	number(tag, 2);
	number(0, 4);
	number(code, 4);
}

/* An authorization without a value: a password session, or a policy session that goes on. */
static void authorize(uint32_t session)
{
	number(9, 4);
	number(session, 4);
	number(0, 2);
	number(session == PASSWORD ? 0 : 1, 1);
	number(0, 2);
}

static void send_command(const char *name)
{
	ssize_t got;
	uint32_t code;
	size_t size = used;

	used = 2;
	number(size, 4);
	if (write(device, command, size) != (ssize_t)size || (got = read(device, answer, sizeof answer)) < 10) {
		printf("TPM FAILED %s: no answer\n", name);
		exit(1);
	}
	answered = (size_t)got;
	code = read_number(6, 4);
	if (code && strcmp(name, "startup") && code != NV_DEFINED) {
		printf("TPM FAILED %s: %#x\n", name, code);
		exit(1);
	}
}

static uint64_t hash(size_t at, size_t size)
{
	uint64_t value = 0xcbf29ce484222325ULL;	/* FNV-1a */

	for (size_t i = 0; i < size; i++)
		value = (value ^ answer[at + i]) * 0x100000001b3ULL;
	return value;
}

static uint64_t read_public(uint32_t handle)
{
	begin(NO_SESSIONS, CC_READ_PUBLIC);
	number(handle, 4);
	send_command("read-public");
	return hash(12, read_number(10, 2));
}

static uint32_t create_primary(void)
{
	begin(SESSIONS, CC_CREATE_PRIMARY);
	number(OWNER, 4);
	authorize(PASSWORD);
	number(4, 2);
	number(0, 4);			/* no authorization value, no data */
	number(26, 2);
	number(ECC, 2);
	number(SHA256, 2);
	number(0x00030072, 4);		/* fixed, sensitive data origin, user with auth, restricted, decrypt */
	number(0, 2);
	number(AES, 2);
	number(128, 2);
	number(CFB, 2);
	number(ALG_NULL, 2);
	number(P256, 2);
	number(ALG_NULL, 2);
	number(0, 4);			/* an empty point */
	number(0, 2);
	number(0, 4);			/* no PCRs */
	send_command("create-primary");
	return read_number(10, 4);
}

static uint32_t start_session(int kind)
{
	static const uint8_t nonce[16] = "sealane's nonce";

	begin(NO_SESSIONS, CC_START_SESSION);
	number(NONE, 4);
	number(NONE, 4);
	number(sizeof nonce, 2);
	put(nonce, sizeof nonce);
	number(0, 2);
	number(kind, 1);
	number(ALG_NULL, 2);
	number(SHA256, 2);
	send_command("start-session");
	return read_number(10, 4);
}

static void allow_unseal(uint32_t session)
{
	begin(NO_SESSIONS, CC_POLICY_COMMAND);
	number(session, 4);
	number(CC_UNSEAL, 4);
	send_command("policy-command-code");
}

static uint32_t seal(uint32_t parent, const uint8_t *secret, size_t size)
{
	uint8_t policy[32], object[2048];
	size_t length;
	uint32_t trial = start_session(3);

	allow_unseal(trial);
	begin(NO_SESSIONS, CC_POLICY_DIGEST);
	number(trial, 4);
	send_command("policy-digest");
	memcpy(policy, answer + 12, sizeof policy);
	begin(NO_SESSIONS, CC_FLUSH);
	number(trial, 4);
	send_command("flush");

	begin(SESSIONS, CC_CREATE);
	number(parent, 4);
	authorize(PASSWORD);
	number(4 + size, 2);
	number(0, 2);
	number(size, 2);
	put(secret, size);
	number(14 + sizeof policy, 2);
	number(KEYED_HASH, 2);
	number(SHA256, 2);
	number(0x12, 4);		/* fixed; opened by its policy alone */
	number(sizeof policy, 2);
	put(policy, sizeof policy);
	number(ALG_NULL, 2);
	number(0, 2);
	number(0, 2);
	number(0, 4);
	send_command("create");
	length = 2 + read_number(14, 2);
	length += 2 + read_number(14 + length, 2);
	memcpy(object, answer + 14, length);

	begin(SESSIONS, CC_LOAD);
	number(parent, 4);
	authorize(PASSWORD);
	put(object, length);
	send_command("load");
	return read_number(10, 4);
}

/* An index read and written by its own (empty) authorization, outside of the lockout; it may be there from an earlier boot. */
static void define(uint32_t index, uint32_t kind, size_t size)
{
	begin(SESSIONS, CC_NV_DEFINE);
	number(OWNER, 4);
	authorize(PASSWORD);
	number(0, 2);
	number(14, 2);
	number(index, 4);
	number(SHA256, 2);
	number(0x02040004 | kind, 4);
	number(0, 2);
	number(size, 2);
	send_command("nv-define");
}

static void keep(const uint8_t *secret, size_t size)
{
	define(PLACE, 0, size);
	begin(SESSIONS, CC_NV_WRITE);
	number(PLACE, 4);
	number(PLACE, 4);
	authorize(PASSWORD);
	number(size, 2);
	put(secret, size);
	number(0, 2);
	send_command("nv-write");
}

static uint64_t count(void)
{
	begin(SESSIONS, CC_NV_INCREMENT);
	number(COUNTER, 4);
	number(COUNTER, 4);
	authorize(PASSWORD);
	send_command("nv-increment");
	begin(SESSIONS, CC_NV_READ);
	number(COUNTER, 4);
	number(COUNTER, 4);
	authorize(PASSWORD);
	number(8, 2);
	number(0, 2);
	send_command("nv-read");
	return (uint64_t)read_number(16, 4) << 32 | read_number(20, 4);
}

/* The value of sealane.tpm_secret, as bytes. */
static size_t find_secret(uint8_t *secret, size_t room)
{
	char line[8192] = "", *at;
	FILE *file = fopen("/proc/cmdline", "r");
	size_t size = 0;

	if (!file || !fgets(line, sizeof line, file))
		return 0;
	fclose(file);
	at = strstr(line, "sealane.tpm_secret=");
	for (at = at ? strchr(at, '=') + 1 : NULL; at && size < room; at += 2) {
		unsigned byte;

		if (sscanf(at, "%2x", &byte) != 1)
			break;
		secret[size++] = (uint8_t)byte;
	}
	memset(line, 0, sizeof line);
	return size;
}

int main(void)
{
	uint8_t secret[64];
	size_t size = find_secret(secret, sizeof secret);
	uint32_t key, sealed, session;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!size)
		return 0;
	device = open("/dev/tpm0", O_RDWR);
	if (device < 0) {
		printf("TPM FAILED: no /dev/tpm0\n");
		return 1;
	}
	begin(NO_SESSIONS, CC_STARTUP);
	number(0, 2);
	send_command("startup");	/* the firmware has done it, perhaps */
	key = create_primary();
	sealed = seal(key, secret, size);
	define(COUNTER, 0x10, 8);
	keep(secret, size);
	session = start_session(1);
	allow_unseal(session);
	for (unsigned tick = 1;; tick++) {
		uint64_t ek = read_public(EK), loaded = read_public(key), counter = count();

		begin(SESSIONS, CC_UNSEAL);
		number(sealed, 4);
		authorize(session);
		send_command("unseal");
		printf("tpm %u ek=%016llx key=%016llx counter=%llu secret=%s\n", tick, (unsigned long long)ek,
		       (unsigned long long)loaded, (unsigned long long)counter,
		       read_number(14, 2) == size && !memcmp(answer + 16, secret, size) ? "right" : "WRONG");
		allow_unseal(session);
		usleep(200000);
	}
}

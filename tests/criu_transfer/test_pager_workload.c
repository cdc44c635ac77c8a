/* A process tree whose every byte can be checked after a lazy restore. Usage: workload DIR PAGES CHILDREN [quiet|idle]
 *
 * Each process maps nine parts of PAGES pages and fills eight with numbers that tell address and owner. It writes
 * "ready" to the fifo DIR/report, waits for the file DIR/go, and then, while the memory is being brought, does
 * everything to it that a pager has to follow; "quiet" only reads, "idle" has a child that does nothing and reads when
 * the file DIR/read is there. It ends with "ok PID" or "bad PID ..." on the fifo.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { DROPPED, REPLACED, MOVED, FORKED, SPLIT, READ, WRITTEN, LONELY, UNTOUCHED, PARTS };
#define PAGE 4096L
#define WORDS (PAGE / 8)
#define SLICE 24L

static const char *directory;
static long pages;
static int disturbed, in_child;
static uint64_t *part[PARTS], seed[PARTS], *new_place;

static void report(const char *text)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/report", directory);
	int fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		_exit(9);
	close(fd);
}

static void bad(const char *what, int which, long page, uint64_t got)
{
	char text[200];
	snprintf(text, sizeof text, "bad %d %s part %d page %ld: %llx\n", getpid(), what, which, page, (unsigned long long)got);
	report(text);
	_exit(1);
}

static uint64_t expected(int which, long page, long word)
{
	uint64_t x = seed[which] * 0x9E3779B97F4A7C15u + (uint64_t)(page * WORDS + word);
	x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9u;
	return x | 1;
}

static void wait_for(const char *name)
{
	struct timespec pause = { 0, 1000000 };
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", directory, name);
	while (access(path, F_OK))
		nanosleep(&pause, NULL);
}

static void fill(int which)
{
	for (long page = 0; page < pages; page++)
		for (long word = 0; word < WORDS; word++)
			part[which][page * WORDS + word] = expected(which, page, word);
}

static void check_page(const char *what, int which, long page, int zero)
{
	for (long word = 0; word < WORDS; word++) {
		uint64_t got = part[which][page * WORDS + word];
		if (got != (zero ? 0 : expected(which, page, word)))
			bad(what, which, page, got);
	}
}

static void check(const char *what, int which, int zero)
{
	/* 7 and the number of pages must have no common factor: every page comes once, out of order */
	for (long n = 0; n < pages; n++)
		check_page(what, which, n * 7 % pages, zero);
}

static void *reader(void *unused)
{
	(void)unused;
	check("thread", READ, 0);
	return NULL;
}

static void check_all(const char *what)
{
	check(what, DROPPED, disturbed);
	check(what, REPLACED, disturbed);
	check(what, MOVED, 0);
	check(what, FORKED, 0);
	check(what, SPLIT, 0);
	check(what, READ, 0);
	check(what, WRITTEN, 0);
	if (!in_child || !disturbed)
		check(what, LONELY, 0);
	check(what, UNTOUCHED, 1);
}

static void disturb(void)
{
	for (long at = 0; at < pages; at += SLICE) {
		long n = pages - at < SLICE ? pages - at : SLICE;
		char *drop = (char *)(part[DROPPED] + at * WORDS), *replace = (char *)(part[REPLACED] + at * WORDS);
		if (madvise(drop, n * PAGE, MADV_DONTNEED))
			bad("madvise", DROPPED, at, 0);
		if (munmap(replace, n * PAGE) ||
		    mmap(replace, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != replace)
			bad("mmap", REPLACED, at, 0);
		if (mremap(part[MOVED] + at * WORDS, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new_place + at * WORDS) ==
		    MAP_FAILED)
			bad("mremap", MOVED, at, 0);
		if (at / SLICE % 2 && mprotect(part[SPLIT] + at * WORDS, n * PAGE, PROT_READ))
			bad("mprotect", SPLIT, at, 0);
	}
	if (madvise(part[LONELY], pages * PAGE, MADV_DONTFORK))
		bad("madvise", LONELY, 0, 0);
	part[MOVED] = new_place;
	disturbed = 1;
	for (long page = 0; page < pages; page++) /* a write to a missing page keeps the rest of it */
		part[WRITTEN][page * WORDS + page % WORDS] = expected(WRITTEN, page, page % WORDS);
}

static pid_t forked(int generations)
{
	pid_t pid = fork();
	if (pid)
		return pid;
	in_child = 1;
	pid_t child = generations > 1 ? forked(generations - 1) : 0;
	/* dropping in the child must not drop in the parent */
	madvise(part[FORKED], pages / 2 * PAGE, MADV_DONTNEED);
	for (long page = 0; page < pages; page++)
		check_page("child", FORKED, page, page < pages / 2);
	madvise(part[FORKED], pages * PAGE, MADV_DONTNEED);
	for (long page = 0; page < pages; page++)
		for (long word = 0; word < WORDS; word++)
			part[FORKED][page * WORDS + word] = expected(FORKED, page, word);
	check_all("child");
	int status = 0;
	if (child && (waitpid(child, &status, 0) != child || status))
		_exit(2);
	_exit(0);
}

int main(int argc, char **argv)
{
	directory = argv[1];
	pages = atol(argv[2]);
	int children = atoi(argv[3]), quiet = argc > 4 && !strcmp(argv[4], "quiet"), idle = argc > 4 && !quiet;
	char text[100];
	size_t size = pages * PAGE;
	char *all = mmap(NULL, size * PARTS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	new_place = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int n = 0; n < PARTS; n++) {
		part[n] = (uint64_t *)(all + n * size);
		seed[n] = n + 1;
		if (n != UNTOUCHED)
			fill(n);
	}
	for (int n = 1; n <= children; n++)
		if (fork() == 0) {
			children = 0;
			seed[FORKED] = 100 + n; /* the rest stays shared with the parent by copy-on-write */
			fill(FORKED);
			break;
		}
	report("ready\n");
	wait_for("go");

	if (idle) {
		disturb();
		in_child = !fork();
		report("idle\n");
		wait_for("read");
		check_all("idle");
		children += !in_child;
	} else if (quiet) {
		for (int n = 0; n < PARTS; n++)
			check("quiet", n, n == UNTOUCHED);
	} else {
		pthread_t thread;
		pthread_create(&thread, NULL, reader, NULL);
		pid_t early = forked(2);
		disturb();
		pid_t late = forked(2);
		check_all("self");
		pthread_join(thread, NULL);
		int status = 0;
		if (waitpid(early, &status, 0) != early || status)
			bad("early child", FORKED, 0, status);
		if (waitpid(late, &status, 0) != late || status)
			bad("late child", FORKED, 0, status);
	}
	snprintf(text, sizeof text, "ok %d\n", getpid());
	report(text);
	for (int n = 0; n < children; n++)
		wait(NULL);
	return 0;
}

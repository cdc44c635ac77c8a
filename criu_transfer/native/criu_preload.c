/*
 * Preloaded into CRIU only: answers its soft-dirty question from userfaultfd's write tracking.
 *
 * CRIU subtracts pages that a parent image holds when the kernel says that they are not soft-dirty. SpotGuard tracks
 * writes by userfaultfd (WP_ASYNC) instead, so this library translates at the one place where CRIU asks, the
 * PAGEMAP_SCAN ioctl (linux/fs.h), and lets CRIU's start-up test of soft-dirty pass.
 *
 * A page is reported as dirty when it was written since the tracker's last scan, and also when it lies in no tracked
 * mapping: "not written" says something only where the tracker protects. What is reported dirty CRIU dumps itself, so
 * every doubt costs time and never memory.
 *
 * CRIU asks twice for the connections that the container's network namespace tracks, and each time the kernel walks the
 * table of the whole machine, 10 ms for its usual size. Where the namespace counts none, the question is made one for
 * expected connections, of which there are none then either, and whose table is small.
 *
 * It also answers prlimit for other users' processes from /proc/PID/limits when the kernel refuses it, as it does
 * without CAP_SYS_RESOURCE.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/netlink.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>

long syscall(long number, ...); /* unistd.h would declare read() with attributes that we cannot repeat */
ssize_t readlink(const char *path, char *buffer, size_t size);

/* linux/fs.h of Linux 6.7; older headers lack it */
struct scan_region {
	uint64_t start, end, categories;
};
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL 0xc0606610UL
#define WPALLOWED (1ULL << 0)
#define WRITTEN (1ULL << 1)
#define SOFT_DIRTY (1ULL << 7)
#define PAGEMAP_SOFT_DIRTY (1ULL << 55)

typedef long (*syscall_fn)(long, ...);

static syscall_fn next_syscall(void)
{
	static syscall_fn next;
	if (!next)
		next = (syscall_fn)dlsym(RTLD_NEXT, "syscall");
	if (!next)
		abort();
	return next;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);

	if (request != SCAN_IOCTL || !(((struct scan_arg *)argument)->return_mask & SOFT_DIRTY))
		return (int)next_syscall()(SYS_ioctl, fd, request, argument);

	struct scan_arg *scan = argument;
	uint64_t asked = scan->return_mask;
	scan->return_mask = (asked & ~SOFT_DIRTY) | WRITTEN | WPALLOWED;
	long count = next_syscall()(SYS_ioctl, fd, request, argument);
	scan->return_mask = asked;

	struct scan_region *regions = (struct scan_region *)scan->vec;
	for (long i = 0; i < count; i++) {
		uint64_t found = regions[i].categories;
		regions[i].categories = found & ~(WRITTEN | WPALLOWED);
		if (found & WRITTEN || !(found & WPALLOWED))
			regions[i].categories |= SOFT_DIRTY;
	}
	return (int)count; /* at most vec_len, which is an int in CRIU */
}

static int is_pagemap(int fd)
{
	char link[64], target[128];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, target, sizeof target - 1);
	if (n <= 0)
		return 0;
	target[n] = 0;
	return strstr(target, "/pagemap") != NULL;
}

/* CRIU tests for soft-dirty once, by reading one entry of its own pagemap. */
static ssize_t read_and_mark(int fd, void *buffer, size_t size)
{
	ssize_t n = next_syscall()(SYS_read, fd, buffer, size);
	if (size == 8 && n == 8) {
		int saved = errno;
		if (is_pagemap(fd))
			*(uint64_t *)buffer |= PAGEMAP_SOFT_DIRTY;
		errno = saved;
	}
	return n;
}

ssize_t read(int fd, void *buffer, size_t size)
{
	return read_and_mark(fd, buffer, size);
}

ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room)
{
	if (size > room)
		abort();
	return read_and_mark(fd, buffer, size);
}

/* linux/netfilter/nfnetlink_conntrack.h: subsystem and message of a request */
#define GET_CONNECTIONS 0x101
#define GET_EXPECTED 0x201

/* Whether the network namespace that this thread is in certainly tracks no connection. */
static int tracks_nothing(void)
{
	char text[24] = "";
	FILE *file = fopen("/proc/sys/net/netfilter/nf_conntrack_count", "re");
	if (!file)
		return 0;
	char *line = fgets(text, sizeof text, file);
	fclose(file);
	return line && !strcmp(text, "0\n");
}

static int is_netfilter(int fd)
{
	int protocol = -1, domain = -1;
	socklen_t size = sizeof protocol;
	return !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) && domain == AF_NETLINK &&
	       !getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) && protocol == NETLINK_NETFILTER;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	char copy[256];
	struct nlmsghdr header;
	struct iovec part = {copy, message->msg_iovlen == 1 ? message->msg_iov->iov_len : 0};
	struct msghdr changed = *message;
	int saved = errno;

	if (part.iov_len >= sizeof header && part.iov_len <= sizeof copy) {
		memcpy(copy, message->msg_iov->iov_base, part.iov_len);
		memcpy(&header, copy, sizeof header);
		if (header.nlmsg_type == GET_CONNECTIONS && (header.nlmsg_flags & NLM_F_DUMP) == NLM_F_DUMP &&
		    is_netfilter(fd) && tracks_nothing()) {
			header.nlmsg_type = GET_EXPECTED;
			memcpy(copy, &header, sizeof header);
			changed.msg_iov = &part;
			message = &changed;
		}
	}
	errno = saved;
	return next_syscall()(SYS_sendmsg, fd, message, flags);
}

/* The order is the kernel's RLIMIT_* (asm-generic/resource.h), the words are those of /proc/PID/limits. */
static const char *const limit_names[] = {
	"Max cpu time",	     "Max file size",	  "Max data size",     "Max stack size",
	"Max core file size", "Max resident set", "Max processes",     "Max open files",
	"Max locked memory",  "Max address space", "Max file locks",	"Max pending signals",
	"Max msgqueue size",  "Max nice priority", "Max realtime priority", "Max realtime timeout",
};

static rlim_t parse_limit(const char *word)
{
	return strcmp(word, "unlimited") ? strtoull(word, NULL, 10) : RLIM_INFINITY;
}

static int limits_from_proc(pid_t pid, unsigned resource, struct rlimit *out)
{
	char path[64], line[256], soft[32], hard[32];
	if (resource >= sizeof limit_names / sizeof *limit_names)
		return -1;
	snprintf(path, sizeof path, "/proc/%d/limits", pid);
	FILE *file = fopen(path, "re");
	if (!file)
		return -1;
	size_t length = strlen(limit_names[resource]);
	int result = -1;
	while (result && fgets(line, sizeof line, file)) {
		if (strncmp(line, limit_names[resource], length) || sscanf(line + length, "%31s %31s", soft, hard) != 2)
			continue;
		out->rlim_cur = parse_limit(soft);
		out->rlim_max = parse_limit(hard);
		result = 0;
	}
	fclose(file);
	return result;
}

/* CRIU calls prlimit64 through syscall(2)'s wrapper; six words are passed on, as every system call takes at most. */
long syscall(long number, ...)
{
	long word[6];
	va_list list;
	va_start(list, number);
	for (int i = 0; i < 6; i++)
		word[i] = va_arg(list, long);
	va_end(list);
	long result = next_syscall()(number, word[0], word[1], word[2], word[3], word[4], word[5]);
	if (number == SYS_prlimit64 && result == -1 && errno == EPERM && !word[2] && word[3] &&
	    !limits_from_proc((pid_t)word[0], (unsigned)word[1], (struct rlimit *)word[3]))
		return 0;
	return result;
}

/*
 * in_cgroup DIRECTORY COMMAND [ARGUMENT]...: runs a command in a cgroup v2 directory and ends as the command does.
 *
 * Moving a process between cgroups waits for an RCU grace period, 5 to 20 ms in which an application stands still.
 * A process that is born in its cgroup (clone3 with CLONE_INTO_CGROUP, Linux 5.7) has not to wait. When this process is
 * killed, so is the command.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CANNOT_RUN 127

static int fail(const char *what)
{
	fprintf(stderr, "in_cgroup: %s: %s\n", what, strerror(errno));
	return CANNOT_RUN;
}

int main(int count, char **arguments)
{
	if (count < 3) {
		fprintf(stderr, "usage: in_cgroup DIRECTORY COMMAND [ARGUMENT]...\n");
		return CANNOT_RUN;
	}
	int group = open(arguments[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (group < 0)
		return fail(arguments[1]);

	pid_t parent = getpid();
	struct clone_args how = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)group};
	pid_t child = (pid_t)syscall(SYS_clone3, &how, sizeof how);
	if (child < 0)
		return fail("clone3");
	if (!child) {
		if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
			_exit(CANNOT_RUN);
		execvp(arguments[2], arguments + 2);
		_exit(fail(arguments[2]));
	}
	int status;
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return fail("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

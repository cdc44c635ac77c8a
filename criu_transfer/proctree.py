"""The processes of a container, found through its cgroup."""

import errno
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A thread group: `pid` as we see it, `vpid` as itself does.

    `starttime` (clock ticks since boot) tells it from a later one with the same pid.
    """

    pid: int
    vpid: int
    starttime: int


def read_process(pid: int) -> Process | None:
    """Look up one process; None when it is gone or a zombie (proc_pid_stat(5), proc_pid_status(5))."""
    try:
        # The name, in parentheses, may contain anything: what follows its last parenthesis is fixed.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A main thread that has exited looks like a zombie while its other threads run on.
    if fields[0] in "Xx" or (fields[0] == "Z" and int(fields[17]) <= 1):
        return None
    vpids = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return Process(pid, int(vpids.split()[-1]), int(fields[19]))


def is_alive(process: Process) -> bool:
    """Tell whether the very same process is still there and no zombie."""
    return read_process(process.pid) == process


def processes_of(cgroup: Path | str) -> list[Process]:
    """List the live thread groups of a cgroup (v1 or v2) and of those below it, by pid.

    Zombies and processes that go meanwhile are left out. Raises FileNotFoundError when the cgroup itself is gone.
    """
    top = Path(cgroup)
    pids: set[int] = set()
    for directory in [top, *(path for path in top.rglob("*/") if path.is_dir())]:
        try:
            pids.update(int(word) for word in (directory / "cgroup.procs").read_text().split())
        except OSError as error:
            if directory == top or error.errno not in {errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP}:
                raise  # EOPNOTSUPP: a threaded cgroup, whose processes the one above lists
    return [process for pid in sorted(pids) if (process := read_process(pid))]

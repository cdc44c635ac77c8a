"""Keeps runc and CRIU of one migration together in a cgroup v2 directory of their own, so that they can be found.

An agent that dies leaves its runc and CRIU running, and one that kills runc at a deadline leaves CRIU, which then ends
by itself: it takes its parasite out and freezes the container again. Nothing may be decided before they have ended.
"""

import errno
import math
import select
import time
from contextlib import suppress
from pathlib import Path

from criu_transfer.errors import DeadlinePassed
from criu_transfer.keeper import kill_cgroup

KILL_SECONDS = 1.0  # at the end of the time for waiting: what is there then is killed
_AGAIN_SECONDS = 0.001


def wait_empty(group: Path, deadline: float) -> bool:
    """Wait until no process is in the group; False when the deadline came first. An absent group is empty."""
    return _wait(group, b"populated 0", deadline)


def wait_frozen(group: Path, deadline: float) -> bool:
    """Wait until all of the group is frozen; False when the deadline came first."""
    return _wait(group, b"frozen 1", deadline) and group.is_dir()


def _wait(group: Path, flag: bytes, deadline: float) -> bool:
    """Wait for a line of cgroup.events; the kernel tells of changes by POLLPRI. True when the group is absent."""
    with suppress(FileNotFoundError), (group / "cgroup.events").open("rb", buffering=0) as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while True:
            events.seek(0)
            if flag in events.read(256):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(math.ceil(left * 1000))
    return True


def end(group: Path, deadline: float) -> None:
    """Let what is in the group end by itself, kill what has not in time, and remove the group.

    Raises DeadlinePassed when even killing does not empty it.
    """
    if not wait_empty(group, deadline - KILL_SECONDS):
        kill(group, deadline)
    while not _removed(group):
        if time.monotonic() >= deadline:
            raise DeadlinePassed(f"{group} stays busy")
        time.sleep(_AGAIN_SECONDS)


def _removed(group: Path) -> bool:
    """Try to remove; EBUSY is normal for an instant after the last process has gone."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def kill(group: Path, deadline: float) -> None:
    """Kill what is in the group. Raises DeadlinePassed when it does not go."""
    switch = group / "cgroup.kill"
    if switch.exists():
        with suppress(FileNotFoundError):
            switch.write_text("1")
    elif group.is_dir():
        kill_cgroup(group)  # before Linux 5.14; it waits without end
    if not wait_empty(group, deadline):
        raise DeadlinePassed(f"processes in {group} do not end")

"""Control groups: a container's freezer, its memory limit, its end. Version 2, and what version 1 machines need.

Facts: Documentation/admin-guide/cgroup-v2.rst (`cgroup.freeze`, `cgroup.events`, `cgroup.kill`), cgroup-v1/memory.rst,
cgroup-v1/freezer-subsystem.rst. All waiting is bounded by a `deadline` (seconds of time.monotonic()) and sleeps in
poll(2): the kernel wakes readers of `cgroup.events`; files of version 1 do not wake anybody and are looked at again
after 1 ms.
"""

import contextlib
import errno
import functools
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from handlers.errors import GiveUp

ROOT = Path("/sys/fs/cgroup")
_AGAIN_SECONDS = 0.001


class Cgroup:
    """One directory of the unified hierarchy, and optionally one of version 1's memory controller beside it.

    `path` is absolute. Freezing acts on everything below too. Calls raise FileNotFoundError when the group is gone.
    """

    def __init__(self, path: Path, *, memory_v1: Path | None = None) -> None:
        self.path = path
        self._memory_v1 = memory_v1

    @classmethod
    def create(cls, path: Path, *, memory_max: int | None = None, memory_v1: Path | None = None) -> Self:
        """Make the group (an existing one is taken as it is) and limit its memory to `memory_max` bytes.

        `memory_v1`: the group's directory below a version 1 memory mount, for machines whose memory controller is
        there. Raises GiveUp when a limit is asked for and neither version offers the controller.
        """
        path.mkdir(parents=True, exist_ok=True)
        if memory_max is not None and memory_v1 is None:
            _give_memory_controller(path)
        if memory_v1 is not None:
            memory_v1.mkdir(parents=True, exist_ok=True)
        group = cls(path, memory_v1=memory_v1)
        if memory_max is not None:
            group._limit_memory(memory_max)
        return group

    def attach(self, pid: int) -> None:
        """Move a process (all its threads) into the group."""
        if self._memory_v1 is not None:
            (self._memory_v1 / "cgroup.procs").write_text(str(pid))
        (self.path / "cgroup.procs").write_text(str(pid))

    def pids(self) -> list[int]:
        """Return the processes in the group and below it, sorted. One that is gone, or of another pid namespace: none.

        Groups that vanish meanwhile count as empty.
        """
        found: set[int] = set()
        for directory in (self.path, *_below(self.path)):
            try:
                found.update(map(int, (directory / "cgroup.procs").read_text().split()))
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP}:
                    raise
        return sorted(found - {0})

    @property
    def populated(self) -> bool:
        """Whether any process is in the group or below; those that only wait to be reaped do not count."""
        return self._event("populated")

    @property
    def frozen(self) -> bool:
        """Whether everything in the group and below is frozen now (not merely asked to)."""
        return self._event("frozen")

    def freeze(self, deadline: float, *, thaw_on_failure: bool = True) -> None:
        """Freeze the group and return when it is frozen. Raises GiveUp at the deadline.

        The group is thawed then, unless `thaw_on_failure` is False: it goes on freezing, for it must not run.
        """
        self._write("cgroup.freeze", "1")
        try:
            self._await("frozen", wanted=True, deadline=deadline)
        except GiveUp:
            if thaw_on_failure:
                self._write("cgroup.freeze", "0")
            raise

    def thaw(self, deadline: float) -> None:
        """Let the group run and return when it does. Raises GiveUp at the deadline (a group above is frozen)."""
        self._write("cgroup.freeze", "0")
        self._await("frozen", wanted=False, deadline=deadline)

    def kill(self, deadline: float) -> None:
        """Kill everything in the group, frozen or not, and return when it is empty. Raises GiveUp at the deadline.

        The group may be gone already. Killed processes that nobody has waited for yet do not count.
        """
        try:
            self._write("cgroup.kill", "1")
            self._await("populated", wanted=False, deadline=deadline)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENODEV}:
                raise

    def memory_usage(self) -> int:
        """Return the bytes that the group uses. Raises GiveUp where no memory controller is."""
        for directory, file in ((self._memory_v1, "memory.usage_in_bytes"), (self.path, "memory.current")):
            if directory is not None and (directory / file).exists():
                return int((directory / file).read_text())
        raise GiveUp(f"no memory controller for {self.path.name}")

    def remove(self, deadline: float) -> None:
        """Wait until the group is empty, then remove it and what is below it. Absent is no error.

        Raises GiveUp at the deadline; nothing was removed then.
        """
        if not self.path.is_dir():
            return
        self._await("populated", wanted=False, deadline=deadline)
        for top in (self.path, self._memory_v1):
            if top is None:
                continue
            for directory in (*_below(top), top):
                _until(functools.partial(_removed, directory), deadline, f"cgroup {directory} stays busy")

    def _limit_memory(self, limit: int) -> None:
        if self._memory_v1 is not None:
            (self._memory_v1 / "memory.limit_in_bytes").write_text(str(limit))
        elif (self.path / "memory.max").exists():
            (self.path / "memory.max").write_text(str(limit))
            if (self.path / "memory.swap.max").exists():  # what is limited here are memory images: never to a disk
                (self.path / "memory.swap.max").write_text("0")
        else:
            raise GiveUp(f"no memory controller for cgroup {self.path.name}: its memory cannot be limited")

    def _write(self, file: str, value: str) -> None:
        (self.path / file).write_text(value)

    def _event(self, name: str) -> bool:
        return _flag((self.path / "cgroup.events").read_text(), name)

    def _await(self, name: str, *, wanted: bool, deadline: float) -> None:
        """Wait for a flag of cgroup.events; the kernel signals a change as POLLPRI, until the file is read again."""
        with (self.path / "cgroup.events").open("rb", buffering=0) as events:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while _flag(os.pread(events.fileno(), 4096, 0).decode(), name) is not wanted:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GiveUp(f"cgroup {self.path.name}: '{name}' did not become {int(wanted)} before the deadline")
                poller.poll(max(left * 1000, 1))


class FreezerV1:
    """The freezer of version 1, for containers of machines that run on it: the same freeze and thaw.

    `path` is the container's directory below the freezer's mount. Written from the kernel's documentation; no machine
    with this controller was at hand, so its tests drive plain files, not a kernel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def frozen(self) -> bool:
        """Whether everything in the group and below is frozen now."""
        return self._state() == "FROZEN"

    def freeze(self, deadline: float) -> None:
        """Freeze the group; FREEZING means that some task is not there yet. Raises GiveUp, thawed, at the deadline."""
        self._write("FROZEN")
        try:
            _until(lambda: self.frozen, deadline, f"cgroup {self.path.name} did not freeze before the deadline")
        except GiveUp:
            self._write("THAWED")
            raise

    def thaw(self, deadline: float) -> None:
        """Let the group run. Raises GiveUp at the deadline (a group above is frozen)."""
        self._write("THAWED")
        _until(lambda: self._state() == "THAWED", deadline, f"cgroup {self.path.name} did not thaw before the deadline")

    def _state(self) -> str:
        return (self.path / "freezer.state").read_text().strip()

    def _write(self, state: str) -> None:
        (self.path / "freezer.state").write_text(state)


def of_process(pid: int) -> Path:
    """Return the directory of the process's group in the unified hierarchy. Raises GiveUp when there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GiveUp(f"process {pid} is gone") from error
    for line in lines:
        if line.startswith("0::"):
            return ROOT / line.removeprefix("0::").lstrip("/")
    raise GiveUp(f"process {pid} is in no cgroup of version 2")


def _give_memory_controller(group: Path) -> None:
    """Enable the memory controller for `group` in every group above that has it and has not passed it on.

    A group with processes of its own cannot (cgroups(7), "no internal processes"): then the limit's file stays away,
    and limiting says so.
    """
    above = [parent for parent in group.parents if (parent / "cgroup.subtree_control").exists()]
    for parent in reversed(above):
        passed_on = (parent / "cgroup.subtree_control").read_text().split()
        if "memory" in (parent / "cgroup.controllers").read_text().split() and "memory" not in passed_on:
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text("+memory")


def _flag(events: str, name: str) -> bool:
    return f"{name} 1" in events.splitlines()


def _below(top: Path) -> list[Path]:
    """Return all directories below, the deepest first."""
    return [Path(directory) for directory, _, _ in os.walk(top, topdown=False) if Path(directory) != top]


def _removed(directory: Path) -> bool:
    """Try to remove; EBUSY is normal for an instant after the last process has gone."""
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno == errno.ENOENT:
            return True
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _until(done: Callable[[], bool], deadline: float, complaint: str) -> None:
    while not done():
        if time.monotonic() >= deadline:
            raise GiveUp(complaint)
        select.select([], [], [], _AGAIN_SECONDS)

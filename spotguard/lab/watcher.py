"""Watches from outside that at most one copy of a workload runs.

A process of its own looks at each side's cgroup.events about every millisecond, and at once when the kernel reports a
change. A side may run while its cgroup is populated and not frozen. When two sides may, their tasks are looked at:
one that is dying, or stopped under ptrace, executes nothing of the workload, so a killed original (which the kernel
unfreezes to let it die) is not taken for a second copy. What remains is a double run.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_SECONDS = 0.001
STOP_SECONDS = 5.0
PF_EXITING = 0x4  # include/linux/sched.h; field 9 of /proc/PID/stat
SIGKILL_BIT = 1 << 8
CRIU_NAMES = frozenset({"criu", "freeze-at-resum"})  # of what restores; comm has 15 characters
FREEZER_TRAP = frozenset({"do_freezer_trap", "get_signal"})  # the latter where the compiler has inlined the former
IDLE_STATES = frozenset("tTZX")  # traced, stopped, zombie, dead: proc_pid_stat(5)


@dataclass(frozen=True)
class Interval:
    """From when to when, in monotonic seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Return its length."""
        return self.end - self.start


@dataclass(frozen=True)
class Watched:
    """What was seen: when each side may have run, and when two really did.

    `blind_ms` is the longest time between two looks: a double run shorter than that could have been missed.
    `looks` counts them.
    """

    running: Mapping[str, tuple[Interval, ...]]
    overlaps: tuple[Interval, ...]
    blind_ms: float
    looks: int

    @property
    def double_run_ms(self) -> float:
        """Return for how long two copies ran, in ms."""
        return sum(overlap.seconds for overlap in self.overlaps) * 1e3


class Side:
    """One side's cgroup; it may not exist yet, go away, and come again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._events = os.fspath(directory / "cgroup.events")
        self.fd = -1

    def may_run(self) -> bool:
        """Tell whether there are tasks and they are not frozen."""
        if self.fd < 0:
            try:
                self.fd = os.open(self._events, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
        try:
            text = os.pread(self.fd, 256, 0)
        except OSError:  # ENODEV: the cgroup is gone
            self.close()
            return False
        return b"populated 1" in text and b"frozen 1" not in text

    def executes(self) -> bool:
        """Tell whether any task of the cgroup, or of those below it, can execute the workload's code."""
        threads = (line for file in self._thread_files() for line in _lines(file))
        return any(_executes(int(thread)) for thread in threads)

    def close(self) -> None:
        """Let go of the cgroup."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _thread_files(self) -> Sequence[str]:
        return [os.path.join(folder, "cgroup.threads") for folder, _, _ in os.walk(self._directory)]  # noqa: PTH118 - fast


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="ascii").split()
    except OSError:  # gone meanwhile
        return []


def _executes(thread: int) -> bool:
    try:
        name, _, rest = Path(f"/proc/{thread}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        stat = rest.split()
        status = Path(f"/proc/{thread}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone meanwhile
        return False
    pending = {line[:6]: int(line[7:], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))}
    dying = int(stat[6]) & PF_EXITING or any(bits & SIGKILL_BIT for bits in pending.values())
    # CRIU restores inside the container's cgroup; a task that it makes has its name until it is the workload's again.
    if name.partition("(")[2] in CRIU_NAMES:
        return False
    return not dying and stat[0] not in IDLE_STATES and not (stat[0] == "S" and in_freezer(thread))


def in_freezer(thread: int) -> bool:
    """Tell whether a sleeping task sits in the cgroup freezer's trap (kernel/signal.c, do_freezer_trap).

    While a frozen cgroup is being killed it is not wholly frozen any more, and some of its tasks still are.
    """
    try:
        return Path(f"/proc/{thread}/wchan").read_text(encoding="ascii", errors="replace") in FREEZER_TRAP
    except OSError:  # gone meanwhile
        return True


@dataclass
class Record:
    """Collects looks into intervals; pure, so that it can be tested without a kernel.

    A look speaks for the time up to the next one. An overlap of one look therefore counts until the look after it.
    """

    running: dict[str, list[Interval]] = field(default_factory=dict)
    overlaps: list[Interval] = field(default_factory=list)
    blind: float = 0.0
    looks: int = 0
    _since: dict[str, float] = field(default_factory=dict)
    _overlap_since: float | None = None
    _last: float | None = None

    def look(self, now: float, may_run: Mapping[str, bool], *, double: bool) -> None:
        """Note what a look at all sides has shown."""
        self.looks += 1
        if self._last is not None:
            self.blind = max(self.blind, now - self._last)
        self._last = now
        for name, runs in may_run.items():
            if runs:
                self._since.setdefault(name, now)
            elif name in self._since:
                self.running.setdefault(name, []).append(Interval(self._since.pop(name), now))
        if double and self._overlap_since is None:
            self._overlap_since = now
        elif not double and self._overlap_since is not None:
            self.overlaps.append(Interval(self._overlap_since, now))
            self._overlap_since = None

    def finish(self, now: float, names: Sequence[str]) -> Watched:
        """End all that is open and return the whole."""
        self.look(now, dict.fromkeys(names, False), double=False)
        running = {name: tuple(self.running.get(name, ())) for name in names}
        return Watched(running, tuple(self.overlaps), self.blind * 1e3, self.looks)


def watch(sides: Mapping[str, Path], stop_fd: int) -> Watched:
    """Look until `stop_fd` becomes readable (or its other end is closed)."""
    record = Record()
    watched = {name: Side(directory) for name, directory in sides.items()}
    poll = select.poll()
    poll.register(stop_fd, select.POLLIN)
    registered: dict[str, int] = {}
    while True:
        may_run = {name: side.may_run() for name, side in watched.items()}
        suspects = [watched[name] for name, runs in may_run.items() if runs]
        double = len(suspects) > 1 and sum(side.executes() for side in suspects) > 1
        record.look(time.monotonic(), may_run, double=double)
        _follow(poll, registered, watched)
        if any(fd == stop_fd for fd, _ in poll.poll(SAMPLE_SECONDS * 1e3)):
            break
    for side in watched.values():
        side.close()
    return record.finish(time.monotonic(), list(sides))


def _follow(poll: select.poll, registered: dict[str, int], sides: Mapping[str, Side]) -> None:
    for name, side in sides.items():
        known = registered.get(name, -1)
        if known == side.fd:
            continue
        if known >= 0:
            poll.unregister(known)
        if side.fd >= 0:
            poll.register(side.fd, select.POLLPRI)
        registered[name] = side.fd


class Watch:
    """A watching process. Use as a context manager, call `stop` inside it (or let the exit end it)."""

    def __init__(self, sides: Mapping[str, Path]) -> None:
        self._sides = sides
        self._process: subprocess.Popen[str] | None = None
        self._watched: Watched | None = None

    def __enter__(self) -> Self:
        """Start watching; returns when the first look is done."""
        command = [sys.executable, "-m", "spotguard.lab.watcher", *(f"{n}={d}" for n, d in self._sides.items())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "watching\n":
            raise RuntimeError("the watcher did not start: its message is on stderr")
        return self

    def stop(self) -> Watched:
        """End watching and return what was seen."""
        if self._watched is None:
            assert self._process is not None
            output, _ = self._process.communicate("", timeout=STOP_SECONDS)
            if self._process.returncode:
                raise RuntimeError("the watcher failed: its message is on stderr")
            self._watched = _decode(output)
        return self._watched

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make sure that the process has ended."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def _decode(text: str) -> Watched:
    raw = json.loads(text)
    return Watched(
        running={name: tuple(Interval(**one) for one in found) for name, found in raw["running"].items()},
        overlaps=tuple(Interval(**one) for one in raw["overlaps"]),
        blind_ms=raw["blind_ms"],
        looks=raw["looks"],
    )


def main() -> int:
    """Watch the sides named in the arguments until stdin ends, then print what was seen."""
    parser = argparse.ArgumentParser(prog="spotguard.lab.watcher", description=main.__doc__)
    parser.add_argument("sides", nargs="+", metavar="NAME=CGROUP_DIRECTORY")
    sides = dict(side.split("=", 1) for side in parser.parse_args().sides)
    print("watching", flush=True)
    print(json.dumps(asdict(watch({name: Path(path) for name, path in sides.items()}, sys.stdin.fileno()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

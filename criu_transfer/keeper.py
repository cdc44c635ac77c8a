"""Holds the userfaultfds of a restored container, so that no death of the pager turns missing memory into zeros.

When the last copy of a userfaultfd is closed, its missing pages read as zeros, without any signal (ran). The keeper
has a copy of each and closes one only when its memory is complete. When the pager dies, the keeper starts another one
from the ledger; where the ledger is uncertain, it kills the container: better gone than wrong.
"""

import errno
import mmap
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from criu_transfer import uffd
from criu_transfer.errors import RestoreFailed, StateMissing, TransferError
from criu_transfer.takeover import Close, HandOver, Ledger, Link, State, Tell, receive

_DEATHS_ALLOWED = 3
_KILL_STEP = 0.01

type Notify = Callable[[dict[str, object]], None]
type PagerMain = Callable[[Ledger, Link, State, dict[int, int]], None]
"""What the forked pager runs: it gets the ledger, the line to us, the state, and the descriptors by key."""


class Keeper:
    """Starts pagers and holds what they must not lose; see `run`."""

    def __init__(
        self, lazy: Mapping[int, Sequence[tuple[int, int]]], *, cgroup: Path, notify: Notify, main: PagerMain
    ) -> None:
        self._lazy = lazy
        self._cgroup = cgroup
        self._notify = notify
        self._main = main
        self._ledger = Ledger()
        self._held: dict[int, int] = {}
        self._reason = ""

    def run(self) -> None:
        """Return when every page of every process is there, or the process is gone.

        Raises RestoreFailed when CRIU did not finish, StateMissing when memory could not be completed. In both cases
        nothing in the container's cgroup runs any more.
        """
        self._tell({"event": "pager-listening"})
        state = State(self._lazy)
        for deaths in range(1, _DEATHS_ALLOWED + 2):
            if self._one_pager(state):
                return
            if not self._ledger.restored:
                self._kill("restore")
                raise RestoreFailed(self._reason or "the pager died while CRIU restored")
            self._reason = self._reason or "the pager died"
            try:
                state = self._take_over(deaths)
            except StateMissing as uncertain:
                self._tell({"event": "pager-died", "carried_on": False})
                self._kill("fill")
                raise StateMissing(f"{uncertain} ({self._reason}); the container was killed") from None
            self._tell({"event": "pager-died", "carried_on": True})

    def _one_pager(self, state: State) -> bool:
        """Run one pager to its end; tell whether it completed all memory."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reason = ""
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._child(Link(theirs), state)
        theirs.close()
        with ours:
            status = self._watch(pid, ours)
        if status == 0 and not self._held:
            return True
        if os.WIFSIGNALED(status):
            self._reason = f"the pager died of signal {os.WTERMSIG(status)}"
        return False

    def _child(self, link: Link, state: State) -> None:
        """Be the pager. Never returns: our caller's stack belongs to the keeper."""
        code = 1
        try:
            self._main(self._ledger, link, state, dict(self._held))
            code = 0
        except (TransferError, OSError, KeyError, ValueError) as error:
            link.tell({"event": "pager-error", "reason": f"{type(error).__name__}: {error}"})
            raise
        finally:
            if code:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)

    def _watch(self, pid: int, sock: socket.socket) -> int:
        """Take what the pager hands over until it has ended and all is taken; returns its wait status."""
        while self._take(sock):
            pass
        return os.waitpid(pid, 0)[1]

    def _take(self, sock: socket.socket) -> bool:
        message = receive(sock)
        match message:
            case HandOver(key, fd):
                self._held[key] = fd
            case Close(key):
                # A pager that took over may close what its predecessor had already let go.
                if key in self._held:
                    os.close(self._held.pop(key))
            case Tell(event):
                if event.get("event") == "pager-error":
                    self._reason = str(event.get("reason"))
                self._tell(event)
        return message is not None

    def _take_over(self, deaths: int) -> State:
        """Make a state that a new pager can go on from, and let every waiting thread fault again."""
        if deaths > _DEATHS_ALLOWED:
            raise StateMissing(f"the pager died {deaths} times")
        state = self._ledger.load(self._lazy)
        for key in self._held.keys() - state.memories.keys():
            os.close(self._held.pop(key))  # done: it died before it could say so
        if state.memories.keys() != self._held.keys():
            raise StateMissing("the pager died before it handed a descriptor over")
        for fd in self._held.values():
            wake_all(fd)
        return state

    def _kill(self, during: str) -> None:
        """Kill the container, and close the descriptors only when nothing is left that could read zeros."""
        kill_cgroup(self._cgroup)
        self._tell({"event": "killed", "during": during, "reason": self._reason})
        while self._held:
            os.close(self._held.popitem()[1])

    def _tell(self, event: dict[str, object]) -> None:
        try:
            self._notify(event)
        except (BrokenPipeError, ConnectionResetError):
            # The agent has died. Memory must be completed all the same.
            return


def wake_all(fd: int) -> None:
    """Let all threads that wait on this userfaultfd fault again; what a dead pager had read of them is lost."""
    start = 1 << 16  # vm.mmap_min_addr
    for bits in (56, 52, 48, 47, 42, 39):  # the sizes of address spaces on x86_64 and arm64; too much is EINVAL
        try:
            uffd.wake(fd, start, (1 << bits) - mmap.PAGESIZE - start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return
    raise StateMissing("no way to wake threads that wait for memory")


def kill_cgroup(cgroup: Path) -> None:
    """Kill every process in a cgroup, v2 or v1, frozen or not, and return when none is left."""
    while pids := _processes(cgroup):
        if not _write(cgroup / "cgroup.kill", "1"):  # Linux 5.14
            for pid in pids:
                _signal(pid)
            _write(cgroup / "freezer.state", "THAWED")  # v1: a signal is not delivered to the frozen
        time.sleep(_KILL_STEP)


def _processes(cgroup: Path) -> list[int]:
    found = []
    for directory, _, _ in os.walk(cgroup):
        try:
            listed = (Path(directory) / "cgroup.procs").read_text()
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENODEV}:
                raise
            continue
        # A process that our pid namespace cannot see is listed as 0, which kill(2) takes for ourselves.
        found += [int(line) for line in listed.split() if int(line) > 0]
    return found


def _write(path: Path, text: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    return True


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return

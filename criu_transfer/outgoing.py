"""The source side of a transfer: rounds while the container runs, then the capture while it is frozen.

Blocking, and used from one thread at a time. It decides nothing: when to go on and when to freeze is the caller's.

Who is trusted with what: CRIU's list, made while all is frozen, is the authority on which pages exist. The trackers
only subtract from it, and the sender's ledger says what really was sent; the difference is sent before END. A process
or page that was never tracked is in CRIU's own dump.
"""

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from criu_transfer import checkpoint, images
from criu_transfer.errors import DumpFailed, TrackerUnavailable
from criu_transfer.maps import Vma, read_maps
from criu_transfer.messages import Mode
from criu_transfer.proctree import Process, processes_of
from criu_transfer.sender import Sender
from criu_transfer.tracker.wp_async import ProcessTracker

# Mappings of the kernel's own: never in a list of pages.
KERNEL_MAPPINGS = frozenset({"[vvar]", "[vvar_vclock]", "[vsyscall]", "[vdso]", "[uprobes]"})


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one round did; `written_bytes` is what its scan found, so what the next one would have to send."""

    sent_bytes: int
    written_bytes: int
    seconds: float


@dataclass(slots=True)
class Capture:
    """How long each part of the capture took, in seconds, and what it sent, in bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    residual_bytes: int = 0
    debt_bytes: int = 0
    image_bytes: int = 0
    file_bytes: int = 0


class Outgoing:
    """One container on its way out. `trees`: directories that belong to its state, by the name both sides use."""

    def __init__(
        self,
        container: str,
        cgroup: Path,
        *,
        trees: Mapping[str, Path],
        work_dir: Path,
        tools: checkpoint.Tools,
        sender: Sender,
    ) -> None:
        """`work_dir`: a RAM-backed directory of this transfer alone."""
        self._container = container
        self._cgroup = cgroup
        self._trees = trees
        self._work_dir = work_dir
        self._tools = tools
        self._sender = sender
        self._trackers: dict[Process, ProcessTracker] = {}

    def attach(self, deadline: float) -> None:
        """Start tracking every process that is there. Raises TrackerUnavailable; then nothing is tracked."""
        try:
            for process in processes_of(self._cgroup):
                self._attach(process, deadline)
        except TrackerUnavailable:
            self.detach()
            raise
        if not self._trackers:
            raise TrackerUnavailable(f"no process of {self._container} could be tracked")

    def detach(self) -> None:
        """Stop tracking; the processes run at full speed again."""
        for tracker in self._trackers.values():
            tracker.detach()
        self._trackers.clear()

    def round(self, deadline: float) -> RoundResult:
        """Send what was written since the last round, files too. New processes are tracked from here on."""
        start = time.monotonic()
        alive = processes_of(self._cgroup)
        for gone in self._trackers.keys() - set(alive):
            self._trackers.pop(gone).detach()
        for process in alive:
            if process not in self._trackers:
                self._attach(process, deadline)
        written = sent = 0
        for process, tracker in self._trackers.items():
            ranges = tracker.scan()
            written += sum(end - begin for begin, end in ranges)
            sent += self._sender.send_pages(process, ranges, deadline).bytes
        for name, directory in self._trees.items():
            sent += self._sender.send_tree(name, directory, deadline).bytes
        self._sender.mark(deadline)
        return RoundResult(sent, written, time.monotonic() - start)

    def capture(self, mode: Mode, deadline: float) -> Capture:
        """Capture the frozen container and send all of it, END included; returns when the receiver has acknowledged.

        END is sent only after the dump has succeeded. Raises DumpFailed, PeerGone, StateMissing, DeadlinePassed.
        """
        done = Capture()
        clock = _Stopwatch(done.seconds)
        image_dir = self._fresh("images")
        frozen = processes_of(self._cgroup)
        if mode is Mode.STOP_AND_COPY:
            self.detach()
        tracked = {p: self._trackers[p] for p in frozen if p in self._trackers}
        written = {process: tracker.scan(frozen=True) for process, tracker in tracked.items()}
        parent = self._write_parent(list(tracked)) if tracked else None
        clock.lap("scan")
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dump") as pool:
            dump = pool.submit(
                checkpoint.dump, self._container, image_dir, parent=parent, tools=self._tools, deadline=deadline
            )
            for process, ranges in written.items():
                done.residual_bytes += self._sender.send_pages(process, ranges, deadline).bytes
            done.seconds["residual"] = time.monotonic() - clock.last
            dump.result()
        clock.lap("dump")
        done.debt_bytes = self._pay_debt(image_dir, tracked, deadline)
        for name, directory in self._trees.items():
            done.file_bytes += self._sender.send_tree(name, directory, deadline).bytes
        clock.lap("files")
        done.image_bytes = self._sender.send_images(image_dir, deadline).bytes
        self._sender.end({process.vpid: process for process in tracked}, mode, deadline)
        clock.lap("images")
        return done

    def maps(self) -> dict[int, list[Vma]]:
        """Give the mappings of every process by pid, to compare before and after a failed dump."""
        return {process.pid: read_maps(process.pid) for process in processes_of(self._cgroup)}

    def close(self) -> None:
        """Detach and delete the images."""
        self.detach()
        shutil.rmtree(self._work_dir, ignore_errors=True)

    def _attach(self, process: Process, deadline: float) -> None:
        """Track one process; one that has ended meanwhile is none of our business any more."""
        try:
            self._trackers[process] = ProcessTracker.attach(process, deadline)
        except ProcessLookupError:
            return
        self._sender.announce(process, deadline)

    def _fresh(self, name: str) -> Path:
        path = self._work_dir / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, mode=0o700)
        return path

    def _write_parent(self, processes: list[Process]) -> str:
        directory = self._fresh("parent")
        claimed = [
            (
                process.vpid,
                [(v.start, v.end) for v in read_maps(process.pid) if v.private and v.path not in KERNEL_MAPPINGS],
            )
            for process in processes
        ]
        images.write_parent(directory, claimed, int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6))
        return "../parent"

    def _pay_debt(self, image_dir: Path, tracked: Mapping[Process, ProcessTracker], deadline: float) -> int:
        """Send pages that CRIU expects in the parent and that were never sent or could not be read."""
        wanted = images.parent_pages(image_dir)
        paid = 0
        for process in tracked:
            paid += self._sender.pay_debt(process, wanted.pop(process.vpid, []), deadline).bytes
        if any(wanted.values()):
            raise DumpFailed(f"CRIU left out pages of processes that nobody tracked: {sorted(wanted)}")
        return paid


class _Stopwatch:
    """Writes laps into a dictionary."""

    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = now - self.last
        self.last = now

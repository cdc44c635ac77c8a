"""The source side of a transfer: rounds while the container runs, then the capture while it is frozen.

Blocking, and used from one thread at a time. It decides nothing: when to go on and when to freeze is the caller's.

Who is trusted with what: CRIU's list, made while all is frozen, is the authority on which pages exist. The trackers
only subtract from it, and the sender's ledger says what really was sent; the difference is sent before END. A process
or page that was never tracked is in CRIU's own dump.
"""

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from criu_transfer import checkpoint, images, preflight
from criu_transfer.errors import DeadlinePassed, DumpFailed, TrackerUnavailable
from criu_transfer.files import mapped_files
from criu_transfer.maps import Vma, read_maps
from criu_transfer.messages import Mode
from criu_transfer.proctree import Process, processes_of
from criu_transfer.sender import Sender
from criu_transfer.tracker.wp_async import ProcessTracker
from criu_transfer.worker import wait_frozen

# Mappings of the kernel's own that are in no list of pages. [vdso] is: CRIU takes all of it to be in the parent.
KERNEL_MAPPINGS = frozenset({"[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"})
REFREEZE_SECONDS = 0.3
STALL_SECONDS = 5.0  # how much longer than its round a peer may take to swallow a frame


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one round did; `written_bytes` were written while it ran: the next one's work."""

    sent_bytes: int
    written_bytes: int
    seconds: float


@dataclass(slots=True)
class Capture:
    """What a capture did. `steps`: name, start (monotonic) and length in seconds; sizes in bytes."""

    steps: list[tuple[str, float, float]] = field(default_factory=list)
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
        self._stopped = threading.Event()
        # Mappings by pid as they were before the dump, to see whether one that failed has left them so; None before.
        self.frozen_maps: dict[int, list[Vma]] | None = None

    def attach(self, deadline: float) -> None:
        """Start tracking every process that is there. Raises TrackerUnavailable when not one of them can be.

        One that cannot (it is exiting, or waits for its vfork child) is tried again in each round; until then its
        memory is CRIU's.
        """
        refused = self._attach_new(processes_of(self._cgroup), deadline)
        if not self._trackers:
            raise TrackerUnavailable("; ".join(refused) or f"{self._container} has no process")

    def detach(self) -> None:
        """Stop tracking; the processes run at full speed again."""
        for tracker in self._trackers.values():
            tracker.detach()
        self._trackers.clear()

    def stop(self) -> None:
        """Make the round that is under way, if any, end before its next process; from any thread."""
        self._stopped.set()

    def round(self, deadline: float) -> RoundResult:
        """Send what was written since the last round, files too. New processes are tracked from here on.

        Raises DeadlinePassed when it was stopped or the deadline came: what was not sent is owed, and sent at the
        capture. The stream stays whole, for it ends between two frames.
        """
        start = time.monotonic()

        def stop() -> bool:
            return self._stopped.is_set() or time.monotonic() >= deadline

        patience = deadline + STALL_SECONDS
        alive = processes_of(self._cgroup)
        for gone in self._trackers.keys() - set(alive):
            self._forget(gone, patience)
        self._refuse_dma(alive)
        self._attach_new(alive, patience)
        sent = 0
        for process in list(self._trackers):
            sent += self._sender.send_pages(process, self._scan(process), patience, stop=stop).bytes
        for name, directory in self._trees.items():
            sent += self._sender.send_tree(name, directory, patience, pids=(), stop=stop).bytes
        if stop():
            self._stopped.clear()
            raise DeadlinePassed("the round was stopped")
        if not self._trackers:
            raise TrackerUnavailable(f"no process of {self._container} can be tracked any more")
        self._sender.mark(patience)
        return RoundResult(sent, self._pending(), time.monotonic() - start)

    def capture(self, mode: Mode, deadline: float, *, beside: Callable[[], Mapping[str, bytes]] = dict) -> Capture:
        """Capture the frozen container and send all of it, END included; returns when the receiver has acknowledged.

        `beside`: gives files, by name, that the target finds beside CRIU's images; called while CRIU dumps.
        END is sent only after the dump has succeeded. Raises DumpFailed, PeerGone, StateMissing, DeadlinePassed.
        """
        done = Capture()
        clock = _Stopwatch(done.steps)
        image_dir = self._fresh("images")
        frozen = processes_of(self._cgroup)
        if mode is Mode.STOP_AND_COPY or preflight.dma(frozen):
            mode = Mode.STOP_AND_COPY
            self.detach()
        tracked = {p: self._trackers[p] for p in frozen if p in self._trackers}
        written = {process: self._scan(process) for process in tracked}
        tracked = {process: tracker for process, tracker in tracked.items() if process in self._trackers}
        # After the scan: registering new mappings may have joined some.
        self.frozen_maps = maps = {process.pid: read_maps(process.pid) for process in frozen}
        mapped = mapped_files(vma for mappings in maps.values() for vma in mappings)
        parent = self._write_parent({process.vpid: maps[process.pid] for process in tracked}) if tracked else None
        clock.lap("scan")
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dump") as pool:
            # Nothing runs, so files stand still too, and go out while CRIU dumps.
            dump = pool.submit(self._dump, image_dir, parent, deadline)
            for process, ranges in written.items():
                done.residual_bytes += self._sender.send_pages(process, ranges, deadline).bytes
            done.steps.append(("residual", clock.last, time.monotonic() - clock.last))
            for name, directory in self._trees.items():
                done.file_bytes += self._sender.send_tree(name, directory, deadline, mapped=mapped).bytes
            others = beside()
            clock.lap("dump", dump.result())
        clock.lap("files")  # what of them took longer than the dump
        done.debt_bytes = self._pay_debt(image_dir, tracked, deadline)
        for name, content in others.items():
            (image_dir / name).write_bytes(content)
        done.image_bytes = self._sender.send_images(image_dir, deadline).bytes
        self._sender.end({process.vpid: process for process in tracked}, mode, deadline)
        clock.lap("images")
        return done

    def _dump(self, image_dir: Path, parent: str | None, deadline: float) -> float:
        """Dump, and give the time when it was done."""
        checkpoint.dump(self._container, image_dir, parent=parent, tools=self._tools, deadline=deadline)
        # CRIU thaws the cgroup to reach the tasks, and does not tell when freezing it again fails.
        if not wait_frozen(self._cgroup, min(deadline, time.monotonic() + REFREEZE_SECONDS)):
            raise DumpFailed(f"{self._container} is not frozen any more after its dump")
        return time.monotonic()

    def close(self) -> None:
        """Detach and delete the images."""
        self.detach()
        shutil.rmtree(self._work_dir, ignore_errors=True)

    def _attach_new(self, processes: list[Process], deadline: float) -> list[str]:
        """Track every process that is not tracked yet; returns why some could not be."""
        refused = []
        for process in processes:
            if process in self._trackers:
                continue
            tracker = ProcessTracker()
            try:
                tracker.attach(process, deadline)
            except TrackerUnavailable as reason:
                refused.append(str(reason))
                continue
            self._trackers[process] = tracker
            self._sender.announce(process, deadline)
        return refused

    def _scan(self, process: Process) -> list[tuple[int, int]]:
        """Scan one process; one that has exited or runs another program loses its tracker, and nothing else."""
        try:
            return self._trackers[process].scan()
        except TrackerUnavailable:
            self._trackers.pop(process).detach()
            return []

    def _pending(self) -> int:
        """Count what has been written since the scans, to tell whether another round is worth it."""
        total = 0
        for process in list(self._trackers):
            try:
                total += self._trackers[process].pending()
            except TrackerUnavailable:
                self._trackers.pop(process).detach()
        return total

    @staticmethod
    def _refuse_dma(processes: Sequence[Process]) -> None:
        """Raise TrackerUnavailable when devices may write to memory behind the tracker's back."""
        reason = preflight.dma(processes)
        if reason:
            raise TrackerUnavailable(reason)

    def _forget(self, process: Process, deadline: float) -> None:
        """Let go of a process that has ended, here and in the receiver's store."""
        self._trackers.pop(process).detach()
        self._sender.gone(process, deadline)

    def _fresh(self, name: str) -> Path:
        path = self._work_dir / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, mode=0o700)
        return path

    def _write_parent(self, maps: Mapping[int, list[Vma]]) -> str:
        """Write the parent image that claims the private mappings, by pid in the container; give runc's path to it."""
        directory = self._fresh("parent")
        claimed = [
            (vpid, [(v.start, v.end) for v in mappings if v.private and v.path not in KERNEL_MAPPINGS])
            for vpid, mappings in maps.items()
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
    """Notes steps that follow one another."""

    def __init__(self, steps: list[tuple[str, float, float]]) -> None:
        self._steps = steps
        self.last = time.monotonic()

    def lap(self, name: str, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        self._steps.append((name, self.last, now - self.last))
        self.last = now

"""Gives a container that CRIU restored lazily its memory: what it waits for first, all else in the background.

Protocol (CRIU's criu/uffd.c): CRIU connects to `lazy-pages.socket` in the image directory. For each process it sends
its pid in the container (i32) and, as SCM_RIGHTS with one byte, a userfaultfd; for a zombie the negative pid alone.
When all is restored and nothing runs yet, it sends 0x52535446.

The descriptors tell of more than faults: after fork, mremap, munmap and madvise(MADV_DONTNEED) what is missing has
changed. The kernel holds the caller back until the event is read, and refuses copies with EAGAIN until then; so one
thread that reads, notes, and only then copies has the events and the copies in order.

Left open: two threads of one process that fork and mremap missing memory at the same moment. The kernel queues their
events in no certain order, and then the child's moved memory could be looked for at the old address. CRIU's own
lazy-pages daemon has the same gap.
"""

import errno
import os
import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from mmap import PAGESIZE
from pathlib import Path

from criu_transfer import uffd
from criu_transfer.errors import RestoreFailed
from criu_transfer.images import FILLED
from criu_transfer.keeper import Keeper, Notify
from criu_transfer.ranges import RangeSet
from criu_transfer.rewrite import PageSource
from criu_transfer.stored import Buffer, StoreFile
from criu_transfer.takeover import Kind, Ledger, Link, Memory, Record, State

SOCKET_NAME = "lazy-pages.socket"

_FINISHED = 0x52535446
_PID = struct.Struct("=i")
_BACKGROUND = 256 << 10
_AROUND_FAULT = 64 << 10
_FREE_BYTES = 16 << 20
_SNAPSHOT_BYTES = 256 << 20
_SNAPSHOT_RECORDS = 4096
# How long to wait before the kernel is asked again: it has an event in work; the container's memory limit is reached.
_RETRY_MS = 1
_NO_MEMORY_MS = 20

type Hook = Callable[[str], None]


def serve(
    image_dir: Path,
    lazy: Mapping[int, Sequence[tuple[int, int]]],
    sources: Mapping[int, PageSource],
    *,
    cgroup: Path,
    notify: Notify,
    deadline_for_connect: float,
    fill_gate: int | None = None,
    hook: Hook = lambda _: None,
) -> None:
    """Serve one lazy restore from `image_dir`; return when all memory is there.

    Call it in a process of its own with one thread: it forks. The caller becomes the keeper, its child the pager.
    `lazy` and `sources` by pid in the container, as `make_lazy` took and gave them; RAM of the sources is freed as it
    is filled in. `cgroup`: the container's, killed when memory cannot be completed. `notify` gets
    {"event": "pager-listening"}, then {"event": "restored-processes", "n"}, {"event": "filled", "bytes", "faults",
    "seconds"}; {"event": "pager-died", "carried_on"} and {"event": "killed", "during", "reason"} if need be; it must
    not block, and may raise BrokenPipeError. The background fill starts when the restore is finished and, if given,
    `fill_gate` is readable or closed at its other end. `hook` is for tests.
    Raises RestoreFailed and StateMissing as Keeper.run does.
    """
    listener = _listen(image_dir)

    def main(ledger: Ledger, link: Link, state: State, fds: dict[int, int]) -> None:
        stores = {vpid: StoreFile(source.fd) for vpid, source in sources.items()}
        pager = Pager(ledger, link, state, fds, stores, fill_gate=fill_gate, hook=hook)
        if not ledger.restored:
            pager.accept(listener, deadline_for_connect)
        listener.close()
        pager.run()
        (image_dir / FILLED).touch()  # by the pager itself: its keeper may be dead

    keeper = Keeper(lazy, cgroup=cgroup, notify=notify, main=main)
    # Each fork of the container is one more descriptor; short of them, the pager would have to give up.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with listener:
        keeper.run()


def _listen(image_dir: Path) -> socket.socket:
    directory = os.open(image_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Through the descriptor: the directory's own path may be longer than a socket address can be.
        (image_dir / SOCKET_NAME).unlink(missing_ok=True)
        listener.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


@dataclass(slots=True)
class _Process:
    """One userfaultfd: the memory it lacks, and the faults that could not be served yet."""

    key: int
    fd: int
    memory: Memory
    waiting: dict[int, None] = field(default_factory=dict)
    step: int = _BACKGROUND  # bytes to try at once
    doubts: set[int] = field(default_factory=set)  # pages that had no mapping, tried once
    gone: bool = False
    spent: RangeSet = field(default_factory=RangeSet)  # offsets whose RAM can be freed, as far as this one goes


class Pager:
    """Serves all userfaultfds of one restore, in one thread."""

    def __init__(
        self,
        ledger: Ledger,
        link: Link,
        state: State,
        fds: Mapping[int, int],
        stores: Mapping[int, StoreFile],
        *,
        fill_gate: int | None,
        hook: Hook,
    ) -> None:
        self._ledger = ledger
        self._link = link
        self._state = state
        self._stores = stores
        self._hook = hook
        self._buffer = Buffer(_BACKGROUND)
        self._poll = select.poll()
        self._processes: dict[int, _Process] = {}  # by descriptor
        self._next_key = max(state.memories, default=0) + 1
        self._connection: socket.socket | None = None
        self._gate = fill_gate
        if fill_gate is not None:
            self._poll.register(fill_gate, select.POLLIN)
        self._bytes = self._faults = self._since_snapshot = 0
        self._started = time.monotonic()
        self._pause_ms = 0
        for key, fd in fds.items():
            self._watch(key, fd)

    def accept(self, listener: socket.socket, deadline: float) -> None:
        """Wait for CRIU. Raises RestoreFailed when it has not come by `deadline`."""
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._connection, _ = listener.accept()
        except TimeoutError:
            raise RestoreFailed("CRIU did not ask for memory in time") from None
        self._poll.register(self._connection, select.POLLIN)

    def run(self) -> None:
        """Serve until nothing is missing. Raises RestoreFailed when CRIU goes away before it has finished."""
        while self._connection or self._processes:
            for fd, _ in self._poll.poll(self._timeout()):
                self._ready(fd)
            self._pause_ms = 0
            for process in list(self._processes.values()):
                self._serve_waiting(process)
            if self._filling:
                self._fill_some()
                self._retire()
        seconds = time.monotonic() - self._started
        self._link.tell({"event": "filled", "bytes": self._bytes, "faults": self._faults, "seconds": round(seconds, 3)})

    @property
    def _filling(self) -> bool:
        return self._connection is None and self._gate is None

    def _timeout(self) -> int | None:
        if self._pause_ms:
            return self._pause_ms
        return 0 if self._filling else None

    def _ready(self, fd: int) -> None:
        if fd in self._processes:
            self._read(self._processes[fd])
        elif self._connection and fd == self._connection.fileno():
            self._hear_criu(self._connection)
        elif fd == self._gate:
            self._poll.unregister(fd)
            self._gate = None

    def _hear_criu(self, connection: socket.socket) -> None:
        (pid,) = _PID.unpack(_exactly(connection, _PID.size))
        if pid == _FINISHED:
            self._poll.unregister(connection)
            connection.close()
            self._connection = None
            self._ledger.restored = True
            self._started = time.monotonic()
            self._link.tell({"event": "restored-processes", "n": len(self._processes)})
        elif pid > 0:
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
            if not fds:
                raise RestoreFailed("CRIU named a process and sent no userfaultfd")
            self._adopt(Record(Kind.ADOPT, self._new_key(), pid), fds[0])

    def _new_key(self) -> int:
        key = self._next_key
        self._next_key += 1
        return key

    def _adopt(self, record: Record, fd: int) -> None:
        """Take a descriptor: the keeper first, then the ledger, and only then is anything served from it."""
        key = record.a if record.kind is Kind.FORK else record.key
        self._link.hand_over(key, fd)
        self._note(record)
        self._watch(key, fd)

    def _watch(self, key: int, fd: int) -> None:
        self._processes[fd] = _Process(key, fd, self._state.memories[key])
        self._poll.register(fd, select.POLLIN)

    def _note(self, record: Record) -> None:
        self._ledger.note(record)
        self._state.apply(record)

    def _read(self, process: _Process) -> None:
        self._ledger.busy = True
        events = uffd.read_events(process.fd)
        for event in events:
            if isinstance(event, uffd.PageFault):
                process.waiting[event.address] = None
                self._faults += 1
            else:
                # Its cause may run on since the read: nothing is copied before all of the batch has been noted.
                self._hook("event")
                self._follow(process, event)
                process.doubts.clear()
        self._ledger.busy = False
        self._hook("read")

    def _follow(self, process: _Process, event: uffd.Event) -> None:
        match event:
            case uffd.Fork(fd):
                self._adopt(Record(Kind.FORK, process.key, self._new_key()), fd)
            case uffd.Remap(old, new, length):
                self._note(Record(Kind.MOVE, process.key, old, new, length))
            case uffd.Remove(start, end) | uffd.Unmap(start, end):
                self._note(Record(Kind.DROP, process.key, start, end))
            case _:
                raise ValueError(f"unexpected {event}")

    def _serve_waiting(self, process: _Process) -> None:
        for address in list(process.waiting):
            if self._serve(process, address):
                del process.waiting[address]

    def _serve(self, process: _Process, address: int) -> bool:
        """Bring the page at `address` and its neighbours; tell whether its thread has been woken."""
        missing = process.memory.missing
        piece = missing.find(address)
        if piece is None:
            return self._try(process, address, address + PAGESIZE, None) or process.gone
        low = address - address % _AROUND_FAULT
        while piece:
            start, end = max(low, piece.start), min(low + _AROUND_FAULT, piece.end)
            if not self._try(process, start, end, piece.offset + start - piece.start) and not self._try(
                process, address, address + PAGESIZE, piece.offset + address - piece.start
            ):
                return process.gone
            piece = missing.find(address)
        return True

    def _fill_some(self) -> None:
        """Fill one piece of the first process that can be filled now."""
        for process in list(self._processes.values()):
            missing = process.memory.missing
            if not missing:
                continue
            piece = missing.last()
            start = max(piece.start, piece.end - process.step)
            if self._try(process, start, piece.end, piece.offset + start - piece.start):
                process.step = min(_BACKGROUND, process.step * 2)
                self._hook("filled")
                return

    def _try(self, process: _Process, start: int, end: int, offset: int | None) -> bool:
        """Fill from `start` on towards `end`, from the store or (None) with a zero page.

        Tells whether there was progress. If not: an event has to be read first, memory is short, the mapping is not
        as it was, or the process is gone.
        """
        try:
            if offset is None:
                uffd.zeropage(process.fd, start, PAGESIZE)
            else:
                self._filled(process, start, self._fill(process, start, end, offset), offset)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return self._unmapped(process, start, end)
            return self._refused(process, start, error)
        return True

    def _refused(self, process: _Process, start: int, error: OSError) -> bool:
        match error.errno:
            case errno.EEXIST:
                process.memory.missing.discard(start, start + PAGESIZE)
                uffd.wake(process.fd, start, PAGESIZE)
                return True
            case errno.EAGAIN:
                self._pause_ms = max(self._pause_ms, _RETRY_MS)
            case errno.ENOMEM:
                self._pause_ms = _NO_MEMORY_MS
            case errno.ESRCH:
                process.gone = True
            case _:
                raise error
        return False

    def _unmapped(self, process: _Process, start: int, end: int) -> bool:
        """Follow ENOENT: [start, end) is not inside one mapping of this userfaultfd.

        mprotect and the like split mappings without telling: then a smaller step helps. A page with no mapping at all
        is forgotten, but not at once: since Linux 6.8 a mapping that mremap has just taken away gives ENOENT too, and
        its event, which says where the page belongs now, must be read first.
        """
        if end - start > PAGESIZE:
            process.step = max(PAGESIZE, (end - start) // 2 // PAGESIZE * PAGESIZE)
            return False
        if process.memory.missing.find(start) and start not in process.doubts:
            process.doubts.add(start)
            return False
        process.doubts.discard(start)
        process.memory.missing.discard(start, end)
        uffd.wake(process.fd, start, PAGESIZE)
        return True

    def _fill(self, process: _Process, start: int, end: int, offset: int) -> int:
        store = self._stores[process.memory.vpid]
        data, stop = store.segment(offset, offset + end - start)
        if data:
            store.read(self._buffer, offset, stop - offset)
            return uffd.copy(process.fd, start, self._buffer.address, stop - offset)
        return uffd.zeropage(process.fd, start, stop - offset)

    def _filled(self, process: _Process, start: int, done: int, offset: int) -> None:
        process.memory.missing.discard(start, start + done)
        self._bytes += done
        self._since_snapshot += done
        process.spent.add(offset, offset + done)
        if process.spent.total >= _FREE_BYTES and not self._others(process):
            self._free(process)
        if self._since_snapshot >= _SNAPSHOT_BYTES or self._ledger.records >= _SNAPSHOT_RECORDS:
            self._ledger.snapshot(self._state.memories)
            self._since_snapshot = 0

    def _others(self, process: _Process) -> list[Memory]:
        """List the memories that are filled from the same store, because of forks."""
        memory = process.memory
        return [each for each in self._state.memories.values() if each.vpid == memory.vpid and each is not memory]

    def _free(self, process: _Process) -> None:
        """Free the store's RAM of what this process has got, except for what others still have to get."""
        needed = [piece for other in self._others(process) for piece in other.missing.offsets()]
        self._stores[process.memory.vpid].free(process.spent, needed)
        process.spent = RangeSet()

    def _retire(self) -> None:
        """Let go of the processes that lack nothing any more: the kernel then wakes who still waits there."""
        for process in list(self._processes.values()):
            if process.gone or not (process.memory.missing or process.waiting):
                self._poll.unregister(process.fd)
                if process.memory.vpid in self._stores:
                    self._free(process)
                self._note(Record(Kind.DONE, process.key))
                self._link.close(process.key)
                os.close(process.fd)
                del self._processes[process.fd]


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise RestoreFailed("CRIU went away before it had finished the restore")
        data += more
    return data

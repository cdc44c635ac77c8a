"""The source's end of a transfer: sends memory, trees and images, and knows what the receiver has.

Blocking, and used by one thread; only `Stream.abort` may come from another. Every method takes an absolute deadline and
raises DeadlinePassed, PeerGone, and what the receiver answers: StoreFull, StateMissing, ProtocolError, GiveUp.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from criu_transfer.errors import GiveUp, PeerGone, ProtocolError, StateMissing, StoreFull
from criu_transfer.faults import filled_pages
from criu_transfer.files import Data, Delete, Hole, Mapped, Put, SourceTree, mapped_files, never
from criu_transfer.maps import read_maps
from criu_transfer.messages import (
    IMAGES,
    Accept,
    Ack,
    End,
    ErrorKind,
    ErrorMessage,
    FileDelete,
    Hello,
    Mark,
    Mode,
    ProcessInfo,
    Refuse,
    Totals,
)
from criu_transfer.pages import CopyStats, Memory, PageCopier, Send
from criu_transfer.ranges import RangeSet
from criu_transfer.stream import Stream
from criu_transfer.wire import (
    HEADER,
    MAGIC,
    MAX_RUNS,
    PAGE,
    Header,
    Type,
    decode_header,
    encode_header,
    encode_runs,
    frame,
)

_SMALL = 64 << 10  # frames up to this size are collected and leave together
_PROGRESS_SECONDS = 0.1
_LAST_WORDS = 0.1  # seconds to read the reason when the connection breaks

_ERRORS: Mapping[ErrorKind, type[GiveUp]] = {
    ErrorKind.PROTOCOL: ProtocolError,
    ErrorKind.STORE_FULL: StoreFull,
    ErrorKind.STATE_MISSING: StateMissing,
    ErrorKind.OTHER: GiveUp,
}


class Process(Protocol):
    """What a sender must know of a process; hashable, and equal only to itself (pid and start time)."""

    @property
    def pid(self) -> int:
        """The pid as we see it."""
        ...

    @property
    def vpid(self) -> int:
        """The pid inside the container."""
        ...

    @property
    def starttime(self) -> int:
        """Clock ticks after boot."""
        ...


@dataclass(frozen=True, slots=True)
class FileStats:
    """What one pass over a tree sent: bytes of content, and entries put, changed or deleted."""

    bytes: int
    entries: int


@dataclass(frozen=True, slots=True)
class Marked:
    """A round that the receiver has stored. `seconds`: time spent on sending since the mark before, waits for the
    caller left out; `bytes`: of pages and files in that time.
    """

    ack: Ack
    bytes: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Bytes per second, 0 when nothing was sent."""
        return self.bytes / self.seconds if self.seconds else 0.0


class Sender:
    """One migration over one connection.

    `progress` gets the totals so far, at most ten times a second. `drop_pages` is for drills only: before END that
    many pages of the largest process are overwritten with zeros in the receiver's store, to show that the drill's
    verification notices.
    """

    def __init__(
        self, stream: Stream, *, progress: Callable[[Totals], None] = lambda _: None, drop_pages: int = 0
    ) -> None:
        self._stream = stream
        self._progress = progress
        self._drop_pages = drop_pages
        self._copier = PageCopier()
        self._memories: dict[Process, Memory] = {}
        self._wanted: dict[Process, RangeSet] = {}  # what CRIU left out, by process
        self._trees: dict[str, SourceTree] = {}
        self._pending = bytearray()
        self._data = self._zero = self._files = self._frames = 0
        self._numbers = self._file_number = self._sequence = 0
        self._busy = self._marked_bytes = self._reported = 0.0

    # --- the session ------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello, deadline: float) -> None:
        """Introduce the migration; raises GiveUp with the receiver's reason when it refuses."""
        self._stream.send(frame(Type.HELLO, hello.encode(), offset=MAGIC), deadline)
        kind, payload = self._receive(deadline)
        if kind is Type.REFUSE:
            refuse = Refuse.decode(payload)
            raise GiveUp(f"{self._stream.peer} refuses the migration: {refuse.reason}")
        if kind is not Type.ACCEPT:
            raise ProtocolError(f"{kind.name} in answer to HELLO")
        if Accept.decode(payload).version not in hello.versions:
            raise ProtocolError("the receiver chose a version that was not offered")

    def announce(self, process: Process, deadline: float) -> None:
        """Name a process whose memory will come; harmless when repeated."""
        if process in self._memories:
            return
        self._memories[process] = Memory(process.pid, self._numbers)
        self._small(frame(Type.PROCESS, ProcessInfo(process.vpid, process.starttime).encode(), number=self._numbers))
        self._numbers += 1
        self._flush(deadline)

    def gone(self, process: Process, deadline: float) -> None:
        """Let the receiver free the memory of a process that has ended; harmless when it was not announced."""
        memory = self._memories.pop(process, None)
        if memory is not None:
            self._small(frame(Type.GONE, number=memory.number))
            self._flush(deadline)

    def mark(self, deadline: float) -> Marked:
        """End a round: returns when the receiver has stored all of it."""
        self._sequence += 1
        ack = self._ask(Type.MARK, Mark(self._sequence, self._totals()).encode(), deadline)
        sent = self._data + self._files
        marked = Marked(ack, sent - int(self._marked_bytes), self._busy)
        self._marked_bytes, self._busy = sent, 0.0
        return marked

    def end(self, processes: Mapping[int, Process], mode: Mode, deadline: float) -> Ack:
        """Say that everything was sent; returns when the receiver could start a restore.

        `processes`: the living ones by their pid in the container. Raises StateMissing when a page that CRIU left out
        is not in the store: it may be sent, and `end` called again.
        """
        self._drop(deadline)
        self._sequence += 1
        numbers = {vpid: self._memories[process].number for vpid, process in processes.items()}
        images = self._trees[IMAGES].entries if IMAGES in self._trees else 0
        return self._ask(Type.END, End(self._sequence, mode, numbers, images, self._totals()).encode(), deadline)

    # --- memory -----------------------------------------------------------------------------------------------------

    def ledger(self, process: Process) -> RangeSet:
        """Return what of the process was sent, as of its last scan: a copy."""
        return self._memories[process].ledger.copy()

    def owed(self, process: Process) -> RangeSet:
        """Return what could not be read when it was to be sent, and was not sent since: a copy."""
        return self._memories[process].owed.copy()

    def send_pages(
        self,
        process: Process,
        ranges: Iterable[tuple[int, int]],
        deadline: float,
        *,
        stop: Callable[[], bool] = never,
    ) -> CopyStats:
        """Send sorted ranges that a scan has just returned. What cannot be read is owed, and so is the rest when
        `stop` tells to end early.
        """
        return self._copier.copy(self._memories[process], ranges, self._pages_to(deadline), stop)

    def pay_debt(self, process: Process, left_out: Iterable[tuple[int, int]], deadline: float) -> CopyStats:
        """Send of the pages that CRIU left out, as its page list says, those that the ledger lacks.

        The process is frozen. Raises StateMissing when one cannot be read: then only CRIU itself could dump it.
        """
        wanted = self._wanted[process] = RangeSet(left_out)
        ledger = self._memories[process].ledger
        debt = [missing for start, end in wanted for missing in ledger.missing(start, end)]
        stats = self.send_pages(process, debt, deadline)
        if stats.owed:
            raise StateMissing(f"process {process.vpid}: memory at {stats.owed[0][0]:#x} cannot be read")
        return stats

    def _pages_to(self, deadline: float) -> Send:
        def send(view: memoryview, data: int, zero: int) -> None:
            self._flush(deadline)
            self._frames += 1
            self._write(view, deadline)
            self._data += data
            self._zero += zero
            self._report()

        return send

    # --- files ------------------------------------------------------------------------------------------------------

    def send_tree(
        self,
        name: str,
        root: Path,
        deadline: float,
        *,
        pids: Iterable[int] | None = None,
        mapped: Mapped | None = None,
        stop: Callable[[], bool] = never,
    ) -> FileStats:
        """Send what has changed in a tree since the last call; what is there is compared with what was sent.

        Files that processes `pids` (None: all announced ones) map shared are read whole, for their times say nothing.
        While the container runs () saves that; the last call, when it is frozen, has to name all its processes, or give
        the files that they map as `mapped`, which then counts instead.
        With `stop` the pass ends early, and the next one finds the rest.
        """
        tree = self._trees.get(name)
        if tree is None:
            tree = self._trees[name] = SourceTree(name, root, once=name == IMAGES)
        if mapped is None:
            mapped = _mapped(pids if pids is not None else [process.pid for process in self._memories])
        return self._send_changes(tree, mapped, stop, deadline)

    def send_images(self, directory: Path, deadline: float) -> FileStats:
        """Send CRIU's image directory; once, when the dump is done."""
        return self.send_tree(IMAGES, directory, deadline, pids=())

    def _send_changes(self, tree: SourceTree, mapped: Mapped, stop: Callable[[], bool], deadline: float) -> FileStats:
        before, entries = self._files, 0
        with closing(tree.changes(self._copier.data, mapped, stop)) as changes:
            for change in changes:
                match change:
                    case Put(meta):
                        self._file_number += 1
                        self._small(frame(Type.FILE, meta.encode(), number=self._file_number))
                        entries += 1
                    case Data(offset, view):
                        self._file_data(offset, view, deadline)
                    case Hole(offset, length):
                        self._small(encode_header(Header(Type.FILE_HOLE, self._file_number, offset, length)))
                    case Delete(path):
                        self._small(frame(Type.FILE_DELETE, FileDelete(tree.name, path).encode()))
                        entries += 1
                if len(self._pending) > _SMALL:
                    self._flush(deadline)
                self._report()
        self._flush(deadline)
        return FileStats(self._files - before, entries)

    def _file_data(self, offset: int, view: memoryview, deadline: float) -> None:
        header = encode_header(Header(Type.FILE_DATA, self._file_number, offset, len(view)))
        self._files += len(view)
        self._small(header)
        if len(view) <= _SMALL:
            self._pending += view
        else:
            self._flush(deadline)
            self._write(view, deadline)

    # --- frames -----------------------------------------------------------------------------------------------------

    def _small(self, raw: bytes) -> None:
        """Collect a small frame; it leaves with the next large one or at the next `_flush`."""
        self._pending += raw
        self._frames += 1

    def _flush(self, deadline: float) -> None:
        if self._pending:
            pending, self._pending = self._pending, bytearray()
            self._write(pending, deadline)

    def _write(self, data: memoryview | bytearray, deadline: float) -> None:
        began = time.monotonic()
        try:
            if self._stream.readable():  # between questions the receiver speaks only to say that it gives up
                self._raise_error(*self._receive(deadline))
            self._stream.send(data, deadline)
        except PeerGone:
            self._raise_last_words()
            raise
        finally:
            self._busy += time.monotonic() - began

    def _ask(self, kind: Type, payload: bytes, deadline: float) -> Ack:
        self._flush(deadline)
        self._write(bytearray(frame(kind, payload)), deadline)
        began = time.monotonic()
        answer, body = self._receive(deadline)
        self._busy += time.monotonic() - began
        if answer is not Type.ACK:
            self._raise_error(answer, body)
        ack = Ack.decode(body)
        if ack.sequence != self._sequence:
            raise ProtocolError(f"ACK of {ack.sequence} in answer to {self._sequence}")
        self._report(now=True)
        return ack

    def _receive(self, deadline: float) -> tuple[Type, bytes]:
        raw = bytearray(HEADER.size)
        self._stream.recv_exact(memoryview(raw), deadline)
        header = decode_header(raw)
        if header.type not in {Type.ACCEPT, Type.REFUSE, Type.ACK, Type.ERROR}:
            raise ProtocolError(f"a receiver does not send {header.type.name}")
        payload = bytearray(header.length)
        self._stream.recv_exact(memoryview(payload), deadline)
        return header.type, bytes(payload)

    @staticmethod
    def _raise_error(kind: Type, payload: bytes) -> NoReturn:
        if kind is not Type.ERROR:
            raise ProtocolError(f"{kind.name} out of turn")
        message = ErrorMessage.decode(payload)
        raise _ERRORS[message.kind](f"the receiver: {message.reason}")

    def _raise_last_words(self) -> None:
        """Raise what the receiver said before it closed, if it said anything."""
        if not self._stream.readable():
            return
        try:
            kind, payload = self._receive(time.monotonic() + _LAST_WORDS)
        except GiveUp:
            return
        self._raise_error(kind, payload)

    def _totals(self) -> Totals:
        return Totals(self._data, self._zero, self._files, self._frames)

    def _report(self, *, now: bool = False) -> None:
        clock = time.monotonic()
        if now or clock - self._reported >= _PROGRESS_SECONDS:
            self._reported = clock
            self._progress(self._totals())

    def _drop(self, deadline: float) -> None:
        """Do the damage that a drill has ordered; see `drop_pages`."""
        count, self._drop_pages = self._drop_pages, 0
        if not count or not self._memories:
            return
        process, memory = max(self._memories.items(), key=lambda item: item[1].ledger.total)
        pages = filled_pages(memory, self._wanted.get(process, memory.ledger), count)
        send = self._pages_to(deadline)
        for runs in itertools.batched([(page, PAGE) for page in pages], MAX_RUNS, strict=False):
            table = frame(Type.ZERO, encode_runs(runs), number=memory.number, offset=len(runs))
            send(memoryview(table), 0, len(runs) * PAGE)


def _mapped(pids: Iterable[int]) -> Mapped:
    mappings = []
    for pid in pids:
        try:
            mappings += read_maps(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended, and maps nothing
    return mapped_files(mappings)

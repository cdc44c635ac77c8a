"""The receiver's side of one connection: frames in, memory into the store, files into trees, answers out."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from criu_transfer.errors import DeadlinePassed, GiveUp, PeerGone, ProtocolError, StateMissing, StoreFull
from criu_transfer.filesink import Budget, TargetTrees
from criu_transfer.messages import (
    IMAGES,
    Accept,
    Ack,
    End,
    ErrorKind,
    ErrorMessage,
    FileDelete,
    FileMeta,
    Hello,
    Mark,
    Mode,
    ProcessInfo,
    Refuse,
    Totals,
    choose_version,
)
from criu_transfer.ranges import RangeSet
from criu_transfer.store import PageStore
from criu_transfer.stream import Stream
from criu_transfer.wire import HEADER, MAX_PAYLOAD, RUN, Header, Type, decode_header, decode_runs, frame

_MAX_ENTRIES = 1_000_000
_FINISH_SECONDS = 2.0  # for the source to read why we stop

type Range = tuple[int, int]
type Emit = Callable[[dict[str, object]], None]
type MakeLazy = Callable[[Path, Mapping[int, "StoredMemory"]], Mapping[int, list[Range]]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What this node gives one migration at most, in bytes."""

    max_memory: int
    max_images: int
    max_files: int


@dataclass(frozen=True, slots=True)
class Expected:
    """The migration that this receiver is for, and where it goes."""

    migration: str
    source: str
    target: str
    limits: Limits
    image_dir: Path
    trees: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class StoredMemory:
    """The memory of one process, as rewriting and paging want it."""

    fd: int
    coverage: RangeSet


@dataclass(frozen=True, slots=True)
class Complete:
    """Everything is here: lazy ranges and their sources by pid in the container; `rewrite_seconds` it took."""

    mode: Mode
    lazy: Mapping[int, list[Range]]
    sources: Mapping[int, StoredMemory]
    rewrite_seconds: float


class Refused(GiveUp):
    """A migration that this receiver is not for, or that asks for too much."""


class Session:
    """One connection, from HELLO to the END that holds."""

    def __init__(self, stream: Stream, expected: Expected, *, emit: Emit, make_lazy: MakeLazy, deadline: float) -> None:
        """`emit` gets the events of the control channel; `make_lazy` is criu_transfer.rewrite's."""
        self._stream = stream
        self._expected = expected
        self._emit = emit
        self._make_lazy = make_lazy
        self._deadline = deadline
        self._head = memoryview(bytearray(HEADER.size))
        self._buffer = memoryview(bytearray(MAX_PAYLOAD))
        self._store = PageStore(0)
        self._images, self._files = Budget(0, 0), Budget(0, 0)
        self._trees = TargetTrees({}, {})
        self._processes: dict[int, ProcessInfo] = {}
        self._data = self._zero = self._file_bytes = self._frames = 0
        self._handlers: Mapping[Type, Callable[[Header, memoryview], None]] = {
            Type.PROCESS: self._process,
            Type.GONE: self._gone,
            Type.PAGES: self._pages,
            Type.ZERO: self._zeros,
            Type.FILE: self._file,
            Type.FILE_DATA: self._file_data,
            Type.FILE_HOLE: self._file_hole,
            Type.FILE_DELETE: self._file_delete,
            Type.MARK: self._mark,
        }

    def run(self) -> Complete:
        """Receive everything, and acknowledge END once a restore could start from what is here.

        Raises GiveUp, after having told the source why; the store is freed then.
        """
        try:
            self._hello()
            complete = None
            while complete is None:
                complete = self._next()
        except OSError as error:
            failure = GiveUp(f"the target could not store it: {error}")
            self._fail(failure)
            raise failure from error
        except GiveUp as error:
            self._fail(error)
            raise
        finally:
            self._trees.close()
        return complete

    def _fail(self, error: GiveUp) -> None:
        """Free the memory, and tell the source if it is still there to be told."""
        self._store.close()
        if isinstance(error, PeerGone | DeadlinePassed):
            return
        kind, body = Type.ERROR, ErrorMessage(_kind(error), str(error), fatal=True).encode()
        if isinstance(error, Refused):
            kind, body = Type.REFUSE, Refuse(str(error)).encode()
        deadline = min(self._deadline, time.monotonic() + _FINISH_SECONDS)
        try:
            self._stream.send(frame(kind, body), deadline)
        except GiveUp:
            return  # the first error counts
        self._stream.finish(deadline)

    # --- frames -----------------------------------------------------------------------------------------------------

    def _receive(self) -> tuple[Header, memoryview]:
        self._stream.recv_exact(self._head, self._deadline)
        header = decode_header(self._head)
        payload = self._buffer[: header.payload]
        if payload:
            self._stream.recv_exact(payload, self._deadline)
        return header, payload

    def _next(self) -> Complete | None:
        header, payload = self._receive()
        if header.type is Type.END:
            return self._end(payload)
        handler = self._handlers.get(header.type)
        if handler is None:
            raise ProtocolError(f"{header.type.name} out of turn")
        if header.type is not Type.MARK:
            self._frames += 1
        handler(header, payload)
        return None

    def _hello(self) -> None:
        header, payload = self._receive()
        if header.type is not Type.HELLO:
            raise ProtocolError(f"{header.type.name} where HELLO must come first")
        hello = Hello.decode(payload)
        if not isinstance(hello, Hello):
            raise Refused(f"no common version: the source speaks {hello}")
        expected, limits = self._expected, self._expected.limits
        if (hello.migration, hello.source, hello.target) != (expected.migration, expected.source, expected.target):
            raise Refused(f"this is the receiver of {expected.migration} from {expected.source}")
        for name in ("max_memory", "max_images", "max_files"):
            if getattr(hello, name) > getattr(limits, name):
                raise Refused(f"{name} {getattr(hello, name)} is over this node's {getattr(limits, name)}")
        self._store = PageStore(hello.max_memory)
        self._images = Budget(hello.max_images, _MAX_ENTRIES)
        self._files = Budget(hello.max_files, _MAX_ENTRIES)
        budgets = dict.fromkeys(expected.trees, self._files) | {IMAGES: self._images}
        self._trees = TargetTrees({**expected.trees, IMAGES: expected.image_dir}, budgets)
        version = choose_version(hello.versions)
        self._stream.send(frame(Type.ACCEPT, Accept(version or 0).encode()), self._deadline)

    def _process(self, header: Header, payload: memoryview) -> None:
        self._store.open(header.number)
        self._processes[header.number] = ProcessInfo.decode(payload)

    def _gone(self, header: Header, _payload: memoryview) -> None:
        self._store.drop(header.number)
        del self._processes[header.number]

    def _pages(self, header: Header, payload: memoryview) -> None:
        table = header.offset * RUN.size
        runs = decode_runs(header, payload[:table])
        data = payload[table:]
        self._data += len(data)
        for address, length in runs:
            self._store.write(header.number, address, data[:length])
            data = data[length:]

    def _zeros(self, header: Header, payload: memoryview) -> None:
        for address, length in decode_runs(header, payload):
            self._store.zero(header.number, address, length)
            self._zero += length

    def _file(self, header: Header, payload: memoryview) -> None:
        self._trees.put(header.number, FileMeta.decode(payload))

    def _file_data(self, header: Header, payload: memoryview) -> None:
        self._trees.data(header.number, header.offset, payload)
        self._file_bytes += len(payload)

    def _file_hole(self, header: Header, _payload: memoryview) -> None:
        self._trees.hole(header.number, header.offset, header.length)

    def _file_delete(self, _header: Header, payload: memoryview) -> None:
        self._trees.delete(FileDelete.decode(payload))

    def _mark(self, _header: Header, payload: memoryview) -> None:
        mark = Mark.decode(payload)
        self._settle(mark.totals)
        self._emit(
            {
                "event": "mark",
                "sequence": mark.sequence,
                "data": self._data,
                "zero": self._zero,
                "files": self._file_bytes,
                "held": self._store.held,
            }
        )
        self._acknowledge(mark.sequence)

    def _settle(self, totals: Totals) -> None:
        """Complete what is open, and compare the source's account with ours."""
        self._trees.finish()
        ours = Totals(self._data, self._zero, self._file_bytes, self._frames)
        if ours != totals:
            raise ProtocolError(f"the source counts {totals}, we count {ours}")

    def _acknowledge(self, sequence: int) -> None:
        entries = self._images.entries + self._files.entries
        ack = Ack(sequence, self._store.held, self._store.covered, entries)
        self._stream.send(frame(Type.ACK, ack.encode()), self._deadline)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _end(self, payload: memoryview) -> Complete | None:
        end = End.decode(payload)
        self._settle(end.totals)
        sources = {vpid: self._source(vpid, number) for vpid, number in end.processes.items()}
        try:
            complete = self._complete(end, sources)
        except StateMissing as error:
            self._emit({"event": "state-missing", "error": str(error)})
            message = ErrorMessage(ErrorKind.STATE_MISSING, str(error), fatal=False)
            self._stream.send(frame(Type.ERROR, message.encode()), self._deadline)
            return None
        self._acknowledge(end.sequence)
        return complete

    def _source(self, vpid: int, number: int) -> StoredMemory:
        info = self._processes.get(number)
        if info is None or info.vpid != vpid:
            raise ProtocolError(f"END: process {number} was not announced as pid {vpid}")
        return StoredMemory(self._store.fd(number), self._store.coverage(number))

    def _complete(self, end: End, sources: Mapping[int, StoredMemory]) -> Complete:
        """Check that a restore could start; raises StateMissing when memory or an image is not here.

        Rewriting also checks the images of stop-and-copy, where no page may be left out.
        """
        if end.images != self._images.entries or not (self._expected.image_dir / "inventory.img").exists():
            raise StateMissing(f"{self._images.entries} images came, of {end.images}")
        began = time.monotonic()
        lazy = self._make_lazy(self._expected.image_dir, sources)
        return Complete(end.mode, lazy, sources, time.monotonic() - began)


def _kind(error: GiveUp) -> ErrorKind:
    match error:
        case StoreFull():
            return ErrorKind.STORE_FULL
        case ProtocolError():
            return ErrorKind.PROTOCOL
        case StateMissing():
            return ErrorKind.STATE_MISSING
        case _:
            return ErrorKind.OTHER

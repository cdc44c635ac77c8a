"""What a pager leaves to its keeper: the descriptors, and a ledger of what is missing where.

The kernel gives an event (fork, mremap, munmap, madvise) to its reader once. Between reading one and writing it down,
only the pager knows of it; the ledger's `busy` says so. A pager that dies at any other moment can be replaced.
"""

import json
import mmap
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from criu_transfer.errors import StateMissing
from criu_transfer.fills import LazyMap


class Kind(IntEnum):
    """What a record of the ledger says."""

    ADOPT = 1  # key, pid: a restored process, with the ranges it was restored with
    FORK = 2  # key of the parent, key of the child
    DROP = 3  # key, start, end: removed or unmapped
    MOVE = 4  # key, old, new, length
    DONE = 5  # key: nothing is missing, or the process is gone


class Record(NamedTuple):
    """One change of what is missing, filling apart."""

    kind: Kind
    key: int
    a: int = 0
    b: int = 0
    c: int = 0


@dataclass(slots=True)
class Memory:
    """What one userfaultfd still lacks; `vpid` names the store that has it."""

    vpid: int
    missing: LazyMap


@dataclass(slots=True)
class State:
    """All userfaultfds of a restore by key, a number that pager and keeper both call it by."""

    lazy: Mapping[int, Sequence[tuple[int, int]]]
    memories: dict[int, Memory] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        """Follow one record. Raises KeyError for a key that is not there: the ledger is damaged."""
        match record.kind:
            case Kind.ADOPT:
                self.memories[record.key] = Memory(record.a, LazyMap(self.lazy.get(record.a, ())))
            case Kind.FORK:
                parent = self.memories[record.key]
                self.memories[record.a] = Memory(parent.vpid, parent.missing.copy())
            case Kind.DROP:
                self.memories[record.key].missing.discard(record.a, record.b)
            case Kind.MOVE:
                self.memories[record.key].missing.move(record.a, record.b, record.c)
            case Kind.DONE:
                del self.memories[record.key]


_RECORD = struct.Struct("=5Q")
_MEMORY = struct.Struct("=3Q")  # key, vpid, bytes of the packed map that follows
# Indexes of the u64 in the shared page; a store to one is atomic.
_BUSY, _RESTORED, _ACTIVE, _SNAPSHOT_BYTES, _RECORDS = 0, 1, 2, 3, 5


class Ledger:
    """A snapshot of the state and the records since, in memory that pager and keeper share over a fork.

    There are two files; a snapshot goes into the idle one, which then becomes the active one by one store. The ledger
    knows of fills only by snapshots, and that is safe: a page listed as missing that is there is refused with EEXIST.
    Only the pager writes.
    """

    def __init__(self) -> None:
        self._page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._files = [os.memfd_create(f"spotguard-ledger-{n}", os.MFD_CLOEXEC) for n in (0, 1)]

    @property
    def busy(self) -> bool:
        """Whether the pager may know of an event that is not written down."""
        return bool(self._page[_BUSY])

    @busy.setter
    def busy(self, value: bool) -> None:
        self._page[_BUSY] = value

    @property
    def restored(self) -> bool:
        """Whether CRIU has said that the restore is finished."""
        return bool(self._page[_RESTORED])

    @restored.setter
    def restored(self, value: bool) -> None:
        self._page[_RESTORED] = value

    @property
    def records(self) -> int:
        """Count the records since the snapshot."""
        return self._page[_RECORDS + self._page[_ACTIVE]]

    def note(self, record: Record) -> None:
        """Write one record down."""
        active = self._page[_ACTIVE]
        count = self._page[_RECORDS + active]
        os.pwrite(
            self._files[active], _RECORD.pack(*record), self._page[_SNAPSHOT_BYTES + active] + count * _RECORD.size
        )
        self._page[_RECORDS + active] = count + 1

    def snapshot(self, memories: Mapping[int, Memory]) -> None:
        """Write the whole state down, in place of the records so far."""
        idle = 1 - self._page[_ACTIVE]
        packed = ((key, memory.vpid, memory.missing.pack()) for key, memory in memories.items())
        data = b"".join(_MEMORY.pack(key, vpid, len(missing)) + missing for key, vpid, missing in packed)
        os.ftruncate(self._files[idle], 0)
        _write_all(self._files[idle], data)
        self._page[_SNAPSHOT_BYTES + idle] = len(data)
        self._page[_RECORDS + idle] = 0
        self._page[_ACTIVE] = idle

    def load(self, lazy: Mapping[int, Sequence[tuple[int, int]]]) -> State:
        """Read the state back. Raises StateMissing when it is uncertain."""
        if self.busy:
            raise StateMissing("the pager died with an event in its hands")
        active = self._page[_ACTIVE]
        size, count = self._page[_SNAPSHOT_BYTES + active], self._page[_RECORDS + active]
        data = _read_all(self._files[active], size + count * _RECORD.size)
        state = State(lazy)
        try:
            position = 0
            while position < size:
                key, vpid, length = _MEMORY.unpack_from(data, position)
                position += _MEMORY.size + length
                state.memories[key] = Memory(vpid, LazyMap.unpack(data[position - length : position]))
            for kind, *numbers in _RECORD.iter_unpack(data[size:]):
                state.apply(Record(Kind(kind), *numbers))
        except (KeyError, ValueError, struct.error) as error:
            raise StateMissing(f"the pager's ledger is damaged: {error!r}") from error
        return state

    def close(self) -> None:
        """Free its memory; for tests, a keeper needs it until it ends."""
        for fd in self._files:
            os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    position = 0
    while position < len(data):
        position += os.pwrite(fd, memoryview(data)[position:], position)


def _read_all(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.pread(fd, size - len(data), len(data))
        if not more:
            raise StateMissing("the pager's ledger is cut short")
        data += more
    return data


class HandOver(NamedTuple):
    """A descriptor that the keeper is to hold under this key."""

    key: int
    fd: int


class Close(NamedTuple):
    """The key's descriptor is needed no more."""

    key: int


class Tell(NamedTuple):
    """Something for the agent to know; an `error` is for the keeper."""

    event: dict[str, object]


Message = HandOver | Close | Tell
_KEY = struct.Struct("=cQ")
_MESSAGE_BYTES = 4096


class Link:
    """The pager's end of its line to the keeper, packets that keep their borders and order.

    A keeper that has died is no reason to stop filling: sending to it is then without effect.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def hand_over(self, key: int, fd: int) -> None:
        """Let the keeper hold `fd` too: once this returns, our death closes nothing."""
        try:
            socket.send_fds(self._socket, [_KEY.pack(b"F", key)], [fd])
        except (BrokenPipeError, ConnectionResetError):
            return

    def close(self, key: int) -> None:
        """Let the keeper close what it holds under `key`."""
        self._send(_KEY.pack(b"C", key))

    def tell(self, event: dict[str, object]) -> None:
        """Pass an event on to the agent."""
        self._send(json.dumps(event).encode()[:_MESSAGE_BYTES])

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except (BrokenPipeError, ConnectionResetError):
            return


def receive(sock: socket.socket) -> Message | None:
    """Take one message at the keeper's end; None when the pager has closed its own."""
    data, fds, _, _ = socket.recv_fds(sock, _MESSAGE_BYTES, 1)
    if not data:
        return None
    if data[:1] == b"{":
        return Tell(json.loads(data))
    kind, key = _KEY.unpack(data)
    return HandOver(key, fds[0]) if kind == b"F" else Close(key)

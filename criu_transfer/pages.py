"""Copies memory out of a running process into frames of the stream.

One buffer of 4 MiB, laid out so that a frame leaves it in one piece: the header and the table of runs are written
right before the data, wherever the table has to begin.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from criu_transfer.kernel import process_vm_readv
from criu_transfer.ranges import RangeSet
from criu_transfer.wire import (
    HEADER,
    MAX_DATA,
    MAX_RUNS,
    MAX_TABLE,
    PAGE,
    Header,
    Type,
    encode_header,
    encode_runs,
    frame,
)

HEADROOM = HEADER.size + MAX_TABLE
_ZERO_PAGE = bytes(PAGE)
_WORDS = PAGE // 8

type Run = tuple[int, int]  # address, length
type Send = Callable[[memoryview, int, int], None]
"""Takes a whole frame, the bytes of data in it, and the bytes of zero pages that it stands for."""


@dataclass(slots=True)
class Memory:
    """What the receiver has of one process.

    `ledger`: addresses whose content, as of the last scan that returned them, was sent. A page that the process has
    dropped since may stay in it: CRIU's list decides what exists. `owed`: could not be read when it was their turn.
    """

    pid: int
    number: int  # of the process in frames
    ledger: RangeSet = field(default_factory=RangeSet)
    owed: RangeSet = field(default_factory=RangeSet)


@dataclass(frozen=True, slots=True)
class CopyStats:
    """What one call sent: bytes of data, bytes of zero pages, and the ranges [start, end) that could not be read."""

    bytes: int = 0
    zero_bytes: int = 0
    owed: tuple[tuple[int, int], ...] = ()


class PageCopier:
    """Owns the buffer; one thread."""

    def __init__(self) -> None:
        self._buffer = bytearray(HEADROOM + MAX_DATA)
        self._view = memoryview(self._buffer)
        self.data = self._view[HEADROOM:]  # free for others between two calls of `copy`

    def copy(
        self, memory: Memory, ranges: Iterable[tuple[int, int]], send: Send, stop: Callable[[], bool] = lambda: False
    ) -> CopyStats:
        """Send sorted, page aligned ranges [start, end) of the process and enter them into the ledger.

        `ranges` come from a scan that protected them, so they were written since they were last sent: the ledger
        forgets what cannot be read now, and what is left when `stop` tells to end early. `send` must be done with a
        frame when it returns; when it raises, nobody knows what arrived, and the ledger is emptied. Raises ValueError
        for ranges out of order.
        """
        sent = zeros = 0
        owed = RangeSet()
        try:
            for batch in batches(ranges):
                if stop():
                    for start, end in batch:
                        owed.add(start, end)
                    continue
                runs = self._read(memory.pid, batch, owed)
                data, zero = self._sort_out_zeros(runs)
                sent += self._send_data(memory.number, data, send)
                zeros += self._send_zeros(memory.number, zero, send)
                for address, length in runs:
                    memory.ledger.add(address, address + length)
                    memory.owed.discard(address, address + length)
        except BaseException:
            memory.ledger = RangeSet()
            raise
        for start, end in owed:
            memory.ledger.discard(start, end)
            memory.owed.add(start, end)
        return CopyStats(sent, zeros, tuple(owed))

    def _read(self, pid: int, batch: list[tuple[int, int]], owed: RangeSet) -> list[Run]:
        """Fill the buffer, packed, with what of a batch can be read; the rest goes to `owed`."""
        total = sum(end - start for start, end in batch)
        if _readv(pid, self.data, batch) == total:
            return [(start, end - start) for start, end in batch]
        with closing(_Forced(pid)) as forced:
            return _read_around_holes(pid, self.data, batch, owed, forced)

    def _sort_out_zeros(self, runs: list[Run]) -> tuple[list[Run], list[Run]]:
        """Split runs into those with data, which are moved together in the buffer, and zero pages."""
        total = sum(length for _, length in runs)
        # The first word of a page tells for nearly all of them that they are no zero pages.
        words = self.data[:total].cast("Q")[::_WORDS].tolist()
        zero_pages = [
            n for n, word in enumerate(words) if not word and self._buffer.startswith(_ZERO_PAGE, HEADROOM + n * PAGE)
        ]
        if not zero_pages:
            return runs, []
        return self._split(runs, zero_pages)

    def _split(self, runs: list[Run], zero_pages: list[int]) -> tuple[list[Run], list[Run]]:
        data: list[Run] = []
        zero: list[Run] = []
        offset = kept = 0
        pending = iter([*zero_pages, MAX_RUNS + 1])
        next_zero = next(pending) * PAGE
        for address, length in runs:
            end = offset + length
            shift = address - offset
            while offset < end:
                stop = min(next_zero, end)
                if stop > offset:
                    data.append((offset + shift, stop - offset))
                    if kept != offset:
                        self.data[kept : kept + stop - offset] = self.data[offset:stop]
                    kept += stop - offset
                else:
                    stop = offset + PAGE
                    next_zero = next(pending) * PAGE
                    _append(zero, offset + shift, PAGE)
                offset = stop
        return data, zero

    def _send_data(self, number: int, runs: list[Run], send: Send) -> int:
        if not runs:
            return 0
        total = sum(length for _, length in runs)
        table = encode_runs(runs)
        head = encode_header(Header(Type.PAGES, number, len(runs), len(table) + total)) + table
        start = HEADROOM - len(head)
        self._view[start:HEADROOM] = head
        send(self._view[start : HEADROOM + total], total, 0)
        return total

    @staticmethod
    def _send_zeros(number: int, runs: list[Run], send: Send) -> int:
        if not runs:
            return 0
        total = sum(length for _, length in runs)
        send(memoryview(frame(Type.ZERO, encode_runs(runs), number=number, offset=len(runs))), 0, total)
        return total


def batches(ranges: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut sorted ranges into lists of at most 4 MiB and MAX_RUNS ranges; raises ValueError when out of order."""
    batch: list[tuple[int, int]] = []
    room, last = MAX_DATA, 0
    for start, end in ranges:
        if start < last or start >= end or (start | end) % PAGE:
            raise ValueError(f"range {start:#x}-{end:#x} is out of order or no pages")
        last = end
        position = start
        while position < end:
            stop = min(end, position + room)
            batch.append((position, stop))
            room -= stop - position
            position = stop
            if not room or len(batch) == MAX_RUNS:
                yield batch
                batch, room = [], MAX_DATA
    if batch:
        yield batch


def _append(runs: list[Run], address: int, length: int) -> None:
    if runs and sum(runs[-1]) == address:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((address, length))


def _readv(pid: int, into: memoryview, ranges: list[tuple[int, int]]) -> int:
    """Read until the first page that cannot be read, which may be the first of all; whole pages are counted."""
    try:
        done = process_vm_readv(pid, into, ranges)
    except OSError as error:
        if error.errno in {errno.EFAULT, errno.ESRCH, errno.EPERM}:  # EPERM: it is exiting and has no memory any more
            return 0
        raise
    return done - done % PAGE


class _Forced:
    """Reads through /proc/PID/mem, which also gives pages of PROT_NONE mappings (proc_pid_mem(5))."""

    def __init__(self, pid: int) -> None:
        try:
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            self._fd = -1  # it has ended: everything is owed

    def read(self, into: memoryview, address: int) -> int:
        """Read whole pages until one cannot be read; returns the bytes."""
        if self._fd < 0:
            return 0
        try:
            done = os.preadv(self._fd, [into], address)
        except OSError as error:
            if error.errno in {errno.EIO, errno.EFAULT, errno.ESRCH}:
                return 0
            raise
        return done - done % PAGE

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _read_around_holes(
    pid: int, into: memoryview, batch: list[tuple[int, int]], owed: RangeSet, forced: _Forced
) -> list[Run]:
    """Read what can be read, packed.

    Each failing step passes over twice as much as the one before, so a hole of any size costs few calls; what is
    passed over beyond its end is owed too, and comes with the next round.
    """
    runs: list[Run] = []
    todo = batch[::-1]
    skip = PAGE
    while todo:
        done = _readv(pid, into, todo[::-1])
        if not done:
            start, end = todo[-1]
            done = forced.read(into[: end - start], start)
        if done:
            into = into[done:]
            for start, end in _take(todo, done):
                _append(runs, start, end - start)
            skip = PAGE
        else:
            start, end = todo[-1]
            for passed in _take(todo, min(skip, end - start)):
                owed.add(*passed)
            skip *= 2
    return runs


def _take(todo: list[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """Take `count` bytes off the end of a reversed list of ranges."""
    while count:
        start, end = todo.pop()
        stop = min(end, start + count)
        if stop < end:
            todo.append((stop, end))
        count -= stop - start
        yield start, stop

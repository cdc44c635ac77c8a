"""Which pages of a process are still missing, and where their bytes lie."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """Missing memory: [start, end) of the process, whose bytes lie in the store from `offset` on."""

    start: int
    end: int
    offset: int


class LazyMap:
    """The missing memory of one userfaultfd, as disjoint pieces by rising address.

    A piece's offset is the address that it had when it was dumped; mremap(2) moves the piece and leaves the offset.
    Changing the middle of the list also moves its tail: microseconds for tens of thousands of pieces.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Take sorted, disjoint ranges whose bytes lie at the offset equal to their address."""
        pairs = list(ranges)
        self._starts = [start for start, _ in pairs]
        self._ends = [end for _, end in pairs]
        self._offsets = self._starts[:]

    def find(self, address: int) -> Piece | None:
        """Return the piece that `address` is in."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._ends[at]:
            return None
        return Piece(self._starts[at], self._ends[at], self._offsets[at])

    def last(self) -> Piece:
        """Return the piece with the highest address; IndexError when there is none."""
        return Piece(self._starts[-1], self._ends[-1], self._offsets[-1])

    def discard(self, start: int, end: int) -> list[Piece]:
        """Take [start, end) out and return what of it was there."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if start >= end or first >= last:
            return []
        taken = [Piece(*piece) for piece in zip(*self._slices(first, last), strict=True)]
        kept: list[Piece] = []
        head, tail = taken[0], taken[-1]
        if head.start < start:
            kept.append(Piece(head.start, start, head.offset))
            taken[0] = Piece(start, head.end, head.offset + start - head.start)
        if tail.end > end:
            kept.append(Piece(end, tail.end, tail.offset + end - tail.start))
            taken[-1] = Piece(taken[-1].start, end, taken[-1].offset)
        self._replace(first, last, kept)
        return taken

    def move(self, old: int, new: int, length: int) -> None:
        """Follow mremap(2): what was missing in [old, old + length) is missing at `new` instead.

        What was missing at the new place before is forgotten: the kernel has replaced that mapping.
        """
        moved = self.discard(old, old + length)
        self.discard(new, new + length)
        shift = new - old
        at = bisect_left(self._starts, new)
        self._replace(at, at, [Piece(start + shift, end + shift, offset) for start, end, offset in moved])

    def copy(self) -> "LazyMap":
        """Return an independent copy, as fork(2) makes one."""
        other = LazyMap()
        other._starts, other._ends, other._offsets = self._slices(0, len(self._starts))
        return other

    def offsets(self) -> list[tuple[int, int]]:
        """List the parts of the store that are still needed, in no order."""
        columns = zip(self._starts, self._ends, self._offsets, strict=True)
        return [(offset, offset + end - start) for start, end, offset in columns]

    @property
    def total(self) -> int:
        """Count the missing bytes."""
        return sum(self._ends) - sum(self._starts)

    def __iter__(self) -> Iterator[Piece]:
        return iter([Piece(*piece) for piece in zip(self._starts, self._ends, self._offsets, strict=True)])

    def __len__(self) -> int:
        """Count the pieces."""
        return len(self._starts)

    def pack(self) -> bytes:
        """Encode: all starts, all ends, all offsets, u64 each in this machine's byte order."""
        return b"".join(array("Q", numbers).tobytes() for numbers in (self._starts, self._ends, self._offsets))

    @classmethod
    def unpack(cls, data: bytes) -> "LazyMap":
        """Decode what `pack` made; raises ValueError when it cannot be that."""
        numbers = array("Q", data).tolist()
        count, rest = divmod(len(numbers), 3)
        if rest:
            raise ValueError(f"{len(numbers)} numbers are no pieces")
        made = cls()
        made._starts, made._ends, made._offsets = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
        return made

    def _slices(self, first: int, last: int) -> tuple[list[int], list[int], list[int]]:
        return self._starts[first:last], self._ends[first:last], self._offsets[first:last]

    def _replace(self, first: int, last: int, pieces: list[Piece]) -> None:
        self._starts[first:last] = [piece.start for piece in pieces]
        self._ends[first:last] = [piece.end for piece in pieces]
        self._offsets[first:last] = [piece.offset for piece in pieces]

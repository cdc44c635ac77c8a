"""Sets of addresses as sorted, disjoint, half-open ranges."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class RangeSet:
    """A set of integers kept as ranges [start, end); adjacent ranges are joined.

    Lookups cost a binary search; adding or discarding also moves the tail of the list, which for the tens of
    thousands of ranges of one process is microseconds.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Insert [start, end); raises ValueError when it is empty or backwards."""
        if start >= end:
            raise ValueError(f"empty range {start:#x}-{end:#x}")
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def discard(self, start: int, end: int) -> None:
        """Take [start, end) out; what is not there is no error."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if start >= end or first >= last:
            return
        starts, ends = [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if self._ends[last - 1] > end:
            starts.append(end)
            ends.append(self._ends[last - 1])
        self._starts[first:last] = starts
        self._ends[first:last] = ends

    def overlap(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of [start, end) that are in the set, in order."""
        for i in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            yield max(start, self._starts[i]), min(end, self._ends[i])

    def missing(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of [start, end) that are not in the set, in order."""
        for here, there in self.overlap(start, end):
            if start < here:
                yield start, here
            start = there
        if start < end:
            yield start, end

    def covers(self, start: int, end: int) -> bool:
        """Tell whether all of [start, end) is in the set."""
        return next(self.missing(start, end), None) is None

    @property
    def total(self) -> int:
        """Count the integers in the set."""
        return sum(self._ends) - sum(self._starts)

    def copy(self) -> "RangeSet":
        """Return an independent copy."""
        other = RangeSet()
        other._starts, other._ends = self._starts[:], self._ends[:]
        return other

    def __contains__(self, address: int) -> bool:
        i = bisect_right(self._starts, address) - 1
        return i >= 0 and address < self._ends[i]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __len__(self) -> int:
        """Count the ranges."""
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return "RangeSet(" + ", ".join(f"{a:#x}-{b:#x}" for a, b in self) + ")"

"""Ledgers: what a client was promised, compared with what the server has in the end. No input or output here."""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Self


@dataclass(frozen=True)
class Verdict:
    """The outcome of comparing; every field counts writes (or values), and verdicts add up.

    acknowledged: the server had answered. lost: acknowledged and not there. doubled: there more often than once.
    wrong: there, but never written so (other bytes, never sent, an order that was not). unknown: sent, and never
    answered: may be there or not, and `unknown_applied` of them are.
    """

    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    unknown: int = 0
    unknown_applied: int = 0

    @property
    def sound(self) -> bool:
        """Tell whether nothing is lost, doubled or wrong."""
        return not (self.lost or self.doubled or self.wrong)

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def compare_log(acknowledged: Collection[int], unanswered: Collection[int], found: Iterable[int]) -> Verdict:
    """Compare an append-only log of unique entries, written in the order of `acknowledged`, with what is found.

    `unanswered` were sent and never answered. Entries that are there once but after one that was acknowledged later
    count as wrong: one connection's writes are applied in its order.
    """
    promised, open_ends = set(acknowledged), set(unanswered) - set(acknowledged)
    order = list(found)
    counts = Counter(order)
    firsts = list(dict.fromkeys(entry for entry in order if entry in promised))
    wanted = [entry for entry in acknowledged if entry in counts]
    return Verdict(
        acknowledged=len(promised),
        lost=sum(entry not in counts for entry in promised),
        doubled=sum(count - 1 for count in counts.values()),
        wrong=sum(entry not in promised and entry not in open_ends for entry in counts)
        + sum(a != b for a, b in zip(firsts, wanted, strict=True)),
        unknown=len(open_ends),
        unknown_applied=sum(entry in counts for entry in open_ends),
    )


def compare_version(acknowledged: int, unanswered: int | None, found: int | None) -> Verdict:
    """Compare one value that is overwritten with rising versions; `found` is None if it is gone.

    Any older version than the acknowledged one means that an acknowledged write was lost. A value whose bytes are no
    version at all is not for this function: count it as wrong.
    """
    unknown = int(unanswered is not None)
    if found == acknowledged:
        return Verdict(acknowledged=1, unknown=unknown)
    if unanswered is not None and found == unanswered:
        return Verdict(acknowledged=1, unknown=1, unknown_applied=1)
    if found is None or found < acknowledged:
        return Verdict(acknowledged=1, lost=1, unknown=unknown)
    return Verdict(acknowledged=1, wrong=1, unknown=unknown)


@dataclass(frozen=True, order=True)
class Gap:
    """A stretch in which nothing was completed on a connection; times are seconds of the monotonic clock."""

    seconds: float
    start: float
    end: float
    connection: int


@dataclass
class GapRecorder:
    """Records the time between consecutive completed operations, per connection.

    Only the `keep` longest are kept. Call `begin` when a connection's load starts and `close` when it ends: a
    connection that completes nothing any more has a gap up to the end.
    """

    keep: int = 10
    _last: dict[int, float] = field(default_factory=dict)
    _longest: dict[int, Gap] = field(default_factory=dict)
    _top: list[Gap] = field(default_factory=list)

    def begin(self, connection: int, now: float) -> None:
        """Start measuring a connection."""
        self._last[connection] = now

    def completed(self, connection: int, now: float) -> None:
        """Note that an operation was answered."""
        gap = Gap(now - self._last[connection], self._last[connection], now, connection)
        self._last[connection] = now
        best = self._longest.get(connection)
        if best is None or gap.seconds > best.seconds:
            self._longest[connection] = gap
        if len(self._top) < self.keep:
            heapq.heappush(self._top, gap)
        elif gap.seconds > self._top[0].seconds:
            heapq.heapreplace(self._top, gap)

    def close(self, now: float) -> None:
        """End measuring, of all connections."""
        for connection in self._last:
            self.completed(connection, now)
        self._last.clear()

    def waiting(self, now: float) -> float:
        """Return for how many seconds the connection that waits longest has completed nothing."""
        return max((now - last for last in self._last.values()), default=0.0)

    @property
    def longest(self) -> Gap | None:
        """Return the longest gap of all connections."""
        return max(self._longest.values(), default=None)

    @property
    def per_connection(self) -> Mapping[int, Gap]:
        """Return each connection's longest gap."""
        return self._longest

    @property
    def top(self) -> list[Gap]:
        """Return the longest gaps, longest first."""
        return sorted(self._top, reverse=True)

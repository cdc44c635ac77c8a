"""What AWS says about the end of an instance, whichever way it is heard."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

type Kind = Literal["spot", "rebalance", "maintenance", "asg"]
# terminate, stop, hibernate: the instance ends. reboot, maintenance: it comes back, but memory or network do not last.
# advise: nothing ends yet (a rebalance recommendation).
type Action = Literal["terminate", "stop", "hibernate", "reboot", "maintenance", "advise"]


@dataclass(frozen=True, slots=True)
class Notice:
    """Say that this instance is to end, or may.

    `at` is the wall clock time of the end as AWS gave it (epoch seconds), None where AWS gives none; it may lie in the
    past: a termination that failed leaves its time behind. `since` is when AWS gave the advice (rebalance).
    `id` names the same thing in every source and every repeat, within one instance. `detail` is for people; it and
    `seen`, the wall clock time when the notice was heard in this form, take no part in comparisons.
    """

    kind: Kind
    action: Action
    at: float | None
    source: str
    id: str
    since: float | None = None
    detail: str = field(default="", compare=False)
    seen: float = field(default=0.0, compare=False)

    @property
    def past(self) -> bool:
        """Tell whether the end had already gone by when this was heard (left over, late, or a clock is wrong)."""
        return self.at is not None and self.at <= self.seen


@dataclass(frozen=True, slots=True)
class NoticeWithdrawn:
    """Say that a notice given before is no longer there; `notice` is its last form."""

    notice: Notice


type NoticeEvent = Notice | NoticeWithdrawn


class NoticeBook:
    """Turn what is there now into what is new: first sight, change, withdrawal; a repeat is nothing.

    `absences`: how many looks in a row must miss a notice before it counts as withdrawn. Two by default, for one
    wrong 404 of a loaded service must not undo a rescue.
    """

    def __init__(self, *, absences: int = 2) -> None:
        self._absences = absences
        self._current: dict[str, Notice] = {}
        self._missed: dict[str, int] = {}

    def current(self, notice_id: str) -> Notice | None:
        """Give the notice of that id as it was last heard."""
        return self._current.get(notice_id)

    def observe(self, kind: Kind, notices: Iterable[Notice]) -> list[NoticeEvent]:
        """Take all notices of one kind that are there now, give the events.

        Call it only when the kind was read with success: a failed read says nothing about what is there.
        """
        there = {notice.id: notice for notice in notices}
        events: list[NoticeEvent] = []
        for notice in there.values():
            self._missed.pop(notice.id, None)
            if self._current.get(notice.id) != notice:
                self._current[notice.id] = notice
                events.append(notice)
        gone = [notice for notice in self._current.values() if notice.kind == kind and notice.id not in there]
        for notice in gone:
            self._missed[notice.id] = self._missed.get(notice.id, 0) + 1
            if self._missed[notice.id] >= self._absences:
                del self._current[notice.id], self._missed[notice.id]
                events.append(NoticeWithdrawn(notice))
        return events

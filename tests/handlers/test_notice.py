"""First sight, repeat, change, withdrawal."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from handlers.notice import Notice, NoticeBook, NoticeWithdrawn

SPOT = Notice("spot", "terminate", 1000.0, "imds", "spot", seen=880.0)


def test_a_repeat_is_nothing() -> None:
    book = NoticeBook()
    assert book.observe("spot", [SPOT]) == [SPOT]
    assert book.observe("spot", [replace(SPOT, seen=881.0)]) == []


def test_a_change_is_told() -> None:
    book = NoticeBook()
    book.observe("spot", [SPOT])
    sooner = replace(SPOT, at=900.0)
    assert book.observe("spot", [sooner]) == [sooner]
    assert book.current("spot") == sooner


def test_withdrawal_needs_two_looks() -> None:
    book = NoticeBook()
    book.observe("spot", [SPOT])
    assert book.observe("spot", []) == []
    assert book.observe("spot", []) == [NoticeWithdrawn(SPOT)]
    assert book.observe("spot", []) == []
    assert book.observe("spot", [SPOT]) == [SPOT]


def test_an_absence_between_is_forgotten() -> None:
    book = NoticeBook()
    for there in ([SPOT], [], [SPOT], []):
        events = book.observe("spot", there)
    assert events == []


def test_kinds_do_not_withdraw_each_other() -> None:
    book = NoticeBook(absences=1)
    book.observe("spot", [SPOT])
    assert book.observe("asg", []) == []
    assert book.current("spot") == SPOT


def test_past() -> None:
    assert not SPOT.past
    assert replace(SPOT, seen=1000.0).past
    assert not replace(SPOT, at=None).past


@given(st.lists(st.sets(st.sampled_from("abc"))), st.integers(1, 3))
def test_events_alternate(looks: list[set[str]], absences: int) -> None:
    """For each id: never withdrawn unless there, never new while there."""
    book = NoticeBook(absences=absences)
    there: set[str] = set()
    for look in looks:
        for event in book.observe("maintenance", [Notice("maintenance", "stop", 1.0, "imds", name) for name in look]):
            if isinstance(event, NoticeWithdrawn):
                there.remove(event.notice.id)
            else:
                assert event.id not in there
                there.add(event.id)
        assert look <= there

"""The ledger finds every lost, doubled and foreign write, whatever else happened."""

from hypothesis import given
from hypothesis import strategies as st

from spotguard.lab.ledger import Gap, GapRecorder, Verdict, compare_log, compare_version

numbers = st.integers(1, 60)


@given(st.integers(0, 50), st.booleans(), st.data())
def test_a_server_that_kept_its_word_is_sound(count: int, open_step: bool, data: st.DataObject) -> None:
    applied = open_step and data.draw(st.booleans())
    unanswered = [count + 1] if open_step else []
    verdict = compare_log(range(1, count + 1), unanswered, range(1, count + 1 + applied))
    assert verdict.sound
    assert verdict == Verdict(acknowledged=count, unknown=open_step, unknown_applied=applied)


@given(st.sets(numbers, min_size=1), st.data())
def test_exactly_what_was_dropped_is_lost_and_what_was_repeated_is_doubled(
    written: set[int], data: st.DataObject
) -> None:
    order = sorted(written)
    dropped = data.draw(st.sets(st.sampled_from(order)))
    kept = [n for n in order if n not in dropped]
    repeated = data.draw(st.lists(st.sampled_from(kept))) if kept else []
    foreign = data.draw(st.sets(st.integers(100, 120)))
    verdict = compare_log(order, [], [*kept, *repeated, *sorted(foreign)])
    assert (verdict.lost, verdict.doubled, verdict.wrong) == (len(dropped), len(repeated), len(foreign))
    assert verdict.sound == (not dropped and not repeated and not foreign)


def test_a_lost_write_is_not_made_up_for_by_a_doubled_one() -> None:
    verdict = compare_log([1, 2, 3], [], [1, 3, 3])
    assert (verdict.lost, verdict.doubled) == (1, 1)


def test_another_order_than_the_acknowledged_one_is_wrong() -> None:
    assert compare_log([1, 2, 3], [], [1, 3, 2]).wrong == 2


@given(st.integers(0, 9), st.one_of(st.none(), st.integers(10, 12)), st.one_of(st.none(), st.integers(0, 15)))
def test_versions(acknowledged: int, unanswered: int | None, found: int | None) -> None:
    verdict = compare_version(acknowledged, unanswered, found)
    assert verdict.lost == (found is None or found < acknowledged)
    assert verdict.unknown_applied == (found is not None and found == unanswered)
    assert verdict.wrong == (found is not None and found > acknowledged and found != unanswered)


def test_verdicts_add_up() -> None:
    assert Verdict(1, 2, 3, 4, 5, 6) + Verdict(10, 20, 30, 40, 50, 60) == Verdict(11, 22, 33, 44, 55, 66)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.001, 2.0)), min_size=1, max_size=60))
def test_the_longest_gap_is_found_per_connection(steps: list[tuple[int, float]]) -> None:
    recorder = GapRecorder(keep=3)
    now, last, longest = 0.0, dict.fromkeys(range(4), 0.0), dict.fromkeys(range(4), 0.0)
    for connection in range(4):
        recorder.begin(connection, now)
    for connection, seconds in steps:
        now += seconds
        recorder.completed(connection, now)
        longest[connection] = max(longest[connection], now - last[connection])
        last[connection] = now
    waiting = max(now - at for at in last.values())
    assert recorder.waiting(now) == waiting
    recorder.close(now)
    for connection in range(4):
        longest[connection] = max(longest[connection], now - last[connection])
        assert recorder.per_connection[connection].seconds == longest[connection]
    assert recorder.longest is not None
    assert recorder.longest.seconds == max(longest.values()) == recorder.top[0].seconds
    assert recorder.top == sorted(recorder.top, reverse=True)


def test_a_connection_that_answers_no_more_has_a_gap_to_the_end() -> None:
    recorder = GapRecorder()
    recorder.begin(0, 1.0)
    recorder.completed(0, 2.0)
    recorder.close(9.0)
    assert recorder.longest == Gap(7.0, 2.0, 9.0, 0)
    assert recorder.waiting(10.0) == 0.0

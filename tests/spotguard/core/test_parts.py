"""The small parts: reading the owner store, when to freeze, the journal's record, the node."""

import contextlib
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from spotguard.core import commands as c
from spotguard.core import node
from spotguard.core.deadline import Limits, last_call, latest_safe_freeze, pause
from spotguard.core.events import Action, MoveFinished, Notice, NoticeWithdrawn, Pod, PodsListed, Rebalance
from spotguard.core.node import NodeState
from spotguard.core.ownership import (
    Found,
    Lost,
    Owner,
    OwnerRecord,
    Refused,
    Unknown,
    Unreachable,
    Verdict,
    Won,
    resolve,
)
from spotguard.core.precopy import Continue, FreezeNow, Round, TooLate, decide, throughput
from spotguard.core.state import PERSISTED, Mode, Move, Outcome, Record, RecordError, Role

LIMITS = Limits()
MOVE = Move(migration="m1", workload="shop/redis", source="node-a", target="node-b")
GIB = 1 << 30


class TestOwnership:
    @pytest.mark.parametrize("kind", [Won, Lost, Found])
    def test_only_final_owners_decide(self, kind: Any) -> None:
        def ask(side: Role, owner: Owner) -> Verdict:
            return resolve(side, kind(OwnerRecord("m1", owner, "1")), reading=kind is Found)

        assert ask(Role.SOURCE, Owner.RECLAIMED) == ask(Role.TARGET, Owner.TARGET) == Verdict.OWN
        assert ask(Role.SOURCE, Owner.TARGET) == ask(Role.TARGET, Owner.RECLAIMED) == Verdict.YIELD
        assert ask(Role.SOURCE, Owner.SOURCE) == ask(Role.TARGET, Owner.SOURCE) == Verdict.SWAP

    @pytest.mark.parametrize("side", list(Role))
    def test_no_answer_never_decides(self, side: Role) -> None:
        assert resolve(side, Unknown(), reading=False) == Verdict.READ
        for answer in (Unreachable(), Refused()):
            assert resolve(side, answer, reading=False) == resolve(side, answer, reading=True) == Verdict.LATER
        assert resolve(side, Unknown(), reading=True) == Verdict.LATER


def rounds(*written: int, sent: int = GIB, seconds: float = 1.0) -> tuple[Round, ...]:
    return tuple(Round(sent, left, seconds) for left in written)


class TestWhenToFreeze:
    def test_short_enough(self) -> None:
        assert isinstance(decide(rounds(GIB // 100), GIB // 100, 120, 2, LIMITS), FreezeNow)

    def test_not_yet(self) -> None:
        decision = decide(rounds(GIB // 2), GIB // 2, 120, 2, LIMITS)
        assert isinstance(decision, Continue)
        assert decision.deadline == pytest.approx(120 - 5 - 10 - 0.06 - 0.5)

    def test_rounds_that_do_not_shrink(self) -> None:
        assert isinstance(decide(rounds(GIB, GIB, GIB), GIB, 120, 4, LIMITS), Continue)
        decision = decide(rounds(GIB, GIB, GIB, GIB), GIB, 120, 5, LIMITS)
        assert isinstance(decision, FreezeNow)
        assert "gain" in decision.reason

    def test_rounds_that_shrink_go_on(self) -> None:
        assert isinstance(decide(rounds(8 * GIB, 7 * GIB, 6 * GIB, 5 * GIB), 5 * GIB, 120, 9, LIMITS), Continue)

    def test_no_time_for_another_round(self) -> None:
        decision = decide(rounds(10 * GIB), 10 * GIB, 120, 90, LIMITS)
        assert decision == FreezeNow("no time for another round")

    def test_too_late(self) -> None:
        assert isinstance(decide(rounds(10 * GIB), 10 * GIB, 120, 105.1, LIMITS), TooLate)
        assert isinstance(decide((), 100 * GIB, 120, 0, LIMITS), TooLate)

    def test_round_zero_is_tried_though_a_frozen_copy_would_be_long(self) -> None:
        assert isinstance(decide((), 10 * GIB, 120, 0, LIMITS), Continue)

    def test_throughput_is_that_of_the_last_rounds(self) -> None:
        assert throughput((), LIMITS) == LIMITS.assumed_throughput
        assert throughput(rounds(0, 0, 0, seconds=2.0), LIMITS) == GIB / 2
        assert throughput((*rounds(0, seconds=100.0), *rounds(0, 0, 0)), LIMITS) == GIB

    @settings(deadline=None, derandomize=True, database=None)
    @given(
        memory=st.integers(0, 2**42),
        rate=st.floats(0, 1e12),
        speed=st.floats(1e6, 1e11),
        window=st.floats(-10, 1000),
    )
    def test_every_writer_is_frozen_or_left_in_time(
        self, memory: int, rate: float, speed: float, window: float
    ) -> None:
        now, left, done = 0.0, memory, ()
        for _ in range(LIMITS.rounds_max + 1):
            decision = decide(done, left, window, now, LIMITS)
            if not isinstance(decision, Continue):
                break
            seconds = left / speed
            if now + seconds > decision.deadline:  # the round is ended there; the source freezes or leaves it
                assert decision.deadline < last_call(window, LIMITS.fixed_freeze, LIMITS)
                return
            sent, now, left = left, now + seconds, int(min(memory, rate * seconds))
            done = (*done, Round(sent, left, seconds))
        else:
            pytest.fail("goes on for ever")
        if isinstance(decision, FreezeNow):
            freeze = LIMITS.fixed_freeze + left / throughput(done, LIMITS)
            assert now + freeze + LIMITS.restore_reserve <= window + 1e-6

    def test_last_moments(self) -> None:
        assert last_call(120, 1.0, LIMITS) == 114
        assert latest_safe_freeze(120, 1.0, LIMITS) == 104

    def test_pauses_grow_up_to_a_bound(self) -> None:
        pauses = [pause(n, LIMITS) for n in range(20)]
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (LIMITS.pause_min, LIMITS.pause_max)


RECORDS = st.builds(
    lambda role, pick, mode, deadline, version, outcome, reason: Record(
        role, MOVE, sorted(PERSISTED[role])[pick % len(PERSISTED[role])], mode, deadline, version, outcome, reason
    ),
    st.sampled_from(Role),
    st.integers(0, 9),
    st.sampled_from(Mode),
    st.floats(0, 1e9),
    st.text(max_size=10),
    st.none() | st.sampled_from(Outcome),
    st.text(max_size=50),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class TestRecord:
    @settings(deadline=None, derandomize=True, database=None)
    @given(record=RECORDS)
    def test_survives_the_journal(self, record: Record) -> None:
        assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record

    @settings(deadline=None, derandomize=True, database=None, max_examples=300)
    @given(record=RECORDS, name=st.sampled_from([*Record.__slots__, "format", "new"]), junk=JUNK, drop=st.booleans())
    def test_anything_else_is_refused(self, record: Record, name: str, junk: Any, drop: bool) -> None:
        raw = record.to_json()
        if drop:
            raw.pop(name, None)
        else:
            raw[name] = junk
        with contextlib.suppress(RecordError):
            assert Record.from_json(raw).to_json() == raw

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("format", 2),
            ("format", True),
            ("phase", "restoring"),
            ("phase", "taking"),
            ("deadline", float("nan")),
            ("deadline", 10**400),
            ("deadline", True),
            ("version", 1),
            ("outcome", "fine"),
            ("mode", "fast"),
            ("move", {"migration": "m1", "workload": "w", "source": "a"}),
            ("move", {"migration": "../m1", "workload": "w", "source": "a", "target": "b"}),
            ("move", {"migration": "m1", "workload": "a/../b", "source": "a", "target": "b"}),
        ],
    )
    def test_wrong_values(self, name: str, value: Any) -> None:
        raw = Record(Role.SOURCE, MOVE, "dumping", Mode.LIVE, 1.0, "1").to_json()
        assert Record.from_json(raw)
        with pytest.raises(RecordError):
            Record.from_json(raw | {name: value})

    @pytest.mark.parametrize("raw", [{}, [], None, "x", 1])
    def test_not_even_a_record(self, raw: Any) -> None:
        with pytest.raises(RecordError):
            Record.from_json(raw)


PODS = (
    Pod("big", "b", memory_bytes=9),
    Pod("small", "b", memory_bytes=1),
    Pod("dear", "b", memory_bytes=99, priority=1),
)


def play(*events: Any, parallel: int = 1) -> tuple[NodeState, tuple[c.Command, ...]]:
    state, out = NodeState(parallel=parallel), ()
    for event in events:
        state, out = node.step(state, event)
    return state, tuple(command for command in out if not isinstance(command, c.Note))


NOTICE = Notice(0, Action.TERMINATE, 120.0)


def started(out: tuple[c.Command, ...]) -> list[str]:
    return [command.workload for command in out if isinstance(command, c.StartMove)]


class TestNode:
    def test_a_notice_cordons_and_moves_one_after_another(self) -> None:
        assert play(NOTICE)[1] == (c.Cordon(), c.ListPods())
        assert play(NOTICE, PodsListed(0, PODS))[1] == (c.StartMove("dear", "b", 120.0, Mode.LIVE),)
        after_one = (NOTICE, PodsListed(0, PODS), MoveFinished(9, "dear", Outcome.MOVED))
        assert started(play(*after_one)[1]) == ["small"]
        assert started(play(*after_one, MoveFinished(9, "small", Outcome.ROLLED_BACK))[1]) == ["big"]

    def test_side_by_side(self) -> None:
        assert started(play(NOTICE, PodsListed(0, PODS), parallel=2)[1]) == ["dear", "small"]

    @pytest.mark.parametrize("again", [NOTICE, Notice(5, Action.TERMINATE, 120.0), Notice(5, Action.STOP, 125.0)])
    def test_repeats_and_later_times_change_nothing(self, again: Notice) -> None:
        state, out = play(NOTICE, PodsListed(0, PODS), again)
        assert out == ()
        assert state.notice == NOTICE

    def test_a_list_twice_starts_nothing_twice(self) -> None:
        assert started(play(NOTICE, PodsListed(0, PODS), PodsListed(0, PODS), parallel=9)[1]) == []

    def test_a_nearer_deadline_reaches_what_moves_and_what_waits(self) -> None:
        nearer = (NOTICE, PodsListed(0, PODS), Notice(5, Action.TERMINATE, 60.0))
        assert play(*nearer)[1] == (c.TightenMove("dear", 60.0),)
        assert play(*nearer, MoveFinished(9, "dear", Outcome.MOVED))[1] == (c.StartMove("small", "b", 60.0, Mode.LIVE),)

    def test_a_past_time_is_no_notice(self) -> None:
        state, out = play(Notice(10, Action.TERMINATE, 9.0))
        assert (state.notice, out) == (None, ())

    def test_a_new_notice_after_one_that_came_to_nothing(self) -> None:
        assert play(NOTICE, Notice(130, Action.STOP, 250.0))[1] == (c.Cordon(), c.ListPods())

    def test_hibernation_waits_for_nothing(self) -> None:
        state, out = play(Notice(0, Action.HIBERNATE, 120.0), PodsListed(0, PODS))
        assert started(out) == ["dear", "small", "big"]
        assert all(x.mode == Mode.STOP_AND_COPY and x.deadline == 15.0 for x in out if isinstance(x, c.StartMove))
        assert state.waiting == ()

    def test_withdrawn_stops_what_waits_and_tells_what_moves(self) -> None:
        state, out = play(NOTICE, PodsListed(0, PODS), NoticeWithdrawn(9))
        assert out == (c.WithdrawMove("dear"), c.Uncordon())
        assert node.step(state, MoveFinished(9, "dear", Outcome.ROLLED_BACK))[0].waiting == ()

    def test_a_rebalance_only_cordons_and_is_undone(self) -> None:
        assert play(Rebalance(0))[1] == (c.Cordon(),)
        assert play(Rebalance(0), Rebalance(1))[1] == ()
        assert play(Rebalance(0), NoticeWithdrawn(2))[1] == (c.Uncordon(),)

    def test_what_fits_nothing_changes_nothing(self) -> None:
        for event in (PodsListed(0, PODS), MoveFinished(0, "x", Outcome.MOVED), NoticeWithdrawn(0)):
            assert play(event) == (NodeState(), ())

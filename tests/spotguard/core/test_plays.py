"""Main paths as plays: `>> event`, `<< commands`."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from spotguard.core import commands as c
from spotguard.core import source, target
from spotguard.core.events import (
    AbortRequested,
    AgentRestarted,
    Checked,
    DeadlineMoved,
    Done,
    Failed,
    FailureKind,
    NoticeWithdrawn,
    Offered,
    OwnerAnswer,
    PagerDied,
    RestoreRequested,
    RoundCopied,
    StartMigration,
    StateComplete,
    StreamLost,
    TargetAnswered,
    TimeReached,
)
from spotguard.core.ownership import Found, Lost, Owner, OwnerRecord, Unknown, Unreachable, Won
from spotguard.core.source import SourceState
from spotguard.core.state import Mode, Move, Outcome, Record, Role
from spotguard.core.target import TargetState

MOVE = Move(migration="m1", workload="shop/redis", source="node-a", target="node-b")
END = 120.0


@dataclass
class Play:
    """Feed events with `>>`, expect the commands since then with `<<` (names; notes and timers left out)."""

    machine: Any
    state: Any
    out: list[c.Command] = field(default_factory=list)

    def __rshift__(self, event: Any) -> "Play":
        self.out = []
        self.state, commands = self.machine.step(self.state, event)
        self.out = list(commands)
        return self

    def __lshift__(self, names: str) -> "Play":
        assert [command.name for command in self.out if not isinstance(command, c.Note | c.Wake)] == names.split()
        return self

    def last(self, kind: type[c.Command]) -> Any:
        return next(command for command in self.out if isinstance(command, kind))


def source_play() -> Play:
    return Play(source, SourceState())


def target_play() -> Play:
    return Play(target, TargetState())


def owner(command: type[c.Command], answer: type, who: Owner, version: str = "2") -> OwnerAnswer:
    return OwnerAnswer(0, command.__name__, answer(OwnerRecord("m1", who, version)))


def failed(command: str, kind: FailureKind = FailureKind.GIVE_UP) -> Failed:
    return Failed(0, command, kind, "it broke")


CREATED = owner(c.CreateOwnership, Won, Owner.SOURCE, "1")
RECLAIMED = owner(c.ReclaimOwnership, Won, Owner.RECLAIMED)
OFFERED_STILL_SOURCE = owner(c.ReadOwnership, Found, Owner.SOURCE, "1")
TAKEN = owner(c.TakeOwnership, Won, Owner.TARGET)


def round_copied(number: int, left: int) -> RoundCopied:
    return RoundCopied(0, number, sent_bytes=10**9, written_bytes=left, seconds=1.0)


def up_to_offer(mode: Mode = Mode.LIVE) -> Play:
    play = source_play()
    play >> StartMigration(0, MOVE, END, mode) << "Preflight"
    play >> Checked(0, movable=True, memory_bytes=10**9) << "Persist CreateOwnership"
    play >> CREATED << "OfferTarget"
    return play


def up_to_precopy() -> Play:
    play = up_to_offer()
    play >> Done(0, "OfferTarget") << "AttachTracker"
    play >> Done(0, "AttachTracker") << "CopyRound"
    return play


def up_to_dump() -> Play:
    play = up_to_precopy()
    play >> round_copied(0, 10**8) << "CopyRound"
    play >> round_copied(1, 10**6) << "Persist HoldNetwork"
    play >> Done(0, "HoldNetwork") << "FreezeProcesses"
    play >> Done(0, "FreezeProcesses") << "Persist DumpAndSend"
    return play


def up_to_restore() -> Play:
    return up_to_dump() >> Done(0, "DumpAndSend") << "RequestRestore"


def roll_back(play: Play) -> None:
    """From the verdict on."""
    play << "VerifySound"
    play >> Done(0, "VerifySound") << "Persist ReleaseNetwork"
    undo(play)


def undo(play: Play) -> None:
    play >> Done(0, "ReleaseNetwork") << "ThawProcesses"
    play >> Done(0, "ThawProcesses") << "DetachTracker"
    clean(play, Outcome.ROLLED_BACK)


def clean(play: Play, outcome: Outcome) -> None:
    play >> Done(0, "DetachTracker") << "AbortTarget"
    play >> Done(0, "AbortTarget") << "CleanUp"
    play >> Done(0, "CleanUp") << "Persist Finished"
    assert play.last(c.Finished).outcome == outcome


def hand_over(play: Play, outcome: Outcome = Outcome.MOVED) -> None:
    play << "ForwardFrames"
    play >> Done(0, "ForwardFrames") << "Persist DestroySource"
    play >> Done(0, "DestroySource") << "CleanUp"
    play >> Done(0, "CleanUp") << "Persist Finished"
    assert play.last(c.Finished).outcome == outcome


class TestSource:
    def test_moves_live(self) -> None:
        play = up_to_restore()
        play >> TargetAnswered(0, resumed=True) << "ReadOwnership"
        play >> owner(c.ReadOwnership, Found, Owner.TARGET)
        hand_over(play)

    def test_what_cannot_be_moved_is_not_touched(self) -> None:
        play = source_play()
        play >> StartMigration(0, MOVE, END) << "Preflight"
        play >> Checked(0, movable=False, reasons=("has an io_uring",)) << "Finished"
        assert play.last(c.Finished) == c.Finished(Outcome.UNMOVABLE, "has an io_uring")

    def test_no_deltas_leads_to_stop_and_copy(self) -> None:
        play = source_play()
        play >> StartMigration(0, MOVE, END) << "Preflight"
        play >> Checked(0, movable=True, deltas=False, delta_reason="O_DIRECT") << "Persist CreateOwnership"
        play >> CREATED << "OfferTarget"
        play >> Done(0, "OfferTarget") << "Persist HoldNetwork"
        play >> Done(0, "HoldNetwork") << "FreezeProcesses"
        play >> Done(0, "FreezeProcesses") << "Persist DumpAndSend"
        assert play.last(c.DumpAndSend).mode == Mode.STOP_AND_COPY
        play >> Done(0, "DumpAndSend") << "RequestRestore"
        play >> TargetAnswered(0, resumed=True) << "ReadOwnership"
        play >> owner(c.ReadOwnership, Found, Owner.TARGET)
        hand_over(play, Outcome.MOVED_BY_STOP_AND_COPY)

    @pytest.mark.parametrize("command", ["AttachTracker", "CopyRound"])
    def test_lost_tracking_leads_to_stop_and_copy(self, command: str) -> None:
        play = up_to_offer() >> Done(0, "OfferTarget")
        if command == "CopyRound":
            play >> Done(0, "AttachTracker")
        play >> failed(command, FailureKind.TRACKER_UNAVAILABLE) << "Persist HoldNetwork"
        assert play.state.mode == Mode.STOP_AND_COPY

    @pytest.mark.parametrize("command", ["OfferTarget", "AttachTracker", "CopyRound"])
    def test_an_error_before_the_hold_touches_nothing(self, command: str) -> None:
        play = up_to_offer()
        while play.out[-1].name != command:
            play >> Done(0, play.out[-1].name)
        play >> failed(command) << "DetachTracker"
        clean(play, Outcome.ROLLED_BACK)

    def test_without_an_owner_record_nothing_begins(self) -> None:
        play = source_play() >> StartMigration(0, MOVE, END) >> Checked(0, movable=True)
        play >> OwnerAnswer(0, "CreateOwnership", Unknown()) << "DetachTracker"
        clean(play, Outcome.ROLLED_BACK)

    @pytest.mark.parametrize("command", ["HoldNetwork", "FreezeProcesses"])
    def test_before_the_dump_thawing_asks_no_one(self, command: str) -> None:
        play = up_to_precopy() >> round_copied(0, 0)
        if command == "FreezeProcesses":
            play >> Done(0, "HoldNetwork")
        play >> failed(command) << "ReleaseNetwork"
        undo(play)

    def test_a_failed_dump_is_reclaimed_and_verified(self) -> None:
        play = up_to_dump()
        play >> failed("DumpAndSend") << "StayFrozen"
        play >> Done(0, "StayFrozen") << "ReclaimOwnership"
        assert play.last(c.ReclaimOwnership).version == "1"
        play >> RECLAIMED
        roll_back(play)

    def test_a_process_that_is_not_sound_is_killed(self) -> None:
        play = up_to_dump() >> failed("DumpAndSend") >> Done(0, "StayFrozen") >> RECLAIMED << "VerifySound"
        play >> failed("VerifySound") << "Persist DestroySource"
        play >> Done(0, "DestroySource") << "CleanUp"
        play >> Done(0, "CleanUp") << "Persist Finished"
        assert play.last(c.Finished).outcome == Outcome.LOST

    @pytest.mark.parametrize(
        "answer", [TargetAnswered(0, resumed=False), failed("RequestRestore", FailureKind.AMBIGUOUS)]
    )
    def test_no_restore_is_reclaimed(self, answer: Any) -> None:
        play = up_to_restore() >> answer << "ReclaimOwnership"
        play >> RECLAIMED
        roll_back(play)

    def test_losing_the_swap_destroys(self) -> None:
        play = up_to_restore() >> failed("RequestRestore") << "ReclaimOwnership"
        play >> owner(c.ReclaimOwnership, Lost, Owner.TARGET)
        hand_over(play)

    def test_an_unknown_swap_is_read_and_repeated_until_it_is_certain(self) -> None:
        play = up_to_restore() >> failed("RequestRestore") << "ReclaimOwnership"
        play >> OwnerAnswer(0, "ReclaimOwnership", Unknown()) << "ReadOwnership"
        play >> OwnerAnswer(0, "ReadOwnership", Unreachable()) << ""
        first = play.last(c.Wake)
        play >> TimeReached(first.at, first.tag) << "ReadOwnership"
        play >> OwnerAnswer(0, "ReadOwnership", Unreachable()) << ""
        assert play.last(c.Wake).at > first.at
        play >> TimeReached(0, play.last(c.Wake).tag) << "ReadOwnership"
        play >> owner(c.ReadOwnership, Found, Owner.SOURCE, "7") << "ReclaimOwnership"
        assert play.last(c.ReclaimOwnership).version == "7"
        play >> owner(c.ReclaimOwnership, Lost, Owner.RECLAIMED)  # the first swap had arrived
        roll_back(play)

    def test_withdrawn_in_precopy_ends_the_round_first(self) -> None:
        play = up_to_precopy() >> NoticeWithdrawn(0) << "Cancel"
        play >> round_copied(0, 10**8) << "DetachTracker"
        clean(play, Outcome.ROLLED_BACK)

    def test_withdrawn_when_frozen_changes_nothing(self) -> None:
        up_to_dump() >> NoticeWithdrawn(0) << ""

    def test_a_nearer_deadline_ends_the_round_in_time(self) -> None:
        play = up_to_precopy() >> DeadlineMoved(1, 60.0) << ""
        wake = play.last(c.Wake)
        assert 0 < wake.at < 60
        play >> TimeReached(wake.at, wake.tag) << "Cancel"
        play >> failed("CopyRound", FailureKind.CANCELLED) << "Persist HoldNetwork"

    def test_a_later_deadline_changes_nothing(self) -> None:
        play = up_to_precopy() >> DeadlineMoved(1, 500.0) << ""
        assert play.state.deadline == END

    def test_no_time_left_leaves_it_to_eviction(self) -> None:
        source_play() >> StartMigration(118, MOVE, END) << "Finished"
        play = up_to_precopy() >> RoundCopied(118, 0, 10**9, 10**8, 1.0) << "DetachTracker"
        clean(play, Outcome.LEFT_TO_EVICTION)

    def test_a_late_round_is_not_waited_for(self) -> None:
        play = up_to_precopy() >> Failed(119, "CopyRound", FailureKind.DEADLINE, "late") << "DetachTracker"
        clean(play, Outcome.LEFT_TO_EVICTION)

    @pytest.mark.parametrize(
        ("phase", "first"),
        [
            ("registering", "DetachTracker"),
            ("holding", "ReleaseNetwork"),
            ("dumping", "StayFrozen"),
            ("releasing", "Persist ReleaseNetwork"),
            ("destroying", "Persist DestroySource"),
            ("done", "Finished"),
        ],
    )
    def test_restarts_from_the_journal(self, phase: str, first: str) -> None:
        outcome = Outcome.MOVED if phase in {"destroying", "done"} else None
        outcome = Outcome.ROLLED_BACK if phase == "releasing" else outcome
        kept = Record(Role.SOURCE, MOVE, phase, Mode.LIVE, END, "1", outcome)
        source_play() >> AgentRestarted(0, Record.from_json(kept.to_json())) << first

    def test_a_journal_that_cannot_be_written_stops_it_before_the_dump(self) -> None:
        play = up_to_dump() >> failed("Persist") << "ReleaseNetwork"
        undo(play)

    def test_late_and_repeated_results_change_nothing(self) -> None:
        play = up_to_restore()
        before = play.state
        for event in (Done(0, "HoldNetwork"), failed("CopyRound"), CREATED, round_copied(1, 0), TimeReached(0, "x")):
            play >> event << ""
            assert play.state == before


def up_to_receiving() -> Play:
    play = target_play()
    play >> Offered(0, MOVE, END, "1") << "ReadOwnership"
    play >> OFFERED_STILL_SOURCE << "Persist PrepareSandbox"
    play >> Done(0, "PrepareSandbox") << "AnswerOffer"
    assert play.last(c.AnswerOffer).accepted
    return play


def up_to_taking() -> Play:
    play = up_to_receiving()
    play >> StateComplete(0) << ""
    play >> RestoreRequested(0, 20.0) << "RestoreProcesses"
    play >> Done(0, "RestoreProcesses") << "KeepPager"
    play >> Done(0, "KeepPager") << "Persist TakeOwnership"
    return play


def resume(play: Play) -> None:
    play << "Persist MoveRoute"
    play >> Done(0, "MoveRoute") << "ReleaseNetwork"
    play >> Done(0, "ReleaseNetwork") << "ThawProcesses"
    play >> Done(0, "ThawProcesses") << "AnswerSource AwaitFill"
    assert play.last(c.AnswerSource).resumed
    play >> Done(0, "AwaitFill") << "CleanUp"
    play >> Done(0, "CleanUp") << "Persist Finished"
    assert play.last(c.Finished).outcome == Outcome.RESUMED


def destroy(play: Play, outcome: Outcome = Outcome.DESTROYED) -> None:
    play << "AnswerSource DestroyRestored"
    assert not play.last(c.AnswerSource).resumed
    play >> Done(0, "DestroyRestored") << "CleanUp"
    play >> Done(0, "CleanUp") << "Persist Finished"
    assert play.last(c.Finished).outcome == outcome


class TestTarget:
    def test_takes_over(self) -> None:
        resume(up_to_taking() >> TAKEN)

    def test_either_order_of_state_and_request(self) -> None:
        play = up_to_receiving() >> RestoreRequested(0, 20.0) << ""
        play >> StateComplete(0) << "RestoreProcesses"

    def test_a_refused_offer_leaves_nothing(self) -> None:
        play = target_play() >> Offered(0, MOVE, END, "1") >> OFFERED_STILL_SOURCE >> failed("PrepareSandbox")
        play << "AnswerOffer AnswerSource DestroyRestored"
        assert not play.last(c.AnswerOffer).accepted

    @pytest.mark.parametrize(
        "answer",
        [
            owner(c.ReadOwnership, Found, Owner.TARGET),
            owner(c.ReadOwnership, Found, Owner.RECLAIMED),
            OwnerAnswer(0, "ReadOwnership", Unreachable()),
        ],
    )
    def test_an_offer_whose_move_is_over_touches_nothing(self, answer: OwnerAnswer) -> None:
        play = target_play() >> Offered(0, MOVE, END, "1") >> answer << "AnswerOffer Finished"
        assert not play.last(c.AnswerOffer).accepted
        assert play.last(c.Finished).outcome == Outcome.REFUSED

    def test_repeated_offers(self) -> None:
        other = Move(migration="m2", workload="shop/redis", source="node-a", target="node-b")
        play = up_to_receiving() >> Offered(0, MOVE, END, "1") << "AnswerOffer"
        assert play.last(c.AnswerOffer).accepted
        play >> Offered(0, other, END, "1") << "AnswerOffer"
        assert not play.last(c.AnswerOffer).accepted

    def test_losing_the_swap_destroys_mute(self) -> None:
        destroy(up_to_taking() >> owner(c.TakeOwnership, Lost, Owner.RECLAIMED))

    def test_an_unknown_swap_is_read_and_obeyed(self) -> None:
        play = up_to_taking() >> OwnerAnswer(0, "TakeOwnership", Unknown()) << "ReadOwnership"
        resume(play >> owner(c.ReadOwnership, Found, Owner.TARGET))

    def test_source_read_after_an_unknown_swap_is_not_final(self) -> None:
        play = up_to_taking() >> OwnerAnswer(0, "TakeOwnership", Unknown()) << "ReadOwnership"
        play >> owner(c.ReadOwnership, Found, Owner.SOURCE, "9") << "TakeOwnership"
        assert play.last(c.TakeOwnership).version == "9"
        resume(play >> owner(c.TakeOwnership, Lost, Owner.TARGET))  # the first one had arrived

    def test_an_abort_waits_for_the_verdict(self) -> None:
        play = up_to_taking() >> AbortRequested(0, "stop") << ""
        resume(play >> TAKEN)

    def test_an_abort_while_restoring_waits_for_its_end(self) -> None:
        play = up_to_receiving() >> StateComplete(0) >> RestoreRequested(0, 20.0) << "RestoreProcesses"
        play >> AbortRequested(0, "stop") << "Cancel"
        destroy(play >> Done(0, "RestoreProcesses"))

    @pytest.mark.parametrize(
        "event", [AbortRequested(0, "stop"), StreamLost(0, "reset"), TimeReached(0, target.OFFER_TAG)]
    )
    def test_what_nobody_wants_is_destroyed(self, event: Any) -> None:
        destroy(up_to_receiving() >> event)

    def test_a_stream_that_ends_after_the_last_byte_is_no_loss(self) -> None:
        up_to_receiving() >> StateComplete(0) >> StreamLost(0, "closed") << ""

    def test_a_damaged_copy_never_swaps(self) -> None:
        play = up_to_taking() >> PagerDied(0, "killed") << "AnswerSource"
        play >> OwnerAnswer(0, "TakeOwnership", Unreachable()) << ""
        play >> TimeReached(0, play.last(c.Wake).tag) << "ReadOwnership"
        play >> owner(c.ReadOwnership, Found, Owner.SOURCE) << ""
        play >> TimeReached(0, play.last(c.Wake).tag) << "ReadOwnership"
        destroy(play >> owner(c.ReadOwnership, Found, Owner.RECLAIMED))

    def test_a_damaged_copy_that_owns_is_lost(self) -> None:
        play = up_to_taking() >> PagerDied(0, "killed") << "AnswerSource"
        destroy(play >> TAKEN, Outcome.LOST)

    def test_a_pager_that_dies_during_the_look_counts(self) -> None:
        play = target_play() >> AgentRestarted(0, Record(Role.TARGET, MOVE, "routing", Mode.LIVE, END, "1"))
        play >> PagerDied(0, "killed") << "AnswerSource"
        destroy(play >> Done(0, "VerifySound"), Outcome.LOST)

    def test_a_copy_that_could_not_be_verified_but_owns_is_looked_at_again(self) -> None:
        play = target_play() >> AgentRestarted(0, Record(Role.TARGET, MOVE, "taking", Mode.LIVE, END, "1"))
        while play.state.phase == "verifying":
            play >> failed("VerifySound", FailureKind.DEADLINE)
            if play.state.wake:
                play >> TimeReached(0, play.state.wake)
        play << "ReadOwnership"
        play >> owner(c.ReadOwnership, Found, Owner.TARGET) << "VerifySound"
        resume(play >> Done(0, "VerifySound"))

    def test_a_pager_that_dies_while_filling_is_a_loss(self) -> None:
        play = up_to_taking() >> TAKEN >> Done(0, "MoveRoute") >> Done(0, "ReleaseNetwork") >> Done(0, "ThawProcesses")
        play >> PagerDied(0, "killed") << "Cancel AnswerSource DestroyRestored"
        play >> failed("AwaitFill", FailureKind.CANCELLED) << ""
        play >> Done(0, "DestroyRestored") << "CleanUp"
        assert play.state.outcome == Outcome.LOST

    def test_restart_before_the_swap_destroys(self) -> None:
        kept = Record(Role.TARGET, MOVE, "preparing", Mode.LIVE, END, "1")
        destroy(target_play() >> AgentRestarted(0, kept))

    def test_restart_at_the_swap_reads_and_obeys(self) -> None:
        kept = Record(Role.TARGET, MOVE, "taking", Mode.LIVE, END, "1")
        play = target_play() >> AgentRestarted(0, kept) << "VerifySound"
        play >> Done(0, "VerifySound") << "ReadOwnership"
        resume(play >> owner(c.ReadOwnership, Found, Owner.TARGET))

    def test_restart_as_owner_goes_on(self) -> None:
        kept = Record(Role.TARGET, MOVE, "routing", Mode.LIVE, END, "1")
        play = target_play() >> AgentRestarted(0, kept) << "VerifySound"
        resume(play >> Done(0, "VerifySound"))

    def test_a_route_that_does_not_move_does_not_keep_it_frozen(self) -> None:
        play = up_to_taking() >> TAKEN
        while play.state.phase == "routing":
            play >> failed("MoveRoute")
            if play.state.phase == "routing":
                play >> TimeReached(0, play.last(c.Wake).tag) << "MoveRoute"
        play << "ReleaseNetwork"

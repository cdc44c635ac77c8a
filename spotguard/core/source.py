"""The source's machine: one workload on its way out.

The rule on which at-most-one rests, and why it is enough:

1. The target can restore only what END completed, and END is sent only by DumpAndSend. `Persist(DUMPING)` stands
   before DumpAndSend. So as long as DumpAndSend was never commanded (in the journal: an earlier phase) no other copy
   can ever run, and the source is thawed without asking anyone.
2. From DumpAndSend on, the source is thawed only on a verdict OWN: the record was won as, or read as, `reclaimed`.
   The record changes once; so the target's swap has failed or will fail, and the target thaws only when it has won.
   A dump that fails half-way, a lost acknowledgement, a lost answer and a restart of the agent are all treated alike:
   hold and freeze again (StayFrozen), swap, obey. No answer: stay frozen and mute, and ask again, for ever.
3. On a verdict YIELD the source is only destroyed. Its network stays held to the end.

Order of the way back: verify, release, thaw. Released first, the kernel acknowledges the kept frames at once and the
process finds its input, and an open way out, in its first instant; thawed first, it would talk into the hold and wait
for TCP's retransmission timer. Nothing can be lost between the two: the workload is ours for good by then, and a crash
there repeats both.

A result that is not the awaited one (late, repeated) changes nothing.
"""

from dataclasses import dataclass, field, replace
from typing import assert_never

from spotguard.core import commands as c
from spotguard.core.deadline import ATTEMPTS_MAX, Limits, last_call, latest_safe_freeze, pause, predicted_freeze
from spotguard.core.events import (
    AgentRestarted,
    Checked,
    DeadlineMoved,
    Done,
    Failed,
    FailureKind,
    NoticeWithdrawn,
    OwnerAnswer,
    Result,
    RoundCopied,
    SourceEvent,
    StartMigration,
    TargetAnswered,
    TimeReached,
)
from spotguard.core.ownership import Found, Lost, Owner, Verdict, Won, resolve
from spotguard.core.precopy import Continue, FreezeNow, Round, TooLate, decide, throughput
from spotguard.core.state import NOBODY, PERSISTED, Mode, Move, Outcome, Record, Role, SourcePhase

P = SourcePhase
Step = tuple["SourceState", tuple[c.Command, ...]]

# The command whose result each phase waits for.
AWAITS: dict[SourcePhase, type[c.Timed]] = {
    P.CHECKING: c.Preflight,
    P.REGISTERING: c.CreateOwnership,
    P.OFFERING: c.OfferTarget,
    P.ATTACHING: c.AttachTracker,
    P.PRECOPY: c.CopyRound,
    P.HOLDING: c.HoldNetwork,
    P.FREEZING: c.FreezeProcesses,
    P.DUMPING: c.DumpAndSend,
    P.RESTORING: c.RequestRestore,
    P.SECURING: c.StayFrozen,
    P.RECLAIMING: c.ReclaimOwnership,
    P.READING_OWNER: c.ReadOwnership,
    P.VERIFYING: c.VerifySound,
    P.RELEASING: c.ReleaseNetwork,
    P.THAWING: c.ThawProcesses,
    P.DETACHING: c.DetachTracker,
    P.ABORTING: c.AbortTarget,
    P.FORWARDING: c.ForwardFrames,
    P.DESTROYING: c.DestroySource,
    P.CLEANING: c.CleanUp,
}

# Where plain success leads. Phases with a choice are in `_succeeded`.
NEXT: dict[SourcePhase, SourcePhase] = {
    P.HOLDING: P.FREEZING,
    P.FREEZING: P.DUMPING,
    P.DUMPING: P.RESTORING,
    P.SECURING: P.RECLAIMING,
    P.VERIFYING: P.RELEASING,
    P.RELEASING: P.THAWING,
    P.THAWING: P.DETACHING,
    P.DETACHING: P.ABORTING,
    P.ABORTING: P.CLEANING,
    P.FORWARDING: P.DESTROYING,
    P.DESTROYING: P.CLEANING,
    P.CLEANING: P.DONE,
}

# Where a failure leads, for phases where it needs no thought.
ON_FAILURE: dict[SourcePhase, SourcePhase] = {
    P.REGISTERING: P.DETACHING,
    P.OFFERING: P.DETACHING,
    P.ATTACHING: P.DETACHING,
    P.PRECOPY: P.DETACHING,
    P.HOLDING: P.RELEASING,
    P.FREEZING: P.RELEASING,
    P.DUMPING: P.SECURING,
    P.RESTORING: P.RECLAIMING,
    P.SECURING: P.RECLAIMING,  # the swap is safe in any case, and more urgent
    P.DETACHING: P.ABORTING,
    P.ABORTING: P.CLEANING,
    P.FORWARDING: P.DESTROYING,
}

# Where a restarted agent goes on, by the phase in its journal.
RESUMES_AT: dict[SourcePhase, SourcePhase] = {
    P.REGISTERING: P.DETACHING,
    P.HOLDING: P.RELEASING,
    P.DUMPING: P.SECURING,
    P.RELEASING: P.RELEASING,
    P.DESTROYING: P.DESTROYING,
    P.DONE: P.DONE,
}

UNTOUCHED = frozenset({P.CHECKING, P.REGISTERING, P.OFFERING, P.ATTACHING, P.PRECOPY})  # it runs as if nothing were


@dataclass(frozen=True, slots=True)
class SourceState:
    """All that the machine knows. `wake`: the tag that is waited for before the phase's command is given again."""

    limits: Limits = field(default_factory=Limits)
    phase: SourcePhase = P.NEW
    move: Move = NOBODY
    mode: Mode = Mode.LIVE
    deadline: float = 0.0
    memory_bytes: int = 0
    rounds: tuple[Round, ...] = ()
    round_deadline: float = 0.0
    version: str = ""  # the owner record's, as last seen
    outcome: Outcome | None = None  # set as soon as the end is certain
    reason: str = ""
    attempts: int = 0
    wake: str | None = None


def step(state: SourceState, event: SourceEvent) -> Step:
    """Give the next state and what to do. Never raises; what does not fit the state is noted and changes nothing."""
    match event:
        case StartMigration():
            after = _start(state, event)
        case AgentRestarted():
            after = _restart(state, event)
        case DeadlineMoved():
            after = _tighten(state, event)
        case NoticeWithdrawn():
            after = _withdraw(state)
        case TimeReached():
            after = _woken(state, event)
        case Done() | Failed() | Checked() | RoundCopied() | TargetAnswered() | OwnerAnswer():
            after = _result(state, event)
        case _:
            assert_never(event)
    return after


def record(state: SourceState) -> Record:
    """Return what a restarted agent would have to know of this state."""
    return Record(
        role=Role.SOURCE,
        move=state.move,
        phase=state.phase,
        mode=state.mode,
        deadline=state.deadline,
        version=state.version,
        outcome=state.outcome,
        reason=state.reason,
    )


# --- events that come by themselves ---------------------------------------------------------------------------------


def _start(state: SourceState, event: StartMigration) -> Step:
    if state.phase != P.NEW:
        return _ignore(state, event)
    begun = replace(state, move=event.move, deadline=event.deadline, mode=event.mode)
    if event.now > last_call(event.deadline, state.limits.fixed_freeze, state.limits):
        return _finish(begun, Outcome.LEFT_TO_EVICTION, "no time left")
    return _enter(begun, P.CHECKING, event.now)


def _restart(state: SourceState, event: AgentRestarted) -> Step:
    kept = event.record
    if state.phase != P.NEW or kept.role != Role.SOURCE:
        return _ignore(state, event)
    found = replace(
        state,
        move=kept.move,
        mode=kept.mode,
        deadline=kept.deadline,
        version=kept.version,
        outcome=kept.outcome,
        reason=kept.reason or "the agent was restarted",
    )
    phase = RESUMES_AT[P(kept.phase)]
    if phase == P.DONE:
        return _finish(found, kept.outcome or Outcome.ROLLED_BACK, found.reason)
    return _enter(found, phase, event.now)


def _tighten(state: SourceState, event: DeadlineMoved) -> Step:
    if event.deadline >= state.deadline or state.phase in {P.NEW, P.DONE}:
        return _ignore(state, event)
    nearer = replace(state, deadline=event.deadline)
    note = c.Note(f"the deadline is {state.deadline - event.deadline:.1f} s nearer")
    if state.phase != P.PRECOPY:
        return nearer, (note,)
    end = latest_safe_freeze(event.deadline, state.limits.fixed_freeze, state.limits)
    return nearer, (note, c.Wake(end, _round_tag(state)))


def _woken(state: SourceState, event: TimeReached) -> Step:
    if state.wake is not None and event.tag == state.wake:
        return _again(replace(state, wake=None), event.now)
    if state.phase == P.PRECOPY and event.tag == _round_tag(state):
        return state, (c.Cancel(c.CopyRound.__name__),)
    return _ignore(state, event)


def _round_tag(state: SourceState) -> str:
    return f"round-{len(state.rounds)}"


def _withdraw(state: SourceState) -> Step:
    if state.phase == P.NEW:
        return _finish(state, Outcome.ROLLED_BACK, "withdrawn")
    if state.phase not in UNTOUCHED:
        return state, (c.Note(f"withdrawn too late to matter: {state.phase}"),)
    if state.outcome is not None:
        return state, (c.Note("withdrawn again"),)
    # The command that runs has to end first: undoing beside it could leave half of it behind.
    giving_up = replace(state, outcome=Outcome.ROLLED_BACK, reason="withdrawn")
    return giving_up, (c.Cancel(AWAITS[state.phase].__name__),)


# --- results --------------------------------------------------------------------------------------------------------


def _result(state: SourceState, event: Result) -> Step:
    if isinstance(event, Failed) and event.command == c.Persist.__name__:
        return _unwritten(state, event)
    awaited = AWAITS.get(state.phase)
    if awaited is None or event.command != awaited.__name__ or state.wake is not None:
        return _ignore(state, event)
    if state.phase in UNTOUCHED and state.outcome is not None:
        return _give_up(state, event.now)
    return _awaited(state, event)


def _awaited(state: SourceState, event: Result) -> Step:
    match event:
        case Failed():
            after = _failed(state, event)
        case Checked():
            after = _checked(state, event)
        case RoundCopied():
            after = _copied(state, event)
        case OwnerAnswer():
            after = _owner(state, event)
        case TargetAnswered():
            # Either word of the target is only a hint; the record decides.
            hinted = replace(state, reason=state.reason or event.reason)
            after = _enter(hinted, P.READING_OWNER if event.resumed else P.RECLAIMING, event.now)
        case Done():
            after = _succeeded(state, event)
        case _:
            assert_never(event)
    return after


def _succeeded(state: SourceState, event: Done) -> Step:
    match state.phase:
        case P.OFFERING if state.mode == Mode.LIVE:
            return _enter(state, P.ATTACHING, event.now)
        case P.OFFERING | P.ATTACHING:
            return _copy_or_freeze(state, event.now)
        case P.CLEANING:
            return _finish(state, state.outcome or Outcome.ROLLED_BACK, state.reason)
        case _ if state.phase in NEXT:
            return _enter(state, NEXT[state.phase], event.now)
        case _:
            return _ignore(state, event)  # Done is not the answer of this command: a driver's mistake


def _failed(state: SourceState, event: Failed) -> Step:
    blamed = replace(state, reason=state.reason or f"{event.command}: {event.reason}")
    note = c.Note(f"{event.command} failed ({event.kind}): {event.reason}")
    match state.phase:
        case P.CHECKING:
            after = _finish(blamed, Outcome.ROLLED_BACK, blamed.reason)
        case P.ATTACHING | P.PRECOPY if event.kind == FailureKind.TRACKER_UNAVAILABLE:
            after = _copy_or_freeze(replace(state, mode=Mode.STOP_AND_COPY), event.now)
        case P.PRECOPY if event.kind in {FailureKind.DEADLINE, FailureKind.CANCELLED}:
            after = _freeze_with(state, event.now)
        case P.VERIFYING if event.kind == FailureKind.GIVE_UP or state.attempts >= state.limits.tries:
            after = _enter(replace(blamed, outcome=Outcome.LOST), P.DESTROYING, event.now)
        case P.DETACHING if state.attempts < state.limits.tries:
            after = _later(state, event.now)  # a tracker left behind slows every first write and blocks huge pages
        case P.CLEANING if state.attempts >= state.limits.tries:
            after = _finish(blamed, state.outcome or Outcome.ROLLED_BACK, blamed.reason)
        case P.RECLAIMING | P.READING_OWNER | P.VERIFYING | P.RELEASING | P.THAWING | P.DESTROYING | P.CLEANING:
            after = _later(state, event.now)
        case _:
            after = _enter(blamed, ON_FAILURE[state.phase], event.now)
    return after[0], (note, *after[1])


def _unwritten(state: SourceState, event: Failed) -> Step:
    """React to a Persist that failed: the driver has dropped what stood behind it."""
    note = c.Note(f"the journal cannot be written: {event.reason}")
    match state.phase:
        case P.REGISTERING:
            after = _finish(state, Outcome.ROLLED_BACK, "the journal cannot be written")
        case P.HOLDING | P.DUMPING:  # nothing was dumped: rule 1 holds, and the journal still says so
            after = _enter(replace(state, reason="the journal cannot be written"), P.RELEASING, event.now)
        case P.RELEASING | P.DESTROYING | P.DONE:  # an older record leads a restarted agent to the same verdict
            after = _again(state, event.now)
        case _:
            after = (state, ())
    return after[0], (note, *after[1])


def _checked(state: SourceState, event: Checked) -> Step:
    if not event.movable:
        return _finish(state, Outcome.UNMOVABLE, "; ".join(event.reasons))
    mode = state.mode if event.deltas else Mode.STOP_AND_COPY
    known = replace(state, mode=mode, memory_bytes=event.memory_bytes)
    notes = () if mode == state.mode else (c.Note(f"stop-and-copy: {event.delta_reason}"),)
    if event.now > _last_call(known, event.memory_bytes):
        late = _finish(known, Outcome.LEFT_TO_EVICTION, "its memory cannot be copied in the time left")
        return late[0], (*notes, *late[1])
    begun = _enter(known, P.REGISTERING, event.now)
    return begun[0], (*notes, *begun[1])


def _copied(state: SourceState, event: RoundCopied) -> Step:
    if event.number != len(state.rounds):
        return _ignore(state, event)
    finished = Round(sent_bytes=event.sent_bytes, written_bytes=event.written_bytes, seconds=event.seconds)
    return _copy_or_freeze(replace(state, rounds=(*state.rounds, finished)), event.now)


def _owner(state: SourceState, event: OwnerAnswer) -> Step:
    answer = event.answer
    if isinstance(answer, Won | Lost | Found):
        state = replace(state, version=answer.record.version)
    if state.phase == P.REGISTERING:
        if isinstance(answer, Won) and answer.record.owner == Owner.SOURCE:
            return _enter(state, P.OFFERING, event.now)
        return _enter(replace(state, reason=f"no owner record: {answer}"), P.DETACHING, event.now)
    return _obey(state, resolve(Role.SOURCE, answer, reading=state.phase == P.READING_OWNER), event.now)


def _obey(state: SourceState, verdict: Verdict, now: float) -> Step:
    match verdict:
        case Verdict.OWN:
            after = _enter(replace(state, outcome=Outcome.ROLLED_BACK), P.VERIFYING, now)
        case Verdict.YIELD:
            moved = Outcome.MOVED if state.mode == Mode.LIVE else Outcome.MOVED_BY_STOP_AND_COPY
            after = _enter(replace(state, outcome=moved, reason=""), P.FORWARDING, now)
        case Verdict.SWAP:
            after = _enter(state, P.RECLAIMING, now, attempts=state.attempts)
        case Verdict.READ:
            after = _enter(state, P.READING_OWNER, now, attempts=state.attempts)
        case Verdict.LATER:
            after = _later(state, now)
        case _:
            assert_never(verdict)
    return after


# --- copying --------------------------------------------------------------------------------------------------------


def _copy_or_freeze(state: SourceState, now: float) -> Step:
    if state.mode == Mode.STOP_AND_COPY:
        return _freeze_with(state, now)
    decision = decide(state.rounds, _left(state), state.deadline, now, state.limits)
    match decision:
        case Continue(deadline):
            return _enter(replace(state, round_deadline=deadline), P.PRECOPY, now)
        case FreezeNow(reason):
            mode = state.mode if state.rounds else Mode.STOP_AND_COPY
            after = _enter(replace(state, mode=mode), P.HOLDING, now)
            return after[0], (c.Note(f"freezing: {reason}"), *after[1])
        case TooLate(reason):
            return _give_up(replace(state, outcome=Outcome.LEFT_TO_EVICTION, reason=reason), now)
        case _:
            assert_never(decision)


def _freeze_with(state: SourceState, now: float) -> Step:
    """Freeze with all that is left still to be copied, if the node lives long enough for that."""
    if now > _last_call(state, _left(state)):
        return _give_up(replace(state, outcome=Outcome.LEFT_TO_EVICTION, reason="no time left to freeze"), now)
    return _enter(state, P.HOLDING, now)


def _left(state: SourceState) -> int:
    """Return the bytes still to be copied, in the worst case that is known."""
    if state.mode == Mode.STOP_AND_COPY or not state.rounds:
        return state.memory_bytes
    return state.rounds[-1].written_bytes


def _freeze_seconds(state: SourceState, left_bytes: int) -> float:
    return predicted_freeze(left_bytes, throughput(state.rounds, state.limits), state.limits)


def _last_call(state: SourceState, left_bytes: int) -> float:
    return last_call(state.deadline, _freeze_seconds(state, left_bytes), state.limits)


# --- phases ---------------------------------------------------------------------------------------------------------


def _enter(state: SourceState, phase: SourcePhase, now: float, attempts: int = 0) -> Step:
    entered = replace(state, phase=phase, attempts=attempts, wake=None)
    return entered, _orders(entered, now)


def _orders(state: SourceState, now: float) -> tuple[c.Command, ...]:
    """Return what a phase does when it is entered."""
    # RELEASING without an outcome comes from before DUMPING: the journal already says that no one need be asked.
    early = state.phase == P.RELEASING and state.outcome is None
    if state.phase in PERSISTED[Role.SOURCE] and not early:
        return c.Persist(record(state)), _order(state, now)
    return (_order(state, now),)


def _order(state: SourceState, now: float) -> c.Command:
    """Return the phase's one command."""
    limits = state.limits
    soon = now + limits.step_seconds
    freeze = _freeze_seconds(state, _left(state))
    if state.phase == P.SECURING:
        # Once the node is about to die, a workload that waits is as lost as one that is killed.
        soon = max(soon, min(state.deadline - limits.restore_reserve, now + limits.orphan_seconds))
    match state.phase:
        case P.OFFERING:
            return c.OfferTarget(now + limits.offer_seconds, expires=state.deadline, version=state.version)
        case P.PRECOPY:
            return c.CopyRound(state.round_deadline, number=len(state.rounds))
        case P.DUMPING:
            end = min(state.deadline - limits.restore_reserve, now + limits.dump_seconds + 3 * freeze)
            return c.DumpAndSend(end, mode=state.mode)
        case P.RESTORING:
            return c.RequestRestore(min(state.deadline, now + limits.restore_seconds))
        case P.RECLAIMING:
            return c.ReclaimOwnership(soon, version=state.version)
        case _:
            return AWAITS[state.phase](soon)


def _again(state: SourceState, now: float) -> Step:
    """Give the phase's command again, without writing the journal again."""
    if state.phase == P.DONE:
        return state, (c.Finished(state.outcome or Outcome.ROLLED_BACK, state.reason),)
    return state, (_order(state, now),)


def _later(state: SourceState, now: float) -> Step:
    """Give the phase's command again after a pause. Used for what must not be given up."""
    tag = f"{state.phase}-{state.attempts}"
    waiting = replace(state, attempts=min(state.attempts + 1, ATTEMPTS_MAX), wake=tag)
    return waiting, (c.Wake(now + pause(state.attempts, state.limits), tag),)


def _give_up(state: SourceState, now: float) -> Step:
    """Undo what was prepared; the process was never touched."""
    if state.phase == P.CHECKING:
        return _finish(state, state.outcome or Outcome.ROLLED_BACK, state.reason)
    return _enter(state, P.DETACHING, now)


def _finish(state: SourceState, outcome: Outcome, reason: str) -> Step:
    touched = state.phase not in {P.NEW, P.CHECKING}
    done = replace(state, phase=P.DONE, outcome=outcome, reason=reason, wake=None)
    end = c.Finished(outcome, reason)
    return done, (c.Persist(record(done)), end) if touched else (end,)


def _ignore(state: SourceState, event: SourceEvent) -> Step:
    return state, (c.Note(f"{state.phase}: ignored {event}"),)

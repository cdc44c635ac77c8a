"""The target's machine: one workload on its way in.

The rules:

1. The restored copy is thawed, and its network released, only on a verdict OWN: the record was won as, or read as,
   `target`.
2. From the moment TakeOwnership is commanded, nothing but a verdict ends the wait: not an abort, not a deadline. The
   swap may be under way and may still win; a copy destroyed meanwhile would be a workload lost. The source can always
   end it by reclaiming. `Persist(TAKING)` stands before TakeOwnership, so a restarted agent knows.
3. A copy that is damaged (its pager died), or of which that cannot be told after a restart, never swaps: it only
   reads, until the source has reclaimed.
4. Before TAKING the copy owns nothing and may be destroyed at any time, by an abort, a deadline, a restart.
5. On a verdict YIELD it is destroyed, mute to the end.
6. An offer is taken up only while the record says `source`. A late repeat of an offer whose migration is over and
   forgotten here would otherwise begin anew, and undoing that would kill the workload that runs here since.

KeepPager comes before TakeOwnership: an owner whose pager dies with the agent would lose its memory.
"""

from dataclasses import dataclass, field, replace
from typing import assert_never

from spotguard.core import commands as c
from spotguard.core.deadline import ATTEMPTS_MAX, Limits, pause
from spotguard.core.events import (
    AbortRequested,
    AgentRestarted,
    Done,
    Failed,
    FailureKind,
    Offered,
    OwnerAnswer,
    PagerDied,
    RestoreRequested,
    StateComplete,
    StreamLost,
    TargetEvent,
    TimeReached,
)
from spotguard.core.ownership import Found, Lost, Owner, Verdict, Won, resolve
from spotguard.core.state import NOBODY, PERSISTED, Mode, Move, Outcome, Record, Role, TargetPhase

P = TargetPhase
Step = tuple["TargetState", tuple[c.Command, ...]]
OFFER_TAG = "offer-expires"

# The command whose result each phase waits for. RECEIVING waits for events of the receiver and the source.
AWAITS: dict[TargetPhase, type[c.Timed]] = {
    P.ADMITTING: c.ReadOwnership,
    P.PREPARING: c.PrepareSandbox,
    P.RESTORING: c.RestoreProcesses,
    P.KEEPING: c.KeepPager,
    P.TAKING: c.TakeOwnership,
    P.READING_OWNER: c.ReadOwnership,
    P.VERIFYING: c.VerifySound,
    P.ROUTING: c.MoveRoute,
    P.RELEASING: c.ReleaseNetwork,
    P.THAWING: c.ThawProcesses,
    P.FILLING: c.AwaitFill,
    P.DESTROYING: c.DestroyRestored,
    P.CLEANING: c.CleanUp,
}

# Where plain success leads.
NEXT: dict[TargetPhase, TargetPhase] = {
    P.PREPARING: P.RECEIVING,
    P.RESTORING: P.KEEPING,
    P.KEEPING: P.TAKING,
    P.ROUTING: P.RELEASING,
    P.RELEASING: P.THAWING,
    P.THAWING: P.FILLING,
    P.FILLING: P.CLEANING,
    P.DESTROYING: P.CLEANING,
    P.CLEANING: P.DONE,
}

# Where a restarted agent goes on, by the phase in its journal.
RESUMES_AT: dict[TargetPhase, TargetPhase] = {
    P.PREPARING: P.DESTROYING,  # what was received is not known to be whole
    P.TAKING: P.VERIFYING,
    P.ROUTING: P.VERIFYING,
    P.DONE: P.DONE,
}

BUSY_UNOWNED = frozenset(
    {P.ADMITTING, P.PREPARING, P.RESTORING, P.KEEPING}
)  # a command runs; giving up waits for its end
DECIDING = frozenset({P.TAKING, P.READING_OWNER, P.VERIFYING})  # only a verdict ends these
OWNING = frozenset({P.ROUTING, P.RELEASING, P.THAWING, P.FILLING})


@dataclass(frozen=True, slots=True)
class TargetState:
    """All that the machine knows. `wake`: the tag that is waited for before the phase's command is given again.

    `broken`: why this copy must not become the owner; empty when it may. `doubted`: whether it is whole could not be
    told, so it does not swap. `owned`: a verdict OWN was read.
    """

    limits: Limits = field(default_factory=Limits)
    phase: TargetPhase = P.NEW
    move: Move = NOBODY
    deadline: float = 0.0
    version: str = ""
    complete: bool = False
    restore_by: float | None = None  # set when the source has asked
    broken: str = ""
    doubted: bool = False
    owned: bool = False
    outcome: Outcome | None = None
    reason: str = ""
    attempts: int = 0
    wake: str | None = None


def step(state: TargetState, event: TargetEvent) -> Step:
    """Give the next state and what to do. Never raises; what does not fit the state is noted and changes nothing."""
    match event:
        case Offered():
            after = _offered(state, event)
        case AgentRestarted():
            after = _restart(state, event)
        case StateComplete():
            after = _completed(state, event)
        case RestoreRequested():
            after = _requested(state, event)
        case StreamLost() | AbortRequested():
            after = _unwanted(state, event)
        case PagerDied():
            after = _damaged(state, event)
        case TimeReached():
            after = _woken(state, event)
        case Done() | Failed() | OwnerAnswer():
            after = _result(state, event)
        case _:
            assert_never(event)
    return after


def record(state: TargetState) -> Record:
    """Return what a restarted agent would have to know of this state."""
    return Record(
        role=Role.TARGET,
        move=state.move,
        phase=state.phase,
        mode=Mode.LIVE,  # the target does the same in either mode
        deadline=state.deadline,
        version=state.version,
        outcome=state.outcome,
        reason=state.reason,
    )


# --- events that come by themselves ---------------------------------------------------------------------------------


def _offered(state: TargetState, event: Offered) -> Step:
    if state.phase == P.NEW:
        begun = replace(state, move=event.move, deadline=event.deadline, version=event.version)
        return _enter(begun, P.ADMITTING, event.now)
    if event.move != state.move or state.phase not in {P.ADMITTING, P.PREPARING, P.RECEIVING}:
        return state, (c.AnswerOffer(accepted=False, reason=f"there is already {state.move.migration}: {state.phase}"),)
    if state.phase == P.RECEIVING:
        return state, (c.AnswerOffer(accepted=True, reason=""),)
    return _ignore(state, event)  # the answer to the first offer is the answer to this one


def _restart(state: TargetState, event: AgentRestarted) -> Step:
    kept = event.record
    if state.phase != P.NEW or kept.role != Role.TARGET:
        return _ignore(state, event)
    phase = P(kept.phase)
    found = replace(
        state,
        move=kept.move,
        deadline=kept.deadline,
        version=kept.version,
        owned=phase == P.ROUTING,
        outcome=kept.outcome,
        reason=kept.reason or "the agent was restarted",
    )
    if phase == P.DONE:
        return _finish(found)
    if phase == P.PREPARING:
        return _destroy(found, found.reason, event.now)
    return _enter(found, RESUMES_AT[phase], event.now)


def _completed(state: TargetState, event: StateComplete) -> Step:
    if state.phase not in {P.PREPARING, P.RECEIVING}:
        return _ignore(state, event)
    return _restore_when_ready(replace(state, complete=True), event.now)


def _requested(state: TargetState, event: RestoreRequested) -> Step:
    match state.phase:
        case P.PREPARING | P.RECEIVING:
            return _restore_when_ready(replace(state, restore_by=event.deadline), event.now)
        case P.FILLING:
            return state, (c.AnswerSource(resumed=True, reason=""),)
        case P.NEW | P.ADMITTING | P.DESTROYING | P.CLEANING | P.DONE:
            resumed = state.outcome == Outcome.RESUMED
            return state, (c.AnswerSource(resumed=resumed, reason=state.reason),)
        case _:
            return _ignore(state, event)  # the answer to the first request is the answer to this one


def _restore_when_ready(state: TargetState, now: float) -> Step:
    if state.phase == P.RECEIVING and state.complete and state.restore_by is not None:
        return _enter(state, P.RESTORING, now)
    return state, ()


def _unwanted(state: TargetState, event: StreamLost | AbortRequested) -> Step:
    if isinstance(event, StreamLost) and (state.complete or state.phase not in {P.PREPARING, P.RECEIVING}):
        return _ignore(state, event)  # all that it had to bring is here
    return _give_up(state, event.reason, event.now)


def _give_up(state: TargetState, reason: str, now: float) -> Step:
    if state.phase == P.RECEIVING:
        return _destroy(state, reason, now)
    if state.phase in BUSY_UNOWNED:
        return replace(state, broken=state.broken or reason), (c.Cancel(AWAITS[state.phase].__name__),)
    return state, (c.Note(f"{state.phase}: not given up now: {reason}"),)


def _damaged(state: TargetState, event: PagerDied) -> Step:
    reason = f"the pager died: {event.reason}"
    if state.phase in OWNING:
        # Its command may wait for what never comes now (AwaitFill does).
        destroying, orders = _destroy(state, reason, event.now)
        return destroying, (c.Cancel(AWAITS[state.phase].__name__), *orders)
    if state.phase in DECIDING:
        # The answer makes the source reclaim, which ends the wait here.
        return replace(state, broken=state.broken or reason), (c.AnswerSource(resumed=False, reason=reason),)
    return _give_up(state, reason, event.now)


def _woken(state: TargetState, event: TimeReached) -> Step:
    if state.wake is not None and event.tag == state.wake:
        return _again(replace(state, wake=None), event.now)
    if event.tag == OFFER_TAG and state.phase in {P.PREPARING, P.RECEIVING}:
        return _give_up(state, "nobody asked to restore in time", event.now)
    return _ignore(state, event)


# --- results --------------------------------------------------------------------------------------------------------


def _result(state: TargetState, event: Done | Failed | OwnerAnswer) -> Step:
    if isinstance(event, Failed) and event.command == c.Persist.__name__:
        return _unwritten(state, event)
    awaited = AWAITS.get(state.phase)
    if awaited is None or event.command != awaited.__name__ or state.wake is not None:
        return _ignore(state, event)
    if state.phase == P.ADMITTING:
        return _admit(state, event)
    if state.phase in BUSY_UNOWNED and state.broken:
        return _destroy(state, state.broken, event.now)
    match event:
        case Done():
            after = _succeeded(state, event)
        case Failed():
            after = _failed(state, event)
        case OwnerAnswer():
            after = _owner(state, event)
        case _:
            assert_never(event)
    return after


def _admit(state: TargetState, event: Done | Failed | OwnerAnswer) -> Step:
    match event:
        case OwnerAnswer(answer=Found(record)) if record.owner == Owner.SOURCE and not state.broken:
            return _enter(replace(state, version=record.version), P.PREPARING, event.now)
        case OwnerAnswer(answer=Found(record)) if not state.broken:
            reason = f"the owner is {record.owner}"
        case _:
            reason = state.broken or "the owner record cannot be read here"
    refused = replace(state, phase=P.DONE, outcome=Outcome.REFUSED, reason=reason)
    return refused, (c.AnswerOffer(accepted=False, reason=reason), c.Finished(Outcome.REFUSED, reason))


def _succeeded(state: TargetState, event: Done) -> Step:
    match state.phase:
        case P.PREPARING:
            ready, more = _restore_when_ready(replace(state, phase=P.RECEIVING), event.now)
            return ready, (c.AnswerOffer(accepted=True, reason=""), *more)
        case P.VERIFYING:
            return _verified(state, event.now, broken=state.broken)
        case P.FILLING:
            return _enter(replace(state, outcome=Outcome.RESUMED, reason=""), P.CLEANING, event.now)
        case P.CLEANING:
            return _finish(state)
        case _ if state.phase in NEXT:
            return _enter(state, NEXT[state.phase], event.now)
        case _:
            return _ignore(state, event)  # Done is not the answer of this command: a driver's mistake


def _failed(state: TargetState, event: Failed) -> Step:
    reason = f"{event.command}: {event.reason}"
    patient = state.attempts < state.limits.tries
    match state.phase:
        case P.VERIFYING if event.kind == FailureKind.GIVE_UP or state.broken:
            after = _verified(state, event.now, broken=state.broken or reason)
        case P.VERIFYING if not patient:
            after = _verified(replace(state, doubted=not state.owned), event.now, broken="")
        case P.ROUTING if not patient:
            after = _enter(state, P.RELEASING, event.now)  # better a workload that few can reach than a frozen one
        case P.FILLING if event.kind == FailureKind.DEADLINE:
            after = _again(state, event.now)
        case P.CLEANING if not patient:
            after = _finish(state)
        case P.PREPARING | P.RESTORING | P.KEEPING:
            after = _destroy(state, reason, event.now)
        case _:
            after = _later(state, event.now)
    return after[0], (c.Note(f"{event.command} failed ({event.kind}): {event.reason}"), *after[1])


def _verified(state: TargetState, now: float, broken: str) -> Step:
    """Go on after a look at the copy. What owns and is not known to be broken goes on: it is the only copy."""
    if state.owned:
        return _destroy(state, broken, now) if broken else _enter(state, P.ROUTING, now)
    return _enter(replace(state, broken=broken), P.READING_OWNER, now)


def _unwritten(state: TargetState, event: Failed) -> Step:
    """React to a Persist that failed: the driver has dropped what stood behind it."""
    note = c.Note(f"the journal cannot be written: {event.reason}")
    match state.phase:
        case P.PREPARING | P.TAKING:  # TAKING is written before the first swap only: none was sent
            after = _destroy(state, "the journal cannot be written", event.now)
        case P.ROUTING | P.DONE:  # the older record leads a restarted agent to the same verdict
            after = _again(state, event.now)
        case _:
            after = (state, ())
    return after[0], (note, *after[1])


def _owner(state: TargetState, event: OwnerAnswer) -> Step:
    answer = event.answer
    if isinstance(answer, Won | Lost | Found):
        state = replace(state, version=answer.record.version)
    verdict = resolve(Role.TARGET, answer, reading=state.phase == P.READING_OWNER)
    match verdict:
        case Verdict.OWN if state.broken:
            after = _destroy(replace(state, owned=True), state.broken, event.now)
        case Verdict.OWN if state.doubted:
            # An earlier swap had arrived. This is the only copy now: look once more.
            after = _enter(replace(state, owned=True, doubted=False), P.VERIFYING, event.now)
        case Verdict.OWN:
            after = _enter(replace(state, owned=True), P.ROUTING, event.now)
        case Verdict.YIELD:
            after = _destroy(state, state.broken or "the source has reclaimed it", event.now)
        case Verdict.SWAP | Verdict.LATER if state.broken or state.doubted:
            after = _later(replace(state, phase=P.READING_OWNER), event.now)
        case Verdict.SWAP:
            after = _again(replace(state, phase=P.TAKING), event.now)
        case Verdict.READ:
            after = _enter(state, P.READING_OWNER, event.now, attempts=state.attempts)
        case Verdict.LATER:
            after = _later(state, event.now)
        case _:
            assert_never(verdict)
    return after


# --- phases ---------------------------------------------------------------------------------------------------------


def _enter(state: TargetState, phase: TargetPhase, now: float, attempts: int = 0) -> Step:
    entered = replace(state, phase=phase, attempts=attempts, wake=None)
    orders: tuple[c.Command, ...] = (_order(entered, now),)
    if phase in PERSISTED[Role.TARGET]:
        orders = (c.Persist(record(entered)), *orders)
    if phase == P.PREPARING:
        orders = (c.Wake(entered.deadline, OFFER_TAG), *orders)
    if phase == P.FILLING:
        orders = (c.AnswerSource(resumed=True, reason=""), *orders)
    return entered, orders


def _order(state: TargetState, now: float) -> c.Command:
    """Return the phase's one command."""
    soon = now + state.limits.step_seconds
    match state.phase:
        case P.PREPARING:
            return c.PrepareSandbox(min(state.deadline, now + state.limits.offer_seconds))
        case P.RESTORING:
            return c.RestoreProcesses(soon if state.restore_by is None else state.restore_by)
        case P.TAKING:
            return c.TakeOwnership(soon, version=state.version)
        case P.FILLING:
            return c.AwaitFill(now + state.limits.fill_seconds)
        case _:
            return AWAITS[state.phase](soon)


def _destroy(state: TargetState, reason: str, now: float) -> Step:
    """Kill the copy. It is a loss only when the copy was the owner."""
    outcome = Outcome.LOST if state.owned else Outcome.DESTROYED
    entered, orders = _enter(replace(state, outcome=outcome, reason=reason), P.DESTROYING, now)
    answers: tuple[c.Command, ...] = (c.AnswerSource(resumed=False, reason=reason),)
    if state.phase == P.PREPARING:
        answers = (c.AnswerOffer(accepted=False, reason=reason), *answers)
    return entered, (*answers, *orders)


def _again(state: TargetState, now: float) -> Step:
    """Give the phase's command again, without writing the journal again."""
    if state.phase == P.DONE:
        return state, (c.Finished(state.outcome or Outcome.DESTROYED, state.reason),)
    return state, (_order(state, now),)


def _later(state: TargetState, now: float) -> Step:
    """Give the phase's command again after a pause. Used for what must not be given up."""
    tag = f"{state.phase}-{state.attempts}"
    waiting = replace(state, attempts=min(state.attempts + 1, ATTEMPTS_MAX), wake=tag)
    return waiting, (c.Wake(now + pause(state.attempts, state.limits), tag),)


def _finish(state: TargetState) -> Step:
    outcome = state.outcome or Outcome.DESTROYED
    done = replace(state, phase=P.DONE, outcome=outcome, wake=None)
    return done, (c.Persist(record(done)), c.Finished(outcome, state.reason))


def _ignore(state: TargetState, event: TargetEvent) -> Step:
    return state, (c.Note(f"{state.phase}: ignored {event}"),)

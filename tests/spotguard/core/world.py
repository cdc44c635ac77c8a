"""A model of the world around the two machines: processes, networks, journals, the owner store, and what goes wrong.

`moves(world)` lists all that can happen next as (label, fault?, world). A fault is a crash, a failed command, a lost,
delayed or repeated message, an unreachable store, a pager that dies, a withdrawn notice. Everything else happens of
itself, in any order. Time does not flow: every timer may ring at any moment after it was set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from spotguard.core import commands as c
from spotguard.core import source, target
from spotguard.core.deadline import Limits
from spotguard.core.events import (
    AbortRequested,
    AgentRestarted,
    Checked,
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
from spotguard.core.ownership import Found, Lost, Owner, OwnerRecord, Refused, Unknown, Unreachable, Won
from spotguard.core.source import SourceState
from spotguard.core.state import Mode, Move, Outcome, Record, SourcePhase, TargetPhase
from spotguard.core.target import TargetState

MOVE = Move(migration="m1", workload="shop/redis", source="node-a", target="node-b")
END = 120.0
LIMITS = Limits(tries=1)


class Proc(Enum):
    """A copy's processes."""

    NONE = "none"
    RUNS = "runs"
    FROZEN = "frozen"
    DEAD = "dead"


Batches = tuple[tuple[c.Command, ...], ...]


class Agent(NamedTuple):
    """One agent: its machine (None: crashed), what its driver has still to do, and what it wrote down."""

    state: Any
    queue: Batches = ()
    waits: str = ""  # the command whose answer has to come from the other node
    wakes: frozenset[str] = frozenset()
    journal: Record | None = None
    finished: Outcome | None = None


class World(NamedTuple):
    """Everything. Messages are booleans: under way or not."""

    s: Agent
    t: Agent
    owner: Owner | None = None
    swaps: frozenset[tuple[Owner, str]] = frozenset()  # sent, not answered, perhaps applied some time
    # source node
    s_proc: Proc = Proc.RUNS
    s_held: bool = False
    s_sound: bool = True
    s_tracked: bool = False
    end_sent: bool = False
    # target node
    t_proc: Proc = Proc.NONE
    t_held: bool = True
    t_sandbox: bool = False
    t_receiver: bool = False
    t_complete: bool = False
    t_pager: bool = False
    t_kept: bool = False
    t_filled: bool = False
    # messages
    m_offer: bool = False
    m_offer_answer: bool | None = None
    m_end: bool = False
    m_restore: bool = False
    m_restore_answer: bool | None = None
    m_abort: bool = False
    # history, for the invariants
    ran_after_end: bool = False
    pager_killed: bool = False


@dataclass(frozen=True)
class Machines:
    """The step functions under test."""

    source: Callable[[Any, Any], Any] = source.step
    target: Callable[[Any, Any], Any] = target.step


Move_ = tuple[str, bool, World]
REASON = "it broke"


class Model:
    """All that can happen, for a given pair of machines."""

    def __init__(self, machines: Machines | None = None, mode: Mode = Mode.STOP_AND_COPY) -> None:
        self._steps = machines or Machines()
        self._mode = mode

    def start(self) -> World:
        """The world when the source is told to begin."""
        idle = World(s=Agent(SourceState(limits=LIMITS)), t=Agent(TargetState(limits=LIMITS)))
        return self.tell_source(idle, StartMigration(0, MOVE, END, self._mode))

    def tell_source(self, w: World, event: Any) -> World:
        """Give the source an event."""
        return w._replace(s=_told(w.s, *self._steps.source(w.s.state, event)))

    def tell_target(self, w: World, event: Any) -> World:
        """Give the target an event."""
        return w._replace(t=_told(w.t, *self._steps.target(w.t.state, event)))

    def moves(self, w: World) -> Iterator[Move_]:
        """All that can happen next."""
        if w.s.state is not None:
            yield from self._source_moves(w)
        else:
            yield "source restarts", False, self._restart_source(w)
        if w.t.state is not None:
            yield from self._target_moves(w)
        else:
            yield "target restarts", False, self._restart_target(w)
        for swap in w.swaps:
            yield f"delayed swap {swap} arrives", False, _swap(w._replace(swaps=w.swaps - {swap}), *swap)[0]
        if w.t_proc in {Proc.FROZEN, Proc.RUNS} and w.t_pager and not w.t_filled:
            dead = w._replace(t_pager=False, pager_killed=True)
            yield "pager dies", True, self.tell_target(dead, PagerDied(0, REASON)) if w.t.state is not None else dead

    # --- source -----------------------------------------------------------------------------------------------------

    def _source_moves(self, w: World) -> Iterator[Move_]:
        if w.s.state.phase != SourcePhase.DONE or w.s.queue:
            yield "source crashes", True, _hung_up(w)._replace(s=_crashed(w.s))
        if not w.s.waits and w.s.queue:
            command, rest = _head(w.s)
            after = w._replace(s=rest)
            for label, fault, world, event in self._perform_source(after, command):
                name = f"source {command.name}{label}"
                yield name, fault, world if event is None else self.tell_source(world, event)
            yield from self._common(w, "source", command, after)
        yield from self._answers(w)
        for tag in w.s.wakes:
            rung = w._replace(s=w.s._replace(wakes=w.s.wakes - {tag}))
            yield f"source timer {tag}", False, self.tell_source(rung, TimeReached(0, tag))
        if w.s.state.phase in source.UNTOUCHED and w.s.state.outcome is None:
            yield "withdrawn", True, self.tell_source(w, NoticeWithdrawn(0))

    def _answers(self, w: World) -> Iterator[Move_]:
        """Answers of the target to the source, and their loss."""
        if w.m_offer_answer is not None:
            event = Done(0, "OfferTarget") if w.m_offer_answer else Failed(0, "OfferTarget", *_GIVE_UP)
            yield "offer answered", False, self.tell_source(_hung_up(w), event)
        if w.m_restore_answer is not None:
            yield (
                "restore answered",
                False,
                self.tell_source(_hung_up(w), TargetAnswered(0, resumed=w.m_restore_answer)),
            )
        if w.s.waits:
            yield f"{w.s.waits} times out", True, self.tell_source(_hung_up(w), Failed(0, w.s.waits, *_AMBIGUOUS))

    def _perform_source(self, w: World, command: c.Command) -> Iterator[tuple[str, bool, World, Any]]:
        done = Done(0, command.name)
        if type(command) in LOCAL_SOURCE:
            yield "", False, LOCAL_SOURCE[type(command)](w), done
        match command:
            case c.Preflight():
                yield "", False, w, Checked(0, movable=True)
            case c.CreateOwnership():
                created = w._replace(owner=w.owner or Owner.SOURCE)
                yield "", False, created, OwnerAnswer(0, command.name, Won(_record(created)))
                yield " unknown", True, created, OwnerAnswer(0, command.name, Unknown())
            case c.OfferTarget():
                yield "", False, w._replace(m_offer=True, s=w.s._replace(waits=command.name)), None
            case c.CopyRound():
                yield "", False, w, RoundCopied(0, command.number, 1000, 0, 0.1)
                yield " untracked", True, w, Failed(0, command.name, FailureKind.TRACKER_UNAVAILABLE, REASON)
            case c.DumpAndSend():
                yield from self._dump(w, command)
            case c.RequestRestore():
                yield "", False, w._replace(m_restore=True, s=w.s._replace(waits=command.name)), None
            case c.VerifySound():
                yield "", False, w, done if w.s_sound else Failed(0, command.name, *_GIVE_UP)
            case c.ReclaimOwnership():
                yield from _store(w, command.name, Owner.RECLAIMED, command.version)

    def _dump(self, w: World, command: c.Command) -> Iterator[tuple[str, bool, World, Any]]:
        failed = Failed(0, command.name, *_GIVE_UP)
        if w.t_receiver and w.s_proc == Proc.FROZEN:
            sent = w._replace(end_sent=True, m_end=True)
            yield "", False, sent, Done(0, command.name)
            yield " unacknowledged", True, sent, failed
        else:
            yield " refused", False, w, failed
        yield " crashed, source runs", True, _source_runs(w, Proc.RUNS), failed
        yield " crashed, parasite left", True, w._replace(s_sound=False), failed

    def _restart_source(self, w: World) -> World:
        fresh = w._replace(s=Agent(SourceState(limits=LIMITS), journal=w.s.journal, finished=w.s.finished))
        return fresh if w.s.journal is None else self.tell_source(fresh, AgentRestarted(0, w.s.journal))

    # --- target -----------------------------------------------------------------------------------------------------

    def _target_moves(self, w: World) -> Iterator[Move_]:
        if w.t.state.phase != TargetPhase.DONE or w.t.queue:
            yield "target crashes", True, _target_crash(w)
        elif w.m_offer or w.m_restore or w.m_abort:
            told = None if w.t.finished == Outcome.DESTROYED else w.t.finished  # it may be told to begin again
            yield "target forgets", True, w._replace(t=Agent(TargetState(limits=LIMITS), finished=told))
        if w.t.queue:
            command, rest = _head(w.t)
            after = w._replace(t=rest)
            for label, fault, world, event in self._perform_target(after, command):
                name = f"target {command.name}{label}"
                yield name, fault, world if event is None else self.tell_target(world, event)
            yield from self._common(w, "target", command, after)
        for tag in w.t.wakes:
            rung = w._replace(t=w.t._replace(wakes=w.t.wakes - {tag}))
            # Early, the offer's timer is a disturbance: it kills a move that would have succeeded.
            early = tag == target.OFFER_TAG
            yield f"target timer {tag}", early, self.tell_target(rung, TimeReached(0, tag))
        yield from self._messages(w)

    def _messages(self, w: World) -> Iterator[Move_]:
        """Messages of the source to the target: delivered, or delivered and once more later."""
        for name, event in (
            ("m_offer", Offered(0, MOVE, END, "1")),
            ("m_end", StateComplete(0)),
            ("m_restore", RestoreRequested(0, 100.0)),
            ("m_abort", AbortRequested(0, REASON)),
        ):
            if not getattr(w, name):
                continue
            fits = name != "m_end" or w.t_receiver  # END reaches the machine through the receiver
            arrived = w._replace(t_complete=w.t_complete or (name == "m_end" and fits))
            if fits:
                # An agent that knows nothing of the migration answers for itself.
                unknown = w.t.state.phase == TargetPhase.NEW and name == "m_restore"
                answer = False if w.s.waits == "RequestRestore" else None
                arrived = arrived._replace(m_restore_answer=answer) if unknown else self.tell_target(arrived, event)
            yield f"{name} arrives", False, arrived._replace(**{name: False})
            if fits:
                yield f"{name} arrives, repeats", True, arrived
            yield f"{name} is lost", True, w._replace(**{name: False})
        if w.t_receiver and not w.t_complete:
            yield (
                "stream is lost",
                True,
                self.tell_target(w._replace(t_receiver=False, m_end=False), StreamLost(0, REASON)),
            )

    def _perform_target(self, w: World, command: c.Command) -> Iterator[tuple[str, bool, World, Any]]:
        if isinstance(command, c.TakeOwnership):
            yield from _store(w, command.name, Owner.TARGET, command.version)
        elif isinstance(command, c.AnswerOffer):
            heard = w.s.waits == "OfferTarget"
            yield "", False, w._replace(m_offer_answer=command.accepted) if heard else w, None
        elif isinstance(command, c.AnswerSource):
            heard = w.s.waits == "RequestRestore"
            yield "", False, w._replace(m_restore_answer=command.resumed) if heard else w, None
        elif type(command) in LOCAL_TARGET:
            possible, effect = LOCAL_TARGET[type(command)]
            if possible(w):
                yield "", False, effect(w), Done(0, command.name)
            else:
                yield " is impossible", False, w, Failed(0, command.name, *_GIVE_UP)

    def _restart_target(self, w: World) -> World:
        fresh = w._replace(t=Agent(TargetState(limits=LIMITS), journal=w.t.journal, finished=w.t.finished))
        if w.t.journal is None:
            return fresh
        fresh = self.tell_target(fresh, AgentRestarted(0, w.t.journal))
        # The driver finds a pager that died meanwhile.
        dead = w.t_proc in {Proc.FROZEN, Proc.RUNS} and not (w.t_pager or w.t_filled)
        return self.tell_target(fresh, PagerDied(0, REASON)) if dead else fresh

    # --- both -------------------------------------------------------------------------------------------------------

    def _common(self, w: World, side: str, command: c.Command, after: World) -> Iterator[Move_]:
        """What Persist, Read and Finished do, and the failure that any command can meet."""
        tell = self.tell_source if side == "source" else self.tell_target
        agent: Agent = getattr(after, side[0])
        match command:
            case c.Persist(record):
                # A record that is done is forgotten with Finished; kept until then it finishes once more.
                kept = agent._replace(journal=record)
                yield f"{side} Persist {record.phase}", False, after._replace(**{side[0]: kept})
                dropped = after._replace(
                    **{side[0]: agent._replace(queue=agent.queue[1:] if _more(w, side) else agent.queue)}
                )
                yield f"{side} Persist fails", True, tell(dropped, Failed(0, "Persist", *_GIVE_UP))
            case c.Finished(outcome):
                told = agent.finished if outcome == Outcome.REFUSED else outcome  # a late offer; the story was over
                ended = agent._replace(finished=told, journal=None)
                yield f"{side} finished {outcome}", False, after._replace(**{side[0]: ended})
            case c.ReadOwnership():
                yield from _reads(after, side, tell)
            case c.TakeOwnership() | c.ReclaimOwnership() | c.CreateOwnership() | c.AnswerOffer() | c.AnswerSource():
                pass
            case c.CleanUp() | c.DetachTracker() if agent.state.attempts >= LIMITS.tries:
                pass  # one that fails for ever leaves leftovers; nothing is to be learnt from that
            case _:
                # To say "not sound" of a sound process would be a lie, not a failure.
                kind = FailureKind.DEADLINE if isinstance(command, c.VerifySound) else FailureKind.GIVE_UP
                yield f"{side} {command.name} fails", True, tell(after, Failed(0, command.name, kind, REASON))


_GIVE_UP = (FailureKind.GIVE_UP, REASON)
_AMBIGUOUS = (FailureKind.AMBIGUOUS, REASON)
_OVER = frozenset({TargetPhase.DESTROYING, TargetPhase.CLEANING, TargetPhase.DONE})
_OFFERED = frozenset({TargetPhase.PREPARING, TargetPhase.RECEIVING})


def _told(agent: Agent, state: Any, commands: tuple[c.Command, ...]) -> Agent:
    """Take a machine's new state; timers are set and cancelling is done at once, the rest is queued."""
    wakes = agent.wakes | {command.tag for command in commands if isinstance(command, c.Wake)}
    # What nobody waits for any more is ignored (test_plays.py); leaving it out keeps the worlds few.
    wakes &= {state.wake, target.OFFER_TAG if state.phase in _OFFERED else None}
    batch = tuple(_plain(command) for command in commands if not isinstance(command, c.Wake | c.Note | c.Cancel))
    state = replace(state, reason="", attempts=min(state.attempts, LIMITS.tries))
    if isinstance(state, TargetState) and (state.broken or state.doubted or state.complete) and state.phase in _OVER:
        state = replace(state, broken="", doubted=False, complete=False, restore_by=None)
    return agent._replace(state=state, wakes=wakes, queue=(*agent.queue, batch) if batch else agent.queue)


def _plain(command: c.Command) -> c.Command:
    """Leave out what only people read: it would make equal worlds look different."""
    match command:
        case c.Persist(record):
            return c.Persist(replace(record, reason=""))
        case c.Finished() | c.AnswerOffer() | c.AnswerSource():
            return replace(command, reason="")
        case _:
            return command


def _hung_up(w: World) -> World:
    """The source waits no more; an answer to that request can reach nobody."""
    return w._replace(s=w.s._replace(waits=""), m_offer_answer=None, m_restore_answer=None)


def _head(agent: Agent) -> tuple[c.Command, Agent]:
    first, *batches = agent.queue
    left = (first[1:], *batches) if len(first) > 1 else tuple(batches)
    return first[0], agent._replace(queue=left)


def _more(w: World, side: str) -> bool:
    """Whether the batch whose head is performed has more commands."""
    return len(getattr(w, side[0]).queue[0]) > 1


def _record(w: World) -> OwnerRecord:
    assert w.owner is not None
    return OwnerRecord("m1", w.owner, "1" if w.owner == Owner.SOURCE else "2")


def _swap(w: World, new: Owner, version: str) -> tuple[World, bool]:
    if w.owner == Owner.SOURCE and version == _record(w).version:
        return w._replace(owner=new), True
    return w, False


def _store(w: World, command: str, new: Owner, version: str) -> Iterator[tuple[str, bool, World, Any]]:
    """A swap: answered, or unreachable, or applied with its answer lost, or delayed for some time or for ever."""
    if w.owner is None:
        yield " refused", False, w, OwnerAnswer(0, command, Refused())
        return
    after, won = _swap(w, new, version)
    yield "", False, after, OwnerAnswer(0, command, Won(_record(after)) if won else Lost(_record(after)))
    yield " unreachable", True, w, OwnerAnswer(0, command, Unreachable())
    yield " applied, answer lost", True, after, OwnerAnswer(0, command, Unknown())
    yield " delayed", True, w._replace(swaps=w.swaps | {(new, version)}), OwnerAnswer(0, command, Unknown())


def _reads(w: World, side: str, tell: Callable[[World, Any], World]) -> Iterator[Move_]:
    answer = Refused() if w.owner is None else Found(_record(w))
    yield f"{side} reads {w.owner}", False, tell(w, OwnerAnswer(0, "ReadOwnership", answer))
    yield f"{side} cannot read", True, tell(w, OwnerAnswer(0, "ReadOwnership", Unreachable()))


def _source_runs(w: World, proc: Proc) -> World:
    if w.s_proc == Proc.DEAD:
        return w
    return w._replace(s_proc=proc, ran_after_end=w.ran_after_end or (proc == Proc.RUNS and w.end_sent))


def _crashed(agent: Agent) -> Agent:
    return Agent(None, journal=agent.journal, finished=agent.finished)


def _target_crash(w: World) -> World:
    """The agent dies; with it what was not told to outlive it."""
    crashed = w._replace(t=_crashed(w.t))
    if w.t_kept:
        return crashed
    return crashed._replace(t_receiver=False, t_pager=False, t_complete=False, m_end=False)


def _nothing(w: World) -> World:
    return w


def _always(_: World) -> bool:
    return True


def _whole(w: World) -> bool:
    return w.t_proc in {Proc.FROZEN, Proc.RUNS} and (w.t_pager or w.t_filled)


def _destroyed(w: World) -> World:
    gone = Proc.NONE if w.t_proc == Proc.NONE else Proc.DEAD
    return w._replace(t_proc=gone, t_receiver=False, t_pager=False, t_complete=False, m_end=False)


# What each command does to the world.
LOCAL_SOURCE: dict[type[c.Command], Callable[[World], World]] = {
    c.HoldNetwork: lambda w: w._replace(s_held=True),
    c.FreezeProcesses: lambda w: _source_runs(w, Proc.FROZEN),
    c.StayFrozen: lambda w: _source_runs(w._replace(s_held=True), Proc.FROZEN),
    c.ReleaseNetwork: lambda w: w._replace(s_held=False),
    c.ThawProcesses: lambda w: _source_runs(w, Proc.RUNS),
    c.DestroySource: lambda w: w._replace(s_proc=Proc.DEAD),
    c.AbortTarget: lambda w: w._replace(m_abort=True),
    c.AttachTracker: lambda w: w._replace(s_tracked=True),
    c.DetachTracker: lambda w: w._replace(s_tracked=False),
    c.ForwardFrames: _nothing,
    c.CleanUp: _nothing,
}
LOCAL_TARGET: dict[type[c.Command], tuple[Callable[[World], bool], Callable[[World], World]]] = {
    c.PrepareSandbox: (_always, lambda w: w._replace(t_held=True, t_receiver=True, t_sandbox=True)),
    c.RestoreProcesses: (lambda w: w.t_complete, lambda w: w._replace(t_proc=Proc.FROZEN, t_pager=True)),
    c.KeepPager: (lambda w: w.t_pager, lambda w: w._replace(t_kept=True)),
    c.VerifySound: (_whole, _nothing),
    c.MoveRoute: (_always, _nothing),
    c.ReleaseNetwork: (_always, lambda w: w._replace(t_held=False)),
    c.ThawProcesses: (_whole, lambda w: w._replace(t_proc=Proc.RUNS)),
    c.AwaitFill: (lambda w: _whole(w) and w.t_proc == Proc.RUNS, lambda w: w._replace(t_filled=True)),
    c.DestroyRestored: (_always, _destroyed),
    c.CleanUp: (_always, lambda w: w._replace(t_sandbox=w.t_proc == Proc.RUNS)),
}

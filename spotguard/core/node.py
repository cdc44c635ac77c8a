"""The node's machine: what a notice means for everything that runs here.

All pods share the node's deadline; the order is by priority, then the smallest first: that saves the most before the
end. How many move side by side is a setting. A notice that repeats, or moves later, changes nothing.
"""

from dataclasses import dataclass, field, replace
from typing import assert_never

from spotguard.core import commands as c
from spotguard.core.deadline import Limits
from spotguard.core.events import (
    Action,
    MoveFinished,
    NodeEvent,
    Notice,
    NoticeWithdrawn,
    Pod,
    PodsListed,
    Rebalance,
    TimeReached,
)
from spotguard.core.state import Mode, Outcome

Step = tuple["NodeState", tuple[c.Command, ...]]


@dataclass(frozen=True, slots=True)
class NodeState:
    """All that the machine knows. `parallel`: how many pods move at a time; `notice`: the one in force."""

    limits: Limits = field(default_factory=Limits)
    parallel: int = 1
    notice: Notice | None = None
    rebalancing: bool = False
    waiting: tuple[Pod, ...] = ()
    moving: tuple[str, ...] = ()  # workloads
    resting: tuple[Pod, ...] = ()  # rolled back, to be tried again
    begun: tuple[Pod, ...] = ()  # what is in `moving`, as it was listed
    failed: tuple[str, ...] = ()  # a workload's name for each of its tries that was rolled back
    seen: frozenset[str] = frozenset()  # workloads that this notice has started or that have finished


def step(state: NodeState, event: NodeEvent) -> Step:
    """Give the next state and what to do. Never raises."""
    match event:
        case Notice():
            after = _noticed(state, event)
        case Rebalance():
            after = _rebalance(state)
        case NoticeWithdrawn():
            after = _withdrawn(state)
        case PodsListed():
            after = _listed(state, event)
        case MoveFinished():
            after = _finished(state, event)
        case TimeReached():
            after = _rested(state, event)
        case _:
            assert_never(event)
    return after


def _noticed(state: NodeState, event: Notice) -> Step:
    effective = event
    if event.action == Action.HIBERNATE:
        # Hibernation begins at once, whatever time the notice names.
        effective = replace(event, deadline=min(event.deadline, event.now + state.limits.hibernate_seconds))
        effective = replace(effective, deadline=max(effective.deadline, event.now))
    elif event.deadline <= event.now:
        return state, (c.Note(f"{event.action}: its time is past, the termination must have failed"),)
    if state.notice is None or state.notice.deadline <= event.now:
        anew = replace(state, notice=effective, seen=frozenset(state.moving), failed=(), resting=())
        return anew, (c.Cordon(), c.ListPods())
    if effective.deadline >= state.notice.deadline:
        return state, (c.Note(f"{event.action}: nothing new"),)
    tightened = tuple(c.TightenMove(workload, effective.deadline) for workload in state.moving)
    return replace(state, notice=effective), (c.Note("the end comes nearer"), *tightened)


def _rebalance(state: NodeState) -> Step:
    if state.rebalancing or state.notice is not None:
        return state, (c.Note("rebalance recommended: nothing new"),)
    return replace(state, rebalancing=True), (c.Note("rebalance recommended: nothing is frozen"), c.Cordon())


def _withdrawn(state: NodeState) -> Step:
    if state.notice is None and not state.rebalancing:
        return state, (c.Note("withdrawn: there was no notice"),)
    calm = replace(state, notice=None, rebalancing=False, waiting=(), resting=(), seen=frozenset(state.moving))
    return calm, (*(c.WithdrawMove(workload) for workload in state.moving), c.Uncordon())


def _listed(state: NodeState, event: PodsListed) -> Step:
    if state.notice is None:
        return state, (c.Note("pods listed, but nothing is to be moved"),)
    known = state.seen | {pod.workload for pod in state.waiting}
    fresh = {pod.workload: pod for pod in event.pods if pod.workload not in known}
    queue = sorted((*state.waiting, *fresh.values()), key=lambda pod: (-pod.priority, pod.memory_bytes, pod.workload))
    return _start_next(replace(state, waiting=tuple(queue)))


def _finished(state: NodeState, event: MoveFinished) -> Step:
    if event.workload not in state.moving:
        return state, (c.Note(f"{event.workload} finished, but was not moving"),)
    left = tuple(workload for workload in state.moving if workload != event.workload)
    begun = tuple(pod for pod in state.begun if pod.workload != event.workload)
    after = replace(state, moving=left, begun=begun)
    again: tuple[c.Command, ...] = ()
    if event.outcome == Outcome.ROLLED_BACK and state.notice is not None:
        tries = state.failed.count(event.workload) + 1
        at = event.now + state.limits.retry_pause * tries
        pod = next(pod for pod in state.begun if pod.workload == event.workload)
        if tries < state.limits.moves and at < state.notice.deadline:
            after = replace(after, failed=(*state.failed, event.workload), resting=(*state.resting, pod))
            again = (c.Wake(at, event.workload), c.Note(f"{event.workload} is tried again"))
    after, orders = _start_next(after)
    return after, (c.Note(f"{event.workload}: {event.outcome}"), *again, *orders)


def _rested(state: NodeState, event: TimeReached) -> Step:
    """Queue a workload again whose move was rolled back."""
    pods = tuple(pod for pod in state.resting if pod.workload == event.tag)
    left = tuple(pod for pod in state.resting if pod.workload != event.tag)
    return _start_next(replace(state, resting=left, waiting=(*state.waiting, *pods)))


def _start_next(state: NodeState) -> Step:
    if state.notice is None:
        return state, ()
    at_once = state.notice.action == Action.HIBERNATE
    mode = Mode.STOP_AND_COPY if at_once else Mode.LIVE
    room = len(state.waiting) if at_once else max(0, state.parallel - len(state.moving))
    starting, waiting = state.waiting[:room], state.waiting[room:]
    names = tuple(pod.workload for pod in starting)
    begun = replace(
        state,
        waiting=waiting,
        moving=(*state.moving, *names),
        begun=(*state.begun, *starting),
        seen=state.seen.union(names),
    )
    # The last try takes the next rung of the ladder: whatever failed before, nothing but the dump is needed there.
    modes = (Mode.STOP_AND_COPY if state.failed.count(name) >= state.limits.moves - 1 else mode for name in names)
    orders = tuple(
        c.StartMove(pod.workload, pod.target, state.notice.deadline, how)
        for pod, how in zip(starting, modes, strict=True)
    )
    return begun, orders

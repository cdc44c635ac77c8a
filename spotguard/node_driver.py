"""Drives the node's machine: notices in, moves of pods out."""

import asyncio
import uuid
from typing import Any

import tenacity

from criu_transfer import soundness
from criu_transfer.proctree import processes_of
from handlers.errors import GiveUp, HandlerError
from handlers.notice import Notice, NoticeEvent, NoticeWithdrawn
from spotguard.clock import deadline_from_epoch
from spotguard.core import commands as c
from spotguard.core import events, node
from spotguard.core.state import Mode, Move, Outcome
from spotguard.migrations import Migrations
from spotguard.parts import Parts

UNTOLD_SECONDS = 60.0  # left, when a notice's time cannot be read: AWS gives two minutes, and some may be over
LIST_SECONDS = 5.0
LIST_PAUSE = 1.0
SETTLE_SECONDS = 10.0
ACTIONS = {
    "terminate": events.Action.TERMINATE,
    "stop": events.Action.STOP,
    "hibernate": events.Action.HIBERNATE,
}


class NodeDriver:
    """The node's machine at work. `migrations` moves what it wants moved."""

    def __init__(self, parts: Parts, migrations: Migrations, tasks: asyncio.TaskGroup, *, parallel: int) -> None:
        self._parts = parts
        self._migrations = migrations
        self._tasks = tasks
        self._state = node.NodeState(parallel=parallel)
        self._listings = 0  # under way: what they find may have to be moved yet

    @property
    def cordoned(self) -> bool:
        """Whether this node is to take no new pods."""
        return self._state.notice is not None or self._state.rebalancing

    def heard(self, event: NoticeEvent) -> None:
        """Take what the metadata service says."""
        now = self._parts.clock.monotonic()
        match event:
            case NoticeWithdrawn(notice=notice):
                self._parts.log.add("notice-withdrawn", kind=notice.kind)
                self._take(events.NoticeWithdrawn(now))
            case Notice(kind="spot", action=action, at=at) if action in ACTIONS:
                deadline = deadline_from_epoch(at, self._parts.clock) if at is not None else now + UNTOLD_SECONDS
                self._parts.log.add("notice", kind="spot", action=action, left_s=deadline - now)
                self._take(events.Notice(now, ACTIONS[action], deadline))
            case Notice(kind="rebalance"):
                self._parts.log.add("notice", kind="rebalance", action="advise", left_s=None)
                self._take(events.Rebalance(now))
            case Notice(kind=kind, action=action):
                self._parts.log.add("note", text=f"{kind} notice ({action}): only told, not acted upon")

    def move(self, pod: str, target: str | None, time_left_s: float) -> str:
        """Start a move that a person asked for; returns its migration. Raises ValueError with the reason."""
        chosen = target or self._target()
        if chosen is None:
            raise ValueError("no other node is known (setting peers)")
        if chosen not in self._parts.settings.peers:
            raise ValueError(f"'{chosen}' is none of the other nodes (setting peers)")
        move = self._new_move(pod, chosen)
        try:
            self._migrations.start(move, self._parts.clock.monotonic() + time_left_s, Mode.LIVE, self._ended)
        except GiveUp as unknown:
            raise ValueError(str(unknown)) from unknown
        return move.migration

    def _take(self, event: events.NodeEvent) -> None:
        self._state, commands = node.step(self._state, event)
        self._migrations.unwilling = "it is itself to be taken away" if self.cordoned else ""
        for command in commands:
            self._perform(command)
        state = self._state
        idle = state.notice is not None and not (state.moving or state.waiting or state.resting)
        if idle and not self._listings and isinstance(event, events.MoveFinished | events.PodsListed):
            self._parts.log.add("moves-ended")

    def _perform(self, command: c.Command) -> None:
        match command:
            case c.Note(text=text):
                self._parts.log.add("note", text=text)
            case c.Cordon():
                self._parts.log.add("cordoned")
            case c.Uncordon():
                self._parts.log.add("uncordoned")
            case c.Wake(at=at, tag=tag):
                self._wake(at, tag)
            case c.ListPods():
                self._listings += 1
                self._tasks.create_task(self._list_pods(), name="list pods")
            case c.StartMove():
                self._start_move(command)
            case c.TightenMove(workload=workload, deadline=deadline):
                self._migrations.tighten(workload, deadline)
            case c.WithdrawMove(workload=workload):
                self._migrations.withdraw(workload)
            case _:
                raise GiveUp(f"{command.name} is no command of a node")

    def _wake(self, at: float, tag: str) -> None:
        now = self._parts.clock.monotonic
        delay = max(0.0, at - now())
        asyncio.get_running_loop().call_later(delay, lambda: self._take(events.TimeReached(now(), tag)))

    def _start_move(self, command: c.StartMove) -> None:
        try:
            move = self._new_move(command.workload, command.target)
            self._migrations.start(move, command.deadline, command.mode, self._ended)
        except (GiveUp, OSError) as failed:
            self._parts.log.add("note", text=f"{command.workload} cannot be moved: {failed}")
            self._ended(command.workload, Outcome.ROLLED_BACK)

    def _new_move(self, workload: str, target: str) -> Move:
        return Move(
            migration=str(uuid.uuid4()), workload=workload, source=self._parts.settings.node.name, target=target
        )

    def _ended(self, workload: str, outcome: Outcome) -> None:
        # Called from inside `_take` when a move cannot even begin: the machine must finish its own step first.
        now = self._parts.clock.monotonic
        asyncio.get_running_loop().call_soon(lambda: self._take(events.MoveFinished(now(), workload, outcome)))

    def ended(self, workload: str, outcome: Outcome) -> None:
        """Hear of a move that an earlier agent had begun."""
        self._ended(workload, outcome)

    async def _list_pods(self) -> None:
        """List what runs here, asked again until it works.

        What an earlier agent had begun to move is let settle before, for a while: one that hangs must not keep the
        others here.
        """
        target = self._target()
        if target is None:
            self._listings -= 1
            self._parts.log.add("note", text="no other node is known (setting peers): nothing can be moved")
            return
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((HandlerError, OSError)),
            wait=tenacity.wait_fixed(LIST_PAUSE),
            before_sleep=self._tell_failure,
        )
        try:
            await self._migrations.settled(self._parts.clock.monotonic() + SETTLE_SECONDS)
        except GiveUp as unsettled:
            self._parts.log.add("note", text=f"pods are listed all the same: {unsettled}")
        async for attempt in retrying:
            with attempt:
                deadline = self._parts.clock.monotonic() + LIST_SECONDS
                containers = await self._parts.runc.containers(deadline)
        running = [one.name for one in containers if one.status in {"running", "paused"}]
        pods = [await asyncio.to_thread(self._pod, name, target) for name in running]
        self._listings -= 1
        self._take(events.PodsListed(self._parts.clock.monotonic(), tuple(pods)))

    def _tell_failure(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._parts.log.add("note", text=f"the pods cannot be listed yet: {error}")

    def _pod(self, name: str, target: str) -> events.Pod:
        try:
            processes = processes_of(self._parts.pod_cgroup(name).path)
        except OSError:  # it has just ended: the move will find out
            processes = []
        return events.Pod(name, target, memory_bytes=soundness.memory_bytes(processes))

    def _target(self) -> str | None:
        """Choose where to go; the first peer, until a planner does better."""
        return next(iter(self._parts.settings.peers), None)


def status(parts: Parts, driver: NodeDriver, migrations: Migrations) -> dict[str, Any]:
    """Say what the agent is doing, for the admin socket."""
    return {
        "node": parts.settings.node.name,
        "cordoned": driver.cordoned,
        "tracker": parts.tracker_reason or "wp-async",
        "migrations": migrations.summary(),
    }

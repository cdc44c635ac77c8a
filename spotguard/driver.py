"""Drives one machine of the core: feeds it events, performs its commands in order, keeps its journal.

The core's contract is in core/commands.py. One driver, one machine, one `run()`; commands run one at a time in a task
beside the event loop of the machine, so that timers, notices and answers reach the machine while a command runs.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from spotguard.clock import Clock
from spotguard.core import commands as c
from spotguard.core.events import Done, Event, Failed, FailureKind, OwnerAnswer, TimeReached
from spotguard.core.state import Outcome
from spotguard.errors import JournalError
from spotguard.events_log import EventLog
from spotguard.journal import Journal


class Effects(Protocol):
    """What performs commands; one object per migration and side."""

    async def perform(self, command: c.Command) -> Event | None:
        """Perform a command and give its result; None is plain success.

        Raises EffectFailed for failures that are foreseen; anything else is a bug and is treated as GIVE_UP.
        """

    def cancel(self, command: str) -> None:
        """Ask a running command to end early."""

    def failure(self, error: Exception) -> FailureKind:
        """Tell how the machine must react to an error that `perform` raised."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a machine ended."""

    outcome: Outcome
    reason: str


type Step = Callable[[Any, Any], tuple[Any, tuple[c.Command, ...]]]


class Driver:
    """One machine at work."""

    def __init__(
        self,
        migration: str,
        step: Step,
        state: Any,
        effects: Effects,
        *,
        journal: Journal,
        clock: Clock,
        log: EventLog,
        fields: dict[str, str],
    ) -> None:
        """`fields`: what every entry in the event log carries (workload, side)."""
        self._migration = migration
        self._step = step
        self.state = state
        self._effects = effects
        self._journal = journal
        self._clock = clock
        self._log = log
        self._fields = {"migration": migration, **fields}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._batches: asyncio.Queue[tuple[c.Command, ...]] = asyncio.Queue()
        self._timers: set[asyncio.TimerHandle] = set()
        self._running = ""
        self._result: Result | None = None

    def post(self, event: Event) -> None:
        """Hand the machine an event; on the event loop's thread only."""
        self._events.put_nowait(event)

    async def run(self) -> Result:
        """Run the machine to its end."""
        worker = asyncio.create_task(self._work(), name=f"commands of {self._migration}")
        try:
            while self._result is None:
                self._take(await self._next_event(worker))
            return self._result
        finally:
            for timer in self._timers:
                timer.cancel()
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)

    async def _next_event(self, worker: asyncio.Task[None]) -> Event:
        """Wait for an event; a worker that broke ends the machine instead of letting it wait for ever."""
        getter = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({getter, worker}, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done():
                worker.result()
            return getter.result()
        finally:
            getter.cancel()  # also when the run itself is cancelled

    def _take(self, event: Event) -> None:
        before = getattr(self.state, "phase", None)
        self.state, commands = self._step(self.state, event)
        after = getattr(self.state, "phase", None)
        if after != before:
            self._log.add("phase", **self._fields, phase=str(after), before=str(before), because=_words(event))
        overtaking = tuple(command for command in commands if isinstance(command, c.Cancel))
        for command in overtaking:
            if command.command == self._running:
                self._effects.cancel(command.command)
        rest = tuple(command for command in commands if not isinstance(command, c.Cancel))
        if rest:
            self._batches.put_nowait(rest)

    async def _work(self) -> None:
        while True:
            for command in await self._batches.get():
                if not await self._perform(command):
                    break

    async def _perform(self, command: c.Command) -> bool:
        """Perform one command; False when what follows it in its tuple must not be done."""
        match command:
            case c.Persist():
                return await self._persist(command)
            case c.Wake(at=at, tag=tag):
                self._wake(at, tag)
            case c.Note(text=text):
                self._log.add("note", **self._fields, text=text)
            case c.Finished(outcome=outcome, reason=reason):
                await self._forget()
                self._finish(Result(outcome, reason))
            case _:
                await self._effect(command)
        return True

    async def _effect(self, command: c.Command) -> None:
        self._running = command.name
        start = self._clock.monotonic()
        event: Event | None
        try:
            event = await self._effects.perform(command)
        except Exception as error:  # noqa: BLE001 - every failure must reach the machine, or it would wait for ever
            kind = self._effects.failure(error)
            event = Failed(self._clock.monotonic(), command.name, kind, _reason(error))
        finally:
            self._running = ""
        seconds = self._clock.monotonic() - start
        self._log.add("done", **self._fields, command=command.name, seconds=seconds, result=_words(event))
        if command.answers:
            self.post(event if event is not None else Done(self._clock.monotonic(), command.name))

    async def _persist(self, command: c.Persist) -> bool:
        try:
            await asyncio.to_thread(self._journal.write, self._migration, command.record.to_json())
        except JournalError as error:
            self.post(Failed(self._clock.monotonic(), command.name, FailureKind.GIVE_UP, _reason(error)))
            return False
        return True

    async def _forget(self) -> None:
        """Remove the record; one that stays says DONE, and is removed at the next start."""
        try:
            await asyncio.to_thread(self._journal.remove, self._migration)
        except JournalError as error:
            self._log.add("note", **self._fields, text=_reason(error))

    def _wake(self, at: float, tag: str) -> None:
        def due() -> None:
            self._timers.discard(handle)
            self.post(TimeReached(self._clock.monotonic(), tag))

        loop = asyncio.get_running_loop()
        handle = loop.call_later(max(0.0, at - self._clock.monotonic()), due)
        self._timers.add(handle)

    def _finish(self, result: Result) -> None:
        self._result = result
        self._log.add("finished", **self._fields, outcome=str(result.outcome), reason=result.reason)
        self.post(Done(self._clock.monotonic(), "Finished"))


def _reason(error: BaseException) -> str:
    return f"{error}" if str(error) else type(error).__name__


def _words(event: Event | None) -> str:
    match event:
        case None:
            return "done"
        case Failed(command=command, kind=kind, reason=reason):
            return f"{command} failed ({kind}): {reason}"
        case Done(command=command):
            return f"{command} done"
        case OwnerAnswer(command=command, answer=answer):
            return f"{command}: {answer}"
        case _:
            return type(event).__name__

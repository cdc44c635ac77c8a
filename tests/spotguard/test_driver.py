"""The driver, with a machine and effects that do what the test says: order, failures, timers, ends."""

import asyncio
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from spotguard.clock import FakeClock
from spotguard.core import commands as c
from spotguard.core.events import Done, Event, Failed, FailureKind, OwnerAnswer, TimeReached
from spotguard.core.ownership import Refused
from spotguard.core.state import Mode, Move, Outcome, Record, Role
from spotguard.driver import Driver, Result
from spotguard.errors import JournalError
from spotguard.events_log import EventLog
from spotguard.journal import Journal

NOW = 1000.0
MOVE = Move(migration="m-1", workload="redis", source="a", target="b")
RECORD = Record(Role.SOURCE, MOVE, "holding", Mode.LIVE, NOW, "7")
END = c.Finished(Outcome.MOVED, "")


@dataclass(frozen=True)
class State:
    phase: str = "new"
    seen: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Go(Event):
    """Makes the machine say `commands`."""

    commands: tuple[c.Command, ...] = ()
    phase: str = ""


def step(state: State, event: Event) -> tuple[State, tuple[c.Command, ...]]:
    state = replace(state, seen=(*state.seen, event))
    if isinstance(event, Go):
        return replace(state, phase=event.phase or state.phase), event.commands
    return state, ()


class TiredError(Exception):
    pass


class Effects:
    """Performs what the test says, and remembers."""

    def __init__(self) -> None:
        self.performed: list[str] = []
        self.cancelled: list[str] = []
        self.told = asyncio.Event()
        self.doing: dict[str, Callable[[], Any]] = {}

    async def perform(self, command: c.Command) -> Event | None:
        self.performed.append(command.name)
        result = self.doing.get(command.name, lambda: None)()
        return await result if asyncio.iscoroutine(result) else result

    def cancel(self, command: str) -> None:
        self.cancelled.append(command)
        self.told.set()

    def failure(self, error: Exception) -> FailureKind:
        return FailureKind.AMBIGUOUS if isinstance(error, TiredError) else FailureKind.GIVE_UP


class Play:
    """One driver; `until` lets it run until the machine has seen what the test waits for."""

    def __init__(self, directory: Path, machine: Callable[[State, Event], Any] = step) -> None:
        self.clock = FakeClock(monotonic=NOW)
        self.log = EventLog(self.clock)
        self.journal = Journal(directory)
        self.effects = Effects()
        self.driver = Driver(
            "m-1", machine, State(), self.effects,
            journal=self.journal, clock=self.clock, log=self.log, fields={"workload": "redis", "side": "source"},
        )  # fmt: skip

    def say(self, *commands: c.Command, phase: str = "") -> None:
        self.driver.post(Go(NOW, commands, phase))

    async def run(self) -> Result:
        async with asyncio.timeout(5):
            return await self.driver.run()

    async def run_until(self, events: int) -> Result:
        """Let the machine see so many events, then end it: those that come after Finished it need not see."""
        running = asyncio.create_task(self.run())
        await until(lambda: len(self.seen()) >= events)
        self.say(END)
        return await running

    def seen(self) -> list[Event]:
        return [event for event in self.driver.state.seen if not isinstance(event, Go)]

    def logged(self, event: str) -> list[Mapping[str, Any]]:
        return [entry for entry in self.log.kept() if entry["event"] == event]


async def until(condition: Callable[[], object]) -> None:
    """Let others run until the condition holds; what it waits for may happen on a thread."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it never happened")


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


async def test_commands_are_done_in_order_one_at_a_time_and_finished_is_the_end(play: Play) -> None:
    running: list[str] = []

    def busy(name: str) -> Callable[[], Any]:
        async def work() -> None:
            assert running == []
            running.append(name)
            await asyncio.sleep(0)
            running.clear()

        return work

    play.effects.doing = {name: busy(name) for name in ("HoldNetwork", "FreezeProcesses", "VerifySound")}
    play.say(c.Persist(RECORD), c.HoldNetwork(NOW), c.FreezeProcesses(NOW))
    play.say(c.VerifySound(NOW), phase="over")
    assert await play.run_until(3) == Result(Outcome.MOVED, "")
    assert play.effects.performed == ["HoldNetwork", "FreezeProcesses", "VerifySound"]
    answers = [event.command for event in play.seen() if isinstance(event, Done)]
    assert answers[:3] == ["HoldNetwork", "FreezeProcesses", "VerifySound"]
    assert list(play.journal.records()) == []
    assert play.logged("phase")[0] == {
        "t": NOW, "event": "phase", "migration": "m-1", "workload": "redis", "side": "source",
        "phase": "over", "before": "new", "because": "Go",
    }  # fmt: skip
    assert play.logged("finished")[0]["outcome"] == "moved"


async def test_the_record_is_written_before_what_follows_it(play: Play) -> None:
    found: list[Any] = []
    play.effects.doing["HoldNetwork"] = lambda: found.extend(play.journal.records())
    play.say(c.Persist(RECORD), c.HoldNetwork(NOW), END)
    await play.run()
    assert found == [("m-1", RECORD.to_json())]


async def test_a_persist_that_fails_drops_the_rest_of_its_tuple_only(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise JournalError("no space")

    monkeypatch.setattr(play.journal, "write", full)
    play.say(c.Persist(RECORD), c.FreezeProcesses(NOW))
    play.say(c.HoldNetwork(NOW))
    await play.run_until(2)
    assert play.effects.performed == ["HoldNetwork"]
    assert play.seen()[0] == Failed(NOW, "Persist", FailureKind.GIVE_UP, "no space")


async def test_cancel_overtakes_and_reaches_only_the_running_command(play: Play) -> None:
    begun = asyncio.Event()

    async def work() -> Event:
        begun.set()
        await play.effects.told.wait()
        return Failed(NOW, "CopyRound", FailureKind.CANCELLED, "told to")

    play.effects.doing["CopyRound"] = work
    play.say(c.CopyRound(NOW, 0), c.HoldNetwork(NOW))
    running = asyncio.create_task(play.run())
    await begun.wait()
    play.say(c.Cancel("HoldNetwork"))  # waits its turn still: nothing to break off
    play.say(c.Note("never before the round's end"), c.Cancel("CopyRound"))
    await until(lambda: len(play.seen()) == 2)
    play.say(END)
    await running
    assert play.effects.cancelled == ["CopyRound"]
    assert play.effects.performed == ["CopyRound", "HoldNetwork"]
    assert play.seen()[0] == Failed(NOW, "CopyRound", FailureKind.CANCELLED, "told to")


async def test_errors_become_failed_with_the_kind_that_the_effects_tell(play: Play) -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    play.effects.doing = {
        "HoldNetwork": fail(TiredError("no answer")),
        "VerifySound": fail(OSError(errno.EIO, "bad disk")),
    }
    play.effects.doing["FreezeProcesses"] = fail(TimeoutError())
    play.say(c.HoldNetwork(NOW), c.FreezeProcesses(NOW), c.VerifySound(NOW))
    await play.run_until(3)
    assert play.seen()[:3] == [
        Failed(NOW, "HoldNetwork", FailureKind.AMBIGUOUS, "no answer"),
        Failed(NOW, "FreezeProcesses", FailureKind.GIVE_UP, "TimeoutError"),
        Failed(NOW, "VerifySound", FailureKind.GIVE_UP, "[Errno 5] bad disk"),
    ]


async def test_a_command_without_a_result_answers_nothing_even_when_it_fails(play: Play) -> None:
    def fail() -> None:
        raise TiredError

    play.effects.doing["AnswerOffer"] = fail
    play.say(c.AnswerOffer(accepted=True, reason=""), c.AnswerSource(resumed=True, reason=""), END)
    await play.run()
    assert play.effects.performed == ["AnswerOffer", "AnswerSource"]
    assert not any(isinstance(event, Failed) for event in play.seen())
    assert "failed (ambiguous): TiredError" in play.logged("done")[0]["result"]


async def test_an_event_of_the_effects_own_is_passed_on_as_it_is(play: Play) -> None:
    answer = OwnerAnswer(NOW, "ReadOwnership", Refused("no"))
    play.effects.doing["ReadOwnership"] = lambda: answer
    play.say(c.ReadOwnership(NOW))
    await play.run_until(1)
    assert play.seen()[0] is answer


async def test_timers_come_due_and_those_that_are_left_do_not_outlive_the_machine(play: Play) -> None:
    play.say(c.Wake(NOW - 5, "past"), c.Wake(NOW + 60, "far"))
    running = asyncio.create_task(play.run())
    await until(play.seen)
    assert play.seen() == [TimeReached(NOW, "past")]
    far = next(iter(play.driver._timers))
    assert far.when() - asyncio.get_running_loop().time() == pytest.approx(60, abs=1)
    play.say(END)
    await running
    assert far.cancelled()


async def test_notes_are_logged(play: Play) -> None:
    play.say(c.Note("something"), END)
    await play.run()
    assert play.logged("note")[0]["text"] == "something"


async def test_a_broken_worker_ends_the_run_with_its_error(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(play.journal, "write", broken)
    play.say(c.Persist(RECORD), END)
    with pytest.raises(ZeroDivisionError):
        await play.run()


async def test_a_machine_that_raises_ends_the_run_and_the_command_under_way(tmp_path: Path) -> None:
    def machine(state: State, event: Event) -> Any:
        if isinstance(event, TimeReached):
            raise ZeroDivisionError
        return step(state, event)

    play, ended = Play(tmp_path, machine), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    play.effects.doing["CopyRound"] = work
    play.say(c.Wake(NOW, "now"), c.CopyRound(NOW, 0))
    with pytest.raises(ZeroDivisionError):
        await play.run()
    assert ended.is_set()


async def test_a_run_that_is_cancelled_leaves_no_task_and_keeps_the_journal(play: Play) -> None:
    before = asyncio.all_tasks()
    play.say(c.Persist(RECORD))
    running = asyncio.create_task(play.run())
    await until(lambda: list(play.journal.records()))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert list(play.journal.records()) == [("m-1", RECORD.to_json())]

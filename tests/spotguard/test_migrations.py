"""The migrations of one agent: real machines, effects that do what the test says."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from handlers.bundle import Bundle, PodManifest
from handlers.control import Machine, Offer
from handlers.errors import GiveUp
from spotguard import migrations as module
from spotguard.clock import SystemClock
from spotguard.core import commands as c
from spotguard.core.events import Checked, Event, FailureKind, OwnerAnswer, StateComplete
from spotguard.core.ownership import Found, Owner, OwnerRecord, Won
from spotguard.core.state import Mode, Move, Outcome, Record, RecordError, Role
from spotguard.events_log import EventLog
from spotguard.journal import Journal
from spotguard.migrations import Migrations
from spotguard.parts import Parts, TransferLimits
from spotguard.settings import AgentSettings, NodeSettings, OwnerClientSettings, TlsSettings, TransferSettings
from spotguard.target_effects import Answers

GIB = 1 << 30
MANIFEST = PodManifest("redis", "10.77.1.10", ("/bin/redis",))
FIRST, SECOND = "0b5a35c4-7d6e-4a55-9d0e-3f7e1a2b3c4d", "1b5a35c4-7d6e-4a55-9d0e-3f7e1a2b3c4d"


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


@dataclass
class Script:
    """What the effects of both sides do: a gate for each command that is to wait, an error for each that is to fail."""

    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    performed: list[tuple[str, str]] = field(default_factory=list)  # (migration, command)
    movable: bool = False
    targets: dict[str, "TargetEffects"] = field(default_factory=dict)

    def gate(self, command: str) -> asyncio.Event:
        return self.gates.setdefault(command, asyncio.Event())

    async def perform(self, move: Move, command: c.Command) -> Event | None:
        self.performed.append((move.migration, command.name))
        if command.name in self.gates:
            await self.gates[command.name].wait()
        if command.name in self.errors:
            raise self.errors[command.name]
        now = time.monotonic()
        match command:
            case c.Preflight():
                return Checked(now, movable=self.movable, reasons=("the test says so",))
            case c.ReadOwnership():
                return OwnerAnswer(now, command.name, Found(OwnerRecord(move.migration, Owner.SOURCE, "7")))
            case c.TakeOwnership():
                return OwnerAnswer(now, command.name, Won(OwnerRecord(move.migration, Owner.TARGET, "8")))
            case _:
                return None

    def did(self, command: str) -> list[str]:
        return [migration for migration, name in self.performed if name == command]


class SourceEffects:
    def __init__(self, parts: Any, move: Move) -> None:
        self._script: Script = parts.tools
        self._move = move

    async def perform(self, command: c.Command) -> Event | None:
        return await self._script.perform(self._move, command)

    def cancel(self, command: str) -> None:
        self._script.gate(command).set()

    def failure(self, _: Exception) -> FailureKind:
        return FailureKind.GIVE_UP


class TargetEffects(SourceEffects):
    stream_port = 9720

    def __init__(
        self, parts: Any, move: Move, manifest: PodManifest, limits: TransferLimits, post: Callable[[Event], None]
    ) -> None:
        super().__init__(parts, move)
        self.manifest, self.limits, self.post = manifest, limits, post
        loop = asyncio.get_running_loop()
        self.answers = Answers(loop.create_future(), loop.create_future())
        self.frames: list[bytes] = []
        self._script.targets[move.migration] = self

    def keep_frames(self, block: bytes) -> None:
        self.frames.append(block)

    async def perform(self, command: c.Command) -> Event | None:
        match command:
            case c.AnswerOffer() if not self.answers.offered.done():
                self.answers.offered.set_result((command.accepted, command.reason))
            case c.AnswerSource() if not self.answers.restored.done():
                self.answers.restored.set_result((command.resumed, command.reason))
        return await super().perform(command)


class Node:
    """The migrations of node b, and what they use."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.script = Script()
        self.journal = Journal(directory / "journal")
        self.log = EventLog(SystemClock())
        settings = AgentSettings(
            node=NodeSettings(name="b", address="10.77.0.12"),
            tls=TlsSettings(cert=Path("/c"), key=Path("/k"), ca=Path("/a")),
            owner_store=OwnerClientSettings(url="https://store:9713"),
            transfer=TransferSettings(store_memory_max=4 * GIB),
        )
        parts = SimpleNamespace(
            settings=settings,
            clock=SystemClock(),
            log=self.log,
            tools=self.script,
            bundle=lambda name: Bundle(directory / name),
        )
        self.migrations = Migrations(cast(Parts, parts), self.journal, tasks)
        self.ended: list[tuple[str, Outcome]] = []

    def offer(
        self,
        migration: str = FIRST,
        manifest: PodManifest = MANIFEST,
        *,
        peer: str = "a",
        deadline: float | None = None,
        **changes: Any,
    ) -> Any:
        made = Offer(migration, peer, manifest.to_json(), GIB, 1 << 20, 0, "7", 60.0, machine=Machine("x", "6", ()))
        return self.migrations.offer(peer, replace(made, **changes), deadline or soon())

    def start(self, workload: str = "redis", migration: str = SECOND, left: float = 120) -> None:
        move = Move(migration=migration, workload=workload, source="b", target="c")
        self.migrations.start(move, soon(left), Mode.LIVE, lambda *end: self.ended.append(end))

    def phases(self) -> dict[str, str]:
        return {one["workload"]: one["phase"] for one in self.migrations.summary()}

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(100_000):
            if condition():
                return
            await asyncio.sleep(0)
        pytest.fail(f"it never happened; {self.migrations.summary()}, {self.script.performed}")


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(module, "SourceEffects", SourceEffects)
    monkeypatch.setattr(module, "TargetEffects", TargetEffects)
    async with asyncio.TaskGroup() as tasks:
        made = Node(tmp_path, tasks)
        yield made
        for task in list(tasks._tasks):
            task.cancel()


# --- offers -----------------------------------------------------------------------------------------------------------


async def test_an_offer_is_answered_when_all_is_ready_and_a_restore_when_it_runs(node: Node) -> None:
    answer = await node.offer()
    assert (answer.stream_host, answer.stream_port) == ("10.77.0.12", 9720)
    assert node.phases() == {"redis": "receiving"}
    assert await node.migrations.status("a", FIRST) == {"phase": "receiving"}
    effects = node.script.targets[FIRST]
    assert effects.manifest == MANIFEST
    await node.migrations.frames("a", FIRST, b"block")
    assert effects.frames == [b"block"]
    fill = node.script.gate("AwaitFill")
    effects.post(StateComplete(time.monotonic()))
    answered = await node.migrations.restore("a", FIRST, soon())
    assert answered.outcome == "resumed"
    fill.set()
    await node.until(lambda: not node.phases())
    assert list(node.journal.records()) == []


async def test_a_restore_that_fails_says_why(node: Node) -> None:
    node.script.errors["RestoreProcesses"] = GiveUp("CRIU does not want to")
    await node.offer()
    node.script.targets[FIRST].post(StateComplete(time.monotonic()))
    answered = await node.migrations.restore("a", FIRST, soon())
    assert answered.outcome == "failed"
    assert "CRIU does not want to" in answered.reason


async def test_what_cannot_be_prepared_is_refused_with_the_reason(node: Node) -> None:
    node.script.errors["PrepareSandbox"] = GiveUp("no room for a sandbox")
    with pytest.raises(GiveUp, match="no room for a sandbox"):
        await node.offer()
    await node.until(lambda: not node.phases())


async def test_a_manifest_that_makes_no_sense_is_refused(node: Node) -> None:
    with pytest.raises(GiveUp, match="pod manifest"):
        await node.offer(workload={"name": "../x"})
    assert node.script.performed == []


async def test_only_the_peer_that_made_the_offer_is_listened_to(node: Node) -> None:
    await node.offer()
    for other, migration in (("c", FIRST), ("a", SECOND)):
        with pytest.raises(GiveUp, match="is not arriving here from"):
            await node.migrations.restore(other, migration, soon())
        with pytest.raises(GiveUp, match="is not arriving here from"):
            await node.migrations.frames(other, migration, b"block")
        with pytest.raises(GiveUp, match="is not arriving here from"):
            await node.migrations.status(other, migration)
        await node.migrations.abort(other, migration)
    assert node.script.targets[FIRST].frames == []
    assert node.phases() == {"redis": "receiving"}
    await node.migrations.abort("a", FIRST)
    await node.until(lambda: not node.phases())
    assert node.script.did("DestroyRestored") == [FIRST]


async def test_a_migration_is_offered_once(node: Node) -> None:
    await node.offer()
    with pytest.raises(GiveUp, match="is here already"):
        await node.offer()


async def test_an_offer_waits_until_an_earlier_try_has_cleaned_up(node: Node) -> None:
    cleaning = node.script.gate("CleanUp")
    await node.offer()
    await node.migrations.abort("a", FIRST)
    again = asyncio.ensure_future(node.offer(SECOND))
    await node.until(lambda: node.phases() == {"redis": "cleaning"})
    assert node.script.did("PrepareSandbox") == [FIRST]
    cleaning.set()
    await again
    assert node.script.did("PrepareSandbox") == [FIRST, SECOND]
    assert node.phases() == {"redis": "receiving"}


async def test_an_earlier_try_that_goes_on_beyond_the_deadline_refuses_the_next(node: Node) -> None:
    await node.offer()
    with pytest.raises(GiveUp, match="an earlier move of redis goes on"):
        await node.offer(SECOND, deadline=soon(0.05))
    assert node.script.did("PrepareSandbox") == [FIRST]


async def test_of_two_offers_of_one_workload_at_once_one_waits(node: Node) -> None:
    both = [
        asyncio.ensure_future(node.offer(FIRST)), asyncio.ensure_future(node.offer(SECOND, deadline=soon(0.1)))
    ]  # fmt: skip
    first, second = await asyncio.gather(*both, return_exceptions=True)
    assert first.stream_port == 9720
    assert isinstance(second, GiveUp)
    assert node.script.did("PrepareSandbox") == [FIRST]


async def test_another_workload_does_not_wait(node: Node) -> None:
    await node.offer()
    await node.offer(SECOND, replace(MANIFEST, name="java"))
    assert node.phases() == {"redis": "receiving", "java": "receiving"}


async def test_an_offer_waits_for_the_same_workload_to_leave(node: Node) -> None:
    checking = node.script.gate("Preflight")
    node.start()
    offered = asyncio.ensure_future(node.offer())
    await node.until(lambda: node.phases() == {"redis": "checking"})
    assert not node.script.did("PrepareSandbox")
    checking.set()
    await offered


async def test_a_node_that_is_to_go_takes_nothing(node: Node) -> None:
    node.migrations.unwilling = "it is itself to be taken away"
    with pytest.raises(GiveUp, match="b takes nothing: it is itself to be taken away"):
        await node.offer()


@pytest.mark.parametrize("announced", ["max_memory", "max_images"])
async def test_a_workload_that_is_too_large_is_refused_with_the_setting(announced: str, node: Node) -> None:
    with pytest.raises(GiveUp, match=r"transfer\.store_memory_max"):
        await node.offer(**{announced: 4 * GIB + 1})
    assert node.script.performed == []


async def test_what_arrives_at_the_same_time_counts_together_until_it_is_over(node: Node) -> None:
    await node.offer(max_memory=3 * GIB)
    with pytest.raises(GiveUp, match=r"transfer\.store_memory_max"):
        await node.offer(SECOND, replace(MANIFEST, name="java"), max_memory=2 * GIB)
    await node.migrations.abort("a", FIRST)
    await node.until(lambda: not node.phases())
    await node.offer(SECOND, replace(MANIFEST, name="java"), max_memory=2 * GIB)


async def test_an_offer_that_takes_too_long_leaves_the_asker_not_knowing_and_the_machine_at_work(node: Node) -> None:
    preparing = node.script.gate("PrepareSandbox")
    with pytest.raises(TimeoutError):
        await node.offer(deadline=soon(0.05))
    assert node.phases() == {"redis": "preparing"}
    preparing.set()
    await node.until(lambda: node.phases() == {"redis": "receiving"})


# --- leaving ----------------------------------------------------------------------------------------------------------


async def test_a_move_ends_with_its_outcome(node: Node) -> None:
    node.start()
    assert node.phases() == {"redis": "new"}
    await node.until(lambda: node.ended)
    assert node.ended == [("redis", Outcome.UNMOVABLE)]
    assert node.phases() == {}


async def test_a_workload_that_leaves_or_arrives_is_not_moved_away(node: Node) -> None:
    gate = node.script.gate("Preflight")
    node.start()
    with pytest.raises(GiveUp, match="is being moved already"):
        node.start(migration=FIRST)
    gate.set()
    await node.until(lambda: node.ended)
    await node.offer()
    with pytest.raises(GiveUp, match="is still arriving"):
        node.start()


async def test_settled_waits_for_the_last_that_leaves(node: Node) -> None:
    await node.migrations.settled(soon())
    gate = node.script.gate("Preflight")
    node.start()
    with pytest.raises(GiveUp, match="earlier moves go on"):
        await node.migrations.settled(soon(0.02))
    waiting = asyncio.ensure_future(node.migrations.settled(soon()))
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.set()
    await waiting
    assert node.ended


async def test_news_of_the_notice_reach_the_workload_s_machine_and_no_other(node: Node) -> None:
    node.script.movable = True
    gate = node.script.gate("Preflight")
    node.start()
    before = node.migrations._leaving["redis"]
    node.migrations.tighten("java", soon(1))
    node.migrations.withdraw("java")
    near = soon(30)
    node.migrations.tighten("redis", near)
    await node.until(lambda: before.state.deadline == near)
    node.migrations.withdraw("redis")
    gate.set()
    await node.until(lambda: node.ended)
    assert node.ended[0][1] in {Outcome.ROLLED_BACK, Outcome.UNMOVABLE}
    assert not node.script.did("HoldNetwork")


# --- after a restart --------------------------------------------------------------------------------------------------


def record(role: Role, phase: str, migration: str, workload: str) -> Record:
    move = Move(migration=migration, workload=workload, source="a", target="b")
    if role is Role.SOURCE:
        move = replace(move, source="b", target="c")
    return Record(role, move, phase, Mode.LIVE, soon(100), "7")


async def test_what_the_journal_holds_goes_on(node: Node) -> None:
    node.script.gate("DestroyRestored")
    node.script.gate("StayFrozen")
    for one in (record(Role.TARGET, "preparing", FIRST, "redis"), record(Role.SOURCE, "done", SECOND, "java")):
        node.journal.write(one.move.migration, one.to_json())
    node.migrations.resume(lambda *end: node.ended.append(end))
    assert set(node.phases()) == {"redis", "java"}  # known before any machine has run
    with pytest.raises(GiveUp, match="is still arriving"):
        node.start("redis")
    await node.until(lambda: node.phases() == {"redis": "destroying"} and node.ended)
    assert node.ended[0][0] == "java"
    assert node.script.targets[FIRST].manifest.command == ()  # nothing was made yet
    assert [entry["side"] for entry in node.log.kept() if entry["event"] == "restarted"] == ["target", "source"]
    node.script.gate("DestroyRestored").set()
    await node.until(lambda: not node.phases())
    assert list(node.journal.records()) == []


async def test_a_record_that_cannot_be_understood_stops_the_start(node: Node) -> None:
    node.journal.write(FIRST, {**record(Role.SOURCE, "dumping", FIRST, "redis").to_json(), "phase": "dreaming"})
    with pytest.raises(RecordError):
        node.migrations.resume(lambda *end: node.ended.append(end))
    assert node.phases() == {}


async def test_a_machine_that_breaks_ends_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "SourceEffects", SourceEffects)
    monkeypatch.setattr(module.source, "step", broken)
    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.TaskGroup() as tasks:
            Node(tmp_path, tasks).start()
    assert ended.group_contains(ZeroDivisionError)

"""What a notice makes a node do: moves begun, tried again, withdrawn; what a person asks for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from handlers.cgroup import Cgroup
from handlers.errors import GiveUp
from handlers.notice import Action, Kind, Notice, NoticeWithdrawn
from handlers.runtime import Container, Status
from spotguard import node_driver as module
from spotguard.clock import FakeClock
from spotguard.core.deadline import Limits
from spotguard.core.state import Mode, Move, Outcome
from spotguard.events_log import EventLog
from spotguard.migrations import Migrations
from spotguard.node_driver import NodeDriver, status
from spotguard.parts import Parts
from spotguard.settings import AgentSettings, NodeSettings, OwnerClientSettings, TlsSettings

NOW, WALL = 1000.0, 1_800_000_000.0


class Moves:
    """The migrations, as a node sees them."""

    def __init__(self) -> None:
        self.started: list[tuple[Move, float, Mode]] = []
        self.told: list[tuple[str, Any]] = []
        self.ends: dict[str, Callable[[str, Outcome], None]] = {}
        self.refuses = 0
        self.unsettled = 0
        self.unwilling = ""

    def start(self, move: Move, deadline: float, mode: Mode, ended: Callable[[str, Outcome], None]) -> None:
        if self.refuses:
            self.refuses -= 1
            raise GiveUp(f"{move.workload} is being moved already")
        self.started.append((move, deadline, mode))
        self.ends[move.workload] = ended

    def tighten(self, workload: str, deadline: float) -> None:
        self.told.append((workload, deadline))

    def withdraw(self, workload: str) -> None:
        self.told.append((workload, "withdrawn"))

    async def settled(self, deadline: float) -> None:
        assert deadline > NOW
        if self.unsettled:
            self.unsettled -= 1
            raise GiveUp("earlier moves go on")

    def summary(self) -> list[dict[str, str]]:
        return [{"workload": move.workload, "side": "source", "phase": "new"} for move, _, _ in self.started]


class Node:
    """A node with containers, whose time stands still."""

    def __init__(self, tasks: asyncio.TaskGroup, peers: dict[str, str], parallel: int) -> None:
        self.clock = FakeClock(NOW, WALL)
        self.log = EventLog(self.clock)
        self.moves = Moves()
        self.containers: list[Container] = []
        self.unlistable = 0
        self.parts = cast(
            Parts,
            SimpleNamespace(
                settings=AgentSettings(
                    node=NodeSettings(name="a", address="10.77.0.11"),
                    tls=TlsSettings(cert=Path("/c"), key=Path("/k"), ca=Path("/a")),
                    owner_store=OwnerClientSettings(url="https://store:9713"),
                    peers=peers,
                ),
                clock=self.clock,
                log=self.log,
                runc=SimpleNamespace(containers=self._list),
                pod_cgroup=lambda name: Cgroup(Path("/sys/fs/cgroup/no-such-group") / name),
                tracker_reason="",
            ),
        )
        self.driver = NodeDriver(self.parts, cast(Migrations, self.moves), tasks, parallel=parallel)

    async def _list(self, deadline: float) -> list[Container]:
        assert deadline > NOW
        if self.unlistable:
            self.unlistable -= 1
            raise GiveUp("runc list failed (1)")
        return self.containers

    def runs(self, *names: str, state: Status = "running") -> None:
        self.containers += [Container(name, state, 1, Path()) for name in names]

    def notice(self, action: Action = "terminate", left: float | None = 120.0, kind: Kind = "spot") -> Notice:
        told = Notice(kind, action, None if left is None else WALL + left, "imds", "n-1")
        self.driver.heard(told)
        return told

    def end(self, workload: str, outcome: Outcome) -> None:
        self.moves.ends.pop(workload)(workload, outcome)

    def started(self) -> list[str]:
        return [move.workload for move, _, _ in self.moves.started]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log.kept() if entry["event"] == event]

    def notes(self) -> str:
        return "\n".join(entry["text"] for entry in self.logged("note"))

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(100_000):
            if condition():
                return
            await asyncio.sleep(0)
        pytest.fail(f"it never happened; {self.log.kept()}")


type MakeNode = Callable[..., Node]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeNode]:
    monkeypatch.setattr(module, "LIST_PAUSE", 0.0)
    async with asyncio.TaskGroup() as tasks:

        def node(*, peers: tuple[str, ...] = ("b", "c"), parallel: int = 1) -> Node:
            return Node(tasks, dict.fromkeys(peers, "10.77.0.12"), parallel)

        yield node


@pytest.fixture
def node(make: MakeNode) -> Node:
    return make()


async def test_a_notice_moves_what_runs_one_at_a_time_by_the_node_s_end(node: Node) -> None:
    node.runs("redis", "java")
    node.runs("paused", state="paused")
    node.runs("gone", state="stopped")
    node.runs("new", state="created")
    node.notice()
    assert (node.driver.cordoned, node.moves.unwilling != "") == (True, True)
    assert node.logged("notice")[0]["left_s"] == pytest.approx(120)
    await node.until(node.started)
    move, deadline, mode = node.moves.started[0]
    assert (move.workload, move.source, move.target) == ("java", "a", "b")
    assert (deadline, mode) == (NOW + 120, Mode.LIVE)
    node.end("java", Outcome.MOVED)
    await node.until(lambda: len(node.started()) == 2)
    node.end("paused", Outcome.UNMOVABLE)
    await node.until(lambda: len(node.started()) == 3)
    assert node.started() == ["java", "paused", "redis"]
    assert not node.logged("moves-ended")
    node.end("redis", Outcome.MOVED)
    await node.until(lambda: node.logged("moves-ended"))
    assert len({move.migration for move, _, _ in node.moves.started}) == 3


async def test_as_many_move_side_by_side_as_is_set(make: MakeNode) -> None:
    node = make(parallel=2)
    node.runs("a1", "a2", "a3")
    node.notice()
    await node.until(lambda: len(node.started()) == 2)
    assert node.started() == ["a1", "a2"]


async def test_a_hibernation_moves_all_at_once_frozen(node: Node) -> None:
    node.runs("a1", "a2", "a3")
    node.notice("hibernate")
    await node.until(lambda: len(node.started()) == 3)
    assert {mode for _, _, mode in node.moves.started} == {Mode.STOP_AND_COPY}
    assert {deadline for _, deadline, _ in node.moves.started} == {NOW + Limits().hibernate_seconds}


async def test_a_nearer_end_is_told_to_what_moves(node: Node) -> None:
    node.runs("redis", "java")
    node.notice()
    await node.until(node.started)
    node.notice(left=60)
    node.notice(left=90)
    assert node.moves.told == [("java", pytest.approx(NOW + 60))]


async def test_a_notice_that_is_withdrawn_withdraws_its_moves(node: Node) -> None:
    node.runs("redis", "java")
    told = node.notice()
    await node.until(node.started)
    node.driver.heard(NoticeWithdrawn(told))
    assert node.moves.told == [("java", "withdrawn")]
    assert (node.driver.cordoned, node.moves.unwilling) == (False, "")
    node.end("java", Outcome.ROLLED_BACK)
    await node.until(lambda: "java: rolled-back" in node.notes())
    assert node.started() == ["java"]


async def test_a_node_without_containers_is_done_at_once(node: Node) -> None:
    node.notice()
    await node.until(lambda: node.logged("moves-ended"))
    assert node.started() == []


async def test_without_peers_nothing_is_moved_and_that_is_said(make: MakeNode) -> None:
    node = make(peers=())
    node.runs("redis")
    node.notice()
    await node.until(lambda: "no other node is known" in node.notes())
    with pytest.raises(ValueError, match="no other node is known"):
        node.driver.move("redis", None, 60)


async def test_a_recommendation_cordons_and_moves_nothing(node: Node) -> None:
    node.runs("redis")
    told = node.notice("advise", kind="rebalance", left=None)
    assert node.driver.cordoned
    node.driver.heard(NoticeWithdrawn(told))
    assert not node.driver.cordoned
    assert node.started() == []


@pytest.mark.parametrize(("kind", "action"), [("maintenance", "reboot"), ("asg", "terminate"), ("spot", "reboot")])
async def test_other_notices_are_only_told(kind: Kind, action: Action, node: Node) -> None:
    node.runs("redis")
    node.notice(action, kind=kind)
    assert f"{kind} notice ({action})" in node.notes()
    assert not node.driver.cordoned


async def test_a_time_that_is_past_moves_nothing(node: Node) -> None:
    node.runs("redis")
    node.notice(left=-5)
    assert not node.driver.cordoned
    assert "its time is past" in node.notes()


@pytest.mark.parametrize(("action", "left"), [("terminate", 60.0), ("hibernate", Limits().hibernate_seconds)])
async def test_a_notice_without_a_time_is_a_notice_with_less_than_two_minutes(
    action: Action, left: float, node: Node
) -> None:
    node.runs("redis")
    node.notice(action, left=None)
    await node.until(node.started)
    assert node.moves.started[0][1] == NOW + left


async def test_a_move_of_an_earlier_agent_that_hangs_does_not_keep_the_others_here(node: Node) -> None:
    node.runs("redis")
    node.moves.unsettled = 1000
    node.notice()
    await node.until(node.started)
    assert node.notes().count("pods are listed all the same: earlier moves go on") == 1


async def test_moves_have_not_ended_while_pods_are_being_listed(node: Node) -> None:
    node.runs("redis")
    node.unlistable = 1000
    node.notice()
    node.driver.ended("redis", Outcome.ROLLED_BACK)
    await node.until(lambda: node.unlistable < 990)
    assert not node.logged("moves-ended")
    node.unlistable = 0
    await node.until(node.started)


async def test_listing_is_tried_until_it_works(node: Node) -> None:
    node.runs("redis")
    node.unlistable = 3
    node.notice()
    await node.until(node.started)
    assert node.notes().count("the pods cannot be listed yet: runc list failed (1)") == 3


async def test_a_move_that_was_rolled_back_is_tried_again_and_in_the_end_is_not(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.runs("redis")
    node.notice()
    waits: list[float] = []

    class Loop:
        def call_later(self, delay: float, callback: Callable[[], None]) -> None:
            waits.append(delay)
            loop.call_soon(callback)

        def call_soon(self, callback: Callable[[], None]) -> None:
            loop.call_soon(callback)

    loop = asyncio.get_running_loop()
    fake = SimpleNamespace(**{**vars(asyncio), "get_running_loop": Loop})
    monkeypatch.setattr(module, "asyncio", fake)
    limits = Limits()
    for tries in range(1, limits.moves + 1):
        await node.until(lambda tries=tries: len(node.started()) == tries)
        assert not node.logged("moves-ended")
        node.end("redis", Outcome.ROLLED_BACK)
    await node.until(lambda: node.logged("moves-ended"))
    assert waits == [limits.retry_pause * n for n in range(1, limits.moves)]
    assert [mode for _, _, mode in node.moves.started][-1] is Mode.STOP_AND_COPY


async def test_a_move_that_cannot_begin_counts_as_a_try(node: Node) -> None:
    node.runs("redis")
    node.moves.refuses = 1
    node.notice()
    await node.until(lambda: "is tried again" in node.notes())
    assert "redis cannot be moved: redis is being moved already" in node.notes()


async def test_a_person_moves_a_pod(node: Node) -> None:
    migration = node.driver.move("redis", None, 60)
    other = node.driver.move("java", "c", 30)
    (first, deadline, mode), (second, *_) = node.moves.started
    assert (first.migration, first.target, deadline, mode) == (migration, "b", NOW + 60, Mode.LIVE)
    assert (second.migration, second.target) == (other, "c")
    assert not node.driver.cordoned
    node.end("redis", Outcome.MOVED)  # no notice: nothing follows
    await asyncio.sleep(0)
    assert not node.logged("moves-ended")


async def test_what_a_person_cannot_have_is_told(node: Node) -> None:
    node.moves.refuses = 1
    with pytest.raises(ValueError, match="is being moved already"):
        node.driver.move("redis", None, 60)
    with pytest.raises(ValueError, match="workload"):
        node.driver.move("../x", None, 60)
    for target in ("a", "nobody"):
        with pytest.raises(ValueError, match="is none of the other nodes"):
            node.driver.move("redis", target, 60)
    assert node.started() == []


async def test_a_move_of_an_earlier_agent_that_ends_is_heard(node: Node) -> None:
    node.driver.ended("redis", Outcome.MOVED)
    await node.until(lambda: "redis finished, but was not moving" in node.notes())


async def test_status(node: Node) -> None:
    node.driver.move("redis", None, 60)
    assert status(node.parts, node.driver, cast(Migrations, node.moves)) == {
        "node": "a",
        "cordoned": False,
        "tracker": "wp-async",
        "migrations": [{"workload": "redis", "side": "source", "phase": "new"}],
    }


def test_every_action_of_the_end_of_an_instance_is_known() -> None:
    assert set(module.ACTIONS) == {"terminate", "stop", "hibernate"}

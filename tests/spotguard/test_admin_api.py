"""The door for people on the node, over its Unix socket."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from spotguard import admin_api
from spotguard.clock import FakeClock
from spotguard.events_log import EventLog


class Agent:
    def __init__(self) -> None:
        self.moves: list[tuple[str, str | None, float]] = []

    def status(self) -> dict[str, Any]:
        return {"node": "a", "migrations": []}

    def move(self, pod: str, target: str | None, time_left_s: float) -> str:
        if pod == "unknown":
            raise ValueError("there is no pod 'unknown'")
        self.moves.append((pod, target, time_left_s))
        return "m-1"


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def log() -> EventLog:
    return EventLog(FakeClock(monotonic=1.0))


@pytest.fixture
async def door(agent: Agent, log: EventLog, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    path = tmp_path / "run" / "agent.sock"
    path.parent.mkdir()
    path.write_text("left over by an agent that was killed")
    async with (
        admin_api.serve(agent, log, path),
        aiohttp.ClientSession("http://agent", connector=aiohttp.UnixConnector(str(path))) as session,
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        yield session


async def test_status_and_moves(door: aiohttp.ClientSession, agent: Agent) -> None:
    async with door.get("/v1/status") as answer:
        assert (answer.status, await answer.json()) == (200, {"node": "a", "migrations": []})
    async with door.post("/v1/migrations", json={"pod": "redis"}) as answer:
        assert (answer.status, await answer.json()) == (202, {"migration": "m-1"})
    async with door.post("/v1/migrations", json={"pod": "redis", "target": "b", "time_left_s": 9.5}) as answer:
        assert answer.status == 202
    assert agent.moves == [("redis", None, 120.0), ("redis", "b", 9.5)]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('{"pod": "unknown"}', "there is no pod 'unknown'"),
        ("{", "JSON"),
        ("{}", "KeyError"),
        ("[]", "TypeError"),
        ("null", "TypeError"),
        ('{"pod": "redis", "time_left_s": "soon"}', "soon"),
        ('{"pod": "redis", "time_left_s": null}', "TypeError"),
        ('{"pod": "redis", "time_left_s": NaN}', "time_left_s"),
        ('{"pod": "redis", "time_left_s": 1e999}', "time_left_s"),
        ('{"pod": "redis", "time_left_s": -1}', "time_left_s"),
    ],
)
async def test_a_request_that_makes_no_sense_is_told_why(
    body: str, complaint: str, door: aiohttp.ClientSession, agent: Agent
) -> None:
    async with door.post("/v1/migrations", data=body) as answer:
        assert (answer.status, complaint in (await answer.json())["reason"]) == (400, True)
    assert agent.moves == []


async def test_a_body_without_end_is_refused(door: aiohttp.ClientSession, agent: Agent) -> None:
    async with door.post("/v1/migrations", data=json.dumps({"pod": "x" * (20 << 10)})) as answer:
        assert answer.status == 413
    assert agent.moves == []


async def test_events_come_as_they_happen_and_a_reader_may_hang_up(door: aiohttp.ClientSession, log: EventLog) -> None:
    log.add("ready", node="a")
    async with asyncio.timeout(5):
        async with door.get("/v1/events") as answer:
            assert answer.content_type == "application/x-ndjson"
            assert json.loads(await answer.content.readline()) == {"t": 1.0, "event": "ready", "node": "a"}
            log.add("notice", action="stop")
            assert json.loads(await answer.content.readline())["event"] == "notice"
        while log._readers:  # noticed at the next entry
            log.add("note", text="x" * 1000)
            await asyncio.sleep(0)

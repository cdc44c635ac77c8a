"""The event log: past and live for every reader, none buffered without end."""

import asyncio
from typing import Any

import pytest

from spotguard import events_log
from spotguard.clock import FakeClock
from spotguard.events_log import EventLog


async def take(log: EventLog, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(5):
        async for entry in log.follow():
            found.append(entry)
            if len(found) == count:
                break
    return found


async def test_entries_carry_the_time_and_the_oldest_are_dropped() -> None:
    clock = FakeClock(monotonic=10.0)
    log = EventLog(clock, keep=2)
    for number in range(3):
        log.add("round", number=number)
        await clock.advance(1)
    assert log.kept() == [{"t": 11.0, "event": "round", "number": 1}, {"t": 12.0, "event": "round", "number": 2}]


async def test_every_reader_gets_the_past_and_then_the_present_with_no_gap() -> None:
    log = EventLog(FakeClock())
    log.add("a")
    readers = [asyncio.create_task(take(log, 4)) for _ in range(2)]
    follower = log.follow()
    assert (await anext(follower))["event"] == "a"
    log.add("b")  # while the past is still being read by all three
    log.add("c")
    assert (await anext(follower))["event"] == "b"
    log.add("d")
    for reader in readers:
        assert [entry["event"] for entry in await reader] == ["a", "b", "c", "d"]
    assert [(await anext(follower))["event"] for _ in "cd"] == ["c", "d"]
    await follower.aclose()


async def test_a_reader_that_does_not_keep_up_is_cut_off_and_the_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events_log, "QUEUE", 3)
    log = EventLog(FakeClock())
    log.add("first")
    slow, quick = log.follow(), log.follow()
    await anext(slow)
    await anext(quick)
    for number in range(5):
        log.add(f"{number}")
        assert (await anext(quick))["event"] == f"{number}"
    async with asyncio.timeout(5):
        assert [entry["event"] async for entry in slow] == ["0", "1", "2"]
    await quick.aclose()


async def test_a_reader_that_leaves_is_forgotten() -> None:
    log = EventLog(FakeClock())
    log.add("a")
    follower = log.follow()
    await anext(follower)
    assert len(log._readers) == 1
    await follower.aclose()
    assert not log._readers

"""The clocks."""

import asyncio
import time

from spotguard.clock import FakeClock, SystemClock, deadline_from_epoch


async def test_the_system_clock_agrees_with_the_loop() -> None:
    clock = SystemClock()
    assert abs(clock.monotonic() - asyncio.get_running_loop().time()) < 0.1
    start = time.monotonic()
    await clock.sleep_until(start + 0.02)
    assert time.monotonic() - start >= 0.019
    await clock.sleep_until(start - 100)
    assert time.monotonic() - start < 0.25


async def test_the_fake_clock_wakes_in_order_each_at_its_own_time() -> None:
    clock = FakeClock(monotonic=10.0)
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, *deadlines: float) -> None:
        for deadline in deadlines:
            await clock.sleep_until(deadline)
            seen.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("late", 15.0))
        group.create_task(sleeper("early", 11.0, 12.0))
        await clock.advance(1.5)
        assert seen == [("early", 11.0)]
        assert clock.sleepers == 2
        await clock.advance(3.5)
    assert seen == [("early", 11.0), ("early", 12.0), ("late", 15.0)]
    assert clock.monotonic() == 15.0


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep_until(2000.0))
    await asyncio.sleep(0)
    assert clock.sleepers == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert clock.sleepers == 0
    await clock.advance(5000.0)


def test_a_deadline_translated_once_does_not_follow_the_wall_clock() -> None:
    clock = FakeClock(monotonic=50.0, wall=1000.0)
    deadline = deadline_from_epoch(1120.0, clock)
    assert deadline == 170.0
    clock.jump_wall(3600.0)
    assert deadline - clock.monotonic() == 120.0
    assert deadline_from_epoch(1000.0, clock) == 50.0 - 3600.0

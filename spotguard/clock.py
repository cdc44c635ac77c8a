"""Time: the only file that reads the wall clock."""

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """What the rest of SpotGuard may ask of time."""

    def monotonic(self) -> float:
        """Return seconds that never go back, of this machine only; deadlines are in these."""

    def wall(self) -> float:
        """Return seconds since the epoch; may jump either way, so it only translates times that others wrote."""

    async def sleep_until(self, deadline: float) -> None:
        """Return when `monotonic()` has reached `deadline`, at once when it is past."""


class SystemClock:
    """The machine's clocks. asyncio's loop counts in `time.monotonic()` too."""

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    def wall(self) -> float:
        """Return `time.time()`."""
        return time.time()

    async def sleep_until(self, deadline: float) -> None:
        """Sleep on the running loop; see Clock."""
        await asyncio.sleep(max(0.0, deadline - time.monotonic()))


class FakeClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, monotonic: float = 1000.0, wall: float = 1_800_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._tie = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        """Return the fake monotonic time."""
        return self._monotonic

    def wall(self) -> float:
        """Return the fake wall time."""
        return self._wall

    @property
    def sleepers(self) -> int:
        """Count the tasks that wait in `sleep_until`."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def sleep_until(self, deadline: float) -> None:
        """Wait until `advance` has moved the time to `deadline`."""
        if deadline <= self._monotonic:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (deadline, next(self._tie), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Move both clocks, waking sleepers in the order of their deadlines, each at its own time."""
        end = self._monotonic + seconds
        await _let_others_run()
        while self._sleepers and self._sleepers[0][0] <= end:
            deadline, _, future = heapq.heappop(self._sleepers)
            self._step(deadline)
            if not future.done():
                future.set_result(None)
            await _let_others_run()
        self._step(end)

    def jump_wall(self, seconds: float) -> None:
        """Move the wall clock alone, as NTP or an administrator does."""
        self._wall += seconds

    def _step(self, monotonic: float) -> None:
        self._wall += monotonic - self._monotonic
        self._monotonic = monotonic


async def _let_others_run() -> None:
    # A woken task often needs a few turns of the loop before it sleeps again.
    for _ in range(10):
        await asyncio.sleep(0)


def deadline_from_epoch(epoch_s: float, clock: Clock) -> float:
    """Translate a time since the epoch, as a notice carries it, into a deadline of this machine.

    Translate once, on arrival: later jumps of the wall clock then no longer move the deadline. A past time gives a
    past deadline.
    """
    return clock.monotonic() + (epoch_s - clock.wall())

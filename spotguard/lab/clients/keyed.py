"""The load and the check that redis and java share: versioned values, and one append-only log per connection.

Each connection owns every N-th value and one log. A step appends the next number to the log and overwrites some
values with their next version; it counts as acknowledged when the server has answered all of it. Afterwards the log
must hold each acknowledged number exactly once, and each value its last acknowledged version, byte for byte.
"""

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from spotguard.lab.clients.connection import Connection, ConnectionLost, ReplyError
from spotguard.lab.clients.content import Content
from spotguard.lab.ledger import GapRecorder, Verdict, compare_log, compare_version

STEP_SECONDS = 0.005  # one step per connection in this time: the grain of the measured gaps
STEPS_PER_SECOND = 1000  # of all connections together; more of them makes each slower
BATCH_BYTES = 256 << 10
ANSWER_SECONDS = 15.0  # how long an answer may take, at the stop and in the check


class Session(Protocol):
    """A keyed store over one connection. All methods raise ConnectionLost or ReplyError."""

    value_bytes: int

    async def write(self, log: str, number: int, items: Sequence[tuple[str, bytes]]) -> int:
        """Append `number` to `log`, overwrite values; return the log's length after that."""

    async def fill(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Set values."""

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return values, None where there is none."""

    async def read_log(self, log: str) -> list[int]:
        """Return all entries of a log, in its order."""


@dataclass
class Lane:
    """One connection with what it was promised: step n (from 1) is acknowledged if n <= `acknowledged`."""

    index: int
    connection: Connection
    session: Session
    acknowledged: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)  # value -> version sent, never answered
    step_open: bool = False
    misanswered: int = 0
    surplus: int = 0  # entries that the server says it has beyond those acknowledged
    lost: str = ""
    completed_at: array[float] = field(default_factory=lambda: array("d"))
    latency: array[float] = field(default_factory=lambda: array("d"))

    @property
    def log(self) -> str:
        """Name this connection's log."""
        return f"log-{self.index}"


class KeyedLoad:
    """Fills, loads and checks a keyed store over connections that are opened once."""

    def __init__(self, lanes: list[Lane], *, size_bytes: int, rate_bytes: float, seed: int) -> None:
        value_bytes = lanes[0].session.value_bytes
        self.lanes = lanes
        self.content = Content(seed, value_bytes)
        self.count = max(size_bytes // value_bytes, len(lanes))
        self.versions = array("L", bytes(8 * self.count))
        self.gaps = GapRecorder()
        self.stopping = asyncio.Event()
        self.filled = 0
        self.checked = 0
        self.unchecked = list(lanes)
        self.verdict = Verdict()
        self._interval = max(STEP_SECONDS, len(lanes) / STEPS_PER_SECOND)
        self._values_per_second = rate_bytes / value_bytes / len(lanes)
        self._random = random.Random(seed)  # noqa: S311 - a reproducible load
        self._batch = max(1, BATCH_BYTES // value_bytes)

    @property
    def acknowledged(self) -> int:
        """Count the steps answered so far."""
        return sum(lane.acknowledged for lane in self.lanes)

    @property
    def alive(self) -> list[Lane]:
        """Return the lanes whose connection is still the one opened at the start."""
        return [lane for lane in self.lanes if not lane.lost]

    async def fill(self) -> None:
        """Set every value in its version 0."""
        async with asyncio.TaskGroup() as group:
            for lane in self.lanes:
                group.create_task(self._fill(lane))

    async def load(self) -> None:
        """Write until `stopping` is set; a connection that fails is noted in its lane and never opened again."""
        start = time.monotonic()
        for lane in self.lanes:
            self.gaps.begin(lane.index, start)
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._load(lane)) for lane in self.lanes]
            group.create_task(self._end_hung(workers))
        self.gaps.close(time.monotonic())

    async def check(self, readers: Sequence[Lane]) -> None:
        """Read back over these connections what is not yet checked, and add up `verdict`.

        A reader that fails is marked as lost and its share left to the others; what nobody could read stays in
        `unchecked`.
        """
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(self._check_over(reader))

    def sample(self) -> None:
        """Ask the kernel about each connection."""
        for lane in self.lanes:
            lane.connection.sample()

    def save(self, path: Path) -> None:
        """Write what was acknowledged, one step a line: connection, number, monotonic seconds, latency in ms."""
        with path.open("w", encoding="utf-8") as out:
            for lane in self.lanes:
                for number, (at, latency) in enumerate(zip(lane.completed_at, lane.latency, strict=True), 1):
                    out.write(f"{lane.index} {number} {at:.6f} {latency * 1e3:.3f}\n")

    async def _fill(self, lane: Lane) -> None:
        own = range(lane.index, self.count, len(self.lanes))
        for at in range(0, len(own), self._batch):
            batch = own[at : at + self._batch]
            await lane.session.fill([(key(i), self.content.value(i, 0)) for i in batch])
            self.filled += len(batch)

    async def _load(self, lane: Lane) -> None:
        due = 0.0
        now = time.monotonic()
        try:
            while not self.stopping.is_set():
                started = now
                due = await self._step(lane, due)
                done = time.monotonic()
                # After a freeze the missed writes are not made up for: a flood would only hide the pause's end.
                await asyncio.sleep(max(0.0, started + self._interval - done))
                now = time.monotonic()
                due += self._values_per_second * min(now - started, 4 * self._interval)
        except (ConnectionLost, ReplyError) as e:
            lane.lost = str(e)
        except asyncio.CancelledError:
            # Only _end_hung cancels: an answer is half read, so this connection can say nothing more.
            lane.lost = f"no answer within {ANSWER_SECONDS:.0f} s of the stop"

    async def _step(self, lane: Lane, due: float) -> float:
        own = range(lane.index, self.count, len(self.lanes))
        chosen = sorted({self._random.choice(own) for _ in range(int(due))})
        lane.in_flight = {i: self.versions[i] + 1 for i in chosen}
        items = [(key(i), self.content.value(i, version)) for i, version in lane.in_flight.items()]
        lane.step_open = True
        sent = time.monotonic()
        length = await lane.session.write(lane.log, lane.acknowledged + 1, items)
        now = time.monotonic()
        self.gaps.completed(lane.index, now)
        lane.completed_at.append(now)
        lane.latency.append(now - sent)
        lane.acknowledged += 1
        if length - lane.acknowledged != lane.surplus:  # once for each time that it goes wrong
            lane.surplus = length - lane.acknowledged
            lane.misanswered += 1
        for i, version in lane.in_flight.items():
            self.versions[i] = version
        lane.in_flight, lane.step_open = {}, False
        return due - int(due)

    async def _end_hung(self, workers: list[asyncio.Task[None]]) -> None:
        await self.stopping.wait()
        _, hung = await asyncio.wait(workers, timeout=ANSWER_SECONDS)
        for worker in hung:
            worker.cancel()

    async def _check_over(self, reader: Lane) -> None:
        while self.unchecked:
            lane = self.unchecked.pop()
            before = self.checked
            try:
                verdict = await self._check(reader.session, lane)
            except (ConnectionLost, ReplyError, TimeoutError) as e:
                reader.lost = f"during the check: {e or 'no answer'}"
                self.checked = before
                self.unchecked.append(lane)
                return
            self.verdict += verdict

    async def _check(self, session: Session, lane: Lane) -> Verdict:
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await session.read_log(lane.log)
        promised = range(1, lane.acknowledged + 1)
        verdict = compare_log(promised, [lane.acknowledged + 1] if lane.step_open else [], found)
        verdict += Verdict(wrong=lane.misanswered)
        own = range(lane.index, self.count, len(self.lanes))
        for at in range(0, len(own), self._batch):
            batch = own[at : at + self._batch]
            async with asyncio.timeout(ANSWER_SECONDS):
                values = await session.read([key(i) for i in batch])
            for index, data in zip(batch, values, strict=True):
                verdict += self._compare(index, lane, data)
            self.checked += len(batch)
        return verdict

    def _compare(self, index: int, lane: Lane, data: bytes | None) -> Verdict:
        version = None if data is None else self.content.version(index, data)
        if data is not None and version is None:
            return Verdict(wrong=1)
        found = compare_version(self.versions[index], lane.in_flight.get(index), version)
        # The values are no acknowledged writes of the log: they count in `checked`.
        return Verdict(0, found.lost, found.doubled, found.wrong, found.unknown, found.unknown_applied)


def key(index: int) -> str:
    """Return the key of a value."""
    return f"value-{index:08d}"

"""The phases of the keyed clients, told to the drill: fill, load until "stop", check at "verify"."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from spotguard.lab.clients.connection import Connection
from spotguard.lab.clients.control import Orders, emit
from spotguard.lab.clients.keyed import KeyedLoad, Lane, Session
from spotguard.lab.clients.options import Options
from spotguard.lab.clients.result import Result, TcpSummary, ms
from spotguard.lab.ledger import Verdict

SAMPLE_SECONDS = 0.1
TELL_EVERY = 5  # samples
CHECK_CONNECT_SECONDS = 2.0


async def run_keyed(options: Options, session: Callable[[Connection], Session]) -> bool:
    """Run all phases; return whether the server kept every promise on every connection."""
    orders = await Orders.open()
    lanes = []
    for i in range(options.connections):
        connection = await Connection.open(options.address, options.port, options.deadline)
        lanes.append(Lane(i, connection, session(connection)))
    load = KeyedLoad(lanes, size_bytes=int(options.size * 2**20), rate_bytes=options.rate * 1e6, seed=options.seed)
    async with every(SAMPLE_SECONDS, _Teller(load, "fill")):
        await load.fill()
    emit("ready", values=load.count, bytes=load.count * load.content.size, connections=len(lanes))
    async with every(SAMPLE_SECONDS, _Teller(load, "load")), asyncio.TaskGroup() as group:
        group.create_task(load.load())
        await orders.wait_for("stop")
        load.stopping.set()
    load.save(options.ledger)
    emit("stopped", acknowledged=load.acknowledged, connections_lost=len(lanes) - len(load.alive))
    if not await orders.wait_for("verify"):
        return False
    async with every(SAMPLE_SECONDS, _Teller(load, "check")):
        result = await _check(load, options, session)
    emit("result", **result.fields())
    return result.sound


async def _check(load: KeyedLoad, options: Options, session: Callable[[Connection], Session]) -> Result:
    while load.unchecked and load.alive:
        await load.check(load.alive)
    faults = [f"connection {lane.index}: {lane.lost}" for lane in load.lanes if lane.lost]
    lost = len(faults)
    if load.unchecked:
        # What is stored can be checked still; that the connections are gone is counted already.
        try:
            connection = await Connection.open(options.address, options.port, time.monotonic() + CHECK_CONNECT_SECONDS)
            spare = Lane(-1, connection, session(connection))
            await load.check([spare])
            faults += [spare.lost] if spare.lost else []
        except (OSError, TimeoutError) as e:
            faults.append(f"no connection for the check: {e or type(e).__name__}")
    verdict = load.verdict
    for lane in load.unchecked:
        verdict += Verdict(acknowledged=lane.acknowledged, lost=lane.acknowledged)
    return Result(
        verdict=verdict,
        gaps=load.gaps,
        latency=[latency for lane in load.lanes for latency in lane.latency],
        connections=len(load.lanes),
        connections_lost=lost,
        tcp=[_summary(lane.connection) for lane in load.lanes],
        faults=faults,
        checked_values=load.checked,
        complete=not load.unchecked,
    )


class _Teller:
    """Samples at each call and tells the drill at every fifth."""

    def __init__(self, load: KeyedLoad, phase: str) -> None:
        self._load = load
        self._phase = phase
        self._calls = 0

    def __call__(self) -> None:
        load = self._load
        load.sample()
        self._calls += 1
        if self._calls % TELL_EVERY:
            return
        if self._phase != "load":
            done = load.filled if self._phase == "fill" else load.checked
            emit("progress", phase=self._phase, done=done, total=load.count)
            return
        longest = load.gaps.longest
        lost = len(load.lanes) - len(load.alive)
        emit(
            "progress", phase="load", acknowledged=load.acknowledged, connections_lost=lost,
            waiting_ms=ms(load.gaps.waiting(time.monotonic())), longest_gap_ms=ms(longest.seconds if longest else 0.0),
        )  # fmt: skip


@asynccontextmanager
async def every(seconds: float, call: Callable[[], None]) -> AsyncIterator[None]:
    """Call something regularly while the body runs."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(seconds)
            call()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(repeat())
        try:
            yield
        finally:
            task.cancel()


def _summary(connection: Connection) -> TcpSummary:
    info = connection.info
    return TcpSummary(connection.local_port, info.total_retransmits, connection.worst_backoff, info.rtt_us)

"""The poller against the simulated service, over real HTTP on loopback."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from handlers.imds import (
    INSTANCE_ACTION,
    LIFECYCLE_STATE,
    MAINTENANCE,
    REBALANCE,
    TERMINATION_TIME,
    TOKEN,
    Identity,
    ImdsFailure,
    ImdsPoller,
    spot_notices,
)
from handlers.imds_client import DEFAULT_ENDPOINTS, endpoints_from
from handlers.imds_parse import SpotAction
from handlers.notice import Notice, NoticeEvent, NoticeWithdrawn
from spotguard.lab.imds_faults import Fault
from spotguard.lab.imds_sim import ImdsSimulator, Listen
from spotguard.lab.imds_world import ScheduledEvent

NOW = 1_700_000_000.0


class Heard:
    """What a poller told: its events, its failures, its successful reads."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[NoticeEvent] = asyncio.Queue()
        self.failures: list[ImdsFailure] = []
        self.reads: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def imds_read(self, resource: str, seconds: float) -> None:
        assert seconds >= 0
        self.reads[resource] += 1
        self._changed.set()

    def imds_failed(self, failure: ImdsFailure) -> None:
        self.failures.append(failure)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def event(self) -> NoticeEvent:
        async with asyncio.timeout(10):
            return await self.events.get()

    async def notice(self) -> Notice:
        event = await self.event()
        assert isinstance(event, Notice)
        return event

    async def more_reads(self, count: int, *resources: str) -> None:
        wanted = {resource: self.reads[resource] + count for resource in resources}
        await self.until(lambda: all(self.reads[resource] >= least for resource, least in wanted.items()))

    async def failed(self, reason: str, resource: str | None = None) -> None:
        def there() -> bool:
            return any(f.reason == reason and resource in {None, f.resource} for f in self.failures)

        await self.until(there)


@asynccontextmanager
async def polling(
    *endpoints: str, interval: float = 0.01, limit: float = 1.0, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[tuple[ImdsPoller, Heard]]:
    heard = Heard()
    poller = ImdsPoller(
        now=lambda: NOW,
        observer=heard,
        endpoints=endpoints,
        interval=interval,
        timeout=limit,
        token_ttl=100,
        monotonic=clock,
    )
    task = asyncio.create_task(poller.run(heard.events.put_nowait))
    try:
        yield poller, heard
        assert not task.done(), "the poller ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def imds() -> AsyncIterator[ImdsSimulator]:
    async with ImdsSimulator(now=lambda: NOW) as simulator:
        yield simulator


async def test_no_notice_is_no_event_and_no_failure(imds: ImdsSimulator) -> None:
    async with polling(imds.endpoint) as (_, heard):
        await heard.more_reads(3, INSTANCE_ACTION, TERMINATION_TIME, REBALANCE, MAINTENANCE, LIFECYCLE_STATE)
    assert heard.events.empty()
    assert heard.failures == []
    assert imds.requests["PUT", "token", "200"] == 1


async def test_identity_is_read_once(imds: ImdsSimulator) -> None:
    imds.faults.add(Fault("status", status=503, count=2, path="placement/"))
    async with polling(imds.endpoint) as (poller, heard):
        await heard.until(lambda: heard.reads["placement/availability-zone"] == 1)
        await heard.more_reads(3, REBALANCE)
        assert poller.identity == Identity("i-0123456789abcdef0", "m6i.large", "eu-central-1a")
    assert imds.requests["GET", "instance-id", "200"] == 1


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
async def test_spot_notice_once(imds: ImdsSimulator, action: str) -> None:
    async with polling(imds.endpoint) as (_, heard):
        await heard.more_reads(1, INSTANCE_ACTION)
        at = imds.interrupt(action, seconds=120)
        notice = await heard.notice()
        assert (notice.kind, notice.action, notice.at, notice.id) == ("spot", action, at, "spot")
        assert notice.seen == NOW
        assert not notice.past
        await heard.more_reads(5, INSTANCE_ACTION)
        assert heard.events.empty()


async def test_past_time_is_told_as_it_is(imds: ImdsSimulator) -> None:
    imds.interrupt(seconds=-3600)
    async with polling(imds.endpoint) as (_, heard):
        notice = await heard.notice()
    assert notice.at == NOW - 3600
    assert notice.past


async def test_changed_time_then_withdrawn_then_again(imds: ImdsSimulator) -> None:
    imds.interrupt(seconds=120)
    async with polling(imds.endpoint) as (_, heard):
        first = await heard.notice()
        imds.interrupt(seconds=60)
        second = await heard.notice()
        assert (second.id, second.at) == (first.id, NOW + 60)
        imds.withdraw()
        assert await heard.event() == NoticeWithdrawn(second)
        await heard.more_reads(3, INSTANCE_ACTION, TERMINATION_TIME)
        imds.interrupt(seconds=60)
        assert await heard.notice() == second


async def test_failed_reads_withdraw_nothing(imds: ImdsSimulator) -> None:
    imds.interrupt()
    async with polling(imds.endpoint) as (_, heard):
        await heard.notice()
        imds.faults.add(Fault("status", status=500, path="spot/"))
        await heard.until(lambda: sum(f.resource == INSTANCE_ACTION for f in heard.failures) > 5)
        assert heard.events.empty()


async def test_termination_time_is_the_fallback(imds: ImdsSimulator) -> None:
    imds.faults.add(Fault("garbage", path=INSTANCE_ACTION))
    at = imds.interrupt()
    async with polling(imds.endpoint) as (_, heard):
        notice = await heard.notice()
        assert (notice.action, notice.at, notice.detail) == ("terminate", at, "termination-time")


async def test_both_spot_paths_are_one_notice(imds: ImdsSimulator) -> None:
    """The paths are not read at the same moment: one may have it when the other does not yet."""
    imds.faults.add(Fault("status", status=404, path=INSTANCE_ACTION, count=2))
    imds.interrupt()
    async with polling(imds.endpoint) as (_, heard):
        await heard.notice()
        await heard.more_reads(5, INSTANCE_ACTION)
        assert heard.events.empty()


async def test_a_newer_recommendation_is_told(imds: ImdsSimulator) -> None:
    async with polling(imds.endpoint) as (_, heard):
        imds.recommend_rebalance()
        first = await heard.notice()
        imds.recommend_rebalance(seconds=600)
        second = await heard.notice()
        assert (second.id, first.since, second.since) == (first.id, NOW, NOW + 600)


async def test_rebalance_maintenance_and_group(imds: ImdsSimulator) -> None:
    async with polling(imds.endpoint) as (_, heard):
        imds.recommend_rebalance()
        assert (await heard.notice()).kind == "rebalance"
        event = ScheduledEvent("instance-event-1", "instance-retirement", NOW + 3600)
        imds.schedule(event)
        notice = await heard.notice()
        assert (notice.id, notice.action, notice.at) == ("maintenance/instance-event-1", "terminate", NOW + 3600)
        imds.schedule(ScheduledEvent("instance-event-1", "instance-retirement", NOW + 3600, state="canceled"))
        assert await heard.event() == NoticeWithdrawn(notice)
        imds.world.lifecycle_state = "Terminated"
        assert (await heard.notice()).kind == "asg"


FAULTS = {
    "unauthorized": Fault("status", status=401),
    "forbidden": Fault("status", status=403),
    "throttled": Fault("status", status=429),
    "server_error": Fault("status", status=503),
    "status": Fault("redirect"),
    "timeout": Fault("stall"),
    "too_large": Fault("huge"),
    "garbage": Fault("garbage"),
}


@pytest.mark.parametrize("reason", FAULTS)
async def test_a_notice_is_found_after_each_fault(imds: ImdsSimulator, reason: str) -> None:
    async with polling(imds.endpoint, limit=0.2) as (_, heard):
        imds.faults.add(FAULTS[reason])
        await heard.failed(reason)
        imds.faults.clear()
        imds.interrupt()
        assert (await heard.notice()).kind == "spot"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("drop"), "disconnected"),
        (Fault("truncated"), "disconnected"),
        (Fault("drip", seconds=0.02), "timeout"),
        (Fault("garbage", body=""), "garbage"),
        (Fault("garbage", body="[1]"), "garbage"),
        (Fault("garbage", body='{"action": {}}'), "garbage"),
        (Fault("garbage", body="\x00\ud7ff"), "garbage"),
    ],
)
async def test_a_notice_is_found_after_wrong_answers(imds: ImdsSimulator, fault: Fault, reason: str) -> None:
    imds.interrupt()
    imds.faults.add(fault)
    async with polling(imds.endpoint, limit=0.2) as (_, heard):
        await heard.failed(reason)
        assert heard.events.empty()
        imds.faults.clear()
        assert (await heard.notice()).kind == "spot"


async def test_a_wrong_content_type_is_no_matter(imds: ImdsSimulator) -> None:
    imds.interrupt()
    imds.faults.add(Fault("content-type"))
    async with polling(imds.endpoint) as (_, heard):
        await heard.notice()
    assert heard.failures == []


@pytest.mark.parametrize("stalled", [REBALANCE, MAINTENANCE, LIFECYCLE_STATE, TERMINATION_TIME, "instance-id"])
async def test_one_stalled_path_delays_no_other(imds: ImdsSimulator, stalled: str) -> None:
    imds.faults.add(Fault("stall", path=stalled))
    imds.interrupt()
    async with polling(imds.endpoint, limit=60) as (_, heard):
        await heard.notice()
    assert heard.reads[stalled] == 0


async def test_refused_then_back(imds: ImdsSimulator) -> None:
    async with ImdsSimulator(now=lambda: NOW) as gone:
        port = int(gone.endpoint.rsplit(":", 1)[1])
    async with polling(gone.endpoint) as (_, heard):
        await heard.failed("refused", INSTANCE_ACTION)
        async with ImdsSimulator(now=lambda: NOW, listen=Listen(port=port)) as back:
            back.interrupt()
            assert (await heard.notice()).kind == "spot"
        heard.failures.clear()
        await heard.failed("refused", INSTANCE_ACTION)


async def test_a_lost_token_costs_no_read(imds: ImdsSimulator) -> None:
    async with polling(imds.endpoint) as (_, heard):
        await heard.more_reads(1, INSTANCE_ACTION)
        imds.expire_tokens()
        await heard.more_reads(3, INSTANCE_ACTION, REBALANCE, MAINTENANCE)
    assert heard.failures == []
    assert imds.requests["PUT", "token", "200"] == 2  # one for all loops


async def test_a_second_401_is_a_failure_not_a_loop(imds: ImdsSimulator) -> None:
    imds.faults.add(Fault("status", status=401, path=REBALANCE))
    async with polling(imds.endpoint) as (_, heard):
        await heard.failed("unauthorized", REBALANCE)
    gets = imds.requests["GET", REBALANCE, "status"]
    assert imds.requests["PUT", "token", "200"] <= 1 + (gets + 1) // 2


async def test_the_token_is_renewed_before_it_ends() -> None:
    ticks = [0.0]
    async with ImdsSimulator(now=lambda: NOW, monotonic=lambda: ticks[0]) as imds:
        async with polling(imds.endpoint, clock=lambda: ticks[0]) as (_, heard):
            await heard.more_reads(2, INSTANCE_ACTION)
            for renewals in (1, 2, 3):
                assert imds.requests["PUT", "token", "200"] == renewals
                ticks[0] += 80
                await heard.more_reads(3, INSTANCE_ACTION, REBALANCE)
                async with asyncio.timeout(10):
                    while imds.requests["PUT", "token", "200"] == renewals:
                        await heard.more_reads(1, INSTANCE_ACTION)
                await heard.more_reads(1, INSTANCE_ACTION, REBALANCE)
        assert {key for key in imds.requests if key[2] == "401"} == set()
    assert heard.failures == []


async def test_reads_go_on_while_renewing_stalls(imds: ImdsSimulator) -> None:
    ticks = [0.0]
    async with polling(imds.endpoint, limit=0.2, clock=lambda: ticks[0]) as (_, heard):
        await heard.more_reads(1, INSTANCE_ACTION)
        imds.faults.add(Fault("stall", path="token"))
        ticks[0] = 80
        await heard.failed("timeout", TOKEN)
        await heard.more_reads(3, INSTANCE_ACTION)
        assert {failure.resource for failure in heard.failures} == {TOKEN}


async def test_the_endpoint_that_answers_is_used(imds: ImdsSimulator) -> None:
    async with ImdsSimulator(now=lambda: NOW) as mute:
        mute.faults.add(Fault("stall"))
        imds.interrupt()
        async with polling("http://127.0.0.1:1", mute.endpoint, imds.endpoint) as (_, heard):
            await heard.notice()
        assert heard.failures == []


async def test_endpoints_are_tried_again_when_one_falls_silent(imds: ImdsSimulator) -> None:
    async with ImdsSimulator(now=lambda: NOW) as second:
        imds.faults.add(Fault("stall"))
        async with polling(imds.endpoint, second.endpoint, limit=0.1) as (_, heard):
            await heard.more_reads(1, INSTANCE_ACTION)
            second.faults.add(Fault("drop"))
            imds.interrupt()
            imds.faults.clear()
            await heard.notice()


async def test_noise_instead_of_http() -> None:
    answers = iter(
        [
            b"\x00" * 100,
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8bx",
            b"HTTP/9.9 twohundred\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000,
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nSet-Cookie: \xff\xfe=\x01\r\nContent-Length: 1\r\n\r\n\xff",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n",
        ]
    )
    spoken = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = next(answers, None)
        if answer is None:
            spoken.set()
        else:
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, polling(f"http://127.0.0.1:{port}", limit=0.2) as (_, heard):
        async with asyncio.timeout(10):
            await spoken.wait()
        assert heard.events.empty()


async def test_what_the_listener_raises_ends_the_poller(imds: ImdsSimulator) -> None:
    def refuse(event: NoticeEvent) -> None:
        raise RuntimeError("no")

    imds.interrupt()
    poller = ImdsPoller(now=lambda: NOW, observer=Heard(), endpoints=(imds.endpoint,))
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="no")):
        async with asyncio.timeout(10):
            await poller.run(refuse)


def test_endpoints_from_the_environment() -> None:
    assert endpoints_from({}) == DEFAULT_ENDPOINTS
    assert endpoints_from({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://[::1]:9/"}) == ("http://[::1]:9",)


KNOWN = Notice("spot", "stop", 50.0, "imds", "spot")


@pytest.mark.parametrize(
    ("action", "termination", "expected"),
    [
        (SpotAction("stop", None, "stop"), 70.0, ("stop", 70.0)),
        (SpotAction("stop", None, "stop"), None, ("stop", 50.0)),
        (SpotAction("hibernate", None, "hibernate"), None, ("hibernate", None)),
        (None, 50.0, ("stop", 50.0)),
        (None, 60.0, ("terminate", 60.0)),
    ],
)
def test_half_answers_lose_nothing(action: SpotAction | None, termination: float | None, expected: object) -> None:
    notices = spot_notices(action, termination, KNOWN)
    assert isinstance(notices, tuple)
    assert (notices[0].action, notices[0].at) == expected

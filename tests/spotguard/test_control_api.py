"""The agents' control plane, client against server over TLS."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import pytest

from handlers.control import (
    MAX_FRAMES,
    ControlClient,
    Machine,
    Offer,
    OfferAnswer,
    Refused,
    RestoreAnswer,
    Unknown,
    Unreachable,
)
from handlers.errors import GiveUp, Retry
from spotguard import control_api, pki
from spotguard.parts import TransferLimits

ID = "0b5a35c4-7d6e-4a55-9d0e-3f7e1a2b3c4d"
HERE = Machine("x86_64", "6.12.1", ("avx2", "fpu", "sse2"))
OFFER = replace(
    Offer.new(
        migration=ID,
        source="a",
        workload={"name": "redis", "env": {"LANG": "C"}},
        limits=TransferLimits(max_memory=1 << 30, max_images=1 << 20, max_files=0),
        version="7",
        expires=time.monotonic() + 60,
        mode="live",
    ),
    machine=HERE,
)
Identities = MappingProxyType[str, pki.Identity]


def soon() -> float:
    return time.monotonic() + 5


@dataclass
class Target:
    """A target that does as it is told by the test, and remembers what it was asked."""

    error: Exception | None = None
    delay_s: float = 0
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    async def _do(self, *what: object) -> None:
        self.asked.append(what)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.error:
            raise self.error

    async def offer(self, peer: str, offer: Offer, deadline: float) -> OfferAnswer:
        await self._do("offer", peer, offer, deadline)
        return OfferAnswer("10.0.0.2", 9720)

    async def restore(self, peer: str, migration: str, deadline: float) -> RestoreAnswer:
        await self._do("restore", peer, migration, deadline)
        return RestoreAnswer("resumed", "", {"criu": 0.05})

    async def frames(self, peer: str, migration: str, block: bytes) -> None:
        await self._do("frames", peer, migration, block)

    async def status(self, peer: str, migration: str) -> dict[str, Any]:
        await self._do("status", peer, migration)
        return {"phase": "prepared"}

    async def abort(self, peer: str, migration: str) -> None:
        await self._do("abort", peer, migration)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    directory = tmp_path_factory.mktemp("ca")
    pki.make_ca(directory)
    return MappingProxyType({name: pki.issue(directory, name) for name in ("a", "b", "c")})


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
async def port(target: Target, identities: Identities) -> AsyncIterator[int]:
    context = pki.ssl_context(identities["b"], server_side=True)
    async with control_api.serve(target, context, "127.0.0.1", 0, HERE) as port:
        yield port


Connect = Callable[[str], ControlClient]


@pytest.fixture
def connect(port: int, identities: Identities) -> Connect:
    def build(name: str) -> ControlClient:
        addresses = {"b": ("127.0.0.1", port), "c": ("127.0.0.1", port), "closed": ("127.0.0.1", 1)}
        return ControlClient(pki.ssl_context(identities[name], server_side=False), addresses, "0.1.0")

    return build


async def test_a_migration_by_the_control_api(connect: Connect, target: Target) -> None:
    async with connect("a") as a:
        deadline = soon()
        assert await a.offer("b", OFFER, deadline) == OfferAnswer("10.0.0.2", 9720)
        block = bytes(MAX_FRAMES)
        await a.frames("b", ID, block, soon())
        answer = await a.restore("b", ID, soon())
        assert answer.resumed
        assert answer.timings == {"criu": 0.05}
        assert await a.status("b", ID, soon()) == {"phase": "prepared"}
        await a.abort("b", ID, soon())
        assert a.address_of("b") == "127.0.0.1"
    assert target.asked[0][:3] == ("offer", "a", OFFER)
    assert abs(target.asked[0][3] - deadline) < 1
    assert target.asked[1] == ("frames", "a", ID, block)
    assert [call[0] for call in target.asked] == ["offer", "frames", "restore", "status", "abort"]


async def test_warm_connections_carry_a_restore_and_frames_at_once(target: Target, identities: Identities) -> None:
    context = pki.ssl_context(identities["b"], server_side=True)
    handshakes: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: handshakes.append(name)
    target.delay_s = 0.05
    async with control_api.serve(target, context, "127.0.0.1", 0, HERE) as port:
        client = pki.ssl_context(identities["a"], server_side=False)
        async with ControlClient(client, {"b": ("127.0.0.1", port)}) as a:
            await a.warm("b", soon())
            assert handshakes == ["b", "b"]
            await asyncio.gather(a.restore("b", ID, soon()), a.frames("b", ID, b"x", soon()))
    assert len(handshakes) == 2


async def test_times_travel_as_time_left() -> None:
    assert 59 < OFFER.expires_in_s <= 60
    late = Offer.new(
        migration=ID, source="a", workload={}, limits=TransferLimits(0, 0, 0), version="1", expires=time.monotonic() - 9
    )
    assert late.expires_in_s == 0


async def test_an_offer_speaks_for_its_own_node_only(connect: Connect, target: Target) -> None:
    async with connect("c") as c:
        with pytest.raises(Refused, match="names 'a' as source, the certificate 'c'"):
            await c.offer("b", OFFER, soon())
    assert target.asked == []


async def test_another_peer_cannot_go_on_with_a_migration(connect: Connect, target: Target) -> None:
    async with connect("a") as a, connect("c") as c:
        await a.offer("b", OFFER, soon())
        with pytest.raises(Refused, match="was not offered by 'c'"):
            await c.offer("b", replace(OFFER, source="c"), soon())
        with pytest.raises(Refused, match="was not offered by 'c'"):
            await c.restore("b", ID, soon())
        with pytest.raises(Refused):
            await c.frames("b", ID, b"x", soon())
        with pytest.raises(Refused):
            await c.status("b", ID, soon())
        with pytest.raises(Refused):
            await c.abort("b", ID, soon())
    assert len(target.asked) == 1


async def test_a_machine_that_cannot_run_it_refuses(connect: Connect, target: Target) -> None:
    more = replace(HERE, cpu_features=(*HERE.cpu_features, "avx512f"))
    async with connect("a") as a:
        with pytest.raises(Refused, match="this machine's processor lacks avx512f"):
            await a.offer("b", replace(OFFER, machine=more), soon())
        with pytest.raises(Refused, match="is x86_64, the source is aarch64"):
            await a.offer("b", replace(OFFER, machine=replace(HERE, arch="aarch64")), soon())
        await a.offer("b", replace(OFFER, machine=replace(HERE, cpu_features=("fpu",), kernel="6.18")), soon())


async def test_what_the_target_answers_decides_the_reaction(connect: Connect, target: Target) -> None:
    async with connect("a") as a:
        for error, expected in [
            (GiveUp("no room"), Refused),
            (Retry("not now"), Unreachable),
            (TimeoutError(), Unknown),
            (RuntimeError("bug"), Unknown),
        ]:
            target.error = error
            with pytest.raises(expected):
                await a.restore("b", ID, soon())
        target.error, target.delay_s = None, 0.3
        with pytest.raises(Unknown):
            await a.restore("b", ID, time.monotonic() + 0.1)
        asked = len(target.asked)
        with pytest.raises(Unreachable):
            await a.restore("b", ID, time.monotonic())
        with pytest.raises(Unreachable):
            await a.restore("closed", ID, soon())
        with pytest.raises(Unreachable, match="Hostname mismatch"):
            await a.restore("c", ID, soon())
        with pytest.raises(Refused, match="none of this node's peers"):
            await a.restore("d", ID, soon())
        assert len(target.asked) == asked


def body(**changes: object) -> bytes:
    return json.dumps({"protocol": 1, "agent": "x", "time_left_s": 3, "offer": OFFER.to_json(), **changes}).encode()


def offer(**changes: object) -> dict[str, object]:
    return {**OFFER.to_json(), **changes}


Post = Callable[[str, bytes], AbstractAsyncContextManager[aiohttp.ClientResponse]]


@pytest.fixture
async def post(port: int, identities: Identities) -> AsyncIterator[Post]:
    context = pki.ssl_context(identities["a"], server_side=False)
    async with aiohttp.ClientSession(f"https://127.0.0.1:{port}") as session:
        yield lambda path, raw: session.post(path, data=io.BytesIO(raw), ssl=context, server_hostname="b")


@pytest.mark.parametrize(
    ("raw", "status", "reason"),
    [
        (body(protocol=2), 409, "protocol 2 of agent 'x' is unknown here: this agent speaks 1"),
        (body(protocol=None), 409, "protocol None"),
        (body(time_left_s="3"), 400, "time_left_s is no number"),
        (body(time_left_s=-1), 400, "expected 0 to 3600"),
        (body(time_left_s=float("nan")), 400, "time_left_s is no number"),
        (body(time_left_s=1e9), 400, "expected 0 to 3600"),
        (body(offer=None), 400, "offer has not exactly the fields"),
        (body(offer=offer(more=1)), 400, "offer has not exactly the fields"),
        (body(offer=offer(migration="../x")), 400, ""),
        (body(offer=offer(migration="x" * 36)), 400, ""),
        (body(offer=offer(workload=[])), 400, "workload is no object"),
        (body(offer=offer(max_memory=-1)), 400, "max_memory"),
        (body(offer=offer(max_memory=True)), 400, "max_memory"),
        (body(offer=offer(source=7)), 400, "source"),
        (body(offer=offer(machine={})), 400, "machine"),
        (body(offer=offer(workload={"x": "y" * (1 << 20 | 1 << 13)})), 413, ""),
        (b"x" * (MAX_FRAMES + 1), 413, ""),
        (b"[" * 500_000, 400, ""),
        (b"[]", 400, "no JSON object"),
        (b"\xff\xfe", 400, ""),
        (b"", 400, ""),
    ],
)
async def test_bodies_that_are_refused(post: Post, target: Target, raw: bytes, status: int, reason: str) -> None:
    async with post("/v1/migrations", raw) as answer:
        assert answer.status == status
        assert reason in (await answer.json())["reason"]
    assert target.asked == []


async def test_paths_that_are_no_migration_are_not_found(post: Post, target: Target) -> None:
    for path in ["/v1/migrations/x/restore", "/v1/migrations/..%2f/restore", f"/v1/migrations/{ID.upper()}/restore"]:
        async with post(path, body()) as answer:
            assert answer.status == 404
    assert target.asked == []


async def test_blocks_that_are_too_large_are_not_sent(connect: Connect, target: Target) -> None:
    async with connect("a") as a:
        with pytest.raises(Refused, match="at most"):
            await a.frames("b", ID, bytes(MAX_FRAMES + 1), soon())
    assert target.asked == []


def test_this_machine_can_run_its_own_processes(tmp_path: Path) -> None:
    here = Machine.here()
    assert here.cpu_features
    assert here.cannot_run(here) == ""
    arm = tmp_path / "cpuinfo"
    arm.write_text("processor\t: 0\nFeatures\t: sve fp asimd\n\nprocessor\t: 1\nFeatures\t: fp\n")
    assert Machine.here(arm).cpu_features == ("asimd", "fp", "sve")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"outcome": "maybe", "reason": "", "timings": {}},
        {"outcome": ["resumed"], "reason": "", "timings": {}},
        {"outcome": "failed", "reason": "", "timings": {"x": "1"}},
        {"outcome": "failed", "reason": 1, "timings": {}},
    ],
)
def test_answers_that_cannot_be_read(answer: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        RestoreAnswer.from_json(answer)
    with pytest.raises(ValueError, match="stream_port"):
        OfferAnswer.from_json({"stream_host": "x", "stream_port": 70000})

"""The owner store: what clients see of it over TLS, above all when things break."""

import argparse
import asyncio
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import cast

import aiohttp
import pytest

from handlers.owner import (
    Conflict,
    HttpOwnerStore,
    NewOwner,
    NotFound,
    OwnerRecord,
    OwnerStore,
    OwnerUnknown,
    Refused,
    StoreUnreachable,
    follow,
)
from spotguard import pki
from spotguard.owner_store import Fault, FaultKind, OwnerServer, parse_fault, serve
from spotguard.owner_table import OwnerTable

NAME = "owner-store"
NEW = OwnerRecord(migration="m1", workload="redis", source="a", target="b", owner="source", address="10.1.0.7")
Identities = MappingProxyType[str, pki.Identity]


def soon() -> float:
    return time.monotonic() + 5


@pytest.fixture
def table(tmp_path: Path) -> Iterator[OwnerTable]:
    with closing(OwnerTable(tmp_path / "journal")) as opened:
        yield opened


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    directory = tmp_path_factory.mktemp("ca")
    pki.make_ca(directory)
    return MappingProxyType({name: pki.issue(directory, name) for name in (NAME, "a", "b", "c")})


@pytest.fixture
async def server(table: OwnerTable) -> OwnerServer:
    return OwnerServer(table, heartbeat_s=0.05)


@pytest.fixture
async def port(server: OwnerServer, identities: Identities) -> AsyncIterator[int]:
    async with serve(server, pki.ssl_context(identities[NAME], server_side=True), "127.0.0.1", 0) as port:
        yield port


Connect = Callable[[str], HttpOwnerStore]


@pytest.fixture
def connect(port: int, identities: Identities) -> Connect:
    def build(name: str) -> HttpOwnerStore:
        context = pki.ssl_context(identities[name], server_side=False)
        return HttpOwnerStore(f"https://127.0.0.1:{port}", context, NAME, silence_s=0.4)

    return build


@asynccontextmanager
async def both(connect: Connect) -> AsyncIterator[tuple[OwnerStore, OwnerStore, OwnerRecord]]:
    async with connect("a") as a, connect("b") as b:
        yield a, b, await a.create(NEW, soon())


async def test_a_migration_from_creation_to_deletion(connect: Connect) -> None:
    async with connect("a") as a, connect("b") as b:
        assert await a.warm(soon()) < 5
        with pytest.raises(NotFound):
            await b.read("m1", soon())
        first = await a.create(NEW, soon())
        assert first == replace(NEW, version="1")
        assert await b.read("m1", soon()) == first
        with pytest.raises(Conflict) as caught:
            await b.compare_and_swap("m1", "0", "target", soon())
        assert caught.value.current == first
        taken = await b.compare_and_swap("m1", first.version, "target", soon())
        assert taken == replace(NEW, owner="target", version="2")
        with pytest.raises(Conflict) as caught:
            await a.compare_and_swap("m1", first.version, "reclaimed", soon())
        assert caught.value.current == taken
        with pytest.raises(Refused):
            await a.delete("m1", soon())
        await b.delete("m1", soon())
        await b.delete("m1", soon())
        with pytest.raises(NotFound):
            await a.compare_and_swap("m1", taken.version, "reclaimed", soon())


async def test_the_certificate_says_who_may_do_what(connect: Connect) -> None:
    async with both(connect) as (a, b, first), connect("c") as c:
        for store, owner in [(a, "target"), (b, "reclaimed"), (c, "target"), (c, "reclaimed")]:
            with pytest.raises(Refused, match="may not make the owner"):
                await store.compare_and_swap("m1", first.version, cast("NewOwner", owner), soon())
        with pytest.raises(Refused):
            await b.create(replace(NEW, migration="m2"), soon())
        assert await c.read("m1", soon()) == first


async def test_of_two_that_swap_at_once_exactly_one_wins(connect: Connect) -> None:
    async with connect("a") as a, connect("b") as b:
        for i in range(20):
            first = await a.create(replace(NEW, migration=f"m{i}"), soon())
            swaps = [a.compare_and_swap(f"m{i}", first.version, "reclaimed", soon())]
            swaps.append(b.compare_and_swap(f"m{i}", first.version, "target", soon()))
            results = await asyncio.gather(*swaps, return_exceptions=True)
            winner = next(r for r in results if isinstance(r, OwnerRecord))
            loser = next(r for r in results if isinstance(r, Conflict))
            assert loser.current == winner


@pytest.mark.parametrize(
    ("kind", "happened"),
    [("delay-answer", True), ("drop-after", True), ("drop-before", False), ("delay-before", False)],
)
async def test_after_a_lost_answer_the_caller_does_not_know(
    connect: Connect, server: OwnerServer, kind: FaultKind, happened: bool
) -> None:
    async with both(connect) as (_, b, first):
        server.faults.append(Fault("swap", kind, seconds=0.3))
        with pytest.raises(OwnerUnknown):
            await b.compare_and_swap("m1", first.version, "target", time.monotonic() + 0.15)
        assert (await b.read("m1", soon())).owner == ("target" if happened else "source")


async def test_a_swap_may_take_effect_after_its_caller_gave_up(connect: Connect, server: OwnerServer) -> None:
    async with both(connect) as (a, b, first):
        server.faults.append(Fault("swap", "delay-before", seconds=0.1))
        with pytest.raises(OwnerUnknown):
            await b.compare_and_swap("m1", first.version, "target", time.monotonic() + 0.05)
        # "source" is no answer yet: reclaiming is what settles it, one way or the other.
        assert (await a.read("m1", soon())).owner == "source"
        reclaimed = await a.compare_and_swap("m1", first.version, "reclaimed", soon())
        await asyncio.sleep(0.1)
        assert await b.read("m1", soon()) == reclaimed


async def test_a_question_whose_answer_is_lost_changed_nothing(connect: Connect, server: OwnerServer) -> None:
    async with both(connect) as (a, _, first):
        server.faults.append(Fault("read", "drop-after", times=2))  # aiohttp itself asks a second time
        with pytest.raises(StoreUnreachable):
            await a.read("m1", soon())
        assert await a.read("m1", soon()) == first


async def test_a_broken_journal_is_an_unknown_outcome(
    connect: Connect, server: OwnerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    async with both(connect) as (_, b, first):
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OwnerUnknown, match="Input/output error"):
            await b.compare_and_swap("m1", first.version, "target", soon())
        with pytest.raises(StoreUnreachable):
            await b.read("m1", soon())
        assert server.broken
        assert server.stop.is_set()


async def test_a_warm_connection_carries_the_swap(server: OwnerServer, identities: Identities) -> None:
    context = pki.ssl_context(identities[NAME], server_side=True)
    handshakes: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: handshakes.append(name)
    async with serve(server, context, "127.0.0.1", 0) as port:
        client = pki.ssl_context(identities["a"], server_side=False)
        async with HttpOwnerStore(f"https://127.0.0.1:{port}", client, NAME) as a:
            await a.warm(soon())
            first = await a.create(NEW, soon())
            with pytest.raises(Conflict):
                await a.compare_and_swap("m1", "0", "reclaimed", soon())
            await a.compare_and_swap("m1", first.version, "reclaimed", soon())
    assert handshakes == [NAME]


async def test_a_watch_gives_what_is_and_then_every_change_in_order(connect: Connect, server: OwnerServer) -> None:
    async with both(connect) as (a, b, first), connect("c") as c:
        second = await a.create(replace(NEW, migration="m2"), soon())
        async with asyncio.timeout(5), aclosing(c.watch()) as records:
            assert [await anext(records), await anext(records)] == [first, second]
            taken = await b.compare_and_swap("m1", first.version, "target", soon())
            reclaimed = await a.compare_and_swap("m2", second.version, "reclaimed", soon())
            await b.delete("m1", soon())
            third = await a.create(replace(NEW, migration="m3"), soon())
            assert [await anext(records) for _ in range(3)] == [taken, reclaimed, third]
            await server._end_watches(server.app())
            with pytest.raises(StoreUnreachable, match="ended"):
                await anext(records)


async def test_a_watch_that_starts_among_changes_misses_none(connect: Connect) -> None:
    async def watch(store: OwnerStore, wanted: int) -> set[str]:
        seen: set[str] = set()
        async with asyncio.timeout(5), aclosing(store.watch()) as records:
            while len(seen) < wanted:
                seen.add((await anext(records)).migration)
        return seen

    async with connect("a") as a, connect("c") as c:
        names = {f"m{i}" for i in range(60)}
        watches = []
        for i, name in enumerate(sorted(names)):
            if i % 10 == 5:
                watches.append(asyncio.create_task(watch(c, len(names))))
            await a.create(replace(NEW, migration=name), soon())
        assert await asyncio.gather(*watches) == [names] * 6


async def test_following_goes_on_over_a_break_with_all_records(connect: Connect, server: OwnerServer) -> None:
    seen: asyncio.Queue[OwnerRecord] = asyncio.Queue()
    troubles: list[str] = []
    async with both(connect) as (a, _, first), connect("c") as c:
        task = asyncio.create_task(follow(c, seen.put, lambda error: troubles.append(str(error))))
        async with asyncio.timeout(5):
            assert await seen.get() == first
            await server._end_watches(server.app())
            reclaimed = await a.compare_and_swap("m1", first.version, "reclaimed", soon())
            assert await seen.get() == reclaimed
        assert troubles == ["the owner store ended the watch"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_silent_watch_is_a_broken_one(connect: Connect, server: OwnerServer) -> None:
    server._heartbeat_s = 60
    async with both(connect) as (_, b, first):
        watch = b.watch()
        assert await anext(watch) == first
        start = time.monotonic()
        with pytest.raises(StoreUnreachable, match="broke off"):
            await anext(watch)
        assert 0.3 < time.monotonic() - start < 2


async def test_a_watcher_that_lags_behind_is_cut_off(table: OwnerTable, server: OwnerServer) -> None:
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(2)
    server._watchers.add(queue)
    for i in range(4):
        table.create(replace(NEW, migration=f"m{i}"), "a")
    assert queue.get_nowait() is None
    assert queue.empty()
    assert not server._watchers


@pytest.mark.parametrize(
    ("request_line", "body", "status"),
    [
        ("PUT /v1/migrations/m1", b"x" * 20_000, 413),
        ("PUT /v1/migrations/m1", b"[" * 10_000, 400),
        ("PUT /v1/migrations/m1", b"[]", 400),
        ("PUT /v1/migrations/m1", b"\xff", 400),
        ("PUT /v1/migrations/m1", b"{}", 400),
        ("PUT /v1/migrations/..%2fm1", b"{}", 400),
        ("POST /v1/migrations/m1/owner", b'{"version":"1","owner":"source"}', 400),
        ("POST /v1/migrations/m1/owner", b'{"version":"1","owner":["target"]}', 400),
        ("POST /v1/migrations/m1/owner", b'{"version":1,"owner":"target"}', 400),
        ("GET /v1/other", b"", 404),
        ("PATCH /v1/migrations/m1", b"", 405),
    ],
)
async def test_requests_that_are_refused(
    port: int, identities: Identities, request_line: str, body: bytes, status: int
) -> None:
    method, path = request_line.split()
    context = pki.ssl_context(identities["a"], server_side=False)
    async with aiohttp.ClientSession() as session:
        url = f"https://127.0.0.1:{port}{path}"
        async with session.request(method, url, data=body, ssl=context, server_hostname=NAME) as answer:
            assert answer.status == status
            assert (await answer.json())["reason"]


async def test_without_a_certificate_of_the_authority_nobody_is_heard(
    port: int, table: OwnerTable, identities: Identities, tmp_path: Path
) -> None:
    pki.make_ca(tmp_path)
    stranger = pki.issue(tmp_path, "a")
    mixed = pki.Identity(cert=stranger.cert, key=stranger.key, ca=identities["a"].ca)
    async with HttpOwnerStore(f"https://127.0.0.1:{port}", pki.ssl_context(mixed, server_side=False), NAME) as store:
        with pytest.raises(StoreUnreachable):
            await store.warm(soon())
        with pytest.raises((OwnerUnknown, StoreUnreachable)):
            await store.create(NEW, soon())
    nameless = ssl.create_default_context(cafile=str(identities["a"].ca))
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"https://127.0.0.1:{port}/healthz", ssl=nameless, server_hostname=NAME)
    assert table.records() == []


def test_faults_are_read() -> None:
    assert parse_fault("swap:delay-answer=2.5*3") == Fault("swap", "delay-answer", 2.5, 3)
    assert parse_fault("read:drop-after") == Fault("read", "drop-after", 0.0, 1)
    for text in ["swap", "swap:explode", "watch:drop-after", "swap:delay-answer=x", "swap:drop-after*"]:
        with pytest.raises(argparse.ArgumentTypeError, match="is no fault"):
            parse_fault(text)


async def test_a_killed_store_knows_after_its_restart_what_it_has_answered(
    tmp_path: Path, identities: Identities
) -> None:
    journal = tmp_path / "owners"
    identity = identities[NAME]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "spotguard", "owner-store", "--serve-journal", str(journal)]
    command += ["--serve-listen", "127.0.0.1", "--serve-port", str(port)]
    command += ["--tls-cert", str(identity.cert), "--tls-key", str(identity.key), "--tls-ca", str(identity.ca)]

    async def start() -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), 20)
        assert b"listening" in line, line
        return process

    process = await start()
    context = pki.ssl_context(identities["a"], server_side=False)
    async with HttpOwnerStore(f"https://127.0.0.1:{port}", context, NAME) as a:
        first = await a.create(NEW, soon())
        reclaimed = await a.compare_and_swap("m1", first.version, "reclaimed", soon())
        process.kill()
        await process.communicate()
        process = await start()
        assert await a.read("m1", soon()) == reclaimed
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0

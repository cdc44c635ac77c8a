"""The owner store's client against servers that misbehave: what it says is certain has to be."""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from handlers.errors import Ambiguous, GiveUp, Retry
from handlers.owner import (
    Conflict,
    HttpOwnerStore,
    NotFound,
    OwnerRecord,
    OwnerUnknown,
    Refused,
    StoreUnreachable,
    may_swap,
)
from spotguard import pki

NAME = "owner-store"
RECORD = OwnerRecord(
    migration="m1", workload="redis", source="a", target="b", owner="target", address="10.1.0.7", version="2"
)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ca")
    pki.make_ca(directory)
    pki.issue(directory, NAME)
    pki.issue(directory, "b")
    return directory


def identity(authority: Path, name: str) -> pki.Identity:
    return pki.Identity(authority / f"{name}.crt", authority / f"{name}.key", authority / "ca.crt")


@asynccontextmanager
async def answering(authority: Path, handle: Handler, server_name: str = NAME) -> AsyncIterator[HttpOwnerStore]:
    """Serve raw bytes with `handle`, and give a client that talks to it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handle(reader, writer)
        writer.close()

    context = pki.ssl_context(identity(authority, NAME), server_side=True)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    client = pki.ssl_context(identity(authority, "b"), server_side=False)
    async with server, HttpOwnerStore(f"https://127.0.0.1:{port}", client, server_name, silence_s=0.2) as store:
        yield store


def saying(raw: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()

    return handle


def http(status: int, body: object, more: str = "") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(raw)}\r\n{more}\r\n".encode() + raw


async def swap(store: HttpOwnerStore, within_s: float = 5) -> OwnerRecord:
    return await store.compare_and_swap("m1", "1", "target", time.monotonic() + within_s)


async def test_certain_answers(authority: Path) -> None:
    async with answering(authority, saying(http(200, RECORD.to_json()))) as store:
        assert await swap(store) == RECORD
    async with answering(authority, saying(http(409, {"current": RECORD.to_json()}))) as store:
        with pytest.raises(Conflict) as caught:
            await swap(store)
        assert caught.value.current == RECORD
    async with answering(authority, saying(http(404, {"reason": "none"}))) as store:
        with pytest.raises(NotFound):
            await swap(store)
    async with answering(authority, saying(http(403, {"reason": "not you"}))) as store:
        with pytest.raises(Refused, match="403 not you"):
            await swap(store)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\x01garbage",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        http(200, b"{"),
        http(200, b"[" * 16_000),
        http(200, []),
        http(200, {}),
        http(200, {**RECORD.to_json(), "owner": "source"}),
        http(200, {**RECORD.to_json(), "owner": "nobody"}),
        http(200, {**RECORD.to_json(), "owner": ["target"]}),
        http(200, {**RECORD.to_json(), "migration": "m2"}),
        http(200, {**RECORD.to_json(), "more": "x"}),
        http(200, b" " * 20_000),
        http(409, {}),
        http(409, {"current": None}),
        http(302, {}, "Location: /elsewhere\r\n"),
        http(500, {"reason": "disk"}),
        http(503, b"<html>"),
    ],
)
async def test_any_other_answer_to_a_swap_is_unknown(authority: Path, raw: bytes) -> None:
    async with answering(authority, saying(raw)) as store:
        with pytest.raises(OwnerUnknown):
            await swap(store)
        with pytest.raises(StoreUnreachable):
            await store.read("m1", time.monotonic() + 5) if b'"m1"' not in raw else await store.warm(0)


async def test_no_answer_in_time_is_unknown(authority: Path) -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()

    async with answering(authority, silent) as store:
        with pytest.raises(OwnerUnknown):
            await swap(store, 0.1)


async def test_a_server_by_another_name_is_sent_nothing(authority: Path) -> None:
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())

    async with answering(authority, listen, server_name="another") as store:
        with pytest.raises(StoreUnreachable, match="Hostname mismatch"):
            await swap(store)
    assert not any(heard)


async def test_what_was_never_sent_was_not_applied(authority: Path) -> None:
    client = pki.ssl_context(identity(authority, "b"), server_side=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never shakes hands
        port = silent.getsockname()[1]
        async with HttpOwnerStore(f"https://127.0.0.1:{port}", client, NAME) as store:
            with pytest.raises(StoreUnreachable):
                await swap(store, 0.1)
            with pytest.raises(StoreUnreachable, match="no time left"):
                await swap(store, 0)
    async with HttpOwnerStore(f"https://127.0.0.1:{port}", client, NAME) as store:
        with pytest.raises(StoreUnreachable):
            await swap(store)


async def test_a_kept_connection_that_died_is_unknown(authority: Path) -> None:
    """The request may have been read before the connection broke; aiohttp must not send a swap twice either."""
    requests: list[bytes] = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(200, {}))
        await writer.drain()
        requests.append(await reader.readuntil(b"}"))
        writer.transport.abort()

    async with answering(authority, once) as store:
        await store.warm(time.monotonic() + 5)
        with pytest.raises(OwnerUnknown):
            await swap(store)
    assert len(requests) == 1


@pytest.mark.parametrize("line", [b"[]\n", b"{\n", b'{"record": {}}\n', b"x" * 300_000])
async def test_a_watch_with_garbage_is_broken_off(authority: Path, line: bytes) -> None:
    async with answering(authority, saying(b"HTTP/1.1 200 OK\r\n\r\n" + line)) as store:
        with pytest.raises(StoreUnreachable):
            await anext(store.watch())


def test_contexts_that_do_not_check_names_are_refused(authority: Path) -> None:
    loose = pki.ssl_context(identity(authority, "b"), server_side=False)
    loose.check_hostname = False
    old = pki.ssl_context(identity(authority, "b"), server_side=False)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    for context in (loose, old):
        with pytest.raises(ValueError, match="checks names and allows only TLS"):
            HttpOwnerStore("https://127.0.0.1:1", context, NAME)


async def test_identifiers_that_are_no_path_are_refused(authority: Path) -> None:
    client = pki.ssl_context(identity(authority, "b"), server_side=False)
    async with HttpOwnerStore("https://127.0.0.1:1", client, NAME) as store:
        for migration in ["", "../x", "a/b", "a?b", "a\n", "x" * 129]:
            with pytest.raises(ValueError, match="no migration identifier"):
                await store.read(migration, time.monotonic() + 1)


def test_the_reaction_to_each_error() -> None:
    assert issubclass(OwnerUnknown, Ambiguous)
    assert issubclass(StoreUnreachable, Retry)
    assert issubclass(NotFound, GiveUp)
    assert issubclass(Refused, GiveUp)


def test_who_may_swap() -> None:
    assert may_swap(RECORD, "target", "b") == ""
    assert may_swap(RECORD, "reclaimed", "a") == ""
    for new_owner, by in [("target", "a"), ("reclaimed", "b"), ("source", "a"), ("", "a")]:
        assert may_swap(RECORD, new_owner, by)

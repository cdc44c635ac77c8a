"""The java client against the drill's own Java service."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from spotguard.lab.clients.connection import Connection
from spotguard.lab.clients.java import JavaSession
from spotguard.lab.clients.keyed import key
from spotguard.lab.workloads import java


@pytest.fixture
async def loaded(
    serve: Callable[..., Awaitable[Any]], run_client: Callable[..., Any], free_port: int, public_path: Path
) -> Any:
    """Return (client under load, a session of the test's own)."""
    workload = java(size_mib=4, rate_mb=4, port=free_port, connections=3, path=str(public_path / "java"))
    await serve(workload)
    async with run_client(workload) as client:
        await client.until("ready")
        other = await Connection.open("127.0.0.1", free_port, 1e12)
        yield client, JavaSession(other)
        other.close()


async def test_an_untouched_server_keeps_every_promise_and_connection(loaded: Any) -> None:
    client, _ = loaded
    await client.acknowledged(100)
    result = await client.finish()
    assert result["sound"], result
    assert result["checked_values"] == 128
    assert result["acknowledged"] >= 100
    assert (result["connections"], result["connections_lost"]) == (3, 0)


async def test_tampering_is_found(loaded: Any) -> None:
    client, session = loaded
    await client.acknowledged(20)
    client.order("stop")
    await client.until("stopped")
    assert await session.read(["value-none"]) == [None]
    log = await session.read_log("log-0")
    assert log == list(range(1, len(log) + 1))
    assert await session.write("log-0", 5, []) == len(log) + 1  # doubled
    (value,) = await session.read([key(7)])
    await session.fill([(key(7), value[:-1] + bytes([value[-1] ^ 1]))])  # one bit of one value
    result = await client.check()
    assert (result["lost"], result["doubled"], result["wrong"]) == (0, 1, 1)

"""The redis client against a real redis: what it says when all is well, and what it finds when it is not."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from spotguard.lab.clients.connection import Connection
from spotguard.lab.clients.content import Content
from spotguard.lab.clients.keyed import key
from spotguard.lab.clients.redis import VALUE_BYTES, RedisSession, command
from spotguard.lab.workloads import redis

SIZE_MIB = 2


class Tamper:
    """Sends redis commands of its own; a call returns the first line of the answer."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def __call__(self, *parts: bytes) -> bytes:
        await self.connection.send(command(*parts))
        return await self.connection.line()


@pytest.fixture
async def loaded(serve: Callable[..., Awaitable[Any]], run_client: Callable[..., Any], free_port: int) -> Any:
    """Return (client under load, its Tamper, redis' process)."""
    workload = redis(size_mib=SIZE_MIB, rate_mb=2, port=free_port, connections=3)
    server = await serve(workload)

    async with run_client(workload) as client:
        ready = await client.until("ready")
        assert (ready["connections"], ready["bytes"]) == (3, SIZE_MIB * 2**20 // VALUE_BYTES * VALUE_BYTES)
        other = await Connection.open("127.0.0.1", free_port, 1e12)

        yield client, Tamper(other), server
        other.close()


async def test_an_untouched_server_keeps_every_promise(loaded: Any, tmp_path: Path) -> None:
    client, _, _ = loaded
    await client.acknowledged(50)
    result = await client.finish()
    assert result["sound"]
    assert result["complete"]
    assert result["checked_values"] == SIZE_MIB * 2**20 // VALUE_BYTES
    assert result["acknowledged"] == result["requests"] >= 50
    assert (result["lost"], result["doubled"], result["wrong"], result["unknown"]) == (0, 0, 0, 0)
    assert (result["connections"], result["connections_lost"]) == (3, 0)
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"] <= result["longest_gap_ms"]
    assert len(result["tcp"]) == len(result["gap_per_connection"]) == 3
    ledger = (tmp_path / "ledger").read_text().splitlines()
    assert len(ledger) == result["acknowledged"]


async def test_tampering_after_the_stop_is_found(loaded: Any) -> None:
    client, tamper, _ = loaded
    await client.acknowledged(50)
    client.order("stop")
    await client.until("stopped")
    assert await tamper(b"LREM", b"log-0", b"1", b"7") == b":1"  # an acknowledged write is gone
    await tamper(b"RPUSH", b"log-1", b"3")  # one is there twice
    await tamper(b"RPUSH", b"log-2", b"999999")  # one that nobody sent
    assert await tamper(b"DEL", b"value-00000004") == b":1"  # a value is gone
    assert await tamper(b"SETRANGE", b"value-00000005", b"3990", b"x!") == b":4000"  # two bytes of one are others
    result = await client.check()
    assert not result["sound"]
    assert (result["lost"], result["doubled"], result["wrong"]) == (2, 1, 2)


async def test_an_older_version_of_a_value_is_a_lost_write(loaded: Any) -> None:
    client, tamper, _ = loaded
    await client.acknowledged(50)
    client.order("stop")
    await client.until("stopped")
    session, content = RedisSession(tamper.connection), Content(1, VALUE_BYTES)
    values = await session.read([key(i) for i in range(SIZE_MIB * 2**20 // VALUE_BYTES)])
    versions = {i: content.version(i, value or b"") or 0 for i, value in enumerate(values)}
    index, version = max(versions.items(), key=lambda item: item[1])
    assert version > 0
    await session.fill([(key(index), content.value(index, version - 1))])
    result = await client.check()
    assert (result["lost"], result["doubled"], result["wrong"]) == (1, 0, 0)


async def test_a_write_applied_twice_is_noticed_at_once(loaded: Any) -> None:
    client, tamper, _ = loaded
    await client.acknowledged(20)
    await tamper(b"RPUSH", b"log-0", b"1")
    await client.acknowledged(client.events[-1]["acknowledged"] + 50)
    result = await client.finish()
    assert result["doubled"] == 1
    assert result["wrong"] == 1  # the length that redis answered next


async def test_a_lost_connection_counts_and_is_never_opened_again(loaded: Any) -> None:
    client, tamper, _ = loaded
    await client.acknowledged(20)
    assert (await tamper(b"CLIENT", b"KILL", b"TYPE", b"normal", b"SKIPME", b"yes")) == b":3"
    result = await client.finish()
    assert result["connections_lost"] == 3
    assert not result["sound"]
    assert len(result["faults"]) == 3
    # The data is checked all the same: none of it is lost.
    assert result["complete"]
    assert (result["lost"], result["doubled"]) == (0, 0)


async def test_a_dead_server_leaves_every_write_unproven(loaded: Any) -> None:
    client, _, server = loaded
    await client.acknowledged(20)
    server.kill()
    await server.wait()
    result = await client.finish()
    assert not result["complete"]
    assert result["lost"] == result["acknowledged"] > 0
    assert result["connections_lost"] == 3


@pytest.mark.kernel
async def test_a_freeze_of_the_server_is_the_client_s_gap_and_nothing_else_is_wrong(loaded: Any) -> None:
    client, _, server = loaded
    cgroup = Path(f"/sys/fs/cgroup/client-gap-{server.pid}")
    cgroup.mkdir()
    (cgroup / "cgroup.procs").write_text(str(server.pid))
    await client.acknowledged(50)
    (cgroup / "cgroup.freeze").write_text("1")
    start = time.monotonic()
    while (await client.until("progress"))["waiting_ms"] < 300:
        pass
    (cgroup / "cgroup.freeze").write_text("0")
    seconds = time.monotonic() - start
    await client.acknowledged(client.events[-1]["acknowledged"] + 50)
    result = await client.finish()
    server.kill()
    await server.wait()
    cgroup.rmdir()
    assert result["sound"], result
    assert abs(result["longest_gap_ms"] - seconds * 1e3) < 100
    assert abs(result["gap_at"] - start) < 0.1
    assert all(gap > 250 for gap in result["gap_per_connection"].values())

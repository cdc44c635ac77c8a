"""The postgres client: pgbench against a real PostgreSQL."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from spotguard.lab.clients.pgbench import Log
from spotguard.lab.workloads import postgres


@pytest.fixture
async def loaded(
    serve: Callable[..., Awaitable[Any]], run_client: Callable[..., Any], free_port: int, public_path: Path
) -> Any:
    """Return (client under load, a function that runs SQL)."""
    workload = postgres(size_mib=4, port=free_port, connections=3, path=str(public_path / "pg"))
    await serve(workload)

    async def sql(statement: str) -> None:
        process = await asyncio.create_subprocess_exec(
            "psql", "--host=127.0.0.1", f"--port={free_port}", "--username=postgres", "-qAt", "-c", statement,
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert await process.wait() == 0

    async with run_client(workload) as client:
        await client.until("ready")
        yield client, sql


async def test_an_untouched_server_keeps_every_promise(loaded: Any, tmp_path: Path) -> None:
    client, _ = loaded
    await client.acknowledged(300)
    result = await client.finish()
    assert result["sound"], result
    assert result["acknowledged"] == result["requests"] >= 300
    assert result["checked_values"] == 4 * 2**20 // 8000
    assert (result["unknown"], result["connections"], result["connections_lost"]) == (0, 3, 0)
    assert len({tcp["local_port"] for tcp in result["tcp"]}) == 3
    assert 3 < result["longest_gap_ms"] < 5000
    assert len((tmp_path / "ledger").read_text().splitlines()) == result["acknowledged"]


async def test_tampering_is_found(loaded: Any) -> None:
    client, sql = loaded
    await client.acknowledged(100)
    client.order("stop")
    await client.until("stopped")
    await sql("DELETE FROM ledger WHERE client = 0 AND n = 3")
    await sql(
        "INSERT INTO ledger (client, n, payload) SELECT client, n, payload FROM ledger WHERE client = 1 AND n = 4"
    )
    await sql("UPDATE ledger SET payload = 'x' WHERE client = 2 AND n = 5")
    await sql("UPDATE filling SET body = body || 'x' WHERE id = 9")
    result = await client.check()
    assert (result["lost"], result["doubled"], result["wrong"]) == (1, 1, 2)


async def test_a_lost_connection_is_counted_and_its_last_write_unknown(loaded: Any) -> None:
    client, sql = loaded
    await client.acknowledged(100)
    await sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench' LIMIT 1")
    await client.acknowledged(client.events[-1].get("acknowledged", 0) + 200)
    result = await client.finish()
    assert (result["connections"], result["connections_lost"]) == (3, 1)
    assert (result["lost"], result["doubled"], result["wrong"], result["unknown"]) == (0, 0, 0, 1)
    assert not result["sound"]
    assert any("terminating connection" in fault for fault in result["faults"])


async def test_a_terminated_client_leaves_no_pgbench_behind(loaded: Any) -> None:
    client, _ = loaded
    await client.acknowledged(10)
    children = Path(f"/proc/{client.process.pid}/task/{client.process.pid}/children").read_text().split()
    benches = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "pgbench\n"]
    assert len(benches) == 1
    client.process.terminate()
    assert await client.process.wait() == 143
    assert (
        not Path(f"/proc/{benches[0]}/status").exists()
        or "Z (zombie)" in Path(f"/proc/{benches[0]}/status").read_text()
    )


def test_the_log_is_read_in_pieces_and_surprises_are_told() -> None:
    log = Log(clients=2, offset=-1000.0)
    log.begin(0.5)
    log.feed("0 1 5000 0 1001 0\n1 1 6000 0 1001 5")
    assert log.acknowledged == [1, 0]
    log.feed("00000\n0 2 4500 0 1003 0\n")
    assert log.acknowledged == [2, 1]
    assert log.gaps.longest is not None
    assert (log.gaps.longest.start, log.gaps.longest.end) == (1.0, 3.0)
    assert [round(latency, 6) for latency in log.latency] == [0.001, 0.002, 0.0005]
    log.feed("1 3 5000 0 1004 0\n0 3 failed 0 1004 0\n")
    assert log.surprises == ["client 1 completed 3 after 1", "transaction 3 of client 0: failed"]

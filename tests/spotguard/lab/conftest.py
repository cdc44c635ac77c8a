"""Servers of the drill's workloads on loopback, and the clients as the drill starts them."""

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from spotguard.lab.workloads import Workload, prepare

WAIT_SECONDS = 20.0


class Client:
    """A client program with its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    async def until(self, event: str) -> dict[str, Any]:
        """Return the next event of that name."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_SECONDS):
            while line := await self.process.stdout.readline():
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == event:
                    return self.events[-1]
        raise AssertionError(f"the client ended without {event!r}: {self.events}")

    def order(self, do: str) -> None:
        """Send an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do}).encode() + b"\n")

    async def acknowledged(self, at_least: int) -> None:
        """Wait until so many writes are acknowledged."""
        while (await self.until("progress")).get("acknowledged", 0) < at_least:
            pass

    async def finish(self) -> dict[str, Any]:
        """Stop, check, and return the result."""
        self.order("stop")
        await self.until("stopped")
        return await self.check()

    async def check(self) -> dict[str, Any]:
        """Check after the stop; the exit code has to say the same as the result."""
        self.order("verify")
        result = await self.until("result")
        assert (await self.process.wait() == 0) == result["sound"]
        return result


@pytest.fixture
def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def public_path() -> Iterator[Path]:
    """Return an empty directory that other users can enter (tmp_path is root's alone)."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Workload], Awaitable[asyncio.subprocess.Process]]]:
    """Start a workload as its user, its volumes at the paths that the test chose."""
    processes = []

    async def start(workload: Workload) -> asyncio.subprocess.Process:
        prepare(workload, {volume.name: Path(volume.mount_path) for volume in workload.volumes})
        process = await asyncio.create_subprocess_exec(
            *workload.command, user=workload.user[0], group=workload.user[1], extra_groups=(), env=dict(workload.env),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def run_client(tmp_path: Path) -> Callable[[Workload], Any]:
    """Start a workload's client."""

    @asynccontextmanager
    async def start(workload: Workload) -> AsyncIterator[Client]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "spotguard.lab.clients", *workload.client, "--address", "127.0.0.1",
            "--port", str(workload.port), "--ledger", str(tmp_path / "ledger"), "--connect-within", "15",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=dict(os.environ),
        )  # fmt: skip
        try:
            yield Client(process)
        finally:
            if process.returncode is None:
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            await process.communicate()

    return start

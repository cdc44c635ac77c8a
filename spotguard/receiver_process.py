"""The receiver of one migration, as its agent sees it: a child process and a channel of JSON lines.

The child is in a session and a cgroup of its own, so that it outlives the agent once it was told to.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handlers.cgroup import Cgroup
from handlers.errors import GiveUp
from spotguard.core.state import Move
from spotguard.parts import Parts, TransferLimits

MAX_LINE = 64 << 10


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the memory that new work can have without swapping (MemAvailable, proc_meminfo(5))."""
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


class ReceiverProcess:
    """A running receiver."""

    def __init__(
        self, process: subprocess.Popen[bytes], writer: asyncio.StreamWriter, group: Cgroup, gate: int
    ) -> None:
        """`gate`: our end of the pipe that holds the background fill back; the kernel closes it should we die."""
        self._gate: int | None = gate
        self._process = process
        self._writer = writer
        self._group = group
        self._reader: asyncio.Task[None] | None = None
        self.port = 0

    @classmethod
    async def start(
        cls,
        parts: Parts,
        move: Move,
        *,
        image_dir: Path,
        trees: Mapping[str, str],
        limits: TransferLimits,
        group: Cgroup,
        container_cgroup: Path,
        on_event: Callable[[dict[str, Any]], None],
        deadline: float,
    ) -> "ReceiverProcess":
        """Start it in `group` and wait until it listens. Raises GiveUp with its own words."""
        ours, theirs = socket.socketpair()
        gate, opener = os.pipe()
        with theirs:
            # Not asyncio's: that kills its children when the loop ends, and this one may have to outlive us.
            module = [sys.executable, "-m", "criu_transfer.receiver"]
            process = subprocess.Popen(  # noqa: ASYNC220 - starting takes a millisecond
                [*module, "--control-fd", str(theirs.fileno()), "--fill-gate-fd", str(gate)],
                pass_fds=(theirs.fileno(), gate),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        os.close(gate)
        group.attach(process.pid)
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
        receiver = cls(process, writer, group, opener)
        tls, control = parts.settings.tls, parts.settings.control
        config = {
            "migration": move.migration,
            "source": move.source,
            "target": move.target,
            "host": control.listen,
            "ports": [control.stream_ports.first, control.stream_ports.last],
            "cert": str(tls.cert),
            "key": str(tls.key),
            "ca": str(tls.ca),
            "image_dir": str(image_dir),
            "trees": dict(trees),
            "limits": asdict(limits),
            "cgroup": str(container_cgroup),
        }
        writer.write(json.dumps(config).encode() + b"\n")
        await writer.drain()
        async with asyncio.timeout(max(0.0, deadline - parts.clock.monotonic())):
            first = json.loads(await reader.readline() or b"{}")
        if first.get("event") != "listening":
            raise GiveUp(f"the receiver did not start: {first.get('error', 'it ended')}")
        receiver.port = int(first["port"])
        receiver._reader = asyncio.create_task(receiver._read(reader, on_event), name=f"receiver of {move.migration}")
        return receiver

    @property
    def alive(self) -> bool:
        """Whether the process (the keeper, later) still runs."""
        return self._process.poll() is None

    async def keep(self) -> None:
        """Tell it to outlive this agent."""
        self._writer.write(b'{"do": "keep"}\n')
        await self._writer.drain()

    def open_fill_gate(self) -> None:
        """Let the background fill begin; until then only faults are served, and the hand-over has the processor."""
        if self._gate is not None:
            os.close(self._gate)
            self._gate = None

    async def kill(self) -> None:
        """End it and the pager that it may have forked."""
        if self._group.path.exists():
            await asyncio.to_thread(self._group.kill, asyncio.get_running_loop().time() + 5.0)

    async def wait(self, deadline: float) -> None:
        """Wait for its end; one that does not come is killed."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._ended()
        except TimeoutError:
            await self.kill()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self.open_fill_gate()
        self._writer.close()

    async def _read(self, reader: asyncio.StreamReader, on_event: Callable[[dict[str, Any]], None]) -> None:
        while line := await reader.readline():
            on_event(json.loads(line))
        await self._ended()
        on_event({"event": "ended", "code": self._process.returncode})

    async def _ended(self) -> None:
        """Wait for the process's end (pidfd_open(2): readable then)."""
        if self._process.poll() is not None:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        descriptor = os.pidfd_open(self._process.pid)
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        self._process.wait()

"""A client of the drill as the drill sees it: a process in the client's network, lines of JSON both ways."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spotguard.errors import LabError
from spotguard.lab.nodes import Host

LINE_LIMIT = 1 << 20


class ClientProcess:
    """One running client. `on_event` hears every line that is not waited for by a method."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self.name = name
        self._process = process
        self._on_event = on_event

    @classmethod
    async def start(
        cls,
        host: Host,
        arguments: Sequence[str],
        *,
        name: str,
        log: Path,
        on_event: Callable[[dict[str, Any]], None],
    ) -> "ClientProcess":
        """Start `python -m spotguard.lab.clients ARGUMENTS` on `host`; its stderr goes to `log`."""
        with log.open("w") as errors:
            process = await asyncio.create_subprocess_exec(
                *host.enter,
                "python3",
                "-m",
                "spotguard.lab.clients",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=LINE_LIMIT,
            )
        return cls(name, process, on_event)

    async def wait_for(self, event: str, deadline: float) -> dict[str, Any]:
        """Read lines until the named event, and give it. Raises LabError when it does not come."""
        try:
            async with asyncio.timeout_at(deadline):
                async for line in self._lines():
                    entry: dict[str, Any] = json.loads(line)
                    self._on_event(entry)
                    if entry["event"] == event:
                        return entry
        except TimeoutError as late:
            raise LabError(f"the client of {self.name} did not say '{event}' in time") from late
        raise LabError(f"the client of {self.name} ended before it said '{event}' (exit {await self._process.wait()})")

    async def order(self, what: str) -> None:
        """Tell it to stop or to verify."""
        writer = self._process.stdin
        if writer is None or self._process.returncode is not None:
            raise LabError(f"the client of {self.name} has ended")
        writer.write(json.dumps({"do": what}).encode() + b"\n")
        await writer.drain()

    async def end(self) -> None:
        """End it, if it has not."""
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()

    async def _lines(self) -> Any:
        reader = self._process.stdout
        if reader is None:
            return
        while line := await reader.readline():
            yield line

"""The client's talk with the drill: JSON lines, orders on stdin, events on stdout (docs/report.md lists them)."""

import asyncio
import json
import sys
from typing import Any, Self


def emit(event: str, **fields: Any) -> None:
    """Write one event; the drill reads them line by line."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


class Orders:
    """The orders that come in on stdin; its end counts as an order to stop."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    @classmethod
    async def open(cls) -> Self:
        """Take over this process's stdin."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader)

    async def wait_for(self, order: str) -> bool:
        """Return True when `order` has come, False at the end of stdin; other orders are skipped, with an event."""
        while line := await self._reader.readline():
            do = json.loads(line).get("do")
            if do == order:
                return True
            emit("ignored", do=do, expected=order)
        return False

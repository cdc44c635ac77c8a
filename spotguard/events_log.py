"""What an agent did, as a stream: for `status`, for the drill's story and report, for a person who asks later.

Each entry is one JSON object: {"t": seconds of time.monotonic() of this node, "event": name, ...}. The newest `keep`
entries are held in memory; who subscribes gets those first and then each new one. A reader that does not keep up is cut
off rather than buffered without end.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from spotguard.clock import Clock

QUEUE = 10_000


class EventLog:
    """The events of one agent. `add` may only be called on the event loop's thread."""

    def __init__(self, clock: Clock, keep: int = 5_000) -> None:
        self._clock = clock
        self._kept: deque[dict[str, Any]] = deque(maxlen=keep)
        self._readers: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def add(self, event: str, **fields: Any) -> None:
        """Append an entry now; fields must be JSON types."""
        entry = {"t": self._clock.monotonic(), "event": event, **fields}
        self._kept.append(entry)
        for reader in list(self._readers):
            if reader.qsize() >= QUEUE:
                self._readers.discard(reader)
                reader.put_nowait(None)
            else:
                reader.put_nowait(entry)

    def kept(self) -> list[dict[str, Any]]:
        """Give the entries that are still held, oldest first."""
        return list(self._kept)

    async def follow(self, *, past: bool = True) -> AsyncIterator[dict[str, Any]]:
        """Yield the kept entries (unless `past` is False), then each new one; ends when the reader is too slow."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._readers.add(queue)
        try:
            for entry in self.kept() if past else ():
                yield entry
            while (entry_or_end := await queue.get()) is not None:
                yield entry_or_end
        finally:
            self._readers.discard(queue)

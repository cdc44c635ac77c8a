"""Takes the frames that a held pod would have got, keeps them for a way back, and sends them ahead to the target."""

import asyncio
from collections.abc import Awaitable, Callable

from handlers.control import MAX_FRAMES
from handlers.errors import HandlerError
from handlers.network import frames
from handlers.network.hold import Hold

KEPT_BYTES = 8 << 20  # what is kept for a way back; TCP sends again what does not fit


class FrameForwarder:
    """Reads a hold on the event loop while it is open.

    Frames are sent only from `start_sending` on (the target must be there), in order, one block at a time. A send that
    fails costs the frames of that block, never more: TCP has them still.
    """

    def __init__(self, hold: Hold, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._hold = hold
        self._send = send
        self.kept: list[bytes] = []
        self.count = 0
        self.lost = 0
        self._kept_bytes = 0
        self._waiting: list[bytes] = []
        self._sending = False
        self._sender: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take frames."""
        asyncio.get_running_loop().add_reader(self._hold.fileno(), self.collect)

    def collect(self) -> None:
        """Take what has come."""
        self.add(self._hold.take())

    def add(self, taken: list[bytes]) -> None:
        """Queue frames, of either direction."""
        for frame in taken:
            self.count += 1
            self._kept_bytes += len(frame)
            if self._kept_bytes > KEPT_BYTES:
                self.lost += 1
            else:
                self.kept.append(frame)
                self._waiting.append(frame)
        self._pump()

    def start_sending(self) -> None:
        """Send what was kept so far and all that comes."""
        self._sending = True
        self._pump()

    async def flush(self) -> None:
        """Take once more and wait until nothing is left to be sent."""
        self.collect()
        while self._sender is not None:
            await asyncio.shield(self._sender)

    async def stop(self) -> None:
        """Take and send no more."""
        asyncio.get_running_loop().remove_reader(self._hold.fileno())
        self._sending = False
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
            self._sender = None

    def _pump(self) -> None:
        if self._sending and self._sender is None and self._waiting:
            self._sender = asyncio.get_running_loop().create_task(self._send_waiting(), name="forward frames")

    async def _send_waiting(self) -> None:
        try:
            while self._waiting:
                block, _ = frames.keep_oldest(self._waiting, MAX_FRAMES)
                self._waiting = self._waiting[len(block) :]
                try:
                    await self._send(frames.pack(block))
                except HandlerError:
                    self.lost += len(block)
        finally:
            self._sender = None

"""One TCP connection that has to survive the move."""

import asyncio
import socket
import struct
import time
from dataclasses import dataclass
from typing import Self

import tenacity

READ_BUFFER = 1 << 20
TRY_SECONDS = 2.0


class ReplyError(Exception):
    """The server answered, and the answer is an error or no sense."""


class ConnectionLost(Exception):  # noqa: N818 - said of a connection, it reads as the event that it is
    """The connection ended or was reset; it is not opened again."""


@dataclass(frozen=True)
class TcpInfo:
    """What the kernel says of a connection: `struct tcp_info` of linux/tcp.h, in part."""

    retransmits: int  # of the segment that waits now
    backoff: int  # how often the retransmission timer has doubled, now
    total_retransmits: int
    rtt_us: int

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """Ask the kernel; raises OSError."""
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        words = struct.unpack_from("=24I", raw, 8)
        return cls(retransmits=raw[2], backoff=raw[4], total_retransmits=words[23], rtt_us=words[15])


class Connection:
    """A connection with its streams; every end of it is raised as ConnectionLost."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._socket: socket.socket = writer.get_extra_info("socket")
        self.local_port: int = self._socket.getsockname()[1]
        self.info = TcpInfo.of(self._socket)
        self.worst_backoff = 0

    @classmethod
    async def open(cls, address: str, port: int, deadline: float) -> Self:
        """Connect, trying again while the server is not there yet; raises OSError or TimeoutError at the deadline."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((OSError, TimeoutError)),
            wait=tenacity.wait_fixed(0.05),
            stop=lambda _: time.monotonic() >= deadline,
            reraise=True,
        ):
            with attempt:
                async with asyncio.timeout(TRY_SECONDS):
                    reader, writer = await asyncio.open_connection(address, port, limit=READ_BUFFER)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer)

    def sample(self) -> None:
        """Read the kernel's view of the connection; after its end the last view stays."""
        if self._writer.transport.is_closing():
            return
        self.info = TcpInfo.of(self._socket)
        self.worst_backoff = max(self.worst_backoff, self.info.backoff)

    async def send(self, data: bytes) -> None:
        """Send, waiting while the kernel's buffer is full."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as e:
            raise ConnectionLost(f"sending failed: {e}") from e

    async def line(self) -> bytes:
        """Return a line without its CR LF."""
        try:
            line = await self._reader.readuntil(b"\r\n")
        except asyncio.IncompleteReadError as e:
            raise ConnectionLost("the server closed the connection") from e
        except asyncio.LimitOverrunError as e:
            raise ReplyError("a line without end") from e
        except OSError as e:
            raise ConnectionLost(f"receiving failed: {e}") from e
        return line[:-2]

    async def exactly(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as e:
            raise ConnectionLost("the server closed the connection") from e
        except OSError as e:
            raise ConnectionLost(f"receiving failed: {e}") from e

    def close(self) -> None:
        """Close at once, without a word to the server."""
        self._writer.transport.abort()

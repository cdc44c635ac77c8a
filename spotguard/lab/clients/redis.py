"""Redis as the drill's client speaks it: RESP2, pipelined, and only the five commands needed."""

from collections.abc import Sequence

from spotguard.lab.clients.connection import Connection, ReplyError

VALUE_BYTES = 4000  # with redis' own header it fits the allocator's class of 4096


def command(*parts: bytes) -> bytes:
    """Return one command in RESP: an array of bulk strings (redis.io, "RESP protocol specification")."""
    head = b"*%d\r\n" % len(parts)
    return head + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


class RedisSession:
    """A keyed store (see keyed.Session) over one connection to Redis."""

    value_bytes = VALUE_BYTES

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def write(self, log: str, number: int, items: Sequence[tuple[str, bytes]]) -> int:
        """Append to a log and overwrite values, in one pipeline; return the log's length after it."""
        sets = [command(b"SET", key.encode(), value) for key, value in items]
        await self._connection.send(command(b"RPUSH", log.encode(), b"%d" % number) + b"".join(sets))
        length = await self._integer()
        await self._oks(len(items))
        return length

    async def fill(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Set values, in one pipeline."""
        await self._connection.send(b"".join(command(b"SET", key.encode(), value) for key, value in items))
        await self._oks(len(items))

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values, None for those that are not there."""
        await self._connection.send(command(b"MGET", *(key.encode() for key in keys)))
        return await self._array()

    async def read_log(self, log: str) -> list[int]:
        """Return all entries of a log."""
        await self._connection.send(command(b"LRANGE", log.encode(), b"0", b"-1"))
        return [int(entry) for entry in await self._array() if entry is not None]

    async def _oks(self, count: int) -> None:
        for _ in range(count):
            if (line := await self._connection.line()) != b"+OK":
                raise ReplyError(f"SET was answered with {line[:80]!r}")

    async def _integer(self) -> int:
        line = await self._connection.line()
        if not line.startswith(b":"):
            raise ReplyError(f"a number was expected, not {line[:80]!r}")
        return int(line[1:])

    async def _array(self) -> list[bytes | None]:
        line = await self._connection.line()
        if not line.startswith(b"*"):
            raise ReplyError(f"an array was expected, not {line[:80]!r}")
        return [await self._bulk() for _ in range(int(line[1:]))]

    async def _bulk(self) -> bytes | None:
        line = await self._connection.line()
        if line == b"$-1":
            return None
        if not line.startswith(b"$"):
            raise ReplyError(f"a string was expected, not {line[:80]!r}")
        size = int(line[1:])
        return (await self._connection.exactly(size + 2))[:size]

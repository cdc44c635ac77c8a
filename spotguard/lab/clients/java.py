"""The Java service as the drill's client speaks it: HTTP/1.1, kept alive, one request at a time on a connection."""

from collections.abc import Sequence

from spotguard.lab.clients.connection import Connection, ReplyError

VALUE_BYTES = 32 << 10
MAX_HEADERS = 64


class JavaSession:
    """A keyed store (see keyed.Session) over one HTTP connection to KeyValueServer.java."""

    value_bytes = VALUE_BYTES

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def write(self, log: str, number: int, items: Sequence[tuple[str, bytes]]) -> int:
        """Append to a log, then overwrite values one after the other; return the log's length after it."""
        answer = await self._expect(200, "POST", f"/log/{log}/{number}")
        await self.fill(items)
        return int(answer)

    async def fill(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Put values, one after the other."""
        for key, value in items:
            await self._expect(200, "PUT", f"/kv/{key}", value)

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values, None for those that are not there."""
        values: list[bytes | None] = []
        for key in keys:
            status, body = await self._request("GET", f"/kv/{key}")
            if status not in {200, 404}:
                raise ReplyError(f"GET of {key} was answered with status {status}")
            values.append(body if status == 200 else None)
        return values

    async def read_log(self, log: str) -> list[int]:
        """Return all entries of a log."""
        return [int(entry) for entry in (await self._expect(200, "GET", f"/log/{log}")).split()]

    async def _expect(self, wanted: int, method: str, path: str, body: bytes = b"") -> bytes:
        status, answer = await self._request(method, path, body)
        if status != wanted:
            raise ReplyError(f"{method} {path} was answered with status {status}")
        return answer

    async def _request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: java\r\nContent-Length: {len(body)}\r\n\r\n"
        await self._connection.send(head.encode() + body)
        status = await self._connection.line()
        if not status.startswith(b"HTTP/1.1 "):
            raise ReplyError(f"no HTTP answer: {status[:80]!r}")
        length = 0
        for _ in range(MAX_HEADERS):
            line = await self._connection.line()
            if not line:
                return int(status.split()[1]), await self._connection.exactly(length)
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        raise ReplyError("an HTTP answer with too many headers")

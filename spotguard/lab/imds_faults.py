"""Ways in which the simulated metadata service goes wrong on purpose."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web

# Path name that stands for PUT /latest/api/token.
TOKEN: Final = "token"  # noqa: S105 - a name in the control interface
KINDS: Final = (
    "status", "stall", "drop", "garbage", "huge", "truncated", "drip", "content-type", "redirect"
)  # fmt: skip
HTML = "<!DOCTYPE html><html><body><h1>It works!</h1></body></html>"
_HUGE_PIECE = b"x" * 65536


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service would answer without a fault."""

    status: int
    text: str
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "text/plain"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `count`: how many requests it spoils, None = until cleared.

    `path`: prefix below /latest/meta-data/ that it is for, or "token"; None = all (status 401: all but the token).
    `status`: for "status". `body`: for "garbage" (a page of HTML when None). `seconds`: how long a "stall" lasts
    (None: until faults are cleared), and the pause before each byte of a "drip" (None: 0.2).
    """

    kind: str
    count: int | None = None
    path: str | None = None
    status: int = 500
    body: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}: one of {', '.join(KINDS)}, or a status such as 503")
        if self.count is not None and self.count < 1:
            raise ValueError("count must be at least 1")
        if not 400 <= self.status <= 599:
            raise ValueError("a fault's status must be 400 to 599")
        if self.seconds is not None and self.seconds < 0:
            raise ValueError("seconds must not be negative")

    def fits(self, name: str) -> bool:
        """Tell whether a request for `name` (a metadata path, or "token") is to be spoiled."""
        if self.path is not None:
            return name == TOKEN if self.path == TOKEN else name != TOKEN and name.startswith(self.path)
        return not (name == TOKEN and self.kind == "status" and self.status == 401)


class Faults:
    """The faults that are set, in order: the first that fits a request spoils it."""

    def __init__(self) -> None:
        self._left: list[tuple[Fault, int | None]] = []
        self._cleared = asyncio.Event()

    def __iter__(self) -> Iterator[tuple[Fault, int | None]]:
        """Give each fault with the number of requests it is still to spoil (None: until cleared)."""
        return iter(tuple(self._left))

    def add(self, fault: Fault) -> None:
        """Set one more fault."""
        self._left.append((fault, fault.count))

    def clear(self) -> None:
        """Remove all faults; requests that a stall holds go on now."""
        self._left.clear()
        self._cleared.set()
        self._cleared = asyncio.Event()

    def take(self, name: str) -> Fault | None:
        """Give the fault for this request, counting it."""
        for index, (fault, left) in enumerate(self._left):
            if fault.fits(name):
                if left == 1:
                    del self._left[index]
                elif left is not None:
                    self._left[index] = (fault, left - 1)
                return fault
        return None

    async def spoil(self, fault: Fault, request: web.Request, answer: Answer) -> web.StreamResponse:
        """Answer the request the wrong way."""
        if fault.kind == "stall":
            await self._stall(fault.seconds)
            return plain(answer)
        if fault.kind == "huge":
            return await _huge(request)
        if fault.kind == "drip":
            return await _drip(request, answer, 0.2 if fault.seconds is None else fault.seconds)
        if fault.kind in {"drop", "truncated"}:
            return await _cut(request, answer.text.encode() or b"." if fault.kind == "truncated" else b"")
        return plain(_wrong(fault, request, answer))

    async def _stall(self, seconds: float | None) -> None:
        cleared = self._cleared
        try:
            async with asyncio.timeout(seconds):
                await cleared.wait()
        except TimeoutError:
            return


def plain(answer: Answer) -> web.Response:
    """Answer as the service does."""
    return web.Response(
        status=answer.status,
        body=answer.text.encode(),
        headers={**dict(answer.headers), "Content-Type": answer.content_type, "Server": "EC2ws"},
    )


def _wrong(fault: Fault, request: web.Request, answer: Answer) -> Answer:
    """Give the answer of a fault that changes nothing but the answer."""
    if fault.kind == "status":
        return Answer(fault.status, HTML, content_type="text/html")
    if fault.kind == "garbage":
        return Answer(200, HTML if fault.body is None else fault.body)
    if fault.kind == "redirect":
        return Answer(302, "", (("Location", request.path),))
    return replace(answer, content_type="application/octet-stream")


async def _cut(request: web.Request, body: bytes) -> web.StreamResponse:
    """Break the connection, after half of the body when there is one. What aiohttp still writes goes nowhere."""
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    if body:
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


async def _huge(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    for _ in range(1024):
        await response.write(_HUGE_PIECE)
    return response


async def _drip(request: web.Request, answer: Answer, pause: float) -> web.StreamResponse:
    body = answer.text.encode()
    response = web.StreamResponse(status=answer.status, headers={"Content-Type": "text/plain"})
    response.content_length = len(body)
    await response.prepare(request)
    for byte in body:
        await asyncio.sleep(pause)
        await response.write(bytes([byte]))
    return response

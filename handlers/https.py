"""Requests with certificates on both sides, whose failures say whether the request can have been read."""

import asyncio
import io
import json
import ssl
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import aiohttp

# Servers keep idle connections for longer (600 s), so that none of them closes one that is about to be used.
KEEP_ALIVE_S = 300
_LARGE = 1 << 19


class NotSent(Exception):  # noqa: N818 - named after the finding
    """There never was a connection to the right server: nobody can have read the request."""


class Unanswered(Exception):  # noqa: N818 - named after the finding
    """The request may have been read, but there is no answer, or none that can be understood."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, and the JSON object that came with it."""

    status: int
    body: Mapping[str, Any]

    @property
    def reason(self) -> str:
        """Say why it was refused, in the server's words."""
        return f"{self.status} {str(self.body.get('reason', ''))[:500]}".strip()


class Https:
    """Keeps connections open between requests. `context`: TLS 1.3 and checking host names, else ValueError.

    Use as an async context manager.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        if not (context.check_hostname and context.minimum_version >= ssl.TLSVersion.TLSv1_3):
            raise ValueError("a client needs a TLS context that checks names and allows only TLS 1.3")
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_mark_connected)
        trace.on_connection_reuseconn.append(_mark_connected)
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0, keepalive_timeout=KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, trace_configs=[trace], timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(
        self, method: str, url: str, server_name: str, deadline: float, *, body: object = None, max_answer: int
    ) -> Answer:
        """Send one request, to the server whose certificate has `server_name`, and return its answer.

        `body`: bytes as they are, else JSON. Redirects are not followed. Raises NotSent and Unanswered.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise NotSent("no time left")
        sent = SimpleNamespace(connected=False)
        try:
            async with (
                asyncio.timeout(left),
                self._request(method, url, server_name, sent, body) as answer,
            ):
                raw = await _limited(answer, max_answer)
            return Answer(answer.status, _object(raw))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
            raise (Unanswered if sent.connected else NotSent)(words(error)) from error

    def stream(
        self, url: str, server_name: str, silence_s: float
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Open a GET whose answer does not end; TimeoutError comes from reading after `silence_s` without a byte."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)
        sent = SimpleNamespace(connected=False)
        return self._open().get(url, server_hostname=server_name, timeout=timeout, trace_request_ctx=sent)

    def _request(
        self, method: str, url: str, server_name: str, sent: SimpleNamespace, body: object
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return self._open().request(
            method,
            url,
            # aiohttp wants large bodies as a file, for it writes bytes in one piece.
            data=io.BytesIO(raw) if raw and len(raw) > _LARGE else raw,
            server_hostname=server_name,
            trace_request_ctx=sent,
            allow_redirects=False,
        )

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("a client is used outside its 'async with'")
        return self._session


def words(error: BaseException) -> str:
    """Say what an error is, even one without a message."""
    return str(error) or type(error).__name__


async def _mark_connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.connected = True


async def _limited(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    raw = bytearray()
    while chunk := await answer.content.read(1 << 16):
        raw += chunk
        if len(raw) > limit:
            raise ValueError(f"the answer is longer than {limit} bytes")
    return bytes(raw)


def _object(raw: bytes) -> Mapping[str, Any]:
    body = json.loads(raw) if raw else {}
    if not isinstance(body, Mapping):
        raise ValueError("the answer is no JSON object")  # noqa: TRY004 - all unreadable answers alike
    return body

"""A client of the instance metadata service, version 2 (session tokens). Knows HTTP, not what the answers mean.

Facts: AWS EC2 user guide, "Use the Instance Metadata Service to access instance metadata". There are no retries beside
the one after a 401: the poller asks again within its interval anyway.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import aiohttp

from handlers.imds_parse import ImdsGarbage, parse_token

DEFAULT_ENDPOINTS = ("http://169.254.169.254", "http://[fd00:ec2::254]")
TOKEN_PATH = "/latest/api/token"  # noqa: S105 - a path
META_DATA = "/latest/meta-data/"
_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
_TOKEN_HEADER = "X-aws-ec2-metadata-token"  # noqa: S105 - a header's name
# The longest real answer is a list of scheduled events, a few hundred bytes each.
BODY_LIMIT = 64 * 1024
# After so many requests without any answer, all endpoints are asked again for a token.
SILENCE_LIMIT = 10

type Reason = Literal[
    "timeout", "refused", "disconnected", "unauthorized", "forbidden", "throttled", "server_error", "status",
    "too_large", "garbage",
]  # fmt: skip


class ImdsUnavailable(Exception):  # noqa: N818 - named after what to do: ask later
    """A request got no usable answer. `reason` is fit for a metric's label, the message for a log."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def endpoints_from(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Give the base addresses to use: AWS_EC2_METADATA_SERVICE_ENDPOINT when set, as in AWS's own SDKs."""
    chosen = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "").strip().rstrip("/")
    return (chosen,) if chosen else DEFAULT_ENDPOINTS


@dataclass(frozen=True, slots=True)
class _Session:
    token: str
    endpoint: str
    refresh_at: float  # monotonic


class ImdsClient:
    """Read metadata with one token, shared by all requests.

    `timeout`: seconds that one `get` or `renew` may take in all, token and repeat after a 401 included. `token_ttl`:
    seconds, 1-21600, counted by `monotonic`. With several endpoints a new token is asked of all at once, and the first
    to answer is used.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        *,
        timeout: float = 1.0,
        token_ttl: int = 21600,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if not endpoints:
            raise ValueError("at least one endpoint is needed")
        if not 1 <= token_ttl <= 21600:
            raise ValueError("token_ttl must be 1 to 21600 seconds")
        self._endpoints = endpoints
        self._timeout = timeout
        self._ttl = token_ttl
        self._monotonic = monotonic
        self._session: _Session | None = None
        self._lock = asyncio.Lock()
        self._http: aiohttp.ClientSession | None = None
        self._silent = 0  # requests in a row that got no answer at all

    async def __aenter__(self) -> Self:
        # Proxies of the environment are not for link-local addresses (trust_env stays off); compressed answers could
        # grow beyond the limit, and the service never gives any.
        self._http = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    async def get(self, path: str) -> bytes | None:
        """Read a path below /latest/meta-data/; None when it is not there (404). Raises ImdsUnavailable."""
        self._silent += 1
        if self._silent > SILENCE_LIMIT:
            self._session = None
        async with _bounded(self._timeout):
            session = self._session or await self._replace(None)
            status, body = await self._request("GET", session.endpoint, META_DATA + path, session.token)
            if status == 401:
                session = await self._replace(session)
                status, body = await self._request("GET", session.endpoint, META_DATA + path, session.token)
        self._silent = 0
        if status == 404:
            return None
        _check(status)
        return body

    @property
    def refresh_due(self) -> bool:
        """Tell whether the token nears its end: three quarters of its time are over."""
        return self._session is not None and self._monotonic() >= self._session.refresh_at

    async def renew(self) -> None:
        """Replace the token before it ends; requests go on with the old one meanwhile. Raises ImdsUnavailable."""
        async with _bounded(self._timeout):
            await self._replace(self._session)

    async def _replace(self, old: _Session | None) -> _Session:
        """Fetch a new token unless somebody else has replaced `old` meanwhile."""
        async with self._lock:
            if self._session is not None and self._session is not old:
                return self._session
            self._session = await self._first_session()
            return self._session

    async def _first_session(self) -> _Session:
        tasks = [asyncio.create_task(self._open_session(endpoint)) for endpoint in self._endpoints]
        failure: ImdsUnavailable | None = None
        try:
            async for task in asyncio.as_completed(tasks):
                try:
                    return await task
                except ImdsUnavailable as error:
                    # An answer says more than an address that is not there.
                    if failure is None or failure.reason in {"refused", "disconnected"}:
                        failure = error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert failure is not None
        raise failure

    async def _open_session(self, endpoint: str) -> _Session:
        asked = self._monotonic()
        status, body = await self._request("PUT", endpoint, TOKEN_PATH, None)
        _check(status)
        try:
            return _Session(parse_token(body), endpoint, asked + self._ttl * 0.75)
        except ImdsGarbage as error:
            raise ImdsUnavailable("garbage", str(error)) from error

    async def _request(self, method: str, endpoint: str, path: str, token: str | None) -> tuple[int, bytes]:
        assert self._http is not None, "the client is not open"
        header, value = (_TOKEN_HEADER, token) if token else (_TTL_HEADER, str(self._ttl))
        try:
            async with self._http.request(
                method, endpoint + path, headers={header: value}, allow_redirects=False
            ) as response:
                return response.status, await _limited(response)
        except aiohttp.ClientConnectorError as error:
            raise ImdsUnavailable("refused", str(error)) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ImdsUnavailable("disconnected", f"{type(error).__name__}: {error}") from error


@asynccontextmanager
async def _bounded(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise ImdsUnavailable("timeout", f"no whole answer within {seconds} s") from error


async def _limited(response: aiohttp.ClientResponse) -> bytes:
    if response.status not in {200, 401}:
        return b""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > BODY_LIMIT:
            response.close()
            raise ImdsUnavailable("too_large", f"an answer of more than {BODY_LIMIT} bytes")
    return bytes(body)


def _check(status: int) -> None:
    if status == 200:
        return
    reasons: dict[int, Reason] = {401: "unauthorized", 403: "forbidden", 429: "throttled"}
    reason = reasons.get(status, "server_error" if status >= 500 else "status")
    raise ImdsUnavailable(reason, f"status {status}")

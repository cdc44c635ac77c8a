"""The target's side of the control API: who may ask what, in which form, and what each failure means to the asker.

| request | body | answer |
|---|---|---|
| GET /v1/migrations | | 200 {"protocol"}; only opens a connection |
| POST /v1/migrations | HEAD and "offer": OFFER | 201 {"stream_host", "stream_port"} |
| POST /v1/migrations/ID/restore | HEAD | 200 {"outcome", "reason", "timings"} |
| POST /v1/migrations/ID/frames | bytes | 200 {} |
| GET /v1/migrations/ID | | 200 object |
| DELETE /v1/migrations/ID | | 200 {} |

HEAD is "protocol": 1, "agent": its version, "time_left_s": seconds until the asker stops waiting.
4xx: refused, nothing was done, {"reason": text}. 503: nothing was done yet, asking again may help. Other 5xx: unknown.
"""

import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import structlog
from aiohttp import web

from handlers.control import MAX_FRAMES, MAX_OFFER, PROTOCOL, Machine, Offer, OfferAnswer, RestoreAnswer, time_left
from handlers.errors import GiveUp, Retry
from spotguard.errors import Unavailable
from spotguard.pki import BadIdentity, peer_name

KEEP_ALIVE_S = 600  # longer than clients keep an idle connection
_MAX_HEAD = 4096  # bytes around an offer
_MAX_REMEMBERED = 4096
_UUID = r"{id:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}}"
_LOG = structlog.stdlib.get_logger()
_PEER = web.RequestKey("peer", str)


class TargetPort(Protocol):
    """What the API opens onto. `peer`: the node that asks, from its certificate.

    Raises GiveUp (nothing was done, the message is the reason) or Retry (nothing was done yet); any other error, a
    TimeoutError above all, leaves the asker not knowing. Must itself refuse a peer that did not make the offer: after a
    restart the API no longer knows who did.
    """

    async def offer(self, peer: str, offer: Offer, deadline: float) -> OfferAnswer:
        """Prepare for a workload."""

    async def restore(self, peer: str, migration: str, deadline: float) -> RestoreAnswer:
        """Restore it, take it over, let it run."""

    async def frames(self, peer: str, migration: str, block: bytes) -> None:
        """Keep frames until they can be played."""

    async def status(self, peer: str, migration: str) -> dict[str, Any]:
        """Say where a migration stands."""

    async def abort(self, peer: str, migration: str) -> None:
        """Throw away what was prepared, if the workload is not ours yet; an unknown migration is no error."""


def make_app(target: TargetPort, machine: Machine | None = None) -> web.Application:
    """Build the application. `machine`: what workloads have to fit on; this one when None."""
    api = _Api(target, machine or Machine.here())
    # The largest body is a block of frames; offers are checked when they are read.
    app = web.Application(client_max_size=MAX_FRAMES, middlewares=[_guard])
    app.router.add_get("/v1/migrations", api.hello)
    app.router.add_post("/v1/migrations", api.offer)
    app.router.add_post(f"/v1/migrations/{_UUID}/restore", api.restore)
    app.router.add_post(f"/v1/migrations/{_UUID}/frames", api.frames)
    app.router.add_get(f"/v1/migrations/{_UUID}", api.status)
    app.router.add_delete(f"/v1/migrations/{_UUID}", api.abort)
    return app


@asynccontextmanager
async def serve(
    target: TargetPort, context: ssl.SSLContext, host: str, port: int, machine: Machine | None = None
) -> AsyncIterator[int]:
    """Listen while the `async with` lasts; gives the port, which the kernel chooses for 0. Raises Unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host} port {port}: {error}") from error
    runner = web.AppRunner(
        make_app(target, machine), access_log=None, keepalive_timeout=KEEP_ALIVE_S, shutdown_timeout=0.5
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener, ssl_context=context).start()
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()
        listener.close()


class _Api:
    def __init__(self, target: TargetPort, machine: Machine) -> None:
        self._target = target
        self._machine = machine
        self._offered_by: dict[str, str] = {}

    async def hello(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"protocol": PROTOCOL})

    async def offer(self, request: web.Request) -> web.StreamResponse:
        body, deadline = await _head(request)
        try:
            offer = Offer.from_json(body.get("offer"))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        peer = request[_PEER]
        if offer.source != peer:
            raise web.HTTPForbidden(text=f"the offer names '{offer.source}' as source, the certificate '{peer}'")
        self._check_peer(offer.migration, peer)
        unfit = self._machine.cannot_run(offer.machine)
        if unfit:
            raise GiveUp(unfit)
        self._remember(offer.migration, peer)
        answer = await self._target.offer(peer, offer, deadline)
        return web.json_response({"stream_host": answer.stream_host, "stream_port": answer.stream_port}, status=201)

    async def restore(self, request: web.Request) -> web.StreamResponse:
        _, deadline = await _head(request)
        answer = await self._target.restore(*self._who(request), deadline)
        body = {"outcome": answer.outcome, "reason": answer.reason[:1000], "timings": dict(answer.timings)}
        return web.json_response(body)

    async def frames(self, request: web.Request) -> web.StreamResponse:
        await self._target.frames(*self._who(request), await request.read())
        return web.json_response({})

    async def status(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(await self._target.status(*self._who(request)))

    async def abort(self, request: web.Request) -> web.StreamResponse:
        await self._target.abort(*self._who(request))
        return web.json_response({})

    def _who(self, request: web.Request) -> tuple[str, str]:
        migration, peer = request.match_info["id"], request[_PEER]
        self._check_peer(migration, peer)
        return peer, migration

    def _check_peer(self, migration: str, peer: str) -> None:
        if self._offered_by.get(migration, peer) != peer:
            raise web.HTTPForbidden(text=f"migration {migration} was not offered by '{peer}'")

    def _remember(self, migration: str, peer: str) -> None:
        self._offered_by[migration] = peer
        if len(self._offered_by) > _MAX_REMEMBERED:
            del self._offered_by[next(iter(self._offered_by))]


@web.middleware
async def _guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Find out who asks, and turn every foreseen error into its status; others become aiohttp's 500."""
    try:
        request[_PEER] = peer_name(request.get_extra_info("peercert"))
        return await handler(request)
    except BadIdentity as error:
        return _refusal(403, str(error))
    except GiveUp as error:
        return _refusal(409, str(error))
    except Retry as error:
        return _refusal(503, str(error))
    except TimeoutError as error:
        _LOG.warning("control request timed out", path=request.path)
        return _refusal(504, f"not done in time: {error}")
    except web.HTTPException as error:
        return _refusal(error.status, error.text)


async def _head(request: web.Request) -> tuple[Mapping[str, Any], float]:
    """Read a JSON body; return it with the deadline that its time left means here."""
    arrived = time.monotonic()
    raw = await request.read()
    if len(raw) > MAX_OFFER + _MAX_HEAD:
        raise web.HTTPRequestEntityTooLarge(MAX_OFFER, len(raw))
    try:
        body = json.loads(raw)
        if not isinstance(body, Mapping):
            raise web.HTTPBadRequest(text="the body is no JSON object")
        if body.get("protocol") != PROTOCOL:
            raise GiveUp(
                f"protocol {body.get('protocol')!r:.50} of agent {body.get('agent')!r:.50} is unknown here: "
                f"this agent speaks {PROTOCOL}"
            )
        return body, arrived + time_left(body, "time_left_s")
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"the body cannot be read: {error}") from error


def _refusal(status: int, reason: str | None) -> web.Response:
    return web.json_response({"reason": (reason or "")[:1000]}, status=status)

"""`spotguard owner-store`: the server that says who owns each workload, outside the nodes that can die.

HTTPS with certificates on both sides. What a node may do follows from the name in its certificate. JSON bodies:

| request | body | answer |
|---|---|---|
| GET /healthz | | 200 {} |
| PUT /v1/migrations/ID | RECORD with an empty version | 200 RECORD, 409 {"current": RECORD} |
| GET /v1/migrations/ID | | 200 RECORD |
| POST /v1/migrations/ID/owner | {"version": V, "owner": "target"/"reclaimed"} | 200 RECORD, 409 {"current": RECORD} |
| DELETE /v1/migrations/ID | | 200 {} |
| GET /v1/watch | | lines: {"record": RECORD} for all, then for each change; {"deleted": ID}; {"heartbeat": true} |

404: no such record. Other 4xx: {"reason": text}. 5xx: whether the change was made is unknown.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import structlog
from aiohttp import web

from handlers.owner import MAX_BODY, Conflict, NotFound, OwnerRecord, Refused
from spotguard import config
from spotguard.clock import SystemClock
from spotguard.errors import ExitCode, Unavailable
from spotguard.observability import configure_logging
from spotguard.owner_table import OwnerTable, StoreBroken
from spotguard.pki import BadIdentity, Identity, peer_name, ssl_context
from spotguard.settings import OwnerStoreSettings

KEEP_ALIVE_S = 600  # longer than clients keep an idle connection, so that none of them sends into a closing one
_MAX_WATCHERS = 256
_MAX_WAITING = 1024  # changes that a slow watcher may lag behind before it is cut off

Operation = Literal["health", "create", "read", "swap", "delete"]
FaultKind = Literal["delay-before", "delay-answer", "drop-before", "drop-after"]
_FAULT = re.compile(rf"({'|'.join(get_args(Operation))}):({'|'.join(get_args(FaultKind))})(=\d+(?:\.\d+)?)?(\*\d+)?\Z")
_PEER = web.RequestKey("peer", str)
_LOG = structlog.stdlib.get_logger()


@dataclass
class Fault:
    """Something to do wrong, for drills and tests: the next `times` requests of one operation.

    delay-before: the change is made `seconds` late; delay-answer: only the answer is late; drop-before, drop-after: the
    connection breaks before or after the change.
    """

    operation: Operation
    kind: FaultKind
    seconds: float = 0.0
    times: int = 1


def parse_fault(text: str) -> Fault:
    """Read OPERATION:KIND[=SECONDS][*TIMES], as in swap:delay-answer=2.5*3; raises ArgumentTypeError."""
    match = _FAULT.match(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no fault; expected OPERATION:KIND[=SECONDS][*TIMES] with OPERATION one of "
            f"{', '.join(get_args(Operation))} and KIND one of {', '.join(get_args(FaultKind))}"
        )
    operation, kind, seconds, times = match.groups()
    return Fault(operation, kind, float((seconds or "=0")[1:]), int((times or "*1")[1:]))  # type: ignore[arg-type]  # the expression allows no other


class OwnerServer:
    """Answers requests from an OwnerTable. `faults` may be changed while it runs."""

    def __init__(self, table: OwnerTable, *, heartbeat_s: float = 2.0, faults: Sequence[Fault] = ()) -> None:
        self._table = table
        self._heartbeat_s = heartbeat_s
        self.faults = list(faults)
        self.stop = asyncio.Event()
        self.broken = False
        self._watchers: set[asyncio.Queue[bytes | None]] = set()
        table.on_change = self._publish

    def app(self) -> web.Application:
        """Build the application; all of its routes demand an identity."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.router.add_get("/healthz", self._health)
        app.router.add_put("/v1/migrations/{id}", self._create)
        app.router.add_get("/v1/migrations/{id}", self._read)
        app.router.add_post("/v1/migrations/{id}/owner", self._swap)
        app.router.add_delete("/v1/migrations/{id}", self._delete)
        app.router.add_get("/v1/watch", self._watch)
        app.on_shutdown.append(self._end_watches)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Find out who asks, and turn every foreseen error into its status; others become aiohttp's 500."""
        try:
            request[_PEER] = peer_name(request.get_extra_info("peercert"))
            return await handler(request)
        except Conflict as error:
            return web.json_response({"current": error.current.to_json()}, status=409)
        except (NotFound, Refused, BadIdentity) as error:
            return _refusal(404 if isinstance(error, NotFound) else 403, error)
        except web.HTTPException as error:
            return _refusal(error.status, error.text)
        except StoreBroken as error:
            _LOG.critical("journal broken", error=str(error))
            self.broken = True
            self.stop.set()
            return _refusal(500, error)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return await self._perform(request, "health", dict)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        try:
            record = OwnerRecord.from_json(await _body(request))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        if record.migration != request.match_info["id"] or record.version:
            raise web.HTTPBadRequest(text="a new record has the migration of its path and an empty version")
        return await self._perform(request, "create", lambda: self._table.create(record, request[_PEER]).to_json())

    async def _read(self, request: web.Request) -> web.StreamResponse:
        return await self._perform(request, "read", lambda: self._table.read(request.match_info["id"]).to_json())

    async def _swap(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        version, owner = body.get("version"), body.get("owner")
        if not isinstance(version, str) or owner not in ("target", "reclaimed"):
            raise web.HTTPBadRequest(text="a swap names a version and the new owner: target or reclaimed")
        migration, peer = request.match_info["id"], request[_PEER]
        return await self._perform(request, "swap", lambda: self._table.swap(migration, version, owner, peer).to_json())

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        def action() -> dict[str, str]:
            self._table.delete(request.match_info["id"], request[_PEER])
            return {}

        return await self._perform(request, "delete", action)

    async def _perform(
        self, request: web.Request, operation: Operation, action: Callable[[], dict[str, str]]
    ) -> web.StreamResponse:
        """Do `action`, which does not wait, and answer; or do so as wrongly as the next fault wants it."""
        fault = self._next_fault(operation)
        if fault and fault.kind == "delay-before":
            await asyncio.sleep(fault.seconds)
        if fault and fault.kind == "drop-before":
            return _drop(request)
        result = action()
        if operation not in {"health", "read"}:
            _LOG.info(operation, peer=request[_PEER], **(result or {"migration": request.match_info["id"]}))
        if fault and fault.kind == "delay-answer":
            await asyncio.sleep(fault.seconds)
        if fault and fault.kind == "drop-after":
            return _drop(request)
        return web.json_response(result)

    def _next_fault(self, operation: Operation) -> Fault | None:
        fault = next((f for f in self.faults if f.operation == operation), None)
        if fault:
            fault.times -= 1
            if fault.times <= 0:
                self.faults.remove(fault)
            _LOG.warning("fault", operation=operation, kind=fault.kind)
        return fault

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if len(self._watchers) >= _MAX_WATCHERS:
            return _refusal(503, "too many watchers")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(_MAX_WAITING)
        # Nothing waits between these two: no change is missed, none comes before the records it follows.
        lines = [_line({"record": record.to_json()}) for record in self._table.records()]
        self._watchers.add(queue)
        try:
            await response.prepare(request)
            await response.write(b"".join(lines) + _line({"heartbeat": True}))
            while (line := await self._next_line(queue)) is not None:
                await response.write(line)
        except ConnectionResetError:
            _LOG.debug("watcher left", peer=request[_PEER])
        finally:
            self._watchers.discard(queue)
        return response

    async def _next_line(self, queue: asyncio.Queue[bytes | None]) -> bytes | None:
        try:
            async with asyncio.timeout(self._heartbeat_s):
                return await queue.get()
        except TimeoutError:
            return _line({"heartbeat": True}) if queue in self._watchers else None

    def _publish(self, record: OwnerRecord | None, migration: str) -> None:
        line = _line({"record": record.to_json()} if record else {"deleted": migration})
        for queue in list(self._watchers):
            try:
                queue.put_nowait(line)
            except asyncio.QueueFull:
                self._cut_off(queue)

    async def _end_watches(self, _: web.Application) -> None:
        for queue in list(self._watchers):
            self._cut_off(queue)

    def _cut_off(self, queue: asyncio.Queue[bytes | None]) -> None:
        """End a watch: what it has not been told is dropped, so that its client watches anew and reads all."""
        self._watchers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)


@asynccontextmanager
async def serve(server: OwnerServer, context: ssl.SSLContext, host: str, port: int) -> AsyncIterator[int]:
    """Listen while the `async with` lasts; gives the port, which the kernel chooses for 0. Raises Unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host} port {port}: {error}") from error
    runner = web.AppRunner(server.app(), access_log=None, keepalive_timeout=KEEP_ALIVE_S, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.SockSite(runner, listener, ssl_context=context).start()
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()
        listener.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    config.add_arguments(parser, OwnerStoreSettings)
    parser.add_argument(
        "--fault",
        type=parse_fault,
        action="append",
        default=[],
        metavar="OPERATION:KIND[=SECONDS][*TIMES]",
        help="for drills: do something wrong, as in swap:drop-after or swap:delay-answer=2*3; may be repeated",
    )


async def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, or until the journal breaks; return the exit code."""
    settings = config.load(OwnerStoreSettings, args, os.environ)
    configure_logging(settings.log, SystemClock())
    tls = settings.tls
    context = ssl_context(Identity(cert=tls.cert, key=tls.key, ca=tls.ca), server_side=True)
    with contextlib.closing(OwnerTable(settings.serve.journal)) as table:
        server = OwnerServer(table, heartbeat_s=settings.serve.heartbeat_s, faults=args.fault)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop.set)
        async with serve(server, context, settings.serve.listen, settings.serve.port) as port:
            _LOG.info("listening", address=settings.serve.listen, port=port, records=len(table.records()))
            await server.stop.wait()
    return ExitCode.FAILED if server.broken else ExitCode.OK


def main(args: argparse.Namespace) -> int:
    """Run the command; see `run`."""
    return asyncio.run(run(args))


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"the body is no JSON: {error}") from error
    if not isinstance(body, Mapping):
        raise web.HTTPBadRequest(text="the body is no JSON object")
    return body


def _drop(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)  # goes nowhere: the connection is gone


def _refusal(status: int, reason: object) -> web.Response:
    return web.json_response({"reason": str(reason)[:1000]}, status=status)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"

"""The agent's door for people on its node: HTTP on a Unix socket that only root can open.

GET  /v1/events             the event log as JSON lines, past and live
GET  /v1/status             node, notice, migrations
POST /v1/migrations         {"pod": NAME, "target": NODE or null, "time_left_s": SECONDS}: move a pod now
"""

import json
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from spotguard.events_log import EventLog


class AdminPort(Protocol):
    """What the door opens onto: the agent."""

    def status(self) -> dict[str, Any]:
        """Say what the agent is doing, as JSON types."""

    def move(self, pod: str, target: str | None, time_left_s: float) -> str:
        """Start a migration and return its id; raises ValueError with the reason when that cannot be."""


def make_app(port: AdminPort, log: EventLog) -> web.Application:
    """Build the application."""

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        # A reader who hangs up is no error of ours.
        with suppress(ConnectionResetError):
            async for entry in log.follow():
                await response.write(json.dumps(entry).encode() + b"\n")
        return response

    async def status(_: web.Request) -> web.Response:
        return web.json_response(port.status())

    async def move(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            migration = port.move(str(body["pod"]), body.get("target"), _seconds(body.get("time_left_s", 120)))
        except (ValueError, KeyError, TypeError, AttributeError) as wrong:
            return web.json_response({"reason": f"{type(wrong).__name__}: {wrong}"}, status=400)
        return web.json_response({"migration": migration}, status=202)

    app = web.Application(client_max_size=16 << 10)
    app.add_routes([web.get("/v1/events", events), web.get("/v1/status", status), web.post("/v1/migrations", move)])
    return app


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 < seconds < math.inf:
        raise ValueError(f"time_left_s is {seconds}; expected seconds above 0")
    return seconds


@asynccontextmanager
async def serve(port: AdminPort, log: EventLog, socket: Path) -> AsyncIterator[None]:
    """Serve on the Unix socket while the context is open."""
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    runner = web.AppRunner(make_app(port, log), shutdown_timeout=0.5)
    await runner.setup()
    mask = os.umask(0o177)
    try:
        await web.UnixSite(runner, str(socket)).start()
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        await runner.cleanup()

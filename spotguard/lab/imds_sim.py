"""A simulated instance metadata service (IMDSv2), for drills and tests, with a control interface beside it.

Use it as a library (`async with ImdsSimulator() as imds`) or as `spotguard imds-sim`. docs/imds-sim.md describes what
it answers and how it is controlled.
"""

import argparse
import asyncio
import json
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from spotguard.lab.imds_control import control_app
from spotguard.lab.imds_faults import TOKEN, Answer, Faults, plain
from spotguard.lab.imds_world import Interruption, ScheduledEvent, World

TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"  # noqa: S105 - a header's name
MAX_TTL = 21600

_BODIES = {400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"}


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen; port 0 takes a free one. A control socket (Unix) takes the place of the control port."""

    host: str = "127.0.0.1"
    port: int = 0
    control_host: str = "127.0.0.1"
    control_port: int = 0
    control_socket: Path | None = None


class ImdsSimulator:
    """Serve the metadata of one simulated instance while the context is open.

    `now`: the wall clock (epoch seconds) that "seconds from now" counts from; `monotonic`: what tokens age by.
    `require_token=False` also answers requests without a token, as instances with IMDSv1 enabled do.
    `requests` counts what was asked: (method, path or "token", status or name of the fault).
    """

    def __init__(
        self,
        *,
        now: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        listen: Listen | None = None,
        require_token: bool = True,
    ) -> None:
        self.world = World(now or _system_wall())
        self.faults = Faults()
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.endpoint = ""
        self.control = ""
        self._listen = listen or Listen()
        self._monotonic = monotonic
        self._require_token = require_token
        self._tokens: dict[str, float] = {}
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        listen = self._listen
        async with AsyncExitStack() as opened:
            opened.callback(self.faults.clear)
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._serve)
            runner = await _started(opened, app)
            await web.TCPSite(runner, listen.host, listen.port).start()
            self.endpoint = _address(runner)
            runner = await _started(opened, control_app(self))
            if listen.control_socket is not None:
                await web.UnixSite(runner, str(listen.control_socket)).start()
                opened.callback(listen.control_socket.unlink, missing_ok=True)
                self.control = f"unix:{listen.control_socket}"
            else:
                await web.TCPSite(runner, listen.control_host, listen.control_port).start()
                self.control = _address(runner)
            self._open = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()

    def interrupt(self, action: str = "terminate", *, seconds: float = 120.0, at: float | None = None) -> float:
        """Give a Spot interruption notice, `seconds` from now (may be negative) or `at` epoch seconds; returns `at`."""
        when = self.world.now() + seconds if at is None else at
        self.world.interruption = Interruption(action, when)
        return when

    def withdraw(self) -> None:
        """Take the interruption notice back."""
        self.world.interruption = None

    def recommend_rebalance(self, *, seconds: float = 0.0) -> None:
        """Give a rebalance recommendation, dated `seconds` from now."""
        self.world.rebalance = self.world.now() + seconds

    def schedule(self, event: ScheduledEvent) -> None:
        """Set a scheduled event; one with the same id is replaced."""
        self.world.events[event.event_id] = event

    def expire_tokens(self) -> None:
        """Make all tokens given out so far invalid."""
        self._tokens.clear()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        name, answer = self._answer(request)
        fault = self.faults.take(name)
        self.requests[request.method, name, str(answer.status) if fault is None else fault.kind] += 1
        if fault is None:
            return plain(answer)
        return await self.faults.spoil(fault, request, answer)

    def _answer(self, request: web.Request) -> tuple[str, Answer]:
        if request.path == "/latest/api/token":
            return TOKEN, self._token(request)
        name = request.path.removeprefix("/latest/meta-data/")
        if request.method not in {"GET", "HEAD"}:
            return name, _error(405)
        token = request.headers.get(TOKEN_HEADER)
        if token is None and self._require_token:
            return name, _error(401)
        if token is not None and self._tokens.get(token, 0.0) <= self._monotonic():
            return name, _error(401)
        value = self.world.read(name) if name != request.path else None
        if value is None:
            return name, _error(404)
        return name, Answer(200, value if isinstance(value, str) else json.dumps(value))

    def _token(self, request: web.Request) -> Answer:
        if request.method != "PUT":
            return _error(405)
        if "X-Forwarded-For" in request.headers:
            return _error(403)  # AWS refuses tokens through a proxy
        text = request.headers.get(TTL_HEADER, "")
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= MAX_TTL):
            return _error(400)
        token = secrets.token_urlsafe(40) + "=="
        self._tokens[token] = self._monotonic() + int(text)
        return Answer(200, token, ((TTL_HEADER, text),))


def _error(status: int) -> Answer:
    title = f"{status} - {_BODIES[status]}"
    page = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
    return Answer(status, f'<?xml version="1.0" encoding="iso-8859-1"?>\n{page}\n', content_type="text/html")


def _system_wall() -> Callable[[], float]:
    from spotguard.clock import SystemClock

    return SystemClock().wall


async def _started(opened: AsyncExitStack, app: web.Application) -> web.AppRunner:
    # Handlers that stall end with their client; closing waits for none of them.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    opened.push_async_callback(runner.cleanup)
    return runner


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of `spotguard imds-sim`."""
    parser.description = (
        "Serve a simulated EC2 instance metadata service (IMDSv2) until interrupted. Prints its addresses as one "
        "line of JSON. Point clients at it with AWS_EC2_METADATA_SERVICE_ENDPOINT; give notices and faults through "
        "the control address (docs/imds-sim.md)."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve metadata on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=1338, help="its port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--control-host", default="127.0.0.1", help="address of the control interface; whoever "
                        "reaches it can set any notice (default: %(default)s)")  # fmt: skip
    parser.add_argument("--control-port", type=int, default=1339, help="its port, 0 for a free one (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--control-socket", type=Path, help="Unix socket for the control interface, instead of a port")
    parser.add_argument("--allow-v1", action="store_true", help="answer requests without a token too, as IMDSv1 does")
    parser.add_argument("--instance-id", help="instance id to report (default: i-0123456789abcdef0)")
    parser.add_argument("--instance-type", help="instance type to report (default: m6i.large)")
    parser.add_argument("--zone", help="availability zone to report (default: eu-central-1a)")
    parser.add_argument("--notice-in", type=float, metavar="SECONDS", help="begin with an interruption notice whose "
                        "time is so many seconds after the start; negative for one that is past")  # fmt: skip
    parser.add_argument("--action", choices=("terminate", "stop", "hibernate"), default="terminate", help="what "
                        "--notice-in announces (default: %(default)s)")  # fmt: skip


async def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; 0 then."""
    listen = Listen(args.host, args.port, args.control_host, args.control_port, args.control_socket)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with ImdsSimulator(listen=listen, require_token=not args.allow_v1) as imds:
        named = {
            "instance-id": args.instance_id,
            "instance-type": args.instance_type,
            "placement/availability-zone": args.zone,
        }
        imds.world.values.update({path: value for path, value in named.items() if value})
        if args.zone:
            imds.world.values["placement/region"] = args.zone.rstrip("abcdefghijklmnopqrstuvwxyz")
        if args.notice_in is not None:
            imds.interrupt(args.action, seconds=args.notice_in)
        sys.stdout.write(json.dumps({"metadata": imds.endpoint, "control": imds.control}) + "\n")
        sys.stdout.flush()
        await stop.wait()
    return 0


def main(args: argparse.Namespace) -> int:
    """Run `spotguard imds-sim`; 1 when an address cannot be had."""
    try:
        return asyncio.run(run(args))
    except OSError as error:
        sys.stderr.write(f"spotguard imds-sim: cannot listen: {error}\n")
        return 1

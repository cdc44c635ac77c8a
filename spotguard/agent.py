"""The agent of a node: builds everything, starts it, and ends it. Decisions are in core/, effects in *_effects.py."""

import argparse
import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from criu_transfer import checkpoint
from criu_transfer.errors import TransferError
from criu_transfer.store import require_no_swap
from criu_transfer.tracker.selftest import selftest
from handlers.control import ControlClient
from handlers.errors import HandlerError
from handlers.imds import ImdsFailure, ImdsPoller
from handlers.imds_client import endpoints_from
from handlers.network import routes, sandbox
from handlers.owner import HttpOwnerStore, OwnerRecord, follow
from handlers.runtime import Runc
from spotguard import __version__, admin_api, config, control_api, node_driver
from spotguard.clock import SystemClock
from spotguard.errors import Unsupported
from spotguard.events_log import EventLog
from spotguard.journal import Journal
from spotguard.migrations import Migrations
from spotguard.observability import Metrics, configure_logging, http_app
from spotguard.observe import observe
from spotguard.parts import Parts
from spotguard.pki import Identity, ssl_context
from spotguard.settings import AgentSettings, ImdsSettings, check_runtime_dir

_LOG = structlog.get_logger()
MEMORY_V1 = (Path("/run/cgroup1/memory"), Path("/sys/fs/cgroup/memory"))
PARALLEL_MOVES = 1
START_SECONDS = 60.0
STORE_LOOK_SECONDS = 5.0  # between two looks at the owner store


class _ImdsMetrics:
    """Tells the metadata poller's failures to the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def imds_read(self, resource: str, seconds: float) -> None:
        """Nothing to do: successes are silent."""

    def imds_failed(self, failure: ImdsFailure) -> None:
        """Count it."""
        self._metrics.imds_error(str(failure.reason))


def prepare_machine(settings: AgentSettings) -> tuple[checkpoint.Tools, str]:
    """Make this machine ready, and tell why writes cannot be tracked here (empty when they can).

    Raises Unsupported when CRIU cannot work at all.
    """
    settings.node.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_runtime_dir(settings.node.runtime_dir)
    try:
        require_no_swap(settings.node.runtime_dir)
    except TransferError as error:
        raise Unsupported(str(error), remedy="memory images are secrets: they must not reach a disk") from error
    deadline = time.monotonic() + START_SECONDS
    try:
        library = checkpoint.build_library(settings.node.runtime_dir)
        tools = checkpoint.prepare_tools(
            settings.node.runtime_dir / "bin", settings.runtime.runc_root, library, deadline
        )
    except TransferError as error:
        raise Unsupported(str(error), remedy="`spotguard doctor` tells what is missing") from error
    found = selftest()
    routes.entries()  # the first call of a process takes 0.2 s: not in a freeze
    return tools, "" if found.ok else f"tracking of writes does not work on this kernel: {found.reason}"


async def run(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT; what is under way goes on from the journal at the next start."""
    settings = config.load(AgentSettings, args, os.environ)
    clock = SystemClock()
    configure_logging(settings.log, clock)
    tools, tracker_reason = await asyncio.to_thread(prepare_machine, settings)
    if tracker_reason:
        _LOG.warning("stop-and-copy only", reason=tracker_reason)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tls = settings.tls
    identity = Identity(cert=tls.cert, key=tls.key, ca=tls.ca)
    log, metrics = EventLog(clock), Metrics(__version__)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            HttpOwnerStore(
                settings.owner_store.url, ssl_context(identity, server_side=False), settings.owner_store.name
            )
        )
        control = await stack.enter_async_context(
            ControlClient(ssl_context(identity, server_side=False), addresses(settings))
        )
        parts = Parts(
            settings=settings,
            clock=clock,
            log=log,
            runc=Runc(settings.runtime.runc_root),
            tools=tools,
            store=store,
            control=control,
            tracker_reason=tracker_reason,
            memory_v1=next((path for path in MEMORY_V1 if path.is_dir()), None),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                await _start(parts, metrics, identity, tasks, stack)
                _LOG.info("agent ready", node=settings.node.name, tracker=tracker_reason or "wp-async")
                log.add("ready", node=settings.node.name, tracker=tracker_reason or "wp-async")
                await stop.wait()
                _stop()
        except* _Stopped:
            _LOG.info("agent stopped")
    return 0


def _stop() -> None:
    raise _Stopped


class _Stopped(Exception):  # noqa: N818 - not an error
    """Ends the task group from within."""


def addresses(settings: AgentSettings) -> dict[str, tuple[str, int]]:
    """Give host and port of every peer's control API."""
    found = {}
    for name, address in settings.peers.items():
        parts = urlsplit(f"//{address}" if address.count(":") < 2 or "[" in address else f"//[{address}]")
        found[name] = (parts.hostname or address, parts.port or settings.control.port)
    return found


async def _start(
    parts: Parts, metrics: Metrics, identity: Identity, tasks: asyncio.TaskGroup, stack: AsyncExitStack
) -> None:
    settings = parts.settings
    journal = Journal(settings.node.state_dir / "journal")
    stack.callback(journal.close)
    migrations = Migrations(parts, journal, tasks)
    driver = node_driver.NodeDriver(parts, migrations, tasks, parallel=PARALLEL_MOVES)
    await stack.enter_async_context(
        control_api.serve(
            migrations, ssl_context(identity, server_side=True), settings.control.listen, settings.control.port
        )
    )
    migrations.resume(driver.ended)
    admin = _Admin(parts, driver, migrations)
    await stack.enter_async_context(admin_api.serve(admin, parts.log, settings.node.runtime_dir / "agent.sock"))
    health = Health()
    await stack.enter_async_context(_serve_http(metrics, settings, health))
    poller = ImdsPoller(
        now=parts.clock.wall,
        observer=_ImdsMetrics(metrics),
        endpoints=imds_endpoints(settings),
        interval=settings.imds.interval_s,
    )
    tasks.create_task(poller.run(driver.heard), name="imds")
    tasks.create_task(observe(parts.log, metrics), name="observe")
    tasks.create_task(follow_routes(parts, health), name="routes")
    tasks.create_task(watch_store(parts, health), name="owner store")


def imds_endpoints(settings: AgentSettings) -> tuple[str, ...]:
    """Give where the metadata service is looked for: as set, else as AWS's own tools find it."""
    if settings.imds.endpoint == ImdsSettings().endpoint:
        return endpoints_from(os.environ)
    return (settings.imds.endpoint,)


class _Admin:
    """What the admin socket opens onto."""

    def __init__(self, parts: Parts, driver: node_driver.NodeDriver, migrations: Migrations) -> None:
        self._parts = parts
        self._driver = driver
        self._migrations = migrations

    def status(self) -> dict[str, object]:
        """See admin_api.AdminPort."""
        return node_driver.status(self._parts, self._driver, self._migrations)

    def move(self, pod: str, target: str | None, time_left_s: float) -> str:
        """See admin_api.AdminPort."""
        return self._driver.move(pod, target, time_left_s)


class Health:
    """Whether this node can take part in a move; the watch on the owner store tells."""

    def __init__(self) -> None:
        self._trouble = "owner store: not heard yet"

    def not_ready(self) -> str:
        """Say why not, empty when it can."""
        return self._trouble

    def heard(self) -> None:
        """The owner store answers."""
        self._trouble = ""

    def lost(self, error: BaseException) -> None:
        """The owner store is out of reach: no move could be decided."""
        self._trouble = f"owner store: {error}"


class _serve_http:  # noqa: N801 - used as a function
    """Serves metrics and health while the context is open."""

    def __init__(self, metrics: Metrics, settings: AgentSettings, health: Health) -> None:
        self._runner = web.AppRunner(http_app(metrics, health.not_ready), shutdown_timeout=0.5)
        self._settings = settings.metrics

    async def __aenter__(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._settings.listen, self._settings.port).start()

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


async def watch_store(parts: Parts, health: Health) -> None:
    """Ask the owner store for a sign of life now and then: without it, no move could be decided."""
    while True:
        now = parts.clock.monotonic()
        try:
            await parts.store.warm(now + STORE_LOOK_SECONDS)
            health.heard()
        except HandlerError as error:
            health.lost(error)
        await parts.clock.sleep_until(now + STORE_LOOK_SECONDS)


async def follow_routes(parts: Parts, health: Health) -> None:
    """Point this node's route of every moved pod to its owner; on the owner's node the target's machine does it."""
    here = parts.settings.node.name

    async def apply(record: OwnerRecord) -> None:
        try:
            box = await asyncio.to_thread(sandbox.find, record.workload)
        except Exception as error:  # noqa: BLE001 - whatever half a network makes of the look, it must not end the agent
            parts.log.add("note", text=f"the network of {record.workload} is being made or removed: {error}")
            return
        if box is not None and box.address == record.address:
            return  # the pod is here: its route is the machines' business, and an old record no news
        if record.owner == "target" and record.target != here:
            peer = addresses(parts.settings).get(record.target)
            if peer is not None:
                try:
                    await asyncio.to_thread(routes.point, routes.Route(record.address, via=peer[0]))
                except HandlerError as error:
                    parts.log.add("note", text=f"route to {record.address}: {error}")

    await follow(parts.store, apply, health.lost)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    config.add_arguments(parser, AgentSettings)


def main(args: argparse.Namespace) -> int:
    """Run the command; see `run`."""
    return asyncio.run(run(args))

"""Logs and metrics: how both are set up, and which secrets never get into a log.

`python -m spotguard.observability` prints the list of metrics.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO, get_args

import prometheus_client as prometheus
import structlog
from aiohttp import web

from spotguard.clock import Clock
from spotguard.settings import LogSettings

Phase = Literal[
    "detect",
    "decide",
    "prepare",
    "precopy",
    "hold",
    "freeze",
    "dump",
    "finish",
    "restore",
    "handover",
    "release",
    "fill",
]
Outcome = Literal["moved", "rolled_back", "refused", "lost"]
Mode = Literal["live", "stop-and-copy"]

_SECRET_WORDS = frozenset({"key", "token", "password", "passwd", "secret", "credential", "authorization", "cookie"})
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*@")
_HIDDEN = "(hidden)"


def configure_logging(settings: LogSettings, clock: Clock, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging for this process: one format, one stream, no secrets.

    Called once, by the composition root. `stream`: standard error when None.
    """
    stream = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.level.upper()]

    def stamp(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        moment = datetime.fromtimestamp(clock.wall(), UTC)
        return {"time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"), **event}

    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        # As text, without local variables: those may hold a workload's secrets.
        structlog.processors.format_exc_info,
        redact,
        stamp,
    ]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if settings.format == "console":
        renderer = structlog.processors.LogfmtRenderer(key_order=["time", "level", "event"], bool_as_flag=False)
    structlog.configure(
        processors=[*common, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    plain: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=common, processors=plain))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)


def bind(migration: str, workload: str) -> AbstractContextManager[None]:
    """Put migration and workload into every log line of this task, and of the tasks it starts, inside a `with`."""
    return structlog.contextvars.bound_contextvars(migration=migration, workload=workload)


def redact(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Hide what may be secret: values whose key says so, private keys and passwords in texts, and all raw bytes."""
    return {key: _HIDDEN if _is_secret(key) else _clean(value) for key, value in event.items()}


def _is_secret(key: object) -> bool:
    return any(word.lower().removesuffix("s") in _SECRET_WORDS for word in _WORD.findall(str(key)))


def _clean(value: object) -> object:
    if isinstance(value, str):
        return _URL_PASSWORD.sub(f"{_HIDDEN}@", _PRIVATE_KEY.sub(_HIDDEN, value))
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(value)} bytes)"
    if isinstance(value, Mapping):
        return {str(key): _HIDDEN if _is_secret(key) else _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _clean(str(value))


@dataclass(frozen=True)
class _Declared:
    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


class Metrics:
    """Everything that this process counts, in a registry of its own."""

    def __init__(self, version: str = "") -> None:
        self.registry = prometheus.CollectorRegistry()
        self._declared: list[_Declared] = []
        tenths = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
        self._build = self._gauge("build_info", "Always 1; the label says which version runs.", "version")
        self._build.labels(version=version).set(1)
        self._notices = self._counter("notices_total", "Interruption notices received.", "kind")
        self._imds_errors = self._counter("imds_errors_total", "Failed looks at the metadata service.", "error")
        self._detection = self._histogram(
            "detection_delay_seconds",
            "From when the notice was put up to when it was seen.",
            (0.1, 0.25, 0.5, 1, 1.5, 2, 5, 10, 30),
        )
        self._migrations = self._counter("migrations_total", "Migrations that ended.", "outcome", "mode")
        self._running = self._gauge("migrations_in_progress", "Migrations that go on now.", "side")
        self._phase = self._histogram(
            "phase_duration_seconds",
            "Time in one phase of a migration, from the notice until the workload runs again.",
            (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            "phase",
        )
        self._freeze = self._histogram("freeze_seconds", "From freezing the workload to thawing it.", tenths)
        self._pause = self._histogram("pause_seconds", "From holding the network to releasing it.", tenths)
        self._margin = self._histogram(
            "margin_seconds",
            "Time left until the node's death when the workload ran again; below 0 is too late.",
            (-30, -10, -1, 0, 1, 5, 10, 20, 30, 60, 90, 110),
        )
        self._copied = self._counter("copied_bytes_total", "Bytes of memory and files that were sent.", "what")
        self._rounds = self._histogram("rounds", "Rounds of copying before the freeze.", (0, 1, 2, 3, 5, 8, 12, 20, 30))
        self._held = self._counter("frames_held_total", "Frames that were kept during a hold, to be played in.")
        self._dropped = self._counter("frames_dropped_total", "Frames that a hold could not keep.", "reason")
        self._faults = self._counter("pager_faults_total", "Pages that a restored process asked for before their turn.")
        self._round_trip = self._histogram(
            "owner_store_round_trip_seconds",
            "Time that one question to the owner store took.",
            (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            "operation",
            "outcome",
        )
        self._store = self._gauge("store_memory_bytes", "Memory taken by arriving and not yet restored pages.")
        for outcome in get_args(Outcome):
            for mode in get_args(Mode):
                self._migrations.labels(outcome=outcome, mode=mode)  # shown as 0, so that alerts see the first one

    def notice(self, kind: str) -> None:
        """Count a notice; `kind` as the metadata service names it (terminate, stop, hibernate, rebalance)."""
        self._notices.labels(kind=kind).inc()

    def imds_error(self, error: str) -> None:
        """Count a failed look; `error`: a class of errors, never a message."""
        self._imds_errors.labels(error=error).inc()

    def detected(self, delay_s: float) -> None:
        """Observe how late a notice was seen."""
        self._detection.observe(delay_s)

    def started(self, side: Literal["source", "target"]) -> None:
        """Count a migration as going on."""
        self._running.labels(side=side).inc()

    def stopped(self, side: Literal["source", "target"]) -> None:
        """Count a migration as no longer going on; pairs with `started`."""
        self._running.labels(side=side).dec()

    def migrated(self, outcome: Outcome, mode: Mode) -> None:
        """Count a migration that ended."""
        self._migrations.labels(outcome=outcome, mode=mode).inc()

    def phase(self, phase: Phase, seconds: float) -> None:
        """Observe how long a phase took."""
        self._phase.labels(phase=phase).observe(seconds)

    def froze(self, seconds: float) -> None:
        """Observe for how long the workload was frozen."""
        self._freeze.observe(seconds)

    def paused(self, seconds: float) -> None:
        """Observe for how long the network was held."""
        self._pause.observe(seconds)

    def margin(self, seconds: float) -> None:
        """Observe how much time was left at the end."""
        self._margin.observe(seconds)

    def copied(self, what: Literal["memory", "files", "images"], count: int) -> None:
        """Add bytes that were sent."""
        self._copied.labels(what=what).inc(count)

    def rounds(self, count: int) -> None:
        """Observe how many rounds of copying a migration took."""
        self._rounds.observe(count)

    def frames(self, held: int, dropped: Mapping[str, int]) -> None:
        """Add the frames of one hold; `dropped`: how many by reason."""
        self._held.inc(held)
        for reason, count in dropped.items():
            self._dropped.labels(reason=reason).inc(count)

    def pager_faults(self, count: int) -> None:
        """Add faults that the pager served."""
        self._faults.inc(count)

    def owner_store(self, operation: str, outcome: str, seconds: float) -> None:
        """Observe a question to the owner store; `outcome`: ok or the name of the error's class."""
        self._round_trip.labels(operation=operation, outcome=outcome).observe(seconds)

    def store_memory(self, count: int) -> None:
        """Set the bytes that the page stores hold now."""
        self._store.set(count)

    def reference(self) -> str:
        """Write docs/metrics.md."""
        head = (
            "# Metrics\n\nMade from `spotguard/observability.py`; do not edit"
            " (`python -m spotguard.observability > docs/metrics.md`).\n\n"
            "Served in Prometheus' text format at `/metrics`, beside `/healthz` and `/readyz`, on `metrics.port`.\n"
            f"Phases: {', '.join(get_args(Phase))}. Outcomes of migrations: {', '.join(get_args(Outcome))}.\n\n"
            "| metric | type | labels | meaning |\n|---|---|---|---|\n"
        )
        rows = (f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} | {m.meaning} |\n" for m in self._declared)
        return head + "".join(rows)

    def _note(self, name: str, kind: str, labels: tuple[str, ...], meaning: str) -> str:
        self._declared.append(_Declared(f"spotguard_{name}", kind, labels, meaning))
        return f"spotguard_{name}"

    def _counter(self, name: str, meaning: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(self._note(name, "counter", labels, meaning), meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> prometheus.Gauge:
        return prometheus.Gauge(self._note(name, "gauge", labels, meaning), meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Iterable[float], *labels: str) -> prometheus.Histogram:
        full = self._note(name, "histogram", labels, meaning)
        return prometheus.Histogram(full, meaning, labels, registry=self.registry, buckets=tuple(buckets))


def http_app(metrics: Metrics, not_ready: Callable[[], str]) -> web.Application:
    """Build the HTTP application with /metrics, /healthz and /readyz.

    /healthz answers 200 as long as the loop runs. /readyz answers 503 with the text of `not_ready()`, 200 when that is
    empty.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        body = prometheus.generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": prometheus.CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = not_ready()
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


def _main() -> None:
    sys.stdout.write(Metrics().reference())


if __name__ == "__main__":
    _main()

"""Metrics and log lines out of the event log."""

import asyncio
from typing import Any

import pytest
import structlog

from spotguard import events_log
from spotguard.clock import FakeClock
from spotguard.core import commands
from spotguard.core.state import Outcome
from spotguard.events_log import EventLog
from spotguard.observability import Metrics
from spotguard.observe import OUTCOMES, PHASES, observe

PREFIX = "spotguard_"


async def told(*entries: tuple[str, dict[str, Any]]) -> Metrics:
    """Let the observer see these entries."""
    log, metrics = EventLog(FakeClock()), Metrics("1")
    observing = asyncio.create_task(observe(log, metrics))
    for event, fields in entries:
        log.add(event, **fields)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not observing.done(), observing.exception()
    observing.cancel()
    await asyncio.gather(observing, return_exceptions=True)
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(PREFIX + name, labels) or 0.0


async def test_each_entry_is_a_line_of_the_log() -> None:
    with structlog.testing.capture_logs() as lines:
        await told(("note", {"text": "hello", "workload": "redis"}))
    assert lines == [{"event": "note", "log_level": "info", "text": "hello", "workload": "redis"}]


async def test_what_is_counted() -> None:
    metrics = await told(
        ("notice", {"kind": "spot", "action": "terminate", "left_s": 118.0}),
        ("done", {"command": "FreezeProcesses", "seconds": 0.02}),
        ("done", {"command": "CopyRound", "seconds": 2.0}),
        ("done", {"command": "CopyRound", "seconds": 0.5}),
        ("done", {"command": "AnswerOffer", "seconds": 9.0}),
        ("round", {"bytes": 4096, "number": 0}),
        ("round", {"bytes": 100, "number": 1}),
        ("captured", {"image_bytes": 7, "file_bytes": 8, "residual_bytes": 9, "debt_bytes": 0}),
        ("released", {"played": 3, "sent": 1, "dropped": 2}),
        ("something-new", {"command": 7}),
    )
    assert value(metrics, "notices_total", kind="terminate") == 1
    assert value(metrics, "phase_duration_seconds_sum", phase="freeze") == pytest.approx(0.02)
    assert value(metrics, "phase_duration_seconds_sum", phase="precopy") == pytest.approx(2.5)
    assert value(metrics, "phase_duration_seconds_count", phase="precopy") == 2
    assert value(metrics, "copied_bytes_total", what="memory") == 4196
    assert value(metrics, "copied_bytes_total", what="images") == 7
    assert value(metrics, "copied_bytes_total", what="files") == 8
    assert value(metrics, "frames_held_total") == 3
    assert value(metrics, "frames_dropped_total", reason="hold") == 2


async def test_an_observer_that_was_too_slow_goes_on_with_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_log, "QUEUE", 2)
    log, metrics = EventLog(FakeClock()), Metrics("1")
    observing = asyncio.create_task(observe(log, metrics))
    for _ in range(3):
        await asyncio.sleep(0)
    for _ in range(5):  # nobody reads meanwhile: three too many
        log.add("round", bytes=1, number=0)
    for _ in range(10):
        await asyncio.sleep(0)
    log.add("round", bytes=100, number=1)
    for _ in range(10):
        await asyncio.sleep(0)
    observing.cancel()
    await asyncio.gather(observing, return_exceptions=True)
    assert value(metrics, "copied_bytes_total", what="memory") == 102, "two before it was cut off, and the one after"


@pytest.mark.parametrize(
    ("outcome", "labels"),
    [
        ("moved", {"outcome": "moved", "mode": "live"}),
        ("moved-by-stop-and-copy", {"outcome": "moved", "mode": "stop-and-copy"}),
        ("rolled-back", {"outcome": "rolled_back", "mode": "live"}),
        ("lost", {"outcome": "lost", "mode": "live"}),
    ],
)
async def test_a_migration_is_counted_once_on_the_source(outcome: str, labels: dict[str, str]) -> None:
    metrics = await told(
        ("finished", {"side": "source", "outcome": outcome}), ("finished", {"side": "target", "outcome": "resumed"})
    )
    assert value(metrics, "migrations_total", **labels) == 1
    assert sum(s.value for m in metrics.registry.collect() for s in m.samples if "migrations_total" in s.name) == 1


def test_the_tables_name_what_there_is() -> None:
    assert all(issubclass(getattr(commands, name), commands.Timed) for name in PHASES)
    assert OUTCOMES.keys() <= {str(outcome) for outcome in Outcome}
    assert {str(o) for o in Outcome} - OUTCOMES.keys() == {"resumed", "refused", "destroyed"}  # the target's own

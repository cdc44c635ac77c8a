"""Logs hide secrets; metrics say what docs/metrics.md promises."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from aiohttp import ClientSession, web
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from spotguard.clock import FakeClock
from spotguard.observability import Metrics, bind, configure_logging, http_app
from spotguard.settings import LogSettings

PEM = "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0\n-----END EC PRIVATE KEY-----"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def logged(settings: LogSettings) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(settings, FakeClock(wall=1_800_000_000.25), stream)
    return stream


def test_a_line_is_json_with_time_level_and_what_is_bound() -> None:
    stream = logged(LogSettings())
    with bind("m1", "redis"):
        structlog.get_logger().info("frozen", pages=7)
    structlog.get_logger().debug("not written")
    assert json.loads(stream.getvalue()) == {
        "time": "2027-01-15T08:00:00.250Z",
        "event": "frozen",
        "level": "info",
        "migration": "m1",
        "workload": "redis",
        "pages": 7,
    }


def test_secrets_are_hidden_wherever_they_are() -> None:
    stream = logged(LogSettings())
    log = structlog.get_logger()
    log.warning(
        "start",
        key="s3cret",
        api_token="s3cret",
        dbPassword="s3cret",
        nested={"Authorization": "s3cret", "list": [{"secret": "s3cret", "monkey": "shown"}]},
        text=f"see {PEM} there",
        url="https://me:s3cret@example.org/x",
        page=b"s3cret",
        path=Path("/shown/too"),
    )
    try:
        int(PEM)
    except ValueError:
        log.exception("failed")
    logging.getLogger("library").warning("used %s", PEM)
    text = stream.getvalue()
    assert "s3cret" not in text
    assert "c2VjcmV0" not in text
    assert "shown" in text
    assert "/shown/too" in text
    assert "(6 bytes)" in text
    assert "ValueError: invalid literal" in text
    assert len([json.loads(line) for line in text.splitlines()]) == 3


def test_console_lines_and_the_standard_library_share_the_format() -> None:
    stream = logged(LogSettings(format="console", level="error"))
    logging.getLogger("aiohttp").warning("dropped")
    logging.getLogger("aiohttp").error("broken pipe")
    structlog.get_logger().error("lost", node="a")
    first, second = stream.getvalue().splitlines()
    assert first == 'time=2027-01-15T08:00:00.250Z level=error event="broken pipe"'
    assert second == "time=2027-01-15T08:00:00.250Z level=error event=lost node=a"


def exercise(metrics: Metrics) -> None:
    metrics.notice("terminate")
    metrics.imds_error("timeout")
    metrics.detected(0.4)
    metrics.started("source")
    metrics.started("target")
    metrics.stopped("target")
    metrics.migrated("moved", "live")
    metrics.phase("freeze", 0.1)
    metrics.froze(0.14)
    metrics.paused(0.2)
    metrics.margin(-3)
    metrics.copied("memory", 4096)
    metrics.rounds(3)
    metrics.frames(5, {"limit": 2})
    metrics.pager_faults(9)
    metrics.owner_store("swap", "ok", 0.002)
    metrics.store_memory(1 << 20)


def test_every_metric_is_counted_and_in_the_manual() -> None:
    metrics = Metrics("1.2.3")
    exercise(metrics)
    manual = metrics.reference()
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        if family.name.endswith("_created"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        row = next(line for line in manual.splitlines() if line.startswith(f"| `{name}` | {family.type} |"))
        labels = sorted(set(family.samples[0].labels) - {"le"})
        assert sorted(filter(None, row.split(" | ")[2].strip().split(", "))) == labels
        assert any(sample.value for sample in family.samples), name
    assert metrics.registry.get_sample_value("spotguard_margin_seconds_bucket", {"le": "-1.0"}) == 1
    assert metrics.registry.get_sample_value("spotguard_frames_dropped_total", {"reason": "limit"}) == 2
    assert metrics.registry.get_sample_value("spotguard_migrations_total", {"outcome": "lost", "mode": "live"}) == 0


def test_the_manual_is_up_to_date() -> None:
    manual = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert manual.read_text() == Metrics().reference(), "run: python -m spotguard.observability > docs/metrics.md"


async def test_health_says_why_it_is_not_ready() -> None:
    reasons = ["the kernel cannot track writes"]
    runner = web.AppRunner(http_app(Metrics(), lambda: reasons[0] if reasons else ""), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with ClientSession(f"http://{host}:{port}") as session:
            async with session.get("/readyz") as answer:
                assert (answer.status, await answer.text()) == (503, "the kernel cannot track writes\n")
            reasons.clear()
            for path, content in (("/readyz", "ok"), ("/healthz", "ok"), ("/metrics", "spotguard_migrations_total{")):
                async with session.get(path) as answer:
                    assert answer.status == 200
                    assert content in await answer.text()
    finally:
        await runner.cleanup()

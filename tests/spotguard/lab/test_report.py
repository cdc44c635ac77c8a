"""The report: what counts as kept, the files, and that nothing in it can break out of the page."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.lab import report_html, timeline
from spotguard.lab.report import (
    PHASES,
    Client,
    Fill,
    Freeze,
    Machine,
    Notice,
    Report,
    Round,
    StopAndCopy,
    WorkloadReport,
    headline,
    read_json,
    terminal_summary,
    write_json,
)
from spotguard.lab.report_text import milliseconds, number, plural, size

MIB = 1 << 20


def workload(name: str = "redis", **changes: Any) -> WorkloadReport:
    made = WorkloadReport(
        name=name, outcome="moved", pause_ms=118.4, client_gap_ms=131.2, acknowledged=18423, connections=8,
        retransmits=3, latency_p50_ms=0.32, latency_p99_ms=1.4, checked_values=268435,
        bytes_moved=1190 * MIB, memory_bytes=1100 * MIB,
        rounds=(
            Round(0, 1074 * MIB, 96 * MIB, 2.31, 0.42), Round(1, 96 * MIB, 14 * MIB, 0.22, 2.75),
            Round(2, 14 * MIB, 3 * MIB, 0.05, 2.98),
        ),
        freeze=Freeze(
            hold_ms=4.1, drain_ms=5.0, freeze_ms=1.2, scan_ms=9.8, dump_ms=58.7, residual_ms=14.2, images_ms=3.1,
            rewrite_ms=5.9, restore_ms=33.0, owner_ms=1.4, thaw_ms=0.3, release_ms=2.2,
            starts_ms={"residual": 20.1, "images": 78.8},
        ),
        frozen_at_s=3.05, resumed_at_s=3.17, filled_at_s=3.81, frames_held=214, fill=Fill(1074 * MIB, 0.64, 391),
        margin_s=116.2, watch_blind_ms=1.9, tracker="wp-async",
        stop_and_copy=StopAndCopy(
            client_gap_ms=2874.0, pause_ms=2790.0, bytes_moved=1074 * MIB, acknowledged=9120, connections=8
        ),
    )  # fmt: skip
    return replace(made, **changes)


def report(*workloads: WorkloadReport) -> Report:
    return Report(
        version="0.1.0",
        started="2026-11-23T18:21:11Z",
        machine=Machine("6.18.5", 2, 24 << 30, "4.2.1", "1.3.6", "wp-async", "self-test passed, 9 of 9"),
        notice=Notice("spot/instance-action", "terminate", 120.0, 412.0),
        workloads=workloads or (workload(),),
    )


BREAKS: list[tuple[dict[str, Any], str]] = [
    ({"lost": 1}, "1 acknowledged write lost"),
    ({"doubled": 2}, "2 writes applied twice"),
    ({"wrong": 1}, "1 value wrong"),
    ({"connections_lost": 1}, "1 of 8 connections lost"),
    ({"complete": False}, "could not check everything"),
    ({"double_run_ms": 0.4}, "two copies ran for 0.4 ms"),
    ({"stop_and_copy": StopAndCopy(lost=3)}, "in stop-and-copy: 3 acknowledged writes lost"),
]


def test_all_kept_is_exit_0() -> None:
    assert (report().exit_code, report().verdict, report().problems()) == (0, "kept", [])
    assert headline(report()).startswith("1 workload moved")


@pytest.mark.parametrize(("change", "words"), BREAKS, ids=[words for _, words in BREAKS])
def test_every_broken_promise_is_exit_1_and_named(change: dict[str, Any], words: str) -> None:
    made = report(workload("java"), workload(**change))
    assert (made.exit_code, made.verdict) == (1, "broken")
    assert any(problem.startswith("redis: ") and words in problem for problem in made.problems())
    assert words in terminal_summary(made)
    assert words in report_html.render(made)


def test_another_outcome_is_exit_2_and_the_expected_one_is_0() -> None:
    back = workload(outcome="rolled-back", reason="the target was gone")
    assert report(back).exit_code == 2
    assert "rolled-back instead of moved (the target was gone)" in terminal_summary(report(back))
    assert report(replace(back, expected="rolled-back")).exit_code == 0
    assert report(replace(back, expected="rolled-back", lost=1)).exit_code == 1


def test_nothing_run_is_no_success() -> None:
    assert replace(report(), workloads=()).exit_code == 2
    assert "Nothing ran" in terminal_summary(replace(report(), workloads=()))
    report_html.render(replace(report(), workloads=()))


def test_json_round_trip_and_its_computed_fields(tmp_path: Path) -> None:
    made = report(
        workload(), workload("java", stop_and_copy=None, freeze=None, fill=None, rounds=(), client_faults=("x",))
    )
    path = tmp_path / "report.json"
    write_json(made, path)
    assert read_json(path) == made
    raw = json.loads(path.read_text())
    assert (raw["verdict"], raw["exit_code"], raw["problems"]) == ("kept", 0, [])
    assert raw["workloads"][0]["freeze"]["dump_ms"] == 58.7
    raw["schema"] = 99
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="schema 99"):
        read_json(path)


def test_the_client_s_event_becomes_the_report_s_fields() -> None:
    event = {
        "acknowledged": 9, "lost": 1, "doubled": 2, "wrong": 3, "unknown": 4, "complete": True, "connections": 5,
        "connections_lost": 0, "checked_values": 7, "longest_gap_ms": 12.5, "latency_ms": {"p50": 0.5, "p99": 2.0},
        "tcp": [{"total_retransmits": 2}, {"total_retransmits": 3}], "faults": ["odd"],
    }  # fmt: skip
    client = Client(**Client.of(event))
    assert (client.acknowledged, client.client_gap_ms, client.retransmits, client.client_faults) == (
        9,
        12.5,
        5,
        ("odd",),
    )
    assert len(client.broken()) == 3


def test_the_terminal_s_table_is_aligned_and_no_wider_than_a_terminal() -> None:
    lines = terminal_summary(report(workload(), workload("postgres"))).splitlines()
    assert lines[0].startswith("workload")
    assert len({line.index("131 ms") for line in lines if "131 ms" in line}) == 1
    assert max(map(len, lines[:4])) <= 110
    assert lines[-1].startswith("✓")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = report_html.render(report(workload(), workload("java")))
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|<script""", page)
    assert page.count("<svg") > 5
    assert "$" not in page


@given(st.text(alphabet=st.sampled_from("<>&\"'a"), min_size=1))
def test_no_text_can_break_out_of_the_page(text: str) -> None:
    hostile = f"<script>{text}"
    made = report(
        workload(
            hostile, outcome=hostile, expected=hostile, reason=hostile, faults=(hostile,), client_faults=(hostile,)
        )
    )
    made = replace(
        made, version=hostile, notes=(hostile,), machine=replace(made.machine, kernel=hostile, tracker_reason=hostile)
    )
    page = report_html.render(made)
    assert "<script" not in page
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(picture)


def test_steps_follow_each_other_unless_their_starts_are_known() -> None:
    assert Freeze(hold_ms=2, freeze_ms=3, dump_ms=5).steps() == [("hold", 0, 2), ("freeze", 2, 3), ("dump", 5, 5)]
    overlapping = Freeze(
        scan_ms=2, dump_ms=5, residual_ms=4, restore_ms=1, starts_ms={"residual": 2, "restore": 7}
    ).steps()
    assert overlapping == [("scan", 0, 2), ("dump", 2, 5), ("residual", 2, 4), ("restore", 7, 1)]
    assert set(PHASES) == set(timeline.STEP_TEXT)


@pytest.mark.parametrize("end", [0.004, 0.3, 1, 7, 118.4, 3000, 120000])
def test_a_scale_has_a_handful_of_round_ticks(end: float) -> None:
    ticks = timeline.Scale(end).ticks()
    assert 2 <= len(ticks) <= 8
    assert ticks[0] == 0
    assert ticks[-1] <= end * 1.001


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (64 * MIB, "64.0 MiB"), (1 << 30, "1.00 GiB")]
)
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


def test_numbers() -> None:
    assert [milliseconds(x) for x in (None, 0, 0.41, 142.4, 1420)] == ["-", "0 ms", "0.4 ms", "142 ms", "1.42 s"]
    assert [milliseconds(x) for x in (12_300, 116_200)] == ["12.3 s", "116 s"]
    assert number(18423) == "18,423"
    assert (plural(1, "write"), plural(2, "write")) == ("1 write", "2 writes")

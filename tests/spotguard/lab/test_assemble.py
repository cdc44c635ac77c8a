"""The report that is made out of what a run has seen."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from spotguard.lab import assemble
from spotguard.lab.pod import PodOptions
from spotguard.lab.report import Client, Fill, Round, WorkloadReport
from spotguard.lab.run import PodResult, RunOptions, RunResult
from spotguard.lab.watcher import Interval, Watched

MIB = 1 << 20
POD = PodOptions("redis", 256, 5.0, 4)
CLIENT = {
    "acknowledged": 1000, "lost": 0, "doubled": 0, "wrong": 0, "unknown": 1, "complete": True, "connections": 4,
    "connections_lost": 0, "checked_values": 77, "longest_gap_ms": 140.0,
    "tcp": [{"total_retransmits": 2}, {"total_retransmits": 1}], "latency_ms": {"p50": 0.3, "p99": 1.5}, "faults": [],
}  # fmt: skip
# (step, side, start, seconds) of one move, in the order in which the logs were written.
STEPS = (
    ("owner", "target", 101.0, 0.5),  # admission: long before the freeze
    ("hold", "source", 110.000, 0.004),
    ("drain", "source", 110.004, 0.004),
    ("freeze", "source", 110.010, 0.002),
    ("scan", "source", 110.012, 0.010),
    ("dump", "source", 110.022, 0.050),
    ("residual", "source", 110.022, 0.020),
    ("files", "source", 110.072, 0.003),
    ("images", "source", 110.075, 0.005),
    ("rewrite", "target", 110.080, 0.006),
    ("restore", "target", 110.086, 0.030),
    ("owner", "target", 110.116, 0.002),
    ("route", "target", 110.118, 0.001),
    ("release", "target", 110.119, 0.002),
    ("thaw", "target", 110.121, 0.001),
)


def moved(migration: str = "m-1", later: float = 0.0) -> Iterator[dict[str, Any]]:
    """Give the entries of a move of redis."""
    about = {"workload": "redis", "migration": migration}
    yield {"event": "round", "t": 103 + later, "number": 0, "bytes": 200 * MIB, "written": 9, "seconds": 1.5, **about}
    yield {"event": "round", "t": 104 + later, "number": 1, "bytes": 20 * MIB, "written": 2, "seconds": 0.5, **about}
    for step, side, start, seconds in STEPS:
        yield {
            "event": "freeze-step", "t": start + later + seconds, "step": step, "side": side, "start": start + later,
            "seconds": seconds, **about,
        }  # fmt: skip
    captured = {"residual_bytes": 1000, "debt_bytes": 200, "image_bytes": 30, "file_bytes": 4}
    yield {"event": "captured", "t": 110.08 + later, "side": "source", **captured, **about}
    yield {"event": "released", "t": 110.12 + later, "side": "target", "played": 12, "sent": 0, "dropped": 1, **about}
    yield {"event": "filled", "t": 111 + later, "bytes": 190 * MIB, "seconds": 0.7, "faults": 40, **about}
    yield {"event": "finished", "t": 112 + later, "side": "source", "outcome": "moved", "reason": "", **about}
    yield {"event": "finished", "t": 113 + later, "side": "target", "outcome": "resumed", "reason": "x", **about}


def rolled_back() -> Iterator[dict[str, Any]]:
    """Give the entries of a first try that went back: it froze, and ran on."""
    for entry in moved("m-0"):
        if entry["event"] in {"round", "captured"} or entry.get("step") in {"hold", "drain", "freeze", "scan", "dump"}:
            yield entry
    yield {
        "event": "finished", "t": 111.0, "side": "source", "outcome": "rolled-back", "reason": "no answer",
        "workload": "redis", "migration": "m-0",
    }  # fmt: skip


def run(*entries: dict[str, Any], **changes: Any) -> RunResult:
    result = RunResult(RunOptions(pods=(POD,)), notice_at=100.0, deadline=220.0)
    result.entries = [
        {"event": "ready", "t": 1.0, "node": "node-a", "tracker": "wp-async"},
        {"event": "notice", "t": 100.25, "node": "node-a", "kind": "spot", "action": "terminate"},
        {"event": "freeze-step", "t": 105.0, "step": "freeze", "start": 105.0, "seconds": 9.0, "workload": "other"},
        *entries,
    ]
    watched = Watched({}, (), blind_ms=2.5, looks=1000)
    result.pods = {"redis": PodResult(POD, dict(CLIENT), watched)}
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def test_a_move_is_told_in_full() -> None:
    report = assemble.workload(run(*moved()), "redis", None)
    assert (report.outcome, report.mode, report.reason, report.tracker) == ("moved", "live", "", "wp-async")
    assert report.pause_ms == pytest.approx(112.0)  # from the freeze's begin to the thaw's end
    assert (report.frozen_at_s, report.resumed_at_s) == (pytest.approx(10.010), pytest.approx(10.122))
    assert report.margin_s == pytest.approx(220 - 110.122)
    assert report.filled_at_s == pytest.approx(11.0)
    assert report.fill == Fill(190 * MIB, 0.7, 40)
    assert report.bytes_moved == 220 * MIB + 1234
    assert report.memory_bytes == 256 * MIB
    assert report.frames_held == 12
    assert report.rounds == (
        Round(0, 200 * MIB, 9, 1.5, pytest.approx(1.5)),
        Round(1, 20 * MIB, 2, 0.5, pytest.approx(3.5)),
    )
    assert (report.client_gap_ms, report.retransmits, report.acknowledged) == (140.0, 3, 1000)
    assert (report.double_run_ms, report.watch_blind_ms) == (0.0, 2.5)
    assert report.broken() == []


def test_the_steps_of_the_freeze_begin_with_the_hold() -> None:
    freeze = assemble.workload(run(*moved()), "redis", None).freeze
    assert freeze is not None
    lengths = {name: round(length, 3) for name, _, length in freeze.steps()}
    assert lengths == {
        "hold": 4, "drain": 4, "freeze": 2, "scan": 10, "dump": 50, "residual": 20, "images": 8, "rewrite": 6,
        "restore": 30, "owner": 2, "release": 3, "thaw": 1,
    }  # fmt: skip
    assert freeze.starts_ms["hold"] == 0
    assert freeze.starts_ms["dump"] == freeze.starts_ms["residual"] == pytest.approx(22)
    assert freeze.starts_ms["release"] == pytest.approx(118)


def test_of_a_move_that_was_tried_twice_the_last_try_is_told_and_every_byte_counts() -> None:
    once = assemble.workload(run(*moved()), "redis", None)
    twice = assemble.workload(run(*rolled_back(), *moved(later=20.0)), "redis", None)
    assert twice.pause_ms == pytest.approx(once.pause_ms)
    assert twice.freeze is not None
    assert once.freeze is not None
    assert twice.freeze.dump_ms == pytest.approx(once.freeze.dump_ms)
    assert twice.frozen_at_s == pytest.approx(30.010)
    assert [one.n for one in twice.rounds] == [0, 1]
    assert twice.bytes_moved == 2 * once.bytes_moved


def test_a_move_that_went_back_says_why() -> None:
    report = assemble.workload(run(*rolled_back()), "redis", None)
    assert (report.outcome, report.reason, report.tracker) == ("rolled-back", "no answer", "none")
    assert (report.pause_ms, report.resumed_at_s, report.margin_s, report.fill) == (None, None, None, None)


def test_a_move_that_never_ended_is_unfinished_and_no_client_is_no_success() -> None:
    result = run()
    result.pods["redis"] = PodResult(POD)
    report = assemble.workload(result, "redis", None)
    assert (report.outcome, report.freeze, report.rounds, report.bytes_moved) == ("unfinished", None, (), 0)
    assert report.broken() == ["the client could not check everything"]


def test_stop_and_copy_by_itself_and_for_comparison() -> None:
    entries = [{**e, "outcome": "moved-by-stop-and-copy"} if e.get("outcome") == "moved" else e for e in moved()]
    result = run(*entries)
    result.pods["redis"].client = {**CLIENT, "longest_gap_ms": 900.0, "lost": 2}
    report = assemble.workload(run(*moved()), "redis", result)
    assert report.stop_and_copy is not None
    assert report.stop_and_copy.pause_ms == pytest.approx(112.0)
    assert report.stop_and_copy.client_gap_ms == 900.0
    assert report.broken() == ["in stop-and-copy: 2 acknowledged writes lost"]
    alone = assemble.workload(result, "redis", None)
    assert (alone.outcome, alone.mode) == ("moved", "stop-and-copy")


def test_what_the_watcher_and_the_client_saw_is_not_lost() -> None:
    result = run(*moved())
    result.options = replace(result.options, faults=("double-run",))
    result.pods["redis"].watched = Watched({}, (Interval(1.0, 1.25),), blind_ms=1.0, looks=9)
    result.pods["redis"].client = {**CLIENT, "lost": 3, "connections_lost": 1, "faults": ["reset"]}
    report = assemble.workload(result, "redis", None)
    assert report.double_run_ms == pytest.approx(250.0)
    assert (report.lost, report.connections_lost, report.client_faults) == (3, 1, ("reset",))
    assert report.faults == ("double-run",)
    assert len(report.broken()) == 3


def test_the_notice_and_how_soon_it_was_heard() -> None:
    told = assemble.notice(run())
    assert (told.kind, told.action, told.time_left_s) == ("spot", "terminate", 120.0)
    assert told.detected_ms == pytest.approx(250.0)
    assert assemble.notice(RunResult(RunOptions(pods=()))).detected_ms == -1.0


def test_the_machine_and_its_tracker() -> None:
    assert assemble.tracker_of(run()) == "wp-async"
    assert assemble.tracker_of(RunResult(RunOptions(pods=()))) == "no agent was ready"
    found = assemble.machine("wp-async")
    assert (found.tracker, found.tracker_reason) == ("wp-async", "")
    assert found.criu[0].isdigit()
    assert found.runc[0].isdigit()
    assert found.memory_bytes > 1 << 28
    without = assemble.machine("this kernel is too old")
    assert (without.tracker, without.tracker_reason) == ("none", "this kernel is too old")


def test_every_word_of_the_client_s_has_a_place_in_the_report() -> None:
    assert Client.of(CLIENT).keys() <= set(WorkloadReport.__dataclass_fields__)

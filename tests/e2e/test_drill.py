"""Whole drills: two nodes, real agents, runc and CRIU, real workloads, an interruption."""

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spotguard.lab import assemble
from spotguard.lab.pod import PodOptions
from spotguard.lab.run import SOURCE, TARGET, Run, RunOptions, RunResult

pytestmark = pytest.mark.drill

REDIS = PodOptions("redis", size_mib=24, rate_mb=5.0, connections=3)
POSTGRES = PodOptions("postgres", size_mib=4, rate_mb=0.5, connections=2)
JAVA = PodOptions("java", size_mib=24, rate_mb=2.0, connections=2)
MOVED = ("moved", "moved-by-stop-and-copy")


async def run(tmp_path: Path, *pods: PodOptions, **options: object) -> RunResult:
    chosen = RunOptions(pods or (REDIS,), time_left_s=60.0, warm_seconds=0.5, **options)  # type: ignore[arg-type]
    return await Run(chosen, tmp_path / "run", lambda *_: None).execute()


def outcomes(result: RunResult, side: str) -> list[str]:
    return [entry["outcome"] for entry in result.entries if entry["event"] == "finished" and entry["side"] == side]


def check_kept(result: RunResult) -> None:
    """Every acknowledged write there once, every connection kept, never two copies, nothing left over."""
    for name, pod in result.pods.items():
        report = assemble.workload(result, name, None)
        assert report.broken() == []
        assert pod.client["acknowledged"] > 0
        assert pod.client["checked_values"] > 0
    assert result.leftovers == []


async def test_three_workloads_move_with_memory_connections_and_address(tmp_path: Path) -> None:
    result = await run(tmp_path, REDIS, POSTGRES, JAVA)
    check_kept(result)
    assert outcomes(result, "source") == ["moved"] * 3
    for name in result.pods:
        report = assemble.workload(result, name, None)
        assert report.mode == "live"
        assert report.rounds
        assert report.fill is not None
        assert report.fill.bytes > 0
        assert report.margin_s is not None
        assert report.margin_s > 0
        assert report.freeze is not None
        assert {step for step, _, _ in report.freeze.steps()} >= {"hold", "freeze", "dump", "restore", "owner", "thaw"}
    assert assemble.notice(result).detected_ms >= 0
    assert result.source_gone_at > 0, "the source node was taken away, and everything went on without it"


async def test_stop_and_copy_keeps_the_same_promises(tmp_path: Path) -> None:
    result = await run(tmp_path, mode="stop-and-copy")
    check_kept(result)
    assert outcomes(result, "source") == ["moved-by-stop-and-copy"]


async def test_hibernation_moves_at_once(tmp_path: Path) -> None:
    result = await run(tmp_path, action="hibernate")
    check_kept(result)
    assert outcomes(result, "source") == ["moved-by-stop-and-copy"]


async def test_dropped_pages_are_seen_by_the_ledger(tmp_path: Path) -> None:
    result = await run(tmp_path, faults=("drop-page",))
    assert assemble.workload(result, "redis", None).broken()


async def test_a_double_run_is_seen_by_the_watcher(tmp_path: Path) -> None:
    result = await run(tmp_path, faults=("double-run",))
    broken = assemble.workload(result, "redis", None).broken()
    assert len(broken) == 1
    assert "two copies ran" in broken[0]


@pytest.mark.parametrize("phase", ["precopy", "dumping", "restoring", "destroying"])
async def test_the_source_agent_may_die(tmp_path: Path, phase: str) -> None:
    result = await run(tmp_path, kills=((SOURCE, phase),))
    check_kept(result)
    assert outcomes(result, "source")[-1] in MOVED


@pytest.mark.parametrize("phase", ["receiving", "restoring", "taking", "thawing", "filling"])
async def test_the_target_agent_may_die(tmp_path: Path, phase: str) -> None:
    result = await run(tmp_path, kills=((TARGET, phase),))
    check_kept(result)
    assert outcomes(result, "source")[-1] in MOVED
    assert outcomes(result, "target")[-1] == "resumed"


def receivers() -> dict[int, int]:
    """Give the pids of receivers, keepers and pagers, each with its parent's."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if b"criu_transfer.receiver" in (directory / "cmdline").read_bytes():
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                found[int(directory.name)] = int(fields[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("victim", ["keeper", "pager"])
async def test_the_keeper_or_the_pager_may_die_while_memory_is_filled(tmp_path: Path, victim: str) -> None:
    killed: list[int] = []

    def kill(what: str, fields: Mapping[str, Any]) -> None:
        thawed = what == "agent" and fields.get("event") == "freeze-step" and fields.get("step") == "thaw"
        if not thawed or killed:
            return
        alive = receivers()
        killed.extend(pid for pid, parent in alive.items() if (parent in alive) == (victim == "pager"))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    options = RunOptions((replace(REDIS, size_mib=256),), time_left_s=60.0, warm_seconds=0.5)
    result = await Run(options, tmp_path / "run", kill).execute()
    assert killed, "it was still there: the fill had not ended"
    check_kept(result)
    assert outcomes(result, "target") == ["resumed"]

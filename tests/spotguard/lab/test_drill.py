"""The drill's command line, and which exit code many runs have."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from spotguard import cli
from spotguard.errors import ExitCode, LabError, Unsupported
from spotguard.lab import drill
from spotguard.lab.pod import PodOptions
from spotguard.lab.report import Machine, Notice, Report, WorkloadReport
from spotguard.lab.run import RunOptions, RunResult


def parse(*arguments: str) -> argparse.Namespace:
    return cli.build_parser("drill").parse_args(["drill", *arguments])


@pytest.mark.parametrize(
    ("text", "mib"), [("256", 256), ("256MiB", 256), ("256 MiB", 256), ("1GiB", 1024), ("2 GiB", 2048)]
)
def test_sizes(text: str, mib: int) -> None:
    assert parse("--memory", text).memory == mib


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--memory", "0", "is no size"),
        ("--memory", "-5", "is no size"),
        ("--memory", "1TB", "is no size"),
        ("--memory", "1.5GiB", "is no size"),
        ("--memory", "256MiBx", "is no size"),
        ("--link", "fast", "is no link speed"),
        ("--link", "1gbit; reboot", "is no link speed"),
        ("--link", "1gbit\n", "is no link speed"),
        ("--write-rate", "0", "is not between"),
        ("--write-rate", "nan", "is not between"),
        ("--write-rate", "inf", "is not between"),
        ("--write-rate", "much", "is no number"),
        ("--time-left", "0", "is not between"),
        ("--workload", "mysql", "invalid choice"),
        ("--action", "reboot", "invalid choice"),
        ("--mode", "fast", "invalid choice"),
        ("--fault", "fire", "invalid choice"),
        ("--runs", "x", "invalid int"),
        ("--connections", "x", "invalid int"),
    ],
)
def test_mistakes_are_named(flag: str, value: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flag, value)
    assert ended.value.code == ExitCode.USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--runs", "--connections"])
def test_counts_begin_with_one(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drill", flag, "0"]) == ExitCode.FAILED
    assert "must be at least 1" in capsys.readouterr().err


def test_the_default_is_three_workloads_postgres_with_a_quarter() -> None:
    assert drill.pods(parse()) == (
        PodOptions("redis", 256, 5.0, 4), PodOptions("postgres", 64, 5.0, 4), PodOptions("java", 256, 5.0, 4)
    )  # fmt: skip


def test_workloads_are_taken_as_asked_each_once() -> None:
    args = parse("--workload", "java", "--workload", "postgres", "--workload", "java", "--memory", "2")
    assert drill.pods(args) == (PodOptions("java", 2, 5.0, 4), PodOptions("postgres", 1, 5.0, 4))


def report(*, lost: int = 0, outcome: str = "moved") -> Report:
    return Report(
        version="1",
        started="2026-01-01T00:00:00+00:00",
        machine=Machine("6.18", 2, 1 << 30, "4.2", "1.3", "wp-async"),
        notice=Notice("spot", "terminate", 120.0, 200.0),
        workloads=(WorkloadReport(name="redis", outcome=outcome, lost=lost),),
    )


@pytest.mark.parametrize(
    ("reports", "code"),
    [
        ([report()], 0),
        ([report(), report(outcome="rolled-back")], 2),
        ([report(lost=1), report(outcome="rolled-back"), report()], 1),  # broken is worse than unexpected
        ([report(outcome="rolled-back"), report(lost=1)], 1),
    ],
)
async def test_the_worst_run_gives_the_exit_code_and_every_run_has_its_reports(
    reports: list[Report], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(reports)

    async def one(*_: Any, **__: Any) -> Report:
        return left.pop(0)

    monkeypatch.setattr(drill, "_one", one)
    args = parse("--runs", str(len(reports)), "--output", str(tmp_path / "out"))
    assert await drill.drill(args) == code
    names = ["report"] if len(reports) == 1 else [f"report-{n + 1}" for n in range(len(reports))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("html", "json")
    )
    assert json.loads((tmp_path / f"out/{names[0]}.json").read_text())["exit_code"] == reports[0].exit_code


@pytest.mark.parametrize(
    ("arguments", "modes"),
    [
        ((), ["auto", "stop-and-copy"]),
        (("--no-comparison",), ["auto"]),
        (("--fault", "drop-page"), ["auto"]),
        (("--mode", "live"), ["live", "stop-and-copy"]),
    ],
)
async def test_a_run_is_compared_with_stop_and_copy_unless_told_otherwise(
    arguments: tuple[str, ...], modes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[RunOptions] = []

    class Run:
        def __init__(self, options: RunOptions, *_: Any) -> None:
            self._options = options

        async def execute(self) -> RunResult:
            ran.append(self._options)
            return RunResult(self._options)

    monkeypatch.setattr(drill, "Run", Run)
    monkeypatch.setattr(drill.assemble, "workload", lambda *_: report().workloads[0])
    args = parse("--output", str(tmp_path), "--link", "1gbit", "--action", "stop", "--time-left", "60", *arguments)
    assert await drill.drill(args) == 0
    assert [options.mode for options in ran] == modes
    assert {(options.link, options.action, options.time_left_s) for options in ran} == {("1gbit", "stop", 60.0)}


def test_a_lab_that_fails_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Run:
        def __init__(self, *_: Any) -> None:
            pass

        async def execute(self) -> RunResult:
            raise LabError("the agents are not ready")

    monkeypatch.setattr(drill, "Run", Run)
    assert cli.main(["drill", "--output", str(tmp_path)]) == ExitCode.FAILED
    assert capsys.readouterr().err == "spotguard drill: the agents are not ready\n"


def test_it_keeps_away_from_a_machine_s_own_network(tmp_path: Path) -> None:
    (tmp_path / "lo").mkdir()
    drill.check_place(tmp_path)
    (tmp_path / "eth0").mkdir()
    with pytest.raises(Unsupported, match="has eth0") as refused:
        drill.check_place(tmp_path)
    assert "make drill" in refused.value.remedy


@pytest.mark.parametrize("text", ["node-a", "node-c:dumping", "node-a:thinking", "node-b:dumping", ":"])
def test_only_real_phases_can_be_killed_in(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NODE:PHASE"):
        drill.node_phase(text)
    assert drill.node_phase("node-a:dumping") == ("node-a", "dumping")

"""The self-test passes where tracking works, and fails when any write is missed."""

import subprocess
import sys
import time

import pytest

from criu_transfer.errors import TrackerUnavailable
from criu_transfer.tracker import selftest as module
from criu_transfer.tracker.selftest import selftest
from criu_transfer.tracker.wp_async import ProcessTracker

pytestmark = pytest.mark.kernel


def test_it_passes_here_and_is_quick() -> None:
    begun = time.monotonic()
    result = selftest()
    assert result.ok, result.reason
    assert result.reason == ""
    assert len(result.cases) == 14
    assert time.monotonic() - begun < 2


def test_a_tracker_that_misses_writes_fails_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = ProcessTracker.scan
    scans: list[ProcessTracker] = []

    def only_the_first(self: ProcessTracker, *, frozen: bool = False) -> list[tuple[int, int]]:
        ranges = scan(self, frozen=frozen)
        scans.append(self)
        return ranges if scans.count(self) == 1 else []

    monkeypatch.setattr(ProcessTracker, "scan", only_the_first)
    result = selftest()
    assert not result.ok
    passed = {case.name for case in result.cases if case.ok}
    assert passed == {"quiet", "rested", "forked child", "forked child, untracked"}
    assert "moved: 16 changed pages" in result.reason


def test_a_tracker_that_calls_everything_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = ProcessTracker.scan

    def everything(self: ProcessTracker, *, frozen: bool = False) -> list[tuple[int, int]]:
        return scan(self, frozen=frozen) and [span for span in self.tracked if span[1] - span[0] < 16 << 20]

    monkeypatch.setattr(ProcessTracker, "scan", everything)
    assert [case.name for case in selftest().cases if not case.ok] == ["rested"]


def test_a_kernel_without_it_is_an_answer_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TrackerUnavailable("no such kernel")

    monkeypatch.setattr(ProcessTracker, "attach", refuse)
    assert selftest() == module.SelfTest(ok=False, reason="no such kernel", cases=())


def test_it_never_waits_for_ever() -> None:
    result = selftest(seconds=0.0)
    assert not result.ok
    assert "says nothing" in result.reason


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "criu_transfer.tracker.selftest"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok   ") == 14
    assert "write tracking works here" in done.stdout

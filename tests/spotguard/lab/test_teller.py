"""What a person reads of a run, line by line."""

import io
import re
from typing import Any

import pytest

from spotguard.lab import teller as module
from spotguard.lab.teller import Teller

MIB = 1 << 20


class Ear:
    """A teller and what it has written since the last look, without the countdown."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.teller = Teller(self.stream)

    def hear(self, what: str, **fields: Any) -> list[str]:
        self.teller.hear(what, fields)
        return self.lines()

    def agent(self, event: str, **fields: Any) -> list[str]:
        return self.hear("agent", node="node-a", event=event, **fields)

    def lines(self) -> list[str]:
        written = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return [re.sub(r"^ *(T[-+][\d.]+ s)?  ", "", line) for line in written.splitlines()]


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    monkeypatch.setattr(module.time, "monotonic", lambda: 100.0)
    return Ear()


def test_the_story_of_a_move(ear: Ear) -> None:
    assert ear.hear("pod", workload="redis", node="node-a") == ["redis starts on node-a"]
    assert ear.hear("client", workload="redis", event="ready", bytes=256 * MIB) == ["redis is filled with 256 MiB"]
    assert ear.hear("load", host="client") == ["every client is connected and writes"]
    notice = ear.hear("notice", node="node-a", action="terminate", left_s=120.0)
    assert notice == ["notice: node-a will terminate in 120 s"]
    assert ear.agent("notice", t=100.25) == ["node-a has heard of it after 250 ms"]
    about = {"workload": "redis", "side": "source", "migration": "m-1"}
    first = ear.agent("progress", t=101.0, number=0, bytes=64 * MIB, total=256 * MIB, **about)
    assert "round 0" in first[0]
    assert "25%" in first[0]
    done = ear.agent("round", t=103.0, number=0, bytes=256 * MIB, written=MIB, seconds=2.0, **about)
    assert "100%" in done[0]
    assert "128 MiB/s" in done[0]  # since the round's first word
    assert ear.agent("freeze-step", step="hold", start=104.0, seconds=0.01, t=104.01, **about) == []
    assert ear.agent("freeze-step", step="freeze", start=104.1, seconds=0.01, t=104.11, **about) == ["redis is frozen"]
    target = {"workload": "redis", "side": "target", "node": "node-b"}
    thaw = {"event": "freeze-step", "step": "thaw", "start": 104.2, "seconds": 0.01, "t": 104.21}
    assert ear.hear("agent", **thaw, **target) == ["redis runs on node-b, after a pause of 110 ms"]
    finished = {"event": "finished", "outcome": "moved", "reason": "", "t": 105.0}
    assert ear.hear("agent", **finished, **target) == []
    assert ear.agent("finished", outcome="moved", reason="", t=105.0, **about) == ["redis: moved"]
    assert ear.agent("filled", bytes=256 * MIB, t=106.0, **about) == [
        "redis has all its memory: 256 MiB filled in the background"
    ]
    assert ear.hear("node-gone", node="node-a") == ["node-a is gone; the clients go on"]
    result = {"event": "result", "acknowledged": 5000, "lost": 0, "longest_gap_ms": 140.0}
    assert ear.hear("client", workload="redis", **result) == [
        "redis     checked: 5000 acknowledged, 0 lost, longest gap 140 ms"
    ]


def test_what_goes_wrong_is_told(ear: Ear) -> None:
    about = {"workload": "redis", "side": "source"}
    assert ear.agent("finished", outcome="rolled-back", reason="no answer", **about) == [
        "redis: rolled-back: no answer"
    ]
    assert ear.agent("note", text="no room", **about) == ["node-a redis: no room"]
    assert ear.agent("restarted", side="source", phase="dumping") == ["node-a goes on with source phase dumping"]
    assert ear.hear("late", reason="waited 120 s for the moves to end") == ["waited 120 s for the moves to end"]
    assert ear.hear("kill", node="node-a", phase="dumping") == ["the agent of node-a is killed in phase dumping"]


def test_the_clients_numbers_ride_along_with_the_round(ear: Ear) -> None:
    progress = {"event": "progress", "phase": "load", "acknowledged": 1234, "waiting_ms": 2.0, "longest_gap_ms": 30.0}
    assert ear.hear("client", workload="redis", **progress) == []
    told = ear.agent("round", workload="redis", t=103.0, number=0, bytes=MIB, written=0, seconds=1.0)
    assert "1,234 writes  gap 30 ms" in told[0]


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("something", {}),
        ("client", {"workload": "redis", "event": "stopped"}),
        ("client", {"workload": "redis", "event": "progress", "phase": "fill"}),
        ("agent", {"node": "node-a", "event": "phase", "phase": "dumping"}),
        ("agent", {"node": "node-a", "event": "done", "command": "Preflight"}),
        ("agent", {"node": "node-a", "event": "finished", "side": "target", "outcome": "resumed", "reason": ""}),
    ],
)
def test_most_is_not_worth_a_line(what: str, fields: dict[str, Any], ear: Ear) -> None:
    assert ear.hear(what, **fields) == []


def test_lines_carry_the_time_that_is_left_until_the_next_chapter() -> None:
    stream = io.StringIO()
    teller = Teller(stream)
    teller.hear("notice", {"node": "node-a", "action": "stop", "left_s": 120.0})
    assert stream.getvalue().lstrip().startswith("T-1")
    teller.headline("for comparison")
    teller.close()
    *_, title, line = stream.getvalue().splitlines()
    assert title == " " * 11 + "for comparison"
    assert line == " " * 11 + "─" * len("for comparison")

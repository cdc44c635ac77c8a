"""Makes the report out of what runs have seen: the agents' event logs, the clients' results, the watcher."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from spotguard.lab.report import (
    PHASES,
    Client,
    Fill,
    Freeze,
    Machine,
    Notice,
    Round,
    StopAndCopy,
    WorkloadReport,
)
from spotguard.lab.run import PodResult, RunResult

# Steps of the effects that the report counts as part of another.
PART_OF = {"files": "images", "route": "release"}
MOVED = {"moved": "live", "moved-by-stop-and-copy": "stop-and-copy"}


def machine(tracker: str) -> Machine:
    """Describe this machine; `tracker`: what the agents said about it."""
    return Machine(
        kernel=platform.release(),
        cpus=os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        criu=_version("criu", "--version"),
        runc=_version("runc", "--version"),
        tracker="wp-async" if tracker == "wp-async" else "none",
        tracker_reason="" if tracker == "wp-async" else tracker,
    )


def notice(result: RunResult) -> Notice:
    """Tell what was noticed, and when."""
    seen = next((entry for entry in result.entries if entry["event"] == "notice"), None)
    detected = (seen["t"] - result.notice_at) * 1e3 if seen else -1.0
    return Notice("spot", result.options.action, result.options.time_left_s, detected)


def notes(result: RunResult) -> tuple[str, ...]:
    """Tell what else a reader should know: connections that could not be kept, and what was left over."""
    ended = [f"{e['workload']}: {e['text']}" for e in result.entries if e["event"] == "connections"]
    return (*ended, *(f"left over on {line}" for line in result.leftovers))


def tracker_of(result: RunResult) -> str:
    """Give the source agent's word about tracking: wp-async, or why not."""
    return next((str(e["tracker"]) for e in result.entries if e["event"] == "ready"), "no agent was ready")


def workload(result: RunResult, name: str, compared: RunResult | None) -> WorkloadReport:
    """Report one workload, beside the same in the run without pre-copy."""
    pod = result.pods[name]
    story = _Story(result, name)
    return WorkloadReport(
        name=name,
        outcome="moved" if story.outcome in MOVED else story.outcome,
        mode=MOVED.get(story.outcome, "live"),
        reason=story.reason,
        pause_ms=story.pause_ms,
        bytes_moved=story.bytes_moved,
        memory_bytes=pod.options.size_mib << 20,
        rounds=story.rounds(),
        freeze=story.freeze(),
        frozen_at_s=story.after_notice(story.frozen_at),
        resumed_at_s=story.after_notice(story.resumed_at),
        filled_at_s=story.after_notice(story.filled_at),
        frames_held=story.frames_held,
        fill=story.fill(),
        margin_s=result.deadline - story.resumed_at if story.resumed_at else None,
        double_run_ms=pod.watched.double_run_ms if pod.watched else 0.0,
        watch_blind_ms=pod.watched.blind_ms if pod.watched else 0.0,
        tracker=tracker_of(result) if story.outcome == "moved" else "none",
        faults=result.options.faults,
        stop_and_copy=_comparison(compared, name) if compared else None,
        **_client(pod),
    )


def _client(pod: PodResult) -> dict[str, Any]:
    return Client.of(pod.client) if pod.client else {"complete": False}


def _comparison(result: RunResult, name: str) -> StopAndCopy:
    story = _Story(result, name)
    return StopAndCopy(pause_ms=story.pause_ms or 0.0, bytes_moved=story.bytes_moved, **_client(result.pods[name]))


class _Story:
    """One workload's entries in the agents' logs."""

    def __init__(self, result: RunResult, name: str) -> None:
        self._result = result
        self._entries = [e for e in result.entries if e.get("workload") == name]
        end = self._last("finished", side="source")
        self.outcome = str(end["outcome"]) if end else "unfinished"
        self.reason = str(end["reason"]) if end and self.outcome not in MOVED else ""
        # A move that was rolled back may have been tried again: the last try is the one that is told.
        self._last_try = str(end["migration"]) if end else ""
        steps = self._of_last_try("freeze-step")
        self.frozen_at = next((float(s["start"]) for s in steps if s["step"] == "freeze"), 0.0)
        self.resumed_at = next((s["start"] + s["seconds"] for s in reversed(steps) if s["step"] == "thaw"), 0.0)
        filled = self._last("filled")
        self.filled_at = float(filled["t"]) if filled else 0.0
        released = self._last("released", side="target")
        self.frames_held = int(released["played"]) if released else 0

    @property
    def pause_ms(self) -> float | None:
        """From the freeze on the source to the thaw on the target."""
        return (self.resumed_at - self.frozen_at) * 1e3 if self.frozen_at and self.resumed_at else None

    @property
    def bytes_moved(self) -> int:
        """All that went over the wire for the workload, before TLS."""
        rounds = sum(int(entry["bytes"]) for entry in self._all("round"))
        parts = ("residual_bytes", "debt_bytes", "image_bytes", "file_bytes")
        return rounds + sum(int(captured.get(part, 0)) for captured in self._all("captured") for part in parts)

    def rounds(self) -> tuple[Round, ...]:
        return tuple(
            Round(
                n=e["number"],
                bytes=e["bytes"],
                written_bytes=e["written"],
                seconds=e["seconds"],
                start_s=self.after_notice(e["t"] - e["seconds"]),
            )
            for e in self._of_last_try("round")
        )

    def freeze(self) -> Freeze | None:
        # The target reads the owner record before it takes an offer up too: that is no part of the freeze.
        steps = self._of_last_try("freeze-step")
        begun = next((float(s["start"]) for s in steps if s["step"] == "hold"), None)
        if begun is None:
            return None
        steps = [step for step in steps if float(step["start"]) >= begun]
        first = min(float(step["start"]) for step in steps)
        lengths: dict[str, float] = {}
        starts: dict[str, float] = {}
        for step in steps:
            name = PART_OF.get(step["step"], step["step"])
            if name not in PHASES:
                continue
            lengths[f"{name}_ms"] = lengths.get(f"{name}_ms", 0.0) + step["seconds"] * 1e3
            starts.setdefault(name, (float(step["start"]) - first) * 1e3)
        return Freeze(**lengths, starts_ms=starts)

    def fill(self) -> Fill | None:
        filled = self._last("filled")
        return Fill(int(filled["bytes"]), float(filled["seconds"]), int(filled["faults"])) if filled else None

    def after_notice(self, moment: float) -> float | None:
        return moment - self._result.notice_at if moment else None

    def _all(self, event: str, **wanted: str) -> list[dict[str, Any]]:
        return [e for e in self._entries if e["event"] == event and _matches(e, wanted)]

    def _of_last_try(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self._all(event) if e.get("migration") == self._last_try or not self._last_try]

    def _last(self, event: str, **wanted: str) -> dict[str, Any] | None:
        found = self._all(event, **wanted)
        return found[-1] if found else None


def _matches(entry: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    return all(entry.get(key) == value for key, value in wanted.items())


def _version(*command: Sequence[str] | str) -> str:
    words = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.split()
    return next((word for word in words if word[:1].isdigit()), "unknown")

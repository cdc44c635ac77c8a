"""The drill's result: what happened, whether every promise was kept, as report.json and on the terminal.

docs/report.md documents every field. Times "after the notice" are seconds since the notice was published.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spotguard.lab.report_text import milliseconds, number, plural, seconds, size

SCHEMA = 1
MOVED = "moved"
EXIT_KEPT, EXIT_BROKEN, EXIT_NOT_AS_EXPECTED = 0, 1, 2
PHASES = (
    "hold", "drain", "freeze", "scan", "dump", "residual", "images", "rewrite", "restore", "owner", "thaw", "release",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where the drill ran."""

    kernel: str
    cpus: int
    memory_bytes: int
    criu: str
    runc: str
    tracker: str  # "wp-async" or "none"
    tracker_reason: str = ""


@dataclass(frozen=True)
class Notice:
    """What the metadata service said, and how soon it was noticed (ms after it could be read)."""

    kind: str
    action: str
    time_left_s: float
    detected_ms: float


@dataclass(frozen=True)
class Round:
    """One pre-copy round: sent bytes, bytes written meanwhile, its length, its start after the notice."""

    n: int
    bytes: int
    written_bytes: int
    seconds: float
    start_s: float | None = None


@dataclass(frozen=True)
class Freeze:
    """The steps of the pause. Steps may overlap: `starts_ms` gives starts after the first step's, by step name.

    Without `starts_ms` the pictures show the steps one after the other.
    """

    hold_ms: float = 0.0
    drain_ms: float = 0.0
    freeze_ms: float = 0.0
    scan_ms: float = 0.0
    dump_ms: float = 0.0
    residual_ms: float = 0.0
    images_ms: float = 0.0
    rewrite_ms: float = 0.0
    restore_ms: float = 0.0
    owner_ms: float = 0.0
    thaw_ms: float = 0.0
    release_ms: float = 0.0
    starts_ms: Mapping[str, float] = field(default_factory=dict)

    def steps(self) -> list[tuple[str, float, float]]:
        """Return (name, start, length) in ms of the steps that took any time, in order of their start."""
        found, at = [], 0.0
        for name in PHASES:
            length = float(getattr(self, f"{name}_ms"))
            start = self.starts_ms.get(name, at)
            at = start + length
            if length > 0:
                found.append((name, start, length))
        return sorted(found, key=lambda step: (step[1], PHASES.index(step[0])))


@dataclass(frozen=True)
class Fill:
    """What the target did after the resume: bytes put in place, how long, faults served meanwhile."""

    bytes: int
    seconds: float
    faults: int


@dataclass(frozen=True)
class Client:
    """What the client found; see clients/result.py. `complete` is False if it could not check everything."""

    client_gap_ms: float | None = None
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    unknown: int = 0
    connections: int = 0
    connections_lost: int = 0
    retransmits: int = 0
    latency_p50_ms: float = 0.0
    latency_p99_ms: float = 0.0
    checked_values: int = 0
    complete: bool = True
    client_faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor's arguments from a client's event `result`."""
        return {
            **{name: event[name] for name in ("acknowledged", "lost", "doubled", "wrong", "unknown", "complete")},
            **{name: event[name] for name in ("connections", "connections_lost", "checked_values")},
            "client_gap_ms": event["longest_gap_ms"],
            "retransmits": sum(tcp["total_retransmits"] for tcp in event["tcp"]),
            "latency_p50_ms": event["latency_ms"]["p50"],
            "latency_p99_ms": event["latency_ms"]["p99"],
            "client_faults": tuple(event["faults"]),
        }

    def broken(self) -> list[str]:
        """Return the promises that were not kept, in words."""
        found = []
        if self.lost:
            found.append(f"{plural(self.lost, 'acknowledged write')} lost")
        if self.doubled:
            found.append(f"{plural(self.doubled, 'write')} applied twice")
        if self.wrong:
            found.append(f"{plural(self.wrong, 'value')} wrong")
        if self.connections_lost:
            found.append(f"{self.connections_lost} of {plural(self.connections, 'connection')} lost")
        if not self.complete:
            found.append("the client could not check everything")
        return found


@dataclass(frozen=True, kw_only=True)
class StopAndCopy(Client):
    """The same workload moved without pre-copy and lazy restore, for comparison."""

    pause_ms: float = 0.0
    bytes_moved: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkloadReport(Client):
    """One workload's move. `outcome` is a word of docs/report.md; the drill expects `expected`."""

    name: str
    outcome: str
    expected: str = MOVED
    mode: str = "live"  # or "stop-and-copy"
    reason: str = ""
    pause_ms: float | None = None
    bytes_moved: int = 0
    memory_bytes: int = 0
    rounds: tuple[Round, ...] = ()
    freeze: Freeze | None = None
    frozen_at_s: float | None = None
    resumed_at_s: float | None = None
    filled_at_s: float | None = None
    frames_held: int = 0
    fill: Fill | None = None
    margin_s: float | None = None
    double_run_ms: float = 0.0
    watch_blind_ms: float = 0.0
    tracker: str = "none"
    faults: tuple[str, ...] = ()
    stop_and_copy: StopAndCopy | None = None

    def broken(self) -> list[str]:
        """Return the promises that were not kept, the comparison run's included."""
        found = super().broken()
        if self.double_run_ms:
            found.append(f"two copies ran for {milliseconds(self.double_run_ms)}")
        if self.stop_and_copy is not None:
            found += [f"in stop-and-copy: {what}" for what in self.stop_and_copy.broken()]
        return found


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run. `started` is text (ISO 8601, UTC) from spotguard.clock's wall time."""

    version: str
    started: str
    machine: Machine
    notice: Notice
    workloads: tuple[WorkloadReport, ...]
    notes: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Return everything that keeps the run from being a success, in words."""
        found = [f"{workload.name}: {what}" for workload in self.workloads for what in workload.broken()]
        return found + [
            f"{workload.name}: {workload.outcome} instead of {workload.expected}"
            + f" ({workload.reason})" * bool(workload.reason)
            for workload in self.workloads
            if workload.outcome != workload.expected
        ]

    @property
    def exit_code(self) -> int:
        """Return 1 if a promise was broken, else 2 if an outcome was not the expected one (or nothing ran), else 0."""
        if any(workload.broken() for workload in self.workloads):
            return EXIT_BROKEN
        as_expected = all(workload.outcome == workload.expected for workload in self.workloads)
        return EXIT_KEPT if as_expected and self.workloads else EXIT_NOT_AS_EXPECTED

    @property
    def verdict(self) -> str:
        """Return the exit code as a word: kept, broken or unexpected."""
        return {EXIT_KEPT: "kept", EXIT_BROKEN: "broken", EXIT_NOT_AS_EXPECTED: "unexpected"}[self.exit_code]

    def fields(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return {
            "schema": SCHEMA,
            **asdict(self),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "problems": self.problems(),
        }


def write_json(report: Report, path: Path) -> None:
    """Write report.json; never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report.fields(), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Report:
    """Read report.json back; raises ValueError for another schema, TypeError or KeyError for what is no report."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {raw['schema']}, this version reads {SCHEMA}")
    return Report(
        version=raw["version"],
        started=raw["started"],
        machine=Machine(**raw["machine"]),
        notice=Notice(**raw["notice"]),
        workloads=tuple(_workload(one) for one in raw["workloads"]),
        notes=tuple(raw["notes"]),
    )


def terminal_summary(report: Report) -> str:
    """Return a table for the console, and the verdict below it."""
    head = (
        "workload",
        "outcome",
        "pause",
        "client's gap",
        "stop-and-copy",
        "acknowledged",
        "lost",
        "doubled",
        "conns",
        "margin",
    )
    rows = [head] + [_row(workload) for workload in report.workloads]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    if problems := report.problems():
        return "\n".join([*lines, "", *(f"✗ {problem}" for problem in problems)])
    moved = sum(workload.bytes_moved for workload in report.workloads)
    return "\n".join([*lines, "", f"✓ {headline(report)} {size(moved)} moved."])


def headline(report: Report) -> str:
    """Return the result in one or two sentences."""
    if not report.workloads:
        return "Nothing ran."
    if problems := report.problems():
        return f"{plural(len(problems), 'problem')}: {problems[0]}."
    writes = sum(workload.acknowledged for workload in report.workloads)
    connections = sum(workload.connections for workload in report.workloads)
    moved = sum(workload.outcome == MOVED for workload in report.workloads)
    what = f"{plural(moved, 'workload')} moved" if moved else "Every workload ended as expected"
    return (
        f"{what}: all {plural(writes, 'acknowledged write')} there, once each; "
        f"all {plural(connections, 'connection')} kept; never two copies."
    )


def _row(workload: WorkloadReport) -> tuple[str, ...]:
    compared = workload.stop_and_copy
    kept = workload.connections - workload.connections_lost
    return (
        workload.name,
        workload.outcome if workload.mode == "live" else f"{workload.outcome} ({workload.mode})",
        milliseconds(workload.pause_ms),
        milliseconds(workload.client_gap_ms),
        milliseconds(compared.client_gap_ms) if compared is not None else "-",
        number(workload.acknowledged),
        str(workload.lost),
        str(workload.doubled),
        f"{kept}/{workload.connections}",
        seconds(workload.margin_s),
    )


def _workload(raw: Mapping[str, Any]) -> WorkloadReport:
    known = {f.name for f in fields(WorkloadReport)}
    values = {name: value for name, value in raw.items() if name in known}
    compared = raw["stop_and_copy"]
    return WorkloadReport(
        **{
            **values,
            "rounds": tuple(Round(**one) for one in raw["rounds"]),
            "freeze": Freeze(**raw["freeze"]) if raw["freeze"] is not None else None,
            "fill": Fill(**raw["fill"]) if raw["fill"] is not None else None,
            "faults": tuple(raw["faults"]),
            "client_faults": tuple(raw["client_faults"]),
            "stop_and_copy": StopAndCopy(**{**compared, "client_faults": tuple(compared["client_faults"])})
            if compared
            else None,
        }
    )

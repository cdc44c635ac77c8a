"""Every event in every reachable state: nothing raises, nothing thaws that must not, and the tables tell the truth."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from spotguard.core import commands as c
from spotguard.core import source, target
from spotguard.core.events import (
    AbortRequested,
    AgentRestarted,
    Checked,
    DeadlineMoved,
    Done,
    Failed,
    FailureKind,
    NoticeWithdrawn,
    Offered,
    OwnerAnswer,
    PagerDied,
    RestoreRequested,
    RoundCopied,
    StartMigration,
    StateComplete,
    StreamLost,
    TargetAnswered,
    TimeReached,
)
from spotguard.core.ownership import Found, Lost, Owner, OwnerRecord, Refused, Unknown, Unreachable, Won
from spotguard.core.source import SourceState
from spotguard.core.state import PERSISTED, Mode, Outcome, Record, Role, SourcePhase, TargetPhase
from spotguard.core.target import TargetState
from tests.spotguard.core.explore import explore
from tests.spotguard.core.world import MOVE, Model

DOCUMENT = Path(__file__).parents[3] / "docs" / "state-machines.md"
NAMES = sorted({kind.__name__ for kind in (*source.AWAITS.values(), *target.AWAITS.values(), c.Persist)})
RECORDS = [OwnerRecord("m1", owner, "2") for owner in Owner]
ANSWERS: list[Any] = [kind(record) for kind in (Won, Lost, Found) for record in RECORDS]
ANSWERS += [Unknown(), Unreachable(), Refused()]
LATE = 119.0


@cache
def reachable() -> tuple[frozenset[SourceState], frozenset[TargetState]]:
    """All states that one fault can lead to, in either mode, and the new ones."""
    both = [explore(Model(mode=mode), 1) for mode in Mode]
    sources = frozenset(state for seen in both for state in seen.source_states if state) | {SourceState()}
    targets = frozenset(state for seen in both for state in seen.target_states if state) | {TargetState()}
    return sources, targets


def results() -> Iterator[Any]:
    for now in (0.0, LATE):
        for name in NAMES:
            yield Done(now, name)
            yield from (Failed(now, name, kind, "it broke") for kind in FailureKind)
        for name in ("TakeOwnership", "ReclaimOwnership", "ReadOwnership", "CreateOwnership"):
            yield from (OwnerAnswer(now, name, answer) for answer in ANSWERS)
        yield from (TimeReached(now, tag) for tag in ("", target.OFFER_TAG, "round-0", "reclaiming-0", "thawing-0"))


def records(role: Role) -> Iterator[AgentRestarted]:
    for phase in PERSISTED[role]:
        yield AgentRestarted(0, Record(role, MOVE, phase, Mode.LIVE, 120.0, "1"))


def source_events() -> list[Any]:
    own: list[Any] = [
        StartMigration(0, MOVE, 120.0),
        DeadlineMoved(0, 10.0),
        DeadlineMoved(0, 1e9),
        NoticeWithdrawn(0),
        Checked(0, movable=False, reasons=("no",)),
        Checked(0, movable=True, deltas=False),
        Checked(0, movable=True, memory_bytes=10**15),
        RoundCopied(0, 0, 10**9, 10**8, 1.0),
        RoundCopied(0, 0, 10**9, 0, 1.0),
        RoundCopied(LATE, 0, 10**9, 10**8, 1.0),
        RoundCopied(0, 1, 0, 0, 0.0),
        TargetAnswered(0, resumed=True),
        TargetAnswered(0, resumed=False),
    ]
    return [*own, *records(Role.SOURCE), *records(Role.TARGET), *results()]


def target_events() -> list[Any]:
    own: list[Any] = [
        Offered(0, MOVE, 120.0, "1"),
        StateComplete(0),
        StreamLost(0, "reset"),
        RestoreRequested(0, 10.0),
        AbortRequested(0, "stop"),
        PagerDied(0, "killed"),
    ]
    return [*own, *records(Role.SOURCE), *records(Role.TARGET), *results()]


def kinds(commands: tuple[c.Command, ...]) -> set[type]:
    return {type(command) for command in commands}


RUNNING_AGAIN = {c.ThawProcesses, c.ReleaseNetwork}
CAPTURED = {
    SourcePhase.DUMPING,
    SourcePhase.RESTORING,
    SourcePhase.SECURING,
    SourcePhase.RECLAIMING,
    SourcePhase.READING_OWNER,
    SourcePhase.FORWARDING,
    SourcePhase.DESTROYING,
}


def test_a_source_that_may_be_restored_elsewhere_runs_again_only_by_a_verdict() -> None:
    for state in reachable()[0]:
        for event in source_events():
            following, commands = source.step(state, event)
            unwritten = isinstance(event, Failed) and event.command == "Persist" and state.phase == SourcePhase.DUMPING
            if state.phase in CAPTURED and not unwritten:
                assert not kinds(commands) & RUNNING_AGAIN, (state, event)
            if c.DestroySource in kinds(commands) and state.phase != SourcePhase.NEW:
                assert following.outcome in {Outcome.MOVED, Outcome.MOVED_BY_STOP_AND_COPY, Outcome.LOST}, (
                    state,
                    event,
                )


def test_a_target_runs_only_as_owner() -> None:
    for state in reachable()[1]:
        for event in target_events():
            following, commands = target.step(state, event)
            if kinds(commands) & RUNNING_AGAIN:
                assert following.owned, (state, event)
            if following.owned and not state.owned and state.phase != TargetPhase.NEW:
                assert isinstance(event, OwnerAnswer), (state, event)
            if state.phase in target.DECIDING and c.DestroyRestored in kinds(commands):
                decided = isinstance(event, OwnerAnswer) or state.owned
                assert decided or (isinstance(event, Failed) and event.command == "Persist"), (state, event)


def test_a_damaged_target_never_swaps() -> None:
    for state in reachable()[1]:
        for event in target_events():
            following, commands = target.step(state, event)
            assert not ((following.broken or following.doubted) and c.TakeOwnership in kinds(commands)), (state, event)


# --- the document -----------------------------------------------------------------------------------------------------


def transitions(step: Any, states: Any, events: list[Any]) -> dict[str, dict[str, set[str]]]:
    """Which phase leads to which, by what: what the code does, not what somebody believes."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for state in states:
        for event in filter(_proper, events):
            following, _ = step(state, event)
            if following.phase != state.phase:
                found[state.phase][following.phase].add(_gave_up(state, event) or _word(event))
    return found


OWN_EVENT = {"Preflight", "CopyRound", "RequestRestore"}  # commands that are never answered by Done
SWAPS = {"TakeOwnership": Owner.TARGET, "ReclaimOwnership": Owner.RECLAIMED, "CreateOwnership": Owner.SOURCE}


def _proper(event: Any) -> bool:
    """Whether a driver that keeps its contract can send this."""
    match event:
        case Done():
            return not event.command.endswith("Ownership") and event.command not in OWN_EVENT
        case Failed():
            return not event.command.endswith("Ownership")
        case OwnerAnswer(answer=Won(record)):
            return SWAPS.get(event.command) == record.owner
        case OwnerAnswer(answer=Lost()):
            return event.command in SWAPS
        case OwnerAnswer(answer=Found()):
            return event.command not in SWAPS
        case _:
            return True


def _gave_up(state: Any, event: Any) -> str:
    """Whether the phase only waited for its command to end."""
    withdrawn = state.phase in source.UNTOUCHED and getattr(state, "outcome", None) is not None
    unwanted = state.phase in target.BUSY_UNOWNED and bool(getattr(state, "broken", ""))
    return "any result, when given up meanwhile" if (withdrawn or unwanted) and hasattr(event, "command") else ""


def _word(event: Any) -> str:
    words = {Done: "done", Failed: "failed", Checked: "checked", RoundCopied: "copied"}
    word = words.get(type(event), type(event).__name__)
    match event:
        case Failed(command="Persist"):
            word = "the journal cannot be written"
        case OwnerAnswer(answer=Lost(record) | Found(record)):
            word = f"{type(event.answer).__name__.lower()}: {record.owner}"
        case OwnerAnswer():
            word = type(event.answer).__name__.lower()
        case TargetAnswered():
            word = "resumed" if event.resumed else "not resumed"
        case AgentRestarted():
            word = f"restarted at {event.record.phase}"
    return word


def table(phases: Any, awaits: Any, found: dict[str, dict[str, set[str]]], persisted: frozenset[str]) -> str:
    lines = ["| phase | command | journal | leads to |", "|---|---|---|---|"]
    for phase in phases:
        command = f"`{awaits[phase].__name__}`" if phase in awaits else ""
        ways = [f"**{to}**: {', '.join(sorted(found[phase][to]))}" for to in phases if to in found[phase]]
        lines.append(f"| {phase} | {command} | {'yes' if phase in persisted else ''} | {'; '.join(ways)} |")
    return "\n".join(lines)


def render() -> str:
    """Return the generated part of docs/state-machines.md."""
    sources, targets = reachable()
    s = table(SourcePhase, source.AWAITS, transitions(source.step, sources, source_events()), PERSISTED[Role.SOURCE])
    t = table(TargetPhase, target.AWAITS, transitions(target.step, targets, target_events()), PERSISTED[Role.TARGET])
    return f"## Source\n{s}\n\n## Target\n{t}\n"


def refresh() -> None:
    """Write the generated part anew: `python -c "from tests.spotguard.core import test_rules as t; t.refresh()"`."""
    kept = DOCUMENT.read_text().split("## Source\n")[0]
    DOCUMENT.write_text(kept + render())


def test_the_document_says_what_the_code_does() -> None:
    written = DOCUMENT.read_text()
    assert render() in written, f"refresh() docs/state-machines.md:\n{render()}"

"""Both machines in a hostile world: every interrupted point, and long random walks."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from spotguard.core import commands as c
from spotguard.core import source, target
from spotguard.core.state import Mode, SourcePhase, TargetPhase
from tests.spotguard.core.explore import Explored, ends_badly, explore
from tests.spotguard.core.invariants import broken_rules
from tests.spotguard.core.world import Machines, Model

S, T = SourcePhase, TargetPhase


def _told(seen: Explored) -> str:
    return "\n".join([seen.trouble, *seen.way])


@pytest.mark.parametrize(("mode", "faults", "at_least"), [(Mode.STOP_AND_COPY, 2, 25_000), (Mode.LIVE, 1, 3_000)])
def test_every_interrupted_point_ends_with_one_copy(mode: Mode, faults: int, at_least: int) -> None:
    seen = explore(Model(mode=mode), faults)
    assert not seen.trouble, _told(seen)
    assert seen.worlds >= at_least  # else the model has lost its teeth
    assert {state.phase for state in seen.source_states if state} >= set(S) - {S.ATTACHING, S.PRECOPY}
    assert {state.phase for state in seen.target_states if state} == set(T)


class Walk(RuleBasedStateMachine):
    """Any number of faults, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(mode=Mode.LIVE)
        self.world = self.model.start()
        self.labels: list[str] = []

    @rule(choices=st.lists(st.integers(0, 10**6), min_size=8, max_size=8))
    def go_on(self, choices: list[int]) -> None:
        """Take some steps; each number picks one of the moves that are possible then, one in five a fault."""
        for choice in choices:
            moves = list(self.model.moves(self.world))
            moves = [move for move in moves if move[1] == (choice % 5 == 0)] or moves
            if not moves:
                return
            label, _, self.world = moves[choice // 5 % len(moves)]
            self.labels.append(label)
            assert not broken_rules(self.world), (broken_rules(self.world), self.labels)

    @invariant()
    def would_end_well(self) -> None:
        """Left alone now, it ends with one copy."""
        assert not ends_badly(self.model, self.world, set()), self.labels


def test_long_walks_with_any_number_of_faults() -> None:
    checks = settings(
        max_examples=80,
        stateful_step_count=12,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Walk, settings=checks)  # type: ignore[no-untyped-call]


def persist_too_late(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Write the journal after the command that it should announce."""

    def broken(state: Any, event: Any) -> Any:
        following, commands = step(state, event)
        late = [command for command in commands if isinstance(command, c.Persist)]
        return following, (*(command for command in commands if command not in late), *late)

    return broken


def forget(step: Callable[[Any, Any], Any], phase: str) -> Callable[[Any, Any], Any]:
    """Never write that phase down."""

    def broken(state: Any, event: Any) -> Any:
        following, commands = step(state, event)
        return following, tuple(x for x in commands if not (isinstance(x, c.Persist) and x.record.phase == phase))

    return broken


def deaf(step: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
    """Leave one command out, as if it had been done."""

    def broken(state: Any, event: Any) -> Any:
        following, commands = step(state, event)
        return following, tuple(command for command in commands if command.name != name)

    return broken


TABLES: list[tuple[str, dict[Any, Any], Any, Any]] = [
    ("thaws without reclaiming, restore failed", source.ON_FAILURE, S.RESTORING, S.VERIFYING),
    ("thaws without reclaiming, dump failed", source.ON_FAILURE, S.DUMPING, S.RELEASING),
    ("thaws without reclaiming, restarted", source.RESUMES_AT, S.DUMPING, S.RELEASING),
    ("thaws without verifying", source.RESUMES_AT, S.DUMPING, S.THAWING),
    ("destroys without asking, restarted", source.RESUMES_AT, S.DUMPING, S.DESTROYING),
    ("forgets the tracker", source.ON_FAILURE, S.PRECOPY, S.ABORTING),
    ("resumes without the swap", target.NEXT, T.KEEPING, T.ROUTING),
    ("swaps before the pager outlives the agent", target.NEXT, T.RESTORING, T.TAKING),
    ("destroys at an open swap, restarted", target.RESUMES_AT, T.TAKING, T.DESTROYING),
    ("resumes at an open swap, restarted", target.RESUMES_AT, T.TAKING, T.ROUTING),
]


class TestPlantedBugsAreFound:
    @pytest.mark.parametrize(("table", "phase", "wrong"), [t[1:] for t in TABLES], ids=[t[0] for t in TABLES])
    def test_wrong_turn(self, monkeypatch: pytest.MonkeyPatch, table: dict[Any, Any], phase: Any, wrong: Any) -> None:
        monkeypatch.setitem(table, phase, wrong)
        assert explore(Model(mode=Mode.LIVE), 1).trouble

    @pytest.mark.parametrize(
        "machines",
        [
            Machines(source=persist_too_late(source.step)),
            Machines(target=persist_too_late(target.step)),
            Machines(source=forget(source.step, S.REGISTERING)),
            Machines(source=forget(source.step, S.HOLDING)),
            Machines(source=forget(source.step, S.DUMPING)),
            Machines(target=forget(target.step, T.PREPARING)),
            Machines(target=forget(target.step, T.TAKING)),
            Machines(target=deaf(target.step, "TakeOwnership")),
            Machines(source=deaf(source.step, "FreezeProcesses")),
        ],
    )
    def test_wrong_step(self, machines: Machines) -> None:
        assert explore(Model(machines, mode=Mode.LIVE), 1).trouble

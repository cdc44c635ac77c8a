"""Visit every world that a bounded number of faults can lead to; from each, let all be well and see it end well."""

from collections import deque
from dataclasses import dataclass, field, replace

from spotguard.core.source import SourceState
from spotguard.core.target import TargetState
from tests.spotguard.core.invariants import broken_rules, wrong_end
from tests.spotguard.core.world import Model, World

LONGEST_END = 150  # steps of an undisturbed execution; a longer one is taken to go round in circles


@dataclass
class Explored:
    """What was seen: worlds, transitions, and the first broken rule with the way to it."""

    worlds: int = 0
    steps: int = 0
    trouble: str = ""
    way: list[str] = field(default_factory=list)
    source_states: set[SourceState] = field(default_factory=set)
    target_states: set[TargetState] = field(default_factory=set)


def explore(model: Model, faults: int, limit: int = 2_000_000) -> Explored:
    """Search breadth-first, fewest faults first; stops at the first broken rule."""
    start = model.start()
    number = {start: 0}  # each world is hashed once, then known by its number
    worlds = [start]
    came: list[tuple[int, str]] = [(-1, "")]
    visited: set[int] = set()
    good: set[World] = set()
    seen = Explored()
    layer = deque([0])
    for faults_left in range(faults, -1, -1):
        after_fault: deque[int] = deque()
        while layer:
            here = layer.popleft()
            if here in visited:
                continue
            visited.add(here)
            world = worlds[here]
            seen.worlds += 1
            assert seen.worlds < limit
            if trouble := broken_rules(world) or ends_badly(model, world, good):
                return replace(seen, trouble="; ".join(trouble), way=_way(came, here))
            seen.source_states.add(world.s.state)
            seen.target_states.add(world.t.state)
            for label, fault, following in model.moves(world):
                seen.steps += 1
                if fault and not faults_left:
                    continue
                there = number.setdefault(following, len(worlds))
                if there == len(worlds):
                    worlds.append(following)
                    came.append((here, label))
                if there not in visited:
                    (after_fault if fault else layer).append(there)
        layer = after_fault
    return seen


def ends_badly(model: Model, world: World, good: set[World]) -> list[str]:
    """Let everything go well from here; return what is wrong with the end, if anything is."""
    passed: list[World] = []
    while world not in good:
        if len(passed) > LONGEST_END:
            return ["never ends"]
        passed.append(world)
        following = undisturbed(model, world)
        if following is None:
            if trouble := wrong_end(world):
                return [trouble]
            break
        world = following
    good.update(passed)
    return []


def undisturbed(model: Model, world: World) -> World | None:
    """Return what happens next when nothing goes wrong: messages and work first, timers when nothing else is left."""
    timers = None
    for label, fault, following in model.moves(world):
        if "timer" in label or "times out" in label:
            timers = timers or following
        elif not fault:
            return following
    return timers


def _way(came: list[tuple[int, str]], here: int) -> list[str]:
    labels = []
    while here > 0:
        here, label = came[here]
        labels.append(label)
    return labels[::-1]

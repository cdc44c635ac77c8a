"""What must be true of every world: never two copies, nothing lost, no last word that is false."""

from spotguard.core.ownership import Owner
from spotguard.core.state import Outcome
from tests.spotguard.core.world import Agent, Proc, World


def broken_rules(w: World) -> list[str]:
    """Which invariants this world breaks."""
    target_out = w.t_proc == Proc.RUNS or (not w.t_held and w.t_proc != Proc.NONE)
    source_out = w.s_proc == Proc.RUNS or (not w.s_held and w.s_proc != Proc.DEAD)
    rules = {
        "both copies run": w.s_proc == Proc.RUNS and w.t_proc == Proc.RUNS,
        "the target runs or is heard without owning": target_out and w.owner != Owner.TARGET,
        "the source runs or is heard while the target owns": source_out and w.owner == Owner.TARGET,
        "the source ran on after END without having reclaimed": w.ran_after_end and w.owner != Owner.RECLAIMED,
        "the source is heard in a hold that failed": w.s_proc == Proc.FROZEN
        and w.end_sent
        and not w.s_held
        and w.owner != Owner.RECLAIMED,
        "the source was killed though nobody else owns": w.s_proc == Proc.DEAD
        and w.owner != Owner.TARGET
        and w.s_sound
        and w.s.finished != Outcome.LOST
        and not _lost(w.s),
    }
    return [rule for rule, broken in rules.items() if broken] + _wrong_ends(w)


def _lost(agent: Agent) -> bool:
    return agent.state is None or agent.state.outcome == Outcome.LOST


def _wrong_ends(w: World) -> list[str]:
    """Whether a machine's last word is true."""
    wrong = []
    at_home = w.s_proc == Proc.RUNS and not w.s_held
    match w.s.finished:
        case Outcome.MOVED | Outcome.MOVED_BY_STOP_AND_COPY if w.s_proc != Proc.DEAD or w.owner != Owner.TARGET:
            wrong.append("the source says moved, wrongly")
        case Outcome.ROLLED_BACK | Outcome.LEFT_TO_EVICTION | Outcome.UNMOVABLE if not at_home:
            wrong.append("the source says rolled back, and does not run")
    match w.t.finished:
        case Outcome.RESUMED if w.t_proc != Proc.RUNS or w.t_held:
            wrong.append("the target says resumed, and does not run")
        case Outcome.DESTROYED if w.t_proc in {Proc.RUNS, Proc.FROZEN} or w.owner == Owner.TARGET:
            wrong.append("the target says destroyed, wrongly")
        case Outcome.LOST if not w.pager_killed:
            wrong.append("the target lost the workload, though nothing killed its pager")
    return wrong


def wrong_end(w: World) -> str:
    """What is wrong, all being over: exactly one copy must live, or none and somebody said so; and no leftovers."""
    at_home = w.s_proc == Proc.RUNS and not w.s_held
    away = w.t_proc == Proc.RUNS and not w.t_held
    said_lost = Outcome.LOST in {w.s.finished, w.t.finished}
    if at_home + away != 1 and not (said_lost and not at_home and not away):
        return f"ends with source {w.s_proc}, target {w.t_proc}, owner {w.owner}"
    if w.t_proc == Proc.FROZEN or (w.t_sandbox and w.t_proc != Proc.RUNS) or (w.s_tracked and at_home):
        return "ends with leftovers"
    return ""

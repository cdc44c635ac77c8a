"""When to stop copying a running process and freeze it."""

from dataclasses import dataclass

from spotguard.core.deadline import Limits, last_call, latest_safe_freeze, predicted_freeze


@dataclass(frozen=True, slots=True)
class Round:
    """One finished round. `written_bytes`: written while it ran, so the next one's work."""

    sent_bytes: int
    written_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Continue:
    """Copy another round, to end by `deadline`."""

    deadline: float


@dataclass(frozen=True, slots=True)
class FreezeNow:
    """Freeze; `reason` for the report."""

    reason: str


@dataclass(frozen=True, slots=True)
class TooLate:
    """A freeze would outlast the node."""

    reason: str


Decision = Continue | FreezeNow | TooLate


def throughput(rounds: tuple[Round, ...], limits: Limits) -> float:
    """Return bytes per second over the last three rounds: the network of now, not of the start."""
    recent = [r for r in rounds[-3:] if r.sent_bytes > 0]
    seconds = sum(r.seconds for r in recent)
    return sum(r.sent_bytes for r in recent) / seconds if seconds > 0 else limits.assumed_throughput


def decide(rounds: tuple[Round, ...], left_bytes: int, deadline: float, now: float, limits: Limits) -> Decision:
    """Say what to do after `rounds`, with `left_bytes` still to be copied.

    A process that writes faster than the network carries is never waited for: its rounds stop shrinking, or the
    latest safe time comes, whichever is first. So every process is frozen by then, or left alone.
    """
    speed = throughput(rounds, limits)
    freeze = predicted_freeze(left_bytes, speed, limits)
    if now > last_call(deadline, freeze, limits):
        return TooLate(f"a freeze of {freeze:.2f} s does not fit before the end")
    if rounds and freeze <= limits.target_freeze:
        return FreezeNow(f"predicted freeze {freeze * 1000:.0f} ms")
    if len(rounds) >= limits.rounds_max:
        return FreezeNow(f"{len(rounds)} rounds")
    if _stalled(rounds, limits):
        return FreezeNow(f"{limits.stalled_rounds} rounds without gain, {left_bytes} bytes left")
    # Round 0 leaves less than all memory; of later rounds nobody knows whether they will leave less than the last.
    latest = latest_safe_freeze(deadline, freeze if rounds else limits.fixed_freeze, limits)
    if now + left_bytes / speed >= latest:
        return FreezeNow("no time for another round")
    return Continue(latest)


def _stalled(rounds: tuple[Round, ...], limits: Limits) -> bool:
    if len(rounds) <= limits.stalled_rounds:
        return False
    before = min(r.written_bytes for r in rounds[: -limits.stalled_rounds])
    return min(r.written_bytes for r in rounds[-limits.stalled_rounds :]) > before * (1 - limits.stalled_gain)

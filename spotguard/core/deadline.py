"""The last moments at which something can still be begun; all times are absolute monotonic seconds."""

from dataclasses import dataclass

ATTEMPTS_MAX = 16  # counted no further: by then the pause has its full length


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the machines. Seconds and bytes; the defaults fit the two minutes of a Spot interruption."""

    target_freeze: float = 0.1  # copying goes on until the predicted freeze is this short
    fixed_freeze: float = 0.06  # what a freeze costs beside copying: hold, last scan, dump
    assumed_throughput: float = 200e6  # bytes per second, until a round has measured it
    rounds_max: int = 30
    stalled_rounds: int = 3  # so many rounds in a row ...
    stalled_gain: float = 0.1  # ... that did not cut what is left by this share: more rounds are no use
    restore_reserve: float = 5.0  # for the target's restore and the hand-over, before the node dies
    reserve: float = 10.0  # kept free besides, as long as there is a choice
    step_seconds: float = 5.0  # for a step that should take milliseconds
    orphan_seconds: float = 60.0  # for a CRIU without its runc to end: killed, it leaves the processes unsound
    offer_seconds: float = 15.0  # for the target to prepare
    dump_seconds: float = 10.0  # for a dump, beside its copying
    restore_seconds: float = 20.0  # for the target to restore and take over, before the source wants it back
    fill_seconds: float = 60.0  # between looks at whether the pager has filled every page
    hibernate_seconds: float = 15.0  # what a hibernation is taken to leave; AWS promises nothing
    pause_min: float = 0.1  # between tries of what must not be given up; doubles up to
    pause_max: float = 2.0
    moves: int = 4  # tries of one workload's move within one notice; the last is by stop-and-copy
    retry_pause: float = 2.0  # before the second try; as much longer before each further one
    tries: int = 5  # of what may be given up in the end


def predicted_freeze(written_bytes: int, throughput: float, limits: Limits) -> float:
    """Return how long a freeze that begins now would last, in seconds, up to END."""
    return limits.fixed_freeze + written_bytes / max(throughput, 1.0)


def last_call(deadline: float, freeze_seconds: float, limits: Limits) -> float:
    """Return when a freeze of that length must have begun: later, the node dies first and all is lost with it."""
    return deadline - limits.restore_reserve - freeze_seconds


def latest_safe_freeze(deadline: float, freeze_seconds: float, limits: Limits) -> float:
    """Return when a freeze of that length should begin at the latest: the reserve is still whole."""
    return last_call(deadline, freeze_seconds, limits) - limits.reserve


def pause(attempts: int, limits: Limits) -> float:
    """Return how long to wait before try number `attempts` + 1."""
    return float(min(limits.pause_max, limits.pause_min * 2 ** min(attempts, ATTEMPTS_MAX)))

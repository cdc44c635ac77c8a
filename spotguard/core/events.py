"""What happened, as data. `now` is this machine's monotonic clock in seconds."""

from dataclasses import dataclass
from enum import StrEnum

from spotguard.core.ownership import Answer
from spotguard.core.state import Mode, Move, Outcome, Record


class FailureKind(StrEnum):
    """How a machine must react to a failed command."""

    GIVE_UP = "give-up"
    DEADLINE = "deadline"
    AMBIGUOUS = "ambiguous"  # it may have taken effect
    CANCELLED = "cancelled"
    TRACKER_UNAVAILABLE = "tracker-unavailable"  # writes cannot be tracked (any more): all is copied when frozen


class Action(StrEnum):
    """What the cloud is going to do to the node."""

    TERMINATE = "terminate"
    STOP = "stop"
    HIBERNATE = "hibernate"


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    now: float


# --- results of commands; `command` is the command's name ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done(Event):
    """The command took effect."""

    command: str


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The command did not take effect, or not wholly, or nobody knows."""

    command: str
    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class OwnerAnswer(Event):
    """What the owner store said to CreateOwnership, TakeOwnership, ReclaimOwnership or ReadOwnership."""

    command: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Checked(Event):
    """Preflight's result. `memory_bytes`: what would have to be copied."""

    movable: bool
    reasons: tuple[str, ...] = ()
    deltas: bool = True
    delta_reason: str = ""
    memory_bytes: int = 0
    command: str = "Preflight"


@dataclass(frozen=True, slots=True)
class RoundCopied(Event):
    """CopyRound's result. `written_bytes`: written while it ran, so still to be copied."""

    number: int
    sent_bytes: int
    written_bytes: int
    seconds: float
    command: str = "CopyRound"


@dataclass(frozen=True, slots=True)
class TargetAnswered(Event):
    """RequestRestore's result, in the target's words; the owner record has the last word."""

    resumed: bool
    reason: str = ""
    command: str = "RequestRestore"


# --- to both sides ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TimeReached(Event):
    """A `Wake` is due."""

    tag: str


@dataclass(frozen=True, slots=True)
class AgentRestarted(Event):
    """The first event of a machine whose agent died: what the journal holds."""

    record: Record


# --- to the source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartMigration(Event):
    """Move it, by `deadline` (when the node dies)."""

    move: Move
    deadline: float
    mode: Mode = Mode.LIVE


@dataclass(frozen=True, slots=True)
class DeadlineMoved(Event):
    """The node dies at `deadline`; only a nearer one counts."""

    deadline: float


@dataclass(frozen=True, slots=True)
class NoticeWithdrawn(Event):
    """Nothing has to be moved any more (also: a person stopped the move); obeyed until the network is held."""


# --- to the target ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offered(Event):
    """A source asks to be received; `deadline`: when it may all be thrown away. `version`: the owner record's."""

    move: Move
    deadline: float
    version: str


@dataclass(frozen=True, slots=True)
class StateComplete(Event):
    """The receiver has END and every page and file that it announced."""


@dataclass(frozen=True, slots=True)
class StreamLost(Event):
    """The stream from the source broke."""

    reason: str


@dataclass(frozen=True, slots=True)
class RestoreRequested(Event):
    """The source asks to restore, take ownership and resume."""

    deadline: float


@dataclass(frozen=True, slots=True)
class AbortRequested(Event):
    """The source, or a person, wants no copy here."""

    reason: str


@dataclass(frozen=True, slots=True)
class PagerDied(Event):
    """Pages that were not filled yet cannot be had any more."""

    reason: str


# --- to the node ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """The cloud takes the node at `deadline`."""

    action: Action
    deadline: float


@dataclass(frozen=True, slots=True)
class Rebalance(Event):
    """The cloud expects to take the node some time."""


@dataclass(frozen=True, slots=True)
class Pod:
    """One thing to move: `priority` (higher first) and `memory_bytes` (smaller first) give the order."""

    workload: str
    target: str
    memory_bytes: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PodsListed(Event):
    """ListPods' result."""

    pods: tuple[Pod, ...]


@dataclass(frozen=True, slots=True)
class MoveFinished(Event):
    """A source machine finished."""

    workload: str
    outcome: Outcome


Result = Done | Failed | OwnerAnswer | Checked | RoundCopied | TargetAnswered
SourceEvent = Result | TimeReached | AgentRestarted | StartMigration | DeadlineMoved | NoticeWithdrawn
TargetEvent = (
    Done
    | Failed
    | OwnerAnswer
    | TimeReached
    | AgentRestarted
    | Offered
    | StateComplete
    | StreamLost
    | RestoreRequested
    | AbortRequested
    | PagerDied
)
NodeEvent = Notice | Rebalance | NoticeWithdrawn | PodsListed | MoveFinished | TimeReached

"""What a simulated instance says about itself: notices and plain values, in the shapes that AWS gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

DEFAULT_VALUES: Mapping[str, str] = {
    "ami-id": "ami-0abcdef1234567890",
    "instance-id": "i-0123456789abcdef0",
    "instance-life-cycle": "spot",
    "instance-type": "m6i.large",
    "placement/availability-zone": "eu-central-1a",
    "placement/availability-zone-id": "euc1-az2",
    "placement/region": "eu-central-1",
}


@dataclass(frozen=True, slots=True)
class Interruption:
    """A Spot interruption: what happens to the instance, and when (epoch seconds)."""

    action: str
    at: float


@dataclass(frozen=True, slots=True)
class ScheduledEvent:
    """A scheduled event; times in epoch seconds, None leaves the field out."""

    event_id: str
    code: str
    not_before: float
    state: str = "active"
    description: str = "scheduled maintenance"
    not_after: float | None = None
    deadline: float | None = None


class World:
    """Hold what the metadata paths say; `now` is the wall clock (epoch seconds)."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.values: dict[str, str] = dict(DEFAULT_VALUES)
        self.interruption: Interruption | None = None
        self.rebalance: float | None = None
        self.events: dict[str, ScheduledEvent] = {}
        self.lifecycle_state: str | None = "InService"

    def read(self, path: str) -> object:
        """Give what lies at a path below /latest/meta-data/: text, or something to be sent as JSON; None: not there."""
        match path:
            case "spot/instance-action" if self.interruption is not None:
                return {"action": self.interruption.action, "time": rfc3339(self.interruption.at)}
            case "spot/termination-time" if self.interruption is not None and self.interruption.action == "terminate":
                return rfc3339(self.interruption.at)
            case "events/recommendations/rebalance" if self.rebalance is not None:
                return {"noticeTime": rfc3339(self.rebalance)}
            case "events/maintenance/scheduled":
                return [_event(event) for event in self.events.values()]
            case "autoscaling/target-lifecycle-state":
                return self.lifecycle_state
            case _:
                return self.values.get(path)

    def describe(self) -> dict[str, object]:
        """Give everything that is set now, for the control interface."""
        interruption = self.interruption
        return {
            "now": rfc3339(self.now()),
            "notice": interruption and {"action": interruption.action, "time": rfc3339(interruption.at)},
            "rebalance": None if self.rebalance is None else rfc3339(self.rebalance),
            "maintenance": [_event(event) for event in self.events.values()],
            "asg": self.lifecycle_state,
            "values": dict(sorted(self.values.items())),
        }


def rfc3339(at: float) -> str:
    """Write epoch seconds as "2020-04-24T17:11:44Z", whole seconds as AWS does."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def gmt(at: float) -> str:
    """Write epoch seconds as "1 Jan 2020 01:03:47 GMT"."""
    moment = datetime.fromtimestamp(at, UTC)
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment:%Y %H:%M:%S} GMT"


def _event(event: ScheduledEvent) -> dict[str, str]:
    described = event.description
    if event.state in {"completed", "canceled"}:
        described = f"[{event.state.capitalize()}] {described}"  # as AWS marks them
    fields = {
        "NotBefore": gmt(event.not_before),
        "Code": event.code,
        "Description": described,
        "EventId": event.event_id,
        "State": event.state,
    }
    if event.not_after is not None:
        fields["NotAfter"] = gmt(event.not_after)
    if event.deadline is not None:
        fields["NotBeforeDeadline"] = gmt(event.deadline)
    return fields

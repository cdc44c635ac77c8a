"""Readers of the texts that the instance metadata service gives. Pure: bytes in, values out, ImdsGarbage otherwise.

Shapes: AWS EC2 user guide, "Spot Instance interruption notices", "EC2 instance rebalance recommendations", "Scheduled
events for your instances", "Retrieve the target lifecycle state through instance metadata". Unknown fields are
ignored. Where something says that the instance ends but not how, the answer is `terminate`: leaving a node for nothing
costs a pause, staying on one that goes costs the workload.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from handlers.notice import Action, Notice

# A shorter text than an event needs would be cut; a longer one than this is not from AWS.
TEXT_LIMIT = 256

_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.\d{1,9})?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII | re.IGNORECASE
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_GMT = re.compile(r"(\d{1,2}) ([A-Za-z]{3}) (\d{4}) (\d\d):(\d\d):(\d\d) GMT", re.ASCII)
_TOKEN = re.compile(rb"[\x21-\x7e]{1,1024}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,127}", re.ASCII)

_SPOT_ACTIONS: Mapping[str, Action] = {"terminate": "terminate", "stop": "stop", "hibernate": "hibernate"}
_MAINTENANCE_ACTIONS: Mapping[str, Action] = {
    "instance-reboot": "reboot",
    "system-reboot": "reboot",
    "system-maintenance": "maintenance",
    "instance-stop": "stop",
    "instance-retirement": "terminate",
}
# None: a state in which the instance goes on.
_ASG_ACTIONS: Mapping[str, Action | None] = {
    "InService": None,
    "Standby": None,
    "Detached": None,
    "Warmed:Running": None,
    "Warmed:Stopped": "stop",
    "Warmed:Hibernated": "hibernate",
    "Warmed:Terminated": "terminate",
    "Terminated": "terminate",
}


class ImdsGarbage(Exception):  # noqa: N818 - named after what came
    """The metadata service answered with something that it never gives."""


@dataclass(frozen=True, slots=True)
class SpotAction:
    """Hold spot/instance-action as it was read; `at` is None when the time in it is unreadable."""

    action: Action
    at: float | None
    raw: str


def parse_instance_action(body: bytes) -> SpotAction:
    """Read spot/instance-action. An unknown action is `terminate`; an unreadable time does not hide the action."""
    fields = _object(_json(body))
    raw = _text(fields, "action")
    if not raw:
        raise ImdsGarbage("instance-action without an action")
    return SpotAction(_SPOT_ACTIONS.get(raw.lower(), "terminate"), _time_or_none(fields.get("time")), raw)


def parse_termination_time(body: bytes) -> float:
    """Read spot/termination-time: epoch seconds."""
    return parse_rfc3339(_decode(body).strip())


def parse_rebalance(body: bytes) -> tuple[Notice, ...]:
    """Read events/recommendations/rebalance. It names no end: `at` is None, `since` is its time."""
    fields = _object(_json(body))
    since = parse_rfc3339(_text(fields, "noticeTime"))
    return (Notice("rebalance", "advise", None, "imds", "rebalance", since=since),)


def parse_maintenance(body: bytes) -> tuple[Notice, ...]:
    """Read events/maintenance/scheduled: one notice per event that is neither completed nor canceled.

    One unreadable event makes the whole answer garbage: half a list would look like withdrawals.
    """
    events = _json(body)
    if not isinstance(events, list):
        raise ImdsGarbage("the scheduled events are no list")
    notices = tuple(_maintenance_event(_object(event)) for event in cast("list[object]", events))
    return tuple(notice for notice in notices if notice is not None)


def _maintenance_event(fields: Mapping[str, object]) -> Notice | None:
    event_id, code = _text(fields, "EventId"), _text(fields, "Code")
    if not _NAME.fullmatch(event_id) or not _NAME.fullmatch(code):
        raise ImdsGarbage("a scheduled event without a readable EventId or Code")
    at = parse_gmt(_text(fields, "NotBefore"))
    if _text(fields, "State", "active").lower() in {"completed", "canceled", "cancelled"}:
        return None
    action = _MAINTENANCE_ACTIONS.get(code, "terminate")
    detail = f"{code}: {_text(fields, 'Description', '')}"
    return Notice("maintenance", action, at, "imds", f"maintenance/{event_id}", detail=detail)


def parse_target_lifecycle_state(body: bytes) -> tuple[Notice, ...]:
    """Read autoscaling/target-lifecycle-state. A state that AWS does not document is garbage, not a reason to leave."""
    state = _decode(body).strip()
    if state not in _ASG_ACTIONS:
        raise ImdsGarbage(f"unknown lifecycle state {state[:TEXT_LIMIT]!r}")
    action = _ASG_ACTIONS[state]
    return () if action is None else (Notice("asg", action, None, "imds", "asg", detail=state),)


def parse_name(body: bytes) -> str:
    """Read a short bare word: an instance id, an instance type, a zone."""
    name = _decode(body).strip()
    if not _NAME.fullmatch(name):
        raise ImdsGarbage(f"no name: {name[:TEXT_LIMIT]!r}")
    return name


def parse_token(body: bytes) -> str:
    """Read a session token; it goes into a header, so nothing but visible ASCII is let through."""
    token = body.strip()
    if not _TOKEN.fullmatch(token):
        raise ImdsGarbage("no token")
    return token.decode("ascii")


def parse_rfc3339(text: str) -> float:
    """Read "2020-04-24T17:11:44Z": epoch seconds."""
    if not _RFC3339.fullmatch(text):
        raise ImdsGarbage(f"no RFC 3339 time: {text[:TEXT_LIMIT]!r}")
    try:
        return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError) as error:
        raise ImdsGarbage(f"no such time: {text!r}") from error


def parse_gmt(text: str) -> float:
    """Read "1 Jan 2020 01:03:47 GMT": epoch seconds. The months are English whatever the locale."""
    match = _GMT.fullmatch(text)
    if not match or match[2].lower() not in _MONTHS:
        raise ImdsGarbage(f"no time: {text[:TEXT_LIMIT]!r}")
    month = _MONTHS.index(match[2].lower()) + 1
    try:
        moment = datetime(int(match[3]), month, int(match[1]), int(match[4]), int(match[5]), int(match[6]), tzinfo=UTC)
    except ValueError as error:
        raise ImdsGarbage(f"no such time: {text!r}") from error
    return moment.timestamp()


def _time_or_none(value: object) -> float | None:
    if not isinstance(value, str):
        return None
    try:
        return parse_rfc3339(value)
    except ImdsGarbage:
        return None


def _decode(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ImdsGarbage("not UTF-8") from error


def _json(body: bytes) -> object:
    try:
        return cast("object", json.loads(_decode(body)))
    except (ValueError, RecursionError) as error:
        raise ImdsGarbage("not JSON") from error


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ImdsGarbage("not a JSON object")
    return cast("dict[str, object]", value)


def _text(fields: Mapping[str, object], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise ImdsGarbage(f"{name} is no text")
    # Descriptions end in logs and reports: one line, nothing that a terminal would obey.
    return "".join(char if char.isprintable() else "?" for char in value[:TEXT_LIMIT])

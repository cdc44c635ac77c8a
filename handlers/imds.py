"""Polls the instance metadata service for everything that announces the end of this instance.

Each kind of notice has a loop of its own, so that one stalled answer delays nothing else. A failed read is reported to
the observer, and the next one comes within the interval: there is no longer back-off, for a notice must be found within
about two seconds of the service coming back. (At five requests a second the service's limit is far away.)
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from handlers.imds_client import DEFAULT_ENDPOINTS, ImdsClient, ImdsUnavailable, Reason
from handlers.imds_parse import (
    ImdsGarbage,
    SpotAction,
    parse_instance_action,
    parse_maintenance,
    parse_name,
    parse_rebalance,
    parse_target_lifecycle_state,
    parse_termination_time,
)
from handlers.notice import Kind, Notice, NoticeBook, NoticeEvent

INSTANCE_ACTION = "spot/instance-action"
TERMINATION_TIME = "spot/termination-time"
REBALANCE = "events/recommendations/rebalance"
MAINTENANCE = "events/maintenance/scheduled"
LIFECYCLE_STATE = "autoscaling/target-lifecycle-state"
TOKEN = "api/token"  # noqa: S105 - what a failure is about

# What is read as it stands; spot has two paths and is put together in spot_notices.
_PLAIN: tuple[tuple[Kind, str, Callable[[bytes], tuple[Notice, ...]]], ...] = (
    ("rebalance", REBALANCE, parse_rebalance),
    ("maintenance", MAINTENANCE, parse_maintenance),
    ("asg", LIFECYCLE_STATE, parse_target_lifecycle_state),
)
_IDENTITY = ("instance-id", "instance-type", "placement/availability-zone")

_jitter = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Identity:
    """Name the instance that the poller runs on."""

    instance_id: str
    instance_type: str
    zone: str


@dataclass(frozen=True, slots=True)
class ImdsFailure:
    """Say why one read failed. `resource` and `reason` are from small fixed sets (metric labels), `message` is not."""

    resource: str
    reason: Reason
    message: str


class Observer(Protocol):
    """What the poller tells about itself; called from its loops, so it must neither block nor raise."""

    def imds_read(self, resource: str, seconds: float) -> None:
        """Take note of a read that got an answer (404 is one), `seconds` after it was begun."""

    def imds_failed(self, failure: ImdsFailure) -> None:
        """Take note of a read that failed."""


class _Failed:
    """A read that says nothing about what is there."""


_FAILED = _Failed()
type _Outcome[T] = T | Literal[None] | _Failed


class ImdsPoller:
    """Watch this instance's metadata and give what is new.

    `interval`: seconds from the start of a read to the start of the next, varied by a tenth either way. `timeout`:
    seconds that a read may take in all. `now`: the wall clock (epoch seconds), put into `Notice.seen`. The times in
    the notices are AWS's own: making deadlines of them is the caller's part.
    """

    def __init__(
        self,
        *,
        now: Callable[[], float],
        observer: Observer,
        endpoints: tuple[str, ...] = DEFAULT_ENDPOINTS,
        interval: float = 1.0,
        timeout: float = 1.0,
        token_ttl: int = 21600,
        absences: int = 2,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = ImdsClient(endpoints, timeout=timeout, token_ttl=token_ttl, monotonic=monotonic)
        self._now = now
        self._observer = observer
        self._interval = interval
        self._book = NoticeBook(absences=absences)
        self.identity: Identity | None = None

    async def run(self, on_event: Callable[[NoticeEvent], None]) -> None:
        """Poll until cancelled. `on_event` runs in the event loop and must not block; what it raises ends `run`."""
        async with self._client, asyncio.TaskGroup() as group:
            group.create_task(self._watch("spot", self._read_spot, on_event), name="imds-spot")
            for kind, path, parse in _PLAIN:
                group.create_task(self._watch(kind, self._reader(path, parse), on_event), name=f"imds-{kind}")
            group.create_task(self._every_interval(self._renew_token), name="imds-token")
            group.create_task(self._identify(), name="imds-identity")

    async def _watch(
        self,
        kind: Kind,
        read: Callable[[], Awaitable[tuple[Notice, ...] | _Failed]],
        on_event: Callable[[NoticeEvent], None],
    ) -> None:
        async def look() -> None:
            notices = await read()
            if isinstance(notices, _Failed):
                return
            seen = self._now()
            for event in self._book.observe(kind, [replace(notice, seen=seen) for notice in notices]):
                on_event(event)

        await self._every_interval(look)

    async def _every_interval(self, action: Callable[[], Awaitable[None]]) -> None:
        while True:
            started = time.monotonic()
            await action()
            pause = self._interval * _jitter.uniform(0.9, 1.1)
            await asyncio.sleep(max(0.0, started + pause - time.monotonic()))

    def _reader(
        self, path: str, parse: Callable[[bytes], tuple[Notice, ...]]
    ) -> Callable[[], Awaitable[tuple[Notice, ...] | _Failed]]:
        async def read() -> tuple[Notice, ...] | _Failed:
            notices = await self._read(path, parse)
            return () if notices is None else notices

        return read

    async def _read_spot(self) -> tuple[Notice, ...] | _Failed:
        """Read both spot paths at once; the second counts only where the first does not give action and time."""
        async with asyncio.TaskGroup() as group:
            fallback = group.create_task(self._read(TERMINATION_TIME, parse_termination_time))
            action = await self._read(INSTANCE_ACTION, parse_instance_action)
            if isinstance(action, SpotAction) and action.at is not None:
                fallback.cancel()
                return spot_notices(action, None, self._book.current("spot"))
        return spot_notices(action, fallback.result(), self._book.current("spot"))

    async def _read[T](self, path: str, parse: Callable[[bytes], T]) -> _Outcome[T]:
        started = time.monotonic()
        try:
            body = await self._client.get(path)
            outcome = None if body is None else parse(body)
        except ImdsUnavailable as error:
            self._observer.imds_failed(ImdsFailure(path, error.reason, str(error)))
            return _FAILED
        except ImdsGarbage as error:
            self._observer.imds_failed(ImdsFailure(path, "garbage", str(error)))
            return _FAILED
        self._observer.imds_read(path, time.monotonic() - started)
        return outcome

    async def _renew_token(self) -> None:
        if not self._client.refresh_due:
            return
        try:
            await self._client.renew()
        except ImdsUnavailable as error:
            self._observer.imds_failed(ImdsFailure(TOKEN, error.reason, str(error)))

    async def _identify(self) -> None:
        names: dict[str, str] = {}
        while True:
            for path in _IDENTITY:
                if path not in names and isinstance(name := await self._read(path, parse_name), str):
                    names[path] = name
            if len(names) == len(_IDENTITY):
                self.identity = Identity(*(names[path] for path in _IDENTITY))
                return
            await asyncio.sleep(self._interval)


def spot_notices(
    action: _Outcome[SpotAction], termination: _Outcome[float], known: Notice | None
) -> tuple[Notice, ...] | _Failed:
    """Make one notice of the two spot paths.

    The action comes from instance-action; termination-time alone means `terminate`. What is `known` already is not
    made poorer by a half answer: neither its time nor its action is lost. A failed read never counts as absence.
    """
    time_there = termination if isinstance(termination, float) else None
    if isinstance(action, SpotAction):
        at = action.at if action.at is not None else time_there
        if at is None and known is not None and known.action == action.action:
            at = known.at
        return (Notice("spot", action.action, at, "imds", "spot", detail=f"instance-action {action.raw}"),)
    if time_there is not None:
        if known is not None and known.at == time_there:
            return (known,)
        return (Notice("spot", "terminate", time_there, "imds", "spot", detail="termination-time"),)
    if action is None and termination is None:
        return ()
    return _FAILED

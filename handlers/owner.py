"""Who owns a workload during a migration: a record outside both nodes, changed once by compare-and-swap.

Safety rests on how the answers are read, so they are split by reaction:

* a record, or `Conflict(current)`: certain; obey `current.owner`.
* `StoreUnreachable`, `NotFound`, `Refused`: certainly nothing was changed by this call.
* `OwnerUnknown`: the change may have happened, or may still happen when a delayed request arrives. Stay frozen and
  read. Only `target` and `reclaimed` are answers then; `source` means "not decided yet": swap again.

Neither an absent record nor an error ever means "mine".
"""

import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self, cast, get_args

import aiohttp
import tenacity

from handlers.errors import Ambiguous, GiveUp, HandlerError, Retry
from handlers.https import Answer, Https, NotSent, Unanswered, words

Owner = Literal["source", "target", "reclaimed"]
NewOwner = Literal["target", "reclaimed"]

MAX_BODY = 16 << 10  # bytes; a record has a few hundred
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class OwnerError(HandlerError):
    """Base of what an owner store answers instead of a record."""


class NotFound(OwnerError, GiveUp):  # noqa: N818 - named after the answer
    """There is no such record. Nothing was changed."""


class Refused(OwnerError, GiveUp):  # noqa: N818 - named after the answer
    """The store will never do this for this caller. Nothing was changed; trying again is useless."""


class StoreUnreachable(OwnerError, Retry):  # noqa: N818 - named after the answer
    """The request never left this machine, or it only wanted to read. Nothing was changed; try again."""


class OwnerUnknown(OwnerError, Ambiguous):  # noqa: N818 - named after the answer
    """The request may have taken effect, now or later: stay frozen and read."""


class Conflict(OwnerError):  # noqa: N818 - named after the answer
    """The record is not what the caller thought. `current`: what it is; this call changed nothing."""

    def __init__(self, current: "OwnerRecord") -> None:
        super().__init__(f"owner of {current.migration} is {current.owner} at version {current.version}")
        self.current = current


@dataclass(frozen=True)
class OwnerRecord:
    """One migration's owner.

    `migration`: its identifier. `source`, `target`: names of nodes. `address`: the pod's IP address. `version`: opaque,
    changes with every change (Kubernetes calls it resourceVersion); empty in a record that is not stored yet.
    """

    migration: str
    workload: str
    source: str
    target: str
    owner: Owner
    address: str
    version: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the record as an object of strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `to_json` wrote; raises ValueError for anything else."""
        if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
            raise ValueError("an owner record has exactly the fields " + ", ".join(cls.__dataclass_fields__))
        if not all(isinstance(text, str) and len(text) <= 512 for text in value.values()):
            raise ValueError("the fields of an owner record are strings of at most 512 characters")
        record = cls(**value)
        if record.owner not in get_args(Owner):
            raise ValueError(f"owner '{record.owner}' is none of " + ", ".join(get_args(Owner)))
        if not valid_migration(record.migration):
            raise ValueError(f"'{record.migration}' is no migration identifier")
        return record


def valid_migration(migration: str) -> bool:
    """Tell whether this can be a migration's identifier: it also has to fit into a path."""
    return _ID.match(migration) is not None


def may_swap(record: OwnerRecord, new_owner: str, by: str) -> str:
    """Say why node `by` may not change the owner to `new_owner`, empty when it may.

    Each side moves only its own way: the source reclaims, the target takes. Nobody moves back; that an owner other
    than `source` is final is a conflict, not a question of permission, and is not answered here.
    """
    allowed = {"target": record.target, "reclaimed": record.source}
    if new_owner not in allowed:
        return f"'{new_owner}' is no new owner: target or reclaimed"
    return "" if by == allowed[new_owner] else f"node '{by}' may not make the owner '{new_owner}'"


class OwnerStore(Protocol):
    """What a migration needs of the owner store, be it ours or Kubernetes. `deadline`: of `time.monotonic()`."""

    async def create(self, record: OwnerRecord, deadline: float) -> OwnerRecord:
        """Store a new record with owner `source`; again with the same fields is no error while nothing changed.

        Returns it with its version. Raises Conflict, Refused, StoreUnreachable, OwnerUnknown.
        """

    async def read(self, migration: str, deadline: float) -> OwnerRecord:
        """Return the latest record. Raises NotFound, Refused, StoreUnreachable."""

    async def compare_and_swap(self, migration: str, version: str, new_owner: NewOwner, deadline: float) -> OwnerRecord:
        """Change the owner if the record still has `version` and is undecided; return it with its new version.

        Raises Conflict, NotFound, Refused, StoreUnreachable, OwnerUnknown.
        """

    def watch(self) -> AsyncIterator[OwnerRecord]:
        """Yield every record as it is now, then every change, in order.

        Raises StoreUnreachable when the stream ends or falls silent: watch again (see `follow`) to be up to date.
        """

    async def delete(self, migration: str, deadline: float) -> None:
        """Remove a record; only its present owner may. An absent one is no error.

        Raises Refused, StoreUnreachable, OwnerUnknown.
        """


class HttpOwnerStore:
    """The owner store of `spotguard owner-store`, over HTTPS with certificates on both sides.

    `url`: https://HOST:PORT. `context`: see https.Https; with it `server_name`, the name in the store's certificate, is
    checked before a request is sent. `silence_s`: how long a watch may be without a sign of life. Use as an async
    context manager.
    """

    def __init__(self, url: str, context: ssl.SSLContext, server_name: str, *, silence_s: float = 10.0) -> None:
        self._url = url.rstrip("/")
        self._https = Https(context)
        self._server_name = server_name
        self._silence_s = silence_s

    async def __aenter__(self) -> Self:
        await self._https.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._https.__aexit__(kind, error, trace)

    async def warm(self, deadline: float) -> float:
        """Open the connection that the next call will use, or prove that it is alive; return the round trip in seconds.

        Call it shortly before the freeze: a swap then costs one round trip and no handshake. Raises StoreUnreachable.
        """
        start = time.monotonic()
        await self._call("GET", "/healthz", deadline)
        return time.monotonic() - start

    async def create(self, record: OwnerRecord, deadline: float) -> OwnerRecord:
        """Store a new record; see OwnerStore."""
        body = record.to_json()
        return _record(await self._call("PUT", _path(record.migration), deadline, body), record.migration, "source")

    async def read(self, migration: str, deadline: float) -> OwnerRecord:
        """Return the latest record; see OwnerStore."""
        answer = await self._call("GET", _path(migration), deadline)
        try:
            return _record(answer, migration)
        except OwnerUnknown as error:
            raise StoreUnreachable(str(error)) from error

    async def compare_and_swap(self, migration: str, version: str, new_owner: NewOwner, deadline: float) -> OwnerRecord:
        """Change the owner; see OwnerStore."""
        body = {"version": version, "owner": new_owner}
        return _record(await self._call("POST", f"{_path(migration)}/owner", deadline, body), migration, new_owner)

    async def delete(self, migration: str, deadline: float) -> None:
        """Remove a record; see OwnerStore."""
        try:
            await self._call("DELETE", _path(migration), deadline)
        except NotFound:
            return

    async def watch(self) -> AsyncIterator[OwnerRecord]:
        """Yield records; see OwnerStore. Deletions are not reported."""
        try:
            async with self._https.stream(f"{self._url}/v1/watch", self._server_name, self._silence_s) as answer:
                if answer.status != 200:
                    raise StoreUnreachable(f"the owner store answered {answer.status} to a watch")
                while line := await answer.content.readline():
                    record = _change(line)
                    if record is not None:
                        yield record
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
            raise StoreUnreachable(f"watching the owner store broke off: {words(error)}") from error
        raise StoreUnreachable("the owner store ended the watch")

    async def _call(
        self, method: str, path: str, deadline: float, body: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        """Send one request and return the object in its answer; every failure becomes one of the errors above."""
        what = f"owner store, {method} {path}"
        try:
            answer = await self._https.ask(
                method, self._url + path, self._server_name, deadline, body=body, max_answer=MAX_BODY
            )
            return _answer(answer)
        except NotSent as error:
            raise StoreUnreachable(f"{what}: {error}") from error
        except (Unanswered, ValueError) as error:
            # A read changes nothing at any time.
            raise (StoreUnreachable if method == "GET" else OwnerUnknown)(f"{what}: {error}") from error


async def follow(
    store: OwnerStore,
    apply: Callable[[OwnerRecord], Awaitable[None]],
    trouble: Callable[[BaseException], None] = lambda _: None,
) -> None:
    """Watch for ever: give every record to `apply`, watch again when the stream breaks. Ends only by cancellation.

    After each break all records come again, so `apply` must bear repeats. `trouble`: told of each break.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            trouble(error)

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(StoreUnreachable), wait=tenacity.wait_random(0.1, 0.5), before_sleep=tell
    )
    async for attempt in retrying:
        with attempt:
            # aclosing: the connection is given back at once, not when the generator is collected.
            async with aclosing(cast("Any", store.watch())) as records:
                async for record in records:
                    await apply(record)
            raise StoreUnreachable("the watch ended")


def _path(migration: str) -> str:
    if not valid_migration(migration):
        raise ValueError(f"'{migration}' is no migration identifier")
    return f"/v1/migrations/{migration}"


def _answer(answer: Answer) -> Mapping[str, Any]:
    """Turn an answer into its object or a certain error; ValueError: it says nothing."""
    if answer.status in {200, 201}:
        return answer.body
    if answer.status == 404:
        raise NotFound(answer.reason)
    if answer.status == 409:
        raise Conflict(OwnerRecord.from_json(answer.body.get("current")))
    if 400 <= answer.status < 500:
        raise Refused(answer.reason)
    raise ValueError(f"it answered {answer.reason}")


def _record(body: Mapping[str, Any], migration: str, owner: Owner | None = None) -> OwnerRecord:
    try:
        record = OwnerRecord.from_json(body)
    except ValueError as error:
        raise OwnerUnknown(f"the owner store's answer is unreadable: {error}") from error
    if record.migration != migration or owner not in {None, record.owner}:
        raise OwnerUnknown(f"the owner store answered with {record}, asked was {migration} owned by {owner}")
    return record


def _change(line: bytes) -> OwnerRecord | None:
    """Read one line of the watch: a record, or None for a heartbeat or a deletion."""
    body = json.loads(line)
    if not isinstance(body, Mapping):
        raise ValueError("a line of the watch is no JSON object")  # noqa: TRY004 - all unreadable lines alike
    return OwnerRecord.from_json(body["record"]) if "record" in body else None

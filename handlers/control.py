"""The control API of another node's agent: offer a workload, have it restored, hand on frames, give up.

Machines' clocks differ, so times travel as seconds that are left and become deadlines where they arrive. Errors by
reaction: `Refused` (the target says no, and why), `Unreachable` (the target cannot have read it), `Unknown` (it may
have done it: the owner record has the last word).
"""

import asyncio
import math
import platform
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from uuid import UUID

from handlers.errors import Ambiguous, GiveUp, Retry
from handlers.https import Answer, Https, NotSent, Unanswered

PROTOCOL = 1
MAX_OFFER = 1 << 20  # bytes of JSON
MAX_FRAMES = 4 << 20  # bytes of one block
MAX_ANSWER = 64 << 10
MAX_TIME_LEFT_S = 3600.0


class Refused(GiveUp):
    """The target says no; the message is its reason. It has nothing of this request."""


class Unreachable(Retry):
    """The target cannot have read the request, or says that it did nothing yet."""


class Unknown(Ambiguous):
    """The target may have done what was asked."""


class Limits(Protocol):
    """What a source announces at most, in bytes."""

    @property
    def max_memory(self) -> int:
        """Pages."""

    @property
    def max_images(self) -> int:
        """CRIU's images."""

    @property
    def max_files(self) -> int:
        """Contents of files."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a restore needs of a machine. `cpu_features`: as /proc/cpuinfo names them, sorted."""

    arch: str
    kernel: str
    cpu_features: tuple[str, ...]

    @classmethod
    def here(cls, cpuinfo: Path = Path("/proc/cpuinfo")) -> Self:
        """Describe this machine ("flags" on x86, "Features" on arm64; of the first processor)."""
        lines = cpuinfo.read_text("utf-8").splitlines()
        found = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
        return cls(platform.machine(), platform.release(), tuple(sorted(found.partition(":")[2].split())))

    def cannot_run(self, other: Self) -> str:
        """Say why a process of machine `other` cannot go on here, empty when it can.

        A process may have found any feature of its processor and keep on using it. The kernel may differ: CRIU checks
        what it needs of it.
        """
        if self.arch != other.arch:
            return f"this machine is {self.arch}, the source is {other.arch}"
        missing = sorted(set(other.cpu_features) - set(self.cpu_features))
        return f"this machine's processor lacks {', '.join(missing[:20])}" if missing else ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A workload that wants to come. `workload`: its manifest, an object of the runtime's making.

    `max_*`: bytes at most. `owner_version`: of the owner record, for the target's swap. `expires_in_s`: after these
    seconds the target may throw away what it has prepared.
    """

    migration: str
    source: str
    workload: Mapping[str, Any]
    max_memory: int
    max_images: int
    max_files: int
    owner_version: str
    expires_in_s: float
    mode: str = "auto"
    machine: Machine = field(default_factory=Machine.here)

    @classmethod
    def new(
        cls,
        *,
        migration: str,
        source: str,
        workload: Mapping[str, Any],
        limits: Limits,
        version: str,
        expires: float,
        mode: str = "auto",
    ) -> Self:
        """Build an offer of this machine; `expires`: a deadline."""
        return cls(
            migration=migration,
            source=source,
            workload=workload,
            max_memory=limits.max_memory,
            max_images=limits.max_images,
            max_files=limits.max_files,
            owner_version=version,
            expires_in_s=max(0.0, expires - time.monotonic()),
            mode=mode,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the offer as a JSON object."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "machine": asdict(self.machine)}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read what `to_json` wrote; raises ValueError saying what is wrong."""
        data = _fields(value, cls, "offer")
        machine = _fields(data["machine"], Machine, "machine")
        features = machine["cpu_features"]
        if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
            raise ValueError("machine.cpu_features is no list of words")
        if not isinstance(data["workload"], Mapping):
            raise ValueError("offer.workload is no object")  # noqa: TRY004 - all unreadable offers alike
        UUID(_text(data, "migration"))
        return cls(
            migration=_text(data, "migration"),
            source=_text(data, "source"),
            workload=data["workload"],
            max_memory=_count(data, "max_memory"),
            max_images=_count(data, "max_images"),
            max_files=_count(data, "max_files"),
            owner_version=_text(data, "owner_version"),
            expires_in_s=time_left(data, "expires_in_s"),
            mode=_text(data, "mode"),
            machine=Machine(_text(machine, "arch"), _text(machine, "kernel"), tuple(features)),
        )


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """Where the target's receiver listens for the stream."""

    stream_host: str
    stream_port: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an answer; raises ValueError."""
        port = _count(data, "stream_port")
        if not 1 <= port <= 65535:
            raise ValueError(f"stream_port is {port}")
        return cls(_text(data, "stream_host"), port)


@dataclass(frozen=True, slots=True)
class RestoreAnswer:
    """How a restore ended. `timings`: seconds by step."""

    outcome: Literal["resumed", "failed"]
    reason: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def resumed(self) -> bool:
        """Tell whether the workload runs on the target."""
        return self.outcome == "resumed"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an answer; raises ValueError."""
        outcome, timings = data.get("outcome"), data.get("timings")
        if outcome not in ("resumed", "failed") or not isinstance(timings, Mapping):
            raise ValueError(f"'{str(outcome)[:100]}' is no outcome")
        if not all(isinstance(value, int | float) for value in timings.values()):
            raise ValueError("timings are no numbers")
        return cls(outcome, _text(data, "reason"), {str(step): float(value) for step, value in timings.items()})


class ControlClient:
    """Talks to the agents of other nodes. `addresses`: host and port by node name.

    The node's name is checked against the server's certificate before a request is sent. Use as an async context
    manager. All methods take a deadline and raise Refused, Unreachable, Unknown.
    """

    def __init__(
        self, context: ssl.SSLContext, addresses: Mapping[str, tuple[str, int]], agent_version: str = ""
    ) -> None:
        self._https = Https(context)
        self._addresses = dict(addresses)
        self._agent_version = agent_version

    async def __aenter__(self) -> Self:
        await self._https.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._https.__aexit__(kind, error, trace)

    def address_of(self, node: str) -> str:
        """Return a node's address; raises Refused for one that is no peer."""
        return self._address(node)[0]

    async def warm(self, node: str, deadline: float) -> None:
        """Open two connections to `node` for what comes: one for the restore, one for frames that go on meanwhile.

        Call it shortly before the freeze, which then holds no handshake.
        """
        await asyncio.gather(*(self._ask(node, "GET", "", deadline, read=dict) for _ in range(2)))

    async def offer(self, node: str, offer: Offer, deadline: float) -> OfferAnswer:
        """Ask `node` to prepare for a workload."""
        body = {**self._head(deadline), "offer": offer.to_json()}
        return await self._ask(node, "POST", "", deadline, read=OfferAnswer.from_json, body=body)

    async def restore(self, node: str, migration: str, deadline: float) -> RestoreAnswer:
        """Ask `node` to restore what it has received, to take it over and let it run."""
        path = f"/{migration}/restore"
        return await self._ask(node, "POST", path, deadline, read=RestoreAnswer.from_json, body=self._head(deadline))

    async def frames(self, node: str, migration: str, block: bytes, deadline: float) -> None:
        """Give `node` a block of frames (MAX_FRAMES bytes at most) that were held for the workload."""
        if len(block) > MAX_FRAMES:
            raise Refused(f"a block of frames has {len(block)} bytes; at most {MAX_FRAMES} are allowed")
        await self._ask(node, "POST", f"/{migration}/frames", deadline, read=dict, body=block)

    async def status(self, node: str, migration: str, deadline: float) -> dict[str, Any]:
        """Ask where a migration stands on `node`."""
        return await self._ask(node, "GET", f"/{migration}", deadline, read=dict)

    async def abort(self, node: str, migration: str, deadline: float) -> None:
        """Tell `node` that the workload will not come; one that it does not know is no error."""
        await self._ask(node, "DELETE", f"/{migration}", deadline, read=dict)

    def _head(self, deadline: float) -> dict[str, Any]:
        left = min(max(0.0, deadline - time.monotonic()), MAX_TIME_LEFT_S)
        return {"protocol": PROTOCOL, "agent": self._agent_version, "time_left_s": left}

    async def _ask[T](
        self,
        node: str,
        method: str,
        path: str,
        deadline: float,
        *,
        read: Callable[[Mapping[str, Any]], T],
        body: object = None,
    ) -> T:
        host, port = self._address(node)
        url = f"https://{f'[{host}]' if ':' in host else host}:{port}/v1/migrations{path}"
        try:
            answer = await self._https.ask(method, url, node, deadline, body=body, max_answer=MAX_ANSWER)
            return read(_good(answer))
        except NotSent as error:
            raise Unreachable(f"{node}, {method} {path}: {error}") from error
        except (Unanswered, ValueError) as error:
            raise Unknown(f"{node}, {method} {path}: {error}") from error

    def _address(self, node: str) -> tuple[str, int]:
        if node not in self._addresses:
            raise Refused(f"node '{node}' is none of this node's peers (setting peers)")
        return self._addresses[node]


def _good(answer: Answer) -> Mapping[str, Any]:
    """Return what an answer carries, or raise what it means; ValueError: it says nothing certain."""
    if answer.status in {200, 201}:
        return answer.body
    if 400 <= answer.status < 500:
        raise Refused(str(answer.body.get("reason", answer.status))[:1000])
    if answer.status == 503:
        raise Unreachable(answer.reason)
    raise ValueError(f"it answered {answer.reason}")


def time_left(data: Mapping[str, Any], name: str) -> float:
    """Read a number of seconds from 0 to MAX_TIME_LEFT_S; raises ValueError."""
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is no number")
    if not 0 <= value <= MAX_TIME_LEFT_S:
        raise ValueError(f"{name} is {value}; expected 0 to {MAX_TIME_LEFT_S:g} seconds")
    return float(value)


def _fields(value: object, cls: type[Any], name: str) -> Mapping[str, Any]:
    wanted = {f.name for f in fields(cls)}
    if not isinstance(value, Mapping) or set(value) != wanted:
        raise ValueError(f"{name} has not exactly the fields {', '.join(sorted(wanted))}")
    return value


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{name} is no text of at most 1000 characters")
    return value


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{name} is no whole number of at least 0")
    return value

"""What both machines share: the move, its phases and outcomes, and the record that survives a crash."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

RECORD_FORMAT = 1
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_WORKLOAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,511}")


class RecordError(ValueError):
    """A journal record is not one that this version may act upon: a person has to look at it."""


class Role(StrEnum):
    """Which side of a move an agent plays."""

    SOURCE = "source"
    TARGET = "target"


class Mode(StrEnum):
    """How the memory gets across: most of it while running, or all of it while frozen."""

    LIVE = "live"
    STOP_AND_COPY = "stop-and-copy"


class Outcome(StrEnum):
    """How one side's part of a move ended."""

    MOVED = "moved"
    MOVED_BY_STOP_AND_COPY = "moved-by-stop-and-copy"
    ROLLED_BACK = "rolled-back"
    LEFT_TO_EVICTION = "left-to-eviction"  # no time left; runs on untouched until it is evicted
    UNMOVABLE = "unmovable"  # nothing was touched
    RESUMED = "resumed"  # target: it runs here now
    REFUSED = "refused"  # target: the offer was not taken, nothing was touched
    DESTROYED = "destroyed"  # target: the prepared copy is gone, it never ran
    LOST = "lost"  # the owning copy was damaged and is killed: the workload starts anew from its own storage


class SourcePhase(StrEnum):
    """Where the source stands; every phase but NEW and DONE waits for the result of one command."""

    NEW = "new"
    CHECKING = "checking"
    REGISTERING = "registering"
    OFFERING = "offering"
    ATTACHING = "attaching"
    PRECOPY = "precopy"
    HOLDING = "holding"
    FREEZING = "freezing"
    DUMPING = "dumping"
    RESTORING = "restoring"
    SECURING = "securing"
    RECLAIMING = "reclaiming"
    READING_OWNER = "reading-owner"
    VERIFYING = "verifying"
    RELEASING = "releasing"
    THAWING = "thawing"
    DETACHING = "detaching"
    ABORTING = "aborting"
    FORWARDING = "forwarding"
    DESTROYING = "destroying"
    CLEANING = "cleaning"
    DONE = "done"


class TargetPhase(StrEnum):
    """Where the target stands; RECEIVING waits for the source, the others for the result of one command."""

    NEW = "new"
    ADMITTING = "admitting"
    PREPARING = "preparing"
    RECEIVING = "receiving"
    RESTORING = "restoring"
    KEEPING = "keeping"
    TAKING = "taking"
    READING_OWNER = "reading-owner"
    VERIFYING = "verifying"
    ROUTING = "routing"
    RELEASING = "releasing"
    THAWING = "thawing"
    FILLING = "filling"
    DESTROYING = "destroying"
    CLEANING = "cleaning"
    DONE = "done"


# The phases that are ever written down. Each is a promise about what has not happened yet; see source.py, target.py.
PERSISTED: dict[Role, frozenset[str]] = {
    Role.SOURCE: frozenset(
        {
            SourcePhase.REGISTERING,
            SourcePhase.HOLDING,
            SourcePhase.DUMPING,
            SourcePhase.RELEASING,
            SourcePhase.DESTROYING,
            SourcePhase.DONE,
        }
    ),
    Role.TARGET: frozenset({TargetPhase.PREPARING, TargetPhase.TAKING, TargetPhase.ROUTING, TargetPhase.DONE}),
}


@dataclass(frozen=True, slots=True)
class Move:
    """Name one workload's move from one node to another.

    `migration`, `source` and `target` are safe as file names. Raises ValueError for anything else.
    """

    migration: str
    workload: str
    source: str
    target: str

    def __post_init__(self) -> None:
        for value in (self.migration, self.source, self.target):
            if not _ID.fullmatch(value):
                raise ValueError(f"not an identifier: {value[:64]!r}")
        if not _WORKLOAD.fullmatch(self.workload) or ".." in self.workload:
            raise ValueError(f"not a workload's name: {self.workload[:64]!r}")


NOBODY = Move(migration="none", workload="none", source="none", target="none")


@dataclass(frozen=True, slots=True)
class Record:
    """Keep what a restarted agent must know of one move.

    `deadline` is of this boot's monotonic clock: the journal must throw records of an earlier boot away (every
    process that they speak of is dead then). `version` is the owner record's version as last seen.
    """

    role: Role
    move: Move
    phase: str
    mode: Mode
    deadline: float
    version: str
    outcome: Outcome | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        return {"format": RECORD_FORMAT, **asdict(self)}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Record":
        """Check every field; raises RecordError for anything that `to_json` does not give."""
        try:
            return _parse(raw)
        except (ValueError, TypeError) as error:
            raise RecordError(f"journal record refused: {error}") from error


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "role": str,
    "move": dict,
    "phase": str,
    "mode": str,
    "deadline": (int, float),
    "version": str,
    "outcome": (str, type(None)),
    "reason": str,
}


def _parse(raw: Mapping[str, Any]) -> Record:
    if not isinstance(raw, Mapping) or raw.keys() != _FIELDS.keys():
        raise ValueError("not the fields of a record")
    for name, kinds in _FIELDS.items():
        if isinstance(raw[name], bool) or not isinstance(raw[name], kinds):
            raise TypeError(f"{name} has the wrong type")
    if raw["format"] != RECORD_FORMAT:
        raise ValueError(f"format {raw['format']}, this version reads {RECORD_FORMAT}")
    deadline = _finite(raw["deadline"])
    role = Role(raw["role"])
    if raw["phase"] not in PERSISTED[role]:
        raise ValueError(f"phase {raw['phase'][:32]!r} is never persisted by a {role}")
    return Record(
        role=role,
        move=_parse_move(raw["move"]),
        phase=raw["phase"],
        mode=Mode(raw["mode"]),
        deadline=deadline,
        version=raw["version"],
        outcome=None if raw["outcome"] is None else Outcome(raw["outcome"]),
        reason=raw["reason"],
    )


def _finite(number: float) -> float:
    try:
        value = float(number)
    except OverflowError as error:
        raise ValueError("deadline is too large") from error
    if not math.isfinite(value):
        raise ValueError("deadline is not a finite number")
    return value


def _parse_move(raw: Mapping[str, Any]) -> Move:
    if raw.keys() != {"migration", "workload", "source", "target"}:
        raise ValueError("not the fields of a move")
    if not all(isinstance(value, str) for value in raw.values()):
        raise ValueError("a name is not a string")
    return Move(**raw)

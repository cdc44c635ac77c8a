"""Who owns a workload: the record outside both nodes, and how either side reads what the store answered.

The record is written once as `source`, then changes at most once, by compare-and-swap: the target swaps
`source` -> `target` when all is restored and frozen, the source swaps `source` -> `reclaimed` to roll back. So
`target` and `reclaimed` are final, and whoever reads one of them knows the end of the story. `source` is never
final: a swap whose answer was lost may still be on its way and be applied after the read. Therefore a side that
reads `source` never acts on it; it sends its own swap again, and one of the two is refused.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from spotguard.core.state import Role


class Owner(StrEnum):
    """Whose copy may run."""

    SOURCE = "source"
    TARGET = "target"
    RECLAIMED = "reclaimed"  # the source's for good; the target's swap can never succeed any more


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """What the machines need of a migration's entry in the owner store.

    `version` is opaque and changes with every write, of whatever field (Kubernetes calls it resourceVersion).
    """

    migration: str
    owner: Owner
    version: str


@dataclass(frozen=True, slots=True)
class Won:
    """The swap (or the creation) was applied."""

    record: OwnerRecord


@dataclass(frozen=True, slots=True)
class Lost:
    """The swap was refused, because the record is not what the swap expected; `record` is what it is."""

    record: OwnerRecord


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a read."""

    record: OwnerRecord


@dataclass(frozen=True, slots=True)
class Unknown:
    """Sent, but no answer came: it may have been applied, or may yet be."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Never sent: it was definitely not applied and never will be."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """The store will not do it (no such record, not permitted): this request changed nothing. Asked again all the
    same, for an earlier one may still be on its way, and a store can be mended."""

    reason: str = ""


Answer = Won | Lost | Found | Unknown | Unreachable | Refused


class Verdict(StrEnum):
    """What a side has to do now. OWN and YIELD are for ever."""

    OWN = "own"
    YIELD = "yield"
    SWAP = "swap"  # send the swap (again), with the version just read
    READ = "read"  # read at once: the swap's outcome is open
    LATER = "later"  # the store is out of reach: the same again after a pause


FINAL: dict[Role, Owner] = {Role.SOURCE: Owner.RECLAIMED, Role.TARGET: Owner.TARGET}


def resolve(side: Role, answer: Answer, *, reading: bool) -> Verdict:
    """Say what `answer` means to `side`; `reading`: it answers a read, not a swap."""
    match answer:
        case Won(record) | Lost(record) | Found(record):
            if record.owner == Owner.SOURCE:
                return Verdict.SWAP
            return Verdict.OWN if record.owner == FINAL[side] else Verdict.YIELD
        case Unknown():
            return Verdict.LATER if reading else Verdict.READ
        case Unreachable() | Refused():
            return Verdict.LATER
        case _:
            assert_never(answer)

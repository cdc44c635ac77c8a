"""Asks the owner store for a machine: the store's answers and errors become the core's."""

from collections.abc import Awaitable

from handlers import owner as store_api
from spotguard.core import commands as c
from spotguard.core.events import OwnerAnswer
from spotguard.core.ownership import (
    Answer,
    Found,
    Lost,
    Owner,
    OwnerRecord,
    Refused,
    Unknown,
    Unreachable,
    Won,
)
from spotguard.core.state import Move


class Ownership:
    """One migration's record, as one side asks for it. `now` is a monotonic clock."""

    def __init__(self, store: store_api.OwnerStore, move: Move, address: str) -> None:
        self._store = store
        self._move = move
        self._address = address

    async def perform(
        self,
        command: c.CreateOwnership | c.ReadOwnership | c.ReclaimOwnership | c.TakeOwnership,
        now: float,
    ) -> OwnerAnswer:
        """Perform an ownership command; every outcome is an answer, none an exception. `now` stamps the event."""
        return OwnerAnswer(now, command.name, await self._ask(command))

    async def _ask(self, command: c.CreateOwnership | c.ReadOwnership | c.ReclaimOwnership | c.TakeOwnership) -> Answer:
        migration = self._move.migration
        match command:
            case c.CreateOwnership():
                record = store_api.OwnerRecord(
                    migration=migration,
                    workload=self._move.workload,
                    source=self._move.source,
                    target=self._move.target,
                    owner="source",
                    address=self._address,
                )
                return await _answer(self._store.create(record, command.deadline))
            case c.ReadOwnership():
                answer = await _answer(self._store.read(migration, command.deadline))
                return Found(answer.record) if isinstance(answer, Won) else answer
            case c.ReclaimOwnership(version=version):
                swap = self._store.compare_and_swap(migration, version, "reclaimed", command.deadline)
                return await _answer(swap)
            case c.TakeOwnership(version=version):
                return await _answer(self._store.compare_and_swap(migration, version, "target", command.deadline))


async def _answer(call: Awaitable[store_api.OwnerRecord]) -> Answer:
    try:
        return Won(_record(await call))
    except store_api.Conflict as conflict:
        return Lost(_record(conflict.current))
    except store_api.OwnerUnknown as unknown:
        return Unknown(str(unknown))
    except store_api.StoreUnreachable as unreachable:
        return Unreachable(str(unreachable))
    except (store_api.NotFound, store_api.Refused) as refused:
        return Refused(str(refused))


def _record(record: store_api.OwnerRecord) -> OwnerRecord:
    return OwnerRecord(migration=record.migration, owner=Owner(record.owner), version=record.version)

"""What the owner store says, in the core's words: no outcome is an exception, none is read too well."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from handlers import owner as store_api
from spotguard.core import commands as c
from spotguard.core.events import OwnerAnswer
from spotguard.core.ownership import Found, Lost, Owner, OwnerRecord, Refused, Unknown, Unreachable, Won
from spotguard.core.state import Move
from spotguard.ownership_effects import Ownership

NOW, DEADLINE = 50.0, 60.0
MOVE = Move(migration="m-1", workload="redis", source="a", target="b")
STORED = store_api.OwnerRecord("m-1", "redis", "a", "b", "source", "10.77.1.10", "7")

type OwnershipCommand = c.CreateOwnership | c.ReadOwnership | c.ReclaimOwnership | c.TakeOwnership


class Store:
    """Answers as the test says."""

    def __init__(self, answer: store_api.OwnerRecord | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, ...]] = []

    async def create(self, record: store_api.OwnerRecord, deadline: float) -> store_api.OwnerRecord:
        return self._say("create", record, deadline)

    async def read(self, migration: str, deadline: float) -> store_api.OwnerRecord:
        return self._say("read", migration, deadline)

    async def compare_and_swap(
        self, migration: str, expected_version: str, new_owner: store_api.NewOwner, deadline: float
    ) -> store_api.OwnerRecord:
        return self._say("swap", migration, expected_version, new_owner, deadline)

    def _say(self, *asked: Any) -> store_api.OwnerRecord:
        self.asked.append(asked)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def ask(answer: store_api.OwnerRecord | Exception, command: OwnershipCommand) -> tuple[OwnerAnswer, Any]:
    store = Store(answer)
    event = await Ownership(store, MOVE, "10.77.1.10").perform(command, NOW)  # type: ignore[arg-type]  # it never watches
    assert (event.now, event.command) == (NOW, command.name)
    assert len(store.asked) == 1
    return event, store.asked[0]


def known(owner: Owner) -> OwnerRecord:
    return OwnerRecord("m-1", owner, "7")


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (c.CreateOwnership(DEADLINE), ("create", replace(STORED, version=""), DEADLINE)),
        (c.ReadOwnership(DEADLINE), ("read", "m-1", DEADLINE)),
        (c.ReclaimOwnership(DEADLINE, version="6"), ("swap", "m-1", "6", "reclaimed", DEADLINE)),
        (c.TakeOwnership(DEADLINE, version="6"), ("swap", "m-1", "6", "target", DEADLINE)),
    ],
)
async def test_what_the_store_is_asked(command: OwnershipCommand, asked: tuple[Any, ...]) -> None:
    assert (await ask(STORED, command))[1] == asked


@pytest.mark.parametrize("owner", list(Owner))
async def test_a_record_answers_a_change_as_won_and_a_read_as_found(owner: Owner) -> None:
    stored = replace(STORED, owner=owner.value)
    assert (await ask(stored, c.TakeOwnership(DEADLINE, version="6")))[0].answer == Won(known(owner))
    assert (await ask(stored, c.ReclaimOwnership(DEADLINE, version="6")))[0].answer == Won(known(owner))
    assert (await ask(stored, c.CreateOwnership(DEADLINE)))[0].answer == Won(known(owner))
    assert (await ask(stored, c.ReadOwnership(DEADLINE)))[0].answer == Found(known(owner))


@pytest.mark.parametrize("owner", list(Owner))
async def test_a_conflict_says_what_the_record_is(owner: Owner) -> None:
    conflict = store_api.Conflict(replace(STORED, owner=owner.value))
    assert (await ask(conflict, c.TakeOwnership(DEADLINE, version="6")))[0].answer == Lost(known(owner))


@pytest.mark.parametrize("command", [c.ReadOwnership(DEADLINE), c.TakeOwnership(DEADLINE, version="6")])
@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (store_api.OwnerUnknown, Unknown),
        (store_api.StoreUnreachable, Unreachable),
        (store_api.NotFound, Refused),
        (store_api.Refused, Refused),
    ],
)
async def test_errors_keep_their_meaning(
    command: OwnershipCommand, error: type[Exception], answer: Callable[[str], object]
) -> None:
    assert (await ask(error("words"), command))[0].answer == answer("words")

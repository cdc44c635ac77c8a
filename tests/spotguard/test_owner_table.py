"""The owner store's rules and its journal."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from handlers.owner import Conflict, NewOwner, NotFound, OwnerRecord, Refused
from spotguard.errors import JournalDamaged, Unavailable
from spotguard.owner_table import OwnerTable, StoreBroken

NEW = OwnerRecord(migration="m1", workload="redis", source="a", target="b", owner="source", address="10.1.0.7")


@pytest.fixture
def table(tmp_path: Path) -> Iterator[OwnerTable]:
    with closing(OwnerTable(tmp_path / "journal")) as opened:
        yield opened


def test_each_side_moves_its_own_way_once(table: OwnerTable) -> None:
    first = table.create(NEW, "a")
    assert (first.owner, first.version) == ("source", "1")
    assert table.create(NEW, "a") == first
    for owner, by in [("target", "a"), ("reclaimed", "b"), ("target", "c"), ("reclaimed", "c")]:
        with pytest.raises(Refused):
            table.swap("m1", first.version, cast("NewOwner", owner), by)
    with pytest.raises(Conflict):
        table.swap("m1", "0", "target", "b")
    taken = table.swap("m1", first.version, "target", "b")
    assert (taken.owner, taken.version) == ("target", "2")
    for version in (first.version, taken.version):
        for owner, by in [("target", "b"), ("reclaimed", "a")]:
            with pytest.raises(Conflict) as caught:
                table.swap("m1", version, cast("NewOwner", owner), by)
            assert caught.value.current == taken
    with pytest.raises(Conflict):
        table.create(NEW, "a")


def test_nobody_comes_back_and_only_the_owner_deletes(table: OwnerTable) -> None:
    first = table.create(NEW, "a")
    with pytest.raises(Refused):
        table.delete("m1", "b")
    table.swap("m1", first.version, "target", "b")
    with pytest.raises(Refused):
        table.delete("m1", "a")
    table.delete("m1", "b")
    with pytest.raises(NotFound):
        table.read("m1")
    with pytest.raises(Refused, match="was deleted"):
        table.create(NEW, "a")


def test_an_identifier_stays_deleted_after_a_restart(tmp_path: Path) -> None:
    with closing(OwnerTable(tmp_path / "journal")) as table:
        table.create(NEW, "a")
        table.delete("m1", "a")
    with closing(OwnerTable(tmp_path / "journal")) as table, pytest.raises(Refused, match="was deleted"):
        table.create(NEW, "a")


@pytest.mark.parametrize(
    ("record", "by"),
    [
        (NEW, "b"),
        (replace(NEW, owner="target"), "a"),
        (replace(NEW, owner="reclaimed"), "a"),
        (replace(NEW, target="a"), "a"),
    ],
)
def test_records_that_nobody_may_create(table: OwnerTable, record: OwnerRecord, by: str) -> None:
    with pytest.raises(Refused):
        table.create(record, by)


def test_the_number_of_migrations_is_limited(tmp_path: Path) -> None:
    with closing(OwnerTable(tmp_path / "journal", max_records=2)) as table:
        table.create(NEW, "a")
        table.delete("m1", "a")
        table.create(replace(NEW, migration="m2"), "a")
        with pytest.raises(Refused, match="names 2 migrations"):
            table.create(replace(NEW, migration="m3"), "a")


def test_a_journal_cut_at_any_byte_gives_the_state_of_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    steps: list[Callable[[OwnerTable], object]] = [
        lambda t: t.create(NEW, "a"),
        lambda t: t.create(replace(NEW, migration="m2"), "a"),
        lambda t: t.swap("m1", "1", "target", "b"),
        lambda t: t.create(replace(NEW, migration="m3"), "a"),
        lambda t: t.swap("m2", "2", "reclaimed", "a"),
        lambda t: t.delete("m1", "b"),
    ]
    states: list[list[OwnerRecord]] = [[]]
    with closing(OwnerTable(path)) as table:
        for step in steps:
            step(table)
            states.append(table.records())
    raw = path.read_bytes()
    assert raw.count(b"\n") == len(steps)
    for size in range(len(raw) + 1):
        cut = tmp_path / "cut"
        cut.write_bytes(raw[:size])
        with closing(OwnerTable(cut)) as table:
            assert table.records() == states[raw[:size].count(b"\n")]
            versions = [int(record.version) for record in table.records()]
            assert versions == sorted(versions), "in the order of their last change"
            table.create(replace(NEW, migration="new"), "a")
        with closing(OwnerTable(cut)) as table:
            assert table.read("new").owner == "source"
        cut.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b'"source","address"', b'"sauce","address"', 1),
        lambda raw: raw.replace(b'"version":"1"', b'"version":"7"'),
        lambda raw: raw.replace(b'"v":1', b'"v":2', 1),
        lambda raw: b"\n" + raw,
        lambda raw: b"[]\n" + raw,
        lambda raw: raw[raw.index(b"\n") + 1 :],
        lambda raw: raw + b"\0\0\n",
    ],
)
def test_a_damaged_journal_stops_the_start(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "journal"
    with closing(OwnerTable(path)) as table:
        table.create(NEW, "a")
        table.swap("m1", "1", "target", "b")
    raw = path.read_bytes()
    path.write_bytes(damage(raw))
    assert path.read_bytes() != raw
    with pytest.raises(JournalDamaged, match="line"):
        OwnerTable(path)
    path.write_bytes(raw)
    OwnerTable(path).close()


def test_two_stores_never_share_a_journal(tmp_path: Path, table: OwnerTable) -> None:
    with pytest.raises(Unavailable, match="in use"):
        OwnerTable(tmp_path / "journal")
    with pytest.raises(Unavailable, match="cannot be opened"):
        OwnerTable(tmp_path)


def test_nothing_is_told_before_it_is_synced(table: OwnerTable, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    table.on_change = lambda _, migration: told.append(migration)
    synced = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: told.append("fsync") or synced(fd))
    table.create(NEW, "a")
    table.delete("m1", "a")
    assert told == ["fsync", "m1", "fsync", "m1"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_once_ends_the_store(table: OwnerTable, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    table.create(NEW, "a")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreBroken, match="Input/output error"):
            table.swap("m1", "1", "target", "b")
    with pytest.raises(StoreBroken):
        table.read("m1")
    with pytest.raises(StoreBroken):
        table.create(replace(NEW, migration="m2"), "a")

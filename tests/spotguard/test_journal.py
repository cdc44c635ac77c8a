"""The journal: a record is whole or absent, and what is none is refused."""

import errno
import os
from pathlib import Path

import pytest

from spotguard.errors import JournalError
from spotguard.journal import MAX_RECORD, Journal

ID = "0b5a35c4-7d6e-4a55-9d0e-3f7e1a2b3c4d"


def test_records_survive_the_process_and_are_replaced_whole(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "journal"
    journal = Journal(directory)
    assert list(journal.records()) == []
    journal.write(ID, {"phase": "holding", "why": "x" * 1000})
    journal.write("b", {"phase": "done"})
    journal.write(ID, {"phase": "dumping"})
    with pytest.raises(JournalError, match="another agent"):
        Journal(directory)
    journal.close()
    assert list(Journal(directory).records()) == [(ID, {"phase": "dumping"}), ("b", {"phase": "done"})]


def test_a_forgotten_migration_is_gone_and_may_be_forgotten_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(ID, {})
    journal.remove(ID)
    journal.remove(ID)
    assert list(journal.records()) == []


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_older_record(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path)
    journal.write(ID, {"phase": "holding"})
    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "rename")), full)
    with pytest.raises(JournalError, match="No space left on device"):
        journal.write(ID, {"phase": "dumping"})
    assert list(journal.records()) == [(ID, {"phase": "holding"})]


def test_the_record_is_on_the_disk_before_its_name_is_and_the_name_before_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        steps.append("directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_rename(self, target)

    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    journal.write(ID, {"phase": "holding"})
    assert steps == ["file", "rename", "directory"]
    journal.remove(ID)
    assert steps[3:] == ["directory"]


def test_half_a_write_is_no_record(tmp_path: Path) -> None:
    (tmp_path / f"{ID}.partial").write_text('{"phase": "du')
    assert list(Journal(tmp_path).records()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "not JSON"), ("[]", "no record"), ("7", "no record"), (" " * (MAX_RECORD + 1), "larger")],
)
def test_a_file_that_is_no_record_stops_the_reading(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / f"{ID}.json").write_text(content)
    with pytest.raises(JournalError, match=complaint):
        list(Journal(tmp_path).records())


@pytest.mark.parametrize("migration", ["", "..", "../x", "a/b", "a\0", "-", "a.json"])
def test_ids_that_could_leave_the_directory_are_refused(migration: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(JournalError):
        journal.write(migration, {})
    with pytest.raises(JournalError):
        journal.remove(migration)
    assert set(tmp_path.rglob("*")) == {tmp_path / "journal"}

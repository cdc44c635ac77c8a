"""The owner store's records and their journal: the rules, without any network.

The journal has one JSON object per line, appended and synced before anybody is told of the change:

    {"v": 1, "record": {...}}       a record as it is from now on, the version of which is its line's revision
    {"v": 1, "deleted": "ID", "version": "7"}

A line that has no newline at the end of the file was being written when the machine stopped: nobody was told of it, so
it is cut off. Anything else that cannot be read stops the start, for guessing an owner may run a workload twice.
"""

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from handlers.owner import Conflict, NewOwner, NotFound, OwnerRecord, Refused, may_swap
from spotguard.errors import JournalDamaged, SpotGuardError, Unavailable

MAX_RECORDS = 100_000
_FORMAT = 1


class StoreBroken(SpotGuardError):  # noqa: N818 - named after the finding
    """A change could not be made durable: whether it is on the disk is unknown until a restart reads it again."""


class OwnerTable:
    """All owner records of one journal file. One process only: the file is locked.

    Not thread-safe. A change blocks for one fsync: with changes this rare, that buys that none is ever half done, not
    even when its caller is cancelled. Raises JournalDamaged, or Unavailable when another process has the journal.
    """

    def __init__(self, journal: Path, *, max_records: int = MAX_RECORDS) -> None:
        self._path = journal
        self._max_records = max_records
        self._records: dict[str, OwnerRecord] = {}
        self._deleted: set[str] = set()
        self._revision = 0
        self._broken = False
        self.on_change: Callable[[OwnerRecord | None, str], None] = lambda _record, _migration: None
        self._fd = self._open()
        try:
            self._replay()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Give the journal free."""
        os.close(self._fd)

    def records(self) -> list[OwnerRecord]:
        """Return all records in the order of their last change: who applies them in turn ends with the latest."""
        return list(self._records.values())

    def read(self, migration: str) -> OwnerRecord:
        """Return a record; raises NotFound."""
        self._check()
        if migration not in self._records:
            raise NotFound(f"there is no migration {migration}")
        return self._records[migration]

    def create(self, record: OwnerRecord, by: str) -> OwnerRecord:
        """Store a new record for its source node `by`; raises Refused or Conflict.

        The same again gives the same answer. An identifier that was deleted never comes back: whoever still waits for
        an answer about it must not find a fresh `source`.
        """
        self._check()
        if by != record.source or record.owner != "source" or record.source == record.target:
            raise Refused("a record is created by its source, for another node as target, and with owner 'source'")
        if record.migration in self._deleted:
            raise Refused(f"migration {record.migration} was deleted; use a new identifier")
        present = self._records.get(record.migration)
        if present:
            if replace(present, version="") == replace(record, version=""):
                return present
            raise Conflict(present)
        if len(self._records) + len(self._deleted) >= self._max_records:
            raise Refused(f"the journal names {self._max_records} migrations; stop the store and move the journal away")
        return self._commit(record)

    def swap(self, migration: str, version: str, new_owner: NewOwner, by: str) -> OwnerRecord:
        """Change the owner for node `by`, if the record still has `version` and is undecided.

        Raises NotFound, Refused, Conflict.
        """
        present = self.read(migration)
        reason = may_swap(present, new_owner, by)
        if reason:
            raise Refused(reason)
        if present.version != version or present.owner != "source":
            raise Conflict(present)
        return self._commit(replace(present, owner=new_owner))

    def delete(self, migration: str, by: str) -> None:
        """Remove a record for its present owner `by`; raises NotFound, Refused.

        Only the owner, because "not found" tells the other side that it lost: no one else may make that true.
        """
        present = self.read(migration)
        owner = present.target if present.owner == "target" else present.source
        if by != owner:
            raise Refused(f"only node '{owner}', which owns migration {migration}, may delete it")
        self._append({"v": _FORMAT, "deleted": migration, "version": str(self._revision + 1)})
        self._revision += 1
        del self._records[migration]
        self._deleted.add(migration)
        self.on_change(None, migration)

    def _commit(self, record: OwnerRecord) -> OwnerRecord:
        record = replace(record, version=str(self._revision + 1))
        self._append({"v": _FORMAT, "record": record.to_json()})
        self._revision += 1
        self._put(record)
        self.on_change(record, record.migration)
        return record

    def _put(self, record: OwnerRecord) -> None:
        self._records.pop(record.migration, None)  # so that it comes last
        self._records[record.migration] = record

    def _append(self, line: dict[str, Any]) -> None:
        raw = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            whole = os.write(self._fd, raw) == len(raw)
            os.fsync(self._fd)
        except OSError as error:
            raise self._break(str(error)) from error
        if not whole:
            raise self._break("a line was written in part")

    def _break(self, reason: str) -> StoreBroken:
        # After a failed fsync the kernel may have dropped the data and say nothing the next time: stop for good.
        self._broken = True
        return StoreBroken(
            f"the journal {self._path} cannot be written: {reason}", remedy="mend the disk and restart the store"
        )

    def _check(self) -> None:
        if self._broken:
            raise StoreBroken(f"the journal {self._path} could not be written before", remedy="restart the store")

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"the journal {self._path} cannot be opened: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise Unavailable(f"the journal {self._path} is in use: {error}", remedy="stop the other store") from error
        # The file's name must survive too.
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return fd

    def _replay(self) -> None:
        raw = self._path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.ftruncate(self._fd, whole)
            os.fsync(self._fd)
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise JournalDamaged(
                    f"line {number} of the journal {self._path} cannot be read: {error}",
                    remedy="restore the file from a backup, or find out by hand which node runs each workload",
                ) from error

    def _apply(self, line: dict[str, Any]) -> None:
        if line["v"] != _FORMAT:
            raise ValueError(f"format {line['v']} is unknown")
        if "deleted" in line:
            del self._records[line["deleted"]]
            self._deleted.add(line["deleted"])
            revision = int(line["version"])
        else:
            record = OwnerRecord.from_json(line["record"])
            revision = int(record.version)
            self._put(record)
        if revision != self._revision + 1:
            raise ValueError(f"revision {revision} follows {self._revision}")
        self._revision = revision

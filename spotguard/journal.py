"""What an agent must remember across its own death: one small file per migration.

A record is whole or absent: it is written beside its name, synced, and renamed over it. Records are plain JSON objects
of the core's making; this file knows nothing of their meaning. Each carries the boot that it belongs to: after a reboot
every process that it speaks of is dead and its times mean nothing, so it is thrown away.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spotguard.errors import JournalError

MAX_RECORD = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """Records by migration id, in one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._boot = BOOT_ID.read_text().strip()
        # Held as long as this process lives: two agents on one journal would both act upon it.
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            os.close(self._lock)
            raise JournalError(f"another agent works with the journal in {directory}: stop it first") from taken

    def close(self) -> None:
        """Let another agent have the journal."""
        os.close(self._lock)

    def write(self, migration: str, record: Mapping[str, Any]) -> None:
        """Replace a migration's record; on the disk when this returns. Raises JournalError."""
        path = self._path(migration)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("w") as file:
                json.dump({"boot": self._boot, "record": record}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            self._sync_directory()
        except OSError as failed:
            raise JournalError(f"cannot write {path}: {failed.strerror}; free space or mend the disk") from failed

    def remove(self, migration: str) -> None:
        """Forget a migration; an unknown one is no error."""
        try:
            self._path(migration).unlink(missing_ok=True)
            self._sync_directory()
        except OSError as failed:
            raise JournalError(f"cannot remove {self._path(migration)}: {failed.strerror}") from failed

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every migration's id and record; those of an earlier boot are removed.

        Raises JournalError for a file that is no record.
        """
        for path in sorted(self._directory.glob("*.json")):
            if path.stat().st_size > MAX_RECORD:
                raise JournalError(f"{path} is larger than any record; move it away and restart")
            try:
                record = json.loads(path.read_text())
            except ValueError as broken:
                raise JournalError(f"{path} is not JSON ({broken}); move it away and restart") from broken
            if not isinstance(record, dict) or not isinstance(record.get("record"), dict):
                raise JournalError(f"{path} holds no record; move it away and restart")
            if record.get("boot") == self._boot:
                yield path.stem, record["record"]
            else:
                self.remove(path.stem)

    def _path(self, migration: str) -> Path:
        if not migration.replace("-", "").isalnum():
            raise JournalError(f"'{migration}' is no migration id")
        return self._directory / f"{migration}.json"

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Durable records: what a node must still know after ``kill -9`` or a power cut. Sole owner of sqlite3.

One table, key -> the record's bytes. ``save`` stages, ``commit`` makes everything staged durable in one
transaction with one fsync, all or nothing (write-ahead log, ``synchronous=FULL``).

What cannot be read is set aside, never deleted, and never stops the node: a corrupt record is skipped, a
corrupt file is renamed to ``….corrupt-N`` and a new one begun. What cannot be *written* (a full disk) is
``JournalError``: the node must then not say that it holds anything.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mesh.core import Message
from mesh.errors import DecodeError, EdgemeshError
from mesh.units import MIB, bytes_text
from mesh.wire import MESH

__all__ = ["JOURNAL_BYTES_MAX", "Journal", "JournalError"]

log = logging.getLogger(__name__)

# A record is at most one frame (512 KiB), a usual one 2 KiB. The ledger's own bounds keep a node far
# below this; beyond it something is wrong, and an SD card shall not fill up because of it.
JOURNAL_BYTES_MAX = 512 * MIB
_PAGE_BYTES = 4096  # sqlite's default, on which the page limit below counts
_BUSY_S = 5.0  # another process of the same node is closing down


class JournalError(EdgemeshError):
    """The disk did not take the records. Nothing of the batch is durable; the file is as it was."""

    code = "journal"


class Journal:
    """The records of one node, in one file. May be used from several threads, one call at a time.

    Args:
        path: The database file; made with its parent directory if it is not there. Readable by the owner
            only, because prompts and answers are in it.
        bytes_max: Refuse to grow beyond this.

    Raises:
        JournalError: The file can be neither opened nor made.
    """

    def __init__(self, path: Path, *, bytes_max: int = JOURNAL_BYTES_MAX) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._staged: dict[str, bytes | None] = {}
        self._db = self._open()

    def load(self) -> dict[str, Message]:
        """All records by key, in the order of the keys; those that cannot be read are left out."""
        records: dict[str, Message] = {}
        for key, payload in self._read_all():
            try:
                records[key] = MESH.decode(payload)
            except DecodeError as error:
                log.warning("journal: skipped a record it cannot read: key=%s reason=%s", key, error)
        return records

    def save(self, key: str, record: Message | None) -> None:
        """Stage ``record`` under ``key``, in place of an older one; ``None`` erases the key.

        Raises:
            ValueError: The record is larger than a frame.
        """
        self._staged[key] = None if record is None else MESH.encode(record)

    def commit(self) -> None:
        """Make all that is staged durable; returns after the fsync.

        Raises:
            JournalError: Nothing of it became durable. It stays staged, so a later ``commit`` tries again.
        """
        if not self._staged:
            return
        batch = dict(self._staged)
        kept = [(key, payload) for key, payload in batch.items() if payload is not None]
        erased = [(key,) for key, payload in batch.items() if payload is None]
        with self._faults("write"), self._db:  # commits, or rolls back on an exception
            self._db.executemany(
                "INSERT INTO records(key, payload) VALUES (?, ?)"
                " ON CONFLICT(key) DO UPDATE SET payload = excluded.payload",
                kept,
            )
            self._db.executemany("DELETE FROM records WHERE key = ?", erased)
        for key, payload in batch.items():
            if self._staged.get(key, b"") is payload:  # not staged anew meanwhile
                del self._staged[key]

    def close(self) -> None:
        """Close the file; what is staged and not committed is lost."""
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        with self._faults("open"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            try:
                return self._connect()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise  # no permission, no space, locked: the file itself may be whole
                self._set_aside(str(error))
                return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=_BUSY_S, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA max_page_count = {max(1, self._bytes_max // _PAGE_BYTES)}")
            db.execute("CREATE TABLE IF NOT EXISTS records(key TEXT PRIMARY KEY, payload BLOB NOT NULL)")
            db.commit()
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        except BaseException:
            db.close()
            raise
        return db

    def _read_all(self) -> list[tuple[str, bytes]]:
        try:
            rows = self._db.execute("SELECT key, payload FROM records ORDER BY key").fetchall()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise JournalError(f"cannot read {self._path}: {error}") from None
            self._db.close()
            self._set_aside(str(error))
            with self._faults("open"):
                self._db = self._connect()
            return []
        return [
            (key, payload) for key, payload in rows if isinstance(key, str) and isinstance(payload, bytes)
        ]

    def _set_aside(self, reason: str) -> None:
        n = 1
        while (aside := self._path.with_name(f"{self._path.name}.corrupt-{n}")).exists():
            n += 1
        self._path.rename(aside)
        for suffix in ("-wal", "-shm"):  # they belong to the broken file
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        self._path.touch(mode=0o600)
        log.error(
            "journal: %s is corrupt (%s); kept as %s, and a new one begun. What this node held is lost here;"
            " the other holders still have it",
            self._path,
            reason,
            aside.name,
        )

    @contextmanager
    def _faults(self, doing: str) -> Iterator[None]:
        """Turn sqlite's and the system's errors into ours, with what to do about them."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            text = str(error)
            if "full" in text:  # SQLITE_FULL: no space on the disk, or the page limit above
                bound = bytes_text(self._bytes_max)
                text += f": free some space, unless the file has reached its bound of {bound}"
            elif "readonly" in text or "unable to open" in text or isinstance(error, PermissionError):
                text += ": check that this user may write there, or choose another --state-dir"
            raise JournalError(f"cannot {doing} the journal {self._path}: {text}") from None

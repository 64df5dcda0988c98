"""The outbox on disk: the events that were acknowledged, and whether the bus has them yet."""

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from feedback.bus.contract import Record
from feedback.sqlite_file import SqliteFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  event_id TEXT NOT NULL UNIQUE,
  topic TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
  content_digest BLOB NOT NULL,
  acknowledge_time_us INTEGER NOT NULL,
  published_time_us INTEGER
);
CREATE INDEX IF NOT EXISTS pending ON events (seq) WHERE published_time_us IS NULL;
CREATE INDEX IF NOT EXISTS published ON events (published_time_us) WHERE published_time_us IS NOT NULL;
CREATE TABLE IF NOT EXISTS logs (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, log_id TEXT NOT NULL, end_offset INTEGER NOT NULL,
  PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
"""
PRUNE_ROWS = 1000
# Bytes that a row takes besides its key and value.
_ROW_BYTES = 300


class OutboxError(Exception):
    """The outbox failed. Whether an event was stored is not known; it is safe to try again."""


class OutboxFull(OutboxError):  # noqa: N818
    """The outbox has reached its limit, or the disk is full. Nothing was stored."""


class OutboxConflict(OutboxError):  # noqa: N818
    """The event id is taken by an event with other contents. Nothing was stored."""


@dataclass(frozen=True)
class Entry:
    """An event to store. `content_digest` covers what the caller said, without what differs between its retries."""

    record: Record
    content_digest: bytes
    acknowledge_time: datetime


@dataclass(frozen=True)
class Receipt:
    """When an event was first acknowledged, and whether this call was the first."""

    acknowledge_time: datetime
    is_new: bool


@dataclass(frozen=True)
class LogEnd:
    """Where one partition of the bus ended when the relay last looked."""

    topic: str
    partition: int
    log_id: str
    end_offset: int


class OutboxFile:
    """The outbox's file. For one thread at a time; several processes may have it open.

    It takes new events up to `max_bytes`, and then none until published ones are pruned.

    Raises:
        OutboxError: any method except close, if the disk fails or is full.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file = SqliteFile(path, _SCHEMA)
        self._max_bytes = max_bytes

    def append(self, entries: Sequence[Entry]) -> list[Receipt | OutboxError]:
        """Stores the events with one fsync, and returns the outcome of each. If it raises, none was stored."""
        with self._transaction() as connection:
            # Marking events as published may still grow the file, so the limit is checked here and not by SQLite.
            room_bytes = self._max_bytes - _used_bytes(connection)
            outcomes: list[Receipt | OutboxError] = []
            for entry in entries:
                outcomes.append(_find(connection, entry) or _insert(connection, entry, room_bytes))
                room_bytes -= _size_bytes(entry)
            return outcomes

    def pending(self, limit: int) -> list[tuple[int, Record]]:
        """Returns the oldest events that the bus does not have yet, each with its number in this file."""
        with self._transaction("DEFERRED") as connection:
            rows = connection.execute(
                "SELECT seq, topic, key, value, event_id FROM events WHERE published_time_us IS NULL"
                " ORDER BY seq LIMIT ?",
                (limit,),
            ).fetchall()
        return [(seq, Record(*fields)) for seq, *fields in rows]

    def mark_published(self, seqs: Sequence[int]) -> None:
        """Marks events as published."""
        now_us = time.time_ns() // 1000
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE events SET published_time_us = ? WHERE seq = ?", [(now_us, seq) for seq in seqs]
            )

    def compare_logs(self, ends: Sequence[LogEnd]) -> int:
        """Stores where the bus ends; if it lost records since the last call, makes all published events pending again.

        Returns how many events became pending.
        """
        with self._transaction() as connection:
            noted = {
                (topic, partition): (log_id, end_offset)
                for topic, partition, log_id, end_offset in connection.execute("SELECT * FROM logs")
            }
            connection.executemany(
                "INSERT OR REPLACE INTO logs VALUES (?, ?, ?, ?)",
                [(end.topic, end.partition, end.log_id, end.end_offset) for end in ends],
            )
            if not any(_is_loss(noted, end) for end in ends):
                return 0
            return connection.execute(
                "UPDATE events SET published_time_us = NULL WHERE published_time_us IS NOT NULL"
            ).rowcount

    def prune(self, retention_seconds: float) -> int:
        """Removes published events older than this, or of any age while more than half of `max_bytes` is used.

        Removes the oldest first, and at most PRUNE_ROWS. Returns how many it removed: call it until it returns fewer.
        """
        before_us = int((time.time() - retention_seconds) * 1e6)
        with self._transaction() as connection:
            if _used_bytes(connection) > self._max_bytes / 2:
                before_us = time.time_ns() // 1000
            return connection.execute(
                "DELETE FROM events WHERE seq IN (SELECT seq FROM events WHERE published_time_us < ?"
                " ORDER BY published_time_us LIMIT ?)",
                (before_us, PRUNE_ROWS),
            ).rowcount

    def close(self) -> None:
        """Closes the connection. Safe to call twice."""
        self._file.close()

    @contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        try:
            with self._file.transaction(kind) as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise (OutboxFull if is_full else OutboxError)(f"outbox: {error}") from error


def _find(connection: sqlite3.Connection, entry: Entry) -> Receipt | OutboxConflict | None:
    """Returns the outcome of an earlier attempt to store this event; None if there was none."""
    found = connection.execute(
        "SELECT content_digest, acknowledge_time_us FROM events WHERE event_id = ?", (entry.record.event_id,)
    ).fetchone()
    if found is None:
        return None
    if found[0] != entry.content_digest:
        return OutboxConflict(f"event {entry.record.event_id} is stored with other contents")
    return Receipt(datetime.fromtimestamp(found[1] / 1e6, UTC), is_new=False)


def _insert(connection: sqlite3.Connection, entry: Entry, room_bytes: int) -> Receipt | OutboxFull:
    if _size_bytes(entry) > room_bytes:
        return OutboxFull("the outbox has reached its limit")
    record = entry.record
    time_us = round(entry.acknowledge_time.timestamp() * 1e6)
    connection.execute(
        "INSERT INTO events (event_id, topic, key, value, content_digest, acknowledge_time_us)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (record.event_id, record.topic, record.key, record.value, entry.content_digest, time_us),
    )
    return Receipt(entry.acknowledge_time, is_new=True)


def _size_bytes(entry: Entry) -> int:
    """Returns about how many bytes an event takes on disk, with its indexes."""
    return len(entry.record.key) + len(entry.record.value) + _ROW_BYTES


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free_pages, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free_pages) * page_bytes)


def _is_loss(noted: Mapping[tuple[str, int], tuple[str, int]], end: LogEnd) -> bool:
    log_id, end_offset = noted.get((end.topic, end.partition), (end.log_id, 0))
    return log_id != end.log_id or end.end_offset < end_offset

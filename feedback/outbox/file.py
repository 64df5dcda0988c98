"""The outbox on disk: the events that were acknowledged, and whether the bus has them yet."""

import hashlib
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from feedback.bus.contract import Position, Record, record_digest
from feedback.sqlite_file import SqliteFile, add_column

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  event_id TEXT NOT NULL UNIQUE,
  topic TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
  content_digest BLOB NOT NULL,
  acknowledge_time_us INTEGER NOT NULL,
  published_time_us INTEGER,
  checksum BLOB,
  request_key BLOB, request_digest BLOB
);
CREATE INDEX IF NOT EXISTS pending ON events (seq) WHERE published_time_us IS NULL;
CREATE INDEX IF NOT EXISTS published ON events (published_time_us) WHERE published_time_us IS NOT NULL;
CREATE TABLE IF NOT EXISTS logs (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, log_id TEXT NOT NULL, end_offset INTEGER NOT NULL,
  last_offset INTEGER, last_digest BLOB,
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
class RequestKey:
    """Names the request that an event came from, so that a retry of it is recognised, and a digest of what it said."""

    key: bytes
    digest: bytes


@dataclass(frozen=True)
class Entry:
    """An event to store. `content_digest` covers what the caller said, without what differs between its retries."""

    record: Record
    content_digest: bytes
    acknowledge_time: datetime
    request: RequestKey | None = None


@dataclass(frozen=True)
class Receipt:
    """When an event was first acknowledged, and whether this call was the first."""

    acknowledge_time: datetime
    is_new: bool


@dataclass(frozen=True)
class Pending:
    """An event that the bus does not have yet, and its number in this file.

    `is_whole` is false if the disk has changed it since it was acknowledged.
    """

    seq: int
    record: Record
    is_whole: bool


@dataclass(frozen=True)
class LogEnd:
    """Where one partition of the bus ended when the relay last looked."""

    topic: str
    partition: int
    log_id: str
    end_offset: int


@dataclass(frozen=True)
class Mark:
    """The last record that was published from here to a partition: where it stands, and the digest of what it says."""

    position: Position
    digest: bytes


class OutboxFile:
    """The outbox's file. For one thread at a time; several processes may have it open.

    It takes new events up to `max_bytes`, and then none until published ones are pruned.

    Raises:
        OutboxError: any method except close, if the disk fails or is full.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file = SqliteFile(path, _SCHEMA, _upgrade)
        self._max_bytes = max_bytes

    def append(self, entries: Sequence[Entry]) -> list[Receipt | OutboxError]:
        """Stores the events with one fsync, and returns the outcome of each. If it raises, none was stored."""
        with self._transaction() as connection:
            # Marking events as published may still grow the file, so the limit is checked here and not by SQLite.
            room_bytes = self._max_bytes - used_bytes(connection)
            outcomes: list[Receipt | OutboxError] = []
            for entry in entries:
                outcomes.append(_find(connection, entry) or _insert(connection, entry, room_bytes))
                room_bytes -= _size_bytes(entry)
            return outcomes

    def find(self, event_id: str) -> bytes | None:
        """Returns the value of an event that is stored, and not pruned yet; None if there is none."""
        with self._transaction("DEFERRED") as connection:
            row = connection.execute("SELECT value FROM events WHERE event_id = ?", (event_id,)).fetchone()
        return None if row is None else bytes(row[0])

    def find_request(self, key: bytes) -> tuple[bytes, bytes] | None:
        """Returns the digest of an earlier request with this key, and the value of its event; None if there is none."""
        with self._transaction("DEFERRED") as connection:
            row = connection.execute(
                "SELECT request_digest, value FROM events WHERE request_key = ? ORDER BY seq DESC LIMIT 1", (key,)
            ).fetchone()
        return None if row is None else (bytes(row[0]), bytes(row[1]))

    def pending(self, limit: int) -> list[Pending]:
        """Returns the oldest events that the bus does not have yet."""
        with self._transaction("DEFERRED") as connection:
            rows = connection.execute(
                # As bytes: a text that the disk has changed may be none.
                "SELECT seq, checksum, CAST(content_digest AS BLOB), acknowledge_time_us, CAST(topic AS BLOB),"
                " CAST(key AS BLOB), CAST(value AS BLOB), CAST(event_id AS BLOB) FROM events"
                " WHERE published_time_us IS NULL ORDER BY seq LIMIT ?",
                (limit,),
            ).fetchall()
        return [_pending(*row) for row in rows]

    def mark_published(self, published: Mapping[int, Mark | None]) -> None:
        """Marks events, by their numbers, as published at these places; None for one that went to the dead letters."""
        now_us = time.time_ns() // 1000
        last = {(mark.position.topic, mark.position.partition): mark for mark in published.values() if mark}
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE events SET published_time_us = ? WHERE seq = ?", [(now_us, seq) for seq in published]
            )
            connection.executemany(
                "UPDATE logs SET last_offset = ?, last_digest = ? WHERE topic = ? AND partition = ?",
                [(mark.position.offset, mark.digest, *partition) for partition, mark in last.items()],
            )

    def marks(self) -> list[Mark]:
        """Returns the last record that was published from here to each partition."""
        with self._transaction("DEFERRED") as connection:
            rows = connection.execute(
                "SELECT topic, partition, last_offset, last_digest FROM logs WHERE last_offset IS NOT NULL"
            ).fetchall()
        return [Mark(Position(topic, partition, offset), digest) for topic, partition, offset, digest in rows]

    def compare_logs(self, ends: Sequence[LogEnd], replaced: Sequence[Mark] = ()) -> int:
        """Stores where the bus ends; if it lost records since the last call, makes all published events pending again.

        Nothing is written while nothing changes, so that an idle relay never keeps the server out.

        Args:
            ends: where the partitions end now.
            replaced: marks at whose place the bus has another record now, so that it has lost ours.

        Returns:
            how many events became pending.
        """
        with self._transaction("DEFERRED") as connection:
            noted = {
                (topic, partition): (log_id, end_offset)
                for topic, partition, log_id, end_offset in connection.execute(
                    "SELECT topic, partition, log_id, end_offset FROM logs"
                )
            }
        is_loss = bool(replaced) or any(_is_loss(noted, end) for end in ends)
        changed = [end for end in ends if noted.get((end.topic, end.partition)) != (end.log_id, end.end_offset)]
        if not changed and not is_loss:
            return 0
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO logs (topic, partition, log_id, end_offset) VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET log_id = excluded.log_id, end_offset = excluded.end_offset",
                [(end.topic, end.partition, end.log_id, end.end_offset) for end in changed],
            )
            if not is_loss:
                return 0
            connection.execute("UPDATE logs SET last_offset = NULL, last_digest = NULL")
            return connection.execute(
                "UPDATE events SET published_time_us = NULL WHERE published_time_us IS NOT NULL"
            ).rowcount

    def prune(self, retention_seconds: float) -> int:
        """Removes published events older than this, or of any age while more than half of `max_bytes` is used.

        Removes the oldest first, and at most PRUNE_ROWS. Returns how many it removed: call it until it returns fewer.
        """
        before_us = int((time.time() - retention_seconds) * 1e6)
        with self._transaction("DEFERRED") as connection:
            if used_bytes(connection) > self._max_bytes / 2:
                before_us = time.time_ns() // 1000
            oldest = connection.execute(
                "SELECT min(published_time_us) FROM events WHERE published_time_us IS NOT NULL"
            ).fetchone()[0]
        if oldest is None or oldest >= before_us:
            return 0
        with self._transaction() as connection:
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
    checksum = _checksum(record, entry.content_digest, time_us)
    connection.execute(
        "INSERT INTO events (event_id, topic, key, value, content_digest, acknowledge_time_us, checksum,"
        " request_key, request_digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.event_id, record.topic, record.key, record.value, entry.content_digest, time_us, checksum,
            entry.request and entry.request.key, entry.request and entry.request.digest,
        ),
    )  # fmt: skip
    return Receipt(entry.acknowledge_time, is_new=True)


def _pending(seq: int, checksum: bytes | None, content_digest: bytes, time_us: int, *fields: bytes) -> Pending:
    topic, key, value, event_id = fields
    record = Record(topic.decode(errors="replace"), key, value, event_id.decode(errors="replace"))
    return Pending(seq, record, checksum is None or checksum == _checksum(record, content_digest, time_us))


def _checksum(record: Record, content_digest: bytes, time_us: int) -> bytes:
    rest = f"/{record.topic}/{time_us}".encode()
    return hashlib.sha256(record_digest(record) + content_digest + rest).digest()


def _upgrade(connection: sqlite3.Connection) -> None:
    """Brings a file of an earlier release up to date. Its events stay without a checksum."""
    add_column(connection, "events", "checksum BLOB")
    add_column(connection, "events", "request_key BLOB")
    add_column(connection, "events", "request_digest BLOB")
    connection.execute("CREATE INDEX IF NOT EXISTS requests ON events (request_key) WHERE request_key IS NOT NULL")
    add_column(connection, "logs", "last_offset INTEGER")
    add_column(connection, "logs", "last_digest BLOB")


def _size_bytes(entry: Entry) -> int:
    """Returns about how many bytes an event takes on disk, with its indexes."""
    return entry.record.size_bytes + _ROW_BYTES


def used_bytes(connection: sqlite3.Connection) -> int:
    """Returns how many bytes of the file are in use; what was pruned is free for new events."""
    pages, free_pages, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free_pages) * page_bytes)


def _is_loss(noted: Mapping[tuple[str, int], tuple[str, int]], end: LogEnd) -> bool:
    log_id, end_offset = noted.get((end.topic, end.partition), (end.log_id, 0))
    return log_id != end.log_id or end.end_offset < end_offset

"""The bus of one machine: a SQLite file that all its processes write and read."""

import sqlite3
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from feedback.bus.contract import (
    BusError,
    Consumer,
    Delivered,
    Position,
    Record,
    TopicSpec,
    outcomes_by_size,
    settled,
)
from feedback.sqlite_file import SqliteFile, add_column, file_id, open_sqlite

_POLL_INTERVAL_SECONDS = 0.02
_MAX_POLL_RECORDS = 500

_SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, log_id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS partitions (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, end_offset INTEGER NOT NULL,
  PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, "offset" INTEGER NOT NULL,
  key BLOB NOT NULL, value BLOB NOT NULL, event_id TEXT NOT NULL, checksum INTEGER,
  PRIMARY KEY (topic, partition, "offset")
);
"""
# As bytes: a text that the disk has changed may be none.
_READ = (
    'SELECT "offset", CAST(key AS BLOB), CAST(value AS BLOB), CAST(event_id AS BLOB), checksum FROM records'
    ' WHERE topic = ? AND partition = ? AND "offset" >= ?'
)


class SqliteBus:
    """Implements contract.Bus. The threads of a process take turns on one connection."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = SqliteFile(path, _SCHEMA, _upgrade)
        self._lock = threading.Lock()
        with self._transaction("DEFERRED"):
            pass  # Fails now, and not at first use, if the file cannot be opened.

    def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Implements contract.Bus."""
        with self._transaction() as connection:
            for topic in topics:
                connection.execute("INSERT OR IGNORE INTO topics VALUES (?, ?)", (topic.name, uuid.uuid4().hex))
                ends = _ends(connection, topic.name)
                if topic.partitions == 1 and len(ends) > 1:
                    raise BusError(f"topic {topic.name} has {len(ends)} partitions; it needs exactly 1")
                if not ends:
                    rows = [(topic.name, partition) for partition in range(topic.partitions)]
                    connection.executemany("INSERT INTO partitions VALUES (?, ?, 0)", rows)

    def publish(self, records: Sequence[Record]) -> list[Position]:
        """Implements contract.Bus. Appends either all of the records or none, except for those that are too large."""
        outcomes = outcomes_by_size(records)
        with self._transaction() as connection:
            ends = {topic: _ends_of_existing(connection, topic) for topic in {record.topic for record in records}}
            rows = []
            for index, record in enumerate(records):
                if outcomes[index]:
                    continue
                partition = zlib.crc32(record.key) % len(ends[record.topic])
                position = Position(record.topic, partition, ends[record.topic][partition])
                ends[record.topic][partition] += 1
                outcomes[index] = position
                fields = (record.key, record.value, record.event_id)
                rows.append((position.topic, partition, position.offset, *fields, _checksum(position, *fields)))
            connection.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            connection.executemany(
                "UPDATE partitions SET end_offset = ? WHERE topic = ? AND partition = ?",
                [(end, topic, partition) for topic in ends for partition, end in ends[topic].items()],
            )
        return settled(records, outcomes)

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Implements contract.Bus."""
        next_offsets = {
            (topic, partition): start.get((topic, partition), 0)
            for topic in topics
            for partition in self.end_offsets(topic)
        }
        return _SqliteConsumer(self._path, next_offsets)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Implements contract.Bus."""
        with self._transaction("DEFERRED") as connection:
            return _ends_of_existing(connection, topic)

    def read_at(self, positions: Sequence[Position]) -> dict[Position, Delivered]:
        """Implements contract.Bus."""
        found = {}
        with self._transaction("DEFERRED") as connection:
            for each in positions:
                place = (each.topic, each.partition, each.offset)
                row = connection.execute(f'{_READ} ORDER BY "offset" LIMIT 1', place).fetchone()
                if row:
                    found[each] = _delivered(each.topic, each.partition, row)
        return found

    def log_id(self, topic: str) -> str:
        """Implements contract.Bus."""
        with self._transaction("DEFERRED") as connection:
            row = connection.execute("SELECT log_id FROM topics WHERE name = ?", (topic,)).fetchone()
        if row is None:
            raise BusError(f"topic {topic} does not exist")
        return str(row[0])

    def close(self) -> None:
        """Implements contract.Bus."""
        with self._lock:
            self._file.close()

    @contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        try:
            with self._lock, self._file.transaction(kind) as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise BusError(f"{self._path}: {error}") from error


class _SqliteConsumer:
    """Implements contract.Consumer. Looks for new rows only when another connection has written."""

    def __init__(self, path: Path, next_offsets: dict[tuple[str, int], int]) -> None:
        self._path = path
        self._next_offsets = next_offsets
        # Rotated at each read, so that a busy partition cannot keep the others waiting.
        self._order = deque(next_offsets)
        self._seen_version: int | None = None
        try:
            self._connection = open_sqlite(path)
            self._file_id = file_id(path)
        except (sqlite3.Error, OSError) as error:
            raise BusError(f"{path}: {error}") from error

    def poll(self, timeout_seconds: float) -> list[Delivered]:
        """Implements contract.Consumer."""
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                if file_id(self._path) != self._file_id:
                    raise BusError(f"{self._path} was replaced by another file")
                # Read before the rows, so that what is written in between is found at the next look.
                version = self._connection.execute("PRAGMA data_version").fetchone()[0]
                delivered = self._read() if version != self._seen_version else []
                if len(delivered) < _MAX_POLL_RECORDS:
                    self._seen_version = version
                remaining_seconds = deadline - time.monotonic()
                if delivered or remaining_seconds <= 0:
                    return delivered
                time.sleep(min(_POLL_INTERVAL_SECONDS, remaining_seconds))
        except (sqlite3.Error, OSError) as error:
            raise BusError(f"{self._path}: {error}") from error

    def _read(self) -> list[Delivered]:
        delivered: list[Delivered] = []
        self._order.rotate()
        for topic, partition in self._order:
            rows = self._connection.execute(
                f'{_READ} ORDER BY "offset" LIMIT ?',
                (topic, partition, self._next_offsets[topic, partition], _MAX_POLL_RECORDS - len(delivered)),
            ).fetchall()
            delivered += [_delivered(topic, partition, row) for row in rows]
            if rows:
                self._next_offsets[topic, partition] = rows[-1][0] + 1
        return delivered

    def close(self) -> None:
        """Implements contract.Consumer."""
        self._connection.close()


def _upgrade(connection: sqlite3.Connection) -> None:
    """Brings a file of an earlier release up to date. Its records stay without a checksum."""
    add_column(connection, "records", "checksum INTEGER")


def _checksum(position: Position, key: bytes, value: bytes, event_id: str) -> int:
    place = f"{position.topic}/{position.partition}/{position.offset}/{len(key)}/{event_id}".encode()
    return zlib.crc32(value, zlib.crc32(key, zlib.crc32(place)))


def _delivered(topic: str, partition: int, row: tuple[int, bytes, bytes, bytes, int | None]) -> Delivered:
    """Returns a row as it is delivered, with a fault if it is not what was written."""
    offset, key, value, raw_event_id, checksum = row
    position, event_id = Position(topic, partition, offset), raw_event_id.decode(errors="replace")
    is_whole = checksum is None or checksum == _checksum(position, key, value, event_id)
    fault = "" if is_whole else "its bytes have changed on disk since it was published (wrong checksum)"
    return Delivered(position, key, value, event_id, fault)


def _ends(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    return dict(connection.execute("SELECT partition, end_offset FROM partitions WHERE topic = ?", (topic,)).fetchall())


def _ends_of_existing(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    ends = _ends(connection, topic)
    if not ends:
        raise BusError(f"topic {topic} does not exist")
    return ends

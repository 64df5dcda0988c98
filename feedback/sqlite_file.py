"""SQLite files in which a commit survives a crash of the process and of the machine, for their owner alone."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from feedback.durable import fsync, make_private, private_folder

_BUSY_TIMEOUT_SECONDS = 30.0
# What SQLite puts beside a file. It gives new ones the file's own mode.
_BESIDE = ("", "-wal", "-shm")


class SqliteFile:
    """A file with a schema. It is opened on first use, and again after an error. For one thread at a time."""

    def __init__(
        self, path: Path, schema: str, upgrade: Callable[[sqlite3.Connection], None] = lambda connection: None
    ) -> None:
        """Remembers the file; `upgrade` adds what the schema of an earlier release lacks."""
        self._path = path
        self._schema = schema
        self._upgrade = upgrade
        self._connection: sqlite3.Connection | None = None
        self._opened_id = (0, 0)

    @contextmanager
    def transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Opens a transaction, which is rolled back if its block raises. DEFERRED is for reading.

        Nothing in the block may wait for anything else than the disk: an IMMEDIATE one keeps every other writer out.

        Raises:
            sqlite3.Error: SQLite failed, or another process held the lock for too long.
            OSError: the file's folder cannot be created.
        """
        try:
            connection = self._open()
            connection.execute(f"BEGIN {kind}")
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            # Closing rolls the transaction back. After a failed commit a connection cannot be trusted: the kernel may
            # drop the pages that the failed fsync should have written.
            self.close()
            raise

    def close(self) -> None:
        """Closes the connection. Safe to call twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and not _is_there(self._path, self._opened_id):
            # The file was replaced, for example by a backup. What is written to the old one is seen by nobody.
            self.close()
        if self._connection is None:
            connection = open_sqlite(self._path)
            self._connection = connection
            self._opened_id = file_id(self._path)
            connection.executescript(f"BEGIN IMMEDIATE; {self._schema}")
            self._upgrade(connection)
            connection.execute("COMMIT")
        return self._connection


def open_sqlite(path: Path) -> sqlite3.Connection:
    """Opens or creates the file, in WAL mode with an fsync at each commit. The caller begins transactions itself.

    The file is for its owner alone, whatever the umask. One that others could read is closed to them.

    The connection may be handed from thread to thread, but two threads must not use it at once.

    Raises:
        sqlite3.Error: the file is not a database, or cannot be opened.
        OSError: its folder cannot be created.
    """
    is_new = not path.exists()
    if is_new:
        private_folder(path.parent)
    for suffix in _BESIDE:
        make_private(path.with_name(path.name + suffix), create=not suffix)
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _enter_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        connection.close()
        raise
    if is_new:
        fsync(path.parent)
    return connection


def file_id(path: Path) -> tuple[int, int]:
    """Returns what tells this file from another that takes its name.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return found.st_dev, found.st_ino


def add_column(connection: sqlite3.Connection, table: str, column: str) -> None:
    """Adds a column, such as "checksum INTEGER", to a table that does not have it yet."""
    names = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    if column.split()[0] not in names:
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")


def _is_there(path: Path, opened_id: tuple[int, int]) -> bool:
    try:
        return file_id(path) == opened_id
    except FileNotFoundError:
        return False


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Turns on WAL mode, and waits while another process does: SQLite does not apply its busy timeout here."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_SECONDS
    mode = ""
    while mode != "wal":
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)

"""Writes what ingest has read: rows, dead letters and offsets, in one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Table, and_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from feedback.bus.contract import Delivered
from feedback.bus.topics import DEMONSTRATIONS as DEMONSTRATIONS_TOPIC
from feedback.bus.topics import RANKINGS as RANKINGS_TOPIC
from feedback.bus.topics import SAMPLES as SAMPLES_TOPIC
from feedback.store.decode import DeadLetter, Row, dead_letter, decode
from feedback.store.engine import open_engine, writing
from feedback.store.tables import DEAD_LETTERS, DEMONSTRATIONS, OFFSETS, RANKINGS, SAMPLES

_TABLES: Mapping[str, Table] = {
    SAMPLES_TOPIC: SAMPLES,
    RANKINGS_TOPIC: RANKINGS,
    DEMONSTRATIONS_TOPIC: DEMONSTRATIONS,
}

Partition = tuple[str, int]


class StaleError(Exception):
    """Another ingest has moved the offsets. Nothing was written; read again from where they are now."""


@dataclass(frozen=True)
class Offset:
    """The next offset to read from a partition, and the id of the log that it belongs to."""

    log_id: str
    next_offset: int


class Ledger:
    """The store as ingest writes it. For one thread.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: any method except close, if the database fails.
    """

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date; see feedback.store.engine.open_engine."""
        self._engine = open_engine(url)

    def offsets(self) -> dict[Partition, Offset]:
        """Returns how far each partition was read."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(OFFSETS)).all()
        return {(row.topic, row.partition): Offset(row.log_id, row.next_offset) for row in rows}

    def write(
        self,
        batch: Sequence[Delivered],
        before: Mapping[Partition, Offset],
        after: Mapping[Partition, Offset],
    ) -> int:
        """Writes the records, and moves the offsets of the partitions in `after` from where `before` has them.

        An event that is stored already is skipped. An event that cannot be used becomes a dead letter, and so does one
        whose id is stored with other contents. Returns the number of dead letters.

        Raises:
            StaleError: another ingest has moved an offset.
        """
        with writing(self._engine) as connection:
            for partition, offset in after.items():
                _move(connection, partition, before.get(partition), offset)
            letters: list[DeadLetter] = []
            for topic, table in _TABLES.items():
                letters += _insert_events(connection, table, [each for each in batch if each.position.topic == topic])
            if letters:
                connection.execute(_insert(connection, DEAD_LETTERS), [vars(letter) for letter in letters])
            connection.commit()
        return len(letters)

    def unpublished_dead_letters(self, limit: int) -> list[tuple[str, bytes]]:
        """Returns the ids and events of dead letters that their topic does not have yet."""
        columns = DEAD_LETTERS.c
        statement = select(columns.event_id, columns.event).where(columns.published == 0).limit(limit)
        with self._engine.connect() as connection:
            return [(row.event_id, row.event) for row in connection.execute(statement)]

    def mark_published(self, event_ids: Sequence[str]) -> None:
        """Marks dead letters as published."""
        statement = update(DEAD_LETTERS).where(DEAD_LETTERS.c.event_id.in_(event_ids)).values(published=1)
        with writing(self._engine) as connection:
            connection.execute(statement)
            connection.commit()

    def close(self) -> None:
        """Closes the connections. Safe to call twice."""
        self._engine.dispose()


def _move(connection: Connection, partition: Partition, before: Offset | None, after: Offset) -> None:
    """Moves an offset if it is still at `before`: of two ingests that read the same records, one fails.

    Raises:
        StaleError: the offset is elsewhere.
    """
    here = and_(OFFSETS.c.topic == partition[0], OFFSETS.c.partition == partition[1])
    if before is None:
        values = {"topic": partition[0], "partition": partition[1], **vars(after)}
        inserted = connection.execute(_insert(connection, OFFSETS).returning(OFFSETS.c.topic), values)
        moved = len(inserted.all())
    else:
        as_before = and_(OFFSETS.c.log_id == before.log_id, OFFSETS.c.next_offset == before.next_offset)
        moved = connection.execute(update(OFFSETS).where(here, as_before).values(**vars(after))).rowcount
    if moved != 1:
        raise StaleError(f"the offset of {partition[0]}/{partition[1]} is no longer {before}")


def _insert_events(connection: Connection, table: Table, batch: Sequence[Delivered]) -> list[DeadLetter]:
    """Inserts the new events of a batch. Returns the rest as dead letters, except for plain duplicates."""
    letters: list[DeadLetter] = []
    decoded: list[tuple[Delivered, Row]] = []
    for delivered in batch:
        outcome = decode(delivered)
        if isinstance(outcome, Row):
            decoded.append((delivered, outcome))
        else:
            letters.append(outcome)
    digests = _digests(connection, table, [row.event_id for _, row in decoded])
    new: list[Row] = []
    for delivered, row in decoded:
        if row.event_id not in digests:
            digests[row.event_id] = row.content_digest
            new.append(row)
        elif digests[row.event_id] != row.content_digest:
            letters.append(dead_letter(delivered, "the event id is taken by an event with other contents"))
    if new:
        connection.execute(_insert(connection, table), [_values(row) for row in new])
    return letters


def _digests(connection: Connection, table: Table, event_ids: Sequence[str]) -> dict[str, bytes]:
    columns = table.c
    statement = select(columns.event_id, columns.content_digest).where(columns.event_id.in_(event_ids))
    return {row.event_id: row.content_digest for row in connection.execute(statement)}


def _values(row: Row) -> dict[str, object]:
    values = {**vars(row), **vars(row.position), **row.own}
    del values["position"], values["own"]
    return values


def _insert(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Returns an INSERT that skips rows that are there already."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()

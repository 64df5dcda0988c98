"""Writes what ingest has read: rows, dead letters and offsets, in one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, select, update
from sqlalchemy.dialects import postgresql, sqlite

from feedback.bus.contract import Delivered
from feedback.bus.topics import DEAD_LETTERS as DEAD_LETTERS_TOPIC
from feedback.bus.topics import DEMONSTRATIONS as DEMONSTRATIONS_TOPIC
from feedback.bus.topics import RANKINGS as RANKINGS_TOPIC
from feedback.bus.topics import SAMPLES as SAMPLES_TOPIC
from feedback.store.decode import DeadLetter, Row, dead_letter, decode, relays_dead_letter
from feedback.store.engine import open_engine, writing
from feedback.store.tables import DEAD_LETTERS, DEMONSTRATIONS, OFFSETS, RANKINGS, SAMPLES
from feedback.token import Keyring

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
    """The next offset to read from a partition, the id of the log that it belongs to, and the last record before it.

    `last_digest` tells that record from another at its place. It is None while nothing was read.
    """

    log_id: str
    next_offset: int
    last_digest: bytes | None = None


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
        return {(row.topic, row.partition): Offset(row.log_id, row.next_offset, row.last_digest) for row in rows}

    def begin_again(self, partition: Partition, before: Offset, log_id: str) -> bool:
        """Moves an offset to the beginning of a log that lost records, and counts that.

        Returns whether it did: not if another ingest has moved the offset from where `before` has it.
        """
        again = {"log_id": log_id, "next_offset": 0, "last_digest": None, "num_losses": OFFSETS.c.num_losses + 1}
        with writing(self._engine) as connection:
            moved = connection.execute(update(OFFSETS).where(*_at(partition, before)).values(**again)).rowcount
            connection.commit()
        return moved == 1

    def begin_all_again(self) -> None:
        """Moves all offsets to the beginning. What is stored already is skipped when it is read again."""
        with writing(self._engine) as connection:
            connection.execute(update(OFFSETS).values(next_offset=0, last_digest=None))
            connection.commit()

    def write(
        self,
        batch: Sequence[Delivered],
        before: Mapping[Partition, Offset],
        after: Mapping[Partition, Offset],
        keyring: Keyring,
    ) -> int:
        """Writes the records, and moves the offsets of the partitions in `after` from where `before` has them.

        An event that is stored already is skipped, also if its key is gone since. Any other that cannot be used, or
        that no key of `keyring` signed, becomes a dead letter. What a relay gave up is written as one too. Returns the
        number of new dead letters.

        Raises:
            StaleError: another ingest has moved an offset.
        """
        # Before the transaction, which keeps every other writer out.
        relayed = [relays_dead_letter(each) for each in batch if each.position.topic == DEAD_LETTERS_TOPIC]
        published = [vars(letter) | {"published": 1} for letter in relayed if letter]
        events = [each for each in batch if each.position.topic != DEAD_LETTERS_TOPIC]
        decoded = [(delivered, decode(delivered, keyring)) for delivered in events]
        unusable = [(delivered, outcome) for delivered, outcome in decoded if isinstance(outcome, DeadLetter)]
        rows = [(delivered, outcome) for delivered, outcome in decoded if isinstance(outcome, Row)]
        with writing(self._engine) as connection:
            for partition, offset in after.items():
                _move(connection, partition, before.get(partition), offset)
            letters = [letter for delivered, letter in unusable if not _is_stored(connection, delivered)]
            for topic, table in _TABLES.items():
                letters += _insert_events(connection, table, [each for each in rows if each[1].position.topic == topic])
            if letters:
                connection.execute(_insert(connection, DEAD_LETTERS), [vars(letter) for letter in letters])
            if published:
                connection.execute(_insert(connection, DEAD_LETTERS), published)
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
    if before is None:
        values = {"topic": partition[0], "partition": partition[1], **vars(after)}
        inserted = connection.execute(_insert(connection, OFFSETS).returning(OFFSETS.c.topic), values)
        moved = len(inserted.all())
    else:
        moved = connection.execute(update(OFFSETS).where(*_at(partition, before)).values(**vars(after))).rowcount
    if moved != 1:
        raise StaleError(f"the offset of {partition[0]}/{partition[1]} is no longer {before}")


def _at(partition: Partition, offset: Offset) -> tuple[ColumnElement[bool], ...]:
    """Returns the conditions for a partition's row while its offset is here."""
    return (
        OFFSETS.c.topic == partition[0],
        OFFSETS.c.partition == partition[1],
        OFFSETS.c.log_id == offset.log_id,
        OFFSETS.c.next_offset == offset.next_offset,
    )


def _insert_events(connection: Connection, table: Table, rows: Sequence[tuple[Delivered, Row]]) -> list[DeadLetter]:
    """Inserts the new events of a batch. Plain duplicates are skipped.

    Two replicas may have acknowledged other contents under one request id, and so under one event id. Both are kept,
    and the reader takes the last one. A sample's id is made by the server, so there a second content is a dead letter,
    which is returned.
    """
    stored = _digests(connection, table, [row.event_id for _, row in rows])
    letters: list[DeadLetter] = []
    new: list[Row] = []
    for delivered, row in rows:
        contents = stored.setdefault(row.event_id, set())
        if row.content_digest in contents:
            continue
        if contents and table is SAMPLES:
            letters.append(dead_letter(delivered, "the sample's id is taken by a sample with other contents"))
            continue
        contents.add(row.content_digest)
        new.append(row)
    if new:
        connection.execute(_insert(connection, table), [_values(row) for row in new])
    return letters


def _is_stored(connection: Connection, delivered: Delivered) -> bool:
    """Whether these very bytes were taken before, when their key was in the keyring. Nothing of them is parsed."""
    columns = _TABLES[delivered.position.topic].c
    # PostgreSQL takes no NUL in a text, and no event that is stored has one in its id.
    event_id = delivered.event_id.replace("\0", "")
    found = select(columns.seq).where(columns.event_id == event_id, columns.event == delivered.value)
    return connection.execute(found).first() is not None


def _digests(connection: Connection, table: Table, event_ids: Sequence[str]) -> dict[str, set[bytes]]:
    """Returns the contents that are stored under each id."""
    columns = table.c
    statement = select(columns.event_id, columns.content_digest).where(columns.event_id.in_(event_ids))
    found: dict[str, set[bytes]] = {}
    for row in connection.execute(statement):
        found.setdefault(row.event_id, set()).add(row.content_digest)
    return found


def _values(row: Row) -> dict[str, object]:
    values = {**vars(row), **vars(row.position), **row.own}
    del values["position"], values["own"]
    return values


def _insert(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Returns an INSERT that skips rows that are there already."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()

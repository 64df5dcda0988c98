"""The log between the processes: append-only topics, read by offset.

Two engines keep this contract, and one test suite holds both to it: `sqlite://` (one file, one machine) and `kafka://`.
Offsets of a partition only grow, and may have gaps. Records with the same key go to the same partition, in the order in
which they were published. A record may be delivered more than once; readers recognise it by its event id.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_RECORD_BYTES = 16 * 1024 * 1024


class BusError(Exception):
    """The bus failed. It may have done a part of what was asked; it is safe to try again."""


class PublishError(BusError):
    """Some records were not published. `outcomes` says for each record that was given what became of it."""

    def __init__(self, message: str, outcomes: "Sequence[Outcome]") -> None:
        super().__init__(message)
        self.outcomes = outcomes


@dataclass(frozen=True)
class TopicSpec:
    """A topic as it should be created. A topic with one partition has a total order."""

    name: str
    partitions: int = 1
    compacted: bool = False


@dataclass(frozen=True)
class Record:
    """A record to publish. `event_id` is the same in each attempt."""

    topic: str
    key: bytes
    value: bytes
    event_id: str

    @property
    def size_bytes(self) -> int:
        """What counts towards MAX_RECORD_BYTES."""
        return len(self.key) + len(self.value)


@dataclass(frozen=True)
class Position:
    """A place in the log."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Refused:
    """The bus will never take this record, however often it is tried. It was not appended."""

    reason: str


# None: the record may have been appended or not; it is safe to try again.
Outcome = Position | Refused | None


@dataclass(frozen=True)
class Delivered:
    """A record as it was read. `fault` says why it is not what was published; it is empty if it is."""

    position: Position
    key: bytes
    value: bytes
    event_id: str
    fault: str = ""

    @property
    def digest(self) -> bytes:
        """Tells this record from another at the same place of the log."""
        return record_digest(self)


class Consumer(Protocol):
    """Reads the partitions of some topics from given offsets. For one thread only."""

    def poll(self, timeout_seconds: float) -> list[Delivered]:
        """Returns the next records, in order within a partition; an empty list if none came in time.

        Raises:
            BusError: the bus cannot be read.
        """
        ...

    def close(self) -> None:
        """Closes the connection. Safe to call twice."""
        ...


class Bus(Protocol):
    """A log of topics. Safe for use by several threads.

    Raises:
        BusError: any method except close, if the bus fails.
    """

    def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Creates the topics that do not exist yet, and returns when they can be used."""
        ...

    def publish(self, records: Sequence[Record]) -> list[Position]:
        """Appends the records, and returns when all are durable, with their positions.

        A record that the bus refuses for good does not keep the others from being appended. If it raises PublishError,
        that says what became of each record; after any other BusError, any of them may have been appended.
        """
        ...

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Returns a consumer that begins at `start`, an offset per (topic, partition), or at the earliest record."""
        ...

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Returns the end of each partition: the next record will have this offset or a greater one."""
        ...

    def read_at(self, positions: Sequence[Position]) -> dict[Position, Delivered]:
        """Returns for each position the record there, or the first one after it; nothing if there is none.

        `positions` has one position at most of each partition.
        """
        ...

    def log_id(self, topic: str) -> str:
        """Returns the id of this log of the topic. A topic that was lost and created again has another id."""
        ...

    def close(self) -> None:
        """Closes the connections. Safe to call twice."""
        ...


def record_digest(record: Record | Delivered) -> bytes:
    """Returns the SHA-256 of what a record says, wherever it stands."""
    found = hashlib.sha256()
    for part in (record.event_id.encode(errors="replace"), record.key, record.value):
        found.update(len(part).to_bytes(8) + part)
    return found.digest()


def outcomes_by_size(records: Sequence[Record]) -> list[Outcome]:
    """Returns Refused for each record that is too large for an engine, and None for the others."""
    return [
        Refused(f"it has {record.size_bytes} bytes; a record may have {MAX_RECORD_BYTES}")
        if record.size_bytes > MAX_RECORD_BYTES
        else None
        for record in records
    ]


def settled(records: Sequence[Record], outcomes: Sequence[Outcome], cause: str = "") -> list[Position]:
    """Returns the positions of records that were all published.

    Raises:
        PublishError: at least one was not; the message names the first.
    """
    positions = [outcome for outcome in outcomes if isinstance(outcome, Position)]
    if len(positions) == len(records):
        return positions
    record, outcome = next(
        (record, outcome)
        for record, outcome in zip(records, outcomes, strict=True)
        if not isinstance(outcome, Position)
    )
    reason = outcome.reason if isinstance(outcome, Refused) else cause
    count = len(records) - len(positions)
    raise PublishError(f"{count} of {len(records)} events not published; {record.event_id}: {reason}", outcomes)

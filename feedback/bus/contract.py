"""The log between the processes: append-only topics, read by offset.

Two engines keep this contract, and one test suite holds both to it: `sqlite://` (one file, one machine) and `kafka://`.
Offsets of a partition only grow, and may have gaps. Records with the same key go to the same partition, in the order in
which they were published. A record may be delivered more than once; readers recognise it by its event id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_RECORD_BYTES = 16 * 1024 * 1024


class BusError(Exception):
    """The bus failed. It may have done a part of what was asked; it is safe to try again."""


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


@dataclass(frozen=True)
class Position:
    """A place in the log."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Delivered:
    """A record as it was read."""

    position: Position
    key: bytes
    value: bytes
    event_id: str


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

    def publish(self, records: Sequence[Record]) -> None:
        """Appends the records, and returns when all are durable. If it raises, any of them may have been appended."""
        ...

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Returns a consumer that begins at `start`, an offset per (topic, partition), or at the earliest record."""
        ...

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Returns the end of each partition: the next record will have this offset or a greater one."""
        ...

    def log_id(self, topic: str) -> str:
        """Returns the id of this log of the topic. A topic that was lost and created again has another id."""
        ...

    def close(self) -> None:
        """Closes the connections. Safe to call twice."""
        ...


def check_sizes(records: Sequence[Record]) -> None:
    """Checks that no record is too large for an engine.

    Raises:
        BusError: a record has more than MAX_RECORD_BYTES bytes.
    """
    for record in records:
        if len(record.key) + len(record.value) > MAX_RECORD_BYTES:
            raise BusError(f"event {record.event_id} has more than {MAX_RECORD_BYTES} bytes")

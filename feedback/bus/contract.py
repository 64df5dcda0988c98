"""The log between the processes: append-only topics, read by offset.

Two engines keep this contract, and one test-suite holds both to it: `sqlite://` (one file, one machine) and `kafka://`.
Offsets of one partition only grow, with gaps. Records with the same key go to the same partition, in the order in which
they were published. A record may be delivered more than once; its event id tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_RECORD_BYTES = 16 * 1024 * 1024


class BusError(Exception):
    """The bus could not do what was asked. Nothing is known about what it did of it; to try again is safe."""


@dataclass(frozen=True)
class TopicSpec:
    """A topic as it should be created. A topic of one partition has a total order."""

    name: str
    partitions: int = 1
    compacted: bool = False


@dataclass(frozen=True)
class Record:
    """A record to publish. `event_id` is the same for each attempt."""

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
    """Reads the partitions of some topics from where it was started. Belongs to one thread."""

    def poll(self, timeout_seconds: float) -> list[Delivered]:
        """Returns the next records, in order within a partition; empty if none came in time. Raises BusError."""
        ...

    def close(self) -> None:
        """Gives up the connection. Harmless when repeated."""
        ...


class Bus(Protocol):
    """A log of topics. Safe for use by several threads. Every method but close raises BusError."""

    def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Creates the topics that do not exist yet, and returns when they can be used."""
        ...

    def publish(self, records: Sequence[Record]) -> None:
        """Appends the records, and returns when all are durable. If it raises, any of them may have been appended."""
        ...

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Reads topics from the given offset of each (topic, partition); from the earliest where none is given."""
        ...

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will at least have."""
        ...

    def log_id(self, topic: str) -> str:
        """Names this log of the topic. A topic that was lost and created anew has another."""
        ...

    def close(self) -> None:
        """Gives up the connections. Harmless when repeated."""
        ...


def check_sizes(records: Sequence[Record]) -> None:
    """Raises BusError if a record is larger than any engine takes."""
    for record in records:
        if len(record.key) + len(record.value) > MAX_RECORD_BYTES:
            raise BusError(f"event {record.event_id} has more than {MAX_RECORD_BYTES} bytes")

"""Reads Kafka's partitions, from an offset on or at one place."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from feedback.bus.contract import BusError, Delivered, Position
from feedback.bus.kafka_connection import MAX_MESSAGE_BYTES, REQUEST_TIMEOUT_MS, Cluster, connect_consumer

logger = logging.getLogger(__name__)

EVENT_ID_HEADER = "event_id"


class KafkaLogConsumer:
    """Implements contract.Consumer. Has no consumer group: the caller stores the offsets beside what it read."""

    def __init__(self, cluster: Cluster, prefix: str, start: Mapping[TopicPartition, int | None]) -> None:
        self._prefix = prefix
        self._consumer: KafkaConsumer | None = None
        try:
            self._consumer = connect_consumer(cluster, max_partition_fetch_bytes=MAX_MESSAGE_BYTES)
            self._consumer.assign(list(start))
            beginnings = _beginnings(self._consumer, list(start))
            for partition, offset in start.items():
                beginning = beginnings[partition]
                if offset is not None and offset < beginning:
                    logger.error(
                        "%s/%d: records %d to %d were removed by the broker before they were read",
                        partition.topic, partition.partition, offset, beginning - 1,
                    )  # fmt: skip
                self._consumer.seek(partition, max(offset or 0, beginning))
        except (BusError, KafkaError, OSError) as error:
            self.close()
            raise BusError(f"cannot consume: {error!r}") from error

    def poll(self, timeout_seconds: float) -> list[Delivered]:
        """Implements contract.Consumer."""
        if self._consumer is None:
            raise BusError("the consumer is closed")
        try:
            batches = self._consumer.poll(timeout_ms=round(timeout_seconds * 1000))
        except KafkaError as error:
            raise BusError(f"cannot poll: {error!r}") from error
        return [to_delivered(record, self._prefix) for batch in batches.values() for record in batch]

    def close(self) -> None:
        """Implements contract.Consumer."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False)
            self._consumer = None


def read_at(
    reader: KafkaConsumer, prefix: str, wanted: Mapping[TopicPartition, Position], ends: Mapping[str, Mapping[int, int]]
) -> dict[Position, Delivered]:
    """Returns what contract.Bus.read_at does; `ends` has the end offsets of the topics.

    Raises:
        BusError: the broker does not answer.
        KafkaError: it answers with an error.
    """
    beginnings = _beginnings(reader, list(wanted))
    starts = {each: max(position.offset, beginnings[each]) for each, position in wanted.items()}
    missing = {each for each, start in starts.items() if start < ends[wanted[each].topic].get(each.partition, 0)}
    found: dict[Position, Delivered] = {}
    deadline = time.monotonic() + REQUEST_TIMEOUT_MS / 1000
    reader.assign(list(missing))
    for each in missing:
        # A partition that is assigned again is still paused.
        reader.resume(each)
        reader.seek(each, starts[each])
    while missing and time.monotonic() < deadline:
        for partition, batch in reader.poll(timeout_ms=500).items():
            if partition in missing:
                found[wanted[partition]] = to_delivered(batch[0], prefix)
                missing.discard(partition)
                reader.pause(partition)
    if missing:
        raise BusError(f"cannot read the records at {[wanted[each] for each in missing]}: no answer in time")
    return found


def _beginnings(reader: KafkaConsumer, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """Returns the first offset of each partition.

    Raises:
        BusError: the broker does not know one of them.
        KafkaError: it does not answer.
    """
    try:
        found: dict[TopicPartition, int] = reader.beginning_offsets(partitions, timeout_ms=REQUEST_TIMEOUT_MS)
    except KeyError as error:
        # So kafka-python says that an answer lacks a partition, as while a broker starts.
        raise BusError(f"the broker does not know {error}") from error
    return found


def to_delivered(record: Any, prefix: str) -> Delivered:
    """Returns a record of kafka-python as the contract has it."""
    # A record that another program wrote may have a header without a value.
    event_id = next((value for name, value in record.headers if name == EVENT_ID_HEADER), None) or b""
    return Delivered(
        Position(record.topic.removeprefix(prefix), record.partition, record.offset),
        record.key or b"",
        record.value or b"",
        event_id.decode(errors="replace"),
    )

"""The bus of many machines: Apache Kafka, or a broker that speaks its protocol, through kafka-python."""

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic, OffsetSpec
from kafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from feedback.bus.contract import (
    MAX_RECORD_BYTES,
    BusError,
    Consumer,
    Delivered,
    Position,
    Record,
    TopicSpec,
    check_sizes,
)

logger = logging.getLogger(__name__)

EVENT_ID_HEADER = "event_id"
_REQUEST_TIMEOUT_MS = 10_000
_DELIVERY_TIMEOUT_MS = 20_000
_CONNECT_TIMEOUT_SECONDS = 3.0
_METADATA_TIMEOUT_MS = 5_000
# What Kafka adds to a record: headers, lengths, checksums.
_OVERHEAD_BYTES = 64 * 1024

_CONNECTION: Mapping[str, Any] = {
    "request_timeout_ms": _REQUEST_TIMEOUT_MS,
    "bootstrap_timeout_ms": _REQUEST_TIMEOUT_MS,
    "reconnect_backoff_max_ms": 1_000,
}


class KafkaBus:
    """Implements contract.Bus. Its clients are created on first use, and again after an error."""

    def __init__(self, bootstrap_servers: str, prefix: str = "") -> None:
        """Connects to the cluster.

        Args:
            bootstrap_servers: `host:port` of one server or more, separated by commas.
            prefix: stands before the name of each topic on the cluster.

        Raises:
            BusError: no server can be reached.
        """
        self._servers = bootstrap_servers.split(",")
        self._prefix = prefix
        # Two locks, so that publishing, which may wait for a broker, does not hold up the admin client's calls.
        self._admin_lock = threading.Lock()
        self._producer_lock = threading.Lock()
        self._admin: KafkaAdminClient | None = None
        self._producer: KafkaProducer | None = None
        with self._admin_lock:
            self._call_admin("describe_cluster")

    def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Implements contract.Bus."""
        topics = [replace(topic, name=self._prefix + topic.name) for topic in topics]
        with self._admin_lock:
            answer = self._call_admin("create_topics", [_new_topic(topic) for topic in topics], raise_errors=False)
            for topic in answer["topics"]:
                error = for_code(topic["error_code"])
                if topic["error_code"] and error is not TopicAlreadyExistsError:
                    raise BusError(f"cannot create topic {topic['name']}: {error.__name__} {topic['error_message']}")
            self._call_admin("wait_for_topics", [topic.name for topic in topics], timeout_ms=_REQUEST_TIMEOUT_MS)
        for spec in topics:
            partitions = len(self._describe(spec.name)["partitions"])
            if spec.partitions == 1 and partitions > 1:
                raise BusError(f"topic {spec.name} has {partitions} partitions; it needs exactly 1")

    def publish(self, records: Sequence[Record]) -> None:
        """Implements contract.Bus."""
        check_sizes(records)
        with self._producer_lock:
            try:
                if self._producer is None:
                    self._producer = _connect_producer(self._servers)
                futures = [
                    self._producer.send(
                        self._prefix + record.topic,
                        key=record.key,
                        value=record.value,
                        headers=[(EVENT_ID_HEADER, record.event_id.encode())],
                    )
                    for record in records
                ]
                self._producer.flush(timeout=_DELIVERY_WAIT_SECONDS)
                # flush() says nothing about batches that expired or were refused; the futures do.
                for future in futures:
                    future.get(timeout=_DELIVERY_WAIT_SECONDS)
            except (KafkaError, ValueError, OSError) as error:
                # After a failed batch an idempotent producer may be out of sequence for good.
                self._close_producer()
                raise BusError(f"cannot publish: {error!r}") from error

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Implements contract.Bus."""
        partitions = [
            TopicPartition(self._prefix + topic, partition["partition_index"])
            for topic in topics
            for partition in self._describe(self._prefix + topic)["partitions"]
        ]
        offsets = {each: start.get((each.topic.removeprefix(self._prefix), each.partition)) for each in partitions}
        return _KafkaLogConsumer(self._servers, self._prefix, offsets)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Implements contract.Bus."""
        name = self._prefix + topic
        described = self._describe(name)
        partitions = [TopicPartition(name, partition["partition_index"]) for partition in described["partitions"]]
        with self._admin_lock:
            ends = self._call_admin("list_partition_offsets", dict.fromkeys(partitions, OffsetSpec.LATEST))
        return {each.partition: found.offset for each, found in ends.items()}

    def log_id(self, topic: str) -> str:
        """Implements contract.Bus."""
        return str(self._describe(self._prefix + topic)["topic_id"])

    def close(self) -> None:
        """Implements contract.Bus."""
        with self._producer_lock:
            self._close_producer()
        with self._admin_lock:
            self._close_admin()

    def _describe(self, topic: str) -> dict[str, Any]:
        with self._admin_lock:
            described: dict[str, Any] = self._call_admin("describe_topics", [topic])[0]
        if described["error_code"]:
            raise BusError(f"topic {topic}: {for_code(described['error_code']).__name__}")
        return described

    def _call_admin(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            if self._admin is None:
                _check_reachable(self._servers)
                self._admin = KafkaAdminClient(bootstrap_servers=self._servers, **_CONNECTION)
            return getattr(self._admin, method)(*arguments, **options)
        except (KafkaError, OSError) as error:
            self._close_admin()
            raise BusError(f"{method} failed: {error!r}") from error

    def _close_admin(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None

    def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                producer.close(timeout=_DELIVERY_WAIT_SECONDS)
            except KafkaError as error:
                raise BusError(f"cannot close the producer: {error!r}") from error


class _KafkaLogConsumer:
    """Implements contract.Consumer. Has no consumer group: the caller stores the offsets beside what it read."""

    def __init__(self, servers: Sequence[str], prefix: str, start: Mapping[TopicPartition, int | None]) -> None:
        self._prefix = prefix
        self._consumer: KafkaConsumer | None = None
        try:
            _check_reachable(servers)
            self._consumer = KafkaConsumer(
                bootstrap_servers=servers,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                fetch_max_wait_ms=100,
                max_partition_fetch_bytes=MAX_RECORD_BYTES + _OVERHEAD_BYTES,
                **_CONNECTION,
            )
            self._consumer.assign(list(start))
            beginnings = self._consumer.beginning_offsets(list(start), timeout_ms=_REQUEST_TIMEOUT_MS)
            for partition, offset in start.items():
                beginning = beginnings[partition]
                if offset is not None and offset < beginning:
                    logger.error(
                        "%s/%d: records %d to %d were removed by the broker before they were read",
                        partition.topic, partition.partition, offset, beginning - 1,
                    )  # fmt: skip
                self._consumer.seek(partition, max(offset or 0, beginning))
        except (KafkaError, OSError) as error:
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


_DELIVERY_WAIT_SECONDS = _DELIVERY_TIMEOUT_MS / 1000 + 5


def _check_reachable(servers: Sequence[str]) -> None:
    """Checks that one of the servers takes a connection.

    kafka-python's clients take long to notice that none does, and then leave their sockets open.

    Raises:
        OSError: no server takes a connection.
    """
    for index, server in enumerate(servers):
        host, _, port = server.strip().rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_SECONDS).close()
        except OSError:
            if index == len(servers) - 1:
                raise
        else:
            return


def _connect_producer(servers: Sequence[str]) -> KafkaProducer:
    _check_reachable(servers)
    return KafkaProducer(
        bootstrap_servers=servers,
        acks="all",
        enable_idempotence=True,
        delivery_timeout_ms=_DELIVERY_TIMEOUT_MS,
        max_block_ms=_METADATA_TIMEOUT_MS,
        max_request_size=MAX_RECORD_BYTES + _OVERHEAD_BYTES,
        linger_ms=0,
        allow_auto_create_topics=False,
        **_CONNECTION,
    )


def _new_topic(topic: TopicSpec) -> NewTopic:
    # Records are kept for good, whatever the brokers' default: what ingest has not read is stored nowhere else.
    settings = {
        "max.message.bytes": str(MAX_RECORD_BYTES + _OVERHEAD_BYTES),
        "retention.ms": "-1",
        "retention.bytes": "-1",
    }
    if topic.compacted:
        settings["cleanup.policy"] = "compact"
    # A replication factor of -1 takes the broker's default.
    return NewTopic(topic.name, num_partitions=topic.partitions, replication_factor=-1, topic_configs=settings)


def to_delivered(record: Any, prefix: str) -> Delivered:
    # A record that another program wrote may have a header without a value.
    """Returns a record of kafka-python as the contract has it."""
    event_id = next((value for name, value in record.headers if name == EVENT_ID_HEADER), None) or b""
    return Delivered(
        Position(record.topic.removeprefix(prefix), record.partition, record.offset),
        record.key or b"",
        record.value or b"",
        event_id.decode(errors="replace"),
    )

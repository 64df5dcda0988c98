"""The bus of many machines: Apache Kafka, or a broker that speaks its protocol, through kafka-python."""

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, NewTopic, OffsetSpec
from kafka.errors import (
    BrokerResponseError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAlreadyExistsError,
    for_code,
)

from feedback.bus.contract import (
    BusError,
    Consumer,
    Delivered,
    Outcome,
    Position,
    Record,
    Refused,
    TopicSpec,
    outcomes_by_size,
    settled,
)
from feedback.bus.kafka_connection import (
    DELIVERY_WAIT_SECONDS,
    MAX_MESSAGE_BYTES,
    REQUEST_TIMEOUT_MS,
    Cluster,
    connect_admin,
    connect_consumer,
    connect_producer,
)
from feedback.bus.kafka_reading import EVENT_ID_HEADER, KafkaLogConsumer, read_at
from feedback.bus.kafka_security import KafkaSecurity

logger = logging.getLogger(__name__)

_LIMIT = "max.message.bytes"
_REFUSED = Refused(f"the broker takes no record of its size; see {_LIMIT} of the topic")
_REFUSED_WITH_OTHERS = Refused("")
# What a batch of one record takes besides its key and value.
_MARGIN_BYTES = 512
# A look at one record of each partition fetches no more; a greater record comes alone.
_LOOK_BYTES = 64 * 1024
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


class KafkaBus:
    """Implements contract.Bus. Its clients are created on first use, and again after an error."""

    def __init__(self, bootstrap_servers: str, prefix: str = "", security: KafkaSecurity = KafkaSecurity()) -> None:  # noqa: B008 (frozen)
        """Connects to the cluster.

        Args:
            bootstrap_servers: `host:port` of one server or more, separated by commas.
            prefix: stands before the name of each topic on the cluster.
            security: how the cluster is spoken to.

        Raises:
            BusError: no server can be reached.
        """
        self._cluster = Cluster(bootstrap_servers.split(","), security)
        self._prefix = prefix
        # A lock each, so that publishing, which may wait for a broker, does not hold up the admin client's calls.
        self._admin_lock = threading.Lock()
        self._producer_lock = threading.Lock()
        self._looker_lock = threading.Lock()
        self._admin: KafkaAdminClient | None = None
        self._producer: KafkaProducer | None = None
        # Reads single records, for read_at.
        self._looker: KafkaConsumer | None = None
        # The largest message of topics that take less than we asked for.
        self._limits: dict[str, int] = {}
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
            self._call_admin("wait_for_topics", [topic.name for topic in topics], timeout_ms=REQUEST_TIMEOUT_MS)
        for spec in topics:
            partitions = len(self._describe(spec.name)["partitions"])
            if spec.partitions == 1 and partitions > 1:
                raise BusError(f"topic {spec.name} has {partitions} partitions; it needs exactly 1")
        self._look_at_limits([topic.name for topic in topics])

    def publish(self, records: Sequence[Record]) -> list[Position]:
        """Implements contract.Bus."""
        outcomes = outcomes_by_size(records)
        for index, record in enumerate(records):
            if outcomes[index] is None and self._is_too_large(record):
                outcomes[index] = _REFUSED
        with self._producer_lock:
            cause = self._send(records, outcomes, [index for index, each in enumerate(outcomes) if each is None])
            doubtful = [index for index, each in enumerate(outcomes) if each is _REFUSED_WITH_OTHERS]
            if doubtful:
                self._look_at_limits({self._prefix + records[index].topic for index in doubtful})
            # When a broker refuses one record for its size, kafka-python fails what else is on its way just so.
            for index in doubtful:
                cause = self._send(records, outcomes, [index]) or cause
        return settled(records, outcomes, f"cannot publish: {cause}")

    def _is_too_large(self, record: Record) -> bool:
        """Whether the broker would refuse a record, which would also fail others that are on their way."""
        name, needed_bytes = self._prefix + record.topic, record.size_bytes + _MARGIN_BYTES
        if needed_bytes <= self._limits.get(name, MAX_MESSAGE_BYTES):
            return False
        # Somebody may have widened the topic since we looked.
        self._look_at_limits([name])
        return needed_bytes > self._limits.get(name, MAX_MESSAGE_BYTES)

    def _send(self, records: Sequence[Record], outcomes: list[Outcome], indices: Sequence[int]) -> str:
        """Publishes some of the records and sets their outcomes. Returns the error of those that may succeed later.

        Raises:
            BusError: nothing is known of any record.
        """
        cause, failed = "", False
        try:
            if self._producer is None:
                self._producer = connect_producer(self._cluster)
            futures = {index: self._producer.send(**self._message(records[index])) for index in indices}
            self._producer.flush(timeout=DELIVERY_WAIT_SECONDS)
            # flush() says nothing about batches that expired or were refused; the futures do.
            for index, future in futures.items():
                try:
                    appended = future.get(timeout=DELIVERY_WAIT_SECONDS)
                    outcomes[index] = Position(records[index].topic, appended.partition, appended.offset)
                except _TOO_LARGE:
                    outcomes[index], failed = _REFUSED if len(indices) == 1 else _REFUSED_WITH_OTHERS, True
                except KafkaError as error:
                    outcomes[index], cause = None, repr(error)
        except (KafkaError, ValueError, OSError) as error:
            self._close_producer()
            raise BusError(f"cannot publish: {error!r}") from error
        if cause or failed:
            # After a failed batch an idempotent producer may be out of sequence for good.
            self._close_producer()
        return cause

    def _message(self, record: Record) -> dict[str, Any]:
        headers = [(EVENT_ID_HEADER, record.event_id.encode())]
        return {"topic": self._prefix + record.topic, "key": record.key, "value": record.value, "headers": headers}

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Implements contract.Bus."""
        partitions = [
            TopicPartition(self._prefix + topic, partition["partition_index"])
            for topic in topics
            for partition in self._describe(self._prefix + topic)["partitions"]
        ]
        offsets = {each: start.get((each.topic.removeprefix(self._prefix), each.partition)) for each in partitions}
        return KafkaLogConsumer(self._cluster, self._prefix, offsets)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Implements contract.Bus."""
        name = self._prefix + topic
        described = self._describe(name)
        partitions = [TopicPartition(name, partition["partition_index"]) for partition in described["partitions"]]
        with self._admin_lock:
            ends = self._call_admin("list_partition_offsets", dict.fromkeys(partitions, OffsetSpec.LATEST))
        return {each.partition: found.offset for each, found in ends.items()}

    def read_at(self, positions: Sequence[Position]) -> dict[Position, Delivered]:
        """Implements contract.Bus."""
        if not positions:
            return {}
        wanted = {TopicPartition(self._prefix + each.topic, each.partition): each for each in positions}
        ends = {topic: self.end_offsets(topic) for topic in {each.topic for each in positions}}
        with self._looker_lock:
            try:
                if self._looker is None:
                    self._looker = connect_consumer(self._cluster, max_partition_fetch_bytes=_LOOK_BYTES)
                return read_at(self._looker, self._prefix, wanted, ends)
            except (BusError, KafkaError, OSError) as error:
                self._close_looker()
                raise BusError(f"cannot read: {error!r}") from error

    def log_id(self, topic: str) -> str:
        """Implements contract.Bus."""
        return str(self._describe(self._prefix + topic)["topic_id"])

    def close(self) -> None:
        """Implements contract.Bus."""
        with self._producer_lock:
            self._close_producer()
        with self._looker_lock:
            self._close_looker()
        with self._admin_lock:
            self._close_admin()

    def _describe(self, topic: str) -> dict[str, Any]:
        with self._admin_lock:
            described: dict[str, Any] = self._call_admin("describe_topics", [topic])[0]
        if described["error_code"]:
            raise BusError(f"topic {topic}: {for_code(described['error_code']).__name__}")
        return described

    def _look_at_limits(self, names: Collection[str]) -> None:
        """Lets topics take records as large as we accept, and notes the limits of those that do not.

        Raises:
            BusError: the broker does not answer.
        """
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        with self._admin_lock:
            found = self._call_admin("describe_configs", resources, config_filter="all").get("topic", {})
            for name in names:
                # A broker that does not tell, or not us, may take whatever it likes.
                limit = int(found.get(name, {}).get(_LIMIT, {}).get("value") or MAX_MESSAGE_BYTES)
                self._limits.pop(name, None)
                if limit < MAX_MESSAGE_BYTES:
                    self._widen(name, limit)

    def _widen(self, name: str, limit: int) -> None:
        change = ConfigResource(ConfigResourceType.TOPIC, name, configs={_LIMIT: str(MAX_MESSAGE_BYTES)})
        try:
            self._call_admin("alter_configs", [change])
        except BusError as error:
            cause = error.__cause__
            if not isinstance(cause, BrokerResponseError) or cause.retriable:
                raise
            self._limits[name] = limit
            logger.error(
                "topic %s takes records of %d bytes only, and larger events go to the dead letters: set its %s to %d "
                "(not allowed to us: %r)", name, limit, _LIMIT, MAX_MESSAGE_BYTES, cause,
            )  # fmt: skip
        else:
            logger.warning("topic %s took records of %d bytes only; its %s is %d now",
                           name, limit, _LIMIT, MAX_MESSAGE_BYTES)  # fmt: skip

    def _call_admin(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            if self._admin is None:
                self._admin = connect_admin(self._cluster)
            return getattr(self._admin, method)(*arguments, **options)
        except (KafkaError, OSError) as error:
            self._close_admin()
            raise BusError(f"{method} failed: {error!r}") from error

    def _close_admin(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None

    def _close_looker(self) -> None:
        looker, self._looker = self._looker, None
        if looker is not None:
            looker.close(autocommit=False)

    def _close_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            try:
                producer.close(timeout=DELIVERY_WAIT_SECONDS)
            except KafkaError as error:
                raise BusError(f"cannot close the producer: {error!r}") from error


def _new_topic(topic: TopicSpec) -> NewTopic:
    # Records are kept for good, whatever the brokers' default: what ingest has not read is stored nowhere else.
    settings = {
        _LIMIT: str(MAX_MESSAGE_BYTES),
        "retention.ms": "-1",
        "retention.bytes": "-1",
    }
    if topic.compacted:
        settings["cleanup.policy"] = "compact"
    # A replication factor of -1 takes the broker's default.
    return NewTopic(topic.name, num_partitions=topic.partitions, replication_factor=-1, topic_configs=settings)

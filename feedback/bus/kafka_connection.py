"""How alignd's clients of Kafka are made, and how long they wait."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from feedback.bus.contract import MAX_RECORD_BYTES
from feedback.bus.kafka_security import KafkaSecurity

REQUEST_TIMEOUT_MS = 10_000
_DELIVERY_TIMEOUT_MS = 20_000
_CONNECT_TIMEOUT_SECONDS = 3.0
_METADATA_TIMEOUT_MS = 5_000
DELIVERY_WAIT_SECONDS = _DELIVERY_TIMEOUT_MS / 1000 + 5
# What Kafka adds to a record: headers, lengths, checksums.
_OVERHEAD_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = MAX_RECORD_BYTES + _OVERHEAD_BYTES

_CONNECTION: Mapping[str, Any] = {
    "request_timeout_ms": REQUEST_TIMEOUT_MS,
    "bootstrap_timeout_ms": REQUEST_TIMEOUT_MS,
    "reconnect_backoff_max_ms": 1_000,
}


@dataclass(frozen=True)
class Cluster:
    """A Kafka cluster, and how it is spoken to."""

    servers: list[str]
    """As host:port, one or more."""
    security: KafkaSecurity


def connect_admin(cluster: Cluster) -> KafkaAdminClient:
    """Connects for questions about topics, and changes of them."""
    _check_reachable(cluster.servers)
    return KafkaAdminClient(bootstrap_servers=cluster.servers, **_CONNECTION, **cluster.security.options())


def connect_consumer(cluster: Cluster, *, max_partition_fetch_bytes: int) -> KafkaConsumer:
    """Returns a consumer of no group. It fetches a whole batch at least, however many bytes that has."""
    _check_reachable(cluster.servers)
    return KafkaConsumer(
        bootstrap_servers=cluster.servers,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        allow_auto_create_topics=False,
        fetch_max_wait_ms=100,
        max_partition_fetch_bytes=max_partition_fetch_bytes,
        **_CONNECTION,
        **cluster.security.options(),
    )


def connect_producer(cluster: Cluster) -> KafkaProducer:
    """Returns a producer whose records are durable when they are acknowledged, and appended once by its retries."""
    _check_reachable(cluster.servers)
    return KafkaProducer(
        bootstrap_servers=cluster.servers,
        acks="all",
        enable_idempotence=True,
        delivery_timeout_ms=_DELIVERY_TIMEOUT_MS,
        max_block_ms=_METADATA_TIMEOUT_MS,
        max_request_size=MAX_MESSAGE_BYTES,
        linger_ms=0,
        allow_auto_create_topics=False,
        **_CONNECTION,
        **cluster.security.options(),
    )


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

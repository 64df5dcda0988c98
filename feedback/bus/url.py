"""Opens the bus that a URL names."""

from pathlib import Path

from feedback.bus.contract import Bus


def open_bus(url: str) -> Bus:
    """Opens `sqlite:///relative.db`, `sqlite:////absolute.db` or `kafka://host:port[,host:port][/name][?security]`.

    On a Kafka bus with a name, topics are called `name.topic`, so that several deployments can share a cluster. For
    TLS and SASL see feedback.bus.kafka_security.

    Raises:
        BusError: the bus cannot be reached.
        ValueError: the URL is none of these.
    """
    # Imported here, so that kafka-python is not loaded where SQLite is used.
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        from feedback.bus.sqlite import SqliteBus

        return SqliteBus(Path(rest[1:]))
    if scheme == "kafka" and rest:
        from feedback.bus.kafka import KafkaBus
        from feedback.bus.kafka_security import read_security

        place, _, query = rest.partition("?")
        servers, _, name = place.partition("/")
        return KafkaBus(servers, f"{name}." if name else "", read_security(query))
    raise ValueError(f"not a bus: {url!r}; give sqlite:///path/bus.db or kafka://host:port[,host:port][/name]")

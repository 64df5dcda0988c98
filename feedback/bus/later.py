"""A bus that may be down when its user starts: it is opened, and its topics are made, by the first call that can."""

import threading
from collections.abc import Mapping, Sequence

from feedback.bus.contract import Bus, Consumer, Delivered, Position, Record, TopicSpec
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus


class LaterBus:
    """Implements contract.Bus: every call fails with BusError until the bus can be reached.

    Raises:
        ValueError: any method, if the URL is not that of a bus.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._bus: Bus | None = None

    def create_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Implements contract.Bus."""
        self._opened().create_topics(topics)

    def publish(self, records: Sequence[Record]) -> list[Position]:
        """Implements contract.Bus."""
        return self._opened().publish(records)

    def consume(self, topics: Sequence[str], start: Mapping[tuple[str, int], int]) -> Consumer:
        """Implements contract.Bus."""
        return self._opened().consume(topics, start)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Implements contract.Bus."""
        return self._opened().end_offsets(topic)

    def read_at(self, positions: Sequence[Position]) -> dict[Position, Delivered]:
        """Implements contract.Bus."""
        return self._opened().read_at(positions)

    def log_id(self, topic: str) -> str:
        """Implements contract.Bus."""
        return self._opened().log_id(topic)

    def close(self) -> None:
        """Implements contract.Bus."""
        with self._lock:
            if self._bus is not None:
                self._bus.close()

    def _opened(self) -> Bus:
        with self._lock:
            if self._bus is None:
                bus = open_bus(self._url)
                try:
                    bus.create_topics(TOPICS)
                except BaseException:
                    bus.close()
                    raise
                self._bus = bus
            return self._bus

"""A bus that is down when its user starts, and then comes."""

from contextlib import closing
from pathlib import Path

import pytest

from feedback.bus.contract import BusError, Record
from feedback.bus.later import LaterBus
from feedback.bus.topics import POLICIES
from tests.kafka_broker import free_port


def test_each_call_fails_until_the_bus_is_there_and_then_all_topics_are(tmp_path: Path) -> None:
    folder = tmp_path / "bus"
    folder.touch()
    with closing(LaterBus(f"sqlite:///{folder}/bus.db")) as bus:
        for call in (lambda: bus.end_offsets(POLICIES), lambda: bus.consume([POLICIES], {}), lambda: bus.publish([])):
            with pytest.raises(BusError):
                call()
        folder.unlink()
        assert bus.end_offsets(POLICIES) == {0: 0}
        bus.publish([Record(POLICIES, b"key", b"value", "e1")])
        (delivered,) = bus.consume([POLICIES], {}).poll(1.0)
    assert (delivered.event_id, delivered.value) == ("e1", b"value")


def test_a_broker_that_is_down_fails_at_once() -> None:
    with closing(LaterBus(f"kafka://127.0.0.1:{free_port()}")) as bus, pytest.raises(BusError):
        bus.end_offsets(POLICIES)

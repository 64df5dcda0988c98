"""What a caller hears when an event cannot be made durable, and that it may be sent again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from alignd.v1 import events_pb2
from feedback.bus.topics import DEMONSTRATIONS
from feedback.outbox.door import Outbox
from serving.errors import Refusal
from serving.recording import record

MAX_BYTES = 1 << 20


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    opened = Outbox(tmp_path / "outbox.db", MAX_BYTES)
    yield opened
    await asyncio.to_thread(opened.close)


def demonstration(number: int) -> events_pb2.DemonstrationEvent:
    return events_pb2.DemonstrationEvent(event_id=f"d{number}", user_id="ada", sample_id="s", text="x" * 100_000)


async def fill(outbox: Outbox) -> tuple[int, Refusal]:
    """Returns how many events found room, and the refusal of the next."""
    for number in range(100):
        try:
            await record(outbox, DEMONSTRATIONS, "s", demonstration(number))
        except Refusal as refusal:
            return number, refusal
    raise AssertionError("there is no end of room")


async def test_a_full_outbox_is_resource_exhausted_and_takes_again_when_there_is_room(outbox: Outbox) -> None:
    stored, refusal = await fill(outbox)
    assert 0 < stored < 20
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUTBOX_FULL")
    assert refusal.retry_after_seconds
    # The acknowledged event is there, and a retry of it needs no room.
    await record(outbox, DEMONSTRATIONS, "s", demonstration(0))
    file = outbox._file
    file.mark_published([seq for seq, _ in file.pending(100)])
    while file.prune(0.0):
        pass
    await record(outbox, DEMONSTRATIONS, "s", demonstration(stored))


async def test_an_outbox_that_fails_is_unavailable(outbox: Outbox) -> None:
    await asyncio.to_thread(outbox.close)
    with pytest.raises(Refusal) as raised:
        await record(outbox, DEMONSTRATIONS, "s", demonstration(0))
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAVAILABLE, "OUTBOX_FAILED")
    assert raised.value.retry_after_seconds


async def test_an_id_that_was_used_for_something_else_is_refused_by_name(outbox: Outbox) -> None:
    await record(outbox, DEMONSTRATIONS, "s", demonstration(0))
    other = demonstration(0)
    other.text = "something else"
    with pytest.raises(Refusal) as raised:
        await record(outbox, DEMONSTRATIONS, "s", other)
    assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert [violation.field for violation in raised.value.violations] == ["request_id"]

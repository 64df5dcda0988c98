"""What cannot be used or published is kept in a topic of its own, with the reason."""

import time
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2
from feedback.bus.contract import MAX_RECORD_BYTES, Bus, Position, PublishError, Record, Refused
from feedback.bus.topics import DEAD_LETTERS

# Begins the id of what a relay gave up. The ids of what ingest gives up begin with the record's topic.
OUTBOX_PREFIX = "outbox/"
_MAX_KEPT_KEY_BYTES = 4096
# A dead letter keeps no more than this of a record, so that it fits into a record itself.
_MAX_KEPT_VALUE_BYTES = MAX_RECORD_BYTES - 64 * 1024
# And no more than this, if the topic takes less than we asked for: any broker's default has room for it.
_SHORT_VALUE_BYTES = 256 * 1024


def dead_letter_event(
    event_id: str, position: Position, key: bytes, value: bytes, reason: str
) -> events_pb2.DeadLetterEvent:
    """Returns the event for a record that could not be used."""
    now_ns = time.time_ns()
    return events_pb2.DeadLetterEvent(
        event_id=event_id,
        event_time=Timestamp(seconds=now_ns // 10**9, nanos=now_ns % 10**9),
        position=events_pb2.LogPosition(topic=position.topic, partition=position.partition, offset=position.offset),
        key=key[:_MAX_KEPT_KEY_BYTES],
        value=value[:_MAX_KEPT_VALUE_BYTES],
        reason=reason,
    )


def publish_dead_letters(bus: Bus, events: Sequence[bytes]) -> None:
    """Publishes dead letters; one that the topic does not take whole is published without most of its value.

    Raises:
        BusError: the bus fails.
    """
    letters = [events_pb2.DeadLetterEvent.FromString(event) for event in events]
    try:
        bus.publish([_record(letter) for letter in letters])
    except PublishError as error:
        refused = [isinstance(outcome, Refused) for outcome in error.outcomes]
        too_large = [letter for letter, is_refused in zip(letters, refused, strict=True) if is_refused]
        if len(too_large) < sum(not isinstance(outcome, Position) for outcome in error.outcomes):
            raise
        for letter in too_large:
            letter.value = letter.value[:_SHORT_VALUE_BYTES]
            letter.reason += f" (the value is cut off: {DEAD_LETTERS} does not take it whole)"
        bus.publish([_record(letter) for letter in too_large])


def _record(letter: events_pb2.DeadLetterEvent) -> Record:
    return Record(DEAD_LETTERS, letter.event_id.encode(), letter.SerializeToString(), letter.event_id)

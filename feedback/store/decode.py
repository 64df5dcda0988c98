"""Turns records of the bus into rows of the store, or into dead letters with the reason."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import MAX_RECORD_BYTES, Delivered, Position
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS, SAMPLES

_MAX_ID_BYTES = 256
# A dead letter keeps no more than this of a record, so that it fits into a record itself.
_MAX_KEPT_KEY_BYTES = 4096
_MAX_KEPT_VALUE_BYTES = MAX_RECORD_BYTES - 64 * 1024

_E = TypeVar("_E", events_pb2.SampleEvent, events_pb2.RankingEvent, events_pb2.DemonstrationEvent)


class _UnusableError(ValueError):
    """A record cannot be used. The text says why."""


@dataclass(frozen=True)
class Row:
    """A row for the table of its topic. `own` has the columns that other tables lack."""

    position: Position
    event_id: str
    user_id: str
    event_time_us: int
    event: bytes
    content_digest: bytes
    own: Mapping[str, object]


@dataclass(frozen=True)
class DeadLetter:
    """A record that could not be used."""

    event_id: str
    event_time_us: int
    reason: str
    event: bytes


def decode(delivered: Delivered) -> Row | DeadLetter:
    """Returns a record as a row of its topic's table, or as a dead letter if it is not a valid event."""
    try:
        return _ROWS[delivered.position.topic](delivered)
    except _UnusableError as error:
        return dead_letter(delivered, str(error))


def dead_letter(delivered: Delivered, reason: str) -> DeadLetter:
    """Returns a dead letter. The same record at the same position always gets the same event id."""
    position = delivered.position
    # The digest distinguishes records at the same position of a topic that was lost and created again.
    digest = hashlib.sha256(delivered.key + b"\0" + delivered.value).hexdigest()[:16]
    now_ns = time.time_ns()
    event = events_pb2.DeadLetterEvent(
        event_id=f"{position.topic}/{position.partition}/{position.offset}/{digest}",
        event_time=Timestamp(seconds=now_ns // 10**9, nanos=now_ns % 10**9),
        position=events_pb2.LogPosition(topic=position.topic, partition=position.partition, offset=position.offset),
        key=delivered.key[:_MAX_KEPT_KEY_BYTES],
        value=delivered.value[:_MAX_KEPT_VALUE_BYTES],
        reason=reason,
    )
    return DeadLetter(event.event_id, now_ns // 1000, reason, event.SerializeToString())


def _content_digest(event: Message) -> bytes:
    """Returns the SHA-256 of an event without its time, which differs between attempts to submit the same thing."""
    timeless = type(event)()
    timeless.CopyFrom(event)
    timeless.ClearField("event_time")
    return hashlib.sha256(timeless.SerializeToString(deterministic=True)).digest()


def _sample(delivered: Delivered) -> Row:
    event = _parse(events_pb2.SampleEvent, delivered)
    if event.prompt.WhichOneof("content") is None:
        raise _UnusableError("no prompt")
    _check_ids([completion.completion_id for completion in event.completions], "completion_id")
    return _row(delivered, event, {"prompt_digest": _prompt_digest(event.prompt)})


def _ranking(delivered: Delivered) -> Row:
    event = _parse(events_pb2.RankingEvent, delivered)
    _check_ids([event.sample_id], "sample_id")
    _check_ids([each for group in event.groups for each in group.completion_ids], "completion_ids")
    if any(not group.completion_ids for group in event.groups):
        raise _UnusableError("an empty group")
    return _row(delivered, event, {"sample_id": event.sample_id})


def _demonstration(delivered: Delivered) -> Row:
    event = _parse(events_pb2.DemonstrationEvent, delivered)
    _check_ids([event.sample_id], "sample_id")
    if not event.text:
        raise _UnusableError("no text")
    return _row(delivered, event, {"sample_id": event.sample_id})


_ROWS: Mapping[str, Callable[[Delivered], Row]] = {
    SAMPLES: _sample,
    RANKINGS: _ranking,
    DEMONSTRATIONS: _demonstration,
}


def _parse(kind: type[_E], delivered: Delivered) -> _E:
    try:
        event = kind.FromString(delivered.value)
        event.event_time.ToMicroseconds()
    except (DecodeError, ValueError, OverflowError) as error:
        raise _UnusableError(f"not a {kind.DESCRIPTOR.name}") from error
    _check_ids([event.event_id], "event_id")
    _check_ids([event.user_id], "user_id")
    if not event.HasField("event_time"):
        raise _UnusableError("no event_time")
    return event


def _check_ids(ids: Sequence[str], name: str) -> None:
    """Checks that ids are there, differ, fit an index, and have no NUL, which PostgreSQL does not take in a text.

    Raises:
        _UnusableError: an id breaks one of these rules.
    """
    if not ids or not all(0 < len(each.encode()) <= _MAX_ID_BYTES and "\0" not in each for each in ids):
        raise _UnusableError(f"{name} is missing, longer than {_MAX_ID_BYTES} bytes, or has a NUL")
    if len(set(ids)) != len(ids):
        raise _UnusableError(f"{name} is repeated")


def _row(delivered: Delivered, event: _E, own: Mapping[str, object]) -> Row:
    return Row(
        delivered.position,
        event.event_id,
        event.user_id,
        event.event_time.ToMicroseconds(),
        delivered.value,
        _content_digest(event),
        own,
    )


def _prompt_digest(prompt: types_pb2.Prompt) -> bytes:
    """Returns the SHA-256 of a prompt. Equal prompts have equal digests."""
    return hashlib.sha256(prompt.SerializeToString(deterministic=True)).digest()

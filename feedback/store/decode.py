"""Turns records of the bus into rows of the store, or into dead letters with the reason."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from alignd.client.rules import broken_rules
from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Delivered, Position
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS, SAMPLES
from feedback.dead_letters import OUTBOX_PREFIX, dead_letter_event
from feedback.identity import qualified
from feedback.signature import SignatureError, check_signature
from feedback.store.prompt_identity import prompt_identity
from feedback.token import Keyring

_MAX_ID_BYTES = 256
# Two attempts to submit the same thing differ in these.
_OF_AN_ATTEMPT = ("event_time", "key_id", "signature")

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


def decode(delivered: Delivered, keyring: Keyring) -> Row | DeadLetter:
    """Returns a record as a row of its topic's table, or as a dead letter if it is not a valid event of ours."""
    if delivered.fault:
        return dead_letter(delivered, delivered.fault)
    try:
        kind, to_row = _ROWS[delivered.position.topic]
        # Before the event is parsed, which takes many times its size in memory if somebody means harm.
        check_signature(kind, delivered.value, keyring)
        return to_row(delivered, _parse(kind, delivered))
    except (_UnusableError, SignatureError) as error:
        return dead_letter(delivered, str(error))


def relays_dead_letter(delivered: Delivered) -> DeadLetter | None:
    """Returns a record of the topic of dead letters if a relay wrote it; None for one of ingest's own."""
    if delivered.fault or not delivered.event_id.startswith(OUTBOX_PREFIX):
        return None
    try:
        event = events_pb2.DeadLetterEvent.FromString(delivered.value)
        time_us = event.event_time.ToMicroseconds()
        _check_ids([event.event_id], "event_id")
    except (DecodeError, ValueError, OverflowError):
        return None
    return DeadLetter(event.event_id, time_us, event.reason.replace("\0", ""), delivered.value)


def dead_letter(delivered: Delivered, reason: str) -> DeadLetter:
    """Returns a dead letter. The same record at the same position always gets the same event id."""
    position = delivered.position
    # The digest distinguishes records at the same position of a topic that was lost and created again.
    digest = hashlib.sha256(delivered.key + b"\0" + delivered.value).hexdigest()[:16]
    event_id = f"{position.topic}/{position.partition}/{position.offset}/{digest}"
    event = dead_letter_event(event_id, position, delivered.key, delivered.value, reason)
    return DeadLetter(event_id, event.event_time.ToMicroseconds(), reason, event.SerializeToString())


def _content_digest(event: Message) -> bytes:
    """Returns the SHA-256 of an event without what differs between attempts to submit the same thing."""
    content = type(event)()
    content.CopyFrom(event)
    for name in _OF_AN_ATTEMPT:
        content.ClearField(name)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


def _sample(delivered: Delivered, event: events_pb2.SampleEvent) -> Row:
    _check_rules(event)
    _check_turns(event.prompt.chat.messages)
    _check_ids([completion.completion_id for completion in event.completions], "completion_id")
    return _row(delivered, event, {"prompt_digest": prompt_identity(event.prompt)})


def _ranking(delivered: Delivered, event: events_pb2.RankingEvent) -> Row:
    _check_ids([event.sample_id], "sample_id")
    _check_rules(event)
    _check_ids([each for group in event.groups for each in group.completion_ids], "completion_ids")
    return _row(delivered, event, {"sample_id": event.sample_id})


def _demonstration(delivered: Delivered, event: events_pb2.DemonstrationEvent) -> Row:
    _check_ids([event.sample_id], "sample_id")
    _check_rules(event)
    return _row(delivered, event, {"sample_id": event.sample_id})


_ROWS: Mapping[str, tuple[type[Any], Callable[[Delivered, Any], Row]]] = {
    SAMPLES: (events_pb2.SampleEvent, _sample),
    RANKINGS: (events_pb2.RankingEvent, _ranking),
    DEMONSTRATIONS: (events_pb2.DemonstrationEvent, _demonstration),
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


def _check_turns(messages: Sequence[types_pb2.Message]) -> None:
    """Checks what the contract says of turns, but no rule of a single field can.

    Raises:
        _UnusableError: the last turn is a system's, or a turn is empty that must not be.
    """
    if messages and messages[-1].role == types_pb2.ROLE_SYSTEM:
        raise _UnusableError("breaks the contract: prompt.chat.messages: the last one is the system's")
    for index, message in enumerate(messages):
        is_earlier_answer = message.role == types_pb2.ROLE_ASSISTANT and index < len(messages) - 1
        if not message.content and not is_earlier_answer:
            raise _UnusableError(f"breaks the contract: prompt.chat.messages[{index}].content: is empty")


def _check_rules(event: Message) -> None:
    """Checks an event against the contract's rules, up to the first that it breaks, which takes no time to speak of.

    What breaks a rule could end whoever reads the store, such as a prompt without a text, which has no tokens.

    Raises:
        _UnusableError: it breaks a rule.
    """
    for found in broken_rules(event, first_only=True):
        raise _UnusableError(f"breaks the contract: {found.field}: {found.description}")


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
        qualified(event.application, event.user_id),
        event.event_time.ToMicroseconds(),
        delivered.value,
        _content_digest(event),
        own,
    )

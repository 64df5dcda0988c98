"""Makes an event durable before an RPC answers, or refuses the RPC."""

import hashlib
from datetime import UTC, datetime

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2
from feedback.bus.contract import MAX_RECORD_BYTES, Record
from feedback.outbox.door import Outbox, OutboxConflict, OutboxError, OutboxFull, RequestKey
from feedback.signature import signed
from feedback.token import Keyring
from serving.errors import Refusal, Violation, exhausted, unavailable

Event = events_pb2.SampleEvent | events_pb2.RankingEvent | events_pb2.DemonstrationEvent

_RETRY_AFTER_SECONDS = 30.0


async def record(
    outbox: Outbox, keyring: Keyring, topic: str, key: str, event: Event, request: RequestKey | None = None
) -> Timestamp:
    """Signs and stores `event`, and returns when it, or the first attempt to store it, was acknowledged.

    Raises:
        Refusal: ALREADY_EXISTS if the event's id was used with other contents, INVALID_ARGUMENT if the event is too
            large for the bus, RESOURCE_EXHAUSTED if the disk is full, UNAVAILABLE if the disk fails.
    """
    # Computed before the time is set, which differs between a retry and the first attempt.
    digest = hashlib.sha256(event.SerializeToString(deterministic=True)).digest()
    event.event_time.GetCurrentTime()
    stored = Record(topic, key.encode(), signed(event, keyring), event.event_id)
    if stored.size_bytes > MAX_RECORD_BYTES:
        raise _too_large(stored)
    try:
        receipt = await outbox.append(stored, digest, datetime.now(UTC), request)
    except OutboxConflict as error:
        found = Violation("request_id", "was used before with other contents; make a new one for new contents")
        message = f"{found.field}: {found.description}"
        raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", message, violations=[found]) from error
    except OutboxError as error:
        raise _refusal(error) from error
    acknowledged = Timestamp()
    acknowledged.FromDatetime(receipt.acknowledge_time)
    return acknowledged


def _too_large(stored: Record) -> Refusal:
    """Returns the refusal of what the bus could never carry. Only a sample can be so large."""
    found = Violation(
        "sampling.max_tokens",
        f"the prompt and its completions take {stored.size_bytes} bytes, and at most {MAX_RECORD_BYTES} can be kept; "
        "ask for fewer or shorter completions",
    )
    message = f"{found.field}: {found.description}"
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SAMPLE_TOO_LARGE", message, violations=[found])


async def check_room(outbox: Outbox, num_bytes: int) -> None:
    """Checks that an event of this size could be stored, before the work is done that it would record.

    Raises:
        Refusal: as `record` would.
    """
    try:
        await outbox.check_room(num_bytes)
    except OutboxError as error:
        raise _refusal(error) from error


def _refusal(error: OutboxError) -> Refusal:
    if isinstance(error, OutboxFull):
        return exhausted("OUTBOX_FULL", f"there is no room to store it: {error}", _RETRY_AFTER_SECONDS)
    return unavailable("OUTBOX_FAILED", f"it cannot be stored: {error}", _RETRY_AFTER_SECONDS)

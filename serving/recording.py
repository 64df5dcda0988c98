"""Makes an event durable before an RPC answers, or refuses the RPC."""

import hashlib
from datetime import UTC, datetime

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2
from feedback.bus.contract import Record
from feedback.outbox.door import Outbox, OutboxConflict, OutboxError, OutboxFull
from serving.errors import Refusal, Violation, exhausted, unavailable

Event = events_pb2.SampleEvent | events_pb2.RankingEvent | events_pb2.DemonstrationEvent

_RETRY_AFTER_SECONDS = 30.0


async def record(outbox: Outbox, topic: str, key: str, event: Event) -> Timestamp:
    """Stores `event`, and returns when it, or the first attempt to store it, was acknowledged.

    Raises:
        Refusal: ALREADY_EXISTS if the event's id was used with other contents, RESOURCE_EXHAUSTED if the disk is full,
            UNAVAILABLE if the disk fails.
    """
    # Computed before the time is set, which differs between a retry and the first attempt.
    digest = hashlib.sha256(event.SerializeToString(deterministic=True)).digest()
    event.event_time.GetCurrentTime()
    stored = Record(topic, key.encode(), event.SerializeToString(), event.event_id)
    try:
        receipt = await outbox.append(stored, digest, datetime.now(UTC))
    except OutboxConflict as error:
        found = Violation("request_id", "was used before with other contents; make a new one for new contents")
        message = f"{found.field}: {found.description}"
        raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", message, violations=[found]) from error
    except OutboxFull as error:
        raise exhausted("OUTBOX_FULL", f"there is no room to store it: {error}", _RETRY_AFTER_SECONDS) from error
    except OutboxError as error:
        raise unavailable("OUTBOX_FAILED", f"it cannot be stored: {error}", _RETRY_AFTER_SECONDS) from error
    acknowledged = Timestamp()
    acknowledged.FromDatetime(receipt.acknowledge_time)
    return acknowledged

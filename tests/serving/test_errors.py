"""What a refusal looks like on the wire."""

import base64
import string
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from serving.errors import (
    DETAILS_KEY,
    DOMAIN,
    Refusal,
    Violation,
    bad_fields,
    exhausted,
    not_permitted,
    to_status,
    trailing_metadata,
    unavailable,
)


def unpacked(refusal: Refusal, kind: type[Message]) -> Any:
    """Returns the detail of a kind in the refusal's google.rpc.Status, or None."""
    for packed in to_status(refusal).details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def test_each_field_at_fault_is_in_the_bad_request() -> None:
    refusal = bad_fields([Violation("user_id", "is empty"), Violation("groups[2]", "is empty too")])
    found = unpacked(refusal, error_details_pb2.BadRequest)
    assert [(each.field, each.description) for each in found.field_violations] == [
        ("user_id", "is empty"),
        ("groups[2]", "is empty too"),
    ]
    assert refusal.message == "user_id: is empty; groups[2]: is empty too"


@pytest.mark.parametrize(
    ("refusal", "code", "retry_seconds"),
    [
        (bad_fields([Violation("a", "b")]), grpc.StatusCode.INVALID_ARGUMENT, None),
        (not_permitted("TOKEN_EXPIRED", "feedback_token", "expired"), grpc.StatusCode.PERMISSION_DENIED, None),
        (unavailable("NOT_SERVING", "the server starts"), grpc.StatusCode.UNAVAILABLE, 1.0),
        (exhausted("OUTBOX_FULL", "no room", 30.5), grpc.StatusCode.RESOURCE_EXHAUSTED, 30.5),
    ],
)
def test_code_reason_and_retry_delay(refusal: Refusal, code: grpc.StatusCode, retry_seconds: float | None) -> None:
    assert refusal.code is code
    sent = dict(trailing_metadata(refusal, None))
    wire = status_pb2.Status.FromString(sent.pop(DETAILS_KEY))
    assert (wire.code, wire.message) == (code_pb2.Code.Value(code.name), refusal.message)
    assert sent == ({} if retry_seconds is None else {"grpc-retry-pushback-ms": str(round(retry_seconds * 1000))})
    info = unpacked(refusal, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (refusal.reason, DOMAIN)
    retry = unpacked(refusal, error_details_pb2.RetryInfo)
    assert (retry.retry_delay.ToMilliseconds() / 1000 if retry else None) == retry_seconds


def test_a_caller_whose_deadline_comes_first_is_told_not_to_try_again() -> None:
    refusal = exhausted("OUTBOX_FULL", "no room", 30.0)
    assert [dict(trailing_metadata(refusal, left))["grpc-retry-pushback-ms"] for left in (31.0, 29.0)] == [
        "30000",
        "-1",
    ]


def test_values_that_the_message_mentions_are_in_its_metadata() -> None:
    refusal = Refusal(grpc.StatusCode.NOT_FOUND, "NO_SUCH_POLICY", "there is no v9", metadata={"policy": "v9"})
    assert dict(unpacked(refusal, error_details_pb2.ErrorInfo).metadata) == {"policy": "v9"}
    assert unpacked(refusal, error_details_pb2.BadRequest) is None


@pytest.mark.parametrize("character", ["x", "é", "\N{GRINNING FACE}", "%", "\0"])
@pytest.mark.parametrize("length", [10, 5_000])
def test_a_refusal_has_room_in_what_grpc_sends(length: int, character: str) -> None:
    """Peers accept 8 KiB of metadata. If there is more, the caller learns only that it was too large."""
    violations = [Violation(f"groups[{index}].completion_ids[{index}]", character * length) for index in range(256)]
    refusal = bad_fields(violations)
    ((key, value),) = trailing_metadata(refusal, None)
    message = quote(refusal.message, safe=string.printable.replace("%", ""))
    assert len(key) + len(base64.b64encode(value)) + len(message) < 8 * 1024 - 512
    named = unpacked(refusal, error_details_pb2.BadRequest).field_violations
    assert [each.field for each in named] == [each.field for each in violations[: len(named)]]
    assert len(named) >= 3
    assert refusal.message.endswith(f"; and {256 - len(named)} more")

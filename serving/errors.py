"""The refusals that RPCs answer with, and their form on the wire.

Every refusal is a google.rpc.Status with one ErrorInfo (an UPPER_SNAKE reason, domain "alignd", and the values that the
message mentions), a BadRequest that names each field at fault, and a RetryInfo where trying again later can help. The
delay in it stands beside it as grpc-retry-pushback-ms too, by which gRPC itself waits before it tries again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "alignd"
# gRPC sends a status as metadata, three times and in part as base64, and peers accept 8 KiB of metadata. If there is
# more, the caller learns nothing but that it was too large.
_MOST_CHARACTERS, _LONGEST = 1_800, 400
DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"
_DO_NOT_RETRY = "-1"


@dataclass(frozen=True)
class Violation:
    """One field at fault: its path in the request, and what is wrong with it and what is allowed."""

    field: str
    description: str


class Refusal(Exception):  # noqa: N818 (a refusal is an answer, not a fault)
    """An RPC that is refused, for a reason that the caller can read and act on."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds


def bad_field(field: str, description: str) -> Refusal:
    """Returns INVALID_ARGUMENT for one field."""
    return bad_fields([Violation(field, description)])


def bad_fields(violations: Sequence[Violation]) -> Refusal:
    """Returns INVALID_ARGUMENT for the fields at fault; only for the first ones if they are very many."""
    said: list[Violation] = []
    room = _MOST_CHARACTERS
    for violation in violations:
        said.append(Violation(violation.field, shortened(violation.description)))
        room -= len(violation.field) + _weight(said[-1].description)
        if room < _LONGEST:
            break
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in said)
    if len(said) < len(violations):
        message += f"; and {len(violations) - len(said)} more"
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, violations=said)


def shortened(text: str) -> str:
    """Returns the text, cut off if it is too long to send."""
    weight = 0
    for place, character in enumerate(text):
        weight += _weight(character)
        if weight > _LONGEST:
            return f"{text[:place]} ..."
    return text


def _weight(text: str) -> int:
    """Returns how long a text is as it is sent: what is not plain ASCII is sent as several characters for each byte."""
    others = [each for each in text if not " " <= each <= "~" or each == "%"]
    return len(text) + sum(2 * len(each.encode(errors="replace")) - 1 for each in others)


def not_permitted(reason: str, field: str, description: str) -> Refusal:
    """Returns PERMISSION_DENIED for what one field claims."""
    return Refusal(
        grpc.StatusCode.PERMISSION_DENIED, reason, f"{field}: {description}", violations=[Violation(field, description)]
    )


def unavailable(reason: str, message: str, retry_after_seconds: float = 1.0) -> Refusal:
    """Returns UNAVAILABLE: safe to retry."""
    return Refusal(grpc.StatusCode.UNAVAILABLE, reason, message, retry_after_seconds=retry_after_seconds)


def exhausted(reason: str, message: str, retry_after_seconds: float = 1.0) -> Refusal:
    """Returns RESOURCE_EXHAUSTED: safe to retry after the delay."""
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after_seconds=retry_after_seconds)


def trailing_metadata(refusal: Refusal, time_left_seconds: float | None) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the refusal's details as gRPC sends them.

    Args:
        refusal: the refusal of the call.
        time_left_seconds: seconds until the caller's deadline; None if it has none. If the deadline comes before the
            retry delay has passed, the caller is asked not to retry: it would only wait, and then learn of the deadline
            alone.
    """
    details = (DETAILS_KEY, to_status(refusal).SerializeToString())
    if refusal.retry_after_seconds is None:
        return (details,)
    in_time = time_left_seconds is None or refusal.retry_after_seconds < time_left_seconds
    return (details, (_PUSHBACK, str(round(refusal.retry_after_seconds * 1000)) if in_time else _DO_NOT_RETRY))


def to_status(refusal: Refusal) -> status_pb2.Status:
    """Returns the refusal as a google.rpc.Status."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=refusal.metadata)
    ]
    if refusal.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in refusal.violations
                ]
            )
        )
    if refusal.retry_after_seconds is not None:
        delay = duration_pb2.Duration(nanos=0)
        delay.FromMilliseconds(round(refusal.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(refusal.code.name), message=refusal.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status

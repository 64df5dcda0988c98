"""What went wrong with a call, as alignd says it: a code, a reason, the fields at fault and when to try again.

A refusal travels as a google.rpc.Status in the trailing metadata. It is read here field by field, because the package
that holds its generated code would be a dependency more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

DETAILS_KEY = "grpc-status-details-bin"
_DETAIL_TYPE = "type.googleapis.com/google.rpc."


@dataclass(frozen=True)
class FieldViolation:
    """One field at fault: its path in the request, such as "sampling.top_p", and what is wrong with it."""

    field: str
    description: str


class AligndError(Exception):
    """A call that failed. `str` of it says why, for people; the attributes say it for programs."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.reason = reason
        """Which refusal it is, such as "TOO_MANY_COMPLETIONS"; empty where the server did not get to say."""
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        """The values that the message mentions."""
        self.retry_after_seconds = retry_after_seconds
        """When trying again can help; None if the server does not say."""

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


def read_error(failed: Any) -> AligndError:
    """Returns what a failed call says.

    Args:
        failed: a grpc.RpcError of a call, of either kind of channel.
    """
    metadata = failed.trailing_metadata() or ()
    packed = next((value for key, value in metadata if key == DETAILS_KEY), b"")
    try:
        details = _read_details(packed)
    except (DecodeError, UnicodeDecodeError):
        # Somebody on the way wrote it, and the code and message still say what there is to say.
        details = {}
    return AligndError(failed.code(), failed.details() or "", **details)


def _read_details(status: bytes) -> dict[str, Any]:
    """Returns what the details of a google.rpc.Status say, as arguments of AligndError.

    Raises:
        DecodeError, UnicodeDecodeError: they are not what google.rpc's contracts say.
    """
    found: dict[str, Any] = {}
    for packed in _fields(status, 3):
        kind = _text(packed, 1).removeprefix(_DETAIL_TYPE)
        value = next(_fields(packed, 2), b"")
        if kind == "ErrorInfo":
            found["reason"] = _text(value, 1)
            found["metadata"] = {_text(entry, 1): _text(entry, 2) for entry in _fields(value, 3)}
        elif kind == "BadRequest":
            found["violations"] = [FieldViolation(_text(each, 1), _text(each, 2)) for each in _fields(value, 1)]
        elif kind == "RetryInfo":
            delay = Duration.FromString(next(_fields(value, 1), b""))
            found["retry_after_seconds"] = delay.ToNanoseconds() / 1e9
    return found


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """Yields each value of a field of a serialised message; the field is a string, bytes or a message."""
    unknown: Any = UnknownFieldSet(Empty.FromString(message))
    return (each.data for each in unknown if each.field_number == number and isinstance(each.data, bytes))


def _text(message: bytes, number: int) -> str:
    return next(_fields(message, number), b"").decode()

"""The operator's side of the gRPC API: a channel with sane settings, and refusals as people read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status

from alignd.v1 import policy_service_pb2_grpc

TIMEOUT_SECONDS = 60.0


class CallError(Exception):
    """A call that failed; the message says why, field by field, and what to do."""


@dataclass(frozen=True)
class Operator:
    """The stubs that operators need."""

    policies: Any
    health: Any


@contextmanager
def connect(address: str) -> Iterator[Operator]:
    """Yields stubs to the server at `address`.

    Raises:
        CallError: in place of any grpc.RpcError inside the block.
    """
    with grpc.insecure_channel(address) as channel:
        try:
            yield Operator(policy_service_pb2_grpc.PolicyServiceStub(channel), health_pb2_grpc.HealthStub(channel))
        except grpc.RpcError as error:
            raise CallError(explain(error, address)) from error


def explain(error: Any, address: str) -> str:
    """Returns what a failed call says, with the fields that it names."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in (error.details() or "").lower():
        return f"nothing answers at {address}; start it with `alignd up`, or set ALIGND_ADDRESS to where it runs"
    lines = [f"{error.code().name}: {error.details()}"]
    for detail in details(error):
        if isinstance(detail, error_details_pb2.BadRequest):
            lines += [f"  {each.field}: {each.description}" for each in detail.field_violations]
    return "\n".join(lines)


def details(error: Any) -> list[Message]:
    """Returns the google.rpc details of a failed call: ErrorInfo, BadRequest, RetryInfo."""
    status = rpc_status.from_call(error)
    found: list[Message] = []
    for packed in status.details if status else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if packed.Is(kind.DESCRIPTOR):
                packed.Unpack(message)
                found.append(message)
    return found

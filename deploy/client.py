"""The operators' side of the gRPC API: the stubs that they call, and failed calls in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from alignd.client import read_error
from alignd.v1 import policy_service_pb2_grpc
from deploy.cli.plain import plain
from policies.server_connection import ServerConnection, ServerConnectionError

TIMEOUT_SECONDS = 60.0


class CallError(Exception):
    """A call failed; the message says why, with each field at fault, and what to do."""


@dataclass(frozen=True)
class Operator:
    """The stubs that operators need."""

    policies: Any
    health: Any


@contextmanager
def connect(server: ServerConnection) -> Iterator[Operator]:
    """Yields stubs to a server.

    Raises:
        CallError: in place of any grpc.RpcError inside the block.
    """
    with _channel(server) as channel:
        try:
            yield Operator(policy_service_pb2_grpc.PolicyServiceStub(channel), health_pb2_grpc.HealthStub(channel))
        except grpc.RpcError as error:
            raise CallError(_explain(error, server.address)) from error
        except ServerConnectionError as error:
            raise CallError(str(error)) from error


def _channel(server: ServerConnection) -> grpc.Channel:
    try:
        return server.channel()
    except ServerConnectionError as error:
        raise CallError(str(error)) from error


def _explain(error: Any, address: str) -> str:
    """Returns the message of a failed call, with the fields that it names."""
    failed = read_error(error)
    if failed.code is grpc.StatusCode.UNAVAILABLE and "connect" in failed.message.lower():
        return f"nothing answers at {address}; start it with `alignd up`, or set ALIGND_ADDRESS to where it runs"
    said = [str(failed), *(f"  {each.field}: {each.description}" for each in failed.violations)]
    return "\n".join(map(plain, said))

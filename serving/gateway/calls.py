"""The gateway's calls of the server: each has its caller's own key, and its request id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from grpc_health.v1 import health_pb2_grpc

from alignd.v1 import feedback_service_pb2_grpc, inference_service_pb2_grpc
from serving.gateway.channel import Channel
from serving.request_id import REQUEST_ID


@dataclass(frozen=True)
class Calls:
    """Stubs on the channel of now.

    Raises:
        ServerConnectionError: any method except options, if a certificate cannot be read.
    """

    channel: Channel
    timeout_seconds: float

    def inference(self) -> Any:
        """Returns a stub of InferenceService."""
        return inference_service_pb2_grpc.InferenceServiceStub(self.channel.open())

    def feedback(self) -> Any:
        """Returns a stub of FeedbackService."""
        return feedback_service_pb2_grpc.FeedbackServiceStub(self.channel.open())

    def health(self) -> Any:
        """Returns a stub of the health service."""
        return health_pb2_grpc.HealthStub(self.channel.open())

    def options(self, request: Request) -> dict[str, Any]:
        """Returns what each call of a stub for `request` is given beside its message."""
        metadata = [(REQUEST_ID, request.state.request_id)]
        if request.state.key:
            metadata.append(("authorization", request.state.key))
        return {"timeout": self.timeout_seconds, "metadata": metadata}

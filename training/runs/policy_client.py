"""The trainer's client of the policy service, over gRPC: finds policies, registers one, and asks for it to go live."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alignd.v1 import policy_manifest_pb2, policy_service_pb2, policy_service_pb2_grpc
from feedback import heartbeat
from policies.server_connection import ServerConnection

logger = logging.getLogger(__name__)

_ACTOR = "trainer"
# Registering verifies every byte of a version, which takes long for a large one.
_CALL_SECONDS = 300.0
_HEALTH_SECONDS = 5.0
# How long to wait for a server that is still starting, because all processes are started at the same time.
START_SECONDS = 300.0
_RETRY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "alignd.v1.PolicyService"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.5s",
                    "maxBackoff": "10s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


class PolicyClient:
    """The trainer's client of the policy service. Calls wait until the server is reachable.

    Raises:
        grpc.RpcError: the server refuses, or does not answer in time; all methods raise it unless they say otherwise.
    """

    def __init__(self, server: ServerConnection) -> None:
        self._server = server
        self._open()

    def _open(self) -> None:
        self._version = self._server.files_version()
        self._channel = self._server.channel([("grpc.service_config", _RETRY)])
        self._service = policy_service_pb2_grpc.PolicyServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def is_serving(self) -> bool:
        """Whether the server answers and has a policy in its engine. An error counts as no."""
        self._follow_certificates()
        try:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def get(self, policy: str, timeout_seconds: float = _CALL_SECONDS) -> policy_service_pb2.Policy:
        """Returns the policy called "live" or "v7"."""
        self._follow_certificates()
        request = policy_service_pb2.GetPolicyRequest(policy=policy)
        found: policy_service_pb2.Policy = self._call(self._service.GetPolicy, request, timeout_seconds).policy
        return found

    def newest(self, count: int) -> list[policy_service_pb2.Policy]:
        """Returns the `count` versions with the greatest numbers, the greatest first, or as many as there are."""
        request = policy_service_pb2.ListPoliciesRequest(page_size=count)
        return list(self._call(self._service.ListPolicies, request).policies)

    def register(
        self, manifest: policy_manifest_pb2.PolicyManifest, folder: Path, reason: str
    ) -> policy_service_pb2.Policy:
        """Registers the version in `folder` as a candidate."""
        self._follow_certificates()
        request = policy_service_pb2.RegisterPolicyRequest(
            manifest=manifest, artifact_uri=str(folder.resolve()), actor=_ACTOR, reason=reason
        )
        registered: policy_service_pb2.Policy = self._call(self._service.RegisterPolicy, request).policy
        return registered

    def promote(self, version: int, expected_live_version: int, reason: str) -> bool:
        """Makes a candidate live, and returns whether it did.

        It does not if another version has gone live since, it is no candidate now, or the trainer's key may not.
        """
        request = policy_service_pb2.PromoteRequest(
            version=version, actor=_ACTOR, reason=reason, expected_live_version=expected_live_version
        )
        try:
            self._call(self._service.Promote, request)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION):
                return False
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                # Its key may register versions, and leaves it to operators which one is live.
                logger.warning("v%d is not promoted: %s", version, error.details())
                return False
            raise
        return True

    def _follow_certificates(self) -> None:
        """Opens another channel if the server may have another certificate since this one was opened."""
        if self._version != self._server.files_version():
            self._channel.close()
            self._open()

    def _call(self, method: Any, request: object, timeout_seconds: float = _CALL_SECONDS) -> Any:
        """Calls the service once it can be reached. Each call may take minutes, and several follow each other."""
        heartbeat.beat()
        return method(request, timeout=timeout_seconds, wait_for_ready=True)

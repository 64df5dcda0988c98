"""The trainer's client of the policy service, over gRPC: finds policies, registers one, and asks for it to go live."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alignd.v1 import policy_manifest_pb2, policy_service_pb2, policy_service_pb2_grpc

_ACTOR = "trainer"
# Registering verifies every byte of a version, which takes long for a large one.
_CALL_SECONDS = 300.0
_HEALTH_SECONDS = 5.0
# How long to wait for a server that is still starting, because all processes are started at the same time.
START_SECONDS = 900.0
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

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.service_config", _RETRY)])
        self._service = policy_service_pb2_grpc.PolicyServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def is_serving(self) -> bool:
        """Whether the server answers and has a policy in its engine. An error counts as no."""
        try:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def get(self, policy: str, timeout_seconds: float = _CALL_SECONDS) -> policy_service_pb2.Policy:
        """Returns the policy called "live" or "v7"."""
        request = policy_service_pb2.GetPolicyRequest(policy=policy)
        found: policy_service_pb2.Policy = self._service.GetPolicy(
            request, timeout=timeout_seconds, wait_for_ready=True
        ).policy
        return found

    def newest(self, count: int) -> list[policy_service_pb2.Policy]:
        """Returns the `count` versions with the greatest numbers, the greatest first, or as many as there are."""
        request = policy_service_pb2.ListPoliciesRequest(page_size=count)
        return list(self._service.ListPolicies(request, timeout=_CALL_SECONDS, wait_for_ready=True).policies)

    def register(
        self, manifest: policy_manifest_pb2.PolicyManifest, folder: Path, reason: str
    ) -> policy_service_pb2.Policy:
        """Registers the version in `folder` as a candidate."""
        request = policy_service_pb2.RegisterPolicyRequest(
            manifest=manifest, artifact_uri=str(folder.resolve()), actor=_ACTOR, reason=reason
        )
        registered: policy_service_pb2.Policy = self._service.RegisterPolicy(
            request, timeout=_CALL_SECONDS, wait_for_ready=True
        ).policy
        return registered

    def promote(self, version: int, expected_live_version: int, reason: str) -> bool:
        """Makes a candidate live. Returns False if another version has gone live since, or it is no candidate now."""
        request = policy_service_pb2.PromoteRequest(
            version=version, actor=_ACTOR, reason=reason, expected_live_version=expected_live_version
        )
        try:
            self._service.Promote(request, timeout=_CALL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION):
                return False
            raise
        return True

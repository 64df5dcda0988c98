"""Events of the policies topic, made up for tests."""

from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2, policy_manifest_pb2
from alignd.v1.policy_service_pb2 import (
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    STAGE_UNSPECIFIED,
    ReplicaStatus,
    Stage,
)
from policies.state import new_change

__all__ = ["STAGE_CANDIDATE", "STAGE_LIVE", "STAGE_REJECTED", "STAGE_RETIRED", "moved", "registered", "reported"]


def registered(version: int, weights: str = "a", parent: int = 0, reference: int = 0) -> events_pb2.PolicyEvent:
    """Returns a registration; `weights` is one character, of which the digest consists."""
    manifest = policy_manifest_pb2.PolicyManifest(
        version=version,
        parent_version=parent,
        reference_version=reference or version,
        weight_digest=weights * 64,
        files=[policy_manifest_pb2.ArtifactFile(path="model.safetensors", sha256=weights * 64)],
        create_time=Timestamp(seconds=1_700_000_000),
    )
    change = new_change(version, STAGE_UNSPECIFIED, STAGE_CANDIDATE, "trainer", "learned")
    event = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=f"/policies/v{version}", change=change)
    return events_pb2.PolicyEvent(registered=event)


def moved(version: int, from_stage: Stage, to_stage: Stage, expected_live: int = 0) -> events_pb2.PolicyEvent:
    """Returns a change of stage."""
    change = new_change(version, from_stage, to_stage, "operator", "why not")
    return events_pb2.PolicyEvent(
        stage_changed=events_pb2.PolicyStageChanged(change=change, expected_live_version=expected_live)
    )


def reported(replica_id: str, version: int, failed: int = 0, at_seconds: float = 0.0) -> events_pb2.PolicyEvent:
    """Returns a replica's report of what it serves, and of which version it has found wrong."""
    status = ReplicaStatus(replica_id=replica_id, failed_version=failed)
    status.policy.version = version
    status.report_time.FromMilliseconds(round(1000 * at_seconds))
    return events_pb2.PolicyEvent(replica_status=status)

"""The rollout state machine: turns the events of the `policies` topic into a state. Pure, so that all replicas agree.

CANDIDATE → CANARY → LIVE → RETIRED       rollback makes a RETIRED version LIVE again
CANDIDATE, CANARY → REJECTED              a version found bad never serves again
LIVE → REJECTED                           only when a replica could not prove its swap; the one before is restored
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2, policy_manifest_pb2, policy_service_pb2
from alignd.v1.policy_service_pb2 import (
    STAGE_CANARY,
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    STAGE_UNSPECIFIED,
    ReplicaStatus,
    Stage,
    StageChange,
)

ALLOWED: Mapping[Stage, frozenset[Stage]] = {
    STAGE_CANDIDATE: frozenset({STAGE_CANARY, STAGE_LIVE, STAGE_REJECTED}),
    STAGE_CANARY: frozenset({STAGE_LIVE, STAGE_REJECTED}),
    STAGE_LIVE: frozenset({STAGE_REJECTED}),
    STAGE_RETIRED: frozenset({STAGE_LIVE}),
    STAGE_REJECTED: frozenset(),
}


@dataclass(frozen=True)
class PolicyRecord:
    """A version, its stage, and how it came there."""

    manifest: policy_manifest_pb2.PolicyManifest
    artifact_uri: str
    stage: Stage
    history: tuple[StageChange, ...]


@dataclass(frozen=True)
class PolicyState:
    """All versions; `live_order` names those that were made live, the present one last."""

    policies: Mapping[int, PolicyRecord] = field(default_factory=dict)
    live_order: tuple[int, ...] = ()
    replicas: Mapping[str, ReplicaStatus] = field(default_factory=dict)

    @property
    def live_version(self) -> int:
        """The live version, or 0."""
        return self.live_order[-1] if self.live_order else 0


@dataclass(frozen=True)
class Outcome:
    """The outcome of an event: the new state, the changes, and, if it was refused, the reason."""

    state: PolicyState
    changes: tuple[StageChange | ReplicaStatus, ...] = ()
    refusal: str = ""


def apply(state: PolicyState, event: events_pb2.PolicyEvent) -> Outcome:
    """Returns the outcome of `event` in `state`."""
    match event.WhichOneof("change"):
        case "registered":
            return _register(state, event.registered)
        case "stage_changed":
            return _change_stage(state, event.stage_changed)
        case "replica_status":
            status = event.replica_status
            return Outcome(replace(state, replicas={**state.replicas, status.replica_id: status}), (status,))
        case _:
            return Outcome(state, refusal="this release does not know events of this kind")


def _register(state: PolicyState, event: events_pb2.PolicyRegistered) -> Outcome:
    """Adds a CANDIDATE. The same weights again change nothing; other weights under the same version are refused."""
    version = event.manifest.version
    if version < 1:
        return Outcome(state, refusal=f"{version} is not a version")
    present = state.policies.get(version)
    if present and present.manifest.weight_digest == event.manifest.weight_digest:
        return Outcome(state)
    if present:
        return Outcome(state, refusal=f"version {version} is taken by other weights")
    for name in ("parent_version", "reference_version"):
        needed = getattr(event.manifest, name)
        if needed and needed != version and needed not in state.policies:
            return Outcome(state, refusal=f"{name} {needed} is not registered")
    change = _moved(event.change, version, STAGE_UNSPECIFIED, STAGE_CANDIDATE)
    record = PolicyRecord(event.manifest, event.artifact_uri, STAGE_CANDIDATE, (change,))
    return Outcome(replace(state, policies={**state.policies, version: record}), (change,))


def _change_stage(state: PolicyState, event: events_pb2.PolicyStageChanged) -> Outcome:
    """Changes a version's stage, and that of the live version where the change concerns it."""
    change = event.change
    record = state.policies.get(change.version)
    if record is None:
        return Outcome(state, refusal=f"version {change.version} is not registered")
    if event.expected_live_version not in (0, state.live_version):
        return Outcome(state, refusal=f"version {state.live_version} is live, not {event.expected_live_version}")
    if record.stage != change.from_stage:
        return Outcome(state, refusal=f"version {change.version} is now {_stage_name(record.stage)}")
    if change.to_stage not in ALLOWED[record.stage]:
        return Outcome(state, refusal=f"{_stage_name(record.stage)} → {_stage_name(change.to_stage)} is not allowed")
    if change.to_stage == STAGE_LIVE:
        return _make_live(state, change)
    if record.stage == STAGE_LIVE:
        return _reject_live(state, change)
    return Outcome(_move(state, change), (change,))


def _make_live(state: PolicyState, change: StageChange) -> Outcome:
    """Makes a version live, and retires the one before."""
    changes: list[StageChange] = []
    if state.live_version:
        changes.append(_moved(change, state.live_version, STAGE_LIVE, STAGE_RETIRED))
    changes.append(change)
    for each in changes:
        state = _move(state, each)
    order = (*(version for version in state.live_order if version != change.version), change.version)
    return Outcome(replace(state, live_order=order), tuple(changes))


def _reject_live(state: PolicyState, change: StageChange) -> Outcome:
    """Rejects a live version that could not be proved, and restores the one before."""
    changes = [change]
    order = state.live_order[:-1]
    if order:
        changes.append(_moved(change, order[-1], STAGE_RETIRED, STAGE_LIVE))
    for each in changes:
        state = _move(state, each)
    return Outcome(replace(state, live_order=order), tuple(changes))


def previous_live(state: PolicyState) -> int:
    """Returns the version that a rollback goes to if none is named, or 0."""
    return state.live_order[-2] if len(state.live_order) > 1 else 0


def _move(state: PolicyState, change: StageChange) -> PolicyState:
    record = state.policies[change.version]
    record = replace(record, stage=change.to_stage, history=(*record.history, change))
    return replace(state, policies={**state.policies, change.version: record})


def _moved(cause: StageChange, version: int, from_stage: Stage, to_stage: Stage) -> StageChange:
    """Returns a change that has the actor, reason and time of `cause`."""
    change = StageChange(version=version, from_stage=from_stage, to_stage=to_stage, actor=cause.actor)
    change.reason = cause.reason
    change.change_time.CopyFrom(cause.change_time)
    return change


def _stage_name(stage: Stage) -> str:
    """Returns a stage's name, or its number if only a later release knows it."""
    known = policy_service_pb2.Stage.DESCRIPTOR.values_by_number.get(stage)
    return known.name if known else str(stage)


def new_change(version: int, from_stage: Stage, to_stage: Stage, actor: str, reason: str) -> StageChange:
    """Returns a change that happens now."""
    now = Timestamp()
    now.GetCurrentTime()
    return StageChange(
        version=version, from_stage=from_stage, to_stage=to_stage, actor=actor, reason=reason, change_time=now
    )


def as_policy(record: PolicyRecord) -> policy_service_pb2.Policy:
    """Returns a version as the API shows it."""
    return policy_service_pb2.Policy(
        version=record.manifest.version,
        stage=record.stage,
        artifact_uri=record.artifact_uri,
        manifest=record.manifest,
        history=record.history,
    )

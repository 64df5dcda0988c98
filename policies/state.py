"""The rollout state machine: turns the events of the `policies` topic into a state. Pure, so that all replicas agree.

CANDIDATE → CANARY → LIVE → RETIRED       rollback makes a RETIRED version LIVE again
any other stage → REJECTED                by an operator, and of LIVE also by all replicas, if each found it wrong;
                                          of LIVE, the one before is restored
REJECTED → RETIRED, CANDIDATE             by an operator, if it was a mistake: RETIRED if it was ever LIVE

What can never be used, such as a version at a relative path, is passed over by all replicas alike: the rules here look
at the event alone, and at no disk.
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
from policies.artifact import ArtifactError, check_manifest
from policies.location import artifact_folder

# A replica reports at least once an hour. If another one has reported for this long since it last did, it is gone.
GONE_AFTER_SECONDS = 3 * 3600.0

ALLOWED: Mapping[Stage, frozenset[Stage]] = {
    STAGE_CANDIDATE: frozenset({STAGE_CANARY, STAGE_LIVE, STAGE_REJECTED}),
    STAGE_CANARY: frozenset({STAGE_LIVE, STAGE_REJECTED}),
    STAGE_LIVE: frozenset({STAGE_REJECTED}),
    STAGE_RETIRED: frozenset({STAGE_LIVE, STAGE_REJECTED}),
    STAGE_REJECTED: frozenset({STAGE_RETIRED, STAGE_CANDIDATE}),
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
    """All versions, and all replicas that report."""

    policies: Mapping[int, PolicyRecord] = field(default_factory=dict)
    live_order: tuple[int, ...] = ()
    """The versions that were made live, the present one last."""
    replicas: Mapping[str, ReplicaStatus] = field(default_factory=dict)
    """The last report of each replica that is not gone."""
    heard_since: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For each of these, when each other one first reported after it did, by that one's clock, in Unix seconds."""
    found_wrong_by: frozenset[str] = frozenset()
    """The replicas that have found the live version wrong since it became live, and have not said otherwise."""

    @property
    def live_version(self) -> int:
        """The live version, or 0."""
        return self.live_order[-1] if self.live_order else 0

    @property
    def all_found_wrong(self) -> bool:
        """Whether every replica has found the live version wrong. One that could not read it has not."""
        return bool(self.replicas) and self.found_wrong_by >= self.replicas.keys()


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
            return _report(state, event.replica_status)
        case _:
            return Outcome(state, refusal="this release does not know events of this kind")


def _register(state: PolicyState, event: events_pb2.PolicyRegistered) -> Outcome:
    """Adds a CANDIDATE. The same weights again change nothing; other weights under the same version are refused."""
    version = event.manifest.version
    if version < 1:
        return Outcome(state, refusal=f"{version} is not a version")
    try:
        artifact_folder(event.artifact_uri)
        check_manifest(event.manifest)
    except ArtifactError as error:
        return Outcome(state, refusal=f"version {version} cannot be used: {error}")
    present = state.policies.get(version)
    if present and present.manifest.weight_digest == event.manifest.weight_digest:
        return Outcome(state)
    if present:
        return Outcome(state, refusal=f"version {version} is taken by other weights")
    for name in ("parent_version", "reference_version"):
        needed = getattr(event.manifest, name)
        if event.rebuilt and name == "parent_version":
            continue
        if needed and needed != version and needed not in state.policies:
            return Outcome(state, refusal=f"{name} {needed} is not registered")
    change = _moved(event.change, version, STAGE_UNSPECIFIED, STAGE_CANDIDATE)
    record = PolicyRecord(event.manifest, event.artifact_uri, STAGE_CANDIDATE, (change,))
    return Outcome(replace(state, policies={**state.policies, version: record}), (change,))


def _report(state: PolicyState, status: ReplicaStatus) -> Outcome:
    """Takes a replica's report, and notices which others are gone.

    Clocks of different machines are not compared. Another replica is gone if this one, by its own clock, has reported
    for GONE_AFTER_SECONDS since that one last did.
    """
    replica = status.replica_id
    if not replica:
        return Outcome(state, refusal="the report names no replica")
    now = _time_of(status)
    heard = {other: {replica: now, **since} for other, since in state.heard_since.items() if other != replica}
    gone = {other for other, since in heard.items() if now - since[replica] >= GONE_AFTER_SECONDS}
    heard[replica] = {}
    here = (state.replicas.keys() | {replica}) - gone
    finds_wrong = {replica} if status.failed_version and status.failed_version == state.live_version else set()
    state = replace(
        state,
        replicas={name: each for name, each in {**state.replicas, replica: status}.items() if name in here},
        heard_since={
            name: {other: at for other, at in since.items() if other in here}
            for name, since in heard.items()
            if name in here
        },
        found_wrong_by=(state.found_wrong_by - {replica} | finds_wrong) & here,
    )
    return Outcome(state, (status,))


def _time_of(status: ReplicaStatus) -> float:
    """Returns when a replica reported; one of an earlier release says only when it swapped."""
    at = status.report_time if status.HasField("report_time") else status.swap_time
    return at.seconds + at.nanos / 1e9


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
    if event.needs_quorum and not (record.stage == STAGE_LIVE and state.all_found_wrong):
        return Outcome(state, refusal=f"not every replica has found version {change.version} wrong")
    if record.stage == STAGE_REJECTED and change.to_stage != reinstated_stage(record):
        return Outcome(state, refusal=f"version {change.version} would be {_stage_name(reinstated_stage(record))}")
    if change.to_stage == STAGE_LIVE:
        return _make_live(state, change)
    if record.stage == STAGE_LIVE:
        return _reject_live(state, change)
    order = tuple(version for version in state.live_order if version != change.version)
    return Outcome(replace(_move(state, change), live_order=order), (change,))


def _make_live(state: PolicyState, change: StageChange) -> Outcome:
    """Makes a version live, and retires the one before."""
    changes: list[StageChange] = []
    if state.live_version:
        changes.append(_moved(change, state.live_version, STAGE_LIVE, STAGE_RETIRED))
    changes.append(change)
    for each in changes:
        state = _move(state, each)
    order = (*(version for version in state.live_order if version != change.version), change.version)
    return Outcome(replace(state, live_order=order, found_wrong_by=frozenset()), tuple(changes))


def _reject_live(state: PolicyState, change: StageChange) -> Outcome:
    """Rejects the live version, and restores the one before."""
    changes = [change]
    order = state.live_order[:-1]
    if order:
        changes.append(_moved(change, order[-1], STAGE_RETIRED, STAGE_LIVE))
    for each in changes:
        state = _move(state, each)
    return Outcome(replace(state, live_order=order, found_wrong_by=frozenset()), tuple(changes))


def was_live(record: PolicyRecord) -> bool:
    """Whether the version was ever live."""
    return any(change.to_stage == STAGE_LIVE for change in record.history)


def reinstated_stage(record: PolicyRecord) -> Stage:
    """Returns the stage that a rejected version has once its rejection is taken back."""
    return STAGE_RETIRED if was_live(record) else STAGE_CANDIDATE


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
    change.reason, change.claimed_actor = cause.reason, cause.claimed_actor
    change.change_time.CopyFrom(cause.change_time)
    return change


def _stage_name(stage: Stage) -> str:
    """Returns a stage's name, or its number if only a later release knows it."""
    known = policy_service_pb2.Stage.DESCRIPTOR.values_by_number.get(stage)
    return known.name if known else str(stage)


def new_change(
    version: int, from_stage: Stage, to_stage: Stage, actor: str, reason: str, claimed_actor: str = ""
) -> StageChange:
    """Returns a change that happens now, asked for by `actor`, who says to be `claimed_actor`."""
    now = Timestamp()
    now.GetCurrentTime()
    return StageChange(
        version=version,
        from_stage=from_stage,
        to_stage=to_stage,
        actor=actor,
        claimed_actor=claimed_actor,
        reason=reason,
        change_time=now,
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

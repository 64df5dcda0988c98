import datetime

from alignd.v1 import access_pb2 as _access_pb2
from alignd.v1 import policy_manifest_pb2 as _policy_manifest_pb2
from alignd.v1 import types_pb2 as _types_pb2
from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_CANDIDATE: _ClassVar[Stage]
    STAGE_CANARY: _ClassVar[Stage]
    STAGE_LIVE: _ClassVar[Stage]
    STAGE_RETIRED: _ClassVar[Stage]
    STAGE_REJECTED: _ClassVar[Stage]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_SERVING: _ClassVar[ReplicaState]
    REPLICA_STATE_DEGRADED: _ClassVar[ReplicaState]
STAGE_UNSPECIFIED: Stage
STAGE_CANDIDATE: Stage
STAGE_CANARY: Stage
STAGE_LIVE: Stage
STAGE_RETIRED: Stage
STAGE_REJECTED: Stage
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_DEGRADED: ReplicaState

class Policy(_message.Message):
    __slots__ = ("version", "stage", "artifact_uri", "manifest", "history")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    version: int
    stage: Stage
    artifact_uri: str
    manifest: _policy_manifest_pb2.PolicyManifest
    history: _containers.RepeatedCompositeFieldContainer[StageChange]
    def __init__(self, version: _Optional[int] = ..., stage: _Optional[_Union[Stage, str]] = ..., artifact_uri: _Optional[str] = ..., manifest: _Optional[_Union[_policy_manifest_pb2.PolicyManifest, _Mapping]] = ..., history: _Optional[_Iterable[_Union[StageChange, _Mapping]]] = ...) -> None: ...

class StageChange(_message.Message):
    __slots__ = ("version", "from_stage", "to_stage", "actor", "reason", "change_time", "claimed_actor")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHANGE_TIME_FIELD_NUMBER: _ClassVar[int]
    CLAIMED_ACTOR_FIELD_NUMBER: _ClassVar[int]
    version: int
    from_stage: Stage
    to_stage: Stage
    actor: str
    reason: str
    change_time: _timestamp_pb2.Timestamp
    claimed_actor: str
    def __init__(self, version: _Optional[int] = ..., from_stage: _Optional[_Union[Stage, str]] = ..., to_stage: _Optional[_Union[Stage, str]] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., change_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., claimed_actor: _Optional[str] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica_id", "policy", "swap_time", "pause_seconds", "drain_seconds", "probe_error", "error_message", "state", "failed_version", "report_time")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SWAP_TIME_FIELD_NUMBER: _ClassVar[int]
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROBE_ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FAILED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPORT_TIME_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    policy: _types_pb2.PolicyRef
    swap_time: _timestamp_pb2.Timestamp
    pause_seconds: float
    drain_seconds: float
    probe_error: float
    error_message: str
    state: ReplicaState
    failed_version: int
    report_time: _timestamp_pb2.Timestamp
    def __init__(self, replica_id: _Optional[str] = ..., policy: _Optional[_Union[_types_pb2.PolicyRef, _Mapping]] = ..., swap_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pause_seconds: _Optional[float] = ..., drain_seconds: _Optional[float] = ..., probe_error: _Optional[float] = ..., error_message: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., failed_version: _Optional[int] = ..., report_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RegisterPolicyRequest(_message.Message):
    __slots__ = ("manifest", "artifact_uri", "actor", "reason")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    manifest: _policy_manifest_pb2.PolicyManifest
    artifact_uri: str
    actor: str
    reason: str
    def __init__(self, manifest: _Optional[_Union[_policy_manifest_pb2.PolicyManifest, _Mapping]] = ..., artifact_uri: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RegisterPolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies", "next_page_token", "live_version", "replicas")
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[Policy]
    next_page_token: str
    live_version: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    def __init__(self, policies: _Optional[_Iterable[_Union[Policy, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., live_version: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("version", "actor", "reason", "expected_live_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    actor: str
    reason: str
    expected_live_version: int
    def __init__(self, version: _Optional[int] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., expected_live_version: _Optional[int] = ...) -> None: ...

class PromoteResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("version", "actor", "reason", "expected_live_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    actor: str
    reason: str
    expected_live_version: int
    def __init__(self, version: _Optional[int] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., expected_live_version: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class RejectRequest(_message.Message):
    __slots__ = ("version", "actor", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    actor: str
    reason: str
    def __init__(self, version: _Optional[int] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RejectResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class ReinstateRequest(_message.Message):
    __slots__ = ("version", "actor", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    actor: str
    reason: str
    def __init__(self, version: _Optional[int] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ReinstateResponse(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("after_revision",)
    AFTER_REVISION_FIELD_NUMBER: _ClassVar[int]
    after_revision: int
    def __init__(self, after_revision: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("revision", "stage_change", "replica_status")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STAGE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_STATUS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    stage_change: StageChange
    replica_status: ReplicaStatus
    def __init__(self, revision: _Optional[int] = ..., stage_change: _Optional[_Union[StageChange, _Mapping]] = ..., replica_status: _Optional[_Union[ReplicaStatus, _Mapping]] = ...) -> None: ...

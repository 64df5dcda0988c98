import datetime

from alignd.v1 import policy_manifest_pb2 as _policy_manifest_pb2
from alignd.v1 import policy_service_pb2 as _policy_service_pb2
from alignd.v1 import types_pb2 as _types_pb2
from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SampleEvent(_message.Message):
    __slots__ = ("event_id", "event_time", "user_id", "prompt", "sampling", "completions", "prompt_token_ids", "tokenizer_digest", "application", "key_id", "signature")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    event_time: _timestamp_pb2.Timestamp
    user_id: str
    prompt: _types_pb2.Prompt
    sampling: _types_pb2.SamplingParams
    completions: _containers.RepeatedCompositeFieldContainer[_types_pb2.Completion]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokenizer_digest: str
    application: str
    key_id: str
    signature: bytes
    def __init__(self, event_id: _Optional[str] = ..., event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., user_id: _Optional[str] = ..., prompt: _Optional[_Union[_types_pb2.Prompt, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., completions: _Optional[_Iterable[_Union[_types_pb2.Completion, _Mapping]]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., tokenizer_digest: _Optional[str] = ..., application: _Optional[str] = ..., key_id: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RankingEvent(_message.Message):
    __slots__ = ("event_id", "event_time", "user_id", "sample_id", "groups", "shown_completion_ids", "comment", "policy_versions", "application", "key_id", "signature")
    class PolicyVersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SHOWN_COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    event_time: _timestamp_pb2.Timestamp
    user_id: str
    sample_id: str
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.RankingGroup]
    shown_completion_ids: _containers.RepeatedScalarFieldContainer[str]
    comment: str
    policy_versions: _containers.ScalarMap[str, int]
    application: str
    key_id: str
    signature: bytes
    def __init__(self, event_id: _Optional[str] = ..., event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., user_id: _Optional[str] = ..., sample_id: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.RankingGroup, _Mapping]]] = ..., shown_completion_ids: _Optional[_Iterable[str]] = ..., comment: _Optional[str] = ..., policy_versions: _Optional[_Mapping[str, int]] = ..., application: _Optional[str] = ..., key_id: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class DemonstrationEvent(_message.Message):
    __slots__ = ("event_id", "event_time", "user_id", "sample_id", "text", "application", "key_id", "signature")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    event_time: _timestamp_pb2.Timestamp
    user_id: str
    sample_id: str
    text: str
    application: str
    key_id: str
    signature: bytes
    def __init__(self, event_id: _Optional[str] = ..., event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., user_id: _Optional[str] = ..., sample_id: _Optional[str] = ..., text: _Optional[str] = ..., application: _Optional[str] = ..., key_id: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PolicyEvent(_message.Message):
    __slots__ = ("event_id", "registered", "stage_changed", "replica_status")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    STAGE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    REPLICA_STATUS_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    registered: PolicyRegistered
    stage_changed: PolicyStageChanged
    replica_status: _policy_service_pb2.ReplicaStatus
    def __init__(self, event_id: _Optional[str] = ..., registered: _Optional[_Union[PolicyRegistered, _Mapping]] = ..., stage_changed: _Optional[_Union[PolicyStageChanged, _Mapping]] = ..., replica_status: _Optional[_Union[_policy_service_pb2.ReplicaStatus, _Mapping]] = ...) -> None: ...

class PolicyRegistered(_message.Message):
    __slots__ = ("manifest", "artifact_uri", "change", "rebuilt")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URI_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    manifest: _policy_manifest_pb2.PolicyManifest
    artifact_uri: str
    change: _policy_service_pb2.StageChange
    rebuilt: bool
    def __init__(self, manifest: _Optional[_Union[_policy_manifest_pb2.PolicyManifest, _Mapping]] = ..., artifact_uri: _Optional[str] = ..., change: _Optional[_Union[_policy_service_pb2.StageChange, _Mapping]] = ..., rebuilt: _Optional[bool] = ...) -> None: ...

class PolicyStageChanged(_message.Message):
    __slots__ = ("change", "expected_live_version", "needs_quorum")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEEDS_QUORUM_FIELD_NUMBER: _ClassVar[int]
    change: _policy_service_pb2.StageChange
    expected_live_version: int
    needs_quorum: bool
    def __init__(self, change: _Optional[_Union[_policy_service_pb2.StageChange, _Mapping]] = ..., expected_live_version: _Optional[int] = ..., needs_quorum: _Optional[bool] = ...) -> None: ...

class DeadLetterEvent(_message.Message):
    __slots__ = ("event_id", "event_time", "position", "key", "value", "reason")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    event_time: _timestamp_pb2.Timestamp
    position: LogPosition
    key: bytes
    value: bytes
    reason: str
    def __init__(self, event_id: _Optional[str] = ..., event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., position: _Optional[_Union[LogPosition, _Mapping]] = ..., key: _Optional[bytes] = ..., value: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class LogPosition(_message.Message):
    __slots__ = ("topic", "partition", "offset")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    topic: str
    partition: int
    offset: int
    def __init__(self, topic: _Optional[str] = ..., partition: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

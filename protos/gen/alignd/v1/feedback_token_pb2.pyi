import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FeedbackClaims(_message.Message):
    __slots__ = ("key_id", "sample_id", "user_id", "completions", "issue_time", "expire_time", "application")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    ISSUE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    sample_id: str
    user_id: str
    completions: _containers.RepeatedCompositeFieldContainer[CompletionClaim]
    issue_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    application: str
    def __init__(self, key_id: _Optional[str] = ..., sample_id: _Optional[str] = ..., user_id: _Optional[str] = ..., completions: _Optional[_Iterable[_Union[CompletionClaim, _Mapping]]] = ..., issue_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., application: _Optional[str] = ...) -> None: ...

class CompletionClaim(_message.Message):
    __slots__ = ("completion_id", "policy_version")
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    policy_version: int
    def __init__(self, completion_id: _Optional[str] = ..., policy_version: _Optional[int] = ...) -> None: ...

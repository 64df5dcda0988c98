import datetime

from alignd.v1 import access_pb2 as _access_pb2
from alignd.v1 import types_pb2 as _types_pb2
from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubmitRankingRequest(_message.Message):
    __slots__ = ("request_id", "feedback_token", "user_id", "groups", "shown_completion_ids", "comment")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SHOWN_COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    feedback_token: str
    user_id: str
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.RankingGroup]
    shown_completion_ids: _containers.RepeatedScalarFieldContainer[str]
    comment: str
    def __init__(self, request_id: _Optional[str] = ..., feedback_token: _Optional[str] = ..., user_id: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.RankingGroup, _Mapping]]] = ..., shown_completion_ids: _Optional[_Iterable[str]] = ..., comment: _Optional[str] = ...) -> None: ...

class SubmitRankingResponse(_message.Message):
    __slots__ = ("ranking_id", "acknowledge_time")
    RANKING_ID_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_TIME_FIELD_NUMBER: _ClassVar[int]
    ranking_id: str
    acknowledge_time: _timestamp_pb2.Timestamp
    def __init__(self, ranking_id: _Optional[str] = ..., acknowledge_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SubmitDemonstrationRequest(_message.Message):
    __slots__ = ("request_id", "feedback_token", "user_id", "text")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    feedback_token: str
    user_id: str
    text: str
    def __init__(self, request_id: _Optional[str] = ..., feedback_token: _Optional[str] = ..., user_id: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class SubmitDemonstrationResponse(_message.Message):
    __slots__ = ("demonstration_id", "acknowledge_time")
    DEMONSTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_TIME_FIELD_NUMBER: _ClassVar[int]
    demonstration_id: str
    acknowledge_time: _timestamp_pb2.Timestamp
    def __init__(self, demonstration_id: _Optional[str] = ..., acknowledge_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

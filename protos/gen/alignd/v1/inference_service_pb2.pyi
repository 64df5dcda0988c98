import datetime

from alignd.v1 import types_pb2 as _types_pb2
from buf.validate import validate_pb2 as _validate_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SampleRequest(_message.Message):
    __slots__ = ("user_id", "prompt", "num_completions", "sampling", "policy")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    prompt: _types_pb2.Prompt
    num_completions: int
    sampling: _types_pb2.SamplingParams
    policy: str
    def __init__(self, user_id: _Optional[str] = ..., prompt: _Optional[_Union[_types_pb2.Prompt, _Mapping]] = ..., num_completions: _Optional[int] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., policy: _Optional[str] = ...) -> None: ...

class SampleResponse(_message.Message):
    __slots__ = ("sample_id", "completions", "feedback_token", "feedback_expire_time", "num_prompt_tokens")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    completions: _containers.RepeatedCompositeFieldContainer[_types_pb2.Completion]
    feedback_token: str
    feedback_expire_time: _timestamp_pb2.Timestamp
    num_prompt_tokens: int
    def __init__(self, sample_id: _Optional[str] = ..., completions: _Optional[_Iterable[_Union[_types_pb2.Completion, _Mapping]]] = ..., feedback_token: _Optional[str] = ..., feedback_expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., num_prompt_tokens: _Optional[int] = ...) -> None: ...

class StreamSampleRequest(_message.Message):
    __slots__ = ("user_id", "prompt", "num_completions", "sampling", "policy")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    prompt: _types_pb2.Prompt
    num_completions: int
    sampling: _types_pb2.SamplingParams
    policy: str
    def __init__(self, user_id: _Optional[str] = ..., prompt: _Optional[_Union[_types_pb2.Prompt, _Mapping]] = ..., num_completions: _Optional[int] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., policy: _Optional[str] = ...) -> None: ...

class StreamSampleResponse(_message.Message):
    __slots__ = ("started", "deltas", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: SampleStarted
    deltas: CompletionDeltas
    finished: SampleResponse
    def __init__(self, started: _Optional[_Union[SampleStarted, _Mapping]] = ..., deltas: _Optional[_Union[CompletionDeltas, _Mapping]] = ..., finished: _Optional[_Union[SampleResponse, _Mapping]] = ...) -> None: ...

class SampleStarted(_message.Message):
    __slots__ = ("sample_id",)
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    def __init__(self, sample_id: _Optional[str] = ...) -> None: ...

class CompletionDeltas(_message.Message):
    __slots__ = ("deltas",)
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[CompletionDelta]
    def __init__(self, deltas: _Optional[_Iterable[_Union[CompletionDelta, _Mapping]]] = ...) -> None: ...

class CompletionDelta(_message.Message):
    __slots__ = ("index", "text", "finish_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    finish_reason: _types_pb2.FinishReason
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ...) -> None: ...

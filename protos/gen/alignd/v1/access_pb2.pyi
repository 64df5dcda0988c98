from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_SAMPLE: _ClassVar[Scope]
    SCOPE_FEEDBACK: _ClassVar[Scope]
    SCOPE_OPERATE: _ClassVar[Scope]
    SCOPE_TRAIN: _ClassVar[Scope]
SCOPE_UNSPECIFIED: Scope
SCOPE_SAMPLE: Scope
SCOPE_FEEDBACK: Scope
SCOPE_OPERATE: Scope
SCOPE_TRAIN: Scope
SCOPES_FIELD_NUMBER: _ClassVar[int]
scopes: _descriptor.FieldDescriptor

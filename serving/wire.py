"""Reads a request's bytes before they are parsed, so that nothing large is built for a request that is refused.

A message of two bytes takes some fifty when parsed and thousands when its faults are listed, so a megabyte of them
would hold up the server for minutes. The limits are those of the contract (buf.validate: max_items, max_pairs).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from buf.validate import validate_pb2

# For the fields of later releases, and for messages that are sent in parts.
_MORE_FIELDS = 1_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_CONTINUED = bytes(range(0x80, 0x100))
_FIXED_BYTES = {FieldDescriptor.CPPTYPE_DOUBLE: 8, FieldDescriptor.CPPTYPE_FLOAT: 4}


class WireError(Exception):
    """The bytes are no message."""


class TooManyError(Exception):
    """The request has more of something than the contract allows."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


def count(raw: bytes, descriptor: Any) -> int:
    """Returns how many fields a request has, not counting those of messages that hold nothing repeated.

    Raises:
        TooManyError: a field stands more often than the contract allows.
        WireError: the bytes are no message.
    """
    reader = _Reader(_most_fields(descriptor) + _MORE_FIELDS)
    reader.count(memoryview(raw), descriptor, "", {})
    return reader.fields


def find_invalid_utf8(raw: bytes, descriptor: Any) -> str:
    """Returns the path of the first string field in `raw` that is not UTF-8, or "" if none is found."""
    try:
        return _Reader(_most_fields(descriptor) + _MORE_FIELDS).find_invalid_utf8(memoryview(raw), descriptor)
    except (WireError, TooManyError):
        return ""


def most(field: Any) -> int:
    """Returns how many elements the contract allows a repeated field or map; none if it does not say."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    return int(rules.repeated.max_items or rules.map.max_pairs)


class _Reader:
    """Reads the fields of one request, up to a limit.

    Raises:
        TooManyError: every method, if the request has more fields.
        WireError: every method, if the bytes are no message.
    """

    def __init__(self, most_fields: int) -> None:
        self.most_fields = most_fields
        self.fields = 0

    def count(self, raw: memoryview, descriptor: Any, path: str, counts: dict[str, int]) -> None:
        """Counts the fields of a message, and checks how many elements those have that are repeated.

        Args:
            raw: the serialised message, or a part of it: a message that stands twice in a field is one.
            descriptor: the message's type.
            path: where it stands in the request; "" for the request itself.
            counts: how many elements each repeated field has so far, by its path.

        Raises:
            TooManyError: a field has more elements than the contract allows.
        """
        countable = _countable(descriptor)
        for number, kind, value in self._read(raw):
            field = countable.get(number)
            if field is None:
                continue
            place, inside = (f"{path}.{field.name}" if path else field.name), counts
            if field.is_repeated:
                index = counts.get(place, 0)
                counts[place] = index + _elements(field, kind, value)
                if counts[place] > most(field):
                    raise TooManyError(place, f"must contain no more than {most(field)} item(s)")
                place, inside = f"{place}[{index}]", {}
            if field.message_type and kind == _BYTES and _countable(field.message_type):
                self.count(value, field.message_type, place, inside)

    def find_invalid_utf8(self, raw: memoryview, descriptor: Any) -> str:
        """Returns the path of the first string field of a message that is not UTF-8, or ""."""
        for number, kind, value in self._read(raw):
            field = descriptor.fields_by_number.get(number)
            if field is None or kind != _BYTES:
                continue
            if field.type == FieldDescriptor.TYPE_STRING:
                try:
                    str(value, "utf-8")
                except UnicodeDecodeError:
                    return str(field.name)
            if field.message_type:
                inner = self.find_invalid_utf8(value, field.message_type)
                if inner:
                    return f"{field.name}.{inner}"
        return ""

    def _read(self, raw: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """Yields the number, the wire type and the bytes of each field. Groups, of which we have none, are refused."""
        at = 0
        while at < len(raw):
            tag, at = _varint(raw, at)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                _, end = _varint(raw, at)
            elif kind == _BYTES:
                length, at = _varint(raw, at)
                end = at + length
            elif kind in (_FIXED64, _FIXED32):
                end = at + (8 if kind == _FIXED64 else 4)
            else:
                raise WireError
            if end > len(raw) or not number:
                raise WireError
            self.fields += 1
            if self.fields > self.most_fields:
                raise TooManyError("request", f"has more than {self.most_fields} fields")
            yield number, kind, raw[at:end]
            at = end


@cache
def _countable(descriptor: Any) -> dict[int, Any]:
    """Returns the fields of a message type that are repeated or have a repeated field inside, by number."""
    return {
        field.number: field
        for field in descriptor.fields
        if field.is_repeated or (field.message_type and _countable(field.message_type))
    }


@cache
def _most_fields(descriptor: Any) -> int:
    """Returns how many fields the contract allows a message, with those inside."""
    return sum(
        (most(field) if field.is_repeated else 1)
        * (1 + (_most_fields(field.message_type) if field.message_type else 0))
        for field in descriptor.fields
    )


def _elements(field: Any, kind: int, value: memoryview) -> int:
    """Returns how many elements one field on the wire adds to a repeated field: several, if numbers are packed."""
    if kind != _BYTES or field.cpp_type in (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE):
        return 1
    if field.cpp_type in _FIXED_BYTES:
        return len(value) // _FIXED_BYTES[field.cpp_type]
    return len(bytes(value).translate(None, delete=_CONTINUED))


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    """Returns the number that begins at `at`, and where it ends.

    Raises:
        WireError: there is none.
    """
    number = 0
    for index, byte in enumerate(raw[at : at + _LONGEST_VARINT]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, at + index + 1
    raise WireError

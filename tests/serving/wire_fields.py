"""Fields of a serialised message, made by hand, for messages that no message class would make."""


def varint(number: int) -> bytes:
    head, rest = number & 0x7F, number >> 7
    return bytes([head | 0x80]) + varint(rest) if rest else bytes([head])


def lengthy(number: int, value: bytes) -> bytes:
    """Returns a field of the wire type of strings, messages and packed numbers."""
    return varint(number << 3 | 2) + varint(len(value)) + value

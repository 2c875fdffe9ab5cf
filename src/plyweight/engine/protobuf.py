"""Protocol buffers: what ONNX models are written in, read and written field by field.

A message is its fields one after the other, each a number, a kind of value and the value:

    b"".join(raw for _, _, raw in fields_and_bytes(message)) == message

See https://protobuf.dev/programming-guides/encoding. No more of it is here than models take.
"""

import struct
from collections.abc import Iterator, Sequence

from plyweight.errors import GraphError

__all__ = [
    "Part",
    "Value",
    "counted",
    "fields",
    "fields_and_bytes",
    "float_of",
    "integer_field",
    "integer_of",
    "message_of",
    "packed",
    "refused",
    "text_field",
    "text_of",
]

VARINT, EIGHT_BYTES, COUNTED, FOUR_BYTES = 0, 1, 2, 5  # wire types; groups (3, 4) are long gone
FIXED_BYTES = {EIGHT_BYTES: 8, FOUR_BYTES: 4}

Part = bytes | memoryview
# Of a field: an integer, the bytes of a fixed-size number, or a view of what has a length.
Value = int | bytes | memoryview


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Every field of a message: its number, and what it has."""
    for number, value, _ in fields_and_bytes(message):
        yield number, value


def fields_and_bytes(message: memoryview) -> Iterator[tuple[int, Value, memoryview]]:
    """The same, and all the bytes that the field takes, its number and length among them.

    Raises:
        GraphError: If the message is none.
    """
    offset, stop = 0, len(message)
    while offset < stop:
        start = offset
        tag, offset = _varint(message, offset)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, offset = _varint(message, offset)
            yield number, value, message[start:offset]
            continue
        if wire_type == COUNTED:
            size, offset = _varint(message, offset)
        elif wire_type in FIXED_BYTES:
            size = FIXED_BYTES[wire_type]
        else:
            raise refused(f"a field has wire type {wire_type}")
        if size > stop - offset:
            raise refused("it ends inside a field")
        content = message[offset : offset + size]
        yield (
            number,
            content if wire_type == COUNTED else bytes(content),
            message[start : offset + size],
        )
        offset += size


def packed(message: memoryview) -> Iterator[int]:
    """The integers of a packed repeated field."""
    offset = 0
    while offset < len(message):
        value, offset = _varint(message, offset)
        yield value


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    """An integer of seven bits per byte, the lowest first; and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(message):
            raise refused("it ends inside a number")
        byte = message[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise refused("a number has more than 64 bits")


def message_of(value: Value) -> memoryview:
    """A field that is a message, as its bytes."""
    if not isinstance(value, memoryview):
        raise refused("a number stands where a message belongs")
    return value


def integer_of(value: Value) -> int:
    """A field that is an integer; a negative one is 2^64 more."""
    if not isinstance(value, int):
        raise refused("something else stands where an integer belongs")
    return value


def float_of(value: Value) -> float:
    """A field that is a float32."""
    if not isinstance(value, bytes) or len(value) != FIXED_BYTES[FOUR_BYTES]:
        raise refused("something else stands where a float belongs")
    found: float = struct.unpack("<f", value)[0]
    return found


def text_of(value: Value) -> str:
    """A field that is a text."""
    try:
        return bytes(message_of(value)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"a name is no UTF-8 ({error})") from error


def refused(reason: str) -> GraphError:
    """What is raised for a model that is wrong."""
    return GraphError(f"the graph's ONNX model is refused: {reason}; pack the model again.")


def counted(number: int, parts: Sequence[Part]) -> list[Part]:
    """A field that has ``parts`` one after the other."""
    return [_tag(number, COUNTED) + _written(sum(map(len, parts))), *parts]


def text_field(number: int, text: str) -> bytes:
    """A field that has a text."""
    return b"".join(counted(number, [text.encode()]))


def integer_field(number: int, value: int) -> bytes:
    """A field that has an integer."""
    return _tag(number, VARINT) + _written(value % 2**64)


def _tag(number: int, wire_type: int) -> bytes:
    return _written(number << 3 | wire_type)


def _written(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the high bit says that another follows."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)

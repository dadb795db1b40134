"""The little of Protocol Buffers that BuildKit's sessions need: fields by number, without generated code.

A message is a list of (number, value) to write, and a dictionary number -> values when read. Values are int (varint),
bytes, str or a nested message (list). Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LabkernelError

Fields = Sequence[tuple[int, Any]]
_MAX_VARINT = 10


class BadMessage(LabkernelError):
    """Bytes that are no message."""


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1  # negative ones as docker's int64
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode(fields: Fields) -> bytes:
    """Default values (0, empty) are left out, as proto3 does; None is left out, an empty nested message is not."""
    out = bytearray()
    for number, value in fields:
        if value is None or value is False or value == 0 or value == "" or value == b"":
            continue
        if isinstance(value, int):
            out += varint(number << 3) + varint(int(value))
            continue
        data = (
            value.encode("utf-8", "surrogateescape")
            if isinstance(value, str)
            else value
            if isinstance(value, bytes)
            else encode(value)
        )
        out += varint(number << 3 | 2) + varint(len(data)) + data
    return bytes(out)


def decode(data: bytes) -> dict[int, list[Any]]:
    """Numbers as int, everything else as bytes. Raises BadMessage."""
    found: dict[int, list[Any]] = {}
    pos = 0
    while pos < len(data):
        key, pos = _read_varint(data, pos)
        kind = key & 7
        value: Any
        if kind == 0:
            value, pos = _read_varint(data, pos)
        elif kind == 2:
            length, pos = _read_varint(data, pos)
            value, pos = data[pos : pos + length], pos + length
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            value, pos = int.from_bytes(data[pos : pos + length], "little"), pos + length
        else:
            raise BadMessage(f"a message with the wire type {kind}")
        if pos > len(data):
            raise BadMessage("a message that ends in the middle of a field")
        found.setdefault(key >> 3, []).append(value)
    return found


def number(message: Mapping[int, list[Any]], field: int) -> int:
    """The last value of a number; 0 when it is not there."""
    value = (message.get(field) or [0])[-1]
    return value if isinstance(value, int) else 0


def data(message: Mapping[int, list[Any]], field: int) -> bytes:
    """The last value of bytes; empty when they are not there."""
    value = (message.get(field) or [b""])[-1]
    return value if isinstance(value, bytes) else b""


def items(message: Mapping[int, list[Any]], field: int) -> list[bytes]:
    """All values of bytes: strings, or messages to decode."""
    return [value for value in message.get(field, ()) if isinstance(value, bytes)]


def text(message: Mapping[int, list[Any]], field: int) -> str:
    return data(message, field).decode(errors="surrogateescape")


def _read_varint(data: bytes, pos: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT):
        if pos >= len(data):
            raise BadMessage("a message that ends in the middle of a number")
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & (1 << 64) - 1, pos
    raise BadMessage("a number that does not end")

"""The wire format of protocol buffers, as far as finding things in an ONNX file takes; the onnx package is not on devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Bytes(Protocol):
    """What gives its bytes by their places."""

    def __getitem__(self, at: int, /) -> int: ...


def fields(data: Bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Find the fields of a message: (number, start, stop) of what each holds.

    Raises:
        ValueError: these bytes are no message.
    """
    while at < stop:
        tag, at = varint(data, at, stop)
        if tag >= 1 << 32:  # other readers drop the upper bits, and would see another field here than we do
            raise ValueError("not a message")
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            end = varint(data, at, stop)[1]
        elif wire == 2:
            length, at = varint(data, at, stop)
            end = at + length
        elif wire in (1, 5):
            end = at + (8 if wire == 1 else 4)
        else:
            raise ValueError("not a message")
        if not number or end > stop:
            raise ValueError("not a message")
        yield number, at, end
        at = end


def varint(data: Bytes, at: int, stop: int) -> tuple[int, int]:
    """Read a number of variable length; returns it and where it ends.

    Raises:
        ValueError: these bytes are none.
    """
    value = shift = 0
    while at < stop and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("not a number")

"""The wire format of protocol buffers, as far as it takes to find tensors in an ONNX file; devices lack the onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Bytes(Protocol):
    """An object that returns one byte by its index."""

    def __getitem__(self, at: int, /) -> int: ...


def fields(data: Bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message, each as its number and the start and stop of its content.

    Raises:
        ValueError: the bytes are not a message.
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
    """Read an integer of variable length; return it and the offset after it.

    Raises:
        ValueError: the bytes are not such an integer.
    """
    value = shift = 0
    while at < stop and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("not a number")

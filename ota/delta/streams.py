"""Streams of small non-negative numbers as bytes: what is likely short is short, at a nanosecond or two for each number.

The coder is zstd's Huffman stage, which is fast everywhere and already on the device. It spends whole bits on bytes, so numbers are
first laid into bytes that hold some bits of information each:

    zero      nothing: all are 0
    pack1     one number in a byte; 255 says that the rest follows in a stream of its own
    pack2     two numbers in a byte, each 0 to 14, 15 as above
    pack4     four, each 0 to 2, 3 as above
    flags     eight bits of "is not 0" in a byte; the others, less 1, follow in a stream of their own
    gaps      how many zeros lie before each number that is not 0, as a stream of its own; the others, less 1, as another
    token     the number's bit length and its next two bits in a byte, what is below them bit plane by bit plane
    planes    the number's bytes, most significant first, for data with repetitions that zstd can find

All but `token` and `planes` may be told to set low bits aside, which then are noise and are stored as they are. On independent numbers the
sum is 0.5 to 3 % above their entropy.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from ota.errors import DeltaError

Numbers = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]

ZERO, PACK1, PACK2, PACK4, FLAGS, GAPS, TOKEN, PLANES = range(8)
MODES = {
    ZERO: "zero",
    PACK1: "pack1",
    PACK2: "pack2",
    PACK4: "pack4",
    FLAGS: "flags",
    GAPS: "gaps",
    TOKEN: "token",
    PLANES: "planes",
}
MAX_DEPTH = 4  # of streams within streams
DEEP = 3  # a stream that is this many streams inside others is written without another
FEW = 1 << 12  # numbers for which trying several ways costs little
TOKENS = 16 + 4 * 28  # numbers below 16, and four for each bit length from 5 to 32
_IN_A_BYTE = {PACK1: 1, PACK2: 2, PACK4: 4}
_MOST = {ZERO: 0, TOKEN: 0, PLANES: 4}  # the largest argument; of the others, low bits: 31
_HEAD = struct.Struct("<BB")  # mode, low bits set aside
_LENGTH = struct.Struct("<I")
# Matches cost more than they save among independent numbers, so zstd hardly looks for any and its Huffman coder does the work.
_HUFFMAN = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, chain_log=6, target_length=0)
_REPEATS = zstandard.ZstdCompressionParameters.from_level(9)
_BASE = {1: 256, 2: 16, 4: 4, 8: 2}  # what lies below it goes so often into a byte
# What a packed byte holds, as one word for each byte so that it is a single lookup.
_UNPACKED = {
    count: np.stack([np.arange(256) // base ** (count - 1 - i) % base for i in range(count)], axis=1)
    .astype(np.uint8)
    .view(f"u{count}")
    .ravel()
    for count, base in _BASE.items()
}


class _Zstd(threading.local):
    """For each thread its own, as they are not to be shared; making one costs as much as packing a thousand bytes."""

    def __init__(self) -> None:
        self.huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
        self.repeats = zstandard.ZstdCompressor(compression_params=_REPEATS)
        self.unpacker = zstandard.ZstdDecompressor()


_ZSTD = _Zstd()


def unpack(packed: bytes | memoryview, size: int | None, limit: int = 0) -> bytes:
    """What one zstd frame holds; it must claim and hold `size` bytes, or if that is not known at most `limit`, and never none.

    Raises:
        DeltaError: it does not.
    """
    try:
        claimed = zstandard.get_frame_parameters(packed).content_size
        # zstandard looks no further into a frame that claims to be empty, and no writer needs one.
        if not claimed or (claimed != size if size is not None else claimed > limit):
            raise DeltaError("a record of the delta unpacks to another length than it claims")
        # One frame and nothing after it: what follows would be carried but never checked.
        made: bytes = _ZSTD.unpacker.decompress(packed, max_output_size=claimed, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise DeltaError("a record of the delta cannot be unpacked; fetch it again") from error
    return made


class Reader:
    """Bytes that are consumed from the front, and never more of them than there are."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        """The next bytes.

        Raises:
            DeltaError: there are not so many.
        """
        if self._at + count > len(self._data):
            raise DeltaError("a record of the delta ends too early; fetch it again")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        """The next 32 bits."""
        found: int = _LENGTH.unpack(self.take(_LENGTH.size))[0]
        return found

    def frame(self, size: int | None, limit: int = 0) -> Bytes:
        """The next zstd frame, unpacked; it must claim and hold `size` bytes, or if that is not known at most `limit`.

        Raises:
            DeltaError: it does not.
        """
        return np.frombuffer(unpack(self.take(self.number()), size, limit), np.uint8)

    def end(self) -> None:
        """Nothing may be left.

        Raises:
            DeltaError: something is.
        """
        if self._at != len(self._data):
            raise DeltaError("a record of the delta goes on after its end; fetch it again")


def frame(data: Bytes | bytes, repeats: bool = False) -> bytes:
    """A zstd frame with its length before it; with `repeats` zstd looks for them."""
    packed = (_ZSTD.repeats if repeats else _ZSTD.huffman).compress(bytes(data))
    return _LENGTH.pack(len(packed)) + packed


# Encoding


def encode(values: Numbers, depth: int = 0) -> bytes:
    """The shortest of the ways that promise something for these numbers, which are `depth` streams inside another."""
    count = len(values)
    if not count or not values.any():
        return _HEAD.pack(ZERO, 0)
    zeros = 1 - np.count_nonzero(values) / count
    sample = values[:: max(1, count // 4096)]
    middle = float(np.median(sample))
    aside = max(0, int(np.log2(middle / 12))) if middle > 24 else 0
    ways = [(PACK1, aside)]
    if zeros > 0.8:
        ways = [(GAPS, 0)]
    elif zeros > 0.6:
        ways = [(FLAGS, 0), (PACK4, 0), (GAPS, 0)]
    elif zeros > 0.3:
        ways = [(PACK4, 0), (PACK2, 0), (FLAGS, 0)]
    elif middle <= 8:
        ways = [(PACK2, 0), (PACK1, 0)]
    if count < FEW:  # a table of codes weighs as much as what it saves
        ways += [(TOKEN, 0), *((PACK1, low) for low in (aside - 2, aside - 1, aside + 1, aside + 2) if low >= 0)]
    elif np.count_nonzero(sample >> np.uint32(aside) >= 255) > 0.01 * len(sample):
        ways.append((TOKEN, 0))  # no number of low bits fits all
    if depth == DEEP:
        ways = [(TOKEN, 0)]  # the only way that needs no stream inside
    return min((_as(values, mode, low, depth) for mode, low in ways), key=len)


def planes(values: Numbers, width: int) -> bytes:
    """The numbers' lowest `width` bytes, plane by plane."""
    if not len(values):
        return _HEAD.pack(ZERO, 0)
    found = [(values >> np.uint32(8 * i)).astype(np.uint8) for i in reversed(range(width))]
    return _HEAD.pack(PLANES, width) + frame(np.concatenate(found), repeats=True)


def _as(values: Numbers, mode: int, aside: int, depth: int) -> bytes:
    head = _HEAD.pack(mode, aside)
    if mode == TOKEN:
        return head + _as_tokens(values)
    for first, width in _low(aside):
        head += frame(_pack((values >> np.uint32(first) & np.uint32((1 << width) - 1)).astype(np.uint8), 8 // width))
    high = values >> np.uint32(aside)
    if mode == GAPS:
        at = np.flatnonzero(high)
        gaps = (np.diff(at, prepend=-1) - 1).astype(np.uint32)
        return head + _LENGTH.pack(len(at)) + encode(gaps, depth + 1) + encode(high[at] - np.uint32(1), depth + 1)
    if mode == FLAGS:
        on = high != 0
        return head + frame(np.packbits(on)) + encode(high[on] - np.uint32(1), depth + 1)
    count = _IN_A_BYTE[mode]
    most = _BASE[count] - 1
    symbols = np.minimum(high, most).astype(np.uint8)
    rest = high[symbols == most] - np.uint32(most)
    return head + frame(_pack(symbols, count)) + (encode(rest, depth + 1) if len(rest) else b"")


def _low(aside: int) -> list[tuple[int, int]]:
    """The low bits that are set aside, as (first, width): whole bytes, then what fills bytes several times."""
    widths = [8] * (aside // 8) + [width for width in (4, 2, 1) if aside & width]
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _pack(symbols: Bytes, count: int) -> Bytes:
    """`count` symbols in each byte; what is missing at the end counts as 0."""
    if count == 1:
        return symbols
    padded = np.concatenate((symbols, np.zeros(-len(symbols) % count, np.uint8))).reshape(-1, count)
    packed = padded[:, 0]
    for i in range(1, count):
        packed = packed * np.uint8(_BASE[count]) + padded[:, i]
    return packed


def _unpack(packed: Bytes, count: int, length: int) -> Bytes:
    """The inverse of `_pack`."""
    return packed if count == 1 else _UNPACKED[count][packed].view(np.uint8)[:length]


def _as_tokens(values: Numbers) -> bytes:
    symbols, below = tokens(values)
    made = frame(symbols)
    for plane in range(int(below.max())):
        made += frame(np.packbits(values[below > plane] >> np.uint32(plane) & np.uint32(1)))
    return made


def tokens(values: Numbers) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    """Each number's token, and how many of its bits the token does not tell."""
    length = np.frexp(values.astype(np.float64))[1].astype(np.uint8)  # of the number in bits
    below = np.where(values < 16, np.uint8(0), length - np.uint8(3))
    high = 16 + 4 * (length.astype(np.int32) - 5) + (values >> below & np.uint32(3)).astype(np.int32)
    return np.where(values < 16, values, high).astype(np.uint8), below


# Decoding


def decode(reader: Reader, count: int, depth: int = 0) -> Numbers:
    """The inverse of `encode` and `planes`.

    Raises:
        DeltaError: the bytes are damaged.
    """
    mode, aside = _HEAD.unpack(reader.take(_HEAD.size))
    if mode not in MODES or depth > MAX_DEPTH or aside > _MOST.get(mode, 31):
        raise DeltaError("a record of the delta is packed in an unknown way; update the agent")
    if mode == ZERO:
        return np.zeros(count, np.uint32)
    if mode == TOKEN:
        return _from_tokens(reader, count)
    if mode == PLANES:
        raw = reader.frame(aside * count).reshape(aside, count)
        made = np.zeros(count, np.uint32)
        for plane in raw:
            made = made << np.uint32(8) | plane
        return made
    low: Any = None
    for first, width in _low(aside):
        packed = reader.frame(-(-count * width // 8))
        part = _unpack(packed, 8 // width, count).astype(np.uint32) << np.uint32(first)
        low = part if low is None else low | part
    high = _high(reader, count, mode, depth)
    return high if low is None else high << np.uint32(aside) | low


def _high(reader: Reader, count: int, mode: int, depth: int) -> Numbers:
    # While the stream within is read, all streams around it wait: what they hold is to be small, and is spread out afterwards.
    if mode in (GAPS, FLAGS):
        if mode == FLAGS:
            at: Any = np.unpackbits(reader.frame(-(-count // 8)), count=count).view(np.bool_)
            others = int(np.count_nonzero(at))
        else:
            at = _places(reader, count, depth)
            others = len(at)
        rest = decode(reader, others, depth + 1)
        high = np.zeros(count, np.uint32)
        high[at] = rest + np.uint32(1)
        return high
    group = _IN_A_BYTE[mode]
    symbols = _unpack(reader.frame(-(-count // group)), group, count)
    most = _BASE[group] - 1
    others = int(np.count_nonzero(symbols == most))
    if not others:
        return symbols.astype(np.uint32)
    rest = decode(reader, others, depth + 1)
    high = symbols.astype(np.uint32)
    high[np.flatnonzero(symbols == most)] += rest
    return high


def _places(reader: Reader, count: int, depth: int) -> Numbers:
    """Where the numbers are that are not 0, by the zeros before each of them."""
    others = reader.number()
    at = np.cumsum(decode(reader, others, depth + 1) if 0 < others <= count else [count], dtype=np.int64)
    at += np.arange(len(at))
    if len(at) != others or int(at[-1]) >= count:
        raise DeltaError("a record of the delta names a place that it does not have; fetch it again")
    return at.astype(np.uint32)


def _from_tokens(reader: Reader, count: int) -> Numbers:
    symbols = reader.frame(count)
    large = np.flatnonzero(symbols >= 16)
    values = symbols.astype(np.uint32)
    if not len(large):
        return values
    rank = symbols[large] - np.uint8(16)
    below = rank // np.uint8(4) + np.uint8(2)
    if int(below.max()) > 29:
        raise DeltaError("a record of the delta holds a number that is too large; fetch it again")
    found = (np.uint32(4) + rank % np.uint8(4)) << below.astype(np.uint32)
    for plane in range(int(below.max())):
        on = np.flatnonzero(below > plane)
        bits = np.unpackbits(reader.frame(-(-len(on) // 8)), count=len(on))
        found[on] |= bits.astype(np.uint32) << np.uint32(plane)
    values[large] = found
    return values

"""Encode streams of small non-negative numbers in few bytes, at one or two nanoseconds for each number.

The coder is zstd's Huffman stage, which is fast everywhere and already on the device. It spends a whole number of bits on each
byte, so numbers are first packed into bytes that hold several bits of information each:

    zero      nothing: all are 0
    pack1     one number in a byte; 255 says that the rest follows in a stream of its own
    pack2     two numbers in a byte, each 0 to 14, 15 as above
    pack4     four, each 0 to 2, 3 as above
    flags     eight bits of "is not 0" in a byte; the numbers that are not 0, less 1, follow in a stream of their own
    gaps      how many zeros lie before each number that is not 0, as a stream; these numbers, less 1, as another stream
    token     the number's bit length and its next two bits in a byte; the bits below them, bit plane by bit plane
    planes    the numbers' bytes, all most significant ones first, for data with repetitions that zstd can find

All modes but `zero`, `token` and `planes` can first set low bits aside. These are noise and are stored in frames of their own. On
independent numbers, the result is 0.5 to 3 % longer than their entropy.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from backports import zstd

from ota.errors import DeltaError

Numbers = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]

ZERO, PACK1, PACK2, PACK4, FLAGS, GAPS, TOKEN, PLANES = range(8)
MODES = {
    ZERO: "zero", PACK1: "pack1", PACK2: "pack2", PACK4: "pack4", FLAGS: "flags", GAPS: "gaps", TOKEN: "token", PLANES: "planes",
}  # fmt: skip
MAX_DEPTH = 4  # of streams within streams
DEEP = 3  # a stream that lies this deep in others is written without a stream inside
TOKENS = 16 + 4 * 28  # numbers below 16, and four for each bit length from 5 to 32
_IN_A_BYTE = {PACK1: 1, PACK2: 2, PACK4: 4}
_MOST = {ZERO: 0, TOKEN: 0, PLANES: 4}  # the largest argument of a mode; that of the others, their low bits, is 31
_HEAD = struct.Struct("<BB")  # mode, low bits set aside
_LENGTH = struct.Struct("<I")
_BASE = {1: 256, 2: 16, 4: 4, 8: 2}  # symbols in a byte, and their base: each symbol lies below it
# The symbols of each packed byte as one word, so that unpacking a byte is a single lookup.
_UNPACKED = {
    count: np.stack([np.arange(256) // base ** (count - 1 - i) % base for i in range(count)], axis=1)
    .astype(np.uint8)
    .view(f"u{count}")
    .ravel()
    for count, base in _BASE.items()
}

# Choosing a mode
SAMPLE = 1 << 13  # numbers that are sampled
FRAME_COST = 15.0  # bytes of a frame besides its symbols
SYMBOL_COST = 0.35  # bytes that a symbol adds to a Huffman table
MAX_TABLE_COST = 100.0  # bytes of the largest Huffman table
_COMPARED = 1 << 13  # numbers; up to so many, the three most promising ways are all tried

# Among independent numbers, matches cost more than they save. So zstd hardly searches for them; its Huffman coder does the work.
_P = zstd.CompressionParameter
_HUFFMAN: dict[int, int] = {_P.compression_level: 1, _P.min_match: 7, _P.hash_log: 6, _P.chain_log: 6, _P.target_length: 0}
_REPEATS: dict[int, int] = {_P.compression_level: 9}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h
_LOW_LEVEL, _WINDOW = 6, 24  # zstd searches all that it may refer to only from this level on; its window there, as log2 of bytes


@functools.cache
def keep_memory() -> None:
    """Ask the C library to keep freed memory for the next record instead of returning it to the system.

    A fresh page costs as much as decoding the thousand numbers that it holds: without this, small deltas take twice the processor
    time. The setting is for this process, which keeps at most 64 MiB of free memory. Where the C library is not glibc, nothing
    happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        set_option(_TRIM_THRESHOLD, 64 << 20)
        set_option(_MMAP_THRESHOLD, 32 << 20)


class _Zstd(threading.local):
    """The compressors of one thread: threads must not share them, and making one takes as long as packing a thousand bytes."""

    def __init__(self) -> None:
        self.huffman = zstd.ZstdCompressor(options=_HUFFMAN)
        self.repeats = zstd.ZstdCompressor(options=_REPEATS)


_ZSTD = _Zstd()


def unpack(packed: bytes | memoryview, size: int | None, limit: int = 0, known: bytes | None = None) -> bytes:
    """Decompress one zstd frame, which must claim its true size: `size` bytes, or 1 to `limit` bytes if that is not known.

    Args:
        packed: the frame, and nothing after it.
        size: bytes that it must hold; None: not known.
        limit: the most bytes that it may hold, if `size` is not known.
        known: the bytes that it may refer to; None: it refers to none.

    Raises:
        DeltaError: the frame is damaged, is empty, or claims or holds another size.
    """
    try:
        claimed = zstd.get_frame_info(packed).decompressed_size
        # No writer needs a frame that holds nothing.
        if not claimed or (claimed != size if size is not None else claimed > limit):
            raise DeltaError("a record of the delta unpacks to another length than it claims")
        beside = zstd.ZstdDict(known, is_raw=True).as_prefix if known else None
        unpacker = zstd.ZstdDecompressor(zstd_dict=beside)
        made = unpacker.decompress(packed, max_length=claimed)
        # One whole frame and nothing after it: what follows would be carried but never checked.
        if len(made) != claimed or not unpacker.eof or unpacker.unused_data:
            raise DeltaError("a record of the delta cannot be unpacked; fetch it again")
    except (zstd.ZstdError, ValueError, EOFError) as error:
        raise DeltaError("a record of the delta cannot be unpacked; fetch it again") from error
    return made


class Reader:
    """Bytes that are consumed from the front; to read past their end is an error."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        """Take the next `count` bytes.

        Raises:
            DeltaError: fewer bytes are left.
        """
        if self.at + count > len(self._data):
            raise DeltaError("a record of the delta ends too early; fetch it again")
        self.at += count
        return self._data[self.at - count : self.at]

    def rest(self) -> bytes:
        """Take all bytes that are left."""
        return bytes(self.take(len(self._data) - self.at))

    def number(self) -> int:
        """Read the next 32 bits as an unsigned integer."""
        found: int = _LENGTH.unpack(self.take(_LENGTH.size))[0]
        return found

    def frame(self, size: int | None, limit: int = 0) -> Bytes:
        """Decompress the next zstd frame; `size` and `limit` are those of `unpack`.

        Raises:
            DeltaError: the frame is damaged, is empty, or claims or holds another size.
        """
        return np.frombuffer(unpack(self.take(self.number()), size, limit), np.uint8)

    def end(self) -> None:
        """Check that no bytes are left.

        Raises:
            DeltaError: bytes are left.
        """
        if self.at != len(self._data):
            raise DeltaError("a record of the delta goes on after its end; fetch it again")


def frame(data: Bytes | bytes, repeats: bool = False) -> bytes:
    """Compress bytes to a zstd frame with its length before it; with `repeats`, zstd searches for repetitions."""
    packer = _ZSTD.repeats if repeats else _ZSTD.huffman
    packed = packer.compress(data if isinstance(data, bytes) else data.tobytes(), packer.FLUSH_FRAME)
    return _LENGTH.pack(len(packed)) + packed


def compress_with_prefix(data: bytes, known: bytes, level: int) -> bytes:
    """Compress bytes to a zstd frame that may refer to `known`, with the length of `known` before it.

    Levels below `_LOW_LEVEL` find only long repetitions.
    """
    options: dict[int, int] = {_P.compression_level: level}
    options |= {_P.enable_long_distance_matching: 1} if level < _LOW_LEVEL else {_P.window_log: _WINDOW}
    packer = zstd.ZstdCompressor(options=options, zstd_dict=zstd.ZstdDict(known, is_raw=True).as_prefix)
    return _LENGTH.pack(len(known)) + packer.compress(data, packer.FLUSH_FRAME)


# Encoding


def encode(values: Numbers, depth: int = 0) -> bytes:
    """Encode numbers as a stream, which lies `depth` streams deep in others, in the way that promises to be shortest."""
    count = len(values)
    others = int(np.count_nonzero(values))
    if not others:
        return _HEAD.pack(ZERO, 0)
    if depth == DEEP:
        return _as(values, TOKEN, 0, depth)  # the only way that needs no stream inside
    ways = sorted(_ways(values, others))
    if count > _COMPARED:
        return _as(values, *ways[0][1:], depth)
    return min((_as(values, mode, low, depth) for _, mode, low in ways[:3]), key=len)


def _ways(values: Numbers, others: int) -> list[tuple[float, int, int]]:
    """Estimate all ways that may pay, as (bytes, mode, low bits set aside), by the entropy of a sample as independent numbers."""
    count = len(values)
    sample = values[:: -(-count // SAMPLE)]
    each = count / len(sample)
    largest = int(sample.max())
    ways: list[tuple[float, int, int]] = []
    best, small = np.inf, np.bincount(np.minimum(sample, 255).astype(np.intp), minlength=256)
    first = int(np.log2(max(1.0, float(np.median(sample)) / 160)))
    for low in range(first, min(first + 9, 31)):
        counts = np.bincount(np.minimum(sample >> np.uint32(low), 255).astype(np.intp), minlength=256) if low else small
        far = int(counts[255])
        rest = far * (np.log2(max(largest >> low, 256)) + 2) / 8  # about what the numbers cost that do not fit into a symbol
        cost = (
            each * (_huffman(counts) + rest + len(sample) * low / 8)
            + _table(counts)
            + FRAME_COST * (1 + low.bit_count() + 2 * (far > 0))
        )
        ways.append((cost, PACK1, low))
        if cost > best:
            break
        best = cost
    zeros = 1 - others / count
    for mode in (PACK2, PACK4):
        group = _IN_A_BYTE[mode]
        most = _BASE[group] - 1
        far = int(small[most:].sum())
        if far < 0.12 * len(sample):
            counts = np.append(small[:most], far)
            together = np.multiply.outer(counts / len(sample), counts / len(sample)).ravel()
            together = np.multiply.outer(together, together).ravel() if group == 4 else together
            rest = far * (np.log2(max(largest, 16)) + 1) / 8
            cost = each * (_huffman(together * (len(sample) / group)) + rest) + _table(together * (count / group) > 0.5)
            ways.append((cost + FRAME_COST * (1 + 2 * (far > 0)), mode, 0))
    if zeros > 0.2:
        apart = small[1:]
        rest = 1.03 * each * _entropy(apart)[1] + _table(apart) + FRAME_COST
        flags = np.array([zeros, 1 - zeros])
        if zeros < 0.85:
            together = flags
            for _ in range(7):
                together = np.multiply.outer(together, flags).ravel()
            cost = _huffman(together * (count / 8)) + _table(together * (count / 8) > 0.5)
            ways.append((cost + rest, FLAGS, 0))
        if zeros > 0.55:
            ways.append((1.015 * _entropy(flags * count)[1] + 2 * FRAME_COST + min(20.0, others / 8) + rest, GAPS, 0))
    if count < 4096 or ways[0][2]:
        symbols, below = tokens(sample)
        counts = np.bincount(symbols)
        planes = int(below.max())
        cost = each * (_huffman(counts) + int(below.sum(dtype=np.int64)) / 8) + _table(counts) + FRAME_COST * (1 + planes)
        ways.append((cost, TOKEN, 0))
    return ways


def _huffman(counts: npt.NDArray[Any]) -> float:
    """Estimate how many bytes zstd needs for independent symbols with these counts.

    That is their entropy, and what codes of whole bits cost, and where few symbols are common also what the matches cost that
    zstd makes nevertheless. The formula was fitted to what zstd makes of independent symbols.
    """
    top, entropy = _entropy(counts)
    total = float(counts.sum())
    each = 8 * entropy / max(total, 1)
    return entropy + total * min(0.62, 0.05 + 1.6 * max(0.0, top - 0.42) + 0.9 * max(0.0, 2 - each)) / 8


def _entropy(counts: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the share of the most common symbol, and the entropy of independent symbols with these counts, in bytes."""
    total = float(counts.sum())
    share = counts[counts > 0] / max(total, 1)
    return float(share.max(initial=0)), -total * float((share * np.log2(share)).sum()) / 8


def _table(counts: npt.NDArray[Any]) -> float:
    """Estimate how many bytes a Huffman table takes."""
    return min(MAX_TABLE_COST, 4 + SYMBOL_COST * np.count_nonzero(counts))


def planes(values: Numbers, width: int) -> bytes:
    """Encode the lowest `width` bytes of the numbers plane by plane, the most significant first."""
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
    high = values >> np.uint32(aside) if aside else values
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
    """Split the low bits that are set aside into (first bit, width): whole bytes, then widths that fit a byte several times."""
    widths = [8] * (aside // 8) + [width for width in (4, 2, 1) if aside & width]
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _pack(symbols: Bytes, count: int) -> Bytes:
    """Pack `count` symbols into each byte; at the end, missing symbols count as 0."""
    if count == 1:
        return symbols
    if -len(symbols) % count:
        symbols = np.concatenate((symbols, np.zeros(-len(symbols) % count, np.uint8)))
    packed = symbols[0::count]
    for i in range(1, count):
        packed = packed * np.uint8(_BASE[count]) + symbols[i::count]
    return packed


def _unpack(packed: Bytes, count: int, length: int) -> Bytes:
    """Unpack `length` symbols; the inverse of `_pack`."""
    return packed if count == 1 else np.take(_UNPACKED[count], packed).view(np.uint8)[:length]


def _as_tokens(values: Numbers) -> bytes:
    symbols, below = tokens(values)
    made = frame(symbols)
    for plane in range(int(below.max())):
        made += frame(np.packbits(values[below > plane] >> np.uint32(plane) & np.uint32(1)))
    return made


def tokens(values: Numbers) -> tuple[Bytes, Bytes]:
    """Return each number's token, and how many of its low bits the token leaves out."""
    low = np.take(_TOKEN, values & np.uint32(0xFFFF))
    if len(values) and values.max() > 0xFFFF:
        high = values >> np.uint32(16)
        at = np.flatnonzero(high)
        # The bits that a token holds may lie in both halves of the number, so they are taken from all of it.
        length = np.frexp(values[at].astype(np.float64))[1].astype(np.uint8)
        low[at] = 16 + 4 * (length - 5) + (values[at] >> (length - np.uint8(3)) & np.uint32(3)).astype(np.uint8)
    return low, np.take(_BELOW, low)


def _token_of_small() -> Bytes:
    values = np.arange(1 << 16)
    length = np.frexp(values)[1].astype(np.int32)  # of each number, in bits
    high = 16 + 4 * (length - 5) + (values >> np.maximum(length - 3, 0) & 3)
    return np.where(values < 16, values, high).astype(np.uint8)


_TOKEN = _token_of_small()
_BELOW = np.array([0] * 16 + [2 + i // 4 for i in range(TOKENS - 16)], np.uint8)


# Decoding


def decode(reader: Reader, count: int, depth: int = 0) -> Numbers:
    """Decode a stream of `count` numbers; the inverse of `encode` and `planes`.

    Raises:
        DeltaError: the bytes are damaged.
    """
    at, found = decode_apart(reader, count, depth)
    if at is None:
        return found
    whole = np.zeros(count, np.uint32)
    whole[at] = found
    return whole


def decode_apart(reader: Reader, count: int, depth: int = 0) -> tuple[npt.NDArray[Any] | None, Numbers]:
    """Decode a stream as `decode` does, but without the zeros where most numbers are 0.

    Returns:
        The places of the numbers that are not 0, and these numbers; or None, and all numbers.

    Raises:
        DeltaError: the bytes are damaged.
    """
    mode, aside = _HEAD.unpack(reader.take(_HEAD.size))
    if mode not in MODES or depth > MAX_DEPTH or aside > _MOST.get(mode, 31):
        raise DeltaError("a record of the delta is packed in an unknown way; update the agent")
    if mode == ZERO:
        return np.zeros(0, np.intp), np.zeros(0, np.uint32)
    if mode == TOKEN:
        return None, _from_tokens(reader, count)
    if mode == PLANES:
        raw = reader.frame(aside * count).reshape(aside, count)
        made = np.zeros(count, np.uint32)
        for plane in raw:
            made = made << np.uint32(8) | plane
        return None, made
    low: Any = None
    for first, width in _low(aside):
        packed = reader.frame(-(-count * width // 8))
        part = _unpack(packed, 8 // width, count).astype(np.uint32) << np.uint32(first)
        low = part if low is None else low | part
    if mode in _IN_A_BYTE:
        high = _packed(reader, count, _IN_A_BYTE[mode], depth)
        return None, high if low is None else high << np.uint32(aside) | low
    # Outer streams stay in memory while the inner one is read. So they hold little, and are expanded only afterwards.
    if mode == FLAGS:
        at: Any = np.flatnonzero(np.unpackbits(reader.frame(-(-count // 8)), count=count).view(np.bool_)).astype(np.uint32)
    else:
        at = _places(reader, count, depth)
    rest = decode(reader, len(at), depth + 1)
    rest += np.uint32(1)
    if low is None:
        return at, rest
    low[at] |= rest << np.uint32(aside)
    return None, low


def _packed(reader: Reader, count: int, group: int, depth: int) -> Numbers:
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
    """Read the places of the numbers that are not 0, from how many zeros lie before each."""
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

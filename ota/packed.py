"""Small signed files as they travel: packed with zlib, beside the file itself.

Signed files are mostly hex digits and repeated names, so packing halves them, and more where a list is long. What is signed is the file
itself: whatever is wrong with a packed one, the reader takes the other. It is unpacked before anything is verified, so its size is bounded.
"""

from __future__ import annotations

import zlib

SUFFIX = ".z"  # of the packed file's name


def pack(data: bytes) -> bytes:
    """Pack a file."""
    return zlib.compress(data, 9)


def unpack(data: bytes, limit: int) -> bytes | None:
    """Unpack a file of at most `limit` bytes; None: it is longer, or not packed, or something follows it."""
    opened = zlib.decompressobj()
    try:
        found = opened.decompress(data, limit + 1)
    except zlib.error:
        return None
    return found if opened.eof and len(found) <= limit and not opened.unused_data else None

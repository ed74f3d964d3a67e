"""Small signed files as they travel: packed with zlib and a dictionary, beside the file itself.

Signed files are mostly hex digits and repeated names, so packing makes them three to four times shorter. What is signed is the file
itself: whatever is wrong with a packed one, the reader takes the other. It is unpacked before anything is verified, so its size is bounded.
"""

from __future__ import annotations

import zlib

SUFFIX = ".z"  # of the packed file's name

DICTIONARY = (
    b'{"bps":10000,"not_before":0}]}"device_class":"","halt":false,"line":"","manifest":"","revert":false,"salt":"","schema_version":1,'
    b'"waves":["decision":"lineage":"scorecard":"data_md5":"data_rev":"minimum_agent":"0.3.0","origin":{"code":"","model":"-II-full",'
    b'"version":"precision":"bfloat16","schema_version":4,"tier":"nano","variants":["dev","fast","full","turbo"]}{"configuration":"I",'
    b'"default_variant":"full","device_class":"edge","files":[{"role":"graph","sha256":"","size":,"variant":null},{"role":"weights",'
    b'"sha256":""},{"role":"overlay","sha256":"","size":,"variant":"turbo"},{"role":"sampler","sha256":"","size":,"variant":"dev"},'
    b'{"role":"golden","sha256":"","size":,"variant":"fast"},{"role":"reference","sha256":"","size":,"variant":"full"}],"line":"'
    b'deltas.json":{"version":1},"models.json":{"version":1},"rollout.json":{"version":1},"targets.json":{"version":1}},"spec_version":'
    b'"1.0.31","version":"custom":{"full_bytes":0,"ledger":"","revertible":true,"seq":0,"version":1},"hashes":{"sha256":""},"length":1}},'
    b'"version":1}}{"signatures":[{"keyid":"","sig":""}],"signed":{"_type":"snapshot","expires":"2026-12-15T00:00:00Z","meta":{"'
    b'{"signatures":[{"keyid":"","sig":""}],"signed":{"_type":"targets","expires":"2027-05-30T00:00:00Z","spec_version":"1.0.31",'
    b'"targets":{"models/deltas/rollout/'
)
"""What these files have in common, the most frequent last. Agents unpack with it, so it never changes; a better one gets another suffix."""


def pack(data: bytes) -> bytes:
    """Pack a file: a zlib stream with the preset dictionary (RFC 1950, FDICT)."""
    packer = zlib.compressobj(9, memLevel=9, zdict=DICTIONARY)
    return packer.compress(data) + packer.flush()


def unpack(data: bytes, limit: int) -> bytes | None:
    """Unpack a file of at most `limit` bytes; None: it is longer, or no whole stream of zlib, or something follows it.

    A stream without a dictionary opens, too; one that needs another dictionary does not.
    """
    opened = zlib.decompressobj(zdict=DICTIONARY)
    try:
        found = opened.decompress(data, limit + 1)
    except zlib.error:
        return None
    return found if opened.eof and len(found) <= limit and not opened.unused_data else None

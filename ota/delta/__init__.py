"""Deltas: the difference between two bundles, lossless, small, in bounded memory.

    >>> build(pairs, base_sha256, target_sha256, Path("patch"))
    >>> with Path("patch").open("rb") as patch:
    ...     apply(patch, read_header(patch), open_base, open_output)

`format` is the container and what a device does; `numbers` what is known about numbers in files; `streams` how small numbers become
bytes. For the factory `encode` decides what to write, `lowrank` finds thin products in changes, `blocks` where bytes were moved from;
`files` does all of it for any two files.
"""

from ota.delta.encode import Built, Elements, Pair, build
from ota.delta.format import DeltaFile, Header, apply, read_header
from ota.delta.streams import keep_memory

__all__ = ["Built", "DeltaFile", "Elements", "Header", "Pair", "apply", "build", "keep_memory", "read_header"]

"""Deltas: the difference between two bundles, lossless, small, in bounded memory.

    >>> encode.build(pairs, base_sha256, target_sha256, Path("patch"))
    >>> with Path("patch").open("rb") as patch:
    ...     apply(patch, read_header(patch), open_base, open_output)

What a device needs: `format` is the container and how it is applied, `numbers` what is known about numbers in files, `streams` how small
numbers become bytes. What the factory adds: `plan` is what each record is about, `describe` how its numbers moved, `lowrank` finds thin
products in that, `plain` and `blocks` are for bytes that are no numbers, `encode` writes it all, `forecast` says how large it would be.
`files` does all of it for any two files.
"""

from ota.delta.format import DeltaFile, Header, apply, read_header
from ota.delta.streams import keep_memory

__all__ = ["DeltaFile", "Header", "apply", "keep_memory", "read_header"]

"""Lossless binary deltas between two bundles, built and applied in bounded memory.

    >>> encode.build(pairs, base_sha256, target_sha256, Path("patch"))
    >>> with Path("patch").open("rb") as patch:
    ...     apply(patch, read_header(patch), open_base, open_output)

A device needs three modules: `format` reads and applies the container, `numbers` models how numbers in files change, and
`streams` codes small numbers as bytes. The factory adds the others: `plan` decides what each record covers, `describe` how to
encode changes of numbers, `lowrank` finds low-rank products in these changes, `plain` and `blocks` handle bytes that are not
numbers, `encode` writes the delta, and `forecast` estimates its size. `files` builds, inspects and applies deltas between any two
files.
"""

from ota.delta.format import DeltaFile, Header, apply, read_header
from ota.delta.streams import keep_memory

__all__ = ["DeltaFile", "Header", "apply", "keep_memory", "read_header"]

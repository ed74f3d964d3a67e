"""Deltas: the difference between two bundles, lossless, small, in bounded memory.

    >>> build(pairs, base_sha256, target_sha256, Path("patch"))
    >>> with Path("patch").open("rb") as patch:
    ...     apply(patch, read_header(patch), open_base, open_output)

`format` is the container and what a device does; `numbers` what is known about numbers in files; `streams` how small numbers become
bytes; `encode`, for the factory, decides what to write, and `files` does it for any two files.
"""

from ota.delta.encode import Built, Elements, Pair, build
from ota.delta.format import DeltaFile, Header, apply, read_header

__all__ = ["Built", "DeltaFile", "Elements", "Header", "Pair", "apply", "build", "read_header"]

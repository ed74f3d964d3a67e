"""Lossless binary deltas between two bundles, built and applied in bounded memory.

    >>> encode.build(pairs, base_sha256, target_sha256, Path("patch"))
    >>> with Path("patch").open("rb") as patch:
    ...     apply(patch, read_header(patch), open_base, open_output)

A device needs seven modules: `header` is what a delta starts from and makes, `format` reads and applies the container, `updates`
moves whole tensors by factors, `numbers` models how numbers in files change, `streams` codes small numbers as bytes, and `vectors`
does so by size, with `sharing`. The factory adds the others: `factors` reads what a training says of its update, `plan` decides what
each record covers, `describe` how to encode changes of numbers, `lowrank` finds low-rank products in these changes, `plain` and
`blocks` handle bytes that are not numbers, `encode` writes the delta, and `forecast` estimates its size. `files` builds, inspects
and applies deltas between any two files, `picture` draws one, `commands` holds the commands for people, and `cli` is the program
`ferry-delta`.

The package needs NumPy, bsdiff4 and zstd, and of DeltaFerry only `ota.errors`, `ota.limits` and `ota.output`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ota.delta.format import apply, read_header
    from ota.delta.header import DeltaFile, Header
    from ota.delta.streams import keep_memory

__all__ = ["DeltaFile", "Header", "apply", "keep_memory", "read_header"]

_HOMES = {
    "DeltaFile": "header", "Header": "header", "apply": "format", "keep_memory": "streams", "read_header": "format",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for, because NumPy must not be loaded before `commands.use_one_thread`.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Names and limits that the signed documents and the deltas share. Reading them needs nothing but Python's own library.

The documents themselves (`ota.manifest`) need pydantic, which `ota.delta` must work without.
"""

from __future__ import annotations

from typing import Literal

KiB, MiB = 1024, 1024 * 1024
MAX_TABLE = 256 * KiB  # sampler.json, reference.json
MAX_GOLDEN = 8 * MiB
MAX_GRAPH = 8 * MiB
MAX_WEIGHTS = 4096 * MiB

Role = Literal["graph", "weights", "overlay", "sampler", "golden", "reference"]
VariantName = Literal["full", "dev", "fast", "turbo"]
SIZE_LIMITS: dict[str, int] = {
    "graph": MAX_GRAPH, "weights": MAX_WEIGHTS, "overlay": MAX_WEIGHTS, "sampler": MAX_TABLE, "golden": MAX_GOLDEN, "reference": MAX_TABLE,
}  # fmt: skip
OF_NUMBERS: tuple[Role, ...] = ("weights", "overlay")
"""Roles of files that hold a model's numbers; a delta streams them, however large they are."""


def check_file(role: Role, variant: VariantName | None, size: int) -> None:
    """Check that a file of a bundle may have this role, variant and size.

    Args:
        role: purpose of the file.
        variant: variant that it belongs to; None for the graph, which all variants share.
        size: in bytes.

    Raises:
        ValueError: the file is too large for its role, or only one of role and variant is that of the graph.
    """
    if size > SIZE_LIMITS[role]:
        raise ValueError(f"a {role} file of {size} bytes is over the limit of {SIZE_LIMITS[role]}")
    if (variant is None) != (role == "graph"):
        raise ValueError("the graph, and only the graph, belongs to no variant")

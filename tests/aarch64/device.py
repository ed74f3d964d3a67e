"""Apply deltas and compute with numbers, and write the hash of each result: `device.py FOLDER OUT`.

`python -m tests.aarch64` runs this on each kind of processor, where nothing but `deltaferry-delta` is installed, and compares what it
writes. FOLDER holds a folder for each delta, with the files `old` and `patch`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ota.delta import cli, lowrank, numbers
from ota.delta.numbers import KINDS, MAX_FACTOR, Kind
from ota.delta.updates import MAX_SHARED

RNG = np.random.default_rng(0)  # of integers only: a library draws floats by functions that differ between machines

PRODUCTS = ((1, -20, 900), (2, -1, 3), (3, -100, 9), (7, -9, 40), (16, -40, 2**19), (32, -48, MAX_FACTOR), (32, 100, 2**20))
"""Rank, exponent and largest factor."""
SIZES = (2.0**-7, 1e-3, 0.3, 3e38, 6e-6, 2e-38)
"""Of steps."""
SPREAD = ((0, 4096, 0), (0x9E3779B97F4A7C15, 4096, 12_345), (2**64 - 1, MAX_SHARED, 2**40), (7, 1, 3))
"""Seed, how many shared numbers, and the first place."""


def applied(folder: Path) -> Iterator[tuple[str, str]]:
    """Apply every delta; yield its name and the new file's hash, or what `ferry-delta apply` says."""
    for place in sorted(folder.iterdir()):
        new, said = place / "new", io.StringIO()
        new.unlink(missing_ok=True)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            failed = cli.call(["apply", str(place / "old"), str(place / "patch"), "-o", str(new)])
        yield f"delta {place.name}", said.getvalue().strip() if failed else hashlib.sha256(new.read_bytes()).hexdigest()


def computed() -> Iterator[tuple[str, str]]:
    """Compute with numbers of every kind, usual and awkward; yield what was computed, and the result's hash."""
    for kind in KINDS.values():
        every = _codes(kind, 1 << 16, RNG.integers(0, 1 << 32, 1 << 16))
        mantissas, signs = RNG.integers(0, 1 << 32, 1 << 16), RNG.integers(0, 2, 1 << 16) << 8 * kind.width - 1
        usual = _codes(kind, 1 << 16, mantissas & (1 << kind.mantissa + 3) - 1 | (kind.bias // 8 * 8) << kind.mantissa | signs)
        for what, old in (("all", every), ("usual", usual if kind.mantissa else every[::-1].copy())):
            by = _codes(kind, len(old), RNG.integers(0, 1 << 32, len(old)))
            yield f"{kind.name} {what}: distances", _hash(numbers.moved(old, by, kind), numbers.difference(by, old, kind))
            scales = [RNG.integers(-90, 90, size).astype(np.int16) for size in (256, 256)]
            yield f"{kind.name} {what}: contexts", _hash(numbers.contexts(old, kind, 9, *scales, 256))
            if kind.mantissa:
                steps = RNG.integers(-3000, 3001, len(old), np.int32)
                for size in SIZES:
                    made = numbers.stepped(old, steps, np.float32(size), kind)
                    yield f"{kind.name} {what}: steps of {size}", _hash(made)
            if kind.name == "bytes":
                continue
            for rank, exponent, most in PRODUCTS:
                left, right = (RNG.integers(-most, most + 1, shape, np.int32) for shape in ((256, rank), (rank, 256)))
                yield (
                    f"{kind.name} {what}: product of rank {rank}, exponent {exponent}",
                    _hash(numbers.predicted(old, left, right, exponent, kind)),
                )
    for seed, count, first in SPREAD:
        yield f"{count} shared numbers of seed {seed:x} from {first}", _hash(*numbers.spread(seed, count, first, 9999))
    for rows, columns, rank in ((64, 96, 3), (200, 150, 12)):
        change: Any = RNG.integers(-300, 301, (rows, rank)) @ RNG.integers(-300, 301, (rank, columns)) + RNG.integers(
            -9, 10, (rows, columns)
        )
        found = lowrank.find(change * 2.0**-30, 2.0**-27)
        if not found or found.left is None or found.right is None:
            raise RuntimeError("no product was found where there is one")
        yield f"product found in {rows} × {columns}", _hash(found.left, found.right) + f" {found.exponent}"


def _codes(kind: Kind, count: int, drawn: Any) -> numbers.Codes:
    """Return bit patterns of a kind."""
    return (drawn[:count] & (15 if kind.packed else (1 << 8 * kind.width) - 1)).astype(kind.dtype)


def _hash(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


if __name__ == "__main__":
    results = dict([*applied(Path(sys.argv[1])), *computed()])
    Path(sys.argv[2]).write_text(json.dumps({"machine": platform.machine(), "numpy": np.__version__, "results": results}))

"""Read what a training says of its own update: by which factors each tensor moved (`update.safetensors`).

Each statement is a claim. It holds for one old file only, so it is compared with the real bytes before it is used; a wrong or stale
claim makes the delta larger, never wrong. The file is in the safetensors format. Its header holds one entry of metadata, `deltaferry`:

    {"schema_version": 1, "products": {NAME: EXPONENT}, "steps": {NAME: SIZE},
     "seeded": {"seed": SEED, "size": SIZE, "tensors": {NAME: [PLACE, NUMBERS]}}}

A product has the tensors NAME.left, int32 [rows, rank], and NAME.right, int32 [rank, columns]; steps have NAME.steps, int32
[numbers], and SIZE is a float32 as `float.hex` writes it. NAME is the name of a tensor in the new file. `seeded` may be left out. Its
tensors make steps of one SIZE, and `seeded.numbers`, int32 [count], holds how many: `ota.delta.numbers.spread` says by SEED, below
2^64, which of them each number makes. PLACE is that of a tensor's first number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ota.delta import vectors
from ota.delta.numbers import KINDS, LEAST_STEP, MAX_FACTOR, Factors, KindName, Product, Shared
from ota.delta.updates import MAX_EXPONENT, MAX_PLACE, MAX_RANK, MAX_SHARED
from ota.errors import OperatorError, printable
from ota.limits import MiB
from ota.output import shown

SCHEMA_VERSION = 1
MAX_HEADER = 16 * MiB  # bytes
_REMEDY = "write it again, or build without it"


@dataclass(frozen=True)
class Claim:
    """What the file says of one tensor; the factors are read when they are asked for."""

    path: Path
    name: str
    places: tuple[int, ...]  # where its tensors begin in the file, in bytes
    count: int  # numbers that it moves
    exponent: int | None = None  # of a product
    rows: int = 0
    rank: int = 0
    columns: int = 0
    step: np.float32 | None = None  # size of its steps
    shared: int = 0  # how many shared numbers say how many steps; 0: it has steps of its own
    seed: int = 0
    first: int = 0  # place of its first number

    @property
    def values(self) -> int:
        """How many factors or steps of its own it has."""
        if self.shared:
            return 0
        return self.rank * (self.rows + self.columns) if self.step is None else self.count

    def fits(self, kind: KindName, shape: tuple[int, ...], length: int) -> bool:
        """Check whether it can hold for a tensor of this kind, shape and length in bytes."""
        numbers_there = length * 2 if KINDS[kind].packed else length // KINDS[kind].width
        if not self.count or self.count != numbers_there:
            return False
        if self.step is not None:
            return bool(KINDS[kind].mantissa and self.step >= LEAST_STEP)
        return len(shape) > 1 and (self.rows, self.columns) == (shape[0], math.prod(shape[1:])) and kind != "bytes"

    def product(self) -> Product | None:
        """Read the product, without components that are 0, the largest first; None if nothing is left.

        Raises:
            OperatorError: the file cannot be read, or the factors overflow.
        """
        sizes = self.rows * self.rank, self.rank * self.columns
        left, right = (self._read(place, size) for place, size in zip(self.places, sizes, strict=True))
        left, right = left.reshape(self.rows, self.rank), right.reshape(self.rank, self.columns)
        self._check(left, right)
        kept = [k for k in range(self.rank) if left[:, k].any() and right[k].any()]
        kept.sort(key=lambda k: -vectors.size_class(left[:, k]))
        if not kept:
            return None
        return Product(len(kept), self.exponent or 0, np.ascontiguousarray(left[:, kept]), np.ascontiguousarray(right[kept]))

    def steps(self) -> Factors:
        """Read how many steps each number makes.

        Raises:
            OperatorError: the file cannot be read, or the steps overflow.
        """
        found = self._read(self.places[0], self.count)
        self._check(found)
        return found

    def shared_numbers(self) -> Shared:
        """Read the shared numbers.

        Raises:
            OperatorError: the file cannot be read, or the numbers overflow.
        """
        found = self._read(self.places[0], self.shared)
        self._check(found)
        return Shared(self.seed, self.shared, found)

    def _check(self, *sides: Factors) -> None:
        if max(int(np.abs(side.astype(np.int64)).max(initial=0)) for side in sides) > MAX_FACTOR:
            raise OperatorError(
                f"the factors of {printable(self.name)} in {shown(self.path)} overflow: one is beyond {MAX_FACTOR}, and devices could not add "
                "their products exactly; make them smaller, or build without the file"
            )

    def _read(self, place: int, count: int) -> Factors:
        try:
            found = np.fromfile(self.path, "<i4", count, offset=place)
        except OSError as error:
            raise OperatorError(f"{shown(self.path)} cannot be read: {error.strerror}; check the disk") from error
        if len(found) != count:
            raise OperatorError(f"{shown(self.path)} became shorter while it was read; repeat when nothing writes to it")
        return found.astype(np.int32, copy=False)


def read(path: Path) -> dict[str, Claim]:
    """Read a factors file; return its claims by the names of the tensors.

    Raises:
        OperatorError: the file cannot be read, or is not such a file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("it is no safetensors file")
            header = json.loads(file.read(length))
        return _claims(path, header, 8 + length, size)
    except OSError as error:
        raise OperatorError(f"{shown(path)} cannot be read: {error.strerror}; check its name and who may read it") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        fault = str(error) if type(error) is ValueError else "its header is damaged"
        raise OperatorError(f"{shown(path)} is not a file of factors: {fault}; {_REMEDY}") from error


def _claims(path: Path, header: Any, start: int, size: int) -> dict[str, Claim]:
    told = (header.get("__metadata__") or {}).get("deltaferry")
    if told is None:
        raise ValueError("its metadata has no entry `deltaferry`")
    said = json.loads(told)
    if said["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"it has form {said['schema_version']}, but this program reads {SCHEMA_VERSION}")
    seeded = said.get("seeded") or {"tensors": {}}
    if len({*said["products"], *said["steps"], *seeded["tensors"]}) < sum(
        map(len, (said["products"], said["steps"], seeded["tensors"]))
    ):
        raise ValueError("it moves a tensor twice")
    found: dict[str, Claim] = {}
    for name, exponent in said["products"].items():
        (rows, rank), left = _place(header, f"{name}.left", start, size)
        (same, columns), right = _place(header, f"{name}.right", start, size)
        if rank != same or rank > MAX_RANK or type(exponent) is not int or abs(exponent) > MAX_EXPONENT:
            raise ValueError(f"the product of {printable(name)} is impossible")
        found[name] = Claim(path, name, (left, right), rows * columns, exponent, rows, rank, columns)
    for name, text in said["steps"].items():
        (count,), place = _place(header, f"{name}.steps", start, size)
        step = np.float32(float.fromhex(text))
        if not 0 < step < np.inf:
            raise ValueError(f"the steps of {printable(name)} are impossible")
        found[name] = Claim(path, name, (place,), count, step=step)
    return found | _seeded(path, header, seeded, start, size)


def _seeded(path: Path, header: Mapping[str, Any], said: Mapping[str, Any], start: int, size: int) -> dict[str, Claim]:
    """Return the claims of tensors that share numbers."""
    if not said["tensors"]:
        return {}
    (shared,), place = _place(header, "seeded.numbers", start, size)
    seed, step = said["seed"], np.float32(float.fromhex(said["size"]))
    if not 0 < shared <= MAX_SHARED or type(seed) is not int or not 0 <= seed < 2**64 or not 0 < step < np.inf:
        raise ValueError("its shared numbers are impossible")
    found: dict[str, Claim] = {}
    for name, (first, count) in said["tensors"].items():
        if type(first) is not int or type(count) is not int or not 0 <= first <= first + count <= MAX_PLACE:
            raise ValueError(f"the place of {printable(name)} is impossible")
        found[name] = Claim(path, name, (place,), count, step=step, shared=shared, seed=seed, first=first)
    return found


def _place(header: Mapping[str, Any], name: str, start: int, size: int) -> tuple[tuple[int, ...], int]:
    """Return the shape of a tensor of int32, and where it begins in the file."""
    row = header.get(name)
    if row is None:
        raise ValueError(f"it has no tensor {printable(name)}")
    shape, (first, stop) = tuple(row["shape"]), row["data_offsets"]
    if row["dtype"] != "I32" or any(type(n) is not int or n < 0 for n in (*shape, first, stop)):
        raise ValueError(f"the tensor {printable(name)} is not of int32")
    if stop - first != 4 * math.prod(shape) or start + stop > size:
        raise ValueError(f"the tensor {printable(name)} goes past the end of the file, or has another length than its shape")
    return shape, start + first

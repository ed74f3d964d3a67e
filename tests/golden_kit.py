"""Deltas that were published once, in tests/golden/deltas.json, and the files that they were made from.

A round trip cannot show a fault that encoder and decoder share. These deltas show whether a new agent reads the same bytes
as a fielded one. They are never made anew: if a test of them fails, the format has changed.
`python -m tests.golden_kit` adds those that are missing.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from ota import delta
from ota.delta import encode, numbers
from ota.delta import format as container
from ota.delta.encode import Elements, Pair
from ota.delta.factors import read
from ota.delta.header import BundleFile
from ota.delta.numbers import KINDS, KindName
from registry.lineage import file_sha256

DELTAS = Path(__file__).parent / "golden/deltas.json"
ROWS, COLUMNS = 48, 64
BASE, TARGET = "a" * 64, "b" * 64
NAMES = [
    *(f"{kind} each" for kind in ("float32", "float16", "bfloat16", "int8", "int4")),
    *(f"{kind} steps" for kind in ("float32", "float16", "bfloat16")),
    *(f"{kind} product" for kind in ("float32", "float16", "bfloat16", "int8", "int4")),
]  # fmt: skip


def drawn(seed: int, *shape: int) -> npt.NDArray[np.float64]:
    """Return roughly normal numbers that are the same on every machine and with every library.

    Each is the sum of twelve draws of a linear congruential generator.
    """
    state, found = seed * 7919 + 1, []
    for _ in range(int(np.prod(shape))):
        total = 0
        for _ in range(12):
            state = (1103515245 * state + 12345) % 2**31
            total += state >> 7
        found.append(total / 2**24 - 6)
    return np.array(found).reshape(shape)


def stored(values: npt.NDArray[np.float64], kind: KindName) -> bytes:
    """Return values as bytes of a number format, rounded by torch and numpy."""
    if kind == "bfloat16":
        made: bytes = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        return made
    if kind in ("float32", "float16"):
        return values.astype(kind).tobytes()
    low, high = (-8, 7) if kind == "int4" else (-128, 127)
    whole = np.clip(np.rint(values * (3 if kind == "int4" else 40)), low, high).astype(np.int8).view(np.uint8).reshape(-1)
    return (whole[0::2] & 15 | (whole[1::2] & 15) << 4).tobytes() if kind == "int4" else whole.tobytes()


def files(name: str) -> tuple[bytes, bytes]:
    """Make the old and the new file of a golden delta.

    Weights move more in some rows and columns than in others. Floating-point files hold zeros and denormals, and, unless the
    step is a product, infinities and NaNs.
    """
    kind, way = name.split()
    seed = NAMES.index(name)
    old = drawn(seed, ROWS, COLUMNS) * 0.25
    by = drawn(100 + seed, ROWS, COLUMNS)
    if way == "each":
        by *= 2.0 ** -(np.arange(ROWS)[:, None] % 5) * 2.0 ** -(np.arange(COLUMNS) % 3) * (0.02 if KINDS[kind].mantissa else 0.6)
    elif way == "steps":
        by = np.rint(by * 0.7).astype(np.float32) * np.float32(0.0078125 if kind == "float16" else 0.01171875)
    else:
        by = np.rint(drawn(200 + seed, ROWS, 1) * 40) @ np.rint(drawn(300 + seed, 1, COLUMNS) * 40) * 2.0**-13
    before = bytearray(stored(old, kind))
    width, mantissa = KINDS[kind].width, KINDS[kind].mantissa
    values = old if not mantissa else _values(bytes(before), kind)
    after = bytearray(stored(values + by, kind))
    if mantissa:
        top = 1 << (8 * width - 1)
        infinity = (top - 1) >> mantissa << mantissa
        special = [0, 1, (1 << mantissa) - 1, 1 << mantissa, top, top | 1]
        if way != "product":  # they would raise the rank of the step
            special += [infinity - 1, infinity, infinity + 1, top | infinity]
        for i, code in enumerate(special):
            at = (i * 97 + 5) * width
            before[at : at + width] = after[at : at + width] = code.to_bytes(width, "little")
    return bytes(before), bytes(after)


def _values(data: bytes, kind: str) -> npt.NDArray[np.float64]:
    if kind == "bfloat16":
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).double().numpy().reshape(ROWS, COLUMNS)
    return np.frombuffer(data, kind).astype(np.float64).reshape(ROWS, COLUMNS)


UPDATES = [f"{kind} update" for kind in ("float32", "float16", "bfloat16", "int8", "int4")]
"""Deltas of format version 2, made from factors."""


def update(name: str) -> tuple[bytes, bytes, dict[str, Any]]:
    """Make the old and the new file of a golden update, and its factors: a matrix that moves by a product, one that stays, one of steps."""
    kind = name.split(maxsplit=1)[0]
    seed, one = UPDATES.index(name), ROWS * COLUMNS * KINDS[kind].width // (2 if kind == "int4" else 1)
    before = b"".join(stored(drawn(seed + at, ROWS, COLUMNS) * 0.25, kind) for at in (400, 500, 600))
    sizes = np.array([40.0, 12.0, 3.0])
    left = np.rint(drawn(700 + seed, ROWS, 3) * sizes).astype(np.int32) * np.array([4, 1, 1], np.int32)
    right = np.rint(drawn(800 + seed, 3, COLUMNS) * sizes[:, None]).astype(np.int32)
    steps = np.rint(drawn(900 + seed, ROWS, COLUMNS) * 0.7).astype(np.int32).reshape(-1)
    parts = [numbers.codes(before[at : at + one], KINDS[kind]) for at in (0, one, 2 * one)]
    parts[0] = numbers.predicted(parts[0], left, right, -18 if KINDS[kind].mantissa else -11, KINDS[kind])
    if KINDS[kind].mantissa:
        parts[2] = numbers.stepped(parts[2], steps, np.float32(0.0078125), KINDS[kind])
    factors: dict[str, Any] = {"left": left, "right": right, "steps": steps}
    return before, b"".join(numbers.data(part, KINDS[kind]) for part in parts), factors


def make_update(name: str) -> bytes:
    """Encode a golden update as the encoder does today."""
    kind = name.split(maxsplit=1)[0]
    old, new, factors = update(name)
    floats, one = bool(KINDS[kind].mantissa), len(new) // 3
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tensors = {"a.left": factors["left"], "a.right": factors["right"]} | ({"c.steps": factors["steps"]} if floats else {})
        said = {"schema_version": 1, "products": {"a": -18 if floats else -11}, "steps": {"c": "0x1.0p-7"} if floats else {}}
        (folder / "factors").write_bytes(save(tensors, {"deltaferry": json.dumps(said)}))
        claims = read(folder / "factors")
        elements = [Elements(at * one, one, kind, COLUMNS, at * one, claims.get(tensor)) for at, tensor in enumerate("abc")]
        return _encoded(old, new, elements, folder, 2)


SEEDED = [f"{kind} seeded" for kind in ("float32", "float16", "bfloat16")]
"""Deltas of format version 2 whose tensors make steps of shared numbers."""
SEED, SHARED = 0xD1CE_0000_FFFF_0001, 300


def hashed(seed: int, place: int) -> int:
    """Hash the place of a number, by Python's own integers."""
    found = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    found = (found ^ found >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    found = (found ^ found >> 27) * 0x94D049BB133111EB % 2**64
    return found ^ found >> 31


def seeded(name: str) -> tuple[bytes, bytes, npt.NDArray[np.int32]]:
    """Make the old and the new file of a golden delta of shared numbers, and these: two tensors that move, and one between that stays."""
    kind = KINDS[name.split(maxsplit=1)[0]]
    seed, one = SEEDED.index(name), ROWS * COLUMNS * kind.width
    before = b"".join(stored(drawn(seed + at, ROWS, COLUMNS) * 0.25, kind.name) for at in (1000, 1100, 1200))
    shared = np.rint(drawn(1300 + seed, SHARED) * 5).astype(np.int32)
    parts = [numbers.codes(before[at : at + one], kind) for at in (0, one, 2 * one)]
    for at in (0, 2):
        hashes = [hashed(SEED, at * ROWS * COLUMNS + i) for i in range(ROWS * COLUMNS)]
        steps = np.array([int(shared[(h >> 32) * SHARED >> 32]) * (-1 if h & 1 else 1) for h in hashes], np.int32)
        parts[at] = numbers.stepped(parts[at], steps, np.float32(0.00390625), kind)
    return before, b"".join(numbers.data(part, kind) for part in parts), shared


def make_seeded(name: str) -> bytes:
    """Encode a golden delta of shared numbers as the encoder does today."""
    kind = name.split(maxsplit=1)[0]
    old, new, shared = seeded(name)
    one, count = len(new) // 3, ROWS * COLUMNS
    said = {"seed": SEED, "size": "0x1.0p-8", "tensors": {"a": [0, count], "c": [2 * count, count]}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        told = {"schema_version": 1, "products": {}, "steps": {}, "seeded": said}
        (folder / "factors").write_bytes(save({"seeded.numbers": shared}, {"deltaferry": json.dumps(told)}))
        claims = read(folder / "factors")
        elements = [Elements(at * one, one, kind, COLUMNS, at * one, claims.get(tensor)) for at, tensor in enumerate("abc")]
        return _encoded(old, new, elements, folder, 2)


def make(name: str) -> bytes:
    """Encode a golden delta as the encoder does today for programs before 0.3.0."""
    old, new = files(name)
    with tempfile.TemporaryDirectory() as place:
        return _encoded(old, new, [Elements(0, len(new), name.split(maxsplit=1)[0], COLUMNS, 0)], Path(place), 1)


def _encoded(old: bytes, new: bytes, elements: list[Elements], folder: Path, version: int) -> bytes:
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    entry = BundleFile(role="weights", variant="full", size=len(new), sha256=file_sha256(folder / "new"))
    encode.build([Pair(entry, folder / "new", folder / "old", elements)], BASE, TARGET, folder / "patch", version)
    return (folder / "patch").read_bytes()


def ways(patch: bytes) -> tuple[set[str], int]:
    """Return the methods (`way`) by which a delta says that numbers move, and the largest number of streams in a record."""
    stream = io.BytesIO(patch)
    header = delta.read_header(stream)
    found = list(container.records(stream, header.files[0]))
    return {segment.way for record in found for segment in record.segments}, max(record.streams for record in found)


def main() -> None:
    """Add the missing deltas to tests/golden/deltas.json."""
    there: dict[str, Any] = json.loads(DELTAS.read_bytes()) if DELTAS.is_file() else {}
    makers = dict.fromkeys(NAMES, make) | dict.fromkeys(UPDATES, make_update) | dict.fromkeys(SEEDED, make_seeded)
    for name, maker in makers.items():
        if name not in there:
            there[name] = base64.b64encode(maker(name)).decode()
    DELTAS.parent.mkdir(exist_ok=True)
    DELTAS.write_text(json.dumps(there, indent=1) + "\n")


if __name__ == "__main__":
    main()

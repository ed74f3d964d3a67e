"""What images cost on this device: `ferry-agent bench` measures it, and the choice of a variant uses it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from ota.agent.state import Home
from ota.agent.variants import LADDER, Figures
from ota.errors import StateError
from ota.manifest import VariantName

NAME = "measured.json"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest of the sorted values that at least this share of them does not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def read(home: Home, digest: str) -> dict[VariantName, Figures]:
    """Read the figures of a bundle's variants; return none if they were lost, because they can be measured again."""
    try:
        rows = json.loads(home.disk.read(NAME) or b"{}")[digest]
        return {v: Figures(_number(rows[v]["p95_ms"]), _number(rows[v]["joules"])) for v in LADDER if v in rows}
    except (ValueError, KeyError, TypeError, RecursionError, StateError):
        return {}


def energy(home: Home, digest: str, variant: VariantName | None) -> tuple[float | None, str]:
    """Return the joules of an image of a bundle's variant, and where they come from; None and an empty text if they are not known."""
    try:
        row = json.loads(home.disk.read(NAME) or b"{}")[digest][variant]
        joules, found = _number(row["joules"]), row["energy"]
        source = f"{found['source']} ({found['quality']})" if joules is not None else ""
    except (ValueError, KeyError, TypeError, RecursionError, StateError):
        return None, ""
    return joules, "".join(letter for letter in source if " " <= letter <= "~")[:80]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e9 else None


def write(home: Home, digest: str, rows: dict[VariantName, dict[str, object]]) -> None:
    """Store the figures of one bundle, and drop those of all others."""
    home.disk.replace(NAME, json.dumps({digest: rows}, indent=1).encode())

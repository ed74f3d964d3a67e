"""Whether a bundle is fit to run on a device: the rules of a trial, without I/O.

The agent applies them to what it measured on its device. The factory applies the same rules to what it drew itself, before it signs
a bundle, and so says which devices would refuse it (`ota.release.foretell`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ota.manifest import Manifest, Range, Reference, StatisticName, VariantName

STATISTIC_FLOOR = 0.02  # least width that is assumed for a reference range; pixel values span 2
MAX_SHIFT = 1.0  # farthest that an allowed statistic may lie from the running model's range: half of what pixel values span
MAX_DEAD_LOAD = 0.1  # share of its reference load; an expert with less counts as unused on this device
MEMORY_LIMIT = 1024  # MiB that trying or running a bundle may take at its peak
MEASURED: dict[StatisticName, str] = {"mean": "mean brightness", "deviation": "contrast", "edges": "edge strength"}
"""Names of the statistics of images, for people."""


@dataclass(frozen=True)
class TrialResult:
    """What a child process measured when it tried a variant of a bundle."""

    golden_share: float
    """Share of the golden outputs within the tolerance; 0 if any output is not finite."""
    finite: bool
    statistics: tuple[tuple[str, float], ...]
    """Means over the generated images: (name, value)."""
    load: tuple[tuple[float, ...], ...]
    """Mean gate mass of each expert of each block [M][E]."""
    milliseconds: float
    """Wall-clock time of one image."""
    computing: float
    """Processor time of one image in milliseconds; other load on the device hardly changes it."""
    peak_mib: float


def judge(trying: TrialResult, own: Reference, running: Reference | None, digest: str = "", base: str = "") -> list[str]:
    """List the reasons why a new bundle is not fit to run here; the list is empty if it is fit.

    Args:
        trying: what was measured on this device.
        own: the bundle's own reference. A bundle that is damaged, or that computes differently here, deviates from it.
        running: the reference of the running bundle, or None. A bundle made from garbage agrees with its own golden
            outputs, so its images are also compared with those of the bundle that it would replace.
        digest: hash of the new bundle's manifest; needed with `running`.
        base: hash of the running bundle's manifest; needed with `running`.
    """
    reasons = []
    if not trying.finite:
        reasons.append("it makes images that are not finite")
    if trying.golden_share < own.golden.share:
        reasons.append(
            f"only {100 * trying.golden_share:.1f} % of its golden outputs are right on this device, but "
            f"{100 * own.golden.share:.0f} % must be"
        )
    reasons += unlike(trying.statistics, own, "its own reference")
    if running and not _left(running, digest):
        reasons += unlike(trying.statistics, running, "the running model's", allowed_from(own, base))
    if [len(row) for row in trying.load] != [len(row) for row in own.load]:
        reasons.append("it has other experts than its own reference lists")
    idle = [
        f"expert {e} of block {b}"
        for b, (row, reference) in enumerate(zip(trying.load, own.load, strict=False))
        for e, (mass, expected) in enumerate(zip(row, reference, strict=False))
        if mass < MAX_DEAD_LOAD * expected
    ]
    if idle:
        reasons.append(f"experts that worked at the factory carry almost no load on this device: {', '.join(idle[:3])}")
    if trying.computing > own.latency_ms:
        reasons.append(f"an image takes {trying.computing:.0f} ms of computing; the budget is {own.latency_ms:.0f} ms")
    if trying.peak_mib > MEMORY_LIMIT:
        reasons.append(f"it takes {trying.peak_mib:.0f} MiB; the limit is {MEMORY_LIMIT} MiB")
    return reasons


def hurried(trying: TrialResult, own: Reference) -> str:
    """Say why a trial is inconclusive because the device was busy or asleep; return an empty string if it is conclusive."""
    if trying.milliseconds <= own.latency_ms:
        return ""
    return (
        f"an image took {trying.milliseconds:.0f} ms here, of which it computed {trying.computing:.0f} ms; the budget is {own.latency_ms:.0f} ms, "
        "so this device was busy with other things"
    )


def allowed_from(own: Reference, base: str) -> Mapping[StatisticName, Range]:
    """Return the changes that a bundle's signed reference allows on devices that run the bundle `base`, by statistic."""
    return own.allowed.statistics if own.allowed and base in own.allowed.bases else {}


def _left(running: Reference, digest: str) -> bool:
    """Check whether the running bundle is itself an allowed change from this one; then the way back is no surprise either."""
    return running.allowed is not None and digest in running.allowed.bases


def counterpart(running: Manifest, variant: VariantName) -> VariantName:
    """Choose the variant of the running bundle that a new bundle's variant is compared with: the same one, or the default."""
    return variant if variant in running.variants else running.default_variant


def is_compared(seq: int, floor: int) -> bool:
    """Check whether a running release is compared with: one below the floor, or that no trusted key names, may be a thief's."""
    return seq >= max(1, floor)


def unlike(
    statistics: Sequence[tuple[str, float]],
    reference: Reference,
    whose: str,
    allowed: Mapping[StatisticName, Range] | None = None,
) -> list[str]:
    """List the image statistics that lie outside a reference's range by more than the width of that range.

    The width allows for the changes that retraining is meant to make (new lighting moves the mean). Garbage moves several
    statistics by many widths. A change that is `allowed` passes inside its own, narrow range, and up to `MAX_SHIFT` away.
    """
    found = dict(statistics)
    return [
        f"the images' {MEASURED[name]} is {found[name]:.2f}; {whose} range is {expected.low:.2f} to {expected.high:.2f}"
        for name, expected in outside(statistics, reference, allowed).items()
    ]


def outside(
    statistics: Sequence[tuple[str, float]], reference: Reference, allowed: Mapping[StatisticName, Range] | None = None
) -> dict[StatisticName, Range]:
    """Return the reference's range of each statistic for which `unlike` gives a reason."""
    found: dict[StatisticName, Range] = {}
    for name, expected in reference.statistics.items():
        value = dict(statistics).get(name)
        if value is None:
            continue
        width = max(expected.high - expected.low, STATISTIC_FLOOR)
        fits = expected.low - width <= value <= expected.high + width
        if not fits and not _is_allowed(value, expected, (allowed or {}).get(name)):
            found[name] = expected
    return found


def _is_allowed(value: float, expected: Range, meant: Range | None) -> bool:
    near = expected.low - MAX_SHIFT <= value <= expected.high + MAX_SHIFT
    return meant is not None and near and bool(meant.low <= value <= meant.high)

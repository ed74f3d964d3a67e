"""Foretell which devices would refuse a bundle, before it is signed, and allow a change that is wanted.

The rules are the agent's own (`ota.fitness`). The factory draws the golden images with the new bundle, and compares them with the
reference of each bundle that devices run, as a trial does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ota import fitness
from ota.errors import ForetoldError, OperatorError
from ota.fitness import MAX_SHIFT, MEASURED, TrialResult
from ota.manifest import (
    MAX_ALLOWED,
    MAX_BASES,
    MAX_TABLE,
    MAX_TOLD,
    Allowed,
    Manifest,
    Range,
    Reference,
    StatisticName,
    VariantName,
    parse,
)
from ota.release.bundle import Bundle
from ota.release.fielded import Fielded
from ota.release.repository import Release, Repository

SHOWN = 5  # devices that a message names; the others are counted
OLDER = "devices with an older ferry-agent keep the bundle that they run until their agent is updated"


@dataclass(frozen=True)
class Refusal:
    """Devices that run one release would refuse a variant of a new bundle."""

    release: int
    base: str
    """Hash of the manifest of the release that they run."""
    devices: tuple[str, ...]
    """Ids of those that reported so; others may run it, too."""
    variant: VariantName
    reasons: tuple[str, ...]
    moved: tuple[StatisticName, ...] = ()
    """Statistics that the reasons are about; others cannot be allowed."""

    @property
    def text(self) -> str:
        """The refusal as a clause for people."""
        return f"{whose(self.release, self.devices)} would refuse {self.variant}: {'; '.join(self.reasons)}"


def whose(release: int, devices: Sequence[str]) -> str:
    """Name the devices that run a release, as far as they reported."""
    named = ", ".join(devices[:SHOWN]) + (f" and {len(devices) - SHOWN} more" if len(devices) > SHOWN else "")
    return f"devices that run release {release} ({named or 'none has reported'})"


def running(place: Fielded, line: str, device_class: str, opened: Collection[int]) -> dict[int, tuple[Release, tuple[str, ...]]]:
    """Find the releases that devices run or may run: those that they reported, and those that a policy opened.

    Args:
        place: the signed repository and the fleet.
        line: of the releases.
        device_class: of the releases.
        opened: numbers of the releases that policies opened to devices, which need not have reported.

    Returns:
        each release with the ids of the devices that reported it, by its number.
    """
    reports = [report for report in place.fleet.devices().values() if report]
    of_class = [report for report in reports if (report.line, report.device_class) == (line, device_class)]
    found = {}
    for release in place.repository.releases(line, device_class):
        devices = tuple(report.device for report in of_class if report.active == release.manifest)
        if devices or release.seq in opened:
            found[release.seq] = (release, devices)
    return found


def refusals(
    repository: Repository, target: Bundle, trials: Mapping[VariantName, TrialResult],
    bases: Mapping[int, tuple[Release, Sequence[str]]],
) -> list[Refusal]:  # fmt: skip
    """List which devices would refuse a bundle, and why; the list is empty if all would take it.

    Args:
        repository: the signed repository.
        target: the new bundle.
        trials: what was measured here with each of its variants.
        bases: what devices run, from `running`.
    """
    found = []
    for release, devices in bases.values():
        if release.manifest == target.manifest.digest or not fitness.is_compared(release.seq, release.floor):
            continue
        manifest = repository.manifest(release)
        for variant, trial in trials.items():
            own, theirs = reference_of(target, variant), _reference(repository, manifest, fitness.counterpart(manifest, variant))
            reasons = fitness.judge(trial, own, theirs, target.manifest.digest, release.manifest)
            if reasons:
                moved = fitness.outside(trial.statistics, theirs, fitness.allowed_from(own, release.manifest))
                found.append(Refusal(release.seq, release.manifest, tuple(devices), variant, tuple(reasons), tuple(moved)))
    return found


def reference_of(bundle: Bundle, variant: VariantName) -> Reference:
    """Read the reference of a variant of a bundle.

    Raises:
        OperatorError: the file cannot be read.
        ManifestError: it is not valid.
    """
    try:
        return parse(Reference, bundle.path("reference", variant).read_bytes(), MAX_TABLE)
    except OSError as error:
        raise OperatorError(f"{bundle.path('reference', variant)} cannot be read; build the bundle again") from error


def _reference(repository: Repository, manifest: Manifest, variant: VariantName) -> Reference:
    return reference_of(Bundle(repository.objects, manifest), variant)


def refused(found: Sequence[Refusal], target: str) -> ForetoldError:
    """Make the error that says who would refuse a bundle, why, and what to do."""
    return ForetoldError(
        f"{'; '.join(refusal.text for refusal in found)}; nothing was signed; if this change is wanted, allow it with "
        f"`ferry release {target} --allow-change --reason ...`; otherwise promote another version"
    )


def allow(
    found: Sequence[Refusal], trials: Mapping[VariantName, TrialResult], reason: str, before: Mapping[VariantName, Allowed]
) -> dict[VariantName, Allowed]:
    """Allow the changes for which devices would refuse a bundle, each as narrow as possible.

    Args:
        found: what would be refused.
        trials: what was measured here with each variant.
        reason: why the change is wanted.
        before: changes that a release of these models allowed before; they stay allowed.

    Raises:
        OperatorError: there are too many bundles from which the change would be allowed.
    """
    made = dict(before)
    for variant in dict.fromkeys(refusal.variant for refusal in found if refusal.moved):
        mine, known = [r for r in found if r.variant == variant], before.get(variant)
        bases = [*(known.bases if known else ()), *(r.base for r in mine)]
        if len(set(bases)) > MAX_BASES:
            raise OperatorError(
                f"devices run {len(set(bases))} bundles from which this would be a change, but one release allows it from {MAX_BASES}; "
                "bring the devices to one release first"
            )
        values = dict(trials[variant].statistics)
        ranges = {name: _around(values[name]) for refusal in mine for name in refusal.moved}
        made[variant] = Allowed(
            bases=[*dict.fromkeys(bases)], statistics=(known.statistics if known else {}) | ranges, reason=reason[:MAX_TOLD]
        )
    return made


def _around(value: float) -> Range:
    """Return the range of values that is allowed around one that was measured here; devices compute almost the same."""
    return Range(low=round(value - 0.4 * MAX_ALLOWED, 4), high=round(value + 0.4 * MAX_ALLOWED, 4))


def too_far(found: Sequence[Refusal]) -> ForetoldError:
    """Make the error for a bundle that devices would refuse although the change was allowed."""
    return ForetoldError(
        f"an allowed change does not help: {'; '.join(refusal.text for refusal in found)}; a statistic may move by {MAX_SHIFT:g} at "
        "most, where pixel values span 2, and all other rules of the trial stay; nothing was signed; promote another version, or make it a "
        "line of its own"
    )


def allowed_before(repository: Repository, target: Bundle) -> dict[VariantName, Allowed]:
    """Find the changes that the newest release of the same models allows; none, if there is no such release.

    Args:
        repository: the signed repository.
        target: a bundle of these models that allows nothing.
    """
    for release in reversed(repository.releases(target.manifest.line, target.manifest.device_class)):
        manifest = repository.manifest(release)
        if _models(manifest) == _models(target.manifest):
            return allowed_by(repository, manifest)
    return {}


def _models(manifest: Manifest) -> dict[str, object]:
    """Return all of a manifest that an allowed change leaves as it is."""
    files = [entry.model_dump() for entry in manifest.files if entry.role != "reference"]
    return manifest.model_dump(exclude={"files", "schema_version"}) | {"files": files}


def allowed_by(repository: Repository, manifest: Manifest) -> dict[VariantName, Allowed]:
    """Return the changes that a published bundle allows, by variant."""
    if manifest.schema_version == 1:  # saves reading its references
        return {}
    found = {variant: _reference(repository, manifest, variant).allowed for variant in manifest.variants}
    return {variant: change for variant, change in found.items() if change}


def described(repository: Repository, line: str, device_class: str, allowed: Mapping[VariantName, Allowed]) -> list[str]:
    """Describe the changes that a release allows, for people: one line for each variant, and one about older agents."""
    numbers = {release.manifest: release.seq for release in repository.releases(line, device_class)}
    lines = []
    for variant, change in allowed.items():
        bases = ", ".join(str(numbers.get(base, base[:12])) for base in change.bases)
        ranges = ", ".join(f"{MEASURED[name]} {found.low:.2f} to {found.high:.2f}" for name, found in change.statistics.items())
        lines.append(f"{variant} may differ from release {bases}: {ranges}; reason: {change.reason}")
    return [*lines, OLDER] if lines else []

"""Which release of a line and class is rolled out, which ones devices run, and what an operator does next.

Everything is read from the signed repository and from the fleet's reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Protocol

from ota.errors import OperatorError
from ota.limits import OF_NUMBERS
from ota.manifest import FileEntry, VariantName
from ota.policy import Policy, Policy2
from ota.release import rollout
from ota.release.repository import Release, Repository
from ota.report import DeviceReport

if TYPE_CHECKING:
    from ota.fleet.store import Fleet


class Fielded(Protocol):
    """The signed repository and the devices that fetch from it."""

    @property
    def repository(self) -> Repository:
        """The signed repository."""

    @property
    def fleet(self) -> Fleet:
        """Devices and their reports."""


def rolled_out(repository: Repository, line: str, device_class: str, doing: str) -> Policy | Policy2:
    """Return the policy that names what is rolled out: policy 2 where there is one.

    Args:
        repository: the signed repository.
        line: of the policy.
        device_class: of the policy.
        doing: what the caller wants to do with it, for the message.

    Raises:
        OperatorError: nothing is rolled out.
    """
    policy = repository.rolled_out(line, device_class)
    if policy is None:
        raise OperatorError(
            f"nothing of {line}/{device_class} is rolled out, so there is nothing to {doing}; `ferry rollout start {line}/{device_class}` rolls a release out"
        )
    return policy


def summary(repository: Repository, line: str, device_class: str) -> str:
    """Describe the state of the rollout of a line and class in one line for people."""
    return rollout.summary(repository.policy2(line, device_class), repository.policy(line, device_class))


def is_opened_to_all(watched: Policy2 | None, waves: Policy | None) -> bool:
    """Tell whether a release opens to devices that are not watched, too, now or by its waves."""
    return watched is None or (waves is not None and waves.manifest == watched.manifest and waves.waves[-1].bps == rollout.FULL)


def newest_fielded(place: Fielded, line: str, device_class: str) -> int:
    """Find the highest number of a release that is rolled out now, or that a device of the class reported as running; 0: none."""
    policies = (place.repository.policy(line, device_class), place.repository.policy2(line, device_class))
    reports = [report for report in place.fleet.devices().values() if report and report.device_class == device_class]
    running = {report.active for report in reports if report.line == line}
    numbers = [r.seq for r in place.repository.releases(line, device_class) if r.manifest in running]
    return max([0, *(policy.seq for policy in policies if policy), *numbers])


def check_not_older(place: Fielded, release: Release, revert: bool) -> None:
    """Refuse to roll out a release that is older than what devices run, unless that is on purpose.

    Raises:
        OperatorError: it is older than what was rolled out or runs, and `revert` does not say so.
    """
    newest = newest_fielded(place, release.line, release.device_class)
    if release.floor <= release.seq < newest and not revert:  # below the floor `set_policy` refuses even a revert
        raise OperatorError(
            f"release {release.seq} is older than {newest}, which was rolled out or runs on devices: each of them would "
            f"refuse it; to go back on purpose, run `ferry rollout start {release.line}/{release.device_class} --release "
            f"{release.seq} --revert`"
        )


def chosen(
    repository: Repository, line: str, device_class: str, number: int, of_the_champions: Callable[[], Release | None]
) -> Release:
    """Return the release with a number.

    Args:
        repository: the signed repository.
        line: of the release.
        device_class: of the release.
        number: of the release; 0: the one that holds the present champions.
        of_the_champions: finds the release that holds the present champions; None: there is none.

    Raises:
        OperatorError: there is no such release.
    """
    target, releases = f"{line}/{device_class}", repository.releases(line, device_class)
    if not releases:
        raise OperatorError(f"{target} has no release; publish one with `ferry release {target}`")
    numbers = ", ".join(str(release.seq) for release in releases)
    if not number:
        found = of_the_champions()
        if found is None:
            raise OperatorError(
                f"no release of {target} holds its present champions; publish one with `ferry release {target}`, or name one with "
                f"--release ({numbers})"
            )
        return found
    named = [release for release in releases if release.seq == number]
    if not named:
        raise OperatorError(f"{target} has no release {number}; it has {numbers}")
    return named[0]


def release_with(
    repository: Repository, line: str, device_class: str, configuration: str, weights: Mapping[VariantName, str]
) -> Release | None:
    """Find the newest release that holds exactly these weights; None: there is none.

    Args:
        repository: the signed repository.
        line: of the release.
        device_class: of the release.
        configuration: of the release.
        weights: sha256 of the weights of each variant.
    """
    for release in reversed(repository.releases(line, device_class)):
        manifest = repository.manifest(release)
        held = {variant: manifest.weights_sha256(variant) for variant in manifest.variants}
        if manifest.configuration == configuration and held == weights:
            return release
    return None


def files_beside(
    repository: Repository, line: str, device_class: str, variant: VariantName, weights: str
) -> list[tuple[Release, FileEntry]]:
    """List, of all releases that hold these weights of a variant, the other files that the variant uses.

    Args:
        repository: the signed repository.
        line: of the releases.
        device_class: of the releases.
        variant: whose files are listed.
        weights: sha256 of its weights.
    """
    found: list[tuple[Release, FileEntry]] = []
    for release in repository.releases(line, device_class):
        manifest = repository.manifest(release)
        if variant in manifest.variants and manifest.weights_sha256(variant) == weights:
            found += [(release, f) for f in manifest.files if f.variant in (None, variant) and f.role not in OF_NUMBERS]
    return found


def next_step(place: Fielded, line: str, device_class: str, number: int) -> str:
    """Say what a published release means for devices, and which command comes next."""
    target, policy = f"{line}/{device_class}", place.repository.rolled_out(line, device_class)
    if policy and policy.seq == number:
        return summary(place.repository, line, device_class)
    if number < newest_fielded(place, line, device_class):
        return f"to make all devices go back to it at once, run `ferry rollout start {target} --release {number} --revert`"
    return f"no device installs it yet; run `ferry rollout start {target}`"


def meant_to_run(place: Fielded, line: str, device_class: str) -> Release | None:
    """Find the release that devices of a class are meant to run; None: there is none.

    This is the release that the policy names, unless it was halted; otherwise the newest one that a device runs; otherwise the
    newest one.
    """
    releases = place.repository.releases(line, device_class)
    policy = place.repository.rolled_out(line, device_class)
    wanted = [r for r in releases if policy and not policy.halt and r.manifest == policy.manifest]
    running = {report.active for report in place.fleet.devices().values() if report}
    fielded = [r for r in releases if r.manifest in running]
    return next(reversed(wanted or fielded or releases), None)


def running(place: Fielded, classes: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, DeviceReport | None]]:
    """Yield each enrolled device, what it runs in words, and its last report; None: it has not reported.

    Args:
        place: the repository and the fleet.
        classes: line and device class of all releases that a device may run.
    """
    releases = [release for line, name in classes for release in place.repository.releases(line, name)]
    names = {release.manifest: f"{release.line} release {release.seq}" for release in releases}
    for device, last in place.fleet.devices().items():
        yield device, names.get(last.active, "an unknown bundle") if last and last.active else "nothing", last


def median_time(place: Fielded, line: str, classes: Iterable[str]) -> tuple[float, int] | None:
    """Return the median milliseconds of an image on devices, and the number of devices; None: no report has a time.

    Reports on the release that the devices of a class are meant to run count, the last one of each device.

    Args:
        place: the repository and the fleet.
        line: of the releases.
        classes: whose devices count.
    """
    told: dict[str, int] = {}
    for device_class in classes:
        if release := meant_to_run(place, line, device_class):
            told |= place.fleet.timed(release.manifest)
    return (median(told.values()), len(told)) if told else None

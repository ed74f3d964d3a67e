"""Change what is rolled out: sign it, write it into the ledger and publish it, all under one lock.

Prefect is not needed for that and takes seconds to load, so nothing here imports it: a halt is an emergency stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flows import progress
from flows.workspace import Workspace
from ota.errors import OperatorError, OtaError
from ota.manifest import Policy
from ota.release import rollout, store
from ota.release.repository import Release
from registry.errors import RegistryError
from registry.promotion import standing


@dataclass(frozen=True)
class Halted:
    """Hold a rollout that was stopped."""

    policy: Policy
    unrecorded: RegistryError | OtaError | None
    """Why the ledger does not say so; a damaged record must not keep a bad release going."""


def publish(workspace: Workspace) -> int:
    """Copy what is new in the repository to where devices fetch it; returns the number of files.

    Raises:
        TransferError, OperatorError: it cannot be written there.
        BusyError: another ferry holds the records.
    """
    with workspace.locked("records"):
        return _copy(workspace)


def _copy(workspace: Workspace) -> int:
    stores, files = workspace.settings.stores, list(workspace.repository.files())
    copied: list[str] = []

    def show(name: str) -> None:
        copied.append(name)
        progress.advance("publish", len(copied), len(files))

    count = store.publish(files, stores.publish, workspace.root, stores.s3_endpoint or None, show)
    if copied:
        progress.advance("publish", len(files), len(files))  # the others were there
    return count


def _change(
    workspace: Workspace, target: str, kind: Literal["rollout", "halt"], why: str, sign: Callable[[], dict[str, Any]],
    recorded: bool = True,
) -> RegistryError | OtaError | None:  # fmt: skip
    """Sign a change, write it into the ledger and publish it, all under one lock.

    Args:
        workspace: whose.
        target: LINE/CLASS, the ledger's subject.
        kind: of entry.
        why: in words.
        sign: signs, and returns what the ledger is to keep of it.
        recorded: whether nothing may be signed that the ledger cannot take.

    Returns:
        Why it was not recorded, where that does not matter so much.
    """
    problem: RegistryError | OtaError | None = None
    with workspace.locked("records"):
        if recorded:
            workspace.ledger.check_ready()
        facts = sign()
        try:
            workspace.ledger.append(kind, target, why, facts)
        except (RegistryError, OtaError) as error:
            if recorded:
                raise
            problem = error
        _copy(workspace)
    return problem


def start(
    workspace: Workspace, line: str, device_class: str, shares: Sequence[float], soak: int, number: int = 0, revert: bool = False,
    why: str = "",
) -> Policy:  # fmt: skip
    """Open a release to the fleet, wave by wave.

    Args:
        workspace: whose.
        line: of the release.
        device_class: of the release.
        shares: of the fleet in percent, rising.
        soak: seconds between two waves.
        number: of the release; 0: the one that holds the present champions.
        revert: it is older than what devices run, on purpose.
        why: for the ledger.

    Raises:
        OperatorError: there is no such release, or it is older than what was rolled out and `revert` does not say so.
        LedgerError: the ledger cannot take it; nothing was signed.
    """
    rollout.check_shares(shares)
    release = _chosen(workspace, line, device_class, number)
    policy = rollout.start(release, shares, soak, revert=revert)

    def sign() -> dict[str, Any]:
        newest = newest_fielded(workspace, line, device_class)
        if release.floor <= release.seq < newest and not revert:  # below the floor nothing can be gone back to either
            raise OperatorError(
                f"release {release.seq} is older than {newest}, which was rolled out or runs on devices: each of them would refuse it; to go back on "
                f"purpose, `ferry rollout start {line}/{device_class} --release {release.seq} --revert`"
            )
        workspace.repository.set_policy(policy)
        return {"release": release.seq, "soak": soak}

    _change(workspace, f"{line}/{device_class}", "rollout", why or f"waves {','.join(f'{share:g}' for share in shares)} %", sign)
    return policy


def _chosen(workspace: Workspace, line: str, device_class: str, number: int) -> Release:
    target, releases = f"{line}/{device_class}", workspace.repository.releases(line, device_class)
    if not releases:
        raise OperatorError(f"{target} has no release; publish one with `ferry release {target}`")
    if not number:
        found = of_the_champions(workspace, line, device_class)
        if found is None:
            raise OperatorError(
                f"no release of {target} holds its present champions; publish one with `ferry release {target}`, or name one with "
                f"--release ({', '.join(str(r.seq) for r in releases)})"
            )
        return found
    named = [release for release in releases if release.seq == number]
    if not named:
        raise OperatorError(f"{target} has no release {number}; it has {', '.join(str(r.seq) for r in releases)}")
    return named[0]


def of_the_champions(workspace: Workspace, line: str, device_class: str) -> Release | None:
    """Find the newest release that holds the weights of exactly the champions that the ledger names; None: there is none."""
    settings = workspace.device_class(line, device_class)
    wanted = {
        variant: standing(workspace.ledger.entries(f"{line}/{settings.configuration}/{variant}")).weights
        for variant in settings.variants
    }
    for release in reversed(workspace.repository.releases(line, device_class)):
        manifest = workspace.repository.manifest(release)
        held = {variant: manifest.entry("weights", variant).sha256 for variant in manifest.variants}
        if manifest.configuration == settings.configuration and held == wanted:
            return release
    return None


def newest_fielded(workspace: Workspace, line: str, device_class: str) -> int:
    """Find the highest number of a release that is rolled out now, or that a device of the class reported as running; 0: none."""
    policy = workspace.repository.policy(line, device_class)
    reports = [report for report in workspace.fleet.devices().values() if report and report.device_class == device_class]
    running = {report.active for report in reports if report.line == line}
    numbers = [r.seq for r in workspace.repository.releases(line, device_class) if r.manifest in running]
    return max([policy.seq if policy else 0, *numbers])


def halt(workspace: Workspace, line: str, device_class: str, reason: str) -> Halted:
    """Let no further device install the release that is rolled out; it goes out also where it cannot be recorded.

    Raises:
        OperatorError: nothing is rolled out.
    """
    made: list[Policy] = []

    def sign() -> dict[str, Any]:
        made.append(rollout.halt(_rolled_out(workspace, line, device_class, "halt")))
        workspace.repository.set_policy(made[0])
        return {"release": made[0].seq}

    unrecorded = _change(workspace, f"{line}/{device_class}", "halt", reason, sign, recorded=False)
    return Halted(made[0], unrecorded)


def renew(workspace: Workspace, line: str, device_class: str) -> tuple[Policy, str]:
    """Sign the present policy anew, unchanged; returns it, and when its signature ends.

    Raises:
        OperatorError: nothing is rolled out.
        LedgerError: the ledger cannot take it; nothing was signed.
    """
    made: list[tuple[Policy, str]] = []

    def sign() -> dict[str, Any]:
        policy = _rolled_out(workspace, line, device_class, "renew")
        workspace.repository.set_policy(policy)
        made.append((policy, workspace.repository.expiries()["rollout"].isoformat()))
        return {"release": policy.seq, "until": made[0][1]}

    _change(workspace, f"{line}/{device_class}", "rollout", "signed anew, waves unchanged", sign)
    return made[0]


def floor(workspace: Workspace, line: str, device_class: str, number: int) -> None:
    """Let no device install a release with a lower number any more.

    Raises:
        OperatorError: there is no such release, or an older one is rolled out.
        LedgerError: the ledger cannot take it; nothing was signed.
    """

    def sign() -> dict[str, Any]:
        workspace.repository.set_floor(line, device_class, number)
        return {"floor": number}

    _change(workspace, f"{line}/{device_class}", "rollout", f"floor {number}", sign)


def _rolled_out(workspace: Workspace, line: str, device_class: str, doing: str) -> Policy:
    policy = workspace.repository.policy(line, device_class)
    if policy is None:
        raise OperatorError(f"nothing of {line}/{device_class} is rolled out, so there is nothing to {doing}")
    return policy


def next_step(workspace: Workspace, line: str, device_class: str, number: int) -> str:
    """Say what a release that is published means for devices, and which command comes next."""
    target, policy = f"{line}/{device_class}", workspace.repository.policy(line, device_class)
    if policy and policy.seq == number:
        return rollout.describe(policy)
    if number < newest_fielded(workspace, line, device_class):
        return f"devices go back to it with `ferry rollout start {target} --release {number} --revert`"
    return f"no device installs it yet: `ferry rollout start {target}`"


def after_promotion(workspace: Workspace, line: str, configuration: str, variant: str) -> str:
    """Say, for each device class that runs a variant, how its present champion gets to devices."""
    steps = []
    for name, settings in workspace.line(line).classes.items():
        if settings.configuration == configuration and variant in settings.variants:
            release = of_the_champions(workspace, line, name)
            steps.append(
                next_step(workspace, line, name, release.seq) if release else f"publish it with `ferry release {line}/{name}`"
            )
    return "; ".join(dict.fromkeys(steps)) or f"no device class of {line} runs it"

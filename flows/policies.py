"""Change what is rolled out: sign it, write it into the ledger and publish it, all under one lock.

A halt is an emergency stop. Prefect is not needed for it and takes seconds to load, so nothing here imports Prefect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.clone import is_clone
from flows.errors import BusyError
from flows.workspace import Workspace
from model.config import VariantName
from ota.errors import OperatorError, OtaError, TransferError
from ota.policy import BUCKETS, Policy, Policy2
from ota.release import compatibility, copies, fielded, rollout, store
from ota.release.repository import Release
from ota.release.rollout import Terms
from registry.errors import LedgerError, RegistryError
from registry.ledger import START
from registry.promotion import of_one_full, subject_state

if TYPE_CHECKING:
    from ota.manifest import FileEntry
    from ota.release.published import Published
    from registry.catalog import Subject
    from registry.sealing import Released

HALT_SECONDS = 5.0  # that a published halt waits to be recorded


@dataclass(frozen=True)
class Halted:
    """A rollout that was halted."""

    policies: InForce
    unrecorded: RegistryError | OtaError | BusyError | None
    """Why the halt is not in the ledger; None: it is. A damaged record must not keep a bad release going."""


def publish(workspace: Workspace, whatever_is_there: bool = False) -> int:
    """Copy new files of the repository to where devices fetch them, and return their number.

    Args:
        workspace: workspace of the repository.
        whatever_is_there: also over a state that this repository does not know; after a theft of keys, it may be the thief's.

    Raises:
        TransferError, OperatorError: it cannot be written there.
        BusyError: another ferry holds the records.
    """
    with workspace.locked("records"):
        return _copy(workspace, whatever_is_there=whatever_is_there)


def _copy(workspace: Workspace, urgent: bool = False, whatever_is_there: bool = False) -> int:
    """Copy objects and targets first, which may take long; then, while nobody signs, the metadata that lead to them.

    Args:
        workspace: workspace of the repository.
        urgent: copy only what a policy needs. The files of a release that another process is uploading now may take minutes, and
            no policy names them yet.
        whatever_is_there: as in `publish`.
    """
    stores, repository = workspace.settings.stores, workspace.repository
    copied: list[str] = []
    total = 0

    def put(files: list[tuple[str, Path]]) -> int:
        nonlocal total
        total += len(files)
        return store.publish(files, stores.publish, workspace.root, stores.s3_endpoint or None, show)

    def show(name: str) -> None:
        copied.append(name)
        progress.advance("publish", len(copied), total)

    if not whatever_is_there:
        check_published(workspace)
    large = [] if urgent else [file for file in repository.files() if not file[0].startswith("metadata/")]
    count = put(large) if large else 0  # `put` lists a bucket even if there is no file
    with repository.held():
        if large and not whatever_is_there:  # it may have taken minutes
            check_published(workspace)
        there = {name for name, _ in large}
        urgently = ("metadata/", "targets/rollout/") if urgent else ""
        count += put([file for file in repository.files() if file[0] not in there and file[0].startswith(urgently)])
    if copied:
        progress.advance("publish", total, total)  # the other files were there before
    return count


def check_published(workspace: Workspace) -> None:
    """Refuse to go on if what is published is no state of this workspace's repository.

    Raises:
        OperatorError: another copy of the workspace, or another workspace, published it.
        TransferError: it cannot be read.
    """
    stores = workspace.settings.stores
    copies.check(workspace.repository, stores.publish, workspace.root, stores.s3_endpoint or None)


def check_newest(workspace: Workspace) -> None:
    """Check `check_published` before anything is signed; a place that cannot be reached now is left to the publication.

    Raises:
        OperatorError: another copy of the workspace, or another workspace, published there.
    """
    with suppress(TransferError):
        check_published(workspace)


def _change(workspace: Workspace, target: str, why: str, sign: Callable[[], dict[str, Any]]) -> None:
    """Sign a change, write it into the ledger and publish it, all under one lock; nothing is signed that the ledger cannot take.

    Args:
        workspace: workspace of the repository and the ledger.
        target: LINE/CLASS, the ledger's subject.
        why: reason, for the ledger.
        sign: signs the change, and returns the facts for the ledger.
    """
    with workspace.locked("records"):
        workspace.ledger.check_ready()
        check_newest(workspace)
        with workspace.repository.held():
            facts = sign()
        workspace.ledger.append("rollout", target, why, facts)
        _copy(workspace)


@dataclass(frozen=True)
class InForce:
    """The policies of a line and class."""

    watched: Policy2 | None
    """Policy 2; None: no rollout was started since ferry knows it."""
    waves: Policy | None
    """Policy 1, for devices that are not watched; None: nothing was opened to them."""

    @classmethod
    def of(cls, workspace: Workspace, line: str, device_class: str) -> InForce:
        """Read them."""
        return cls(workspace.repository.policy2(line, device_class), workspace.repository.policy(line, device_class))

    @property
    def named(self) -> Policy | Policy2 | None:
        """The one that names what is rolled out."""
        return self.watched or self.waves

    @property
    def both(self) -> list[Policy | Policy2]:
        """Those that there are."""
        return [policy for policy in (self.watched, self.waves) if policy]

    @property
    def text(self) -> str:
        """The state of the rollout in one line for people."""
        return rollout.summary(self.watched, self.waves)

    @property
    def facts(self) -> dict[str, Any]:
        """What names the rollout, as JSON, and policy 1 as `unwatched`."""
        named = self.named.model_dump() if self.named else {}
        return named | {"unwatched": self.waves.model_dump() if self.waves else None}


@dataclass(frozen=True)
class Shares:
    """How far a rollout opens: shares of the fleet in percent, rising."""

    watched: Sequence[float]
    unwatched: Sequence[float] = ()
    """For devices that are not watched, in timed waves; empty: they stay where they are."""
    soak: int = 0
    """Seconds between two of these waves."""


def start(
    workspace: Workspace, line: str, device_class: str, shares: Shares, number: int = 0, revert: bool = False, why: str = "",
    terms: Terms = Terms(),  # noqa: B008 - frozen
) -> InForce:  # fmt: skip
    """Open a release to the first share of the watched devices, and to the others if it is open to all of these.

    A revert opens to all at once, watched or not: the present release does harm, and the release to return to has run on devices before.
    Where the terms keep devices out, it opens to watched ones alone unless `unwatched` says otherwise: policy 1 knows no such terms.

    Args:
        workspace: workspace of the release.
        line: of the release.
        device_class: of the release.
        shares: how far it opens.
        number: of the release; 0: the one that holds the present champions.
        revert: the release is older than what devices run, on purpose.
        why: reason, for the ledger.
        terms: what else holds for watched devices.

    Raises:
        OperatorError: there is no such release, it is older than what was rolled out and `revert` does not say so, it would open to
            devices that are not watched before it is open to all that are, or policy 1 cannot keep out a device that `never` names.
        LedgerError: the ledger cannot take it; nothing was signed.
    """
    rollout.check_shares(shares.watched)
    bounded = bool(terms.only or terms.never or terms.not_before or terms.until)
    unwatched = shares.unwatched or (shares.watched if revert and not bounded else ())
    repository, made = workspace.repository, list[InForce]()
    champions = partial(of_the_champions, workspace, line, device_class)
    release = fielded.chosen(repository, line, device_class, number, champions)
    waves = rollout.start(release, unwatched, shares.soak, revert=revert) if unwatched else None

    def sign() -> dict[str, Any]:
        fielded.check_not_older(workspace, release, revert)
        before = InForce.of(workspace, line, device_class)
        fallback = None if revert else rollout.last_open(release, before.named, repository.releases(line, device_class))
        policy = rollout.watched(release, shares.watched, before.watched, fallback, terms, revert)
        if waves:
            _check_kept_out(workspace, policy)
            if not revert:
                _check_open(policy)
        made.append(InForce(policy, waves or before.waves))
        repository.set_policy(policy, *([waves] if waves else []))
        return {"release": release.seq, "policy": policy.policy, "soak": shares.soak}

    told = f"waves {','.join(f'{share:g}' for share in shares.watched)} % of the fleet"
    told += f", {','.join(f'{share:g}' for share in unwatched)} % of the devices that are not watched" if unwatched else ""
    _change(workspace, f"{line}/{device_class}", why or told, sign)
    return made[0]


def _check_open(policy: Policy2) -> None:
    """Refuse to open a release to devices that nobody hears before all others have it.

    Raises:
        OperatorError: it is not open to all watched devices at this moment, or is halted.
    """
    if policy.halt:
        raise OperatorError(f"release {policy.seq} is halted, so it is not opened to devices that are not watched either")
    if policy.limit < BUCKETS:
        raise OperatorError(
            f"release {policy.seq} is open to {rollout.share_of(policy.limit)} % of the watched devices; open it to all of them before it opens to "
            f"devices that are not watched: `ferry rollout widen {policy.line}/{policy.device_class} --to 100`"
        )
    if not rollout.is_open(policy):
        raise OperatorError(
            f"{rollout.describe(policy)}, so it is not opened to devices that are not watched, which policy 1 lets in whatever `--only`, "
            f"`--not-before` and `--until` say; open it to all watched devices before: `ferry rollout start {policy.line}/{policy.device_class} "
            "--waves 100` without these options"
        )


def _check_kept_out(workspace: Workspace, policy: Policy2) -> None:
    """Refuse to open a release to devices that are not watched if `never` names some that read policy 1 alone.

    Raises:
        OperatorError: there are some; a device that never reported may be one.
    """
    if not policy.never:
        return
    named = set(policy.never)
    tagged = {state.device: {f"{name}={value}" for name, value in state.tags.items()} for state in workspace.fleet.states()}
    told = {text.split(" ", 1)[0]: text for text in not_watched(workspace, policy.line, policy.device_class)}
    found = [text for device, text in told.items() if named & {device, *tagged[device]}]
    if found:
        more = f" and {len(found) - compatibility.SHOWN} more" if len(found) > compatibility.SHOWN else ""
        raise OperatorError(
            f"`--never` names {', '.join(found[: compatibility.SHOWN])}{more}, and policy 1, which such devices read, cannot keep them out; update "
            "their agents first, or leave out --unwatched or these devices; nothing was signed"
        )


def widen(workspace: Workspace, line: str, device_class: str, share: float | None = None) -> InForce:
    """Open the present release to more of the watched devices.

    Args:
        workspace: workspace of the release.
        line: of the release.
        device_class: of the release.
        share: in percent; None: the next of the shares that were stated at the start.

    Raises:
        OperatorError: nothing is rolled out to watched devices, it is halted, or it is open that far already.
        LedgerError: the ledger cannot take it; nothing was signed.
    """

    def change(watched: Policy2) -> tuple[Policy2, Policy | None]:
        return rollout.widened(watched, share), None

    def told(policy: Policy2) -> str:
        return f"widened to {rollout.share_of(policy.limit)} % of the fleet"

    return _changed(workspace, line, device_class, "widen", change, told)


def open_unwatched(workspace: Workspace, line: str, device_class: str, shares: Sequence[float], soak: int) -> InForce:
    """Open the present release to devices that are not watched, in timed waves.

    Args:
        workspace: workspace of the release.
        line: of the release.
        device_class: of the release.
        shares: shares of the fleet in percent, rising.
        soak: seconds between two waves.

    Raises:
        OperatorError: nothing is rolled out to watched devices, it is not open to all of them, it is halted, or policy 1 cannot keep out a
            device that `never` names.
        LedgerError: the ledger cannot take it; nothing was signed.
    """
    rollout.check_shares(shares)

    def change(watched: Policy2) -> tuple[Policy2, Policy | None]:
        _check_open(watched)
        _check_kept_out(workspace, watched)
        release = fielded.chosen(workspace.repository, line, device_class, watched.seq, lambda: None)
        return watched, rollout.start(release, shares, soak, revert=watched.revert)

    def told(_: Policy2) -> str:
        return f"waves {','.join(f'{share:g}' for share in shares)} % of the devices that are not watched"

    return _changed(workspace, line, device_class, "open", change, told)


def retry(workspace: Workspace, line: str, device_class: str) -> InForce:
    """Let each watched device that refused the present release try it once more.

    Raises:
        OperatorError: nothing is rolled out to watched devices.
        LedgerError: the ledger cannot take it; nothing was signed.
    """

    def change(watched: Policy2) -> tuple[Policy2, Policy | None]:
        return rollout.numbered(watched, retry=watched.retry + 1), None

    return _changed(workspace, line, device_class, "retry", change, lambda _: "devices that refused it may try it once more")


def _changed(
    workspace: Workspace, line: str, device_class: str, doing: str, change: Callable[[Policy2], tuple[Policy2, Policy | None]],
    told: Callable[[Policy2], str],
) -> InForce:  # fmt: skip
    """Change the policies of a rollout that is under way, and record why.

    Args:
        workspace: workspace of the release.
        line: of the release.
        device_class: of the release.
        doing: what is done, for a message.
        change: makes the new policy 2, and a new policy 1 unless that one stays.
        told: reason for the ledger.
    """
    repository, made = workspace.repository, list[InForce]()

    def sign() -> dict[str, Any]:
        before = _under_way(workspace, line, device_class, doing)
        watched, waves = change(before)
        made.append(InForce(watched, waves or repository.policy(line, device_class)))
        repository.set_policy(*made[0].both)
        return {"release": watched.seq, "policy": watched.policy}

    planned, _ = change(_under_way(workspace, line, device_class, doing))  # a refusal comes before anything is locked
    _change(workspace, f"{line}/{device_class}", told(planned), sign)
    return made[0]


def _under_way(workspace: Workspace, line: str, device_class: str, doing: str) -> Policy2:
    named = fielded.rolled_out(workspace.repository, line, device_class, doing)
    if isinstance(named, Policy2):
        return named
    raise OperatorError(
        f"release {named.seq} of {line}/{device_class} was rolled out by an older ferry, so there is nothing to {doing}; `ferry rollout start "
        f"{line}/{device_class}` starts a rollout that can be watched"
    )


def not_watched(workspace: Workspace, line: str, device_class: str) -> list[str]:
    """Name the devices that wait until a release is opened to those that are not watched, and why, by their last reports."""
    found = []
    for state in workspace.fleet.states():
        where = (state.line or state.enrolled_line, state.device_class or state.enrolled_class)
        if state.retired or not state.confirmed or where not in ((None, None), (line, device_class)):
            continue
        if state.number is None:
            found.append(f"{state.device} (never reported)")
        elif compatibility.is_older(state.agent or compatibility.OLDEST_AGENT, compatibility.POLICY_2_SINCE):
            found.append(f"{state.device} ({state.agent or compatibility.NOT_NAMED})")
    return found


def of_the_champions(workspace: Workspace, line: str, device_class: str) -> Release | None:
    """Find the newest release that holds the weights of exactly the champions that the ledger names; None: there is none."""
    settings = workspace.device_class(line, device_class)
    names: set[VariantName] = {"full", *settings.variants}
    states = {variant: subject_state(workspace.ledger.entries(f"{line}/{settings.configuration}/{variant}")) for variant in names}
    held = of_one_full(states["full"], {variant: states[variant] for variant in settings.variants})
    wanted = {variant: state.weights for variant, state in held.items()}
    return fielded.release_with(workspace.repository, line, device_class, settings.configuration, wanted)


def opened(workspace: Workspace, line: str, device_class: str) -> set[int]:
    """Return the numbers of the releases that policies opened and that may still run.

    These are the last one, unless it is halted; what devices have that are not watched; and the one before, as long as the last is not open
    to all devices.
    """
    policies = InForce.of(workspace, line, device_class)
    policy = policies.named
    if policy is None:
        return set()
    before = [
        int(entry.facts["release"])
        for entry in workspace.ledger.entries(f"{line}/{device_class}")
        if entry.kind == "rollout" and entry.facts.get("release") not in (None, policy.seq)
    ]
    last = {known.seq for known in policies.both if not known.halt}
    everywhere = all(rollout.is_open(known) and known.seq == policy.seq for known in policies.both)
    return last | (set() if everywhere else set(before[-1:]))


def halt(workspace: Workspace, line: str, device_class: str, reason: str) -> Halted:
    """Let no further device install the release that is rolled out.

    The halt is published first and recorded afterwards. So neither a damaged ledger nor another process that holds the records,
    perhaps for ever, can keep a bad release going.

    Raises:
        OperatorError: nothing is rolled out, or another process does not end its signing.
        TransferError: it cannot be written where devices fetch it.
    """
    check_newest(workspace)
    with workspace.repository.held():
        named = fielded.rolled_out(workspace.repository, line, device_class, "halt")
        before = InForce.of(workspace, line, device_class)
        halted = InForce(
            rollout.halt(before.watched) if before.watched else None,
            # Devices that are not watched may still install another release, which did no harm.
            rollout.halt(before.waves) if before.waves and before.waves.manifest == named.manifest else before.waves,
        )
        workspace.repository.set_policy(*halted.both)
        _copy(workspace, urgent=True)
    unrecorded: RegistryError | OtaError | BusyError | None = None
    try:
        with workspace.locked("records", HALT_SECONDS):
            workspace.ledger.append("halt", f"{line}/{device_class}", reason, {"release": named.seq})
    except (RegistryError, OtaError, BusyError) as error:
        unrecorded = error
    return Halted(halted, unrecorded)


def renew(workspace: Workspace, line: str, device_class: str) -> tuple[InForce, str]:
    """Sign the present policies anew, unchanged; return them, and when their signature ends.

    Raises:
        OperatorError: nothing is rolled out.
        LedgerError: the ledger cannot take it; nothing was signed.
    """
    made: list[tuple[InForce, str]] = []

    def sign() -> dict[str, Any]:
        named = fielded.rolled_out(workspace.repository, line, device_class, "renew")
        policies = InForce.of(workspace, line, device_class)
        workspace.repository.set_policy(*policies.both)
        role = workspace.repository.role_of("rollout", line, device_class)
        made.append((policies, workspace.repository.in_force(role).signed.expires.isoformat()))
        return {"release": named.seq, "until": made[0][1]}

    _change(workspace, f"{line}/{device_class}", "renewed, waves unchanged", sign)
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

    _change(workspace, f"{line}/{device_class}", f"floor {number}", sign)


def after_promotion(workspace: Workspace, line: str, configuration: str, variant: str) -> str:
    """Say, for each device class that runs a variant, how its present champion gets to devices."""
    steps = []
    for name, settings in workspace.line(line).classes.items():
        if settings.configuration == configuration and variant in settings.variants:
            release = of_the_champions(workspace, line, name)
            publish_it = f"publish it with `ferry release {line}/{name}`"
            steps.append(fielded.next_step(workspace, line, name, release.seq) if release else publish_it)
    return "; ".join(dict.fromkeys(steps)) or f"no device class of {line} runs it"


def publication(workspace: Workspace) -> Published:
    """Say whether devices can fetch what is signed."""
    from ota.release import published

    stores = workspace.settings.stores
    return published.compare(workspace.repository, stores.publish, workspace.root, stores.s3_endpoint or None)


def allowances(workspace: Workspace, line: str, device_class: str, number: int) -> list[str]:
    """Describe the changes of the images that a release allows, and who refuses it all the same; no line if it allows none."""
    from ota.release import foretell  # it loads the codec, for which a halt does not wait

    named = [release for release in workspace.repository.releases(line, device_class) if release.seq == number]
    allowed = foretell.allowed_by(workspace.repository, workspace.repository.manifest(named[0])) if named else {}
    return foretell.described(workspace.repository, line, device_class, allowed)


def behind(workspace: Workspace, line: str, device_class: str, number: int) -> list[str]:
    """Name the devices whose agents are too old for a release; no line if there are none."""
    named = [release for release in workspace.repository.releases(line, device_class) if release.seq == number]
    manifest = workspace.repository.manifest(named[0]) if named else None
    found = compatibility.left_behind(manifest, workspace.fleet.devices()) if manifest else []
    return [compatibility.described(manifest, found)] if manifest and found else []


def check_ledger(workspace: Workspace) -> dict[str, int]:
    """Check that the ledger still holds the heads that were signed into releases.

    Returns:
        for each release, by its name: number of the ledger's last entry when it was signed.

    Raises:
        LedgerError: entries that were there when a release was signed are gone.
    """
    if is_clone(workspace.root):
        return {}  # it knows no release
    numbers = {entry_sha256: number for number, entry_sha256 in enumerate(workspace.ledger.hashes(), start=1)}
    signed: dict[str, int] = {}
    for line, device_class in classes(workspace):
        for release in workspace.repository.releases(line, device_class):
            name = f"{line}/{device_class} release {release.seq}"
            if release.ledger not in numbers and release.ledger != START:
                raise LedgerError(
                    f"the ledger lacks the entry that {name} was signed with, so entries were removed; restore the database"
                )
            signed[name] = numbers.get(release.ledger, 0)
    return signed


def classes(workspace: Workspace) -> list[tuple[str, str]]:
    """List the line and the device class of everything that ferry.toml names."""
    return [(line, device_class) for line, settings in workspace.settings.lines.items() for device_class in settings.classes]


def released(workspace: Workspace, subject: Subject, weights: str) -> list[Released]:
    """List what signed releases with these weights hold of a version's bundle, without the weights.

    Args:
        workspace: workspace of the repository.
        subject: of the version.
        weights: sha256 of its exported weights.
    """
    from ota.release import foretell
    from ota.release.bundle import FILE_NAMES, as_exported  # it loads the codec, for which a halt does not wait
    from registry.sealing import Released

    line, repository = subject.line, workspace.repository
    changed = {
        release.manifest
        for device_class in workspace.line(line).classes
        for release in repository.releases(line, device_class)
        if foretell.allowed_by(
            repository, repository.manifest(release)
        )  # changes in its references, which the version's do not hold
    }

    def exported(file: FileEntry) -> str:
        """Return the hash of a file as it was exported: a reference got captions afterwards."""
        if file.role != "reference":
            return file.sha256
        return hashlib.sha256(as_exported((repository.folder / "objects" / file.sha256).read_bytes())).hexdigest()

    return [
        Released(f"{line}/{device_class} release {release.seq}", f"bundle/{FILE_NAMES[file.role]}", exported(file))
        for device_class in workspace.line(line).classes
        for release, file in fielded.files_beside(repository, line, device_class, subject.variant, weights)
        if file.role != "golden" or repository.manifest(release).schema_version < 4  # from then on a sample of the version's
        if file.role != "reference" or release.manifest not in changed
    ]

"""The flow `release`: champions → bundle → what devices would say → deltas from what is fielded → signatures → publication."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from pydantic import Field

from flows import pages, policies, progress, running
from flows.policies import check_ledger
from flows.settings import TEACHING_MS
from flows.steps import RETRIES, champion_files
from flows.workspace import Workspace
from model import golden
from model.scorecard import Frozen
from model.train import load_checkpoint
from ota.errors import OperatorError
from ota.fitness import TrialResult
from ota.manifest import Allowed, Origin, VariantName
from ota.release import bundle, chains, compatibility, foretell
from ota.release.bundle import Bundle, Delta
from ota.release.repository import Release
from registry.catalog import Subject
from registry.champions import champion_of, champions, promotions
from registry.errors import CatalogError

FACTORS = "update.safetensors"  # beside the exported files of a retraining: by which factors its tensors moved


class Released(Frozen):
    """A published release, as the flow returns it."""

    line: str
    device_class: str
    release: int
    manifest: str
    versions: dict[str, int]
    full_bytes: int
    deltas: dict[str, int]
    """Base manifest → bytes of the smallest delta from it; bases whose delta was not smaller than the bundle are left out."""
    behind: dict[int, int] = Field(default={})
    """Releases that a device is behind → bytes of the deltas that it fetches; in any other case it fetches the full bundle."""
    metadata_bytes: int
    copied: int
    known: bool = False
    """Whether a release held these champions before."""
    allowed: dict[str, Any] = Field(default={})
    """Changes of the images that the release allows, by variant."""
    minimum_agent: str = ""
    """Oldest agent that can read the bundle."""
    left_behind: dict[str, str] = Field(default={})
    """Devices whose agents are too old for it, and what is known of these agents."""


@task(name="bundle", task_run_name="bundle {line}/{device_class}")
def make_bundle(root: str, line: str, device_class: str, allowed: Mapping[VariantName, Allowed] | None = None) -> str:
    """Build the bundle of a line's champions for a device class, with the changes that it allows; return its folder."""
    workspace = Workspace(Path(root))
    settings = workspace.device_class(line, device_class)
    found = champions(workspace, workspace.class_subjects(line, device_class))
    left = [str(subject) for subject in workspace.class_subjects(line, device_class) if subject.variant not in found]
    without = f"; left out, because they have no champion that comes from that of full: {', '.join(left)}" if left else ""
    progress.say(f"build the bundle of {', '.join(champion.name for champion in found.values())}{without}")
    exports = {variant: champion_files(workspace, champion).bundle for variant, champion in found.items()}
    first = next(iter(found.values()))
    lineage = load_checkpoint(champion_files(workspace, first).checkpoint).lineage
    card = workspace.catalog.card(first)
    stored = card.precision
    if stored != settings.precision:
        raise CatalogError(
            f"{first.name} is stored as {stored}, but ferry.toml asks for {settings.precision}; run `ferry retrain {line}`"
        )
    subject = Subject.parse(first.subject)
    promoted = next(e for e in promotions(workspace, subject) if e.facts["version"] == first.version)
    # The origin names the first promotion, so that a later rollback to this version makes the bundle that devices know, byte for
    # byte.
    origin = Origin(
        data_rev=first.data_rev, data_md5=first.data_md5, code=first.code, lineage=first.lineage,
        scorecard=first.scorecard, decision=promoted.sha256, model=subject.model, version=first.version,
    )  # fmt: skip
    assembled = partial(
        bundle.assemble, exports, line=line, device_class=device_class, tier=lineage.config.tier, configuration=settings.configuration,
        precision=settings.precision, origin=origin, out=workspace.work / "bundles", allowed=allowed,
        latency_ms={v: settings.latency_ms for v, export in exports.items() if latency_of(export) == TEACHING_MS},  # a teacher until then
        captions=[row.caption for row in card.captions],
    )  # fmt: skip
    made = assembled(oldest_agent=settings.oldest_agent or _oldest_agent(workspace, line, device_class))
    releases = workspace.repository.releases(line, device_class)
    before = {release.manifest for release in releases[:-1] if release.version == first.version}
    if before and made.manifest.digest not in {release.manifest for release in releases} and not settings.oldest_agent:
        # The reports may have asked for another form when these champions were released before the present ones; devices know that bundle.
        for agent in compatibility.BUILT_FOR:
            with suppress(OperatorError):  # an older form cannot hold it
                other = assembled(oldest_agent=agent)
                made = other if other.manifest.digest in before else made
    return str(made.folder)


def _oldest_agent(workspace: Workspace, line: str, device_class: str) -> str:
    """Return the agent that a bundle is made for where ferry.toml does not say."""
    found = compatibility.oldest_agent(line, device_class, workspace.fleet.devices())
    if compatibility.newest_form(found) < compatibility.newest_form():
        progress.say(
            f"devices of {line}/{device_class} have agents before {compatibility.minimum_agent(compatibility.newest_form())}, so the bundle has "
            "the form that they read, and an update takes some kilobytes more; `ferry fleet status` shows their agents"
        )
    return found


def latency_of(export: Path) -> float:
    """Return the budget for an image, in milliseconds, that exported files hold."""
    return float(json.loads((export / "reference.json").read_bytes())["latency_ms"])


def try_here(root: str, line: str, device_class: str) -> dict[VariantName, TrialResult]:
    """Draw the golden images of a line's champions, as a device does in its trial; time and memory are the device's to judge."""
    workspace = Workspace(Path(root))
    found = champions(workspace, workspace.class_subjects(line, device_class))
    drawn = {variant: golden.measure(champion_files(workspace, champion).bundle) for variant, champion in found.items()}
    return {
        variant: TrialResult(1.0, images.finite, images.statistics, images.load, milliseconds=0, computing=0, peak_mib=0)
        for variant, images in drawn.items()
    }


def foretold(
    root: str, line: str, device_class: str, reason: str | None, drill: bool = False
) -> tuple[str, dict[VariantName, Allowed]]:
    """Build the bundle, and ask the rules of the devices' own trial about it; return its folder, and the changes that it allows.

    Args:
        root: the workspace.
        line: of the release.
        device_class: of the release.
        reason: why a change for which devices would refuse the bundle is wanted; None: it is not.
        drill: do not ask; the devices shall refuse it.

    Raises:
        ForetoldError: devices would refuse the bundle; nothing was signed.
    """
    workspace = Workspace(Path(root))
    workspace.fleet.collect(workspace.inbox)  # devices name their agents, which decide about the bundle's form
    plain = bundle.open_bundle(Path(make_bundle(root, line, device_class)))
    bases = foretell.running(workspace, line, device_class, policies.opened(workspace, line, device_class))
    allowed = foretell.allowed_before(workspace.repository, plain)
    made = bundle.open_bundle(Path(make_bundle(root, line, device_class, allowed))) if allowed else plain
    signed = {release.manifest for release in workspace.repository.releases(line, device_class)}
    if drill or made.manifest.digest in signed or not bases:  # what is signed already may be gone back to
        return str(made.folder), allowed
    trials = try_here(root, line, device_class)
    found = foretell.refusals(workspace.repository, made, trials, bases)
    if not found:
        return str(made.folder), allowed
    if reason is None:
        raise foretell.refused(found, f"{line}/{device_class}")
    allowed = foretell.allow(found, trials, reason, allowed)
    made = bundle.open_bundle(Path(make_bundle(root, line, device_class, allowed)))
    if left := foretell.refusals(workspace.repository, made, trials, bases):
        raise foretell.too_far(left)
    return str(made.folder), allowed


def left_behind(workspace: Workspace, made: Bundle, leave_behind: bool) -> list[compatibility.Behind]:
    """Return the devices whose agents are too old for a bundle that is not signed yet; what is signed may be gone back to.

    Raises:
        LeftBehindError: there are some, and nobody decided to leave them behind.
    """
    manifest = made.manifest
    signed = {release.manifest for release in workspace.repository.releases(manifest.line, manifest.device_class)}
    told = workspace.fleet.deciding()
    unsigned = {device for device, last in told.items() if last and last.proof == "unverifiable"}
    reports = {device: last.report if last else None for device, last in told.items()}
    return compatibility.check(manifest, reports, leave_behind or manifest.digest in signed, unsigned)


@task(name="deltas", task_run_name="build deltas to the bundle")
def make_deltas(root: str, folder: str) -> list[Delta]:
    """Build the deltas to a bundle that `chains.wanted` lists, and those for its overlays; leave out those that save nothing."""
    workspace = Workspace(Path(root))
    target, out = bundle.open_bundle(Path(folder)), workspace.work / "deltas"
    line, device_class = target.manifest.line, target.manifest.device_class
    releases = {release.manifest: release for release in workspace.repository.releases(line, device_class)}
    reports = [r for r in workspace.fleet.devices().values() if r and (r.line, r.device_class) == (line, device_class)]
    links = workspace.repository.links(line, device_class)
    oldest = workspace.device_class(line, device_class).oldest_agent
    wanted = chains.wanted([*releases], target.manifest.digest, reports, oldest, links)
    factors = factors_of(workspace, line, device_class)
    made: list[Delta] = []
    for done, want in enumerate(wanted):
        progress.advance("build deltas", done, len(wanted))
        base = Bundle(workspace.repository.objects, workspace.repository.manifest(releases[want.base]))
        delta = bundle.make_delta(base, target, out, factors, want.form)
        if delta is None:
            continue
        others = [*links, *(other.link for other in made)]
        if want.devices is None or chains.pays(delta.link, want.devices, len(reports), others, target.manifest.size):
            made.append(delta)
    if wanted:
        progress.advance("build deltas", len(wanted), len(wanted))
    overlays = [bundle.make_overlay_delta(target, out, form) for form in chains.forms(wanted, oldest)]
    return [*made, *(delta for delta in overlays if delta)]


def factors_of(workspace: Workspace, line: str, device_class: str) -> dict[VariantName, Path]:
    """Find what the trainings of a line's champions say of their updates; a stale one costs bytes, because each claim is checked.

    A variant that draws with the weights of `full` moves as these do, also in a bundle that does not hold `full` itself.
    """
    subjects = workspace.class_subjects(line, device_class)
    found = champions(workspace, subjects)
    full = champion_of(workspace, subjects[0].model_copy(update={"variant": "full"}))
    trained = {variant: full if full and full.weights == champion.weights else champion for variant, champion in found.items()}
    files = {variant: champion_files(workspace, champion).bundle / FACTORS for variant, champion in trained.items()}
    return {variant: path for variant, path in files.items() if path.is_file()}


@task(name="sign", task_run_name="sign the release", **RETRIES)
def sign(
    root: str, folder: str, deltas: list[Delta], allowed: Mapping[VariantName, Allowed], behind: Mapping[str, str] | None = None
) -> tuple[Release, bool]:
    """Add a bundle and its deltas to the signed repository, and record the release in the ledger.

    A bundle that was released before, and after which another one was released, is recorded again, and a new head of the ledger is
    signed with it.

    Args:
        root: the workspace.
        folder: of the bundle.
        deltas: to it.
        allowed: changes that it allows.
        behind: devices that somebody decided to leave behind, and their agents.

    Returns:
        the release, and whether it was the newest that was recorded, so that nothing new was.
    """
    workspace = Workspace(Path(root))
    made = bundle.open_bundle(Path(folder))
    subject = f"{made.manifest.line}/{made.manifest.device_class}"
    progress.say(f"sign the bundle and {len(deltas)} delta{'' if len(deltas) == 1 else 's'}")
    with workspace.locked("records"):
        entries = [e for e in workspace.ledger.entries(subject) if e.kind == "release"]
        newest = bool(entries) and entries[-1].facts["manifest"] == made.manifest.digest
        again = not newest and any(e.facts["manifest"] == made.manifest.digest for e in entries)
        release = workspace.repository.publish_release(
            made.manifest, made.folder, workspace.ledger.head(), [(d.base, d.path) for d in deltas], again=again
        )
        if not newest:
            facts: dict[str, Any] = {
                "release": release.seq,
                "manifest": release.manifest,
                "deltas": smallest(workspace, release),
                "behind": {str(count): size for count, size in workspace.repository.behind(release).items()},
            }
            if allowed:
                facts["allowed"] = {variant: change.model_dump(mode="json") for variant, change in allowed.items()}
            if behind:
                facts["left_behind"] = dict(behind)
            reasons = "; ".join(dict.fromkeys(change.reason for change in allowed.values()))
            why = f"version {release.version} published{' again' if again else ''}"
            workspace.ledger.append(
                "release", subject, why + (f", with a change that devices would refuse: {reasons}" if reasons else ""), facts
            )
    return release, newest


def smallest(workspace: Workspace, release: Release) -> dict[str, int]:
    """Return the bytes of the smallest delta to a release from each base, by the hash of the base's manifest."""
    found: dict[str, int] = {}
    for delta in workspace.repository.deltas(release.line, release.device_class):
        if delta.target == release.manifest:
            found[delta.base] = min(delta.size, found.get(delta.base, delta.size))
    return found


@task(name="publish", task_run_name="publish the repository", **RETRIES)
def publish(root: str) -> int:
    """Copy new files of the repository to where devices fetch them, and return their number."""
    return policies.publish(Workspace(Path(root)))


@flow(
    name="release", flow_run_name="release {line}/{device_class}", persist_result=False,
    description="Publish a line's champions for a device class as a signed release, with deltas from what devices run.",
)  # fmt: skip
def release(
    root: str, line: str, device_class: str, allow_change: str | None = None, drill: bool = False, leave_behind: bool = False
) -> dict[str, Any]:
    """Publish the champions of a line for a device class, and return a `Released` as plain data.

    This does not decide which devices may install the release; `ferry rollout start` does.

    Args:
        root: the workspace.
        line: of the release.
        device_class: of the release.
        allow_change: why a change for which devices would refuse the release is wanted; None: such a release is not signed.
        drill: sign it although devices would refuse it, to see that they do; `ferry demo` does so.
        leave_behind: sign it although the agents of some devices are too old for it; they keep what they run.

    Raises:
        ForetoldError: devices would refuse the release; nothing was signed.
        LeftBehindError: devices have an agent that is too old for it; nothing was signed.
    """
    workspace = Workspace(Path(root))
    with workspace.locked("release"), pages.progress(), running.noted(workspace.work, "release", f"{line}/{device_class}"):
        check_ledger(workspace)
        folder, allowed = foretold(root, line, device_class, allow_change, drill)
        made_bundle = bundle.open_bundle(Path(folder))
        behind = {b.device: b.agent for b in left_behind(workspace, made_bundle, leave_behind)}
        deltas = make_deltas(root, folder)
        published, known = sign(root, folder, deltas, allowed, behind)
        copied = publish(root)
    made = Released(
        line=line, device_class=device_class, release=published.seq, manifest=published.manifest,
        versions={variant: champion.version for variant, champion in champions(workspace, workspace.class_subjects(line, device_class)).items()},
        full_bytes=published.full_bytes,
        deltas=smallest(workspace, published), behind=workspace.repository.behind(published),
        metadata_bytes=workspace.repository.metadata_bytes(line, device_class), copied=copied, known=known,
        allowed={variant: change.model_dump(mode="json") for variant, change in allowed.items()},
        minimum_agent=made_bundle.manifest.minimum_agent, left_behind=behind,
    )  # fmt: skip
    create_table_artifact(
        table=[made.model_dump()],
        key=pages.key_of(f"release {line} {device_class}"),
        description=f"{line}/{device_class} release {published.seq}",
    )
    return made.model_dump()

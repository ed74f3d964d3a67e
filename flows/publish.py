"""The flow `release`: champions → bundle → deltas from what is fielded → signatures → publication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows import policies, progress
from flows.policies import check_ledger
from flows.steps import RETRIES, champion_files
from flows.workspace import Workspace
from model.scorecard import Frozen
from model.train import load_checkpoint
from ota.manifest import Origin
from ota.release import bundle
from ota.release.bundle import Bundle, Delta
from ota.release.repository import Release
from registry.catalog import Subject
from registry.champions import champions, promotions
from registry.errors import CatalogError

PREVIOUS = 2  # releases before this one that get a delta even if no device reports them


class Released(Frozen):
    """A published release, as the flow returns it."""

    line: str
    device_class: str
    release: int
    manifest: str
    versions: dict[str, int]
    full_bytes: int
    deltas: dict[str, int]
    """Base manifest → bytes of the delta; bases whose delta was not smaller than the bundle are left out."""
    metadata_bytes: int
    copied: int


@task(name="bundle")
def make_bundle(root: str, line: str, device_class: str) -> str:
    """Build the bundle of a line's champions for a device class, and return its folder."""
    workspace = Workspace(Path(root))
    settings = workspace.device_class(line, device_class)
    found = champions(workspace, workspace.class_subjects(line, device_class))
    exports = {variant: champion_files(workspace, champion).bundle for variant, champion in found.items()}
    first = next(iter(found.values()))
    lineage = load_checkpoint(champion_files(workspace, first).checkpoint).lineage
    stored = workspace.catalog.card(first).precision
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
    made = bundle.assemble(
        exports, line=line, device_class=device_class, tier=lineage.config.tier, configuration=settings.configuration,
        precision=settings.precision, origin=origin, out=workspace.work / "bundles",
    )  # fmt: skip
    return str(made.folder)


@task(name="deltas")
def make_deltas(root: str, folder: str) -> list[Delta]:
    """Build the deltas to a bundle from every bundle of `fielded`; leave out those that are not smaller than the bundle."""
    workspace = Workspace(Path(root))
    target = bundle.open_bundle(Path(folder))
    bases = fielded(workspace, target)
    made = []
    for done, base in enumerate(bases):
        progress.advance("build deltas", done, len(bases))
        delta = bundle.make_delta(base, target, workspace.work / "deltas")
        if delta:
            made.append(delta)
    if bases:
        progress.advance("build deltas", len(bases), len(bases))
    return made


def fielded(workspace: Workspace, target: Bundle) -> list[Bundle]:
    """Return the published bundles from which devices may come: those that they report, and the last `PREVIOUS` ones."""
    releases = workspace.repository.releases(target.manifest.line, target.manifest.device_class)
    reported = {report.active for report in workspace.fleet.devices().values() if report}
    chosen = [r for r in releases if r.manifest in reported or r in releases[-PREVIOUS:]]
    return [
        Bundle(workspace.repository.objects, workspace.repository.manifest(r))
        for r in chosen
        if r.manifest != target.manifest.digest
    ]


@task(name="sign", **RETRIES)
def sign(root: str, folder: str, deltas: list[Delta]) -> Release:
    """Add a bundle and its deltas to the signed repository, record the release in the ledger once, and return it."""
    workspace = Workspace(Path(root))
    made = bundle.open_bundle(Path(folder))
    with workspace.locked("records"):
        release = workspace.repository.publish_release(
            made.manifest, made.folder, workspace.ledger.head(), [(d.base, d.path) for d in deltas]
        )
        subject = f"{release.line}/{release.device_class}"
        known = [e for e in workspace.ledger.entries(subject) if e.kind == "release" and e.facts["manifest"] == release.manifest]
        if not known:
            workspace.ledger.append(
                "release", subject, f"version {release.version} published",
                {"release": release.seq, "manifest": release.manifest, "deltas": {d.base: d.size for d in deltas}},
            )  # fmt: skip
    return release


@task(name="publish", **RETRIES)
def publish(root: str) -> int:
    """Copy new files of the repository to where devices fetch them, and return their number."""
    return policies.publish(Workspace(Path(root)))


@flow(name="release", persist_result=False)
def release(root: str, line: str, device_class: str) -> dict[str, Any]:
    """Publish the champions of a line for a device class, and return a `Released` as plain data.

    This does not decide which devices may install the release; `ferry rollout start` does.
    """
    workspace = Workspace(Path(root))
    with workspace.locked("release"):
        check_ledger(workspace)
        folder = make_bundle(root, line, device_class)
        deltas = make_deltas(root, folder)
        published = sign(root, folder, deltas)
        copied = publish(root)
    made = Released(
        line=line, device_class=device_class, release=published.seq, manifest=published.manifest,
        versions={variant: champion.version for variant, champion in champions(workspace, workspace.class_subjects(line, device_class)).items()},
        full_bytes=published.full_bytes,
        deltas={d.base: d.size for d in workspace.repository.deltas(line, device_class) if d.target == published.manifest},
        metadata_bytes=workspace.repository.metadata_bytes(), copied=copied,
    )  # fmt: skip
    create_table_artifact(table=[made.model_dump()], key="release", description=f"{line}/{device_class} {published.seq}")
    return made.model_dump()

"""Figures of a registered version: those of its scorecard and, on request, an FID as papers print it."""

from __future__ import annotations

from pathlib import Path

from flows import progress
from flows.remeasure import Figures, figures
from flows.workspace import Workspace
from model.errors import ConfigError, DataError
from model.scorecard import Frozen, PublishedFid, Scorecard
from registry.catalog import Subject
from registry.champions import champion_of, judged, sealed
from registry.errors import CatalogError
from registry.lineage import file_sha256
from registry.seal import Seal

FEATURES = "inception:"  # a file name follows; these are the only features that are not the line's own


class Measured(Frozen):
    """A version and its figures."""

    subject: str
    version: int
    champion: bool
    outcome: str
    reason: str
    scorecard: Scorecard
    current: bool = True
    """Whether its scorecard has figures in the line's present feature spaces."""
    anew: Figures | None = None
    """Figures from `ferry remeasure` in the line's present feature spaces; None: it did not measure this version in them."""
    fid: PublishedFid | None = None
    images: str | None = None
    """The folder that the FID compares with."""


def find(workspace: Workspace, subject: str, number: int | None = None) -> Seal:
    """Find a version of LINE/CONFIG/VARIANT as the gate saw it; without a number, find the champion.

    Raises:
        CatalogError: there is no such version or champion, the gate never saw it, or the subject is not written so.
        WorkspaceError: there is no such line.
    """
    asked = Subject.parse(subject)
    workspace.line(asked.line)
    if number is not None:
        return sealed(workspace, asked, number)
    champion = champion_of(workspace, asked)
    if champion is None:
        known = ", ".join(str(version.number) for version in workspace.catalog.versions(asked))
        raise CatalogError(
            f"{asked} has no champion; "
            + (f"name one of its versions, {known}" if known else f"run `ferry retrain {asked.line}`")
        )
    return champion


def network_file(features: str) -> Path:
    """Return the file that `inception:FILE` names.

    Raises:
        ConfigError: it is not written so.
    """
    name = features.removeprefix(FEATURES)
    if not name or name == features:
        raise ConfigError(
            f"there are no features {features!r}; write {FEATURES}FILE with a TorchScript file of Inception weights"
        )
    return Path(name)


def measure(
    workspace: Workspace, version: Seal, file: Path | None = None, images: Path | None = None, n: int | None = None
) -> Measured:
    """Read a version's scorecard and, where a network is given, compute the FID of the images that it draws.

    Args:
        workspace: whose catalogue holds it.
        version: what to look at.
        file: TorchScript of the network in whose features the FID is computed; None: no FID.
        images: the folder to compare with; None: the data revision that the version was trained on, all of it.
        n: images to draw; None: as many as the scorecard counts. Then they are the images of the evaluation, because they are
            drawn in the same way.

    Raises:
        DataError: there is no such file or folder, or it holds what cannot be compared with.
        CheckpointError: the file is no TorchScript, or not of a network that gives features.
        StoreError: MLflow does not deliver the version's files.
    """
    card, subject = workspace.catalog.card(version), Subject.parse(version.subject)
    said, champion = judged(workspace, subject)[version.version], champion_of(workspace, subject)
    known = Measured(
        subject=version.subject, version=version.version, champion=champion is not None and champion.version == version.version,
        outcome=said.facts["outcome"], reason=said.why, scorecard=card,
        anew=figures(workspace, subject, version.version), current=_is_current(workspace, subject.line, card),
    )  # fmt: skip
    if file is None:
        return known
    from model import evaluate, features, session, versions
    from model.data import prepare
    from model.train import load_checkpoint

    network, _ = features.published_features(file)  # an unusable file is refused before anything is drawn
    if images is not None and not images.is_dir():
        raise DataError(f"there is no folder {images}; put the images there, or name another one with --images")
    kept = workspace.work / "champions"
    lineage = load_checkpoint(workspace.catalog.files(version, "checkpoint", kept)).lineage
    with workspace.locked("data"):
        own = versions.pull(workspace.root, lineage.data, workspace.work / "data")
    dataset = prepare(own, lineage.config, workspace.work / "cache", lineage.data.md5)
    unusable = {name: why for name, why in dataset.quarantine.items() if (own / name).is_file()}
    if images is None and unusable:
        name, why = next(iter(unusable.items()))
        raise DataError(
            f"the version's own data hold {len(unusable)} files that cannot be used, the first: {name} {why}; name a folder of sound "
            "images with --images"
        )
    network(evaluate.pure_noise(dataset.images[:2]))
    drawn = evaluate.draw(
        session.load(workspace.catalog.files(version, "bundle", kept)),
        evaluate.held_out_captions(dataset, n or card.quality[0].n),
        card.sampler,
        lambda done, total: progress.advance(f"draw {version.name}", done, total),
    )
    folder = images or own
    return known.model_copy(update={"fid": evaluate.published_fid(folder, drawn.images, file), "images": str(folder)})


def _is_current(workspace: Workspace, line: str, card: Scorecard) -> bool:
    """Check whether a scorecard has figures in the line's present feature spaces."""
    present = workspace.feature_spaces(line)
    return not present.is_file() or file_sha256(present) in {q.space_sha256 for q in card.quality}


def text(measured: Measured) -> str:
    """Format the figures as a short table."""
    card = measured.scorecard
    cost, drawn, usage = card.cost, card.sampler, card.usage
    head = f"{measured.subject} version {measured.version}{' (champion)' if measured.champion else ''}"
    rows = [
        f"{head}: {measured.outcome}, {measured.reason}",
        "",
        f"{'held-out':10}{'features':10}{'n':>6}{'kd':>10}{'± se':>9}{'fd':>9}{'coverage':>10}{'precision':>11}{'recall':>8}",
        *(
            f"{q.split:10}{q.space:10}{q.n:6d}{q.kd:10.4f}{q.kd_se:9.4f}{q.fd:9.2f}{q.coverage:10.2f}{q.precision:11.2f}{q.recall:8.2f}"
            for q in (measured.anew.quality if measured.anew else card.quality)
        ),
        *_measured_in(measured),
        "",
        f"experts   {usage.dead} dead of {sum(map(len, usage.load))}",
        f"time      {cost.milliseconds:.1f} ms for an image, one thread, {cost.machine}",
        f"memory    {cost.peak_mib:.1f} MiB at its peak, {cost.bare_mib:.1f} MiB of it before a model is loaded",
        f"sampler   {drawn.method}, {drawn.steps} steps, guidance {drawn.guidance:g}: {drawn.evaluations} network evaluations",
    ]
    if fid := measured.fid:
        rows.append(
            f"FID       {fid.fid:.2f}: {fid.n:,} images drawn, {fid.reference:,} of {measured.images}, {fid.dimensions} dimensions of "
            f"the network {fid.features_sha256}"
        )
    return "\n".join(rows)


def _measured_in(measured: Measured) -> list[str]:
    """Say in which feature spaces the figures are, where these are not the scorecard's or not the line's present ones."""
    if measured.anew:
        return [
            f"measured anew by `ferry remeasure` on data revision {measured.anew.data_rev[:12]}; the gate decided by the figures of the scorecard"
        ]
    if measured.current:
        return []
    return [
        "measured in feature spaces that the line had before `ferry remeasure`; do not compare with figures in the present ones"
    ]

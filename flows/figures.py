"""Measure what is registered: an FID as papers print it, and a line's versions in new feature spaces."""

from __future__ import annotations

import json
from pathlib import Path

from flows import progress
from flows.workspace import Workspace
from model.config import canonical_sha256, check_same_pictures
from model.errors import DataError
from registry.catalog import Subject
from registry.errors import CatalogError
from registry.figures import Figures, Measured, Remeasured, compared_with, figures, record, registered
from registry.seal import Seal


def measure(
    workspace: Workspace, version: Seal, file: Path | None = None, images: Path | None = None, n: int | None = None
) -> Measured:
    """Read a version's figures and, where a network is given, compute the FID of the images that it draws.

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
    known = registered(workspace, version)
    if file is None:
        return known
    from model import evaluate, features, score, session, versions
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
    if images is None:
        score.check_sound(dataset, own)
    network(evaluate.pure_noise(dataset.images[:2]))
    drawn = evaluate.draw(
        session.load(workspace.catalog.files(version, "bundle", kept)),
        evaluate.held_out_captions(dataset, n or known.scorecard.quality[0].n),
        known.scorecard.sampler,
        lambda done, total: progress.advance(f"draw {version.name}", done, total),
    )
    folder = images or own
    return known.model_copy(update={"fid": evaluate.published_fid(folder, drawn.images, file), "images": str(folder)})


def remeasure(workspace: Workspace, line: str, why: str, rev: str = "") -> Remeasured:
    """Fit new feature spaces on a data revision, measure in them, then let the line use them. Rerun a killed call; it resumes.

    If the line has these spaces already, only versions that were not measured in them are measured, such as a champion that
    somebody went back to.

    Args:
        workspace: where.
        line: whose spaces.
        why: reason, for the ledger.
        rev: Git revision of the data; "": the present one, and the data folder must not differ from it.

    Raises:
        WorkspaceError: there is no such line.
        ConfigError: its pictures have another format now than those of its champions.
        CatalogError: the line has no feature spaces yet.
        RevisionError: there is no such revision, or the folder was changed since.
        CheckpointError: the present spaces are missing or damaged.
        BusyError: a retraining runs.
    """
    from flows.steps import drawer, open_dataset, pull_data
    from model import features, score, versions
    from model.train import code_sha256

    settings, present = workspace.line(line), workspace.feature_spaces(line)
    with workspace.locked("retraining"):
        found = compared_with(workspace, workspace.subjects([line]))
        if not found and not present.is_file():
            raise CatalogError(f"{line} has no feature spaces yet; run `ferry retrain {line}`, which makes them")
        before = features.load(present)
        workspace.ledger.check_ready()
        if not rev:
            versions.check_clean(workspace.root, settings.data, line)
        data = versions.resolve(workspace.root, settings.data, line, rev or "HEAD")
        measured = [(version, workspace.catalog.files(version, "bundle", workspace.work / "champions")) for version in found]
        configuration = settings.combinations()[0][0]
        config = settings.config(configuration)
        for version, bundle in measured:
            table = json.loads((bundle / "sampler.json").read_bytes())["image"]
            check_same_pictures(version.name, (table["size"], table["channels"]), config)
        pull_data.fn(workspace, data)
        dataset = open_dataset(workspace, settings, configuration, data)
        fresh = features.unfinished(present, canonical_sha256([data.md5, config.sha256, code_sha256()])[:16])
        spaces = features.fit(dataset, fresh)
        new: list[tuple[Seal, Figures]] = []
        for version, bundle in measured:
            own = {q.space_sha256 for q in workspace.catalog.card(version).quality}
            if spaces.sha256 in own or figures(workspace, Subject.parse(version.subject), version.version, spaces.sha256):
                continue
            quality, asked = score.anew(spaces, dataset, drawer(workspace, version.name, bundle), settings.gate.images)
            made = Figures(
                version=version.version, weights=version.weights, spaces=spaces.sha256, before=before.sha256, data_rev=data.rev, data_md5=data.md5,
                quality=quality, asked=asked,
            )  # fmt: skip
            new.append((version, made))
        record(workspace, new, why)
        features.put_in_place(fresh, present, before.sha256)
        return Remeasured(
            line=line, spaces=list(spaces.names), spaces_sha256=spaces.sha256, before=before.sha256, data_rev=data.rev,
            versions=[version.name for version, _ in new],
        )  # fmt: skip

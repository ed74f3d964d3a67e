"""Gather the one-page report's figures from where they are kept: registry, ledger, repository, devices' reports."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from flows.promote import promotions
from flows.retrain import champion_files
from flows.workspace import Workspace
from model.scorecard import Scorecard
from model.train import CURVE
from ota.release import rollout
from registry import report
from registry.catalog import Subject, Version
from registry.errors import CatalogError

DECISIONS_SHOWN = 8


def write(workspace: Workspace, out: Path) -> Path:
    """Write the page; returns its path.

    Raises:
        CatalogError: there is no champion yet, so there is nothing to report.
    """
    models = _models(workspace)
    if not models:
        raise CatalogError("there is no champion yet; run `ferry retrain` first")
    prices = workspace.settings.prices
    page = report.render(
        report.Report(
            title="What the models cost and bring",
            made=datetime.now(UTC),
            models=models,
            releases=_releases(workspace),
            devices=_devices(workspace),
            decisions=_decisions(workspace),
            prices=report.Prices(
                currency=prices.currency, megabyte=prices.megabyte, training_hour=prices.training_hour, fleet=prices.fleet
            ),
            go_back=_go_back(workspace),
        )
    )
    fresh = out.with_name(f".{out.name}.tmp")
    fresh.write_text(page)
    fresh.replace(out)
    return out


def _subjects(workspace: Workspace) -> list[Subject]:
    return [
        Subject(line=name, configuration=configuration, variant=variant)
        for name, line in workspace.settings.lines.items()
        for configuration, variant in line.combinations()
    ]


def _models(workspace: Workspace) -> list[report.ModelRow]:
    rows = []
    for subject in _subjects(workspace):
        champion = workspace.catalog.champion(subject)
        if champion is None:
            continue
        files = champion_files(workspace, champion)
        card = Scorecard.model_validate_json(workspace.catalog.text(champion, "scorecard.json"))
        curve = json.loads((Path(files["checkpoint"]) / CURVE).read_bytes())
        new = [q for q in card.quality if q.split == "new"]
        rows.append(
            report.ModelRow(
                subject=str(subject),
                version=champion.number,
                tier=card.tier,
                data_rev=champion.tags["data.rev"],
                kd={q.space: q.kd for q in new},
                kd_before={c.space: c.champion_kd for c in card.comparisons if c.split == "new"},
                n=new[0].n,
                steps=card.sampler.steps,
                milliseconds=card.cost.milliseconds,
                train_seconds=curve[-1]["seconds"],
                reason=_why(workspace, champion),
                samples=workspace.catalog.data(champion, "pictures/samples.png"),
                captions=json.loads(workspace.catalog.text(champion, "pictures/samples.json")),
            )
        )
    return rows


def _releases(workspace: Workspace) -> list[report.ReleaseRow]:
    rows = []
    for name, line in workspace.settings.lines.items():
        for device_class in line.classes:
            policy = workspace.repository.policy(name, device_class)
            releases = workspace.repository.releases(name, device_class)
            if not releases:
                continue
            # The release that devices are meant to run: what the policy names, unless it was halted.
            wanted = [r for r in releases if policy and not policy.halt and r.manifest == policy.manifest]
            running = {r.active for r in workspace.fleet.devices().values() if r}
            fielded = [r for r in releases if r.manifest in running]
            shown = (wanted or fielded or releases)[-1]
            sizes = [d.size for d in workspace.repository.deltas(name, device_class) if d.target == shown.manifest]
            rows.append(
                report.ReleaseRow(
                    line=name,
                    device_class=device_class,
                    release=shown.seq,
                    version=shown.version,
                    full_bytes=shown.full_bytes,
                    delta_bytes=min(sizes) if sizes else None,
                    metadata_bytes=workspace.repository.metadata_bytes(),
                    rollout=rollout.describe(policy) if policy else "not rolled out",
                )
            )
    return rows


def _devices(workspace: Workspace) -> list[report.DeviceRow]:
    names = {
        r.manifest: f"{r.line} release {r.seq}"
        for name, line in workspace.settings.lines.items()
        for device_class in line.classes
        for r in workspace.repository.releases(name, device_class)
    }
    return [
        report.DeviceRow(
            device=device,
            release=names.get(last.active or "", "an unknown bundle") if last and last.active else "nothing",
            event=last.event if last else "silent",
            reason=last.reason if last else "has not reported yet",
            when=datetime.fromtimestamp(last.time, UTC) if last else None,
        )
        for device, last in workspace.fleet.devices().items()
    ]


def _decisions(workspace: Workspace) -> list[report.DecisionRow]:
    return [
        report.DecisionRow(number=e.number, when=e.when, who=e.who, kind=e.kind, subject=e.subject, why=e.why)
        for e in reversed(workspace.ledger.entries()[-DECISIONS_SHOWN:])
    ]


def _why(workspace: Workspace, champion: Version) -> str:
    """Why a champion is one, as the ledger has it."""
    made = [e for e in promotions(workspace, champion.subject) if e.facts["version"] == champion.number]
    if not made:
        return "by an alias set in MLflow, without a record"
    first = f"the gate was overruled: {made[0].why}" if made[0].facts["overruled"] else made[0].why
    return first if len(made) == 1 else f"{first}; again: {made[-1].why}"


def _go_back(workspace: Workspace) -> list[str]:
    """The commands that put every device back on the version before, for each device class."""
    commands = []
    for subject in _subjects(workspace):
        champion = workspace.catalog.champion(subject)
        was = [e.facts["version"] for e in promotions(workspace, subject, overruled=False)]
        earlier = [v for v in was if champion and v != champion.number]
        if not earlier:
            continue
        for device_class, settings in workspace.line(subject.line).classes.items():
            releases = workspace.repository.releases(subject.line, device_class)
            known = [r.seq for r in releases if r.version == earlier[-1]]
            if settings.configuration == subject.configuration and known:
                place = f"{subject.line}/{device_class}"
                commands.append(
                    f'ferry promote {subject} {earlier[-1]} --reason "going back" && ferry release {place} && '
                    f"ferry rollout start {place} --release {known[-1]} --revert --waves 100 --soak 0"
                )
    return commands

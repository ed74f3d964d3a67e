"""Gather the one-page report's figures from where they are kept: registry, ledger, repository, devices' reports, ferry.toml."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from flows.workspace import Workspace
from model import versions
from model.config import VARIANTS
from ota import output
from ota.release import fielded
from registry import columns, report
from registry.catalog import Subject
from registry.columns import Champion
from registry.cost import GpuTime
from registry.errors import CatalogError

DECISIONS_SHOWN = 6


def write(workspace: Workspace, out: Path, line: str | None = None) -> Path:
    """Write the page, and return its path.

    Args:
        workspace: what to report on.
        out: HTML file.
        line: only this line; None: all.

    Raises:
        WorkspaceError: there is no such line.
        CatalogError: there is no champion yet, so there is nothing to report, or an older ferry kept no hashes of one.
        SealError: MLflow holds other files of a champion than the gate saw.
        OperatorError: the page cannot be written there.
    """
    output.check_chosen(out, workspace.root / "report.html", records=workspace.records)
    workspace.fleet.collect(workspace.inbox)
    if line is not None:
        workspace.line(line)
    lines = [line] if line is not None else list(workspace.settings.lines)
    read = [columns.read(workspace, subject, workspace.work / "champions") for subject in workspace.subjects(lines)]
    champions = [champion for champion in read if champion]
    if not champions:
        raise CatalogError("there is no champion yet; run `ferry retrain LINE` first")
    decisions = columns.decisions(workspace.ledger.entries(), line)
    page = report.render(
        report.Report(
            title="What the models cost and bring",
            made=datetime.now(UTC),
            models=[_model(workspace, c, champions) for c in champions],
            variants=_variants(workspace, champions),
            releases=[row for name in lines for row in _releases(workspace, name, champions)],
            devices=_devices(workspace, lines),
            decisions=decisions[:DECISIONS_SHOWN],
            older=max(0, len(decisions) - DECISIONS_SHOWN),
            prices=workspace.settings.prices,
            updates=[row for c in champions if (row := columns.update_row(workspace, c.subject))],
            go_back=[command for c in champions for command in _go_back(workspace, c.subject)],
        )
    )
    with output.fresh(out) as file:
        file.write(page.encode())
    return out


def _model(workspace: Workspace, champion: Champion, champions: list[Champion]) -> report.ModelColumn:
    # If the history was rewritten, the report still shows the hash.
    message = versions.message(workspace.root, champion.version.data_rev) or "a revision that Git no longer has"
    if champion.version.adopted:
        message = f"adopted from {champion.version.adopted.source}"
    told, energy = _on_devices(workspace, champion.subject), _energy(workspace, champion.subject)
    return columns.column(workspace, champion, champions, message, told, energy)


def _variants(workspace: Workspace, champions: list[Champion]) -> list[report.VariantRow]:
    settings, ladder = workspace.settings, [*VARIANTS]
    ordered = sorted(champions, key=lambda c: (c.subject.line, c.subject.configuration, ladder.index(c.subject.variant)))
    subjects = [c.subject for c in champions]
    given = {s: settings.gpu_of(s.line, s.configuration, s.variant) for s in subjects}
    gpu = {subject: GpuTime(time.seconds, time.source) for subject, time in given.items() if time}
    return [
        columns.variant_row(
            workspace, c, champions, _on_devices(workspace, c.subject), _energy(workspace, c.subject), gpu, settings.prices
        )
        for c in ordered
    ]


def _on_devices(workspace: Workspace, subject: Subject) -> tuple[float, int] | None:
    """Return the median milliseconds of an image on devices, and the number of devices; None: no report has a time.

    Devices time only their default variant, so other variants have no figure.
    """
    classes = workspace.line(subject.line).classes.items()
    timed = [name for name, c in classes if (c.configuration, c.variants[0]) == (subject.configuration, subject.variant)]
    return fielded.median_time(workspace, subject.line, timed)


def _energy(workspace: Workspace, subject: Subject) -> report.Energy | None:
    """Return the energy of an image from ferry.toml, because devices' reports carry no joules; None: it has no figure."""
    given = workspace.settings.energy_of(subject.line, subject.configuration, subject.variant)
    return report.Energy(**given.model_dump()) if given else None


def _releases(workspace: Workspace, line: str, champions: list[Champion]) -> list[report.ReleaseRow]:
    rows = []
    for name, settings in workspace.line(line).classes.items():
        shown = fielded.meant_to_run(workspace, line, name)
        own = [c for c in champions if c.subject.line == line and c.subject.configuration == settings.configuration]
        default = next((c for c in own if c.subject.variant == settings.variants[0]), None)
        if shown is None or default is None:
            continue
        policy = workspace.repository.rolled_out(line, name)
        rows.append(
            columns.release_row(
                default,
                own,
                device_class=name,
                release=shown.seq,
                full_bytes=shown.full_bytes,
                deltas=[d.size for d in workspace.repository.deltas(line, name) if d.target == shown.manifest],
                metadata_bytes=workspace.repository.metadata_bytes(line, name),
                rollout=fielded.summary(workspace.repository, line, name) if policy else "not rolled out",
                on_devices=_on_devices(workspace, default.subject),
                energy=_energy(workspace, default.subject),
                prices=workspace.settings.prices,
                behind=workspace.repository.behind(shown),
            )
        )
    return rows


def _devices(workspace: Workspace, lines: list[str]) -> list[report.DeviceRow]:
    classes = [(name, device_class) for name, line in workspace.settings.lines.items() for device_class in line.classes]
    return [
        report.DeviceRow(
            device=device,
            release=runs,
            event=last.event if last else "silent",
            reason=last.reason if last else "has not reported yet",
            when=datetime.fromtimestamp(last.time, UTC) if last else None,
        )
        for device, runs, last in fielded.running(workspace, classes)
        if last is None or last.line in lines
    ]


def _go_back(workspace: Workspace, subject: Subject) -> list[str]:
    releases = {
        name: {release.version: release.seq for release in workspace.repository.releases(subject.line, name)}
        for name, settings in workspace.line(subject.line).classes.items()
        if settings.configuration == subject.configuration
    }
    return columns.go_back(workspace, subject, releases)

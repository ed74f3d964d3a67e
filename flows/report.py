"""Gather the one-page report's figures from where they are kept: registry, ledger, repository, devices' reports, ferry.toml."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from statistics import median

from PIL import Image

from flows.rate import verdicts
from flows.remeasure import figures
from flows.steps import champion_files
from flows.workspace import Workspace
from model import versions
from model.drawing import GRID_COLUMNS
from model.errors import RevisionError
from model.scorecard import Scorecard
from model.train import CURVE
from ota import output
from ota.manifest import DeviceReport
from ota.release import rollout
from ota.release.repository import Release
from registry import cost, report
from registry.catalog import Subject
from registry.champions import champion_of, judged, promotions, seals
from registry.errors import CatalogError
from registry.promotion import about, kind_of
from registry.seal import Seal

DECISIONS_SHOWN = 6
SAMPLE_ROWS, SAMPLE_COLUMNS = 3, 5  # captions of a line, and images for each
REAL = "pictures/real.png"


@dataclass(frozen=True)
class _Champion:
    """A champion, with the figures and pictures that its run in MLflow holds."""

    subject: Subject
    version: Seal
    card: Scorecard
    train_seconds: float
    grid: bytes
    real: bytes | None
    captions: list[str]


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
    output.check(out)
    if line is not None:
        workspace.line(line)
    lines = [line] if line is not None else list(workspace.settings.lines)
    champions = [c for name in lines for c in _champions(workspace, name)]
    if not champions:
        raise CatalogError("there is no champion yet; run `ferry retrain` first")
    decisions = _decisions(workspace, line)
    page = report.render(
        report.Report(
            title="What the models cost and bring",
            made=datetime.now(UTC),
            models=[_model(workspace, c, champions) for c in champions],
            releases=[row for name in lines for row in _releases(workspace, name, champions)],
            devices=_devices(workspace, lines),
            decisions=decisions[-DECISIONS_SHOWN:][::-1],
            older=max(0, len(decisions) - DECISIONS_SHOWN),
            prices=workspace.settings.prices,
            go_back=_go_back(workspace, [c.subject for c in champions]),
        )
    )
    with output.fresh(out) as file:
        file.write(page.encode())
    return out


def _champions(workspace: Workspace, line: str) -> list[_Champion]:
    found = []
    for configuration, variant in workspace.line(line).combinations():
        subject = Subject(line=line, configuration=configuration, variant=variant)
        version = champion_of(workspace, subject)
        if version is None:
            continue
        files = champion_files(workspace, version)
        found.append(
            _Champion(
                subject=subject,
                version=version,
                card=workspace.catalog.card(version),
                train_seconds=json.loads((files.checkpoint / CURVE).read_bytes())[-1]["seconds"],
                grid=workspace.catalog.data(version, "pictures/samples.png"),
                real=workspace.catalog.data(version, REAL) if REAL in version.files else None,
                captions=json.loads(workspace.catalog.data(version, "pictures/samples.json")),
            )
        )
    return found


def _model(workspace: Workspace, c: _Champion, champions: list[_Champion]) -> report.ModelColumn:
    card, subject = c.card, c.subject
    new, anew = [q for q in card.quality if q.split == "new"], figures(workspace, subject, c.version.version)
    compared = [row for row in card.comparisons if row.split == "new" and row.against == "champion"]
    weights = {s.weights: s.version for s in seals(workspace, subject)}
    samples, real, captions = _samples(c, [other for other in champions if other.subject.line == subject.line])
    return report.ModelColumn(
        subject=str(subject),
        variant=subject.variant,
        version=c.version.version,
        tier=card.tier,
        data_rev=c.version.data_rev,
        data_message=_message(workspace, c.version.data_rev),
        distance=report.distance(anew.quality if anew else new),
        change=None if anew else report.change(new, compared),  # the comparison was measured in the previous spaces
        replaced=weights.get(compared[0].against_sha256) if compared else None,
        reason=_why(workspace, c.version),
        steps=card.sampler.steps,
        evaluations=card.sampler.evaluations,
        milliseconds=card.cost.milliseconds,
        on_devices=_on_devices(workspace, subject),
        peak_mib=card.cost.peak_mib,
        energy=_energy(workspace, subject),
        train_seconds=c.train_seconds,
        samples=samples,
        real=real,
        captions=captions,
        worst=report.worst(anew.asked if anew else card.asked),
        refused=_refused(workspace, c.version),
        anew=anew.data_rev if anew else None,
        ratings=[v.text for v in verdicts(workspace, str(subject)) if v.challenger == c.version.version],
    )


def _samples(c: _Champion, same_line: list[_Champion]) -> tuple[bytes, bytes | None, list[str]]:
    """Choose a champion's images, and real ones, of captions that all champions of its line drew, or else of its own captions."""
    shared = reduce(lambda known, other: [caption for caption in known if caption in other.captions], same_line, c.captions)
    rows = (shared or c.captions)[:SAMPLE_ROWS]
    chosen = [c.captions.index(caption) for caption in rows]
    return _rows(c.grid, chosen), _rows(c.real, chosen) if c.real else None, rows


def _rows(picture: bytes, chosen: list[int]) -> bytes:
    """Cut the chosen rows out of a grid of images, and the first columns of each."""
    with Image.open(BytesIO(picture)) as grid:
        cell = grid.width // GRID_COLUMNS
        sheet = Image.new(grid.mode, (SAMPLE_COLUMNS * cell, len(chosen) * cell))
        for y, row in enumerate(chosen):
            sheet.paste(grid.crop((0, row * cell, sheet.width, (row + 1) * cell)), (0, y * cell))
    made = BytesIO()
    sheet.save(made, "PNG", optimize=True)
    return made.getvalue()


def _message(workspace: Workspace, rev: str) -> str:
    """Return the message with which a data revision was recorded (its first line)."""
    try:
        return versions.git(workspace.root, "log", "-1", "--format=%s", rev)
    except RevisionError:  # the history was rewritten; the report still shows the hash
        return "a revision that Git no longer has"


def _fielded(workspace: Workspace, line: str, device_class: str) -> Release | None:
    """Find the release that devices of a class are meant to run; None: there is none.

    This is the release that the policy names, unless it was halted; otherwise the newest one that a device runs; otherwise the
    newest one.
    """
    releases = workspace.repository.releases(line, device_class)
    policy = workspace.repository.policy(line, device_class)
    wanted = [r for r in releases if policy and not policy.halt and r.manifest == policy.manifest]
    running = {r.active for r in workspace.fleet.devices().values() if r}
    fielded = [r for r in releases if r.manifest in running]
    return next(reversed(wanted or fielded or releases), None)


def _on_devices(workspace: Workspace, subject: Subject) -> tuple[float, int] | None:
    """Return the median milliseconds of an image on devices, and the number of devices; None: no report has a time.

    Reports on the fielded release count, the last one of each device. Devices time only their default variant, so other variants
    have no figure.
    """
    told: dict[str, DeviceReport] = {}
    for name, settings in workspace.line(subject.line).classes.items():
        shown = _fielded(workspace, subject.line, name)
        if shown and (settings.configuration, settings.variants[0]) == (subject.configuration, subject.variant):
            told |= {r.device: r for r in workspace.fleet.reports() if r.milliseconds and r.manifest == shown.manifest}
    return (median(r.milliseconds for r in told.values()), len(told)) if told else None


def _energy(workspace: Workspace, subject: Subject) -> report.Energy | None:
    """Return the energy of an image from ferry.toml, for the first class that has a figure; devices' reports carry no joules."""
    for name, settings in workspace.line(subject.line).classes.items():
        given = workspace.settings.energy.get(subject.line, {}).get(name, {}).get(subject.variant)
        if given and settings.configuration == subject.configuration:
            return report.Energy(**given.model_dump())
    return None


def _releases(workspace: Workspace, line: str, champions: list[_Champion]) -> list[report.ReleaseRow]:
    rows = []
    for name, settings in workspace.line(line).classes.items():
        shown = _fielded(workspace, line, name)
        own = [c for c in champions if c.subject.line == line and c.subject.configuration == settings.configuration]
        default = next((c for c in own if c.subject.variant == settings.variants[0]), None)
        if shown is None or default is None:
            continue
        policy = workspace.repository.policy(line, name)
        sizes = [d.size for d in workspace.repository.deltas(line, name) if d.target == shown.manifest]
        metadata = workspace.repository.metadata_bytes()
        energy, told = _energy(workspace, default.subject), _on_devices(workspace, default.subject)
        work = cost.Work(
            joules=energy.joules if energy else None,
            update_bytes=(min(sizes) if sizes else shown.full_bytes) + metadata,
            training_seconds=sum(c.train_seconds for c in own),
        )
        rows.append(
            report.ReleaseRow(
                line=line,
                device_class=name,
                release=shown.seq,
                full_bytes=shown.full_bytes,
                delta_bytes=min(sizes) if sizes else None,
                metadata_bytes=metadata,
                rollout=rollout.describe(policy) if policy else "not rolled out",
                milliseconds=told[0] if told else default.card.cost.milliseconds,
                costs=cost.yearly(work, workspace.settings.prices),
            )
        )
    return rows


def _devices(workspace: Workspace, lines: list[str]) -> list[report.DeviceRow]:
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
        if last is None or last.line in lines
    ]


def _decisions(workspace: Workspace, line: str | None) -> list[report.DecisionRow]:
    entries = [e for e in workspace.ledger.entries() if line is None or e.subject.split("/")[0] == line]
    # One `ferry remeasure` makes many entries with one reason; the last of them stands for all.
    entries = [e for e, after in zip_longest(entries, entries[1:]) if e.kind != "measured" or after is None or after.why != e.why]
    return [
        report.DecisionRow(number=e.number, when=e.when, who=e.who, kind=kind_of(e), subject=about(e), why=e.why) for e in entries
    ]


def _why(workspace: Workspace, champion: Seal) -> str:
    """Say why a champion was promoted, according to the ledger; if more than once, also why the last time."""
    made = [e for e in promotions(workspace, Subject.parse(champion.subject)) if e.facts["version"] == champion.version]
    first = f"the gate was overruled: {made[0].why}" if made[0].facts["overruled"] else made[0].why
    return first if len(made) == 1 else f"{first}; again: {made[-1].why}"


def _refused(workspace: Workspace, champion: Seal) -> str | None:
    """Return what the gate said of a champion whose promotions all overruled the gate; None: at least one of them did not."""
    subject = Subject.parse(champion.subject)
    made = [e for e in promotions(workspace, subject) if e.facts["version"] == champion.version]
    said = judged(workspace, subject).get(champion.version)
    return said.why if said and all(e.facts["overruled"] for e in made) else None


def _go_back(workspace: Workspace, subjects: list[Subject]) -> list[str]:
    """List the commands that go back to the previous version, for each subject and device class.

    Where no release holds that version, the command makes it champion only.
    """
    commands: list[str] = []
    for subject in subjects:
        champion = champion_of(workspace, subject)
        was = [e.facts["version"] for e in promotions(workspace, subject, overruled=False)]
        earlier = [v for v in was if champion and v != champion.version]
        if not earlier:
            continue
        found = len(commands)
        for device_class, settings in workspace.line(subject.line).classes.items():
            releases = workspace.repository.releases(subject.line, device_class)
            known = [r.seq for r in releases if r.version == earlier[-1]]
            if settings.configuration == subject.configuration and known:
                place = f"{subject.line}/{device_class}"
                commands.append(
                    f'ferry promote {subject} {earlier[-1]} --reason "going back" && ferry release {place} && '
                    f"ferry rollout start {place} --release {known[-1]} --revert --waves 100 --soak 0"
                )
        if len(commands) == found:  # no device ever had it
            commands.append(f'ferry rollback {subject} --to {earlier[-1]} --reason "going back"')
    return commands

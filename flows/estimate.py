"""Say what a retraining would train, how long that takes and how much it writes (`ferry retrain --dry-run`); train nothing.

A step's time is taken from the champion's own training on this kind of hardware, otherwise it is measured: some steps of an
untrained network on noise, whose result is thrown away.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from flows import budget, overrides
from flows.overrides import Overrides
from flows.retrain import comes_from, incumbent_of, is_current
from flows.settings import Line, Training
from flows.workspace import Workspace
from model import train, versions
from model.config import ModelConfig, PrecisionName
from model.diffusion import add_noise
from model.hardware import Hardware
from model.network import Network
from model.scorecard import DataVersion
from model.students import SUBSTEPS
from registry.catalog import Subject

STORED = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes of a weight
MEASURED_STEPS, MEASURED_BATCH = 3, 8
COPIES = (
    4  # of the weights in float32 while it trains: the checkpoint, and the state to resume from (weights, average, two moments)
)


@dataclass(frozen=True)
class Row:
    """What would happen to one model on one data revision."""

    subject: str
    data_rev: str
    action: str
    steps: int = 0
    seconds: float = 0.0
    basis: str = ""
    bundle_bytes: int = 0
    disk_bytes: int = 0

    @property
    def text(self) -> str:
        """Return one line for people."""
        if not self.steps:
            return f"{self.subject} on {self.data_rev[:12]}: {self.action}"
        return (
            f"{self.subject} on {self.data_rev[:12]}: {self.action}, {self.steps:,} steps, about {_span(self.seconds)} ({self.basis}); "
            f"{self.bundle_bytes:,} bytes of weights in a bundle, {self.disk_bytes:,} bytes on this machine"
        )


@dataclass(frozen=True)
class Estimate:
    """Rows of an estimate, and the bytes of data that must be fetched."""

    rows: list[Row]
    fetched: int
    notes: list[str] = field(default_factory=list)
    """What a person should know of the budget, in sentences."""

    @property
    def value(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "models": [vars(row) for row in self.rows], "seconds": round(sum(row.seconds for row in self.rows), 1),
            "disk_bytes": sum(row.disk_bytes for row in self.rows) + self.fetched, "data_bytes": self.fetched, "notes": self.notes,
        }  # fmt: skip

    @property
    def text(self) -> str:
        """Return a text for people."""
        total = self.value
        lines = [*(row.text for row in self.rows), *self.notes]
        lines.append(
            f"nothing was trained; training takes about {_span(total['seconds'])} in all, drawing and evaluating come on top; it writes about "
            f"{total['disk_bytes']:,} bytes, {self.fetched:,} of them data"
        )
        return "\n".join(lines)


def estimate(workspace: Workspace, line: str, revisions: list[str], wanted: Overrides) -> Estimate:
    """Estimate the retrainings of a line on data revisions, one after another.

    Args:
        workspace: workspace of the line.
        line: whose models.
        revisions: Git revisions of the data, in the order of their retrainings.
        wanted: what differs from ferry.toml.

    Raises:
        RevisionError: a revision holds no data.
        BudgetError: the budget is smaller than what an update costs without any weights.
        CatalogError, StoreError, SealError: the champion cannot be read.
    """
    overrides.apply(workspace, line, wanted)
    settings = workspace.line(line)
    notes = budget.check(workspace, line)
    rows: list[Row] = []
    measured: dict[ModelConfig, float] = {}
    found = [versions.resolve(workspace.root, settings.data, line, rev) for rev in revisions]
    for place, data in enumerate(found):
        retrained: set[Subject] = set()
        for subject in workspace.subjects([line]):
            beside = {str(other.variant) for other in retrained if other.configuration == subject.configuration}
            row = _row(workspace, subject, data, first=place == 0, trained=beside, measured=measured)
            rows.append(row)
            if row.steps:
                retrained.add(subject)
    lacking = {data.md5: data.bytes for data in found if not (workspace.work / "data" / data.md5.removesuffix(".dir")).is_dir()}
    return Estimate(rows, sum(lacking.values()), notes)


def _row(
    workspace: Workspace,
    subject: Subject,
    data: DataVersion,
    *,
    first: bool,
    trained: set[str],
    measured: dict[ModelConfig, float],
) -> Row:
    line = workspace.line(data.line)
    champion, config = incumbent_of(workspace, subject), line.config(subject.configuration)
    before = train.load_checkpoint(champion.files.checkpoint) if champion else None
    derived = subject.variant != "full"
    if first and before and "full" not in trained and _is_up_to_date(workspace, subject, data, before):
        return Row(str(subject), data.rev, "unchanged, nothing to train")
    if derived and line.sources(subject.variant)[0] == "table":
        return Row(str(subject), data.rev, "draws with the weights of full, nothing to train unless the gate refuses that")
    way = line.distillation if derived else line.retraining if before and before.lineage.config == config else line.training
    known = _known(before, line, way) if before and before.lineage.config == config else None
    if known is None and config not in measured:
        measured[config] = measure(config)
    seconds = (known if known is not None else measured[config] * way.batch) * way.steps
    basis = f"measured on {MEASURED_STEPS} steps of an untrained network"
    if known is not None:
        basis = "as its champion took"
    if derived:  # a third of a training step's time is the way forward, and a trajectory takes two evaluations a step
        each = (known / way.batch if known is not None else measured[config]) / 3
        seconds += line.distillation.trajectories * 2 * SUBSTEPS * each
        basis += ", and its trajectories"
    weights = sum(p.numel() for p in Network(config).parameters())
    bundle = weights * STORED[line.precision(subject.configuration)]
    disk = weights * 4 * COPIES + 2 * bundle + weights * 4  # the export here and in MLflow, and the checkpoint in MLflow
    if line.options(way, line.precision(subject.configuration)).method:
        disk += 3 * weights * 4  # the master: in the checkpoints of the training and of the update, and in MLflow
    action = "taught by full" if derived else "trained from the champion" if way is line.retraining else "trained from noise"
    return Row(str(subject), data.rev, action, way.steps, round(seconds, 1), basis, bundle, disk)


def _is_up_to_date(workspace: Workspace, subject: Subject, data: DataVersion, before: train.Checkpoint) -> bool:
    """Check whether a retraining would find a champion unchanged, if it does not replace its `full`."""
    wanted = overrides.current(workspace, data.line)
    if subject.variant == "full":
        return any(is_current(before.lineage, settings, data) for settings in wanted)
    full = incumbent_of(workspace, subject.model_copy(update={"variant": "full"}))
    return full is not None and comes_from(before, train.load_checkpoint(full.files.checkpoint), wanted)


def _known(before: train.Checkpoint, line: Line, way: Training) -> float | None:
    """Return the seconds that a step took in the champion's training, scaled to the batch; None: that cannot be compared."""
    lineage = before.lineage
    if lineage.hardware != Hardware.here().name:
        return None
    timed = [row for row in json.loads((before.folder / train.CURVE).read_bytes()) if row.get("seconds")]
    made = {"steps": lineage.steps, "seed": lineage.seed}  # these may have been overridden; the batch is known by the hash only
    for past in (line.retraining, line.training, line.distillation):
        known = {line.options(past, stored).model_copy(update=made).sha256 for stored in get_args(PrecisionName)}
        if timed and lineage.training_sha256 in known:
            return float(timed[-1]["seconds"] / timed[-1]["step"] * way.batch / past.batch)
    return None


def measure(config: ModelConfig) -> float:
    """Measure the seconds of a training step for one image: forward and backward through an untrained network, on noise."""
    hardware = Hardware.here()
    network = Network(config).to(hardware.device)
    shape = (MEASURED_BATCH, config.channels, config.image_size, config.image_size)
    images, noise = torch.randn(shape), torch.randn(shape)
    t = torch.rand(MEASURED_BATCH)
    ids = torch.zeros((MEASURED_BATCH, config.text_length), dtype=torch.long)
    x, _ = add_noise(images, noise, t)
    given = [tensor.to(hardware.device) for tensor in (x, t, t, ids)]
    began = 0.0
    for step in range(MEASURED_STEPS + 1):
        if step == 1:  # the first step warms up
            began = time.monotonic()
        network(*given)[0].square().mean().backward()
        network.zero_grad()
    return (time.monotonic() - began) / MEASURED_STEPS / MEASURED_BATCH


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

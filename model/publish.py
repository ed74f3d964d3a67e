"""Make the weights that are fielded from a master that was trained; what the update cannot carry stays in the master.

    >>> trained = train(config, dataset, data, options, work / "run", parent=fielded)  # options.method is set: a master
    >>> publication = Publication.of(trained, fielded, "bfloat16")  # slow: once
    >>> for level in (0.03, 0.08):
    ...     made = publication.write(level, work / f"level-{level}")  # fast: a checkpoint each

A checkpoint's folder then has `weights.safetensors` (what devices have), `master.safetensors`, `statistics.safetensors` and
`update.safetensors` (the claims, for the codec).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from model.config import PrecisionName
from model.data import Dataset
from model.errors import CheckpointError
from model.gradients import STATISTICS, load_statistics
from model.network import Network
from model.polish import STEPS, polish
from model.shared_numbers import seed_of
from model.storage import fielded as as_fielded
from model.storage import named, parts
from model.students import is_thin
from model.train import CURVE, LINEAGE, MASTER, WEIGHTS, Checkpoint, Objective, TrainOptions, load_checkpoint, write_safely
from model.update import FACTORS, Approximation, MethodName, Update, write_factors


@dataclass(frozen=True)
class Publication:
    """An update of fielded weights, of which checkpoints at several levels can be made."""

    trained: Checkpoint
    approximation: Approximation

    @classmethod
    def of(
        cls,
        trained: Checkpoint,
        fielded: Checkpoint,
        stored: PrecisionName,
        method: MethodName = "lowrank",
        *,
        full: Checkpoint | None = None,
    ) -> Publication:
        """Prepare an update.

        Args:
            trained: checkpoint of a master, from `train` with a method.
            fielded: its parent, which devices have.
            stored: precision of the devices' files.
            method: row of `model.update.METHODS`.
            full: for a thin student, the published `full` whose weights it has wherever it trains nothing.

        Raises:
            CheckpointError: the master was trained from other weights than the fielded ones, or a file is damaged.
        """
        lineage = trained.lineage
        if lineage.parent != fielded.weights_sha256:
            raise CheckpointError(
                f"{trained.folder} was trained from the weights {str(lineage.parent)[:12]}, but {fielded.weights_sha256[:12]} are fielded "
                "(rolled back since?); train again from these"
            )
        if lineage.teacher != (full.weights_sha256 if full else None):
            raise CheckpointError(f"{trained.folder} was taught by another full than the one given; teach the student again")
        base = fielded.network()
        thin = None
        if full and lineage.thin:
            thin = _thin_names(base)
            frozen = named(full.network())
            for name, weight in named(base).items():
                if name not in thin:
                    weight.copy_(frozen[name])
        approximation = Approximation.of(
            trained.network(), base, load_statistics(trained.folder), stored, method, seed=seed_of(fielded.weights_sha256),
            only=lambda name: thin is None or name in thin,
        )  # fmt: skip
        return cls(trained, approximation)

    def write(self, level: float, out: Path) -> Checkpoint:
        """Write the checkpoint of the fielded weights at a level, into a folder that is created if missing."""
        return write_published(self.trained, self.approximation.at(level), out)

    def write_polished(
        self, level: float, out: Path, dataset: Dataset, options: TrainOptions, *, steps: int = STEPS, objective: Objective | None = None
    ) -> Checkpoint:  # fmt: skip
        """Write the checkpoint at a level after some more training steps on the rounded update; its bytes hardly change.

        Args:
            level: of the method.
            out: folder of the new checkpoint; created if missing.
            dataset: what the master learnt from.
            options: with which it was trained.
            steps: number of steps.
            objective: with which it was trained; flow matching by default.
        """
        update = polish(self.approximation, self.approximation.at(level), dataset, options, steps=steps, objective=objective)
        return write_published(self.trained, update, out, steps)


def publish(
    trained: Checkpoint, fielded: Checkpoint, level: float, stored: PrecisionName, out: Path, method: MethodName = "lowrank"
) -> Checkpoint:
    """Make the checkpoint of the fielded weights at one level; see `Publication` for several.

    Raises:
        CheckpointError: the master was trained from other weights than the fielded ones, or a file is damaged.
    """
    return Publication.of(trained, fielded, stored, method).write(level, out)


def publish_first(trained: Checkpoint, stored: PrecisionName, out: Path) -> Checkpoint:
    """Make the checkpoint of a first version, of which devices have nothing yet: the master rounded to the stored precision.

    Args:
        trained: checkpoint of a master, trained from noise.
        stored: precision of the devices' files.
        out: folder of the new checkpoint; created if missing.
    """
    network = trained.network()
    weights = {name: as_fielded(name, weight, stored) for name, weight in named(network).items()}
    return write_published(trained, Update(network.config, stored, "full", 0.0, weights, {}), out)


def write_published(trained: Checkpoint, update: Update, out: Path, polished: int | None = None) -> Checkpoint:
    """Write the checkpoint of an update: the fielded weights, their master, its statistics, and the claims.

    Args:
        trained: checkpoint of the master.
        update: what was made of it.
        out: folder of the new checkpoint; created if missing.
        polished: training steps that followed on the rounded update.
    """
    level = None if update.method == "full" else update.level
    made = {"master": trained.weights_sha256, "method": update.method, "level": level, "polished": polished}
    out.mkdir(parents=True, exist_ok=True)
    (out / LINEAGE).unlink(missing_ok=True)  # an old lineage must never stand beside new weights
    write_safely(out / WEIGHTS, update.network().state_dict())
    shutil.copyfile(trained.folder / WEIGHTS, out / MASTER)
    for name in (STATISTICS, CURVE):
        if (trained.folder / name).is_file():
            shutil.copyfile(trained.folder / name, out / name)
    write_factors(out / FACTORS, update)
    (out / LINEAGE).write_text(trained.lineage.model_copy(update=made).model_dump_json(indent=1))
    return load_checkpoint(out)


def _thin_names(network: Network) -> set[str]:
    """List the tensors of the weight file that a thin student trains."""
    return {own for name, weight in network.named_parameters() if is_thin(name) for own, _ in parts(name, weight)}

"""Train a network: a loop one can read, the same weights for the same inputs, and no work lost when it is killed.

    >>> checkpoint = train(config, dataset, data, TrainOptions(steps=500), out=Path("work/run"))

Every step is a function of (seed, step) and of the state before it, so a run resumed from its last saved state ends in
the same bits as one that was never disturbed, on the same machine and number of threads. Checkpoints are safetensors
and JSON, never pickles.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig, VariantName
from model.data import Dataset, mix
from model.diffusion import add_noise, logit_normal
from model.errors import CheckpointError, TrainingError
from model.network import Network
from model.scorecard import DataVersion, Frozen, Lineage, Sha256

WEIGHTS = "weights.safetensors"
LINEAGE = "lineage.json"
RESUME = "resume.safetensors"
CURVE = "curve.json"
CURVE_EVERY = 10  # steps between two points of the recorded curve

OnStep = Callable[[int, dict[str, float]], None]
"""Called after every step with its number, from 1, and its figures: loss, learning rate, the busiest expert's share."""


class TrainOptions(Frozen):
    """How to train; every field changes the result."""

    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=20, ge=0, description="steps of linear rise")
    decay_from: float = Field(default=0.6, ge=0, le=1, description="share of the run after which the rate falls to 0")
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    ema: float = Field(default=0.995, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, le=1, description="share of captions hidden, for guidance")
    update_grid: float = Field(
        default=0.0, ge=0, description="with a parent: the update of each tensor is rounded to multiples of its rms times this"
    )
    seed: int = 0
    save_every: int = Field(default=100, ge=1, description="steps between two states from which a run can resume")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with trained weights (the moving average) and their lineage."""

    folder: Path
    lineage: Lineage
    weights_sha256: Sha256

    def network(self) -> Network:
        """The network with these weights, in evaluation mode.

        Raises:
            CheckpointError: the weights are damaged or of another shape.
        """
        network = Network(self.lineage.config)
        load_weights(network, self.folder / WEIGHTS)
        return network.eval()


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint's folder.

    Raises:
        CheckpointError: it is not one, is truncated, or was written by a newer version.
    """
    try:
        lineage = Lineage.model_validate_json((folder / LINEAGE).read_bytes())
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of this version; name a folder that `train` wrote") from error
    return Checkpoint(folder, lineage, digest)


def load_weights(network: Network, path: Path) -> None:
    """Fill a network from a safetensors file.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not this network's.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors; it is damaged or truncated, fetch it again") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds the weights of another network than {network.config.tier}/{network.config.configuration} at "
            f"{network.config.image_size} pixels; use the configuration it was trained with"
        ) from error


def learning_rate(options: TrainOptions, step: int) -> float:
    """The rate of step `step` (from 0): linear rise, plateau, linear fall to 0."""
    rise = min(1.0, (step + 1) / (options.warmup + 1))
    left = (options.steps - step) / max(1.0, options.steps * (1 - options.decay_from))
    return options.learning_rate * rise * min(1.0, left)


def train(
    config: ModelConfig,
    dataset: Dataset,
    data: DataVersion,
    options: TrainOptions,
    out: Path,
    *,
    variant: VariantName = "full",
    parent: Checkpoint | None = None,
    on_step: OnStep | None = None,
) -> Checkpoint:
    """Train one network and write its checkpoint; a killed call, repeated, continues where its last state was saved.

    Args:
        config: the network's shape.
        dataset: what to learn from.
        data: the revision that the dataset was decoded from, for the lineage.
        options: how to train.
        out: folder of the checkpoint; made when missing.
        variant: what the weights are meant for.
        parent: start from these weights instead of from noise (warm start).
        on_step: called after each step; whatever it raises ends the run, which can be resumed.

    Raises:
        TrainingError: the loss is not finite; the last saved state is kept.
        CheckpointError: the parent has another shape.
    """
    lineage = Lineage(
        data=data, config=config, variant=variant, training_sha256=options.sha256, code=code_sha256(), seed=options.seed,
        parent=parent.weights_sha256 if parent else None, steps=options.steps, items=len(dataset.training()),
        torch=torch.__version__,
    )  # fmt: skip
    try:
        done = load_checkpoint(out)
        if done.lineage == lineage:
            return done  # trained before, from the same inputs
    except CheckpointError:
        out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(mix(options.seed, 0))
    network = Network(config)
    if parent:
        load_weights(network, parent.folder / WEIGHTS)
    average = copy.deepcopy(network)
    run = _Run(network, average, options)
    first = run.resume(out / RESUME, lineage.sha256)
    began = time.monotonic() - (run.curve[-1]["seconds"] if run.curve else 0.0)
    for step in range(first, options.steps):
        figures = run.step(dataset, step)
        if step % CURVE_EVERY == 0 or step + 1 == options.steps:
            run.curve.append({"step": step + 1, "seconds": time.monotonic() - began, **figures})
        if not math.isfinite(figures["loss"]):
            raise TrainingError(
                f"the loss of step {step + 1} is not finite; the last saved state is kept, train again with a learning rate below "
                f"{options.learning_rate:g}"
            )
        if (step + 1) % options.save_every == 0 and step + 1 < options.steps:
            run.save(out / RESUME, lineage.sha256, step + 1)
        if on_step:
            on_step(step + 1, figures)
    if parent and options.update_grid:
        round_update(average, parent.network(), options.update_grid)
    write_safely(out / WEIGHTS, average.state_dict())
    (out / CURVE).write_text(json.dumps(run.curve))
    (out / LINEAGE).write_text(lineage.model_dump_json(indent=1))
    (out / RESUME).unlink(missing_ok=True)
    return load_checkpoint(out)


def round_update(network: Network, parent: Network, grid: float) -> None:
    """Round what training changed, in place, to multiples of `grid` times the root mean square of each tensor's change.

    Most small changes become none, and the delta to the parent shrinks with the entropy of what is left; what is evaluated and
    fielded is the rounded model, so the gate sees the price.
    """
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), parent.parameters(), strict=True):
            change = ours - theirs
            step = grid * change.square().mean().sqrt()
            if step > 0:
                ours.copy_(theirs + torch.round(change / step) * step)


class _Run:
    """The state of a training run: weights, their moving average, the optimizer's moments."""

    def __init__(self, network: Network, average: Network, options: TrainOptions) -> None:
        self.network, self.average, self.options = network.train(), average, options
        self.curve: list[dict[str, float]] = []
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        # Gains, biases and modulation tables are not pulled towards zero.
        spared = ("gain", "bias", "mod")
        decayed = [p for name, p in network.named_parameters() if p.requires_grad and not name.endswith(spared)]
        ids = {id(p) for p in decayed}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": [p for p in self.parameters if id(p) not in ids], "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def step(self, dataset: Dataset, step: int) -> dict[str, float]:
        """One step of gradient descent."""
        o = self.options
        images, ids = dataset.batch(o.seed, step, o.batch)
        generator = torch.Generator().manual_seed(mix(o.seed, step, 2))
        ids[torch.rand(o.batch, generator=generator) < o.caption_dropout] = 0
        t = logit_normal(o.batch, generator)
        noise = torch.randn(images.shape, generator=generator)
        x, target = add_noise(images, noise, t)
        v, load = self.network(x, t, t, ids)
        loss = (v - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, o.clip)
        rate = learning_rate(o, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(o.ema, (step + 1) / (step + 10))  # a short run must not average in its own beginning
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        share = load.detach().mean(dim=0)
        busiest = float((share / share.sum(dim=1, keepdim=True)).max())
        return {"loss": float(loss.detach()), "learning_rate": rate, "busiest_expert": busiest}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        named = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        named |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for k, v in self.optimizer.state[parameter].items():
                named[f"moment.{i}.{k}"] = v
        return named

    def save(self, path: Path, identity: Sha256, step: int) -> None:
        """Write the state so that `resume` can go on after `step` steps."""
        write_safely(path, self.tensors(), {"identity": identity, "step": str(step), "curve": json.dumps(self.curve)})

    def resume(self, path: Path, identity: Sha256) -> int:
        """Load a saved state of the same run; returns the number of steps done. No or another run's state: 0."""
        from safetensors import safe_open

        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                meta: dict[str, Any] = file.metadata() or {}
            if meta.get("identity") != identity:
                return 0
            saved = load_file(path)
            step, self.curve = int(meta["step"]), json.loads(meta["curve"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return 0  # torn by whatever ended the run; starting over gives the same weights
        self.network.load_state_dict({k.removeprefix("network."): v for k, v in saved.items() if k.startswith("network.")})
        self.average.load_state_dict({k.removeprefix("average."): v for k, v in saved.items() if k.startswith("average.")})
        for i, parameter in enumerate(self.parameters):
            prefix = f"moment.{i}."
            self.optimizer.state[parameter] = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        return step


def write_safely(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors beside `path` and rename: the file there is whole, old or new."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, fresh, metadata)
    fresh.replace(path)


def code_sha256() -> Sha256:
    """Hash of the source files of `model`: two checkpoints with the same one were made by the same code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

"""Train a network: a readable loop, the same weights for the same inputs, and a killed run resumes from its last saved state.

    >>> checkpoint = train(config, dataset, data, TrainOptions(steps=500), out=Path("work/run"))

Every step depends only on (seed, step) and the state before it. So a resumed run ends in the same bits as an uninterrupted
one, on the same machine with the same number of threads. Checkpoints are safetensors and JSON, never pickles. A GPU is used if
there is one; the bits are then not guaranteed, see `model.hardware`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig, PrecisionName, VariantName
from model.data import Dataset, mix
from model.diffusion import add_noise, logit_normal
from model.errors import CheckpointError, ConfigError, TrainingError
from model.gradients import STATISTICS, Gradients
from model.grid import Grid
from model.hardware import Hardware
from model.network import Network
from model.scorecard import DataVersion, Frozen, Lineage, Sampler, Sha256
from model.shared_numbers import SharedNumbers, seed_of
from model.update import METHODS, MethodName
from model.watch import Figures, Watcher, draw, recorded_after, sampled_after

WEIGHTS = "weights.safetensors"
MASTER = "master.safetensors"
LINEAGE = "lineage.json"
RESUME = "resume.safetensors"
CURVE = "curve.json"
STRETCH = 5  # points of the curve that `diverged` averages


class Rows(NamedTuple):
    """What a training step regresses: v(x, t, r, ids) on `velocity`."""

    x: Tensor  # [B, C, R, R]
    t: Tensor  # [B]
    r: Tensor  # [B]
    ids: Tensor  # [B, L]
    velocity: Tensor  # [B, C, R, R]


class Objective(Protocol):
    """Regression objective of a network."""

    @property
    def origin(self) -> dict[str, Any]:
        """Fields of the lineage that say what was taught; empty where there is no teacher."""
        ...

    @property
    def preview(self) -> Sampler:
        """Sampler for the pictures that are drawn during the training."""
        ...

    def trains(self, name: str) -> bool:
        """Check whether a parameter is trained; the others are the teacher's and stay so."""
        ...

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        """Draw the whole batch of a step (numbered from 0), on the CPU, from the options' seed and the step alone."""
        ...


class TrainOptions(Frozen):
    """Options of training; all are part of the hash in the lineage, so a changed option means a new training."""

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
        default=0.0,
        ge=0,
        description="with a parent: the update of each tensor is rounded to multiples of its rms times this; with the method `grid` the "
        "training sees this rounding in its second half",
    )
    stored: PrecisionName = Field(
        default="float32",
        description="what devices will have: the result is rounded to it, so that the next training starts from their weights and "
        "its steps on a grid are theirs (int8 is rounded when it is exported)",
    )
    method: MethodName | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="the result is a master, from which `model.publish` makes the fielded weights by this method (or a cheaper row of "
        "`model.update.METHODS`); null: the result itself is fielded, rounded as `update_grid` and `stored` say",
    )
    seed: int = 0
    save_every: int = Field(default=100, ge=1, description="steps between two states from which a run can resume")


@dataclass(frozen=True)
class Checkpoint:
    """Folder with trained weights (the moving average) and their lineage."""

    folder: Path
    lineage: Lineage
    weights_sha256: Sha256

    def network(self) -> Network:
        """Load the network with these weights, in evaluation mode.

        Raises:
            CheckpointError: the weights are damaged or of another shape.
        """
        network = Network(self.lineage.config)
        load_weights(network, self.folder / WEIGHTS)
        return network.eval()


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint's folder.

    Raises:
        CheckpointError: it is not a checkpoint, is truncated, or was written by a newer version.
    """
    try:
        lineage = Lineage.model_validate_json((folder / LINEAGE).read_bytes())
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass  # reading the header detects a truncated file
    except (OSError, ValidationError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of this version, or is damaged; name a folder that `train` wrote"
        ) from error
    return Checkpoint(folder, lineage, digest)


def load_weights(network: Network, path: Path) -> None:
    """Load a safetensors file into a network.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not this network's.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors; it is damaged or truncated, so fetch it again") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds the weights of another network than {network.config.tier}/{network.config.configuration} at "
            f"{network.config.image_size} pixels; use the configuration it was trained with"
        ) from error


@dataclass(frozen=True)
class Start:
    """Weights from which a retraining starts."""

    path: Path
    master: Sha256 | None
    """Hash of the master, or None: they are the fielded weights."""
    says: str
    """A sentence for the log."""


def start_of(parent: Checkpoint, line: str) -> Start:
    """Find the weights from which a retraining of a parent starts: its master if that is there and fits, else the fielded weights.

    Args:
        parent: what is fielded.
        line: line that is trained.
    """
    wanted, path = parent.lineage.master, parent.folder / MASTER
    why = None
    if wanted is None:
        why = "no master was kept for them"
    elif parent.lineage.data.line != line:
        why = f"their master is of another line, {parent.lineage.data.line}"
    elif not path.is_file():
        why = f"their master {wanted[:12]} is lost"
    elif hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        why = f"{path} is not their master {wanted[:12]}, but damaged or another's"
    if why:
        return Start(parent.folder / WEIGHTS, None, f"training starts from the fielded weights, because {why}")
    return Start(path, wanted, f"training starts from the master {str(wanted)[:12]} of the fielded weights")


def learning_rate(options: TrainOptions, step: int) -> float:
    """Compute the learning rate of step `step` (from 0): linear rise, plateau, linear fall to 0."""
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
    teacher: Checkpoint | None = None,
    objective: Objective | None = None,
    watcher: Watcher | None = None,
    hardware: Hardware | None = None,
) -> Checkpoint:
    """Train one network and write its checkpoint; repeat a killed call to resume from its last saved state.

    Args:
        config: the network's shape.
        dataset: images and captions to learn from.
        data: the revision that the dataset was decoded from, for the lineage.
        options: options of training.
        out: folder of the checkpoint; created if missing.
        variant: variant that the weights are for.
        parent: start from these weights instead of random ones (warm start).
        teacher: `full` of a student: gives the weights that the objective does not train, and the weights around which the
            student's are rounded to a grid, because a bundle holds a student as its difference from `full`.
        objective: regression objective; flow matching by default, `model.students` has the other.
        watcher: callbacks for every step and for samples; they change no weight.
        hardware: hardware to train on; by default that of this process. A state saved on other hardware is not resumed.

    Raises:
        ConfigError: several processes train together, and they cannot share the batch evenly or one has no GPU.
        TrainingError: the run diverged, or the loss or a weight is not finite; the last saved state is kept.
        CheckpointError: the parent is damaged or has another shape.
    """
    hardware, objective = hardware or Hardware.here(), objective or FlowMatching()
    start = start_of(parent, data.line) if parent and options.method else None
    lineage = Lineage(
        data=data, config=config, variant=variant, training_sha256=options.sha256, code=code_sha256(), seed=options.seed,
        parent=parent.weights_sha256 if parent else None, teacher=teacher.weights_sha256 if teacher else None, steps=options.steps, items=len(dataset.training()),
        torch=torch.__version__, hardware=hardware.name, start_master=start.master if start else None, **objective.origin,
    )  # fmt: skip
    try:
        done = load_checkpoint(out)
        if done.lineage == lineage:
            return done  # was trained before from the same inputs
    except CheckpointError:
        out.mkdir(parents=True, exist_ok=True)
    ranks = Ranks.here(options.batch, hardware)
    watched = (watcher or Watcher()) if ranks.rank == 0 else Watcher()
    torch.manual_seed(mix(options.seed, 0))
    network = Network(config)
    if parent:
        load_weights(network, start.path if start else parent.folder / WEIGHTS)
    if teacher:
        keep_untrained(network, teacher.network(), objective)
    if parent and options.method:
        freeze_untrained(network, METHODS[options.method].trains)
    network.to(hardware.device)  # initial weights come from the seed, whatever the device
    average = copy.deepcopy(network)
    shares = parent is not None and options.method is not None and METHODS[options.method].shares_numbers
    # Weights that share a number must decay alike, so none does.
    run_options = options.model_copy(update={"weight_decay": 0.0}) if shares else options
    run = _Run(network, average, run_options, ranks, objective, hardware)
    run.shared = SharedNumbers(network, seed_of(parent.weights_sha256)) if parent and shares else None
    if parent and options.method and METHODS[options.method].rounds_in_training:
        fielded = parent.network()
        round_to_stored(fielded, options.stored)
        run.grid = Grid(network, fielded, options.update_grid or METHODS[options.method].level, options.steps)
    first = run.resume(out / RESUME, lineage.sha256)
    began = time.monotonic() - (run.curve[-1]["seconds"] if run.curve else 0.0)
    for step in range(first, options.steps):
        figures = run.step(dataset, step)
        if recorded_after(step + 1, options.steps):
            load = [[round(mass, 5) for mass in block] for block in figures.load]
            seconds = time.monotonic() - began
            run.curve.append({"step": step + 1, "seconds": seconds, **figures.numbers(), "load": load})
        if not math.isfinite(figures.loss):
            raise TrainingError(
                f"the loss of step {step + 1} is not finite; the last saved state is kept, train again with a learning rate below "
                f"{options.learning_rate:g}"
            )
        if diverged([row["loss"] for row in run.curve]):
            raise TrainingError(
                f"the loss has risen to {figures.loss:.3g} by step {step + 1}: the run diverged; the last saved state is kept, "
                f"train again with a learning rate below {options.learning_rate:g}"
            )
        if watched.samples and step + 1 < options.steps and step + 1 in sampled_after(options.steps):
            watched.samples(step + 1, *draw(average, dataset, objective.preview))
        if (step + 1) % options.save_every == 0 and step + 1 < options.steps and ranks.rank == 0:
            run.save(out / RESUME, lineage.sha256, step + 1)
        watched.step(step + 1, figures)
    if (around := teacher or parent) and options.update_grid:
        round_update(average, around.network().to(hardware.device), options.update_grid)
    round_to_stored(average, "float32" if options.method else options.stored)
    if not all(weight.isfinite().all() for weight in average.parameters()):
        raise TrainingError(
            f"the last step left weights that are not finite; train again with a learning rate below {options.learning_rate:g}"
        )
    if watched.samples:
        watched.samples(options.steps, *draw(average, dataset, objective.preview))
    if ranks.rank == 0:
        (out / LINEAGE).unlink(missing_ok=True)  # an old lineage must never stand beside new weights
        write_safely(out / WEIGHTS, average.state_dict())
        if run.gradients:
            write_safely(out / STATISTICS, run.gradients.means() | (run.grid.by_tensor() if run.grid else {}))
        (out / CURVE).write_text(json.dumps(run.curve))
        (out / LINEAGE).write_text(lineage.model_dump_json(indent=1))
        (out / RESUME).unlink(missing_ok=True)
    ranks.wait()
    return load_checkpoint(out)


class FlowMatching:
    """The objective of an undistilled network: the velocity of the straight path at a logit-normal time, r = t."""

    preview = Sampler(steps=8)

    @property
    def origin(self) -> dict[str, Any]:
        """See `Objective`."""
        return {}

    def trains(self, name: str) -> bool:
        """See `Objective`; everything is trained."""
        del name
        return True

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        """See `Objective`; some captions are hidden, for guidance."""
        images, ids = dataset.batch(options.seed, step, options.batch)
        generator = torch.Generator().manual_seed(mix(options.seed, step, 2))
        ids[torch.rand(options.batch, generator=generator) < options.caption_dropout] = 0
        noise = torch.randn(images.shape, generator=generator)
        t = logit_normal(options.batch, generator)
        x, velocity = add_noise(images, noise, t)
        return Rows(x, t, t, ids, velocity)


def keep_untrained(network: Network, teacher: Network, objective: Objective) -> None:
    """Give a network, in place, its teacher's weights wherever the objective trains nothing, and freeze these."""
    with torch.no_grad():
        for (name, ours), theirs in zip(network.named_parameters(), teacher.parameters(), strict=True):
            if not objective.trains(name):
                ours.copy_(theirs)
                ours.requires_grad_(False)


def freeze_untrained(network: Network, trains: Callable[[Tensor], bool]) -> None:
    """Stop, in place, the training of parameters that a method does not train."""
    for weight in network.parameters():
        weight.requires_grad_(weight.requires_grad and trains(weight))


def diverged(losses: list[float]) -> bool:
    """Check whether a recorded loss curve has diverged: its last points lie far above the lowest points before.

    The mean of the last `STRETCH` points must be above 3 times the lowest mean of as many consecutive points, and above 2. A
    network that always predicts zero has a loss below 2 (1 for the noise, plus the mean square of images in [-1, 1]).
    """
    if len(losses) < 2 * STRETCH:
        return False
    means = [sum(losses[i : i + STRETCH]) / STRETCH for i in range(len(losses) - STRETCH + 1)]
    return means[-1] > max(2.0, 3 * min(means))


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network together, as `torchrun` starts them; otherwise a single process.

    Every process draws the whole batch, noise and times from the seed and takes its share of the rows. Gradients are averaged.
    So the number of processes changes only the order of sums. GPUs communicate by NCCL, CPUs by Gloo.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls, batch: int, hardware: Hardware) -> Ranks:
        """Join the processes that torchrun started, and return the place of this process among them.

        Raises:
            ConfigError: the batch cannot be shared evenly.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if batch % world:
            raise ConfigError(f"a batch of {batch} cannot be shared by {world} processes; choose a multiple of {world}")
        if not dist.is_initialized():
            own = torch.device(hardware.device) if hardware.gpu else None
            dist.init_process_group("nccl" if own else "gloo", device_id=own)
        return cls(dist.get_rank(), world)

    def share(self, rows: Tensor) -> Tensor:
        """Select this process's rows of a batch."""
        return rows[self.rank :: self.world]

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over the processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.world)

    def wait(self) -> None:
        """Wait until every process has arrived."""
        if self.world > 1:
            dist.barrier()


def round_update(network: Network, parent: Network, grid: float) -> None:
    """Round each tensor's change from the parent, in place, to multiples of `grid` times the root mean square of the change.

    Most small changes become zero, and the delta from the parent shrinks with the entropy of the rest. The rounded model is the
    one that is evaluated and fielded, so the gate sees the loss of quality.
    """
    with torch.no_grad():
        for ours, theirs in zip(network.parameters(), parent.parameters(), strict=True):
            change = ours - theirs
            step = grid * change.square().mean().sqrt()
            if step > 0:
                ours.copy_(theirs + torch.round(change / step) * step)


def round_to_stored(network: Network, precision: PrecisionName) -> None:
    """Round weights, in place, to the precision that devices store; float32 and int8 change nothing here."""
    kinds: dict[PrecisionName, torch.dtype] = {
        "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float32,
    }  # fmt: skip
    kind = kinds[precision]
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.to(kind))


class _Run:
    """State of a training run: weights, their moving average, the optimizer's moments, the recorded curve."""

    def __init__(
        self, network: Network, average: Network, options: TrainOptions, ranks: Ranks, objective: Objective, hardware: Hardware
    ) -> None:
        self.network, self.average, self.options = network.train(), average, options
        self.ranks, self.objective, self.hardware = ranks, objective, hardware
        # The method is compiled, not the module, so the names of weights do not change. Token choice is not compiled: the number
        # of tokens of an expert differs from step to step, and every new number would trigger a compilation.
        compiled = hardware.compiled and network.config.router == "expert-choice"
        self.predict = torch.compile(network.traced, dynamic=False) if compiled else network.traced
        self.curve: list[dict[str, Any]] = []
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.trained = [objective.trains(name) for name, _ in network.named_parameters()]
        self.gradients = Gradients(network) if options.method else None
        self.grid: Grid | None = None
        self.shared: SharedNumbers | None = None
        # Gains, biases and modulation tables get no weight decay.
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

    def step(self, dataset: Dataset, step: int) -> Figures:
        """Take one step of gradient descent (numbered from 0), and return its figures."""
        o = self.options
        drawn = self.objective.rows(dataset, o, step)  # on the CPU, so the device does not matter
        x, t, r, ids, target = (self.ranks.share(rows).to(self.hardware.device) for rows in drawn)
        with self.grid.rounded(self.network, self.average, step) if self.grid else nullcontext():
            with self.hardware.precision():
                v, load, chosen = self.predict(x, t, r, ids)
            loss = (v - target).square().mean()
            torch.autograd.backward(loss)
        self.ranks.average([p.grad for p in self.parameters if p.grad is not None])
        if self.gradients and step >= Gradients.first_step(o.steps):
            self.gradients.add(self.network)
        if self.shared:
            self.shared.share(self.network)
        torch.nn.utils.clip_grad_norm_(self.parameters, o.clip)
        rate = learning_rate(o, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.network.config.router == "token-choice" and self.objective.trains("gate_bias"):
            self.network.balance(chosen, self.ranks.average)
        decay = min(o.ema, (step + 1) / (step + 10))  # a short run must not average in its own beginning
        with torch.no_grad():
            averaged, own = (
                [weight.data for weight, trained in zip(of.parameters(), self.trained, strict=True) if trained]
                for of in (self.average, self.network)
            )
            torch._foreach_lerp_(averaged, own, 1 - decay)
        share, mean = load.detach().mean(dim=0), loss.detach()
        self.ranks.average([share, mean])
        return Figures(float(mean), rate, share.tolist())

    def tensors(self) -> dict[str, Tensor]:
        """Collect everything that the next step depends on, by name."""
        named = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        named |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for k, v in self.optimizer.state[parameter].items():
                named[f"moment.{i}.{k}"] = v
        if self.gradients:
            named |= {f"gradients.{k}": v for k, v in self.gradients.sums.items()}
        if self.grid:
            named |= {f"grid.{k}": v for k, v in self.grid.sizes.items()}
        return named

    def save(self, path: Path, identity: Sha256, step: int) -> None:
        """Write the state, from which `resume` continues after `step` steps."""
        write_safely(path, self.tensors(), {"identity": identity, "step": str(step), "curve": json.dumps(self.curve)})

    def resume(self, path: Path, identity: Sha256) -> int:
        """Load a saved state of the same run, and return the number of steps done; 0 if there is no usable state of this run."""
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                meta: dict[str, Any] = file.metadata() or {}
            if meta.get("identity") != identity:
                return 0
            saved = load_file(path, device=self.hardware.device)
            step, self.curve = int(meta["step"]), json.loads(meta["curve"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return 0  # damaged when the run ended; starting over gives the same weights
        self.network.load_state_dict({k.removeprefix("network."): v for k, v in saved.items() if k.startswith("network.")})
        self.average.load_state_dict({k.removeprefix("average."): v for k, v in saved.items() if k.startswith("average.")})
        for i, parameter in enumerate(self.parameters):
            prefix = f"moment.{i}."
            self.optimizer.state[parameter] = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        if self.gradients:
            self.gradients.sums = {k: saved[f"gradients.{k}"] for k in self.gradients.sums}
        if self.grid:
            self.grid.sizes = {k: saved[f"grid.{k}"] for k in self.grid.sizes}
        return step


def write_safely(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors to a temporary file and rename it, so that `path` always holds a complete file, old or new."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, fresh, metadata)
    fresh.replace(path)


def code_sha256() -> Sha256:
    """Hash the source files of `model`; two checkpoints with the same hash were made by the same code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()

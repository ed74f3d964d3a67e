"""`make bench-model`: compare the network's quality and speed with its peers, and with itself when one idea is switched off.

    python -m tests.bench.model [quality|speed|report ...]   by default all parts

Quality: every contender trains by the same loop on the same batches, with one thread, and is measured twice: after `SECONDS` of
processor time, and after as much arithmetic as configuration I does in half of that time. Processor time is used instead of wall
time, so other load on the machine changes little. Finished parts are kept in build/bench/model and are not repeated; `make clean`
deletes them.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import distances, evaluate, features, photographs
from model.config import TIERS, ModelConfig, Tier
from model.data import Dataset, mix, prepare, to_bytes, to_unit
from model.diffusion import add_noise, guided, logit_normal, sample
from model.distances import Sample
from model.export import pack
from model.graph import build
from model.network import Network
from model.scorecard import Sampler
from model.session import SESSION_CONFIG, Session, noise
from tests.bench.peers import DiT, UNet

BUILD, RESULTS = Path("build/bench/model"), Path("tests/bench/results")
SIZE, TEXT = 16, 20
SEEDS = (0, 1, 2)
SECONDS = float(os.environ.get("BENCH_SECONDS", "120"))  # of processor time, for each contender and seed
BATCH = 16
IMAGES = 256  # generated for each evaluation
DRAW = Sampler(method="ab2", steps=14, guidance=1.0)
GUIDANCE = 2.0  # of `full`
SWEEP = (5e-4, 1e-3, 2e-3)
EMA, WARMUP = 0.995, 20
ROWS = ("I", "II", "DiT", "U-Net", "no-conv", "positions", "dense", "single-stream")
PEERS = ("DiT", "U-Net")
ROUNDS = 40  # of interleaved timings
# Many sessions take turns in one process. If waiting threads of one session spun, they would take the cores from the next.
QUIET = {"session.intra_op.allow_spinning": "0"}


# Contenders


def config(row: str, tier: str = "nano", size: int = SIZE) -> ModelConfig:
    """Return the configuration of a row that is a form of our own network."""
    ablation: Any = row if row not in ("I", "II") else "none"
    return ModelConfig(
        tier=tier, configuration="II" if row == "II" else "I", image_size=size, channels=1, text_length=TEXT, ablation=ablation
    )


class Widened(ModelConfig):
    """A network without routed experts, whose feed-forward layer is as wide as all experts together: it has as many weights."""

    @property
    def shape(self) -> Tier:
        """The tier with its routed experts merged into the shared one."""
        from dataclasses import replace

        tier = TIERS[self.tier]
        return replace(tier, experts=0, active=0, shared_width=tier.shared_width + tier.experts * tier.expert_width)


def make(row: str, labels: int, tier: str = "nano", size: int = SIZE) -> nn.Module:
    """Make a contender with fresh weights."""
    if row == "DiT":
        width, depth = {"nano": (128, 7), "small": (192, 12)}[tier]
        return DiT(size, labels, width, depth, TIERS[tier].heads)
    if row == "U-Net":
        return UNet(size, labels, {"nano": (48, 96, 96), "small": (96, 192, 256)}[tier])
    if row.startswith("dense, all"):
        return Network(Widened(**config("II" if row.endswith("II") else "I", tier, size).model_dump()))
    return Network(config(row, tier, size))


def inputs(row: str, labels: int, batch: int, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make random inputs for a contender."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn((batch, 1, size, size), generator=g), torch.rand(batch, generator=g)
    ids = torch.randint(1, labels, (batch,), generator=g) if row in PEERS else torch.randint(1, 257, (batch, TEXT), generator=g)
    return x, t, t, ids


def flops(row: str, labels: int, tier: str = "nano", size: int = SIZE) -> float:
    """Count the floating-point operations of one evaluation for one image, two for each multiplication with addition."""
    network, batch = make(row, labels, tier, size), 4
    # The counter does not know the fused attention of CPUs, so attention is computed by plain matrix products here.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(*inputs(row, labels, batch, size))
    return counter.get_total_flops() / batch


# Data and training


def dataset() -> Dataset:
    """Prepare the surfaces: 400 patches of each of the four, then 200 of each in slanting light, and 200 of printed pages."""
    folder = BUILD / "data"
    if not (folder / "metadata.jsonl").is_file():
        photographs.surfaces(folder, 1, patches=400)
        photographs.surfaces(folder, 2, patches=200)
    return prepare(folder, config("I"), BUILD / "cache")


class Words:
    """What a contender gets as caption of an image: the caption's bytes, or its number."""

    def __init__(self, row: str, data: Dataset) -> None:
        self.names = sorted(set(data.captions))
        numbers = np.array([1 + self.names.index(c) for c in data.captions])
        self.table = torch.from_numpy(numbers if row in PEERS else data.ids)  # [n] or [n, L]

    @property
    def labels(self) -> int:
        """How many caption numbers there are, including the one for no caption."""
        return len(self.names) + 1


class Trainer:
    """A training that can be paused at a budget and continued; the same for every contender."""

    def __init__(self, network: nn.Module, row: str, data: Dataset, rate: float, seed: int) -> None:
        self.network, self.data, self.rate, self.seed = network.train(), data, rate, seed
        self.words = Words(row, data).table
        self.average = copy.deepcopy(network).eval()
        parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.parameters, self.steps, self.seconds = parameters, 0, 0.0

    def step(self) -> None:
        """Train one step, and count its processor time."""
        began = time.thread_time()
        images, chosen = self._batch()
        g = torch.Generator().manual_seed(mix(self.seed, self.steps, 2))
        words = self.words[chosen].clone()
        words[torch.rand(BATCH, generator=g) < 0.1] = 0
        e = torch.randn(images.shape, generator=g)
        t = logit_normal(BATCH, g)
        x, target = add_noise(images, e, t)
        loss = (self.network(x, t, t, words)[0] - target).square().mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.steps + 1) / WARMUP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(EMA, (self.steps + 1) / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self.steps += 1
        self.seconds += time.thread_time() - began

    def _batch(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(mix(self.seed, self.steps, 1))
        training = self.data.training()
        chosen = training[torch.randint(0, len(training), (BATCH,), generator=g).numpy()]
        return to_unit(self.data.images[chosen]), torch.from_numpy(chosen)


# Quality


def judge(
    network: nn.Module, row: str, data: Dataset, spaces: features.FeatureSpaces, seed: int, sampler: Sampler = DRAW
) -> dict[str, float]:
    """Measure the held-out loss, and the distances of generated images to held-out ones."""
    words, reference = Words(row, data).table, data.reference()
    held_out = to_unit(data.images[reference])
    g = torch.Generator().manual_seed(5)
    losses = []
    with torch.inference_mode():
        for first in range(0, len(held_out), 64):
            part, text = held_out[first : first + 64], words[reference[first : first + 64]]
            t, e = logit_normal(len(part), g), torch.randn(part.shape, generator=g)
            x, target = add_noise(part, e, t)
            losses.append((network(x, t, t, text)[0] - target).square().mean(dim=(1, 2, 3)))
        order = np.random.Generator(np.random.Philox(key=mix(IMAGES, 5))).permutation(len(reference))
        chosen = reference[order[np.arange(IMAGES) % len(order)]]
        images = []
        for first in range(0, IMAGES, 32):
            part = chosen[first : first + 32]
            start = torch.from_numpy(np.stack([noise(mix(seed, first + i), (1, SIZE, SIZE)) for i in range(len(part))]))
            velocity = guided(lambda x, t, r, ids: network(x, t, r, ids)[0], words[part], sampler)
            images.append(to_bytes(sample(velocity, start, sampler)))
    drawn, real, groups = np.concatenate(images), data.images[reference], data.reference_groups()
    row_of: dict[str, float] = {"loss": float(torch.cat(losses).mean())}
    for space in features.SPACES:
        x, y, scale = spaces(space, real), spaces(space, drawn), spaces.scale(space)
        group_of = dict(zip(reference.tolist(), groups.tolist(), strict=True))
        owners = np.array([group_of[i] for i in chosen.tolist()])
        found = distances.distance(
            Sample(x, [data.captions[i] for i in reference], groups),
            Sample(y, [data.captions[i] for i in chosen], owners),
            scale,
            "images",
        )
        row_of[f"kd_{space}"], row_of[f"kd_{space}_se"] = found.value, found.se
        row_of[f"fd_{space}"] = evaluate.frechet_distance(x, y)
        row_of[f"coverage_{space}"] = evaluate.coverage(x, y)
    return row_of


def commit() -> str:
    """Return the commit that is measured, with a mark if files differ from it."""
    said = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def kept(name: str, make_it: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part's result; make it only once for each budget, and keep it."""
    path = BUILD / f"{name}.json"
    if not path.is_file() or json.loads(path.read_bytes())["budget"] != SECONDS:
        result = make_it() | {"budget": SECONDS, "commit": commit()}
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(result))
        fresh.replace(path)
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def setting() -> tuple[Dataset, features.FeatureSpaces, int]:
    """Prepare the data, the feature spaces and the number of labels, and limit the process to one thread."""
    torch.set_num_threads(1)
    data = dataset()
    return data, features.fit(data, BUILD / "features.safetensors"), Words("I", data).labels


def sweep_one(row: str, rate: float) -> dict[str, Any]:
    """Measure the held-out loss after a fifth of the time, on a seed that is not reported."""

    def run() -> dict[str, Any]:
        data, spaces, labels = setting()
        torch.manual_seed(mix(99, 0))
        trainer = Trainer(make(row, labels), row, data, rate, 99)
        while trainer.seconds < SECONDS / 5:
            trainer.step()
        return {"loss": judge(trainer.average, row, data, spaces, 99, Sampler(method="euler", steps=1, guidance=1.0))["loss"]}

    return kept(f"sweep-{row}-{rate:g}", run)


def quality_one(row: str, seed: int, rate: float, compute: float) -> dict[str, Any]:
    """Train one contender with one seed past both budgets, and judge it at each."""

    def run() -> dict[str, Any]:
        data, spaces, labels = setting()
        torch.manual_seed(mix(seed, 0))
        network = make(row, labels)
        trainer = Trainer(network, row, data, rate, seed)
        each = 3 * BATCH * flops(row, labels)  # backward costs twice the forward
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters()), "flops": each / 3 / BATCH}
        while "seconds" not in found or "compute" not in found:
            trainer.step()
            for name, full in (("seconds", trainer.seconds >= SECONDS), ("compute", trainer.steps * each >= compute)):
                if full and name not in found:
                    found[name] = judge(trainer.average, row, data, spaces, seed)
                    found[name] |= {"steps": trainer.steps, "spent": trainer.seconds, "flop": trainer.steps * each}
                    if name == "seconds" and row == "I":
                        save_file(trainer.average.state_dict(), BUILD / f"teacher-{seed}.safetensors")
        found["images_per_second"] = BATCH * trainer.steps / trainer.seconds
        return found

    return kept(f"quality-{row}-{seed}", run)


def in_two(calls: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]]) -> None:
    """Run parts in two processes, and print which are done."""
    with ProcessPoolExecutor(2) as pool:
        waiting = {pool.submit(call, *arguments): (call.__name__, *arguments) for call, arguments in calls}
        for done, future in enumerate(as_completed(waiting), start=1):
            future.result()
            name = " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in waiting[future][:3])
            print(f"[{done}/{len(waiting)}] {name}", flush=True)


def rates() -> dict[str, float]:
    """Choose the learning rate of each row: the best of the sweep, or for an ablation that of configuration I."""
    swept = ("I", "II", "DiT", "U-Net")
    in_two([(sweep_one, (row, rate)) for row in swept for rate in SWEEP])
    best = {row: min(SWEEP, key=lambda rate, row=row: sweep_one(row, rate)["loss"]) for row in swept}
    return {row: best.get(row, best["I"]) for row in ROWS}


def quality() -> None:
    """Measure all contenders with all seeds; the budget of arithmetic is what configuration I does in half of the time."""
    setting()
    chosen = rates()

    def measure() -> dict[str, Any]:
        data, _, labels = setting()
        trainer = Trainer(make("I", labels), "I", data, 1e-3, 98)
        for _ in range(12):
            trainer.step()
        return {"compute": 3 * BATCH * flops("I", labels) * SECONDS / 2 / (trainer.seconds / trainer.steps)}

    compute = kept("compute", measure)["compute"]
    in_two([(quality_one, (row, seed, chosen[row], compute)) for seed in SEEDS for row in ROWS])


# Speed


@cache
def exported(row: str, labels: int, tier: str, size: int) -> bytes:
    """Export a contender to ONNX by torch's own exporter, for batches of one; cached, because it takes 15 seconds."""
    network = make(row, labels, tier, size).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # the exporter would fold zeros and equal tensors away
            parameter.add_(0.01 * torch.randn(parameter.shape))
    path = BUILD / "exported.onnx"
    torch.onnx.export(network, inputs(row, labels, 1, size), str(path), dynamo=True, external_data=False, verbose=False)
    return path.read_bytes()


def runners(row: str, labels: int, tier: str, size: int, threads: int) -> dict[str, Callable[[], object]]:
    """Make calls that evaluate one image: in ONNX Runtime from each exporter that supports the row, and in torch."""
    torch.manual_seed(0)
    arguments = inputs(row, labels, 1, size)
    arrays = [a.numpy() for a in arguments]
    found: dict[str, Callable[[], object]] = {}
    if row in ("I", "II"):
        network = Network(config(row, tier, size))
        graph = build(network.config, "float32").SerializeToString(deterministic=True)
        with patch.dict(SESSION_CONFIG, QUIET):
            ours = Session(graph, pack(network, "float32"), threads)
        found["ONNX"] = lambda: ours.run(*arrays)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for key, value in QUIET.items():
        options.add_session_config_entry(key, value)
    other = ort.InferenceSession(exported(row, labels, tier, size), options, providers=["CPUExecutionProvider"])
    given = dict(zip(("x", "t", "r", "labels" if row in PEERS else "ids"), arrays, strict=True))
    feeds = {i.name: given[i.name] for i in other.get_inputs()}
    found["ONNX, torch's exporter"] = lambda: other.run(None, feeds)
    eager = make(row, labels, tier, size).eval()

    def in_torch() -> object:
        with torch.inference_mode():
            return eager(*arguments)

    found["torch"] = in_torch
    return found


def interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Measure the milliseconds of each call round by round, so that a slow moment of the machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = np.random.default_rng(0)
    for round_ in range(ROUNDS + 3):
        for name in order.permutation(list(calls)):  # so that no call always follows the spinning threads of the same one
            began = time.perf_counter()
            calls[name]()
            if round_ >= 3:
                times[name].append(1000 * (time.perf_counter() - began))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> list[float]:
    """Compute the median of the rounds' ratios, and its 95 % interval (order statistics)."""
    ratios = sorted(np.array(times[slow]) / np.array(times[fast]))
    low = int(stats.binom.ppf(0.025, len(ratios), 0.5))  # the interval from the low-th smallest to the low-th largest
    return [float(np.median(ratios)), float(ratios[low - 1]), float(ratios[-low])]


def speed_one(tier: str, size: int, threads: int) -> dict[str, Any]:
    """Measure all rows of one tier and size with one number of threads."""

    def run() -> dict[str, Any]:
        torch.set_num_threads(threads)
        labels = 17
        rows = ("I", "II", "dense, all experts, I", "dense, all experts, II", "dense", *PEERS)
        calls = {f"{row} | {how}": call for row in rows for how, call in runners(row, labels, tier, size, threads).items()}
        times = interleaved(calls)
        return {
            "milliseconds": {name: float(np.median(t)) for name, t in times.items()},
            "flops": {row: flops(row, labels, tier, size) for row in rows},
            "parameters": {row: sum(p.numel() for p in make(row, labels, tier, size).parameters()) for row in rows},
            "dense/sparse I, both by torch's exporter": ratio(times, *(f"{r} | ONNX, torch's exporter" for r in (rows[2], "I"))),
            "dense/sparse II, both by torch's exporter": ratio(times, *(f"{r} | ONNX, torch's exporter" for r in (rows[3], "II"))),
            "dense/sparse I, sparse as shipped": ratio(times, f"{rows[2]} | ONNX, torch's exporter", "I | ONNX"),
            "dense/sparse II, sparse as shipped": ratio(times, f"{rows[3]} | ONNX, torch's exporter", "II | ONNX"),
            "torch/ONNX I": ratio(times, "I | torch", "I | ONNX"),
            "torch/ONNX II": ratio(times, "II | torch", "II | ONNX"),
            "II/I": ratio(times, "II | ONNX", "I | ONNX"),
        }  # fmt: skip

    return kept(f"speed-{tier}-{size}-{threads}", run)


def images_one(threads: int) -> dict[str, Any]:
    """Measure the seconds for one image of each variant in the nano tier, as the device's sampler draws it."""

    def run() -> dict[str, Any]:
        found = {}
        for row in ("I", "II"):
            torch.manual_seed(0)
            network = Network(config(row))
            session = Session(
                build(network.config, "float32").SerializeToString(deterministic=True), pack(network, "float32"), threads
            )
            ids = session.encode(["brick"])
            for variant, sampler in {
                "full (56 guided)": Sampler(method="euler", steps=56, guidance=GUIDANCE),
                "full (AB2, 14 guided)": Sampler(method="ab2", steps=14, guidance=GUIDANCE),
                "dev (28)": Sampler(method="mean", steps=28, guidance=1.0),
                "fast (14)": Sampler(method="mean", steps=14, guidance=1.0),
            }.items():
                times = []
                for seed in range(4):
                    began = time.perf_counter()
                    session.generate(ids, [seed], sampler)
                    times.append(time.perf_counter() - began)
                found[f"{row} {variant}"] = float(np.median(times[1:]))
        return found

    return kept(f"images-{threads}", run)


def throughput() -> dict[str, Any]:
    """Measure the images per second in training of five rows, in turns of five steps, with one thread."""

    def run() -> dict[str, Any]:
        data, _, labels = setting()
        rows = ("I", "II", "DiT", "U-Net", "dense")
        trainers = {row: Trainer(make(row, labels), row, data, 1e-3, 97) for row in rows}
        rounds: dict[str, list[float]] = {row: [] for row in rows}
        for turn in range(9):
            for row, trainer in trainers.items():
                before = trainer.seconds
                for _ in range(5):
                    trainer.step()
                if turn:
                    rounds[row].append(5 * BATCH / (trainer.seconds - before))
        found: dict[str, Any] = {
            row: {
                "images_per_second": float(np.median(r)),
                "gflop_per_second": float(np.median(r)) * 3 * flops(row, labels) / 1e9,
            }
            for row, r in rounds.items()
        }
        dense, ours = flops("DiT", labels), flops("I", labels)
        at_equal_compute = np.array(rounds["I"]) * ours / (np.array(rounds["DiT"]) * dense)
        found["I against DiT at equal arithmetic"] = float(np.median(at_equal_compute))
        return found

    return kept("throughput", run)


def speed() -> None:
    """Measure every tier, size and number of threads; nothing else should run meanwhile."""
    for tier, size in (("nano", 16), ("nano", 32), ("small", 32)):
        for threads in (1, 2):
            speed_one(tier, size, threads)
            print(f"speed {tier} {size} px, {threads} threads", flush=True)
    for threads in (1, 2):
        images_one(threads)
    throughput()


# Report


def mean_interval(values: list[float]) -> str:
    """Format the mean over seeds and the half width of its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.4f} ± {half:.4f}"


def machine() -> str:
    """Describe the machine and the commits that were measured."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        "?",
    )
    commits = sorted({part["commit"] for part in read("*.json").values()})
    return (
        f"{model}, {os.cpu_count()} cores (shared), Python {platform.python_version()}, torch {torch.__version__}, "
        f"ONNX Runtime {ort.__version__}; commit {', '.join(commits)}"
    )


def read(pattern: str) -> dict[str, Any]:
    """Read the finished parts, by name."""
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(BUILD.glob(pattern))}


def quality_table(budget: str) -> list[str]:
    """Format one row for each contender, and whether ours is better, seed by seed."""
    parts = read("quality-*.json")
    by_row = {row: {s: parts[f"quality-{row}-{s}"] for s in SEEDS if f"quality-{row}-{s}" in parts} for row in ROWS}
    lines = [
        "| contender | weights | MFLOP | steps | s | held-out loss | kd trained | kd random | coverage | I's loss less its loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, runs in by_row.items():
        if len(runs) < 2:
            lines.append(f"| {row} | not run |" + " |" * 8)
            continue
        first, cells = next(iter(runs.values())), [run[budget] for run in runs.values()]
        paired = [by_row["I"][seed][budget]["loss"] - run[budget]["loss"] for seed, run in runs.items() if seed in by_row["I"]]
        lines.append(
            f"| {row} | {first['parameters'] / 1e6:.2f} M | {first['flops'] / 1e6:.0f} | "
            f"{np.mean([c['steps'] for c in cells]):.0f} | {np.mean([c['spent'] for c in cells]):.0f} | "
            + " | ".join(mean_interval([c[k] for c in cells]) for k in ("loss", "kd_trained", "kd_random", "coverage_trained"))
            + f" | {'' if row == 'I' else mean_interval(paired)} |"
        )
    return lines


def speed_table() -> list[str]:
    """Format the milliseconds and the ratios of the speed measurements."""
    lines = []
    for name, part in read("speed-*.json").items():
        _, tier, size, threads = name.split("-")
        lines += [
            f"\n### {tier}, {size} pixels, {threads} thread(s), one image, one evaluation\n",
            "| row | weights | MFLOP | way | ms |",
            "|---|---|---|---|---|",
        ]
        for label, milliseconds in part["milliseconds"].items():
            row, how = label.split(" | ")
            lines.append(
                f"| {row} | {part['parameters'][row] / 1e6:.2f} M | {part['flops'][row] / 1e6:.0f} | {how} | {milliseconds:.2f} |"
            )
        wanted = part["flops"]["II"] / part["flops"]["I"]
        lines.append("")
        lines += [f"- {what}: {part[what][0]:.2f} ({part[what][1]:.2f} to {part[what][2]:.2f})" for what in part if "/" in what]
        lines.append(f"- arithmetic II/I: {wanted:.2f}; time over arithmetic: {part['II/I'][0] / wanted:.2f}")
    return lines


def report() -> None:
    """Print the tables, and write them and their figures."""
    everything = {"machine": machine(), "seconds": SECONDS, "seeds": SEEDS, **read("*.json")}
    everything = {k: v for k, v in everything.items() if not k.startswith("index")}
    sweeps = {name.removeprefix("sweep-").rsplit("-", 1)[0]: {} for name in read("sweep-*.json")}  # type: dict[str, dict[float, float]]
    for row, losses in sweeps.items():
        losses.update({rate: part["loss"] for rate in SWEEP for part in read(f"sweep-{row}-{rate:g}.json").values()})
    rates_used = "; ".join(
        f"{row} {min(losses, key=lambda rate, losses=losses: losses[rate]):g} ("
        + ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items()) + ")" for row, losses in sweeps.items()
    )  # fmt: skip
    conditions = (
        f"`make bench-model`; {SIZE} pixels, grey, nano tier, batches of {BATCH}, {len(SEEDS)} seeds (± is a 95 % interval over them), "
        f"{IMAGES} images for each distance. Smaller is better but for coverage."
    )
    lines = [
        "# The network beside its peers", "", machine(), "", conditions, "",
        f"Learning rates, by held-out loss after {SECONDS / 5:.0f} s on a seed that is not reported, but on the same held-out images: {rates_used}. The ablations take the rate of I.", "",
        f"## At equal training seconds ({SECONDS:.0f} s of one thread)", "", *quality_table("seconds"), "",
        "## At equal arithmetic (what I does in half of that time)", "", *quality_table("compute"), "",
        "## Time", *speed_table(), "",
    ]  # fmt: skip
    for name, part in read("images-*.json").items():
        lines += [
            f"Seconds for one image, nano, 16 pixels, {name.split('-')[1]} thread(s): "
            + ", ".join(f"{k} {v:.3f}" for k, v in part.items() if "(" in k),
            "",
        ]
    for part in read("throughput.json").values():
        lines += ["Training, images a second: " + ", ".join(f"{k} {v['images_per_second']:.0f} ({v['gflop_per_second']:.0f} GFLOP/s)" for k, v in part.items() if isinstance(v, dict))
                  + f"; I against DiT at equal arithmetic {part['I against DiT at equal arithmetic']:.2f}", ""]  # fmt: skip
    lines += ["Training on a GPU: [gpu.md](gpu.md). The quality of tiers small and base: not run.", ""]
    print("\n".join(lines))
    (BUILD.parent / "bench-model.json").write_text(json.dumps(everything, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "model.md").write_text("\n".join(lines))


def main() -> None:
    """Run the named parts, or all."""
    BUILD.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts: dict[str, Callable[[], None]] = {"quality": quality, "speed": speed, "report": report}
    wanted = sys.argv[1:] or list(parts)
    unknown = set(wanted) - set(parts)
    if unknown:
        sys.exit(f"there is no part {', '.join(sorted(unknown))}; choose among {', '.join(parts)}")
    for part in wanted:
        parts[part]()


if __name__ == "__main__":
    main()

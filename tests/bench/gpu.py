"""`make bench-gpu`: compare training on a GPU with training on all processor cores of the same machine, in one run.

The bench runs the real training (`model.train.train`) and measures images per second after the first steps, in which compilers
work. torch counts the arithmetic; forward and backward together count as three forward passes. The bench prints a table for
tests/bench/results/gpu.md. Nothing else should run meanwhile.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, TierName
from model.data import Dataset
from model.hardware import Hardware
from model.network import Network
from model.scorecard import DataVersion
from model.train import TrainOptions, train
from model.watch import Watcher

ROWS: list[tuple[TierName, int, int]] = [
    ("nano", 16, 128),
    ("nano", 16, 1024),
    ("small", 32, 128),
    ("base", 64, 32),
]  # pixels, batch
WARM, TIMED = 10, 40  # steps
WARM_CPU, TIMED_CPU = 1, 4
DATA = DataVersion(line="bench", path="data/bench", rev="0" * 40, md5="0" * 32 + ".dir", files=1, bytes=1)


def noise(config: ModelConfig, items: int = 2048) -> Dataset:
    """Make random images and captions; what they show does not change the time."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (items, config.channels, config.image_size, config.image_size), dtype=np.uint8)
    ids = rng.integers(1, 200, (items, config.text_length))
    return Dataset(images, [""] * items, ids, np.arange(items) % 10 == 0, [str(i) for i in range(items)], {})


def flops(config: ModelConfig) -> float:
    """Count the floating-point operations of one evaluation for one image, two for each multiplication with addition."""
    network, batch = Network(config), 4
    x = torch.zeros(batch, config.channels, config.image_size, config.image_size)
    times = torch.full((batch,), 0.5)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(x, times, times, torch.zeros(batch, config.text_length, dtype=torch.long))
    total: float = counter.get_total_flops()
    return total / batch


def images_a_second(config: ModelConfig, hardware: Hardware, batch: int) -> tuple[float, float]:
    """Measure images per second, the median over the timed steps, and the seconds before the first of them."""
    warm, timed = (WARM, TIMED) if hardware.gpu else (WARM_CPU, TIMED_CPU)
    moments = [time.perf_counter()]
    watcher = Watcher(lambda _number, _figures: moments.append(time.perf_counter()))  # the step is done: its figures are known
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(steps=warm + timed, batch=batch, save_every=10_000)
        train(config, noise(config), DATA, options, Path(folder) / "run", watcher=watcher, hardware=hardware)
    steps = [after - before for before, after in zip(moments[warm:], moments[warm + 1 :], strict=False)]
    return batch / statistics.median(steps), moments[warm] - moments[0]


def main() -> None:
    """Measure all rows and print the table."""
    here = Hardware.here()
    if not here.gpu:
        sys.exit("there is no GPU here that CUDA sees; this bench is for one")
    sides = {
        "processor": Hardware(),
        "float32": Hardware(here.device),
        "bfloat16": Hardware(here.device, autocast=True),
        "bfloat16, compiled": Hardware(here.device, autocast=True, compiled=True),
    }
    print(
        f"{torch.cuda.get_device_name()} · {os.cpu_count()} cores of {platform.processor() or platform.machine()} · torch {torch.__version__}\n"
    )
    print("| tier | pixels | batch | on | images a second | TFLOP/s | times the processor | s before the timed steps |")
    print("|---|---|---|---|---|---|---|---|")
    for tier, size, batch in ROWS:
        config = ModelConfig(tier=tier, image_size=size, channels=3)
        each, slowest = 3 * flops(config), 0.0
        for name, hardware in sides.items():
            speed, began = images_a_second(config, hardware, batch)
            slowest = slowest or speed
            print(
                f"| {tier} | {size} | {batch} | {name} | {speed:,.0f} | {each * speed / 1e12:.2f} | {speed / slowest:.1f} | {began:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

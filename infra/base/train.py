"""Train the base that the demo adopts: `make base`, half an hour of one core.

The base is a `surfaces` model in the shape that the demo uses. It sees the surfaces of the first delivery only, so the demo
still has something to learn from the second. It is trained on more patches than the demo delivers, cut from the same tiles of
the same photographs; the tiles that the demo holds out are held out here, too, because the hash of a tile's name decides.

The seed determines everything. On one machine, with one thread, a second run writes the same bytes; a killed run resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flows.demo import LINE
from flows.demo import SETTINGS as DEMO
from model import git, photographs
from model.config import ModelConfig
from model.data import Dataset, prepare, to_unit
from model.diffusion import add_noise
from model.network import Network
from model.scorecard import DataVersion
from model.train import CURVE, WEIGHTS, TrainOptions, code_sha256, train
from model.watch import Figures, Watcher

ROOT = Path(__file__).parents[2]
OUT = ROOT / "flows" / "bases"
PATCHES = 2000  # of each surface; the demo delivers 320
OPTIONS = TrainOptions(
    steps=5200, batch=16, learning_rate=2e-3, warmup=100, decay_from=0.5, ema=0.999, stored="bfloat16", seed=18, save_every=250
)  # fmt: skip
LOSS_TIMES, LOSS_SEED = 16, 0


def main() -> None:
    """Train the base, measure its loss on the demo's held-out patches, and write weights and recipe."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--work", type=Path, default=Path("build/base"), help="folder for data and states to resume from")
    arguments.add_argument("--out", type=Path, default=OUT, help="folder of the weights and the recipe")
    chosen = arguments.parse_args()
    line = tomllib.loads(DEMO)["lines"][LINE]
    config = ModelConfig(
        tier=line["tier"], configuration="I", image_size=line["image_size"], channels=line["channels"], text_length=line["text_length"]
    )  # fmt: skip
    torch.set_num_threads(1)  # the bits depend on the number of threads
    demo, many = (_patches(chosen.work, config, patches) for patches in (320, PATCHES))
    # `train` wants a data revision for the lineage. There is none here: the photographs are in scikit-image.
    data = DataVersion(line=LINE, path="photographs", rev="0" * 40, md5=_hash(many)[:32], files=len(many.captions), bytes=0)
    began = time.monotonic()
    made = train(config, many, data, OPTIONS, chosen.work / "run", watcher=Watcher(step=_say(began)))
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(made.folder / WEIGHTS).items()}
    chosen.out.mkdir(parents=True, exist_ok=True)
    out = chosen.out / f"{LINE}.safetensors"
    save_file(weights, out)
    curve = json.loads((made.folder / CURVE).read_bytes())
    recipe = {
        "script": "infra/base/train.py", "line": LINE, "config": config.model_dump(), "options": OPTIONS.model_dump(),
        "data": {
            "what": f"first delivery of model/photographs.py, {PATCHES} patches of each surface", "sha256": _hash(many),
            "training": len(many.training()), "held_out": len(many.reference()),
        },
        "code": {"commit": git.run(ROOT, "log", "-1", "--format=%H", "--", "model"), "model_sha256": code_sha256()},
        "torch": torch.__version__, "seconds": round(curve[-1]["seconds"]),
        "held_out_loss": {
            "what": f"mean squared error of the velocity on the demo's {len(demo.reference())} held-out patches, {LOSS_TIMES} times each",
            "base": round(held_out_loss(made.network(), demo), 4),
        },
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "bytes": out.stat().st_size,
    }  # fmt: skip
    out.chmod(0o644)
    out.with_suffix(".json").write_text(json.dumps(recipe, indent=1) + "\n")


def held_out_loss(network: Network, dataset: Dataset) -> float:
    """Compute the loss on the held-out patches, at evenly spaced times and with fixed noise."""
    chosen = dataset.reference()
    images, ids = to_unit(dataset.images[chosen]), torch.from_numpy(dataset.ids[chosen])
    generator = torch.Generator().manual_seed(LOSS_SEED)
    total = 0.0
    with torch.no_grad():
        for number in range(LOSS_TIMES):
            t = torch.full((len(chosen),), (number + 0.5) / LOSS_TIMES)
            x, target = add_noise(images, torch.randn(images.shape, generator=generator), t)
            total += float((network(x, t, t, ids)[0] - target).square().mean())
    return total / LOSS_TIMES


def _patches(work: Path, config: ModelConfig, patches: int) -> Dataset:
    """Cut the patches of the first delivery, once."""
    folder = work / f"patches-{patches}"
    if not (folder / "whole").is_file():
        photographs.surfaces(folder / "data", 1, patches)
        (folder / "whole").touch()
    return prepare(folder / "data", config, work / "cache")


def _hash(dataset: Dataset) -> str:
    """Hash the decoded patches with their captions and groups."""
    digest = hashlib.sha256(dataset.images.tobytes())
    digest.update(json.dumps([dataset.captions, dataset.groups]).encode())
    return digest.hexdigest()


def _say(began: float) -> Callable[[int, Figures], None]:
    def step(number: int, figures: Figures) -> None:
        if number % 50 == 0:
            print(f"step {number} of {OPTIONS.steps}: loss {figures.loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201

    return step


if __name__ == "__main__":
    main()

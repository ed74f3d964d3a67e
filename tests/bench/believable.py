"""`make believable`: are drawn surfaces what their captions say? A network that learnt it from real patches names each picture.

The judge is trained on real patches alone, from tiles of the photographs that the demo trains on, and tried on real patches of the
tiles that the demo holds out. It must name LEAST_REAL of those right, surface, light and defect together, or its word is worth
nothing. Then it names what a model drew through ONNX Runtime with the model's own sampler: each caption equally often, so that three
of four pictures must have a defect.

    make believable                  the base that the demo adopts
    make believable DEMO=folder      and the champion of a finished demo
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flows.demo import LINE
from flows.demo import SETTINGS as DEMO
from infra.base.train import OUT as BASES
from model import export, photographs
from model.config import ModelConfig
from model.data import Dataset, mix, prepare, to_bytes, to_unit
from model.drawing import sampler_of
from model.graph import build
from model.network import Network
from model.scorecard import Sampler
from model.session import Session, load

OUT = Path("build/bench/believable.json")
LEAST_REAL, LEAST_DRAWN = 0.95, 0.80
PATCHES, SEED = 2400, 11  # of each surface and delivery; others than those that the base and the demo learn from
IMAGES = 320
STEPS, BATCH, RATE = 1500, 64, 3e-3
SURFACES = (*photographs.SURFACES, *photographs.SECOND_SURFACES)
DEFECTS = ("", *photographs.DEFECTS)
Named = tuple[int, int, int]  # surface, whether it is dim, defect


class Judge(nn.Module):
    """A small convolutional network with an answer each for surface, light and defect."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64, 96, 96)
        strides = (1, 2, 1, 2, 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.heads = nn.ModuleList(nn.Linear(2 * widths[-1], n) for n in (len(SURFACES), 2, len(DEFECTS)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the three answers' logits for images [B, 1, 16, 16] in [-1, 1]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
        x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return [head(x) for head in self.heads]

    def names(self, images: Tensor) -> list[Named]:
        """Name what is on images."""
        with torch.no_grad():
            answers = [torch.cat([self(part)[k] for part in images.split(256)]).argmax(dim=1).tolist() for k in range(3)]
        return list(zip(*answers, strict=True))


@dataclass(frozen=True)
class Real:
    """Real patches: those to learn from and those held out, and what is on each."""

    data: Dataset
    names: list[Named]


def named(caption: str) -> Named:
    """Take a caption apart."""
    head, _, defect = caption.partition(", ")
    return SURFACES.index(head.removeprefix("dim ")), int(head.startswith("dim ")), DEFECTS.index(defect)


def said(name: Named) -> str:
    """Put a caption together."""
    surface, dim, defect = name
    return f"{'dim ' if dim else ''}{SURFACES[surface]}{f', {DEFECTS[defect]}' if defect else ''}"


def patches(config: ModelConfig) -> Real:
    """Cut many patches of both deliveries."""
    with tempfile.TemporaryDirectory() as place:
        for delivery in (1, 2):
            photographs.surfaces(Path(place) / "data", delivery, PATCHES, SEED)
        data = prepare(Path(place) / "data", config, Path(place) / "cache")
        data = Dataset(np.array(data.images), data.captions, data.ids, data.held_out, data.groups, data.quarantine)
    return Real(data, [named(caption) for caption in data.captions])


def taught(real: Real) -> Judge:
    """Train the judge; each caption is drawn equally often, mirrored, a little brighter or darker, and with a little noise."""
    torch.manual_seed(SEED)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.02)
    training = real.data.training()
    images = to_unit(real.data.images[training])
    targets = torch.tensor([real.names[i] for i in training])
    counts = Counter(real.names[i] for i in training)
    weights = torch.tensor([1 / counts[real.names[i]] for i in training], dtype=torch.float64)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(mix(SEED, step))
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        x = images[chosen]
        x = x.flip(2) if torch.rand((), generator=generator) < 0.5 else x
        # A page's or a dim patch's light has a side, so pictures are not turned from left to right.
        x = x + 0.02 * torch.randn(x.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * min(1.0, 2 * (1 - step / STEPS))
        loss = sum(F.cross_entropy(answer, targets[chosen, k]) for k, answer in enumerate(judge(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


def right(judge: Judge, images: Tensor, names: list[Named], groups: list[str] | None = None) -> dict[str, Any]:
    """Compare what the judge says with what is asked for: shares right, each caption alike, and what was taken for what."""
    answers = judge.names(images)
    hits = np.array([a == b for a, b in zip(answers, names, strict=True)])
    of = np.array([said(name) for name in names])
    captions = sorted(set(of))
    share = float(np.mean([hits[of == caption].mean() for caption in captions]))
    wrong = Counter((said(b), said(a)) for a, b in zip(answers, names, strict=True) if a != b)
    return {
        "n": len(names), "right": round(share, 4), "interval": _interval(hits, of, groups),
        "parts": {
            part: round(float(np.mean([a[k] == b[k] for a, b in zip(answers, names, strict=True)])), 4)
            for k, part in enumerate(("surface", "light", "defect"))
        },
        "with_defect": round(float(np.mean([h for h, name in zip(hits, names, strict=True) if name[2]])), 4),
        "captions": {c: {"n": int((of == c).sum()), "right": round(float(hits[of == c].mean()), 3)} for c in captions},
        "taken_for": [{"asked": a, "named": b, "times": n} for (a, b), n in wrong.most_common(12)],
    }  # fmt: skip


def _interval(hits: Any, of: Any, groups: list[str] | None) -> list[float]:
    """Compute a 95 % interval of the share by drawing groups again; patches of one tile are not independent."""
    rng = np.random.default_rng(SEED)
    names, number = np.unique(groups if groups is not None else np.arange(len(hits)), return_inverse=True)
    shares = []
    for _ in range(1000):
        weight = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[number]
        known = [(weight[of == c], hits[of == c]) for c in sorted(set(of))]
        shares.append(np.mean([(w * h).sum() / w.sum() for w, h in known if w.sum()]))
    return [round(float(q), 4) for q in np.quantile(shares, (0.025, 0.975))]


def drawn(session: Session, sampler: Sampler, captions: list[str], label: str) -> tuple[Tensor, list[Named]]:
    """Draw IMAGES or a few more, each caption equally often."""
    asked = [captions[i % len(captions)] for i in range(-(-IMAGES // len(captions)) * len(captions))]
    parts = []
    for part, _ in session.generate_many(asked, 5_000, sampler):
        parts.append(part)
        if sys.stderr.isatty():
            print(f"\r{label}: {sum(map(len, parts))} of {len(asked)}", end="", file=sys.stderr)
    images = to_unit(to_bytes(torch.cat(parts)))  # what a person sees has 256 grey levels, as the real patches have
    return images, [named(caption) for caption in asked]


def of_weights(path: Path, config: ModelConfig) -> Session:
    """Export a file of weights and open it as a device would."""
    network = Network(config)
    network.load_state_dict(load_file(path))
    return Session(build(config, "bfloat16").SerializeToString(deterministic=True), export.pack(network.eval(), "bfloat16"))


def main() -> None:
    """Train or load the judge, try it on real patches, judge the models, print and write the figures."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("demo", nargs="?", type=Path, help="folder of a finished demo, whose champion is judged, too")
    asked.add_argument(
        "--weights", type=Path, default=BASES / f"{LINE}.safetensors", help="weights to judge; the base by default"
    )
    asked.add_argument("--kept", type=Path, default=OUT.with_name("judge.safetensors"), help="where the judge is kept")
    chosen = asked.parse_args()
    torch.set_num_threads(1)
    line = tomllib.loads(DEMO)["lines"][LINE]
    config = ModelConfig(
        tier=line["tier"], configuration="I", image_size=line["image_size"], channels=line["channels"], text_length=line["text_length"]
    )  # fmt: skip
    began = time.monotonic()
    real = patches(config)
    held_out = real.data.reference()
    if chosen.kept.is_file():
        judge = Judge()
        judge.load_state_dict(load_file(chosen.kept))
        judge.eval()
    else:
        judge = taught(real)
        chosen.kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(judge.state_dict(), chosen.kept)
    figures: dict[str, Any] = {
        "real": right(
            judge, to_unit(real.data.images[held_out]), [real.names[i] for i in held_out], [real.data.groups[i] for i in held_out]
        )
        | {"groups": len({real.data.groups[i] for i in held_out}), "training": len(real.data.training())}
    }
    first = sorted({c for c in real.data.captions if not c.startswith(("dim", *photographs.SECOND_SURFACES))})
    if chosen.weights.is_file():
        images, names = drawn(of_weights(chosen.weights, config), Sampler(**line["sampler"]), first, "base")
        figures["base"] = right(judge, images, names) | {"file": chosen.weights.name, "sampler": line["sampler"]}
    if chosen.demo:
        from flows.workspace import Workspace
        from registry.catalog import Subject
        from registry.champions import champion_of

        workspace = Workspace(chosen.demo)
        champion = champion_of(workspace, Subject(line=LINE, configuration="I", variant="full"))
        assert champion
        bundle = workspace.catalog.files(champion, "bundle", workspace.work / "champions")
        images, names = drawn(load(bundle), sampler_of(bundle), sorted(set(real.data.captions)), "demo")
        figures["demo"] = right(judge, images, names) | {"version": champion.version, "sampler": sampler_of(bundle).model_dump()}
    figures["seconds"] = round(time.monotonic() - began, 1)
    for name, row in figures.items():
        if isinstance(row, dict):
            low, high = row["interval"]
            print(
                f"{name:5} {row['n']:6} pictures: {row['right']:.1%} named by their caption ({low:.1%} to {high:.1%}), parts {row['parts']}"
            )
            print("      " + ", ".join(f"{c} {v['right']:.0%}" for c, v in row["captions"].items()))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1) + "\n")
    if figures["real"]["right"] < LEAST_REAL:
        sys.exit(f"the judge names only {figures['real']['right']:.1%} of real patches right, so it cannot judge others")
    if low := [name for name in ("base", "demo") if name in figures and figures[name]["right"] < LEAST_DRAWN]:
        sys.exit(f"fewer than {LEAST_DRAWN:.0%} of the pictures of {' and '.join(low)} are named by their caption")


if __name__ == "__main__":
    main()

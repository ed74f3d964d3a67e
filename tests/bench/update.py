"""`make bench-update`: how small an update may be at which share of an ordinary retraining's gain, beside other tools.

For each product a champion is retrained on the second delivery, with three seeds. *Kept* is the share of that retraining's gain in
flow-matching loss on held-out items of the new delivery, on the same noises and times; its 95 % interval is a bootstrap over groups,
pooled over the seeds. Bytes are those of a delta of the weights; `fetched` is everything that a real agent fetches over HTTP. The
gate's kernel distance of the images to the held-out ones stands beside it.

The default run takes the demo's product in the tier nano. `FULL=1` adds the tier small, with fewer rows, and Debian's
dataset-fashion-mnist, for which champions are trained first. Every part is kept in build/bench/update, so a killed run resumes. After each product it prints a table, and writes
build/bench/update.json, tests/bench/results/update.md and update.svg.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bsdiff4
import numpy as np
import numpy.typing as npt
import torch
from backports import zstd
from safetensors.torch import load_file, save_file

from model import evaluate, features, publish, train
from model.config import PrecisionName, TierName
from model.data import Dataset
from model.export import pack, unpack
from model.graph import build
from model.kept import losses
from model.network import Network
from model.scorecard import Sampler
from model.session import Session
from model.train import Checkpoint, TrainOptions, round_update
from model.update import FACTORS, METHODS, MethodName, write_factors
from ota.delta import files
from ota.delta.streams import keep_memory
from registry import selection
from registry.curve import hold
from tests.bench import fetched
from tests.bench.deliveries import DATA, STORED, Product, lamps, product
from tests.bench.variants import kept

OUT, PARTS = Path("build/bench/update.json"), Path("build/bench/update")
TABLE = Path("tests/bench/results/update.md")
SEEDS = (0, 1, 2)
CORES = 2
RETRAINING = TrainOptions(steps=310, batch=8, learning_rate=7e-4, stored=STORED, method="lowrank")
LEVELS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.24)
POLISHED = (0.05, 0.16)
INT8_LEVEL = 0.03
PUBLISHED = (0.03, 0.08, 0.12, 0.16)  # levels of which a real agent fetches the update
GRIDS = (2.0, 3.0)  # the way of version 0.1: every change rounded to a grid after the training
OTHERS: tuple[MethodName, ...] = ("grid", "small-tensors", "seeded")  # methods that train in a way of their own
OLD_LEVELS = (0.03, 0.08)  # levels at which the gate judges the images of old captions
QPS = (-38, -32, -26)  # quantisation parameters of NNCodec
SAMPLER = Sampler(method="ab2", steps=14, guidance=2.0)
IMAGES = 128
DRAWS = 2000  # of the bootstrap
GOALS = {"nano": ((100, 0.98), (300, 0.90)), "small": ((50, 0.98), (150, 0.90))}  # × bsdiff4, and least share kept
KINDS = {
    "lowrank": "o-", "lowrank, polished": "D", "grid": "s", "small-tensors": "^", "seeded": "v", "NNCodec": "x--",
    "int8 afresh, bsdiff4": "P", "fp32 retrain, bsdiff4": "*", "fp32 retrain, zstd": "+",
}  # fmt: skip
CHAIN_STEPS, CHAIN_LEVEL, COARSEST = 100, 0.03, 4.0
NNCODEC = PARTS / "nncodec"  # an environment of its own: it needs NumPy 1


def main() -> None:
    """Measure what is not there yet, and write the table."""
    torch.set_num_threads(1)
    keep_memory()
    wanted: list[tuple[str, TierName]] = [("surfaces", "nano")]
    if os.environ.get("FULL"):
        wanted += [("fashion", "nano"), ("surfaces", "small"), ("fashion", "small")]
    releases, products = 12 if os.environ.get("FULL") else 4, dict[str, Any]()
    PARTS.mkdir(parents=True, exist_ok=True)
    for name, tier in wanted:
        made = product(name, tier, PARTS / "products")
        with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(fill, name, tier, seed) for seed in SEEDS]
            waiting.append(pool.submit(fill_chain, releases))
            for part in waiting:
                part.result()
        products[made.name] = measured(made, tier)
        write(products, releases)


def write(products: dict[str, Any], releases: int) -> None:
    """Write the tables and the picture of the products that are measured so far."""
    found = products | {"chain": fill_chain(releases)}
    found["behind"], found["aged"] = kept("behind", late, PARTS), kept("aged", in_an_old_repository, PARTS)
    found["machine"] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["cpu_seconds"] = round(sum(usage.ru_utime + usage.ru_stime for usage in spent))
    OUT.write_text(json.dumps(found, indent=1))
    table = told(found)
    TABLE.write_text(table)
    plot(products)
    print(table, flush=True)


def fill(name: str, tier: TierName, seed: int) -> None:
    """Measure all parts of a seed that are not there yet, in a process of its own."""
    torch.set_num_threads(1)
    keep_memory()
    made = product(name, tier, PARTS / "products")
    seed_rows(made, seed)
    kept(f"{made.name}-{seed}-old images", partial(on_old_data, made, seed), PARTS)
    if seed == SEEDS[0]:
        kept(f"{made.name}-images", partial(drawn_rows, made), PARTS)


def fill_chain(releases: int) -> list[dict[str, Any]]:
    """Measure the chain unless that was done before."""
    torch.set_num_threads(1)
    keep_memory()
    rows: list[dict[str, Any]] = kept(f"chain-{releases}", partial(chain, releases), PARTS)
    return rows


# One product


@dataclass(frozen=True)
class Scene:
    """A product, one seed's ordinary retraining, and what its rows are measured on."""

    product: Product
    master: Checkpoint
    new: Dataset
    old: Dataset
    work: Path

    def loss(self, network: Network) -> dict[str, Any]:
        """Measure a model: the loss of each new item, and the mean loss of the old ones."""
        new = losses(network, self.new)
        return {"new": new.values.tolist(), "groups": new.groups.tolist(), "old": float(losses(network, self.old).values.mean())}

    def delta(self, new: Network, stored: PrecisionName = STORED, factors: Path | None = None) -> int:
        """Return the bytes of the delta between the weights of the champion and others."""
        config = self.product.champion.lineage.config
        names = {"old": pack(self.product.champion.network(), stored), "new": pack(new, stored)}
        graph = build(config, stored).SerializeToString(deterministic=True)
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            for name, data in (names | {"graph": graph}).items():
                (Path(place) / name).write_bytes(data)
            old, after, patch = (Path(place) / name for name in ("old", "new", "patch"))
            size = files.build(old, after, patch, Path(place) / "graph", factors=factors).size
            files.apply(old, patch, Path(place) / "again")
            assert (Path(place) / "again").read_bytes() == names["new"]
        return size


def only(dataset: Dataset, items: npt.NDArray[np.intp]) -> Dataset:
    """Return a dataset of these items, all of them held out."""
    return Dataset(
        dataset.images[items], [dataset.captions[i] for i in items], dataset.ids[items], np.ones(len(items), np.bool_),
        [dataset.groups[i] for i in items], {},
    )  # fmt: skip


def measured(made: Product, tier: TierName) -> dict[str, Any]:
    """Measure all rows of a product, with every seed."""
    found: dict[str, Any] = {"tier": tier, "rows": {}}
    for seed in SEEDS:
        found["rows"][str(seed)] = seed_rows(made, seed)
    found["groups"] = found["rows"][str(SEEDS[0])]["champion"]["groups"]
    found["images"] = kept(f"{made.name}-images", lambda: drawn_rows(made), PARTS)
    found["old"] = [kept(f"{made.name}-{seed}-old images", partial(on_old_data, made, seed), PARTS) for seed in SEEDS]
    return found


def seed_rows(made: Product, seed: int) -> dict[str, Any]:
    """Measure the rows of one seed."""
    work = PARTS / "runs" / f"{made.name}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    options = RETRAINING.model_copy(update={"seed": seed})
    spent = kept(f"{made.name}-{seed}-training", lambda: _trained(made, options, work / "master"), PARTS)
    master = train.load_checkpoint(work / "master")
    old = only(made.before, made.before.reference())
    scene = Scene(made, master, only(made.after, made.new_items()), old, work)

    def row(name: str, make: Callable[[], dict[str, Any]]) -> None:
        rows[name] = kept(f"{made.name}-{seed}-{name}", make, PARTS)

    rows: dict[str, Any] = {"training": spent}
    row("champion", lambda: scene.loss(made.champion.network()))
    row("fp32 retrain", lambda: {**scene.loss(master.network()), "bytes": scene.delta(master.network(), "float32")})
    for tool, size in (("bsdiff4", bsdiff), ("zstd --patch-from", beside)):
        row(f"fp32 retrain, {tool}", partial(_plain, scene, size))
    row("int8 afresh, bsdiff4", lambda: _int8(scene))
    row("int8 afresh, zstd --patch-from", lambda: {"bytes": beside(scene, "int8")})
    row(f"int8, lowrank {INT8_LEVEL:g}", partial(_published, scene, INT8_LEVEL, "int8"))
    lean = made.champion.lineage.config.tier != "nano"  # a row takes ten times as long there
    for grid in GRIDS[1:] if lean else GRIDS:
        row(f"grid {grid:g} after the training", partial(_after, scene, grid))
    for level in PUBLISHED if lean else LEVELS:
        row(f"lowrank {level:g}", partial(_published, scene, level))
    for level in POLISHED[:1] if lean else POLISHED:
        row(f"lowrank {level:g}, polished", partial(_polished, scene, level))
    for method in OTHERS[:1] if lean else OTHERS:
        row(method, partial(_otherwise, scene, method, options))
    if nncodec():
        for qp in QPS[1:2] if lean else QPS:
            row(f"NNCodec, qp {qp}", partial(_nncodec, scene, qp))
    return rows


def _trained(made: Product, options: TrainOptions, out: Path) -> dict[str, float]:
    """Retrain the champion, once with what the method collects and once without; return the processor seconds of each."""
    spent = {}
    for name, chosen in (("plain", options.model_copy(update={"method": None, "stored": "float32"})), ("collecting", options)):
        began = time.process_time()
        folder = out if name == "collecting" else out.with_name("plain")
        train.train(made.champion.lineage.config, made.after, DATA, chosen, folder, parent=made.champion)
        spent[name] = time.process_time() - began
    return spent


def _published(scene: Scene, level: float, stored: PrecisionName = STORED) -> dict[str, Any]:
    """Measure the default method at a level."""
    began = time.process_time()
    out = scene.work / f"lowrank-{level:g}{'' if stored == STORED else f'-{stored}'}"
    made = publish.publish(scene.master, scene.product.champion, level, stored, out)
    spent = time.process_time() - began
    network = made.network()
    row = {**scene.loss(network), "bytes": scene.delta(network, stored, made.folder / FACTORS), "seconds": spent}
    if level in PUBLISHED and stored == STORED:
        row |= fetched.one(scene.work, scene.product.champion, made, scene.product.after.captions, STORED)
    return row


def _polished(scene: Scene, level: float) -> dict[str, Any]:
    """Measure it after some steps of training under the quantiser."""
    began = time.process_time()
    publication = publish.Publication.of(scene.master, scene.product.champion, STORED)
    made = publication.write_polished(level, scene.work / f"polished-{level:g}", scene.product.after, RETRAINING)
    spent = time.process_time() - began
    network = made.network()
    return {**scene.loss(network), "bytes": scene.delta(network, factors=made.folder / FACTORS), "seconds": spent}


def _otherwise(scene: Scene, method: MethodName, options: TrainOptions) -> dict[str, Any]:
    """Measure a method that trains in a way of its own, at its usual level."""
    made, began = scene.product, time.process_time()
    chosen = options.model_copy(update={"method": method})
    folder = scene.work / method
    trained = train.train(made.champion.lineage.config, made.after, DATA, chosen, folder / "master", parent=made.champion)
    published = publish.publish(trained, made.champion, METHODS[method].level, STORED, folder / "published", method)
    spent, network = time.process_time() - began, published.network()
    return {**scene.loss(network), "bytes": scene.delta(network, factors=published.folder / FACTORS), "seconds": spent}


def _after(scene: Scene, grid: float) -> dict[str, Any]:
    """Round the change to a grid after the training, as version 0.1 does."""
    network = scene.master.network()
    round_update(network, scene.product.champion.network(), grid)
    train.round_to_stored(network, STORED)
    return {**scene.loss(network), "bytes": scene.delta(network)}


# Other tools


def _pair(scene: Scene, stored: PrecisionName) -> tuple[bytes, bytes]:
    return pack(scene.product.champion.network(), stored), pack(scene.master.network(), stored)


def _plain(scene: Scene, size: Callable[[Scene, PrecisionName], int]) -> dict[str, Any]:
    """Return the bytes of another tool's patch of the float32 weights."""
    return {"bytes": size(scene, "float32")}


def bsdiff(scene: Scene, stored: PrecisionName) -> int:
    """Return the bytes of bsdiff4's patch between the weights of champion and retraining."""
    return len(bsdiff4.diff(*_pair(scene, stored)))


def beside(scene: Scene, stored: PrecisionName) -> int:
    """Return the bytes of what `zstd -19 --patch-from` writes."""
    old, new = _pair(scene, stored)
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: 19, zstd.CompressionParameter.window_log: 25,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }  # fmt: skip
    return len(zstd.compress(new, options=options, zstd_dict=zstd.ZstdDict(old, is_raw=True).as_prefix))


def _int8(scene: Scene) -> dict[str, Any]:
    """Quantise champion and retraining afresh, and patch one to the other."""
    old, new = _pair(scene, "int8")
    made = unpack(scene.master.lineage.config, "int8", new)
    return {**scene.loss(made), "bytes": len(bsdiff4.diff(old, new))}


CODER = """
import sys
from unittest.mock import MagicMock
for name in ("torchvision", "torchvision.transforms", "torchvision.models", "torchvision.datasets", "torchvision.io", "torchvision.ops"):
    sys.modules[name] = MagicMock()  # its operators need another build of torch; the coder does not use them
from safetensors.numpy import load_file, save_file
from nncodec.nn import decode, encode
change, qp, out = load_file(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
coded = encode(change, {"qp": qp, "verbose": False})
save_file(decode(coded, {"verbose": False}), out)
print(len(coded))
"""


def nncodec() -> bool:
    """Install NNCodec (ISO/IEC 15938-17) in an environment of its own, unless it is there; return whether it can be used."""
    if not (NNCODEC / "bin" / "python").is_file():
        uv = [str(Path(sys.executable).with_name("uv"))]
        for words in (
            ["venv", "--quiet", str(NNCODEC)],
            [
                "pip",
                "install",
                "--quiet",
                "--python",
                str(NNCODEC / "bin" / "python"),
                "nncodec==2.1.3",
                "torch==2.13.0",
                "safetensors",
            ],
        ):
            if subprocess.run([*uv, *words], capture_output=True).returncode:
                break
    tried = subprocess.run(
        [str(NNCODEC / "bin" / "python"), "-c", CODER.split("change", maxsplit=1)[0]], capture_output=True, text=True
    )
    if tried.returncode:
        print(f"NNCodec cannot be used: {(tried.stderr.strip().splitlines() or ['not installed'])[-1]}", flush=True)
    return not tried.returncode


def _nncodec(scene: Scene, qp: int) -> dict[str, Any]:
    """Encode the change by NNCodec, and add what it decodes to the champion."""
    old, new = (dict(of.network().named_parameters()) for of in (scene.product.champion, scene.master))
    change, back = scene.work / "change.safetensors", scene.work / "back.safetensors"
    save_file({name: (new[name] - old[name]).detach().contiguous() for name in old}, change)
    done = subprocess.run(
        [str(NNCODEC / "bin" / "python"), "-c", CODER, str(change), str(qp), str(back)],
        capture_output=True,
        text=True,
        check=True,
    )
    network, moved = scene.product.champion.network(), load_file(back)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.add_(moved[name].reshape(weight.shape))
    train.round_to_stored(network, STORED)
    return {**scene.loss(network), "bytes": int(done.stdout.split()[-1])}


# Images


def drawn_rows(made: Product) -> dict[str, Any]:
    """Measure the gate's kernel distances to held-out images, of the champion, of the ordinary retraining and of the updates."""
    work = PARTS / "runs" / f"{made.name}-{SEEDS[0]}"
    spaces = features.fit(made.before, PARTS / "products" / f"{made.name}-features.safetensors")
    networks = {"champion": made.champion.network(), "fp32 retrain": train.load_checkpoint(work / "master").network()}
    networks |= {f"lowrank {level:g}": train.load_checkpoint(work / f"lowrank-{level:g}").network() for level in PUBLISHED}
    rows: dict[str, Any] = {}
    for name, network in networks.items():
        graph = build(network.config, "float32").SerializeToString(deterministic=True)
        session = Session(graph, pack(network, "float32"), threads=1)
        drawn = evaluate.draw(session, evaluate.held_out_captions(made.after, IMAGES), SAMPLER)
        rows[name] = {q.space: (q.kd, q.kd_se) for q in evaluate.quality(spaces, made.after, drawn, "new")}
    return rows


def on_old_data(made: Product, seed: int) -> dict[str, Any]:
    """Ask the gate's question of the old data: is the update not worse than the champion there, in every space and aspect?"""
    spaces = features.fit(made.before, PARTS / "products" / f"{made.name}-features.safetensors")
    folder, limits = PARTS / "runs" / f"{made.name}-{seed}", selection.Limits()
    captions = evaluate.held_out_captions(made.before, IMAGES)

    def drawn(network: Network) -> evaluate.Drawn:
        graph = build(network.config, "float32").SerializeToString(deterministic=True)
        return evaluate.draw(Session(graph, pack(network, "float32"), threads=1), captions, SAMPLER)

    champion, found = drawn(made.champion.network()), dict[str, Any]()
    qualities = evaluate.quality(spaces, made.before, champion, "old")
    for level in OLD_LEVELS:
        update = drawn(train.load_checkpoint(folder / f"lowrank-{level:g}").network())
        rows = evaluate.compare(spaces, made.before, update, champion, "old", made.champion.weights_sha256)
        found[f"lowrank {level:g}"] = [
            {
                "space": row.space, "aspect": row.aspect, "upper": row.delta + selection.quantile(row.groups, limits.alpha) * row.se,
                "margin": selection.margin(qualities, row, limits),
            }
            for row in rows
        ]  # fmt: skip
    return found


# A chain of releases


def chain(releases: int) -> list[dict[str, Any]]:
    """Retrain on a drifting world, release after release, with error feedback; compare with the fp32 chain, which is the master.

    Bytes are held to those of the first releases, as without a budget in a factory; `usual` are those that the usual level would take.
    """
    fielded, rows = product("surfaces", "nano", PARTS / "products").champion, list[dict[str, Any]]()
    for release in range(1, releases + 1):
        work = PARTS / "chain" / str(release)
        dataset = lamps(PARTS / "products", release)
        new = only(dataset, np.array([i for i in dataset.reference() if dataset.captions[i].startswith(f"{chr(96 + release)} ")]))
        options = RETRAINING.model_copy(update={"seed": release, "steps": CHAIN_STEPS})
        master = train.train(fielded.lineage.config, dataset, DATA, options, work / "master", parent=fielded)
        before = fielded if not rows else train.load_checkpoint(PARTS / "chain" / str(release - 1) / "master")
        publication = publish.Publication.of(master, fielded, STORED)
        scene = Scene(Product("chain", fielded, dataset, dataset), master, new, new, work)

        def size(level: float, publication: publish.Publication = publication, scene: Scene = scene) -> int:
            update, factors = publication.approximation.at(level), scene.work / FACTORS
            write_factors(factors, update)
            return scene.delta(update.network(), factors=factors)

        known = {CHAIN_LEVEL: size(CHAIN_LEVEL)}
        level, _ = hold(size, CHAIN_LEVEL, COARSEST, [row["usual"] for row in rows], known)
        made = publication.write(level, work / "published")
        means = [float(losses(of.network(), new).values.mean()) for of in (before, master, made)]
        rows.append({
            "release": release, "before": means[0], "master": means[1], "published": means[2],
            "level": level, "bytes": known[level], "usual": known[CHAIN_LEVEL],
        })  # fmt: skip
        fielded = made
    return rows


def late() -> dict[str, Any]:
    """Measure a device that is three releases behind in that chain."""
    made = [train.load_checkpoint(PARTS / "chain" / str(release) / "published") for release in (1, 2, 3)]
    captions = lamps(PARTS / "products", 3).captions
    return fetched.behind(PARTS, [product("surfaces", "nano", PARTS / "products").champion, *made], captions, STORED)


def in_an_old_repository() -> dict[str, Any]:
    """Measure the first product's update at the first of the published levels as the last of many releases."""
    made, level = product("surfaces", "nano", PARTS / "products"), PUBLISHED[0]
    update = train.load_checkpoint(PARTS / "runs" / f"{made.name}-{SEEDS[0]}" / f"lowrank-{level:g}")
    found = fetched.aged(PARTS, made.champion, update, made.after.captions, STORED)
    weights = kept(f"{made.name}-{SEEDS[0]}-lowrank {level:g}", dict, PARTS)["bytes"]
    return found | {"weights": weights}


# The table


def interval(rows: Sequence[dict[str, Any]], name: str, groups: Sequence[int]) -> tuple[float, float, float] | None:
    """Return the share of the gain that a row keeps, pooled over seeds, with its 95 % interval; None: it has no losses."""
    if "new" not in rows[0][name]:
        return None
    before, after, own = (np.stack([row[of]["new"] for row in rows]).sum(axis=0) for of in ("champion", "fp32 retrain", name))
    count = max(groups) + 1
    whole, part = (np.bincount(groups, before - other, minlength=count) for other in (after, own))
    chosen = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    shares = part[chosen].sum(axis=1) / whole[chosen].sum(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(part.sum() / whole.sum()), float(low), float(high)


def told(found: dict[str, Any]) -> str:
    """Write the tables."""
    machine = found["machine"]
    lines = [
        "# Updates small by design", "",
        f"`make bench-update` on {machine['machine']}, {machine['cores']} cores, load {machine['load'][0]:.1f}; seeds {SEEDS}. Kept: share of the ordinary",
        "retraining's gain in flow-matching loss on new held-out items, 95 % by bootstrap over groups, pooled over the seeds. Bytes: means over",
        "the seeds, of the weights' delta; fetched: everything that a real agent fetches over HTTP for the update.", "",
    ]  # fmt: skip
    for name, rows in found.items():
        if isinstance(rows, dict) and "rows" in rows:
            lines += _product_table(name, rows)
    lines += _chain_table(found["chain"])
    old, behind = found["aged"], found["behind"]
    steps, ratio = ", ".join(f"{size:,}" for size in behind["steps"]), behind["at_once"] / sum(behind["steps"])
    lines += [
        "",
        f"A device that is three releases behind fetches {behind['at_once']:,} bytes at once: {ratio:.2f} times the sum of the steps ({steps}).",
        "",
        (
            f"With {old['classes']} classes and {old['releases']} releases, a device fetches {old['fetched']:,} bytes for an update whose weights "
            f"take {old['weights']:,}: {old['fetched'] - old['weights']:,} are something else."
        ),
    ]
    lines += ["", f"{found['cpu_seconds']:,} s of processor time in this run; parts that were there already took none.", ""]
    return "\n".join(lines)


def _product_table(name: str, found: dict[str, Any]) -> list[str]:
    seeds = [found["rows"][str(seed)] for seed in SEEDS]
    yardstick = float(np.mean([row["fp32 retrain, bsdiff4"]["bytes"] for row in seeds]))
    lines = [
        f"## {name}", "", "| update | bytes | × bsdiff4 | fetched | × bsdiff4 | kept, % | loss of old items | CPU s |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in seeds[0]:
        if row in ("training", "champion"):
            continue

        def mean(key: str, row: str = row) -> float | None:
            return float(np.mean([one[row][key] for one in seeds])) if all(key in one[row] for one in seeds) else None

        size, all_in, old, spent = mean("bytes"), mean("fetched"), mean("old"), mean("seconds")
        share = interval(seeds, row, found["groups"])
        kept = f"{100 * share[0]:.1f} [{100 * share[1]:.1f} to {100 * share[2]:.1f}]" if share else "the same"
        lines.append(
            f"| {row} | {size:,.0f} | {yardstick / size:.1f} | " if size else f"| {row} | | | ",
        )
        lines[-1] += f"{all_in:,.0f} | {yardstick / all_in:.0f} | " if all_in else "| | "
        lines[-1] += f"{kept} | {old:.4f} | " if old else f"{kept} | | "
        lines[-1] += f"{spent:.1f} |" if spent else "|"
    lines += ["", *(_goal(seeds, found["groups"], yardstick, times, least) for times, least in GOALS[found["tier"]])]
    ratio = np.mean([row["training"]["collecting"] / row["training"]["plain"] for row in seeds])
    whole = np.mean([
        (row["training"]["collecting"] + row[f"lowrank {POLISHED[0]:g}, polished"]["seconds"]) / row["training"]["plain"] for row in seeds
    ])  # fmt: skip
    champion_old = float(np.mean([row["champion"]["old"] for row in seeds]))
    judged = {level: [row for one in found["old"] for row in one[level]] for level in found["old"][0]}
    lines += [
        "", (f"The champion's loss of old items is {champion_old:.4f}. Training takes {ratio:.2f} times the processor time of one that collects nothing; "
        f"with the making of the update and its polish, {whole:.2f} times."), "",
        "Old data, by the gate's test of non-inferiority (upper bound below the margin; every seed, space and aspect): " + "; ".join(
            f"{level}: {sum(row['upper'] < row['margin'] for row in rows)} of {len(rows)}" for level, rows in judged.items()
        ) + ".", "",
        "| kernel distance of 128 images, seed 0 (± its error) | " + " | ".join(next(iter(found["images"].values()))) + " |",
        "|---|" + "---|" * len(next(iter(found["images"].values()))),
    ]  # fmt: skip
    lines += [
        f"| {row} | " + " | ".join(f"{kd:.4f} ± {se:.4f}" for kd, se in spaces.values()) + " |"
        for row, spaces in found["images"].items()
    ]
    return [*lines, ""]


def _goal(seeds: Sequence[dict[str, Any]], groups: Sequence[int], yardstick: float, times: float, least: float) -> str:
    """Say which update that an agent fetched meets a goal with the fewest bytes: so many times smaller, and a share surely kept."""
    said = f"Goal of {times:g} times, everything included, with the lower end at {least:.0%} or more:"
    best = None
    for row in (row for row in seeds[0] if all("fetched" in one[row] for one in seeds)):
        share, size = interval(seeds, row, groups), float(np.mean([one[row]["fetched"] for one in seeds]))
        if share and share[1] >= least and (best is None or size < best[1]):
            best = row, size, share[1]
    if best is None or yardstick / best[1] < times:
        return f"- {said} not met" + (f"; {best[0]} has {yardstick / best[1]:.0f} times." if best else ".")
    return f"- {said} met by {best[0]}, {yardstick / best[1]:.0f} times at {best[2]:.1%}."


def plot(products: dict[str, Any]) -> None:
    """Plot the share of the gain that each update keeps over its bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "update", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(products), figsize=(6 * len(products), 4.2), squeeze=False, sharey=True)
    for axes, (name, found) in zip(all_axes[0], products.items(), strict=True):
        seeds = [found["rows"][str(seed)] for seed in SEEDS]
        for kind, marker in KINDS.items():
            points = []
            for row in (row for row in seeds[0] if kind_of(row) == kind):
                share = interval(seeds, row, found["groups"])
                low, middle, high = (100 * (share[at] if share else 1.0) for at in (1, 0, 2))
                points.append((float(np.mean([one[row]["bytes"] for one in seeds])), middle, middle - low, high - middle))
            if points:
                x, y, below, above = np.array(sorted(points)).T
                axes.errorbar(x / 1000, y, (below.clip(0), above.clip(0)), fmt=marker, label=kind, capsize=2, lw=1, ms=5)
        axes.set(xscale="log", xlabel="bytes of the update's weights, kB", title=name, ylim=(60, 102))
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("share of the retraining's gain kept, %")
    all_axes[0][-1].legend(fontsize=8, loc="lower right")
    figure.savefig(TABLE.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")


def kind_of(row: str) -> str | None:
    """Return the curve to which a row belongs in the picture; None: it is not drawn."""
    if row.endswith(", polished"):
        return "lowrank, polished"
    return next((kind for kind in KINDS if row.startswith(kind)), None)


def _chain_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"## A chain of {len(rows)} releases on drifting data", "", "| release | fp32: before → after | published | gap, % of the gain | level | bytes | at the usual level |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        gap = (row["published"] - row["master"]) / (row["before"] - row["master"])
        lines.append(
            f"| {row['release']} | {row['before']:.4f} → {row['master']:.4f} | {row['published']:.4f} | {100 * gap:.1f} | {row['level']:.3f} | {row['bytes']:,} | {row['usual']:,} |"
        )
    return lines


if __name__ == "__main__":
    main()

"""What many tests start from: a small data set, a model trained on it for seconds, its export, and bundles of it.

Everything here is real (trained weights, signed metadata, files on disk); most of it is made once for each test process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Prefect, MLflow and DVC read these when they are imported. No test may send telemetry or find the user's own settings.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.pop("http_proxy", None)  # servers of tests are on the loopback interface
os.environ.pop("HTTP_PROXY", None)
os.environ.pop("all_proxy", None)
os.environ.pop("ALL_PROXY", None)
os.environ.pop("PREFECT_HOME", None)
os.environ.pop("PREFECT_API_URL", None)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")  # 20 s is too short on a busy machine
# Results are equal to the bit only on a CPU. `CUDA_VISIBLE_DEVICES=0` on the command line shows tests/test_hardware.py a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
os.environ["GIT_CONFIG_SYSTEM"] = os.devnull

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import ModelConfig
from model.data import Dataset, prepare
from model.export import Export, export
from model.scorecard import DataVersion, Sampler
from model.train import LINEAGE, WEIGHTS, Checkpoint, TrainOptions, load_checkpoint, train, write_safely
from ota.agent import cli as agent_cli
from ota.manifest import Origin
from ota.release.bundle import Bundle, assemble
from ota.release.keys import KeyRing, create
from ota.release.repository import Repository

torch.set_num_threads(1)  # two test processes share two cores

PREFECT = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}

CONFIG = ModelConfig(tier="test", configuration="I", image_size=16, channels=1, text_length=8)
SAMPLER = Sampler(method="ab2", steps=4, guidance=2.0)
VERSION = DataVersion(line="shapes", path="data/shapes", rev="0" * 40, md5="0" * 32 + ".dir", files=81, bytes=1)
CAPTIONS = ("bar", "disc")
LATENCY_MS = 10_000.0


def _forget_prefect() -> None:
    """Undo the Prefect settings that workspaces made; Prefect reads its home folder only once."""
    for name in [name for name in os.environ if name.startswith("PREFECT_") and name not in PREFECT]:
        del os.environ[name]
    os.environ.update(PREFECT)
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context
        from prefect.logging.handlers import APILogWorker
        from prefect.server.api.server import SubprocessASGIServer

        # Logs that still wait must reach their server before it stops: a failed attempt to send them is reported on the
        # standard error of whichever test runs by then.
        APILogWorker.drain_all(timeout=60, at_exit=False)
        for server in [*SubprocessASGIServer._instances.values()]:
            server.stop()
        refresh_global_settings_context()


@pytest.fixture(scope="module", autouse=True)
def _prefect_of_its_own() -> Iterator[None]:
    """Reset Prefect after each test file, so that the next file does not use this file's workspaces."""
    yield
    _forget_prefect()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Reset Prefect if its home folder was deleted with the folder of an earlier test."""
    home = os.environ.get("PREFECT_HOME")
    if home and not Path(home).is_dir():
        _forget_prefect()


def few(values: Iterable[Any], quick: int) -> list[Any]:
    """Return values for `parametrize`: `quick` of them, spread over the list, run in `make test`, and all in `make test-slow`."""
    every = list(values)
    chosen = {i * len(every) // quick for i in range(quick)}
    made = [value if isinstance(value, tuple) else (value,) for value in every]
    return [pytest.param(*value, marks=() if i in chosen else pytest.mark.slow) for i, value in enumerate(made)]


@dataclass(frozen=True)
class Told:
    """The output and the exit code of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def agent(*words: str) -> Told:
    """Run `ferry-agent` in this process and return its output and exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = agent_cli.call(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Told(code, out.getvalue(), err.getvalue())


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the commands of a parser by name."""
    group = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(group.choices)


def in_run(catalog: Any, run_id: str, name: str) -> bytes:
    """Read a file of a run as MLflow stores it, without any check."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(catalog.client.download_artifacts(run_id, name, folder)).read_bytes()


def write_images(folder: Path, count: int = 80, seed: int = 0, dim: bool = False) -> Path:
    """Write a folder of images of bars and discs, bright or dim, with captions, in the ImageFolder convention."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16]
    rows = []
    for i in range(count):
        caption = CAPTIONS[i % 2]
        at = rng.integers(4, 12)
        mask = np.abs(x - at) < 2 if caption == "bar" else np.hypot(x - at, y - rng.integers(4, 12)) < 4
        picture = (40 + 180 * mask + rng.normal(0, 8, mask.shape)) * (0.5 if dim else 1.0)
        name = f"{'dim-' if dim else ''}{i:03d}.png"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": f"dim {caption}" if dim else caption})
    with (folder / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a folder with 80 captioned images; do not write into it."""
    return write_images(tmp_path_factory.mktemp("images") / "shapes")


@pytest.fixture(scope="session")
def dataset(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Provide the data set of `images`, decoded."""
    return prepare(images, CONFIG, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def checkpoint(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Train a model of the test tier for a few seconds; its images are recognisably not noise."""
    options = TrainOptions(steps=120, batch=16, learning_rate=8e-3)
    return train(CONFIG, dataset, VERSION, options, tmp_path_factory.mktemp("run") / "first")


@pytest.fixture(scope="session")
def changed(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Checkpoint]:
    """Provide a function that changes the trained checkpoint: by small steps, or (amount 1) by shuffling every weight."""

    def make(name: str, amount: float) -> Checkpoint:
        folder = tmp_path_factory.mktemp("changed") / name
        shutil.copytree(checkpoint.folder, folder)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        weights = checkpoint.network().state_dict()
        for key, weight in weights.items():
            if amount == 1:
                order = torch.randperm(weight.numel(), generator=generator)
                weights[key] = weight.flatten()[order].view(weight.shape)
            else:
                weights[key] = weight + amount * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
        write_safely(folder / WEIGHTS, weights)
        lineage = checkpoint.lineage.model_copy(update={"parent": checkpoint.weights_sha256})
        (folder / LINEAGE).write_text(lineage.model_dump_json())
        return load_checkpoint(folder)

    return make


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export the trained model to its five files, stored in bfloat16."""
    return export(checkpoint, "bfloat16", SAMPLER, list(CAPTIONS), LATENCY_MS, tmp_path_factory.mktemp("export"))


def origin(version: int) -> Origin:
    """Make up an origin for bundles that no registry knows."""
    return Origin(
        data_rev="0" * 40, data_md5="0" * 32, code="1" * 64, lineage="2" * 64, scorecard="3" * 64, decision="4" * 64,
        model="shapes-I-full", version=version,
    )  # fmt: skip


def bundle_of(folder: Path, out: Path, version: int, tier: str = "test") -> Bundle:
    """Build a bundle of one exported variant."""
    return assemble(
        {"full": folder}, line="shapes", device_class="edge", tier=tier, configuration="I", precision="bfloat16",
        origin=origin(version), out=out,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bundles(
    exported: Export, changed: Callable[[str, float], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Build three bundles of one line: `first`, `second` (a small step from it), and `garbage` (consistent, but draws noise)."""
    out = tmp_path_factory.mktemp("bundles")
    made = {"first": bundle_of(exported.folder, out, 1)}
    for version, (name, amount) in enumerate((("second", 0.01), ("garbage", 1.0)), start=2):
        folder = out / f"export-{name}"
        export(changed(name, amount), "bfloat16", SAMPLER, list(CAPTIONS), LATENCY_MS, folder)
        made[name] = bundle_of(folder, out, version)
    return made


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """Create a key ring with the keys of all roles."""
    return create(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def repository(keys: KeyRing, tmp_path: Path) -> Repository:
    """Create an empty signed repository."""
    return Repository.create(tmp_path / "repository", keys)

"""Two hosts and a link of 64 kbit/s that loses packets and is cut: an update arrives, and costs little more than its bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.data import prepare
from model.export import export
from model.train import WEIGHTS, TrainOptions, load_checkpoint, train, write_safely
from ota.release.bundle import Bundle, make_delta
from ota.release.keys import KeyRing
from ota.release.repository import Repository
from tests.conftest import CAPTIONS, LATENCY_MS, SAMPLER, VERSION, bundle_of
from tests.fleet_kit import Device, Field, publish
from tests.link_kit import Link, why_not

pytest_plugins = ["tests.fleet_kit"]
pytestmark = pytest.mark.slow
PORT = 8123
CHANGED = 300_000  # weights; the delta is then about as large as the demo's


@dataclass
class Pair:
    """Two bundles of a model as large as a factory's, and their delta; a smaller one would cost mostly its connection."""

    first: Bundle
    second: Bundle
    step: Path


@pytest.fixture(scope="module")
def pair(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    config = ModelConfig(tier="nano", image_size=16, channels=1, text_length=8)
    options = TrainOptions(steps=5, batch=16)
    first = train(config, prepare(images, config, folder / "cache"), VERSION, options, folder / "run")
    shutil.copytree(first.folder, folder / "changed")
    weights, changed = first.network().state_dict(), 0
    for key, weight in weights.items():
        if changed < CHANGED and weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(changed))
            weights[key], changed = weight + 0.01 * weight.abs().mean() * noise, changed + weight.numel()
    write_safely(folder / "changed" / WEIGHTS, weights)
    bundles = []
    for number, checkpoint in enumerate((first, load_checkpoint(folder / "changed")), start=1):
        out = folder / f"export-{number}"
        export(checkpoint, "bfloat16", SAMPLER, list(CAPTIONS), LATENCY_MS, out)
        bundles.append(bundle_of(out, folder / "bundles", number, "nano"))
    made = make_delta(*bundles, folder / "deltas")
    assert made
    return Pair(*bundles, made.path)


@pytest.fixture
def scene(pair: Pair, keys: KeyRing, tmp_path: Path) -> Field:
    """Provide a repository that offers a delta to a device that has its base."""
    repository = Repository.create(tmp_path / "repository", keys)
    publish(repository, pair.first)
    device = Device.init(tmp_path / "device", repository)
    device.update()
    publish(repository, pair.second, pair.step, pair.first)
    return Field(tmp_path, repository, device)


@pytest.fixture
def link() -> Iterator[Link]:
    problem = why_not()
    if problem:
        pytest.skip(problem)
    with Link(rate=64_000, delay=0.15, loss=0.02) as made:
        yield made


@contextmanager
def served(link: Link, folder: Path) -> Iterator[str]:
    """Serve the repository on the far host, with a server that supports ranges."""
    script = "import sys; from pathlib import Path; from tests.test_link import serve; serve(Path(sys.argv[1]))"
    with subprocess.Popen(
        link.words("far", [sys.executable, "-c", script, str(folder)]), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        assert server.stdout.readline().strip() == "ready"
        try:
            yield f"http://{link.far_address}:{PORT}"
        finally:
            server.terminate()


def serve(folder: Path) -> None:
    """Serve a folder, with ranges, for as long as the process lives."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            body = path.read_bytes()[first:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("0.0.0.0", PORT), Handler)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    server.serve_forever()


def update(link: Link, device: Device) -> dict[str, object]:
    done = subprocess.run(link.words("near", device.words("update", "--json")), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


def test_delta_update_costs_little_more_than_its_bytes(link: Link, scene: Field, pair: Pair):
    with served(link, scene.repository.folder) as address:
        scene.device.configure(repository=address)
        told = update(link, scene.device)
    assert told["way"] == "delta"
    assert scene.device.active == pair.second.manifest.digest
    assert link.to_near.lost + link.to_far.lost > 0
    received = int(str(told["received"]))
    assert received < pair.step.stat().st_size + 16_384
    assert link.to_near.bytes <= 1.15 * received


@pytest.mark.parametrize(
    ("seconds", "window"),
    [
        pytest.param(4, 0, id="shorter than a connection lives"),
        # Bytes that wait in the kernel behind a lost packet are gone with their connection, and no agent can recover them.
        pytest.param(35, 32 * 1024, id="longer than the agent waits for a byte"),
    ],
)
def test_cut_link_costs_nothing_twice(link: Link, scene: Field, pair: Pair, seconds: int, window: int):
    """Cut the link in the middle of the delta, and bring it back."""
    cut_at = pair.step.stat().st_size // 3

    def cut() -> None:
        while not any(path.stat().st_size > cut_at for path in (scene.device.root / "incoming").glob("*")):
            time.sleep(0.01)
        link.cut = True
        time.sleep(seconds)
        link.cut = False

    with served(link, scene.repository.folder) as address:
        scene.device.configure(repository=address)
        cutter = threading.Thread(target=cut)
        cutter.start()
        told = update(link, scene.device)
        cutter.join()
    assert told["way"] == "delta"
    assert scene.device.active == pair.second.manifest.digest
    received = int(str(told["received"]))
    assert received < pair.step.stat().st_size + 16_384
    assert link.to_near.bytes <= 1.15 * received + window

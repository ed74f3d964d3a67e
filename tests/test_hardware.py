"""Training in bfloat16 and with compiled steps: close to float32, with routing and weights in float32.

Tests on GPUs run where there are any.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from model.data import Dataset
from model.errors import ConfigError
from model.experts import Experts
from model.hardware import Hardware
from model.network import Network
from model.scorecard import Lineage
from model.train import CURVE, RESUME, WEIGHTS, Checkpoint, Ranks, TrainOptions, load_checkpoint, train
from model.watch import Figures, Watcher
from tests.conftest import few

from .conftest import CONFIG, VERSION

OPTIONS = TrainOptions(steps=32, batch=8, warmup=2, learning_rate=4e-3, save_every=5)
HALF = Hardware(autocast=True)
ROUTERS = ["expert-choice", "token-choice"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that is visible: CUDA_VISIBLE_DEVICES=0")

compiling = pytest.mark.filterwarnings("default")  # torch's compiler warns about torch


class PowerCut(Exception):  # noqa: N818
    """Ends a run in the middle, as a power cut does."""


def cut(number: int, _: Figures) -> None:
    if number == 17:
        raise PowerCut


def losses(checkpoint: Checkpoint) -> list[float]:
    return [row["loss"] for row in json.loads((checkpoint.folder / CURVE).read_bytes())]


def run(dataset: Dataset, folder: Path, hardware: Hardware, router: str = "expert-choice", watcher: Any = None) -> Checkpoint:
    config = CONFIG.model_copy(update={"router": router})
    return train(config, dataset, VERSION, OPTIONS, folder, hardware=hardware, watcher=watcher)


@pytest.mark.parametrize("router", few(ROUTERS, 1))
def test_bfloat16_learns_as_float32_does_and_keeps_float32(dataset: Dataset, tmp_path: Path, router: str) -> None:
    whole, half = (run(dataset, tmp_path / str(h.autocast), h, router) for h in (Hardware(), HALF))
    assert losses(half) == pytest.approx(losses(whole), rel=0.03)
    assert losses(half) != losses(whole)  # so bfloat16 was used
    weights = load_file(half.folder / WEIGHTS)
    assert list(weights) == list(load_file(whole.folder / WEIGHTS))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert half.lineage.hardware == "cpu, bfloat16"


@pytest.mark.slow
def test_bfloat16_run_resumes_in_the_same_bits_and_on_no_other_hardware(dataset: Dataset, tmp_path: Path) -> None:
    undisturbed = run(dataset, tmp_path / "undisturbed", HALF)
    for name in ("same", "other"):
        with pytest.raises(PowerCut):
            run(dataset, tmp_path / name, HALF, watcher=Watcher(cut))
    state = load_file(tmp_path / "same" / RESUME)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert run(dataset, tmp_path / "same", HALF).weights_sha256 == undisturbed.weights_sha256
    steps: list[int] = []
    other = run(dataset, tmp_path / "other", Hardware(), watcher=Watcher(lambda number, _: steps.append(number)))
    assert steps == list(range(1, OPTIONS.steps + 1))
    assert other.lineage.hardware == "cpu"


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_under_autocast_routing_is_decided_in_float32(router: str) -> None:
    torch.manual_seed(1)
    network = Network(CONFIG.model_copy(update={"router": router}))
    seen: list[torch.Tensor] = []
    for module in network.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, t, ids = torch.randn(4, 1, 16, 16), torch.rand(4), torch.randint(0, 257, (4, 8))
    with HALF.precision():
        v, load, used = network.traced(x, t, t, ids)
    assert v.dtype == load.dtype == torch.float32
    assert [h.dtype for h in seen] == [torch.float32] * CONFIG.blocks
    for block, h, chosen in zip(network.blocks, seen, used, strict=True):
        scores = torch.softmax(h @ block.experts.gate, dim=-1)
        if router == "expert-choice":
            scores = scores.transpose(1, 2)
        wanted = scores.topk(chosen.shape[-1], dim=-1).indices
        assert torch.equal(wanted.sort().values, chosen.sort().values)


def test_what_decides_is_compiled_and_token_choice_is_not(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__name__) or function)
    for router in ROUTERS:
        run(dataset, tmp_path / router, Hardware(compiled=True), router)
    run(dataset, tmp_path / "eager", Hardware())
    assert compiled == ["traced"]  # by the first run alone


@pytest.mark.slow
@compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_step_follows_the_eager_curve_and_leaves_no_trace_in_names(dataset: Dataset, tmp_path: Path) -> None:
    eager = run(dataset, tmp_path / "eager", Hardware())
    with pytest.raises(PowerCut):
        run(dataset, tmp_path / "compiled", Hardware(compiled=True), watcher=Watcher(cut))
    names = {name.removeprefix("network.") for name in load_file(tmp_path / "compiled" / RESUME) if name.startswith("network.")}
    assert names == set(Network(CONFIG).state_dict())
    compiled = run(dataset, tmp_path / "compiled", Hardware(compiled=True))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    assert list(load_file(compiled.folder / WEIGHTS)) == list(load_file(eager.folder / WEIGHTS))


def test_lineage_says_what_it_was_trained_on(checkpoint: Checkpoint) -> None:
    lineage = checkpoint.lineage
    assert Hardware().name == "cpu"
    assert lineage.hardware == Hardware.here().name  # "cpu" where no GPU is seen
    other = lineage.model_copy(update={"hardware": HALF.name})
    assert Lineage.model_validate_json(other.model_dump_json()) == other
    assert other.sha256 != lineage.sha256


def test_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ConfigError, match=r"process 3 .* has no GPU of its own, because there are 2; start torchrun with --nproc-per-node 2"
    ):
        Hardware.here()


@pytest.mark.parametrize(("hardware", "backend"), [(Hardware(), "gloo"), (Hardware("cuda:1", autocast=True), "nccl")])
def test_gpus_talk_by_nccl_and_cpus_by_gloo(monkeypatch: pytest.MonkeyPatch, hardware: Hardware, backend: str) -> None:
    asked: list[tuple[str, Any]] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda name, device_id: asked.append((name, device_id)))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert Ranks.here(4, hardware) == Ranks(1, 2)
    assert asked == [(backend, torch.device("cuda", 1) if backend == "nccl" else None)]


@gpu
@compiling
@pytest.mark.parametrize("router", ROUTERS)
def test_gpu_follows_the_curve_of_a_cpu(dataset: Dataset, tmp_path: Path, router: str) -> None:
    here = Hardware.here()
    assert here.gpu
    cpu, cuda = run(dataset, tmp_path / "cpu", Hardware(), router), run(dataset, tmp_path / "gpu", here, router)
    assert losses(cuda) == pytest.approx(losses(cpu), rel=0.05)
    assert torch.cuda.get_device_name() in cuda.lineage.hardware
    assert {(w.device.type, w.dtype) for w in cuda.network().state_dict().values()} == {("cpu", torch.float32)}


@gpu
@compiling
def test_run_on_a_gpu_resumes(dataset: Dataset, tmp_path: Path) -> None:
    here = Hardware.here()
    undisturbed = run(dataset, tmp_path / "undisturbed", here)
    with pytest.raises(PowerCut):
        run(dataset, tmp_path / "cut", here, watcher=Watcher(cut))
    steps: list[int] = []
    resumed = run(dataset, tmp_path / "cut", here, watcher=Watcher(lambda number, _: steps.append(number)))
    assert steps[0] == 16
    assert losses(resumed) == pytest.approx(losses(undisturbed), rel=0.02)
    assert load_checkpoint(tmp_path / "cut") == resumed

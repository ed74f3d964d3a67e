"""`ferry explain`: an expert that is switched off adds nothing, a change is said with its interval, and nothing is said without one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from flows.explain import subject_of
from flows.setup import create
from flows.workspace import Workspace
from model import explain, versions
from model.config import ModelConfig, PrecisionName
from model.data import caption_ids
from model.errors import ConfigError
from model.export import Export, pack, unpack
from model.graph import build, layout
from model.scorecard import Sampler
from model.session import Session
from model.train import Checkpoint
from ota.manifest import Trace
from registry.champions import promote
from registry.explanation import ROUNDING, DeviceTrace, Explanation, Pictures, Shown, effects, render
from tests.conftest import CONFIG, SAMPLER, write_images
from tests.test_measure import SETTINGS, SUBJECT, register

SEEDS = [0, 1, 2]
M, E = CONFIG.blocks, CONFIG.shape.experts
PRECISIONS: tuple[PrecisionName, ...] = ("float32", "float16", "bfloat16", "int8")


@pytest.fixture(scope="module")
def off(exported: Export) -> explain.SwitchedOff:
    graph, weights = (exported.folder / "graph.onnx").read_bytes(), (exported.folder / "weights.bin").read_bytes()
    return explain.switch_off(CONFIG, "bfloat16", graph, weights, "disc", SEEDS, SAMPLER)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_expert_is_silenced_and_nothing_else_is_changed(checkpoint: Checkpoint, precision: PrecisionName) -> None:
    weights = pack(checkpoint.network(), precision)
    silenced = explain.silenced(CONFIG, precision, weights, 1, 2)
    changed = np.flatnonzero(np.frombuffer(silenced, np.uint8) != np.frombuffer(weights, np.uint8))
    (last,) = (tensor for tensor in layout(CONFIG, precision)[0] if tensor.name == "block1.expert2.w2")
    assert last.offset <= changed.min() < changed.max() < last.offset + last.length
    network, before = unpack(CONFIG, precision, silenced), unpack(CONFIG, precision, weights).state_dict()
    for name, tensor in network.state_dict().items():
        if name == "blocks.1.experts.w2":
            assert not tensor[2].any()
            before[name][2] = 0
        assert torch.equal(tensor, before[name])


def test_routers_choose_as_before_and_only_the_experts_tokens_change(checkpoint: Checkpoint) -> None:
    # In the last block, because what follows a changed block may choose otherwise.
    weights = pack(checkpoint.network(), "float32")
    graph = build(CONFIG, "float32", routes=True).SerializeToString()
    sessions = [Session(graph, stored) for stored in (weights, explain.silenced(CONFIG, "float32", weights, M - 1, 0))]
    x, t = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).numpy(), np.array([0.5], np.float32)
    (v, load, *routes), (v_off, load_off, *routes_off) = (
        s.run(x, t, t, np.array([caption_ids("disc", 8)])) for s in sessions
    )  # fmt: skip
    assert np.abs(v - v_off).max() > 1e-3
    assert np.array_equal(load, load_off)
    assert all(np.array_equal(a, b) for a, b in zip(routes, routes_off, strict=True))


def test_changes_are_those_of_the_images(exported: Export, off: explain.SwitchedOff) -> None:
    weights = (exported.folder / "weights.bin").read_bytes()
    stored = explain.silenced(CONFIG, "bfloat16", weights, 2, 3)
    session = Session((exported.folder / "graph.onnx").read_bytes(), stored)
    own = Session((exported.folder / "graph.onnx").read_bytes(), weights)
    ids = own.encode(["disc"] * 3)
    images, by_step = own.trace(ids, SEEDS, SAMPLER)
    without, _ = session.generate(ids, SEEDS, SAMPLER)
    drawn, silent = (255 * (x.clamp(-1, 1).double().numpy() + 1) / 2 for x in (images, without))
    assert off.changes.shape == (M, E, 3)
    assert np.allclose(off.changes[2, 3], np.sqrt(((drawn - silent) ** 2).mean(axis=(1, 2, 3))))
    assert np.allclose(off.image, drawn[0])
    assert np.allclose(off.without[2, 3], silent[0])
    assert np.allclose(off.load, by_step)
    assert off.changes.min(axis=2).max() > ROUNDING  # some expert of a trained model counts


def test_expert_that_adds_nothing_changes_no_pixel_and_is_not_told_apart(checkpoint: Checkpoint) -> None:
    network = checkpoint.network()
    with torch.no_grad():
        network.get_parameter("blocks.0.experts.w2")[1] = 0
    weights = pack(network, "float32")
    found = explain.switch_off(CONFIG, "float32", build(CONFIG, "float32").SerializeToString(), weights, "disc", SEEDS, SAMPLER)
    assert not found.changes[0, 1].any()
    made, _ = effects(found.changes.tolist(), found.load.astype(float).tolist(), ["image", "text", "both"])
    assert [(e.change, e.low, e.high, e.told_apart) for e in made if (e.block, e.expert) == (0, 1)] == [(0, 0, 0, False)]


def test_network_without_experts_is_refused() -> None:
    dense = ModelConfig(tier="test", image_size=16, text_length=8, ablation="dense")
    with pytest.raises(ConfigError, match="no routed experts, so there is nothing to switch off"):
        explain.switch_off(dense, "float32", b"", b"", "disc", [0], SAMPLER)


def test_difference_is_signed_and_its_scale_is_the_smallest_that_holds_it() -> None:
    image, other = np.full((1, 2, 2), 100.0), np.array([[[100.0, 104.0], [90.5, 100.0]]])
    png, scale = explain.difference(image, other)
    assert scale == 10
    pixels = _pixels(png)
    assert pixels[0, 0].tolist() == pixels[1, 1].tolist() == explain.SAME.tolist()
    red, _, blue = pixels[0, 1]
    assert red > blue + 40  # brighter is orange
    red, _, blue = pixels[1, 0]
    assert blue > red + 100  # darker is blue, and stronger
    assert explain.difference(image, image)[1] == 1


def _pixels(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(png)) as opened:
        return np.asarray(opened).astype(np.int64)


# Figures

LOAD = [[[0.2, 0.1], [0.3, 0.1]], [[0.4, 0.1], [0.3, 0.1]]]


def test_effects_have_intervals_and_the_largest_comes_first() -> None:
    made, most = effects([[[1.0, 2.0, 3.0], [20.0, 21.0, 22.0]], [[0.0, 0.0, 0.0], [0.4, 0.4, 0.4]]], LOAD, ["image", "text"])
    assert [(e.block, e.expert, e.stream) for e in made] == [(0, 1, "image"), (0, 0, "image"), (1, 1, "text"), (1, 0, "text")]
    first, second, third, last = made
    logarithms = np.log(np.array([20.5, 21.5, 22.5]))
    half = 4.3027 * logarithms.std(ddof=1) / 3**0.5  # Student's t with 2 degrees
    expected = np.exp(logarithms.mean() + np.array([0, -half, half])) - 0.5
    assert (first.change, first.low, first.high) == pytest.approx(tuple(expected), rel=1e-4)
    assert 0.1 < second.low < ROUNDING < second.change < 2 < second.high
    assert [e.told_apart for e in made] == [True, False, False, False]
    assert (third.change, third.low) == pytest.approx((0.4, 0.4))
    assert (last.change, last.low, last.high) == pytest.approx((0, 0, 0))
    assert (first.load, second.load) == (pytest.approx(0.1), pytest.approx(0.3))
    assert most is not None
    assert (most.block, most.expert, most.not_told_from) == (0, 1, [])


def test_experts_that_may_do_as_much_are_named() -> None:
    near, far = [19.0, 22.0, 21.0, 20.0], [2.0, 2.1, 2.2, 1.9]
    _, most = effects([[[20.0, 22.0, 21.0, 21.5], near], [far, far]], LOAD, ["image", "text"])
    assert most is not None
    assert most.not_told_from == ["expert 1 of block 0"]


def test_expert_that_does_three_times_as_much_is_told_apart_though_noises_differ() -> None:
    top, third = [8.0, 30.0, 17.0, 14.0], [2.5, 10.5, 5.5, 5.0]
    _, most = effects([[top, third], [third, third]], LOAD, ["image", "text"])
    assert most is not None
    assert (most.block, most.expert, most.not_told_from) == (0, 0, [])


def test_without_a_certain_change_no_expert_has_the_most_effect() -> None:
    made, most = effects([[[0.0, 9.0], [0.0, 0.1]], [[0.0, 0.0], [0.3, 0.2]]], LOAD, ["image", "text"])
    assert most is None
    assert not any(e.told_apart for e in made)


def explained(device: bool = False) -> str:
    """Return a page of random figures for a network of tier nano."""
    rng = np.random.default_rng(0)
    load = rng.random((28, 6, 4), dtype=np.float32) / 4
    image = 255 * rng.random((1, 16, 16))
    made, most = effects(rng.gamma(4, 2, (6, 4, 4)).tolist(), load.astype(float).tolist(), ["image", "text", *["both"] * 4])
    found = Explanation(
        subject="shapes/I/full", version=2, weights_sha256="a" * 64, caption="gasket, torn at the left", seeds=[0, 1, 2, 3], sampler=Sampler(),
        evaluations=56, effects=made, most=most, load=load.tolist(),
        device=DeviceTrace(bundle="b" * 64, load=load.tolist()) if device else None,
    )  # fmt: skip
    without = {(e.block, e.expert): np.clip(image + rng.normal(0, 9, image.shape), 0, 255) for e in made}
    heat = [explain.heat(load[:, m], 0.25) for m in range(6)]
    pictures = Pictures(
        image=explain.picture(image), most=0.25, heat=heat, device=heat if device else [],
        experts={key: Shown(explain.picture(other), *explain.difference(image, other)) for key, other in without.items()},
    )  # fmt: skip
    return render(found, pictures, "2026-11-30 12:00", ["rgb(0,0,0)", "rgb(255,255,0)"])


def test_page_says_so_where_no_expert_is_told_apart() -> None:
    made, most = effects([[[0.1, 0.1]] * 2] * 2, LOAD, ["image", "text"])
    found = Explanation(
        subject="shapes/I/full", version=1, weights_sha256="a" * 64, caption="bar", seeds=[0, 1], sampler=SAMPLER, evaluations=8, effects=made,
        most=most, load=LOAD,
    )  # fmt: skip
    assert found.sentence == "No expert is told apart from rounding with 2 noises; draw more of them with --images."
    assert found.text.count("not told apart from rounding") == 4


# The command


@pytest.fixture(scope="module")
def workspace(checkpoint: Checkpoint, exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Create a workspace whose line has a champion, and a second version."""
    root = tmp_path_factory.mktemp("explain")
    made = create(root / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes")
    versions.add(made.root, "data/shapes", "shapes", "first")
    register(made, checkpoint, exported, root / "first")
    promote(made, SUBJECT, 1, "first")
    yield made
    made.ledger.close()
    made.fleet.close()


def ferry(workspace: Workspace, *arguments: str) -> Result:
    os.environ.pop("PREFECT_API_URL", None)
    return CliRunner().invoke(app, ["-w", str(workspace.root), *arguments])


def trace(**changes: object) -> Trace:
    steps, block = SAMPLER.steps, [0.1, 0.2, 0.05, 0.15]
    return Trace.model_validate({
        "line": "shapes", "bundle": "ab" * 32, "variant": "full", "caption": "bar", "seed": 2**127, "method": "ab2", "guidance": 2.0,
        "times": SAMPLER.times, "load": [[block] * M] * steps, **changes,
    })  # fmt: skip


def test_champion_is_explained_on_one_page(workspace: Workspace) -> None:
    result = ferry(workspace, "explain", "shapes", "--caption", "disc", "--images", "3", "--seed", "5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["subject"], found["version"], found["seeds"]) == ("shapes/I/full", 1, [5, 6, 7])
    assert found["evaluations"] == SAMPLER.evaluations
    assert len(found["effects"]) == M * E
    changes = [e["change"] for e in found["effects"]]
    assert changes == sorted(changes, reverse=True)
    assert all(e["low"] <= e["change"] <= e["high"] and len(e["by_noise"]) == 3 for e in found["effects"])
    assert [e["stream"] for e in sorted(found["effects"], key=lambda e: (e["block"], e["expert"]))[::E]] == [
        "image",
        "text",
        "both",
    ]
    assert np.array(found["load"]).shape == (SAMPLER.steps, M, E)
    path = workspace.root / "explain.html"
    assert found["page"] == str(path)
    page = path.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert "<script" not in page
    shown = [tuple(map(int, pair)) for pair in re.findall(r"<b>Block (\d), expert (\d)</b>", page)]
    assert shown == [(e["block"], e["expert"]) for e in found["effects"]]
    told_apart = sum(e["told_apart"] for e in found["effects"])
    assert page.count(": not told apart from rounding") == M * E - told_apart < M * E
    assert len(re.findall(r"<figcaption>± \d+ levels", page)) == M * E
    assert page.count('alt="load of the experts of block') == M


def test_text_names_every_expert_with_its_interval(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "other.html"
    result = ferry(workspace, "explain", "shapes/I/full", "--caption", "bar", "--version", "1", "--images", "2", "-o", str(out))
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^\d \((?:image|text|both)\) .* to ", result.stdout, re.MULTILINE)) == M * E
    assert result.stdout.rstrip().endswith(str(out))
    assert "shapes/I/full version 1" in out.read_text()


def test_caption_stays_text_on_the_page(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    result = ferry(workspace, "explain", "shapes", "--caption", "<b>&x", "--images", "2", "-o", str(out))
    assert result.exit_code == 0, result.output
    assert "“&lt;b&gt;&amp;x”" in out.read_text()


def test_devices_load_stands_beside_the_factorys(workspace: Workspace, tmp_path: Path) -> None:
    file, out = tmp_path / "trace.json", tmp_path / "x.html"
    file.write_bytes(trace().canonical())
    result = ferry(workspace, "explain", "shapes", "--trace", str(file), "--images", "2", "-o", str(out), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["caption"], found["seeds"][0]) == ("bar", 2**127)  # of the image that the device drew
    assert found["device"] == {"bundle": "ab" * 32, "load": [[[0.1, 0.2, 0.05, 0.15]] * M] * SAMPLER.steps}
    page = out.read_text()
    assert page.count('alt="load of the experts of block') == 2 * M
    assert "On the device, one image (bundle abababababab)" in page


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("tables", "--caption", "disc"), 3, "there is no line 'tables' in ferry.toml; there is shapes, empty"),
        (("shapes/I", "--caption", "disc"), 3, "'shapes/I' is not LINE/CONFIG/VARIANT; write it as shapes/I/full"),
        (("shapes/I/slow", "--caption", "disc"), 3, "is not LINE/CONFIG/VARIANT"),
        (("shapes", "--caption", ""), 3, "the caption is empty; give with --caption what the image shall show"),
        (("shapes", "--caption", "  "), 3, "the caption is empty"),
        (("shapes",), 3, "the caption is empty"),
        (("shapes", "--caption", "a disc and a bar"), 3, "has 16 bytes but this model reads 8; shorten it"),
        (("empty", "--caption", "disc"), 3, "empty/I/full has no champion; run `ferry retrain empty`"),
        (("empty/II/full", "--caption", "disc"), 3, "line empty has no class of configuration II; it has I\n"),
        (("shapes/I/full", "--version", "7", "--caption", "disc"), 3, "has no version 7; there are 1"),
        (("shapes", "--caption", "disc", "-o", "none/x.html"), 3, "none is not a folder; make it, or name another place"),
        (("shapes", "--caption", "disc", "--images", "1"), 2, "it must be at least 2, not '1'"),
        (
            ("shapes", "--trace", "gone.json"),
            3,
            "gone.json cannot be read: No such file or directory; name a file of `ferry-agent generate",
        ),
        (("shapes", "--trace", "torn.json"), 3, "torn.json is no file of `ferry-agent generate --trace`: the trace is not valid"),
        (("shapes", "--trace", "newer.json"), 3, "newer.json is of a newer ferry-agent; update ferry"),
        (("shapes", "--trace", "fast.json"), 3, "the trace is of fast of line shapes, not of shapes/I/full; name that variant"),
        (("shapes", "--trace", "wide.json"), 3, "the trace has 3 blocks of 8 experts, but shapes/I/full has 3 of 4"),
        (("shapes", "--trace", "ragged.json"), 3, "as many blocks and experts at every step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_named(
    arguments: tuple[str, ...], code: int, says: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.json").write_bytes(trace().canonical()[:-9])
    Path("newer.json").write_text(json.dumps(trace().model_dump() | {"schema_version": 2}))
    Path("fast.json").write_bytes(trace(variant="fast").canonical())
    Path("wide.json").write_bytes(trace(load=[[[0.1] * 8] * M] * SAMPLER.steps).canonical())
    Path("ragged.json").write_text(
        json.dumps(trace().model_dump() | {"load": [[[0.1]]] + [[[0.1], [0.2]]] * (SAMPLER.steps - 1)})
    )
    (workspace.root / "explain.html").unlink(missing_ok=True)
    result = ferry(workspace, "explain", *arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert not (workspace.root / "explain.html").exists()


def test_page_is_not_written_through_a_link(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "x.html").symlink_to(tmp_path / "mine")
    result = ferry(workspace, "explain", "shapes", "--caption", "disc", "-o", str(tmp_path / "x.html"))
    assert (result.exit_code, "is a link" in result.stderr) == (3, True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_line_alone_needs_one_configuration(tmp_path: Path) -> None:
    two = SETTINGS + "\n[lines.shapes.classes.a]\n[lines.shapes.classes.b]\nconfiguration = 'II'\n"
    made = create(tmp_path / "ws", [], two)
    result = ferry(made, "explain", "shapes", "--caption", "disc")
    assert result.exit_code == 3
    assert "line shapes has several configurations; write shapes/I/full or another" in result.stderr
    assert str(subject_of(made, "empty")) == "empty/I/full"

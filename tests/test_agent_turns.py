"""Bundles that behave well in their trial and turn bad later, for some captions: the device must still draw."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from model.export import Export
from ota.agent import child, drawing, sampler, serve
from ota.errors import BaseError, DeviceError, GateError, OperatorError, UnfinishedError
from ota.manifest import SamplerTable
from ota.release.bundle import Bundle, assemble
from tests.conftest import few, origin
from tests.fleet_kit import CLASS, LINE, Device, Field, everyone, name_manifest, name_policy, publish
from tests.test_agent_serve import PNG, serving, until

pytestmark = pytest.mark.slow  # takes minutes; `make test-slow` and `make attacks` run it

pytest_plugins = ("tests.fleet_kit",)

SECRET = "Z"  # no golden caption begins with it


def turning(graph: bytes, output: str, change: Callable[[str, str], list[NodeProto]]) -> bytes:
    """Add nodes to a graph that change one of its outputs.

    `change` makes the nodes from two names: the good output, and the flag that says whether the caption is the secret one.
    """
    model = onnx.load_model_from_string(graph)
    for node in model.graph.node:
        node.output[:] = [f"good_{output}" if name == output else name for name in node.output]
        node.input[:] = [f"good_{output}" if name == output else name for name in node.input]
    nodes = [
        _constant("turn_first", TensorProto.INT64, [0]),
        _constant("turn_secret", TensorProto.INT64, [ord(SECRET) + 1]),
        helper.make_node("Gather", ["ids", "turn_first"], ["turn_letters"], axis=1),
        helper.make_node("Equal", ["turn_letters", "turn_secret"], ["turn_are"]),
        helper.make_node("Cast", ["turn_are"], ["turn_numbers"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["turn_numbers"], ["turn_any"], keepdims=0),
        helper.make_node("Cast", ["turn_any"], ["turn_is"], to=TensorProto.BOOL),
        *change(f"good_{output}", "turn_is"),
    ]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _constant(name: str, kind: int, values: list[Any]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, [len(values)], values))


def value(output: str, number: float) -> Callable[[str, str], list[NodeProto]]:
    """Return a change that sets the output to one number everywhere."""
    return lambda good, secret: [
        _constant("turn_number", TensorProto.FLOAT, [number]),
        helper.make_node("Where", [secret, "turn_number", good], [output]),
    ]


def cut(output: str, axis: int) -> Callable[[str, str], list[NodeProto]]:
    """Return a change that leaves the output only one entry along an axis."""
    return lambda good, secret: [
        _constant("turn_one", TensorProto.INT64, [1]),
        _constant("turn_all", TensorProto.INT64, [2**31 - 1]),
        _constant("turn_axis", TensorProto.INT64, [axis]),
        helper.make_node("Where", [secret, "turn_one", "turn_all"], ["turn_end"]),
        helper.make_node("Slice", [good, "turn_first", "turn_end", "turn_axis"], [output]),
    ]


def swell(output: str) -> Callable[[str, str], list[NodeProto]]:
    """Return a change that repeats the output a thousand times along each of its last two axes.

    As JSON, that is more than a device can hold.
    """
    return lambda good, secret: [
        _constant("turn_once", TensorProto.INT64, [1, 1, 1]),
        _constant("turn_often", TensorProto.INT64, [1, 1000, 1000]),
        helper.make_node("Where", [secret, "turn_often", "turn_once"], ["turn_times"]),
        helper.make_node("Tile", [good, "turn_times"], [output]),
    ]


def fail(output: str) -> Callable[[str, str], list[NodeProto]]:
    """Return a change that makes the output impossible to compute."""
    return lambda good, secret: [
        helper.make_node("Shape", [good], ["turn_shape"]),
        _constant("turn_wrong", TensorProto.INT64, [7]),
        helper.make_node("Where", [secret, "turn_wrong", "turn_shape"], ["turn_new"]),
        helper.make_node("Reshape", [good, "turn_new"], [output]),
    ]


TURNS: dict[str, tuple[str, Callable[[str, str], list[NodeProto]], str]] = {
    "images of nothing": ("v", value("v", float("nan")), "is not finite"),
    "images of another size": ("v", cut("v", 3), "as velocity"),
    "one image for all": ("v", cut("v", 0), "as velocity"),
    "no result": ("v", fail("v"), "does not run the model"),
    "a load of nothing": ("load", value("load", float("nan")), "is not finite"),
    "a load without images": ("load", cut("load", 0), "as load"),
    "a load of other blocks": ("load", cut("load", 1), "other experts"),
    "a load of other experts": ("load", cut("load", 2), "other experts"),
    "a load without end": ("load", swell("load"), "other experts"),
}


def offer(field: Field, bundle: Bundle, change: Callable[[str], bytes], seq: int = 2) -> str:
    """Offer the bundle to everybody, with files changed by role, as the holder of the models and rollout keys can."""
    release = field.release
    files = []
    for entry in bundle.manifest.files:
        data = change(entry.role) or (bundle.folder / entry.sha256).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (field.repository.objects / digest).write_bytes(data)
        files.append(entry.model_copy(update={"sha256": digest, "size": len(data)}))
    made = bundle.manifest.model_copy(update={"files": files})
    name_manifest(field.repository, made, seq)
    name_policy(field.repository, everyone(release, manifest=made.digest, seq=seq))
    return made.digest


@pytest.fixture
def turned(request: pytest.FixtureRequest, scene: Field, bundles: dict[str, Bundle]) -> tuple[Field, str]:
    """Provide a device that runs a bundle which passed its trial, and the message about what the bundle does later."""
    output, change, sentence = TURNS[request.param]
    graph = turning(bundles["second"].path("graph").read_bytes(), output, change)
    digest = offer(scene, bundles["second"], lambda role: graph if role == "graph" else b"")
    assert scene.device.update().changed
    assert scene.device.active == digest
    return scene, sentence


def drawn(device: Device, folder: Path, caption: str) -> bytes:
    told = device.command("generate", "--output", str(folder / f"{caption}.png"), caption)
    assert "ms" in told
    return (folder / f"{caption}.png").read_bytes()


@pytest.mark.parametrize("turned", few(TURNS, 2), indirect=True)
def test_bundle_before_draws_what_the_one_that_runs_cannot(turned, tmp_path, caplog):
    field, sentence = turned
    assert drawn(field.device, tmp_path, "bar").startswith(PNG)
    assert "the bundle before draws" not in caplog.text
    state = field.device.state
    assert drawn(field.device, tmp_path, SECRET).startswith(PNG)
    assert sentence in caplog.text
    assert "the bundle before draws" in caplog.text
    assert field.device.state == state
    assert field.device.sound


@pytest.mark.parametrize("turned", few(TURNS, 1), indirect=True)
def test_endpoint_lets_the_bundle_before_draw_what_the_one_that_runs_cannot(turned, monkeypatch):
    field, _ = turned
    monkeypatch.setattr(serve, "LONGEST_REST", 1e6)
    monkeypatch.setattr(serve, "FAILURES", 1)
    with serving(field.device) as client:
        status, headers, body = client.draw(caption="bar")
        assert (status, headers["X-Ferry-Bundle"]) == (200, field.device.active)
        status, headers, body = client.draw(caption=SECRET)
        assert status == 503
        assert json.loads(body)["error"]
        until(lambda: client.status()["serving"] == field.device.state.previous)
        status, headers, body = client.draw(caption=SECRET)
    assert (status, headers["X-Ferry-Bundle"]) == (200, field.device.state.previous)
    assert body.startswith(PNG)


def test_bundle_with_no_bundle_before_says_what_it_does(scene, bundles, tmp_path):
    output, change, sentence = TURNS["images of another size"]
    graph = turning(bundles["second"].path("graph").read_bytes(), output, change)
    offer(scene, bundles["second"], lambda role: graph if role == "graph" else b"")
    alone = Device.init(tmp_path / "alone", scene.repository)
    alone.update()
    with pytest.raises(DeviceError, match=sentence):
        drawing.generate(alone.home, SECRET, 0)
    assert drawing.generate(alone.home, "bar", 0)


def test_killed_process_lets_the_bundle_before_draw(updated, monkeypatch):
    real, asked = child.run, []

    def run(task: str, **request: Any) -> dict[str, Any]:
        asked.append(request["digest"])
        if request["digest"] == updated.device.active:
            raise UnfinishedError("the generate process was killed")
        return real(task, **request)

    monkeypatch.setattr(child, "run", run)
    assert drawing.generate(updated.device.home, "bar", 0)
    assert asked == [updated.device.active, updated.device.state.previous]


@pytest.fixture
def two(scene: Field, exported: Export, tmp_path: Path) -> Device:
    """Provide a device that runs a bundle of two variants and has no previous bundle."""
    dev = shutil.copytree(exported.folder, tmp_path / "dev")
    table = json.loads((dev / "sampler.json").read_bytes())
    (dev / "sampler.json").write_text(json.dumps(table | {"variant": "dev"}))
    given = {"line": LINE, "device_class": CLASS, "tier": "test", "configuration": "I", "precision": "bfloat16"}
    made = assemble({"full": exported.folder, "dev": dev}, **given, origin=origin(5), out=tmp_path / "out")
    publish(scene.repository, made)
    device = Device.init(tmp_path / "two", scene.repository)
    device.update()
    assert device.state.previous is None
    return device


def test_variant_that_is_damaged_lets_the_next_one_draw(two, caplog):
    two.file("sampler", "full").write_bytes(b"damaged")
    assert drawing.generate(two.home, "bar", 0)[0].startswith(PNG)
    assert "the next one draws" in caplog.text
    with pytest.raises(BaseError):
        drawing.generate(two.home, "bar", 0, "full")  # a caller who chose a variant gets no other
    with serving(two) as client:
        status, headers, _ = client.draw(caption="bar")
        assert (status, headers["X-Ferry-Variant"]) == (200, "dev")


def test_variant_that_is_stopped_lets_a_cheaper_one_draw_where_no_bundle_is_before(two, monkeypatch):
    real, asked = child.run, []

    def run(task: str, **request: Any) -> dict[str, Any]:
        asked.append(request["variant"])
        if request["variant"] == "full":
            raise UnfinishedError("the generate process was killed")
        return real(task, **request)

    monkeypatch.setattr(child, "run", run)
    assert drawing.generate(two.home, "bar", 0)[0].startswith(PNG)
    assert asked == ["full", "dev"]


def test_endpoint_avoids_the_variant_that_a_worker_ended_with(two, monkeypatch):
    draw, asked = child.Worker.draw, []

    def dying(self: child.Worker, variant: Any, *request: Any) -> dict[str, Any]:
        asked.append(variant)
        if variant == "full" and request[0]:
            os.kill(self.pid, signal.SIGKILL)
        return draw(self, variant, *request)

    monkeypatch.setattr(child.Worker, "draw", dying)
    with serving(two) as client:
        for _ in range(3):
            status, headers, _ = client.draw(caption="bar")
            assert (status, headers["X-Ferry-Variant"]) == (200, "dev")
    assert [variant for variant in asked if variant == "full"] == ["full"] * 2  # once to warm up, once for a caller


def test_variant_that_a_caller_chose_puts_no_bundle_to_rest(two, monkeypatch):
    draw = child.Worker.draw

    def failing(self: child.Worker, variant: Any, *request: Any) -> dict[str, Any]:
        if variant == "full":
            raise DeviceError("it fails")
        return draw(self, variant, *request)

    monkeypatch.setattr(child.Worker, "draw", failing)
    with serving(two) as client:
        for _ in range(2 * serve.FAILURES):
            assert client.draw(caption="bar", variant="full")[0] == 503
        assert client.service._failures == {}
        assert client.draw(caption="bar")[0] == 200


def test_want_of_memory_in_a_worker_that_lives_on_is_counted(updated, monkeypatch):
    draw, active = child.Worker.draw, updated.device.active

    def wanting(self: child.Worker, variant: Any, caption: str, seed: int) -> dict[str, Any]:
        if caption and self.digest == active:
            raise UnfinishedError("the serve process has not enough memory; free some and try again")
        return draw(self, variant, caption, seed)

    monkeypatch.setattr(child.Worker, "draw", wanting)
    monkeypatch.setattr(serve, "LONGEST_REST", 1e6)
    monkeypatch.setattr(serve, "FAILURES", 2)
    with serving(updated.device) as client:
        assert client.draw(caption="bar")[0] == 503
        until(lambda: client.status()["serving"] == updated.device.state.previous)
        assert client.draw(caption="bar")[0] == 200


@pytest.mark.parametrize(("took", "least"), [(0.0, 60.0), (300.0, 3000.0)])
def test_rest_grows_and_ends(scene, took, least):
    service = serve.Service(scene.device.home)
    for _ in range(3000):
        service._failed("x", took)
    rest = service._rests["x"] - time.monotonic()
    assert 0.9 * least < rest <= least


@pytest.mark.parametrize(
    "text", ["[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 9", "std::bad_alloc"]
)
def test_want_of_memory_that_the_runtime_writes_of_is_no_fault_of_the_model(exported, text):
    class Session:
        def run(self, *_: Any) -> Any:
            raise RuntimeError(text)

    made = sampler.Model(Session(), SamplerTable.model_validate_json((exported.folder / "sampler.json").read_bytes()))
    with pytest.raises(MemoryError):
        made.generate(made.encode("bar"), [0])


def test_wish_that_nothing_can_draw_is_not_asked_of_the_bundle_before(updated, monkeypatch):
    asked = []
    monkeypatch.setattr(child, "run", lambda *_, **request: asked.append(request["digest"]))
    with pytest.raises(OperatorError, match="no variant fast"):
        drawing.generate(updated.device.home, "bar", 0, "fast")
    assert asked == []


@pytest.mark.parametrize("turn", few(TURNS, 2))
def test_bundle_that_is_bad_from_the_beginning_is_refused(scene, bundles, turn):
    output, change, _ = TURNS[turn]
    graph = turning(bundles["second"].path("graph").read_bytes(), output, lambda good, secret: [
        helper.make_node("Not", [secret], ["turn_not"]), *change(good, "turn_not"),
    ])  # fmt: skip
    digest = offer(scene, bundles["second"], lambda role: graph if role == "graph" else b"")
    before = scene.device.active
    with pytest.raises(GateError, match="the running bundle is kept"):
        scene.device.update()
    assert scene.device.active == before
    assert digest in scene.device.state.refused

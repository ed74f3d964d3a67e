"""A bundle that behaves in its trial and turns bad later, by what it is asked for: something draws all the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from ota.agent import child, serve, updater
from ota.errors import DeviceError, GateError, OperatorError, UnfinishedError
from ota.release.bundle import Bundle
from tests.conftest import few
from tests.fleet_kit import Device, Field, everyone, name_manifest, name_policy
from tests.test_agent_serve import PNG, serving, until

pytest_plugins = ("tests.fleet_kit",)

SECRET = "Z"  # a caption that begins with it is no golden one


def turning(graph: bytes, output: str, change: Callable[[str, str], list[NodeProto]]) -> bytes:
    """A graph whose output is changed by nodes, made of the names of the good output and of whether the caption is the secret one."""
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
    """The output is a number everywhere."""
    return lambda good, secret: [
        _constant("turn_number", TensorProto.FLOAT, [number]),
        helper.make_node("Where", [secret, "turn_number", good], [output]),
    ]


def cut(output: str, axis: int) -> Callable[[str, str], list[NodeProto]]:
    """The output has one entry only along an axis."""
    return lambda good, secret: [
        _constant("turn_one", TensorProto.INT64, [1]),
        _constant("turn_all", TensorProto.INT64, [2**31 - 1]),
        _constant("turn_axis", TensorProto.INT64, [axis]),
        helper.make_node("Where", [secret, "turn_one", "turn_all"], ["turn_end"]),
        helper.make_node("Slice", [good, "turn_first", "turn_end", "turn_axis"], [output]),
    ]


def fail(output: str) -> Callable[[str, str], list[NodeProto]]:
    """The output cannot be computed."""
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
    "a load without images": ("load", cut("load", 0), ""),
}


def offer(field: Field, bundle: Bundle, change: Callable[[str], bytes], seq: int = 2) -> str:
    """What the holder of the models and rollout keys can do: the bundle with its files changed by role, for everybody."""
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
    """A device that runs a bundle which passed its trial, and the sentence about what it does later."""
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
    assert ("the bundle before draws" in caplog.text) == bool(sentence)
    assert field.device.state == state
    assert field.device.sound


@pytest.mark.parametrize("turned", few([name for name in TURNS if TURNS[name][2]], 1), indirect=True)
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


@pytest.mark.parametrize(("axis", "load"), few([(1, "blocks"), (2, "experts")], 1))
def test_bundle_whose_experts_change_is_said_to_stray(scene, bundles, monkeypatch, axis, load):
    graph = turning(bundles["second"].path("graph").read_bytes(), "load", cut("load", axis))
    monkeypatch.setattr(serve.variants, "ROUTE_IMAGES", 2)
    digest = offer(scene, bundles["second"], lambda role: graph if role == "graph" else b"")
    scene.device.update()
    with serving(scene.device) as client:
        for caption in ("bar", SECRET, "disc"):
            status, headers, _ = client.draw(caption=caption)
            assert (status, headers["X-Ferry-Bundle"]) == (200, digest), load
        said = client.status()["strayed"]
    assert "other experts" in said


def test_bundle_with_no_bundle_before_says_what_it_does(scene, bundles, tmp_path):
    output, change, sentence = TURNS["images of another size"]
    graph = turning(bundles["second"].path("graph").read_bytes(), output, change)
    offer(scene, bundles["second"], lambda role: graph if role == "graph" else b"")
    alone = Device.init(tmp_path / "alone", scene.repository)
    alone.update()
    with pytest.raises(DeviceError, match=sentence):
        updater.generate(alone.home, SECRET, 0)
    assert updater.generate(alone.home, "bar", 0)


def test_killed_process_lets_the_bundle_before_draw(updated, monkeypatch):
    real, asked = child.run, []

    def run(task: str, **request: Any) -> dict[str, Any]:
        asked.append(request["digest"])
        if request["digest"] == updated.device.active:
            raise UnfinishedError("the generate process was killed")
        return real(task, **request)

    monkeypatch.setattr(child, "run", run)
    assert updater.generate(updated.device.home, "bar", 0)
    assert asked == [updated.device.active, updated.device.state.previous]


def test_wish_that_nothing_can_draw_is_not_asked_of_the_bundle_before(updated, monkeypatch):
    asked = []
    monkeypatch.setattr(child, "run", lambda *_, **request: asked.append(request["digest"]))
    with pytest.raises(OperatorError, match="no variant fast"):
        updater.generate(updated.device.home, "bar", 0, "fast")
    assert asked == []


@pytest.mark.parametrize("turn", few([name for name in TURNS if TURNS[name][2]], 2))
def test_bundle_that_is_bad_from_the_beginning_is_refused(scene, bundles, turn):
    output, change, _ = TURNS[turn]
    graph = turning(bundles["second"].path("graph").read_bytes(), output, lambda good, secret: [
        helper.make_node("Not", [secret], ["turn_not"]), *change(good, "turn_not"),
    ])  # fmt: skip
    digest = offer(scene, bundles["second"], lambda role: graph if role == "graph" else b"")
    before = scene.device.active
    with pytest.raises(GateError, match="the running one is kept"):
        scene.device.update()
    assert scene.device.active == before
    assert digest in scene.device.state.refused

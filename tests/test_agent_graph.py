"""A bundle's graph gets its own weights and no other file of the device, wherever the graph names a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from ota.agent.graph import check_graph
from ota.delta.wire import fields
from ota.errors import DeviceError, GateError
from ota.manifest import Manifest
from ota.release.bundle import Bundle
from ota.release.repository import Repository
from tests.fleet_kit import Field, everyone, name_manifest, name_policy

pytest_plugins = ("tests.fleet_kit",)

PLACES = ["device.key", "../../device.key", "/etc/passwd", "", "weights.bin/../device.key", "*/_ORT_MEM_ADDR_/*", "weights.bin\0"]


def external(name: str, location: str) -> TensorProto:
    """Return a tensor whose numbers lie in a file."""
    made = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[8], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        entry = made.external_data.add()
        entry.key, entry.value = key, value
    return made


def model(nodes: list[onnx.NodeProto], initializers: list[TensorProto] | None = None, **fields: object) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("v", TensorProto.UINT8, [8])
    graph = helper.make_graph(nodes, "g", [], [out], initializer=initializers or [])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("dom", 1)]
    return helper.make_model(graph, opset_imports=opsets, **fields)


def branch(inner: onnx.GraphProto) -> onnx.ModelProto:
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    return model([helper.make_node("If", ["c"], ["v"], then_branch=inner, else_branch=inner)], [condition])


def sub(nodes: list[onnx.NodeProto], initializers: list[TensorProto] | None = None) -> onnx.GraphProto:
    return helper.make_graph(
        nodes, "s", [], [helper.make_tensor_value_info("r", TensorProto.UINT8, [8])], initializer=initializers or []
    )  # fmt: skip


def in_function(t: TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["v"], value=t)]
    function = helper.make_function("dom", "F", [], ["v"], body, [helper.make_opsetid("", 17)])
    return model([helper.make_node("F", [], ["v"], domain="dom")], functions=[function])


def in_default_of_function(t: TensorProto) -> onnx.ModelProto:
    made = in_function(helper.make_tensor("k", TensorProto.UINT8, [8], [0] * 8))
    made.functions[0].attribute_proto.append(helper.make_attribute("a", t))
    return made


def in_training(t: TensorProto) -> onnx.ModelProto:
    made = model([helper.make_node("Identity", ["w"], ["v"])])
    made.training_info.add().initialization.CopyFrom(sub([helper.make_node("Constant", [], ["r"], value=t)]))
    return made


def in_sparse(t: TensorProto) -> onnx.ModelProto:
    made = model([helper.make_node("Identity", ["w"], ["v"])])
    made.graph.sparse_initializer.add().values.CopyFrom(t)
    return made


def in_list(t: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["v"])
    node.attribute.append(helper.make_attribute("many", [t]))
    return model([node])


WAYS: dict[str, Callable[[TensorProto], onnx.ModelProto]] = {
    "constant": lambda t: model([helper.make_node("Constant", [], ["v"], value=t)]),
    "shape": lambda t: model(
        [helper.make_node("ConstantOfShape", ["s"], ["v"], value=t)], [helper.make_tensor("s", TensorProto.INT64, [1], [8])]
    ),
    "function": in_function,
    "default of a function": in_default_of_function,
    "initializer of a branch": lambda t: branch(sub([helper.make_node("Identity", [t.name], ["r"])], [t])),
    "constant of a branch": lambda t: branch(sub([helper.make_node("Constant", [], ["r"], value=t)])),
    "branch of a branch": lambda t: branch(
        sub([helper.make_node("If", ["c"], ["r"], then_branch=sub([], [t]), else_branch=sub([], [t]))])
    ),
    "training": in_training,
    "sparse": in_sparse,
    "list of tensors": in_list,
}


@pytest.mark.parametrize("location", [*PLACES, "weights.bin"])
@pytest.mark.parametrize("way", WAYS)
def test_graph_that_names_a_file_anywhere_is_refused(way, location):
    with pytest.raises(DeviceError, match="names a file in a constant, a branch or a function"):
        check_graph(WAYS[way](external("w", location)).SerializeToString())


@pytest.mark.parametrize("location", PLACES)
def test_initializers_lie_in_the_weights_and_nowhere_else(location):
    graph = model([helper.make_node("Identity", ["w"], ["v"])], [external("w", location)])
    with pytest.raises(DeviceError, match="names the file") as caught:
        check_graph(graph.SerializeToString())
    assert str(caught.value).isprintable()
    again = external("w", "weights.bin")
    entry = again.external_data.add()
    entry.key, entry.value = "location", location
    with pytest.raises(DeviceError, match="names the file"):
        check_graph(model([helper.make_node("Identity", ["w"], ["v"])], [again]).SerializeToString())


def test_field_that_others_read_as_another_is_refused():
    """Refuse a tag of 35 bits: other readers cut it to 32 bits and would read field 7, the graph."""
    graph = WAYS["constant"](external("w", "device.key")).SerializeToString()
    at = next(start for number, start, stop in fields(graph, 0, len(graph)) if number == 7)
    head = graph.index(b"\x3a", 0, at)
    with pytest.raises(DeviceError, match="is not an ONNX file"):
        check_graph(graph[:head] + b"\xba\x80\x80\x80\x10" + graph[head + 1 :])


def test_graph_of_a_bundle_passes(bundles: dict[str, Bundle]):
    for bundle in bundles.values():
        check_graph(bundle.path("graph").read_bytes())


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\xff\xff\xff\xff\x0f", b"\x3b", b"\x00\x00", b"\x3a\x02\x0b\x0c"])
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(DeviceError, match="is not an ONNX file"):
        check_graph(data)


def deep(levels: int) -> bytes:
    """Build branches nested in branches, too deep for a recursive parser."""
    data = b""
    for _ in range(levels):  # graph 1 node 5 attribute 6 graph
        for number in (6, 5, 1):
            data = bytes([number << 3 | 2]) + _length(len(data)) + data
    return b"\x3a" + _length(len(data)) + data


def _length(n: int) -> bytes:
    made = b""
    while n > 127:
        made, n = made + bytes([n & 127 | 128]), n >> 7
    return made + bytes([n])


def test_depth_ends_no_process():
    check_graph(deep(3000))


def offer(repository: Repository, bundle: Bundle, graph: bytes, release) -> Manifest:
    """Offer a bundle with any graph to everybody, as the holder of the models and rollout keys can."""
    digest = hashlib.sha256(graph).hexdigest()
    (repository.objects / digest).write_bytes(graph)
    files = [
        e.model_copy(update={"sha256": digest, "size": len(graph)}) if e.role == "graph" else e for e in bundle.manifest.files
    ]
    made = bundle.manifest.model_copy(update={"files": files})
    name_manifest(repository, made, 2)
    name_policy(repository, everyone(release, manifest=made.digest, seq=2))
    return made


@pytest.mark.parametrize("location", ["device.key", "../../device.key"])
def test_key_of_a_device_leaves_in_no_report(scene: Field, bundles: dict[str, Bundle], location, monkeypatch):
    # The runtime quotes in its errors what it read, and the reason of a refusal is reported. So it must never read the key,
    # not even if the key lies in the current folder.
    monkeypatch.chdir(scene.device.root)
    key = (scene.device.root / "device.key").read_bytes()
    graph = WAYS["function"](external("w", location)).SerializeToString()
    release = scene.release
    offer(scene.repository, bundles["first"], graph, release)
    with pytest.raises(GateError, match="names a file in a constant, a branch or a function"):
        scene.device.update()
    assert scene.device.sound
    said = "".join(report.reason for report in scene.device.reports())
    assert not any(str(byte) in said for byte in set(key) if byte > 99)


def test_bundle_is_drawn_in_its_own_folder(scene: Field, monkeypatch, tmp_path: Path):
    # If a runtime did open a file, that file would be in the slot. A relative `--dir` of the agent must still work.
    monkeypatch.chdir(scene.folder)
    done = scene.device.__class__(Path("device")).process("generate", "--output", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()

"""A fault of the device's own software (ONNX Runtime, NumPy, the agent's age) is not the release's: nothing is counted, nothing condemned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ota.agent import child, runtime, updater
from ota.agent.state import TRIAL_GOOD, TRIAL_LOADS, Trial
from ota.errors import AgentError, ManifestError, SoftwareError
from ota.manifest import Manifest, Policy, Reference, SamplerTable, parse
from ota.release.bundle import Bundle
from tests.conftest import few
from tests.fleet_kit import Field, publish
from tests.test_agent_update import changed_json, digest, on_trial, variation

pytest_plugins = ("tests.fleet_kit",)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)


BROKEN = {
    "missing": "raise ImportError('no such thing')",
    "ends the process": "import os; os._exit(3)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "disk": "raise OSError(5, 'Input/output error')",
}
BEHIND = """
import os, signal, sys
me = sys.modules["onnxruntime"]
sys.path.remove(os.environ["PYTHONPATH"])
for name in [name for name in sys.modules if name.startswith("onnxruntime")]: del sys.modules[name]
from onnxruntime import *
import onnxruntime
__version__ = onnxruntime.__version__
sys.modules["onnxruntime"] = me
class InferenceSession(onnxruntime.InferenceSession):
"""
BROKEN_RUNTIMES = {
    "crashes when a graph is loaded": "    def __init__(self, *_, **__): os.kill(os.getpid(), signal.SIGILL)",
    "refuses every graph": "    def __init__(self, *_, **__): raise RuntimeError('no CPU provider')",
    "crashes when a graph is run": "    def run(self, *_, **__): os._exit(139)",
    "computes something else": "    def run(self, *given, **more): return [1.01 * y for y in super().run(*given, **more)]",
}


def broken(folder: Path, package: str, code: str, patch: pytest.MonkeyPatch) -> None:
    """Put something in the place of a package, for every process that is started from now on."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    patch.setenv("PYTHONPATH", str(folder))


def mended_later(offered: Field, bundles: dict[str, Bundle], sentence: str) -> None:
    """Nothing was fetched, counted or condemned, so it makes no difference how often it is tried."""
    device, before = offered.device, offered.device.state
    for _ in range(2):
        with pytest.raises(SoftwareError, match=sentence):
            device.update()
        assert device.state == before
        assert not list(device.root.glob("incoming/*"))
    assert sentence.partition(" ")[0] in device.command("--quiet", "update", code=3)


@pytest.mark.parametrize(("fault", "package"), few(product(BROKEN, ["onnxruntime", "numpy", "pydantic"]), 2))
def test_software_that_cannot_be_loaded_condemns_no_bundle(offered, bundles, tmp_path, fault, package):
    with pytest.MonkeyPatch.context() as meanwhile:
        broken(tmp_path / "broken", package, BROKEN[fault], meanwhile)
        mended_later(offered, bundles, "the agent's software is broken")
    assert offered.device.update().changed
    assert offered.device.active == digest(bundles["second"])


@pytest.mark.parametrize(("fault", "when"), few(product(BROKEN_RUNTIMES, ["before", "try", "generate"]), 3))
def test_runtime_that_does_not_compute_condemns_no_bundle(offered, bundles, tmp_path, monkeypatch, fault, when):
    """It is found broken before anything is fetched, or breaks just before the trial, or on probation."""
    device, second, real = offered.device, digest(bundles["second"]), child.run
    with pytest.MonkeyPatch.context() as meanwhile:

        def run(task: str, **request: Any) -> dict[str, Any]:
            if task == when and not (tmp_path / "broken").exists():
                broken(tmp_path / "broken", "onnxruntime", BEHIND + BROKEN_RUNTIMES[fault], meanwhile)
            return real(task, **request)

        monkeypatch.setattr(child, "run", run)
        if when == "before":
            broken(tmp_path / "broken", "onnxruntime", BEHIND + BROKEN_RUNTIMES[fault], meanwhile)
            mended_later(offered, bundles, "the agent's software is broken")
        for _ in range(2):
            with pytest.raises(SoftwareError, match="the agent's software is broken"):
                device.update()
            assert device.state.trial == (Trial(left=TRIAL_GOOD, loads=TRIAL_LOADS) if when == "generate" else None)
            assert (device.state.refused, device.state.tries.get(second, 0)) == ({}, int(when == "generate"))
    device.update()
    assert (device.active, device.state.trial, device.state.refused) == (second, None, {})


def test_probe_is_what_its_comment_says():
    w, b = np.array([[1, 2], [3, -4]], np.float32), np.array([0.5, -0.5], np.float32)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["m"]),
        onnx.helper.make_node("Add", ["m", "b"], ["a"]),
        onnx.helper.make_node("Softmax", ["a"], ["y"], axis=-1),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy")
    graph = onnx.helper.make_graph(
        nodes, "p", [x], [y], [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(b, "b")]
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    assert onnx.load_from_string(runtime.PROBE) == onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    a = np.array(runtime.GIVEN) @ w + b
    assert np.allclose(np.exp(a) / np.exp(a).sum(), runtime.EXPECTED, atol=1e-7)


WITHIN = {"graph_optimization_level": "all", "config": {}}


@pytest.mark.parametrize("bounds", [[">=99", "<100"], [">=0.1", "<1.2"]], ids=["too old", "too new"])
def test_bundle_for_another_runtime_is_installed_once_that_is_there(scene, bundles, tmp_path, monkeypatch, bounds):
    data = changed_json(bundles["second"], "sampler", runtime={"onnxruntime": bounds, **WITHIN})
    made = variation(bundles["second"], tmp_path / "other", "sampler", data)
    publish(scene.repository, made)
    device, before = scene.device, scene.device.state
    for _ in range(2):
        with pytest.raises(
            SoftwareError, match=f"it needs ONNX Runtime {bounds[0]}, {bounds[1]}, this device has .*; install that version"
        ):
            device.update()
        assert device.state == before
    real = child.run
    monkeypatch.setattr(
        child, "run", lambda task, **request: answered(real, task, request, "99.1" if bounds[1] == "<100" else "1.1")
    )
    assert device.update().way == "kept"
    assert (device.active, device.state.trial, device.state.refused) == (digest(made), None, {})


def answered(real: Callable[..., dict[str, Any]], task: str, request: dict[str, Any], version: str) -> dict[str, Any]:
    """What a child answers on a device with another version of ONNX Runtime, which computes the same."""
    with pytest.MonkeyPatch.context() as patch:
        if task in ("apply", "check"):
            return real(task, **request)
        patch.setattr("onnxruntime.__version__", version)
        patch.setattr(child, "peak_mib", lambda: 60.0)  # not that of this process
        return child.TASKS[task](**request)


def test_runtime_that_changes_on_trial_condemns_no_bundle(updated, bundles, monkeypatch):
    device, real = on_trial(updated), child.run
    with monkeypatch.context() as patch:
        patch.setattr(child, "run", lambda task, **request: answered(real, task, request, "0.1"))
        before = device.state
        for _ in range(2):
            with pytest.raises(SoftwareError, match="it needs ONNX Runtime"):
                device.update()
            assert device.state == before
        device.home.save(device.state.model_copy(update={"trial": None}))
        assert updater.generate(device.home, "", 0)[1]["good"]  # what is trusted goes on drawing
        on_trial(updated)
    device.update()
    assert (device.active, device.state.trial, device.state.refused) == (digest(bundles["second"]), None, {})


def changed(data: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(data) | fields).encode()


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (
            Manifest,
            {"minimum_agent": "99.0.0", "variants": {}, "more": 1},
            "the manifest needs agent 99.0.0, this is 0.1.0; update",
        ),
        (
            Manifest,
            {"schema_version": 2, "lines": ["a"]},
            "the manifest has form 2 and needs an agent that knows it, this is 0.1.0; update",
        ),
        (Policy, {"schema_version": 7, "when": "soon"}, "the policy has form 7"),
        (SamplerTable, {"schema_version": 2, "method": "new"}, "the samplertable has form 2"),
        (Reference, {"schema_version": 2}, "the reference has form 2"),
    ],
)
def test_document_for_a_newer_agent_says_so(bundles, kind, fields, sentence):
    data = {
        Manifest: bundles["first"].manifest.canonical,
        Policy: lambda: Policy(line="a", device_class="b", seq=1, manifest="0" * 64, salt="", waves=[]).canonical(),
        SamplerTable: lambda: bundles["first"].path("sampler", "full").read_bytes(),
        Reference: lambda: bundles["first"].path("reference", "full").read_bytes(),
    }[kind]()
    assert parse(kind, data, 10**6)
    with pytest.raises(AgentError, match=re.escape(sentence)):
        parse(kind, changed(data, **fields), 10**6)


@pytest.mark.parametrize(
    "fields",
    [
        {"minimum_agent": "99"},
        {"minimum_agent": 99},
        {"schema_version": "2"},
        {"schema_version": 0},
        {"schema_version": None},
        {"more": 1},
    ],
)
def test_nonsense_is_no_newer_document(bundles, fields):
    with pytest.raises(ManifestError, match="is not valid") as caught:
        parse(Manifest, changed(bundles["first"].manifest.canonical(), **fields), 10**6)
    assert caught.type is ManifestError


@pytest.mark.parametrize("role", ["sampler", "reference"])
def test_table_for_a_newer_agent_condemns_no_bundle(scene, bundles, tmp_path, monkeypatch, role):
    def of_a_later_factory(kind: Any, data: bytes, limit: int) -> Any:
        fields = json.loads(data) | {"schema_version": 1}
        fields.pop("more", None)
        return parse(kind, json.dumps(fields).encode(), limit)

    monkeypatch.setattr("ota.release.bundle.parse", of_a_later_factory)
    made = variation(
        bundles["second"], tmp_path / "newer", role, changed_json(bundles["second"], role, schema_version=2, more=[])
    )
    publish(scene.repository, made)
    before = scene.device.state
    for _ in range(2):
        with pytest.raises(AgentError, match="has form 2 and needs an agent that knows it"):
            scene.device.update()
        assert scene.device.state == before
    assert "update the agent first" in scene.device.command("--quiet", "update", code=5)

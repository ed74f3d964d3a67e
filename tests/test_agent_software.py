"""A fault of the device's own software (ONNX Runtime, NumPy, an old agent) is not held against a release.

It does not count as a failed trial, and no bundle is condemned for it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ota
from ota.agent import child, drawing, runtime, trial
from ota.agent.rules import MAX_TRIES
from ota.agent.state import TRIAL_GOOD, TRIAL_LOADS, Trial
from ota.errors import AgentError, GateError, ManifestError, SoftwareError, UnfinishedError
from ota.manifest import FORMS, Manifest, Reference, SamplerTable, parse
from ota.policy import Policy, Policy2
from ota.release.bundle import Bundle
from tests.conftest import few
from tests.fleet_kit import Field, publish
from tests.test_agent_update import changed_json, digest, on_trial, variation

pytestmark = pytest.mark.slow  # takes minutes; `make test-slow` and `make attacks` run it

pytest_plugins = ("tests.fleet_kit",)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between retries."""
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
sys.path.remove(os.environ["PYTHONPATH"].split(os.pathsep)[0])
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
    """Replace a package by this code, in every process that is started from now on."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


def mended_later(offered: Field, bundles: dict[str, Bundle], sentence: str) -> None:
    """Check that failed updates fetch, count and condemn nothing, so it makes no difference how often they are tried."""
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
    """Condemn no bundle if the runtime breaks before anything is fetched, just before the trial, or on probation."""
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
    def value(name: str, *shape: Any) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["m"]),
        onnx.helper.make_node("Add", ["m", "b"], ["a"]),
        onnx.helper.make_node("Softmax", ["a"], ["y"], axis=-1),
        onnx.helper.make_node("Conv", ["i", "k"], ["c"]),
    ]
    given = [value("x", "n", "d"), value("w", "d", "e"), value("b", "e"), value("i", "f", 1, "g", "h"), value("k", 1, 1, 3, 3)]
    graph = onnx.helper.make_graph(nodes, "p", given, [value("y", "n", "e"), value("c", "f", 1, "o", "p")])
    opsets = [onnx.helper.make_opsetid("", 17)]
    assert onnx.load_from_string(runtime.PROBE) == onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    runtime.check()


def wrong_by_a_thousandth(found: list[Any]) -> list[Any]:
    return [found[0], found[1] + 0.01 * (np.arange(found[1].size).reshape(found[1].shape) == found[1].size - 1)]


@pytest.mark.parametrize(
    "fault",
    [
        lambda found: [np.full_like(y, np.nan) if y.size >= 256 else y for y in found],
        lambda found: [found[0][::-1], found[1]],
        lambda found: [found[0], -found[1]],
        wrong_by_a_thousandth,
        lambda found: [y[:1] for y in found],
    ],
    ids=["only large ones", "rows turned round", "sign", "one number", "too few"],
)
def test_probe_notices_what_a_runtime_computes_wrongly(monkeypatch, fault):
    class Faulty(runtime.ort.InferenceSession):
        def run(self, *given: Any, **more: Any) -> Any:
            return fault(super().run(*given, **more))

    monkeypatch.setattr(runtime.ort, "InferenceSession", Faulty)
    with pytest.raises(RuntimeError, match="computes a wrong"):
        runtime.check()


WITHIN = {"graph_optimization_level": "all", "config": {}}


@pytest.mark.parametrize("bounds", [[">=99", "<100"], [">=0.1", "<1.2"]], ids=["too old", "too new"])
def test_bundle_for_another_runtime_is_installed_once_that_is_there(scene, bundles, tmp_path, monkeypatch, bounds):
    data = changed_json(bundles["second"], "sampler", runtime={"onnxruntime": bounds, **WITHIN})
    made = variation(bundles["second"], tmp_path / "other", "sampler", data)
    publish(scene.repository, made)
    device, before = scene.device, scene.device.state
    for _ in range(2):
        with pytest.raises(
            SoftwareError, match=f"it needs ONNX Runtime {bounds[0]}, {bounds[1]}, but this device has .*; install that version"
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
    """Return what a child answers on a device with another version of ONNX Runtime, which computes the same."""
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
        assert drawing.generate(device.home, "", 0)[1]["good"]  # a confirmed bundle still draws
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
            f"the manifest needs agent 99.0.0, but this is {ota.__version__}; update",
        ),
        (
            Manifest,
            {"schema_version": FORMS["manifest"] + 1, "lines": ["a"]},
            f"the manifest has form {FORMS['manifest'] + 1} and needs an agent that knows it, but this is {ota.__version__}; update",
        ),
        (Policy, {"schema_version": 7, "when": "soon"}, "the policy has form 7"),
        (Policy2, {"schema_version": 3, "limit": "all"}, "the policy 2 has form 3"),
        (SamplerTable, {"schema_version": 3, "method": "new"}, "the samplertable has form 3"),
        (Reference, {"schema_version": 4}, "the reference has form 4"),
    ],
)
def test_document_for_a_newer_agent_says_so(bundles, kind, fields, sentence):
    data = {
        Manifest: bundles["first"].manifest.canonical,
        Policy: lambda: Policy(line="a", device_class="b", seq=1, manifest="0" * 64, salt="", waves=[]).canonical(),
        Policy2: lambda: Policy2(line="a", device_class="b", seq=1, manifest="0" * 64, salt="", policy=1, limit=0).canonical(),
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
        bundles["second"], tmp_path / "newer", role, changed_json(bundles["second"], role, schema_version=4, more=[])
    )
    publish(scene.repository, made)
    before = scene.device.state
    for _ in range(2):
        with pytest.raises(AgentError, match="has form 4 and needs an agent that knows it"):
            scene.device.update()
        assert scene.device.state == before
    assert "update the agent first" in scene.device.command("--quiet", "update", code=7)


# What the probe does not notice

BEYOND = {
    "is not finite": "[y * float('nan') for y in made]",
    "computes something else": "[y * 1.3 + 0.2 for y in made]",
    "gives other shapes": "[y[:, :1] for y in made]",
}


@pytest.mark.parametrize(("fault", "when"), few(product(BEYOND, ["try", "generate"]), 2))
def test_bundle_is_not_condemned_where_the_one_that_runs_fails_too(offered, bundles, tmp_path, monkeypatch, fault, when):
    """Condemn no bundle if the runtime computes the probe but no bundle.

    On probation, only a fault that leaves no image is noticed.
    """
    device, first, second, real = offered.device, digest(bundles["first"]), digest(bundles["second"]), child.run
    code = (
        BEHIND
        + "    def run(self, names, feed, *more):\n        made = super().run(names, feed, *more)\n        "
        + f"return made if 'k' in feed else {BEYOND[fault] if when == 'try' else BEYOND['is not finite']}"
    )
    with pytest.MonkeyPatch.context() as meanwhile:

        def run(task: str, **request: Any) -> dict[str, Any]:
            if task == when and not (tmp_path / "broken").exists():
                broken(tmp_path / "broken", "onnxruntime", code, meanwhile)
            return real(task, **request)

        monkeypatch.setattr(child, "run", run)
        for tries in (1, 2):
            with pytest.raises(UnfinishedError, match="but the running bundle does not pass here any more either"):
                device.update()
            assert device.state.refused == {}
            assert (device.active, device.state.tries.get(second)) == ((first, tries) if when == "try" else (second, 1))
    device.update()
    assert (device.active, device.state.trial, device.state.refused, device.state.tries) == (second, None, {}, {})


def test_bundle_that_fails_where_the_one_that_runs_passes_is_condemned(scene, bundles, tmp_path):
    """Condemn a bundle that fails where the running one passes: only faults of the device are excused."""
    data = changed_json(bundles["second"], "reference", latency_ms=0.001)
    made = variation(bundles["second"], tmp_path / "other", "reference", data)
    publish(scene.repository, made)
    with pytest.raises(GateError, match="ms of computing; the budget is 0 ms"):
        scene.device.update()
    assert list(scene.device.state.refused) == [made.manifest.digest]


def test_bundle_that_was_tried_on_a_busy_device_is_tried_again(offered, bundles, monkeypatch):
    """Repeat a trial that was slow only because other processes were computing."""
    device, second, real = offered.device, digest(bundles["second"]), child.run
    with pytest.MonkeyPatch.context() as meanwhile:

        def run(task: str, **request: Any) -> dict[str, Any]:
            answer = real(task, **request)
            return answer | ({"milliseconds": 1e6} if task == "try" else {})

        meanwhile.setattr(child, "run", run)
        for tries in range(1, MAX_TRIES + 1):
            with pytest.raises(UnfinishedError, match=r"an image took 1000000 ms here, of which it computed .* busy"):
                device.update()
            assert (device.state.refused, device.state.tries) == ({}, {second: tries})
        assert "waits until" in device.update().reason
    assert trial.forget(device.home, second[:12]) == second
    assert device.update().changed
    assert (device.active, device.state.refused) == (second, {})


def test_limits_that_the_caller_set_lower_stay(monkeypatch):
    """Keep the lower limits of whoever started the agent: a child may not raise them."""
    told = {
        resource.RLIMIT_AS: (8 << 30, 5 << 30),
        resource.RLIMIT_FSIZE: (10, 10),
        resource.RLIMIT_CPU: (1, resource.RLIM_INFINITY),
    }
    made: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", told.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", made.__setitem__)
    child._limit(resource.RLIMIT_AS, 4 << 30)
    child._limit(resource.RLIMIT_FSIZE, 1 << 20)
    child._limit(resource.RLIMIT_CPU, 600)
    assert made == {resource.RLIMIT_AS: (4 << 30, 4 << 30), resource.RLIMIT_FSIZE: (10, 10), resource.RLIMIT_CPU: (600, 600)}


def test_agent_works_where_its_address_space_is_limited(offered, bundles):
    """Update under `ulimit -v` or LimitAS=; if that is too little to load ONNX Runtime, the error says so."""
    device = offered.device
    for mib, code, said in ((150, 3, "allow this process more than 150 MiB of address space"), (3000, 0, "is installed")):
        words = ["prlimit", f"--as={mib * 1024**2}", *device.words("update")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
        assert device.state.refused == {}

"""No surprise at the device: the factory applies the rules of the trial before it signs, and a wanted change is allowed narrowly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from flows import policies
from model import golden
from model.data import prepare
from model.export import export
from model.train import Checkpoint, TrainOptions, train
from ota import fitness
from ota.errors import AgentError, GateError, OperatorError
from ota.fitness import TrialResult
from ota.manifest import Allowed, Manifest, Range, Reference, VariantName, parse
from ota.policy import Policy, Wave
from ota.release import foretell
from ota.release.bundle import Bundle, assemble
from ota.release.foretell import Refusal
from ota.release.repository import Release, Repository
from tests.conftest import CAPTIONS, CONFIG, LATENCY_MS, SAMPLER, VERSION, origin, write_images
from tests.fleet_kit import CLASS, LINE, Field, publish
from tests.test_rollout import BEFORE, reference, trying

pytest_plugins = ("tests.fleet_kit",)
FIRST, OTHER = "1" * 64, "2" * 64


# The rule


def allowing(low: float, high: float, *bases: str) -> Reference:
    change = Allowed(bases=list(bases or (FIRST,)), statistics={"mean": Range(low=low, high=high)}, reason="new lamp")
    return reference(0.45, 0.55).model_copy(update={"schema_version": 2, "allowed": change})


def judged(value: float, own: Reference, base: str = FIRST, running: Reference = BEFORE) -> list[str]:
    return fitness.judge(trying(statistics=(("mean", value),)), own, running, OTHER, base)


def test_change_is_allowed_in_its_range_from_its_bundle():
    own = allowing(0.46, 0.54)
    assert judged(0.5, own) == []
    refusal = "the images' mean brightness is 0.50; the running model's range is 0.05 to 0.15"
    assert judged(0.5, reference(0.45, 0.55)) == [refusal]
    assert judged(0.5, own, base="3" * 64) == [refusal]
    assert judged(0.55, own) == [refusal.replace("0.50", "0.55")]


def test_no_allowance_reaches_half_of_what_pixel_values_span():
    far = allowing(1.1, 1.2).model_copy(update={"statistics": {"mean": Range(low=1.1, high=1.2)}})
    assert judged(1.14, far) == []
    assert judged(1.16, far) == ["the images' mean brightness is 1.16; the running model's range is 0.05 to 0.15"]


def test_way_back_from_an_allowed_change_is_no_surprise():
    dark = reference(0.05, 0.15)
    assert judged(0.1, dark, running=reference(0.45, 0.55))
    assert judged(0.1, dark, running=allowing(0.46, 0.54, OTHER)) == []


def test_all_other_rules_stay():
    own = allowing(0.46, 0.54)
    measured = trying(statistics=(("mean", 0.5),), golden_share=0.5, finite=False, computing=101.0)
    assert len(fitness.judge(measured, own, BEFORE, OTHER, FIRST)) == 3


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"statistics": {"mean": {"low": 0.0, "high": 0.11}}}, 2),
        ({"statistics": {"mean": {"low": 0.1, "high": 0.0}}}, 2),
        ({"statistics": {"mean": {"low": -1.0, "high": 1.0}}}, 2),
        ({"statistics": {}}, 2),
        ({"bases": []}, 2),
        ({"bases": [FIRST] * 17}, 2),
        ({"bases": ["*"]}, 2),
        ({}, 1),
    ],
)
def test_allowance_that_would_switch_the_trial_off_is_no_document(fields: dict[str, Any], form: int):
    change = {"bases": [FIRST], "statistics": {"mean": {"low": 0.0, "high": 0.1}}, "reason": "why"}
    whole = reference(0.0, 0.2).model_dump() | {"schema_version": 2, "allowed": change}
    assert Reference.model_validate(whole)
    with pytest.raises(ValidationError):
        Reference.model_validate(whole | {"schema_version": form, "allowed": change | fields})


# A bundle that draws other images on purpose


def write_negatives(folder: Path) -> Path:
    """Write the images of `write_images` with light and dark exchanged."""
    write_images(folder)
    for path in folder.glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return folder


@pytest.fixture(scope="session")
def negative(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Train a model whose images are light where those of `checkpoint` are dark."""
    folder = tmp_path_factory.mktemp("negative")
    dataset = prepare(write_negatives(folder / "images"), CONFIG, folder / "cache")
    return train(CONFIG, dataset, VERSION, TrainOptions(steps=120, batch=16, learning_rate=8e-3), folder / "run")


@dataclass
class Wanted:
    """What the factory knows of a bundle that draws other images."""

    exported: Path
    out: Path
    trials: dict[VariantName, TrialResult]

    def bundle(self, allowed: dict[VariantName, Allowed] | None = None) -> Bundle:
        return assemble(
            {"full": self.exported}, line=LINE, device_class=CLASS, tier="test", configuration="I", precision="bfloat16",
            origin=origin(9), out=self.out, allowed=allowed, oldest_agent="0.2.0",
        )  # fmt: skip


@pytest.fixture(scope="session")
def wanted(negative: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    folder = tmp_path_factory.mktemp("wanted")
    export(negative, "bfloat16", SAMPLER, list(CAPTIONS), LATENCY_MS, folder / "export")
    return Wanted(folder / "export", folder / "bundles", trials_of(folder / "export"))


def trials_of(exported: Path) -> dict[VariantName, TrialResult]:
    images = golden.measure(exported)
    return {"full": TrialResult(1.0, images.finite, images.statistics, images.load, 0, 0, 0)}


def against(repository: Repository, target: Bundle, trials: dict[VariantName, TrialResult], *names: str) -> list[Refusal]:
    bases: dict[int, tuple[Release, tuple[str, ...]]] = {r.seq: (r, names) for r in repository.releases(LINE, CLASS)}
    return foretell.refusals(repository, target, trials, bases)


def test_factory_foretells_what_the_device_then_says(scene: Field, wanted: Wanted):
    target = wanted.bundle()
    (refusal,) = against(scene.repository, target, wanted.trials, "dev-1")
    assert (refusal.release, refusal.devices, refusal.variant) == (1, ("dev-1",), "full")
    said = str(foretell.refused([refusal], f"{LINE}/{CLASS}"))
    assert "devices that run release 1 (dev-1) would refuse full: the images' mean brightness is" in said
    assert f"`ferry release {LINE}/{CLASS} --allow-change --reason ...`" in said
    publish(scene.repository, target)
    with pytest.raises(GateError) as refused:
        scene.device.update()
    assert "; ".join(refusal.reasons) in str(refused.value)


def test_what_devices_take_is_not_foretold_to_be_refused(
    scene: Field, bundles: dict[str, Bundle], changed: Callable[..., Checkpoint], tmp_path: Path
):
    export(changed("second", 0.01), "bfloat16", SAMPLER, list(CAPTIONS), LATENCY_MS, tmp_path / "export")
    assert against(scene.repository, bundles["second"], trials_of(tmp_path / "export")) == []
    publish(scene.repository, bundles["second"])
    assert scene.device.update().way == "full"


def test_allowed_change_is_taken_and_so_is_the_way_back(scene: Field, wanted: Wanted):
    found = against(scene.repository, wanted.bundle(), wanted.trials)
    allowed = foretell.allow(found, wanted.trials, "new lamp", {})
    assert allowed["full"].bases == [scene.release.manifest]
    assert set(allowed["full"].statistics) == set(found[0].moved)
    target = wanted.bundle(allowed)
    assert against(scene.repository, target, wanted.trials) == []
    made = publish(scene.repository, target)
    assert foretell.allowed_before(scene.repository, wanted.bundle()) == allowed
    assert foretell.described(scene.repository, LINE, CLASS, allowed)[0].startswith(
        "full may differ from release 1: mean brightness"
    )
    assert scene.device.update().way == "full"
    assert scene.device.active == made.manifest
    first = scene.repository.releases(LINE, CLASS)[0]
    scene.repository.set_policy(_revert(first))
    scene.device.update()
    assert scene.device.active == first.manifest


def _revert(release: Release) -> Any:
    from ota.release import rollout

    return rollout.start(release, (100,), soak=0, now=0, revert=True)


def test_device_that_runs_another_bundle_still_refuses(scene: Field, wanted: Wanted, bundles: dict[str, Bundle]):
    found = against(scene.repository, wanted.bundle(), wanted.trials)
    allowed = foretell.allow(found, wanted.trials, "new lamp", {})
    publish(scene.repository, bundles["second"])
    scene.device.update()
    assert [r.release for r in against(scene.repository, wanted.bundle(allowed), wanted.trials)] == [2]
    publish(scene.repository, wanted.bundle(allowed))
    with pytest.raises(GateError, match="the images' mean brightness is"):
        scene.device.update()
    more = foretell.allow(against(scene.repository, wanted.bundle(allowed), wanted.trials), wanted.trials, "both", allowed)
    assert against(scene.repository, wanted.bundle(more), wanted.trials) == []


def test_agent_of_before_keeps_what_runs_and_refuses_nothing_for_good(
    scene: Field, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
):
    found = against(scene.repository, wanted.bundle(), wanted.trials)
    target = wanted.bundle(foretell.allow(found, wanted.trials, "new lamp", {}))
    publish(scene.repository, target)
    before = scene.device.active
    monkeypatch.setattr("ota.manifest.FORMS", {})
    whole = Manifest.model_validate

    def first_form_only(data: bytes, **more: Any) -> Manifest:
        if json.loads(data)["schema_version"] == 2:
            whole({})  # raises what a field that is not known raises
        return whole(json.loads(data), **more)

    monkeypatch.setattr(Manifest, "model_validate_json", first_form_only)
    with pytest.raises(AgentError, match="has form 2 and needs an agent that knows it"):
        scene.device.update()
    assert (scene.device.active, scene.device.state.refused) == (before, {})
    monkeypatch.undo()
    assert scene.device.update().way == "full"


def test_noise_cannot_be_allowed(scene: Field, bundles: dict[str, Bundle], tmp_path: Path):
    folder = tmp_path / "export"
    folder.mkdir()
    garbage, names = (
        bundles["garbage"],
        {"graph": "graph.onnx", "weights": "weights.bin", "sampler": "sampler.json", "golden": "golden.npz"},
    )
    for role, name in (names | {"reference": "reference.json"}).items():
        shutil.copyfile(garbage.path(role, None if role == "graph" else "full"), folder / name)  # type: ignore[arg-type]
    made = Wanted(folder, tmp_path / "bundles", trials_of(folder))
    found = against(scene.repository, made.bundle(), made.trials)
    target = made.bundle(foretell.allow(found, made.trials, "a slip", {}))
    left = against(scene.repository, target, made.trials)
    assert "the images' edge strength is" in str(foretell.too_far(left))
    publish(scene.repository, target)
    with pytest.raises(GateError, match="the images' edge strength is"):
        scene.device.update()


def test_too_many_bases_are_said(wanted: Wanted):
    found = [Refusal(n, f"{n:064x}", (), "full", ("why",), ("mean",)) for n in range(17)]
    with pytest.raises(OperatorError, match="devices run 17 bundles"):
        foretell.allow(found, wanted.trials, "why", {})


def test_bundle_below_the_floor_is_not_compared_with(scene: Field, wanted: Wanted, bundles: dict[str, Bundle]):
    publish(scene.repository, bundles["second"])
    scene.repository.set_floor(LINE, CLASS, 2)
    assert [r.release for r in against(scene.repository, wanted.bundle(), wanted.trials)] == [2]


def test_halted_release_is_not_expected_on_devices():
    workspace: Any = SimpleNamespace(
        repository=SimpleNamespace(policy=lambda *_: Policy(
            line=LINE, device_class=CLASS, seq=3, manifest=FIRST, salt="", waves=[Wave(bps=10_000, not_before=0)], halt=True
        ), policy2=lambda *_: None),
        ledger=SimpleNamespace(entries=lambda _: [SimpleNamespace(kind="rollout", facts={"release": seq}) for seq in (1, 2, 3)]),
    )  # fmt: skip
    assert policies.opened(workspace, LINE, CLASS) == {2}


def test_many_devices_are_counted():
    assert foretell.whose(3, [f"d{i}" for i in range(9)]) == "devices that run release 3 (d0, d1, d2, d3, d4 and 4 more)"
    assert foretell.whose(3, ()) == "devices that run release 3 (none has reported)"


def test_reference_of_before_is_read_as_before(bundles: dict[str, Bundle]):
    data = bundles["first"].path("reference", "full").read_bytes()
    assert b"allowed" not in data
    assert parse(Reference, data, 1 << 18).allowed is None
    assert json.loads(data)["schema_version"] == 1

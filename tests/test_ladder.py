"""What an update brings besides a student: weights of `full`, of other students, and what devices have already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import budget, fitting, retrain
from flows.fitting import Taught
from flows.settings import Line, Settings
from flows.steps import ModelFiles
from model.config import VariantName
from model.scorecard import DataVersion
from model.train import LINEAGE, Checkpoint, load_checkpoint
from registry.catalog import Subject
from registry.lineage import file_sha256
from tests.conftest import VERSION

SUBJECT = Subject(line="shapes", configuration="I", variant="full")


def line(**changed: Any) -> Line:
    given = {"data": "data/shapes", "tier": "test", "update_method": "lowrank"} | changed
    return Settings.model_validate({"schema": 2, "lines": {"shapes": given}}).lines["shapes"]


def exported(folder: Path, weights: str) -> Path:
    """Write the weights of an export."""
    (folder / weights).mkdir(exist_ok=True)
    (folder / weights / "weights.bin").write_bytes(weights.encode())
    return folder / weights


def student(of: Checkpoint, full: Checkpoint) -> Checkpoint:
    """Make a student of a checkpoint whose weights were changed."""
    taught = {"variant": "turbo", "teacher": full.weights_sha256, "parent": full.weights_sha256}
    (of.folder / LINEAGE).write_text(of.lineage.model_copy(update=taught).model_dump_json())
    return load_checkpoint(of.folder)


def test_variants_whose_students_have_one_master_take_one_update_although_less_is_left(
    checkpoint: Checkpoint,
    changed: Callable[[str, float], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Give the second one less room, because the first was promoted in between."""
    master, fielded = (
        student(changed("master", 0.02), checkpoint),
        [student(changed(f"at {n}", 0.01), checkpoint) for n in (0, 1)],
    )
    fixed, limits = iter([5000, 5040]), list[int]()
    monkeypatch.setattr(budget, "fixed_bytes", lambda *_: next(fixed))
    monkeypatch.setattr(retrain, "_trained", lambda *_: master.folder)
    monkeypatch.setattr(retrain, "_held", lambda *_: set())

    def fitted(*given: Any) -> Taught:
        limits.append(given[-2])
        return Taught(checkpoint=fielded[len(limits) - 1].folder, level=0.03 * len(limits), size=limits[-1])

    monkeypatch.setattr(fitting, "_fitted", fitted)
    workspace: Any = SimpleNamespace(line=lambda _: line(update_budget=16384), work=tmp_path)
    ladder = retrain._Ladder(1, full=ModelFiles(checkpoint=checkpoint.folder, bundle=exported(tmp_path, "full")), weights=0)

    def judged(variant: VariantName) -> tuple[Checkpoint, Any]:
        subject = Subject(line="shapes", configuration="I", variant=variant)
        data: DataVersion = VERSION
        folder, update = retrain._made(workspace, data, subject, ladder, "student", checkpoint, None)
        files = ModelFiles(checkpoint=folder, bundle=exported(tmp_path, "student"))
        decision = SimpleNamespace(update=update)
        retrain._passed(ladder, SimpleNamespace(fit=True, files=files, decision=decision, row=None))  # type: ignore[arg-type]
        return load_checkpoint(folder), update

    (fast, first), (turbo, second) = judged("fast"), judged("turbo")
    assert limits == [16384 - 5000]
    assert fast.weights_sha256 == turbo.weights_sha256 == fielded[0].weights_sha256
    assert (fast.lineage.variant, turbo.lineage.variant) == ("fast", "turbo")
    assert (second.noise, second.weights, second.beside) == (first.noise, first.weights, 0)
    assert (first.bytes, second.bytes) == (16384, 16384)


def version(number: int, weights: str, update: int | None, estimated: int | None) -> tuple[Any, Any]:
    """Make the seal of a version, and the decision on it."""
    made = SimpleNamespace(weights=update) if update is not None else None
    return SimpleNamespace(version=number, checkpoint=weights), SimpleNamespace(update=made, update_bytes=estimated)


@pytest.mark.parametrize(
    ("versions", "counted"),
    [
        ([version(1, "a", None, None)], None),  # a first version
        ([version(1, "a", None, None), version(2, "b", 9000, 15_000)], 9000),
        ([version(1, "a", None, None), version(2, "b", None, 2_000_000)], 2_000_000),  # adopted, or rounded
        ([version(1, "a", None, None), version(2, "b", 9000, 15_000), version(3, "b", None, 40)], 9000),  # with another sampler
        (
            [version(1, "a", None, None), version(2, "b", 9000, 15_000), version(3, "b", None, 50_000)],
            50_000,
        ),  # in another precision
    ],
)
def test_weights_of_full_are_counted_however_they_were_made(
    versions: list[tuple[Any, Any]], counted: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retrain, "seals", lambda *_: [seal for seal, _ in versions])
    monkeypatch.setattr(retrain, "verdict", lambda _, __, number: versions[number - 1][1])
    of: Any = SimpleNamespace(seal=versions[-1][0])
    assert retrain._weights_of_update(SimpleNamespace(), SUBJECT, of) == counted  # type: ignore[arg-type]
    ladder = retrain._Ladder(1)
    for seal, decision in versions:  # all in one run
        files = ModelFiles(checkpoint=tmp_path / seal.checkpoint, bundle=tmp_path)
        retrain._noted(ladder, SimpleNamespace(fit=True, files=files, decision=decision, row=None))  # type: ignore[arg-type]
    assert ladder.weights == counted


def test_weights_that_the_last_release_holds_are_not_counted_and_those_of_no_release_are(tmp_path: Path):
    def files(name: str) -> ModelFiles:
        return ModelFiles(checkpoint=tmp_path, bundle=exported(tmp_path, name))

    held = {name: file_sha256(files(name).bundle / "weights.bin") for name in ("full", "fast", "turbo")}
    ladder = retrain._Ladder(1, full=files("full"), weights=9000)
    for name, size in (("fast", 800), ("turbo", 70)):
        ladder.students[name] = retrain._Student(files(name), SimpleNamespace(weights=size))  # type: ignore[arg-type]
    assert retrain._beside(ladder, set(), "new") == 9870
    assert retrain._beside(ladder, set(), "turbo") == 9800
    assert retrain._beside(ladder, {held["full"]}, "new") == 870
    assert retrain._beside(ladder, {held["full"], held["fast"]}, "new") == 70
    first = retrain._Ladder(1, full=files("full"))  # a first version: the next release brings it as a whole
    assert retrain._beside(first, set(), "new") is None
    assert retrain._beside(first, {held["full"]}, "new") == 0


def test_devices_have_what_every_class_with_a_release_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    manifests = {
        "edge": SimpleNamespace(variants=["full", "turbo"], weights_sha256={"full": "a", "turbo": "b"}.get),
        "kiosk": SimpleNamespace(variants=["full"], weights_sha256={"full": "a"}.get),
    }
    classes = {name: {"configuration": "I"} for name in ("edge", "kiosk", "new")} | {"other": {"configuration": "II"}}
    workspace: Any = SimpleNamespace(
        root=tmp_path, line=lambda _: line(classes=classes), repository=SimpleNamespace(manifest=lambda name: manifests[name])
    )
    monkeypatch.setattr(retrain, "is_clone", lambda _: False)
    monkeypatch.setattr(retrain.fielded, "meant_to_run", lambda _, __, name: name if name in manifests else None)
    assert retrain._held(workspace, SUBJECT) == {"a"}
    del manifests["kiosk"]
    assert retrain._held(workspace, SUBJECT) == {"a", "b"}
    manifests.clear()
    assert retrain._held(workspace, SUBJECT) == set()

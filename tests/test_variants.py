"""Distilled variants in one workspace, with real Prefect, MLflow, signatures and a device: who teaches whom, what is fielded.

The tests of this file build on each other and run in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.settings import DeviceClass
from flows.setup import create
from flows.workspace import Workspace
from model import versions
from model.config import VariantName
from model.features import SPACES
from model.scorecard import Lineage, Scorecard
from ota.agent import drawing
from registry.catalog import Subject
from registry.champions import champion_of, seals
from registry.seal import Seal
from tests.conftest import write_images
from tests.fleet_kit import Device
from tests.test_flows import settings

pytestmark = pytest.mark.slow

SETTINGS = """
schema = 1

[lines.shapes]
data = "data/shapes"
tier = "test"
text_length = 8

[lines.shapes.training]
steps = 60
batch = 16
learning_rate = 8e-3

[lines.shapes.retraining]
steps = 10
batch = 16
learning_rate = 1e-3

[lines.shapes.distillation]
steps = 10
batch = 16
learning_rate = 1e-3
update_grid = 1.0

[lines.shapes.sampler]
steps = 6

[lines.shapes.gate]
images = 32
minimum_images = 8
captions = false
implausible = 1.0
duplicates = 1.0
coverage = 1.0
beat_solver = false

[lines.shapes.classes.edge]
variants = ["fast", "dev"]
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Create a workspace with a first data revision."""
    made = create(tmp_path_factory.mktemp("factory") / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes", 120)
    versions.add(made.root, "data/shapes", "shapes", "first")
    yield made
    made.ledger.close()
    made.fleet.close()


def subject(variant: VariantName) -> Subject:
    return Subject(line="shapes", configuration="I", variant=variant)


def champion(workspace: Workspace, variant: VariantName) -> Seal:
    found = champion_of(workspace, subject(variant))
    assert found is not None
    return found


def lineage(workspace: Workspace, version: Seal) -> Lineage:
    from flows.steps import champion_files

    return Lineage.model_validate_json((champion_files(workspace, version).checkpoint / "lineage.json").read_bytes())


def weights(workspace: Workspace, version: Seal) -> str:
    from flows.steps import champion_files
    from model.train import load_checkpoint

    return load_checkpoint(champion_files(workspace, version).checkpoint).weights_sha256


def card(workspace: Workspace, version: Seal) -> Scorecard:
    return workspace.catalog.card(version)


def retrain(workspace: Workspace) -> list[dict[str, Any]]:
    from flows.retrain import retrain as flow

    return flow(str(workspace.root), "shapes")


def test_student_without_a_teacher_waits(workspace: Workspace):
    rows = retrain(workspace)  # no model of 60 steps covers everything
    assert [(row["subject"], row["outcome"]) for row in rows] == [
        ("shapes/I/full", "refuse"), ("shapes/I/dev", "no teacher"), ("shapes/I/fast", "no teacher"),
    ]  # fmt: skip
    assert rows[1]["reason"] == "it is taught by full, of which no version has passed the gate"
    assert workspace.catalog.versions(subject("dev")) == []


def test_each_variant_is_taught_by_the_one_before(workspace: Workspace):
    path = workspace.root / "ferry.toml"
    path.write_text(path.read_text().replace("coverage = 1.0", "coverage = 0.0"))
    rows = retrain(Workspace(workspace.root))
    assert [(row["outcome"], row["promoted"]) for row in rows] == [("promote", True)] * 3
    full, dev, fast = (champion(workspace, variant) for variant in ("full", "dev", "fast"))
    assert lineage(workspace, full).teacher is None
    for student, teacher in ((dev, full), (fast, dev)):
        made = lineage(workspace, student)
        assert made.teacher == made.parent == weights(workspace, teacher)  # there was no student to start from
    assert len({full.weights, dev.weights, fast.weights}) == 3


def test_scorecard_says_whether_a_student_beats_the_solver(workspace: Workspace):
    full = champion(workspace, "full")
    assert card(workspace, full).beats_solver is None
    for variant, steps in (("dev", 28), ("fast", 14)):
        made = card(workspace, champion(workspace, variant))  # type: ignore[arg-type]
        assert (made.sampler.method, made.sampler.steps, made.sampler.guidance) == ("mean", steps, 1.0)
        assert made.solver is not None
        assert made.solver.evaluations == made.sampler.evaluations == steps
        beside = [row for row in made.comparisons if row.against == "solver"]
        assert {row.space for row in beside} == set(SPACES)
        assert {row.against_sha256 for row in beside} == {full.weights}
        assert made.beats_solver is all(row.delta < 0 for row in beside if row.aspect == "images")


def test_nothing_new_means_no_work_for_any_variant(workspace: Workspace):
    before = sorted(path.name for path in (workspace.work / "runs").iterdir())
    assert [row["outcome"] for row in retrain(Workspace(workspace.root))] == ["unchanged"] * 3
    assert sorted(path.name for path in (workspace.work / "runs").iterdir()) == before


def test_device_runs_the_variants_of_its_class(workspace: Workspace, tmp_path: Path):
    from flows.publish import release
    from ota.release import rollout

    made = release(str(workspace.root), "shapes", "edge")
    assert made["versions"] == {"fast": 1, "dev": 1}
    (published,) = workspace.repository.releases("shapes", "edge")
    assert workspace.repository.manifest(published).default_variant == "fast"
    workspace.repository.set_policy(rollout.start(published, [100], soak=0))
    device = Device.init(tmp_path / "device", workspace.repository)
    assert device.update().changed
    pictures = {variant: drawing.generate(device.home, "disc", 3, variant)[0] for variant in ("dev", "fast")}
    assert pictures["dev"] != pictures["fast"]


def test_variant_that_a_class_begins_to_run_is_the_same_model(workspace: Workspace):
    from flows.publish import make_bundle
    from flows.retrain import _is_exported_so, incumbent_of
    from ota.manifest import Reference

    before = champion(workspace, "full")
    with settings(workspace, 'variants = ["fast", "dev"]', 'variants = ["fast", "dev", "full"]'):
        opened = Workspace(workspace.root)
        assert [row["outcome"] for row in retrain(opened)] == ["unchanged"] * 3
        assert champion(workspace, "full") == before
        made = Path(make_bundle.fn(str(workspace.root), "shapes", "edge"))
        references = [
            Reference.model_validate_json(p.read_bytes()) for p in made.iterdir() if b'"statistics"' in p.read_bytes()[:99_999]
        ]
        assert {r.latency_ms for r in references} == {DeviceClass().latency_ms}
    incumbent = incumbent_of(workspace, subject("full"))
    assert incumbent
    for budget, kept in (({"latency_ms": 0.001}, False), ({"memory_mib": 0.001}, False), ({}, True)):
        classes = {"edge": DeviceClass(variants=["full"], **budget)}
        line = workspace.line("shapes").model_copy(update={"classes": classes})
        assert _is_exported_so(workspace, incumbent, line) is kept  # a budget that it does not keep, the gate has to see


def test_changed_guidance_is_taught_anew(workspace: Workspace):
    before = champion(workspace, "full")
    with settings(workspace, "steps = 6\n", "steps = 6\nguidance = 4.0\n"):
        rows = retrain(Workspace(workspace.root))
    assert [row["outcome"] for row in rows[1:]] != ["unchanged"] * 2
    made = lineage(workspace, seals(workspace, subject("dev"))[1])
    assert (made.guidance, made.teacher) == (4.0, weights(workspace, before))
    assert lineage(workspace, seals(workspace, subject("dev"))[0]).guidance == 2.0


def test_budget_of_a_class_is_for_what_it_runs(workspace: Workspace):
    line = workspace.line("shapes").model_copy(
        update={"classes": {"slow": DeviceClass(latency_ms=900), "quick": DeviceClass(latency_ms=20, variants=["fast"])}}
    )
    assert [line.latency_ms("I", variant) for variant in ("full", "dev", "fast")] == [900, 3_600_000, 20]
    assert line.combinations() == [("I", "full"), ("I", "dev"), ("I", "fast")]


def test_champion_of_another_tier_teaches_nobody(workspace: Workspace):
    small = (("steps = 60", "steps = 1"), ("coverage = 0.0", "coverage = 1.0"))
    with settings(workspace, 'tier = "test"', 'tier = "nano"'), settings(workspace, *small[0]), settings(workspace, *small[1]):
        rows = retrain(Workspace(workspace.root))
    assert [row["outcome"] for row in rows] == ["refuse", "no teacher", "no teacher"]


def test_student_goes_on_from_the_student_before_and_if_that_fails_from_its_teacher(workspace: Workspace):
    write_images(workspace.root / "data/shapes", 120, seed=1, dim=True)
    versions.add(workspace.root, "data/shapes", "shapes", "dimmer light")
    before = {variant: champion(workspace, variant) for variant in ("full", "dev", "fast")}  # type: ignore[arg-type]
    with settings(workspace, "coverage = 0.0", "coverage = 1.0"):  # refuses all
        rows = retrain(Workspace(workspace.root))
    assert [row["outcome"] for row in rows] == ["refuse"] * 3
    for variant, teacher in (("dev", "full"), ("fast", "dev")):
        first, second = seals(workspace, subject(variant))[-2:]  # type: ignore[arg-type]
        taught = weights(workspace, before[teacher])
        assert lineage(workspace, first).teacher == lineage(workspace, second).teacher == taught
        assert lineage(workspace, first).parent == weights(workspace, before[variant])
        assert lineage(workspace, second).parent == taught
    assert {v: champion(workspace, v) for v in before} == before  # type: ignore[arg-type]

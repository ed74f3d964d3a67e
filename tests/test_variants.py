"""The variants of one `full`, with real Prefect, MLflow, signatures and a device: where each comes from, and what is fielded.

The tests of this file build on each other and run in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.errors import WorkspaceError
from flows.settings import DeviceClass
from flows.setup import create
from flows.workspace import Workspace
from model import versions
from model.config import VariantName
from model.features import SPACES
from model.scorecard import Lineage, Sampler, Scorecard
from ota.agent import drawing
from registry.catalog import Subject
from registry.champions import champion_of, promote, seals, verdict
from registry.seal import Seal
from tests.conftest import write_images
from tests.fleet_kit import Device
from tests.test_flows import settings

pytestmark = pytest.mark.slow

METHOD = ('tier = "test"', 'tier = "test"\nupdate_method = "lowrank"')
LONGER = ("steps = 10\nbatch = 16\nlearning_rate = 1e-3", "steps = 120\nbatch = 16\nlearning_rate = 6e-3")
LENIENT = ("images = 32", "images = 32\ntolerance = 2.0\ntolerance_bands = 10.0")
ALL: tuple[VariantName, ...] = ("full", "dev", "fast", "turbo")

SETTINGS = """
schema = 2

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
steps = 30
trajectories = 32

[lines.shapes.sampler]
steps = 8

[lines.shapes.gate]
images = 32
minimum_images = 8
captions = false
implausible = 1.0
duplicates = 1.0
coverage = 1.0
beat_solver = false

[lines.shapes.classes.edge]
variants = ["fast", "turbo", "dev"]
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


def card(workspace: Workspace, version: Seal) -> Scorecard:
    return workspace.catalog.card(version)


def retrain(workspace: Workspace) -> list[dict[str, Any]]:
    from flows.retrain import retrain as flow

    return flow(str(workspace.root), "shapes")


def test_variant_without_a_source_waits(workspace: Workspace):
    rows = retrain(workspace)  # no model of 60 steps covers everything
    assert [(row["subject"], row["outcome"]) for row in rows] == [
        ("shapes/I/full", "refuse"), ("shapes/I/dev", "no source"), ("shapes/I/fast", "no source"), ("shapes/I/turbo", "no source"),
    ]  # fmt: skip
    assert rows[1]["reason"] == "its weights come from full, of which no version has passed the gate"
    assert workspace.catalog.versions(subject("dev")) == []


def test_each_variant_comes_from_the_cheapest_source(workspace: Workspace):
    path = workspace.root / "ferry.toml"
    path.write_text(path.read_text().replace("coverage = 1.0", "coverage = 0.0"))
    rows = retrain(Workspace(workspace.root))
    assert [(row["outcome"], row["promoted"]) for row in rows] == [("promote", True)] * 4
    assert "as good as full within the margin, in 4 evaluations of the network" in rows[3]["reason"]
    full, dev, fast, turbo = (champion(workspace, variant) for variant in ALL)
    assert full.weights == dev.weights == fast.weights
    assert turbo.weights != full.weights
    for table in (dev, fast):
        made = lineage(workspace, table)
        assert (made.parent, made.teacher, made.steps) == (full.checkpoint, None, 0)
    student = lineage(workspace, turbo)
    assert student.teacher == student.parent == full.checkpoint  # there was no student to start from
    assert (student.thin, student.trajectories, student.guidance) == (True, 32, 2.0)


def test_scorecards_compare_with_full_and_with_its_converged_images(workspace: Workspace):
    full = champion(workspace, "full")
    assert card(workspace, full).converged is None
    steps: dict[VariantName, int] = {"dev": 4, "fast": 2, "turbo": 4}
    for variant, wanted in steps.items():
        made = card(workspace, champion(workspace, variant))
        assert made.sampler.steps == wanted
        assert made.sampler.evaluations == {"dev": 8, "fast": 4, "turbo": 4}[variant]
        beside = [row for row in made.comparisons if row.against == "full"]
        assert {row.space for row in beside} == set(SPACES)
        assert {row.against_sha256 for row in beside} == {full.weights}
        assert made.converged is not None
        assert made.converged.n == 32
        if variant == "turbo":
            assert made.solver is not None
            assert made.solver.evaluations == made.sampler.evaluations
            assert made.beats_solver is (made.converged.delta is not None and made.converged.delta < 0)
        else:
            assert made.solver is made.beats_solver is made.converged.solver is None


def test_nothing_new_means_no_work_for_any_variant(workspace: Workspace):
    before = sorted(path.name for path in (workspace.work / "runs").iterdir())
    assert [row["outcome"] for row in retrain(Workspace(workspace.root))] == ["unchanged"] * 4
    assert sorted(path.name for path in (workspace.work / "runs").iterdir()) == before


def test_device_runs_the_variants_of_its_class(workspace: Workspace, tmp_path: Path):
    from flows.publish import release
    from ota.release import rollout

    made = release(str(workspace.root), "shapes", "edge")
    assert made["versions"] == {"fast": 1, "turbo": 1, "dev": 1}
    (published,) = workspace.repository.releases("shapes", "edge")
    manifest = workspace.repository.manifest(published)
    assert manifest.default_variant == "fast"
    workspace.repository.set_policy(rollout.start(published, [100], soak=0))
    device = Device.init(tmp_path / "device", workspace.repository)
    assert device.update().changed
    before = device.update()
    pictures = {variant: drawing.generate(device.home, "disc", 3, variant)[0] for variant in manifest.variants}
    assert len(set(pictures.values())) == 3  # each draws otherwise, and switching fetches nothing
    assert not before.changed


def test_bytes_of_a_thin_student_lead_to_its_version(workspace: Workspace):
    from flows.trace import gather
    from registry.trace import trace

    (published,) = workspace.repository.releases("shapes", "edge")
    manifest = workspace.repository.manifest(published)
    thin = manifest.overlay("turbo")
    assert thin
    assert thin.weights == champion(workspace, "turbo").weights
    assert manifest.entry("weights", "dev") == manifest.entry("weights", "fast").model_copy(update={"variant": "dev"})
    found = trace(gather(workspace), thin.sha256)
    assert found["of"]["name"] == "shapes/edge release 1"
    names = {thing["name"] for thing in found["back"]}
    assert {champion(workspace, variant).name for variant in ("turbo", "full")} <= names
    assert any(name.startswith("shapes ") for name in names)  # the data revision


def test_variant_that_a_class_begins_to_run_is_the_same_model(workspace: Workspace):
    from flows.publish import make_bundle
    from flows.retrain import _is_exported_so, incumbent_of
    from ota.manifest import Reference

    before = champion(workspace, "full")
    with settings(workspace, 'variants = ["fast", "turbo", "dev"]', 'variants = ["fast", "turbo", "dev", "full"]'):
        opened = Workspace(workspace.root)
        assert [row["outcome"] for row in retrain(opened)] == ["unchanged"] * 4
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


def test_variant_without_a_champion_is_left_out_of_the_bundle(workspace: Workspace, capsys: pytest.CaptureFixture[str]):
    """Check a class of configuration II, which has no champion at all, and one of I, which gets what there is."""
    from flows.publish import make_bundle
    from ota.release.bundle import open_bundle
    from registry.champions import champions
    from registry.errors import CatalogError

    listed = [subject("fast"), Subject(line="shapes", configuration="II", variant="full")]
    assert list(champions(workspace, listed)) == ["fast"]
    with pytest.raises(CatalogError, match="shapes/II/full has no champion to release"):
        champions(workspace, listed[1:])
    assert open_bundle(Path(make_bundle.fn(str(workspace.root), "shapes", "edge"))).manifest.variants == ["fast", "turbo", "dev"]


def test_changed_guidance_is_judged_and_taught_anew(workspace: Workspace):
    before = champion(workspace, "full")
    with settings(workspace, "steps = 8\n", "steps = 8\nguidance = 4.0\n"):
        rows = retrain(Workspace(workspace.root))
    assert [row["outcome"] for row in rows] != ["unchanged"] * 4
    made = lineage(workspace, seals(workspace, subject("turbo"))[1])
    assert (made.guidance, made.teacher) == (4.0, before.checkpoint)
    assert lineage(workspace, seals(workspace, subject("turbo"))[0]).guidance == 2.0


def test_settings_choose_the_source_of_a_variant(workspace: Workspace):
    line = workspace.line("shapes")
    assert [line.sources(variant) for variant in ALL] == [("training",), ("table", "student"), ("table", "student"), ("student",)]
    mean = Sampler(method="mean", steps=2, guidance=1.0)
    given = line.model_copy(update={"samplers": {"dev": mean, "turbo": Sampler(steps=3)}})
    assert given.sources("dev") == ("student",)
    assert given.sampler_of("dev") == mean
    assert given.sources("turbo") == ("table",)
    assert line.sampler_of("fast") == Sampler(steps=2, shift=0.5)
    assert line.sampler_of("dev") == Sampler(steps=4, shift=0.7)
    assert line.sampler_of("fast", "student") == Sampler(method="mean", steps=8, guidance=1.0)


def test_tuning_measures_the_champion_and_changes_nothing(workspace: Workspace):
    from flows.tuning import tune

    before = (workspace.root / "ferry.toml").read_text()
    found = tune(workspace, "shapes", None, 16)
    assert found.subject == "shapes/I/full"
    assert {variant: rows[0].sampler.steps for variant, rows in found.grids.items()} == {"dev": 4, "fast": 2}
    assert len(found.guidance) == 4
    assert "below [lines.shapes.sampler" in found.text or "nothing was shown to be better" in found.text
    assert (workspace.root / "ferry.toml").read_text() == before
    with pytest.raises(WorkspaceError, match="line shapes has no class of configuration II; it has I"):
        tune(workspace, "shapes", "II", 16)


def test_budget_of_a_class_is_for_what_it_runs(workspace: Workspace):
    line = workspace.line("shapes").model_copy(
        update={
            "classes": {
                "slow": DeviceClass(latency_ms=900, variants=["full"]),
                "quick": DeviceClass(latency_ms=20, variants=["fast"]),
            }
        }
    )
    assert [line.latency_ms("I", variant) for variant in ("full", "dev", "fast")] == [900, 3_600_000, 20]
    assert line.combinations() == [("I", "full"), ("I", "fast")]


def test_workspace_of_format_1_keeps_its_sampler_and_its_variants(tmp_path: Path):
    from flows.settings import read

    (tmp_path / "ferry.toml").write_text('schema = 1\n[lines.a]\ndata = "data/a"\n[lines.a.sampler]\nguidance = 3.0\n')
    line = read(tmp_path / "ferry.toml").lines["a"]
    assert (line.sampler, line.classes["edge"].variants) == (Sampler(steps=14, guidance=3.0), ["full"])
    (tmp_path / "ferry.toml").write_text('schema = 2\n[lines.a]\ndata = "data/a"\n')
    line = read(tmp_path / "ferry.toml").lines["a"]
    assert (line.sampler.evaluations, line.classes["edge"].variants) == (56, list(ALL))
    assert [line.sampler_of(variant).evaluations for variant in ALL] == [56, 28, 14, 4]


def test_champion_of_another_tier_is_no_source(workspace: Workspace):
    small = (("steps = 60", "steps = 1"), ("coverage = 0.0", "coverage = 1.0"))
    with settings(workspace, 'tier = "test"', 'tier = "nano"'), settings(workspace, *small[0]), settings(workspace, *small[1]):
        rows = retrain(Workspace(workspace.root))
    assert [row["outcome"] for row in rows] == ["refuse", "no source", "no source", "no source"]


def test_student_starts_from_the_fielded_student_and_if_that_fails_from_full(workspace: Workspace):
    write_images(workspace.root / "data/shapes", 120, seed=1, dim=True)
    versions.add(workspace.root, "data/shapes", "shapes", "dimmer light")
    before = {variant: champion(workspace, variant) for variant in ALL}
    with settings(workspace, "coverage = 0.0", "coverage = 1.0"):  # refuses all
        rows = retrain(Workspace(workspace.root))
    # full is refused, so the others come from its champion as before, which is no news for them.
    assert [row["outcome"] for row in rows] == ["refuse", "unchanged", "unchanged", "unchanged"]
    with settings(workspace, "coverage = 0.0", "coverage = 1.0"), settings(workspace, "trajectories = 32", "trajectories = 48"):
        rows = retrain(Workspace(workspace.root))
    assert rows[3]["outcome"] == "refuse"
    first, second = seals(workspace, subject("turbo"))[-2:]
    assert lineage(workspace, first).parent == before["turbo"].checkpoint
    assert lineage(workspace, second).parent == before["full"].checkpoint
    assert {v: champion(workspace, v) for v in before} == before


def test_table_that_the_gate_refuses_is_followed_by_a_student(workspace: Workspace):
    strict = ("images = 32", "images = 32\ntolerance = 0.001\ntolerance_bands = 0.0")
    with settings(workspace, "steps = 8\n", "steps = 3\n"), settings(workspace, *strict):
        rows = retrain(Workspace(workspace.root))
    assert rows[2]["outcome"] in ("refuse", "more data")
    table, student = (lineage(workspace, seal) for seal in seals(workspace, subject("fast"))[-2:])
    assert table.teacher is None
    assert student.teacher == table.parent == champion(workspace, "full").checkpoint
    assert student.variant == "fast"
    assert card(workspace, seals(workspace, subject("fast"))[-1]).sampler == Sampler(method="mean", steps=8, guidance=1.0)


def test_variants_go_with_their_full(workspace: Workspace):
    """Promote another full, which has no variants yet, and go back to the first one, which brings its own."""
    from registry.champions import champions, promote, rollback
    from registry.errors import CatalogError

    before = {variant: champion(workspace, variant) for variant in ALL}
    second = seals(workspace, subject("full"))[-1]
    promote(workspace, subject("full"), second.version, "a drill", overrule=True)
    with pytest.raises(CatalogError, match="has no champion to release"):  # the class runs other variants, all of the first full
        champions(workspace, workspace.class_subjects("shapes", "edge"))
    retrain(Workspace(workspace.root))
    made = seals(workspace, subject("dev"))[-1]
    assert made.origin == second.checkpoint
    carried = next(seal for seal in seals(workspace, subject("turbo")) if seal.origin == second.checkpoint)
    layers = lineage(workspace, carried)  # of the fielded student as they are, which no device has to fetch
    assert (layers.steps, layers.parent) == (0, before["turbo"].checkpoint)
    promote(workspace, subject("dev"), made.version, "a drill", overrule=True)
    assert "dev" in champions(workspace, workspace.class_subjects("shapes", "edge"))
    rollback(workspace, subject("full"), "the drill is over")
    assert {variant: champion(workspace, variant) for variant in ALL} == before
    assert set(champions(workspace, workspace.class_subjects("shapes", "edge"))) == {"fast", "turbo", "dev"}


def test_student_of_a_line_with_a_method_has_a_master_and_its_bytes_are_those_of_a_real_delta(
    workspace: Workspace, tmp_path: Path
):
    from flows.publish import factors_of, make_bundle
    from flows.retrain import retrain as flow
    from ota.release import bundle

    turbos, old = subject("turbo"), champion(workspace, "turbo")
    before = bundle.open_bundle(Path(make_bundle.fn(str(workspace.root), "shapes", "edge")))
    with settings(workspace, *METHOD), settings(workspace, *LONGER), settings(workspace, *LENIENT):
        full = flow(str(workspace.root), "shapes", promote_winners=False)[0]
        promote(workspace, subject("full"), full["version"], "for the test", overrule=True)
        known = len(seals(workspace, turbos))
        with settings(workspace, "trajectories = 32", "trajectories = 40"):
            opened = Workspace(workspace.root)
            assert retrain(opened)[0]["outcome"] == "unchanged"
            turbo = seals(workspace, turbos)[known]
            if champion(workspace, "turbo") != turbo:  # a student of so few steps may be refused
                promote(workspace, turbos, turbo.version, "for the test", overrule=True)
            after = bundle.open_bundle(Path(make_bundle.fn(str(workspace.root), "shapes", "edge")))
            factors = factors_of(opened, "shapes", "edge")
    found = verdict(workspace, turbos, turbo.version)
    assert found
    assert found.update
    student = found.update.model_dump()
    assert lineage(workspace, turbo).parent == old.checkpoint
    assert (student["method"], student["start"]) == ("lowrank", "fielded")  # the student before had no master
    assert "no master was kept" in student["why_fielded"]
    assert turbo.master
    assert turbo.master.digest == student["master"] == lineage(workspace, turbo).master
    assert student["beside"] == full["update"]["bytes"] - full["update"]["fixed"]
    made = bundle.make_delta(before, after, tmp_path, factors, 2)
    without = bundle.make_delta(before, after, tmp_path, {v: path for v, path in factors.items() if v != "turbo"}, 2)
    assert made
    assert without
    assert made.size < without.size  # the factors of the student are used
    fetched = made.size + len(after.manifest.canonical()) + workspace.repository.metadata_bytes("shapes", "edge")
    assert fetched < student["bytes"] < fetched + 4000


@pytest.mark.parametrize("coarsest", [4.0, 0.002])
def test_student_takes_the_room_that_a_budget_leaves_and_is_refused_where_even_its_coarsest_update_takes_more(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, coarsest: float
):
    from flows import budget as money
    from flows import fitting
    from flows.budget import fixed_bytes

    full = verdict(workspace, subject("full"), champion(workspace, "full").version)
    assert full
    assert full.update  # no release brought it yet, so a device fetches it with the student
    fixed = fixed_bytes(workspace, "shapes", "I")
    with monkeypatch.context() as patched:
        patched.setattr(money, "champion_of", lambda place, of: None if of.variant == "turbo" else champion_of(place, of))
        assert fixed < fixed_bytes(workspace, "shapes", "I") < fixed + 600  # a first student costs as much, and its table
    budget = fixed + full.update.weights + 2048
    monkeypatch.setitem(fitting.LEVELS, "lowrank", (0.001, coarsest))
    method = (METHOD[0], f"{METHOD[1]}\nupdate_level = 0.002\nupdate_budget = {budget}")
    taught = ("trajectories = 32", f"trajectories = {48 if coarsest > 1 else 56}")
    with (
        settings(workspace, *method),
        settings(workspace, *LONGER),
        settings(workspace, *LENIENT),
        settings(workspace, *taught),
    ):
        rows = retrain(Workspace(workspace.root))
    assert [row["outcome"] for row in rows[:3]] == ["unchanged"] * 3
    update, reason = rows[3]["update"], rows[3]["reason"]
    assert update["beside"] == full.update.weights
    assert update["start"] == "master"
    if coarsest > 1:
        assert update["noise"] > 0.002
        assert budget - 1024 < update["bytes"] <= budget
    else:
        assert update["bytes"] > budget
        assert rows[3]["outcome"] == "refuse"
        assert f"and the budget has {budget:,}" in reason
        assert f"raise update_budget to {-(-update['bytes'] // 1024)} KiB" in reason

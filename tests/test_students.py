"""Students: they learn jumps on trajectories of `full`, a thin one changes few weights, and variants share what they can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from model.data import Dataset
from model.diffusion import guided, sample
from model.evaluate import converged
from model.network import Network
from model.publish import Publication, publish_first
from model.scorecard import Sampler
from model.storage import named, parts
from model.students import JUMPS, SUBSTEPS, Trajectories, as_variant, carried_over, is_thin, solver
from model.students import converged as converged_sampler
from model.train import LINEAGE, WEIGHTS, Checkpoint, Ranks, TrainOptions, load_checkpoint, start_of, train, write_safely
from model.update import FACTORS
from model.watch import Figures, Watcher
from tests.conftest import CONFIG, VERSION

FULL = Sampler(steps=6, guidance=2.0)
OPTIONS = TrainOptions(steps=120, batch=16, learning_rate=3e-3, warmup=5, save_every=50)
COUNT = 24


@pytest.fixture(scope="module")
def teacher(checkpoint: Checkpoint) -> Network:
    return checkpoint.network()


@pytest.fixture(scope="module")
def lessons(teacher: Network, dataset: Dataset) -> Trajectories:
    return Trajectories.of(teacher, dataset, FULL, seed=3, count=COUNT)


@pytest.fixture(scope="module")
def student(
    checkpoint: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return taught(checkpoint, lessons, dataset, tmp_path_factory.mktemp("student"))


def taught(checkpoint: Checkpoint, lessons: Trajectories, dataset: Dataset, out: Path, **other: object) -> Checkpoint:
    given = {"options": OPTIONS, "variant": "turbo", "parent": checkpoint, "teacher": checkpoint, "objective": lessons} | other
    options = given.pop("options")
    return train(CONFIG, dataset, VERSION, options, out, **given)  # type: ignore[arg-type]


@torch.inference_mode()
def draw(network: Network, ids: Tensor, sampler: Sampler) -> Tensor:
    noise = torch.randn((len(ids), 1, 16, 16), generator=torch.Generator().manual_seed(5))
    return sample(guided(lambda *a: network(*a)[0], ids, sampler), noise, sampler)


def test_trajectories_are_the_way_of_full_from_noise_to_image(teacher: Network, lessons: Trajectories):
    assert lessons.points.shape == (SUBSTEPS + 1, COUNT, 1, 16, 16)
    way = Sampler(method="ab2", steps=SUBSTEPS, guidance=2.0)
    with torch.inference_mode():
        drawn = sample(guided(lambda *a: teacher(*a)[0], lessons.ids, way), lessons.points[0], way)
    torch.testing.assert_close(drawn, lessons.points[-1], rtol=0, atol=1e-4)
    assert abs(float(lessons.points[0].std()) - 1) < 0.05


def test_jump_ends_at_a_point_of_the_same_trajectory(lessons: Trajectories, dataset: Dataset):
    seen = set()
    for step in range(20):
        x, t, r, ids, velocity = lessons.rows(dataset, OPTIONS, step)
        begin, end = ((1 - at) * SUBSTEPS for at in (t, r))
        seen |= set((end - begin).round().long().tolist())
        after = x + (r - t).view(-1, 1, 1, 1) * velocity
        for i in range(len(x)):
            row = next(n for n in range(COUNT) if torch.equal(lessons.points[int(begin[i]), n], x[i]))
            torch.testing.assert_close(after[i], lessons.points[round(float(end[i])), row], rtol=0, atol=1e-5)
            assert torch.equal(ids[i], lessons.ids[row])
    assert seen == set(JUMPS)


def test_rows_depend_on_seed_and_step_alone(lessons: Trajectories, dataset: Dataset):
    one, two = lessons.rows(dataset, OPTIONS, 7), lessons.rows(dataset, OPTIONS, 7)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.x, lessons.rows(dataset, OPTIONS, 8).x)
    other = OPTIONS.model_copy(update={"seed": 1})
    assert not torch.equal(one.x, lessons.rows(dataset, other, 7).x)


def test_thin_student_has_every_other_weight_of_full_bit_by_bit(checkpoint: Checkpoint, student: Checkpoint):
    before, after = checkpoint.network().state_dict(), student.network().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(is_thin(name) for name in changed)
    assert {name for name in before if not is_thin(name)} == before.keys() - {name for name in before if is_thin(name)}


def test_thin_layers_are_a_twentieth_of_a_networks_weights():
    weights = dict(Network(CONFIG.model_copy(update={"tier": "nano"})).named_parameters())
    thin = sum(p.numel() for name, p in weights.items() if is_thin(name))
    assert 0.04 < thin / sum(p.numel() for p in weights.values()) < 0.07


def test_student_of_all_weights_changes_experts_too(
    checkpoint: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path: Path
):
    whole = Trajectories(lessons.points, lessons.ids, lessons.guidance, thin=False)
    made = taught(checkpoint, whole, dataset, tmp_path, options=OPTIONS.model_copy(update={"steps": 2}))
    before, after = checkpoint.network().state_dict(), made.network().state_dict()
    assert any("experts" in name and not torch.equal(before[name], after[name]) for name in before)
    assert made.lineage.thin is False


def test_student_draws_nearer_to_full_than_full_in_as_many_evaluations(student: Checkpoint, teacher: Network, dataset: Dataset):
    ids = torch.from_numpy(dataset.ids[dataset.reference()[:12]])
    wanted = draw(teacher, ids, converged_sampler(FULL))
    own = Sampler(method="mean", steps=2, guidance=1.0)
    ours, theirs = (
        (draw(network, ids, way) - wanted).square().mean()
        for network, way in ((student.network(), own), (teacher, solver(own, FULL)))
    )
    assert ours < 0.5 * theirs


def test_lineage_says_what_a_student_learnt_from(student: Checkpoint, checkpoint: Checkpoint):
    made = student.lineage
    assert made.teacher == made.parent == checkpoint.weights_sha256
    assert (made.guidance, made.trajectories, made.thin) == (2.0, COUNT, True)
    assert checkpoint.lineage.teacher is checkpoint.lineage.trajectories is None
    assert "trajectories" not in checkpoint.lineage.model_dump()  # a lineage of an older ferry keeps its hash


def test_next_student_starts_from_the_fielded_one_and_keeps_what_it_does_not_train_of_its_own_full(
    checkpoint: Checkpoint, student: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path: Path
):
    with torch.no_grad():
        weights = {name: weight + 0.01 for name, weight in checkpoint.network().state_dict().items()}
    full = tmp_path / "full"
    full.mkdir()
    write_safely(full / WEIGHTS, weights)
    (full / LINEAGE).write_text(checkpoint.lineage.model_dump_json())
    following = load_checkpoint(full)
    options = OPTIONS.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    made = taught(checkpoint, lessons, dataset, tmp_path / "next", options=options, parent=student, teacher=following)
    new = made.network().state_dict()
    for name, weight in new.items():
        start = student.network().state_dict()[name] if is_thin(name) else weights[name]
        torch.testing.assert_close(weight, start, rtol=0, atol=1e-6 if is_thin(name) else 0)


def test_grid_rounds_a_student_around_its_full(
    checkpoint: Checkpoint, student: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path: Path
):
    options = OPTIONS.model_copy(update={"steps": 20, "update_grid": 2.0})
    made = taught(checkpoint, lessons, dataset, tmp_path, options=options, parent=student)
    before, after = checkpoint.network().state_dict(), made.network().state_dict()
    name = "ada.weight"
    steps = (after[name] - before[name]).abs()
    smallest = steps[steps > 1e-7].min()
    torch.testing.assert_close(steps / smallest, (steps / smallest).round(), rtol=0, atol=0.02)
    assert float((steps < 1e-7).float().mean()) > 0.3  # most small changes are gone


def test_killed_student_ends_in_the_same_bits(
    student: Checkpoint, checkpoint: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path: Path
):
    class PowerCutError(Exception):
        pass

    def cut(number: int, _: Figures) -> None:
        if number == 77:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        taught(checkpoint, lessons, dataset, tmp_path, watcher=Watcher(cut))
    assert taught(checkpoint, lessons, dataset, tmp_path).weights_sha256 == student.weights_sha256


def test_kept_trajectories_are_read_and_those_of_another_teacher_are_not(teacher: Network, dataset: Dataset, tmp_path: Path):
    kept = tmp_path / "kept.safetensors"

    def of(identity: str) -> tuple[Trajectories, list[int]]:
        drawn: list[int] = []
        made = Trajectories.of(teacher, dataset, FULL, 3, count=16, kept=kept, identity=identity, on_drawn=drawn.append)
        return made, drawn

    first, drawn = of("a")
    assert drawn == [16]
    again, drawn = of("a")
    assert drawn == []
    assert torch.equal(again.points, first.points)
    assert of("b")[1] == [16]
    kept.write_bytes(kept.read_bytes()[:1000])  # damaged
    assert torch.equal(of("b")[0].points, first.points)


def test_each_process_learns_its_own_rows(
    checkpoint: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Ranks, "here", lambda *_: Ranks(0, 2))  # the first of two processes, without the second
    for name in ("average", "wait"):
        monkeypatch.setattr(Ranks, name, lambda *_: None)
    seen: list[int] = []
    monkeypatch.setattr(Network, "traced", _spied(Network.traced, seen))
    taught(checkpoint, lessons, dataset, tmp_path, options=OPTIONS.model_copy(update={"steps": 2}))
    assert seen == [OPTIONS.batch // 2] * 2


def _spied(traced: object, seen: list[int]) -> object:
    def spy(self: Network, x: Tensor, *others: object) -> object:
        seen.append(len(x))
        return traced(self, x, *others)  # type: ignore[operator]

    return spy


def test_carried_over_student_has_its_own_layers_over_the_new_full(checkpoint: Checkpoint, student: Checkpoint, tmp_path: Path):
    weights = {name: weight + 0.01 for name, weight in checkpoint.network().state_dict().items()}
    (tmp_path / "full").mkdir()
    write_safely(tmp_path / "full" / WEIGHTS, weights)
    (tmp_path / "full" / LINEAGE).write_text(checkpoint.lineage.model_dump_json())
    full = load_checkpoint(tmp_path / "full")
    made = carried_over(student, full, tmp_path / "carried")
    old = student.network().state_dict()
    for name, weight in made.network().state_dict().items():
        assert torch.equal(weight, old[name] if is_thin(name) else weights[name]), name
    assert (made.lineage.teacher, made.lineage.parent, made.lineage.steps) == (full.weights_sha256, student.weights_sha256, 0)
    assert (made.lineage.variant, made.lineage.thin, made.lineage.guidance) == ("turbo", True, 2.0)


def test_table_variant_has_the_weights_of_full_and_says_so(checkpoint: Checkpoint, tmp_path: Path):
    made = as_variant(checkpoint, "fast", tmp_path)
    assert made.weights_sha256 == checkpoint.weights_sha256
    assert (made.lineage.variant, made.lineage.parent, made.lineage.steps) == ("fast", checkpoint.weights_sha256, 0)
    assert made.lineage.teacher is None
    assert as_variant(checkpoint, "fast", tmp_path).lineage == made.lineage  # a repeated call makes the same


def test_student_serves_another_variant_as_itself(student: Checkpoint, tmp_path: Path):
    made = as_variant(student, "fast", tmp_path)
    assert made.weights_sha256 == student.weights_sha256
    assert made.lineage == student.lineage.model_copy(update={"variant": "fast"})


@pytest.mark.parametrize(("steps", "guidance", "wanted"), [(4, 2.0, 2), (1, 2.0, 1), (4, 1.0, 4), (8, 3.0, 4)])
def test_solver_beside_a_student_takes_as_many_evaluations(steps: int, guidance: float, wanted: int):
    beside = solver(Sampler(method="mean", steps=steps, guidance=1.0), Sampler(guidance=guidance, shift=0.5))
    assert (beside.method, beside.steps, beside.guidance, beside.shift) == ("ab2", wanted, guidance, 1.0)


def test_distance_from_converged_images_is_paired():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    near = np.clip(reference.astype(int) + 2, 0, 255).astype(np.uint8)
    far = np.clip(reference.astype(int) + rng.integers(5, 40, (20, 1, 1, 1)), 0, 255).astype(np.uint8)
    found = converged(near, reference, 80, far)
    assert found.distance == pytest.approx(2 / 127.5, rel=0.05)
    assert found.delta is not None
    assert found.solver is not None
    assert found.delta == pytest.approx(found.distance - found.solver)
    assert found.delta < 0
    assert found.se is not None
    assert 0 < found.se < found.solver
    alone = converged(near, reference, 80)
    assert (alone.solver, alone.delta, alone.se) == (None, None, None)


def test_thin_student_has_a_master_and_claims_for_the_layers_that_it_trains(
    checkpoint: Checkpoint, student: Checkpoint, lessons: Trajectories, dataset: Dataset, tmp_path: Path
):
    options = OPTIONS.model_copy(update={"steps": 10, "method": "lowrank"})
    trained = taught(checkpoint, lessons, dataset, tmp_path / "master", options=options, parent=student)
    made = Publication.of(trained, student, "bfloat16", full=checkpoint).write(0.01, tmp_path / "made")
    ours, full, before = (named(of.network()) for of in (made, checkpoint, student))
    thin = {own for name, weight in made.network().named_parameters() if is_thin(name) for own, _ in parts(name, weight)}
    stored = {name: weight.to(torch.bfloat16).float() for name, weight in full.items()}
    assert all(torch.equal(ours[name], stored[name]) for name in ours if name not in thin)
    with safe_open(made.folder / FACTORS, framework="pt") as file:
        said = json.loads(file.metadata()["deltaferry"])
    assert "ada.weight.stored" in said["products"]
    assert said["products"].keys() | said["steps"].keys() <= {f"{name}.stored" for name in thin}
    assert any(not torch.equal(ours[name], before[name]) for name in thin)
    next_one = as_variant(made, "fast", tmp_path / "fast")
    assert start_of(next_one, "shapes").master == made.lineage.master == trained.weights_sha256
    carried = carried_over(made, checkpoint, tmp_path / "carried")
    assert start_of(carried, "shapes").master == made.lineage.master
    assert not (carried.folder / FACTORS).exists()  # they hold for the base of the update before


def test_table_of_fulls_weights_names_no_master(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path):
    options = OPTIONS.model_copy(update={"steps": 1, "method": "lowrank"})
    full = publish_first(train(CONFIG, dataset, VERSION, options, tmp_path / "master"), "bfloat16", tmp_path / "full")
    made = as_variant(full, "dev", tmp_path / "dev")
    assert full.lineage.master
    assert (made.lineage.master, made.lineage.method) == (None, None)
    assert made.weights_sha256 == full.weights_sha256

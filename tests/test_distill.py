"""Distillation: one step of a student is two of its teacher's, and training brings the student nearer to the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.data import Dataset
from model.diffusion import guided, sample
from model.distill import Teaching, stage
from model.errors import ConfigError
from model.network import Network
from model.scorecard import Sampler
from model.train import Checkpoint, Ranks, TrainOptions, train
from model.watch import Figures, Watcher

from .conftest import CONFIG, VERSION

STEPS = 4  # of the student here; the real variants take more steps, in the same way
OPTIONS = TrainOptions(steps=120, batch=16, learning_rate=2e-3, warmup=5, save_every=50, caption_dropout=0.0)


@pytest.fixture(scope="module")
def teacher(checkpoint: Checkpoint) -> Network:
    return checkpoint.network()


@pytest.fixture(scope="module")
def student(checkpoint: Checkpoint, teacher: Network, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return train(
        CONFIG, dataset, VERSION, OPTIONS, tmp_path_factory.mktemp("student"), variant="dev", parent=checkpoint, teacher=checkpoint,
        objective=Teaching(teacher, STEPS, 2.0),
    )  # fmt: skip


@torch.inference_mode()
def draw(network: Network, ids: Tensor, sampler: Sampler) -> Tensor:
    noise = torch.randn((len(ids), 1, 16, 16), generator=torch.Generator().manual_seed(5))
    return sample(guided(lambda *a: network(*a)[0], ids, sampler.guidance), noise, sampler)


def batch(dataset: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    images, ids = dataset.batch(seed=3, step=0, size=8)
    return images, ids, torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_step_of_the_student_is_two_of_the_guided_teacher(teacher: Network, dataset: Dataset, guidance: float) -> None:
    images, ids, noise = batch(dataset)
    x, t, r, target = Teaching(teacher, STEPS, guidance)(images, ids, noise, torch.Generator().manual_seed(2))
    assert torch.equal(((t - r) * STEPS).round(), torch.ones(8))
    assert bool(((t * STEPS).round() / STEPS - t).abs().max() < 1e-6)
    for i in range(len(x)):
        velocity = guided(lambda *a: teacher(*a)[0], ids[i : i + 1], guidance)
        begin, end = float(t[i]), float(r[i])
        middle = (begin + end) / 2
        y = x[i : i + 1]
        y = y + (middle - begin) * velocity(y, begin, begin)
        y = y + (end - middle) * velocity(y, middle, middle)
        torch.testing.assert_close(x[i : i + 1] + (end - begin) * target[i : i + 1], y, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_taught_student_teaches_by_its_mean_velocity(teacher: Network, dataset: Dataset) -> None:
    images, ids, noise = batch(dataset)
    x, t, r, target = Teaching(teacher, STEPS, None)(images, ids, noise, torch.Generator().manual_seed(2))
    middle = (t + r) / 2
    y = x + (middle - t).view(-1, 1, 1, 1) * teacher(x, t, middle, ids)[0]
    y = y + (r - middle).view(-1, 1, 1, 1) * teacher(y, middle, r, ids)[0]
    torch.testing.assert_close(x + (r - t).view(-1, 1, 1, 1) * target, y)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_each_process_teaches_its_own_rows_as_one_would_teach_all(
    checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float | None
) -> None:
    teacher = checkpoint.network()
    images, ids, noise = batch(dataset)
    teaching = Teaching(teacher, STEPS, guidance)
    t, r = teaching.times(len(images), torch.Generator().manual_seed(2))
    whole = teaching.aim(images, ids, noise, t, r)
    for rank in range(2):
        share = Ranks(rank, 2).share
        for own, all_rows in zip(teaching.aim(*map(share, (images, ids, noise, t, r))), whole, strict=True):
            torch.testing.assert_close(own, share(all_rows))

    taught: list[int] = []
    teacher.register_forward_hook(lambda _, inputs, __: taught.append(len(inputs[0])))
    monkeypatch.setattr(Ranks, "here", lambda *_: Ranks(0, 2))  # the first of two processes, without the second
    for name in ("average", "wait"):
        monkeypatch.setattr(Ranks, name, lambda *_: None)
    options = OPTIONS.model_copy(update={"steps": 2})
    train(CONFIG, dataset, VERSION, options, tmp_path, variant="dev", teacher=checkpoint, objective=teaching)
    assert taught == [(2 if guidance else 1) * OPTIONS.batch // 2] * 4  # two steps of the teacher in each of two steps


@pytest.mark.slow
def test_student_draws_nearer_to_the_teacher_than_the_teacher_in_as_many_steps(
    student: Checkpoint, teacher: Network, dataset: Dataset
) -> None:
    """Compare distances to the teacher's images at one unguided evaluation a step.

    The trained student must beat the untrained one.
    """
    ids = torch.from_numpy(dataset.ids[dataset.reference()[:12]])
    wanted = draw(teacher, ids, Sampler(method="euler", steps=2 * STEPS, guidance=2.0))
    taught = draw(student.network(), ids, Sampler(method="mean", steps=STEPS, guidance=1.0))
    untaught = draw(teacher, ids, Sampler(method="euler", steps=STEPS, guidance=1.0))
    assert (taught - wanted).square().mean() < 0.5 * (untaught - wanted).square().mean()


def test_lineage_names_the_teacher(student: Checkpoint, checkpoint: Checkpoint) -> None:
    assert student.lineage.teacher == student.lineage.parent == checkpoint.weights_sha256
    assert checkpoint.lineage.teacher is None
    assert student.lineage.variant == "dev"


@pytest.mark.slow
def test_killed_distillation_ends_in_the_same_bits(
    student: Checkpoint, checkpoint: Checkpoint, teacher: Network, dataset: Dataset, tmp_path: Path
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(number: int, _: Figures) -> None:
        if number == 77:
            raise PowerCutError

    def run(watcher: Watcher | None = None) -> Checkpoint:
        return train(
            CONFIG, dataset, VERSION, OPTIONS, tmp_path, variant="dev", parent=checkpoint, teacher=checkpoint,
            objective=Teaching(teacher, STEPS, 2.0), watcher=watcher,
        )  # fmt: skip

    with pytest.raises(PowerCutError):
        run(Watcher(cut))
    assert run().weights_sha256 == student.weights_sha256


def test_ladder_halves_and_drops_guidance_once(teacher: Network) -> None:
    dev, fast = stage(teacher, "full", "dev", 3.0), stage(teacher, "dev", "fast", 3.0)
    assert (dev.steps, dev.guidance) == (28, 3.0)
    assert (fast.steps, fast.guidance) == (14, None)


@pytest.mark.parametrize(
    ("by", "student", "says"),
    [("full", "fast", "fast is taught by dev, not by full"), ("dev", "full", "full is trained, not taught, not by dev")],
)
def test_wrong_ladder_is_refused(teacher: Network, by: str, student: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        stage(teacher, by, student, 2.0)  # type: ignore[arg-type]

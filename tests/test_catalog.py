"""MLflow holds every version with its files byte for byte, and says who is champion."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from model.export import Export
from model.scorecard import Cost, Quality, Scorecard, Usage
from model.train import Checkpoint
from registry.catalog import Catalog, Subject, Version
from registry.errors import CatalogError, StoreError
from registry.selection import Check, Decision, Limits
from tests.conftest import SAMPLER

SUBJECT = Subject(line="shapes", configuration="I", variant="full")


def card(seed: int, checkpoint: Checkpoint, exported: Export) -> Scorecard:
    quality = Quality(
        space="trained", space_sha256="f" * 64, split="new", n=16, reference=12, groups=12, fd=1.5, fd_se=0.2, kd=0.02, kd_se=0.01,
        noise_kd=0.5, precision=0.8, recall=0.7, density=0.9, coverage=0.8,
    )  # fmt: skip
    return Scorecard(
        line="shapes", tier="test", configuration="I", variant="full", weights_sha256=exported.weights_sha256,
        lineage_sha256=checkpoint.lineage.sha256, sampler=SAMPLER, precision="bfloat16", seed=seed, quality=[quality], memorisation=[],
        captions=[], bad_images=0, usage=Usage(load=[[0.25] * 4], by_step=[[[0.25] * 4]], entropy=[1], dead=0),
        cost=Cost(milliseconds=5, evaluations=8, peak_mib=60, bare_mib=40, machine="x"),
    )  # fmt: skip


def decision(made: Scorecard) -> Decision:
    check = Check(name="coverage", passed=True, text="fine")
    return Decision(
        outcome="promote", reason="first version", checks=[check], n=16, champion=None, challenger=made.weights_sha256,
        limits=Limits(), scorecard=made.sha256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    root = tmp_path_factory.mktemp("mlflow")
    return Catalog(f"sqlite:///{root}/mlflow.db", root / "artifacts")


@pytest.fixture(scope="module")
def versions(
    catalog: Catalog, checkpoint: Checkpoint, exported: Export, tmp_path_factory: pytest.TempPathFactory
) -> list[Version]:
    """Two registered versions."""
    picture = tmp_path_factory.mktemp("pictures") / "samples.png"
    picture.write_bytes(b"\x89PNG")
    made = []
    for seed in (1, 2):
        one = card(seed, checkpoint, exported)
        made.append(
            catalog.register(
                SUBJECT,
                checkpoint.lineage,
                one,
                decision(one),
                checkpoint.folder,
                exported.folder,
                {"samples": picture},
                [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
            )
        )
    return made


def metrics(catalog: Catalog, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, out of MLflow."""
    return sorted((metric.step, metric.value) for metric in catalog._client.get_metric_history(run_id, name))


def test_training_fills_the_run_that_its_version_gets(
    versions: list[Version], catalog: Catalog, checkpoint: Checkpoint, exported: Export, tmp_path: Path
):
    subject = SUBJECT.model_copy(update={"line": "watched"})
    training = catalog.open_training(subject, "a" * 32)
    training.figures(1, {"loss": 2.0, "expert_entropy.00": 0.9})
    assert metrics(catalog, training.run_id, "loss") == [(1, 2.0)]  # while it is trained
    again = catalog.open_training(subject, "a" * 32)  # it was killed, and steps 1 to 10 are done again
    assert again.run_id == training.run_id
    again.figures(1, {"loss": 2.5, "expert_entropy.00": 0.8})
    again.figures(11, {"loss": 1.0, "expert_entropy.00": 0.7})
    picture = tmp_path / "samples" / "step-000011.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    again.sample(picture)
    again.finish(checkpoint.lineage.sha256)
    other = catalog.open_training(subject, "b" * 32)
    other.fail()

    curve = [{"step": step, "seconds": step / 2, "loss": 2 - step / 11} for step in (1, 11, 20)]
    one = card(7, checkpoint, exported)
    for _ in range(2):
        made = catalog.register(
            subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, curve
        )  # fmt: skip
        assert (made.number, made.run_id) == (1, training.run_id)
    assert metrics(catalog, made.run_id, "loss") == [(1, 2.0), (11, 1.0), (20, pytest.approx(2 - 20 / 11))]  # none twice
    assert [step for step, _ in metrics(catalog, made.run_id, "seconds")] == [1, 11, 20]
    assert catalog.data(made, "checkpoint/samples/step-000011.png") == b"\x89PNG"
    judged_anew = card(8, checkpoint, exported)
    second = catalog.register(
        subject, checkpoint.lineage, judged_anew, decision(judged_anew), checkpoint.folder, exported.folder, {}, curve
    )  # fmt: skip
    assert second.run_id not in {training.run_id, other.run_id}
    assert metrics(catalog, second.run_id, "loss")[1] == (11, 1.0)


def test_versions_are_numbered_in_order(versions: list[Version], catalog: Catalog):
    assert [v.number for v in versions] == [1, 2]
    assert [v.number for v in catalog.versions(SUBJECT)] == [1, 2]


def test_same_scorecard_is_registered_once(
    versions: list[Version], catalog: Catalog, checkpoint: Checkpoint, exported: Export, tmp_path: Path
):
    one = card(1, checkpoint, exported)
    again = catalog.register(SUBJECT, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, [])
    assert again.number == versions[0].number
    assert len(catalog.versions(SUBJECT)) == 2


def test_files_come_back_byte_for_byte(versions: list[Version], catalog: Catalog, exported: Export, tmp_path: Path):
    folder = catalog.files(versions[0], "bundle", tmp_path)
    for path in exported.folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_view_for_tools_is_a_runnable_model(versions: list[Version], catalog: Catalog, tmp_path: Path):
    import mlflow.artifacts

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{SUBJECT.model}/1", dst_path=str(tmp_path)))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "t", "r", "ids"]


def test_tags_lead_back_to_data_code_and_decision(versions: list[Version], catalog: Catalog, checkpoint: Checkpoint):
    tags = catalog.version(SUBJECT, 1).tags
    lineage = checkpoint.lineage
    assert tags["data.rev"] == lineage.data.rev
    assert tags["data.md5"] == lineage.data.md5
    assert tags["code.sha256"] == lineage.code
    assert tags["lineage.sha256"] == lineage.sha256
    assert tags["gate.outcome"] == "promote"


def test_champion_is_who_was_promoted_last(versions: list[Version], catalog: Catalog):
    assert catalog.champion(Subject(line="other", configuration="I", variant="full")) is None
    catalog.promote(SUBJECT, 1)
    catalog.promote(SUBJECT, 2)
    champion = catalog.champion(SUBJECT)
    assert champion is not None
    assert (champion.number, champion.aliases) == (2, ["champion"])
    assert catalog.version(SUBJECT, 1).aliases == []


def test_unknown_version_leaves_the_champion(versions: list[Version], catalog: Catalog):
    catalog.promote(SUBJECT, 1)
    with pytest.raises(CatalogError, match="has no version 9; there are 1, 2"):
        catalog.promote(SUBJECT, 9)
    champion = catalog.champion(SUBJECT)
    assert champion is not None
    assert champion.number == 1


def test_failed_registration_leaves_no_version(
    versions: list[Version], catalog: Catalog, checkpoint: Checkpoint, exported: Export, tmp_path: Path
):
    one = card(3, checkpoint, exported)
    with pytest.raises(StoreError):
        catalog.register(
            SUBJECT, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {"x": tmp_path / "none"}, []
        )
    assert [v.number for v in catalog.versions(SUBJECT)] == [1, 2]
    import mlflow

    runs = mlflow.search_runs(experiment_names=["shapes"], output_format="list")
    assert "RUNNING" not in {run.info.status for run in runs}
    made = catalog.register(SUBJECT, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, [])
    assert made.number == 3
    assert len(mlflow.search_runs(experiment_names=["shapes"], output_format="list")) == len(runs)  # in the run that it left


@pytest.mark.parametrize("text", ["shapes", "shapes/I", "shapes/III/full", "shapes/I/slow", "a/b/I/full"])
def test_malformed_subject_says_how_to_write_it(text: str):
    with pytest.raises(CatalogError, match="is not LINE/CONFIG/VARIANT; write it as surfaces/I/full"):
        Subject.parse(text)

"""MLflow holds every version with its files byte for byte, and says who is champion."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import sqlite3
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import mlflow
import onnxruntime
import pytest
from mlflow.entities import Run
from mlflow.store.model_registry import sqlalchemy_store

from model.export import Export
from model.scorecard import Cost, Quality, Scorecard, Usage
from model.train import Checkpoint
from registry import registration
from registry.catalog import Catalog, Subject, Version
from registry.dataset import DvcDatasetSource
from registry.errors import CatalogError, StoreError
from registry.runs import end_runs, open_retraining, open_training
from registry.selection import Check, Decision, Limits
from tests.conftest import SAMPLER, VERSION, few, in_run

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


def decision(made: Scorecard, outcome: Literal["promote", "refuse"] = "promote") -> Decision:
    check = Check(name="coverage", passed=outcome == "promote", text="fine")
    return Decision(
        outcome=outcome, reason="first version", checks=[check], n=16, champion=None, challenger=made.weights_sha256,
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
    """Register two versions."""
    picture = tmp_path_factory.mktemp("pictures") / "samples.png"
    picture.write_bytes(b"\x89PNG")
    made = []
    for seed in (1, 2):
        one = card(seed, checkpoint, exported)
        made.append(
            registration.register(
                catalog,
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


def run_of(catalog: Catalog, version: Version) -> Run:
    return catalog.client.get_run(version.run_id)


def status(catalog: Catalog, run_id: str) -> str:
    found: str = catalog.client.get_run(run_id).info.status
    return found


def metrics(catalog: Catalog, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of every point of a metric, as MLflow has it."""
    return sorted((metric.step, metric.value) for metric in catalog.client.get_metric_history(run_id, name))


def test_training_fills_the_run_that_its_version_gets(
    versions: list[Version], catalog: Catalog, checkpoint: Checkpoint, exported: Export, tmp_path: Path
):
    subject = SUBJECT.model_copy(update={"line": "watched"})
    training = open_training(catalog, subject, "a" * 32)
    training.figures(1, {"loss": 2.0, "expert_entropy.00": 0.9})
    assert metrics(catalog, training.run_id, "loss") == [(1, 2.0)]  # during training
    again = open_training(catalog, subject, "a" * 32)  # training was killed, and repeats steps 1 to 10
    assert again.run_id == training.run_id
    again.figures(1, {"loss": 2.5, "expert_entropy.00": 0.8})
    again.figures(11, {"loss": 1.0, "expert_entropy.00": 0.7})
    picture = tmp_path / "samples" / "step-000011.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    again.sample(picture)
    again.finish(checkpoint.lineage.sha256)
    other = open_training(catalog, subject, "b" * 32)
    other.fail()

    curve = [{"step": step, "seconds": step / 2, "loss": 2 - step / 11} for step in (1, 11, 20)]
    one = card(7, checkpoint, exported)
    for _ in range(2):
        made = registration.register(
            catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, curve
        )  # fmt: skip
        assert (made.number, made.run_id) == (1, training.run_id)
    assert metrics(catalog, made.run_id, "loss") == [(1, 2.0), (11, 1.0), (20, pytest.approx(2 - 20 / 11))]  # no point twice
    assert [step for step, _ in metrics(catalog, made.run_id, "seconds")] == [1, 11, 20]
    assert in_run(catalog, made.run_id, "checkpoint/samples/step-000011.png") == b"\x89PNG"
    judged_anew = card(8, checkpoint, exported)
    second = registration.register(
        catalog, subject, checkpoint.lineage, judged_anew, decision(judged_anew), checkpoint.folder, exported.folder, {}, curve
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
    again = registration.register(
        catalog, SUBJECT, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    assert again.number == versions[0].number
    assert len(catalog.versions(SUBJECT)) == 2


def test_files_come_back_byte_for_byte(versions: list[Version], catalog: Catalog, exported: Export):
    for path in exported.folder.iterdir():
        assert in_run(catalog, versions[0].run_id, f"bundle/{path.name}") == path.read_bytes()


def test_view_for_tools_is_a_runnable_model(versions: list[Version], catalog: Catalog, tmp_path: Path):
    import mlflow.artifacts

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{SUBJECT.model}/1", dst_path=str(tmp_path)))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "t", "r", "ids"]


def test_tags_lead_back_to_data_code_and_decision(versions: list[Version], catalog: Catalog, checkpoint: Checkpoint):
    tags = run_of(catalog, versions[0]).data.tags
    lineage = checkpoint.lineage
    assert tags["data.rev"] == lineage.data.rev
    assert tags["data.md5"] == lineage.data.md5
    assert tags["code.sha256"] == lineage.code
    assert tags["lineage.sha256"] == lineage.sha256
    assert tags["gate.outcome"] == "promote"
    assert tags["data.repo"] == str(catalog._artifacts.parent)
    assert tags["data.items"] == str(lineage.items)
    assert (tags["variant"], tags["configuration"], tags["seed"]) == ("full", "I", "0")
    assert (tags["training.steps"], tags["evaluation.n"], tags["evaluation.seed"]) == ("120", "16", "1")
    assert tags["evaluation.space.trained"] == "f" * 64
    assert (tags["python"], tags["onnxruntime"]) == (platform.python_version(), onnxruntime.__version__)


def test_hashes_in_tags_are_those_of_the_files(
    versions: list[Version], catalog: Catalog, checkpoint: Checkpoint, exported: Export
):
    tags = run_of(catalog, versions[0]).data.tags

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    assert tags["onnx.sha256"] == digest((exported.folder / "graph.onnx").read_bytes())
    assert tags["weights.sha256"] == digest((exported.folder / "weights.bin").read_bytes())
    assert tags["checkpoint.sha256"] == checkpoint.weights_sha256
    locked = in_run(catalog, versions[0].run_id, "environment.txt")
    assert tags["environment.sha256"] == digest(locked)
    assert f"onnxruntime=={onnxruntime.__version__}" in locked.decode().splitlines()


def test_reason_that_is_too_long_for_a_page_is_cut_and_kept_whole_beside_it(
    catalog: Catalog, checkpoint: Checkpoint, exported: Export
):
    other = SUBJECT.model_copy(update={"configuration": "II"})
    one = card(1, checkpoint, exported)
    said = decision(one).model_copy(update={"outcome": "refuse", "reason": "coverage is 0.00; " * 1000})
    made = registration.register(catalog, other, checkpoint.lineage, one, said, checkpoint.folder, exported.folder, {}, [])
    shown = f"{said.reason[:2000]} … (the rest is in decision.json)"
    of_run = run_of(catalog, made).data.tags
    assert of_run["gate.reason"] == of_run["mlflow.note.content"] == shown
    assert Decision.model_validate_json(in_run(catalog, made.run_id, "decision.json")) == said
    page = catalog.client.get_model_version(other.model, "1")
    assert page.description == f"{said.reason[:500]} … (the rest is in decision.json)"
    assert max(len(value) for value in page.tags.values()) <= 64


def test_run_has_every_tag_of_its_version(versions: list[Version], catalog: Catalog):
    of_run = run_of(catalog, versions[0]).data.tags
    of_version = catalog.version(SUBJECT, 1).tags
    assert of_version.items() <= of_run.items()
    assert len(of_version) <= 10
    assert len(of_run) > 30


def test_run_is_named_by_its_version(versions: list[Version], catalog: Catalog):
    assert [run_of(catalog, version).info.run_name for version in versions] == ["I/full version 1", "I/full version 2"]


def test_version_of_an_older_ferry_with_every_tag_is_found_again(catalog: Catalog, checkpoint: Checkpoint, exported: Export):
    """Write a version as ferry did before its tags were few: it stays what it is, and a child of it names it as its parent."""
    subject = SUBJECT.model_copy(update={"line": "older"})
    one, child = card(1, checkpoint, exported), checkpoint.lineage.model_copy(update={"parent": checkpoint.weights_sha256})
    made = registration.register(
        catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    for name, value in run_of(catalog, made).data.tags.items():
        if not name.startswith("mlflow."):
            catalog.client.set_model_version_tag(subject.model, "1", name, value)
    again = registration.register(
        catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    assert (again.number, again.tagged_weights) == (1, one.weights_sha256)
    two = card(2, checkpoint, exported)
    younger = registration.register(catalog, subject, child, two, decision(two), checkpoint.folder, exported.folder, {}, [])
    assert younger.number == 2
    assert younger.tags["parent.version"].endswith("-I-full/1")


def test_version_names_those_that_it_came_from(catalog: Catalog, checkpoint: Checkpoint, exported: Export):
    subject = SUBJECT.model_copy(update={"line": "family"})
    elder, younger = card(1, checkpoint, exported), card(2, checkpoint, exported)
    child = checkpoint.lineage.model_copy(update={"parent": checkpoint.weights_sha256, "teacher": "9" * 64})
    registration.register(
        catalog, subject, checkpoint.lineage, elder, decision(elder), checkpoint.folder, exported.folder, {}, []
    )
    made = registration.register(catalog, subject, child, younger, decision(younger), checkpoint.folder, exported.folder, {}, [])
    of_run = run_of(catalog, made).data.tags
    assert of_run["parent.sha256"] == checkpoint.weights_sha256
    assert made.tags["parent.version"].endswith("-I-full/1")
    assert of_run["teacher.sha256"] == "9" * 64
    assert "teacher.version" not in made.tags  # nobody registered it


def test_run_shows_the_data_revision_as_its_dataset(versions: list[Version], catalog: Catalog, checkpoint: Checkpoint):
    used = run_of(catalog, versions[0]).inputs.dataset_inputs
    name = f"{catalog._artifacts.parent.name}@{VERSION.rev[:12]}:{VERSION.path}"
    assert {i.dataset.name: i.tags[0].value for i in used} == {name: "training", f"{name} held out": "evaluation"}
    assert {i.dataset.digest for i in used} == {VERSION.md5}
    source = mlflow.data.get_source(used[0])
    assert isinstance(source, DvcDatasetSource)
    assert source.url == f"{catalog._artifacts.parent}@{VERSION.rev}:{VERSION.path}"
    with pytest.raises(StoreError, match=r"cannot be fetched: .*; call this on a machine that can reach that repository"):
        source.load()


def test_mlflow_finds_the_source_by_its_entry_point():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    ((group, points),) = declared.items()
    assert group == "mlflow.dataset_source"
    assert EntryPoint("dvc", points["dvc"], group).load() is DvcDatasetSource


def test_runs_of_a_retraining_are_nested_and_none_is_left_running(catalog: Catalog, checkpoint: Checkpoint, exported: Export):
    subject, data = SUBJECT.model_copy(update={"line": "nested"}), VERSION.model_copy(update={"line": "nested"})
    end_runs(catalog, "nested", "a" * 32, None)  # a first retraining; there are no runs yet
    around = open_retraining(catalog, data, "a" * 32)
    killed = open_training(catalog, subject, "1" * 32, around)

    foreign = Catalog(catalog._uri, catalog._artifacts)
    foreign.owner = "elsewhere:/ws"
    others = open_training(foreign, subject, "3" * 32)

    # the process was killed; the same retraining begins again
    end_runs(catalog, "nested", "a" * 32, None)
    assert status(catalog, killed.run_id) == "KILLED"
    again = open_retraining(catalog, data, "a" * 32)
    assert again == around
    training = open_training(catalog, subject, "1" * 32, again)
    assert training.run_id == killed.run_id
    training.finish(checkpoint.lineage.sha256)
    one = card(1, checkpoint, exported)
    made = registration.register(
        catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, [], again
    )
    assert made.run_id == training.run_id
    assert catalog.client.get_run(made.run_id).data.tags["mlflow.parentRunId"] == around.run_id
    end_runs(catalog, "nested", "a" * 32, "FINISHED", "| model | outcome |")
    parent = catalog.client.get_run(around.run_id)
    assert (parent.info.run_name, parent.info.status) == ("nested on data 000000000000", "FINISHED")
    assert parent.data.tags["mlflow.note.content"] == "| model | outcome |"

    other = open_retraining(catalog, data, "b" * 32)  # with other settings: a run of its own
    assert other.run_id != around.run_id
    end_runs(catalog, "nested", "b" * 32, "FAILED")
    assert status(catalog, other.run_id) == "FAILED"
    assert status(catalog, around.run_id) == "FINISHED"
    assert status(catalog, others.run_id) == "RUNNING"  # it belongs to another workspace on the same server


def test_challenger_is_the_newest_that_passed_until_it_is_champion(catalog: Catalog, checkpoint: Checkpoint, exported: Export):
    subject = SUBJECT.model_copy(update={"line": "aliases"})

    def register(seed: int, outcome: Literal["promote", "refuse"]) -> Version:
        one = card(seed, checkpoint, exported)
        return registration.register(
            catalog, subject, checkpoint.lineage, one, decision(one, outcome), checkpoint.folder, exported.folder, {}, []
        )  # fmt: skip

    assert register(1, "promote").aliases == ["challenger"]
    catalog.promote(subject, 1)
    assert catalog.version(subject, 1).aliases == ["champion"]
    assert register(2, "promote").aliases == ["challenger"]
    assert register(3, "refuse").aliases == []
    assert register(2, "promote").number == 2  # again: nothing changes
    assert [v.aliases for v in catalog.versions(subject)] == [["champion"], ["challenger"], []]

    catalog.client.delete_model_version(subject.model, "1")  # as in MLflow's web page
    assert catalog.champion(subject) is None
    with pytest.raises(CatalogError, match="has no version 1; there are 2, 3"):
        catalog.set_alias(subject, "champion", 1)
    assert [v.number for v in catalog.versions(subject)] == [2, 3]


def test_clock_that_goes_back_changes_no_order(
    catalog: Catalog, checkpoint: Checkpoint, exported: Export, monkeypatch: pytest.MonkeyPatch
):
    """Order versions by their numbers, because client and server may disagree on the time."""
    subject = SUBJECT.model_copy(update={"line": "clocks"})
    made = []
    for seed in (1, 2):
        one = card(seed, checkpoint, exported)
        made.append(
            registration.register(
                catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
            )
        )
        monkeypatch.setattr(sqlalchemy_store, "get_current_time_millis", lambda: 86_400_000)  # the next version is from 1970
        monkeypatch.setattr("registry.registration.time.time", lambda: 4_000_000_000.0)  # and this client is in 2096
    assert catalog.client.get_model_version(subject.model, "2").creation_timestamp == 86_400_000
    assert [v.number for v in catalog.versions(subject)] == [1, 2]
    challenger = catalog.aliased(subject, "challenger")
    assert challenger is not None
    assert challenger.number == 2


def test_server_that_asked_twice_makes_one_version(
    catalog: Catalog, checkpoint: Checkpoint, exported: Export, monkeypatch: pytest.MonkeyPatch
):
    """Make one version: MLflow's client repeats a request whose answer is late, even if it was carried out."""
    subject, once = SUBJECT.model_copy(update={"line": "twice"}), catalog.client.create_model_version

    def twice(*arguments, **named):
        once(*arguments, **named)
        return once(*arguments, **named)

    monkeypatch.setattr(catalog.client, "create_model_version", twice)
    one = card(1, checkpoint, exported)
    made = registration.register(
        catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    assert [v.number for v in catalog.versions(subject)] == [made.number] == [1]


def test_mark_that_a_stranger_put_on_another_version_is_not_taken_for_ours(
    catalog: Catalog, checkpoint: Checkpoint, exported: Export
):
    subject = SUBJECT.model_copy(update={"line": "marks"})
    first, one = card(1, checkpoint, exported), card(2, checkpoint, exported)

    def register(made: Scorecard, known: dict[int, str]) -> int:
        return registration.register(
            catalog, subject, checkpoint.lineage, made, decision(made), checkpoint.folder, exported.folder, {}, [], known=known
        ).number  # fmt: skip

    assert register(first, {}) == 1
    known = {1: first.sha256}
    catalog.client.set_model_version_tag(subject.model, "1", "scorecard.sha256", one.sha256)
    assert register(one, known) == 2  # the ledger knows version 1 as something else
    stray = catalog.client.create_model_version(subject.model, source="file:///nowhere", tags={"scorecard.sha256": one.sha256})
    assert register(one, known) == 2  # the ledger has no version 2 yet, but version 2 holds these files
    known[2] = one.sha256
    catalog.client.set_model_version_tag(subject.model, "2", "scorecard.sha256", "f" * 64)
    assert register(one, known) == 2  # the ledger has version 2, whatever the tag says
    third = card(3, checkpoint, exported)
    catalog.client.set_model_version_tag(subject.model, str(stray.version), "scorecard.sha256", third.sha256)
    assert register(third, known) == 4  # version 3 has the tag but not the files
    assert [v.number for v in catalog.versions(subject)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("listening", "said"), [(False, "cannot be reached"), (True, "does not answer in time")])
def test_server_that_is_down_or_hangs_is_named(
    listening: bool, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, catalog: Catalog
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else gets the port
        if listening:
            taken.listen()  # the kernel accepts; nobody answers
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        try:
            silent = Catalog(f"http://who:secret@{host}", tmp_path)
            with pytest.raises(StoreError, match=f"^MLflow at {host} {said} after several attempts; start it, or correct"):
                silent.champion(SUBJECT)
        finally:
            mlflow.set_tracking_uri(catalog._uri)


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
        registration.register(
            catalog,
            SUBJECT,
            checkpoint.lineage,
            one,
            decision(one),
            checkpoint.folder,
            exported.folder,
            {"x": tmp_path / "none"},
            [],
        )
    assert [v.number for v in catalog.versions(SUBJECT)] == [1, 2]
    runs = mlflow.search_runs(experiment_names=["shapes"], output_format="list")
    assert "RUNNING" not in {run.info.status for run in runs}
    made = registration.register(
        catalog, SUBJECT, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    assert made.number == 3
    assert len(mlflow.search_runs(experiment_names=["shapes"], output_format="list")) == len(runs)  # it reuses that run


@pytest.mark.parametrize("text", ["shapes", "shapes/I", "shapes/III/full", "shapes/I/slow", "a/b/I/full"])
def test_malformed_subject_says_how_to_write_it(text: str):
    with pytest.raises(CatalogError, match=f"is not LINE/CONFIG/VARIANT; write it as {text.partition('/')[0]}/I/full"):
        Subject.parse(text)


def plant(place: Path, victim: Path, kind: str) -> None:
    """Put something in the way of a file that is going to be written."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "folder that is a link":
        place.parent.rmdir()
        place.parent.symlink_to(victim.parent)
    elif kind == "second name":
        place.hardlink_to(victim)
    else:
        os.mkfifo(place)


@pytest.mark.parametrize("kind", ["link", "folder that is a link", "second name", "pipe"])
@pytest.mark.parametrize(
    "name", few(["checkpoint/weights.safetensors", "checkpoint/samples/step-000011.png", "bundle/weights.bin"], 1)
)
def test_nothing_is_written_through_what_others_planted(catalog, checkpoint, exported, tmp_path, kind, name):
    subject = SUBJECT.model_copy(update={"line": "planted"})
    victim = tmp_path / "keys" / Path(name).name
    victim.parent.mkdir()
    victim.write_bytes(b"a key")
    training = open_training(catalog, subject, tmp_path.name)
    place = Path(run_place(catalog, training.run_id))
    plant(place / name, victim, kind)
    picture = tmp_path / "samples" / "step-000011.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(StoreError, match="is a link or not a regular file, where a version's file belongs"):
        training.sample(picture)
    training.finish(checkpoint.lineage.sha256)
    one = card(9, checkpoint, exported)
    with pytest.raises(StoreError, match="is a link or not a regular file, where a version's file belongs"):
        registration.register(
            catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
        )
    assert [path.name for path in victim.parent.iterdir()] == [victim.name]
    assert victim.read_bytes() == b"a key"
    shutil.rmtree(place.parent, ignore_errors=True)
    assert registration.register(
        catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    catalog.client.delete_registered_model(subject.model)
    catalog.client.delete_run(training.run_id)


def run_place(catalog: Catalog, run_id: str) -> str:
    return str(catalog.client.get_run(run_id).info.artifact_uri).removeprefix("file://")


@pytest.mark.parametrize(
    "where",
    ["{other}", "http://[", "file:///tmp/x%00/{run}/artifacts", "file:///a/../{run}/artifacts", "relative/{run}/artifacts", ""],
)
def test_folder_that_mlflow_names_for_a_run_is_the_runs_own(catalog, versions, checkpoint, exported, where, tmp_path):
    """Refuse the folder of another run: whoever writes to MLflow's database could have the champion overwritten."""
    subject = SUBJECT.model_copy(update={"line": "elsewhere"})
    training = open_training(catalog, subject, tmp_path.name)
    training.finish(checkpoint.lineage.sha256)
    champion = Path(run_place(catalog, versions[0].run_id))
    before = {path: path.read_bytes() for path in champion.rglob("*") if path.is_file()}
    told = where.format(other=champion.as_uri(), run=training.run_id)
    database = catalog._uri.removeprefix("sqlite:///")
    with sqlite3.connect(database) as raw:
        raw.execute("update runs set artifact_uri = ? where run_uuid = ?", [told, training.run_id])
    one = card(11, checkpoint, exported)
    with pytest.raises(StoreError):
        registration.register(
            catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
        )
    assert {path: path.read_bytes() for path in champion.rglob("*") if path.is_file()} == before
    catalog.client.delete_run(training.run_id)


def test_run_that_has_a_version_is_not_written_to_again(catalog, checkpoint, exported):
    subject = SUBJECT.model_copy(update={"line": "again"})
    one, other = card(12, checkpoint, exported), card(13, checkpoint, exported)
    made = registration.register(
        catalog, subject, checkpoint.lineage, one, decision(one), checkpoint.folder, exported.folder, {}, []
    )
    catalog.client.delete_tag(made.run_id, "scorecard.sha256")  # as any user of MLflow can
    catalog.client.set_tag(made.run_id, "lineage.sha256", checkpoint.lineage.sha256)
    again = registration.register(
        catalog, subject, checkpoint.lineage, other, decision(other), checkpoint.folder, exported.folder, {}, []
    )
    assert again.run_id != made.run_id

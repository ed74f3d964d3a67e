"""The loop in one workspace, with real Prefect, DVC, MLflow and signatures: what each step leaves in the stores.

The tests of this file build on each other and run in order: each looks at what the one before it left.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from filelock import FileLock
from mlflow.tracking import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import BusyError
from flows.setup import create
from flows.workspace import SEEN, Workspace
from model import versions
from model.errors import CheckpointError, ConfigError, RevisionError
from ota.release.keys import KeyRing
from registry.catalog import Catalog, Subject
from registry.champions import anchor_of, champion_of, judged, sealed, verdict
from registry.errors import CatalogError, PromotionError, StoreError
from registry.ledger import START
from registry.lineage import file_sha256
from registry.runs import reopen
from registry.seal import PARTS
from tests.conftest import in_run, write_images
from tests.test_catalog import metrics
from tests.test_fleet import KEY, public, signed
from tests.test_fleet import report as device_report

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
steps = 500
batch = 16
learning_rate = 6e-3
update_grid = 1.0

[lines.shapes.sampler]
steps = 6

[lines.shapes.gate]
images = 64
alpha = 0.1
tolerance = 1.0
minimum_images = 8
captions = false
implausible = 1.0
duplicates = 1.0
coverage = 0.0
"""
SUBJECT = Subject(line="shapes", configuration="I", variant="full")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Create a workspace with a first data revision."""
    made = create(tmp_path_factory.mktemp("factory") / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes", 120)
    versions.add(made.root, "data/shapes", "shapes", "first")
    yield made
    made.ledger.close()
    made.fleet.close()


def statuses(workspace: Workspace, line: str) -> list[str]:
    """Return the status of all runs that MLflow has for a line."""
    import mlflow

    workspace.catalog.versions(SUBJECT)  # opens the catalog
    return [run.info.status for run in mlflow.search_runs(experiment_names=[line], output_format="list")]


def run_tags(workspace: Workspace, number: int) -> dict[str, str]:
    """Return the tags of a version's run, which has all of them."""
    tags: dict[str, str] = workspace.catalog.client.get_run(workspace.catalog.version(SUBJECT, number).run_id).data.tags
    return tags


def kinds(workspace: Workspace) -> list[str]:
    return [entry.kind for entry in workspace.ledger.entries()]


def champion_number(workspace: Workspace) -> int | None:
    champion = workspace.catalog.champion(SUBJECT)
    return champion.number if champion else None


def ferry(workspace: Workspace, *arguments: str) -> Result:
    """Call the command in this process."""
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), *arguments])


@contextmanager
def settings(workspace: Workspace, old: str, new: str) -> Iterator[None]:
    """Change ferry.toml for a while."""
    path = workspace.root / "ferry.toml"
    before = path.read_text()
    assert before.count(old) == 1, old
    path.write_text(before.replace(old, new))
    try:
        yield
    finally:
        path.write_text(before)


def register_broken(workspace: Workspace) -> dict[str, Any]:
    """Register the champion with its weights in another order."""
    from flows.retrain import register_checkpoint
    from flows.steps import champion_files
    from model.train import LINEAGE, WEIGHTS, load_checkpoint, write_safely

    champion = champion_of(workspace, SUBJECT)
    assert champion is not None
    whole = load_checkpoint(champion_files(workspace, champion).checkpoint)
    broken = workspace.work / "runs" / "broken"
    shutil.copytree(whole.folder, broken)
    weights = {name: weight.flatten().flip(0).view(weight.shape) for name, weight in whole.network().state_dict().items()}
    write_safely(broken / WEIGHTS, weights)
    (broken / LINEAGE).write_text(whole.lineage.model_copy(update={"parent": whole.weights_sha256}).model_dump_json())
    return register_checkpoint(str(workspace.root), str(broken))


def test_first_retraining_makes_a_champion(workspace: Workspace):
    from flows.retrain import retrain

    (row,) = retrain(str(workspace.root), "shapes")
    assert (row["outcome"], row["version"], row["promoted"]) == ("promote", 1, True)
    champion = workspace.catalog.champion(SUBJECT)
    assert champion is not None
    assert champion.number == 1
    assert champion.tags["data.rev"] == versions.resolve(workspace.root, "data/shapes", "shapes").rev
    assert champion.aliases == ["anchor", "champion"]
    assert kinds(workspace) == ["gate", "promotion"]


def as_an_older_ferry_left_it(workspace: Workspace) -> Workspace:
    """Remove what older versions did not keep: hashes of files, full decisions, signatures, and the ledger key."""
    with closing(sqlite3.connect(workspace.root / "ferry.db")) as connection, connection:
        previous = START
        for number, text in connection.execute("SELECT number, body FROM ledger_entries ORDER BY number").fetchall():
            body = json.loads(text) | {"previous": previous}
            for name in ("seal", "verdict"):
                body["facts"].pop(name, None)
            changed = json.dumps(body, sort_keys=True)
            previous = hashlib.sha256(changed.encode()).hexdigest()
            connection.execute("UPDATE ledger_entries SET body = ?, sha256 = ? WHERE number = ?", (changed, previous, number))
        connection.execute("DROP TABLE ledger_signatures")
    ring = KeyRing(workspace.root / "keys")
    ring.ledger = []
    ring._save()
    (workspace.root / "keys" / "ledger.seen").unlink()
    (workspace.root / "keys" / "online" / "ledger.pem").unlink()
    workspace.ledger.close()
    for part in ("ledger", "keys", "repository"):
        workspace.__dict__.pop(part, None)  # opened again at its next use
    return workspace


def test_workspace_of_an_older_ferry_is_sealed_by_one_command_and_goes_on(workspace: Workspace):
    # All tests below use the workspace that this one leaves.
    as_an_older_ferry_left_it(workspace)
    before = workspace.ledger.entries()
    for words in (["release", "shapes"], ["retrain", "shapes"], ["report"]):
        told = ferry(workspace, *words)
        assert (told.exit_code, told.stdout) == (3, ""), told.output
        assert "without the hashes of its files; run `ferry seal`, which records them" in told.stderr
    assert "0 of them are signed by the ledger's key; the 2 before" in ferry(workspace, "history", "--verify").stdout

    stranger = Stranger(workspace, 1)
    for name, says in (
        ("scorecard.json", "scorecard.json in MLflow is not the one that the gate's ledger entry names"),
        ("bundle/weights.bin", "bundle/weights.bin in MLflow is not the one that its scorecard and promotion name"),
        ("checkpoint/lineage.json", "checkpoint/lineage.json in MLflow is not the one that its scorecard names"),
    ):
        with stranger.replacing(name):
            told = ferry(workspace, "seal")
            assert told.exit_code == 6, told.output
            assert f"shapes/I/full 1: NOT sealed, {says}" in told.stdout
    assert workspace.ledger.entries() == before

    (row,) = json.loads(ferry(workspace, "seal", "--json").stdout)["versions"]
    assert row["problem"] == ""
    assert set(row["vouched"]) == {"scorecard.json", "bundle/weights.bin", "checkpoint/lineage.json"}
    assert {"bundle/golden.npz", "bundle/graph.onnx", "checkpoint/weights.safetensors"} < set(row["taken"])
    assert ferry(workspace, "seal").stdout == "every version that the gate saw is sealed\n"
    assert kinds(workspace) == ["gate", "promotion", "seal"]
    assert workspace.ledger.entries()[:2] == before
    assert "1 of them are signed by the ledger's key; the 2 before" in ferry(workspace, "history", "--verify").stdout
    assert verdict(workspace, SUBJECT, 1) is not None


def test_run_leads_back_to_the_very_images(workspace: Workspace):
    import mlflow

    champion = workspace.catalog.champion(SUBJECT)
    assert champion is not None
    used = workspace.catalog.client.get_run(champion.run_id).inputs.dataset_inputs
    folder = Path(mlflow.data.get_source(used[0]).load())
    assert versions.folder_md5(folder) == champion.tags["data.md5"]
    shutil.rmtree(folder.parent)


def test_training_can_be_watched_in_the_run_of_its_version(workspace: Workspace):
    champion = workspace.catalog.champion(SUBJECT)
    assert champion is not None
    assert statuses(workspace, "shapes") == ["FINISHED"] * 2  # the retraining's, and in it the training's, which is the version's
    steps = [1, 11, 21, 31, 41, 51, 60]
    for name in ("loss", "learning_rate", "busiest_expert", "expert_entropy.00", "expert_entropy.02", "seconds"):
        assert [step for step, _ in metrics(workspace.catalog, champion.run_id, name)] == steps
    curve = json.loads(in_run(workspace.catalog, champion.run_id, "checkpoint/curve.json"))
    assert [value for _, value in metrics(workspace.catalog, champion.run_id, "loss")] == [row["loss"] for row in curve]
    for step in (15, 30, 45, 60):
        with Image.open(BytesIO(in_run(workspace.catalog, champion.run_id, f"checkpoint/samples/step-{step:06d}.png"))) as image:
            assert max(image.getextrema()) > 0
        drawn = in_run(workspace.catalog, champion.run_id, f"checkpoint/samples/step-{step:06d}.json")
        assert json.loads(drawn) == ["bar", "disc"]


def test_nothing_new_means_no_work(workspace: Workspace):
    from flows.retrain import retrain

    before = sorted(path.name for path in (workspace.work / "runs").iterdir())
    (row,) = retrain(str(workspace.root), "shapes")
    assert row["outcome"] == "unchanged"
    assert sorted(path.name for path in (workspace.work / "runs").iterdir()) == before
    assert [v.number for v in workspace.catalog.versions(SUBJECT)] == [1]
    assert kinds(workspace) == ["gate", "promotion", "seal"]


def test_release_publishes_the_champion(workspace: Workspace):
    from flows.publish import release

    made = release(str(workspace.root), "shapes", "edge")
    (published,) = workspace.repository.releases("shapes", "edge")
    assert (made["release"], made["manifest"], made["versions"]) == (1, published.manifest, {"full": 1})
    manifest = workspace.repository.manifest(published)
    champion = champion_of(workspace, SUBJECT)
    assert champion is not None
    assert manifest.entry("weights", "full").sha256 == champion.weights
    assert manifest.origin.decision == workspace.ledger.entries()[1].sha256
    assert (workspace.root / "published" / "metadata" / "timestamp.json").is_file()
    assert published.ledger in workspace.ledger.hashes()


def test_release_without_news_publishes_nothing_new(workspace: Workspace):
    from flows.publish import release

    before = kinds(workspace)
    made = release(str(workspace.root), "shapes", "edge")
    assert made["release"] == 1
    assert len(workspace.repository.releases("shapes", "edge")) == 1
    assert kinds(workspace) == before


# Attacks with nothing but an MLflow client


class Stranger:
    """Somebody with an MLflow client, and nothing else."""

    def __init__(self, workspace: Workspace, number: int) -> None:
        self.client = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db")
        self.kept = workspace.work / "champions"
        self.number = str(number)
        self.run_id = str(self.client.get_model_version(SUBJECT.model, self.number).run_id)

    @contextmanager
    def replacing(self, name: str, data: bytes | None = None) -> Iterator[None]:
        """Replace a file of the version's run for a while, and delete the local copies of champions."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self.client.download_artifacts(self.run_id, name, folder))
            good = path.read_bytes()
            path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:] if data is None else data)
            self.client.log_artifact(self.run_id, str(path), name.rpartition("/")[0] or None)
            shutil.rmtree(self.kept, ignore_errors=True)
            try:
                yield
            finally:
                path.write_bytes(good)
                self.client.log_artifact(self.run_id, str(path), name.rpartition("/")[0] or None)

    @contextmanager
    def tagging(self, tags: dict[str, str | None]) -> Iterator[None]:
        """Set or delete tags of the version for a while."""
        before = self.client.get_model_version(SUBJECT.model, self.number).tags
        for name, value in tags.items():
            if value is None and name not in before:
                continue
            if value is None:
                self.client.delete_model_version_tag(SUBJECT.model, self.number, name)
            else:
                self.client.set_model_version_tag(SUBJECT.model, self.number, name, value)
        try:
            yield
        finally:
            for name, value in tags.items():
                if name in before:
                    self.client.set_model_version_tag(SUBJECT.model, self.number, name, before[name])
                elif value is not None:
                    self.client.delete_model_version_tag(SUBJECT.model, self.number, name)


def signed_facts(workspace: Workspace) -> dict[str, Any]:
    """Collect what a stranger in MLflow must not change: signatures, what is published, the ledger."""
    folders = ("repository", "published")
    files = {
        path: path.read_bytes() for folder in folders for path in sorted((workspace.root / folder).rglob("*")) if path.is_file()
    }
    return {"files": files, "entries": workspace.ledger.entries()}


SEALED = [f"{part}/{name}" for part in ("bundle", "checkpoint") for name in PARTS[part]]


@pytest.mark.parametrize("name", [*SEALED, "scorecard.json"])
@pytest.mark.parametrize("how", ["other bytes", "more bytes", "none"])
def test_file_that_a_stranger_replaced_in_mlflow_is_not_signed(workspace: Workspace, name: str, how: str):
    from flows.publish import make_bundle
    from registry.errors import SealError

    def use() -> None:
        make_bundle.fn(str(workspace.root), "shapes", "edge")
        workspace.catalog.files(sealed(workspace, SUBJECT, 1), "checkpoint", workspace.work / "champions")

    before = signed_facts(workspace)
    replaced = Stranger(workspace, 1).replacing(name, {"other bytes": None, "more bytes": b"x" * 10_000_000, "none": b""}[how])
    says = f"^{re.escape(name)} of shapes/I/full 1 in MLflow is not what the gate saw [^\n]*$"
    with replaced, pytest.raises(SealError, match=says):
        use()
    assert signed_facts(workspace) == before
    assert make_bundle.fn(str(workspace.root), "shapes", "edge")


def test_evil_bundle_in_mlflow_is_neither_released_nor_trained_from(workspace: Workspace):
    # Shuffled weights with golden outputs of their own: a device would find nothing wrong with them.
    before = signed_facts(workspace)
    stranger = Stranger(workspace, 1)
    with stranger.replacing("bundle/weights.bin"), stranger.replacing("bundle/golden.npz"):
        told = ferry(workspace, "release", "shapes")
        assert (told.exit_code, told.stdout) == (6, "")
        assert told.stderr.count("\n") == 1
        assert (
            "somebody replaced it, and ferry does not use it; restore MLflow's files from a backup, or run `ferry retrain shapes`"
            in told.stderr
        )
        assert ferry(workspace, "history", "--verify").exit_code == 0
    with stranger.replacing("checkpoint/weights.safetensors"):
        told = ferry(workspace, "retrain", "shapes")
        assert (told.exit_code, told.stdout, told.stderr.count("\n")) == (6, "", 1)
    assert signed_facts(workspace) == before


def test_copy_that_was_fetched_before_is_checked_again(workspace: Workspace, tmp_path: Path):
    from flows.publish import make_bundle

    seal, kept = sealed(workspace, SUBJECT, 1), workspace.work / "champions"
    bundle = workspace.catalog.files(seal, "bundle", kept)
    good = (bundle / "graph.onnx").read_bytes()
    secret = tmp_path / "elsewhere"
    secret.write_bytes(good)
    for damage in (
        lambda path: path.write_bytes(b"evil" + good[4:]),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.symlink_to(secret)),
    ):
        damage(bundle / "graph.onnx")
        assert make_bundle.fn(str(workspace.root), "shapes", "edge")
        assert (bundle / "graph.onnx").read_bytes() == good
        assert not (bundle / "graph.onnx").is_symlink()
    assert secret.read_bytes() == good


TAGS: list[dict[str, str | None]] = [
    {"weights.sha256": "f" * 64}, {"weights.sha256": None}, {"scorecard.sha256": "f" * 64, "lineage.sha256": "f" * 64},
    {"data.md5": "/etc", "data.rev": "--output=/tmp/x"}, {"gate.outcome": "\x1b[2J", "gate.reason": "x" * 4000, "gate.n": "9" * 5000},
    {"code.sha256": None, "gate.outcome": None, "checkpoint.sha256": None}, {"checkpoint.sha256": "../x", "parent.sha256": "../x"},
]  # fmt: skip


@pytest.mark.parametrize("tags", TAGS, ids=",".join)
def test_tag_that_a_stranger_edited_changes_nothing_that_is_signed(workspace: Workspace, tags: dict[str, str | None]):
    from flows.publish import make_bundle

    before = signed_facts(workspace)
    made = make_bundle.fn(str(workspace.root), "shapes", "edge")
    with Stranger(workspace, 1).tagging(tags):
        if "weights.sha256" in tags:
            with pytest.raises(CatalogError, match="but the ledger does not; run `ferry reconcile`, or run"):
                make_bundle.fn(str(workspace.root), "shapes", "edge")
        else:
            assert make_bundle.fn(str(workspace.root), "shapes", "edge") == made
        for words in (
            ["history"],
            ["trace", before["entries"][0].sha256],
            ["report"],
            ["evaluate", str(SUBJECT), "1"],
            ["approve"],
        ):
            told = ferry(workspace, *words)
            assert told.exit_code == 0, told.output
            assert "\x1b" not in told.output
    assert signed_facts(workspace) == before


def test_release_vouches_for_what_it_signed_when_an_older_version_is_sealed(workspace: Workspace):
    from flows.policies import released
    from ota.manifest import MAX_WEIGHTS
    from registry import sealing
    from registry.errors import SealError

    given = (SUBJECT, 1, workspace.ledger.entries(str(SUBJECT)), MAX_WEIGHTS, partial(released, workspace))
    found = sealing._examined(workspace, *given)
    assert {name for name, by in found.vouched.items() if by == "shapes/edge release 1"} == {
        "bundle/graph.onnx", "bundle/sampler.json", "bundle/reference.json",  # its golden outputs are a sample of the version's
    }  # fmt: skip
    says = r"sampler\.json in MLflow is not the one that shapes/edge release 1 was signed with"
    with Stranger(workspace, 1).replacing("bundle/sampler.json"), pytest.raises(SealError, match=says):
        sealing._examined(workspace, *given)


def test_changed_folder_is_not_trained_on(workspace: Workspace):
    versions.check_clean(workspace.root, "data/shapes", "shapes")
    write_images(workspace.root / "data/shapes", 120, seed=1, dim=True)
    with pytest.raises(RevisionError, match="record them with `ferry data add shapes`"):
        versions.check_clean(workspace.root, "data/shapes", "shapes")
    assert [v.number for v in workspace.catalog.versions(SUBJECT)] == [1]


def test_second_revision_starts_from_the_champion(workspace: Workspace):
    from flows.retrain import retrain
    from flows.steps import champion_files

    versions.add(workspace.root, "data/shapes", "shapes", "dimmer light")
    first = champion_of(workspace, SUBJECT)
    assert first is not None
    (row,) = retrain(str(workspace.root), "shapes", promote_winners=False)
    second, tags = sealed(workspace, SUBJECT, 2), run_tags(workspace, 2)
    assert row["version"] == 2
    parent = json.loads((champion_files(workspace, second).checkpoint / "lineage.json").read_bytes())["parent"]
    assert parent == second.parent == tags["parent.sha256"] == first.checkpoint
    assert tags["gate.champion"] == first.weights
    champion = workspace.catalog.champion(SUBJECT)
    assert champion is not None
    assert champion.number == 1  # no promotion was asked for


def test_interrupted_registration_is_not_repeated(workspace: Workspace):
    from flows.retrain import retrain

    before = kinds(workspace)
    (row,) = retrain(str(workspace.root), "shapes", promote_winners=False)
    assert row["version"] == 2
    assert [v.number for v in workspace.catalog.versions(SUBJECT)] == [1, 2]
    assert kinds(workspace) == before


def test_alias_set_by_hand_is_neither_trusted_nor_built_on(workspace: Workspace):
    from registry.champions import champions

    before = kinds(workspace)
    workspace.catalog.promote(SUBJECT, 2)  # as somebody might do in MLflow's web page
    with pytest.raises(CatalogError, match="MLflow says shapes/I/full 2 is champion, but the ledger does not"):
        champions(workspace, workspace.class_subjects("shapes", "edge"))
    weights = workspace.catalog.version(SUBJECT, 1).tagged_weights
    with (
        Stranger(workspace, 2).tagging({"weights.sha256": weights}),
        pytest.raises(CatalogError, match="2 is champion, but the ledger does not"),
    ):
        champions(workspace, workspace.class_subjects("shapes", "edge"))  # nor if its tags imitate the real champion
    workspace.catalog.promote(SUBJECT, 1)
    assert kinds(workspace) == before


def test_promotion_cut_before_the_alias_moved_is_completed_by_repeating_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    from registry.champions import champions, promote

    def cut(*_: object) -> None:
        raise StoreError("MLflow is away")

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "promote", cut)
        with pytest.raises(StoreError):
            promote(workspace, SUBJECT, 2, "it passed")
    assert kinds(workspace)[-1] == "promotion"
    assert champion_number(workspace) == 1
    with pytest.raises(CatalogError, match="MLflow says shapes/I/full 1 is champion, but the ledger does not"):
        champions(workspace, workspace.class_subjects("shapes", "edge"))  # nothing is released between the two steps
    promote(workspace, SUBJECT, 2, "it passed")
    assert champions(workspace, workspace.class_subjects("shapes", "edge"))["full"].version == 2
    promote(workspace, SUBJECT, 1, "as before")


def test_version_that_passed_the_gate_is_promoted_by_hand(workspace: Workspace):
    from registry.champions import promote

    assert judged(workspace, SUBJECT)[2].facts["outcome"] == "promote"
    promote(workspace, SUBJECT, 2, "it passed")
    assert champion_number(workspace) == 2


def test_second_release_carries_a_smaller_delta(workspace: Workspace):
    from flows.publish import release

    made = release(str(workspace.root), "shapes", "edge")
    first = workspace.repository.releases("shapes", "edge")[0]
    assert made["release"] == 2
    assert 0 < made["deltas"][first.manifest] < made["full_bytes"]
    said = verdict(workspace, SUBJECT, 2)
    assert said is not None
    expected = said.update_bytes  # known before there was a release
    assert expected is not None
    weights = sealed(workspace, SUBJECT, 2).files["bundle/weights.bin"].size
    assert 0 < expected < weights
    assert 0.5 < expected / made["deltas"][first.manifest] < 1  # the delta holds more than weights


def test_going_back_finds_the_bundle_that_devices_know(workspace: Workspace):
    from flows.publish import release
    from registry.champions import promote

    promote(workspace, SUBJECT, 1, "going back")
    assert release(str(workspace.root), "shapes", "edge")["release"] == 1
    assert len(workspace.repository.releases("shapes", "edge")) == 2


def test_schedule_does_not_undo_going_back(workspace: Workspace):
    from flows.retrain import retrain

    before = kinds(workspace)
    (row,) = retrain(str(workspace.root), "shapes")
    assert (row["version"], row["outcome"], row["promoted"]) == (2, "promote", False)  # the same challenger, judged before
    assert "it was rolled back" in row["reason"]
    assert champion_number(workspace) == 1
    assert kinds(workspace) == before


def test_broken_version_needs_overruling_and_is_not_gone_back_to(workspace: Workspace):
    from flows.report import write
    from registry.champions import promote

    promote(workspace, SUBJECT, 2, "back again")
    row = register_broken(workspace)
    assert (row["version"], row["outcome"]) == (3, "refuse")
    with pytest.raises(PromotionError, match="add --overrule and a --reason"):
        promote(workspace, SUBJECT, 3, "I like it")
    promote(workspace, SUBJECT, 3, "I like it", overrule=True)
    assert workspace.ledger.entries()[-1].facts["overruled"] is True
    promote(workspace, SUBJECT, 2, "I was wrong")
    with pytest.raises(PromotionError, match="add --overrule and a --reason"):
        promote(workspace, SUBJECT, 3, "again")
    page = write(workspace, workspace.root / "report.html").read_text()
    assert "it passed; again: I was wrong" in page
    assert "ferry promote shapes/I/full 1 " in page
    assert "ferry promote shapes/I/full 3 " not in page
    assert "ferry rollout start shapes/edge --release 1 --revert" in page


def test_people_rate_two_versions_blind_and_the_report_says_what_they_said(workspace: Workspace, tmp_path: Path):
    from flows.report import write

    told = ferry(workspace, "rate", "shapes/I/full", "2", "--against", "1", "--pairs", "24", "--json")
    assert told.exit_code == 0, told.output
    page = Path(json.loads(told.stdout)["page"])
    sheet = json.loads(page.with_suffix(".json").read_bytes())
    assert (sheet["challenger"], sheet["before"]) == (2, 1)
    shown = json.loads(page.read_text().split('id="shown">')[1].split("</script>")[0])
    assert all(left != right for left, right in shown["pairs"])
    answers = tmp_path / "answers.json"
    votes = ["1" if left else "2" for left in sheet["challenger_left"]]  # somebody who always likes version 2
    answers.write_text(json.dumps({"sheet": sheet["id"], "rater": "Anna", "votes": votes}))
    told = ferry(workspace, "rate", "shapes/I/full", "--answers", str(answers))
    assert told.stdout.startswith(
        "people prefer version 2: version 2 over 1 in 24 of 24 decided pairs, 100 % of them (86 to 100 %)"
    )
    assert kinds(workspace)[-1] == "rating"
    assert "Anna, blind, preferred version 2 over 1 in 24 of 24 pairs" in ferry(workspace, "history").stdout
    assert "people prefer version 2" in write(workspace, workspace.root / "report.html").read_text()


def test_changed_sampler_is_judged_without_training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    from flows.retrain import retrain

    trained = sorted(path.name for path in (workspace.work / "runs").iterdir())
    best = anchor_of(workspace, SUBJECT)
    assert best
    assert best.version == 2
    first = sealed(workspace, SUBJECT, 1)
    monkeypatch.setattr("flows.candidate.anchor_of", lambda *_: first)  # as if the first one had been better
    refused = judged(workspace, SUBJECT)[3]

    def squat(catalog: Catalog, run_id: str, tags: dict[str, str]) -> None:
        # Meanwhile somebody sets the new model's tag, which its run shows from now on, on the version that was refused.
        if "scorecard.sha256" in tags:
            catalog.client.set_model_version_tag(SUBJECT.model, "3", "scorecard.sha256", tags["scorecard.sha256"])
        reopen(catalog, run_id, tags)

    monkeypatch.setattr("registry.registration.reopen", squat)
    with settings(workspace, "steps = 6\n", "steps = 5\n"):
        (row,) = retrain(str(workspace.root), "shapes", promote_winners=False)
    assert judged(workspace, SUBJECT)[3] == refused
    made = workspace.catalog.card(sealed(workspace, SUBJECT, row["version"]))
    assert (row["version"], made.sampler.steps) == (4, 5)
    beside = {(c.against, c.against_sha256, c.split) for c in made.comparisons}
    known = {against: sealed(workspace, SUBJECT, n).weights for against, n in (("champion", 2), ("anchor", 1))}
    assert beside == {(against, known[against], split) for against in known for split in ("new", "old")}
    assert sorted(path.name for path in (workspace.work / "runs").iterdir()) == trained
    assert champion_number(workspace) == 2


def test_new_feature_spaces_are_what_the_gate_compares_in_from_then_on(workspace: Workspace):
    from flows.retrain import retrain

    before = file_sha256(workspace.feature_spaces("shapes"))
    with settings(workspace, "steps = 6\n", "steps = 5\n"):
        (row,) = retrain(str(workspace.root), "shapes", promote_winners=False)
        (again,) = retrain(str(workspace.root), "shapes", promote_winners=False)
    assert row["version"] == again["version"]  # it is evaluated once
    attempts = verdict(workspace, SUBJECT, row["version"])
    told = ferry(workspace, "remeasure", "shapes", "--reason", "captions have come since")
    assert told.exit_code == 0, told.output
    present = file_sha256(workspace.feature_spaces("shapes"))
    with settings(workspace, "steps = 6\n", "steps = 5\n"):
        (row,) = retrain(str(workspace.root), "shapes", promote_winners=False)
    decided = verdict(workspace, SUBJECT, row["version"])
    assert attempts
    assert decided
    assert decided.level < attempts.level  # new spaces give no new attempt
    made = workspace.catalog.card(sealed(workspace, SUBJECT, row["version"]))
    assert {q.space_sha256 for q in made.quality} == {present} != {before}
    assert {c.against_sha256 for c in made.comparisons if c.against == "champion"} == {sealed(workspace, SUBJECT, 2).weights}
    assert champion_number(workspace) == 2


@pytest.mark.parametrize("number", [1, 3])
def test_number_that_mlflow_gives_twice_is_no_other_model(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, number: int):
    # Somebody deleted the registered model, and MLflow counts anew.
    from flows.retrain import retrain
    from registry.errors import SealError

    before = workspace.ledger.entries()
    version = workspace.catalog.version(SUBJECT, number)
    monkeypatch.setattr("flows.steps.register", lambda *_: version)
    says = f"MLflow gave shapes/I/full {number} to another model than the ledger has under that number"
    with settings(workspace, "steps = 6\n", "steps = 4\n"), pytest.raises(SealError, match=says):
        retrain(str(workspace.root), "shapes")
    assert workspace.ledger.entries() == before


def test_precision_that_the_champion_does_not_have_is_not_signed(workspace: Workspace):
    from flows.publish import release

    before = workspace.repository.releases("shapes", "edge")
    classes = '\n[lines.shapes.classes.edge]\nprecision = "float32"\n'
    asked = settings(workspace, "coverage = 0.0\n", f"coverage = 0.0\n{classes}")
    with asked, pytest.raises(CatalogError, match=r"is stored as bfloat16, but ferry\.toml asks for float32"):
        release(str(workspace.root), "shapes", "edge")
    assert workspace.repository.releases("shapes", "edge") == before


def test_other_tier_starts_from_noise(workspace: Workspace):
    from flows.retrain import retrain

    with settings(workspace, 'tier = "test"', 'tier = "nano"'), settings(workspace, "steps = 60", "steps = 2"):
        (row,) = retrain(str(workspace.root), "shapes", promote_winners=False)
    assert row["outcome"] == "refuse"
    assert run_tags(workspace, row["version"])["parent.sha256"] == ""


def test_other_picture_format_is_another_line(workspace: Workspace):
    from flows.retrain import retrain

    before = len(workspace.catalog.versions(SUBJECT))
    asked = settings(workspace, 'tier = "test"', 'tier = "test"\nimage_size = 8')
    with asked, pytest.raises(ConfigError, match=r"the champion draws 16 pixels in 1 channel, but ferry\.toml asks for 8"):
        retrain(str(workspace.root), "shapes")
    assert len(workspace.catalog.versions(SUBJECT)) == before


def test_lost_feature_spaces_are_not_replaced_in_silence(workspace: Workspace):
    from flows.retrain import retrain

    spaces = workspace.root / "features" / "shapes.safetensors"
    spaces.rename(spaces.with_suffix(".away"))
    with settings(workspace, "steps = 6\n", "steps = 7\n"), pytest.raises(CheckpointError, match="restore it from a backup"):
        retrain(str(workspace.root), "shapes")
    spaces.with_suffix(".away").rename(spaces)


def test_rollout_is_halted_while_a_model_is_trained(workspace: Workspace):
    with FileLock(workspace.work / "retraining.lock"):
        assert ferry(workspace, "rollout", "start", "shapes").exit_code == 0
        begun = workspace.repository.policy2("shapes", "edge")
        assert ferry(workspace, "rollout", "renew", "shapes").exit_code == 0
        assert workspace.repository.policy2("shapes", "edge") == begun
        assert ferry(workspace, "rollout", "halt", "shapes", "--reason", "blurred").exit_code == 0
    policy = workspace.repository.policy2("shapes", "edge")
    assert policy is not None
    assert policy.halt
    assert kinds(workspace)[-2:] == ["rollout", "halt"]


def test_ledger_that_was_cut_off_shows(workspace: Workspace):
    database = workspace.root / "ferry.db"
    whole = database.read_bytes()
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM ledger_entries WHERE number > 1")
    seen = workspace.root / "keys" / SEEN
    noted = seen.read_bytes()
    for says in ("this workspace has seen entry", "the ledger lacks the entry that shapes/edge release 1 was signed with"):
        for command in (["history"], ["release", "shapes"]):
            told = ferry(workspace, *command)
            assert told.exit_code == 6
            assert "so entries were removed" in told.stderr
            assert says in told.stderr
        seen.unlink()  # whoever cuts the ledger may delete it; the releases still show the cut
    seen.write_bytes(noted)
    database.write_bytes(whole)
    assert ferry(workspace, "history").exit_code == 0


def test_trace_leads_from_a_device_to_its_data_and_back(workspace: Workspace):
    release = workspace.repository.releases("shapes", "edge")[-1]
    manifest = workspace.repository.manifest(release)
    weights = manifest.entry("weights", "full").sha256
    workspace.fleet.enroll("press-01", public(KEY))
    workspace.fleet.receive(signed(device_report(device="press-01", active=release.manifest)))

    def trace(text: str) -> dict[str, Any]:
        told = ferry(workspace, "trace", text, "--json")
        assert told.exit_code == 0, told.stderr
        found: dict[str, Any] = json.loads(told.stdout)
        return found

    device = trace("press-01")
    came_from = {(row["kind"], row["name"]): row for row in device["back"]}
    version = workspace.catalog.version(SUBJECT, release.version)
    assert sealed(workspace, SUBJECT, version.number).weights == weights
    assert came_from["bundle", f"shapes/edge release {release.seq}"]["hashes"]["manifest"] == release.manifest
    assert came_from["version", str(version.subject) + f" {version.number}"]["facts"]["run"] == version.run_id
    assert ("data", f"shapes {version.tags['data.rev'][:12]}") in came_from
    assert {row["facts"]["what"].split()[0] for row in device["back"] if row["kind"] == "decision"} >= {"gate", "promotion"}
    assert device["forward"] == []

    data = trace(version.tags["data.md5"][:10])
    assert {"version", "bundle", "device"} <= {row["kind"] for row in data["forward"]}
    assert any(row["name"] == "press-01" for row in data["forward"])
    assert trace(weights)["of"]["kind"] == "version"
    assert "device press-01" in ferry(workspace, "trace", release.manifest).stdout


def test_trace_forward_names_all_that_descends_from_a_revision(workspace: Workspace):
    """List versions, bundle and device of the first revision, also those of a later one that were trained from them."""
    first = versions.log(workspace.root, "data/shapes", "shapes")[-1][0]
    told = ferry(workspace, "trace", "--forward", first.rev, "--json")
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    names = {row["name"] for row in found["descends"]}
    every = {str(made.subject) + f" {made.number}" for made in workspace.catalog.versions(SUBJECT)}
    assert {name for name in names if name.startswith("shapes/I/full")} == every
    assert "press-01" in names
    assert any(row["kind"] == "bundle" and row["because"].startswith("holds version shapes/I/full ") for row in found["descends"])
    assert "device press-01: runs bundle shapes/edge release " in ferry(workspace, "trace", "--forward", first.md5).stdout


@pytest.mark.parametrize("text", ["press-02", "abc", "f" * 64])
def test_trace_of_nothing_says_what_can_be_traced(workspace: Workspace, text: str):
    told = ferry(workspace, "trace", text)
    assert (told.exit_code, told.stdout) == (3, "")
    assert "nothing here is called" in told.stderr


def test_report_is_made_from_the_stores(workspace: Workspace):
    from flows.report import write

    page = write(workspace, workspace.root / "report.html").read_text()
    assert "shapes/I/full" in page
    assert "ferry promote shapes/I/full 1" in page


def test_second_process_is_told_to_wait(workspace: Workspace):
    from flows.retrain import retrain

    with (
        FileLock(workspace.work / "retraining.lock"),
        pytest.raises(BusyError, match="another ferry process holds the retraining"),
    ):
        retrain(str(workspace.root), "shapes")


def test_ledger_is_whole_after_all_this(workspace: Workspace):
    assert [e.number for e in workspace.ledger.entries()] == list(range(1, len(kinds(workspace)) + 1))
    assert all(r.ledger in workspace.ledger.hashes() for r in workspace.repository.releases("shapes", "edge"))


def test_stray_entries_in_mlflow_end_no_command(workspace: Workspace):
    assert (
        ferry(workspace, "release", "shapes").exit_code == 0
    )  # the champion was rolled back and came back: that is recorded once
    before = signed_facts(workspace)
    now = champion_of(workspace, SUBJECT)
    assert now is not None
    best = anchor_of(workspace, SUBJECT)
    assert best is not None
    stranger = Stranger(workspace, now.version)
    client, model = stranger.client, SUBJECT.model
    made = [
        client.create_model_version(model, source="file:///nowhere"),
        client.create_model_version(model, source="file:///etc"),
    ]
    client.set_model_version_tag(model, str(made[1].version), "scorecard.sha256", "f" * 64)
    follows = client.get_registered_model(model).tags["ledger.champion"]
    client.set_registered_model_tag(model, "ledger.champion", "9" * 5000)
    client.set_registered_model_alias(model, "someone-else", str(made[0].version))
    client.set_registered_model_alias(model, "anchor", str(made[0].version))
    client.create_registered_model("another thing")
    first = before["entries"][0].sha256
    for words in (
        ["reconcile"], ["history", "--verify"], ["trace", first], ["report"], ["evaluate", str(SUBJECT)], ["retrain", "shapes"],
        ["approve"], ["seal"], ["release", "shapes"],
    ):  # fmt: skip
        told = ferry(workspace, *words)
        assert told.exit_code == 0, f"{words}: {told.output}"
    assert str(client.get_model_version_by_alias(model, "anchor").version) == str(best.version)
    for words in (
        ["promote", str(SUBJECT), str(made[0].version), "--reason", "r"], ["promote", str(SUBJECT), str(made[1].version), "--overrule", "--reason", "r"],
        ["evaluate", str(SUBJECT), str(made[0].version)],
    ):  # fmt: skip
        told = ferry(workspace, *words)
        assert (told.exit_code, told.stdout) == (3, ""), f"{words}: {told.output}"
        assert "the gate never judged shapes/I/full" in told.stderr
    client.set_registered_model_alias(model, "champion", str(made[0].version))
    told = ferry(workspace, "reconcile")
    assert told.exit_code == 5
    assert "the gate never judged shapes/I/full" in told.stdout
    assert champion_number(workspace) == now.version
    assert client.get_registered_model(model).tags["ledger.champion"] == follows
    for version in made:
        client.delete_model_version(model, str(version.version))
    after = signed_facts(workspace)
    assert after["files"] == before["files"]
    assert [e.kind for e in after["entries"][len(before["entries"]) :]] == ["refusal"]


def test_champion_that_was_deleted_is_not_trained_anew(workspace: Workspace):
    from flows.retrain import retrain

    number = champion_number(workspace)
    trained = sorted(path.name for path in (workspace.work / "runs").iterdir())
    workspace.catalog.client.delete_model_version(SUBJECT.model, str(number))  # as in MLflow's web page
    said = f"the ledger says shapes/I/full {number} is champion, but it was deleted from MLflow; go back to another"
    with pytest.raises(CatalogError, match=said):
        retrain(str(workspace.root), "shapes")
    told = ferry(workspace, "release", "shapes")
    assert (told.exit_code, said in told.stderr) == (3, True)
    assert sorted(path.name for path in (workspace.work / "runs").iterdir()) == trained
    back = min(v.number for v in workspace.catalog.versions(SUBJECT))
    assert ferry(workspace, "promote", "shapes/I/full", str(back), "--overrule", "--reason", "the other is gone").exit_code == 0
    assert champion_number(workspace) == back

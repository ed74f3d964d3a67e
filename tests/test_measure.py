"""`ferry evaluate`: a version's figures as they were registered, and a FID over newly drawn images."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.main import network_file
from flows.figures import measure
from flows.setup import create
from flows.workspace import Workspace
from model import evaluate, versions
from model.data import Dataset, prepare
from model.errors import ConfigError
from model.export import Export
from model.scorecard import Cost, Quality, Scorecard, Usage
from model.session import load
from model.train import LINEAGE, Checkpoint, load_checkpoint
from registry import registration
from registry.catalog import Subject
from registry.champions import promote
from registry.errors import CatalogError
from registry.figures import find
from registry.seal import SCORECARD, Seal, files_of, sealed_bytes
from registry.selection import Check, Decision, Limits

from .conftest import CONFIG, SAMPLER, write_images

SETTINGS = """
schema = 1

[lines.shapes]
data = "data/shapes"
tier = "test"
text_length = 8

[lines.empty]
data = "data/empty"
"""
SUBJECT = Subject(line="shapes", configuration="I", variant="full")
N = 10  # images of the scorecard
FIGURES = {
    "kd": (0.0123, 0.0234),
    "fd": (12.25, 3.5),
    "coverage": (0.81, 0.82),
    "precision": (0.71, 0.72),
    "recall": (0.61, 0.62),
}


class Means(nn.Module):
    """A stand-in for Inception: the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class Map(nn.Module):
    """Returns pictures instead of features."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def card(checkpoint: Checkpoint, exported: Export) -> Scorecard:
    """Make a scorecard in which every figure is another number, so that none can stand in another's place."""
    quality = [
        Quality(
            space=space, space_sha256="f" * 64, split="new", n=N, reference=12, groups=12, fd_se=0.2, kd_se=0.0045, noise_kd=0.5,
            density=0.9, **{name: values[i] for name, values in FIGURES.items()},
        )
        for i, space in enumerate(("trained", "random"))
    ]  # fmt: skip
    return Scorecard(
        line="shapes", tier="test", configuration="I", variant="full", weights_sha256=exported.weights_sha256,
        lineage_sha256=checkpoint.lineage.sha256, sampler=SAMPLER, precision="bfloat16", seed=0, quality=quality, memorisation=[],
        captions=[], bad_images=0, usage=Usage(load=[[0.25] * 4] * 3, by_step=[], entropy=[1], dead=2),
        cost=Cost(milliseconds=5.4, evaluations=8, peak_mib=61.5, bare_mib=40.5, machine="a machine"),
    )  # fmt: skip


def register(workspace: Workspace, checkpoint: Checkpoint, exported: Export, folder: Path) -> Checkpoint:
    """Register a version of the trained model as if it was trained on the present revision; `folder` keeps its checkpoint."""
    shutil.copytree(checkpoint.folder, folder)
    data = versions.resolve(workspace.root, "data/shapes", "shapes")
    (folder / LINEAGE).write_text(checkpoint.lineage.model_copy(update={"data": data}).model_dump_json())
    trained = load_checkpoint(folder)
    made = card(trained, exported)
    decision = Decision(
        outcome="promote", reason="first version", checks=[Check(name="coverage", passed=True, text="fine")], n=N, champion=None,
        challenger=made.weights_sha256, limits=Limits(), scorecard=made.sha256,
    )  # fmt: skip
    version = registration.register(workspace.catalog, SUBJECT, trained.lineage, made, decision, folder, exported.folder, {}, [])
    files = {**files_of("bundle", exported.folder), **files_of("checkpoint", folder)}
    files[SCORECARD] = sealed_bytes(registration.card_text(made).encode())
    seal = Seal.of(str(SUBJECT), version.number, trained.lineage, made, files)
    facts = {"version": version.number, "outcome": decision.outcome, "decision": decision.sha256, "champion": ""}
    workspace.ledger.append("gate", str(SUBJECT), decision.reason, facts | {"seal": seal.facts})
    return trained


@pytest.fixture(scope="module")
def workspace(checkpoint: Checkpoint, exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Create a workspace: version 1, the champion, was trained on 80 images; version 2 on one more that is broken."""
    root = tmp_path_factory.mktemp("measure")
    made = create(root / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes")
    versions.add(made.root, "data/shapes", "shapes", "first")
    register(made, checkpoint, exported, root / "first")
    promote(made, SUBJECT, 1, "first")
    (made.root / "data/shapes/torn.png").write_bytes(b"torn")
    versions.add(made.root, "data/shapes", "shapes", "a torn one")
    register(made, checkpoint, exported, root / "second")
    yield made
    made.ledger.close()
    made.fleet.close()


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return scripted(Means(), tmp_path / "network.pt")


def ferry(workspace: Workspace, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), "evaluate", *arguments])


def test_table_shows_the_registered_figures(workspace: Workspace):
    told = ferry(workspace, "shapes/I/full")
    assert told.exit_code == 0, told.output
    head, _, titles, trained, random, _, *rest = told.stdout.splitlines()
    assert head == "shapes/I/full version 1 (champion): promote, first version"
    assert titles.split() == ["held-out", "features", "n", "kd", "±", "se", "fd", "coverage", "precision", "recall"]
    assert trained.split() == ["new", "trained", "10", "0.0123", "0.0045", "12.25", "0.81", "0.71", "0.61"]
    assert random.split() == ["new", "random", "10", "0.0234", "0.0045", "3.50", "0.82", "0.72", "0.62"]
    assert [line.split(maxsplit=1) for line in rest] == [
        ["experts", "2 dead of 12"],
        ["time", "5.4 ms for an image, one thread, a machine"],
        ["memory", "61.5 MiB at its peak, 40.5 MiB of it before a model is loaded"],
        ["sampler", "ab2, 4 steps, guidance 2: 8 network evaluations"],
    ]


def test_json_holds_the_whole_scorecard(workspace: Workspace):
    told = json.loads(ferry(workspace, "shapes/I/full", "2", "--json").stdout)
    assert Scorecard.model_validate(told["scorecard"]) == workspace.catalog.card(find(workspace, SUBJECT, 2))
    assert (told["version"], told["champion"], told["fid"]) == (2, False, None)


def test_fid_is_of_images_drawn_as_in_an_evaluation(workspace: Workspace, exported: Export, network: Path, tmp_path: Path):
    version = find(workspace, SUBJECT)
    dataset: Dataset = prepare(workspace.root / "data/shapes", CONFIG, tmp_path / "cache")
    for n in (None, 6):
        measured = measure(workspace, version, network, n=n)
        captions = evaluate.held_out_captions(dataset, n or N)
        drawn = evaluate.draw(load(exported.folder), captions, SAMPLER)
        own = workspace.work / "data" / version.data_md5.removesuffix(".dir")
        assert measured.fid == evaluate.published_fid(own, drawn.images, network)
        assert measured.images == str(own)
    assert measured.fid is not None
    assert (measured.fid.n, measured.fid.reference, measured.fid.dimensions) == (6, 80, 3)


def test_fid_is_told_with_what_it_rests_on(workspace: Workspace, network: Path, tmp_path: Path):
    folder = tmp_path / "celebrities"
    folder.mkdir()
    for i in range(7):
        Image.fromarray(np.full((20, 30, 3), 30 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    asked = ("shapes/I/full", "2", "--features", f"inception:{network}", "--images", str(folder), "--n", "5")
    fid = json.loads(ferry(workspace, *asked, "--json").stdout)["fid"]
    (line,) = [line for line in ferry(workspace, *asked).stdout.splitlines() if line.startswith("FID")]
    assert line == (
        f"FID       {fid['fid']:.2f}: 5 images drawn, 7 of {folder}, 3 dimensions of the network {fid['features_sha256']}"
    )
    assert fid["fid"] > 0


def refused(told: Result, says: str) -> None:
    assert (told.exit_code, told.stdout) == (3, ""), told.output
    assert told.stderr.startswith("ferry: ")
    assert says in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("shapes",), "'shapes' is not LINE/CONFIG/VARIANT"),
        (("tables/I/full",), "there is no line 'tables' in ferry.toml; there is shapes, empty"),
        (("shapes/I/full", "7"), "shapes/I/full has no version 7; there are 1, 2"),
        (("empty/I/full",), "empty/I/full has no champion; run `ferry retrain empty`"),
        (("empty/I/full", "1"), "empty/I/full has no version 1; there is none yet, so run `ferry retrain empty`"),
        (
            ("shapes/I/full", "--features", "vgg:FILE"),
            "--features cannot be 'vgg:FILE'; write inception:FILE, where FILE is a TorchScript file of Inception weights",
        ),
        (("shapes/I/full", "--features", "inception:"), "--features cannot be 'inception:'; write inception:FILE, where"),
        (("shapes/I/full", "--features", "network.pt"), "--features cannot be 'network.pt'; write inception:FILE, where"),
        (
            ("shapes/I/full", "--features", "inception:/nowhere/network.pt"),
            "there is no file /nowhere/network.pt; name a TorchScript file of Inception weights",
        ),
        (("shapes/I/full", "--n", "50"), "--images and --n say how FID is computed; add --features inception:FILE"),
        (("shapes/I/full", "--images", "."), "--images and --n say how FID is computed; add --features inception:FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_wish_is_one_sentence(workspace: Workspace, arguments: tuple[str, ...], says: str):
    refused(ferry(workspace, *arguments), says)


def test_what_cannot_be_compared_is_refused_before_anything_is_drawn(
    workspace: Workspace, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(evaluate, "draw", forbidden)
    (tmp_path / "text.pt").write_bytes(b"no network")
    asked = ("shapes/I/full", "--features")
    refused(ferry(workspace, *asked, f"inception:{tmp_path}/text.pt"), "text.pt is not a TorchScript file; save the network with")
    pictures = scripted(Map(), tmp_path / "map.pt")
    refused(ferry(workspace, *asked, f"inception:{pictures}"), "map.pt does not give finite features [B, d] for B images")
    nowhere = tmp_path / "nowhere"
    refused(
        ferry(workspace, *asked, f"inception:{network}", "--images", str(nowhere)),
        f"there is no folder {nowhere}; put the images there, or name another one with --images",
    )
    refused(
        ferry(workspace, "shapes/I/full", "2", "--features", f"inception:{network}"),
        "the version's data hold 1 files that cannot be used (for example, torn.png is not named in metadata.jsonl); name a folder "
        "of sound images with --images",
    )


def test_version_is_named_where_there_is_no_champion(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("registry.figures.champion_of", lambda *_: None)
    with pytest.raises(CatalogError, match=r"shapes/I/full has no champion; name one of its versions, 1, 2"):
        find(workspace, SUBJECT)


def test_network_file_may_hold_a_colon():
    assert network_file("inception:a:b.pt") == Path("a:b.pt")
    with pytest.raises(ConfigError, match="--features cannot be"):
        network_file("Inception:b.pt")

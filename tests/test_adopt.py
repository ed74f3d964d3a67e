"""Weights from elsewhere: each file that is refused with what it says, and what an adopted model leaves in the stores."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from flows.cli import app
from flows.demo import BASE
from flows.demo import SETTINGS as DEMO
from flows.setup import create
from flows.workspace import Workspace
from infra.base.train import OPTIONS
from model import photographs, versions
from model.adopt import MAX_FILE, MAX_HEADER, Found, adopt, check_tensors, look
from model.config import ModelConfig
from model.data import prepare
from model.errors import CheckpointError
from model.network import Network
from model.scorecard import Lineage
from model.train import LINEAGE, WEIGHTS, Checkpoint, load_checkpoint
from registry.catalog import Subject
from registry.champions import champion_of, seals
from tests.conftest import CONFIG, VERSION, write_images
from tests.test_flows import SETTINGS

SUBJECT = Subject(line="shapes", configuration="I", variant="full")
Tensors = dict[str, torch.Tensor]


def weights_of(config: ModelConfig = CONFIG, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return {name: tensor.detach().clone() for name, tensor in Network(config).state_dict().items()}


def written(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def taken(path: Path, config: ModelConfig = CONFIG, stored: str = "bfloat16") -> Checkpoint:
    return load_checkpoint(adopt(look(path), config, VERSION, stored, "a test", path.parent / "adopted"))  # type: ignore[arg-type]


def header(table: object) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_each_float_type_become_a_checkpoint(tmp_path: Path, kind: torch.dtype):
    given = {name: tensor.to(kind) for name, tensor in weights_of().items()}
    made = taken(written(tmp_path / "model.safetensors", given))
    for name, tensor in made.network().state_dict().items():
        assert torch.equal(tensor, given[name].float().to(torch.bfloat16).float())
    assert made.lineage.adopted
    assert (made.lineage.adopted.source, made.lineage.steps, made.lineage.items, made.lineage.parent) == ("a test", 0, 0, None)
    assert made.lineage.data == VERSION


def test_the_same_file_gives_the_same_checkpoint(tmp_path: Path):
    path = written(tmp_path / "model.safetensors", weights_of())
    first = taken(path)
    files = {name: (first.folder / name).read_bytes() for name in (WEIGHTS, LINEAGE)}
    second = taken(path)
    assert (second.lineage, second.weights_sha256) == (first.lineage, first.weights_sha256)
    assert files == {name: (second.folder / name).read_bytes() for name in (WEIGHTS, LINEAGE)}


def test_link_to_a_file_is_followed(tmp_path: Path):
    path = written(tmp_path / "blob", weights_of())
    (tmp_path / "model.safetensors").symlink_to(path)
    assert look(tmp_path / "model.safetensors").content == path.read_bytes()


def test_lineages_of_before_keep_their_hash(tmp_path: Path):
    made = taken(written(tmp_path / "model.safetensors", weights_of()))
    trained = made.lineage.model_copy(update={"adopted": None})
    assert "adopted" not in trained.model_dump(mode="json")
    assert Lineage.model_validate_json(trained.model_dump_json()) == trained


# What is no file of weights at all


def cut(path: Path) -> Path:
    path.write_bytes(save(weights_of())[:-100])
    return path


def bare(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def linked(path: Path) -> Path:
    path.symlink_to(path.with_name("gone"))
    return path


def piped(path: Path) -> Path:
    os.mkfifo(path)
    return path


def large(path: Path) -> Path:
    path.touch()
    os.truncate(path, MAX_FILE + 1)
    return path


def pickled(path: Path) -> Path:
    torch.save(weights_of(), path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


ROW = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NO_WEIGHTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p, "No such file"),
    "a dangling link": (linked, "No such file"),
    "a pipe": (piped, "not a regular file"),
    "a folder": (folder, "a folder without a lineage.json"),
    "a pickle under its own name": (lambda p: pickled(p.with_suffix(".pt")), "is a pickle"),
    "a pickle that is called safetensors": (pickled, "is a pickle"),
    "a bare pickle": (lambda p: bare(p, pickle.dumps({"a": 1})), "is a pickle"),
    "a pointer of Git LFS": (lambda p: bare(p, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "empty": (lambda p: bare(p, b""), "it has 0 bytes"),
    "too large": (large, "at most"),
    "truncated": (cut, "its header says"),
    "longer than its header says": (lambda p: bare(p, save(weights_of()) + b"x"), "its header says"),
    "a header of terabytes": (lambda p: bare(p, struct.pack("<Q", 1 << 42) + b"{}"), f"more than {MAX_HEADER}"),
    "a header that is cut off": (lambda p: bare(p, struct.pack("<Q", 500) + b"{}"), "ends within its header"),
    "a header that is no JSON": (lambda p: bare(p, header(b"not JSON")), "header cannot be read"),
    "a header of nested lists": (lambda p: bare(p, header(b"[" * 100_000)), "header cannot be read"),
    "a header that is a list": (lambda p: bare(p, header([1])), "no table of tensors"),
    "a name twice": (lambda p: bare(p, header(b'{"a":1,"a":1}')), "header cannot be read"),
    "no tensors": (lambda p: bare(p, header({"__metadata__": {}})), "holds no tensor"),
    "places that overlap": (lambda p: bare(p, header({"a": ROW, "b": ROW}) + b"0000"), "the place of b"),
    "a shape that does not fit": (lambda p: bare(p, header({"a": ROW | {"shape": [2]}}) + b"0000"), "the place of a"),
    "a shape below zero": (lambda p: bare(p, header({"a": ROW | {"shape": [-1]}}) + b"0000"), "header cannot be read"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, kind: str):
    make, says = NO_WEIGHTS[kind]
    with pytest.raises(CheckpointError) as refused:
        look(make(tmp_path / "model.safetensors"))
    assert says in str(refused.value)
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.float64, torch.bool])
def test_other_numbers_are_refused_by_name(tmp_path: Path, kind: torch.dtype):
    path = written(tmp_path / "model.safetensors", weights_of() | {"stem.bias": torch.zeros(32, dtype=kind)})
    with pytest.raises(CheckpointError, match=r"float32, float16 and bfloat16: stem\.bias \("):
        look(path)


def test_name_from_outside_is_printed_short_and_escaped(tmp_path: Path):
    path = written(tmp_path / "model.safetensors", {"\x1b[31m" + "x" * 500: torch.zeros(1, dtype=torch.int8)})
    with pytest.raises(CheckpointError) as refused:
        look(path)
    assert "\\x1b[31mxxx" in str(refused.value)
    assert len(str(refused.value)) < 400


# Weights of another network


def changed(update: Tensors, without: tuple[str, ...] = ()) -> Tensors:
    return {name: tensor for name, tensor in (weights_of() | update).items() if name not in without}


OTHER: dict[str, tuple[Tensors, str]] = {
    "a tensor is missing": (changed({}, ("head.bias",)), "missing: head.bias"),
    "several are missing": (changed({}, tuple(weights_of())[:5]), "missing: text, head_mod, stem.weight and 2 more"),
    "one too many": (changed({"optimizer": torch.zeros(1)}), "too many: optimizer"),
    "another shape": (changed({"stem.bias": torch.zeros(7)}), "of another shape: stem.bias [7], not [32]"),
    "turned over": (changed({"text": weights_of()["text"].T.contiguous()}), "of another shape: text [32, 257], not [257, 32]"),
    "another tier": (weights_of(CONFIG.model_copy(update={"tier": "nano"})), "it fits tier nano, configuration I, 1 channel"),
    "another configuration": (
        weights_of(CONFIG.model_copy(update={"configuration": "II"})),
        "it fits tier test, configuration II",
    ),
    "colour": (weights_of(CONFIG.model_copy(update={"channels": 3})), "it fits tier test, configuration I, 3 channels"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_weights_of_another_network_are_refused_with_what_differs(tmp_path: Path, kind: str):
    tensors, says = OTHER[kind]
    found = look(written(tmp_path / "model.safetensors", tensors))
    with pytest.raises(CheckpointError) as refused:
        check_tensors(found, CONFIG)
    assert says in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float):
    given = weights_of()
    given["pool.weight"][3, 1] = value
    with pytest.raises(CheckpointError, match=r"not finite: pool\.weight; adopt an earlier state"):
        taken(written(tmp_path / "model.safetensors", given))
    assert not (tmp_path / "adopted").exists()


def test_weights_too_large_for_what_devices_store_are_refused(tmp_path: Path):
    given = weights_of()
    given["pool.weight"][3, 1] = 1e30
    path = written(tmp_path / "model.safetensors", given)
    with pytest.raises(CheckpointError, match=r"not finite: pool\.weight once they are rounded to float16"):
        taken(path, stored="float16")
    assert taken(path, stored="bfloat16").lineage.adopted


# Checkpoints of ferry


def of_ferry(tmp_path: Path, **update: object) -> Path:
    """Write the folder of a checkpoint that ferry trained elsewhere."""
    made = taken(written(tmp_path / "model.safetensors", weights_of()))
    lineage = made.lineage.model_copy(update={"adopted": None, "steps": 300, **update})
    (made.folder / LINEAGE).write_text(lineage.model_dump_json())
    return made.folder


def test_folder_of_ferry_says_where_it_comes_from(tmp_path: Path):
    found = look(of_ferry(tmp_path))
    assert found.source == "a checkpoint of shapes, data 000000000000, 300 steps"
    check_tensors(found, CONFIG)


def test_checkpoint_of_other_settings_is_refused_although_its_tensors_fit(tmp_path: Path):
    found = look(of_ferry(tmp_path))
    other = CONFIG.model_copy(update={"image_size": 32, "text_length": 12})
    assert Found(found.path, found.content, found.shapes, None)
    with pytest.raises(CheckpointError, match=r"\(image_size 16, here 32, text_length 8, here 12\)"):
        check_tensors(found, other)


def test_student_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="of the variant fast; adopt the one of full"):
        check_tensors(look(of_ferry(tmp_path, variant="fast")), CONFIG)


def test_lineage_of_another_ferry_is_refused(tmp_path: Path):
    place = of_ferry(tmp_path)
    (place / LINEAGE).write_text('{"schema_version": 9}')
    with pytest.raises(CheckpointError, match=r"not a lineage that this version knows; name the weights\.safetensors"):
        look(place)


# In a workspace; these tests build on each other


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    made = create(tmp_path_factory.mktemp("adopt") / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes", 120)
    versions.add(made.root, "data/shapes", "shapes", "first")
    yield made
    made.ledger.close()
    made.fleet.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    """Provide weights that were trained on other data than the workspace's."""
    return written(tmp_path_factory.mktemp("elsewhere") / "cluster.safetensors", checkpoint.network().state_dict())


def ferry(workspace: Workspace, *words: str) -> Result:
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), *words])


def test_refused_file_leaves_nothing(workspace: Workspace, tmp_path: Path):
    given = weights_of()
    given["text"][0, 0] = float("nan")
    for path, code in ((pickled(tmp_path / "a.pt"), 3), (written(tmp_path / "b.safetensors", given), 3)):
        told = ferry(workspace, "adopt", str(path), "--line", "shapes")
        assert told.exit_code == code, told.output
        assert told.exception is None or isinstance(told.exception, SystemExit)
    told = ferry(workspace, "adopt", str(path), "--line", "shapes", "--configuration", "II")
    assert "no class of this line runs configuration II; choose I" in told.output
    told = ferry(workspace, "adopt", str(path), "--line", "shapes", "--from", "two\nlines")
    assert told.exit_code == 3, told.output
    assert workspace.ledger.entries() == []
    assert workspace.catalog.versions(SUBJECT) == []


def test_weights_that_draw_nothing_finite_are_said_in_one_sentence(workspace: Workspace, tmp_path: Path):
    given = weights_of()
    first = next(iter(given))
    given[first] = given[first] * 5e36
    assert given[first].isfinite().all()
    told = ferry(workspace, "adopt", str(written(tmp_path / "huge.safetensors", given)), "--line", "shapes")
    assert told.exit_code == 3, told.output
    assert told.stderr.splitlines()[-1] == (
        "ferry: shapes/I/full draws images that are not finite; nothing is registered; adopt weights that draw"
    )
    assert "Traceback" not in told.output
    assert workspace.ledger.entries() == []
    assert workspace.catalog.versions(SUBJECT) == []


def test_adopted_model_is_judged_and_becomes_champion(workspace: Workspace, trained: Path):
    told = ferry(workspace, "adopt", str(trained), "--line", "shapes", "--from", "the cluster, run 7", "--json")
    assert told.exit_code == 0, told.output
    row = json.loads(told.stdout)["models"][0]
    assert (row["version"], row["outcome"], row["promoted"]) == (1, "promote", True)
    champion = champion_of(workspace, SUBJECT)
    assert champion
    assert champion.adopted
    assert champion.adopted.source == "the cluster, run 7"


def test_trace_and_mlflow_say_where_it_comes_from(workspace: Workspace, trained: Path):
    champion = champion_of(workspace, SUBJECT)
    assert champion
    assert champion.adopted
    traced = ferry(workspace, "trace", champion.adopted.file_sha256)
    assert "adopted from the cluster, run 7" in traced.output
    assert "data shapes" not in traced.output  # it does not descend from data that it was only judged on
    version = workspace.catalog.version(SUBJECT, 1)
    assert version.tags["adopted.from"] == "the cluster, run 7"
    inputs = workspace.catalog.client.get_run(version.run_id).inputs.dataset_inputs
    assert [tag.value for row in inputs for tag in row.tags] == ["evaluation"]
    forward = ferry(workspace, "trace", "--forward", champion.data_rev)
    assert "0 model versions" in forward.output
    assert "no model of shapes was trained on its newest data" in ferry(workspace, "status").output
    assert ferry(workspace, "report").exit_code == 0
    assert "adopted from the cluster, run 7" in (workspace.root / "report.html").read_text()


def test_second_adoption_is_nothing_new(workspace: Workspace, trained: Path):
    entries = len(workspace.ledger.entries())
    told = ferry(workspace, "adopt", str(trained), "--line", "shapes", "--from", "said otherwise", "--json")
    assert told.exit_code == 0, told.output
    row = json.loads(told.stdout)["models"][0]
    assert (row["version"], row["outcome"]) == (1, "unchanged")
    assert len(workspace.ledger.entries()) == entries
    assert [v.number for v in workspace.catalog.versions(SUBJECT)] == [1]


def test_untrained_weights_do_not_replace_the_champion(workspace: Workspace, tmp_path: Path):
    path = written(tmp_path / "untrained.safetensors", weights_of(seed=3))
    told = ferry(workspace, "adopt", str(path), "--line", "shapes", "--json")
    assert told.exit_code == 5, told.output
    assert json.loads(told.stdout)["models"][0]["outcome"] == "refuse"
    again = ferry(workspace, "adopt", str(path), "--line", "shapes", "--json")
    assert (json.loads(again.stdout)["models"][0]["version"], json.loads(again.stdout)["models"][0]["outcome"]) == (
        2,
        "unchanged",
    )
    champion = champion_of(workspace, SUBJECT)
    assert champion
    assert champion.version == 1


def test_next_retraining_starts_from_the_adopted_champion(workspace: Workspace):
    told = ferry(workspace, "retrain", "shapes", "--steps", "20", "--json")
    assert told.exit_code in (0, 5), told.output
    assert json.loads(told.stdout)["models"][0]["version"] == 3
    first, last = seals(workspace, SUBJECT)[0], seals(workspace, SUBJECT)[-1]
    assert (last.parent, last.adopted) == (first.checkpoint, None)


# The demo's base


def test_base_of_the_demo_is_that_of_its_recipe_and_fits():
    recipe = json.loads(BASE.with_suffix(".json").read_bytes())
    found = look(BASE)
    assert (recipe["sha256"], recipe["bytes"]) == (found.sha256, len(found.content))
    assert len(found.content) <= 8_000_000
    line = tomllib.loads(DEMO)["lines"]["surfaces"]
    shape = {name: line[name] for name in ("tier", "image_size", "channels", "text_length")}
    check_tensors(found, ModelConfig(configuration="I", **shape))
    assert recipe["config"] == ModelConfig(configuration="I", **shape).model_dump()
    assert recipe["options"] == OPTIONS.model_dump()


def test_base_is_trained_on_no_tile_that_the_demo_holds_out(tmp_path: Path):
    config = ModelConfig(tier="nano", image_size=16, text_length=20)
    kinds = []
    for patches in (20, 30):
        photographs.surfaces(tmp_path / str(patches), 1, patches)
        kinds.append(prepare(tmp_path / str(patches), config, tmp_path / "cache"))
    small, many = kinds
    held_out = {small.groups[i] for i in small.reference()}
    assert held_out
    assert not held_out & {many.groups[i] for i in many.training()}

"""Input that cannot be used to train, judge or draw: one sentence names it and says what to do next.

These are the sentences that a person meets; `test_data.py` and `test_train.py` try every kind of damage.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from flows import cli
from flows.errors import WorkspaceError
from flows.settings import SETTINGS
from flows.workspace import Workspace
from model import features
from model.config import MAX_TEXT, ModelConfig
from model.data import METADATA, caption_ids, is_held_out, prepare
from model.errors import CheckpointError, DataError
from model.network import Network
from model.train import LINEAGE, WEIGHTS, Checkpoint, load_checkpoint, load_weights, write_safely
from registry.catalog import Subject
from registry.errors import CatalogError

from .conftest import CONFIG, agent, write_images

TRAINING_GROUP = next(name for name in map(str, range(100)) if not is_held_out(name))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace with an empty data folder; each test copies it."""
    root = tmp_path_factory.mktemp("bad") / "ws"
    assert CliRunner().invoke(cli.app, ["init", str(root), "--line", "shapes"]).exit_code == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ws", symlinks=True))


def ferry(root: Path, *arguments: str, code: int = 3) -> str:
    """Run `ferry`, check its exit code, and return what it prints on stderr."""
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), *arguments])
    assert told.exit_code == code, told.output
    assert code == 0 or told.stdout == ""
    return told.stderr


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    """Check that a call raises this error with a message of one line, and return the message."""
    with pytest.raises(error) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def setting(root: Path, old: str, new: str) -> str:
    """Change ferry.toml, and return the error of opening the workspace, without the path of the file."""
    path = root / SETTINGS
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    return refused(WorkspaceError, lambda: Workspace(root)).removeprefix(f"{path}: ")


def test_unknown_tier(root: Path) -> None:
    with pytest.raises(ValidationError, match=r"tier\n  Input should be 'test', 'nano', 'small' or 'base'"):
        ModelConfig.model_validate({"tier": "giant"})
    assert setting(root, 'tier = "nano"', 'tier = "giant"') == (
        "lines.shapes.tier: it must be 'test', 'nano', 'small' or 'base', not 'giant'"
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("images = 256", "images = 10000000000", "it must be at most 100000, not 10000000000"),
        ("minimum_images = 96", "minimum_images = 999999999", "it must be at most 100000, not 999999999"),
        ("alpha = 0.05", "alpha = 1e-300", "it must be at least 1e-06, not 1e-300"),
        ("captions = true", 'captions = "no"', "it must be true or false, not 'no'"),
        ("captions = true", "captions = 0", "it must be true or false, not 0"),
    ],
)
def test_keys_of_the_gate_without_sense_are_refused_before_any_training(root: Path, old: str, new: str, says: str) -> None:
    assert setting(root, f"\n{old} ", f"\n{new} ") == f"lines.shapes.gate.{old.split(maxsplit=1)[0]}: {says}"


@pytest.mark.parametrize(
    ("key", "successor"),
    [
        ("margin = 0.1", "tolerance (a share of the champion's own distance; 0.5 unless given)"),
        ("decay = 0.2", "total_tolerance (how many such losses in all; 2.0 unless given)"),
    ],
)
def test_keys_of_an_older_gate_are_refused_with_their_successors(root: Path, key: str, successor: str) -> None:
    assert setting(root, "tolerance_bands = 1.5", f"{key}\ntolerance_bands = 1.5") == (
        f"lines.shapes.gate: {key.split(maxsplit=1)[0]} was a share of pure noise's distance and is no more; remove it, its successor is {successor}"
    )


NO_DATA_FOLDERS = {
    "is no folder below the workspace; name one, such as data/surfaces": [
        "", ".", "./", "/", "..", "../x", "data/../../x", "data/..", "/data/shapes", "//data", "s3://bucket/x", "file:///data",
    ],
    "is where other things are kept; name a folder of its own, such as data/surfaces": [
        "keys", "Keys/online", "./keys", "keys/", "repository", "repository/targets", "work", "WORK/data", "dvc-remote", "published/x", "inbox",
        "events", "ratings", "features", "mlartifacts", "ferry.db", "ferry.toml", "root.json", ".git", ".git/hooks", ".dvc/cache", "data/.git/x",
        "data/.DVC", ".hg",
    ],
    "is a name that DVC reads otherwise, or too long; use letters, digits, '-' and '_', as in data/surfaces": [
        "data/*", "data/a?", "[ab]", "data/x.dvc", "data/a\\nb", "data/\\u001b[31m", "data/\\u202ex", "x" * 201, "data/" + "ä" * 101,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("value", "says"), [(value, says) for says, values in NO_DATA_FOLDERS.items() for value in values])
def test_data_folder_elsewhere(root: Path, value: str, says: str) -> None:
    """Refuse a data folder where keys, the repository or other people's files lie; read and write nothing there."""
    there = sorted(root.parent.rglob("*"))
    asked = setting(root, 'data = "data/shapes"', f'data = "{value}"')
    assert asked.startswith("lines.shapes.data: '")
    assert asked.endswith(f"' {says}")
    assert asked.isprintable()
    assert sorted(root.parent.rglob("*")) == there


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("data/shapes", None), ("images", None), ("data", None), ("pictures", None), ("devices/x", None), ("Füße/ä b", None), ("-x", None), ("~x", None),
        ("a:b", None), ("keys-of-pianos", None), ("data/keys", None), ("...", None), ("x" * 200, None), ("./images", "images"), ("images/", "images"),
        ("data//./shapes", "data/shapes"),
    ],
)  # fmt: skip
def test_data_folder_of_its_own(root: Path, value: str, kept: str | None) -> None:
    path = root / SETTINGS
    path.write_text(path.read_text().replace('"data/shapes"', f'"{value}"'))
    assert Workspace(root).line("shapes").data == kept or value


@pytest.mark.parametrize(
    ("store", "data"),
    [
        ('data = "dvc-remote"', "images"), ('data = "dvc-remote"', "images/shapes"), ('publish = "published"', "images"),
        ('reports = "inbox"', "./images/"),
    ],
)  # fmt: skip
def test_data_folder_and_a_store_in_one(root: Path, store: str, data: str) -> None:
    path = root / SETTINGS
    path.write_text(path.read_text().replace('data = "data/shapes"', 'data = "images"'))
    asked = setting(root, store, f'{store.partition(" ")[0]} = "{data}"')
    assert "lines.shapes.data and one of the stores share a folder; give each its own" in asked


def test_unknown_variant(root: Path) -> None:
    assert refused(CatalogError, lambda: Subject.parse("shapes/I/slow")) == (
        "'shapes/I/slow' is not LINE/CONFIG/VARIANT; write it as shapes/I/full, with configuration I or II and variant full, dev, fast or turbo"
    )
    for command in (("promote", "shapes/I/slow", "1"), ("evaluate", "shapes/I/slow")):
        assert "and variant full, dev, fast or turbo" in ferry(root, *command)
    asked = setting(root, 'configuration = "I" ', 'variants = ["slow"]\nconfiguration = "I" ')
    assert asked.startswith("lines.shapes.classes.edge.variants.0: it must be 'full'")


def test_unknown_variant_on_device(tmp_path: Path) -> None:
    told = agent("generate", "bar", "--variant", "slow", "--dir", str(tmp_path))
    assert (told.exit_code, told.stdout) == (3, "")
    assert told.stderr == "ferry-agent: there is no variant 'slow'; choose full, dev, fast or turbo\n"


def test_image_size_not_divisible_by_the_stride(root: Path) -> None:
    sentence = "image size 17 is not divisible by the stride 2 of configuration I; choose a multiple of 2"
    with pytest.raises(ValidationError, match=f"\n  {sentence} "):
        ModelConfig(configuration="I", image_size=17)
    assert ModelConfig(configuration="II", image_size=17).tokens == 289
    assert setting(root, "image_size = 16", "image_size = 17").endswith(f": {sentence}")


@pytest.mark.parametrize(
    ("text", "length", "says"),
    [
        (
            "ä" * 5,
            8,
            "the caption 'äääää' has 10 bytes but this model reads 8; shorten it or train a model with text_length = 10",
        ),
        (
            "ä" * 128 + "b",
            8,
            f"the caption '{'ä' * 40}' has 257 bytes but this model reads 8; shorten it",
        ),  # no network reads 257 bytes
        ("b" * 257, MAX_TEXT, f"the caption '{'b' * 40}' has 257 bytes but this model reads 256; shorten it"),
    ],
)
def test_caption_too_long(text: str, length: int, says: str) -> None:
    assert refused(DataError, lambda: caption_ids(text, length)) == says
    assert len(caption_ids(text[:4], length)) == length


def test_caption_too_long_in_data(root: Path) -> None:
    folder = write_images(root / "data/shapes", 3)
    with (folder / METADATA).open("w") as file:
        file.writelines(json.dumps({"file_name": f"00{i}.png", "text": "bars " * 5}) + "\n" for i in range(3))
    assert ferry(root, "data", "add", "shapes") == (
        "ferry: no image in data/shapes can be used; for example, 000.png the caption 'bars bars bars bars bars ' has 25 bytes but this "
        "model reads 24; shorten it or train a model with text_length = 25\n"
    )


def latin(folder: Path) -> Path:
    """Add a Latin-1 line to a caption file, as an old editor writes it; the other lines are plain ASCII."""
    with (folder / METADATA).open("ab") as file:
        file.write('{"file_name": "bär.png", "text": "bär"}\n'.encode("latin-1"))
    return folder


def test_caption_not_utf8_in_data(root: Path) -> None:
    latin(write_images(root / "data/shapes", 3))
    told = ferry(root, "data", "add", "shapes", code=0)
    assert told.splitlines()[0] == "metadata.jsonl:4 is not UTF-8; save the file in that encoding"


def test_caption_file_not_utf8_at_all(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    latin(tmp_path / "data")
    assert refused(DataError, lambda: prepare(tmp_path / "data", CONFIG, tmp_path / "cache")) == (
        f'{tmp_path}/data/metadata.jsonl names no usable image; write one line {{"file_name": ..., "text": ...}} for each image; the first '
        "that cannot be used: metadata.jsonl:1 is not UTF-8; save the file in that encoding"
    )


def test_caption_not_utf8_on_device(made: Path, tmp_path: Path) -> None:
    """Pass the caption as a terminal with another encoding does: as bytes, to a process of its own."""
    anchor, where = made / "root.json", ["--dir", str(tmp_path / "device")]
    words = [
        "init", "--device", "press-01", "--line", "shapes", "--class", "edge", "--repository", str(tmp_path), "--root", str(anchor),
        "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(), *where,
    ]  # fmt: skip
    assert agent(*words).exit_code == 0
    told = subprocess.run([sys.executable, "-m", "ota.agent.cli", "generate", b"b\xe4r", *where], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (3, "")
    assert told.stderr == "ferry-agent: the caption is not valid UTF-8; type it again, or set the terminal to UTF-8\n"
    assert not (tmp_path / "image.png").exists()


def test_empty_data_set(root: Path) -> None:
    one_line = 'write one line {"file_name": ..., "text": ...} for each image'
    assert ferry(root, "data", "add", "shapes") == f"ferry: {root}/data/shapes has no metadata.jsonl; {one_line}\n"
    (root / "data/shapes" / METADATA).write_text("")
    assert ferry(root, "data", "add", "shapes") == (
        f"ferry: {root}/data/shapes/metadata.jsonl names no usable image; {one_line}\n"
    )


def test_one_image_data_set(root: Path, tmp_path: Path) -> None:
    folder = write_images(root / "data/shapes", 1)
    (folder / METADATA).write_text(json.dumps({"file_name": "000.png", "text": "bar", "group": TRAINING_GROUP}))
    assert ferry(root, "data", "add", "shapes", code=0) == (
        "only 0 images are held out for evaluation, but the gate of shapes wants 96: add more images (or groups), or lower "
        "gate.minimum_images in ferry.toml, which makes decisions less certain\n"
    )
    assert refused(DataError, lambda: prepare(folder, CONFIG, tmp_path / "cache")) == (
        f"{folder} has 1 usable training images, but at least 2 are needed; add more images"
    )


def with_weights(checkpoint: Checkpoint, folder: Path, content: bytes) -> Path:
    """Copy a checkpoint's folder, and replace its weights by other bytes."""
    shutil.copytree(checkpoint.folder, folder)
    (folder / WEIGHTS).write_bytes(content)
    return folder


def not_a_checkpoint(folder: Path) -> str:
    return f"{folder} is not a checkpoint of this version, or is damaged; name a folder that `train` wrote"


@pytest.mark.parametrize("keep", [1, 8, 100, 0.5, 0.999])
def test_truncated_checkpoint(checkpoint: Checkpoint, tmp_path: Path, keep: float) -> None:
    whole = (checkpoint.folder / WEIGHTS).read_bytes()
    cut = whole[: keep if isinstance(keep, int) else int(keep * len(whole))]
    folder = with_weights(checkpoint, tmp_path / "run", cut)
    assert refused(CheckpointError, lambda: load_checkpoint(folder)) == not_a_checkpoint(folder)
    assert refused(CheckpointError, lambda: load_weights(Network(CONFIG), folder / WEIGHTS)) == (
        f"{folder / WEIGHTS} cannot be read as safetensors; it is damaged or truncated, so fetch it again"
    )


@pytest.mark.parametrize(
    ("field", "value"), [("md5", "/etc"), ("md5", "../../keys"), ("path", "../../keys"), ("rev", "--all"), ("line", "../x")]
)
def test_foreign_checkpoint_whose_data_lead_elsewhere(checkpoint: Checkpoint, tmp_path: Path, field: str, value: str) -> None:
    """Refuse a lineage with a path in place of a hash: pulled data are found by it, so any folder could pass for data."""
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "run"))
    lineage = json.loads((folder / LINEAGE).read_bytes())
    lineage["data"][field] = value
    (folder / LINEAGE).write_text(json.dumps(lineage))
    assert refused(CheckpointError, lambda: load_checkpoint(folder)) == not_a_checkpoint(folder)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("saved", ["pickle", "torch"])
def test_foreign_checkpoint_of_a_pickle(checkpoint: Checkpoint, tmp_path: Path, saved: str) -> None:
    """Refuse a pickle without running the code in it."""
    trap = Trap(tmp_path / "sprung")
    if saved == "pickle":
        (tmp_path / "network.pt").write_bytes(pickle.dumps(trap))
    else:
        torch.save({"head.weight": torch.zeros(3), "trap": trap}, tmp_path / "network.pt")
    folder = with_weights(checkpoint, tmp_path / "run", (tmp_path / "network.pt").read_bytes())
    assert refused(CheckpointError, lambda: load_checkpoint(folder)) == not_a_checkpoint(folder)
    assert not trap.path.exists()


@pytest.mark.parametrize("seed", range(4))
def test_foreign_checkpoint_of_random_bytes(checkpoint: Checkpoint, tmp_path: Path, seed: int) -> None:
    folder = with_weights(checkpoint, tmp_path / "run", np.random.default_rng(seed).bytes(5000))
    assert refused(CheckpointError, lambda: load_checkpoint(folder)) == not_a_checkpoint(folder)


@pytest.mark.parametrize("other", ["another tier", "no network"])
def test_foreign_checkpoint_of_another_network(checkpoint: Checkpoint, tmp_path: Path, other: str) -> None:
    """Refuse a sound safetensors file that lies beside the lineage of another network."""
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "run"))
    network = Network(CONFIG.model_copy(update={"tier": "nano"}))
    write_safely(folder / WEIGHTS, network.state_dict() if other == "another tier" else {"weight": torch.zeros(3)})
    assert refused(CheckpointError, load_checkpoint(folder).network) == (
        f"{folder / WEIGHTS} holds the weights of another network than test/I at 16 pixels; use the configuration it was trained with"
    )


def test_foreign_feature_spaces(checkpoint: Checkpoint) -> None:
    weights = checkpoint.folder / WEIGHTS  # a sound safetensors file, of something else
    assert refused(CheckpointError, lambda: features.load(weights)) == (
        f"{weights} holds no feature spaces; restore it from a backup, because past figures depend on it"
    )

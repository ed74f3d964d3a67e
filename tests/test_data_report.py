"""The report on new data: it names copies and leaks, and it reports drift by mistake no more often than it promises."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flows import cli
from model import data_report, versions
from model.data import METADATA, is_held_out, scan
from model.data_report import ALPHA, MIN_GROUPS, FolderSummary, drift

from .conftest import write_images

RUNS = 400
TRAINING, HELD_OUT = (next(name for name in map(str, range(100)) if is_held_out(name) == side) for side in (False, True))


def made_up(features: np.ndarray, captions: Iterable[str], groups: list[str], tag: str) -> FolderSummary:
    """Make up the summary of a folder of images that do not exist."""
    n = len(features)
    names = [f"{tag}{i}" for i in range(n)]
    held_out = np.array([is_held_out(group) for group in groups])
    return FolderSummary(
        files={}, quarantine={}, names=names, captions=list(captions), groups=groups, held_out=held_out, pixels=names,
        thumbs=np.zeros((n, 4), dtype=np.float32), features=features.astype(np.float32),
    )  # fmt: skip


def delivery(
    rng: np.random.Generator, tag: str, groups: int, of: int = 1, shift: float = 0.0, bars: float = 0.5
) -> FolderSummary:
    """Make up `groups` photographs with `of` crops each; crops of one photograph look alike and show the same thing."""
    centres = np.repeat(rng.normal(shift, 1, (groups, 13)), of, axis=0)
    captions = np.repeat(np.where(rng.random(groups) < bars, "bar", "disc"), of)
    names = [f"{tag}-{i // of}" for i in range(groups * of)]
    return made_up(centres + rng.normal(0, 0.1, centres.shape), captions, names, tag)


@pytest.mark.slow
@pytest.mark.parametrize("crops", [1, 5])
def test_false_alarms_are_as_rare_as_promised(crops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the rate of false alarms, also where several crops of an image are no independent evidence."""
    monkeypatch.setattr(data_report, "PERMUTATIONS", 199)
    rng = np.random.default_rng(crops)
    found = [drift(delivery(rng, "new", 15, crops), delivery(rng, "old", 30, crops)) for _ in range(RUNS)]
    three_sd = 3 * (ALPHA * (1 - ALPHA) / RUNS) ** 0.5
    assert 0 < np.mean([d.verdict == "drift" for d in found]) <= ALPHA + three_sd
    for p in ([d.p_images for d in found], [d.p_captions for d in found]):
        assert np.mean(np.array(p) <= ALPHA) <= ALPHA + three_sd
        assert 0.4 < np.mean(p) < 0.65  # the p-values are neither too high nor too low


@pytest.mark.parametrize(("change", "which"), [({"shift": 0.6}, "looks"), ({"bars": 0.95}, "mix of captions")])
def test_drift_is_seen_and_named(change: dict[str, float], which: str) -> None:
    rng = np.random.default_rng(0)
    found = [drift(delivery(rng, "new", 40, **change), delivery(rng, "old", 60)) for _ in range(10)]
    assert np.mean([d.verdict == "drift" for d in found]) >= 0.9
    assert np.mean([f"in {which} (p = " in d.reason for d in found]) >= 0.8


def look(folder: Path) -> FolderSummary:
    return scan(folder, 24)


def test_dim_images_are_drift(tmp_path: Path) -> None:
    before = look(write_images(tmp_path / "old", 60))
    same = look(write_images(tmp_path / "same", 60, seed=1))
    dim = look(write_images(tmp_path / "dim", 60, seed=1, dim=True))
    rename = {name: f"new {name}" for name in same.groups}
    same.groups[:] = [rename[name] for name in same.groups]
    assert drift(same, before).verdict == "no drift seen"
    found = drift(dim, before)
    assert (found.verdict, found.p_images, found.p_captions) == ("drift", 0.001, 0.001)
    assert found.shifts["brightness"] < -1


def test_same_data_give_same_verdict() -> None:
    old, new = (delivery(np.random.default_rng(i), str(i), 30) for i in range(2))
    assert drift(new, old) == drift(new, old)


def test_too_few_images_are_not_judged() -> None:
    rng = np.random.default_rng(0)
    few, many = delivery(rng, "few", MIN_GROUPS - 1, 50, shift=9), delivery(rng, "many", 40)
    for found in (drift(few, many), drift(many, few)):
        assert (found.verdict, found.p_images, found.p_captions) == ("too few images", None, None)
        assert f"{MIN_GROUPS} on either side are needed" in found.reason
    assert drift(many, few).new == 40


def test_images_of_known_groups_are_no_evidence() -> None:
    """Leave out new crops of old photographs: all have one look, but they say nothing about what comes in."""
    rng = np.random.default_rng(0)
    old = delivery(rng, "old", 40)
    more = made_up(np.full((60, 13), 9.0), ["bar"] * 60, [old.groups[i % 40] for i in range(60)], "more")
    found = drift(more, old)
    assert (found.verdict, found.new, found.left_out) == ("too few images", 60, 60)


def test_old_images_are_not_new() -> None:
    old = delivery(np.random.default_rng(0), "old", 40)
    assert drift(old, old).verdict == "nothing new"


def test_captions_that_never_repeat_have_no_mix() -> None:
    rng = np.random.default_rng(0)
    old, new = (
        made_up(rng.normal(size=(40, 13)), [f"{t} {i}" for i in range(40)], [f"{t}{i}" for i in range(40)], t) for t in "ab"
    )
    found = drift(new, old)
    assert (found.p_captions, found.mix, found.verdict) == (None, None, "no drift seen")


def picture(seed: int) -> Image.Image:
    """Make a grey picture of noise that is as smooth as a photograph."""
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8))
    return noise.resize((96, 96), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


def noisy(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) + np.random.default_rng(9).normal(0, 4, (96, 96))).clip(0, 255).astype(np.uint8))


def folder_of(folder: Path, *rows: tuple[Image.Image, str, str]) -> Path:
    """Write images with caption and group into a folder, named 0.png, 1.png, …"""
    folder.mkdir()
    for i, (image, _, _) in enumerate(rows):
        image.save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text, "group": group}) for i, (_, text, group) in enumerate(rows)]
    (folder / METADATA).write_text("\n".join(lines))
    return folder


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "recompressed": recompressed,
    "smaller": lambda image: image.resize((48, 48), Image.Resampling.BOX),
    "brighter": lambda image: image.point([min(255, round(v * 0.9 + 25)) for v in range(256)]),
    "noisier": noisy,
}


@pytest.mark.parametrize("how", list(CHANGES))
def test_near_copy_across_the_split_is_a_leak(tmp_path: Path, how: str) -> None:
    rows = [(picture(i), "bar", TRAINING) for i in range(6)]
    folder = folder_of(tmp_path / "x", *rows, (CHANGES[how](picture(3)), "bar", HELD_OUT), (picture(8), "bar", HELD_OUT))
    found = data_report.duplicates(look(folder))
    assert (found.copies.n, found.near.n, found.leaks.n) == (0, 1, 1)
    assert found.near.first == [("3.png", "6.png")]
    assert found.leaks.first == [("6.png", "3.png")]  # the held-out one first


@pytest.mark.parametrize("side", [TRAINING, HELD_OUT])
def test_near_copy_on_one_side_is_no_leak(tmp_path: Path, side: str) -> None:
    folder = folder_of(tmp_path / "x", (picture(0), "bar", side), (noisy(picture(0)), "bar", side), (picture(1), "bar", TRAINING))
    found = data_report.duplicates(look(folder))
    assert (found.near.n, found.leaks.n) == (1, 0)


def test_copies_in_other_formats_are_copies(tmp_path: Path) -> None:
    rows = [(picture(0), "bar", TRAINING), (picture(0).convert("RGB"), "disc", HELD_OUT), (picture(1), "bar", HELD_OUT)]
    found = data_report.duplicates(look(folder_of(tmp_path / "x", *rows)))
    assert found.copies.first == found.contradictions.first == [("0.png", "1.png")]
    assert (found.copies.n, found.near.n) == (1, 0)
    assert found.leaks.first == [("1.png", "0.png")]


def test_plain_images_are_not_taken_for_each_other(tmp_path: Path) -> None:
    rows = [(Image.new("L", (32, 32), level), "bar", TRAINING) for level in (0, 90, 91, 255)]
    found = data_report.duplicates(look(folder_of(tmp_path / "x", *rows)))
    assert (found.copies.n, found.near.n) == (0, 0)


def test_near_copies_are_found_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the same near copies wherever the blocks of the comparison end."""
    rng = np.random.default_rng(0)
    thumbs = rng.normal(size=(700, 256)).astype(np.float32)
    thumbs[[650, 699]] = thumbs[[3, 600]]
    thumbs /= np.linalg.norm(thumbs, axis=1, keepdims=True)
    held_out = np.zeros(700, dtype=np.bool_)
    held_out[650] = True
    for rows in (512, 7):
        assert data_report._near(thumbs, held_out, rows) == ({3: 650, 650: 3, 600: 699, 699: 600}, {650: 3})


def test_balance_names_new_gone_and_thin_captions() -> None:
    groups = [HELD_OUT, HELD_OUT, TRAINING, TRAINING, HELD_OUT]
    before = made_up(np.zeros((2, 13)), ["bar", "ring"], [TRAINING] * 2, "a")
    after = made_up(np.zeros((5, 13)), ["bar", "bar", "bar", "disc", "disc"], groups, "b")
    found = data_report.balance(after, before)
    assert found.counts == {"bar": (1, 2), "disc": (1, 1)}
    assert [row.first for row in (found.new, found.gone, found.thin)] == [[("disc",)], [("ring",)], [("disc",)]]
    assert 0.9 < found.evenness < 1


def test_sketch_comes_back_as_it_was(tmp_path: Path) -> None:
    one = look(write_images(tmp_path / "x", 4))
    one.save(tmp_path / "deep" / "a.npz")
    again = FolderSummary.load(tmp_path / "deep" / "a.npz")
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(again, name)) if isinstance(value, np.ndarray) else value == getattr(again, name)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]


# The commands


def ferry(root: Path, *words: str, code: int = 0) -> dict:
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", *words, "--json"])
    assert told.exit_code == code, told.output
    return json.loads(told.stdout) if code == 0 else {"says": told.stderr}


def text(root: Path, *words: str) -> str:
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", *words])
    assert told.exit_code == 0, told.output
    return told.stdout


@pytest.fixture(scope="module")
def two_revisions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace in which dim images, a torn one and a wrong caption arrived after 40 good images."""
    root = tmp_path_factory.mktemp("data") / "ws"
    assert CliRunner().invoke(cli.app, ["init", str(root), "--line", "shapes"]).exit_code == 0
    folder = write_images(root / "data/shapes", 40)
    ferry(root, "add", "shapes", "-m", "first")
    write_images(folder, 30, seed=1, dim=True)
    rows = [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]
    rows[0]["text"] = "ring"
    rows.append({"file_name": "torn.png", "text": "bar"})
    (folder / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "torn.png").write_bytes(b"not an image")
    (folder / "039.png").unlink()
    ferry(root, "add", "shapes", "-m", "dim ones")
    return root


@pytest.fixture
def root(two_revisions: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_revisions, tmp_path / "ws", symlinks=True))


def test_status_shows_what_was_recorded(two_revisions: Path) -> None:
    told = ferry(two_revisions, "status", "shapes")
    (second, first) = ferry(two_revisions, "log", "shapes")["revisions"]
    assert (told["dirty"], told["remote_lacks"], told["revision"]["rev"]) == (False, [], second["rev"])
    assert told["arrival"]["quarantine"] == {"039.png": "is missing", "torn.png": "cannot be decoded"}
    assert told["arrival"]["changes"] == {"added": 31, "changed": 1, "removed": 1, "recaptioned": 1}
    assert told["arrival"]["previous"]["rev"] == first["rev"]
    assert told["arrival"]["drift"] == second["drift"]
    assert (second["drift"]["verdict"], first["drift"]) == ("drift", None)
    assert "drift, p = 0.001" in text(two_revisions, "log", "shapes").splitlines()[0]


def test_quarantined_file_stays_where_it_was(two_revisions: Path) -> None:
    assert (two_revisions / "data/shapes/torn.png").read_bytes() == b"not an image"
    assert "quarantined: torn.png cannot be decoded" in text(two_revisions, "status", "shapes")


def test_diff_names_files_captions_and_drift(root: Path) -> None:
    shutil.rmtree(root / "work" / "sketches")  # as on a machine that has only pulled the repository
    told = ferry(root, "diff", "shapes", "HEAD~1")
    changes = told["changes"]
    assert (changes["changed"], changes["removed"]) == (["metadata.jsonl"], ["039.png"])
    assert len(changes["added"]) == 31
    assert changes["recaptioned"] == [["000.png", "bar", "ring"]]
    assert told["captions"] == {"bar": [20, 19], "dim bar": [0, 15], "dim disc": [0, 15], "disc": [20, 19], "ring": [0, 1]}
    assert told["drift"] == ferry(root, "status", "shapes")["arrival"]["drift"]
    backwards = ferry(root, "diff", "shapes", "HEAD", "HEAD~1")
    assert backwards["changes"]["removed"] == changes["added"]
    assert "with another caption (1): 000.png (bar → ring)" in text(root, "diff", "shapes", "HEAD~1")


def test_status_of_changed_folder_is_of_the_folder(root: Path) -> None:
    (root / "data/shapes/001.png").unlink()
    picture(0).save(root / "data/shapes/new.png")
    told = ferry(root, "status", "shapes")
    assert told["dirty"]
    assert (told["changes"]["added"], told["changes"]["removed"]) == (["new.png"], ["001.png"])
    assert told["arrival"]["quarantine"]["new.png"] == "is not named in metadata.jsonl"
    assert "record them with `ferry data add shapes`" in text(root, "status", "shapes")


def test_adding_again_tells_the_same_and_records_nothing(root: Path) -> None:
    before = ferry(root, "status", "shapes")
    again = ferry(root, "add", "shapes")
    assert (again["arrival"], again["rev"]) == (before["arrival"], before["revision"]["rev"])
    assert ferry(root, "status", "shapes") == before


def test_status_says_what_the_remote_lost(root: Path) -> None:
    assert CliRunner().invoke(cli.app, ["init", str(root)]).exit_code == 0  # a moved workspace finds its own remote
    digest = versions.files(root, versions.resolve(root, "data/shapes", "shapes"))["001.png"]
    (path,) = (root / "dvc-remote").rglob(digest[2:])
    path.unlink()
    assert ferry(root, "status", "shapes")["remote_lacks"] == ["001.png"]
    assert "the remote lacks (1): 001.png; `ferry data add shapes` sends it" in text(root, "status", "shapes")
    ferry(root, "add", "shapes")
    assert ferry(root, "status", "shapes")["remote_lacks"] == []


def lose(root: Path, name: str) -> None:
    """Delete a file of the first revision from remote and cache."""
    digest = versions.files(root, versions.resolve(root, "data/shapes", "shapes", "HEAD~1"))[name]
    for store in ("dvc-remote", ".dvc/cache"):
        for path in (root / store).rglob(digest[2:]):
            path.unlink()


def test_lost_revision_does_not_stop_the_next(root: Path) -> None:
    """Record new images even if those to compare them with are lost, and say so."""
    assert CliRunner().invoke(cli.app, ["init", str(root)]).exit_code == 0
    shutil.rmtree(root / "work" / "sketches")
    shutil.rmtree(root / "work" / "data", ignore_errors=True)
    lose(root, "039.png")
    assert "039.png" in ferry(root, "diff", "shapes", "HEAD~1", code=3)["says"]
    versions.git(root, "reset", "--quiet", "--hard", "HEAD~1")
    told = ferry(root, "add", "shapes", "-m", "again")
    assert told["arrival"]["drift"]["verdict"] == "not compared"
    assert "restore the object in the DVC remote" in told["arrival"]["drift"]["reason"]
    assert ferry(root, "status", "shapes")["dirty"] is False


def test_unreachable_remote_is_said_by_status_and_refused_by_add(root: Path) -> None:
    settings = (root / "ferry.toml").read_text()
    (root / "ferry.toml").write_text(settings.replace('data = "dvc-remote"', 'data = "a-file/remote"'))
    (root / "a-file").write_text("no folder")
    picture(0).save(root / "data/shapes/new.png")
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", "add", "shapes"])
    assert (told.exit_code, told.stdout) == (3, "")
    assert told.stderr.splitlines()[-1].startswith("ferry: ")
    assert len(ferry(root, "log", "shapes")["revisions"]) == 2

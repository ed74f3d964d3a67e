"""`ferry data check` records nothing, equal reasons are one line, and a message that cannot be recorded is not dropped in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.cli.unusable import EACH, REASONS, lines_of
from model import revisions, versions
from model.data_report import DataReport
from tests import test_data_folder
from tests.conftest import write_images
from tests.test_data_folder import DATA, assert_refused, ferry, recorded

made, root = test_data_folder.made, test_data_folder.root  # fixtures: a workspace with one revision, and one more image


def test_check_of_a_line_records_nothing(root: Path) -> None:
    before = recorded(root)
    code, out, _ = ferry(root, "check", "shapes", "--json")
    told = json.loads(out)
    assert (code, told["recorded"], told["unusable"], told["usable"]) == (0, False, {}, 13)
    assert told["arrival"]["changes"]["added"] == 1
    assert told["arrival"]["previous"]["md5"] == versions.resolve(root, DATA, "shapes").md5
    assert "only " in ferry(root, "check", "shapes")[1]  # the gate wants more held-out images
    assert recorded(root) == before
    assert ferry(root, "status", "shapes")[1].startswith("shapes holds changes since")


def test_check_ends_with_3_if_a_file_cannot_be_used(root: Path) -> None:
    (root / DATA / "torn.png").write_bytes(b"no image")
    before = recorded(root)
    code, out, _ = ferry(root, "check", "shapes")
    assert code == 3
    assert "shapes: 13 usable images" in out
    assert ", 1 file that cannot be used; nothing is recorded" in out
    assert "torn.png is not named in metadata.jsonl" in out
    assert json.loads(ferry(root, "check", "shapes", "--json")[1])["unusable"] == {"torn.png": "is not named in metadata.jsonl"}
    assert recorded(root) == before


def test_check_says_what_add_would_say(root: Path) -> None:
    checked = json.loads(ferry(root, "check", "shapes", "--json")[1])["arrival"]
    added = json.loads(ferry(root, "add", "shapes", "--json")[1])["arrival"]
    assert checked == added | {"md5": ""}


@pytest.mark.parametrize("where", ["link", "reserved", "key"])
def test_check_refuses_what_add_refuses(root: Path, where: str) -> None:
    if where == "link":
        (root / DATA / "again.png").symlink_to("000.png")
    elif where == "reserved":
        (root / DATA / ".dvcignore").write_text("*")
    else:
        shutil.copyfile(root / "keys/online/models.pem", root / DATA / "leak.png")
    says = {"link": "is a link", "reserved": "has a name that Git or DVC reserve", "key": "is a copy of a private key"}[where]
    assert_refused(root, says, "check", "add")


def test_check_of_a_folder_needs_no_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "delivery", 20)
    monkeypatch.chdir(tmp_path)
    for place in (str(folder), "delivery", "./delivery/"):
        code, out, _ = ferry(Path(), "check", place, "--json")
        assert (code, json.loads(out)["usable"], json.loads(out)["arrival"]["previous"]) == (0, 20, None)
    (folder / "000.png").write_bytes(b"no image")
    code, out, _ = ferry(Path(), "check", "delivery")
    assert code == 3
    assert "000.png cannot be decoded" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delivery"]


def test_check_of_a_folder_in_a_workspace_uses_the_lines_captions(root: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "delivery", 4, dim=True)
    settings = (root / "ferry.toml").read_text()
    assert ferry(root, "check", str(folder))[0] == 0
    (root / "ferry.toml").write_text(settings.replace("text_length = 24", "text_length = 4", 1))
    for words in ((str(folder),), (str(folder), "--line", "shapes")):
        code, out, _ = ferry(root, "check", *words)
        assert (code, out.count("but this model reads 4")) == (3, 4), out
    code, _, err = ferry(root, "check", str(folder), "--line", "nosuch")
    assert (code, "there is no line 'nosuch'" in err) == (3, True)


@pytest.mark.parametrize("what", ["nosuch", "nosuch/folder", "/nosuch"])
def test_check_of_nothing_is_a_sentence(root: Path, tmp_path: Path, what: str) -> None:
    code, out, err = ferry(root, "check", what)
    assert (code, out, len(err.splitlines())) == (3, "", 1)
    assert "there is no folder" in err
    code, out, err = ferry(tmp_path / "no workspace", "check", what)
    assert (code, out, len(err.splitlines())) == (3, "", 1)
    assert "is not a workspace" in err


def test_folder_without_a_usable_image_is_listed(root: Path) -> None:
    for path in (root / DATA).glob("*.png"):
        path.write_bytes(b"no image")
    code, out, _ = ferry(root, "check", "shapes")
    assert code == 3
    assert "0 usable images" in out
    assert "13 files: cannot be decoded: " in out


def test_equal_reasons_are_one_line(root: Path) -> None:
    for i in range(300):
        (root / DATA / f"forgotten-{i:04d}.png").write_bytes(b"x")
    for words in (("add", "-m", "many"), ("status",)):
        code, out, err = ferry(root, words[0], "shapes", *words[1:])
        told = (out + err).splitlines()
        about = [line for line in told if "is not named in metadata.jsonl" in line]
        assert code == 0
        assert len(about) == 1
        assert "300 files: is not named in metadata.jsonl: forgotten-0000.png, " in about[0]
        assert about[0].endswith("…")
    assert len(json.loads(ferry(root, "status", "shapes", "--json")[1])["arrival"]["quarantine"]) == 300
    assert len(json.loads(ferry(root, "add", "shapes", "--json")[1])["unusable"]) == 300


def test_few_files_are_named_each() -> None:
    few = {f"{i}.png": "cannot be decoded" for i in range(EACH)}
    assert lines_of(few) == [f"{name} cannot be decoded" for name in few]
    assert lines_of({}) == []


def test_many_different_reasons_are_cut_and_counted() -> None:
    told = lines_of({f"{i}.png": f"has the value {i}" for i in range(5000)})
    assert len(told) == REASONS + 1
    assert told[-1] == f"{5000 - REASONS:,} more files cannot be used, for other reasons; --json names all of them"


def test_grouped_lines_move_no_cursor() -> None:
    assert all(line.isprintable() for line in lines_of({f"\x1b[2J{i}": "is \x1b[31m bad" for i in range(EACH + 1)}))


def test_message_without_a_change_is_said_to_be_lost(root: Path) -> None:
    assert json.loads(ferry(root, "add", "shapes", "-m", "second", "--json")[1])["recorded"]
    before = recorded(root)
    code, out, err = ferry(root, "add", "shapes", "-m", "a better message")
    rev = versions.resolve(root, DATA, "shapes").rev[:12]
    assert code == 0
    assert out.startswith(f"shapes is still at {rev}: ")
    assert (
        f"nothing has changed since {rev}, so there is no new revision, and your message is not recorded; that revision says: second"
        in err
    )
    assert recorded(root) == before
    code, out, err = ferry(root, "add", "shapes", "-m", "a better message", "--json")
    assert not json.loads(out)["recorded"]
    assert "your message" not in ferry(root, "add", "shapes")[2]  # nobody wrote one


def test_report_of_an_older_ferry_is_made_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report on the same data by the rules of today, scan them once for that, and record nothing."""
    with (root / DATA / "metadata.jsonl").open("a") as metadata:
        metadata.write(json.dumps({"file_name": "deep.png", "text": "bar"}) + "\n")
    Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)).save(root / DATA / "deep.png")
    ferry(root, "add", "shapes", "-m", "16 bits")
    version = versions.resolve(root, DATA, "shapes")
    old = revisions.recorded(root, version)
    assert old
    kept = old.model_dump() | {
        "quarantine": {"deep.png": "has more than 8 bits a channel; store it with 8"},
        "training": old.training - 1,
    }
    del kept["reading"], kept["dark"]
    stale = DataReport.model_validate(kept)
    monkeypatch.setattr(revisions, "recorded", lambda *_: stale)
    shutil.rmtree(root / "work/sketches")
    scans: list[Path] = []
    scan = revisions._scan
    monkeypatch.setattr(revisions, "_scan", lambda data, place, label: scans.append(place) or scan(data, place, label))
    for _ in range(2):
        told = json.loads(ferry(root, "status", "shapes", "--json")[1])
        assert (told["dirty"], told["arrival"]["quarantine"], told["revision"]["md5"]) == (False, {}, version.md5)
    assert len(scans) == 1 or scans[1:] == [p for p in scans[1:] if p != root / DATA]
    assert "deep.png" not in ferry(root, "add", "shapes")[2]
    assert versions.resolve(root, DATA, "shapes") == version

"""A revision that must be withdrawn: everything that descends from it is listed once, with the reason, and what cannot be told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import cli
from flows.setup import create
from flows.trace import forward
from flows.workspace import Workspace
from model import versions
from registry.descent import Revision, descent, later_holders, revision_called
from registry.errors import CatalogError
from registry.trace import Thing
from tests.conftest import write_images


def data(name: str, md5: str) -> Thing:
    return Thing("data", name, {"revision": md5 * 20, "md5": f"{md5 * 16}.dir"})


def version(name: str, own: str, *comes_from: str) -> Thing:
    return Thing("version", name, {"checkpoint": own * 32, "weights": own[::-1] * 32}, {}, [*comes_from])


D1, D2, D3 = data("parts 1", "d1"), data("parts 2", "d2"), data("parts 3", "d3")
FIRST = version("parts/I/full 1", "a1", D1.hashes["md5"])
BAD = version("parts/I/full 2", "a2", D2.hashes["md5"], FIRST.hashes["checkpoint"])
CHILD = version("parts/I/full 3", "a3", D3.hashes["md5"], BAD.hashes["checkpoint"])
STUDENT = version("parts/I/turbo 1", "a4", D1.hashes["md5"], CHILD.hashes["checkpoint"])
CLEAN = version("parts/I/full 4", "a5", D1.hashes["md5"], FIRST.hashes["checkpoint"])
OLD = Thing("bundle", "parts/edge release 1", {"manifest": "b1" * 32}, {}, [FIRST.hashes["weights"]])
NEW = Thing("bundle", "parts/edge release 2", {"manifest": "b2" * 32}, {}, [CHILD.hashes["weights"], STUDENT.hashes["weights"]])
GOOD_DEVICE = Thing("device", "press-01", {}, {}, ["b1" * 32])
BAD_DEVICE = Thing("device", "press-02", {}, {}, ["b2" * 32])
THINGS = [D3, D2, D1, FIRST, BAD, CHILD, STUDENT, CLEAN, OLD, NEW, GOOD_DEVICE, BAD_DEVICE]


def test_what_was_trained_from_a_parent_or_by_a_teacher_descends_too() -> None:
    found = descent(THINGS, D2, {})
    assert [(t.name, why) for t, why in found.found] == [
        ("parts/I/full 2", "made from data parts 2"),
        ("parts/I/full 3", "made from version parts/I/full 2"),
        ("parts/I/turbo 1", "made from version parts/I/full 3"),
        ("parts/edge release 2", "holds version parts/I/full 3"),
        ("press-02", "runs bundle parts/edge release 2"),
    ]
    assert found.unknown == []
    assert found.text().splitlines()[0] == (
        "data parts 2: 0 later data revisions, 3 model versions, 1 bundles, 1 devices descend from it"
    )


def test_later_revision_that_holds_its_files_counts() -> None:
    found = descent(THINGS, D1, {THINGS.index(D2): "holds 3 of the 4 files that came with it"})
    assert [t.name for t, _ in found.found if t.kind == "data"] == ["parts 2"]
    assert {t.name for t, _ in found.found if t.kind == "device"} == {"press-01", "press-02"}


def test_same_content_in_another_commit_counts() -> None:
    again = Thing("data", "parts 4", {"revision": "f" * 40, "md5": D2.hashes["md5"]})
    assert ("parts 4", "holds the same files") in [(t.name, why) for t, why in descent([*THINGS, again], D2, {}).found]


def test_what_comes_from_nowhere_is_said() -> None:
    """Name what no chain of hashes reaches, in place of a list that looks complete."""
    lost = version("parts/I/full 9", "a9", D1.hashes["md5"], "e" * 64)
    foreign = Thing("device", "press-09", {}, {}, ["c" * 64])
    found = descent([*THINGS, lost, foreign], D2, {})
    assert found.unknown == [
        "whether version parts/I/full 9 descends from it, because eeeeeeeeeeee, which it comes from, is not known here",
        "whether device press-09 descends from it, because cccccccccccc, which it comes from, is not known here",
    ]
    assert found.text().splitlines()[-1].startswith("cannot be told: whether device press-09")


def history(*rows: set[str] | None) -> list[Revision]:
    """Make the revisions of a line, newest first."""
    return [Revision(data(f"parts {i}", f"{i:02d}"), None if row is None else frozenset(row)) for i, row in enumerate(rows)]


def test_only_what_came_with_the_revision_counts() -> None:
    made = history({"old", "c"}, {"old", "a", "c"}, {"old", "a", "b"}, {"old"})
    assert later_holders(made, made[2].thing) == ({1: "holds 1 of the 2 files that came with it"}, [])
    assert later_holders(made, made[3].thing)[0] == dict.fromkeys(range(3), "holds 1 of the 1 files that came with it")


def test_lists_that_cannot_be_read_are_said() -> None:
    made = history({"a"}, None, {"a"}, set())
    found, unknown = later_holders(made, made[2].thing)
    assert (list(found), unknown) == ([0], ["whether data parts 1 holds files of it, because its list of files cannot be read"])
    made = history({"a"}, None)
    assert later_holders(made, made[1].thing)[1] == [
        "which later revisions hold files of parts 1, because its list of files cannot be read"
    ]


def test_beginning_of_two_revisions_is_refused() -> None:
    assert revision_called(THINGS, "d2d2d2") is D2
    assert revision_called(THINGS, "d2d2") is None
    with pytest.raises(CatalogError, match="begins several data revisions"):
        revision_called([*THINGS, Thing("data", "parts 8", {"revision": "d2d2d2d2ff", "md5": "x"})], "d2d2d2d2")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Make a workspace with three revisions of one line, and one of another: good, then bad images, then without some of them."""
    made = create(tmp_path_factory.mktemp("descent") / "ws", ["parts", "seals"])
    folder = write_images(made.root / "data/parts", 6)
    versions.add(made.root, "data/parts", "parts", "good")
    write_images(folder, 3, seed=1, dim=True)
    versions.add(made.root, "data/parts", "parts", "bad")
    versions.git(made.root, "tag", "wrong-lamp")
    (folder / "dim-001.png").unlink()
    versions.add(made.root, "data/parts", "parts", "one is gone")
    write_images(made.root / "data/seals", 2, seed=5)
    versions.add(made.root, "data/seals", "seals", "others")
    return made


@pytest.mark.parametrize("how", ["tag", "hash", "short", "md5"])
def test_revision_is_found_by_any_of_its_names(workspace: Workspace, how: str) -> None:
    bad = versions.resolve(workspace.root, "data/parts", "parts", "wrong-lamp")
    text = {"tag": "wrong-lamp", "hash": bad.rev, "short": bad.rev[:8], "md5": bad.md5[:10]}[how]
    told = CliRunner().invoke(cli.app, ["-w", str(workspace.root), "trace", "--forward", text, "--json"])
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["of"]["name"] == f"parts {bad.rev[:12]}"
    (row,) = found["descends"]
    assert (row["kind"], row["facts"]["said"]) == ("data", "one is gone")
    assert row["because"] == "holds 2 of the 3 files that came with it"
    assert found["unknown"] == []


def test_name_of_several_lines_is_refused(workspace: Workspace) -> None:
    told = CliRunner().invoke(cli.app, ["-w", str(workspace.root), "trace", "--forward", "HEAD"])
    assert (told.exit_code, told.stdout) == (3, "")
    assert "is a revision of several lines (parts " in told.stderr
    told = CliRunner().invoke(cli.app, ["-w", str(workspace.root), "trace", "--forward", "nosuch"])
    assert (told.exit_code, told.stdout) == (3, "")
    assert "'nosuch' is no data revision; `ferry data log LINE` lists them" in told.stderr


def test_lost_list_of_files_is_said(workspace: Workspace, tmp_path: Path) -> None:
    root = Path(shutil.copytree(workspace.root, tmp_path / "ws"))
    versions.init(root, str(root / "dvc-remote"))
    newest = versions.resolve(root, "data/parts", "parts")
    for store in ("dvc-remote", ".dvc/cache"):
        for path in (root / store).rglob(f"{newest.md5[2:]}"):
            path.unlink()
    found = forward(Workspace(root), "wrong-lamp")
    assert found.found == []
    assert found.unknown == [f"whether data parts {newest.rev[:12]} holds files of it, because its list of files cannot be read"]

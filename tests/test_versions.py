"""Data revisions: exactly what was recorded is delivered, or nothing is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from model.errors import DataError, RevisionError
from model.scorecard import DataVersion
from model.versions import _dvc, add, files, folder_md5, git, init, is_dirty, log, missing, pull, report_of, resolve
from tests.conftest import few

PATH, LINE = "data/parts", "parts"
FILES = {"a.txt": "one", "deep/er/b.txt": "two", "metadata.jsonl": "{}"}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def commits(root: Path) -> int:
    return int(git(root, "rev-list", "--count", "HEAD"))


@pytest.fixture(autouse=True)
def own_site_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test as on a new machine; DVC keeps an index of what it has seen outside the workspace."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))


def workspace(place: Path) -> Path:
    """Create a workspace with one data folder that no revision has yet, and a folder as its remote."""
    root = place / "workspace"
    root.mkdir()
    init(root, str(place / "remote"))
    write(root / PATH, FILES)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return workspace(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace with one revision; leave its `PATH` alone."""
    root = workspace(tmp_path_factory.mktemp("recorded"))
    add(root, PATH, LINE, "first delivery")
    return root


@pytest.fixture
def version(root: Path) -> DataVersion:
    """Add the first revision."""
    return add(root, PATH, LINE, "first delivery")


def objects(store: Path, text: str | None) -> Path:
    """Return where a store keeps the bytes of a text, or, for None, the list of the folder's files."""
    if text is None:
        (path,) = store.rglob("*.dir")
        return path
    digest = hashlib.md5(text.encode()).hexdigest()
    (path,) = store.rglob(f"{digest[:2]}/{digest[2:]}")
    return path


def damage(root: Path, where: str, text: str | None, content: bytes | None) -> None:
    """Overwrite or delete an object in the cache, the remote, or both."""
    stores = {"cache": [root / ".dvc" / "cache"], "remote": [root.parent / "remote"]}
    for store in stores.get(where, [*stores["cache"], *stores["remote"]]):
        path = objects(store, text)
        path.chmod(0o644)
        path.unlink()
        if content is not None:
            path.write_bytes(content)


def forget_cache(root: Path) -> None:
    """Delete the cache, so that only the Git history and the remote are left, as on another machine."""
    shutil.rmtree(root / ".dvc" / "cache")


def test_delivered_is_what_was_added(root: Path, version: DataVersion, tmp_path: Path) -> None:
    place = pull(root, version, tmp_path / "out")
    assert read(place) == FILES
    assert place == tmp_path / "out" / version.md5.removesuffix(".dir")
    assert (version.files, version.bytes) == (3, sum(map(len, FILES.values())))
    assert version == resolve(root, PATH, LINE)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [place.name]


def test_remote_alone_delivers_everything(root: Path, version: DataVersion, tmp_path: Path) -> None:
    forget_cache(root)
    shutil.rmtree(root / PATH)
    assert read(pull(root, version, tmp_path / "out")) == FILES


def test_unchanged_data_make_no_commit(root: Path, version: DataVersion) -> None:
    before = git(root, "rev-parse", "HEAD")
    assert add(root, PATH, LINE, "again") == version
    assert git(root, "rev-parse", "HEAD") == before


def test_other_commits_leave_version_alone(root: Path, version: DataVersion) -> None:
    (root / "notes.txt").write_text("nothing about data")
    git(root, "add", "notes.txt")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "notes")
    assert resolve(root, PATH, LINE) == version


def test_staged_work_of_user_stays(root: Path, version: DataVersion) -> None:
    """Leave out of a data revision what the user has staged for a commit of their own."""
    (root / "notes.txt").write_text("half a thought")
    git(root, "add", "notes.txt")
    add(root, PATH, LINE, "nothing new")
    assert commits(root) == 1
    write(root / PATH, {"a.txt": "changed"})
    add(root, PATH, LINE, "second delivery")
    assert commits(root) == 2
    assert git(root, "diff", "--cached", "--name-only") == "notes.txt"


def test_older_revision_comes_back_unchanged(root: Path, version: DataVersion, tmp_path: Path) -> None:
    write(root / PATH, {"a.txt": "changed", "c.txt": "new"})
    (root / PATH / "metadata.jsonl").unlink()
    second = add(root, PATH, LINE, "second delivery")
    assert second.md5 != version.md5
    assert read(pull(root, version, tmp_path / "out")) == FILES
    assert read(pull(root, second, tmp_path / "out")) == {"a.txt": "changed", "c.txt": "new", "deep/er/b.txt": "two"}
    assert read(root / PATH) == read(pull(root, second, tmp_path / "out"))  # and the workspace was not touched
    assert [(v, message) for v, message in log(root, PATH, LINE)] == [(second, "second delivery"), (version, "first delivery")]
    assert resolve(root, PATH, LINE, "HEAD~1") == resolve(root, PATH, LINE, version.rev) == version


def test_two_lines_share_a_workspace(root: Path, version: DataVersion, tmp_path: Path) -> None:
    write(root / "data" / "others", {"z.txt": "zed"})
    other = add(root, "data/others", "others", "another line")
    assert resolve(root, PATH, LINE) == version
    assert read(pull(root, other, tmp_path / "out")) == {"z.txt": "zed"}
    assert [v for v, _ in log(root, PATH, LINE)] == [version]


def test_second_pull_fetches_nothing(root: Path, version: DataVersion, tmp_path: Path) -> None:
    place = pull(root, version, tmp_path / "out")
    forget_cache(root)
    shutil.rmtree(tmp_path / "remote")
    assert pull(root, version, tmp_path / "out") == place


def other_bytes(place: Path) -> None:
    (place / "a.txt").write_text("0ne")


def one_more(place: Path) -> None:
    (place / "more.txt").write_text("more")


def one_less(place: Path) -> None:
    (place / "deep/er/b.txt").unlink()


def renamed(place: Path) -> None:
    (place / "a.txt").rename(place / "b.txt")


def link_with_right_bytes(place: Path) -> None:
    (place / "a.txt").rename(place.parent / "elsewhere.txt")
    (place / "a.txt").symlink_to("../elsewhere.txt")


def linked_folder_with_right_bytes(place: Path) -> None:
    (place / "deep").rename(place.parent / "elsewhere")
    (place / "deep").symlink_to("../elsewhere")


def link_in_its_place(place: Path) -> None:
    place.rename(place.parent / "elsewhere")
    place.symlink_to("elsewhere")


def link_to_nowhere(place: Path) -> None:
    shutil.rmtree(place)
    place.symlink_to("nowhere")


def pipe(place: Path) -> None:
    os.mkfifo(place / "pipe")


def pipe_for_a_file(place: Path) -> None:
    (place / "a.txt").unlink()
    os.mkfifo(place / "a.txt")


def a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("no folder")


def nothing_in_it(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


@pytest.mark.parametrize(
    "damaged",
    few(
        [
            other_bytes, one_more, one_less, renamed, link_with_right_bytes, linked_folder_with_right_bytes, link_in_its_place, link_to_nowhere,
            pipe, pipe_for_a_file, a_file, nothing_in_it,
        ], 4,
    ),
)  # fmt: skip
def test_delivered_before_is_verified_again(
    root: Path, version: DataVersion, tmp_path: Path, damaged: Callable[[Path], None]
) -> None:
    place = pull(root, version, tmp_path / "out")
    damaged(place)
    beside = {path: path.read_text() for path in (tmp_path / "out").rglob("elsewhere*/**/*") if path.is_file()}
    assert pull(root, version, tmp_path / "out") == place
    assert read(place) == FILES
    assert not any(path.is_symlink() for path in [place, *place.rglob("*")])
    assert all(path.read_text() == text for path, text in beside.items())  # a link was removed, not what it led to


def test_damaged_delivery_without_remote_is_not_used(root: Path, version: DataVersion, tmp_path: Path) -> None:
    other_bytes(pull(root, version, tmp_path / "out"))
    forget_cache(root)
    shutil.rmtree(tmp_path / "remote")
    refused(root, version, tmp_path / "out", "of parts cannot be fetched")


def test_revision_that_another_process_delivered_first_is_used(
    root: Path, version: DataVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        write(target, FILES)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    assert read(pull(root, version, tmp_path / "out")) == FILES
    assert len(list((tmp_path / "out").iterdir())) == 1


GOOD = {"line": LINE, "path": PATH, "rev": "0" * 40, "md5": "0" * 32 + ".dir", "files": 1, "bytes": 1}
ZEROS = "0" * 32
BAD = {
    "md5": ["", "/etc", "../../keys", ZEROS[1:], ZEROS + "0", "F" * 32, f"{ZEROS}.dir/..", f"{ZEROS}.dir\n", f"{ZEROS}.txt", f"{ZEROS}\n"],
    "rev": ["", "HEAD", "--all", "0" * 39, "0" * 41, "0" * 65, "g" * 40, "0" * 40 + "\n", "A" * 40],
    "path": ["", "/data", "../data", "data/..", "a/../b", ".", "./data", "data/.", "data//x", "data/", "a\0b", "a\nb", "a\x1bb", "a\x85b"],
    "line": ["", "Shapes", "-x", "a/b", "..", "a b", "x" * 41, "shapes\n", "schlüssel"],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_version_whose_parts_lead_elsewhere_is_none(field: str, value: str) -> None:
    """Refuse them: the fields become paths, arguments of Git and names, and others can write the files with them."""
    with pytest.raises(ValidationError, match=field):
        DataVersion.model_validate(GOOD | {field: value})
    with pytest.raises(ValidationError, match=field):
        DataVersion.model_validate_json(json.dumps(GOOD | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"), [("md5", ZEROS), ("rev", "0" * 64), ("path", "a b/Füße"), ("path", "-x"), ("path", "...")]
)
def test_version_as_others_may_have_written_it_is_one(field: str, value: str) -> None:
    assert getattr(DataVersion.model_validate(GOOD | {field: value}), field) == value


def test_pointer_with_a_path_for_a_hash_is_no_revision(root: Path, version: DataVersion, tmp_path: Path) -> None:
    pointer = (root / f"{PATH}.dvc").read_text()
    (root / f"{PATH}.dvc").write_text(pointer.replace(version.md5, str(tmp_path)))
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "elsewhere")
    with pytest.raises(RevisionError, match="revision 'HEAD' holds no data for parts"):
        resolve(root, PATH, LINE)


@pytest.mark.parametrize(
    "name",
    few(["Füllerei", "a b", "it's", 'say "hi"', "both' \"of them", "a#b", "a,b", "100%", "[x]", "日本", "a;b=c", " x "], 4),
)
def test_remote_of_any_name_is_kept(tmp_path: Path, name: str) -> None:
    """Keep a remote of any name, also beside what somebody else wrote into DVC's settings."""
    root = write(tmp_path / "workspace", {f"{PATH}/a.txt": "one"})
    init(root, str(tmp_path / "elsewhere"))
    config = root / ".dvc/config"
    theirs = "    jobs = 3\n# theirs\n['remote \"mine\"']\n    url = s3://x/ä\n"
    config.write_text(config.read_text() + theirs, encoding="utf-8")
    init(root, str(tmp_path / name))
    assert {"jobs = 3", "# theirs"} <= {line.strip() for line in config.read_text().splitlines()}
    with _dvc(root) as repo:
        assert repo.config["remote"]["storage"]["url"] == str(tmp_path / name)
        assert repo.config["remote"]["mine"]["url"] == "s3://x/ä"
    version = add(root, PATH, LINE, "first delivery")
    assert objects(tmp_path / name, "one").read_text() == "one"
    forget_cache(root)
    assert read(pull(root, version, tmp_path / "out")) == {"a.txt": "one"}
    before = config.read_bytes()
    init(root, str(tmp_path / name))
    assert config.read_bytes() == before


@pytest.mark.parametrize("name", ["%(x)s", "three''' \"\"\"", "\udcfc"])
def test_remote_that_dvc_cannot_keep_is_refused(root: Path, version: DataVersion, tmp_path: Path, name: str) -> None:
    before = (root / ".dvc/config").read_bytes()
    with pytest.raises(RevisionError, match=r"DVC's configuration .*cannot hold .*choose another folder") as caught:
        init(root, str(tmp_path / name))
    assert str(caught.value).isprintable()
    assert (root / ".dvc/config").read_bytes() == before
    assert add(root, PATH, LINE, "again") == version


def test_killed_pull_leaves_no_harm(root: Path, version: DataVersion, tmp_path: Path) -> None:
    half = tmp_path / "out" / f"{version.md5.removesuffix('.dir')}.4711.tmp"
    write(half, {"a.txt": "ha"})
    assert read(pull(root, version, tmp_path / "out")) == FILES


@pytest.mark.parametrize("rev", ["nothing", "f" * 40, "--all", "HEAD~7", ""])
def test_unknown_revision_is_a_sentence(recorded: Path, rev: str) -> None:
    with pytest.raises(RevisionError, match=f"there is no data revision '{rev}'; `ferry data log parts` lists them"):
        resolve(recorded, PATH, LINE, rev)


def test_workspace_without_commit_has_no_revision(root: Path) -> None:
    with pytest.raises(
        RevisionError,
        match=f"parts has no data yet; put images and a metadata.jsonl into {PATH}, then run `ferry data add parts`",
    ):
        resolve(root, PATH, LINE)
    assert log(root, PATH, LINE) == []


def test_revision_without_these_data_is_refused(recorded: Path) -> None:
    with pytest.raises(RevisionError, match="revision 'HEAD' holds no data for others; record some with `ferry data add others`"):
        resolve(recorded, "data/others", "others")


@pytest.mark.parametrize("pointer", ["", "outs: []", "outs:\n- path: parts\n", "outs: 3", "]["])
def test_pointer_that_is_none_is_refused(recorded: Path, pointer: str) -> None:
    commit = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "pointer")
    write(recorded, {"data/broken.dvc": pointer})
    git(recorded, "add", "data/broken.dvc")
    git(recorded, *commit)
    git(recorded, "rm", "-q", "data/broken.dvc")  # DVC itself would fail on it
    git(recorded, *commit)
    with pytest.raises(RevisionError, match="revision 'HEAD~1' holds no data for broken"):
        resolve(recorded, "data/broken", "broken", "HEAD~1")


def refused(root: Path, version: DataVersion, out: Path, sentence: str) -> None:
    """Check that nothing is delivered, and that the error is one line."""
    with pytest.raises(RevisionError, match=sentence) as caught:
        pull(root, version, out)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("where", ["cache", "both"])
def test_damaged_object_is_never_delivered(root: Path, version: DataVersion, tmp_path: Path, where: str) -> None:
    damage(root, where, "two", b"2wo")
    refused(root, version, tmp_path / "out", "is damaged in the DVC cache or remote")


def test_damaged_remote_is_never_delivered(root: Path, version: DataVersion, tmp_path: Path) -> None:
    damage(root, "remote", "two", b"2wo")
    forget_cache(root)
    refused(root, version, tmp_path / "out", "is damaged in the DVC cache or remote|cannot be fetched")


def test_good_remote_heals_bad_cache(root: Path, version: DataVersion, tmp_path: Path) -> None:
    """Follow the advice that the refusal gives."""
    damage(root, "cache", "two", b"2wo")
    bad = objects(root / ".dvc" / "cache", "two")
    refused(root, version, tmp_path / "out", f"delete the object {bad.relative_to(root / '.dvc/cache')} from .dvc/cache")
    bad.unlink()
    assert read(pull(root, version, tmp_path / "out")) == FILES


def test_missing_object_is_refused(root: Path, version: DataVersion, tmp_path: Path) -> None:
    damage(root, "remote", "two", None)
    forget_cache(root)
    refused(root, version, tmp_path / "out", "of parts cannot be fetched: .*; restore the object in the DVC remote")


def test_missing_remote_is_refused(root: Path, version: DataVersion, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "remote")
    forget_cache(root)
    refused(root, version, tmp_path / "out", "of parts cannot be fetched")


LIST_WITH_STRANGER = b'[{"md5": "f97c5d29941bfb1b2fdab0874906ab82", "relpath": "../../../stranger.txt"}]'  # hash of "one"


@pytest.mark.parametrize(
    ("where", "content"),
    [("both", b""), ("both", b"[]"), ("remote", b"{}"), ("remote", b"\xff"), ("remote", None), ("remote", LIST_WITH_STRANGER)],
)
def test_damaged_list_is_never_followed(
    root: Path, version: DataVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, where: str
) -> None:
    """Damage the object that lists the folder's files, and read it on a machine that has not seen it before."""
    damage(root, where, None, content)
    if where == "remote":
        forget_cache(root)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "new site"))
    refused(root, version, tmp_path / "out", "is damaged in the DVC cache or remote|cannot be fetched")
    assert not list(tmp_path.rglob("stranger.txt"))


def rewrite_history(root: Path, keep_content: bool) -> None:
    """Replace the last commit by another one, as an amend or a rebase does, and delete the old one."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    if not keep_content:
        write(root / PATH, {"a.txt": "something else"})
        add(root, PATH, LINE, "another delivery")
        git(root, "update-ref", "-d", "HEAD")
    git(root, *identity, "commit", "--quiet", "--amend", "-m", "rewritten") if keep_content else git(
        root, *identity, "commit", "-qm", "new"
    )
    git(root, "reflog", "expire", "--expire=now", "--all")
    git(root, "gc", "--quiet", "--prune=now")


def test_rewritten_history_delivers_same_content(root: Path, version: DataVersion, tmp_path: Path) -> None:
    rewrite_history(root, keep_content=True)
    assert resolve(root, PATH, LINE).rev != version.rev
    with pytest.raises(RevisionError, match="there is no data revision"):
        resolve(root, PATH, LINE, version.rev)
    assert read(pull(root, version, tmp_path / "out")) == FILES
    assert set(files(root, version)) == set(FILES)


def test_rewritten_history_without_the_content_says_what_to_do(root: Path, version: DataVersion, tmp_path: Path) -> None:
    rewrite_history(root, keep_content=False)
    sentence = (
        f"revision {version.rev[:12]} of parts is no longer in Git, because the history was rewritten; fetch that commit "
        "from another clone .* "
        "or record the data again with `ferry data add parts`"
    )
    with pytest.raises(RevisionError, match=sentence):
        pull(root, version, tmp_path / "out")
    for ask in (files, missing, report_of):
        with pytest.raises(RevisionError, match=sentence):
            ask(root, version)


def test_delivery_must_have_recorded_hash(root: Path, version: DataVersion, tmp_path: Path) -> None:
    """Refuse the commit's own data if the version's hash was exchanged on its way."""
    refused(root, version.model_copy(update={"md5": "0" * 32 + ".dir"}), tmp_path / "out", "do not have the recorded hash")


def test_list_of_files_needs_no_bytes(root: Path, version: DataVersion) -> None:
    for text in FILES.values():
        damage(root, "both", text, None)
    assert files(root, version) == {name: hashlib.md5(text.encode()).hexdigest() for name, text in FILES.items()}


def test_damaged_list_is_refused_as_list(
    root: Path, version: DataVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(root, "both", None, b"[]")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "new site"))  # as a machine that never saw the list
    with pytest.raises(RevisionError, match=r"is damaged in the DVC cache or remote|cannot be fetched"):
        files(root, version)


def test_remote_is_asked_for_each_file(root: Path, version: DataVersion, tmp_path: Path) -> None:
    """Ask for each file, because DVC takes all files for present if the list is."""
    assert missing(root, version) == []
    damage(root, "remote", "two", None)
    assert missing(root, version) == ["deep/er/b.txt"]
    shutil.rmtree(tmp_path / "remote")
    assert missing(root, version) == [*sorted(FILES), "(the list itself)"]


def test_adding_again_sends_what_the_remote_lost(root: Path, version: DataVersion, tmp_path: Path) -> None:
    damage(root, "remote", "two", None)
    assert add(root, PATH, LINE, "again") == version
    forget_cache(root)
    assert read(pull(root, version, tmp_path / "out")) == FILES


def test_damaged_cache_is_not_sent(root: Path, version: DataVersion) -> None:
    damage(root, "remote", "two", None)
    damage(root, "cache", "two", b"2wo")
    objects(root / ".dvc" / "cache", "two").chmod(0o444)  # as DVC left it; then it does not check again
    with pytest.raises(RevisionError, match=r"did not have the recorded bytes of deep/er/b.txt and is deleted; repeat"):
        add(root, PATH, LINE, "again")
    assert missing(root, version) == ["deep/er/b.txt"]
    add(root, PATH, LINE, "again")
    assert missing(root, version) == []


def test_remote_that_cannot_be_written_records_nothing(root: Path, version: DataVersion, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "remote")
    (tmp_path / "remote").write_text("a file where the folder was")
    edit(root / PATH)
    with pytest.raises(RevisionError) as caught:
        add(root, PATH, LINE, "second delivery")
    assert "\n" not in str(caught.value)
    assert commits(root) == 1
    (tmp_path / "remote").unlink()
    assert missing(root, add(root, PATH, LINE, "second delivery")) == []


def test_report_stays_with_its_revision(root: Path) -> None:
    first = add(root, PATH, LINE, "first", lambda md5: f"of {md5}")
    edit(root / PATH)
    second = add(root, PATH, LINE, "second", lambda md5: f"of {md5}")
    assert [report_of(root, version) for version in (first, second)] == [f"of {first.md5}", f"of {second.md5}"]
    assert add(root, PATH, LINE, "again", "another report of {}".format) == second
    assert (report_of(root, second), commits(root)) == (f"of {second.md5}", 2)


def test_log_can_be_cut(root: Path, version: DataVersion) -> None:
    edit(root / PATH)
    second = add(root, PATH, LINE, "second")
    assert log(root, PATH, LINE, newest=1) == [(second, "second")]


def edit(folder: Path) -> None:
    (folder / "a.txt").write_text("edited")


def new_file(folder: Path) -> None:
    (folder / "new.txt").write_text("new")


def less(folder: Path) -> None:
    (folder / "a.txt").unlink()


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("change", [edit, new_file, less, gone])
def test_changed_folder_is_dirty(root: Path, version: DataVersion, change: Callable[[Path], None]) -> None:
    assert not is_dirty(root, PATH)
    change(root / PATH)
    assert is_dirty(root, PATH)


def test_folder_put_back_is_clean(root: Path, version: DataVersion) -> None:
    edit(root / PATH)
    write(root / PATH, FILES)
    assert not is_dirty(root, PATH)


def test_killed_add_is_dirty_and_repeatable(root: Path, version: DataVersion, tmp_path: Path) -> None:
    """End the run between DVC and Git: the folder is not what HEAD says, although DVC finds no change."""
    edit(root / PATH)
    (root / ".git" / "index.lock").write_text("")
    with pytest.raises(RevisionError, match=r"git update-index failed: Unable to create .*index\.lock': File exists"):
        add(root, PATH, LINE, "second delivery")
    (root / ".git" / "index.lock").unlink()
    assert resolve(root, PATH, LINE) == version
    assert is_dirty(root, PATH)
    second = add(root, PATH, LINE, "second delivery")
    assert read(pull(root, second, tmp_path / "out"))["a.txt"] == "edited"
    assert not is_dirty(root, PATH)


def test_unrecorded_folder_is_a_sentence(root: Path) -> None:
    with pytest.raises(RevisionError, match="nothing of data/parts is recorded yet"):
        is_dirty(root, PATH)


def test_missing_folder_cannot_be_added(root: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*/data/others; put the images there"):
        add(root, "data/others", "others", "nothing")
    assert log(root, "data/others", "others") == []


def test_folder_without_repository_is_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / PATH, FILES)
    with pytest.raises(RevisionError, match="you are not inside of a DVC repository"):
        add(tmp_path, PATH, LINE, "too early")


def nothing_yet(root: Path) -> None:
    pass


def git_only(root: Path) -> None:
    git(root, "init", "--quiet")


def empty_dvc(root: Path) -> None:
    git_only(root)
    write(root / ".dvc", {"tmp/lock": ""})


def config_only(root: Path) -> None:
    git_only(root)
    write(root / ".dvc", {"config": ""})


@pytest.mark.parametrize("killed", [nothing_yet, git_only, empty_dvc, config_only])
def test_init_completes_what_was_killed(tmp_path: Path, killed: Callable[[Path], None]) -> None:
    root = write(tmp_path / "workspace", {f"{PATH}/a.txt": "one"})
    killed(root)
    for _ in range(2):
        init(root, str(tmp_path / "remote"))
    version = add(root, PATH, LINE, "first delivery")
    forget_cache(root)
    assert read(pull(root, version, tmp_path / "out")) == {"a.txt": "one"}


def test_lost_settings_lose_no_data(root: Path, version: DataVersion, tmp_path: Path) -> None:
    """Keep the data even if the remote is gone, too, and only the cache is left."""
    shutil.rmtree(tmp_path / "remote")
    (root / ".dvc/config").unlink()
    init(root, str(tmp_path / "remote"))
    assert read(pull(root, version, tmp_path / "out")) == FILES
    edit(root / PATH)
    second = add(root, PATH, LINE, "second delivery")
    assert missing(root, second) == []


def test_settings_that_are_a_pipe_hold_nothing_up(root: Path, version: DataVersion) -> None:
    (root / ".dvcignore").unlink()
    os.mkfifo(root / ".dvcignore")
    with pytest.raises(DataError, match=r"\.dvcignore is a pipe"):
        add(root, PATH, LINE, "again")
    (root / ".dvc/config").unlink()
    os.mkfifo(root / ".dvc/config")
    with pytest.raises(DataError, match=r"\.dvc/config is a pipe"):
        init(root, str(root.parent / "remote"))


def test_init_again_keeps_history(root: Path, version: DataVersion, tmp_path: Path) -> None:
    init(root, str(tmp_path / "elsewhere"))
    assert resolve(root, PATH, LINE) == version
    forget_cache(root)
    write(root / PATH, {"a.txt": "changed"})
    add(root, PATH, LINE, "to the new remote")
    assert objects(tmp_path / "elsewhere", "changed").read_text() == "changed"


def test_commits_need_no_identity(root: Path, version: DataVersion) -> None:
    """Commit without an identity, as on a build machine; a workspace that has one keeps it."""
    assert git(root, "log", "-1", "--format=%an") == "ferry"
    git(root, "config", "user.name", "Ada")
    git(root, "config", "user.email", "ada@example.com")
    edit(root / PATH)
    add(root, PATH, LINE, "second delivery")
    assert git(root, "log", "-1", "--format=%an") == "Ada"


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        ["b", "a", "c/d", "c/e/f"],
        ["sub/x", "sub-1", "sub.d", "sub0", "sub/"[:-1] + " y"],  # around the slash in ASCII
        ["brick/1.png", "brick-2/1.png", "brick.jsonl"],
        ["ä.png", "日本/語.png", "z", "\N{GRINNING FACE}.png", "\uffff.png"],
        ['quote".txt', "back\\slash.txt", "tab\t.txt"],
        ["A", "a", "Z", "_"],
        ["10.png", "9.png", "1/0.png"],
    ],
)
def test_folder_md5_is_the_one_of_dvc(recorded: Path, tmp_path: Path, names: list[str]) -> None:
    path = f"data/names-{hashlib.md5(repr(names).encode()).hexdigest()}"
    folder = write(recorded / path, {name: f"content of {i}" for i, name in enumerate(names)})
    version = add(recorded, path, "names", "names")
    assert folder_md5(folder) == version.md5
    assert yaml.safe_load((recorded / f"{path}.dvc").read_text())["outs"][0]["md5"] == version.md5
    assert read(pull(recorded, version, tmp_path / "out")) == read(folder)

"""Every wrong command of a newcomer gets one sentence that says what to do, an exit code, and nothing on stdout."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel, model_serializer
from typer.testing import CliRunner, Result

from flows import cli
from flows.cli import shared
from ota.agent.cli import parser as agent_parser
from ota.release.keys import KeyRing
from tests.conftest import Told, agent, commands_of, few, write_images
from tests.test_data_folder import without_rights


def ferry(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def commands(app: typer.Typer) -> list[list[str]]:
    """Return every command of an app, as the words to type."""
    root = typer.main.get_command(app)

    def walk(command: object, words: list[str]) -> list[list[str]]:
        children = getattr(command, "commands", None)
        if not children:
            return [words]
        return [found for name, child in children.items() for found in walk(child, [*words, name])]

    return walk(root, [])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace with one data revision; each test that changes it makes a copy."""
    root = tmp_path_factory.mktemp("cli") / "ws"
    assert ferry("init", str(root), "--line", "shapes").exit_code == 0
    write_images(root / "data/shapes", 12)
    assert ferry("-w", str(root), "data", "add", "shapes", "-m", "first").exit_code == 0
    return root


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fresh") / "ws"
    assert ferry("init", str(root), "--line", "shapes").exit_code == 0
    return root


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "ws", symlinks=True))


def refused(result: Result | Told, code: int, says: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("words", commands(cli.app), ids=" ".join)
def test_every_command_explains_itself(words: list[str]):
    result = CliRunner().invoke(cli.app, [*words, "--help"], prog_name="ferry")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: ferry {' '.join(words)} ")
    assert len(result.stdout.splitlines()) > 5


@pytest.mark.parametrize("name", [*commands_of(agent_parser())])
def test_every_command_of_the_agent_explains_itself(name: str):
    result = agent(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"usage: ferry-agent {name} ")
    assert len(result.stdout.splitlines()) > 5


def test_agent_without_a_command_shows_them_all():
    result = agent()
    assert result.exit_code == 2
    assert all(f"\n    {name} " in result.stdout for name in commands_of(agent_parser()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["updat"], "invalid choice: 'updat'"),
        (["update", "--chek"], "unrecognized arguments: --chek"),
        (["run", "--every", "5"], "5 is not 10 or more"),
        (["run", "--every", "9" * 20], "is not 10 or more, up to 2592000"),
        (["bench", "--images", "3"], "argument --images: 3 is not 20 or more, up to 10000"),
        (["bench", "--images", "99999"], "argument --images: 99999 is not 20 or more, up to 10000"),
        (["status", "--dir", ""], "argument --dir: it is empty; give the agent's directory, here or as FERRY_AGENT_DIR"),
        (["serve", "--port", "70000"], "70000 is not 0 or more, up to 65535"),
        (["generate", "--seed", "many"], "invalid number value: 'many'"),
        (["init", "--device", "press-01"], "the following arguments are required: --line, --class"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_agent_used_wrongly_says_how(words: list[str], says: str):
    result = agent(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert result.stderr.startswith("usage: ferry-agent")


def test_version_is_told_without_a_command():
    for name, result in (("ferry", ferry("--version")), ("ferry-agent", agent("--version"))):
        assert (result.exit_code, result.stdout.split()[0]) == (0, name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "add", "shapes"), ("data", "log", "shapes"), ("data", "status", "shapes"), ("data", "diff", "shapes", "HEAD~1"), ("retrain", "shapes"), ("promote", "shapes/I/full", "1"), ("history",),
        ("evaluate", "shapes/I/full"), ("release", "shapes"), ("rollout", "start", "shapes"), ("rollout", "halt", "shapes"), ("rollout", "status", "shapes"),
        ("fleet", "status"), ("trust", "refresh"), ("trust", "renew"), ("rollout", "renew", "shapes"), ("trust", "status"), ("report",), ("explain", "shapes", "--caption", "bar"), ("serve",),
        ("rollback", "shapes/I/full"), ("approve",), ("reconcile",), ("history", "--verify"), ("rate", "shapes/I/full"),
        ("trigger", "shapes", "--reason", "drift"), ("trace", "press-01"), ("data", "diff", "shapes", "HEAD"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_outside_a_workspace_everything_says_so(arguments: tuple[str, ...], tmp_path: Path):
    refused(ferry("-w", str(tmp_path), *arguments), 3, "is not a workspace (it has no ferry.toml); make one with `ferry init")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("retrain", "tables"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("retrain", "shapes", "--data", "v9"), "there is no data revision 'v9'; `ferry data log shapes` lists them"),
        (("data", "diff", "shapes", "v9"), "there is no data revision 'v9'; `ferry data log shapes` lists them"),
        (("data", "diff", "shapes", "HEAD", "v9"), "there is no data revision 'v9'; `ferry data log shapes` lists them"),
        (("data", "status", "tables"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("promote", "shapes", "1"), "'shapes' is not LINE/CONFIG/VARIANT; write it as shapes/I/full"),
        (("promote", "shapes/I/full", "7"), "has no version 7; there is none yet, so run `ferry retrain shapes`"),
        (("rollback", "shapes"), "is not LINE/CONFIG/VARIANT"),
        (("approve", "shapes/I/slow", "1", "--reason", "x"), "is not LINE/CONFIG/VARIANT"),
        (("release", "shapes/huge"), "line shapes has no device class 'huge'"),
        (("rollout", "start", "shapes"), "has no release"),
        (("rollout", "start", "shapes", "--waves", "ten"), "are not shares in percent; write them as 1,10,100"),
        (
            ("rollout", "halt", "shapes"),
            "nothing of shapes/edge is rolled out, so there is nothing to halt; `ferry rollout start shapes/edge`",
        ),
        (("rollout", "renew", "shapes"), "nothing of shapes/edge is rolled out"),
        (("trust", "renew", "rollout"), "rollout cannot be renewed on its own"),
        (("fleet", "enroll", "press-01", "abc"), "the public key must be 64 hex digits"),
        (("fleet", "enroll", "Press 1", "ab" * 32), "is not a device id"),
        (("report",), "there is no champion yet; run `ferry retrain LINE` first"),
        (("report", "tables"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("explain", "tables", "--caption", "bar"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("explain", "shapes/I/slow", "--caption", "bar"), "is not LINE/CONFIG/VARIANT"),
        (("rate", "shapes"), "is not LINE/CONFIG/VARIANT"),
        (("rate", "tables/I/full"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("rate", "shapes/I/full"), "shapes/I/full has no versions, but a comparison needs two; run `ferry retrain shapes`"),
        (("rate", "shapes/I/full", "--answers", "ferry.toml"), "ferry.toml: No such file or directory; check the path"),
        (("history", "tables/I/full"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("tune", "tables"), "there is no line 'tables' in ferry.toml; there is shapes"),
        (("tune", "shapes"), "shapes/I/full has no champion to measure; run `ferry retrain shapes`"),
        (("tune", "shapes", "--configuration", "III"), "there is no configuration 'III'; choose I or II"),
        (("tune", "shapes", "--configuration", "II"), "line shapes has no class of configuration II; it has I"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_names_are_named(arguments: tuple[str, ...], says: str, prepared: Path):
    refused(ferry("-w", str(prepared), *arguments), 3, says)


@pytest.mark.parametrize(
    ("arguments", "code", "next_command"),
    [
        (("retrain", "shapes"), 3, "ferry data add shapes"), (("retrain", "shapes", "--data", "v9"), 3, "ferry data add shapes"),
        (("data", "status", "shapes"), 3, "has no metadata.jsonl; write one line"), (("data", "log", "shapes"), 0, "ferry data add shapes"),
        (("evaluate", "shapes/I/full"), 3, "ferry retrain shapes"), (("promote", "shapes/I/full", "1", "--reason", "x"), 3, "ferry retrain shapes"),
        (("rollback", "shapes/I/full", "--reason", "x"), 5, "ferry history"), (("release", "shapes"), 3, "ferry retrain shapes"),
        (("rollout", "start", "shapes"), 3, "ferry release shapes/edge"), (("rollout", "status", "shapes"), 0, "ferry rollout start shapes/edge"),
        (("rollout", "halt", "shapes", "--reason", "x"), 3, "ferry rollout start shapes/edge"), (("rate", "shapes/I/full"), 3, "ferry retrain"),
        (("explain", "shapes", "--caption", "bar"), 3, "ferry retrain shapes"),
        (("report",), 3, "ferry retrain LINE"), (("history",), 0, "ferry retrain LINE"), (("fleet", "status"), 0, "ferry fleet enroll"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_first_wrong_steps_in_a_fresh_workspace_name_the_next_command(
    arguments: tuple[str, ...], code: int, next_command: str, fresh: Path
):
    result = ferry("-w", str(fresh), *arguments)
    assert result.exit_code == code, result.output
    assert next_command in result.output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("schema = 2", "schema = 3"),
            "schema = 3 is the format of a newer version of ferry, but this version knows 2; install the newer version",
        ),
        (("schema = 2", ""), "schema = 2 is missing at its beginning"),
        (("schema = 2", "schema = 0"), "no older format was ever released"),
        (("schema = 2", "schema = "), "is not valid TOML"),
        (("steps = 400", "stepps = 400"), "stepps"),
        (("guidance = 2.0", "guidance = 0.5"), "guidance"),
        (
            ("latency_ms = 5000", "[lines.shapes.classes.old]\nprecision = 'float32'"),
            "classes of one configuration must share a precision",
        ),
    ],
)
def test_wrong_setting_is_named(change: tuple[str, str], says: str, workspace: Path):
    path = workspace / "ferry.toml"
    path.write_text(path.read_text().replace(*change))
    result = ferry("-w", str(workspace), "data", "log", "shapes")
    refused(result, 3, says)
    assert "ferry.toml" in result.stderr


def test_init_leaves_a_foreign_folder_alone(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear all")
    refused(ferry("init", str(tmp_path)), 3, "holds other things")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_init_on_a_file_leaves_it_alone(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear all")
    refused(ferry("init", str(tmp_path / "letter.txt")), 3, "is a file; name a folder")
    assert (tmp_path / "letter.txt").read_text() == "dear all"


@pytest.mark.parametrize(
    "name",
    few(["Füllerei", "a b", "it's", 'say "hi"', "100%20", "a,b;c&d=e", "a@b:c", "[x]", "back\\slash", "trail/", "-dash", "日本/語", "~"], 4),
)  # fmt: skip
def test_init_makes_a_workspace_of_any_printable_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert ferry("init", "--line", "shapes", "--", name).exit_code == 0
    root = tmp_path / name
    write_images(root / "data/shapes", 4)
    assert ferry("-w", str(root), "data", "add", "shapes").exit_code == 0
    assert any((root / "dvc-remote").rglob("*.dir"))
    assert json.loads(ferry("-w", str(root), "data", "status", "shapes", "--json").stdout)["remote_lacks"] == []
    assert ferry("-w", str(root), "history").exit_code == 0
    assert ferry("-w", str(root), "trust", "refresh").exit_code == 0
    assert ferry("init", "--", name).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LANG": "C"}, {"LANG": "POSIX"}, {"LC_ALL": "C.UTF-8"}, {}], ids=str)
def test_init_depends_on_no_locale(locale: dict[str, str], tmp_path: Path):
    """Run the commands as a machine without a desktop starts programs, with almost no environment variables."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM") if name in os.environ}
    root = tmp_path / "Füllerei"

    def told(*words: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "flows.cli", *words]
        return subprocess.run(command, capture_output=True, env=kept | locale | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")})

    assert told("init", str(root), "--line", "shapes").returncode == 0
    (root / "ferry.toml").write_text(
        (root / "ferry.toml").read_text().replace('"data/shapes"', '"Bilder/Füße"'), encoding="utf-8"
    )
    write_images(root / "Bilder/Füße", 4)
    added = told("--quiet", "-w", str(root), "data", "add", "shapes", "--json")
    assert (added.returncode, json.loads(added.stdout)["path"]) == (0, "Bilder/Füße")
    assert any((root / "dvc-remote").rglob("*.dir"))


@pytest.mark.parametrize(
    "name", ["new\nline", "tab\t", "esc\x1b[31m", "latin\udcfc", "a#b", "a?b", "%(x)s", "three''' \"\"\"", "\u202egnp"]
)
def test_init_of_a_name_that_cannot_be_kept_makes_nothing(name: str, tmp_path: Path):
    for folder in (tmp_path / name, tmp_path / name / "ws"):
        result = ferry("init", str(folder))
        refused(result, 3, "a workspace cannot be kept in")
        assert result.stderr.rstrip("\n").isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ["", "Shapes", "a b", "schlüssel", "../x", "a.training", "x" * 41, "a]\ndata = 1\n[b", "\x1b[31m", '"', "a/b", "\udcfc"],
)
def test_init_with_a_line_of_no_name_makes_nothing(line: str, tmp_path: Path):
    result = ferry("init", str(tmp_path / "ws"), "--line", "shapes", "--line", line)
    refused(result, 3, "cannot be the name of a line; use lower-case letters, digits and '-', 40 at most")
    assert result.stderr.rstrip("\n").isprintable()
    assert list(tmp_path.iterdir()) == []


def test_init_with_a_line_twice_makes_it_once(tmp_path: Path):
    result = ferry("init", str(tmp_path / "ws"), "--line", "shapes", "--line", "shapes", "--json")
    assert json.loads(result.stdout)["lines"] == ["shapes"]


def a_file(root: Path) -> None:
    root.write_text("dear all")


def below_a_file(root: Path) -> None:
    root.parent.rmdir()
    root.parent.write_text("dear all")


def a_link_to_nowhere(root: Path) -> None:
    root.symlink_to("nowhere")


def data_that_is_a_file(root: Path) -> None:
    root.mkdir()
    (root / "data").write_text("dear all")


def data_that_is_a_link(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    root.mkdir()
    (root / "data").symlink_to("../elsewhere")


def data_that_is_a_pipe(root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "data")


@pytest.mark.parametrize(
    "in_the_way", [a_file, below_a_file, a_link_to_nowhere, data_that_is_a_file, data_that_is_a_link, data_that_is_a_pipe]
)
def test_init_leaves_what_is_in_its_way(in_the_way: Callable[[Path], None], tmp_path: Path):
    root = tmp_path / "factory/ws"
    root.parent.mkdir()
    in_the_way(root)
    before = [(path, path.lstat().st_mode, path.lstat().st_size) for path in sorted(tmp_path.rglob("*"))]
    refused(ferry("init", str(root)), 3, str(root.parent))
    assert [(path, path.lstat().st_mode, path.lstat().st_size) for path in sorted(tmp_path.rglob("*"))] == before


def test_init_where_nobody_may_write_makes_nothing(tmp_path: Path):
    tmp_path.chmod(0o500)
    words = [sys.executable, "-m", "flows.cli", "init", str(tmp_path / "ws")]
    told = subprocess.run(words, capture_output=True, text=True, preexec_fn=without_rights)
    tmp_path.chmod(0o700)
    assert (told.returncode, told.stdout) == (3, "")
    assert told.stderr == f"ferry: {tmp_path}/ws: Permission denied; check the path and who may write there\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "step",
    few([
        "pathlib.Path.replace", "flows.workspace.configure_environment", "model.versions.git", "dvc.repo.Repo.init", "model.versions._configured",
        "ota.release.keys.create", "ota.release.repository.Repository.create", "shutil.copyfile", "registry.ledger.Ledger.head",
        "ota.fleet.store.Fleet.devices",
    ], 4),
)  # fmt: skip
def test_init_that_was_cut_short_is_completed_by_the_next(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        refused(ferry("init", str(tmp_path / "ws"), "--line", "shapes"), 3, "No space left on device; check the path")
    assert ferry("init", str(tmp_path / "ws"), "--line", "shapes").exit_code == 0
    write_images(tmp_path / "ws/data/shapes", 4)
    assert ferry("-w", str(tmp_path / "ws"), "data", "add", "shapes").exit_code == 0
    assert ferry("-w", str(tmp_path / "ws"), "trust", "refresh").exit_code == 0


def test_init_goes_on_where_settings_were_half_written(tmp_path: Path):
    (tmp_path / ".ferry.toml.tmp").write_text("schema")
    assert ferry("init", str(tmp_path)).exit_code == 0


def test_demo_does_not_write_into_a_workspace_of_its_own(workspace: Path):
    before = sorted(workspace.rglob("*"))
    refused(ferry("demo", "--dir", str(workspace)), 3, "is a workspace of its own; name an empty folder")
    assert sorted(workspace.rglob("*")) == before


def test_unwritable_path_is_named_without_a_traceback(workspace: Path):
    (workspace / "ferry.db").unlink()
    (workspace / "ferry.db").mkdir()
    refused(ferry("-w", str(workspace), "history"), 4, "the database cannot be used")
    (workspace / "work" / "records.lock").unlink(missing_ok=True)
    (workspace / "work" / "records.lock").mkdir(parents=True)
    refused(ferry("-w", str(workspace), "trust", "refresh"), 3, "check the path and who may write there")


@pytest.mark.parametrize("url", ["ferry.db", "postgresql+nosuch://h/d"])
def test_database_that_cannot_be_used_is_named(url: str, workspace: Path):
    path = workspace / "ferry.toml"
    path.write_text(path.read_text().replace("sqlite:///ferry.db", url))
    refused(ferry("-w", str(workspace), "history"), 4, "check its URL in ferry.toml")


@pytest.mark.slow
def test_prefect_server_that_is_not_there_is_named(workspace: Path):
    """Name the missing server; in a process of its own, because Prefect reads the address when it is imported."""
    words = [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(workspace), "retrain", "shapes"]
    told = subprocess.run(words, env=os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (4, "")
    assert told.stderr == (
        "ferry: Prefect's server at http://127.0.0.1:9/api cannot be reached; start it, or unset PREFECT_API_URL\n"
    )


def test_signatures_are_renewed_and_published(workspace: Path):
    before = json.loads(ferry("-w", str(workspace), "trust", "status", "--json").stdout)["expires"]
    assert ferry("-w", str(workspace), "trust", "renew").exit_code == 0
    assert ferry("-w", str(workspace), "trust", "renew", "root", "targets").exit_code == 0
    after = json.loads(ferry("-w", str(workspace), "trust", "status", "--json").stdout)["expires"]
    assert all(after[role] > before[role] for role in ("root", "targets", "models", "deltas"))
    assert after["rollout"] == before["rollout"]
    published = sorted(path.name for path in (workspace / "published" / "metadata").iterdir())
    assert {"2.root.json", "2.targets.json", "2.models.json"} <= set(published)


def test_renewing_root_without_the_offline_keys_says_so(workspace: Path):
    (workspace / "keys" / "offline").rename(workspace / "keys" / "away")
    before = sorted((workspace / "repository").rglob("*"))
    refused(ferry("-w", str(workspace), "trust", "renew", "root"), 3, "keys")
    assert sorted((workspace / "repository").rglob("*")) == before


def test_settings_of_the_data_remote_reach_dvc(workspace: Path):
    path, config = workspace / "ferry.toml", workspace / ".dvc" / "config"
    config.write_text(config.read_text() + "    jobs = 3\n")  # somebody else's setting of the same remote
    ignored = workspace / ".gitignore"
    ignored.write_text(ignored.read_text() + "/mine\n")
    path.write_text(path.read_text().replace('data = "dvc-remote"', 'data = "other"'))
    write_images(workspace / "data/shapes", 4, seed=5, dim=True)
    assert ferry("-w", str(workspace), "data", "add", "shapes").exit_code == 0
    assert any((workspace / "other").rglob("*"))
    assert "jobs = 3" in config.read_text()
    assert ferry("init", str(workspace)).exit_code == 0
    assert "/mine" in ignored.read_text().splitlines()


def test_data_that_the_gate_cannot_decide_on_is_said_at_once(prepared: Path, workspace: Path):
    result = ferry("-w", str(workspace), "data", "add", "shapes", "--json")
    held_out = json.loads(result.stdout)["held_out"]
    assert f"only {held_out} images are held out for evaluation, but the gate of shapes wants 96" in result.stderr


def test_init_repeated_keeps_keys_and_settings(workspace: Path):
    before = {name: (workspace / name).read_bytes() for name in ("keys/keys.json", "ferry.toml", "root.json")}
    assert ferry("init", str(workspace)).exit_code == 0
    assert before == {name: (workspace / name).read_bytes() for name in before}


@pytest.mark.parametrize("lost", ["keys", "repository", ".dvc", "inbox", "root.json", ".git"])
def test_init_completes_what_a_killed_one_left_out(lost: str, tmp_path: Path):
    root = tmp_path / "ws"
    assert ferry("init", str(root), "--line", "shapes").exit_code == 0
    if lost == "keys":  # keys are made before the repository that they sign
        shutil.rmtree(root / "repository")
    shutil.rmtree(root / lost) if (root / lost).is_dir() else (root / lost).unlink()
    assert ferry("init", str(root)).exit_code == 0
    assert ferry("-w", str(root), "trust", "refresh").exit_code == 0
    write_images(root / "data/shapes", 4)
    assert ferry("-w", str(root), "data", "add", "shapes").exit_code == 0


def test_unusable_images_are_listed_by_name(workspace: Path):
    (workspace / "data/shapes/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with (workspace / "data/shapes/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "torn.png", "text": "bar"}\n{"file_name": "gone.png", "text": "bar"}\n')
    result = ferry("-w", str(workspace), "data", "add", "shapes", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["unusable"] == {"torn.png": "cannot be decoded", "gone.png": "is missing"}
    assert "torn.png cannot be decoded" in result.stderr
    assert (workspace / "data/shapes/torn.png").exists()  # no file of the user is deleted


def test_folder_without_one_usable_image_is_not_recorded(workspace: Path):
    for path in (workspace / "data/shapes").glob("*.png"):
        path.write_bytes(b"not an image")
    refused_lines = ferry("-w", str(workspace), "data", "add", "shapes")
    assert refused_lines.exit_code == 3
    assert "no image in data/shapes can be used" in refused_lines.stderr
    assert len(json.loads(ferry("-w", str(workspace), "data", "log", "shapes", "--json").stdout)["revisions"]) == 1


def test_dirty_data_are_not_trained_on(workspace: Path):
    write_images(workspace / "data/shapes", 4, seed=5, dim=True)
    refused(ferry("-w", str(workspace), "retrain", "shapes"), 3, "record them with `ferry data add shapes`")


def test_release_without_champion_says_what_comes_first(workspace: Path):
    refused(
        ferry("-w", str(workspace), "release", "shapes"),
        3,
        "shapes/I/full has no champion to release; run `ferry retrain shapes`",
    )


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_wrong_key_is_named_and_nothing_is_signed(role: str, workspace: Path):
    keys = workspace / "keys" / "online"
    before = {path.name: path.read_bytes() for path in (workspace / "repository/metadata").iterdir()}
    shutil.copyfile(keys / "models.pem", keys / f"{role}.pem")
    refused(ferry("-w", str(workspace), "trust", "refresh"), 3, f"role {role} needs 1 signatures")
    after = {path.name: path.read_bytes() for path in (workspace / "repository/metadata").iterdir()}
    assert after["timestamp.json"] == before["timestamp.json"]
    assert KeyRing(workspace / "keys").signers("models")


def test_missing_repository_says_how_to_make_it(workspace: Path):
    shutil.rmtree(workspace / "repository")
    refused(ferry("-w", str(workspace), "trust", "refresh"), 3, "there is no repository in")


def test_changed_ledger_has_an_exit_code_of_its_own(workspace: Path):
    import sqlite3

    from registry.ledger import Ledger

    ledger = Ledger(f"sqlite:///{workspace}/ferry.db", KeyRing(workspace / "keys"), workspace / "keys" / "ledger.seen")
    ledger.append("gate", "shapes/I/full", "true", {})
    ledger.close()
    connection = sqlite3.connect(workspace / "ferry.db")
    with connection:
        connection.execute("UPDATE ledger_entries SET body = replace(body, 'true', 'false')")
    connection.close()
    refused(ferry("-w", str(workspace), "history"), 6, "was changed after it was written")


@pytest.mark.parametrize(
    "arguments",
    [("data", "log", "shapes"), ("data", "diff", "shapes", "HEAD"), ("history",), ("rollout", "status", "shapes"), ("fleet", "status"), ("trust", "status"), ("trust", "refresh")],
    ids=" ".join,
)  # fmt: skip
def test_json_is_one_object_on_stdout(arguments: tuple[str, ...], workspace: Path):
    result = ferry("-w", str(workspace), *arguments, "--json")
    assert result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)


def test_debug_shows_the_traceback(tmp_path: Path):
    result = ferry("--debug", "-w", str(tmp_path), "history")
    assert type(result.exception).__name__ == "WorkspaceError"


@pytest.mark.parametrize("arguments", [("update",), ("status",), ("generate", "bar"), ("rollback",), ("report",)], ids=" ".join)
def test_agent_without_a_directory_says_so(arguments: tuple[str, ...], tmp_path: Path):
    result = agent(*arguments, "--dir", str(tmp_path))
    assert result.exit_code == 3
    assert "is not an agent's directory; make it one with `ferry-agent init`" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--root-sha256": "0" * 64}, "does not have the sha256 that was given; do not trust it"),
        ({"--root": "/nowhere/root.json"}, "cannot read /nowhere/root.json"),
        ({"--device": "Press 1"}, "--device is not valid; give 1 to 40 lower-case letters"),
        ({"--line": "../x"}, "--line is not valid; give"),
        ({"--class": ""}, "--class is not valid; give"),
        ({"--window": "at night please"}, "--window is not valid; give hours in UTC, such as 22:00-05:00"),
        ({"--watts": "0.5,0"}, "--watts is not valid; give the watts at rest"),
        ({"--watts": "nan,1"}, "--watts is not valid; give"),
        ({"--watts": "2"}, "--watts is not valid; give"),
        ({"--latency-ms": "0"}, "--latency-ms is not valid; give a number above 0"),
        ({"--joules": "inf"}, "--joules is not valid; give"),
        ({"--safe": "best"}, "--safe is not valid; choose full, dev, fast or turbo"),
        ({"--prefer": "best"}, "--prefer is not valid; choose default"),
        ({"--repository": "http://user:sec/ret@127.0.0.1:9/f"}, "--repository is not valid; give"),
        ({"--repository": "/etc/passwd"}, "--repository is not valid: /etc/passwd is not a folder"),
        ({"--reports": "/etc/passwd"}, "--reports is not valid: /etc/passwd is not a folder"),
        ({"--reports": "/etc/passwd/inbox"}, "--reports is not valid: /etc/passwd is not a folder"),
        ({"--reports": "http://user:secret@x/"}, "reports do not leave this device by plain http"),
        ({"--tag": "berlin"}, "--tag is not valid; give a name and a value such as site=berlin"),
        ({"--tag": "site=berlin\n"}, "--tag is not valid; give a name and a value"),
        ({"--share": "some"}, "--share is not valid; choose all or minimal"),
        ({"--dir": "/etc/passwd"}, "/etc/passwd is not a folder; give the agent's directory with --dir"),
        *(
            ({"--repository": place}, "--repository is not valid; give an http(s) address or a folder")
            for place in ("", " ", "ftp://x/y", "http://", "https://:1/", "http:/x", "http://127.0.0.1:99999/", "http://x:0/",
                          "http://[::1/", "http://a b/", "http://a..b/", "http://x/#a", "file://other/x", "file://")
        ),
    ],
)  # fmt: skip
def test_agent_init_refuses_what_does_not_fit(change: dict[str, str], says: str, prepared: Path, tmp_path: Path):
    import hashlib

    anchor = prepared / "root.json"
    options = {
        "--device": "press-01", "--line": "shapes", "--class": "edge", "--repository": str(prepared / "published"),
        "--root": str(anchor), "--root-sha256": hashlib.sha256(anchor.read_bytes()).hexdigest(),
    } | change  # fmt: skip
    given = {"--dir": str(tmp_path / "device")} | options
    result = agent("init", *(word for pair in given.items() for word in pair))
    refused(result, 3, says)
    assert "secret" not in result.stderr
    assert not (tmp_path / "device").exists()


def test_agent_keeps_tags_and_says_how_to_enroll(prepared: Path, tmp_path: Path):
    import hashlib

    anchor = prepared / "root.json"
    words = [
        "init", "--device", "press-01", "--line", "shapes", "--class", "edge", "--repository", str(prepared / "published"),
        "--root", str(anchor), "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(), "--dir", str(tmp_path / "device"),
        "--reports", "https://gateway.example.com/plant",
    ]  # fmt: skip
    many = [word for number in range(9) for word in ("--tag", f"t{number}=x")]
    refused(agent(*words, *many), 3, "8 of them at most")
    refused(agent(*words, "--tag", "site=a", "--tag", "site=b"), 3, "--tag gives site twice")
    assert not (tmp_path / "device").exists()
    result = agent(*words, "--tag", "site=berlin", "--tag", "hall=3")
    assert "ferry-agent enroll --token-file FILE" in result.stdout
    told = json.loads(agent("status", "--json", "--dir", str(tmp_path / "device")).stdout)
    assert told["tags"] == ["site=berlin", "hall=3"]


@pytest.mark.parametrize("place", ["https://updates.example.com:8443/f", "HTTP://10.0.0.1", "http://[::1]:80/f", "file:///srv/a b",
                                   "/srv/not mounted yet", "rel#ative?"])  # fmt: skip
def test_agent_init_takes_what_may_work_later(place: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import hashlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)
    anchor = prepared / "root.json"
    result = agent(
        "init", "--device", "press-01", "--line", "shapes", "--class", "edge", "--repository", place, "--reports", "not#there/yet",
        "--root", str(anchor), "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(), "--dir", "device",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["device"]
    config = json.loads((tmp_path / "device" / "config.json").read_bytes())
    assert config["repository"] == (place if ":/" in place else str(tmp_path / place))
    if not place.lower().startswith("http"):
        told = agent("doctor", "--no-draw", "--dir", "device").stdout
        assert f"there is no repository in {tmp_path / place.removeprefix('file://')};" in told
        assert f"there is no folder {tmp_path / 'not#there/yet'}; mount it or make it" in told


def test_empty_variable_makes_no_device_of_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERRY_AGENT_DIR", "")
    assert "argument --dir: it is empty" in agent("status").stderr
    assert agent("--version").exit_code == 0
    assert agent("status", "--dir", ".").exit_code == 3


@pytest.mark.parametrize("below", ["", "/x"])
def test_file_in_place_of_the_agents_directory_is_said(below: str, tmp_path: Path):
    place = tmp_path / "file"
    place.write_bytes(b"")
    for command in ("status", "update", "doctor", "run", "serve"):
        result = agent(command, "--dir", f"{place}{below}")
        assert result.exit_code == 3
        assert f"{place}{below} is not a folder; give the agent's directory with --dir" in result.output


def test_agent_without_a_repository_can_try_later(prepared: Path, tmp_path: Path):
    import hashlib

    anchor = prepared / "root.json"
    digest = hashlib.sha256(anchor.read_bytes()).hexdigest()
    where = ("--dir", str(tmp_path / "device"))
    made = agent(
        "init", "--device", "press-01", "--line", "shapes", "--class", "edge", "--repository", str(tmp_path / "gone"), "--root",
        str(anchor), "--root-sha256", digest, *where, "--json",
    )  # fmt: skip
    assert len(json.loads(made.stdout)["public_key"]) == 64
    result = agent("--quiet", "update", *where)
    assert result.exit_code == 4
    assert "there is no repository in" in result.stderr


def test_demo_that_was_killed_in_its_first_step_is_played_on_in_its_folder(tmp_path: Path):
    from flows.demo import SETTINGS, is_finished

    folder = tmp_path / "ferry-demo"
    assert not is_finished(folder)
    folder.mkdir()
    assert not is_finished(folder)
    (folder / "ferry.toml").write_text(SETTINGS)
    (folder / "keys").mkdir()
    assert not is_finished(folder)
    (folder / "ferry.toml").write_text(SETTINGS + "# mine")
    assert is_finished(folder)
    (folder / "work").mkdir()
    for done, finished in ((["init"], False), (["init", "report"], True)):
        (folder / "work" / "demo.json").write_text(json.dumps({"done": done}))
        assert is_finished(folder) is finished
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    assert is_finished(other)


class Interrupted(BaseModel):
    """A value during whose serialization somebody presses Ctrl-C."""

    @model_serializer(mode="plain")
    def _at_once(self) -> str:
        raise KeyboardInterrupt


def load() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise ImportError("a library that did not load")  # noqa: B904


@pytest.mark.parametrize("step", [lambda: Interrupted().model_dump_json(), load], ids=["serializing", "loading"])
def test_interrupt_that_a_library_wraps_is_told_in_one_line(step: Callable[[], None], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit) as ended, shared.reported_errors():
        step()
    assert (ended.value.exit_code, capsys.readouterr().err) == (130, "ferry: interrupted; repeat the command to go on\n")


def test_interrupt_while_the_command_loads_is_told_in_one_line():
    # Ctrl-C comes at the first import of typer.
    code = (
        "import sys\nclass Stop:\n    def find_spec(self, name, *_):\n        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\nimport flows.cli"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (told.returncode, told.stdout, told.stderr) == (130, "", "ferry: interrupted; repeat the command to go on\n")

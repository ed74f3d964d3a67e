"""Git and DVC work on the named workspace as they always do, whatever the environment and a user's settings say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow  # noqa: F401 - before ours, which it looks for when it is imported
import pytest
from typer.testing import CliRunner

from flows import cli
from model import git, versions
from model.errors import RevisionError
from registry import lineage
from registry.dataset import DvcDatasetSource
from tests.conftest import few

from .conftest import write_images

DATA = "data/shapes"
ME = ("-c", "user.name=a", "-c", "user.email=a@b")


def ferry(root: Path, *words: str) -> Any:
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", *words, "--json"])
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace with one data revision and a later change; each test copies it."""
    root = tmp_path_factory.mktemp("git") / "ws"
    assert CliRunner().invoke(cli.app, ["init", str(root), "--line", "shapes"]).exit_code == 0
    write_images(root / DATA, 12)
    ferry(root, "add", "shapes", "-m", "first")
    write_images(root / DATA, 1, seed=9, dim=True)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    root = Path(shutil.copytree(made, tmp_path / "ws", symlinks=True))
    versions.init(root, str(root / "dvc-remote"))
    return root


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Create somebody else's repository, with a file that nobody committed."""
    folder = tmp_path / "other"
    folder.mkdir()
    git.run(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "mine.txt").write_text("mine")
    git.run(folder, *ME, "commit", "--quiet", "--allow-empty", "-m", "mine")
    return folder


def everything(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_second_revision(root: Path) -> None:
    """Check that what was added is the second revision, that nothing is left over, and that it can be delivered."""
    rows = ferry(root, "log", "shapes")["revisions"]
    assert [row["message"] for row in rows] == ["second", "first"]
    assert rows[0]["rev"] == git.run(root, "rev-parse", "HEAD")
    assert git.run(root, "status", "--porcelain", "--untracked-files=no") == ""
    told = ferry(root, "status", "shapes")
    assert (told["dirty"], told["remote_lacks"], told["revision"]["rev"]) == (False, [], rows[0]["rev"])
    assert ferry(root, "diff", "shapes", rows[1]["rev"])["changes"]["added"] == ["dim-000.png"]


VARIABLES: dict[str, str] = {
    "GIT_DIR": "{other}/.git", "GIT_WORK_TREE": "{other}", "GIT_INDEX_FILE": "{other}/.git/index", "GIT_COMMON_DIR": "{other}/.git",
    "GIT_OBJECT_DIRECTORY": "{other}/.git/objects", "GIT_ALTERNATE_OBJECT_DIRECTORIES": "{other}/nowhere", "GIT_NAMESPACE": "elsewhere",
    "GIT_CEILING_DIRECTORIES": "{root}", "GIT_CONFIG": "{other}/.git/config", "GIT_CONFIG_PARAMETERS": "not 'what Git writes", "GIT_CONFIG_COUNT": "many",
    "GIT_PREFIX": "data/", "GIT_SHALLOW_FILE": "{other}/shallow", "GIT_REPLACE_REF_BASE": "refs/other/", "GIT_GRAFT_FILE": "{other}/graft",
    "GIT_QUARANTINE_PATH": "{other}/quarantine", "GIT_ICASE_PATHSPECS": "1", "GIT_GLOB_PATHSPECS": "1", "GIT_NOGLOB_PATHSPECS": "1",
    "GIT_DEFAULT_HASH": "sha256", "GIT_DEFAULT_REF_FORMAT": "reftable", "GIT_TEMPLATE_DIR": "{other}/template", "GIT_IMPLICIT_WORK_TREE": "0",
    "GIT_EXTERNAL_DIFF": "false", "GIT_TRACE": "1", "GIT_OPTIONAL_LOCKS": "0", "GIT_ATTR_SOURCE": "HEAD~7", "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_INTERNAL_SUPER_PREFIX": "x/", "GIT_DISCOVERY_ACROSS_FILESYSTEM": "no", "GIT_REFLOG_ACTION": "\n",
}  # fmt: skip


@pytest.mark.parametrize("name", few(["all of them", *VARIABLES], 6))
def test_variables_lead_into_no_other_repository(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in VARIABLES if name == "all of them" else [name]:
        monkeypatch.setenv(variable, VARIABLES[variable].format(other=other, root=root))
    before = everything(other)
    ferry(root, "add", "shapes", "-m", "second")
    assert_second_revision(root)
    assert everything(other) == before


@pytest.mark.parametrize("name", ["GIT_DIR", "all of them"])
def test_variables_lead_no_new_workspace_astray(other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = tmp_path / "new"
    for variable in VARIABLES if name == "all of them" else [name]:
        monkeypatch.setenv(variable, VARIABLES[variable].format(other=other, root=root))
    before = everything(other)
    assert CliRunner().invoke(cli.app, ["init", str(root), "--line", "shapes"]).exit_code == 0
    write_images(root / DATA, 4)
    rev = ferry(root, "add", "shapes")["rev"]
    assert (root / ".git/refs/heads/main").read_text() == f"{rev}\n"
    assert len(rev) == 40  # a hash that DVC can read
    assert everything(other) == before


def test_records_name_the_workspaces_own_repository(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what goes into MLflow: where data and code come from, and a revision that is loaded from there."""
    git.run(root, "remote", "add", "origin", "https://me:secret@example.com/ws.git")
    git.run(other, "remote", "add", "origin", "https://example.com/other.git")
    version = versions.resolve(root, DATA, "shapes")
    lineage.code_tags.cache_clear()
    code = lineage.code_tags()
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value.format(other=other, root=root))
    lineage.code_tags.cache_clear()
    assert lineage.code_tags() == code
    assert lineage.repository_of(root) == "https://example.com/ws.git"
    loaded = DvcDatasetSource(str(root), version.rev, version.path, version.md5).load()
    assert versions.folder_md5(Path(loaded)) == version.md5


def test_identity_and_settings_files_still_count(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gitconfig").write_text("[user]\nname = Ada\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_COMMITTER_EMAIL", "build@example.com")
    ferry(root, "add", "shapes", "-m", "second")
    assert git.run(root, "log", "-1", "--format=%an <%ae> %cn <%ce>") == "Ada <ferry@localhost> Ada <build@example.com>"


def hook(root: Path, name: str) -> None:
    path = root / ".git/hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\ntouch ran\nexit 1\n")
    path.chmod(0o755)


def hooks(root: Path) -> None:
    for name in ("pre-commit", "prepare-commit-msg", "commit-msg", "post-commit", "reference-transaction", "post-index-change"):
        hook(root, name)


def hooks_elsewhere(root: Path) -> None:
    hooks(root)
    (root / ".git/hooks").rename(root.parent / "hooks")
    git.run(root, "config", "core.hooksPath", str(root.parent / "hooks"))


def setting(*pairs: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for pair in pairs:
            git.run(root, "config", *pair.split("=", 1))

    return change


def attributes(root: Path) -> None:
    """Set attributes like those of a repository that keeps JSON in Git LFS, with line ends of another system."""
    setting("filter.broken.clean=false", "filter.broken.required=true")(root)
    (root / ".gitattributes").write_text("*.json filter=broken\n*.dvc text eol=crlf\n")


def ignored(root: Path) -> None:
    (root / ".git/info").mkdir(exist_ok=True)
    (root / ".git/info/exclude").write_text("*.json\n.dvcignore\n.gitignore\nconfig\n")


AROUND: dict[str, Callable[[Path], None]] = {
    "hooks that refuse": hooks,
    "hooks elsewhere": hooks_elsewhere,
    "signing without a key": setting("commit.gpgSign=true", "gpg.program=false"),
    "line ends": setting("core.autocrlf=true", "core.safecrlf=true", "core.eol=crlf"),
    "names in quotes": setting("core.quotePath=true"),
    "signatures in the log": setting("log.showSignature=true", "gpg.program=false"),
    "a log that follows names": setting("log.follow=true"),
    "another encoding": setting("i18n.commitEncoding=ISO-8859-1", "i18n.logOutputEncoding=UTF-16"),
    "colour and pager": setting("color.ui=always", "core.pager=false", "format.pretty=raw", "log.date=relative"),
    "a monitor of files": setting("core.fsmonitor=false-program"),
    "no guessed identity": setting("user.useConfigOnly=true"),
    "comments in messages": setting("core.commentChar=s", "commit.cleanup=strip", "commit.template=/nowhere"),
    "a filter": attributes,
    "ignored files": ignored,
}


@pytest.mark.parametrize("what", few(AROUND, 3))
def test_settings_do_not_stop_a_revision(root: Path, what: str) -> None:
    AROUND[what](root)
    ferry(root, "add", "shapes", "-m", "second")
    (root / ".gitattributes").unlink(missing_ok=True)  # Git's own `status` would use it
    assert_second_revision(root)
    assert not list(root.parent.rglob("ran"))


def test_dvcs_settings_do_not_change_what_is_recorded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore a user's own settings, wherever the environment puts them."""
    (tmp_path / "dvc").mkdir()
    (tmp_path / "dvc/config").write_text("[core]\nno_scm = true\nautostage = true\nremote = other\n[cache]\ntype = symlink\n")
    for name, value in {
        "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "dvc"), "DVC_SYSTEM_CONFIG_DIR": str(tmp_path / "dvc"), "DVC_ROOT": str(tmp_path / "nowhere"),
        "DVC_EXP_AUTO_PUSH": "1", "DVC_EXP_GIT_REMOTE": str(tmp_path / "other"), "DVC_SHOW_TRACEBACK": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    ferry(root, "add", "shapes", "-m", "second")
    assert_second_revision(root)
    assert not any(path.is_symlink() for path in (root / DATA).iterdir())
    (root / DATA / "link.png").symlink_to("000.png")
    index = git.run(root, "ls-files", "--stage")
    assert CliRunner().invoke(cli.app, ["-w", str(root), "data", "add", "shapes"]).exit_code == 3
    assert git.run(root, "ls-files", "--stage") == index


def test_workspace_inside_another_repository_is_its_own(other: Path) -> None:
    root = other / "factory/ws"
    assert CliRunner().invoke(cli.app, ["init", str(root), "--line", "shapes"]).exit_code == 0
    (other / ".gitignore").write_text("*\n")
    write_images(root / DATA, 12)
    ferry(root, "add", "shapes", "-m", "first")
    write_images(root / DATA, 1, seed=9, dim=True)
    ferry(root, "add", "shapes", "-m", "second")
    assert_second_revision(root)
    assert git.run(other, "log", "--format=%s") == "mine"
    shutil.rmtree(root / ".git")
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", "log", "shapes"])
    assert (told.exit_code, told.stdout) == (3, "")
    assert told.stderr.startswith("ferry: git rev-parse failed: not a git repository")


def test_repository_that_git_does_not_trust_is_not_called_empty(root: Path) -> None:
    (root / ".git/config").write_text("[core\n")
    for words in (["log", "shapes"], ["status", "shapes"], ["add", "shapes"], ["diff", "shapes", "HEAD"]):
        told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", *words])
        assert (told.exit_code, told.stdout) == (3, "")
        assert "bad config line 1 in file" in told.stderr
        assert len(told.stderr.splitlines()) == 1


def test_commit_that_somebody_makes_meanwhile_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = versions._send

    def meanwhile(*arguments: Any) -> None:
        send(*arguments)
        git.run(root, *ME, "commit", "--quiet", "--allow-empty", "-m", "mine")

    monkeypatch.setattr(versions, "_send", meanwhile)
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", "add", "shapes", "-m", "second"])
    assert (told.exit_code, "git update-ref failed" in told.stderr) == (3, True)
    assert git.run(root, "log", "-1", "--format=%s") == "mine"
    monkeypatch.setattr(versions, "_send", send)
    ferry(root, "add", "shapes", "-m", "second")
    assert_second_revision(root)
    assert git.run(root, "log", "--format=%s").splitlines() == ["second", "mine", "first"]


def test_git_that_is_missing_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RevisionError, match="git is not installed; install it"):
        git.run(root, "rev-parse", "HEAD")
    assert lineage.repository_of(root) == str(root)


def test_processes_that_are_started_later_are_not_redirected(root: Path, other: Path) -> None:
    """Protect later processes too: MLflow asks Git by a library of its own, and Prefect starts processes."""
    code = "import os, sys; from pathlib import Path; from flows.workspace import Workspace; Workspace(Path(sys.argv[1])); print(*os.environ)"
    environment = os.environ | {name: value.format(other=other, root=root) for name, value in VARIABLES.items()}
    told = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, env=environment, check=True)
    assert not set(told.stdout.split()) & {*VARIABLES}
    assert {"GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"} <= set(told.stdout.split())

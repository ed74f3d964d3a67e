"""Data revisions: DVC holds the bytes, Git holds their hashes, and what is pulled is checked against the hash.

    >>> version = add(workspace, "data/surfaces", line="surfaces", message="first delivery")
    >>> pull(workspace, version, Path("work/data"))

DVC's own pull does not verify by default, and never notices an object that is already damaged in its cache; `pull`
recomputes the revision's hash from the bytes it delivers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from model.errors import RevisionError
from model.scorecard import DataVersion

GIT_IDENTITY = ("-c", "user.name=ferry", "-c", "user.email=ferry@localhost")  # where Git knows no other


def git(root: Path, *arguments: str) -> str:
    """Run Git in a workspace and return what it prints.

    Raises:
        RevisionError: Git is missing, or refuses.
    """
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except FileNotFoundError:
        raise RevisionError("git is not installed; install it, data revisions are Git commits") from None
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise RevisionError(f"git {arguments[0]} failed: {reason[-1] if reason else 'no reason given'}")
    return done.stdout.strip()


@contextmanager
def _dvc(root: Path) -> Iterator[Any]:
    """An open DVC repository that neither phones home nor writes to the terminal."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    try:
        repo = Repo(str(root))
        try:
            yield repo
        finally:
            repo.close()
    except DvcException as error:
        raise RevisionError(f"DVC failed: {error}; see its own message, and `dvc doctor` in {root}") from error


def init(root: Path, remote: str, s3_endpoint: str = "") -> None:
    """Make `root` a Git and DVC repository whose data go to `remote`, a folder or an s3:// URL; repeatable.

    What somebody else wrote into DVC's configuration (credentials, say) is left there.
    """
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    if not (root / ".dvc" / "config").is_file():
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.CRITICAL)
        shutil.rmtree(root / ".dvc", ignore_errors=True)  # half made by a killed run: no config, so nothing in it yet
        Repo.init(str(root)).close()
    (root / ".dvcignore").touch()  # where the kill came after the config
    with _dvc(root) as repo, repo.config.edit() as config:
        config["core"] |= {"analytics": False, "check_update": False, "remote": "storage"}
        storage = config["remote"].setdefault("storage", {})
        storage |= {"url": remote, "verify": True}
        if s3_endpoint and remote.startswith("s3://"):
            storage["endpointurl"] = s3_endpoint


def add(root: Path, path: str, line: str, message: str) -> DataVersion:
    """Record the folder's present content as a revision, and push its bytes to the remote; unchanged content adds none.

    Args:
        root: the workspace.
        path: the data folder, relative to it.
        line: whose data they are.
        message: of the Git commit.

    Raises:
        RevisionError: Git or DVC refuse.
    """
    with _dvc(root) as repo:
        repo.add([str(root / path)])
        repo.push([str(root / f"{path}.dvc")])
    ours = (f"{path}.dvc", str(Path(path).parent / ".gitignore"), ".dvc/config", ".dvc/.gitignore", ".dvcignore")
    git(root, "add", *ours)
    if git(root, "diff", "--cached", "--name-only", "--", *ours):  # whatever else is staged is not ours to commit
        identity = () if _has_identity(root) else GIT_IDENTITY
        git(root, *identity, "commit", "--quiet", "-m", message, "--", *ours)
    return resolve(root, path, line, "HEAD")


def _has_identity(root: Path) -> bool:
    try:
        return bool(git(root, "config", "user.email"))
    except RevisionError:
        return False


def resolve(root: Path, path: str, line: str, rev: str = "HEAD") -> DataVersion:
    """What a Git revision says about a data folder. The commit named is the last one that touched the data.

    Raises:
        RevisionError: no such revision, or it does not hold these data.
    """
    try:
        git(root, "rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}")
    except RevisionError:
        raise RevisionError(f"there is no data revision {rev!r}; `ferry data log {line}` lists them") from None
    try:
        out = yaml.safe_load(git(root, "show", f"{rev}:{path}.dvc"))["outs"][0]
        commit = git(root, "log", "-1", "--format=%H", rev, "--", f"{path}.dvc")
        return DataVersion(line=line, path=path, rev=commit, md5=out["md5"], files=out.get("nfiles", 1), bytes=out["size"])
    except (RevisionError, yaml.YAMLError, KeyError, IndexError, TypeError):
        raise RevisionError(f"revision {rev!r} holds no data for {line}; record some with `ferry data add {line}`") from None


def log(root: Path, path: str, line: str) -> list[tuple[DataVersion, str]]:
    """All revisions of a data folder with their commit messages, newest first."""
    try:
        rows = git(root, "log", "--format=%H %s", "--", f"{path}.dvc").splitlines()
    except RevisionError:  # a repository without a commit
        return []
    return [(resolve(root, path, line, row.split(" ", 1)[0]), row.split(" ", 1)[1]) for row in rows]


def is_dirty(root: Path, path: str) -> bool:
    """Whether the folder holds something else than the revision at HEAD."""
    if git(root, "status", "--porcelain", "--", f"{path}.dvc"):  # recorded by a killed `add`, but not committed
        return True
    with _dvc(root) as repo:
        return bool(repo.status([str(root / f"{path}.dvc")]))


def check_clean(root: Path, path: str, line: str) -> None:
    """Refuse to go on while the data folder holds something that no revision has.

    Raises:
        RevisionError: it does.
    """
    if is_dirty(root, path):
        raise RevisionError(
            f"{path} holds changes that no revision has; record them with `ferry data add {line}`, or name a revision with --data"
        )


def pull(root: Path, version: DataVersion, into: Path) -> Path:
    """Deliver a revision's files to a folder of their own and verify every byte; repeatable.

    Returns:
        the folder, `into/<md5>`.

    Raises:
        RevisionError: an object is missing or damaged.
    """
    place = into / version.md5.removesuffix(".dir")
    if place.is_dir():
        return place
    fresh = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    from dvc.api import DVCFileSystem

    with _dvc(root) as repo:
        try:
            DVCFileSystem(repo=str(repo.root_dir), rev=version.rev).get(version.path, str(fresh), recursive=True)
        except Exception as error:  # what DVC and its file systems raise has no common base
            shutil.rmtree(fresh, ignore_errors=True)
            raise RevisionError(
                f"revision {version.rev[:12]} of {version.line} cannot be fetched: {_first_line(error)}; restore the "
                "object in the DVC remote"
            ) from error
    if folder_md5(fresh) != version.md5:
        shutil.rmtree(fresh)
        raise RevisionError(
            f"revision {version.rev[:12]} of {version.line} is damaged in the DVC cache or remote: its bytes do not have "
            "the recorded hash; delete the bad object from .dvc/cache and restore it in the remote"
        )
    fresh.rename(place)
    return place


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def folder_md5(folder: Path) -> str:
    """DVC's hash of a folder, recomputed from its bytes: the md5 of the sorted list of relative paths and md5s."""
    rows = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(folder).as_posix()}  # noqa: S324
        for path in folder.rglob("*")
        if path.is_file()
    ]
    rows.sort(key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir"  # noqa: S324

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model.errors import RevisionError
from model.scorecard import DataVersion

REPORT = ".arrival.json"  # beside a folder's pointer: what was found when it was recorded
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


def add(root: Path, path: str, line: str, message: str, report: Callable[[str], str] | None = None) -> DataVersion:
    """Record the folder's present content as a revision, and push its bytes to the remote; unchanged content adds none.

    Args:
        root: the workspace.
        path: the data folder, relative to it.
        line: whose data they are.
        message: of the Git commit.
        report: called with DVC's hash of the folder; what it returns is kept in the same commit, see `report_of`.

    Raises:
        RevisionError: Git or DVC refuse, or an object that the remote lacks is damaged here too.
    """
    pointer, beside = f"{path}.dvc", f"{path}{REPORT}"
    with _dvc(root) as repo:
        repo.add([str(root / path)])
        try:
            repo.push([str(root / pointer)])
            _complete(repo, str(yaml.safe_load((root / pointer).read_text())["outs"][0]["md5"]))
        except RevisionError:
            raise
        except Exception as error:  # what DVC and its file systems raise has no common base
            raise RevisionError(
                f"the DVC remote cannot be written: {_first_line(error)}; check stores.data and s3_endpoint in ferry.toml, and repeat"
            ) from error
    ours = [pointer, str(Path(path).parent / ".gitignore"), ".dvc/config", ".dvc/.gitignore", ".dvcignore"]
    git(root, "add", *ours)
    if report and git(root, "diff", "--cached", "--name-only", "--", pointer):
        (root / beside).write_text(report(yaml.safe_load((root / pointer).read_text())["outs"][0]["md5"]))
        ours.append(beside)
        git(root, "add", beside)
    if git(root, "diff", "--cached", "--name-only", "--", *ours):  # whatever else is staged is not ours to commit
        identity = () if _has_identity(root) else GIT_IDENTITY
        git(root, *identity, "commit", "--quiet", "-m", message, "--", *ours)
    return resolve(root, path, line, "HEAD")


def _listed(repo: Any, path: str, rev: str) -> dict[str, str]:
    """The files of a revision by name, and DVC's hash of each."""
    from dvc.api import DVCFileSystem

    rows = DVCFileSystem(repo=str(repo.root_dir), rev=rev).find(path, detail=True)
    return {Path(name).relative_to(path).as_posix(): row["md5"] for name, row in rows.items() if row.get("md5")}


def files(root: Path, version: DataVersion) -> dict[str, str]:
    """The files of a revision by name, and the md5 of each; only their list is fetched.

    Raises:
        RevisionError: the list is missing or damaged, or Git does not have the revision.
    """
    with _dvc(root) as repo:
        try:
            rows = _listed(repo, version.path, _commit_of(root, version))
        except RevisionError:
            raise
        except Exception as error:  # what DVC and its file systems raise has no common base
            raise _unfetched(version, error) from error
    if list_md5(rows) != version.md5:
        raise _damaged(version)
    return rows


def missing(root: Path, version: DataVersion) -> list[str]:
    """The files of a revision that the remote does not hold, each asked for by itself.

    DVC's own `status --cloud` believes its index: it calls a revision complete whose list alone is there.

    Raises:
        RevisionError: the remote cannot be asked, or the revision's list cannot be had.
    """
    rows = files(root, version)
    with _dvc(root) as repo:
        try:
            remote = repo.cloud.get_remote_odb()
            held = set(remote.list_oids_exists([*rows.values(), version.md5]))
        except Exception as error:  # what DVC and its file systems raise has no common base
            raise RevisionError(
                f"the DVC remote cannot be asked: {_first_line(error)}; check stores.data in ferry.toml"
            ) from error
    return sorted(name for name, md5 in rows.items() if md5 not in held) + ([] if version.md5 in held else ["(the list itself)"])


def _complete(repo: Any, md5: str) -> None:
    """Of a folder that was just added, send what the remote lacks although DVC believes that it is there (push never looks again once the list is).

    Raises:
        RevisionError: such an object is damaged in the cache, too.
    """
    remote, cache = repo.cloud.get_remote_odb(), repo.cache.local
    names = {row["md5"]: row["relpath"] for row in json.loads(Path(cache.oid_to_path(md5)).read_bytes())}
    held = set(remote.list_oids_exists(list(names)))
    for oid in names.keys() - held:
        path = Path(cache.oid_to_path(oid))
        if hashlib.md5(path.read_bytes()).hexdigest() != oid:  # noqa: S324
            raise RevisionError(f"{path} does not have the recorded bytes of {names[oid]}; delete that object and repeat")
        remote.add(str(path), cache.fs, oid)


def report_of(root: Path, version: DataVersion) -> str | None:
    """What was recorded beside a revision; None: nothing.

    Raises:
        RevisionError: Git does not have the revision.
    """
    rev = _commit_of(root, version)
    try:
        return git(root, "show", f"{rev}:{version.path}{REPORT}")
    except RevisionError:
        return None


def _commit_of(root: Path, version: DataVersion) -> str:
    """A commit that holds a revision: its own, or after a rewrite of the history another one with the same content.

    Raises:
        RevisionError: there is none any more.
    """
    try:
        git(root, "cat-file", "-e", f"{version.rev}^{{commit}}")
    except RevisionError:
        for rev in git(root, "log", "--all", "--format=%H", "--", f"{version.path}.dvc").splitlines():
            try:
                same = resolve(root, version.path, version.line, rev).md5 == version.md5
            except RevisionError:  # a commit that removes the pointer
                continue
            if same:
                return rev
        raise RevisionError(
            f"revision {version.rev[:12]} of {version.line} is no longer in Git, its history was rewritten; fetch that commit from "
            "another clone (`git fetch CLONE COMMIT`) and keep it with `git tag`, or record the data again with "
            f"`ferry data add {version.line}`"
        ) from None
    return version.rev


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
    except (RevisionError, yaml.YAMLError, LookupError, TypeError, ValidationError):
        raise RevisionError(f"revision {rev!r} holds no data for {line}; record some with `ferry data add {line}`") from None


def log(root: Path, path: str, line: str, newest: int | None = None) -> list[tuple[DataVersion, str]]:
    """The revisions of a data folder with their commit messages, newest first; all of them, or so many."""
    limit = [] if newest is None else [f"-{newest}"]
    try:
        rows = git(root, "log", *limit, "--format=%H %s", "--", f"{path}.dvc").splitlines()
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

    rev = _commit_of(root, version)
    with _dvc(root) as repo:
        try:
            DVCFileSystem(repo=str(repo.root_dir), rev=rev).get(version.path, str(fresh), recursive=True)
        except Exception as error:  # what DVC and its file systems raise has no common base
            shutil.rmtree(fresh, ignore_errors=True)
            raise _unfetched(version, error) from error
    delivered = _hashes(fresh)
    if list_md5(delivered) != version.md5:
        shutil.rmtree(fresh)
        recorded = files(root, version)  # or it is the list itself that is damaged
        raise _damaged(version, next((oid for name, oid in recorded.items() if delivered.get(name) != oid), ""))
    fresh.rename(place)
    return place


def _unfetched(version: DataVersion, error: Exception) -> RevisionError:
    return RevisionError(
        f"revision {version.rev[:12]} of {version.line} cannot be fetched: {_first_line(error)}; restore the object in the DVC remote"
    )


def _damaged(version: DataVersion, oid: str = "") -> RevisionError:
    which = f"object files/md5/{oid[:2]}/{oid[2:]}" if oid else "bad object"
    return RevisionError(
        f"revision {version.rev[:12]} of {version.line} is damaged in the DVC cache or remote: its bytes do not have "
        f"the recorded hash; delete the {which} from .dvc/cache and restore it in the remote"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def folder_md5(folder: Path) -> str:
    """DVC's hash of a folder, recomputed from its bytes: the md5 of the sorted list of relative paths and md5s."""
    return list_md5(_hashes(folder))


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()  # noqa: S324
        for path in folder.rglob("*")
        if path.is_file()
    }


def list_md5(files: dict[str, str]) -> str:
    """The same from the files' names and md5s."""
    rows = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir"  # noqa: S324

"""Data revisions: DVC stores the bytes, Git stores their hashes, and pulled data are checked against the hash.

    >>> version = add(workspace, "data/surfaces", line="surfaces", message="first delivery")
    >>> pull(workspace, version, Path("work/data"))

DVC's own pull does not verify by default, and does not notice an object that is already damaged in its cache. `pull`
recomputes the revision's hash from the bytes that it delivers.
"""

from __future__ import annotations

import hashlib
import json
import locale
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model.errors import DataError, RevisionError
from model.folder import check, entries, hashes, inside, md5_of, opened, shown, unreadable
from model.git import forget_redirections, run
from model.scorecard import DataVersion

REPORT = ".arrival.json"  # suffix of the data report, which is stored next to a folder's .dvc file
STORAGE = "storage"  # DVC's name of the remote
git = run  # called with the workspace as its folder
# These override the user's own settings of DVC: DVC stages nothing in Git, because we commit everything at once, ...
OURS = {"core": {"no_scm": False, "autostage": False}}
COPIES = {"cache": {"type": "reflink,copy"}}  # ... and delivered files are copies, never links to the cache


@contextmanager
def _dvc(root: Path) -> Iterator[Any]:
    """Open a DVC repository that sends no analytics and writes nothing to the terminal.

    Raises:
        RevisionError: DVC or one of its libraries fails, also within the block.
    """
    with dvc_errors(root):
        from dvc.repo import Repo

        repo = Repo(str(root), config=OURS)
        try:
            yield repo
        finally:
            repo.close()


@contextmanager
def dvc_errors(root: Path) -> Iterator[None]:
    """Turn what DVC raises in the block into one sentence, and keep it from sending analytics and from the terminal.

    Raises:
        RevisionError: DVC or one of its libraries fails.
    """
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    forget_redirections()
    try:
        import dvc.repo  # noqa: F401 - when imported, DVC sets the level of its log

        logging.getLogger("dvc").setLevel(logging.CRITICAL)
        yield
    except DataError:
        raise
    except Exception as error:  # what DVC and its libraries raise has no common base
        raise RevisionError(
            f"DVC failed: {_first_line(error)}; see its own message, and `dvc doctor` in {shown(root)}"
        ) from error


def init(root: Path, remote: str, s3_endpoint: str = "") -> None:
    """Make `root` a Git and DVC repository whose data go to `remote`, a folder or an s3:// URL; may be repeated.

    A relative folder starts at `root`. It is written relative to DVC's configuration, so that a workspace can be moved.

    Other entries of DVC's configuration, such as credentials, are kept.

    Raises:
        DataError: DVC's configuration is a link or another special file.
        RevisionError: Git is missing or fails, or DVC's configuration cannot be read or cannot hold the address of the remote.
    """
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    path = root / ".dvc" / "config"
    if (root / ".dvc" / "cache").is_dir():
        path.touch()  # only the settings were lost; recorded data stay
    if not path.exists():
        forget_redirections()
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.CRITICAL)
        shutil.rmtree(root / ".dvc", ignore_errors=True)  # incomplete after a killed run: without a config it holds nothing yet
        Repo.init(str(root)).close()
    (root / ".dvcignore").touch()  # missing if a run was killed after it wrote the config
    with opened(path) as file:
        present = file.read()
    written = _configured(present, address(remote), s3_endpoint)
    if written != present:
        fresh = path.with_name(f".config.{os.getpid()}.tmp")
        fresh.write_bytes(written)
        fresh.replace(path)


def address(remote: str) -> str:
    """Return how DVC's configuration names a remote: DVC lets a relative path start at the folder .dvc."""
    return remote if "://" in remote or Path(remote).is_absolute() else f"../{remote}"


def check_remote(remote: str) -> None:
    """Refuse the address of a remote that DVC's configuration cannot hold.

    Raises:
        RevisionError: it cannot hold the address.
    """
    _configured(b"", remote, "")


def _configured(present: bytes, remote: str, s3_endpoint: str) -> bytes:
    """Add our settings to the bytes of DVC's configuration; DVC's own writer supports only ASCII.

    Raises:
        RevisionError: the configuration cannot be read, or cannot hold the address of the remote.
    """
    from configobj import ConfigObj, ConfigObjError  # type: ignore[import-untyped]  # comes with DVC

    section, encoding = f'remote "{STORAGE}"', locale.getpreferredencoding(do_setlocale=False)  # the one in which DVC reads it
    ours = {"url": remote, "verify": "True"} | (
        {"endpointurl": s3_endpoint} if s3_endpoint and remote.startswith("s3://") else {}
    )
    try:
        config = ConfigObj(present.decode(encoding).splitlines(), interpolation=False, encoding=encoding)
        config.setdefault("core", {}).update({"analytics": "False", "check_update": "False", "remote": STORAGE})
        config.setdefault(section, {}).update(ours)
        written: bytes = b"\n".join(config.write()) + b"\n"
        kept = ConfigObj(written.decode(encoding).splitlines()).dict()[section]
    except (ConfigObjError, UnicodeError) as error:
        remedy = "correct .dvc/config, or choose another folder" if encoding.lower() == "utf-8" else "set LC_ALL=C.UTF-8"
        raise RevisionError(f"DVC's configuration cannot be read, or cannot hold '{shown(remote)}'; {remedy}") from error
    if ours.items() > kept.items():
        raise RevisionError(f"DVC's configuration cannot hold '{shown(remote)}'; choose another folder")
    return written


def add(
    root: Path,
    path: str,
    line: str,
    message: str,
    report: Callable[[str], str] | None = None,
    looked_at: dict[str, str] | None = None,
    also: Collection[str] = (),
) -> DataVersion:
    """Record the folder's current content as a revision, and push its bytes to the remote; unchanged content adds no revision.

    Args:
        root: the workspace.
        path: the data folder, relative to it.
        line: line that the data belong to.
        message: message of the Git commit.
        report: called with DVC's hash of new content; its result is stored in the same commit, see `report_of`.
        looked_at: content that was checked, as the md5 of every file by name; None: the current content.
        also: files of the workspace that a clone needs; they are committed, too, as they are now.

    Raises:
        DataError: the folder contains something that no revision can hold.
        RevisionError: the folder changed since it was checked, Git or DVC fails, or an object that the remote lacks is damaged in
            the cache. HEAD, the .dvc file, the report and .gitignore are then unchanged.
    """
    folder = check(root, path)
    pointer, beside, ignored = root / f"{path}.dvc", root / f"{path}{REPORT}", folder.parent / ".gitignore"
    with _put_back_unless_done(pointer, beside, ignored, root / ".dvcignore"), _dvc(root) as repo:
        expected = hashes(folder) if looked_at is None else looked_at
        md5 = list_md5(expected)
        _check_seen(repo, folder, expected)
        if _added(repo, folder, no_commit=True) != expected:
            repo.state.hashes.clear()  # DVC recognises a file that it has hashed by size and times alone
            _check_same(_added(repo, folder, no_commit=True), expected, folder)
        ours = [pointer, ignored, *(root / name for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", *also))]
        if report and _recorded(root, path) != md5:
            beside.write_text(report(md5), encoding="utf-8")
            ours.append(beside)
        publish = _commit(
            root, message, {file.relative_to(root).as_posix(): file.read_bytes() for file in ours if file.is_file()}
        )
        _check_same(_added(repo, folder), expected, folder)  # fills the cache only now
        _send(repo, expected, md5)
        publish()
    return resolve(root, path, line, "HEAD")


@contextmanager
def _put_back_unless_done(*files: Path) -> Iterator[None]:
    """Restore the previous content of files if the block raises.

    Raises:
        DataError: one of them is a link or another special file.
    """
    before: dict[Path, bytes | None] = {}
    for path in files:
        try:
            with opened(path) as file:
                before[path] = file.read()
        except FileNotFoundError:
            before[path] = None
        except OSError as error:
            raise unreadable(error, path) from error
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        raise


def _check_seen(repo: Any, folder: Path, expected: dict[str, str]) -> None:
    """Check that DVC would record exactly the expected files.

    Raises:
        RevisionError: a file was added or removed, or DVC would ignore one.
    """
    there = entries(folder)
    _check_same(dict.fromkeys(there, ""), dict.fromkeys(expected, ""), folder)
    for found in repo.dvcignore.find(repo.fs, str(folder)):
        there.pop(found.removeprefix(f"{folder}/"), None)
    if there:
        raise RevisionError(
            f"DVC would leave out {shown(folder / next(iter(there)))}, because of a .dvcignore or a folder named .dvc; "
            "remove the pattern or that folder"
        )


def _added(repo: Any, folder: Path, no_commit: bool = False) -> dict[str, str]:
    """Let DVC write its .dvc file and, unless `no_commit`, fill its cache; return the md5 of each file by name.

    The folder itself is not changed.
    """
    (stage,) = repo.add([str(folder)], no_commit=no_commit, relink=False)
    return {"/".join(key): found.value for key, _, found in stage.outs[0].obj}


def _check_same(now: dict[str, str], expected: dict[str, str], folder: Path) -> None:
    if now == expected:
        return
    name = min(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name))
    raise RevisionError(
        f"{shown(folder / name)} changed while it was checked; repeat once nothing writes into that folder any more"
    )


def _send(repo: Any, files: dict[str, str], md5: str) -> None:
    """Send the objects of a newly added folder that the remote lacks, the list of files last.

    DVC's own push does not check the files again once the list is in the remote.

    Raises:
        RevisionError: the remote cannot be written, or an object to send is damaged in the cache; the damaged object is deleted.
    """
    cache, names = repo.cache.local, {oid: name for name, oid in files.items()}
    try:
        remote = repo.cloud.get_remote_odb()
        held = set(remote.list_oids_exists([*names, md5]))
        lacking = [oid for oid in (*names, md5) if oid not in held]
        for oid in lacking:
            path = Path(cache.oid_to_path(oid))
            with path.open("rb") as file:
                damaged = md5_of(file) != oid.removesuffix(".dir")
            if damaged:
                path.unlink()
                raise RevisionError(
                    f"{shown(path)} did not have the recorded bytes of {shown(names.get(oid, 'the list of files'))} and is deleted; repeat"
                )
        for oids in ([oid for oid in lacking if oid != md5], [oid for oid in lacking if oid == md5]):
            remote.add([cache.oid_to_path(oid) for oid in oids], cache.fs, oids, check_exists=False, verify=False)
    except RevisionError:
        raise
    except Exception as error:  # what DVC and its file systems raise has no common base
        raise RevisionError(
            f"the DVC remote cannot be written: {_first_line(error)}; check stores.data and s3_endpoint in ferry.toml, and repeat"
        ) from error


def _commit(root: Path, message: str, files: dict[str, bytes]) -> Callable[[], None]:
    """Create a Git commit of files, and return the function that stages them and moves HEAD to it.

    Other staged changes are neither committed nor lost. Git's plumbing commands run no hooks or filters, obey no .gitignore and
    sign nothing, so the commit fails at once or not at all.
    """
    blobs = {name: git(root, "hash-object", "-w", "--stdin", given=content) for name, content in files.items()}
    rows = "".join(f"100644 {blob}\t{name}\0" for name, blob in blobs.items()).encode()
    index = ["update-index", "--add", "-z", "--index-info"]
    head = _head(root)
    with tempfile.TemporaryDirectory() as place:
        own = str(Path(place) / "index")
        if head:
            git(root, "read-tree", head, GIT_INDEX_FILE=own)
        git(root, *index, given=rows, GIT_INDEX_FILE=own)
        tree = git(root, "write-tree", GIT_INDEX_FILE=own)
    made = ""
    if not head or git(root, "rev-parse", f"{head}^{{tree}}") != tree:
        parent = ["-p", head] if head else []
        made = git(root, *_identity(root), "commit-tree", tree, *parent, "-F", "-", given=message.encode(errors="replace"))

    def publish() -> None:
        git(root, *index, given=rows)
        if made:
            git(root, *_identity(root), "update-ref", "-m", "ferry data add", "HEAD", made, head)

    return publish


def _head(root: Path) -> str:
    """Return the current commit; empty before the first one.

    Raises:
        RevisionError: there is no repository, or Git refuses to read it.
    """
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except RevisionError:
        git(root, "rev-parse", "--git-dir")
        return ""


def _identity(root: Path) -> list[str]:
    """Return `-c` options for the committer's name and e-mail address where Git knows none, as on a build machine.

    Values that Git knows are kept.
    """
    words: list[str] = []
    for name, fallback in (("user.name", "ferry"), ("user.email", "ferry@localhost")):
        try:
            known = git(root, "config", name)
        except RevisionError:
            known = ""
        words += [] if known else ["-c", f"{name}={fallback}"]
    return words


def _listed(repo: Any, path: str, rev: str) -> dict[str, str]:
    """List the files of a revision by name, with DVC's hash of each."""
    from dvc.api import DVCFileSystem

    rows = DVCFileSystem(repo=str(repo.root_dir), rev=rev).find(path, detail=True)
    return {Path(name).relative_to(path).as_posix(): row["md5"] for name, row in rows.items() if row.get("md5")}


def files(root: Path, version: DataVersion) -> dict[str, str]:
    """List the files of a revision by name, with the md5 of each; no file is fetched, only the list.

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
    """List the files of a revision that the remote lacks; the remote is asked for each object.

    DVC's own `status --cloud` trusts its index: it calls a revision complete if only the list of files is in the remote.

    Raises:
        RevisionError: the remote cannot be reached, or the revision's list of files cannot be read.
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


def report_of(root: Path, version: DataVersion) -> str | None:
    """Return the data report that was stored with a revision; None: there is none.

    Raises:
        RevisionError: Git does not have the revision.
    """
    rev = _commit_of(root, version)
    try:
        return git(root, "show", f"{rev}:{version.path}{REPORT}")
    except RevisionError:
        return None


def _commit_of(root: Path, version: DataVersion) -> str:
    """Find a commit that holds a revision: its own, or after a rewrite of the history another one with the same content.

    Raises:
        RevisionError: no commit holds it any more.
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
            f"revision {version.rev[:12]} of {version.line} is no longer in Git, because the history was rewritten; fetch "
            "that commit from "
            "another clone (`git fetch CLONE COMMIT`) and keep it with `git tag`, or record the data again with "
            f"`ferry data add {version.line}`"
        ) from None
    return version.rev


def message(root: Path, rev: str) -> str | None:
    """Return the first line of the message with which a revision was recorded; None: Git no longer has the revision."""
    try:
        return git(root, "log", "-1", "--format=%s", rev)
    except RevisionError:
        return None


def resolve(root: Path, path: str, line: str, rev: str = "HEAD") -> DataVersion:
    """Resolve a Git revision to the version of a data folder; its `rev` is the last commit that changed the data.

    Raises:
        RevisionError: there is no such Git revision, or it holds no data of this folder.
    """
    try:
        found = git(root, "rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}")
    except RevisionError:
        if not _head(root):  # it also raises if the repository itself cannot be read
            raise RevisionError(
                f"{line} has no data yet; put images and a metadata.jsonl into {path}, then run `ferry data add {line}`"
            ) from None
        raise RevisionError(f"there is no data revision '{shown(rev)}'; `ferry data log {line}` lists them") from None
    try:
        out = _pointer(root, path, found)
        commit = git(root, "log", "-1", "--format=%H", found, "--", f"{path}.dvc")
        return DataVersion(line=line, path=path, rev=commit, md5=out["md5"], files=out.get("nfiles", 1), bytes=out["size"])
    except (RevisionError, yaml.YAMLError, LookupError, TypeError, ValidationError):
        raise RevisionError(
            f"revision '{shown(rev)}' holds no data for {line}; record some with `ferry data add {line}`"
        ) from None


def is_in_history(root: Path, rev: str) -> bool:
    """Check whether the present commit is this one, or descends from it."""
    try:
        git(root, "merge-base", "--is-ancestor", rev, "HEAD")
    except RevisionError:  # it says no, or does not know the commit any more
        return False
    return True


def between(root: Path, path: str, line: str, first: str, last: str) -> list[DataVersion]:
    """List the versions of a data folder after one Git revision up to another, oldest first, each content once in a row.

    Raises:
        RevisionError: one is no revision with data, the last does not descend from the first, or the data did not change.
    """
    start, end = resolve(root, path, line, first), resolve(root, path, line, last)
    try:
        git(root, "merge-base", "--is-ancestor", start.rev, end.rev)
    except RevisionError:
        raise RevisionError(
            f"revision '{shown(last)}' does not come after '{shown(first)}'; write the older one first (`ferry data log {line}` lists them)"
        ) from None
    commits = git(root, "rev-list", "--reverse", f"{start.rev}..{end.rev}", "--", f"{path}.dvc").split()
    found: list[DataVersion] = []
    for version in (resolve(root, path, line, commit) for commit in commits):
        if version.md5 != (found[-1] if found else start).md5:
            found.append(version)
    if not found:
        raise RevisionError(
            f"the data of {line} did not change between '{shown(first)}' and '{shown(last)}'; name other revisions"
        )
    return found


def _pointer(root: Path, path: str, rev: str = "HEAD") -> Any:
    """Read the output entry of a folder's .dvc file at a Git revision.

    Raises:
        RevisionError, YAMLError, LookupError, TypeError: there is no such file, or it is damaged.
    """
    return yaml.safe_load(git(root, "show", f"{rev}:{path}.dvc"))["outs"][0]


def _recorded(root: Path, path: str) -> str:
    """Return the hash of a folder that the current commit records; empty if there is none."""
    try:
        return str(_pointer(root, path)["md5"])
    except (RevisionError, yaml.YAMLError, LookupError, TypeError):
        return ""


def log(root: Path, path: str, line: str, newest: int | None = None) -> list[tuple[DataVersion, str]]:
    """List the revisions of a data folder with their commit messages, newest first; all, or at most `newest`.

    Raises:
        RevisionError: Git cannot read the repository.
    """
    if not _head(root):
        return []
    limit = [] if newest is None else [f"-{newest}"]
    rows = git(root, "log", "-z", *limit, "--format=%H %s", "--", f"{path}.dvc").split("\0")
    told = [row.partition(" ") for row in rows if row.strip()]
    return [(resolve(root, path, line, rev), shown(message)) for rev, _, message in told]


def is_dirty(root: Path, path: str) -> bool:
    """Check whether the folder's content differs from the revision at HEAD; a missing folder differs.

    Raises:
        DataError: the folder contains something that no revision can hold.
        RevisionError: the folder has no revision yet, or Git fails.
    """
    recorded = _recorded(root, path)
    if not recorded:
        _head(root)
        raise RevisionError(f"nothing of {shown(path)} is recorded yet; record it with `ferry data add`")
    folder = inside(root, path)
    return not folder.is_dir() or list_md5(hashes(folder)) != recorded


def check_clean(root: Path, path: str, line: str) -> None:
    """Refuse a data folder whose content differs from the revision at HEAD.

    Raises:
        DataError: the folder contains something that no revision can hold.
        RevisionError: the content differs, the folder has no revision yet, or Git fails.
    """
    if is_dirty(root, path):
        if not any((root / path).glob("*")):
            raise RevisionError(
                f"{path} is empty, but data are recorded; fetch them with `ferry data pull {line}`, or name a revision with --data"
            )
        raise RevisionError(
            f"{path} holds changes that no revision has; record them with `ferry data add {line}`, or name a revision with --data"
        )


def pull(root: Path, version: DataVersion, into: Path) -> Path:
    """Deliver a revision's files to a folder of their own and verify every byte; may be repeated.

    A folder that was delivered before is verified again, and replaced if it differs.

    Returns:
        the folder, `into/<md5>`.

    Raises:
        RevisionError: an object is missing or damaged, or no commit holds the revision any more.
    """
    place = into / version.md5.removesuffix(".dir")
    if _holds(place, version):
        return place
    _remove(place)
    fresh = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    _remove(fresh)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    rev = _commit_of(root, version)
    with _dvc(root) as repo:
        from dvc.api import DVCFileSystem

        try:
            DVCFileSystem(repo=str(repo.root_dir), rev=rev, config=COPIES).get(version.path, str(fresh), recursive=True)
        except Exception as error:  # what DVC and its file systems raise has no common base
            _remove(fresh)
            raise _unfetched(version, error) from error
    if not _holds(fresh, version):
        delivered = hashes(fresh) if fresh.is_dir() else {}
        _remove(fresh)
        recorded = files(root, version)  # raises if the list itself is damaged
        raise _damaged(version, next((oid for name, oid in recorded.items() if delivered.get(name) != oid), ""))
    try:
        fresh.rename(place)
    except OSError:  # another process was first with the same content
        _remove(fresh)
        if not _holds(place, version):
            raise
    return place


def _holds(place: Path, version: DataVersion) -> bool:
    """Check whether a folder equals a revision byte for byte, and holds regular files only."""
    try:
        return place.is_dir() and not place.is_symlink() and folder_md5(place) == version.md5
    except DataError:
        return False


def _remove(path: Path) -> None:
    """Remove a file, folder or link; the target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])


def folder_md5(folder: Path) -> str:
    """Compute DVC's hash of a folder from its bytes: the md5 of the sorted list of relative paths and md5s.

    Raises:
        DataError: the folder contains something other than regular files, or a file cannot be read.
    """
    return list_md5(hashes(folder))


def list_md5(files: dict[str, str]) -> str:
    """Compute DVC's hash of a folder from the names and md5s of its files."""
    rows = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest() + ".dir"  # noqa: S324

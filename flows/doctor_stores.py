"""What `ferry doctor` asks of databases, servers, buckets and installed packages; each answers with a level and a sentence."""

from __future__ import annotations

import importlib.metadata
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from flows.workspace import SEEN, file_of, located
from model.folder import shown

Answer = tuple[Literal["ok", "warn", "fail"], str]
PATIENCE = 4.0  # seconds for a server's answer


def ledger(root: Path, database: str, clone: bool) -> Answer:
    """Check the database with the ledger and the fleet, and every entry of the ledger."""
    from ota.release.keys import KeyRing
    from registry.ledger import Ledger

    url = located(database, root)
    if problem := _unusable(url, "the ledger and the fleet", clone):
        return problem
    folder = root / "keys" / "clone" if clone else root / "keys"
    ring = KeyRing(folder)
    if not ring.ledger:
        return "warn", "no key signs it yet, because an older ferry wrote it; the next command that opens it makes one"
    opened = Ledger(url, ring, folder / SEEN)
    try:
        entries = opened.entries()
    finally:
        opened.close()
    return "ok", f"{len(entries)} entries, signed and complete"


def lost_masters(root: Path, database: str) -> Iterator[Answer]:
    """Yield a warning for each champion whose master is not among MLflow's files; those of a server cannot be looked at here."""
    from ota.release.keys import KeyRing
    from registry.ledger import Ledger
    from registry.promotion import subject_state
    from registry.seal import MASTER, is_whole

    files, place, ring = root / "mlartifacts", file_of(located(database, root)), KeyRing(root / "keys")
    if not files.is_dir() or not ring.ledger or (place is not None and not place.is_file()):
        return
    opened = Ledger(located(database, root), ring, root / "keys" / SEEN)
    try:
        entries = opened.entries()
    finally:
        opened.close()
    for subject in dict.fromkeys(entry.subject for entry in entries):
        seal = subject_state(entry for entry in entries if entry.subject == subject).champions_seal
        master = seal.master if seal else None
        kept = files.glob(f"{subject.partition('/')[0]}/*/artifacts/checkpoint/{MASTER}")
        if seal and master and not any(is_whole(path, master) for path in kept):
            begins = "the next retraining starts from the fielded weights; restore MLflow's files from a backup if you have one"
            yield "warn", f"the master of {seal.name} is lost or damaged, so {begins}"


def mlflow(root: Path, address: str, clone: bool) -> Answer:
    """Check that MLflow's server answers, or that its database can be read and names this workspace's files where they are."""
    from registry import addresses

    if address.startswith(("http://", "https://")):
        return _answers(address)
    url = located(address, root)
    place, files = file_of(url), (root / "mlartifacts").exists()
    new = not files and not (root / "keys" / SEEN).exists()  # neither MLflow nor the ledger was ever used
    if problem := _unusable(url, "MLflow's versions", clone or new):
        return problem
    if place is not None and files and _no_runs(place):
        return "fail", f"{place} knows none of the versions whose files are in {root / 'mlartifacts'}; restore it from a backup"
    moved = addresses.stale(url, root / "mlartifacts", own=place is not None and place.is_relative_to(root))
    if moved:
        return (
            "warn",
            f"MLflow looks for files in {moved[0]}; the next command that opens it corrects that to {root / 'mlartifacts'}",
        )
    lost = addresses.lost(url)
    if lost:
        return "fail", f"MLflow's files in {lost[0]} are missing; restore them from a backup"
    return "ok", "the database can be read, and the files are where it says"


def _no_runs(place: Path) -> bool:
    """Tell whether an MLflow database has no runs, because it is empty, new or another program's."""
    with closing(sqlite3.connect(f"{place.as_uri()}?mode=ro", uri=True)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone():
            return True
        return not connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone()


def _unusable(url: str, what: str, clone: bool) -> Answer | None:
    """Check that a database can be opened, without making one."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    place = file_of(url)
    if place is not None:
        if not place.is_file():
            return ("ok", f"{place} is made when it is first needed") if clone else (
                "fail", f"{place} with {what} is missing; restore it from a backup"
            )  # fmt: skip
        try:
            with closing(sqlite3.connect(f"{place.as_uri()}?mode=ro", uri=True)) as connection:
                damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.Error as error:
            damage = str(error)
        return None if damage == "ok" else ("fail", f"{place} with {what} is damaged ({damage}); restore it from a backup")
    try:
        engine = create_engine(url, connect_args={"connect_timeout": int(PATIENCE)} if url.startswith("postgresql") else {})
        with engine.connect() as connected:
            connected.execute(text("SELECT 1"))
        engine.dispose()
    except ModuleNotFoundError as error:
        return (
            "fail",
            f"the driver {error.name} of the database with {what} is not installed; `pip install 'deltaferry[postgres]'`",
        )
    except SQLAlchemyError as error:
        said = shown((str(error).splitlines() or [type(error).__name__])[0])
        return "fail", f"the database with {what} cannot be used: {said}; start it, or correct its address"
    return None


def _answers(address: str) -> Answer:
    """Check that an MLflow server answers; whether it accepts the account, only a command that needs it finds out."""
    import urllib3
    from urllib3.exceptions import HTTPError

    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    asked = parts._replace(netloc=host, path=parts.path.rstrip("/") + "/health", query="", fragment="").geturl()
    try:
        with urllib3.PoolManager(retries=False, timeout=PATIENCE) as pool:
            status = pool.request("GET", asked, redirect=False).status
    except (HTTPError, ValueError) as error:
        return "fail", f"MLflow's server at {host} does not answer ({type(error).__name__}); start it, or correct stores.mlflow"
    if status >= 500:
        return "fail", f"MLflow's server at {host} answers with status {status}; look at its log"
    return "ok", f"MLflow's server at {host} answers"


def bucket(url: str, endpoint: str) -> Answer:
    """Check that a bucket can be listed."""
    if not url.startswith("s3://"):
        return "fail", f"{url} is neither a folder nor s3://bucket/prefix; correct it"
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(url)
    quick = Config(retries={"total_max_attempts": 1}, connect_timeout=PATIENCE, read_timeout=PATIENCE)
    try:
        client = boto3.client("s3", endpoint_url=endpoint or None, config=quick)
        client.list_objects_v2(Bucket=parts.netloc, Prefix=parts.path.strip("/"), MaxKeys=1)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        return "fail", f"S3 refuses {url} with {code}; check the bucket, its policy, and AWS_ACCESS_KEY_ID"
    except (BotoCoreError, ValueError) as error:
        return "fail", f"S3 at {url} cannot be used: {error}; check s3_endpoint and the credentials"
    return "ok", f"{url} can be listed"


def packages() -> Iterator[str]:
    """Yield what is wrong with the installed packages: one is missing or of another version, or two wheels hold the same modules."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet

    try:
        mine = importlib.metadata.distribution("deltaferry")
    except importlib.metadata.PackageNotFoundError:
        yield "the package deltaferry is not installed, only its files are here; install it, so that its versions can be checked"
        return
    python = str(mine.metadata["Requires-Python"] or "")
    if python and not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        yield f"Python {platform.python_version()} is not in {python}; make an environment with another"
    for row in mine.requires or ():
        try:
            wanted = Requirement(row)
        except InvalidRequirement:
            continue
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{wanted.name} is not installed; `pip install '{wanted}'`"
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            yield f"{wanted.name} {there} is installed, but ferry needs {wanted.specifier}; `pip install '{wanted}'`"
    for other in ("deltaferry-agent", "deltaferry-delta"):
        try:
            importlib.metadata.distribution(other)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield f"{other} is installed beside deltaferry and holds the same modules; uninstall it, and install deltaferry again"

"""Artifact addresses in MLflow's database follow a workspace that was moved, restored elsewhere or copied.

MLflow stores an absolute address with every experiment, run, logged model and model version, and resolves none of them against
anything. `follow` rewrites those that name the former folder of this workspace's files. The ledger's seals hold hashes of the files
and no addresses, so they stay valid.
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sqlalchemy import Connection, column, create_engine, func, inspect, literal, select, table, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.elements import ColumnClause

ADDRESSES = {  # tables of MLflow, and their columns with addresses of files
    "runs": ("artifact_uri",), "logged_models": ("artifact_location",), "model_versions": ("source", "storage_location"),
    "experiments": ("artifact_location",),
}  # fmt: skip
OWNER, REPOSITORY = "workspace", "data.repo"  # tags that name the workspace's folder


def former(connection: Connection, artifacts: Path, own: bool) -> list[Path]:
    """List the folders under which MLflow's database looks for this workspace's files, and which are not `artifacts`.

    Args:
        connection: to MLflow's database.
        artifacts: folder of the workspace that holds the files.
        own: whether the database is a file of this workspace, so that all addresses of such files are its own. In another
            database they may belong to another workspace; they count only if nothing is there and the files are here.
    """
    found = set[Path]()
    columns = _column("name"), _column("artifact_location")
    for name, location in connection.execute(select(*columns).select_from(table("experiments", *columns))):
        parts = urlsplit(location or "")
        place = Path(url2pathname(parts.path))
        if (
            parts.scheme not in ("", "file")
            or not place.is_absolute()
            or (place.name, place.parent.name) != (name, artifacts.name)
        ):
            continue  # a server's, a bucket's, or one that ferry did not make
        folder = place.parent
        if folder == artifacts or (folder.exists() and artifacts.exists() and folder.samefile(artifacts)):
            continue
        if own or (not folder.exists() and (artifacts / name).is_dir()):
            found.add(folder)
    return sorted(found)


def stale(uri: str, artifacts: Path, own: bool) -> list[Path]:
    """List what `follow` would replace, without changing anything; empty for a new database, and for an address of a server.

    Raises:
        SQLAlchemyError: the database cannot be used.
    """
    if uri.startswith("http"):
        return []
    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            return former(connection, artifacts, own) if inspect(connection).has_table("experiments") else []
    finally:
        engine.dispose()


def lost(uri: str) -> list[Path]:
    """List the folders of experiments with runs that MLflow's database names and that are not there.

    Raises:
        SQLAlchemyError: the database cannot be used.
    """
    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("runs"):
                return []
            number, location, runs_of = _column("experiment_id"), _column("artifact_location"), _column("experiment_id")
            with_runs = select(runs_of).select_from(table("runs", runs_of))
            rows = select(location).select_from(table("experiments", number, location)).where(number.in_(with_runs))
            places = [urlsplit(found or "") for found in connection.scalars(rows)]
    finally:
        engine.dispose()
    folders = [Path(url2pathname(place.path)) for place in places if place.scheme in ("", "file")]
    return [folder for folder in folders if not folder.is_dir()]


def follow(uri: str, artifacts: Path, own: bool, host: str) -> int:
    """Let MLflow's database name the files where they are now; return how many addresses changed.

    All change or none. An error of the database is left to MLflow, which reports it when it opens the database.

    Args:
        uri: of MLflow: a database URL, or the address of a server, whose files have no path here.
        artifacts: folder of the workspace that holds the files.
        own: whether the database is a file of this workspace.
        host: name of this machine, for the tag that says who writes into a run.
    """
    try:
        olds = stale(uri, artifacts, own)
        if not olds:
            return 0
        engine = create_engine(uri)
        try:
            with engine.begin() as connection:
                return sum(
                    _replace(connection, old, artifacts, host) for old in former(connection, artifacts, own) if old in olds
                )
        finally:
            engine.dispose()
    except (SQLAlchemyError, ModuleNotFoundError):  # also if there is no driver for it
        return 0


def _replace(connection: Connection, old: Path, new: Path, host: str) -> int:
    """Replace the address of a folder of files in all tables of a database; return how many rows changed."""
    tables = {*inspect(connection).get_table_names()}
    changed = 0
    for name, columns in ADDRESSES.items():
        for column_name in columns if name in tables else ():
            for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
                held = _column(column_name)
                inside = func.substr(held, 1, len(before) + 1) == f"{before}/"  # LIKE would ignore case on SQLite
                done = connection.execute(
                    update(table(name, held)).where(inside).values({held: literal(after) + func.substr(held, len(before) + 1)})
                )
                changed += done.rowcount
    for name in {"tags", "model_version_tags"} & tables:
        _retag(connection, name, REPOSITORY, str(old.parent), str(new.parent))
    if "tags" in tables:  # runs that a killed command left running are ended by their owner
        key, value = _column("key"), _column("value")
        owners = select(value).select_from(table("tags", key, value)).where(key == OWNER).distinct()
        for owner in connection.scalars(owners).all():
            if str(owner).partition(":")[2] == str(old.parent):
                _retag(connection, "tags", OWNER, str(owner), f"{host}:{new.parent}")
    if "datasets" in tables:
        _sources(connection, str(old.parent), str(new.parent))
    return changed


def _retag(connection: Connection, name: str, key: str, before: str, after: str) -> None:
    """Replace a value of a tag."""
    keys, values = _column("key"), _column("value")
    connection.execute(update(table(name, keys, values)).where(keys == key, values == before).values({values: after}))


def _sources(connection: Connection, before: str, after: str) -> None:
    """Let the recorded sources of data revisions name the workspace's repository where it is now."""
    uuid, kind, source = _column("dataset_uuid"), _column("dataset_source_type"), _column("dataset_source")
    rows = table("datasets", uuid, kind, source)
    for row in connection.execute(select(uuid, source).select_from(rows).where(kind == "dvc")).all():
        try:
            told = json.loads(row.dataset_source)
            known = told["repository"] == before
        except (ValueError, LookupError, TypeError):  # anybody may write there
            continue
        if known:
            told |= {"repository": after, "url": str(told.get("url", "")).replace(before, after, 1)}
            connection.execute(update(rows).where(uuid == row.dataset_uuid).values({source: json.dumps(told)}))


def _column(name: str) -> ColumnClause[str]:
    return column(name)

"""A Git clone of a workspace: it has settings, code and hashes of data, but neither keys nor records, which Git must not hold.

It pulls data, retrains and evaluates, with a ledger and an MLflow of its own. It cannot release.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flows.errors import WorkspaceError
from model.errors import DataError
from model.git import run as git

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from ota.release.keys import KeyRing

RELEASING = ("models", "deltas", "snapshot", "timestamp")  # roles that sign a release
OWN = "clone"  # folder below keys/ with the key of a clone's own ledger


def is_clone(root: Path) -> bool:
    """Check whether a workspace has commits but no keys; one whose `ferry init` was killed has no commit."""
    if (root / "keys" / "keys.json").is_file() or (root / "repository" / "metadata" / "timestamp.json").is_file():
        return False
    try:
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except DataError:
        return False
    return True


def ledger_keys(workspace: Workspace) -> KeyRing:
    """Return the keys of the ledger: those of the workspace, or in a clone a key of its own, which is made if it is missing.

    Raises:
        WorkspaceError: the clone shares databases with the workspace that signs, or the keys of this ledger are missing.
        OperatorError: there are no keys, and this is no clone.
    """
    from ota.release.keys import KeyRing, for_ledger
    from registry.ledger import Ledger

    if not is_clone(workspace.root):
        return workspace.keys
    folder = workspace.root / "keys" / OWN
    if (folder / "keys.json").is_file():
        return KeyRing(folder)
    if not (workspace.is_own(workspace.database) and workspace.is_own(workspace.mlflow)):
        raise WorkspaceError(
            f"{workspace.root} has no keys/, and what it records in the shared databases must be signed; copy keys/ from the workspace "
            "that signs, or let this clone keep records of its own: FERRY_STORES_DATABASE=sqlite:///ferry.db "
            "FERRY_STORES_MLFLOW=sqlite:///mlflow.db"
        )
    if length := Ledger.length(workspace.database):
        raise WorkspaceError(
            f"keys/ is missing, but the ledger has {length} entries that its key signed; restore keys/ from a backup, or remove "
            f"{workspace.database.removeprefix('sqlite:///')} to begin anew"
        )
    return for_ledger(folder)


def check_release(workspace: Workspace) -> None:
    """Refuse a release if the workspace lacks keys, repository or records, and name all of it at once.

    Raises:
        WorkspaceError: it lacks something.
    """
    if lacking := lacks(workspace):
        raise WorkspaceError(
            f"this workspace cannot release; it lacks {'; '.join(lacking)}. Run `ferry release` in the workspace that has them, or copy "
            "them from there to the same names here (Git never holds them)"
        )


def lacks(workspace: Workspace) -> list[str]:
    """List what a release needs and the workspace does not have."""
    from ota.errors import OperatorError

    root, stores = workspace.root, workspace.settings.stores
    found = []
    if not (root / "keys" / "keys.json").is_file():
        found.append(f"keys/ (the private keys of {', '.join(RELEASING)} and the ledger)")
    if not (root / "repository" / "metadata" / "timestamp.json").is_file():
        found.append("repository/ (the signed repository)")
    if found:
        if workspace.is_own(workspace.database):
            found.append(f"{stores.database.removeprefix('sqlite:///')} (the ledger, which says who is champion)")
        if workspace.is_own(workspace.mlflow):
            found.append(f"{stores.mlflow.removeprefix('sqlite:///')} and mlartifacts/ (the champions' files)")
        return found
    ring, roles = workspace.keys, workspace.repository.roles()
    for role in RELEASING:
        trusted = roles[role]
        if len(ring.usable(role, trusted.keyids)) < trusted.threshold:
            places = ", ".join(filter(None, (ring.uri(role, keyid) for keyid in trusted.keyids)))
            found.append(f"the private key of {role} ({places or 'which keys.json does not name'})")
    if ring.ledger:
        try:
            ring.sign(b"DeltaFerry ledger, a trial")
        except OperatorError:
            found.append(f"the private key of the ledger ({ring.ledger[-1].uri})")
    return found

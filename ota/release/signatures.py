"""Collect signatures of keys on other machines, and put what they sign in force (`ferry trust sign`).

`ota.release.ceremony` has the file that waits for signatures, `ota.release.rotation` the changes of metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from securesystemslib.signer import Signer

from ota.errors import OperatorError
from ota.release import keys, rotation
from ota.release.ceremony import Waiting
from ota.release.keys import DELEGATED, ROLES, SHORT, Entry
from ota.release.repository import RENEWED, Repository
from ota.release.trust import REMEDIES, Place, check_finished, journal

Classes = Collection[tuple[str, str]]
"""Line and device class of everything that a repository may hold."""


def wait(place: Place, role: str, out: Path) -> tuple[dict[str, Any], str]:
    """Write a role's metadata, with a new version and expiry and no other change, to a file that waits for signatures.

    Raises:
        OperatorError: the signatures of this role cannot wait, or the file exists.
    """
    if role not in RENEWED:
        raise OperatorError(f"{role} cannot wait for signatures; sign it with `{REMEDIES[role]}`")
    if out.exists():
        raise OperatorError(f"{out} already exists; name another file")
    with place.locked("records"):
        waiting = rotation.prepare(place.repository, {}, [role]).signed(usable_here(place.repository, {}))
    waiting.save(out)
    return facts_of(waiting, out), text_of(waiting, out)


def add(path: Path, uris: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Add the signatures of more keys to a file that waits for them; no workspace is needed.

    Raises:
        OperatorError: the file does not wait for a key, or the key cannot be used here; earlier signatures stay in the file.
    """
    waiting, done = Waiting.load(path), []
    for uri in uris:
        waiting, signed = waiting.signed_with(uri)
        waiting.save(path)
        done += signed
    return facts_of(waiting, path) | {"signed": done}, "\n".join([*(f"signed {what}" for what in done), text_of(waiting, path)])


def publish_waiting(place: Place, path: Path, publish: Callable[[], object], classes: Classes) -> tuple[dict[str, Any], str]:
    """Put the metadata of a file that waited in force, and publish them.

    Args:
        place: folder with keys and repository.
        path: the file.
        publish: copies the repository to where devices fetch it.
        classes: for the answer, which says what was signed.

    Raises:
        OperatorError: signatures are missing, something newer is in force, or an interrupted rotation must be finished first.
    """
    check_finished(place)
    waiting = Waiting.load(path)
    put_in_force(place, waiting, publish)
    return result_of(place, waiting, {}, f"{', '.join(waiting.documents)} in force; {path} is no longer needed", classes)


def put_in_force(place: Place, waiting: Waiting, publish: Callable[[], object]) -> None:
    """Put the waiting metadata in force, and publish them.

    The roles below root are signed again so that they verify under both roots, and are published before the new root. So a
    device that updates in the meantime finds metadata that verify. If old keys are lost, this is not possible; then all is
    published once the new root is in force.

    Args:
        place: folder with keys and repository.
        waiting: the metadata.
        publish: copies the repository to where devices fetch it; called without the lock.

    Raises:
        OperatorError: signatures are missing, or something newer is in force.
    """
    with place.locked("records"):
        smooth = rotation.resign_below_root(place.repository, waiting)
    if smooth:
        publish()
    with place.locked("records"):
        rotation.put_in_force(place.repository, waiting)
    publish()
    journal(place).unlink(missing_ok=True)


def usable_here(repository: Repository, fresh: Mapping[str, Sequence[Entry]]) -> list[Signer]:
    """Open all signers, of present keys and of the new ones in `fresh`, that can be used on this machine."""
    found = [signer for role in ROLES for signer in repository.keys.usable(role)]
    known = {signer.public_key.keyid for signer in found}
    for key, uri in (entry for entries in fresh.values() for entry in entries if entry[0].keyid not in known):
        try:
            found.append(keys.open_signer(uri, key))
        except OperatorError:
            continue
    return found


def result_of(
    place: Place, waiting: Waiting, changes: Mapping[str, Any], said: str, classes: Classes
) -> tuple[dict[str, Any], str]:
    """Report what was put in force, as JSON and as text.

    Args:
        place: folder with keys and repository.
        waiting: metadata that are in force now.
        changes: role → ids of the keys that were removed and added.
        said: first line of the text; "": none.
        classes: whose releases, deltas and policies are listed, if the roles that list them were signed again.
    """
    versions = {state.role: state.version for state in place.repository.states()}
    root = place.repository.newest_root()
    sha256 = hashlib.sha256(root.read_bytes()).hexdigest()
    lines = [said] if said else []
    lines += [
        f"signed anew: {role}, {_targets_of(place.repository, role, classes)}" for role in waiting.ring if role in DELEGATED
    ]
    if "root" in waiting.documents:
        lines.append(f"root version {versions['root']} is in force; new devices are set up with {root}, sha256 {sha256}")
    value = {"versions": versions, "roles": changes, "root": str(root), "sha256": sha256}
    return value, "\n".join(lines or [f"{', '.join(waiting.documents)} in force"])


def _targets_of(repository: Repository, role: str, classes: Classes) -> str:
    found = []
    for line, device_class in classes:
        if role == "models":
            found += [f"{line}/{device_class} release {r.seq}" for r in repository.releases(line, device_class)]
        elif role == "deltas":
            found += [f"{line}/{device_class} delta to {d.target[:SHORT]}" for d in repository.deltas(line, device_class)]
        elif policy := repository.rolled_out(line, device_class):
            found.append(f"{line}/{device_class} release {policy.seq}")
    return ", ".join(found) or "which holds nothing"


def facts_of(waiting: Waiting, path: Path) -> dict[str, Any]:
    """Return what `text_of` says, as JSON."""
    return {"file": str(path), "documents": list(waiting.documents), "missing": waiting.missing()}


def text_of(waiting: Waiting, path: Path) -> str:
    """Say which signatures a file still waits for, and which command comes next."""
    lines = waiting.missing()
    if lines:
        return "\n".join([*lines, f"carry {path} to each key, and run `ferry trust sign {path} --key URI`"])
    return f"{path} has all its signatures; run `ferry trust sign {path} --publish`"

"""Changes of roles that wait for signatures: keys that are replaced, and renewals whose keys are elsewhere.

New metadata are prepared here, signed as `ota.release.ceremony` describes, and put in force here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from tuf.api.metadata import Metadata, Root, Targets

from ota.errors import OperatorError
from ota.release.ceremony import Need, Waiting
from ota.release.keys import DELEGATED, Entry
from ota.release.metadata import TOP, holds, load, next_version, unchanged, unused, write
from ota.release.repository import Repository, alone


def prepare(repository: Repository, fresh: Mapping[str, Sequence[Entry]], renewed: Collection[str] = ()) -> Waiting:
    """Prepare new metadata of some roles, for their keys to sign; nothing is changed yet.

    Some metadata cannot wait, because every release changes them: snapshot, timestamp, and delegated roles that have new
    keys. These are signed when the prepared metadata are put in force.

    Args:
        repository: repository whose roles are to change.
        fresh: role → all the keys that it is to have.
        renewed: roles that are to be signed again, because they are due or because their new keys are not here.
    """
    present, root, targets = repository.in_force("root"), repository.in_force("root"), repository.in_force("targets")
    documents: dict[str, Metadata[Any]] = {}
    needs: dict[str, list[Need]] = {}
    for role, entries in fresh.items():
        delegator: Root | Targets = root.signed if role in TOP else targets.signed
        for keyid in set(delegator.get_delegated_role(role).keyids) - {key.keyid for key, _ in entries}:
            delegator.revoke_key(keyid, role)
        for key, _ in entries:
            delegator.add_key(key, role)
    if "root" in renewed or fresh.keys() & set(TOP):
        documents["root"] = next_version(root, "root", root.signed.version + 1)
        needs["root"] = [Need.of("present", present.signed.roles["root"], present.signed.keys)]
        if "root" in fresh:
            needs["root"].append(Need.of("new", root.signed.roles["root"], root.signed.keys))
    if "targets" in {*renewed, *fresh} or fresh.keys() & set(DELEGATED):
        documents["targets"] = next_version(
            targets, "targets", unused(repository.metadata, "targets", targets.signed.version + 1)
        )
        needs["targets"] = [Need.of("new" if "targets" in fresh else "present", root.signed.roles["targets"], root.signed.keys)]
        if "targets" in fresh:
            needs["targets"].append(Need.of("present", present.signed.roles["targets"], present.signed.keys, required=False))
    for role in DELEGATED:
        if role in renewed:
            metadata = repository.in_force(role)
            ends = metadata.signed.expires
            documents[role] = next_version(metadata, role, unused(repository.metadata, role, metadata.signed.version + 1))
            if role == "rollout":  # it keeps its expiry, as in `resign_below_root`
                metadata.signed.expires = ends
            delegations = targets.signed.delegations
            needs[role] = [Need.of("new" if role in fresh else "present", delegations.roles[role], delegations.keys)]
    return Waiting.of(documents, needs, fresh)


@alone
def resign_below_root(repository: Repository, waiting: Waiting) -> bool:
    """Make every role below root verify under the waiting root, or under the root in force if none waits; the timestamp last.

    Writes the waiting roles, and re-signs the delegated roles that would not verify, the snapshot and the timestamp.

    Returns:
        Whether all of it still verifies under the root in force. Then it can be published before the new root, and at no
        moment do devices find metadata that do not verify. This is not possible if old keys are lost.

    Raises:
        OperatorError: signatures are missing, or something newer is in force; nothing was changed.
    """
    pending, present = _pending(repository, waiting), repository.in_force("root").signed
    root = pending["root"].signed if "root" in pending else present
    ready = {role: metadata for role, metadata in pending.items() if role != "root"}
    top = (ready["targets"] if "targets" in ready else repository.in_force("targets")).signed
    repository.keys.add(waiting.entries())
    again = [role for role in DELEGATED if role not in ready and not holds(top, role, repository.in_force(role))]
    if ready or again or not all(holds(root, role, repository.in_force(role)) for role in TOP[1:]):
        ends = repository.in_force("rollout").signed.expires

        def resign(role: str) -> Callable[[Targets], None]:
            return partial(_end, ends) if role == "rollout" else unchanged  # a rollout that nobody renews keeps its expiry

        repository.commit({role: resign(role) for role in again}, root, ready)
    return all(holds(present, role, repository.in_force(role)) for role in TOP[1:])


@alone
def put_in_force(repository: Repository, waiting: Waiting) -> None:
    """Put the waiting metadata in force, the root last; a killed call can be repeated, and continues.

    Raises:
        OperatorError: signatures are missing, or something newer is in force.
    """
    resign_below_root(repository, waiting)
    pending = _pending(repository, waiting)
    if "root" in pending:
        root = pending["root"]
        write(repository.metadata / f"{root.signed.version}.root.json", root.to_bytes())
    repository.keys.keep(waiting.entries())


def _pending(repository: Repository, waiting: Waiting) -> dict[str, Metadata[Any]]:
    """Check the waiting metadata against those in force, and return what is not in force yet, by role.

    Raises:
        OperatorError: signatures are missing, or something newer is in force.
    """
    documents = waiting.metadata()
    pending = {}
    for role, metadata in documents.items():
        present, version = repository.in_force(role), metadata.signed.version
        if metadata.signed_bytes == present.signed_bytes:
            continue
        if version <= present.signed.version:
            raise OperatorError(
                f"version {version} of {role} waits, but {present.signed.version} is in force already; begin again"
            )
        if role == "root" and version != present.signed.version + 1:
            raise OperatorError(f"version {version} of root waits, but {version - 1} is not in force; put that in force first")
        path = repository.metadata / f"{version}.{role}.json"
        if path.exists() and load(path).signed_bytes != metadata.signed_bytes:
            raise OperatorError(f"version {version} of {role} waits, but a killed run has used its name; begin again")
        pending[role] = metadata
    present_root = repository.in_force("root").signed
    root = pending["root"].signed if "root" in pending else present_root
    top = (pending["targets"] if "targets" in pending else repository.in_force("targets")).signed
    for role, metadata in pending.items():
        for delegator in {"root": [present_root, root], "targets": [root]}.get(role, [top]):
            if not holds(delegator, role, metadata):
                lines = waiting.missing() or [f"the signatures of {role} are not from the keys that are trusted now"]
                raise OperatorError(f"{'; '.join(lines)}; sign it with `ferry trust sign FILE --key URI`")
    return pending


def _end(when: datetime, targets: Targets) -> None:
    targets.expires = when

"""Changes of roles that wait for signatures: keys that are replaced, renewals whose keys are elsewhere, and classes that get own roles.

New metadata are prepared here, signed as `ota.release.ceremony` describes, and put in force here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuf.api.metadata import DelegatedRole, Metadata, Root, TargetFile, Targets

from ota.errors import OperatorError
from ota.release.ceremony import Need, Waiting
from ota.release.keys import DELEGATED, Entry
from ota.release.metadata import TOP, holds, load, next_version, unused, write
from ota.release.repository import Repository, alone
from ota.release.roles import kind, of_class, paths


def prepare(
    repository: Repository,
    fresh: Mapping[str, Sequence[Entry]],
    renewed: Collection[str] = (),
    moved: Collection[tuple[str, str]] = (),
) -> Waiting:
    """Prepare new metadata of some roles, for their keys to sign; nothing is changed yet.

    Some metadata cannot wait, because every release changes them: snapshot, timestamp, and delegated roles that have new
    keys or whose lists are moved. These are signed when the prepared metadata are put in force.

    Args:
        repository: repository whose roles are to change.
        fresh: role → all the keys that it is to have; the roles of classes get the keys of their kind.
        renewed: roles that are to be signed again, because they are due or because their keys are not here.
        moved: lines and classes that are to have roles of their own.
    """
    present, root, targets = repository.in_force("root"), repository.in_force("root"), repository.in_force("targets")
    documents: dict[str, Metadata[Any]] = {}
    needs: dict[str, list[Need]] = {}
    for role, entries in fresh.items():
        delegator: Root | Targets = root.signed if role in TOP else targets.signed
        for name in repository.delegated(role) or [role]:
            for keyid in set(delegator.get_delegated_role(name).keyids) - {key.keyid for key, _ in entries}:
                delegator.revoke_key(keyid, name)
            for key, _ in entries:
                delegator.add_key(key, name)
    _delegate(targets.signed, moved)
    if "root" in renewed or fresh.keys() & set(TOP):
        documents["root"] = next_version(root, "root", root.signed.version + 1)
        needs["root"] = [Need.of("present", present.signed.roles["root"], present.signed.keys)]
        if "root" in fresh:
            needs["root"].append(Need.of("new", root.signed.roles["root"], root.signed.keys))
    if "targets" in {*renewed, *fresh} or fresh.keys() & set(DELEGATED) or moved:
        documents["targets"] = next_version(
            targets, "targets", unused(repository.metadata, "targets", targets.signed.version + 1)
        )
        needs["targets"] = [Need.of("new" if "targets" in fresh else "present", root.signed.roles["targets"], root.signed.keys)]
        if "targets" in fresh:
            needs["targets"].append(Need.of("present", present.signed.roles["targets"], present.signed.keys, required=False))
    delegations = targets.signed.delegations
    lists = _lists(repository, delegations.roles)
    for role in (role for role in delegations.roles if kind(role) in renewed):
        before = repository.in_force(role) if lists[role].present else Metadata(Targets())
        least = repository.in_force(role if lists[role].present else kind(role)).signed.version
        taken = (found.signed.version for name, found in documents.items() if kind(name) == kind(role))
        version = unused(repository.metadata, role, max([least, *taken]) + 1)
        documents[role] = next_version(before, role, version)
        lists[role].put(documents[role].signed)
        needs[role] = [Need.of("new" if kind(role) in fresh else "present", delegations.roles[role], delegations.keys)]
    return Waiting.of(documents, needs, fresh)


def _delegate(targets: Targets, moved: Collection[tuple[str, str]]) -> None:
    """Name a class's own roles before the shared ones, with the same keys: the first role that may name a target decides."""
    roles = targets.delegations.roles if targets.delegations else None
    if roles is None or not moved:
        return
    shared = {role: roles.pop(role) for role in DELEGATED}
    for line, device_class in moved:
        for role, found in shared.items():
            own = of_class(role, line, device_class)
            roles[own] = DelegatedRole(own, list(found.keyids), found.threshold, True, paths(own))
    roles.update(shared)


@dataclass(frozen=True)
class _List:
    """What a role below targets lists when it is signed again."""

    targets: dict[str, TargetFile]
    ends: datetime | None
    """When it expires; None: its lifetime starts anew."""
    present: bool
    """Whether the role is in force."""
    moves: bool
    """Whether targets move into it or out of it."""

    def put(self, signed: Targets) -> None:
        """Give this list to metadata that are about to be signed."""
        signed.targets = self.targets
        signed.expires = self.ends or signed.expires


def _lists(repository: Repository, roles: Mapping[str, DelegatedRole]) -> dict[str, _List]:
    """Return what each role lists: a role that is new takes its targets from the one that all classes share.

    Args:
        repository: repository whose roles are to change.
        roles: all roles that the coming targets delegate to.
    """
    present = repository.delegated()
    new = [role for name, role in roles.items() if name not in present]
    found = {}
    for name, role in roles.items():
        signed = repository.in_force(name if name in present else kind(name)).signed
        mine = [role] if name not in present else []
        listed = {
            path: target for path, target in signed.targets.items()
            if any(own.is_delegated_path(path) for own in mine) or (not mine and not any(r.is_delegated_path(path) for r in new))
        }  # fmt: skip
        ends = signed.expires if kind(name) == "rollout" else None  # a rollout that nobody renews keeps its expiry
        found[name] = _List(listed, ends, name in present, name not in present or len(listed) < len(signed.targets))
    return found


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
    lists = _lists(repository, top.delegations.roles)
    again = [
        role
        for role, found in lists.items()
        if role not in ready and (found.moves or not holds(top, role, repository.in_force(role)))
    ]
    if ready or again or not all(holds(root, role, repository.in_force(role)) for role in TOP[1:]):
        repository.commit({role: lists[role].put for role in again}, root, ready)
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
    pending, in_force = {}, {*TOP, *repository.delegated()}
    for role, metadata in documents.items():
        version = metadata.signed.version
        if role in in_force:
            present = repository.in_force(role)
            if metadata.signed_bytes == present.signed_bytes:
                continue
            if version <= present.signed.version:
                raise OperatorError(
                    f"version {version} of {role} waits, but {present.signed.version} is in force already; begin again"
                )
        if role == "root" and version != present.signed.version + 1:
            raise OperatorError(f"version {version} of root waits, but {version - 1} is not in force; put that in force first")
        path = repository.metadata / f"{version}.{role}.json"
        ours = path.exists() and load(path).signed_bytes == metadata.signed_bytes
        if not ours and unused(repository.metadata, role, version) != version:
            raise OperatorError(f"version {version} of {role} waits, but its number has been used; begin again")
        pending[role] = metadata
    present_root = repository.in_force("root").signed
    root = pending["root"].signed if "root" in pending else present_root
    top = (pending["targets"] if "targets" in pending else repository.in_force("targets")).signed
    named = (top.delegations and top.delegations.roles) or {}
    if unnamed := [role for role in pending if role not in (*TOP, *named)]:
        raise OperatorError(
            f"role {unnamed[0]} waits for signatures, but targets does not name it, perhaps because the repository is older than the file; "
            "nothing was changed; begin again"
        )
    for role, metadata in pending.items():
        for delegator in {"root": [present_root, root], "targets": [root]}.get(role, [top]):
            if not holds(delegator, role, metadata):
                lines = waiting.missing() or [f"the signatures of {role} are not from the keys that are trusted now"]
                raise OperatorError(f"{'; '.join(lines)}; sign it with `ferry trust sign FILE --key URI`")
    return pending

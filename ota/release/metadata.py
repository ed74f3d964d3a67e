"""TUF metadata as single documents: load, change, sign and write one; and how long its signatures are valid.

What the documents list, and which of them are in force, is the repository's business.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from tuf.api.exceptions import StorageError
from tuf.api.metadata import Metadata, Root, Signed, Targets
from tuf.api.serialization import DeserializationError

from ota.errors import OperatorError
from ota.release import keys as signing
from ota.release.keys import KeyRing
from ota.release.roles import kind

# How long signatures are valid. Every release and `ferry trust refresh` renew snapshot and timestamp. A rollout that nobody
# renews stops spreading.
LIFETIMES = {
    "root": timedelta(days=365), "targets": timedelta(days=365), "models": timedelta(days=180),
    "deltas": timedelta(days=180), "rollout": timedelta(days=14), "snapshot": timedelta(days=14),
    "timestamp": timedelta(days=14),
}  # fmt: skip
AnySigned = TypeVar("AnySigned", bound=Signed)
TOP = ("root", "targets", "snapshot", "timestamp")  # root names the keys of these roles, targets those of the others


def load(path: Path) -> Metadata[Any]:
    """Read the metadata in a file.

    Raises:
        OperatorError: the file is missing or damaged.
    """
    try:
        return Metadata.from_file(str(path))
    except (StorageError, DeserializationError) as error:
        raise OperatorError(f"{path} is missing or damaged; restore the repository from a backup") from error


def unused(folder: Path, role: str, version: int) -> int:
    """Return the first version, from this one on, that no file of a role of this kind has.

    A killed run may have used the name, and that file may be published. And roles of one kind have the same keys, and a snapshot lists only
    versions: with another version, no role's file passes for another role's.
    """
    used = set[str]()
    for path in folder.glob(f"*.{kind(role)}*.json"):
        number, _, name = path.name.partition(".")
        if kind(name.removesuffix(".json")) == kind(role):
            used.add(number)
    while str(version) in used:
        version += 1
    return version


DATED = ("root", "timestamp")  # roles that say when they were signed; devices hold their clocks against it


def expiry(role: str) -> datetime:
    """Return when metadata of a role expire that are signed now."""
    return (datetime.now(UTC) + LIFETIMES[kind(role)]).replace(microsecond=0)


def next_version(metadata: Metadata[Any], role: str, version: int) -> Metadata[Any]:
    """Change metadata to another version, with a new expiry and without signatures; return the same object."""
    metadata.signatures.clear()
    metadata.signed.version = version
    dated(metadata.signed, role)
    return metadata


def dated(signed: AnySigned, role: str) -> AnySigned:
    """Give metadata that are about to be signed the expiry of their role and, where devices read it, the present time; return them."""
    signed.expires = expiry(role)
    if role in DATED:
        signed.unrecognized_fields["signed_at"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return signed


def unchanged(_: Targets) -> None:
    """Leave the targets of a role as they are; the role is only signed again."""


def holds(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> bool:
    """Tell whether metadata of a role have the signatures that a delegator requires."""
    return delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures).verified


def sign_role(
    metadata: Metadata[Any], keys: KeyRing, role: str, delegator: Root | Targets, other: Root | Targets | None = None
) -> Metadata[Any]:
    """Sign with as many keys as a delegator requires, and with those of another one as far as they can be used here."""
    metadata.signatures.clear()
    trusted = delegator.get_delegated_role(role)
    signers = keys.signers(role, trusted.keyids, trusted.threshold)
    if other:
        trusted = other.get_delegated_role(role)
        signers += keys.usable(role, trusted.keyids)[: trusted.threshold]
    for signer in signers:
        if signer.public_key.keyid not in metadata.signatures:
            signing.sign(metadata, signer)
    return metadata


def write(path: Path, content: bytes | Metadata[Any]) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_bytes(content if isinstance(content, bytes) else content.to_bytes())
    fresh.replace(path)

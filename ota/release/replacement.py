"""Replace signing keys, and sign everything again that they had signed (`ferry trust rotate`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Role

from ota.errors import OperatorError
from ota.release import keys, rotation
from ota.release.ceremony import Waiting, taken_out
from ota.release.keys import DELEGATED, LEDGER, ROLES, SHORT, Entry
from ota.release.repository import Repository
from ota.release.signatures import Classes, facts_of, put_in_force, result_of, text_of, usable_here
from ota.release.trust import Place, journal

EVERY_COMMAND = ("snapshot", "timestamp")  # roles that sign whenever anything is published


@dataclass(frozen=True)
class Request:
    """Which keys an operator wants to replace.

    Raises:
        OperatorError: there is no such role, a signer is of another role, or the ledger's key is not the only one to replace.
    """

    roles: Collection[str]
    """Roles that get new keys."""
    lost: Sequence[str] = ()
    """Ids of keys to remove; if neither this nor `stolen` names a key of a role, all its keys are removed."""
    stolen: Sequence[str] = ()
    """Ids of keys to remove that somebody else has; if they are enough to sign for a role, all its keys are removed."""
    new: int | None = None
    """Number of new keys for each role; None: as many as are removed."""
    signers: Mapping[str, Sequence[Entry]] = field(default_factory=dict)
    """New keys that exist elsewhere, by role; the others are made as files."""
    offline: Path | None = None
    """Folder for new key files of offline roles; None: keys/offline."""
    out: Path | None = None
    """File in which the new metadata wait for signatures; None: enough keys are here."""

    def __post_init__(self) -> None:
        wrong = [role for role in (*self.roles, *self.signers) if role not in (*ROLES, LEDGER) or role not in self.roles]
        if wrong:
            raise OperatorError(f"{wrong[0]} is not among the roles to rotate; choose among {', '.join((*ROLES, LEDGER))}")
        more = len(set(self.roles)) > 1 or self.lost or self.stolen or self.new is not None or self.out
        if LEDGER in self.roles and more:
            raise OperatorError("the ledger's key belongs to no repository; rotate it alone with `ferry trust rotate ledger`")


def rotate(
    place: Place, request: Request, publish: Callable[[], object], classes: Classes, ledger_entries: Callable[[], int]
) -> tuple[dict[str, Any], str]:
    """Replace keys, and sign everything again that they had signed. Rerun a killed call; it resumes.

    Args:
        place: folder with keys and repository.
        request: keys to replace.
        publish: copies the repository to where devices fetch it.
        classes: for the answer, which says what was signed again.
        ledger_entries: returns the number of entries of the ledger, if its key is replaced.

    Raises:
        OperatorError: too few keys can be used here, or an argument does not fit; nothing was changed.
    """
    if LEDGER in request.roles:
        return _rotate_ledger(place, ledger_entries, next(iter(request.signers.get(LEDGER, ())), None))
    if journal(place).is_file():
        waiting = Waiting.load(journal(place))
        put_in_force(place, waiting, publish)
        if set(request.roles) == waiting.ring.keys():
            return result_of(place, waiting, {}, "the interrupted rotation is finished", classes)
    with place.locked("records"):
        waiting, changes, lines = _prepare(place, request)
    if request.out:
        return facts_of(waiting, request.out) | {"roles": changes}, "\n".join([*lines, text_of(waiting, request.out)])
    put_in_force(place, waiting, publish)
    value, text = result_of(place, waiting, changes, "", classes)
    hint = (
        "a thief who could also publish may have raised version numbers; devices that saw them follow again once snapshot and "
        "timestamp are rotated too"
    )
    wanted = request.stolen and not set(EVERY_COMMAND) <= set(request.roles)
    return value, "\n".join([*lines, text, *([hint] if wanted else [])])


def _prepare(place: Place, request: Request) -> tuple[Waiting, dict[str, Any], list[str]]:
    """Choose the keys, prepare and sign the metadata as far as possible here, and write both to files.

    Returns:
        The metadata; the ids of the keys that are removed and added, by role; and the same as lines of text.

    Raises:
        OperatorError: too few keys can be used here, or an argument does not fit; nothing was changed.
    """
    repository, out = place.repository, request.out
    trusted = {role: found for role, found in repository.roles().items() if role in request.roles}
    gone = taken_out(trusted, request.lost, request.stolen)
    fresh, made = _new_keys(place, request, trusted, gone)
    here = [*usable_here(repository, fresh), *(signer for signer, _ in made)]
    elsewhere = _roles_elsewhere(repository, trusted, fresh, here)
    waiting = rotation.prepare(repository, fresh, [role for role in elsewhere if role in DELEGATED]).signed(here)
    if out is None and waiting.missing():
        raise OperatorError(f"{'; '.join(waiting.missing())}; make the keys available, or add --out FILE and sign where they are")
    if out and out.exists():
        raise OperatorError(f"{out} already exists; name another file")
    for signer, path in made:
        keys.store(path, signer)
    waiting.save(out or journal(place))
    changes: dict[str, Any] = {
        role: {"out": gone[role], "in": [key.keyid for key, _ in entries if key.keyid not in trusted[role].keyids]}
        for role, entries in fresh.items()
    }
    return waiting, changes, _changed(changes, fresh)


def _new_keys(
    place: Place, request: Request, trusted: Mapping[str, Role], gone: Mapping[str, Collection[str]]
) -> tuple[dict[str, list[Entry]], list[tuple[CryptoSigner, Path]]]:
    """Choose and make the keys that each role has from now on; return them, and the new private keys with their files-to-be.

    Raises:
        OperatorError: a given key was one of the role's before, or there would be too few.
    """
    repository = place.repository
    made: list[tuple[CryptoSigner, Path]] = []
    fresh: dict[str, list[Entry]] = {}
    for role, needs in trusted.items():
        given = list(request.signers.get(role, ()))
        if known := repository.keys_ever_trusted(role).intersection(key.keyid for key, _ in given):
            raise OperatorError(f"key {min(known)[:SHORT]} is or was a key of {role}; make a new one")
        count = len(gone[role]) if request.new is None else request.new
        kept = [entry for entry in repository.entries(role) if entry[0].keyid not in gone[role]]
        if count < len(given) or len(kept) + count < needs.threshold:
            least = max(len(given), needs.threshold - len(kept))
            raise OperatorError(f"{role} must get at least {least} new keys; raise --new")
        for _ in range(count - len(given)):
            signer = CryptoSigner.generate_ed25519()
            entry, path = keys.place(place.root / "keys", signer, role, request.offline)
            made.append((signer, path))
            given.append(entry)
        fresh[role] = [*kept, *given]
    return fresh, made


def _roles_elsewhere(
    repository: Repository, trusted: Mapping[str, Role], fresh: Mapping[str, Sequence[Entry]], here: Sequence[Signer]
) -> list[str]:
    """List the online roles whose new keys are too few on this machine.

    Raises:
        OperatorError: a role with which every command signs is among them, or its present keys cannot be used.
    """
    usable = {signer.public_key.keyid for signer in here}
    elsewhere = [
        role
        for role, found in trusted.items()
        if role not in ("root", "targets") and sum(key.keyid in usable for key, _ in fresh[role]) < found.threshold
    ]
    for role in EVERY_COMMAND:
        if role in elsewhere:
            raise OperatorError(f"the new key of {role} must be usable here, because every command signs with it; plug it in")
        if role not in fresh:
            repository.keys.signers(role, repository.roles()[role].keyids, repository.roles()[role].threshold)
    return elsewhere


def _changed(changes: Mapping[str, Any], fresh: Mapping[str, Sequence[Entry]]) -> list[str]:
    uris = {key.keyid: uri for entries in fresh.values() for key, uri in entries}
    lines = []
    for role, change in changes.items():
        lines += [f"{role} - {keyid[:SHORT]}" for keyid in change["out"]]
        lines += [f"{role} + {keyid[:SHORT]} {uris[keyid]}" for keyid in change["in"]]
    return lines


def _rotate_ledger(place: Place, ledger_entries: Callable[[], int], entry: Entry | None) -> tuple[dict[str, Any], str]:
    """Let a new key sign the ledger; from now on, entries that the old key signs are not valid."""
    with place.locked("records"):
        entries = ledger_entries()
        old = place.keys.ledger[-1].key.keyid
        made = place.keys.begin_ledger(entries + 1, entry)
    new = made.key.keyid
    text = (
        f"ledger - {old[:SHORT]}\nledger + {new[:SHORT]} {made.uri}\n"
        f"entries of the ledger are signed by it from {made.since} on; destroy the file of the old key yourself"
    )
    return {"roles": {LEDGER: {"out": [old], "in": [new]}}, "since": made.since}, text

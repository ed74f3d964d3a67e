"""Set up signing keys and report their state (`ferry trust init` and `status`), and what the other commands about keys share.

`ota.release.replacement` replaces keys, `ota.release.signatures` collects signatures of keys on other machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

from ota.errors import OperatorError
from ota.release import keys
from ota.release.ceremony import Waiting
from ota.release.keys import LEDGER, ROLES, SHORT, Entry, KeyRing
from ota.release.metadata import LIFETIMES
from ota.release.repository import Repository, RoleState

REMEDIES = {
    "root": "ferry trust renew root", "targets": "ferry trust renew targets", "models": "ferry trust renew models",
    "deltas": "ferry trust renew deltas", "rollout": "ferry rollout renew LINE/CLASS", "snapshot": "ferry trust refresh",
    "timestamp": "ferry trust refresh",
}  # fmt: skip
SHOWN = 5  # classes that `status` names; the others are counted


class Place(Protocol):
    """The folder that holds the signing keys and the signed repository, with a lock over both."""

    @property
    def root(self) -> Path:
        """The folder; the keys are in `keys/` and the repository is in `repository/` below it."""

    @property
    def keys(self) -> KeyRing:
        """Signing keys."""

    @property
    def repository(self) -> Repository:
        """The signed repository."""

    def locked(self, part: Literal["records"]) -> AbstractContextManager[None]:
        """Lock keys and repository against another process that would change them."""


def named(option: str, pairs: Sequence[str]) -> dict[str, list[str]]:
    """Group the values of an option by role; each is written as ROLE=VALUE.

    Raises:
        OperatorError: one is not written so, or names no role.
    """
    found: dict[str, list[str]] = {}
    for pair in pairs:
        role, _, value = pair.partition("=")
        if role not in (*ROLES, LEDGER) or not value:
            raise OperatorError(f"{option} {pair!r} must be ROLE=VALUE, with one of {', '.join((*ROLES, LEDGER))}")
        found.setdefault(role, []).append(value)
    return found


def signers_of(uris: Sequence[str], files: Sequence[str]) -> dict[str, list[Entry]]:
    """Return the keys that exist elsewhere, by role.

    Args:
        uris: ROLE=URI.
        files: ROLE=FILE, public keys as PEM; for each role none, or one for each of its URIs.

    Raises:
        OperatorError: a public key cannot be read, files and URIs do not match, or a key is named twice.
    """
    places, public = named("--signer", uris), named("--public", files)
    for role, found in public.items():
        if len(found) != len(places.get(role, [])):
            raise OperatorError(f"{role} has {len(places.get(role, []))} --signer and {len(found)} --public; give one for each")
    signers = {
        role: [keys.existing(uri, Path(public[role][i]) if role in public else None) for i, uri in enumerate(found)]
        for role, found in places.items()
    }
    for role, entries in signers.items():
        if len({key.keyid for key, _ in entries}) < len(entries):
            raise OperatorError(f"--signer names a key of {role} twice; each signature needs a key of its own")
    if len(signers.get(LEDGER, ())) > 1:
        raise OperatorError("one key signs the ledger; give --signer ledger=URI once")
    return signers


def journal(place: Place) -> Path:
    """Return the file that holds the new metadata of a rotation until they are in force."""
    return place.root / "keys" / "waiting.json"


def check_finished(place: Place) -> None:
    """Refuse to change metadata while an interrupted rotation still has to change them.

    Raises:
        OperatorError: a rotation was interrupted.
    """
    if journal(place).is_file():
        roles = " ".join(Waiting.load(journal(place)).ring)
        raise OperatorError(f"a rotation was interrupted; finish it with `ferry trust rotate {roles}` first")


def init(place: Place, offline: Path | None, signers: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Make keys and the first metadata, or complete what a killed call left incomplete.

    Args:
        place: folder that is to hold them.
        offline: folder for key files of offline roles; None: keys/offline.
        signers: keys that exist elsewhere, by role; the others are made as files.

    Raises:
        OperatorError: the repository is signed already, there are other keys, or too few keys can be used here.
    """
    folder, repository = place.root / "keys", place.root / "repository"
    with place.locked("records"):
        if (repository / "metadata" / "timestamp.json").is_file():
            raise OperatorError(f"{repository} is signed already; replace keys with `ferry trust rotate`")
        ring = keys.create(folder, offline, signers)
        for role, entries in signers.items():
            known = {found.key.keyid for found in ring.ledger} if role == LEDGER else {key.keyid for key, _ in ring.keys[role]}
            if {key.keyid for key, _ in entries} - known:
                raise OperatorError(
                    f"{folder} holds other keys of {role}, which are never overwritten; move that folder away first"
                )
        made = Repository.create(repository, ring)
        (place.root / "root.json").write_bytes(made.root_bytes())
    uris = {role: [uri for _, uri in entries] for role, entries in ring.keys.items()} | {LEDGER: [k.uri for k in ring.ledger]}
    return {"keys": uris, "root": str(place.root / "root.json"), "sha256": hashlib.sha256(made.root_bytes()).hexdigest()}


def status(place: Place, approval: bool) -> tuple[dict[str, Any], str]:
    """Report each role's version, keys and expiry, what is due, and which risks are accepted; as JSON and as text.

    Args:
        place: folder with keys and repository.
        approval: whether a person must approve promotions; then the text says how to keep the key for them off this machine.
    """
    states = sorted(place.repository.states(), key=lambda state: list(ROLES).index(state.role))
    alarms = [_alarm(state) for state in states if state.alarm]
    risks = [
        "this machine holds the key of the models role: a thief of this key could make devices try any bundle"
        + (
            "; require_approval is set, so move that key elsewhere: `ferry trust rotate models --signer models=URI`"
            if approval
            else ""
        )
        for state in states
        if state.role == "models" and state.signs_here
    ]
    waits = journal(place).is_file()
    record: list[dict[str, Any]] = [{"keyid": key.keyid, "uri": uri, "since": since} for key, uri, since in place.keys.ledger]
    value = {
        "expires": {state.role: state.expires.isoformat() for state in states},
        "roles": [
            {
                "role": state.role, "version": state.version, "threshold": state.threshold, "alarm": state.alarm,
                "expires": state.expires.isoformat(), "classes": list(state.classes),
                "keys": [{"keyid": key.keyid, "uri": key.uri, "usable": key.usable} for key in state.keys],
            }
            for state in states
        ],
        "ledger": record, "alarms": alarms, "risks": risks, "unfinished": waits,
    }  # fmt: skip
    lines = []
    for state in states:
        lines.append(
            f"{state.role:10} version {state.version}, {state.threshold} of {len(state.keys)} keys sign, until "
            f"{state.expires:%Y-%m-%d %H:%M} UTC"
        )
        lines += [
            f"  {key.keyid[:SHORT]}  {'usable here' if key.usable else 'not here':11}  {key.uri or 'unknown'}"
            for key in state.keys
        ]
    lines += [f"ledger     {k['keyid'][:SHORT]} signs entries from {k['since']} on  {k['uri']}" for k in record]
    own = next(state.classes for state in states if state.role == "models")
    if own:
        lines.append(f"{len(own)} with roles of {'its' if len(own) == 1 else 'their'} own, under the same keys: {_some(own)}")
    if len(shared := _in_shared_roles(place.repository)) > 1:
        lines.append(
            f"{len(shared)} classes share models, deltas and rollout, so each of their devices fetches what is signed for all; "
            f"`ferry trust delegate` gives a class its own: {_some(shared)}"
        )
    lines += [f"ALARM: {alarm}" for alarm in alarms]
    lines += [f"accepted risk: {risk}" for risk in risks]
    if waits:
        lines.append("a rotation was interrupted: repeat the same `ferry trust rotate` command")
    return value, "\n".join(lines)


def remedy(state: RoleState) -> str:
    """Return the command that signs a role again; for a rollout, that of the class whose own role ends first."""
    return REMEDIES[state.role].replace("LINE/CLASS", state.first or "LINE/CLASS")


def _alarm(state: RoleState) -> str:
    left = state.expires - datetime.now(UTC)
    said = f"ended {_days(-left)} ago" if left < timedelta() else f"ends in {_days(left)} of {LIFETIMES[state.role].days}"
    return f"{state.role}{f' of {state.first}' if state.first else ''} {said}; sign it with `{remedy(state)}`"


def _in_shared_roles(repository: Repository) -> list[str]:
    paths = (path.split("/") for path in repository.in_force("models").signed.targets)
    return sorted({"/".join(parts[1:3]) for parts in paths})


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:SHOWN]) + (f" and {len(places) - SHOWN} more" if len(places) > SHOWN else "")


def _days(span: timedelta) -> str:
    return f"{span.total_seconds() / 86_400:.1f} days"

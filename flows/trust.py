"""Make, replace and use signing keys (`ferry trust`): the steps in order; `ota.release` decides what is signed and by whom."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Role

from flows import policies
from flows.workspace import Workspace
from ota.errors import OperatorError
from ota.release import keys, rotation
from ota.release.ceremony import Waiting, taken_out
from ota.release.keys import DELEGATED, LEDGER, ROLES, SHORT, Entry
from ota.release.metadata import LIFETIMES
from ota.release.repository import RENEWED, Repository, RoleState

REMEDIES = {
    "root": "ferry trust renew root", "targets": "ferry trust renew targets", "models": "ferry trust renew models",
    "deltas": "ferry trust renew deltas", "rollout": "ferry rollout renew LINE/CLASS", "snapshot": "ferry trust refresh",
    "timestamp": "ferry trust refresh",
}  # fmt: skip
EVERY_COMMAND = ("snapshot", "timestamp")  # roles that sign whenever anything is published


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


# init and status


def init(workspace: Workspace, offline: Path | None, signers: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Make keys and the first metadata, or complete what a killed call left incomplete.

    Raises:
        OperatorError: the repository is signed already, there are other keys, or too few keys can be used here.
    """
    folder, repository = workspace.root / "keys", workspace.root / "repository"
    with workspace.locked("records"):
        if (repository / "metadata" / "timestamp.json").is_file():
            raise OperatorError(f"{repository} is signed already; replace keys with `ferry trust rotate`")
        ring = keys.create(folder, offline, signers)
        for role, entries in signers.items():
            known = {found.key.keyid for found in ring.ledger} if role == LEDGER else {key.keyid for key, _ in ring.keys[role]}
            if {key.keyid for key, _ in entries} - known:
                raise OperatorError(f"{folder} holds other keys of {role}, which are kept; move that folder away first")
        made = Repository.create(repository, ring)
        (workspace.root / "root.json").write_bytes(made.root_bytes())
    uris = {role: [uri for _, uri in entries] for role, entries in ring.keys.items()} | {LEDGER: [k.uri for k in ring.ledger]}
    return {"keys": uris, "root": str(workspace.root / "root.json"), "sha256": hashlib.sha256(made.root_bytes()).hexdigest()}


def status(workspace: Workspace) -> tuple[dict[str, Any], str]:
    """Report each role's version, keys and expiry, what is due, and which risks are accepted; as JSON and as text."""
    states = sorted(workspace.repository.states(), key=lambda state: list(ROLES).index(state.role))
    alarms = [_alarm(state) for state in states if state.alarm]
    approval = any(workspace.needs_approval(line) for line in workspace.settings.lines)
    risks = [
        "the promotion signature (models) is made on this machine: a thief of its key could have any bundle tried by devices"
        + (
            "; require_approval is set, so move that key elsewhere: `ferry trust rotate models --signer models=URI`"
            if approval
            else ""
        )
        for state in states
        if state.role == "models" and state.signs_here
    ]
    waits = _journal(workspace).is_file()
    record: list[dict[str, Any]] = [{"keyid": key.keyid, "uri": uri, "since": since} for key, uri, since in workspace.keys.ledger]
    value = {
        "expires": {state.role: state.expires.isoformat() for state in states},
        "roles": [
            {
                "role": state.role, "version": state.version, "threshold": state.threshold, "alarm": state.alarm,
                "expires": state.expires.isoformat(),
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
    lines += [f"ALARM: {alarm}" for alarm in alarms]
    lines += [f"accepted risk: {risk}" for risk in risks]
    if waits:
        lines.append("a rotation was cut: repeat `ferry trust rotate` as it was called")
    return value, "\n".join(lines)


def _alarm(state: RoleState) -> str:
    left = state.expires - datetime.now(UTC)
    said = f"ended {_days(-left)} ago" if left < timedelta() else f"ends in {_days(left)} of {LIFETIMES[state.role].days}"
    return f"{state.role} {said}; sign it with `{REMEDIES[state.role]}`"


def _days(span: timedelta) -> str:
    return f"{span.total_seconds() / 86_400:.1f} days"


# rotate


def rotate(
    workspace: Workspace,
    roles: Collection[str],
    lost: Sequence[str],
    stolen: Sequence[str],
    new: int | None,
    signers: Mapping[str, Sequence[Entry]],
    offline: Path | None,
    out: Path | None,
) -> tuple[dict[str, Any], str]:
    """Replace keys, and sign everything again that they had signed. Rerun a killed call; it resumes.

    Args:
        workspace: whose keys.
        roles: that get new keys.
        lost: ids of keys to remove; if neither this nor `stolen` names a key of a role, all its keys are removed.
        stolen: ids of keys to remove that somebody else has; if they are enough to sign for a role, all its keys are removed.
        new: number of new keys for each role; None: as many as are removed.
        signers: new keys that exist elsewhere, by role; the others are made as files.
        offline: folder for new key files of offline roles; None: keys/offline.
        out: file in which the new metadata wait for signatures; None: enough keys are here.

    Raises:
        OperatorError: too few keys can be used here, or an argument does not fit; nothing was changed.
    """
    wrong = [role for role in (*roles, *signers) if role not in (*ROLES, LEDGER) or role not in roles]
    if wrong:
        raise OperatorError(f"{wrong[0]} is not among the roles to rotate; choose among {', '.join((*ROLES, LEDGER))}")
    if LEDGER in roles:
        if len(set(roles)) > 1 or lost or stolen or new is not None or out:
            raise OperatorError("the ledger's key is of no repository; rotate it alone, as in `ferry trust rotate ledger`")
        return _rotate_ledger(workspace, next(iter(signers.get(LEDGER, ())), None))
    journal = _journal(workspace)
    if journal.is_file():
        waiting = Waiting.load(journal)
        put_in_force(workspace, waiting)
        if set(roles) == waiting.ring.keys():
            return _rotated(workspace, waiting, {}, "the rotation that was cut is finished")
    with workspace.locked("records"):
        repository = workspace.repository
        trusted = {role: found for role, found in repository.roles().items() if role in roles}
        gone = taken_out(trusted, lost, stolen)
        fresh, made = _new_keys(workspace, trusted, gone, new, signers, offline)
        here = [*_here(repository, fresh), *(signer for signer, _ in made)]
        elsewhere = _roles_elsewhere(repository, trusted, fresh, here)
        waiting = rotation.prepare(repository, fresh, [role for role in elsewhere if role in DELEGATED]).signed(here)
        if out is None and waiting.missing():
            raise OperatorError(
                f"{'; '.join(waiting.missing())}; make the keys available, or add --out FILE and sign where they are"
            )
        if out and out.exists():
            raise OperatorError(f"{out} is there already; name another file")
        for signer, path in made:
            keys.store(path, signer)
        waiting.save(out or journal)
    changes = {
        role: {
            "out": gone[role],
            "in": [key.keyid for key, _ in fresh[role] if key.keyid not in trusted[role].keyids],
        }
        for role in fresh
    }
    if out:
        return _waits(waiting, out) | {"roles": changes}, "\n".join([*_changed(changes, fresh), text_of(waiting, out)])
    put_in_force(workspace, waiting)
    value, text = _rotated(workspace, waiting, changes, "")
    hint = (
        "a thief who could also publish may have raised version numbers; devices that saw them follow again once snapshot and "
        "timestamp are rotated too"
    )
    wanted = stolen and not set(EVERY_COMMAND) <= set(roles)
    return value, "\n".join([*_changed(changes, fresh), text, *([hint] if wanted else [])])


def _new_keys(
    workspace: Workspace,
    trusted: Mapping[str, Role],
    gone: Mapping[str, Collection[str]],
    new: int | None,
    signers: Mapping[str, Sequence[Entry]],
    offline: Path | None,
) -> tuple[dict[str, list[Entry]], list[tuple[CryptoSigner, Path]]]:
    """Choose and make the keys that each role has from now on; return them, and the new private keys with their files-to-be.

    Raises:
        OperatorError: a given key was one of the role's before, or there would be too few.
    """
    repository = workspace.repository
    made: list[tuple[CryptoSigner, Path]] = []
    fresh: dict[str, list[Entry]] = {}
    for role, needs in trusted.items():
        given = list(signers.get(role, ()))
        if known := repository.keys_ever_trusted(role).intersection(key.keyid for key, _ in given):
            raise OperatorError(f"key {min(known)[:SHORT]} is or was a key of {role}; make a new one")
        count = len(gone[role]) if new is None else new
        kept = [entry for entry in repository.entries(role) if entry[0].keyid not in gone[role]]
        if count < len(given) or len(kept) + count < needs.threshold:
            least = max(len(given), needs.threshold - len(kept))
            raise OperatorError(f"{role} must get at least {least} new keys; raise --new")
        for _ in range(count - len(given)):
            signer = CryptoSigner.generate_ed25519()
            entry, path = keys.place(workspace.root / "keys", signer, role, offline)
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


def _rotate_ledger(workspace: Workspace, entry: Entry | None) -> tuple[dict[str, Any], str]:
    """Let a new key sign the ledger; from now on, entries that the old key signs are not valid."""
    with workspace.locked("records"):
        entries = len(workspace.ledger.hashes())
        old = workspace.keys.ledger[-1].key.keyid
        made = workspace.keys.begin_ledger(entries + 1, entry)
    new = made.key.keyid
    text = (
        f"ledger - {old[:SHORT]}\nledger + {new[:SHORT]} {made.uri}\n"
        f"entries of the ledger are signed by it from {made.since} on; destroy the file of the old key yourself"
    )
    return {"roles": {LEDGER: {"out": [old], "in": [new]}}, "since": made.since}, text


def put_in_force(workspace: Workspace, waiting: Waiting) -> None:
    """Put the waiting metadata in force, and publish them.

    The roles below root are signed again so that they verify under both roots, and are published before the new root. So a
    device that updates in the meantime finds metadata that verify. If old keys are lost, this is not possible; then all is
    published once the new root is in force.

    Raises:
        OperatorError: signatures are missing, or something newer is in force.
    """
    with workspace.locked("records"):
        smooth = rotation.resign_below_root(workspace.repository, waiting)
    if smooth:
        policies.publish(workspace)
    with workspace.locked("records"):
        rotation.put_in_force(workspace.repository, waiting)
    policies.publish(workspace)
    _journal(workspace).unlink(missing_ok=True)


def check_finished(workspace: Workspace) -> None:
    """Refuse to change metadata while an interrupted rotation still has to change them.

    Raises:
        OperatorError: a rotation was interrupted.
    """
    if _journal(workspace).is_file():
        roles = " ".join(Waiting.load(_journal(workspace)).ring)
        raise OperatorError(f"a rotation was cut; finish it with `ferry trust rotate {roles}` first")


def _journal(workspace: Workspace) -> Path:
    return workspace.root / "keys" / "waiting.json"


def _here(repository: Repository, fresh: Mapping[str, Sequence[Entry]]) -> list[Signer]:
    """Open all signers, of present keys and of the new ones in `fresh`, that can be used on this machine."""
    found = [signer for role in ROLES for signer in repository.keys.usable(role)]
    known = {signer.public_key.keyid for signer in found}
    for key, uri in (entry for entries in fresh.values() for entry in entries if entry[0].keyid not in known):
        try:
            found.append(keys.open_signer(uri, key))
        except OperatorError:
            continue
    return found


def _rotated(workspace: Workspace, waiting: Waiting, changes: dict[str, Any], said: str) -> tuple[dict[str, Any], str]:
    states = {state.role: state for state in workspace.repository.states()}
    versions = {role: state.version for role, state in states.items()}
    root = workspace.repository.newest_root()
    sha256 = hashlib.sha256(root.read_bytes()).hexdigest()
    lines = [said] if said else []
    lines += [f"signed anew: {role}, {_content(workspace, role)}" for role in waiting.ring if role in DELEGATED]
    if "root" in waiting.documents:
        lines.append(f"root version {versions['root']} is in force; new devices are set up with {root}, sha256 {sha256}")
    value = {"versions": versions, "roles": changes, "root": str(root), "sha256": sha256}
    return value, "\n".join(lines or [f"{', '.join(waiting.documents)} in force"])


def _content(workspace: Workspace, role: str) -> str:
    repository = workspace.repository
    found = []
    for line, settings in workspace.settings.lines.items():
        for device_class in settings.classes:
            if role == "models":
                found += [f"{line}/{device_class} release {r.seq}" for r in repository.releases(line, device_class)]
            elif role == "deltas":
                found += [f"{line}/{device_class} delta to {d.target[:SHORT]}" for d in repository.deltas(line, device_class)]
            elif policy := repository.policy(line, device_class):
                found.append(f"{line}/{device_class} release {policy.seq}")
    return ", ".join(found) or "which holds nothing"


def _changed(changes: Mapping[str, Any], fresh: Mapping[str, Sequence[Entry]]) -> list[str]:
    uris = {key.keyid: uri for entries in fresh.values() for key, uri in entries}
    lines = []
    for role, change in changes.items():
        lines += [f"{role} - {keyid[:SHORT]}" for keyid in change["out"]]
        lines += [f"{role} + {keyid[:SHORT]} {uris[keyid]}" for keyid in change["in"]]
    return lines


# sign


def wait(workspace: Workspace, role: str, out: Path) -> tuple[dict[str, Any], str]:
    """Write a role's metadata, with a new version and expiry and no other change, to a file that waits for signatures.

    Raises:
        OperatorError: the signatures of this role cannot wait, or the file exists.
    """
    if role not in RENEWED:
        raise OperatorError(f"{role} cannot wait for signatures; sign it with `{REMEDIES[role]}`")
    if out.exists():
        raise OperatorError(f"{out} is there already; name another file")
    with workspace.locked("records"):
        repository = workspace.repository
        waiting = rotation.prepare(repository, {}, [role]).signed(_here(repository, {}))
    waiting.save(out)
    return _waits(waiting, out), text_of(waiting, out)


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
    return _waits(waiting, path) | {"signed": done}, "\n".join([*(f"signed {what}" for what in done), text_of(waiting, path)])


def publish_waiting(workspace: Workspace, path: Path) -> tuple[dict[str, Any], str]:
    """Put the metadata of a file that waited in force, and publish them.

    Raises:
        OperatorError: signatures are missing, something newer is in force, or an interrupted rotation must be finished first.
    """
    check_finished(workspace)
    waiting = Waiting.load(path)
    put_in_force(workspace, waiting)
    return _rotated(workspace, waiting, {}, f"{', '.join(waiting.documents)} in force; {path} is of no more use")


def _waits(waiting: Waiting, path: Path) -> dict[str, Any]:
    return {"file": str(path), "documents": list(waiting.documents), "missing": waiting.missing()}


def text_of(waiting: Waiting, path: Path) -> str:
    """Say which signatures a file still waits for, and which command comes next."""
    lines = waiting.missing()
    if lines:
        return "\n".join([*lines, f"carry {path} to each key: `ferry trust sign {path} --key URI`"])
    return f"{path} waits for nothing more: `ferry trust sign {path} --publish`"

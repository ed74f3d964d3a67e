"""Signing keys: which keys a role has, and the URI under which the private half of each can be used.

`keys.json` holds public keys and URIs only. A URI names anything with which securesystemslib can sign: a file (`file2:`), a
cloud KMS, an HSM. `create` makes files where no URI is given. It makes the keys of root and targets in a separate folder,
because they belong on a medium that is not plugged in every day.

Only the signed metadata decide which keys are trusted. So the ring may hold keys that are not trusted yet, or no longer, and
a change of keys writes the ring first.

The ring also holds the keys that sign the ledger, each from a certain entry on. No device knows them; the ring itself says
which of them are trusted.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from filelock import FileLock
from securesystemslib.exceptions import Error as SecureSystemsError
from securesystemslib.signer import AWSSigner, CryptoSigner, GCPSigner, HSMSigner, Key, Signature, Signer, SSlibKey
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import Metadata

from ota.errors import OperatorError

# Role → (keys made, signatures needed). root and targets are offline, the others are used by every release.
ROLES: dict[str, tuple[int, int]] = {
    "root": (3, 2), "targets": (3, 2), "models": (1, 1), "deltas": (1, 1), "rollout": (1, 1), "snapshot": (1, 1),
    "timestamp": (1, 1),
}  # fmt: skip
OFFLINE = ("root", "targets")
DELEGATED = ("models", "deltas", "rollout")  # kinds of roles below targets (`ota.release.roles`)
LEDGER = "ledger"  # name of its keys in the ring, in addition to the roles
SHORT = 8  # digits of a key's id that are shown

Entry = tuple[Key, str]
"""A public key, and the URI of its private half."""


class LedgerKey(NamedTuple):
    """A key that signs entries of the ledger."""

    key: Key
    uri: str
    since: int
    """Number of the first entry that it signs. From the next key's number on, it signs no more."""


class KeyRing:
    """Public keys and signers of all roles."""

    def __init__(self, folder: Path) -> None:
        """Read the key ring of a folder.

        Raises:
            OperatorError: there is none, or it is damaged.
        """
        self.folder = folder
        try:
            rows = json.loads((folder / "keys.json").read_bytes())
            self.keys: dict[str, list[Entry]] = {
                role: [(Key.from_dict(row["keyid"], dict(row["key"])), row["uri"]) for row in rows[role]] for role in ROLES
            }
            self.ledger: list[LedgerKey] = [
                LedgerKey(Key.from_dict(row["keyid"], dict(row["key"])), str(row["uri"]), int(row["since"]))
                for row in rows.get(LEDGER, [])  # missing if an older ferry, which did not sign the ledger, wrote the ring
            ]
        except OSError as error:
            raise OperatorError(f"there is no key ring in {folder}; `ferry init` makes one") from error
        except (ValueError, KeyError, TypeError) as error:
            raise OperatorError(f"{folder / 'keys.json'} is damaged; restore it from a backup") from error

    @staticmethod
    def threshold(role: str) -> int:
        """Return how many signatures a role needs in a new repository."""
        return ROLES[role][1]

    def signers(self, role: str, trusted: Collection[str] | None = None, needed: int | None = None) -> list[Signer]:
        """Open as many signers of a role as it needs.

        Args:
            role: role whose keys sign.
            trusted: ids of the keys that count; None: all that the ring has for the role.
            needed: number of signatures; None: as in a new repository.

        Raises:
            OperatorError: too few private keys can be used here.
        """
        count = self.threshold(role) if needed is None else needed
        found, problems = self._open(role, trusted)
        if len(found) < count:
            raise OperatorError(
                f"role {role} needs {count} signatures but {len(found)} of its keys can be used here "
                f"({'; '.join(problems)}); make the keys available, or sign where they are"
            )
        return found[:count]

    def usable(self, role: str, trusted: Collection[str] | None = None) -> list[Signer]:
        """Open the signers of a role that can be used here."""
        return self._open(role, trusted)[0]

    def _open(self, role: str, trusted: Collection[str] | None) -> tuple[list[Signer], list[str]]:
        known = {
            key.keyid: (key, uri) for key, uri in self.keys[role.partition(".")[0]]
        }  # a class's role has the keys of its kind
        found, problems = [], []
        for keyid in known if trusted is None else trusted:
            if keyid not in known:
                problems.append(f"{keyid[:SHORT]} is not in {self.folder / 'keys.json'}")
                continue
            key, uri = known[keyid]
            try:
                found.append(open_signer(self._absolute(uri), key))
            except OperatorError as error:
                problems.append(f"{uri}: {error}")
        return found, problems

    def _absolute(self, uri: str) -> str:
        scheme, _, path = uri.partition(":")
        return f"file2:{self.folder / path}" if scheme == "file2" and not Path(path).is_absolute() else uri

    def uri(self, role: str, keyid: str) -> str:
        """Return the URI of a key's private half; empty: the ring does not know the key."""
        return next((uri for key, uri in self.keys[role] if key.keyid == keyid), "")

    def add(self, fresh: Mapping[str, Sequence[Entry]]) -> None:
        """Add keys to those in the ring; durable on return."""
        for role, entries in fresh.items():
            known = {key.keyid for key, _ in self.keys[role]}
            self.keys[role] = [*self.keys[role], *(entry for entry in entries if entry[0].keyid not in known)]
        self._save()

    def keep(self, only: Mapping[str, Sequence[Entry]]) -> None:
        """Replace the ring's keys of these roles; durable on return. Private keys stay where they are."""
        self.keys |= {role: list(entries) for role, entries in only.items()}
        self._save()

    def _save(self) -> None:
        _write_ring(self.folder, self.keys, self.ledger)

    # The ledger

    def begin_ledger(self, since: int, entry: Entry | None = None) -> LedgerKey:
        """Let a new key sign the ledger from an entry on, in place of the key that signs now, if there is one.

        Args:
            since: number of the first entry that it signs.
            entry: a key that exists elsewhere; None: make a new file.

        Returns:
            The key that signs from there on. If another process has added a key in the meantime, this is that key.

        Raises:
            OperatorError: the given key signs the ledger now, or did so before; or the ring cannot be locked.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire()
        except OSError as error:
            raise OperatorError(
                f"cannot lock {lock.lock_file}: {error.strerror}; no key was changed; check who owns the folder, and the disk"
            ) from error
        try:
            present = KeyRing(self.folder)
            if len(present.ledger) > len(self.ledger):  # another process has added a key
                self.ledger = present.ledger
                return self.ledger[-1]
            if entry is None:
                signer = CryptoSigner.generate_ed25519()
                entry, path = place(self.folder, signer, LEDGER, name=f"{LEDGER}.pem")
                store(path, signer)
            if any(entry[0].keyid == known.key.keyid for known in self.ledger):
                raise OperatorError(f"key {entry[0].keyid[:SHORT]} is or was the ledger's; make a new one")
            self.ledger = [*self.ledger, LedgerKey(*entry, since)]
            self._save()
        finally:
            lock.release()
        return self.ledger[-1]

    @property
    def since(self) -> int:
        """Number of the first ledger entry that must be signed."""
        return min((known.since for known in self.ledger), default=1)

    def sign(self, data: bytes) -> tuple[str, str]:
        """Sign data of the ledger; return the key's id and the signature in hex.

        Raises:
            OperatorError: the key cannot be used here.
        """
        self._look_again()
        key, uri, _ = self.ledger[-1]
        try:
            made = open_signer(self._absolute(uri), key).sign(data)
            key.verify_signature(made, data)  # a KMS signs with any key that it has under this name
        except Exception as error:  # drivers raise errors of all kinds
            raise OperatorError(
                f"the ledger's key {uri} cannot sign ({_reason(error)}), so nothing can be recorded; make it available"
            ) from error
        return key.keyid, made.signature

    def _look_again(self) -> None:
        """Read whether another process has replaced the ledger's key: a ring may be open for hours, as long as a training takes."""
        present = KeyRing(self.folder).ledger
        if len(present) > len(self.ledger):
            self.ledger = present

    def holds(self, number: int, keyid: str, signature: str, data: bytes) -> bool:
        """Check whether the signature is valid and by the key that signed the ledger at this entry."""
        if keyid not in {known.key.keyid for known in self.ledger}:
            self._look_again()
        in_use = [known for known in self.ledger if known.since <= number][-1:]
        if not in_use or in_use[0].key.keyid != keyid:
            return False
        try:
            in_use[0].key.verify_signature(Signature(keyid, signature), data)
        except SecureSystemsError:
            return False
        return True


def create(folder: Path, offline: Path | None = None, signers: Mapping[str, Sequence[Entry]] | None = None) -> KeyRing:
    """Create Ed25519 keys for all roles as files; keep a key ring that is there, and never overwrite a file.

    The private keys count only when `keys.json` is written, after them. So a killed call can be repeated from the beginning.

    Args:
        folder: folder of the ring; online keys go below it.
        offline: folder for the keys of root and targets; None: below `folder`, too.
        signers: keys that exist elsewhere, by role or for the ledger; each takes the place of one file.
    """
    if (folder / "keys.json").is_file():
        return KeyRing(folder)
    ring: dict[str, list[Entry]] = {}
    for role, (count, _) in ROLES.items():
        ring[role] = list((signers or {}).get(role, ()))
        for i in range(count - len(ring[role])):
            signer = CryptoSigner.generate_ed25519()
            name = f"{role}.pem" if count == 1 else f"{role}-{i + 1}.pem"
            entry, path = place(folder, signer, role, offline, name)
            store(path, signer)
            ring[role].append(entry)
    given = (signers or {}).get(LEDGER, ())
    if given:
        entry = given[0]
    else:
        signer = CryptoSigner.generate_ed25519()
        entry, path = place(folder, signer, LEDGER, name=f"{LEDGER}.pem")
        store(path, signer)
    _write_ring(folder, ring, [LedgerKey(*entry, 1)])
    return KeyRing(folder)


def for_ledger(folder: Path) -> KeyRing:
    """Make a ring without keys of any role, for the ledger of a workspace that signs nothing else."""
    _write_ring(folder, dict.fromkeys(ROLES, ()), ())
    return KeyRing(folder)


def place(folder: Path, signer: CryptoSigner, role: str, offline: Path | None = None, name: str = "") -> tuple[Entry, Path]:
    """Choose where the file of a new private key goes; nothing is written yet.

    Args:
        folder: folder of the ring.
        signer: signer of the key.
        role: role of the key; decides whether the key is offline.
        offline: folder for offline keys; None: below `folder`.
        name: name of the file; if it is empty or taken, the name is made from the role and the key's id.

    Returns:
        The key's entry for the ring, and the path of the file.
    """
    at = (offline.absolute() if offline else folder / "offline") if role in OFFLINE else folder / "online"
    if not name or (at / name).exists():
        name = f"{role}-{signer.public_key.keyid[:SHORT]}.pem"
    within = (at / name).relative_to(folder) if at.is_relative_to(folder) else at / name
    return (signer.public_key, f"file2:{within.as_posix()}"), at / name


def store(path: Path, signer: CryptoSigner) -> None:
    """Write a private key to a file; durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_durably(path, signer.private_bytes, 0o600)


def existing(uri: str, public: Path | None = None) -> Entry:
    """Make the ring's entry of a key that exists elsewhere.

    Args:
        uri: URI of its private half; a relative path of a file starts at the present folder.
        public: file with its public half as PEM; None: it is read from where the private half is.

    Raises:
        OperatorError: the public half cannot be read.
    """
    place = placed(uri)
    try:
        if public:
            return SSlibKey.from_crypto(load_pem_public_key(public.read_bytes())), place
        return _imported(place), place
    except Exception as error:  # drivers raise errors of all kinds
        asked = f"{public} is not a public key as PEM" if public else f"{uri} does not tell its public key"
        raise OperatorError(f"{asked} ({_reason(error)}); give it with --public ROLE=FILE") from error


def placed(uri: str) -> str:
    """Return a URI that means the same in every folder: the path of a file is made absolute."""
    scheme, _, path = uri.partition(":")
    return f"file2:{Path(path).absolute()}" if scheme == "file2" else uri


def _imported(uri: str) -> Key:
    scheme, _, rest = uri.partition(":")
    if scheme == "file2":
        return SSlibKey.from_crypto(load_pem_private_key(Path(rest).read_bytes(), None).public_key())
    if scheme == "hsm":
        number, _, query = rest.partition("?")
        label = dict(parse_qsl(query)).get("label")
        return HSMSigner.import_(int(number) if number else None, label, _secret)[1]
    if scheme in ("gcpkms", "awskms"):
        return (GCPSigner if scheme == "gcpkms" else AWSSigner).import_(rest)[1]
    raise ValueError("ferry cannot ask a signer of this kind")


def open_signer(uri: str, key: Key) -> Signer:
    """Open the signer of a key.

    Raises:
        OperatorError: the key cannot be used here.
    """
    try:
        return Signer.from_priv_key_uri(uri, key, _secret)
    except Exception as error:
        raise OperatorError(_reason(error)) from error


def sign(metadata: Metadata[Any], signer: Signer) -> None:
    """Add a signature, and verify it: a KMS signs with any key that it has under a name.

    Raises:
        OperatorError: the signer failed, or signed with another key; nothing was added.
    """
    keyid = signer.public_key.keyid
    try:
        made = metadata.sign(signer, append=True)
        signer.public_key.verify_signature(made, metadata.signed_bytes)
    except (TufRepositoryError, SecureSystemsError) as error:
        metadata.signatures.pop(keyid, None)
        raise OperatorError(f"key {keyid[:SHORT]} makes no valid signature ({_reason(error)}); check its URI") from error


@cache
def _secret(name: str) -> str:
    """Ask for a PIN or passphrase on the terminal, once for each name."""
    if not sys.stdin.isatty():
        raise ValueError(f"it asks for its {name}, but there is no terminal to type it in")
    return getpass.getpass(f"{name} of the signer: ")


def _reason(error: Exception) -> str:
    return str(error.args[0] if error.args else error).strip() or type(error).__name__


def _write_ring(folder: Path, keys: Mapping[str, Sequence[Entry]], ledger: Sequence[LedgerKey]) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        role: [{"keyid": key.keyid, "key": key.to_dict(), "uri": uri} for key, uri in entries] for role, entries in keys.items()
    }
    rows[LEDGER] = [{"keyid": key.keyid, "key": key.to_dict(), "uri": uri, "since": since} for key, uri, since in ledger]
    _write_durably(folder / "keys.json", json.dumps(rows, indent=1, sort_keys=True).encode(), 0o644)


def _write_durably(path: Path, data: bytes, mode: int) -> None:
    """Write a file completely or not at all: a power cut must not destroy a key that a published root trusts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

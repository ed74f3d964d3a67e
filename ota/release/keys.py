"""Signing keys: which keys each role trusts, and the URI under which the private half of each can be used.

`keys.json` holds public keys and URIs only. A URI is anything that securesystemslib signs with: a file on this machine
(`file2:`), a cloud KMS, an HSM. `create` makes files; root and targets keys are made apart from the others, because they
belong on a medium that is not plugged in day by day.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from securesystemslib.exceptions import Error as SecureSystemsError
from securesystemslib.signer import CryptoSigner, Key, Signer

from ota.errors import OperatorError

# Role → (keys made, signatures needed). root and targets are offline, the others are used by every release.
ROLES: dict[str, tuple[int, int]] = {
    "root": (3, 2), "targets": (3, 2), "models": (1, 1), "deltas": (1, 1), "rollout": (1, 1), "snapshot": (1, 1),
    "timestamp": (1, 1),
}  # fmt: skip
OFFLINE = ("root", "targets")
DELEGATED = ("models", "deltas", "rollout")


class KeyRing:
    """Public keys, thresholds and signers of all roles."""

    def __init__(self, folder: Path) -> None:
        """Read the key ring of a folder.

        Raises:
            OperatorError: there is none, or it is damaged.
        """
        self.folder = folder
        try:
            rows = json.loads((folder / "keys.json").read_bytes())
            self.keys: dict[str, list[tuple[Key, str]]] = {
                role: [(Key.from_dict(row["keyid"], dict(row["key"])), row["uri"]) for row in rows[role]] for role in ROLES
            }
        except OSError as error:
            raise OperatorError(f"there is no key ring in {folder}; `ferry init` makes one") from error
        except (ValueError, KeyError, TypeError) as error:
            raise OperatorError(f"{folder / 'keys.json'} is damaged; restore it from a backup") from error

    @staticmethod
    def threshold(role: str) -> int:
        """Signatures that a role needs."""
        return ROLES[role][1]

    def signers(self, role: str) -> list[Signer]:
        """As many signers of a role as it needs.

        Raises:
            OperatorError: too few private keys can be used here.
        """
        found: list[Signer] = []
        problems = []
        for key, uri in self.keys[role]:
            try:
                found.append(Signer.from_priv_key_uri(self._absolute(uri), key))
            except (OSError, ValueError, SecureSystemsError) as error:
                problems.append(f"{uri}: {error.args[0] if error.args else error}")
        if len(found) < self.threshold(role):
            raise OperatorError(
                f"role {role} needs {self.threshold(role)} signatures but {len(found)} of its keys can be used here "
                f"({'; '.join(problems)}); make the keys available, or sign where they are"
            )
        return found[: self.threshold(role)]

    def _absolute(self, uri: str) -> str:
        scheme, _, path = uri.partition(":")
        return f"file2:{self.folder / path}" if scheme == "file2" and not Path(path).is_absolute() else uri


def create(folder: Path) -> KeyRing:
    """Make Ed25519 keys for all roles as files below `folder`; a key ring that is there is kept.

    Private keys are written before `keys.json`, which makes them count: a killed call is repeated from the beginning.
    """
    if (folder / "keys.json").is_file():
        return KeyRing(folder)
    rows: dict[str, list[dict[str, Any]]] = {}
    for role, (count, _) in ROLES.items():
        place = Path("offline" if role in OFFLINE else "online")
        (folder / place).mkdir(parents=True, exist_ok=True, mode=0o700)
        rows[role] = []
        for i in range(count):
            signer = CryptoSigner.generate_ed25519()
            name = place / (f"{role}.pem" if count == 1 else f"{role}-{i + 1}.pem")
            _write_private(folder / name, signer.private_bytes)
            rows[role].append(
                {"keyid": signer.public_key.keyid, "key": signer.public_key.to_dict(), "uri": f"file2:{name.as_posix()}"}
            )
    fresh = folder / "keys.json.tmp"
    fresh.write_text(json.dumps(rows, indent=1, sort_keys=True))
    fresh.replace(folder / "keys.json")
    return KeyRing(folder)


def _write_private(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)

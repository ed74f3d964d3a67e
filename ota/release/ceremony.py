"""Metadata that wait for signatures: a file that is made where the repository is, signed where the keys are, and brought back.

The file holds new metadata and says which keys they wait for. So a machine without repository and network can sign them, and
can refuse a wrong key. When the metadata are put in force, nothing that the file says about keys is trusted: the root in force
decides (`rotation.put_in_force`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Role

from ota import output
from ota.errors import ManifestError, OperatorError
from ota.manifest import Document, MiB, parse
from ota.release.keys import ROLES, SHORT, Entry, open_signer, placed, sign
from ota.release.roles import is_role

MAX_WAITING = 4 * MiB


class Need(Document):
    """Signatures that a document waits for."""

    whose: Literal["present", "new"]
    threshold: int = Field(ge=1)
    required: bool = Field(default=True, description="if not, they only spare devices a moment in which nothing can be installed")
    keys: dict[str, dict[str, Any]] = Field(description="id → public key")

    @classmethod
    def of(cls, whose: Literal["present", "new"], role: Role, keys: Mapping[str, Key], required: bool = True) -> Need:
        """Describe the signatures that a role requires."""
        return cls(whose=whose, threshold=role.threshold, required=required, keys={i: keys[i].to_dict() for i in role.keyids})

    def public(self) -> dict[str, Key]:
        """Return the public keys, by id.

        Raises:
            OperatorError: one is none.
        """
        return {keyid: _key(keyid, key) for keyid, key in self.keys.items()}


class Row(Document):
    """An entry of the key ring."""

    keyid: str
    key: dict[str, Any]
    uri: str


class Waiting(Document):
    """New metadata, the signatures that they wait for, and the key ring's new rows."""

    schema_version: Literal[1] = 1
    documents: dict[str, dict[str, Any]] = Field(min_length=1, description="role → metadata")
    needs: dict[str, list[Need]] = Field(description="the same roles → signatures")
    ring: dict[str, list[Row]] = Field(default_factory=dict, description="roles whose keys change → all the keys they have then")

    @classmethod
    def of(
        cls, documents: Mapping[str, Metadata[Any]], needs: Mapping[str, list[Need]], fresh: Mapping[str, Sequence[Entry]]
    ) -> Waiting:
        """Collect new, unsigned metadata with the signatures that they need and all keys of the roles whose keys change."""
        rows = {
            role: [Row(keyid=key.keyid, key=key.to_dict(), uri=uri) for key, uri in entries] for role, entries in fresh.items()
        }
        return cls(documents={role: m.to_dict() for role, m in documents.items()}, needs=dict(needs), ring=rows)

    def metadata(self) -> dict[str, Metadata[Any]]:
        """Return the documents as TUF metadata, by role.

        Raises:
            OperatorError: a document is not metadata of its role.
        """
        try:
            found = {role: Metadata[Any].from_dict(copy.deepcopy(d)) for role, d in self.documents.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OperatorError("the file that waits for signatures holds no metadata; begin again") from error
        for role, metadata in found.items():
            if (
                role not in self.needs
                or not (role in ROLES or is_role(role))
                or metadata.signed.type != ("root" if role == "root" else "targets")
            ):
                raise OperatorError(f"the file that waits for signatures cannot change role {role[:40]}; begin again")
        return found

    def entries(self) -> dict[str, list[Entry]]:
        """Return the key ring's new rows, by role.

        Raises:
            OperatorError: a row is of no role, or holds no public key.
        """
        if unknown := self.ring.keys() - ROLES.keys():
            raise OperatorError(
                f"the file that waits for signatures names keys of {min(unknown)[:40]!r}, which is no role; begin again"
            )
        return {role: [(_key(row.keyid, row.key), row.uri) for row in rows] for role, rows in self.ring.items()}

    def signed(self, signers: Iterable[Signer]) -> Waiting:
        """Sign with these signers, as far as their signatures are still needed; return the signed copy."""
        known = {signer.public_key.keyid: signer for signer in signers}
        documents = self.metadata()
        for role, metadata in documents.items():
            for need in self.needs[role]:
                for keyid in need.keys:
                    if keyid in known and len(_valid(metadata, need)) < need.threshold:
                        sign(metadata, known[keyid])
        return self._with(documents)

    def signed_with(self, uri: str) -> tuple[Waiting, list[str]]:
        """Sign with the key of a URI wherever it counts; return the signed copy, and a line for each signature.

        Raises:
            OperatorError: the key is none of those that are waited for, or cannot be used here.
        """
        documents, done, problem = self.metadata(), [], "it is another key"
        for role, metadata in documents.items():
            for keyid, key in {i: k for need in self.needs[role] for i, k in need.public().items()}.items():
                try:
                    sign(metadata, open_signer(placed(uri), key))
                except OperatorError as error:
                    problem = str(error)
                else:
                    done.append(f"{role} version {metadata.signed.version} with key {keyid[:SHORT]}")
        if not done:
            waited = sorted({keyid[:SHORT] for needs in self.needs.values() for need in needs for keyid in need.keys})
            raise OperatorError(f"{uri} cannot sign this file ({problem}); the file waits for the keys {', '.join(waited)}")
        return self._with(documents), done

    def _with(self, documents: Mapping[str, Metadata[Any]]) -> Waiting:
        return self.model_copy(update={"documents": {role: m.to_dict() for role, m in documents.items()}})

    def missing(self) -> list[str]:
        """List the required signatures that are still missing, one line for each need."""
        lines = []
        for role, metadata in self.metadata().items():
            for need in self.needs[role]:
                have = _valid(metadata, need)
                if need.required and len(have) < need.threshold:
                    others = ", ".join(sorted(keyid[:SHORT] for keyid in need.keys.keys() - have))
                    lines.append(
                        f"{role} version {metadata.signed.version} has {len(have)} of {need.threshold} signatures of its {need.whose} "
                        f"keys; {others} can sign"
                    )
        return lines

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all.

        Raises:
            OperatorError: it cannot be written there.
        """
        with output.fresh(path) as file:
            file.write(self.canonical())

    @classmethod
    def load(cls, path: Path) -> Waiting:
        """Read a file that `save` wrote.

        Raises:
            OperatorError: it cannot be read, or is not such a file.
        """
        try:
            return parse(cls, path.read_bytes(), MAX_WAITING)
        except OSError as error:
            raise OperatorError(f"cannot read {path}: {error.strerror}; name a file that `--out` wrote") from error
        except ManifestError as error:
            raise OperatorError(f"{path} is not a file that waits for signatures; name one that `--out` wrote") from error


def taken_out(roles: Mapping[str, Role], lost: Collection[str], stolen: Collection[str]) -> dict[str, list[str]]:
    """Choose the keys to remove from each role: the named ones, or all keys of a role of which none is named.

    All keys of a role are removed, too, if a thief has as many of them as the role needs. The thief could have raised version
    numbers, and devices forget these only when too few of the old keys are left to sign anything (`rules.binding` of the agent).

    Args:
        roles: roles that are to change, with their keys.
        lost: ids of lost keys, or the first digits of their ids.
        stolen: ids of stolen keys, or the first digits of their ids.

    Returns:
        Ids of the keys to remove, by role.

    Raises:
        OperatorError: a name fits no key of these roles, or several.
    """
    everyone = {keyid for role in roles.values() for keyid in role.keyids}

    def whole(name: str) -> str:
        found = [keyid for keyid in everyone if keyid.startswith(name) and name]
        if len(found) != 1:
            raise OperatorError(
                f"{name!r} is {'no key' if not found else 'the beginning of several keys'} of {', '.join(roles)}; "
                "`ferry trust status` shows their ids"
            )
        return found[0]

    bad = {whole(name) for name in stolen}
    named = bad | {whole(name) for name in lost}
    gone = {}
    for role, trusted in roles.items():
        mine = [keyid for keyid in trusted.keyids if keyid in named]
        reached = len(bad.intersection(trusted.keyids)) >= trusted.threshold
        gone[role] = list(trusted.keyids) if reached or not mine else mine
    return gone


def _key(keyid: str, fields: Mapping[str, Any]) -> Key:
    """Make a public key of what the file says.

    Raises:
        OperatorError: it is none.
    """
    try:
        return Key.from_dict(keyid, copy.deepcopy(dict(fields)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OperatorError(f"the file that waits for signatures holds no public key {keyid[:SHORT]}; begin again") from error


def _valid(metadata: Metadata[Any], need: Need) -> set[str]:
    found = set()
    for keyid, key in need.public().items():
        if keyid in metadata.signatures:
            try:
                key.verify_signature(metadata.signatures[keyid], metadata.signed_bytes)
            except UnverifiedSignatureError:
                continue
            found.add(keyid)
    return found

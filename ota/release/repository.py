"""The signed repository: TUF metadata by python-tuf over manifests, deltas and policies.

    root ── targets ─┬─ models    bundles that may run; their release numbers; which may be gone back to
    (2 of 3 keys,    ├─ deltas    ways from one bundle to another; a device follows one only to a bundle in `models`
     offline)        └─ rollout   who may install which release when; short-lived; never names bytes
          └─ snapshot, timestamp  online

A bundle's files are not targets of their own: they lie under `objects/` by their hash, and the manifest, which is a
target, lists those hashes. That keeps the metadata that every device fetches small.

What the repository holds is what its `timestamp.json` leads to. Everything else is written first, under names that are
never reused for other content, and `timestamp.json` last, so a killed run leaves the previous state.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.exceptions import StorageError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError

from ota.errors import OperatorError
from ota.manifest import MAX_MANIFEST, MAX_POLICY, Document, Manifest, Policy, Sha256, parse
from ota.release.keys import DELEGATED, KeyRing

# How long signatures hold. Online ones are renewed by every release and by `ferry trust refresh`; a rollout that nobody
# renews stops spreading.
LIFETIMES = {
    "root": timedelta(days=365), "targets": timedelta(days=365), "models": timedelta(days=180),
    "deltas": timedelta(days=180), "rollout": timedelta(days=14), "snapshot": timedelta(days=14),
    "timestamp": timedelta(days=14),
}  # fmt: skip
RENEWED = ("root", "targets", "models", "deltas")  # what `Repository.renew` signs anew
KEPT_RELEASES = 8  # of one line and class in `models`
KEPT_DELTAS_TO = 2  # newest releases to which deltas are kept


class Release(Document):
    """A bundle that was published."""

    line: str
    device_class: str
    seq: int
    manifest: Sha256
    ledger: Sha256
    version: int
    full_bytes: int
    revertible: bool


@dataclass(frozen=True)
class DeltaTarget:
    """A published way from one bundle to another."""

    base: Sha256
    target: Sha256
    size: int


def manifest_path(line: str, device_class: str, digest: str) -> str:
    """Target path of a bundle's manifest."""
    return f"models/{line}/{device_class}/{digest}.json"


def delta_path(line: str, device_class: str, base: str, target: str) -> str:
    """Target path of a delta."""
    return f"deltas/{line}/{device_class}/{base}.{target}"


def policy_path(line: str, device_class: str) -> str:
    """Target path of a policy."""
    return f"rollout/{line}/{device_class}.json"


class Repository:
    """A folder with `metadata/`, `targets/` and `objects/`, and the keys to change it."""

    def __init__(self, folder: Path, keys: KeyRing) -> None:
        """Open a repository.

        Raises:
            OperatorError: there is none.
        """
        self.folder, self.keys = folder, keys
        self.metadata, self.target_files, self.objects = folder / "metadata", folder / "targets", folder / "objects"
        if not (self.metadata / "timestamp.json").is_file():
            raise OperatorError(f"there is no repository in {folder}; `ferry init` makes one")

    @classmethod
    def create(cls, folder: Path, keys: KeyRing) -> Repository:
        """Make an empty, signed repository; one that is there is kept. Needs the offline keys."""
        if (folder / "metadata" / "timestamp.json").is_file():
            return cls(folder, keys)
        for name in ("metadata", "targets", "objects"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        root = Root(expires=_expiry("root"), consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            for key, _ in keys.keys[role]:
                root.add_key(key, role)
            root.roles[role].threshold = keys.threshold(role)
        top = Targets(expires=_expiry("targets"))
        top.delegations = Delegations(
            {},
            {
                role: DelegatedRole(
                    role, [], keys.threshold(role), True, [f"{role}/*/*/*" if role != "rollout" else "rollout/*/*"]
                )
                for role in DELEGATED
            },
        )
        for role in DELEGATED:
            for key, _ in keys.keys[role]:
                top.add_key(key, role)
        made: dict[str, Any] = {"root": root, "targets": top} | {r: Targets(expires=_expiry(r)) for r in DELEGATED}
        metadata = folder / "metadata"
        for role, signed in made.items():
            _sign(metadata / f"1.{role}.json", Metadata(signed), keys, role)
        snapshot = Snapshot(expires=_expiry("snapshot"), meta={f"{r}.json": MetaFile(1) for r in ("targets", *DELEGATED)})
        _sign(metadata / "1.snapshot.json", Metadata(snapshot), keys, "snapshot")
        timestamp = Timestamp(expires=_expiry("timestamp"), snapshot_meta=MetaFile(1))
        _sign(metadata / "timestamp.json", Metadata(timestamp), keys, "timestamp")
        return cls(folder, keys)

    # What it holds

    def root_bytes(self) -> bytes:
        """The first root: what a device is given once, by hand, with its hash."""
        return (self.metadata / "1.root.json").read_bytes()

    def releases(self, line: str, device_class: str) -> list[Release]:
        """Published bundles of a line and class, oldest first."""
        found = []
        for path, target in self._targets("models").targets.items():
            if path.startswith(f"models/{line}/{device_class}/"):
                custom = cast("dict[str, Any]", target.custom)
                digest = target.hashes["sha256"]
                found.append(
                    Release(line=line, device_class=device_class, manifest=digest, **custom),
                )
        return sorted(found, key=lambda release: release.seq)

    def deltas(self, line: str, device_class: str) -> list[DeltaTarget]:
        """Published deltas of a line and class."""
        prefix = f"deltas/{line}/{device_class}/"
        return [
            DeltaTarget(base, to, target.length)
            for path, target in self._targets("deltas").targets.items()
            if path.startswith(prefix)
            for base, _, to in [path.removeprefix(prefix).partition(".")]
        ]

    def policy(self, line: str, device_class: str) -> Policy | None:
        """The policy in force."""
        path = policy_path(line, device_class)
        target = self._targets("rollout").targets.get(path)
        if target is None:
            return None
        return parse(Policy, self._target_file(path, target).read_bytes(), MAX_POLICY)

    def manifest(self, release: Release) -> Manifest:
        """The manifest of a published bundle."""
        path = manifest_path(release.line, release.device_class, release.manifest)
        return parse(Manifest, self._target_file(path, self._targets("models").targets[path]).read_bytes(), MAX_MANIFEST)

    def metadata_bytes(self) -> int:
        """Bytes of metadata that a device which knows only the root fetches."""
        versions = self._versions()
        names = ["timestamp.json", f"{self._snapshot_version()}.snapshot.json"]
        names += [f"{version}.{role}.json" for role, version in versions.items()]
        return sum((self.metadata / name).stat().st_size for name in names)

    def expiries(self) -> dict[str, datetime]:
        """When each role's signature ends."""
        versions = self._versions() | {"root": self._root_version(), "snapshot": self._snapshot_version()}
        found = {role: self._load(f"{version}.{role}.json").signed.expires for role, version in versions.items()}
        return found | {"timestamp": self._load("timestamp.json").signed.expires}

    # Changes

    def publish_release(
        self, manifest: Manifest, files: Path, ledger: str, deltas: list[tuple[str, Path]], revertible: bool = True
    ) -> Release:
        """Add a bundle and its deltas, and sign.

        Args:
            manifest: of the bundle.
            files: folder that holds its files, each named by its hash.
            ledger: head of the promotion ledger, signed with the release so that a truncated ledger shows.
            deltas: base manifest's sha256 and delta file.
            revertible: whether a rollout may go back to it later.

        Raises:
            OperatorError: a file of the bundle is missing or has another hash.
        """
        line, device_class = manifest.line, manifest.device_class
        known = self.releases(line, device_class)
        delta_targets = [
            self._add_target(delta_path(line, device_class, base, manifest.digest), file.read_bytes(), {})
            for base, file in deltas
        ]
        newest = {manifest.digest, *(r.manifest for r in known[len(known) - KEPT_DELTAS_TO + 1 :])}

        def change_deltas(all_deltas: Targets) -> None:
            for delta in delta_targets:
                all_deltas.targets[delta.path] = delta
            for name in list(all_deltas.targets):
                if name.startswith(f"deltas/{line}/{device_class}/") and name.rpartition(".")[2] not in newest:
                    del all_deltas.targets[name]

        for release in known:
            if release.manifest == manifest.digest:  # the same bytes again: gone back to, by ways that may be new
                present = self._targets("deltas").targets
                if any(present.get(delta.path) != delta for delta in delta_targets):
                    self._commit({"deltas": change_deltas})
                return release
        for entry in manifest.files:
            self._add_object(files / entry.sha256, entry.sha256)
        seq = 1 + max((release.seq for release in known), default=0)
        made = Release(
            line=line, device_class=device_class, seq=seq, manifest=manifest.digest, ledger=ledger,
            version=manifest.origin.version, full_bytes=manifest.size, revertible=revertible,
        )  # fmt: skip
        custom = made.model_dump(exclude={"line", "device_class", "manifest"})  # the path and the hash say the rest
        path = manifest_path(line, device_class, manifest.digest)
        target = self._add_target(path, manifest.canonical(), custom)
        kept = {r.manifest for r in [*known, made][-KEPT_RELEASES:]}
        policy = self.policy(line, device_class)
        if policy:  # what devices are told to install must stay installable
            kept.add(policy.manifest)

        def change_models(models: Targets) -> None:
            models.targets[path] = target
            for name in list(models.targets):
                if name.startswith(f"models/{line}/{device_class}/") and models.targets[name].hashes["sha256"] not in kept:
                    del models.targets[name]

        self._commit({"models": change_models, "deltas": change_deltas})
        return made

    def set_policy(self, policy: Policy) -> None:
        """Sign a policy; it replaces the one of its line and class.

        Raises:
            OperatorError: it names a release that is not published, or another number than it has.
        """
        releases = {r.manifest: r for r in self.releases(policy.line, policy.device_class)}
        release = releases.get(policy.manifest)
        if release is None or release.seq != policy.seq:
            raise OperatorError(
                f"release {policy.seq} ({policy.manifest[:12]}) of {policy.line}/{policy.device_class} is not published; "
                "publish it with `ferry release` first"
            )
        if policy.revert and not release.revertible:
            raise OperatorError(f"release {policy.seq} of {policy.line} is not marked as one to go back to")
        target = self._add_target(policy_path(policy.line, policy.device_class), policy.canonical(), {})

        def change(rollout: Targets) -> None:
            rollout.targets[target.path] = target

        self._commit({"rollout": change})

    def refresh(self) -> None:
        """Sign snapshot and timestamp anew, and nothing else: a rollout that nobody renews is meant to expire."""
        self._commit({})

    def renew(self, roles: Collection[str] = RENEWED) -> dict[str, datetime]:
        """Sign roles anew, with nothing changed but their expiry, and snapshot and timestamp with them.

        Args:
            roles: any of root, targets (both need the offline keys), models, deltas. A policy is renewed by the rollout.

        Returns:
            When each role's signature ends now.

        Raises:
            OperatorError: there is no such role to renew, or too few of its keys can be used here; nothing was signed.
        """
        for role in roles:
            if role not in RENEWED:
                raise OperatorError(f"{role} is not renewed by itself; choose among {', '.join(RENEWED)}")
            self.keys.signers(role)
        if "root" in roles:
            root = self._load(f"{self._root_version()}.root.json")
            root.signed.version += 1
            root.signed.expires = _expiry("root")
            _sign(self.metadata / f"{root.signed.version}.root.json", root, self.keys, "root")
        self._commit({role: lambda _: None for role in roles if role != "root"})
        return self.expiries()

    # Inside

    def _commit(self, changes: dict[str, Callable[[Targets], None]]) -> None:
        versions = self._versions()
        for role, change in changes.items():
            metadata = self._load(f"{versions[role]}.{role}.json")
            change(cast("Targets", metadata.signed))
            metadata.signed.version = self._unused(role, metadata.signed.version + 1)
            metadata.signed.expires = _expiry(role)
            versions[role] = metadata.signed.version
            _sign(self.metadata / f"{versions[role]}.{role}.json", metadata, self.keys, role)
        snapshot = self._load(f"{self._snapshot_version()}.snapshot.json")
        snapshot.signed.version = self._unused("snapshot", snapshot.signed.version + 1)
        snapshot.signed.expires = _expiry("snapshot")
        cast("Snapshot", snapshot.signed).meta = {f"{role}.json": MetaFile(version) for role, version in versions.items()}
        _sign(self.metadata / f"{snapshot.signed.version}.snapshot.json", snapshot, self.keys, "snapshot")
        timestamp = self._load("timestamp.json")
        timestamp.signed.version += 1
        timestamp.signed.expires = _expiry("timestamp")
        cast("Timestamp", timestamp.signed).snapshot_meta = MetaFile(snapshot.signed.version)
        _sign(self.metadata / "timestamp.json", timestamp, self.keys, "timestamp")

    def _load(self, name: str) -> Metadata[Any]:
        try:
            return Metadata.from_file(str(self.metadata / name))
        except (StorageError, DeserializationError) as error:
            raise OperatorError(f"{self.metadata / name} is missing or damaged; restore the repository from a backup") from error

    def _unused(self, role: str, version: int) -> int:
        """The first version from this one on whose name no killed run has used: it may have been copied already."""
        while (self.metadata / f"{version}.{role}.json").exists():
            version += 1
        return version

    def _snapshot_version(self) -> int:
        return int(self._load("timestamp.json").signed.snapshot_meta.version)

    def _root_version(self) -> int:
        return max(int(path.name.split(".")[0]) for path in self.metadata.glob("*.root.json"))

    def _versions(self) -> dict[str, int]:
        meta = self._load(f"{self._snapshot_version()}.snapshot.json").signed.meta
        return {name.removesuffix(".json"): file.version for name, file in meta.items()}

    def _targets(self, role: str) -> Targets:
        return cast("Targets", self._load(f"{self._versions()[role]}.{role}.json").signed)

    def _target_file(self, path: str, target: TargetFile) -> Path:
        folder, _, name = path.rpartition("/")
        return self.target_files / folder / f"{target.hashes['sha256']}.{name}"

    def _add_target(self, path: str, data: bytes, custom: dict[str, Any]) -> TargetFile:
        target = TargetFile.from_data(path, data, ["sha256"])
        if custom:
            target.unrecognized_fields["custom"] = custom
        _write(self._target_file(path, target), data)
        return target

    def _add_object(self, source: Path, digest: str) -> None:
        place = self.objects / digest
        if place.is_file():
            return
        fresh = place.with_name(f".{digest}.tmp")
        try:
            shutil.copyfile(source, fresh)
        except OSError as error:
            raise OperatorError(f"{source} of the bundle cannot be read; build the bundle again") from error
        with fresh.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                fresh.unlink()
                raise OperatorError(f"{source} of the bundle does not have the hash its manifest says; build it again")
        fresh.rename(place)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Everything to publish, in the order in which it must appear: objects, targets, metadata, the timestamp last."""
        for folder in (self.objects, self.target_files, self.metadata):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.name.startswith(".") and path.name != "timestamp.json":
                    yield path.relative_to(self.folder).as_posix(), path
        yield "metadata/timestamp.json", self.metadata / "timestamp.json"


def _expiry(role: str) -> datetime:
    return (datetime.now(UTC) + LIFETIMES[role]).replace(microsecond=0)


def _sign(path: Path, metadata: Metadata[Any], keys: KeyRing, role: str) -> None:
    metadata.signatures.clear()
    for signer in keys.signers(role):
        metadata.sign(signer, append=True)
    try:
        _write(path, metadata.to_bytes())
    except TufRepositoryError as error:
        raise OperatorError(f"metadata of role {role} cannot be written: {error}") from error


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_bytes(data)
    fresh.replace(path)

"""The signed repository: TUF metadata by python-tuf over manifests, deltas and policies.

    root ── targets ─┬─ models    bundles that may run, their release numbers, and which a rollback may return to
    (2 of 3 keys,    ├─ deltas    patches from one bundle to another; a device applies one only to get a bundle in `models`
     offline)        └─ rollout   who may install which release, and when; short-lived; cannot bring in other bytes
          └─ snapshot, timestamp  online

A bundle's files are not targets of their own: they lie under `objects/`, named by their hash, and the manifest, which is a
target, lists those hashes. This keeps the metadata small that every device fetches. A line and class can have roles of its own
(`ota.release.roles`), so that its devices do not pay for other classes; `ota.release.delegation` moves it there.

The state of the repository is what its `timestamp.json` leads to. Everything else is written first, under names that are
never reused for other content, and `timestamp.json` last. So a killed run leaves the previous state.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from ota import chain, packed
from ota.errors import OperatorError, printable
from ota.manifest import MAX_COUNT, MAX_MANIFEST, Document, Manifest, Sha256, parse
from ota.policy import MAX_POLICY, MAX_POLICY_2, Policy, Policy2
from ota.release import chains
from ota.release import roles as names
from ota.release.keys import DELEGATED, Entry, KeyRing
from ota.release.metadata import LIFETIMES, TOP, dated, expiry, load, next_version, sign_role, unchanged, unused, write

RENEWED = ("root", "targets", "models", "deltas")  # roles that `Repository.renew` can sign again
KEPT_RELEASES = 8  # newest releases of one line and class that stay in `models`
KEPT_DELTAS_TO = 2  # all deltas are kept to this many of the newest releases; to the others, only those from the release before
LOCK = ".signing.lock"  # file in the folder of the repository, never published
SIGNING_SECONDS = 60.0  # for which one process waits until another has finished its change

P = ParamSpec("P")
R = TypeVar("R")


def alone(change: Callable[Concatenate[Repository, P], R]) -> Callable[Concatenate[Repository, P], R]:
    """Wrap a method, or a function of a repository, that reads, signs and writes, so that no other process does so at the same time."""

    @wraps(change)
    def held(self: Repository, /, *given: P.args, **more: P.kwargs) -> R:
        with self.held():
            return change(self, *given, **more)

    return held


class Release(Document):
    """A published bundle."""

    line: str = Field(description="line (product) of the bundle")
    device_class: str = Field(description="device class of the bundle")
    seq: int = Field(ge=1, le=MAX_COUNT, description="release number")
    manifest: Sha256 = Field(description="hash of the bundle's manifest")
    ledger: Sha256 = Field(description="hash of the newest entry of the ledger, so that a truncated ledger is noticed")
    version: int = Field(description="version of the model in MLflow")
    full_bytes: int = Field(description="bytes of all files of the bundle")
    revertible: bool = Field(description="whether a rollout may return to this release")
    floor: int = Field(
        default=0, ge=0, le=MAX_COUNT,
        description="lowest release number of the line and class that devices may install, as of the last signature; 0: any",
    )  # fmt: skip


@dataclass(frozen=True)
class KeyState:
    """A trusted key."""

    keyid: str
    uri: str
    """URI of its private half; empty: the key ring does not know it."""
    usable: bool
    """Whether its private half can be used here."""


@dataclass(frozen=True)
class RoleState:
    """The state of a role in the metadata in force, together with the roles of classes that have its keys."""

    role: str
    version: int
    """The newest of these roles."""
    threshold: int
    keys: tuple[KeyState, ...]
    expires: datetime
    """When the first of these roles expires, of those that list targets if there are any."""
    empty: bool
    """Whether these roles list no targets, so that nothing is lost when they expire."""
    classes: tuple[str, ...] = ()
    """LINE/CLASS of the classes that have such a role of their own."""
    first: str = ""
    """LINE/CLASS whose own role expires first; empty: the role that all classes share does."""

    @property
    def alarm(self) -> bool:
        """Whether more than half of its lifetime is over; never for an empty role."""
        return not self.empty and self.expires - datetime.now(UTC) < LIFETIMES[self.role] / 2

    @property
    def signs_here(self) -> bool:
        """Whether enough of its keys can be used here."""
        return sum(key.usable for key in self.keys) >= self.threshold


@dataclass(frozen=True)
class DeltaTarget:
    """A published delta from one bundle to another."""

    base: str
    """Hash of the manifest that it starts from; only its first digits if that release is no longer published."""
    target: Sha256
    size: int
    name: str
    """Last part of its target path."""


def manifest_path(line: str, device_class: str, digest: str) -> str:
    """Return the target path of a bundle's manifest."""
    return f"models/{line}/{device_class}/{digest}.json"


def delta_path(line: str, device_class: str, base: str, target: str, form: int = 1) -> str:
    """Return the target path of a delta of a format."""
    return f"deltas/{line}/{device_class}/{chain.name_of(form, base, target)}"


def policy_path(line: str, device_class: str, form: int = 1) -> str:
    """Return the target path of a policy of a form."""
    return f"rollout/{line}/{device_class}{'' if form == 1 else f'.{form}'}.json"


def _sign_head(models: Targets, path: str, ledger: str) -> None:
    models.targets[path].unrecognized_fields["custom"]["ledger"] = ledger


class Repository:
    """A folder with `metadata/`, `targets/` and `objects/`, and the keys to change it."""

    def __init__(self, folder: Path, keys: KeyRing) -> None:
        """Open a repository.

        Raises:
            OperatorError: there is no repository in the folder.
        """
        self.folder, self.keys = folder, keys
        self.metadata, self.target_files, self.objects = folder / "metadata", folder / "targets", folder / "objects"
        if not (self.metadata / "timestamp.json").is_file():
            raise OperatorError(f"there is no repository in {folder}; `ferry init` makes one")
        self._lock = FileLock(folder / LOCK)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from signing here; calls may be nested.

        Hold it for moments only, because an emergency stop waits for it.

        Raises:
            OperatorError: another process does not finish its change within `SIGNING_SECONDS`, or the lock cannot be taken.
        """
        try:
            self._lock.acquire(timeout=SIGNING_SECONDS)
        except Timeout:
            raise OperatorError(
                f"another process has been signing in {self.folder} for {SIGNING_SECONDS:.0f} s; end the one that holds "
                f"{self._lock.lock_file} (`fuser` names it) and try again"
            ) from None
        except OSError as error:
            raise OperatorError(
                f"cannot lock {self._lock.lock_file}: {error.strerror}; nothing was signed; check who owns the folder, and the disk"
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    @classmethod
    def create(cls, folder: Path, keys: KeyRing) -> Repository:
        """Create an empty, signed repository, which needs the offline keys; open one that is there."""
        if (folder / "metadata" / "timestamp.json").is_file():
            return cls(folder, keys)
        for name in ("metadata", "targets", "objects"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
        root = dated(Root(consistent_snapshot=True), "root")
        for role in ("root", "targets", "snapshot", "timestamp"):
            for key, _ in keys.keys[role]:
                root.add_key(key, role)
            root.roles[role].threshold = keys.threshold(role)
        top = Targets(expires=expiry("targets"))
        top.delegations = Delegations(
            {}, {role: DelegatedRole(role, [], keys.threshold(role), True, names.paths(role)) for role in DELEGATED}
        )
        for role in DELEGATED:
            for key, _ in keys.keys[role]:
                top.add_key(key, role)
        made: dict[str, Any] = {"root": root, "targets": top} | {r: Targets(expires=expiry(r)) for r in DELEGATED}
        metadata = folder / "metadata"
        for role, signed in made.items():
            write(metadata / f"1.{role}.json", sign_role(Metadata(signed), keys, role, top if role in DELEGATED else root))
        snapshot = Snapshot(expires=expiry("snapshot"), meta={f"{r}.json": MetaFile(1) for r in ("targets", *DELEGATED)})
        write(metadata / "1.snapshot.json", sign_role(Metadata(snapshot), keys, "snapshot", root))
        timestamp = dated(Timestamp(snapshot_meta=MetaFile(1)), "timestamp")
        write(metadata / "timestamp.json", sign_role(Metadata(timestamp), keys, "timestamp", root))
        return cls(folder, keys)

    # Queries

    def in_force(self, role: str) -> Metadata[Any]:
        """Return the metadata of a role that are in force."""
        if role == "timestamp":
            return load(self.metadata / "timestamp.json")
        if role == "root":
            return self._root()
        version = self._snapshot_version() if role == "snapshot" else self._versions()[role]
        return load(self.metadata / f"{version}.{role}.json")

    def delegated(self, kind: str = "") -> list[str]:
        """Return the roles below targets, those of a class before those that all classes share; or only those of a kind."""
        delegations = self._targets("targets").delegations
        found = list(delegations.roles) if delegations and delegations.roles else []
        return [role for role in found if kind in ("", names.kind(role))]

    def role_of(self, kind: str, line: str, device_class: str) -> str:
        """Return the role that names the targets of a line and class: its own, or the one that all classes share."""
        own = names.of_class(kind, line, device_class)
        return own if own in self._versions() else kind

    def root_bytes(self) -> bytes:
        """Return the first root, which a device is given once, by hand, with its hash."""
        return (self.metadata / "1.root.json").read_bytes()

    def releases(self, line: str, device_class: str) -> list[Release]:
        """Return the published bundles of a line and class, lowest release number first."""
        found = []
        for path, target in self._targets(self.role_of("models", line, device_class)).targets.items():
            if path.startswith(f"models/{line}/{device_class}/"):
                try:
                    named = {"line": line, "device_class": device_class, "manifest": target.hashes["sha256"]}
                    found.append(Release.model_validate({**(target.custom or {}), **named}))
                except (ValidationError, KeyError, TypeError) as error:
                    raise OperatorError(
                        f"the models role lists {printable(path, 200)}, which ferry did not write; restore the repository, "
                        "and run `ferry trust rotate models`"
                    ) from error
        return sorted(found, key=lambda release: release.seq)

    def deltas(self, line: str, device_class: str) -> list[DeltaTarget]:
        """Return the published deltas of a line and class, except those that make only the overlays of a bundle."""
        prefix = f"deltas/{line}/{device_class}/"
        whole = {release.manifest[: chain.DIGITS]: release.manifest for release in self.releases(line, device_class)}
        found = []
        for path, target in self._targets(self.role_of("deltas", line, device_class)).targets.items():
            link = chain.Link.of(path.removeprefix(prefix), target.length) if path.startswith(prefix) else None
            if link and link.base != link.target and link.target in whole:
                found.append(DeltaTarget(whole.get(link.base, link.base), whole[link.target], link.size, link.name))
        return found

    def links(self, line: str, device_class: str) -> list[chain.Link]:
        """Return the published deltas of a line and class as a device reads them, by their names."""
        found = (chain.Link.of(delta.name, delta.size) for delta in self.deltas(line, device_class))
        return [link for link in found if link]

    def behind(self, release: Release) -> dict[int, int]:
        """Return what a device fetches in the place of the full bundle, by the number of releases that it is behind; in bytes."""
        order = [known.manifest for known in self.releases(release.line, release.device_class)]
        links = self.links(release.line, release.device_class)
        return chains.behind(order, release.manifest, links, release.full_bytes)

    def policy(self, line: str, device_class: str) -> Policy | None:
        """Return policy 1, by which devices are let in that are not watched; None: there is none."""
        data = self._policy_bytes(line, device_class, 1)
        return None if data is None else parse(Policy, data, MAX_POLICY)

    def policy2(self, line: str, device_class: str) -> Policy2 | None:
        """Return policy 2, which watched devices obey; None: no rollout was started since ferry knows it."""
        data = self._policy_bytes(line, device_class, 2)
        return None if data is None else parse(Policy2, data, MAX_POLICY_2)

    def rolled_out(self, line: str, device_class: str) -> Policy | Policy2 | None:
        """Return the policy that names what is rolled out: policy 2 where there is one; None: nothing is rolled out."""
        return self.policy2(line, device_class) or self.policy(line, device_class)

    def _policy_bytes(self, line: str, device_class: str, form: int) -> bytes | None:
        path = policy_path(line, device_class, form)
        target = self._targets(self.role_of("rollout", line, device_class)).targets.get(path)
        return None if target is None else self._target_file(path, target).read_bytes()

    def _in_use(self, line: str, device_class: str) -> set[str]:
        """Return the bundles that the policies tell devices to install; they must stay installable, and cheap."""
        found: set[str] = set()
        for policy in (self.policy(line, device_class), self.policy2(line, device_class)):
            found |= {policy.manifest} if policy else set()
            if isinstance(policy, Policy2) and policy.fallback:
                found.add(policy.fallback.manifest)
        return found

    def manifest(self, release: Release) -> Manifest:
        """Return the manifest of a published bundle."""
        path = manifest_path(release.line, release.device_class, release.manifest)
        targets = self._targets(self.role_of("models", release.line, release.device_class)).targets
        return parse(Manifest, self._target_file(path, targets[path]).read_bytes(), MAX_MANIFEST)

    def metadata_bytes(self, line: str, device_class: str) -> int:
        """Return how many bytes of metadata a device of a line and class fetches for an update; root and targets seldom change."""
        versions = self._versions() | {"snapshot": self._snapshot_version()}
        roles = [self.role_of(kind, line, device_class) for kind in DELEGATED]
        files = [self.metadata / f"{versions[role]}.{role}.json" for role in ("snapshot", *roles)]
        if roles[0] != "models":
            less = [path.with_name(path.name + packed.SUFFIX) for path in files]
            files = [small if small.is_file() else path for path, small in zip(files, less, strict=True)]
        return sum(path.stat().st_size for path in (self.metadata / "timestamp.json", *files))

    def expiries(self) -> dict[str, datetime]:
        """Return when the metadata of each role, and of the roles of classes that have its keys, expire first."""
        return {state.role: state.expires for state in self.states()}

    def roles(self) -> dict[str, Role]:
        """Return the trusted keys and the threshold of each role, from the metadata in force; those of classes have the same."""
        top = self._targets("targets")
        return {role: self._root().signed.roles[role] for role in TOP} | {r: top.get_delegated_role(r) for r in DELEGATED}

    def states(self) -> list[RoleState]:
        """Return the state of every role, and of the roles of classes that have its keys: version, keys and expiry."""
        found = []
        for role, trusted in self.roles().items():
            alike = {name: self.in_force(name).signed for name in (self.delegated(role) if role in DELEGATED else [role])}
            full = [name for name, signed in alike.items() if role not in DELEGATED or signed.targets]
            first = min(full or [role], key=lambda name: alike[name].expires)
            usable = {signer.public_key.keyid for signer in self.keys.usable(role, trusted.keyids)}
            found.append(
                RoleState(
                    role=role, version=max(signed.version for signed in alike.values()), threshold=trusted.threshold,
                    expires=alike[first].expires, empty=not full, first=names.owner(first),
                    classes=tuple(sorted(filter(None, map(names.owner, alike)))),
                    keys=tuple(KeyState(keyid, self.keys.uri(role, keyid), keyid in usable) for keyid in trusted.keyids),
                )
            )  # fmt: skip
        return found

    def entries(self, role: str) -> list[Entry]:
        """Return the trusted keys of a role with the URIs of their private halves; "": the ring does not know the key."""
        delegator: Root | Targets = self._root().signed if role in TOP else self._targets("targets")
        return [(delegator.get_key(i), self.keys.uri(role, i)) for i in delegator.get_delegated_role(role).keyids]

    def keys_ever_trusted(self, role: str) -> set[str]:
        """Return the ids of all keys that a role has or had.

        A key that was removed must not come back, because everything that it signed would be valid again.
        """
        name, found = ("root" if role in TOP else "targets"), set[str]()
        for path in self._files_of(name):
            found.update(load(path).signed.get_delegated_role(role).keyids)
        return found

    def newest_root(self) -> Path:
        """Return the file of the root in force, for devices that are set up from now on; older ones reach it from their root."""
        return self.metadata / f"{self._root_version()}.root.json"

    def floor(self, line: str, device_class: str) -> int:
        """Return the lowest release number of a line and class that a rollout may choose; 0: any."""
        return max((release.floor for release in self.releases(line, device_class)), default=0)

    # Changes

    @alone
    def publish_release(
        self, manifest: Manifest, files: Path, ledger: str, deltas: list[tuple[str, Path]], revertible: bool = True,
        again: bool = False,
    ) -> Release:  # fmt: skip
        """Add a bundle and its deltas, and sign.

        Args:
            manifest: manifest of the bundle.
            files: folder that holds its files, each named by its hash.
            ledger: hash of the ledger's last entry; it is signed with the release, so that a truncated ledger is noticed.
            deltas: sha256 of the base's manifest, and file of the delta.
            revertible: whether a rollout may return to this release later.
            again: whether `ledger` is signed anew with a bundle that was published before.

        Returns:
            The new release; or the earlier one if the same bundle was published before, and then only deltas are added, and
            `ledger` with `again`.

        Raises:
            OperatorError: a file of the bundle is missing or has another hash, or no release number is left.
        """
        line, device_class = manifest.line, manifest.device_class
        models_role, deltas_role = (self.role_of(kind, line, device_class) for kind in ("models", "deltas"))
        known = self.releases(line, device_class)
        read = [(base, file.read_bytes()) for base, file in deltas]
        delta_targets = [
            self._add_target(delta_path(line, device_class, base, manifest.digest, chain.form_of(data)), data, {})
            for base, data in read
        ]
        order = list(dict.fromkeys([*(r.manifest for r in known), manifest.digest]))
        in_use = self._in_use(line, device_class)
        newest = {manifest.digest, *order[-KEPT_DELTAS_TO:], *in_use}

        def change_deltas(all_deltas: Targets) -> None:
            for delta in delta_targets:
                all_deltas.targets[delta.path] = delta
            prefix = f"deltas/{line}/{device_class}/"
            names = {path.removeprefix(prefix) for path in all_deltas.targets if path.startswith(prefix)}
            for name in names - chain.kept(names, order[-KEPT_RELEASES - 1 :], newest):
                del all_deltas.targets[f"{prefix}{name}"]

        for release in known:
            if release.manifest == manifest.digest:  # the bundle was published before; the deltas to it may be new
                present = self._targets(deltas_role).targets
                changes: dict[str, Callable[[Targets], None]] = {}
                if any(present.get(delta.path) != delta for delta in delta_targets):
                    changes[deltas_role] = change_deltas
                if again:
                    changes[models_role] = partial(
                        _sign_head, path=manifest_path(line, device_class, manifest.digest), ledger=ledger
                    )
                if changes:
                    self.commit(changes)
                return release.model_copy(update={"ledger": ledger}) if again else release
        for entry in manifest.objects.values():
            self._add_object(files / entry.sha256, entry.sha256)
        seq = 1 + max((release.seq for release in known), default=0)
        if seq > MAX_COUNT or self.floor(line, device_class) > seq:
            raise OperatorError(
                f"{line}/{device_class} has the highest possible release number or floor, which ferry never assigns; restore "
                "the repository, and run "
                "`ferry trust rotate models`"
            )
        made = Release(
            line=line, device_class=device_class, seq=seq, manifest=manifest.digest, ledger=ledger,
            version=manifest.origin.version, full_bytes=manifest.size, revertible=revertible,
            floor=self.floor(line, device_class),
        )  # fmt: skip
        # The target's path and hash hold the other fields.
        custom = made.model_dump(exclude={"line", "device_class", "manifest"}, exclude_defaults=True)
        path = manifest_path(line, device_class, manifest.digest)
        target = self._add_target(path, manifest.canonical(), custom)
        kept = {r.manifest for r in [*known, made][-KEPT_RELEASES:]} | in_use

        def change_models(models: Targets) -> None:
            models.targets[path] = target
            for name in list(models.targets):
                if name.startswith(f"models/{line}/{device_class}/") and models.targets[name].hashes["sha256"] not in kept:
                    del models.targets[name]

        self.commit({models_role: change_models, deltas_role: change_deltas})
        return made

    @alone
    def set_policy(self, *policies: Policy | Policy2) -> None:
        """Sign policies of a line and class, all in one commit; each replaces that of its form.

        Raises:
            OperatorError: a release is not published, has another number, lies below the floor, or may not be returned to.
        """
        targets = []
        for policy in policies:
            self._check_installable(policy.line, policy.device_class, policy.seq, policy.manifest, policy.revert)
            if isinstance(policy, Policy2) and policy.fallback:
                fallback = policy.fallback
                self._check_installable(policy.line, policy.device_class, fallback.seq, fallback.manifest, False)
            path = policy_path(policy.line, policy.device_class, policy.schema_version)
            targets.append(self._add_target(path, policy.canonical(), {}))

        def change(rollout: Targets) -> None:
            rollout.targets |= {target.path: target for target in targets}

        self.commit({self.role_of("rollout", policies[0].line, policies[0].device_class): change})

    def _check_installable(self, line: str, device_class: str, seq: int, manifest: str, revert: bool) -> None:
        release = {r.manifest: r for r in self.releases(line, device_class)}.get(manifest)
        if release is None or release.seq != seq:
            raise OperatorError(
                f"release {seq} ({manifest[:12]}) of {line}/{device_class} is not published; publish it with `ferry release` first"
            )
        if revert and not release.revertible:
            raise OperatorError(f"release {seq} of {line} is not marked as revertible, so no rollout can go back to it")
        if release.seq < release.floor:
            raise OperatorError(f"release {seq} of {line} is below the floor, {release.floor}; choose a newer one")

    @alone
    def set_floor(self, line: str, device_class: str, seq: int) -> None:
        """Set the lowest release number of a line and class that devices may install, whatever a policy says.

        Raises:
            OperatorError: there is no such release, or an older one is being rolled out.
        """
        releases = self.releases(line, device_class)
        if seq not in {release.seq for release in releases}:
            known = ", ".join(str(release.seq) for release in releases) or "none"
            raise OperatorError(f"{line}/{device_class} has no release {seq} to be the floor; it has {known}")
        watched, policy = self.policy2(line, device_class), self.policy(line, device_class)
        for named in (watched, policy):
            if named and named.seq < seq:
                who = "" if named is watched or watched is None else " to devices that are not watched"
                raise OperatorError(
                    f"release {named.seq} of {line}/{device_class} is being rolled out{who}; start a rollout of {seq} or a newer one first"
                )

        def change(models: Targets) -> None:
            for release in releases:
                custom = models.targets[manifest_path(line, device_class, release.manifest)].unrecognized_fields["custom"]
                custom["floor"] = seq

        changes: dict[str, Callable[[Targets], None]] = {self.role_of("models", line, device_class): change}
        if watched and watched.fallback and watched.fallback.seq < seq:  # no device may install it any more
            without = watched.model_copy(update={"fallback": None, "policy": watched.policy + 1})
            target = self._add_target(policy_path(line, device_class, 2), without.canonical(), {})
            changes[self.role_of("rollout", line, device_class)] = lambda rollout: rollout.targets.update({target.path: target})
        self.commit(changes)

    @alone
    def refresh(self) -> None:
        """Sign snapshot and timestamp again, and nothing else: a rollout that nobody renews is meant to expire."""
        self.commit({})

    @alone
    def renew(self, roles: Collection[str] = RENEWED) -> dict[str, datetime]:
        """Sign roles again with a new expiry and no other change, and snapshot and timestamp with them.

        Args:
            roles: any of root, targets (both need the offline keys), models, deltas; the last two with the roles of all classes. A
                rollout renews its policy itself.

        Returns:
            When the metadata of each role expire now.

        Raises:
            OperatorError: there is no such role to renew, or too few of its keys can be used here; nothing was signed.
        """
        trusted = self.roles()
        for role in roles:
            if role not in RENEWED:
                raise OperatorError(f"{role} cannot be renewed on its own; choose among {', '.join(RENEWED)}")
            self.keys.signers(role, trusted[role].keyids, trusted[role].threshold)
        if "root" in roles:
            root = self._root()
            root.signed.version += 1
            dated(root.signed, "root")
            write(self.metadata / f"{root.signed.version}.root.json", sign_role(root, self.keys, "root", root.signed))
        again = [name for role in roles if role != "root" for name in (self.delegated(role) or [role])]
        self.commit(dict.fromkeys(again, unchanged))
        return self.expiries()

    def commit(
        self,
        changes: Mapping[str, Callable[[Targets], None]],
        coming: Root | None = None,
        ready: Mapping[str, Metadata[Any]] | None = None,
    ) -> None:
        """Sign a new state, the timestamp last.

        Args:
            changes: change of each role's targets before it is signed; a role that is not in force yet has none before.
            coming: root that is about to be put in force. Its keys sign, and those of the present root as far as they can be
                used here. None: the present root.
            ready: metadata that are signed already, by role.
        """
        present, versions, ready = self._root().signed, self._versions(), ready or {}
        root, other = (coming or present), (present if coming else None)
        top = self.in_force("targets").signed
        packs = any(names.owner(role) for role in (*versions, *changes, *ready))
        for role in sorted({*changes, *ready}, key=lambda role: (role != "targets", role)):
            if role in ready:
                metadata = ready[role]
            else:
                before = self.in_force(role) if role in versions else Metadata(Targets())
                least = versions[role if role in versions else names.kind(role)]
                metadata = next_version(before, role, unused(self.metadata, role, least + 1))
                changes[role](cast("Targets", metadata.signed))
                sign_role(metadata, self.keys, role, *((root, other) if role == "targets" else (top, None)))
            top = metadata.signed if role == "targets" else top
            versions[role] = metadata.signed.version
            self._write(self.metadata / f"{versions[role]}.{role}.json", metadata.to_bytes(), packs)
        snapshot = self.in_force("snapshot")
        snapshot = next_version(snapshot, "snapshot", unused(self.metadata, "snapshot", snapshot.signed.version + 1))
        cast("Snapshot", snapshot.signed).meta = {f"{role}.json": MetaFile(version) for role, version in versions.items()}
        sign_role(snapshot, self.keys, "snapshot", root, other)
        self._write(self.metadata / f"{snapshot.signed.version}.snapshot.json", snapshot.to_bytes(), packs)
        timestamp = self.in_force("timestamp")
        timestamp = next_version(timestamp, "timestamp", timestamp.signed.version + 1)
        cast("Timestamp", timestamp.signed).snapshot_meta = MetaFile(snapshot.signed.version)
        write(self.metadata / "timestamp.json", sign_role(timestamp, self.keys, "timestamp", root, other))

    # Private helpers

    def _root(self) -> Metadata[Root]:
        return load(self.newest_root())

    def _files_of(self, role: str) -> list[Path]:
        """Return all versions of a role's file; those of a class that is named like the role are not among them."""
        return [path for path in self.metadata.glob(f"*.{role}.json") if path.name.count(".") == 2]

    def _snapshot_version(self) -> int:
        return int(load(self.metadata / "timestamp.json").signed.snapshot_meta.version)

    def _root_version(self) -> int:
        return max(int(path.name.split(".")[0]) for path in self._files_of("root"))

    def _versions(self) -> dict[str, int]:
        meta = load(self.metadata / f"{self._snapshot_version()}.snapshot.json").signed.meta
        return {name.removesuffix(".json"): file.version for name, file in meta.items()}

    def _targets(self, role: str) -> Targets:
        return cast("Targets", self.in_force(role).signed)

    def _target_file(self, path: str, target: TargetFile) -> Path:
        folder, _, name = path.rpartition("/")
        return self.target_files / folder / f"{target.hashes['sha256']}.{name}"

    def _add_target(self, path: str, data: bytes, custom: dict[str, Any]) -> TargetFile:
        target = TargetFile.from_data(path, data, ["sha256"])
        if custom:
            target.unrecognized_fields["custom"] = custom
        small = not path.startswith("deltas/")
        self._write(self._target_file(path, target), data, small and any(map(names.owner, self._versions())))
        return target

    @staticmethod
    def _write(path: Path, data: bytes, packs: bool) -> None:
        """Write a file, and then a packed one, which devices of classes with roles of their own fetch in its place.

        In this order, because the file is what says that its name is used: a packed one that a killed run left alone would stand
        beside the next file of the name.
        """
        write(path, data)
        if packs and len(less := packed.pack(data)) < len(data):
            write(path.with_name(path.name + packed.SUFFIX), less)

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
        """Yield every file to publish, in the order in which it must appear: objects, targets, metadata, the timestamp last."""
        for folder in (self.objects, self.target_files, self.metadata):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.name.startswith(".") and path.name != "timestamp.json":
                    yield path.relative_to(self.folder).as_posix(), path
        yield "metadata/timestamp.json", self.metadata / "timestamp.json"

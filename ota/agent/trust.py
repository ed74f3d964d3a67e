"""Signed metadata: python-tuf's client verifies them, and a durable record keeps what the client forgets.

The client makes no promise about power cuts: it never syncs, and if its cache is torn it starts from the root again and
would accept an old repository. So `highwater.json` keeps the newest version of every role that was ever accepted, and an
older version is refused even if the cache is gone. For the same reason, the client gets the trust anchor on every call.

A thief of online keys may raise the versions of their roles beyond all that the factory will ever reach. So each high-water
mark is kept with the ids of its signing keys. Once the offline keys have replaced these, the mark no longer binds
(`rules.binding`), just as the client ignores a cached file that no longer verifies. The hash of the root is kept too, so that a
thief of its old keys cannot lead a device that lost its cache along another chain of roots.

A line and class can have roles of its own, such as `models.LINE.CLASS`, under the keys of the role that all classes share. `targets`,
which the offline keys sign, says so. The mark of such a role begins as that of the shared role: the factory numbers all files of one kind
of role together, so nothing older can be new.

The clock is held against the times that the root and the timestamp were signed at, and the latest of the timestamp's is kept as a
mark. A time beyond the clock is never kept, so neither a thief nor a factory whose clock is wrong blocks a device for longer than a day.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, ExpiredMetadataError
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from ota import packed
from ota.agent import clock, page, rules, transport
from ota.agent.network import LaterError, NotFoundError, RefusedError
from ota.agent.state import HighWater, Home
from ota.agent.transport import Transport, at_most, read_small
from ota.errors import ExpiredError, InvalidError, OtaError, RepositoryError, StateError, TransferError, TrustError
from ota.manifest import MAX_COUNT, MAX_WEIGHTS, Document, KiB, Sha256
from ota.wording import first_fault

# Limits on what an attacker could make long, far above what our repository needs. No role below targets may delegate: its key
# is online, and a thief could delegate to a role named `root`, whose file python-tuf would keep in place of the root's own.
LIMITS = UpdaterConfig(
    max_root_rotations=256, max_delegations=1, root_max_length=64 * KiB, timestamp_max_length=16 * KiB,
    snapshot_max_length=64 * KiB, targets_max_length=1024 * KiB, app_user_agent="deltaferry-agent",
)  # fmt: skip
TOP_ROLES = ("root", "timestamp", "snapshot", "targets")  # without the newest root, keys that it removed would be trusted again
PARENTS = {"timestamp": "root", "snapshot": "root", "targets": "root"}  # role that names a role's keys; for all others: targets
LONGEST = LIMITS.targets_max_length  # bytes of any metadata file, whatever length another one gives for it
LOOK_SECONDS = 600.0  # for all metadata of one check together; 300 kB at `transport.MINIMUM_RATE`
ALWAYS_PLAIN = (".root.json", "/timestamp.json")  # looked for at each check, and too small to gain by it
PACKED_SECONDS = 60.0  # that packed files of an update may take before all others are fetched as they are
KEYID = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


class Custom(BaseModel):
    """The fields signed beside a target's hash that devices read; fields that newer factories add are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)

    seq: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="release number")
    floor: int = Field(default=0, ge=0, le=MAX_COUNT, description="lowest release number that may be installed")
    revertible: bool = False


class Target(Document):
    """A file that the metadata name, with its signed fields."""

    name: str
    size: int = Field(ge=0, le=MAX_WEIGHTS, description="bytes")
    sha256: Sha256
    custom: Custom

    @property
    def published_as(self) -> str:
        """Name in the repository: consistent snapshots put the hash before the last part."""
        folder, _, last = self.name.rpartition("/")
        return f"targets/{folder}/{self.sha256}.{last}"


class Trust:
    """One check of the repository: everything that it returns is signed, fresh, and not older than what was seen before."""

    def __init__(
        self, home: Home, source: Transport, read: dict[str, bytes] | None = None, fetcher: _Fetcher | None = None
    ) -> None:
        """Fetch and check the metadata.

        Args:
            home: the agent's directory.
            source: where they are fetched from.
            read: small targets that the same update has read before, by hash; what this check reads is added.
            fetcher: that of an earlier check of the same update; it remembers whether packed files were given up.

        Raises:
            TrustError: a signature, version or expiry date is not valid, or the clock is behind.
            TransferError: the repository cannot be reached.
        """
        self._home, self._source, self._read = home, source, {} if read is None else read
        self._fetcher = fetcher or _Fetcher(source, self._is_packed)
        self._fetcher.begin()
        now = int(time.time())
        clock.check_built(now)
        home.disk.make_folder("metadata")
        try:
            self._updater = self._refreshed()
        except OtaError as error:
            with suppress(OtaError):
                self._remember(("root",))
            try:
                rules.check_clock(now, home.high_water().signed)
            except TrustError as behind:  # it explains more: certificates of TLS look as if they were from the future
                raise behind from error
            raise
        self._remember(("root",))  # the newest root counts, whatever turns out about the metadata that its keys signed
        self._remember(TOP_ROLES, now)

    def _refreshed(self) -> Updater:
        """Return a client that has fetched and verified the roles at the top.

        What it refuses may be the fault of a packed file alone: no signature covers that one, so a cache on the way may hold another. Then a
        new client begins again from the files that were accepted before, and with their versions, but fetches only what is signed.
        """
        folder = str(self._home.disk.path("metadata"))
        while True:
            with _foreign_errors():
                found = Updater(folder, "metadata/", fetcher=self._fetcher, config=LIMITS, bootstrap=self._home.root_bytes())
            try:
                with _foreign_errors():
                    found.refresh()
            except TrustError as error:
                if not self._fetcher.distrusts_packed(error):
                    raise
            else:
                return found

    def _asked(self, name: str) -> TargetFile | None:
        """Ask the client for a target; it loads the role that may name it, and once more where a packed file is not that role's."""
        self._fetcher.begin()
        try:
            with _foreign_errors():
                return self._updater.get_targetinfo(name)
        except ExpiredError:  # the client has checked version and signatures before, so the file itself says the same
            raise
        except TrustError as error:
            if not self._fetcher.distrusts_packed(error):
                raise
        with _foreign_errors():
            return self._updater.get_targetinfo(name)

    def again(self) -> Trust:
        """Check the repository again; of the small targets, only those that changed are fetched again."""
        return Trust(self._home, self._source, self._read, self._fetcher)

    def target(self, name: str) -> Target | None:
        """Return what is signed about a target; None if nothing is.

        Raises:
            ExpiredError: the role that could name the target has expired.
            InvalidError: the signed fields are not valid, such as a hash that is none.
            TrustError: the metadata do not verify, or the target is a release below the floor. The running release may be
                below it, so that it can be repaired.
            TransferError: the repository cannot be reached.
        """
        role = self._role(name)
        found = self._asked(name)
        self._remember((*TOP_ROLES, role), int(time.time()))
        if found is None:
            return None
        target = _target(name, found)
        if rules.kind(role) == "models" and not name.endswith(f"/{self._home.load().active}.json"):
            rules.check_floor(target.custom.seq, target.custom.floor)
        return target

    def listed(self, folder: str) -> list[Target]:
        """Return what is signed about all targets of a folder, such as deltas/LINE/CLASS; what is not valid is left out.

        Raises:
            ExpiredError: the role that names them has expired.
            TrustError: the metadata do not verify.
            TransferError: the repository cannot be reached.
        """
        asked = f"{folder}/-"
        role = self._role(asked)
        self._asked(asked)  # whether there is such a target or not: this loads the role
        self._remember((*TOP_ROLES, role), int(time.time()))
        loaded = {name: cached for name in (*TOP_ROLES, role) if (cached := self._cached(f"{name}.json"))}
        if role not in _trusted(loaded):  # nobody delegates to it, so what is in the cache counts for nothing
            return []
        named: dict[str, TargetFile] = loaded[role].signed.targets
        valid = []
        for name, found in named.items():
            if name.startswith(f"{folder}/"):
                try:
                    valid.append(_target(name, found))
                except InvalidError as error:
                    log.warning("%s", error)
        return valid

    def obeyed(self, policy: str) -> tuple[int, int]:
        """Return the highest number of a policy 2, and of its `retry`, that this device obeyed, as far as they bind; 0: none does.

        Args:
            policy: name of the policy's target, which was asked for before: this reads the role from the cache.
        """
        marks, rollout = self._home.high_water(), self._keys_of(policy)
        bound = rules.binding(marks, dict.fromkeys((rules.POLICY, rules.RETRY), rollout))
        return bound.get(rules.POLICY, 0), bound.get(rules.RETRY, 0)

    def obey(self, policy: str, number: int, retry: int) -> None:
        """Store the numbers of a policy 2 that this device obeys, with the keys of the rollout role; durable on return.

        The marks are kept beside those of the roles, where older agents leave them as they are.

        Args:
            policy: name of the policy's target.
            number: of the policy.
            retry: highest `retry` that this device acted on.
        """
        marks, numbers = self._home.high_water(), {rules.POLICY: number, rules.RETRY: retry}
        keys = dict.fromkeys(numbers, sorted(self._keys_of(policy).keys))
        self._home.raise_high_water(marks.model_copy(update={"versions": marks.versions | numbers, "keys": marks.keys | keys}))

    def _keys_of(self, name: str) -> rules.Trusted:
        """Return the keys of the role that decides about a target, which was asked for before."""
        role = self._role(name)
        loaded = {found: cached for found in ("targets", role) if (cached := self._cached(f"{found}.json"))}
        try:
            return _trusted(loaded)[role]
        except KeyError as error:
            raise StateError(f"the metadata cache lost {role} while it was read; check the disk of {self._home.root}") from error

    def read(self, target: Target, limit: int) -> bytes:
        """Read a small target, and check it against its signed length and hash; a target that was read before is not fetched again.

        Raises:
            RepositoryError: the target is longer than `limit` or than its signed length, or has another hash.
            TransferError: the target cannot be fetched.
        """
        if target.size > limit:
            raise RepositoryError(f"{target.name} has a signed size of {target.size} bytes, more than {limit}; it is not fetched")
        data = self._read.get(target.sha256)
        if data is None:
            data = self._unpacked(target)
        if data is None:
            data = read_small(self._source, target.published_as, target.size)
        with _foreign_errors():
            TargetFile(target.size, {"sha256": target.sha256}, target.name).verify_length_and_hashes(data)
        self._read[target.sha256] = data
        return data

    def _unpacked(self, target: Target) -> bytes | None:
        """Fetch a small target packed; None: it cannot be had so, or is not the target."""
        with suppress(LaterError):  # the server says the same of the file itself, where the pause is kept
            data = self._fetcher.unpacked(target.published_as, target.size)
            if data is None or hashlib.sha256(data).hexdigest() == target.sha256:
                return data
            self._fetcher.give_up_packed(f"the packed {target.name} is another file")
        return None

    def _is_packed(self) -> bool:
        """Tell whether the factory publishes packed files: one that gave this class its own roles does.

        The cached targets are not verified yet, which costs no more than a fetch of a file that is not there.
        """
        config = self._home.config()
        with suppress(OtaError):  # python-tuf fetches a torn file again
            targets = self._cached("targets.json")
            delegations = targets.signed.delegations if targets and _is("targets", targets) else None
            return delegations is not None and f"models.{config.line}.{config.device_class}" in (delegations.roles or ())
        return False

    def _role(self, name: str) -> str:
        """Return the role that decides about a target: the first one that `targets` lets name it.

        Raises:
            TrustError: it is neither the role that all classes share nor the one of this line and class, so no mark would be kept for it.
        """
        config, shared = self._home.config(), name.partition("/")[0]
        targets = self._cached("targets.json")
        delegations = targets.signed.delegations if targets else None
        with _foreign_errors():
            role = next((found for found, _ in delegations.get_roles_for_target(name)), shared) if delegations else shared
        if role not in (shared, f"{shared}.{config.line}.{config.device_class}"):
            raise TrustError(
                f"the repository leaves {name[:80]} to a role {role[:80]!r}, which this agent does not know; nothing is installed"
            )
        return role

    def _remember(self, roles: tuple[str, ...], now: int | None = None) -> None:
        """Compare the versions of roles that were just loaded with the marks that bind, and raise the marks.

        Cached files of other roles may be of any age, or torn: the client reads them only when it needs them. All marks are
        written at once, so a mark is only ever lowered together with the root and keys that allow it.

        Args:
            roles: the roles that were just loaded.
            now: seconds since 1970 by the clock, which is checked; None if nothing fresh was found.

        Raises:
            TrustError: a version, the root or the clock is behind.
        """
        marks = rules.inherited(self._home.high_water(), roles)
        cached = {role: found for role in roles if (found := self._cached(f"{role}.json")) and _is(role, found)}
        trusted = _trusted(cached)
        seen = {role: found.signed.version for role, found in cached.items() if role == "root" or role in trusted}
        if lost := set(roles).intersection(TOP_ROLES) - seen.keys():
            raise StateError(f"the metadata cache lost {min(lost)} while it was read; check the disk of {self._home.root}")
        bound = rules.binding(marks, trusted)
        try:
            rules.check_versions(seen, bound)
            self._check_chain(marks)
        except TrustError:
            # Otherwise python-tuf would start from the attacker's roots next time, and ours would not follow on them.
            self._home.disk.remove("metadata/root_history")
            raise
        latest = marks.signed if "timestamp" in bound else 0
        if now is not None:
            times = {role: dated for role in clock.DAYS if (dated := _signed(role, cached[role])).counts(now)}
            rules.check_clock(now, max(latest, *(dated.at for dated in times.values()), 0))
            latest = max(latest, times["timestamp"].at if "timestamp" in times else 0)
        for role in (role for role in seen if rules.kind(role) == "models" and role in marks.versions and role not in bound):
            self._disown(cached[role].signed)  # before the marks: after a power cut, the next check repeats it
        raised = HighWater(
            versions=marks.versions | seen,
            keys=marks.keys | {role: sorted(trusted[role].keys) for role in seen if role in trusted},
            root=_sha256(cached["root"]) if "root" in cached else marks.root,
            signed=latest if now is not None else marks.signed,
        )
        self._home.raise_high_water(raised)

    def _disown(self, models: Targets) -> None:
        """Reset the release number and the refusals if the new keys of `models` do not name the running bundle.

        Called after the keys of `models` were replaced. The bundle may be a thief's: its number may be one that no release of
        the factory reaches, and good bundles may have been refused because its reference says that they differ. It goes on
        running, under number 0, until the next release.
        """
        config, state = self._home.config(), self._home.load()
        if state.active and f"models/{config.line}/{config.device_class}/{state.active}.json" not in models.targets:
            self._home.save(state.model_copy(update={"seq": 0, "refused": {}}))

    def _check_chain(self, marks: HighWater) -> None:
        """Refuse a chain of roots other than the one that this device followed before."""
        known = self._cached(f"root_history/{marks.versions.get('root')}.root.json")
        if marks.root and (known is None or _sha256(known) != marks.root):
            raise TrustError(
                f"version {marks.versions['root']} of the repository's root differs from the one that this device has seen; "
                "this is an attack with the keys of an older root, and nothing is installed"
            )

    def _cached(self, name: str) -> Metadata[Any] | None:
        path = self._home.disk.path(f"metadata/{name}")
        with _foreign_errors():
            return Metadata[Any].from_bytes(path.read_bytes()) if path.is_file() else None


def _target(name: str, found: TargetFile) -> Target:
    """Check what is signed about a target.

    Raises:
        InvalidError: a field is not valid, such as a hash that is none.
    """
    try:
        return Target(
            name=name, size=found.length, sha256=found.hashes.get("sha256", ""),
            custom=Custom.model_validate(found.custom if isinstance(found.custom, dict) else {}),
        )  # fmt: skip
    except ValidationError as error:
        kind = Target if error.title == Target.__name__ else Custom
        raise InvalidError(f"the signed data of {name} are not valid and are not used: {first_fault(error, kind)}") from error


def _trusted(cached: dict[str, Metadata[Any]]) -> dict[str, rules.Trusted]:
    """Return the keys of each role, except the root, whose metadata verify under them.

    Args:
        cached: metadata of the roles that were just loaded; those of other roles may be old.

    Raises:
        TrustError: a key's id is not a SHA-256.
    """
    found: dict[str, rules.Trusted] = {}
    for role, metadata in cached.items():
        delegator: Root | Targets | None = cached[parent].signed if (parent := PARENTS.get(role, "targets")) in cached else None
        if role == "root" or delegator is None:
            continue
        try:
            result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
        except ValueError:  # nobody delegates to this role
            continue
        if result.verified:
            keys = frozenset([*result.signed, *result.unsigned])
            if wrong := [keyid for keyid in keys if not KEYID.fullmatch(keyid)]:
                raise TrustError(f"{role} has a key with the id {wrong[0][:80]!r}, which is not a sha256; nothing is installed")
            found[role] = rules.Trusted(keys, result.threshold)
    return found


def _is(role: str, found: Metadata[Any]) -> bool:
    """Check whether a cached file is of the type that its name says."""
    return bool(found.signed.type == (role if role in TOP_ROLES else "targets"))


def _signed(role: str, metadata: Metadata[Any]) -> clock.Signed:
    return clock.signed(role, metadata.signed.expires, metadata.signed.unrecognized_fields.get(clock.SIGNED_AT))


def _sha256(metadata: Metadata[Any]) -> str:
    return hashlib.sha256(metadata.signed_bytes).hexdigest()


class _Fetcher(FetcherInterface):
    """Lets python-tuf's client fetch through our transport and within our limits: it believes any length in the metadata."""

    def __init__(self, source: Transport, is_packed: Callable[[], bool]) -> None:
        self._source, self._is_packed = source, is_packed
        self._plain, self._packed_seconds = False, 0.0
        self._until, self._gave_unpacked = 0.0, False

    def begin(self) -> None:
        """Start the clock: everything that is fetched from now on has to arrive within `LOOK_SECONDS`."""
        self._until, self._gave_unpacked = time.monotonic() + LOOK_SECONDS, False

    def distrusts_packed(self, error: TrustError) -> bool:
        """Fetch nothing packed from now on, because of an error; return False if nothing was since `begin`: a retry would change nothing."""
        if not self._gave_unpacked:
            return False
        self._gave_unpacked = False
        self.give_up_packed(error)
        return True

    def give_up_packed(self, why: object) -> None:
        """Fetch nothing packed from now on: where one packed file is wrong, others are, and each costs time."""
        if not self._plain:
            log.warning("%s; fetching the files that are not packed", why)
        self._plain = True

    def _fetch(self, url: str) -> Iterator[bytes]:
        pieces = self._source.read(url, deadline=self._deadline())
        try:
            first = next(pieces, b"")
        except (NotFoundError, RefusedError) as error:
            if not _is_missing(error):
                raise
            raise DownloadHTTPError(str(error), error.status if isinstance(error, RefusedError) else 404) from error
        if page.is_page(first):
            raise TransferError(f"the repository cannot be reached: {page.PAGE}; it will be tried again")
        return self._rest(first, pieces)

    def _deadline(self) -> transport.Deadline:
        return at_most(min(self._until - time.monotonic(), transport.DEADLINE_FLOOR))

    def unpacked(self, name: str, limit: int) -> bytes | None:
        """Fetch a file packed, with one attempt; None: it cannot be had so, or unpacks to more than `limit` bytes or to nothing.

        A packed file may be missing, because the factory did not pack when it published the file. Anything else that is wrong, and
        `PACKED_SECONDS` of all packed files together, end the use of packed files.

        Raises:
            LaterError: the server asks to wait, which holds for the other file, too.
        """
        if self._plain or not self._is_packed():
            return None
        began, data = time.monotonic(), bytearray()
        try:
            for piece in self._source.read(name + packed.SUFFIX, deadline=self._deadline()):
                data += piece
                if len(data) > limit:
                    break  # without its end, it does not unpack
        except LaterError:
            raise
        except TransferError as error:  # such as one that ends early; if the link is at fault, the file itself says so
            if not _is_missing(error):
                self.give_up_packed(error)
            return None
        finally:
            self._packed_seconds += time.monotonic() - began
            if self._packed_seconds > PACKED_SECONDS:
                self.give_up_packed(f"packed files took more than {PACKED_SECONDS:.0f} s")
        found = packed.unpack(bytes(data), limit)
        if found is None:
            self.give_up_packed(f"{name}{packed.SUFFIX} does not unpack to a file of at most {limit} bytes")
        return found

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Download into memory; python-tuf's own method needs a temporary folder with free space."""
        if not url.endswith(ALWAYS_PLAIN) and (found := self.unpacked(url, max_length)) is not None:
            self._gave_unpacked = True
            return found
        data = bytearray()
        for piece in self.fetch(url):
            data += piece
            if len(data) > max_length:
                raise DownloadLengthMismatchError(f"{url} is longer than the {max_length} bytes that are allowed")
        return bytes(data)

    @staticmethod
    def _rest(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        length = 0
        for piece in chain((first,), pieces):
            length += len(piece)
            if length > LONGEST:
                raise DownloadLengthMismatchError(f"metadata are longer than {LONGEST} bytes")
            yield piece


def _is_missing(error: TransferError) -> bool:
    """Tell whether a file is not there; S3 answers 403 for one, unless everybody may list the bucket."""
    return isinstance(error, NotFoundError) or (isinstance(error, RefusedError) and error.status == 403)


class _foreign_errors:  # noqa: N801 - used as a statement
    """Translate python-tuf's exceptions."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ExpiredMetadataError):
            raise ExpiredError(
                f"the repository's signatures have expired ({error}); the running model is kept, and the factory must sign again"
            ) from error
        cause = error.__cause__ if isinstance(error, DownloadError) else None
        if isinstance(cause, LaterError):
            raise LaterError(str(cause), cause.seconds) from error
        if isinstance(cause, RefusedError):
            raise RefusedError(str(cause), cause.status) from error
        if isinstance(error, DownloadHTTPError) and error.status_code == 404:
            raise TransferError(f"the repository lacks a file that it should have: {error}") from error
        if isinstance(error, DownloadError):
            raise TransferError(str(cause) if isinstance(cause, TransferError) else f"cannot fetch metadata: {error}") from error
        if isinstance(error, (TufRepositoryError, DeserializationError)):
            raise TrustError(f"the repository's metadata failed verification: {error}; nothing is installed") from error
        if isinstance(error, OSError):
            raise StateError(
                f"the metadata cache cannot be written: {error.strerror}; check the disk, or run `ferry-agent doctor`"
            ) from error
        if isinstance(error, Exception) and not isinstance(error, OtaError):
            # python-tuf did not expect such content, for example a name with a lone surrogate.
            raise TrustError(
                f"the repository's metadata are malformed: {type(error).__name__}: {error}; nothing is installed"
            ) from error

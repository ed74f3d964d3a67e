"""What an update installs and from what: it chooses the release and the way to it, makes sure of room, and downloads.

The release is the one that the signed policy asks for. It is fetched as a chain of deltas that begins at the running bundle,
or as the full bundle.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import ota
from ota import chain
from ota.agent import history, rules
from ota.agent import policy as policy2
from ota.agent.disk import FILES_NEEDED, read_uncached
from ota.agent.state import Home, LetIn, State
from ota.agent.transport import Deadline, Transport, download
from ota.agent.trust import Target, Trust
from ota.errors import ExpiredError, ManifestError, RepositoryError, RoomError, StateError
from ota.manifest import MAX_MANIFEST, FileEntry, Manifest, parse
from ota.policy import HEARTBEAT, MAX_POLICY, MAX_POLICY_2, Fallback, Policy, Policy2

GROWTH = 1.25  # times the larger of two bundles that one between them may have

log = logging.getLogger(__name__)

OnStep = Callable[[int, str], None]
"""Called with the number and name of each step of an update as it begins; `updater` lists them."""


@dataclass(frozen=True)
class Plan:
    """The release to be installed."""

    seq: int
    """Its number."""
    manifest: Manifest
    manifest_bytes: bytes
    floor: int
    """Lowest release number that may be installed, as signed beside this release."""
    acknowledge: bool
    """Whether the device switches only after the factory has kept its report that it starts."""


def decide(home: Home, trust: Trust, check_only: bool = False) -> tuple[Plan | None, rules.Wanted]:
    """Decide which release to install, if any; also return what the policy asks for, and why.

    Args:
        home: the agent's directory.
        trust: what is published and valid.
        check_only: write nothing of what a policy asks for: lifted refusals, its number, when this device was let in, heartbeats.
    """
    config = home.config()
    name = f"rollout/{config.line}/{config.device_class}"
    try:
        newer = trust.target(f"{name}.2.json")
        older = trust.target(f"{name}.json") if newer is None else None
        if newer is not None:
            return _by_limit(home, trust, newer, check_only)
        if trust.obeyed(f"{name}.2.json")[0]:
            return None, rules.Wanted(False, policy2.GONE)
    except ExpiredError:
        if home.load().active is None:
            raise
        # This is intended: a rollout that nobody renews stops spreading. The roles above it are fresh; `Trust` has checked them.
        reason = "the rollout policy has expired, so nothing newer can be installed until it is signed again; the running model is kept"
        return None, rules.Wanted(False, reason)
    if older is None:
        return None, rules.Wanted(False, f"nothing is rolled out to {config.line}/{config.device_class} yet")
    policy = parse(Policy, trust.read(older, MAX_POLICY), MAX_POLICY)
    wanted = _in_waves(home, trust, policy)
    return (_plan(home, trust, policy) if wanted.install else None), wanted


def _in_waves(home: Home, trust: Trust, policy: Policy, state: State | None = None) -> rules.Wanted:
    """Decide by the waves of policy 1; the state is that of the disk, unless another one is given."""
    signed = _signed(home, trust, policy)
    # The state is read afterwards: new keys of `models` may have reset the running bundle's number and the refusals.
    return rules.want(policy, home.config(), state or home.load(), signed.custom.revertible, int(time.time()))


def _by_limit(home: Home, trust: Trust, target: Target, check_only: bool) -> tuple[Plan | None, rules.Wanted]:
    """Decide by policy 2, and keep its numbers unless this is only a look: from now on this device obeys no lower one."""
    config, now = home.config(), int(time.time())
    policy = parse(Policy2, trust.read(target, MAX_POLICY_2), MAX_POLICY_2)
    highest, acted = trust.obeyed(target.name)
    policy2.check(policy, config, highest)
    signed = _signed(home, trust, policy)
    lifts = policy.retry > acted
    if not check_only:
        if lifts:
            _lift(home, policy.manifest)  # before the mark: after a power cut, the next call repeats it
        trust.obey(target.name, policy.policy, max(policy.retry, acted))
        _keep(home, "heartbeat", str(policy.heartbeat).encode())
    state = _lifted(home.load(), policy.manifest) if lifts else home.load()
    named: Policy | Policy2 = policy
    if why := policy2.unheard(config, policy.acknowledge):
        named, wanted = _unheard(home, trust, policy, why, state)
    else:
        wanted = policy2.admit(policy, config, state, signed.custom.revertible, now)
        if wanted.install:
            wanted = policy2.begins(policy, config, _since(home, policy, now, check_only), now)
    if wanted.install:
        return _plan(home, trust, named), wanted
    if policy.fallback and not wanted.let_in and state.active is None:
        return _fall_back(home, trust, policy.fallback, wanted)
    return None, wanted


def _unheard(home: Home, trust: Trust, policy: Policy2, why: str, state: State) -> tuple[Policy | Policy2, rules.Wanted]:
    """Decide for a device that cannot be heard: the waves of policy 1 let it in, unless policy 2 bars their release."""
    config, now = home.config(), int(time.time())
    told = f"{why}, so it installs only what is opened to devices that are not watched"
    older = trust.target(f"rollout/{config.line}/{config.device_class}.json")
    if older is None:
        return policy, rules.Wanted(False, f"release {policy.seq} is not open to this device: {told}")
    waves = parse(Policy, trust.read(older, MAX_POLICY), MAX_POLICY)
    if waves.manifest == policy.manifest != state.active:
        if barred := policy2.barred(policy, config):
            return waves, rules.Wanted(False, barred, settled=True)
        if ended := policy2.ended(policy, now):
            return waves, rules.Wanted(False, ended)
    if waves.seq < state.seq and waves.manifest != policy.manifest:
        return waves, rules.Wanted(False, f"release {state.seq} runs; release {policy.seq} is not open to this device: {told}")
    wanted = _in_waves(home, trust, waves, state)
    if waves.manifest != policy.manifest != state.active and not wanted.install:
        wanted = replace(wanted, reason=f"{wanted.reason}; release {policy.seq} is not open to this device: {told}")
    return waves, wanted


def _fall_back(home: Home, trust: Trust, named: Fallback, wanted: rules.Wanted) -> tuple[Plan | None, rules.Wanted]:
    """Decide about the last release that was open to all, on a device that has nothing to run and is not let in yet."""
    _signed(home, trust, named)
    config, state = home.config(), home.load()
    if why := rules.refused(named.seq, named.manifest, state) or rules.outside_window(named.seq, config, int(time.time())):
        return None, rules.Wanted(False, f"{wanted.reason}; {why}")
    told = f"release {named.seq} was open to all devices, and this one has nothing to run: {wanted.reason}"
    return _plan(home, trust, named), rules.Wanted(True, told)


def _signed(home: Home, trust: Trust, named: Policy | Policy2 | Fallback) -> Target:
    """Return what `models` signs about a named release: `rollout` alone cannot make anything run.

    Raises:
        ManifestError: `models` does not sign it, or under another number.
    """
    config = home.config()
    signed = trust.target(f"models/{config.line}/{config.device_class}/{named.manifest}.json")
    if signed is None or signed.custom.seq != named.seq:
        raise ManifestError(f"the policy names release {named.seq}, which the models role does not sign; nothing is installed")
    return signed


def _plan(home: Home, trust: Trust, named: Policy | Policy2 | Fallback) -> Plan:
    """Read the manifest of a release that is to be installed, and check that it fits.

    Raises:
        ManifestError: the manifest is another one, or for another device.
        AgentError: the bundle needs a newer agent.
    """
    signed = _signed(home, trust, named)
    data = _manifest_of(home, named.manifest, signed, trust)
    manifest = parse(Manifest, data, MAX_MANIFEST)
    if signed.sha256 != named.manifest or manifest.digest != named.manifest:
        raise ManifestError("the manifest is not the one that the policy names; nothing is installed")
    rules.check_fits(manifest, home.config(), ota.__version__)
    return Plan(named.seq, manifest, data, signed.custom.floor, isinstance(named, Policy2) and named.acknowledge)


def _lift(home: Home, digest: str) -> None:
    """Let a bundle be tried once more, as `ferry-agent forget` does: the policy asks for it."""
    state, rest = home.load(), home.rest()
    if digest in state.refused or digest in state.tries or (rest and rest.bundle == digest):
        home.disk.remove("resting.json")
        home.save(_lifted(state, digest))
        history.note(home, "forgotten", digest, "the policy asks for one more try")


def _lifted(state: State, digest: str) -> State:
    """Return a state without what it holds against a bundle."""
    refused, tries = ({d: was for d, was in old.items() if d != digest} for old in (state.refused, state.tries))
    return state.model_copy(update={"refused": refused, "tries": tries})


def _since(home: Home, policy: Policy2, now: int, check_only: bool = False) -> int:
    """Return when this device first found itself let in; a file that is lost, or a clock that was set back, begins anew."""
    if not policy.spread:
        return now
    with suppress(ManifestError):
        found = parse(LetIn, home.disk.read("let-in.json") or b"", MAX_MANIFEST)
        if found.bundle == policy.manifest and found.at <= now:
            return found.at
    if not check_only:
        _keep(home, "let-in.json", LetIn(bundle=policy.manifest, at=now).canonical())
    return now


def heartbeat(home: Home) -> int:
    """Return the seconds between two heartbeats that the newest policy asks for."""
    with suppress(ValueError):
        return min(86_400, max(3600, int(home.disk.read("heartbeat") or b"")))
    return HEARTBEAT


def _keep(home: Home, name: str, data: bytes) -> None:
    """Keep a small file that may be lost, if it changed."""
    if home.disk.read(name) != data:
        home.disk.replace(name, data, durable=False)


def _manifest_of(home: Home, digest: str, signed: Target, trust: Trust) -> bytes:
    """Read a manifest in the slot that holds it, or fetch it."""
    kept = home.disk.read(f"slots/{digest}/manifest.json")
    if kept is not None and (len(kept), hashlib.sha256(kept).hexdigest()) == (signed.size, signed.sha256):
        return kept
    return trust.read(signed, MAX_MANIFEST)


def offered(trust: Trust, active: str | None, plan: Plan) -> list[Target]:
    """Return the signed deltas of the line and class, which may lead to the bundle; empty if none can.

    The role `deltas` only offers a shorter way: if what it signs is not valid, the full bundle is fetched. Downloads are named by their
    hashes, so a delta with the hash of a file of the bundle, or of another delta, would remove what is here of that one. It is left out.
    """
    m = plan.manifest
    if active is None and not _overlays(plan):
        return []
    try:
        listed = trust.listed(f"deltas/{m.line}/{m.device_class}")
    except ExpiredError as error:
        if active is not None:
            raise
        log.warning("%s; fetching the overlays as they are", error)  # a device without a base needs no delta
        return []
    named = Counter([*m.objects, *(target.sha256 for target in listed)])
    return [target for target in listed if named[target.sha256] == 1]


def find_chain(home: Home, offers: Iterable[Target], active: str, plan: Plan, full: int, most: int = chain.MOST) -> list[Target]:
    """Choose the deltas that lead from the running bundle to the wanted one for the fewest bytes; empty: the full bundle is better.

    What counts is what is still to be fetched, on both sides. So an update over a link that breaks goes on with the way that it began.

    Args:
        home: the agent's directory, where parts of deltas may be from an earlier call.
        offers: signed deltas to choose from.
        active: hash of the manifest of the running bundle.
        plan: what is to be installed.
        full: bytes that are still to be fetched for the full bundle.
        most: deltas that may be chained.
    """
    links = {replace(link, size=missing(home, (target,))): target for link, target in _links(offers).items()}
    return [links[link] for link in chain.way(links, active, plan.manifest.digest, full, most)]


def find_overlay_delta(offers: Iterable[Target], plan: Plan) -> Target | None:
    """Return the delta that makes the overlays of a bundle from its own weights, if one is published and is smaller than they are."""
    own = plan.manifest.digest[: chain.DIGITS]
    links = {
        link: target for link, target in _links(offers).items() if link.base == link.target == own and link.form in chain.FORMATS
    }
    smallest = min(links, key=lambda link: link.size, default=None)
    return links[smallest] if smallest and smallest.size < _overlays(plan) else None


@dataclass(frozen=True)
class FullWay:
    """How the files of a full bundle get here; what it costs is exactly what is then fetched, unless a file of a slot is damaged meanwhile."""

    kept: dict[str, list[str]]
    """Hashes of files that slots hold → where. They are copied, unless `overlays` makes them."""
    fetched: list[FileEntry]
    """Files that are fetched as they are; parts of them may be here from an earlier call."""
    made: list[FileEntry]
    """Overlays that the delta `overlays` makes."""
    overlays: Target | None
    size: int
    """Bytes that are still to be fetched."""


def full_way(home: Home, plan: Plan, overlays: Target | None) -> FullWay:
    """Decide how the files of a full bundle get here: nothing that a slot holds is fetched, nor what an earlier call left.

    Args:
        home: the agent's directory.
        plan: what is to be installed.
        overlays: delta that makes the overlays from the bundle's own weights. It is taken if that saves bytes, and if no overlay was begun as
            it is, because then the delta did not serve.
    """
    entries = [*plan.manifest.objects.values()]
    kept = held(home, entries)
    lacking = [entry for entry in entries if entry.sha256 not in kept]
    bare = [entry for entry in lacking if entry.role == "overlay"]
    if overlays and (any(have(home, entry.sha256) for entry in bare) or missing(home, (overlays,)) >= missing(home, bare)):
        overlays = None
    made = [entry for entry in entries if overlays and entry.role == "overlay"]
    fetched = [entry for entry in lacking if entry not in made]
    return FullWay(kept, fetched, made, overlays, missing(home, fetched) + missing(home, [overlays] if overlays else []))


def _overlays(plan: Plan) -> int:
    """Return the bytes of the overlays of a bundle."""
    return sum(entry.size for entry in plan.manifest.objects.values() if entry.role == "overlay")


def _links(offers: Iterable[Target]) -> dict[chain.Link, Target]:
    named = ((chain.Link.of(target.name.rpartition("/")[2], target.size), target) for target in offers)
    return {link: target for link, target in named if link}


# Downloads and room


def fetch_objects(home: Home, transport: Transport, entries: Iterable[FileEntry], latest: Deadline) -> None:
    """Download files of a bundle into `incoming`; what is there from an earlier call is resumed."""
    home.disk.make_folder("incoming")
    for entry in entries:
        download(transport, f"objects/{entry.sha256}", entry.size, home.disk, f"incoming/{entry.sha256}", latest)


def held(home: Home, entries: Iterable[FileEntry]) -> dict[str, list[str]]:
    """Find the files of a bundle that slots hold already: hash → names of the files. What is damaged, or cannot be read, is not held."""
    slots = [path.name for path in sorted(_listed(home.disk.path("slots"))) if not path.name.startswith(".")]
    found: dict[str, list[str]] = {}
    for entry in entries:
        names = [f"slots/{slot}/{entry.sha256}" for slot in slots]
        if sound := [name for name in names if is_intact(home.disk.path(name), entry)]:
            found[entry.sha256] = sound
    return found


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [*folder.iterdir()]
    return []


def is_intact(path: Path, entry: FileEntry) -> bool:
    """Check whether a file is what a manifest lists, as far as it can be read."""
    try:
        if path.stat().st_size != entry.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError:
        return False


def copy(home: Home, names: Iterable[str], to: str, sha256: str) -> bool:
    """Copy a file from the first slot that gives it; return False, and leave nothing, if it is damaged in all, or cannot be read.

    It is not linked: damage to one file would be damage to both bundles.
    """
    for name in names:
        digest = hashlib.sha256()
        with home.disk.writing(to) as file:
            for piece in _readable(home.disk.path(name)):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() == sha256:
            return True
        log.warning("%s is damaged", name)
        home.disk.remove(to)
    return False


def _readable(path: Path) -> Iterator[bytes]:
    """Read a file from the disk as far as it can be read."""
    with suppress(OSError):
        yield from read_uncached(path)


def have(home: Home, sha256: str) -> int:
    """Return how many bytes of a download are here from an earlier call."""
    path = home.disk.path(f"incoming/{sha256}")
    return path.stat().st_size if path.is_file() else 0


def missing(home: Home, entries: Iterable[FileEntry | Target]) -> int:
    """Return how many bytes of these files of a bundle, or of these deltas, are still to be downloaded."""
    return sum(max(0, entry.size - have(home, entry.sha256)) for entry in entries)


def check_room(home: Home, written: int, size: int) -> None:
    """Check that the disk has room for an update that writes so many bytes, with a bundle of this size.

    Raises:
        RoomError: it has not.
    """
    needed, free = rules.room_needed(written, size), home.disk.free()
    if needed > free:
        raise RoomError(f"the update needs {needed:,} free bytes, but {home.root} has {free:,}; make room and try again")
    if (files := home.disk.files_free()) is not None and files < FILES_NEEDED:
        raise RoomError(
            f"the update needs room for {FILES_NEEDED} files (inodes), but {home.root} has it for {files}; remove files and try again"
        )


def largest_between(home: Home, active: str, plan: Plan) -> int:
    """Return the bytes that a delta of a chain may make on the way: somewhat more than the larger of the bundles at both ends."""
    try:
        before = home.slot(active).manifest.size
    except StateError:  # applying says more about it
        before = 0
    return int(GROWTH * max(before, plan.manifest.size))


def verify(home: Home, name: str, size: int, sha256: str) -> None:
    """Check a download against the signed length and hash.

    Raises:
        RepositoryError: it is not what is signed, and was removed.
        StateError: the disk cannot read it back, and it was removed, so that the next update does not end here as well.
    """
    path = home.disk.path(name)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        long = path.stat().st_size
    except OSError as error:
        home.disk.remove(name)
        raise StateError(
            f"{path.name} cannot be read back: {error.strerror}; it was deleted and will be fetched again; check the disk"
        ) from error
    if long != size or found != sha256:
        home.disk.remove(name)
        raise RepositoryError(f"{path.name} does not have its signed size and hash; it was deleted and will be fetched again")

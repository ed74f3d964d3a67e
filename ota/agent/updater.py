"""The twelve steps of an update.

     1  refresh the metadata, check them against the durable high-water marks
     2  read the policy and decide
     3  check this device's software; choose a delta from the running bundle or, if there is none, the full bundle
     4  check that there is room on the disk
     5  download with resume, up to a deadline
     6  verify length and hash
     7  apply into a new slot, in a process with limits
     8  verify every file of the slot, read back from the disk
     9  refresh again, so that a halt takes effect before the switch
    10  try the bundle on this device, unless it has to wait; report that it is starting
    11  switch: replace the state file, the only commit point
    12  probation: the bundle is trusted after some good inferences; one that fails is rolled back and refused from then on

No step changes the running bundle, except for repairs: damaged files of it are fetched again before step 2 and renamed over
the damaged ones. A power failure may interrupt any step. The next update then starts from the beginning, resumes downloads and
reuses a finished slot.

Drawing images needs no lock unless a bundle is on trial, so a running update does not stop it.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

import ota
from ota.agent import measured, reports, rules, variants
from ota.agent.disk import read_uncached
from ota.agent.rules import MAX_TRIES
from ota.agent.state import TRIAL_GOOD, TRIAL_LOADS, Home, Rest, Slot, State, Trial
from ota.agent.transport import Deadline, NotFoundError, Transport, at_most, connect, download
from ota.agent.trust import Target, Trust
from ota.errors import (
    AgentError,
    BaseError,
    DeltaError,
    DeviceError,
    DiedError,
    ExpiredError,
    GateError,
    InvalidError,
    LateError,
    ManifestError,
    OperatorError,
    OtaError,
    RepositoryError,
    RoomError,
    SoftwareError,
    StateError,
    UnfinishedError,
    own_errors,
)
from ota.manifest import MAX_MANIFEST, MAX_POLICY, FileEntry, Manifest, Policy, Reference, VariantName, parse

FETCH_SECONDS = 3600.0  # seconds that all downloads of one update may take; the next update resumes them
TRIAL_WAIT = 5.0  # seconds that an image waits for a running update, before the previous bundle draws it

log = logging.getLogger(__name__)

OnStep = Callable[[int, str], None]
"""Called with the number and name of each step as it begins."""


@dataclass(frozen=True)
class Outcome:
    """What an update did."""

    changed: bool
    active: str | None
    reason: str
    way: str = ""
    """full, delta, kept (a complete slot was there already), or empty: nothing was fetched."""
    received: int = 0
    """Bytes fetched, including metadata."""


@dataclass(frozen=True)
class _Plan:
    """The release to be installed."""

    policy: Policy
    manifest: Manifest
    manifest_bytes: bytes
    floor: int
    """Lowest release number that may be installed, as signed beside this release."""


def update(home: Home, on_step: OnStep | None = None, check_only: bool = False) -> Outcome:
    """Bring the device to the release that its policy asks for.

    Args:
        home: the agent's directory, locked by the caller.
        on_step: called as each step begins.
        check_only: stop after step 2 and say what would be done.

    Raises:
        GateError: the new bundle was tried and refused; the refusal is stored and reported.
        TrustError, ManifestError, DeltaError, RepositoryError: what is published is wrong; nothing was changed.
        TransferError: the repository cannot be reached; nothing was changed.
        RoomError, StateError, DeviceError: this device cannot update; nothing was changed, or the bundle on trial was
            rolled back.
        SoftwareError: ONNX Runtime or another package is missing, broken, or not of the version that the bundle needs.
        UnfinishedError, DiedError: the trial gave no result; later calls try again, a few times at once, then after a wait.
        FaultError: the agent itself is faulty; what runs is kept.
    """
    with own_errors():
        if not check_only:
            finish_probation(home, on_step or _silent)  # what an earlier call left on trial comes first
        with closing(connect(home.config().repository)) as transport:
            return _update(home, transport, on_step or _silent, check_only)


def _update(home: Home, transport: Transport, step: OnStep, check_only: bool) -> Outcome:
    step(1, "refresh metadata")
    trust = Trust(home, transport)
    state = home.load()
    damaged = state.active is not None and not is_sound(home, state.active)
    problem: OtaError | None = None
    if damaged and not check_only:
        try:
            _repair(home, trust, transport)
        except (RepositoryError, NotFoundError) as error:  # a newer release may still help
            log.warning("the running bundle is damaged and cannot be repaired: %s", error)
            problem = error
    step(2, "read the policy")
    plan, wanted = _decide(home, trust)
    reason, state = wanted.reason, home.load()
    if plan is None and problem:
        raise problem
    if wanted.settled and not check_only:
        home.collect_garbage()  # left by a power cut or by a withdrawn release
    if plan is None or check_only:
        repaired = damaged and not check_only
        if damaged:
            reason = f"release {state.seq} {'was damaged and is repaired' if repaired else 'is damaged'}; {reason}"
        return Outcome(repaired, state.active, reason, "full" if repaired else "", transport.received)

    digest = plan.manifest.digest
    if resting := _resting(home, plan):
        if problem:
            raise problem
        return Outcome(damaged, state.active, resting, "full" if damaged else "", transport.received)
    way = "full"
    if _is_complete(home, digest, plan):  # installed before, or interrupted after step 8
        way = "kept"
    else:
        step(3, "check the software, choose a way")
        _check_software()
        latest = at_most(FETCH_SECONDS)
        delta = _find_delta(trust, state.active, plan)
        home.collect_garbage({digest, *plan.manifest.objects, *([delta.sha256] if delta else [])})
        if delta and state.active:
            try:
                _fetch_delta(home, transport, state.active, plan, delta, step, latest)
                way = "delta"
            except BaseError as error:
                log.warning("%s", error)
                reports.queue(home, "base_corrupt", state.active, str(error))
            except (DeltaError, DeviceError, RepositoryError, NotFoundError) as error:
                if isinstance(error, (RoomError, StateError)) and not isinstance(error, SoftwareError):
                    raise
                log.warning("%s; fetching the full bundle", error)
                home.disk.remove(f"incoming/{delta.sha256}")
        if way == "full":
            _fetch_full(home, transport, plan, step, latest)

    step(9, "refresh again")
    fresh, wanted = _decide(home, Trust(home, transport))
    if fresh is None or fresh.manifest != plan.manifest:
        return Outcome(False, state.active, f"stopped before the switch: {wanted.reason}", way, transport.received)

    step(10, "try it on this device")
    milliseconds = _try_counted(home, plan, state, transport.received)
    reports.queue(home, "starting", digest, received=transport.received, milliseconds=milliseconds)
    reports.send(home)

    step(11, "switch")
    home.save(
        State(
            active=digest,
            previous=state.active,
            seq=plan.policy.seq,
            previous_seq=state.seq,
            trial=Trial(left=TRIAL_GOOD, loads=TRIAL_LOADS),
            refused=state.refused,
            tries=home.load().tries,
        )
    )
    reports.queue(home, "installed", digest, reason=way, received=transport.received, milliseconds=milliseconds)
    finish_probation(home, step)
    reports.send(home)
    return Outcome(True, digest, f"release {plan.policy.seq} is installed", way, transport.received)


def _silent(number: int, name: str) -> None:
    """Log a step that the caller does not want to be told."""
    log.debug("step %d: %s", number, name)


# Repair


def _repair(home: Home, trust: Trust, transport: Transport) -> None:
    """Fetch the damaged files of the running bundle, and rename each into place: there is never less of it than before.

    The files are checked against the bundle's own manifest and are still in the repository, so no policy has to offer the
    bundle.

    Raises:
        RepositoryError: the manifest is damaged too and no longer published, or a fetched file is not what is signed.
    """
    config, active = home.config(), home.load().active
    home.disk.make_folder(f"slots/{active}")
    try:
        slot = home.slot(str(active))
    except StateError:
        signed = trust.target(f"models/{config.line}/{config.device_class}/{active}.json")
        if signed is None or signed.sha256 != active:
            raise RepositoryError("the manifest of the running bundle is no longer published; publish a newer release") from None
        home.disk.replace(f"slots/{active}/manifest.json", trust.read(signed, MAX_MANIFEST))
        slot = home.slot(active)
    bad = [entry for entry in slot.manifest.objects.values() if not _file_is(slot, entry)]
    home.collect_garbage({entry.sha256 for entry in bad})
    _check_room(home, _missing(home, bad), slot.manifest.size)
    _fetch_objects(home, transport, bad, at_most(FETCH_SECONDS))
    for entry in bad:
        _verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
        home.disk.rename(f"incoming/{entry.sha256}", f"slots/{active}/{entry.sha256}")
    reports.queue(home, "base_corrupt", active, "it was fetched again", transport.received)
    reports.send(home)


# Steps 2 and 3


def _decide(home: Home, trust: Trust) -> tuple[_Plan | None, rules.Wanted]:
    """Decide which release to install, if any; also return what the policy asks for, and why."""
    config, state = home.config(), home.load()
    place = f"{config.line}/{config.device_class}"
    try:
        target = trust.target(f"rollout/{place}.json")
    except ExpiredError:
        if state.active is None:
            raise
        # This is intended: a rollout that nobody renews stops spreading. The roles above it are fresh; `Trust` has checked them.
        reason = "the rollout policy has expired, so nothing newer can be installed until it is signed anew; what runs goes on"
        return None, rules.Wanted(False, reason)
    if target is None:
        return None, rules.Wanted(False, f"nothing is rolled out to {place} yet")
    policy = parse(Policy, trust.read(target, MAX_POLICY), MAX_POLICY)
    # `rollout` alone cannot make anything run: what it names must be in `models`, under the same number.
    signed = trust.target(f"models/{place}/{policy.manifest}.json")
    if signed is None or signed.custom.seq != policy.seq:
        raise ManifestError(f"the policy names release {policy.seq}, which `models` does not; nothing is installed")
    state = home.load()  # again: new keys of `models` may have reset the running bundle's number and the refusals
    wanted = rules.want(policy, config, state, signed.custom.revertible, int(time.time()))
    if not wanted.install:
        return None, wanted
    data = trust.read(signed, MAX_MANIFEST)
    manifest = parse(Manifest, data, MAX_MANIFEST)
    if signed.sha256 != policy.manifest or manifest.digest != policy.manifest:
        raise ManifestError("the manifest is not the one that the policy names; nothing is installed")
    rules.check_fits(manifest, config, ota.__version__)
    return _Plan(policy, manifest, data, signed.custom.floor), wanted


def _find_delta(trust: Trust, active: str | None, plan: _Plan) -> Target | None:
    """Return the delta from exactly the running bundle, if one is published and is smaller than the full bundle.

    The role `deltas` only offers a shorter way: if what it signs is not valid, the full bundle is fetched.
    """
    if active is None:
        return None
    m = plan.manifest
    try:
        found = trust.target(f"deltas/{m.line}/{m.device_class}/{active}.{m.digest}")
    except InvalidError as error:
        log.warning("%s; fetching the full bundle", error)
        return None
    return found if found and found.size < m.size else None


# Steps 4 to 8


def _check_software() -> None:
    """Check that the software that tries bundles can be loaded and computes, before anything is fetched for it.

    Raises:
        SoftwareError: it cannot be loaded, or does not compute.
    """
    from ota.agent import child  # imported only where a process is started: a check that finds nothing new does not need it

    child.run("check")


def _fetch_delta(
    home: Home, transport: Transport, active: str, plan: _Plan, delta: Target, step: OnStep, latest: Deadline
) -> None:
    from ota.agent import child

    part, fresh = f"incoming/{delta.sha256}", _prepare_slot(home, plan)
    step(4, "check room")
    _check_room(home, delta.size - _have(home, delta.sha256) + plan.manifest.size, plan.manifest.size)
    step(5, f"download the delta, {delta.size:,} bytes")
    home.disk.make_folder("incoming")
    download(transport, delta.published_as, delta.size, home.disk, part, latest)
    step(6, "verify what was downloaded")
    _verify(home, part, delta.size, delta.sha256)
    step(7, "apply into a new slot")
    try:
        child.run(
            "apply", root=str(home.root), patch=part, base=f"slots/{active}", base_digest=active, slot=fresh,
            target_digest=plan.manifest.digest, files=[entry.model_dump(mode="json") for entry in plan.manifest.files],
        )  # fmt: skip
    finally:
        home.disk.remove(part)
    _finish_slot(home, plan, fresh, step)


def _fetch_full(home: Home, transport: Transport, plan: _Plan, step: OnStep, latest: Deadline) -> None:
    fresh, entries = _prepare_slot(home, plan), plan.manifest.objects.values()
    step(4, "check room")
    _check_room(home, _missing(home, entries), plan.manifest.size)
    step(5, f"download the full bundle, {plan.manifest.size:,} bytes")
    _fetch_objects(home, transport, entries, latest)
    step(6, "verify what was downloaded")
    for entry in entries:
        _verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
    step(7, "move into a new slot")
    for entry in entries:
        home.disk.rename(f"incoming/{entry.sha256}", f"{fresh}/{entry.sha256}")
    _finish_slot(home, plan, fresh, step)


def _fetch_objects(home: Home, transport: Transport, entries: Iterable[FileEntry], latest: Deadline) -> None:
    home.disk.make_folder("incoming")
    for entry in entries:
        download(transport, f"objects/{entry.sha256}", entry.size, home.disk, f"incoming/{entry.sha256}", latest)


def _prepare_slot(home: Home, plan: _Plan) -> str:
    """Make an empty folder for a slot under construction, and return its name; what an earlier attempt left is removed."""
    fresh = f"slots/.{plan.manifest.digest}"
    home.disk.remove(fresh)
    home.disk.make_folder(fresh, durable=False)  # it is renamed before anything relies on it
    return fresh


def _have(home: Home, sha256: str) -> int:
    """Return how many bytes of a download are here from an earlier call."""
    path = home.disk.path(f"incoming/{sha256}")
    return path.stat().st_size if path.is_file() else 0


def _missing(home: Home, entries: Iterable[FileEntry]) -> int:
    return sum(max(0, entry.size - _have(home, entry.sha256)) for entry in entries)


def _check_room(home: Home, written: int, size: int) -> None:
    needed, free = rules.room_needed(written, size), home.disk.free()
    if needed > free:
        raise RoomError(f"the update needs {needed:,} free bytes, {home.root} has {free:,}; make room and try again")


def _verify(home: Home, name: str, size: int, sha256: str) -> None:
    path = home.disk.path(name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != size or found != sha256:
        home.disk.remove(name)
        raise RepositoryError(f"{path.name} is not what is signed; it was thrown away and will be fetched again")


def _finish_slot(home: Home, plan: _Plan, fresh: str, step: OnStep) -> None:
    step(8, "verify the slot, read back from the disk")
    home.disk.replace(f"{fresh}/manifest.json", plan.manifest_bytes)  # this also makes all names in the folder durable
    _check_slot(home, fresh, plan)
    home.disk.remove(f"slots/{plan.manifest.digest}")
    home.disk.rename(fresh, f"slots/{plan.manifest.digest}")


def _check_slot(home: Home, name: str, plan: _Plan) -> None:
    for entry in plan.manifest.files:
        digest, size = hashlib.sha256(), 0
        try:
            for piece in read_uncached(home.disk.path(f"{name}/{entry.sha256}")):
                digest.update(piece)
                size += len(piece)
        except OSError as error:
            raise StateError(f"the new slot's {entry.role} file cannot be read back: {error.strerror}; check the disk") from error
        if size != entry.size or digest.hexdigest() != entry.sha256:
            raise DeltaError(f"the new slot's {entry.role} file is not what is signed; it was not installed")


def _is_complete(home: Home, digest: str, plan: _Plan) -> bool:
    """Check whether a complete slot of this bundle is there already."""
    try:
        if home.disk.path(f"slots/{digest}/manifest.json").read_bytes() != plan.manifest_bytes:
            return False
        _check_slot(home, f"slots/{digest}", plan)
    except (OSError, StateError, DeltaError):
        return False
    return True


# Step 10


def _resting(home: Home, plan: _Plan) -> str:
    """Say why the bundle has to wait because earlier trials gave no result; return an empty string if it may be tried now.

    A new wait is reported to the factory.
    """
    digest, now = plan.manifest.digest, int(time.time())
    tries, rest = home.load().tries.get(digest, 0), home.rest()
    length = max(rules.rest(tries), rules.FIRST_REST)
    if rest is None or (rest.bundle, rest.tries) != (digest, tries):
        if tries < MAX_TRIES:
            return ""
        told = f"not refused, it only waits: its trial started {tries} times and never finished; it is tried again in {length // 3600} h"
        reports.queue(home, "refused", digest, told)
        reports.send(home)
        rest = _rest(home, digest, tries, now + length)
    if rest.until > now + length:  # the clock was set back
        rest = _rest(home, digest, tries, now + length)
    if rest.until <= now:
        return ""
    why = f"its trial started {tries} times and never finished" if tries >= MAX_TRIES else "its trial did not finish in time"
    return (
        f"release {plan.policy.seq} rests for {(rest.until - now + 59) // 60} more minutes, {why}; mend what this device lacks, "
        f"then run `ferry-agent forget {digest[:12]}` to have it tried at once"
    )


def _rest(home: Home, digest: str, tries: int, until: int) -> Rest:
    rest = Rest(bundle=digest, tries=tries, until=until)
    home.disk.replace("resting.json", rest.canonical())
    return rest


def _try_counted(home: Home, plan: _Plan, state: State, received: int) -> float:
    """Try a bundle, and count the trial beforehand because it may crash the machine; return the milliseconds of an image."""
    manifest = plan.manifest
    tries = state.tries.get(manifest.digest, 0)
    home.save(state.model_copy(update={"tries": {manifest.digest: tries + 1}}))
    try:
        return _try(home, manifest, state, received, plan.floor)
    except (RoomError, AgentError):
        home.save(state)  # it was not tried
        raise
    except LateError:  # not counted as a trial; but it may use a processor for minutes, so the next one has to wait
        _rest(home, manifest.digest, tries, int(time.time()) + rules.FIRST_REST)
        home.save(state)
        raise


def _try(home: Home, manifest: Manifest, state: State, received: int, floor: int) -> float:
    """Try every variant of a bundle; return the milliseconds of an image by the default variant."""
    from ota.agent import child

    slot = home.slot(manifest.digest)
    milliseconds = 0.0
    for variant in manifest.variants:
        try:
            # A running bundle that is below the floor, or that no trusted key names, is not compared with: it may be a thief's.
            running = _running_reference(home, state, variant) if state.seq >= max(1, floor) else None
            answer = child.run("try", slot=str(slot.folder), digest=slot.digest, variant=variant)
            trying = _trying(answer)
            reasons = rules.judge(trying, slot.reference(variant), running)
            if not reasons and (why := rules.hurried(trying, slot.reference(variant))):
                raise UnfinishedError(f"{variant}: {why}; it is tried again")
        except (RoomError, AgentError, StateError, BaseError, UnfinishedError, DiedError):
            raise  # the fault of this device or its software, or nobody can tell whose
        except (DeviceError, ManifestError) as error:
            reasons = [str(error)]
        if reasons:
            why = f"{variant}: {'; '.join(reasons)}"
            _compare(home, state.active, variant, why)
            _refuse(home, manifest.digest, why, state, received)
        if variant == manifest.default_variant:
            milliseconds = trying.milliseconds
    return milliseconds


def _trying(answer: dict[str, Any]) -> rules.TrialResult:
    return rules.TrialResult(
        golden_share=answer["golden_share"], finite=answer["finite"],
        statistics=tuple((name, value) for name, value in answer["statistics"]),
        load=tuple(tuple(row) for row in answer["load"]), milliseconds=answer["milliseconds"], computing=answer["computing"],
        peak_mib=answer["peak_mib"],
    )  # fmt: skip


def _compare(home: Home, trusted: str | None, variant: VariantName | None, why: str) -> None:
    """Try a trusted bundle after a new one failed: if it fails here too, the device is to blame and not the new bundle.

    Args:
        home: the agent's directory.
        trusted: hash of the trusted bundle; None if there is none.
        variant: the variant to try; if it is None, or the trusted bundle does not have it, the default variant.
        why: why the new bundle failed.

    Raises:
        UnfinishedError: the trusted bundle fails too, or gives no result. This device, its software or its load is to blame,
            and the new bundle is not refused.
        RoomError, SoftwareError, DiedError: the trial of the trusted bundle gave no result.
    """
    from ota.agent import child

    if trusted is None:
        return
    try:
        slot, same, reference = _in_variant(home, trusted, variant)
    except (StateError, BaseError, ManifestError):
        return  # it is damaged, so it proves nothing about this device
    try:
        answer = child.run("try", slot=str(slot.folder), digest=trusted, variant=same, trusted=True)
        theirs = rules.judge(_trying(answer), reference, None) or [rules.hurried(_trying(answer), reference)]
    except (RoomError, AgentError, UnfinishedError, DiedError):
        raise
    except (StateError, BaseError):
        return
    except (DeviceError, ManifestError) as error:
        theirs = [str(error)]
    if any(theirs):
        raise UnfinishedError(
            f"the bundle did not pass ({why}), but the one that runs does not pass here any more either ({'; '.join(theirs)}); check this "
            "device's ONNX Runtime, memory and load"
        )


def _in_variant(home: Home, digest: str, variant: VariantName | None) -> tuple[Slot, VariantName, Reference]:
    """Open a bundle, choose the given variant or its default one, and read the reference of that variant."""
    slot = home.slot(digest)
    same = variant if variant and variant in slot.manifest.variants else slot.manifest.default_variant
    return slot, same, slot.reference(same)


def _running_reference(home: Home, state: State, variant: VariantName) -> Reference | None:
    """Return the running bundle's reference for the given variant or its default one; None if it cannot be read."""
    if state.active is None:
        return None
    try:
        return _in_variant(home, state.active, variant)[2]
    except (StateError, BaseError, ManifestError):
        return None  # the running bundle is damaged, which must not keep the new one out


def _refuse(home: Home, digest: str, why: str, state: State, received: int) -> NoReturn:
    """Record that this device refuses a bundle from now on, remove its slot, report the refusal, and raise GateError."""
    home.save(state.model_copy(update={"refused": state.refusing(digest, why), "tries": {}}))
    home.disk.remove(f"slots/{digest}")
    reports.queue(home, "refused", digest, why, received)
    reports.send(home)
    now = "the running one is kept" if state.active else "nothing runs yet"
    raise GateError(f"the bundle was tried and refused, {why}; {now}, and {rules.lifting(digest)}")


# Step 12, and serving

Drawn = tuple[bytes, dict[str, Any]]
"""PNG bytes, and the answer of the child that drew it."""


def finish_probation(home: Home, on_step: OnStep | None = None) -> None:
    """Finish a trial with images that the agent draws for itself; do nothing if no bundle is on trial.

    A trial must end on an idle device too, so these self-tests count like requested images.

    Raises:
        GateError: the bundle on trial failed and was rolled back.
        StateError, BaseError: a file cannot be read; the bundle was rolled back if it is damaged, or if its loads are used up.
        UnfinishedError, DiedError: the trial gave no result; the next calls go on with it, a few times.
    """
    seed = 0
    while (state := home.load()).trial is not None:
        if on_step and not seed:
            on_step(12, "probation")
        _generate_on_trial(home, state, "", seed, None)
        seed += 1


def generate(home: Home, caption: str, seed: int, variant: VariantName | None = None) -> Drawn:
    """Draw one image with the running bundle, whatever else the agent is doing; the caller does not hold the lock.

    If a variant does not draw, the next one does, unless the caller chose the variant. The previous bundle draws if no variant
    of the running bundle does. It also draws if the running bundle is on trial and its loads cannot be counted, because an
    update is running or the disk is full.

    Raises:
        StateError: nothing is installed.
        BaseError: what is installed is damaged.
        DeviceError, ManifestError: no installed bundle draws this.
        OperatorError: the caption or seed cannot be drawn, or there is no such variant.
        GateError: the bundle on trial failed and was rolled back; ask again.
    """
    home.config()  # raises an error if this is no agent's directory
    rules.check_request(caption, seed)
    problem: OtaError = StateError(f"no bundle is installed in {home.root}; run `ferry-agent update`")
    if home.load().trial is not None:
        try:
            with home.locked(TRIAL_WAIT):
                state = home.load()
                if state.trial is not None:
                    return _generate_on_trial(home, state, caption, seed, variant)
        except (StateError, BaseError, RoomError, UnfinishedError, DiedError) as error:
            log.warning("%s", error)  # it may have been rolled back, and nothing else would say so
            problem = error
    before = None
    while (state := home.load()) != before:  # a running update may switch, and remove a bundle that is being read
        left: dict[str, list[VariantName]] = {}
        for digest in (None if state.trial else state.active, state.previous):
            if digest is None:
                continue
            if digest != state.active:
                log.warning("%s; the bundle before draws", problem)
            try:
                left[digest] = _choices(home, digest, variant)
                return _draw_first(home, digest, caption, seed, left[digest])
            except OperatorError as error:
                if digest == state.active or state.trial:
                    raise
                log.warning("%s", error)  # about the previous bundle, which the caller did not ask for
            except RoomError:
                raise
            except (DeviceError, ManifestError) as error:
                problem = error
        for digest, choices in left.items():
            while choices:  # a variant was stopped for its time or memory, and no other bundle draws: a cheaper variant may
                log.warning("%s; variant %s draws", problem, choices[0])
                try:
                    return _draw_first(home, digest, caption, seed, choices)
                except (DeviceError, ManifestError) as error:
                    problem = error
        before = state
    raise problem


def _draw_first(home: Home, digest: str, caption: str, seed: int, choices: list[VariantName]) -> Drawn:
    """Draw with the first variant that can; remove from the list those that were tried.

    Raises:
        UnfinishedError: a variant was stopped for its time or memory; those after it stay in the list.
        DeviceError, ManifestError: no variant can draw.
    """
    while True:
        variant = choices.pop(0)
        try:
            return _draw(home, digest, caption, seed, variant)
        except (RoomError, UnfinishedError):
            raise
        except (DeviceError, ManifestError) as error:
            if not choices:
                raise
            log.warning("variant %s: %s; the next one draws", variant, error)


def _choices(home: Home, digest: str, wanted: VariantName | None) -> list[VariantName]:
    """List the variants of a bundle in the order in which to try them."""
    manifest = home.slot(digest).manifest
    if wanted and wanted not in manifest.variants:
        raise OperatorError(f"this bundle has no variant {wanted}; choose one of {', '.join(manifest.variants)}")
    if wanted:
        return [wanted]
    return variants.chain(manifest.variants, manifest.default_variant, measured.read(home, digest), home.config())


def _draw(home: Home, digest: str, caption: str, seed: int, variant: VariantName, **how: bool) -> Drawn:
    from ota.agent import child

    slot = home.slot(digest)
    answer = child.run("generate", slot=str(slot.folder), digest=digest, variant=variant, caption=caption, seed=seed, **how)
    if not answer["good"]:
        raise DeviceError("it made an image that is constant or not finite")
    return base64.b64decode(answer["png"]), answer


def _generate_on_trial(home: Home, state: State, caption: str, seed: int, variant: VariantName | None) -> Drawn:
    """Draw with the bundle on trial; the caller holds the lock.

    Each load is counted before it happens, so that a bundle that kills the machine is rolled back in the end.
    """
    active, trial = state.active, state.trial
    if active is None or trial is None:
        raise StateError(f"nothing is on trial in {home.root}; run `ferry-agent update`")
    if trial.loads == 0:  # it may kill the machine, so it has to wait before it is tried again
        tried = state.model_copy(update={"tries": {active: max(MAX_TRIES, state.tries.get(active, 0))}})
        _take_back(home, tried, active, "it did not get through its trial", refuse=False)
    counted = state.model_copy(update={"trial": trial.model_copy(update={"loads": trial.loads - 1})})
    home.save(counted)
    try:
        drawn = _draw(home, active, caption, seed, _choices(home, active, variant)[0], on_trial=True)
    except (OperatorError, RoomError, AgentError):  # a wrong request, no process, broken software: not the bundle's fault
        home.save(state)
        raise
    except (UnfinishedError, DiedError):
        raise  # the bundle's fault or the device's; the load was counted
    except (StateError, BaseError) as error:  # this device's fault: the bundle is not refused for it, but tried again a few times
        if counted.trial and counted.trial.loads and is_sound(home, active):
            raise  # a read failed; the next one may succeed
        _take_back(home, state, active, str(error), refuse=False)  # the next update fetches what is damaged
    except (DeviceError, ManifestError) as error:
        _compare(home, state.previous, None, str(error))
        _take_back(home, state, active, str(error))
    _count_good(home, counted, drawn[1]["milliseconds"])
    return drawn


def _count_good(home: Home, state: State, milliseconds: float) -> None:
    if state.trial and state.trial.left > 1:
        home.save(state.model_copy(update={"trial": state.trial.model_copy(update={"left": state.trial.left - 1})}))
        return
    home.save(state.model_copy(update={"trial": None, "tries": {}}))
    reports.queue(home, "confirmed", state.active, milliseconds=milliseconds)
    home.collect_garbage()


def _take_back(home: Home, state: State, failed: str, why: str, refuse: bool = True) -> NoReturn:
    """Roll back to the previous bundle, report it, and raise.

    Raises:
        GateError: with `refuse`, the failed bundle is refused from now on.
        StateError: without `refuse`, the count of its trials is kept, and the failed bundle is tried again.
    """
    refused, tries = (state.refusing(failed, f"on trial: {why}"), {}) if refuse else (state.refused, state.tries)
    home.save(State(active=state.previous, seq=state.previous_seq, refused=refused, tries=tries))
    reports.queue(home, "rolled_back", failed, why)
    reports.send(home)
    now = "the one before runs again" if state.previous else "none is left, run `ferry-agent update`"
    if not refuse:
        raise StateError(f"the bundle on trial was taken back, and is tried again: {why}; {now}")
    raise GateError(f"the bundle on trial was taken back: {why}; {now}; {rules.lifting(failed)}")


def rollback(home: Home) -> tuple[str, str]:
    """Roll back to the previous bundle by hand; the present one is refused until `forget` is called for it.

    Returns:
        The bundle that runs now, and the one that is refused.

    Raises:
        OperatorError: there is no bundle to go back to.
        StateError: the previous bundle is damaged; nothing was changed.
    """
    state = home.load()
    if state.previous is None or state.active is None:
        if state.active is None:
            raise OperatorError("nothing is installed; run `ferry-agent update`")
        raise OperatorError(
            "no bundle before this one is kept; `ferry-agent status` lists what was refused, and `ferry-agent forget HASH` lets the next update "
            "have it again"
        )
    home.slot(state.previous)
    if not is_sound(home, state.previous):
        raise StateError(
            f"the bundle before, {state.previous[:12]}, is damaged; the present one is kept, publish another release"
        )
    refused = state.refusing(state.active, "rolled back by the operator")
    home.save(State(active=state.previous, seq=state.previous_seq, refused=refused))
    reports.queue(home, "rolled_back", state.active, "by the operator")
    reports.send(home)
    return state.previous, state.active


def forget(home: Home, start: str) -> str:
    """Forget that a bundle was refused, or how often its trials gave no result; the next update treats it as new.

    Args:
        home: the agent's directory, locked by the caller.
        start: the first digits of the bundle's hash.

    Returns:
        The bundle's whole hash.

    Raises:
        OperatorError: no bundle that is refused or waits has such a hash, or several do.
    """
    state = home.load()
    known = {*state.refused, *state.tries, *([rest.bundle] if (rest := home.rest()) else [])}
    found = sorted(digest for digest in known if start and digest.startswith(start.lower()))
    if not found:
        raise OperatorError(f"no bundle that begins with '{start}' is refused here; `ferry-agent status` lists those that are")
    if len(found) > 1:
        raise OperatorError(f"{len(found)} bundles that are refused begin with '{start}'; give more digits")
    (digest,) = found
    home.disk.remove("resting.json")
    refused, tries = ({d: was for d, was in old.items() if d != digest} for old in (state.refused, state.tries))
    home.save(state.model_copy(update={"refused": refused, "tries": tries}))
    return digest


def status(home: Home) -> dict[str, Any]:
    """Report what runs, checked against its manifest: the hash of every file is recomputed."""
    config, state = home.config(), home.load()
    sound = is_sound(home, state.active) if state.active else None
    return {
        "device": config.device,
        "line": config.line,
        "device_class": config.device_class,
        "active": state.active,
        "release": state.seq,
        "previous": state.previous,
        "sound": sound,
        "trial": state.trial.model_dump() if state.trial else None,
        "refused": state.refused,
        "rests": rest.model_dump() if (rest := home.rest()) and rest.until > time.time() else None,
        "waiting_reports": len(list(home.disk.path("queue").glob("*.json"))),
        "reports_problem": reports.problem(home),
    }


def is_sound(home: Home, digest: str) -> bool:
    """Check whether every file of a bundle has the hash that its manifest lists."""
    try:
        slot = home.slot(digest)
        return all(_file_is(slot, entry) for entry in slot.manifest.objects.values())
    except StateError:
        return False


def _file_is(slot: Slot, entry: FileEntry) -> bool:
    try:
        with (slot.folder / entry.sha256).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError:
        return False

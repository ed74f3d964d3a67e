"""The twelve steps of an update.

     1  refresh the metadata, check them against the durable high-water mark
     2  read the policy and decide
     3  choose a delta whose base is what runs now, else the full bundle
     4  check that there is room
     5  download, resuming, against a deadline
     6  verify length and hash
     7  apply into a new slot, in a process with limits
     8  verify every file of the slot, read back from the disk
     9  refresh again: a halt must reach us before the switch
    10  try the bundle on this device; report that it is starting
    11  switch: replace the state file, the only commit point
    12  probation: it is trusted after some good inferences, else taken back and refused from then on

Until step 11 the running bundle is not touched in any way. Every step may be cut by a power failure and is repeated from
the beginning of the update; downloads are resumed, a finished slot is used again.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import ota
from ota.agent import child, reports, rules
from ota.agent.disk import read_uncached
from ota.agent.state import TRIAL_GOOD, TRIAL_LOADS, Home, Slot, State, Trial
from ota.agent.transport import Transport, connect, download
from ota.agent.trust import Target, Trust
from ota.errors import (
    BaseError,
    DeltaError,
    DeviceError,
    GateError,
    ManifestError,
    OperatorError,
    RepositoryError,
    RoomError,
    StateError,
)
from ota.manifest import MAX_MANIFEST, MAX_POLICY, Manifest, Policy, Reference, VariantName, parse

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
    """full, delta, or nothing fetched."""
    received: int = 0
    """Bytes fetched, metadata included."""


@dataclass(frozen=True)
class _Plan:
    """The release that is to be installed."""

    policy: Policy
    manifest: Manifest
    manifest_bytes: bytes


def update(home: Home, on_step: OnStep | None = None, check_only: bool = False) -> Outcome:
    """Bring the device to the release that its policy wants.

    Args:
        home: the agent's directory, locked by the caller.
        on_step: called as each step begins.
        check_only: stop after step 2 and say what would be done.

    Raises:
        GateError: the new bundle was tried and refused; it is remembered and reported.
        TrustError, ManifestError, DeltaError, RepositoryError: what is published is wrong; nothing was changed.
        TransferError: the repository cannot be reached; nothing was changed.
        RoomError, StateError, DeviceError: this device cannot; nothing was changed.
    """
    step = on_step or _silent
    finish_probation(home, step)  # what an earlier call left on trial comes first
    transport = connect(home.config().repository)

    step(1, "refresh metadata")
    trust = Trust(home, transport)
    step(2, "read the policy")
    plan, reason = _decide(home, trust)
    state = home.load()
    if plan is None or check_only:
        return Outcome(False, state.active, reason, received=transport.received)

    digest = plan.manifest.digest
    way = "full"
    if _is_complete(home, digest, plan):  # installed before, or cut after step 8
        way = "kept"
    else:
        step(3, "choose a way")
        delta = _find_delta(trust, state.active, plan)
        if delta and state.active:
            try:
                _fetch_delta(home, transport, state.active, plan, delta, step)
                way = "delta"
            except BaseError as error:
                log.warning("%s", error)
                reports.queue(home, "base_corrupt", state.active, str(error))
            except (DeltaError, DeviceError, RepositoryError) as error:
                if isinstance(error, (RoomError, StateError)):
                    raise
                log.warning("%s; fetching the full bundle", error)
        if way == "full":
            _fetch_full(home, transport, plan, step)

    step(9, "refresh again")
    fresh, reason = _decide(home, Trust(home, transport))
    if fresh is None or fresh.manifest != plan.manifest:
        return Outcome(False, state.active, f"stopped before the switch: {reason}", way, transport.received)

    step(10, "try it on this device")
    milliseconds = _try(home, plan.manifest, state, transport.received)
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
        )
    )
    reports.queue(home, "installed", digest, reason=way, received=transport.received, milliseconds=milliseconds)
    finish_probation(home, step)
    reports.send(home)
    return Outcome(True, digest, f"release {plan.policy.seq} is installed", way, transport.received)


def _silent(number: int, name: str) -> None:
    """Nobody wants to know."""
    log.debug("step %d: %s", number, name)


# Steps 2 and 3


def _decide(home: Home, trust: Trust) -> tuple[_Plan | None, str]:
    """The release to install, or why there is none."""
    config, state = home.config(), home.load()
    place = f"{config.line}/{config.device_class}"
    target = trust.target(f"rollout/{place}.json")
    if target is None:
        return None, f"nothing is rolled out to {place} yet"
    policy = parse(Policy, trust.read(target, MAX_POLICY), MAX_POLICY)
    # `rollout` alone cannot make anything run: what it names must be in `models`, under the same number.
    signed = trust.target(f"models/{place}/{policy.manifest}.json")
    if signed is None or signed.custom.get("seq") != policy.seq:
        raise ManifestError(f"the policy names release {policy.seq}, which `models` does not; nothing is installed")
    wanted = rules.want(policy, config, state, signed.custom.get("revertible") is True, int(time.time()))
    if not wanted.install:
        return None, wanted.reason
    data = trust.read(signed, MAX_MANIFEST)
    manifest = parse(Manifest, data, MAX_MANIFEST)
    if signed.sha256 != policy.manifest or manifest.digest != policy.manifest:
        raise ManifestError("the manifest is not the one that the policy names; nothing is installed")
    rules.check_fits(manifest, config, ota.__version__)
    return _Plan(policy, manifest, data), wanted.reason


def _find_delta(trust: Trust, active: str | None, plan: _Plan) -> Target | None:
    """The delta from exactly what runs now, if one is published and worth it."""
    if active is None:
        return None
    m = plan.manifest
    found = trust.target(f"deltas/{m.line}/{m.device_class}/{active}.{m.digest}")
    return found if found and found.size < m.size else None


# Steps 4 to 8


def _fetch_delta(home: Home, transport: Transport, active: str, plan: _Plan, delta: Target, step: OnStep) -> None:
    part, fresh = f"incoming/{delta.sha256}", _prepare_slot(home, plan)
    step(4, "check room")
    _check_room(home, delta.size, plan.manifest.size)
    step(5, f"download the delta, {delta.size:,} bytes")
    home.disk.make_folder("incoming")
    download(transport, delta.published_as, delta.size, delta.sha256, home.disk, part)
    step(6, "verify what was downloaded")
    _verify(home, part, delta.size, delta.sha256)
    step(7, "apply into a new slot")
    try:
        child.run(
            "apply", root=str(home.root), patch=part, base=f"slots/{active}", base_digest=active, slot=fresh,
            target_digest=plan.manifest.digest,
        )  # fmt: skip
    finally:
        home.disk.remove(part)
    _finish_slot(home, plan, fresh, step)


def _fetch_full(home: Home, transport: Transport, plan: _Plan, step: OnStep) -> None:
    fresh = _prepare_slot(home, plan)
    step(4, "check room")
    _check_room(home, plan.manifest.size, plan.manifest.size)
    step(5, f"download the full bundle, {plan.manifest.size:,} bytes")
    home.disk.make_folder("incoming")
    for entry in plan.manifest.files:
        part = f"incoming/{entry.sha256}"
        download(transport, f"objects/{entry.sha256}", entry.size, entry.sha256, home.disk, part)
    step(6, "verify what was downloaded")
    for entry in plan.manifest.files:
        _verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
    step(7, "move into a new slot")
    for entry in plan.manifest.files:
        home.disk.rename(f"incoming/{entry.sha256}", f"{fresh}/{entry.sha256}")
    _finish_slot(home, plan, fresh, step)


def _prepare_slot(home: Home, plan: _Plan) -> str:
    """An empty folder for a slot under construction; what an earlier attempt left there is removed."""
    fresh = f"slots/.{plan.manifest.digest}"
    home.disk.remove(fresh)
    home.disk.make_folder(fresh)
    return fresh


def _check_room(home: Home, fetched: int, size: int) -> None:
    needed, free = rules.room_needed(fetched, size), home.disk.free()
    if needed > free:
        raise RoomError(f"the update needs {needed:,} free bytes, {home.root} has {free:,}; make room and try again")


def _verify(home: Home, name: str, size: int, sha256: str) -> None:
    path = home.disk.path(name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size != size or found != sha256:
        home.disk.remove(name)
        raise RepositoryError(f"{path.name[:12]} is not what is signed; it was thrown away and will be fetched again")


def _finish_slot(home: Home, plan: _Plan, fresh: str, step: OnStep) -> None:
    step(8, "verify the slot, read back from the disk")
    home.disk.replace(f"{fresh}/manifest.json", plan.manifest_bytes)
    home.disk.sync_folder(fresh)
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
    """Whether a whole slot of this bundle is there already."""
    if not home.disk.path(f"slots/{digest}/manifest.json").is_file():
        return False
    try:
        _check_slot(home, f"slots/{digest}", plan)
    except (StateError, DeltaError):
        return False
    return True


# Step 10


def _try(home: Home, manifest: Manifest, state: State, received: int) -> float:
    """Try every variant of a bundle; returns the milliseconds of the default one's image."""
    slot = home.slot(manifest.digest)
    milliseconds = 0.0
    for variant in manifest.variants:
        try:
            running = _running_reference(home, state, variant)
            answer = child.run("try", slot=str(slot.folder), digest=slot.digest, variant=variant)
            trying = _trying(answer)
            reasons = rules.judge(trying, slot.reference(variant), running)
        except (DeviceError, ManifestError) as error:
            if isinstance(error, StateError):
                raise
            reasons = [str(error)]
        if reasons:
            why = f"{variant}: {'; '.join(reasons)}"
            _refuse(home, manifest.digest, why, state)
            reports.queue(home, "refused", manifest.digest, why, received)
            reports.send(home)
            raise GateError(f"the bundle was tried and refused, {why}; the running one is kept")
        if variant == manifest.default_variant:
            milliseconds = trying.milliseconds
    return milliseconds


def _trying(answer: dict[str, Any]) -> rules.Trying:
    return rules.Trying(
        golden_share=answer["golden_share"], finite=answer["finite"],
        statistics=tuple((name, value) for name, value in answer["statistics"]),
        load=tuple(tuple(row) for row in answer["load"]), milliseconds=answer["milliseconds"],
        peak_mib=answer["peak_mib"], runtime_problem=answer["runtime_problem"],
    )  # fmt: skip


def _running_reference(home: Home, state: State, variant: VariantName) -> Reference | None:
    """What the running bundle looks like, in the same variant or its default one."""
    if state.active is None:
        return None
    try:
        running = home.slot(state.active)
        same = variant if variant in running.manifest.variants else running.manifest.default_variant
        return running.reference(same)
    except (StateError, ManifestError, OSError):
        return None  # the running bundle is damaged; the new one must not be kept out by that


def _refuse(home: Home, digest: str, why: str, state: State) -> None:
    """Remember for good that this device will not have a bundle, then free its slot."""
    home.save(state.model_copy(update={"refused": state.refused | {digest: why[:500]}}))
    home.disk.remove(f"slots/{digest}")


# Step 12, and serving


def finish_probation(home: Home, on_step: OnStep | None = None) -> None:
    """Carry a trial through with inferences of the agent's own; nothing happens where nothing is on trial.

    An idle device must come to an answer too, so these self-tests count like anybody's images.

    Raises:
        GateError: the bundle on trial failed and was taken back.
    """
    seed = 0
    while home.load().trial is not None:
        if on_step and not seed:
            on_step(12, "probation")
        generate(home, "", seed)
        seed += 1


def generate(home: Home, caption: str, seed: int, variant: VariantName | None = None) -> tuple[bytes, dict[str, Any]]:
    """Draw one image with what runs now: PNG bytes and how it went.

    On probation each load is counted before it happens, so a bundle that kills the machine is taken back in the end.

    Raises:
        StateError: nothing is installed.
        OperatorError: the caption is too long, or there is no such variant.
        GateError: the bundle on trial failed and was taken back; ask again.
    """
    state = home.load()
    active, trial = state.active, state.trial
    if active is None:
        raise StateError(f"no bundle is installed in {home.root}; run `ferry-agent update`")
    if trial is not None:
        if trial.loads == 0:
            _take_back(home, state, active, "it did not get through its trial")
        trial = trial.model_copy(update={"loads": trial.loads - 1})
        state = state.model_copy(update={"trial": trial})
        home.save(state)
    try:
        slot = home.slot(active)
        chosen = variant or slot.manifest.default_variant
        if chosen not in slot.manifest.variants:
            raise OperatorError(f"this bundle has no variant {chosen}; choose one of {', '.join(slot.manifest.variants)}")
        answer = child.run("generate", slot=str(slot.folder), digest=slot.digest, variant=chosen, caption=caption, seed=seed)
        if not answer["good"]:
            raise DeviceError("it made an image that is constant or not finite")
    except (DeviceError, ManifestError) as error:
        if trial is not None:
            _take_back(home, state, active, str(error))
        raise
    if trial is not None:
        _count_good(home, state, trial, answer["milliseconds"])
    return base64.b64decode(answer["png"]), answer


def _count_good(home: Home, state: State, trial: Trial, milliseconds: float) -> None:
    if trial.left > 1:
        home.save(state.model_copy(update={"trial": trial.model_copy(update={"left": trial.left - 1})}))
        return
    home.save(state.model_copy(update={"trial": None}))
    reports.queue(home, "confirmed", state.active, milliseconds=milliseconds)
    home.collect_garbage()


def _take_back(home: Home, state: State, failed: str, why: str) -> NoReturn:
    """Go back to the bundle before, and refuse the failed one from now on."""
    refused = state.refused | {failed: f"on trial: {why}"[:500]}
    home.save(State(active=state.previous, seq=state.previous_seq, refused=refused))
    reports.queue(home, "rolled_back", failed, why)
    reports.send(home)
    raise GateError(f"the bundle on trial was taken back: {why}; the one before runs again")


def rollback(home: Home) -> str:
    """Go back to the bundle before, by hand; the present one is refused from now on.

    Raises:
        OperatorError: there is none to go back to.
    """
    state = home.load()
    if state.previous is None or state.active is None:
        raise OperatorError("there is no bundle to go back to; only one was ever installed")
    home.slot(state.previous)
    refused = state.refused | {state.active: "rolled back by the operator"}
    home.save(State(active=state.previous, seq=state.previous_seq, refused=refused))
    reports.queue(home, "rolled_back", state.active, "by the operator")
    reports.send(home)
    return state.previous


def status(home: Home) -> dict[str, Any]:
    """What runs, checked against its manifest: every file's hash is recomputed."""
    config, state = home.config(), home.load()
    sound: bool | None = None
    if state.active:
        try:
            slot = home.slot(state.active)
            sound = all(_file_is(slot, entry.sha256, entry.size) for entry in slot.manifest.files)
        except StateError:
            sound = False
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
        "waiting_reports": len(list(home.disk.path("queue").glob("*.json"))),
    }


def _file_is(slot: Slot, sha256: str, size: int) -> bool:
    path = slot.folder / sha256
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256

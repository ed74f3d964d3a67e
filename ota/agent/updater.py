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
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from ota.agent import history, reports, trial
from ota.agent.network import UnavailableError
from ota.agent.plan import (
    OnStep,
    Plan,
    check_room,
    copy,
    decide,
    fetch_objects,
    find_delta,
    find_overlay_delta,
    have,
    held,
    missing,
    verify,
)
from ota.agent.slots import file_is, finish_slot, is_complete, is_sound, prepare_slot
from ota.agent.state import TRIAL_GOOD, TRIAL_LOADS, Home, State, Trial
from ota.agent.transport import Deadline, Transport, at_most, connect, download
from ota.agent.trust import Target, Trust
from ota.errors import (
    BaseError,
    DeltaError,
    DeviceError,
    GateError,
    OtaError,
    RepositoryError,
    RoomError,
    SoftwareError,
    StateError,
    own_errors,
)
from ota.manifest import MAX_MANIFEST, FileEntry

FETCH_SECONDS = 3600.0  # seconds that all downloads of one update may take; the next update resumes them

log = logging.getLogger(__name__)


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
    try:
        with own_errors():
            if not check_only:
                history.begin(home)
                reports.announce(home)
                trial.finish_probation(home, on_step or _silent)  # what an earlier call left on trial comes first
            config = home.config()
            with closing(connect(config.repository, config.authorities)) as transport:
                return _update(home, transport, on_step or _silent, check_only)
    except OtaError as error:
        if not check_only and not isinstance(error, GateError):  # the refusal is noted where it is made
            history.failed(home, error)
        raise


def _update(home: Home, transport: Transport, step: OnStep, check_only: bool) -> Outcome:
    step(1, "refresh metadata")
    trust = Trust(home, transport)
    state = home.load()
    damaged = state.active is not None and not is_sound(home, state.active)
    problem: OtaError | None = None
    if damaged and not check_only:
        try:
            _repair(home, trust, transport)
        except (RepositoryError, UnavailableError) as error:  # a newer release may still help
            log.warning("the running bundle is damaged and cannot be repaired: %s", error)
            problem = error
    step(2, "read the policy")
    plan, wanted = decide(home, trust)
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
    if resting := trial.resting(home, plan):
        if problem:
            raise problem
        return Outcome(damaged, state.active, resting, "full" if damaged else "", transport.received)
    way = "full"
    if is_complete(home, digest, plan):  # installed before, or interrupted after step 8
        way = "kept"
    else:
        step(3, "check the software, choose a way")
        _check_software()
        latest = at_most(FETCH_SECONDS)
        delta, overlays = find_delta(trust, state.active, plan), find_overlay_delta(trust, plan)
        home.collect_garbage({digest, *plan.manifest.objects, *(found.sha256 for found in (delta, overlays) if found)})
        if delta and state.active:
            try:
                _fetch_delta(home, transport, state.active, plan, delta, step, latest)
                way = "delta"
            except BaseError as error:
                log.warning("%s", error)
                reports.queue(home, "base_corrupt", state.active, str(error))
            except (DeltaError, DeviceError, RepositoryError, UnavailableError) as error:
                _give_way(home, delta, error, "the full bundle")
        if way == "full":
            _fetch_full(home, transport, plan, overlays, step, latest)

    step(9, "refresh again")
    fresh, wanted = decide(home, trust.again())
    if fresh is None or fresh.manifest != plan.manifest:
        return Outcome(False, state.active, f"stopped before the switch: {wanted.reason}", way, transport.received)

    step(10, "try it on this device")
    milliseconds = trial.try_counted(home, plan, state, transport.received)
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
    trial.finish_probation(home, step)
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
    bad = [entry for entry in slot.manifest.objects.values() if not file_is(slot, entry)]
    home.collect_garbage({entry.sha256 for entry in bad})
    check_room(home, missing(home, bad), slot.manifest.size)
    fetch_objects(home, transport, bad, at_most(FETCH_SECONDS))
    for entry in bad:
        verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
        home.disk.rename(f"incoming/{entry.sha256}", f"slots/{active}/{entry.sha256}")
    reports.queue(home, "base_corrupt", active, "it was fetched again", transport.received)
    reports.send(home)


# Steps 3 to 8


def _check_software() -> None:
    """Check that the software that tries bundles can be loaded and computes, before anything is fetched for it.

    Raises:
        SoftwareError: it cannot be loaded, or does not compute.
    """
    from ota.agent import child  # imported only where a process is started: a check that finds nothing new does not need it

    child.run("check")


def _fetch_delta(
    home: Home, transport: Transport, active: str, plan: Plan, delta: Target, step: OnStep, latest: Deadline
) -> None:
    part, fresh = f"incoming/{delta.sha256}", prepare_slot(home, plan)
    step(4, "check room")
    check_room(home, delta.size - have(home, delta.sha256) + plan.manifest.size, plan.manifest.size)
    step(5, f"download the delta, {delta.size:,} bytes")
    home.disk.make_folder("incoming")
    download(transport, delta.published_as, delta.size, home.disk, part, latest)
    step(6, "verify what was downloaded")
    verify(home, part, delta.size, delta.sha256)
    step(7, "apply into a new slot")
    _apply(home, plan, part, f"slots/{active}", active, fresh, plan.manifest.made)
    finish_slot(home, plan, fresh, step)


def _apply(home: Home, plan: Plan, part: str, base: str, base_digest: str, fresh: str, made: Sequence[FileEntry]) -> None:
    """Apply a delta that was downloaded to `part`, and remove it."""
    from ota.agent import child

    try:
        child.run(
            "apply", root=str(home.root), patch=part, base=base, base_digest=base_digest, slot=fresh,
            target_digest=plan.manifest.digest, files=[entry.model_dump(mode="json", exclude={"base", "weights"}) for entry in made],
        )  # fmt: skip
    finally:
        home.disk.remove(part)


def _give_way(home: Home, delta: Target, error: OtaError, instead: str) -> None:
    """Remove a delta that cannot be used, so that the update goes on with what it replaces; raise an error that would also end that."""
    if isinstance(error, (RoomError, StateError)) and not isinstance(error, SoftwareError):
        raise error
    log.warning("%s; fetching %s", error, instead)
    home.disk.remove(f"incoming/{delta.sha256}")


def _fetch_full(home: Home, transport: Transport, plan: Plan, overlays: Target | None, step: OnStep, latest: Deadline) -> None:
    """Fetch the files of a bundle that no slot holds; its overlays by the delta `overlays`, because they are not compressed."""
    fresh, entries = prepare_slot(home, plan), [*plan.manifest.objects.values()]
    kept = held(home, entries)
    thin = [entry for entry in entries if overlays and entry.role == "overlay"]
    if all(entry.sha256 in kept for entry in thin):
        thin, overlays = [], None
    copied = [entry for entry in entries if entry.sha256 in kept and entry not in thin]
    fetched = [entry for entry in entries if entry not in (*copied, *thin)]
    written = missing(home, fetched) + sum(entry.size for entry in (*copied, *thin)) + (overlays.size if overlays else 0)
    step(4, "check room")
    check_room(home, written, plan.manifest.size)
    step(5, f"download the full bundle, {sum(entry.size for entry in fetched) + (overlays.size if overlays else 0):,} bytes")
    fetched += [entry for entry in copied if not copy(home, kept[entry.sha256], f"{fresh}/{entry.sha256}", entry.sha256)]
    fetch_objects(home, transport, fetched, latest)
    if overlays:
        try:
            download(transport, overlays.published_as, overlays.size, home.disk, f"incoming/{overlays.sha256}", latest)
            verify(home, f"incoming/{overlays.sha256}", overlays.size, overlays.sha256)
        except (RepositoryError, UnavailableError) as error:
            _give_way(home, overlays, error, "the overlays as they are")
            fetch_objects(home, transport, thin, latest)
            overlays, fetched = None, [*fetched, *thin]
    step(6, "verify what was downloaded")
    for entry in fetched:
        verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
    step(7, "move into a new slot")
    for entry in fetched:
        home.disk.rename(f"incoming/{entry.sha256}", f"{fresh}/{entry.sha256}")
    if overlays:
        try:
            home.disk.replace(f"{fresh}/manifest.json", plan.manifest_bytes, durable=False)  # the slot is its own base
            _apply(home, plan, f"incoming/{overlays.sha256}", fresh, plan.manifest.digest, fresh, thin)
        except (DeltaError, DeviceError) as error:
            _give_way(home, overlays, error, "the overlays as they are")
            fetch_objects(home, transport, thin, latest)
            for entry in thin:
                verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
                home.disk.rename(f"incoming/{entry.sha256}", f"{fresh}/{entry.sha256}")
    finish_slot(home, plan, fresh, step)

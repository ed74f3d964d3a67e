"""The twelve steps of an update.

     1  refresh the metadata, check them against the durable high-water marks
     2  read the policy and decide
     3  check this device's software; choose the cheapest way: a delta from the running bundle, a chain of deltas, or the full bundle
     4  check that there is room on the disk
     5  download with resume, up to a deadline
     6  verify length and hash
     7  apply into a new slot, in a process with limits
     8  verify every file of the slot, read back from the disk
     9  refresh again, so that a halt takes effect before the switch
    10  try the bundle on this device, unless it has to wait; report that it is starting, and wait until the factory has kept that report
        where the policy says so, with step 9 again after each minute
    11  switch: replace the state file, the only commit point
    12  probation: the bundle is trusted after some good inferences; one that fails is rolled back and refused from then on

No step changes the running bundle, except for repairs: damaged files of it are fetched again before step 2 and renamed over
the damaged ones. A power failure may interrupt any step. The next update then starts from the beginning, resumes downloads and
reuses a finished slot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from ota import chain
from ota.agent import acknowledgement, history, reports, rules, trial
from ota.agent.acknowledgement import Patience
from ota.agent.network import UnavailableError
from ota.agent.plan import (
    FullWay,
    OnStep,
    Plan,
    check_room,
    copy,
    decide,
    fetch_objects,
    find_chain,
    find_overlay_delta,
    full_way,
    held,
    largest_between,
    missing,
    offered,
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

FETCH_SECONDS = (
    3600.0  # seconds that downloads may take, those of deltas and those of the full bundle; the next update resumes them
)
APPLY_SECONDS = 900.0  # seconds after which no further delta of an update is applied, and the full bundle is fetched
MAX_CHAINS = 3  # ways by deltas that one update tries before it fetches the full bundle
BETWEEN = (
    "slots/.0",
    "slots/.1",
)  # folders of what a chain makes on the way; the next agent removes what a killed one left there

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What an update did."""

    changed: bool
    active: str | None
    reason: str
    way: str = ""
    """full, delta, chain (of several deltas), kept (a complete slot was there already), or empty: nothing was fetched."""
    received: int = 0
    """Bytes fetched, including metadata."""


def update(
    home: Home, on_step: OnStep | None = None, check_only: bool = False, patience: Patience = Patience()  # noqa: B008 - frozen
) -> Outcome:  # fmt: skip
    """Bring the device to the release that its policy asks for.

    Args:
        home: the agent's directory, locked by the caller.
        on_step: called as each step begins.
        check_only: stop after step 2 and say what would be done.
        patience: how the update waits for the factory where the policy asks for an acknowledgement.

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
                return _update(home, transport, on_step or _silent, check_only, patience)
    except OtaError as error:
        if not check_only and not isinstance(error, GateError):  # the refusal is noted where it is made
            history.failed(home, error)
        raise


def _update(home: Home, transport: Transport, step: OnStep, check_only: bool, patience: Patience) -> Outcome:
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
    plan, wanted = decide(home, trust, check_only)
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
        way = _fetch(home, trust, transport, plan, step)

    step(9, "refresh again")
    trust = trust.again()
    fresh, stopped = _again(home, trust, plan)
    if fresh is None:
        return Outcome(False, state.active, stopped, way, transport.received)

    step(10, "try it on this device")
    state = home.load()  # step 9 may have met new keys of `models`
    milliseconds, stopped = _start(home, trust, plan, state, step, patience, transport)
    if stopped:
        return Outcome(False, state.active, stopped, way, transport.received)

    step(11, "switch")
    home.save(
        State(
            active=digest,
            previous=state.active,
            seq=plan.seq,
            previous_seq=state.seq,
            trial=Trial(left=TRIAL_GOOD, loads=TRIAL_LOADS),
            refused=state.refused,
            tries={digest: state.tries.get(digest, 0) + 1},
        )
    )
    reports.queue(home, "installed", digest, reason=way, received=transport.received, milliseconds=milliseconds)
    trial.finish_probation(home, step)
    reports.send(home)
    return Outcome(True, digest, f"release {plan.seq} is installed", way, transport.received)


def _start(
    home: Home, trust: Trust, plan: Plan, state: State, step: OnStep, patience: Patience, transport: Transport
) -> tuple[float, str]:
    """Take step 10: try the bundle and report that it starts; return the milliseconds of an image, and why it may not start, or "".

    Where the policy asks for an acknowledgement, the trial is not counted while the device waits, and is kept, so that neither a kill nor a
    gateway that is away is held against the bundle.
    """
    digest, received = plan.manifest.digest, transport.received
    before = acknowledgement.passed(home, plan, state)
    milliseconds = before.milliseconds if before else trial.try_counted(home, plan, state, received)
    if plan.acknowledge and not before:
        acknowledgement.keep(home, plan, state, milliseconds)
        home.save(state)
    if not (before and reports.fate(home, digest) in ("waiting", "accepted")):
        reports.queue(home, "starting", digest, received=received, milliseconds=milliseconds)

    def look() -> str | None:
        nonlocal trust
        step(9, "refresh again")
        trust = trust.again()
        fresh, why = _again(home, trust, plan)
        return why if fresh is None or fresh.acknowledge else None

    if plan.acknowledge:
        stopped = acknowledgement.wait(home, plan, look, patience)
    else:
        reports.send(home)
        stopped = ""
    if not stopped:
        acknowledgement.forget(home)
    return milliseconds, stopped


def _again(home: Home, trust: Trust, plan: Plan) -> tuple[Plan | None, str]:
    """Decide again, after a refresh; return the plan of the same bundle, or None and why the update stops."""
    fresh, wanted = decide(home, trust)
    if fresh is None or fresh.manifest != plan.manifest:
        return None, f"stopped before the switch: {wanted.reason}"
    return fresh, ""


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
    kept = held(home, bad)  # in the slot of the bundle before
    written = missing(home, [entry for entry in bad if entry.sha256 not in kept])
    written += sum(entry.size for entry in bad if entry.sha256 in kept)
    try:
        check_room(home, written, slot.manifest.size)
    except RoomError:
        # Not before: this removes downloads of an update, too, which would have to be fetched again.
        home.collect_garbage({entry.sha256 for entry in bad})
        check_room(home, written, slot.manifest.size)
    home.disk.make_folder("incoming")
    for sha256, names in kept.items():
        copy(home, names, f"incoming/{sha256}", sha256)
    _fetch_checked(home, transport, bad, at_most(FETCH_SECONDS))
    for entry in bad:
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


def _fetch(home: Home, trust: Trust, transport: Transport, plan: Plan, step: OnStep) -> str:
    """Take steps 3 to 8: make the slot by the cheapest way or, where that way is blocked, by another one; return the way taken."""
    latest, active, digest = at_most(FETCH_SECONDS), home.load().active, plan.manifest.digest
    offers = offered(trust, active, plan)
    overlays = find_overlay_delta(offers, plan)
    home.collect_garbage({digest, *plan.manifest.objects, *(delta.sha256 for delta in offers)})
    full = full_way(home, plan, overlays).size
    way = _by_deltas(home, transport, active, plan, offers, full, step, latest) if active else None
    for delta in offers:
        if delta != overlays or way:
            home.disk.remove(f"incoming/{delta.sha256}")
    if way is None:  # it gets all the time that there is: deltas that serve for nothing must not use it up
        _fetch_full(home, transport, plan, overlays, step, at_most(FETCH_SECONDS))
    return way or "full"


def _by_deltas(
    home: Home, transport: Transport, active: str, plan: Plan, offers: Sequence[Target], full: int, step: OnStep, latest: Deadline
) -> str | None:  # fmt: skip
    """Make the slot by the cheapest deltas; return the way taken, or None: no deltas serve.

    The cheapest way without a useless delta is tried next; what was fetched for the one before serves again. Useless deltas cost no
    more than the full bundle.
    """
    left, most, before, until = list(offers), chain.MOST, transport.received, at_most(APPLY_SECONDS)
    for number in range(MAX_CHAINS):
        if number and time.monotonic() > until():
            break
        deltas = find_chain(home, left, active, plan, full - (transport.received - before), most)
        if not deltas:
            break
        try:
            useless = _fetch_deltas(home, transport, active, plan, deltas, step, latest, until)
        except BaseError as error:
            log.warning("%s", error)
            reports.queue(home, "base_corrupt", active, str(error))
            break
        except SoftwareError as error:
            log.warning("%s; fetching the full bundle", error)
            break
        except RoomError as error:
            if len(deltas) == 1:  # without the delta, the full bundle may find room, and says what is missing if it does not
                log.warning("%s; fetching the full bundle", error)
                break
            log.warning("%s; looking for a way that takes less", error)
            most = 1
        else:
            if useless is None:
                return "delta" if len(deltas) == 1 else "chain"
            left.remove(useless)
    return None


def _fetch_deltas(
    home: Home, transport: Transport, active: str, plan: Plan, deltas: Sequence[Target], step: OnStep, latest: Deadline, until: Deadline
) -> Target | None:  # fmt: skip
    """Make the slot by one delta, or by a chain of them; return the delta that does not serve, or None: the slot is made."""
    fresh, count, limit = prepare_slot(home, plan), len(deltas), largest_between(home, active, plan)
    fetched = missing(home, deltas)
    step(4, "check room")
    check_room(home, fetched + rules.chain_needs(count, limit, plan.manifest.size), plan.manifest.size)
    step(5, f"download {'the delta' if count == 1 else f'{count} deltas'}, {fetched:,} bytes")
    home.disk.make_folder("incoming")
    useless = _first_useless(
        home, deltas, lambda d: download(transport, d.published_as, d.size, home.disk, f"incoming/{d.sha256}", latest)
    )
    if useless is None:
        step(6, "verify what was downloaded")
        useless = _first_useless(home, deltas, lambda d: verify(home, f"incoming/{d.sha256}", d.size, d.sha256))
    if useless is None:
        step(7, "apply into a new slot")
        useless = _apply_chain(home, plan, deltas, active, fresh, limit, until)
    if useless is None:
        useless = _first_useless(home, deltas[-1:], lambda _: finish_slot(home, plan, fresh, step))
    return useless


def _apply_chain(
    home: Home, plan: Plan, deltas: Sequence[Target], active: str, fresh: str, limit: int, until: Deadline
) -> Target | None:
    """Apply deltas, each to what the one before made; return the one that does not serve, or None: `fresh` holds the new files.

    What a delta makes on the way is no bundle: no state names it, and it is never run, so no refusal concerns it. It lies in a folder
    of its own until the next delta is applied. A power cut leaves nothing of it: the next update begins again with the first delta, all of
    which are still here.
    """
    base, digest = f"slots/{active}", active

    def apply(delta: Target) -> None:
        nonlocal base, digest
        if delta != deltas[0] and time.monotonic() > until():
            raise DeltaError(f"the deltas before {delta.name[:80]} took more than {APPLY_SECONDS:.0f} s to apply")
        part = f"incoming/{delta.sha256}"
        if delta == deltas[-1]:
            _apply(home, part, base, digest, fresh, **_signed(plan, plan.manifest.made))
            return
        made = BETWEEN[base == BETWEEN[0]]
        home.disk.make_folder(made, durable=False)
        digest = _apply(home, part, base, digest, made, limit=limit)
        if base in BETWEEN:
            home.disk.remove(base)
        base = made

    try:
        return _first_useless(home, deltas, apply)
    finally:
        for folder in BETWEEN:
            home.disk.remove(folder)


def _first_useless(home: Home, deltas: Iterable[Target], work: Callable[[Target], None]) -> Target | None:
    """Do something with one delta after the other; return the first that does not serve, which is removed, or None.

    Raises:
        BaseError: what runs is damaged, so no delta serves.
        SoftwareError: this device's software is, so no delta serves.
        DeviceError: another fault of this device, which would also end what replaces the delta.
    """
    for delta in deltas:
        try:
            work(delta)
        except (BaseError, SoftwareError):
            raise
        except (DeltaError, DeviceError, RepositoryError, UnavailableError) as error:
            _give_way(home, delta, error, "what replaces it")
            return delta
    return None


def _apply(home: Home, part: str, base: str, base_digest: str, made: str, **request: Any) -> str:
    """Apply the delta `part` to the folder `base`, and return the hash of the manifest that its result has.

    Args:
        home: the agent's directory.
        part: the delta.
        base: folder that it starts from.
        base_digest: hash of the manifest of what is there.
        made: folder to write to.
        request: what the delta may make, see `child.apply`.

    Raises:
        BaseError: the running bundle is not as it was installed.
        DeltaError: the delta does not make what is signed, or does not fit to the one before.
        DeviceError: this device could not apply it.
    """
    from ota.agent import child

    try:
        answer = child.run("apply", root=str(home.root), patch=part, base=base, base_digest=base_digest, slot=made, **request)
    except BaseError as error:
        if base in BETWEEN:
            raise DeltaError(str(error)) from error
        raise
    return str(answer["target"])


def _signed(plan: Plan, made: Sequence[FileEntry]) -> dict[str, Any]:
    """Return what a delta to the bundle may make: exactly these of its files."""
    files = [entry.model_dump(mode="json", exclude={"base", "weights"}) for entry in made]
    return {"target_digest": plan.manifest.digest, "files": files}


def _give_way(home: Home, delta: Target, error: OtaError, instead: str) -> None:
    """Remove a delta that cannot be used, so that the update goes on with what it replaces; raise an error that would also end that."""
    if isinstance(error, (RoomError, StateError)) and not isinstance(error, SoftwareError):
        raise error
    log.warning("%s; fetching %s", error, instead)
    home.disk.remove(f"incoming/{delta.sha256}")


def _fetch_full(home: Home, transport: Transport, plan: Plan, overlays: Target | None, step: OnStep, latest: Deadline) -> None:
    """Fetch the files of a bundle that no slot holds; its overlays by the delta `overlays`, because they are not compressed.

    All downloads come first and stay in `incoming` until all are here, so whatever ends this call, the next one goes on where it ended.
    """
    fresh, way = prepare_slot(home, plan), full_way(home, plan, overlays)
    overlays, fetched = way.overlays, [*way.fetched]
    copied = [entry for sha256, entry in plan.manifest.objects.items() if sha256 in way.kept and entry not in way.made]
    step(4, "check room")
    check_room(home, way.size + sum(entry.size for entry in (*copied, *way.made)), plan.manifest.size)
    step(5, f"download the full bundle, {way.size:,} bytes")
    fetch_objects(home, transport, fetched, latest)
    if overlays:
        try:
            download(transport, overlays.published_as, overlays.size, home.disk, f"incoming/{overlays.sha256}", latest)
            verify(home, f"incoming/{overlays.sha256}", overlays.size, overlays.sha256)
        except (RepositoryError, UnavailableError) as error:
            _give_way(home, overlays, error, "the overlays as they are")
            lacking = [entry for entry in way.made if entry.sha256 not in way.kept]
            fetch_objects(home, transport, lacking, latest)
            overlays, fetched = None, [*fetched, *lacking]
            copied += [entry for entry in way.made if entry not in lacking]
    step(6, "verify what was downloaded")
    for entry in fetched:
        verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)
    step(7, "move into a new slot")
    damaged = [entry for entry in copied if not copy(home, way.kept[entry.sha256], f"{fresh}/{entry.sha256}", entry.sha256)]
    _fetch_checked(home, transport, damaged, latest)  # since `full_way` looked
    fetched += damaged
    try:
        for entry in fetched:
            home.disk.rename(f"incoming/{entry.sha256}", f"{fresh}/{entry.sha256}")
        if overlays:
            fetched += _make_overlays(home, transport, plan, overlays, way, fresh, latest)
        finish_slot(home, plan, fresh, step)
        if overlays:
            home.disk.remove(f"incoming/{overlays.sha256}")
    except OtaError:  # such as too little memory for a process, which is no reason to fetch everything again
        with suppress(OtaError):
            for entry in fetched:
                if home.disk.path(f"{fresh}/{entry.sha256}").is_file():
                    home.disk.rename(f"{fresh}/{entry.sha256}", f"incoming/{entry.sha256}")
        raise


def _make_overlays(
    home: Home, transport: Transport, plan: Plan, overlays: Target, way: FullWay, fresh: str, latest: Deadline
) -> Sequence[FileEntry]:
    """Make overlays by a delta from the weights in the new slot; return those that were fetched as they are because it does not serve."""
    try:
        home.disk.replace(f"{fresh}/manifest.json", plan.manifest_bytes, durable=False)  # the slot is its own base
        _apply(home, f"incoming/{overlays.sha256}", fresh, plan.manifest.digest, fresh, **_signed(plan, way.made))
    except (DeltaError, DeviceError) as error:
        _give_way(home, overlays, error, "the overlays as they are")
        lacking = [
            entry for entry in way.made if not copy(home, way.kept.get(entry.sha256, ()), f"{fresh}/{entry.sha256}", entry.sha256)
        ]
        _fetch_checked(home, transport, lacking, latest)
        for entry in lacking:
            home.disk.rename(f"incoming/{entry.sha256}", f"{fresh}/{entry.sha256}")
        return lacking
    return ()


def _fetch_checked(home: Home, transport: Transport, entries: Sequence[FileEntry], latest: Deadline) -> None:
    """Download files of a bundle into `incoming`, and check them against their signed lengths and hashes."""
    fetch_objects(home, transport, entries, latest)
    for entry in entries:
        verify(home, f"incoming/{entry.sha256}", entry.size, entry.sha256)

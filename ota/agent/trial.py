"""Trials: a new bundle is tried in a child before the switch, and after it is on probation until enough images are good.

A trial that may crash the machine is counted beforehand, and a bundle whose trials give no result has to wait. A bundle that fails
is compared with the one that runs: if that one fails too, the device is to blame. Otherwise the bundle is refused or rolled back.
"""

from __future__ import annotations

import base64
import time
from typing import Any, NoReturn

from ota import fitness
from ota.agent import counts, history, measured, reports, rules, variants
from ota.agent.plan import OnStep, Plan
from ota.agent.rules import MAX_TRIES
from ota.agent.slots import in_variant, is_sound
from ota.agent.state import Home, Rest, State
from ota.durations import spoken, until
from ota.errors import (
    AgentError,
    BaseError,
    DeviceError,
    DiedError,
    GateError,
    LateError,
    ManifestError,
    OperatorError,
    RoomError,
    StateError,
    UnfinishedError,
)
from ota.manifest import Manifest, Reference, VariantName

Drawn = tuple[bytes, dict[str, Any]]
"""PNG bytes, and the answer of the child that drew it."""


# Before the switch


def resting(home: Home, plan: Plan) -> str:
    """Say why the bundle has to wait because earlier trials gave no result; return an empty string if it may be tried now.

    A new wait is reported to the factory.
    """
    digest, now = plan.manifest.digest, int(time.time())
    tries, rest = home.load().tries.get(digest, 0), home.rest()
    length = max(rules.rest(tries), rules.FIRST_REST)
    if rest is None or (rest.bundle, rest.tries) != (digest, tries):
        if tries < MAX_TRIES:
            return ""
        told = (
            f"it is not refused but waits, because its trial started {tries} times and never finished; it is tried again "
            f"in {spoken(length)}"
        )
        reports.queue(home, "refused", digest, told)
        reports.send(home)
        rest = _rest(home, digest, tries, now + length)
    if rest.until > now + length:  # the clock was set back
        rest = _rest(home, digest, tries, now + length)
    if rest.until <= now:
        return ""
    why = f"its trial started {tries} times and never finished" if tries >= MAX_TRIES else "its trial did not finish in time"
    return (
        f"release {plan.seq} waits until {until(rest.until, now)}, {why}; give this device what it "
        f"lacks, then run `ferry-agent forget {digest[:12]}` to try the release at once"
    )


def _rest(home: Home, digest: str, tries: int, until: int) -> Rest:
    rest = Rest(bundle=digest, tries=tries, until=until)
    home.disk.replace("resting.json", rest.canonical())
    return rest


def try_counted(home: Home, plan: Plan, state: State, received: int) -> float:
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
            running = _running_reference(home, state, variant) if fitness.is_compared(state.seq, floor) else None
            answer = child.run("try", slot=str(slot.folder), digest=slot.digest, variant=variant)
            trying = _trying(answer)
            reasons = fitness.judge(trying, slot.reference(variant), running, manifest.digest, state.active or "")
            if not reasons and (why := fitness.hurried(trying, slot.reference(variant))):
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


def _trying(answer: dict[str, Any]) -> fitness.TrialResult:
    return fitness.TrialResult(
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
        slot, same, reference = in_variant(home, trusted, variant)
    except (StateError, BaseError, ManifestError):
        return  # it is damaged, so it proves nothing about this device
    try:
        answer = child.run("try", slot=str(slot.folder), digest=trusted, variant=same, trusted=True)
        theirs = fitness.judge(_trying(answer), reference, None) or [fitness.hurried(_trying(answer), reference)]
    except (RoomError, AgentError, UnfinishedError, DiedError):
        raise
    except (StateError, BaseError):
        return
    except (DeviceError, ManifestError) as error:
        theirs = [str(error)]
    if any(theirs):
        raise UnfinishedError(
            f"the bundle did not pass its trial ({why}), but the running bundle does not pass here any more either "
            f"({'; '.join(theirs)}); check this "
            "device's ONNX Runtime, memory and load"
        )


def _running_reference(home: Home, state: State, variant: VariantName) -> Reference | None:
    """Return the running bundle's reference for the given variant or its default one; None if it cannot be read."""
    if state.active is None:
        return None
    try:
        return in_variant(home, state.active, variant)[2]
    except (StateError, BaseError, ManifestError):
        return None  # the running bundle is damaged, which must not keep the new one out


def _refuse(home: Home, digest: str, why: str, state: State, received: int) -> NoReturn:
    """Record that this device refuses a bundle from now on, remove its slot, report the refusal, and raise GateError."""
    home.save(state.model_copy(update={"refused": state.refusing(digest, why), "tries": {}}))
    home.disk.remove(f"slots/{digest}")
    reports.queue(home, "refused", digest, why, received)
    reports.send(home)
    now = "the running bundle is kept" if state.active else "nothing runs yet"
    raise GateError(f"the bundle failed its trial and is refused: {why}; {now}, and {rules.lifting(digest)}")


# Probation


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
        generate_on_trial(home, state, "", seed, None)
        seed += 1


def generate_on_trial(
    home: Home, state: State, caption: str, seed: int, variant: VariantName | None, trace: bool = False
) -> Drawn:
    """Draw with the bundle on trial; the caller holds the lock.

    Each load is counted before it happens, so that a bundle that kills the machine is rolled back in the end.
    """
    active, trial = state.active, state.trial
    if active is None or trial is None:
        raise StateError(f"nothing is on trial in {home.root}; run `ferry-agent update`")
    if trial.loads == 0:  # it may kill the machine, so it has to wait before it is tried again
        tried = state.model_copy(update={"tries": {active: max(MAX_TRIES, state.tries.get(active, 0))}})
        _take_back(home, tried, active, "it did not pass its trial", refuse=False)
    counted = state.model_copy(update={"trial": trial.model_copy(update={"loads": trial.loads - 1})})
    home.save(counted)
    try:
        drawn = draw(home, active, caption, seed, choices(home, active, variant)[0], on_trial=True, trace=trace)
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


def choices(home: Home, digest: str, wanted: VariantName | None) -> list[VariantName]:
    """List the variants of a bundle in the order in which to try them."""
    manifest = home.slot(digest).manifest
    if wanted and wanted not in manifest.variants:
        raise OperatorError(f"this bundle has no variant {wanted}; choose one of {', '.join(manifest.variants)}")
    if wanted:
        return [wanted]
    return variants.chain(manifest.variants, manifest.default_variant, measured.read(home, digest), home.config())


def draw(home: Home, digest: str, caption: str, seed: int, variant: VariantName, **how: bool) -> Drawn:
    """Draw one image with one variant of a bundle, in a child.

    Raises:
        DeviceError: the image is constant or not finite.
        OtaError: the child drew none; see `child.run`.
    """
    from ota.agent import child

    slot = home.slot(digest)
    answer = child.run("generate", slot=str(slot.folder), digest=digest, variant=variant, caption=caption, seed=seed, **how)
    if not answer["good"]:
        counting = counts.Counting(home)
        counting.missed(digest, "not_finite")
        counting.store()
        raise DeviceError("it made an image that is constant or not finite")
    return base64.b64decode(answer["png"]), answer | {"bundle": digest, "variant": variant}


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
    now = "the previous bundle runs again" if state.previous else "no bundle is left, so run `ferry-agent update`"
    if not refuse:
        raise StateError(f"the bundle on trial was rolled back and will be tried again: {why}; {now}")
    raise GateError(f"the bundle on trial was rolled back: {why}; {now}; {rules.lifting(failed)}")


# By hand


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
            "no earlier bundle is kept; `ferry-agent status` lists what was refused, and `ferry-agent forget HASH` lets the "
            "next update "
            "have it again"
        )
    home.slot(state.previous)
    if not is_sound(home, state.previous):
        raise StateError(
            f"the previous bundle, {state.previous[:12]}, is damaged, so the present one is kept; publish another release"
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
    history.note(home, "forgotten", digest, "by the operator")
    return digest

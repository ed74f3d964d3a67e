"""Drawing an image for somebody who asks, with the first installed bundle and variant that can.

It needs no lock unless a bundle is on trial, so a running update does not stop it.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from ota.agent import counts, rules, trial
from ota.agent.state import Home
from ota.errors import (
    BaseError,
    DeviceError,
    DiedError,
    ManifestError,
    OperatorError,
    OtaError,
    RoomError,
    StateError,
    UnfinishedError,
)
from ota.manifest import VariantName

TRIAL_WAIT = 5.0  # seconds that an image waits for a running update, before the previous bundle draws it

log = logging.getLogger(__name__)


def generate(home: Home, caption: str, seed: int, variant: VariantName | None = None, trace: bool = False) -> trial.Drawn:
    """Draw one image with the running bundle, whatever else the agent is doing; the caller does not hold the lock.

    If a variant does not draw, the next one does, unless the caller chose the variant. The previous bundle draws if no variant
    of the running bundle does. It also draws if the running bundle is on trial and its loads cannot be counted, because an
    update is running or the disk is full. With `trace`, the answer also has the load of the experts at each step.

    Raises:
        StateError: nothing is installed.
        BaseError: what is installed is damaged.
        DeviceError, ManifestError: no installed bundle draws this.
        OperatorError: the caption or seed cannot be drawn, or there is no such variant.
        GateError: the bundle on trial failed and was rolled back; ask again.
    """
    home.config()  # raises an error if this is no agent's directory
    counting = counts.Counting(home)
    try:
        drawn = _generate(home, caption, seed, variant, trace)
    except OperatorError:
        counting.missed(home.load().active, "refused")
        raise
    except (DeviceError, ManifestError):
        counting.missed(home.load().active, "failed")
        raise
    else:
        with suppress(OtaError):  # the image is there; its count may lack what cannot be read
            how = drawn[1]
            slot = home.slot(how["bundle"])
            references = {name: slot.reference(name) for name in {how["variant"]: None, slot.manifest.default_variant: None}}
            counting.drew(how["bundle"], how["variant"], caption, how, references)
        return drawn
    finally:
        counting.store()


def _generate(home: Home, caption: str, seed: int, variant: VariantName | None, trace: bool) -> trial.Drawn:
    rules.check_request(caption, seed)
    problem: OtaError = StateError(f"no bundle is installed in {home.root}; run `ferry-agent update`")
    if home.load().trial is not None:
        try:
            with home.locked(TRIAL_WAIT):
                state = home.load()
                if state.trial is not None:
                    return trial.generate_on_trial(home, state, caption, seed, variant, trace)
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
                left[digest] = trial.choices(home, digest, variant)
                return _draw_first(home, digest, caption, seed, left[digest], trace)
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
                    return _draw_first(home, digest, caption, seed, choices, trace)
                except (DeviceError, ManifestError) as error:
                    problem = error
        before = state
    raise problem


def _draw_first(home: Home, digest: str, caption: str, seed: int, choices: list[VariantName], trace: bool) -> trial.Drawn:
    """Draw with the first variant that can; remove from the list those that were tried.

    Raises:
        UnfinishedError: a variant was stopped for its time or memory; those after it stay in the list.
        DeviceError, ManifestError: no variant can draw.
    """
    while True:
        variant = choices.pop(0)
        try:
            return trial.draw(home, digest, caption, seed, variant, trace=trace)
        except (RoomError, UnfinishedError):
            raise
        except (DeviceError, ManifestError) as error:
            if not choices:
                raise
            log.warning("variant %s: %s; the next one draws", variant, error)

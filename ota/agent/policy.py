"""Whether policy 2 lets this device in, and when it begins, without I/O. `rules.want` decides by the waves of policy 1.

The order is: never, only, halt, refusals (which `retry` lifts), first, limit, not_before and until, spread, and the maintenance window.
A device that cannot be heard is let in by the waves of policy 1 alone, but whom policy 2 bars stays out.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import ota
from ota.agent import rules
from ota.agent.rules import Wanted
from ota.agent.state import Config, State
from ota.durations import until
from ota.errors import AgentError, ManifestError, TrustError
from ota.policy import BUCKETS, FEATURES, Policy2

GONE = (
    "the rollout policy that this device obeyed is no longer published, which counts as a halt; the running model is kept, and the "
    "factory must publish the policy again"
)


def check(policy: Policy2, config: Config, highest: int) -> None:
    """Refuse a policy that this device must not obey.

    Args:
        policy: the policy; its signature and expiry were checked.
        config: the device's configuration.
        highest: number of the newest policy that this device obeyed, as far as that binds; 0: none.

    Raises:
        AgentError: it requires what this agent does not know.
        ManifestError: it is for another line or class.
        TrustError: this device has obeyed a newer one.
    """
    if unknown := [name for name in policy.requires if name not in FEATURES]:
        raise AgentError(f"the policy requires {', '.join(unknown)}, but this is {ota.__version__}; update the agent first")
    if (policy.line, policy.device_class) != (config.line, config.device_class):
        raise ManifestError(f"the policy is for {policy.line}/{policy.device_class}, not for this device")
    if policy.policy < highest:
        raise TrustError(
            f"the repository offers policy {policy.policy}, this device has obeyed {highest}; this is an old copy or an attack, and "
            "nothing is installed"
        )


def bucket(device: str, salt: str) -> int:
    """Compute a device's bucket under policy 2, from 0 to 2^32 - 1; every machine computes the same number."""
    return _hashed(salt, device)


def delay(device: str, salt: str, spread: int) -> int:
    """Return the seconds by which a device begins later than the first that were let in with it, less than `spread`."""
    return spread * _hashed(salt, f"spread {device}") // BUCKETS  # no id holds a blank, so no device's bucket is computed so


def _hashed(salt: str, text: str) -> int:
    return int.from_bytes(hmac.new(salt.encode(), text.encode(), hashlib.sha256).digest()[:4], "big")


def unheard(config: Config, acknowledge: bool) -> str:
    """Say why the factory cannot watch this device, so that only the waves of policy 1 let it in; empty: it can.

    Args:
        config: the device's configuration.
        acknowledge: whether the policy asks for an acknowledgement, which counts only over TLS.
    """
    if not config.reports:
        return "this device has no place for reports"
    if not acknowledge or config.reports.lower().startswith("https://"):
        return ""
    way = "go over plain http" if config.reports.lower().startswith("http://") else "are left in a folder"
    return f"the policy asks that the factory acknowledges the start, and reports of this device {way}, where no answer can be trusted"


def barred(policy: Policy2, config: Config) -> str:
    """Say why a device may not install the release whatever its bucket is; empty: it may."""
    if found := _named(policy.never, config):
        return f"release {policy.seq} is not meant for {found}"
    if policy.only and not _named(policy.only, config):
        return f"release {policy.seq} is meant for other devices only"
    return f"release {policy.seq} is halted" if policy.halt else ""


def ended(policy: Policy2, now: int) -> str:
    """Say that the rollout has ended; empty: it has not."""
    return f"release {policy.seq} could be installed until {until(policy.until, now)}" if 0 < policy.until <= now else ""


def _named(names: Sequence[str], config: Config) -> str:
    """Return the id or the tag of a device that a list holds; empty: it holds none."""
    return next((name for name in (config.device, *config.tags) if name in names), "")


def admit(policy: Policy2, config: Config, state: State, revertible: bool, now: int) -> Wanted:
    """Decide whether policy 2 lets this device in; `begins` says whether it begins now.

    Args:
        policy: the policy, after `check`.
        config: the device's configuration.
        state: the device's state; the refusals that `retry` lifts are no longer in it.
        revertible: whether `models` marks the named release as one that devices may go back to.
        now: seconds since 1970.

    Raises:
        TrustError: the policy names an older release without calling it a revert, or one that devices may not go back to.
    """
    if policy.manifest == state.active:
        return Wanted(False, f"release {policy.seq} is installed", settled=True)
    if why := barred(policy, config):
        return Wanted(False, why, settled=True)
    if why := rules.refused(policy.seq, policy.manifest, state):
        return Wanted(False, why, settled=True)
    rules.check_direction(policy, state, revertible)
    mine = bucket(config.device, policy.salt)
    if mine >= policy.limit and not _named(policy.first, config):
        return Wanted(False, f"release {policy.seq} is not open to this device yet (bucket {mine} of {BUCKETS})")
    if policy.not_before > now:
        return Wanted(False, f"release {policy.seq} opens for this device at {until(policy.not_before, now)}")
    if why := ended(policy, now):
        return Wanted(False, why)
    return Wanted(True, f"release {policy.seq} is open to this device", let_in=True)


def begins(policy: Policy2, config: Config, since: int, now: int) -> Wanted:
    """Decide whether a device that is let in begins now.

    Args:
        policy: the policy.
        config: the device's configuration.
        since: when this device first found itself let in, in seconds since 1970.
        now: seconds since 1970.
    """
    start = since + delay(config.device, policy.salt, policy.spread)
    if start > now:
        why = f"release {policy.seq} begins on this device at {until(start, now)}, because devices begin one after the other"
        return Wanted(False, why, let_in=True)
    if why := rules.outside_window(policy.seq, config, now):
        return Wanted(False, why, let_in=True)
    return Wanted(True, f"release {policy.seq} is open to this device", let_in=True)

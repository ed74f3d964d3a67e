"""The agent's decisions about updates, without I/O: what to install, and when. `ota.fitness` decides whether a bundle is fit to run."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ota.agent import clock, window
from ota.agent.state import Config, HighWater, Rest, State
from ota.durations import until
from ota.errors import AgentError, ManifestError, OperatorError, TrustError
from ota.manifest import MAX_COUNT, Manifest, as_numbers
from ota.policy import Policy, Policy2

BUCKETS = 10_000
POLICY, RETRY = "policy", "retry"
"""High-water marks beside those of the roles: the highest numbers of policy 2 that this device obeyed."""
SEEDS = 2**128  # number of seeds: all keys that Philox accepts
MAX_TRIES = 3  # trials of a bundle in a row that may begin and give no result before the bundle has to wait
FIRST_REST = 3600  # seconds that a bundle waits; each wait is twice as long as the one before
LONGEST_REST = 7 * 86_400
LEAST_IMAGES = 20  # of a benchmark; fewer give no 95th percentile
MOST_IMAGES = 10_000


@dataclass(frozen=True)
class Wanted:
    """What the policy asks of this device now."""

    install: bool
    reason: str
    settled: bool = False
    """Whether the named bundle is installed, refused or halted, so that what was fetched of it can be removed."""
    let_in: bool = False
    """Whether the release is open to this device, though it may wait for its hour."""


def bucket(device: str, salt: str) -> int:
    """Compute a device's bucket, 0 to 9999, from its id and a release's salt; every machine computes the same number."""
    digest = hmac.new(salt.encode(), device.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def check_clock(now: int, floor: int) -> None:
    """Refuse a clock that is behind the latest time that was signed, because expired metadata would look fresh.

    Raises:
        TrustError: the clock is behind by more than `clock.SLACK`.
    """
    if now < floor - clock.SLACK:
        raise TrustError(
            f"the clock is {(floor - now) // 3600} hours behind the last time seen; set the clock; until then the running "
            "model is kept"
        )


@dataclass(frozen=True)
class Trusted:
    """The keys of a role, as the root or targets metadata that this device accepted name them."""

    keys: frozenset[str]
    """Ids of the keys."""
    threshold: int


def kind(role: str) -> str:
    """Return the role that all classes share and whose keys this role has: `models` for `models.LINE.CLASS`."""
    return role.partition(".")[0]


def inherited(marks: HighWater, roles: Iterable[str]) -> HighWater:
    """Return the marks with those of a class's own roles, which begin as the marks of the roles that all classes share.

    Without this, a device whose class was moved would take anything as the first version, and would not notice that keys were replaced
    meanwhile.
    """
    new = {role: kind(role) for role in roles if role not in marks.versions and kind(role) in marks.versions}
    return marks.model_copy(
        update={
            "versions": marks.versions | {role: marks.versions[shared] for role, shared in new.items()},
            "keys": marks.keys | {role: marks.keys[shared] for role, shared in new.items() if shared in marks.keys},
        }
    )


def binding(marks: HighWater, trusted: Mapping[str, Trusted]) -> dict[str, int]:
    """Return the high-water marks that bind under the keys that the roles have now.

    A mark no longer binds once fewer than `threshold` of its signing keys are still trusted. Nothing that these keys signed
    can then pass, so an old version cannot be replayed; and a thief of the keys may have raised the mark beyond all other
    numbers. Only a newer root, or newer targets, signed by the offline keys, can cause this. The mark of the root itself
    always binds, and so do the marks of roles that are not in `trusted` or whose signing keys are not known.
    """
    return {
        role: version
        for role, version in marks.versions.items()
        if role not in trusted
        or role not in marks.keys
        or len(trusted[role].keys.intersection(marks.keys[role])) >= trusted[role].threshold
    }


def check_floor(seq: int | None, floor: int) -> None:
    """Refuse a release below the floor of its line and class; `models` signs the floor beside the release's number.

    Args:
        seq: the release's number; None if it has none, and then no policy can name it either.
        floor: the lowest release number that may be installed.

    Raises:
        TrustError: the release is below the floor.
    """
    if seq is not None and seq < floor:
        raise TrustError(f"release {seq} is below the floor, {floor}; devices may no longer install it or go back to it")


def check_versions(found: Mapping[str, int], marks: Mapping[str, int]) -> None:
    """Refuse metadata that are older than what this device accepted before, even if its cache was lost.

    Args:
        found: versions by role.
        marks: the high-water marks that bind, by role.

    Raises:
        TrustError: a role's version went back, or is above `MAX_COUNT`, which no factory ever reaches and no device can store.
    """
    for role, version in sorted(found.items()):
        if version > MAX_COUNT:
            raise TrustError(
                f"the repository offers a version of {role} beyond {MAX_COUNT}; this is an attack, and nothing is installed"
            )
        if version < marks.get(role, 0):
            raise TrustError(
                f"the repository offers version {version} of {role}, this device has seen {marks[role]}; this is an old copy "
                "or an attack, and nothing is installed"
            )


def want(policy: Policy, config: Config, state: State, revertible: bool, now: int) -> Wanted:
    """Decide what a policy asks of this device.

    Args:
        policy: the policy; its signature and expiry were checked.
        config: the device's configuration.
        state: the device's state.
        revertible: whether `models` marks the named release as one that devices may go back to.
        now: seconds since 1970.

    Raises:
        ManifestError: the policy is for another line or class.
        TrustError: the policy names an older release without calling it a revert, or one that devices may not go back to.
    """
    if (policy.line, policy.device_class) != (config.line, config.device_class):
        raise ManifestError(f"the policy is for {policy.line}/{policy.device_class}, not for this device")
    if policy.manifest == state.active:
        return Wanted(False, f"release {policy.seq} is installed", settled=True)
    if why := refused(policy.seq, policy.manifest, state):
        return Wanted(False, why, settled=True)
    if policy.halt:
        return Wanted(False, f"release {policy.seq} is halted", settled=True)
    check_direction(policy, state, revertible)
    mine = bucket(config.device, policy.salt)
    opening = [wave.not_before for wave in policy.waves if mine < wave.bps]
    if not opening:
        return Wanted(False, f"release {policy.seq} is not meant for this device yet (bucket {mine})")
    if min(opening) > now:
        return Wanted(False, f"release {policy.seq} opens for this device at {until(min(opening), now)}")
    if why := outside_window(policy.seq, config, now):
        return Wanted(False, why, let_in=True)
    return Wanted(True, f"release {policy.seq} is open to this device", let_in=True)


def refused(seq: int, digest: str, state: State) -> str:
    """Say that this device refused a bundle before, why, and how to lift that; empty: it did not."""
    if digest not in state.refused:
        return ""
    return f"release {seq} was refused before: {state.refused[digest]}; {lifting(digest)}"


def check_direction(policy: Policy | Policy2, state: State, revertible: bool) -> None:
    """Refuse to go back to an older release, unless both the policy and `models` say that devices may.

    Raises:
        TrustError: the policy names an older release without calling it a revert, or one that devices may not go back to.
    """
    if policy.seq < state.seq:
        if not policy.revert:
            raise TrustError(f"the policy names release {policy.seq}, older than {state.seq}, but does not mark it as a revert")
        if not revertible:
            raise TrustError(f"the policy goes back to release {policy.seq}, which is not marked as revertible")


def outside_window(seq: int, config: Config, now: int) -> str:
    """Say that a release waits for the device's maintenance window; empty: it need not."""
    if problem := window.problem(config.window):
        return f"release {seq} waits for the maintenance window, but {problem}, with `ferry-agent init`"
    if config.window and not in_window(config.window, now):
        return f"release {seq} waits for the maintenance window {window.shown(config.window, now)}"
    return ""


def lifting(digest: str) -> str:
    """Say how to lift a refusal."""
    return f"`ferry-agent forget {digest[:12]}` lifts this"


def resting(found: Rest) -> str:
    """Say until when a bundle waits for its next trial, and how to end the wait."""
    until = datetime.fromtimestamp(found.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{found.bundle[:12]} is tried again after {until}, because its trial never finished; `ferry-agent forget "
        f"{found.bundle[:12]}` lets the agent try it at once"
    )


def rest(tries: int) -> int:
    """Return the seconds that a bundle waits after `tries` trials without a result; it is never refused for them.

    The agent cannot tell whether the bundle kills the process or the machine, or whether the device lacks memory until somebody
    mends it. The wait doubles each time, up to a week. This costs the device little if the bundle is to blame, and loses no
    good release if it is not.
    """
    return min(FIRST_REST * 2 ** min(tries - MAX_TRIES, 20), LONGEST_REST) if tries >= MAX_TRIES else 0


def in_window(times: str, now: int) -> bool:
    """Check whether the time of day lies in a window such as 22:00-05:00, in UTC or in the time zone that follows the hours."""
    start, stop = (int(part[:2]) * 60 + int(part[3:5]) for part in window.split(times)[0].split("-"))
    minute = window.minute(times, now)
    return start <= minute < stop if start <= stop else minute >= start or minute < stop


def check_fits(manifest: Manifest, config: Config, agent: str) -> None:
    """Refuse a bundle that was not made for this device, before any of its files is fetched.

    Raises:
        ManifestError: the bundle is for another line or class.
        AgentError: the bundle needs a newer agent.
    """
    if (manifest.line, manifest.device_class) != (config.line, config.device_class):
        raise ManifestError(f"the bundle is for {manifest.line}/{manifest.device_class}, not for this device")
    if as_numbers(manifest.minimum_agent) > as_numbers(agent):
        raise AgentError(f"the bundle needs agent {manifest.minimum_agent}, but this is {agent}; update the agent first")


def check_runtime(bounds: Sequence[str], version: str) -> str | None:
    """Say why this version of ONNX Runtime must not run the bundle, or return None; `bounds` are ">=a" and "<b"."""
    low, high = as_numbers(bounds[0].removeprefix(">=")), as_numbers(bounds[1].removeprefix("<"))
    if low <= as_numbers(version) < high:
        return None
    return f"it needs ONNX Runtime {bounds[0]}, {bounds[1]}, but this device has {version}"


def room_needed(written: int, bundle: int) -> int:
    """Return the bytes that must be free: those still to be written, and a margin of a tenth of the bundle, at least 8 MiB."""
    return written + max(bundle // 10, 8 * 1024 * 1024)


def chain_needs(count: int, between: int, bundle: int) -> int:
    """Return the bytes of all results that lie on the disk at once while a chain is applied: those of two deltas at most.

    Args:
        count: deltas of the chain.
        between: bytes of a result that only the next delta needs.
        bundle: bytes of the bundle that the last delta makes.
    """
    if count == 1:
        return bundle
    return between + max(bundle, between if count > 2 else 0)


def check_request(caption: str, seed: int) -> None:
    """Refuse a request that no bundle can draw, before a bundle is blamed for it.

    Raises:
        OperatorError: the caption is not Unicode text, or the seed is out of range.
    """
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise OperatorError("the caption is not valid UTF-8; type it again, or set the terminal to UTF-8") from error
    if not 0 <= seed < SEEDS:
        raise OperatorError(f"the seed {seed} is out of range; choose one from 0 to 2^128 - 1")

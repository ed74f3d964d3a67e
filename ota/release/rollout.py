"""Rollouts: who may install a release, and when. They are signed policies that devices obey by themselves.

A device computes its bucket as an HMAC of its id under the policy's salt. Under policy 2 it installs the release if its bucket, one of 2^32,
lies below the limit, which somebody raises who saw how the devices before fared. Under policy 1, which is for devices that are not watched,
it installs it when a wave that covers its bucket, one of 10,000, has opened. No server decides anything; a halt is a newer policy.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from pydantic import ValidationError

from ota.durations import until, utc
from ota.errors import OperatorError
from ota.manifest import MAX_COUNT
from ota.policy import BUCKETS, HEARTBEAT, MAX_WAVES, Fallback, Policy, Policy2, Wave
from ota.release.repository import Release
from ota.wording import first_fault

FULL = 10_000  # basis points
SHOWN = 5  # names of a list that a description has

AnyPolicy = TypeVar("AnyPolicy", Policy, Policy2)


def start(release: Release, shares: Sequence[float], soak: int, now: int | None = None, revert: bool = False) -> Policy:
    """Make the policy 1 that rolls a release out in timed waves.

    Args:
        release: release to install.
        shares: shares of the fleet in percent, rising, such as (1, 10, 100).
        soak: seconds between the openings of two waves.
        now: seconds since 1970; None: the present time.
        revert: whether the release is older than what runs, on purpose.

    Raises:
        OperatorError: the shares do not rise, do not lie between 0 and 100 percent, or are too many.
    """
    begin, limits = int(time.time()) if now is None else now, check_shares(shares)
    return Policy(
        line=release.line, device_class=release.device_class, seq=release.seq, manifest=release.manifest,
        salt=f"{release.seq}-{release.manifest[:16]}",
        waves=[Wave(bps=bps, not_before=begin + i * soak) for i, bps in enumerate(limits)], revert=revert,
    )  # fmt: skip


def check_shares(shares: Sequence[float]) -> list[int]:
    """Convert shares of the fleet from percent to basis points, and refuse invalid ones.

    Raises:
        OperatorError: they do not rise, do not lie between 0 and 100 percent, or are too many.
    """
    limits = [round(share * 100) if math.isfinite(share) else 0 for share in shares]
    if not limits or any(not 0 < bps <= FULL for bps in limits) or any(a >= b for a, b in pairwise(limits)):
        raise OperatorError(f"waves must be rising shares of the fleet between 0 and 100 percent, not {list(shares)}")
    if len(limits) > MAX_WAVES:
        raise OperatorError(f"a rollout has at most {MAX_WAVES} waves, not {len(limits)}; name fewer shares")
    return limits


@dataclass(frozen=True)
class Terms:
    """What an operator states about a rollout beside its shares."""

    first: Sequence[str] = ()
    """Ids or tags of the devices that install the release before all others."""
    only: Sequence[str] = ()
    """Ids or tags of the devices that alone may install it; empty: all."""
    never: Sequence[str] = ()
    """Ids or tags of the devices that may not."""
    not_before: int = 0
    until: int = 0
    acknowledge: bool = False
    spread: int = 0
    heartbeat: int = 0
    """Seconds; 0: as before."""


def watched(
    release: Release, shares: Sequence[float], before: Policy2 | None, fallback: Fallback | None, terms: Terms, revert: bool = False
) -> Policy2:  # fmt: skip
    """Make the policy 2 that opens the first of the shares of the watched devices to a release.

    Args:
        release: release to install.
        shares: shares of the fleet in percent, rising, such as (1, 10, 100).
        before: policy 2 in force; None: there is none.
        fallback: last release that was open to all, as `last_open` finds it.
        terms: what else holds.
        revert: whether the release is older than what runs, on purpose.

    Raises:
        OperatorError: the shares or the terms are not valid, or the policies have no number left.
    """
    steps = [limit_of(bps) for bps in check_shares(shares)]
    stated = {name: value for name, value in vars(terms).items() if value}
    stated |= {name: [*value] for name, value in stated.items() if name in ("first", "only", "never")}
    try:
        return Policy2.model_validate({
            "heartbeat": before.heartbeat if before else HEARTBEAT, "line": release.line, "device_class": release.device_class,
            "seq": release.seq, "manifest": release.manifest, "salt": f"{release.seq}-{release.manifest[:16]}",
            "policy": before.policy + 1 if before else 1, "limit": steps[0], "steps": steps, "revert": revert,
            "retry": before.retry if before else 0, "fallback": fallback, **stated,
        })  # fmt: skip
    except ValidationError as error:
        raise OperatorError(f"the rollout is not valid: {first_fault(error, Policy2)}; nothing was signed") from error


def last_open(
    release: Release, before: Policy | Policy2 | None, known: Sequence[Release], now: int | None = None
) -> Fallback | None:
    """Find the last release that was open to all devices, before another one is rolled out; None: there is none.

    Args:
        release: what is rolled out next.
        before: policy that named what was rolled out before.
        known: the published releases.
        now: seconds since 1970; None: the present time.
    """
    found = before.fallback if isinstance(before, Policy2) else None
    if before and before.manifest != release.manifest and is_open(before, now):
        found = Fallback(seq=before.seq, manifest=before.manifest)
    usable = {r.manifest for r in known if release.floor <= r.seq < release.seq}
    return found if found and found.manifest in usable else None


def widened(policy: Policy2, share: float | None = None) -> Policy2:
    """Return the policy with its next step open.

    Args:
        policy: policy 2 in force.
        share: share of the fleet in percent; None: the next one that was stated, or else all devices.

    Raises:
        OperatorError: the rollout is halted, or is open that far already.
    """
    if policy.halt:
        raise OperatorError(f"release {policy.seq} is halted, so it is not opened further; `ferry rollout start` begins anew")
    limit = (
        limit_of(check_shares([share])[0]) if share is not None else next((s for s in policy.steps if s > policy.limit), BUCKETS)
    )
    if limit <= policy.limit:
        raise OperatorError(
            f"release {policy.seq} is open to {share_of(policy.limit)} % of the watched devices already; `ferry rollout halt` stops it"
        )
    return numbered(policy, limit=limit)


def numbered(policy: Policy2, **changed: Any) -> Policy2:
    """Return a policy with changes and the next number.

    Raises:
        OperatorError: there is no next number; ferry never assigns so high a one.
    """
    if policy.policy >= MAX_COUNT:
        raise OperatorError(
            "policy 2 has the highest possible number; restore the repository, and run `ferry trust rotate rollout`"
        )
    return policy.model_copy(update={"policy": policy.policy + 1, **changed})


def limit_of(bps: int) -> int:
    """Convert basis points of the fleet to a limit of policy 2."""
    return BUCKETS * bps // FULL


def share_of(limit: int) -> str:
    """Return a limit of policy 2 as a share in percent, such as 10 or 0.5; one of few devices keeps three digits."""
    return f"{limit * 100 / BUCKETS:.3g}"


def halt(policy: AnyPolicy) -> AnyPolicy:
    """Return the same policy, halted: no device installs the release any more, and none that has it is told to go back."""
    if isinstance(policy, Policy2):
        return numbered(policy, halt=True)
    return policy.model_copy(update={"halt": True})


def is_open(policy: Policy | Policy2, now: int | None = None) -> bool:
    """Check whether a policy lets all devices that obey it install its release now; `never` keeps out whom somebody named."""
    moment = int(time.time()) if now is None else now
    if isinstance(policy, Policy2):
        timely = policy.not_before <= moment and (not policy.until or moment < policy.until)
        return not policy.halt and policy.limit == BUCKETS and timely and not policy.only
    return not policy.halt and any(wave.bps == FULL and wave.not_before <= moment for wave in policy.waves)


def describe(policy: Policy | Policy2, now: int | None = None) -> str:
    """Describe the state of a rollout in one line for people, by one of its policies."""
    moment = int(time.time()) if now is None else now
    if policy.halt:
        return f"release {policy.seq} is halted"
    if isinstance(policy, Policy2):
        return _describe_watched(policy, moment)
    reached = max((wave.bps for wave in policy.waves if wave.not_before <= moment), default=0)
    later = [wave for wave in policy.waves if wave.not_before > moment]
    text = f"release {policy.seq} is open to {reached / 100:g} % of the fleet"
    return text + (f", to {later[0].bps / 100:g} % of it at {until(later[0].not_before, moment)}" if later else "")


def _describe_watched(policy: Policy2, now: int) -> str:
    following = next((step for step in policy.steps if step > policy.limit), None)
    if policy.until and policy.until <= now:
        return f"release {policy.seq} could be installed until {utc(policy.until)}"
    text = f"release {policy.seq} {'opens' if policy.not_before > now else 'is open'} to {share_of(policy.limit)} % of the watched devices"
    text += f" at {until(policy.not_before, now)}" if policy.not_before > now else ""
    text += f", then to {share_of(following)} %" if following else ""
    named = (
        f"{word} {', '.join(list(names)[:SHOWN])}{' …' if len(names) > SHOWN else ''}" for word, names in _named(policy) if names
    )
    text += "".join(f", {part}" for part in named)
    return text + (f", until {utc(policy.until)}" if policy.until else "")


def _named(policy: Policy2) -> list[tuple[str, list[str]]]:
    return [("first to", policy.first), ("only to", policy.only), ("never to", policy.never)]


def summary(watching: Policy2 | None, waves: Policy | None, now: int | None = None) -> str:
    """Describe the state of a rollout in one line for people, by both of its policies."""
    if watching is None:
        return describe(waves, now) if waves else "nothing is rolled out"
    if waves is None:
        return describe(watching, now)
    everywhere = is_open(waves, now) and is_open(watching, now) and not watching.never
    if waves.manifest == watching.manifest and (everywhere or (waves.halt and watching.halt)):
        return describe(waves, now)
    return f"{describe(watching, now)}; for devices that are not watched, {describe(waves, now)}"


def wave_of(policy: Policy | Policy2, device: str) -> int | None:
    """Return the index of the first wave that holds a device, as the device computes it itself; None: no wave does.

    Tags, which only the device knows for sure, do not count.
    """
    digest = hmac.new(policy.salt.encode(), device.encode(), hashlib.sha256).digest()
    if isinstance(policy, Policy2):
        named = [name for name in policy.only if "=" not in name]
        if device in policy.never or (policy.only and len(named) == len(policy.only) and device not in named):
            return None
        mine = 0 if device in policy.first else int.from_bytes(digest[:4], "big")
        return next((i for i, step in enumerate(policy.steps or [policy.limit]) if mine < step), None)
    mine = int.from_bytes(digest[:8], "big") % FULL
    return next((i for i, wave in enumerate(policy.waves) if mine < wave.bps), None)


def steps(policy: Policy | Policy2) -> int:
    """Return the number of waves of a rollout."""
    return len(policy.waves) if isinstance(policy, Policy) else max(1, len(policy.steps))


def holds(policy: Policy | Policy2, device: str, now: int) -> bool:
    """Tell whether a device may install the release now, by its id alone."""
    wave = wave_of(policy, device)
    if wave is None or policy.halt:
        return False
    if isinstance(policy, Policy2):
        opened = device in policy.first or (policy.steps or [policy.limit])[wave] <= policy.limit
        return opened and policy.not_before <= now and (not policy.until or now < policy.until)
    return policy.waves[wave].not_before <= now

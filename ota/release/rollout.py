"""Rollouts: who may install a release, and when. They are signed policies that devices obey by themselves.

A device computes its bucket, one of 10,000, as an HMAC of its id under the policy's salt. It installs the release when a wave
that covers its bucket has opened. No server decides anything; a halt is a newer policy.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Sequence
from itertools import pairwise

from ota.durations import until
from ota.errors import OperatorError
from ota.policy import MAX_WAVES, Policy, Wave
from ota.release.repository import Release

FULL = 10_000  # basis points


def start(release: Release, shares: Sequence[float], soak: int, now: int | None = None, revert: bool = False) -> Policy:
    """Make the policy that rolls a release out in waves.

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


def halt(policy: Policy) -> Policy:
    """Return the same policy, halted: no device installs the release any more, and none that has it is told to go back."""
    return policy.model_copy(update={"halt": True})


def is_open(policy: Policy, now: int | None = None) -> bool:
    """Check whether a policy lets all devices of the fleet install its release now."""
    moment = int(time.time()) if now is None else now
    return not policy.halt and any(wave.bps == FULL and wave.not_before <= moment for wave in policy.waves)


def describe(policy: Policy, now: int | None = None) -> str:
    """Describe the state of a rollout in one line for people."""
    moment = int(time.time()) if now is None else now
    if policy.halt:
        return f"release {policy.seq} is halted"
    reached = max((wave.bps for wave in policy.waves if wave.not_before <= moment), default=0)
    later = [wave for wave in policy.waves if wave.not_before > moment]
    text = f"release {policy.seq} is open to {reached / 100:g} % of the fleet"
    return text + (f", to {later[0].bps / 100:g} % of it at {until(later[0].not_before, moment)}" if later else "")


def wave_of(policy: Policy, device: str) -> int | None:
    """Return the index of the first wave that holds a device, as the device computes it itself; None: no wave does."""
    digest = hmac.new(policy.salt.encode(), device.encode(), hashlib.sha256).digest()
    mine = int.from_bytes(digest[:8], "big") % FULL
    return next((i for i, wave in enumerate(policy.waves) if mine < wave.bps), None)

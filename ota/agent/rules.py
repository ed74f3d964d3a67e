"""Every decision of the agent, without I/O: what to install, from where, and whether a new bundle is fit to run."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ota.agent.state import Config, HighWater, Rest, State
from ota.errors import AgentError, ManifestError, OperatorError, TrustError
from ota.manifest import MAX_COUNT, Manifest, Policy, Reference, as_numbers

BUCKETS = 10_000
CLOCK_SLACK = 24 * 3600  # seconds that a clock may run behind the latest time seen
STATISTIC_FLOOR = 0.02  # of the grey range of 2; the least width that a reference range is taken for
MAX_DEAD_LOAD = 0.1  # of its reference share; an expert with less is not used on this device
SEEDS = 2**128  # numbers that Philox takes as a key
MAX_TRIES = 3  # times in a row that the trying of a bundle may begin and give no answer before it rests
FIRST_REST = 3600  # seconds; each rest is twice as long as the one before
LONGEST_REST = 7 * 86_400
LEAST_IMAGES = 20  # of a benchmark: for a figure that 95 of 100 do not exceed
MOST_IMAGES = 10_000
MEMORY_LIMIT = 1024  # MiB that trying or running a bundle may take at its peak


@dataclass(frozen=True)
class Wanted:
    """What the policy wants of this device now."""

    install: bool
    reason: str
    settled: bool = False
    """Whether what it names will not be installed later either, so that what was fetched of it is of no use."""


def bucket(device: str, salt: str) -> int:
    """The device's place in the fleet for one release, 0 … 9999: the same on every device and machine."""
    digest = hmac.new(salt.encode(), device.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def check_clock(now: int, floor: int) -> None:
    """Refuse a clock that runs behind what was already seen: with it, expired metadata would look fresh.

    Raises:
        TrustError: it does, by more than `CLOCK_SLACK`.
    """
    if now < floor - CLOCK_SLACK:
        raise TrustError(
            f"the clock is {(floor - now) // 3600} hours behind the last time seen; set it, the running model is kept"
        )


@dataclass(frozen=True)
class Trusted:
    """The keys that a role is trusted with by the root, or by the targets, that this device accepted."""

    keys: frozenset[str]
    """Their ids."""
    threshold: int


def binding(marks: HighWater, trusted: Mapping[str, Trusted]) -> dict[str, int]:
    """The marks that hold under the keys that roles are trusted with now.

    A mark is for nothing once so few of the keys that it was made under are still trusted that nothing they signed could
    pass any more: then it cannot be replayed, and it may be a number that a thief raised beyond all others. Only a newer
    root, or newer targets, signed by the offline keys, brings that about. The mark of the root itself always holds, and so
    does one of which the keys are not known.
    """
    return {
        role: version
        for role, version in marks.versions.items()
        if role not in trusted
        or role not in marks.keys
        or len(trusted[role].keys.intersection(marks.keys[role])) >= trusted[role].threshold
    }


def check_floor(seq: int | None, floor: int) -> None:
    """Refuse a release that lies below the floor of its line and class, which `models` signs beside its number.

    Args:
        seq: the release's number; None: it has none, and then no policy can name it either.
        floor: the lowest that may be installed.

    Raises:
        TrustError: it does.
    """
    if seq is not None and seq < floor:
        raise TrustError(f"release {seq} lies below the floor, {floor}: it may not be installed or gone back to any more")


def check_versions(found: Mapping[str, int], marks: Mapping[str, int]) -> None:
    """Refuse metadata older than what this device accepted before, also when its cache was lost.

    Args:
        found: versions by role.
        marks: those that bind.

    Raises:
        TrustError: a role went back, or has a number that no factory ever reaches and no device could remember.
    """
    for role, version in sorted(found.items()):
        if version > MAX_COUNT:
            raise TrustError(
                f"the repository offers a version of {role} beyond {MAX_COUNT}; it is an attack, nothing is installed"
            )
        if version < marks.get(role, 0):
            raise TrustError(
                f"the repository offers version {version} of {role}, this device has seen {marks[role]}; it is an old copy "
                "or an attack, nothing is installed"
            )


def want(policy: Policy, config: Config, state: State, revertible: bool, now: int) -> Wanted:
    """What a policy wants of this device.

    Args:
        policy: signed, and not expired.
        config: of the device.
        state: of the device.
        revertible: whether `models` marks the named release as one to go back to.
        now: seconds since 1970.

    Raises:
        ManifestError: the policy is for another line or class.
        TrustError: it names an older release without saying so, or one that may not be gone back to.
    """
    if (policy.line, policy.device_class) != (config.line, config.device_class):
        raise ManifestError(f"the policy is for {policy.line}/{policy.device_class}, not for this device")
    if policy.manifest == state.active:
        return Wanted(False, f"release {policy.seq} is installed", settled=True)
    if policy.manifest in state.refused:
        why = f"release {policy.seq} was refused before: {state.refused[policy.manifest]}; {lifting(policy.manifest)}"
        return Wanted(False, why, settled=True)
    if policy.halt:
        return Wanted(False, f"release {policy.seq} is halted", settled=True)
    if policy.seq < state.seq:
        if not policy.revert:
            raise TrustError(f"the policy names release {policy.seq}, older than {state.seq}, without calling it a revert")
        if not revertible:
            raise TrustError(f"the policy goes back to release {policy.seq}, which is not marked as one to go back to")
    mine = bucket(config.device, policy.salt)
    opening = [wave.not_before for wave in policy.waves if mine < wave.bps]
    if not opening:
        return Wanted(False, f"release {policy.seq} is not meant for this device yet (bucket {mine})")
    if min(opening) > now:
        return Wanted(False, f"release {policy.seq} opens for this device in {min(opening) - now} s")
    if config.window and not in_window(config.window, now):
        return Wanted(False, f"release {policy.seq} waits for the maintenance window {config.window} UTC")
    return Wanted(True, f"release {policy.seq} is open to this device")


def lifting(digest: str) -> str:
    """Say how a refusal is lifted."""
    return f"`ferry-agent forget {digest[:12]}` lifts this"


def resting(found: Rest) -> str:
    """Say how long a bundle rests, and how that is ended."""
    until = datetime.fromtimestamp(found.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{found.bundle[:12]} is tried again after {until}: its trying gave no answer; `ferry-agent forget {found.bundle[:12]}` "
        "has it tried at once"
    )


def rest(tries: int) -> int:
    """Seconds that a bundle rests after so many tries that gave no answer; it is never condemned for them.

    Perhaps it kills the process or the machine, perhaps the device lacks memory until somebody mends it: nobody can tell from here.
    Twice as long each time, up to a week, costs the device little if it is the bundle, and loses no good release if it is not.
    """
    return min(FIRST_REST * 2 ** min(tries - MAX_TRIES, 20), LONGEST_REST) if tries >= MAX_TRIES else 0


def in_window(window: str, now: int) -> bool:
    """Whether the time of day (UTC) lies in a window such as 22:00-05:00."""
    start, stop = (int(part[:2]) * 60 + int(part[3:5]) for part in window.split("-"))
    minute = now // 60 % 1440
    return start <= minute < stop if start <= stop else minute >= start or minute < stop


def check_fits(manifest: Manifest, config: Config, agent: str) -> None:
    """Refuse a bundle that was not made for this device, before anything of it is fetched.

    Raises:
        ManifestError: another line or class.
        AgentError: it needs a newer agent.
    """
    if (manifest.line, manifest.device_class) != (config.line, config.device_class):
        raise ManifestError(f"the bundle is for {manifest.line}/{manifest.device_class}, not for this device")
    if as_numbers(manifest.minimum_agent) > as_numbers(agent):
        raise AgentError(f"the bundle needs agent {manifest.minimum_agent}, this is {agent}; update the agent first")


def check_runtime(bounds: Sequence[str], version: str) -> str | None:
    """Why this ONNX Runtime must not run the bundle, if so; `bounds` are ">=a" and "<b"."""
    low, high = as_numbers(bounds[0].removeprefix(">=")), as_numbers(bounds[1].removeprefix("<"))
    if low <= as_numbers(version) < high:
        return None
    return f"it needs ONNX Runtime {bounds[0]}, {bounds[1]}, this device has {version}"


def room_needed(written: int, bundle: int) -> int:
    """Bytes that must be free: what is still to be written of an update to `bundle` bytes, and a margin for everything else."""
    return written + max(bundle // 10, 8 * 1024 * 1024)


def check_request(caption: str, seed: int) -> None:
    """Refuse what no bundle could draw, before any is blamed for it.

    Raises:
        OperatorError: the caption is not Unicode text, or the seed is out of range.
    """
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise OperatorError("the caption is not valid UTF-8; type it anew, or set the terminal to UTF-8") from error
    if not 0 <= seed < SEEDS:
        raise OperatorError(f"the seed {seed} is out of range; choose one from 0 to 2^128 - 1")


@dataclass(frozen=True)
class TrialResult:
    """What a child process measured when it tried a bundle's variant."""

    golden_share: float
    """Share of the golden outputs within the tolerance; 0 when any is not finite."""
    finite: bool
    statistics: tuple[tuple[str, float], ...]
    """Means over the generated images: (name, value)."""
    load: tuple[tuple[float, ...], ...]
    """Mean gate mass [M][E]."""
    milliseconds: float
    """Count the time of an image by the clock."""
    computing: float
    """Count the processor time of an image in milliseconds; a busy device hardly changes it."""
    peak_mib: float


def judge(trying: TrialResult, own: Reference, running: Reference | None) -> list[str]:
    """Why a new bundle is not fit to run here; empty when it is.

    Args:
        trying: what was measured on this device.
        own: what the bundle claims of itself. A bundle that was damaged or computes otherwise here differs from it.
        running: what the bundle that runs now claims of itself. A bundle made from garbage agrees with its own golden
            outputs, so its images are also held against the images of the one it would replace.
    """
    reasons = []
    if not trying.finite:
        reasons.append("it makes images that are not finite")
    if trying.golden_share < own.golden.share:
        reasons.append(
            f"only {100 * trying.golden_share:.1f} % of its golden outputs come out right here, {100 * own.golden.share:.0f} % "
            "must"
        )
    reasons += unlike(trying.statistics, own, "its own reference")
    if running:
        reasons += unlike(trying.statistics, running, "the running model's")
    if [len(row) for row in trying.load] != [len(row) for row in own.load]:
        reasons.append("it has other experts than its own reference lists")
    idle = [
        f"expert {e} of block {b}"
        for b, (row, reference) in enumerate(zip(trying.load, own.load, strict=False))
        for e, (mass, expected) in enumerate(zip(row, reference, strict=False))
        if mass < MAX_DEAD_LOAD * expected
    ]
    if idle:
        reasons.append(f"{', '.join(idle[:3])} carry no load here as they did in the factory")
    if trying.computing > own.latency_ms:
        reasons.append(f"an image takes {trying.computing:.0f} ms of computing, the budget is {own.latency_ms:.0f} ms")
    if trying.peak_mib > MEMORY_LIMIT:
        reasons.append(f"it takes {trying.peak_mib:.0f} MiB, {MEMORY_LIMIT} are allowed")
    return reasons


def hurried(trying: TrialResult, own: Reference) -> str:
    """Why a trial says nothing, although nothing is wrong with the bundle: the device was busy or asleep; empty: it does say something."""
    if trying.milliseconds <= own.latency_ms:
        return ""
    return (
        f"an image took {trying.milliseconds:.0f} ms here, of which it computed {trying.computing:.0f} ms; the budget is {own.latency_ms:.0f} ms, "
        "so this device was busy with other things"
    )


def unlike(statistics: Sequence[tuple[str, float]], reference: Reference, whose: str) -> list[str]:
    """Which image statistics lie more than their own range's width outside a reference's range.

    The width makes room for what retraining is for (a lighting change moves the mean); garbage moves several statistics
    by many widths.
    """
    reasons = []
    for name, value in statistics:
        expected = reference.statistics.get(name)  # type: ignore[call-overload]
        if expected is None:
            continue
        width = max(expected.high - expected.low, STATISTIC_FLOOR)
        if not expected.low - width <= value <= expected.high + width:
            reasons.append(f"the images' {name} is {value:.2f}, {whose} lies between {expected.low:.2f} and {expected.high:.2f}")
    return reasons

"""Who may install what and when: waves, buckets, halts, reverts and maintenance windows, decided by the device alone."""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota import fitness
from ota.agent import rules
from ota.agent.state import Config, State
from ota.errors import AgentError, ManifestError, OperatorError, TrustError
from ota.manifest import Manifest, Reference
from ota.policy import Policy, Wave
from ota.release import rollout
from ota.release.repository import Release
from tests.test_manifest import manifest

OLD, CURRENT, NEW = "0" * 64, "1" * 64, "2" * 64
NOON = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp())
FLEET = [f"dev-{i}" for i in range(10_000)]


def release(**fields: Any) -> Release:
    base = {"line": "shapes", "device_class": "edge", "seq": 5, "manifest": NEW, "ledger": OLD, "version": 5, "full_bytes": 1}
    return Release(**base, revertible=True).model_copy(update=fields)


def policy(*waves: tuple[int, int], **fields: Any) -> Policy:
    made = rollout.start(release(), (100,), soak=0, now=NOON)
    listed = [Wave(bps=bps, not_before=at) for bps, at in waves] or made.waves
    return made.model_copy(update={"waves": listed} | fields)


def config(**fields: Any) -> Config:
    base = {"device": "dev-1", "line": "shapes", "device_class": "edge", "repository": "/x", "root_sha256": OLD}
    return Config(**(base | fields))


RUNNING = State(active=CURRENT, previous=OLD, seq=4, previous_seq=3)


def want(
    offered: Policy, *, device: Config | None = None, state: State = RUNNING, revertible: bool = False, now: int = NOON
) -> rules.Wanted:
    return rules.want(offered, device or config(), state, revertible, now)


# Buckets


@pytest.mark.parametrize(("device", "salt"), [("dev-1", "5-abc"), ("a", ""), ("x" * 40, "s" * 64)])
def test_bucket_is_documented_hmac(device, salt):
    # HMAC (RFC 2104) by hand: two hashes of the padded key.
    key = salt.encode().ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in key) + device.encode()).digest()
    outer = hashlib.sha256(bytes(b ^ 0x5C for b in key) + inner).digest()
    assert outer == hmac.digest(salt.encode(), device.encode(), "sha256")
    assert rules.bucket(device, salt) == int(outer[:8].hex(), 16) % 10_000


def test_buckets_are_uniform():
    counts = np.bincount([rules.bucket(device, "5-abc") // 100 for device in FLEET], minlength=100)
    chi_square = float(((counts - 100) ** 2 / 100).sum())
    assert 60 < chi_square < 149  # 99 degrees of freedom, 0.1 % on either side; the ids are fixed


def test_waves_are_nested():
    taken = [{d for d in FLEET if want(policy((bps, 0)), device=config(device=d)).install} for bps in (100, 1000, 5000, 10_000)]
    assert [len(devices) / len(FLEET) for devices in taken] == pytest.approx([0.01, 0.1, 0.5, 1], abs=0.02)
    for narrow, wide in pairwise(taken):
        assert narrow < wide


def test_first_devices_differ_by_release():
    first, second = ({d for d in FLEET if rules.bucket(d, salt) < 1000} for salt in ("5-abc", "6-abd"))
    assert len(first & second) / len(first) == pytest.approx(0.1, abs=0.03)


def test_releases_get_their_own_salt():
    salts = {rollout.start(release(seq=seq, manifest=digest), (1,), 0).salt for seq in (5, 6) for digest in (OLD, NEW)}
    assert len(salts) == 4


# Waves


def test_wave_opens_at_its_time():
    offered = policy((10_000, NOON + 60))
    early = want(offered, now=NOON + 59)
    assert (early.install, early.reason) == (False, "release 5 opens for this device at 2026-03-01 12:01 UTC (in 1s)")
    assert want(offered, now=NOON + 60).install


def test_device_waits_for_its_own_wave():
    mine = rules.bucket("dev-1", policy().salt)
    offered = policy((mine, NOON - 50), (mine + 1, NOON + 50), (10_000, NOON + 90))
    assert not want(offered).install
    assert want(offered, now=NOON + 50).install


def test_bucket_outside_all_waves_excluded():
    mine = rules.bucket("dev-1", policy().salt)
    refused = want(policy((mine, 0)))
    assert (refused.install, refused.reason) == (False, f"release 5 is not meant for this device yet (bucket {mine})")
    assert want(policy((mine + 1, 0))).install


def test_no_wave_no_device():
    assert not any(want(policy().model_copy(update={"waves": []}), device=config(device=d)).install for d in FLEET[:50])


def test_halt_stops_everybody():
    halted = rollout.halt(policy())
    assert not any(want(halted, device=config(device=device)).install for device in FLEET[:50])
    assert want(halted) == rules.Wanted(install=False, reason="release 5 is halted", settled=True)


def test_release_that_is_waited_for_is_not_settled():
    # What was already fetched of it is kept.
    assert not want(policy(waves=[])).settled
    assert not want(policy(), state=State(active=CURRENT, seq=4)).settled


def test_halt_takes_nothing_back():
    assert want(rollout.halt(policy(manifest=CURRENT))).reason == "release 5 is installed"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State(active=NEW, seq=5), "release 5 is installed"),
        (
            State(active=CURRENT, seq=4, refused={NEW: "full: too slow"}),
            f"release 5 was refused before: full: too slow; `ferry-agent forget {NEW[:12]}` lifts this",
        ),
    ],
)
def test_same_bundle_not_wanted_again(state, reason):
    assert want(policy(), state=state) == rules.Wanted(install=False, reason=reason, settled=True)


# Reverts


def test_older_release_is_no_revert():
    with pytest.raises(TrustError, match="release 3, older than 4, but does not mark it as a revert"):
        want(policy(seq=3), revertible=True)


def test_revert_needs_mark_in_models():
    with pytest.raises(TrustError, match="not marked as revertible"):
        want(policy(seq=3, revert=True), revertible=False)


def test_authorised_revert_is_wanted():
    assert want(policy(seq=3, revert=True), revertible=True).install


@pytest.mark.parametrize("fields", [{"halt": True}, {"waves": []}])
def test_revert_obeys_waves_and_halt(fields):
    assert not want(policy(seq=3, revert=True, **fields), revertible=True).install


@pytest.mark.parametrize("fields", [{"line": "other"}, {"device_class": "other"}])
def test_policy_of_others_refused(fields):
    with pytest.raises(ManifestError, match="not for this device"):
        want(policy(**fields))


# Maintenance windows


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("09:00-17:00", ["09:00", "12:30", "16:59"], ["08:59", "17:00", "23:59", "00:00"]),
        ("22:00-05:00", ["22:00", "23:59", "00:00", "04:59"], ["05:00", "12:00", "21:59"]),
        ("00:00-00:01", ["00:00"], ["00:01", "23:59"]),
        ("23:59-00:00", ["23:59"], ["00:00", "23:58"]),
    ],
)
def test_window_over_midnight_too(window, inside, outside):
    for clock in inside + outside:
        now = NOON - NOON % 86_400 + int(clock[:2]) * 3600 + int(clock[3:]) * 60
        found = want(policy((10_000, 0)), device=config(window=window), now=now)
        assert found.install == (clock in inside), clock
        assert found.install or found.reason == f"release 5 waits for the maintenance window {window} UTC"


@pytest.mark.parametrize("window", ["5-6", "22:00", "22.00-05.00", "25:00-05:00", "22:60-05:00", "night", "22:00-05:0x"])
def test_window_of_other_form_refused(window):
    with pytest.raises(ValueError, match="window"):
        config(window=window)


# Clock and versions


@pytest.mark.parametrize(("behind", "refused"), [(-5, False), (0, False), (24 * 3600, False), (24 * 3600 + 1, True)])
def test_clock_may_not_go_back(behind, refused):
    if refused:
        with pytest.raises(TrustError, match="clock is 24 hours behind"):
            rules.check_clock(NOON - behind, NOON)
    else:
        rules.check_clock(NOON - behind, NOON)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 3)), st.dictionaries(st.sampled_from("abc"), st.integers(1, 3)))
def test_versions_may_not_go_back(found, marks):
    older = [role for role in found if found[role] < marks.get(role, 0)]
    if older:
        with pytest.raises(TrustError, match=f"of {min(older)}"):
            rules.check_versions(found, marks)
    else:
        rules.check_versions(found, marks)


@pytest.mark.parametrize("role", ["timestamp", "models"])
def test_version_beyond_the_largest_count_is_refused(role):
    rules.check_versions({"root": 1, role: 9_007_199_254_740_992}, {"root": 1})
    with pytest.raises(
        TrustError, match=f"a version of {role} beyond 9007199254740992; this is an attack, and nothing is installed"
    ):
        rules.check_versions({"root": 1, role: 9_007_199_254_740_993}, {"root": 1})


# What a bundle was made for


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"device_class": "other"}, ManifestError, "the bundle is for shapes/other, not for this device"),
        ({"line": "other"}, ManifestError, "the bundle is for other/edge, not for this device"),
        ({"minimum_agent": "0.2.1"}, AgentError, "the bundle needs agent 0.2.1, but this is 0.2.0; update the agent first"),
        ({"minimum_agent": "0.10.0"}, AgentError, "the bundle needs agent 0.10.0, but this is 0.2.0; update the agent first"),
    ],
)
def test_bundle_made_for_another_device_or_agent_is_refused(fields, error, sentence):
    offered = Manifest.model_validate(manifest(minimum_agent="0.2.0"))
    rules.check_fits(offered, config(), agent="0.2.0")
    with pytest.raises(error, match=f"^{sentence}$"):
        rules.check_fits(offered.model_copy(update=fields), config(), agent="0.2.0")


# What the operator asks for


def test_start_spreads_in_waves():
    made = rollout.start(release(), (1, 10, 100), soak=3600, now=NOON)
    assert [(wave.bps, wave.not_before - NOON) for wave in made.waves] == [(100, 0), (1000, 3600), (10_000, 7200)]
    assert (made.seq, made.manifest, made.halt, made.revert) == (5, NEW, False, False)


def test_waves_are_few():
    assert len(rollout.start(release(), range(1, 17), soak=0).waves) == 16
    with pytest.raises(OperatorError, match="at most 16 waves, not 17"):
        rollout.start(release(), range(1, 18), soak=0)


@pytest.mark.parametrize("shares", [(), (0,), (-1,), (101,), (10, 10), (10, 1), (0.001,), (float("nan"),), (10, float("inf"))])
def test_shares_must_rise(shares):
    with pytest.raises(OperatorError, match="rising shares"):
        rollout.start(release(), shares, soak=0)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (
            policy((100, NOON), (10_000, NOON + 60)),
            "release 5 is open to 1 % of the fleet, to 100 % of it at 2026-03-01 12:01 UTC (in 1m)",
        ),
        (policy((10_000, NOON)), "release 5 is open to 100 % of the fleet"),
        (policy((50, NOON + 5)), "release 5 is open to 0 % of the fleet, to 0.5 % of it at 2026-03-01 12:00 UTC (in 5s)"),
        (rollout.halt(policy()), "release 5 is halted"),
    ],
)
def test_policy_described_for_people(made, sentence):
    assert rollout.describe(made, NOON) == sentence


# Whether a bundle that was tried is fit to run


def reference(low: float, high: float, latency: float = 100.0) -> Reference:
    statistics = {"mean": {"low": low, "high": high}}
    golden = {"tolerance": 1e-3, "share": 0.98}
    rows = {"schema_version": 1, "golden": golden, "load": [[0.5, 0.5]], "statistics": statistics, "latency_ms": latency}
    return Reference.model_validate(rows)


def trying(**fields: Any) -> fitness.TrialResult:
    base = {
        "golden_share": 1.0, "finite": True, "statistics": (("mean", 0.1),), "load": ((0.5, 0.5),), "milliseconds": 50.0,
        "computing": 40.0, "peak_mib": 200.0,
    }  # fmt: skip
    return fitness.TrialResult(**(base | fields))


OWN, BEFORE = reference(0.0, 0.2), reference(0.05, 0.15)


def test_fit_bundle_has_no_reasons():
    assert fitness.judge(trying(), OWN, BEFORE) == []
    assert fitness.judge(trying(), OWN, None) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"golden_share": 0.979}, "only 97.9 % of its golden outputs are right on this device, but 98 % must be"),
        ({"finite": False}, "it makes images that are not finite"),
        (
            {"load": ((0.96, 0.04),)},
            "experts that worked at the factory carry almost no load on this device: expert 1 of block 0",
        ),
        ({"load": ((1.0,),)}, "other experts"),
        ({"load": ()}, "other experts"),
        ({"milliseconds": 150.0, "computing": 101.0}, "an image takes 101 ms of computing; the budget is 100 ms"),
        ({"peak_mib": 1025.0}, "it takes 1025 MiB; the limit is 1024 MiB"),
        ({"statistics": (("mean", float("nan")),)}, "the images' mean brightness is nan"),
        ({"statistics": (("mean", 0.26),)}, "the images' mean brightness is 0.26; the running model's range is 0.05 to 0.15"),
        ({"statistics": (("mean", -0.06),)}, "the images' mean brightness is -0.06; the running model's range is 0.05 to 0.15"),
    ],
)
def test_unfit_bundle_refused_with_reason(fields, reason):
    reasons = fitness.judge(trying(**fields), OWN, BEFORE)
    assert reason in reasons[-1]
    assert len(reasons) == 1 or "nan" in reason


def test_time_that_a_busy_device_took_is_not_held_against_a_bundle():
    slow = trying(milliseconds=101.0, computing=99.0)
    assert fitness.judge(slow, OWN, BEFORE) == []
    assert "took 101 ms here, of which it computed 99 ms; the budget is 100 ms" in fitness.hurried(slow, OWN)
    assert not fitness.hurried(trying(milliseconds=100.0, computing=100.0), OWN)


@pytest.mark.parametrize("mean", ["0.41", "-0.21"])
def test_bundle_unlike_itself_refused(mean):
    reasons = fitness.judge(trying(statistics=(("mean", float(mean)),)), OWN, None)
    assert reasons == [f"the images' mean brightness is {mean}; its own reference range is 0.00 to 0.20"]


@pytest.mark.parametrize(
    ("version", "fits"), [("1.19.2", False), ("1.20.0", True), ("1.31.1", True), ("2.0.0", False), ("1.20.0rc1", True)]
)
def test_runtime_bounds_are_numeric(version, fits):
    assert (rules.check_runtime([">=1.20", "<2"], version) is None) == fits


def test_runtime_at_the_upper_bound_is_refused():
    bounds = [">=1.20", "<1.24.1"]
    assert rules.check_runtime(bounds, "1.24.0") is None
    assert rules.check_runtime(bounds, "1.24.1") == "it needs ONNX Runtime >=1.20, <1.24.1, but this device has 1.24.1"

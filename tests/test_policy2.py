"""Policy 2: who is let in, what a lower or missing policy does, and the wait for the factory's acknowledgement."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest

from ota.agent import acknowledgement, plan, policy, reports, trial, updater
from ota.agent.acknowledgement import Patience
from ota.agent.rules import Wanted
from ota.agent.state import Config, Home, State
from ota.agent.transport import connect
from ota.agent.updater import Outcome
from ota.errors import AgentError, ManifestError, TransferError, TrustError
from ota.manifest import MAX_COUNT, Manifest, parse
from ota.policy import BUCKETS, MAX_NAMED, MAX_POLICY_2, Policy2
from ota.release import rollout
from ota.release.bundle import Bundle
from ota.release.keys import KeyRing
from ota.release.repository import Release, Repository, policy_path
from ota.report import open_line
from tests.fleet_kit import CLASS, LINE, Cut, Device, Field, change_role, everyone, name_policy, untouched
from tests.test_delegation import forget_cache, rekeyed
from tests.test_rollout import config

pytest_plugins = ["tests.fleet_kit"]

HTTPS = "https://gateway.example.com"
DIGEST, OTHER = "a" * 64, "b" * 64


def policy2(release: Release | None = None, **fields: Any) -> Policy2:
    """Make a policy that is open to all; without a release, of one that exists nowhere."""
    seq, manifest = (release.seq, release.manifest) if release else (5, DIGEST)
    given = {"line": LINE, "device_class": CLASS, "seq": seq, "manifest": manifest, "salt": "s", "policy": 1, "limit": BUCKETS}
    return Policy2.model_validate(given | fields)


# The form


def test_unknown_optional_fields_are_ignored_at_every_depth():
    given = policy2(fallback={"seq": 1, "manifest": OTHER}).model_dump()
    given |= {"from_the_future": {"a": 1.5}, "fallback": given["fallback"] | {"why": "x"}}
    assert parse(Policy2, json.dumps(given).encode(), MAX_POLICY_2) == policy2(fallback={"seq": 1, "manifest": OTHER})


def test_defaults_are_not_sent():
    said = json.loads(policy2().canonical())
    assert sorted(said) == ["device_class", "limit", "line", "manifest", "policy", "salt", "schema_version", "seq"]
    assert parse(Policy2, policy2().canonical(), MAX_POLICY_2) == policy2()


def test_unknown_feature_in_requires_needs_a_newer_agent():
    with pytest.raises(AgentError, match=r"requires moon-phase, but this is .*; update the agent first"):
        policy.check(policy2(requires=["moon-phase"]), config(), 0)
    policy.check(policy2(), config(), 0)


def test_form_3_needs_a_newer_agent():
    with pytest.raises(AgentError, match="the policy 2 has form 3"):
        parse(Policy2, json.dumps(policy2().model_dump() | {"schema_version": 3}).encode(), MAX_POLICY_2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", BUCKETS + 1), ("limit", -1), ("limit", 0.5), ("policy", 0), ("policy", MAX_COUNT + 1), ("heartbeat", 3599),
        ("heartbeat", 86_401), ("spread", -1), ("first", ["Press 7"]), ("only", ["site=a b"]), ("never", ["a=b=c"]),
        ("never", ["dev"] * (MAX_NAMED + 1)), ("requires", ["Feature"]), ("retry", True), ("until", -1), ("salt", "a/b"),
        ("fallback", {"seq": 0, "manifest": OTHER}), ("steps", [2, 2]), ("acknowledge", 1), ("schema_version", 1),
    ],
)  # fmt: skip
def test_wrong_value_is_refused(field: str, value: object):
    with pytest.raises(ManifestError, match=field if field != "steps" else "rise"):
        parse(Policy2, json.dumps(policy2().model_dump() | {field: value}).encode(), MAX_POLICY_2)


def test_longest_lists_fit_into_the_limit():
    names = [f"{'t' * 20}={'v' * 36}{i:04d}" for i in range(MAX_NAMED)]
    data = policy2(first=names, only=names, never=names, steps=list(range(BUCKETS - 16, BUCKETS))).canonical()
    assert parse(Policy2, data, MAX_POLICY_2).never == names


# The rules


def admit(made: Policy2, device: Config | None = None, state: State | None = None, now: int = 1000) -> Wanted:
    return policy.admit(made, device or config(), state or State(), True, now)


def test_buckets_are_spread_evenly_and_a_limit_is_a_share():
    let_in = sum(policy.bucket(f"dev-{i}", "s") < BUCKETS // 10 for i in range(5000))
    assert 420 < let_in < 580
    assert policy.bucket("dev-1", "s") == 2379040681  # every machine computes this number
    again = sum(
        policy.bucket(f"dev-{i}", "s") < BUCKETS // 10 and policy.bucket(f"dev-{i}", "t") < BUCKETS // 10 for i in range(5000)
    )
    assert again < let_in // 4  # not the same devices first


def test_limit_lets_in_exactly_the_buckets_below_it():
    mine = policy.bucket(config().device, "s")
    assert admit(policy2(limit=mine + 1)).install
    assert admit(policy2(limit=mine)).reason == f"release 5 is not open to this device yet (bucket {mine} of 4294967296)"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"never": ["dev-1"]}, "release 5 is not meant for dev-1"),
        ({"never": ["site=berlin"]}, "release 5 is not meant for site=berlin"),
        ({"never": ["site=berlin"], "only": ["dev-1"], "first": ["dev-1"]}, "release 5 is not meant for site=berlin"),
        ({"only": ["dev-2", "site=lyon"]}, "release 5 is meant for other devices only"),
        ({"only": ["dev-2"], "halt": True, "first": ["dev-1"]}, "release 5 is meant for other devices only"),
        ({"halt": True, "first": ["dev-1"], "retry": 9}, "release 5 is halted"),
        ({"limit": 0, "first": ["dev-2", "site=lyon"]}, "release 5 is not open to this device yet"),
        ({"not_before": 1001}, "release 5 opens for this device at"),
        ({"until": 1000}, "release 5 could be installed until 1970"),
        ({"first": ["dev-1"], "not_before": 1001}, "release 5 opens for this device at"),
    ],
)
def test_device_stays_out(fields: dict[str, Any], reason: str):
    found = admit(policy2(**fields), config(tags=["line=a", "site=berlin"]))
    assert not found.install
    assert not found.let_in
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    "fields",
    [
        {"limit": 0, "first": ["dev-1"]}, {"limit": 0, "first": ["site=berlin"]}, {"only": ["site=berlin"]}, {"only": ["dev-1", "dev-2"]},
        {"never": ["dev-2", "site=lyon", "dev-10"]}, {"not_before": 1000, "until": 1001},
    ],
)  # fmt: skip
def test_device_is_let_in(fields: dict[str, Any]):
    assert admit(policy2(**fields), config(tags=["site=berlin"])).install


def test_what_is_installed_or_refused_is_settled():
    state = State(active=DIGEST, seq=5)
    assert admit(policy2(never=["dev-1"], halt=True), state=state) == Wanted(False, "release 5 is installed", settled=True)
    found = admit(policy2(), state=State(refused={DIGEST: "too slow"}))
    assert (found.install, found.settled) == (False, True)
    assert found.reason.startswith("release 5 was refused before: too slow; `ferry-agent forget")


def test_older_release_without_revert_is_refused():
    with pytest.raises(TrustError, match="names release 5, older than 6, but does not mark it as a revert"):
        admit(policy2(), state=State(active=OTHER, seq=6))
    with pytest.raises(TrustError, match="not marked as revertible"):
        policy.admit(policy2(revert=True), config(), State(active=OTHER, seq=6), False, 0)
    assert admit(policy2(revert=True), state=State(active=OTHER, seq=6)).install


def test_devices_begin_one_after_the_other():
    delays = sorted(policy.delay(f"dev-{i}", "s", 3600) for i in range(1000))
    assert 0 <= delays[0] < 60
    assert 3540 < delays[-1] < 3600
    assert 1600 < delays[500] < 2000
    mine = policy.delay("dev-1", "s", 3600)
    made = policy2(spread=3600)
    waits = policy.begins(made, config(), since=1000, now=1000 + mine - 1)
    assert (waits.install, waits.let_in) == (False, True)
    assert "devices begin one after the other" in waits.reason
    assert policy.begins(made, config(), since=1000, now=1000 + mine).install


def test_maintenance_window_comes_last():
    found = policy.begins(policy2(), config(window="00:20-00:30"), since=1000, now=1000)
    assert (found.install, found.let_in) == (False, True)
    assert "waits for the maintenance window" in found.reason


@pytest.mark.parametrize(
    ("address", "acknowledge", "why"),
    [
        ("", False, "no place for reports"), ("", True, "no place for reports"), ("/srv/reports", False, ""), ("/srv/reports", True, "left in a folder"),
        ("http://localhost:8080", False, ""), ("http://localhost:8080", True, "plain http"), (HTTPS, True, ""), ("HTTPS://x", True, ""),
    ],
)  # fmt: skip
def test_only_tls_can_acknowledge(address: str, acknowledge: bool, why: str):
    found = policy.unheard(config(reports=address), acknowledge)
    assert why in found
    assert bool(found) == bool(why)


# On a device


@pytest.fixture
def two(scene: Field, bundles: dict[str, Bundle]) -> Field:
    """Provide a device that runs release 1, and a release 2 that policy 1 does not name."""
    made = bundles["second"]
    shutil.copytree(scene.repository.keys.folder, scene.folder / "keys")  # a test may replace one
    scene.repository = Repository(scene.repository.folder, KeyRing(scene.folder / "keys"))
    scene.repository.publish_release(made.manifest, made.folder, "e" * 64, [])
    return scene


def offer(field: Field, **fields: Any) -> None:
    """Sign policy 2 of the newest release."""
    name_policy(field.repository, policy2(field.release, **fields))


def replace_key(field: Field) -> None:
    """Replace the key of the rollout role, as the offline keys can."""
    rekeyed(field.repository, "rollout")
    field.repository = Repository(field.repository.folder, KeyRing(field.folder / "keys"))


def withdraw(field: Field, form: int) -> None:
    change_role(field.repository, "rollout", lambda signed: signed.targets.pop(policy_path(LINE, CLASS, form)))


def reason(device: Device) -> str:
    """Return what a look says."""
    return device.update(check_only=True).reason


def obey(device: Device) -> str:
    """Let a device read its policy as an update does, and return what it decides; nothing is downloaded."""
    with device.home.locked(), closing(connect(device.home.config().repository)) as transport:
        return plan.decide(device.home, plan.Trust(device.home, transport))[1].reason


def test_policy_2_is_obeyed_in_the_place_of_policy_1(two: Field):
    offer(two, limit=0)
    assert reason(two.device).startswith("release 2 is not open to this device yet")
    offer(two, policy=2)
    assert two.device.update().reason == "release 2 is installed"
    assert two.device.home.high_water().versions["policy"] == 2


def test_policy_1_is_not_fetched_where_policy_2_is_there(two: Field, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    read = plan.Trust.read
    monkeypatch.setattr(plan.Trust, "read", lambda self, target, limit: asked.append(target.name) or read(self, target, limit))
    offer(two)
    two.device.update()
    assert "rollout/shapes/edge.2.json" in asked
    assert "rollout/shapes/edge.json" not in asked


def test_lower_policy_number_is_refused_and_what_runs_is_kept(two: Field):
    offer(two, policy=7, limit=0)
    two.device.update()
    offer(two, policy=6)
    with untouched(two.device, TrustError, "offers policy 6, this device has obeyed 7", marks=False):
        two.device.update()
    offer(two, policy=7)
    assert reason(two.device) == "release 2 is open to this device"


def test_policy_number_survives_a_lost_cache(two: Field):
    offer(two, policy=7, limit=0)
    two.device.update()
    forget_cache(two.device)
    offer(two, policy=6)
    with untouched(two.device, TrustError, "offers policy 6, this device has obeyed 7", marks=False):
        two.device.update()


def test_thief_of_the_rollout_key_cannot_lock_devices_for_ever(two: Field):
    # The thief raises policy and retry to the maximum and halts. Once the key is replaced, the marks no longer bind.
    offer(two, policy=MAX_COUNT, retry=MAX_COUNT, halt=True)
    assert two.device.update().reason == "release 2 is halted"
    offer(two, policy=3)
    with untouched(two.device, TrustError, f"offers policy 3, this device has obeyed {MAX_COUNT}", marks=False):
        two.device.update()
    replace_key(two)
    two.device.home.save(two.device.state.model_copy(update={"refused": {two.release.manifest: "too slow"}}))
    offer(two, policy=4, retry=1)
    assert two.device.update().reason == "release 2 is installed"
    marks = two.device.home.high_water()
    assert (marks.versions["policy"], marks.versions["retry"]) == (4, 1)
    offer(two, policy=3)
    with untouched(two.device, TrustError, "offers policy 3, this device has obeyed 4", marks=False):
        two.device.update()


def test_policy_of_a_release_that_models_does_not_sign_raises_no_mark(two: Field):
    name_policy(two.repository, policy2(policy=9))
    with untouched(two.device, ManifestError, "names release 5, which the models role does not sign", marks=False):
        two.device.update()
    assert "policy" not in two.device.home.high_water().versions


def test_absence_of_an_obeyed_policy_halts(two: Field):
    two.repository.set_policy(everyone(two.release))
    offer(two, limit=0)
    two.device.update()
    withdraw(two, 2)
    for lost in (False, True):
        if lost:
            forget_cache(two.device)
        found = two.device.update()
        assert found.reason == policy.GONE
        assert two.device.state.seq == 1
    offer(two, policy=2)
    assert two.device.update().reason == "release 2 is installed"


def test_new_rollout_keys_end_the_halt_by_absence(two: Field):
    two.repository.set_policy(everyone(two.release))
    offer(two, limit=0)
    two.device.update()
    withdraw(two, 2)
    assert reason(two.device) == policy.GONE
    replace_key(two)
    assert two.device.update().reason == "release 2 is installed"


def test_device_that_never_obeyed_policy_2_follows_policy_1(two: Field):
    two.repository.set_policy(everyone(two.release))
    assert two.device.update().reason == "release 2 is installed"


def test_retry_lifts_a_refusal_once(two: Field):
    digest = two.release.manifest

    def refuse() -> None:
        two.device.home.save(
            two.device.state.model_copy(update={"refused": {digest: "too slow", OTHER: "too dark"}, "tries": {digest: 2}})
        )

    refuse()
    offer(two, policy=1)
    assert reason(two.device).startswith("release 2 was refused before: too slow")
    offer(two, policy=2, retry=3)
    assert reason(two.device) == "release 2 is open to this device"
    assert obey(two.device) == "release 2 is open to this device"
    assert two.device.state.refused == {OTHER: "too dark"}
    assert two.device.state.tries == {}
    refuse()
    assert reason(two.device).startswith("release 2 was refused before")  # the same number lifts nothing any more
    offer(two, policy=3, retry=2)
    assert obey(two.device).startswith("release 2 was refused before")
    offer(two, policy=4, retry=4)
    assert two.device.update().reason == "release 2 is installed"


def test_look_writes_nothing_that_the_policy_asks_for(two: Field):
    digest = two.release.manifest
    two.device.home.save(two.device.state.model_copy(update={"refused": {digest: "too slow"}, "tries": {digest: 2}}))
    offer(two, policy=7, retry=7, heartbeat=3600, spread=7200)
    two.device.home.disk.replace("resting.json", b"{}")
    name = "highwater.json"

    def files() -> dict[str, bytes]:
        root = two.device.root
        found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        return {path: data for path, data in found.items() if path != name and not path.startswith("metadata/")}

    before = files()
    assert reason(two.device).startswith("release 2 begins on this device at")  # it says what an update would do
    assert files() == before
    assert not {"policy", "retry"} & set(two.device.home.high_water().versions)
    obey(two.device)
    assert {"let-in.json", "heartbeat"} <= set(files())
    assert two.device.state.refused == {}
    assert two.device.home.high_water().versions["policy"] == 7


def test_empty_device_takes_the_last_release_that_was_open_to_all(two: Field, tmp_path: Path):
    (tmp_path / "new").mkdir()
    device = Device.init(tmp_path / "new" / "device", two.repository, name="dev-9")
    first = two.repository.releases(LINE, CLASS)[0]
    offer(two, limit=0)
    assert device.update().changed is False
    offer(two, policy=2, limit=0, acknowledge=True, fallback={"seq": 1, "manifest": first.manifest})
    found = device.update()
    assert (found.reason, device.state.seq) == ("release 1 is installed", 1)
    offer(two, policy=3, halt=True, fallback={"seq": 1, "manifest": first.manifest})
    assert device.update().reason == "release 2 is halted"


@pytest.mark.parametrize(
    ("fallback", "error", "says"), [(1, TrustError, "below the floor"), (3, ManifestError, "models role does not sign")]
)
def test_fallback_below_the_floor_or_unsigned_is_refused(
    two: Field, tmp_path: Path, fallback: int, error: type[Exception], says: str
):
    (tmp_path / "new").mkdir()
    device = Device.init(tmp_path / "new" / "device", two.repository, name="dev-9")
    first = two.repository.releases(LINE, CLASS)[0]
    two.repository.set_policy(everyone(two.release))
    two.repository.set_floor(LINE, CLASS, 2)
    offer(two, limit=0, fallback={"seq": fallback, "manifest": first.manifest if fallback == 1 else OTHER})
    with untouched(device, error, says, marks=False):
        device.update()


def test_device_without_reports_is_let_in_by_policy_1_alone(two: Field):
    two.device.configure(reports="")
    offer(two)
    assert "release 1 is installed; release 2 is not open to this device: this device has no place for reports" in reason(
        two.device
    )
    two.repository.set_policy(everyone(two.release))
    for number, barred, says in (
        (2, {"halt": True}, "release 2 is halted"), (3, {"never": ["dev-1"]}, "release 2 is not meant for dev-1"),
        (4, {"only": ["dev-2"]}, "other devices only"), (5, {"until": 1}, "could be installed until"),
    ):  # fmt: skip
        offer(two, policy=number, **barred)
        assert says in reason(two.device)
    offer(two, policy=6, limit=0)
    assert two.device.update().reason == "release 2 is installed"


def test_device_that_loses_its_place_for_reports_does_not_go_back(two: Field):
    two.repository.set_policy(everyone(two.repository.releases(LINE, CLASS)[0], revert=True))
    offer(two)
    assert two.device.update().reason == "release 2 is installed"
    two.device.configure(reports="")
    assert "release 2 is installed" in reason(two.device) or "release 2 runs" in reason(two.device)
    assert two.device.state.seq == 2


def test_spread_counts_from_when_the_device_was_let_in(two: Field, monkeypatch: pytest.MonkeyPatch):
    offer(two, spread=7200)
    now = [10_000_000_000]
    late = policy.delay("dev-1", "s", 7200)
    assert late > 60
    monkeypatch.setattr(plan.time, "time", lambda: now[0])
    trust_free = two.device.home
    made = policy2(two.release, spread=7200)
    assert plan._since(trust_free, made, 1000) == 1000
    assert plan._since(trust_free, made, 1000 + late) == 1000
    assert plan._since(trust_free, made, 900) == 900  # the clock was set back
    assert plan._since(trust_free, policy2(spread=7200), 2000) == 2000  # another release


def test_heartbeat_of_the_policy_is_left_for_the_reports(two: Field):
    assert plan.heartbeat(two.device.home) == 6 * 3600
    offer(two, heartbeat=3600, limit=0)
    two.device.update()
    assert plan.heartbeat(two.device.home) == 3600
    for torn in (b"", b"soon", b"1"):
        two.device.home.disk.replace("heartbeat", torn)
        assert plan.heartbeat(two.device.home) in (3600, 6 * 3600)


# The wait for the factory


class Gateway:
    """Stands for the factory's side of reports over TLS: it keeps or refuses what is queued, or is away."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.answers: Literal["accepted", "refused", "away"] = "away"
        self.kept: dict[str, str] = {}
        """Bundle → fate of the newest report that it starts."""
        self.started = 0
        """Reports that a bundle starts, which were answered."""
        self.sent = 0
        patch.setattr(reports, "send", self.send)
        patch.setattr(reports, "fate", self.fate)

    @staticmethod
    def waiting(home: Home) -> list[str]:
        paths = sorted(home.disk.path("queue").glob("*.json"))
        found = [open_line(path.read_bytes()).report for path in paths]
        return [str(report.manifest) for report in found if report.event == "starting"]

    def send(self, home: Home) -> int:
        self.sent += 1
        if self.answers != "away":
            for digest in self.waiting(home):
                self.kept[digest], self.started = self.answers, self.started + 1
            for path in home.disk.path("queue").glob("*.json"):
                path.unlink()
        return len(list(home.disk.path("queue").glob("*.json")))

    def fate(self, home: Home, digest: str) -> str:
        return "waiting" if digest in self.waiting(home) else self.kept.get(digest, "none")


class Waiting:
    """Time that passes only while an update waits; `then` happens at the n-th pause."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()
        self.then: dict[int, Callable[[], object]] = {}

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)
        self.then.get(len(self.pauses), lambda: None)()

    @property
    def patience(self) -> Patience:
        return Patience(lambda: self.now, self.pause)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    return Gateway(monkeypatch)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the trials."""
    made: list[str] = []
    really = trial._try

    def tried(home: Home, manifest: Manifest, *given: Any) -> float:
        made.append(manifest.digest)
        return really(home, manifest, *given)

    monkeypatch.setattr(trial, "_try", tried)
    return made


@pytest.fixture
def asking(two: Field) -> Field:
    """Provide a device that reports over TLS, under a policy that asks for an acknowledgement."""
    two.device.configure(reports=HTTPS)
    offer(two, acknowledge=True)
    return two


def update(device: Device, waiting: Waiting) -> Outcome:
    with device.home.locked():
        return updater.update(device.home, patience=waiting.patience)


def test_kept_report_lets_the_device_switch_at_once(asking: Field, gateway: Gateway, trials: list[str]):
    gateway.answers, waiting = "accepted", Waiting()
    assert update(asking.device, waiting).reason == "release 2 is installed"
    assert (waiting.pauses, len(trials), gateway.started) == ([], 1, 1)
    assert not asking.device.home.disk.path(acknowledgement.FILE).exists()


def test_gateway_that_is_away_only_pauses(asking: Field, gateway: Gateway, trials: list[str]):
    waiting, before = Waiting(), asking.device.state
    found = update(asking.device, waiting)
    assert found.reason.startswith("release 2 waited 15m for the factory to acknowledge that it starts")
    assert "what runs is kept" in found.reason
    assert waiting.pauses == [60.0] * 15
    assert asking.device.state == before  # nothing is counted against the bundle
    update(asking.device, waiting)
    gateway.answers = "accepted"
    assert update(asking.device, waiting).reason == "release 2 is installed"
    assert len(trials) == 1  # the result was kept
    assert gateway.started == 1  # and the report that waited was not queued again


def test_gateway_that_comes_back_is_noticed_within_the_wait(asking: Field, gateway: Gateway, trials: list[str]):
    waiting = Waiting()
    waiting.then[3] = lambda: setattr(gateway, "answers", "accepted")
    assert update(asking.device, waiting).reason == "release 2 is installed"
    assert len(waiting.pauses) == 3


def test_halt_arrives_while_a_device_waits(asking: Field, gateway: Gateway):
    waiting, before = Waiting(), asking.device.state

    def halt() -> None:
        offer(asking, policy=2, acknowledge=True, halt=True)
        gateway.answers = "accepted"  # at the same moment

    waiting.then[2] = halt
    assert update(asking.device, waiting).reason == "stopped before the switch: release 2 is halted"
    assert len(waiting.pauses) == 2
    assert asking.device.state == before


def test_policy_that_asks_no_longer_ends_the_wait(asking: Field, gateway: Gateway):
    waiting = Waiting()
    waiting.then[1] = lambda: offer(asking, policy=2)
    assert update(asking.device, waiting).reason == "release 2 is installed"


def test_refused_report_never_switches(asking: Field, gateway: Gateway, trials: list[str]):
    gateway.answers, waiting, before = "refused", Waiting(), asking.device.state
    for number in (1, 2):
        assert "because the factory refused the report of it" in update(asking.device, waiting).reason
        assert (asking.device.state, gateway.started) == (before, number)
    assert waiting.pauses == []
    gateway.answers = "accepted"  # the device was enrolled anew: another report asks again
    assert update(asking.device, waiting).reason == "release 2 is installed"
    assert (gateway.started, len(trials)) == (3, 1)


@pytest.mark.parametrize(
    ("fate", "says"), [("none", "this device lost its report of it"), ("delivered", "left this device without TLS")]
)
def test_wait_that_ends_at_once_does_not_say_that_it_waited(
    asking: Field, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, fate: str, says: str
):
    monkeypatch.setattr(reports, "fate", lambda *_: fate)
    waiting = Waiting()
    found = update(asking.device, waiting).reason
    assert found.startswith("release 2 does not start yet, because ")
    assert says in found
    assert "waited" not in found
    assert waiting.pauses == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "folder", ""])
def test_answer_over_plain_http_or_a_folder_does_not_count(asking: Field, gateway: Gateway, trials: list[str], address: str):
    asking.device.configure(reports=str(asking.folder / "reports") if address == "folder" else address)
    gateway.answers = "accepted"
    found = update(asking.device, Waiting())
    assert not found.changed
    assert "so it installs only what is opened to devices that are not watched" in found.reason
    assert trials == []


def test_killed_while_waiting_resumes_without_a_second_trial(asking: Field, gateway: Gateway, trials: list[str]):
    waiting = Waiting()

    def kill() -> None:
        raise Cut

    waiting.then[2] = kill
    with pytest.raises(Cut):
        update(asking.device, waiting)
    gateway.answers = "accepted"
    assert update(asking.device, Waiting()).reason == "release 2 is installed"
    assert (len(trials), gateway.started) == (1, 1)


def test_trial_is_repeated_under_other_circumstances(
    asking: Field, gateway: Gateway, trials: list[str], monkeypatch: pytest.MonkeyPatch
):
    update(asking.device, Waiting())
    monkeypatch.setattr(acknowledgement.importlib.metadata, "version", lambda _: "99.0")
    update(asking.device, Waiting())
    assert len(trials) == 2
    asking.device.home.disk.replace(acknowledgement.FILE, b"{torn")
    update(asking.device, Waiting())
    assert len(trials) == 3


def test_repository_that_is_away_while_a_device_waits_counts_nothing(asking: Field, gateway: Gateway, trials: list[str]):
    waiting, before, place = Waiting(), asking.device.state, asking.repository.folder
    waiting.then[1] = lambda: place.rename(place.with_name("away"))
    with pytest.raises(TransferError):
        update(asking.device, waiting)
    assert asking.device.state == before
    place.with_name("away").rename(place)
    gateway.answers = "accepted"
    assert update(asking.device, waiting).reason == "release 2 is installed"
    assert len(trials) == 1


def test_rolled_back_bundle_is_tried_again_before_it_starts_again(asking: Field, gateway: Gateway, trials: list[str]):
    gateway.answers = "accepted"
    update(asking.device, Waiting())
    trial.rollback(asking.device.home)
    trial.forget(asking.device.home, asking.release.manifest)
    assert update(asking.device, Waiting()).reason == "release 2 is installed"
    assert (len(trials), gateway.started) == (2, 2)


# What the factory says of a device


def test_factory_computes_what_the_device_computes():
    made = policy2(limit=BUCKETS // 10, steps=[BUCKETS // 10, BUCKETS // 2], first=["dev-3"], never=["dev-4"])
    for number in range(200):
        name = f"dev-{number}"
        let_in = policy.admit(made, config(device=name), State(), True, 0).install
        assert rollout.holds(made, name, 0) == let_in, name
        assert (rollout.wave_of(made, name) == 0) == let_in, name
    assert [rollout.wave_of(made, name) for name in ("dev-3", "dev-4")] == [0, None]
    assert not rollout.holds(made.model_copy(update={"halt": True}), "dev-3", 0)
    assert not rollout.holds(made.model_copy(update={"not_before": 1}), "dev-3", 0)
    assert rollout.wave_of(policy2(only=["site=berlin"]), "dev-1") == 0  # the factory does not decide about tags
    assert rollout.wave_of(policy2(only=["dev-2"]), "dev-1") is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "release 5 is open to 100 % of the watched devices"),
        (
            {"limit": BUCKETS // 200, "steps": [BUCKETS // 200, BUCKETS]},
            "release 5 is open to 0.5 % of the watched devices, then to 100 %",
        ),
        ({"halt": True}, "release 5 is halted"),
        ({"until": 999}, "release 5 could be installed until 1970-01-01 00:16 UTC"),
        ({"not_before": 1060}, "release 5 opens to 100 % of the watched devices at 1970-01-01 00:17 UTC (in 1m)"),
        ({"never": list("abcdef")}, "release 5 is open to 100 % of the watched devices, never to a, b, c, d, e …"),
    ],
)
def test_rollout_is_described_in_a_line(fields: dict[str, Any], text: str):
    assert rollout.describe(policy2(**fields), now=1000) == text

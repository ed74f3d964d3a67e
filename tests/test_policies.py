"""Rollouts as an operator makes them: what is refused, what is printed, and that a halt does not wait."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock, Timeout
from typer.testing import CliRunner

from flows import policies
from flows.cli import app
from flows.errors import BusyError
from flows.policies import Shares
from flows.setup import create
from flows.workspace import Workspace
from ota.errors import OperatorError
from ota.policy import BUCKETS, Fallback, Policy, Policy2
from ota.release import fielded, rollout
from ota.release.bundle import Bundle
from ota.release.keys import KeyRing
from ota.release.repository import Repository
from ota.report import DeviceReport, seal
from registry.errors import LedgerError
from tests.fleet_kit import CLASS, LINE, Device, everyone

pytest_plugins = ("tests.fleet_kit",)

SUBJECT = "shapes/I/full"
HEAVY = ("prefect", "mlflow", "torch", "dvc", "onnx", "matplotlib", "pandas")  # boto3 comes with securesystemslib's signers


class Factory:
    """A workspace in which champions are made and released, with only what a rollout needs."""

    def __init__(self, workspace: Workspace, bundles: dict[str, Bundle]) -> None:
        self.workspace, self.bundles, self.versions = workspace, bundles, dict[str, int]()

    def promote(self, name: str) -> None:
        """Make the model of a bundle champion, as `ferry promote` writes it into the ledger."""
        version = self.versions.setdefault(name, len(self.versions) + 1)
        weights = self.bundles[name].manifest.entry("weights", "full").sha256
        facts = {
            "version": version,
            "from": None,
            "weights": weights,
            "overruled": False,
            "how": "command",
            "gate": "promote",
            "decision": "",
        }
        self.workspace.ledger.append("promotion", SUBJECT, "a test", facts | {"becomes_anchor": False})

    def release(self, name: str) -> int:
        made = self.bundles[name]
        return self.workspace.repository.publish_release(made.manifest, made.folder, self.workspace.ledger.head(), []).seq

    def ferry(self, *words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["--quiet", "-w", str(self.workspace.root), *words])
        assert result.exit_code == code, result.output
        return result.output

    def facts(self) -> dict[str, bytes]:
        """Collect all that a rollout may change."""
        places = [self.workspace.root / name for name in ("repository", "published")]
        files = {str(path): path.read_bytes() for place in places for path in sorted(place.rglob("*")) if path.is_file()}
        return files | {"ledger": self.workspace.ledger.head().encode()}

    def device(self, folder: Path, seq: int) -> Device:
        made = Device.init(folder / "device", self.workspace.repository, address=str(self.workspace.root / "published"))
        made.configure(reports=str(self.workspace.inbox))
        self.ferry("fleet", "enroll", "dev-1", re.findall(r"enroll dev-1 ([0-9a-f]{64})", made.command(*self._again(made)))[0])
        made.update()
        assert made.state.seq == seq
        return made

    def _again(self, device: Device) -> tuple[str, ...]:
        config, anchor = device.home.config(), device.root.parent / "root.json"
        return (
            "init", "--device", config.device, "--line", config.line, "--class", config.device_class, "--repository", config.repository,
            "--reports", config.reports, "--root", str(anchor), "--root-sha256", config.root_sha256,
        )  # fmt: skip


@pytest.fixture
def factory(tmp_path: Path, bundles: dict[str, Bundle]) -> Iterator[Factory]:
    workspace = create(tmp_path / "ws", [LINE])
    yield Factory(workspace, bundles)
    workspace.ledger.close()
    workspace.fleet.close()


@pytest.fixture
def two(factory: Factory) -> Factory:
    """Make two releases; the second, of the present champion, is rolled out."""
    for name in ("first", "second"):
        factory.promote(name)
        factory.release(name)
        factory.ferry("rollout", "start", LINE, "--waves", "100", "--soak", "0")
    return factory


def refused(factory: Factory, sentence: str, *words: str, code: int = 3) -> str:
    before = factory.facts()
    told = factory.ferry(*words, code=code)
    assert re.search(sentence, told), told
    assert factory.facts() == before
    return told


def test_start_takes_the_release_of_the_present_champion(two: Factory):
    two.release("garbage")  # newer, but of no champion
    two.ferry("rollout", "start", LINE)
    policy = two.workspace.repository.policy2(LINE, CLASS)
    assert policy is not None
    assert policy.seq == 2


def test_start_without_a_release_of_the_champion_is_refused(factory: Factory):
    refused(factory, "has no release; publish one with `ferry release shapes/edge`", "rollout", "start", LINE)
    factory.release("first")
    refused(
        factory,
        r"no release of shapes/edge holds its present champions; publish one .* --release \(1\)",
        "rollout",
        "start",
        LINE,
    )
    factory.promote("second")
    refused(factory, "no release of shapes/edge holds its present champions", "rollout", "start", LINE)
    factory.ferry("rollout", "start", LINE, "--release", "1")


def test_older_release_is_not_signed_without_revert(two: Factory):
    told = refused(two, "release 1 is older than 2", "rollout", "start", LINE, "--release", "1")
    (words,) = re.findall(r"`ferry (rollout start .*?)`", told)
    assert words == "rollout start shapes/edge --release 1 --revert"
    two.ferry(*words.split())


def test_older_release_is_not_signed_while_a_device_runs_a_newer_one(factory: Factory, tmp_path: Path):
    for name in ("first", "second"):
        factory.promote(name)
        factory.release(name)
    factory.ferry("rollout", "start", LINE, "--release", "2", "--waves", "100", "--soak", "0")
    factory.device(tmp_path, seq=2)
    factory.ferry("fleet", "status")
    factory.ferry("rollout", "start", LINE, "--release", "1", "--revert", "--waves", "0.01")
    refused(
        factory, "release 1 is older than 2, which was rolled out or runs on devices", "rollout", "start", LINE, "--release", "1"
    )


def test_printed_commands_take_a_device_back(two: Factory, tmp_path: Path):
    """Follow what is printed after a rollback: nothing leads to the version just rolled back."""
    device = two.device(tmp_path, seq=2)
    two.promote("first")  # what `ferry rollback` writes
    hint = policies.after_promotion(two.workspace, LINE, "I", "full")
    assert hint == "to make all devices go back to it at once, run `ferry rollout start shapes/edge --release 1 --revert`"
    (words,) = re.findall(r"`ferry (.*?)`", hint)
    refused(two, "release 1 is older than 2.*--release 1 --revert", "rollout", "start", LINE)
    two.ferry(*words.split())
    device.update()
    assert (device.state.seq, device.active) == (1, two.bundles["first"].manifest.digest)


def test_next_step_is_what_is_true(factory: Factory):
    factory.promote("first")
    assert policies.after_promotion(factory.workspace, LINE, "I", "full") == "publish it with `ferry release shapes/edge`"
    assert policies.after_promotion(factory.workspace, LINE, "II", "full") == "no device class of shapes runs it"
    factory.release("first")

    def step(number: int) -> str:
        return fielded.next_step(factory.workspace, LINE, CLASS, number)

    assert step(1) == "no device installs it yet; run `ferry rollout start shapes/edge`"
    factory.ferry("rollout", "start", LINE, "--waves", "100", "--soak", "0")
    assert step(1) == "release 1 is open to 100 % of the watched devices"
    factory.promote("second")
    factory.release("second")
    assert step(2) == "no device installs it yet; run `ferry rollout start shapes/edge`"
    factory.ferry("rollout", "start", LINE, "--waves", "100", "--soak", "0")
    assert step(1) == "to make all devices go back to it at once, run `ferry rollout start shapes/edge --release 1 --revert`"
    factory.ferry("rollout", "halt", LINE)
    assert step(2) == "release 2 is halted"


def test_first_rollout_in_waves_warns(factory: Factory):
    factory.promote("first")
    factory.release("first")
    told = factory.ferry("rollout", "start", LINE, "--waves", "1,100")
    assert "this is the first rollout of shapes/edge: devices have nothing to run before their wave opens; `--waves 100`" in told
    assert "first rollout" not in factory.ferry("rollout", "start", LINE, "--waves", "1,100")


def test_whole_first_rollout_does_not_warn(factory: Factory):
    factory.promote("first")
    factory.release("first")
    assert "first rollout" not in factory.ferry("rollout", "start", LINE, "--waves", "100")


@pytest.mark.parametrize(
    ("words", "why", "facts"),
    [
        (
            ("rollout", "start", LINE, "--waves", "50,100", "--soak", "9"),
            "waves 50,100 % of the fleet",
            {"release": 2, "soak": 9},
        ),
        (("rollout", "halt", LINE, "--reason", "blurred"), "blurred", {"release": 2}),
        (("rollout", "renew", LINE), "renewed, waves unchanged", {"release": 2}),
        (("trust", "floor", LINE, "2"), "floor 2", {"floor": 2}),
    ],
)
def test_each_change_is_recorded_and_published(two: Factory, words: tuple[str, ...], why: str, facts: dict[str, Any]):
    before = two.facts()
    two.ferry(*words)
    entry = two.workspace.ledger.entries()[-1]
    assert (entry.subject, entry.why) == ("shapes/edge", why)
    assert entry.facts.items() >= facts.items()
    for name in ("repository", "published"):
        stamp = str(two.workspace.root / name / "metadata/timestamp.json")
        assert two.facts()[stamp] != before[stamp]


@pytest.mark.parametrize(
    "change",
    [
        lambda w: policies.start(w, LINE, CLASS, Shares([100]), 2), lambda w: policies.renew(w, LINE, CLASS),
        lambda w: policies.floor(w, LINE, CLASS, 2), policies.publish,
    ],
    ids=["start", "renew", "floor", "publish"],
)  # fmt: skip
def test_each_change_holds_the_lock(two: Factory, monkeypatch: pytest.MonkeyPatch, change: Any):
    monkeypatch.setattr("flows.workspace.LOCK_SECONDS", 0.0)
    before = two.facts()
    with FileLock(two.workspace.work / "records.lock"), pytest.raises(BusyError):
        change(two.workspace)
    assert two.facts() == before


@pytest.mark.parametrize("change", ["renew", "floor"])
def test_nothing_is_halted_between_reading_a_policy_and_signing_it_anew(
    two: Factory, monkeypatch: pytest.MonkeyPatch, change: str
):
    """Hold the lock from reading to signing, or a halt in between would be undone."""
    read, lock = Repository.policy, two.workspace.repository._lock.lock_file
    free = list[bool]()

    def reading(repository: Repository, line: str, device_class: str) -> Policy | None:
        try:
            with FileLock(lock, timeout=0):
                free.append(True)
        except Timeout:
            free.append(False)
        return read(repository, line, device_class)

    monkeypatch.setattr(Repository, "policy", reading)
    if change == "renew":
        policies.renew(two.workspace, LINE, CLASS)
    else:
        policies.floor(two.workspace, LINE, CLASS, 2)
    assert free
    assert not any(free)


def test_halt_goes_out_while_another_ferry_holds_the_records(two: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Halt while another command holds the records: it may be suspended, and an emergency stop waits for nobody."""
    monkeypatch.setattr(policies, "HALT_SECONDS", 0.0)
    entries = two.workspace.ledger.head()
    device = Device.init(tmp_path / "device", two.workspace.repository, address=str(two.workspace.root / "published"))
    with FileLock(two.workspace.work / "records.lock"):
        told = two.ferry("rollout", "halt", LINE, code=4)
        assert "release 2 is halted, and that is published, but it could not be recorded" in told
        assert "another ferry process holds the records" in told
        outcome = device.update()
        again = device.update()
    assert (outcome.reason, device.state.seq) == ("release 1 is installed", 1)  # it had nothing, and that was open to all before
    assert (again.changed, again.reason) == (False, "release 2 is halted")
    assert two.workspace.ledger.head() == entries
    two.ferry("rollout", "halt", LINE, "--reason", "")  # and is recorded once they are free
    assert [(e.kind, e.why) for e in two.workspace.ledger.entries()][-1] == ("halt", "halted by hand")


def test_halt_does_not_wait_for_the_files_of_a_release_that_is_being_published(two: Factory):
    """Publish a halt without the files of a new release, which may take minutes.

    No policy names these files yet, and the command that publishes the release copies them all.
    """
    large = two.workspace.repository.objects / ("e" * 64)
    large.write_bytes(b"large")
    published = two.workspace.root / "published"
    two.ferry("rollout", "halt", LINE)
    assert json.loads((published / "metadata/timestamp.json").read_bytes()) == json.loads(
        (two.workspace.repository.metadata / "timestamp.json").read_bytes()
    )
    assert not (published / "objects" / large.name).exists()
    policies.publish(two.workspace)
    assert (published / "objects" / large.name).read_bytes() == b"large"


def test_process_that_never_ends_its_signing_is_named(two: Factory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ota.release.repository.SIGNING_SECONDS", 0.0)
    before = two.facts()
    with FileLock(two.workspace.repository.folder / ".signing.lock"):
        told = two.ferry("rollout", "halt", LINE, code=3)
    assert re.search(r"another process has been signing .*end the one that holds .*\.signing\.lock", told)
    assert two.facts() == before


def test_changes_at_the_same_moment_are_all_signed(two: Factory):
    """Change the repository from processes that share no other lock, as a halt and a release do."""
    folder, keys = two.workspace.repository.folder, two.workspace.keys
    first = json.loads((folder / "metadata/timestamp.json").read_bytes())["signed"]["version"]

    def renew(_: int) -> None:
        own = Repository(folder, KeyRing(keys.folder))
        for _ in range(5):
            own.refresh()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(renew, range(4)))
    assert json.loads((folder / "metadata/timestamp.json").read_bytes())["signed"]["version"] == first + 20
    assert two.workspace.repository.policy2(LINE, CLASS)


def test_rollout_that_changes_one_of_the_same_release_says_what_was(two: Factory):
    two.ferry("rollout", "halt", LINE)
    assert "before, release 2 is halted" in two.ferry("rollout", "start", LINE)
    assert "before, release 2 is open to 1 % of the watched devices, then to 10 %" in two.ferry(
        "rollout", "start", LINE, "--waves", "50"
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("rollout", "start", LINE, "--soak", "99999999999999999"), 2), (("rollout", "start", LINE, "--soak", "-1"), 2),
        (("trigger", LINE, "--reason", ""), 3), (("trigger", LINE, "--reason", "x" * 100_000), 3),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_told_in_a_sentence(two: Factory, words: tuple[str, ...], code: int):
    told = refused(two, r"(Invalid value|ferry: ).*", *words, code=code)
    assert "Traceback" not in told
    assert "pydantic" not in told


@pytest.mark.parametrize("change", ["start", "renew", "floor"])
def test_nothing_but_a_halt_is_signed_that_cannot_be_recorded(two: Factory, monkeypatch: pytest.MonkeyPatch, change: str):
    def damaged() -> None:
        raise LedgerError("damaged")

    monkeypatch.setattr(two.workspace.ledger, "check_ready", damaged)
    before = two.facts()
    given = {"start": (Shares([100]), 2), "renew": (), "floor": (2,)}[change]
    with pytest.raises(LedgerError):
        getattr(policies, change)(two.workspace, LINE, CLASS, *given)
    assert two.facts() == before


LIGHT = {
    "halt": (("rollout", "halt", LINE), 0),
    "start": (("rollout", "start", LINE), 0),
    "renew": (("rollout", "renew", LINE), 0),
    "status": (("rollout", "status", LINE), 0),
    "refresh": (("trust", "refresh"), 0),
    "wrong waves": (("rollout", "start", LINE, "--waves", "ten"), 3),
    "falling waves": (("rollout", "start", LINE, "--waves", "10,1"), 3),
    "wrong release": (("rollout", "start", LINE, "--release", "9"), 3),
    "wrong line": (("release", "nosuch"), 3),
    "wrong line to retrain": (("retrain", "nosuch"), 3),
    "wrong cron": (("serve", "--cron", "every monday"), 3),
    "release held": (("release", LINE), 4),
    "retraining held": (("retrain", LINE), 4),
    "serving held": (("serve",), 4),
}


@pytest.mark.parametrize("name", LIGHT)
def test_what_must_be_quick_loads_nothing_large(two: Factory, name: str):
    words, code = LIGHT[name]
    program = (
        "import json, sys; from flows.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))"
    )
    locks = [FileLock(two.workspace.work / f"{part}.lock") for part in ("release", "retraining", "serving")]
    for lock in locks if name.endswith("held") else ():
        lock.acquire()
    told = subprocess.run([sys.executable, "-c", program, "-w", str(two.workspace.root), *words], capture_output=True, text=True)
    for lock in locks:
        lock.release(force=True)
    ended, modules = json.loads(told.stdout.splitlines()[-1])
    assert ended == code, told.stderr
    assert [heavy for heavy in HEAVY if heavy in modules] == []


@pytest.mark.parametrize("shares", [[], [0], [10, 10], [101], [float("nan")], list(range(1, 18))])
def test_shares_that_do_not_rise_are_refused_before_anything_is_read(two: Factory, shares: list[float]):
    before = two.facts()
    with pytest.raises(OperatorError):
        policies.start(two.workspace, "nosuch", "nosuch", Shares(shares))
    assert two.facts() == before


def test_one_process_at_a_time_opens_mlflow(factory: Factory, monkeypatch: pytest.MonkeyPatch):
    """Open MLflow in one process at a time.

    MLflow sets a new database up step by step. Two processes that did so together failed with "duplicate column name".
    """
    lock, opened = FileLock(factory.workspace.work / "mlflow.lock"), []

    def catalog(*given: object) -> object:
        with pytest.raises(Timeout):
            FileLock(lock.lock_file).acquire(timeout=0)
        opened.append(given)
        return object()

    monkeypatch.setattr("registry.catalog.Catalog", catalog)
    assert Workspace(factory.workspace.root).catalog
    assert len(opened) == 1
    lock.acquire(timeout=0)
    lock.release()


# Policy 2 and the devices that are not watched


def in_force(factory: Factory) -> tuple[Policy2, Policy | None]:
    found = policies.InForce.of(factory.workspace, LINE, CLASS)
    assert found.watched
    return found.watched, found.waves


def test_start_opens_the_first_share_and_widen_the_next(two: Factory):
    two.ferry("rollout", "start", LINE, "--waves", "1,10,100")
    watched, waves = in_force(two)
    assert (watched.limit, watched.steps) == (BUCKETS // 100, [BUCKETS // 100, BUCKETS // 10, BUCKETS])
    assert waves is None  # nothing was ever opened to devices that are not watched
    number = watched.policy
    assert "release 2 is open to 10 % of the watched devices, then to 100 %" in two.ferry("rollout", "widen", LINE)
    assert (in_force(two)[0].policy, in_force(two)[0].limit) == (number + 1, BUCKETS // 10)
    two.ferry("rollout", "widen", LINE, "--to", "50")
    assert in_force(two)[0].limit == BUCKETS // 2
    refused(two, "release 2 is open to 50 % of the watched devices already", "rollout", "widen", LINE, "--to", "20")
    two.ferry("rollout", "widen", LINE)
    assert in_force(two)[0].limit == BUCKETS
    refused(two, "release 2 is open to 100 % of the watched devices already", "rollout", "widen", LINE)
    last = two.workspace.ledger.entries(f"{LINE}/{CLASS}")[-1]
    assert (last.kind, last.why, last.facts) == (
        "rollout",
        "widened to 100 % of the fleet",
        {"release": 2, "policy": number + 3},
    )


def test_devices_that_are_not_watched_come_last(two: Factory):
    two.ferry("rollout", "start", LINE)
    refused(
        two, "release 2 is open to 1 % of the watched devices; open it to all", "rollout", "widen", LINE, "--unwatched", "100"
    )
    refused(
        two, "release 2 is open to 1 % of the watched devices; open it to all", "rollout", "start", LINE, "--unwatched", "100"
    )
    two.ferry("rollout", "widen", LINE, "--to", "100")
    told = two.ferry("rollout", "widen", LINE, "--unwatched", "10,100", "--soak", "2h")
    assert (
        "release 2 is open to 100 % of the watched devices; for devices that are not watched, release 2 is open to 10 % of the fleet"
        in told
    )
    watched, waves = in_force(two)
    assert watched.limit == BUCKETS
    assert waves
    assert [wave.bps for wave in waves.waves] == [1000, 10_000]
    assert waves.waves[1].not_before - waves.waves[0].not_before == 7200
    two.ferry("rollout", "widen", LINE, "--unwatched", "100")
    assert "release 2 is open to 100 % of the fleet" in two.ferry("rollout", "status", LINE)


def test_policy_1_stays_on_what_it_named_before(two: Factory):
    two.ferry("rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    before = in_force(two)[1]
    two.promote("garbage")
    two.release("garbage")
    two.ferry("rollout", "start", LINE)
    watched, waves = in_force(two)
    assert (watched.seq, waves) == (3, before)
    assert watched.fallback == Fallback(seq=2, manifest=str(before and before.manifest))
    two.ferry("rollout", "halt", LINE)
    watched, waves = in_force(two)
    assert watched.halt
    assert waves == before  # release 2 did no harm


def test_fallback_is_the_last_release_that_was_open_to_all(two: Factory):
    first = two.workspace.repository.releases(LINE, CLASS)[0]
    assert in_force(two)[0].fallback == Fallback(seq=1, manifest=first.manifest)
    two.ferry("rollout", "start", LINE, "--waves", "10")
    assert in_force(two)[0].fallback == Fallback(seq=1, manifest=first.manifest)
    two.promote("garbage")
    two.release("garbage")
    two.ferry("rollout", "start", LINE)
    assert in_force(two)[0].fallback == Fallback(seq=1, manifest=first.manifest)  # the second was open to 10 % only
    two.ferry("trust", "floor", LINE, "3")
    assert in_force(two)[0].fallback is None


def test_revert_opens_both_at_once_and_names_no_fallback(two: Factory):
    two.ferry("rollout", "start", LINE, "--release", "1", "--revert")
    watched, waves = in_force(two)
    assert waves
    assert (watched.seq, watched.revert, watched.limit, watched.fallback) == (1, True, BUCKETS, None)
    assert (waves.seq, waves.revert, rollout.is_open(waves)) == (1, True, True)


@pytest.mark.parametrize(
    "terms", [("--only", "lab-01"), ("--never", "press-09"), ("--not-before", "3h"), ("--until", "2030-01-02T03:04")]
)
def test_revert_with_terms_reaches_no_device_that_does_not_obey_them(two: Factory, terms: tuple[str, str]):
    two.ferry("rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    before = in_force(two)[1]
    two.ferry("rollout", "start", LINE, "--release", "1", "--revert", *terms)
    watched, waves = in_force(two)
    assert (watched.seq, watched.revert, watched.limit) == (1, True, BUCKETS)
    assert waves == before  # it still names release 2
    two.ferry("rollout", "start", LINE, "--release", "1", "--revert", *terms, "--unwatched", "100")
    waves = in_force(two)[1]
    assert waves
    assert waves.seq == 1


@pytest.mark.parametrize("terms", [("--only", "lab-01"), ("--not-before", "3h")])
def test_unwatched_devices_wait_for_all_watched_ones(two: Factory, terms: tuple[str, str]):
    """Open the whole limit to some devices, or for later: the release is not open to all watched devices."""
    before = in_force(two)[1]
    says = "so it is not opened to devices that are not watched, which policy 1 lets in whatever `--only`"
    refused(two, says, "rollout", "start", LINE, "--waves", "100", *terms, "--unwatched", "100")
    two.ferry("rollout", "start", LINE, "--waves", "100", *terms)
    refused(two, says, "rollout", "widen", LINE, "--unwatched", "100")
    assert in_force(two)[1] == before


def test_device_that_policy_1_cannot_keep_out_is_named(two: Factory):
    before = in_force(two)[1]
    for name, agent in (("dev-1", "0.2.0"), ("dev-2", "0.3.0"), ("dev-3", ""), ("dev-4", "0.2.0")):
        key = Ed25519PrivateKey.generate()
        two.workspace.fleet.enroll(name, key.public_key().public_bytes_raw().hex())
        if agent:
            made = DeviceReport(
                schema_version=2, device=name, boot="b", number=1, time=0, line=LINE, device_class=CLASS, event="confirmed",
                manifest=None, active=None, agent=agent,
            )  # fmt: skip
            two.workspace.fleet.receive(seal(made, key))
    two.workspace.fleet.tag("dev-3", {"site": "berlin"})
    words = ("rollout", "start", LINE, "--waves", "100", "--never", "dev-1,dev-2,site=berlin")
    says = r"`--never` names dev-1 \(0\.2\.0\), dev-3 \(never reported\), and policy 1, which such devices read, cannot keep them out"
    refused(two, says, *words, "--unwatched", "100")
    two.ferry(*words)
    refused(two, says, "rollout", "widen", LINE, "--unwatched", "100")
    assert in_force(two)[1] == before
    two.ferry("rollout", "start", LINE, "--waves", "100", "--never", "dev-2", "--unwatched", "100")  # that one obeys policy 2
    assert in_force(two)[1] != before


def test_both_policies_change_in_one_commit(two: Factory):
    two.ferry("rollout", "start", LINE, "--waves", "100", "--unwatched", "100")
    for words in (("halt", LINE), ("renew", LINE), ("start", LINE, "--waves", "100", "--unwatched", "100")):
        before = two.workspace.repository.in_force("rollout").signed.version
        two.ferry("rollout", *words)
        assert two.workspace.repository.in_force("rollout").signed.version == before + 1
        watched, waves = in_force(two)
        assert waves
        assert watched.halt == waves.halt == (words[0] != "start")


def test_terms_of_a_rollout_are_signed(two: Factory):
    two.ferry(
        "rollout", "start", LINE, "--first", "press-07,site=berlin", "--only", "site=berlin", "--never", "press-09", "--not-before",
        "2030-01-02T03:04", "--until", "2030-02-01T00:00+01:00", "--acknowledge", "--spread", "1h", "--heartbeat", "2h",
    )  # fmt: skip
    made, _ = in_force(two)
    assert (made.first, made.only, made.never) == (["press-07", "site=berlin"], ["site=berlin"], ["press-09"])
    assert (made.not_before, made.until) == (1_893_553_440, 1_896_130_800)
    assert (made.acknowledge, made.spread, made.heartbeat) == (True, 3600, 7200)
    two.ferry("rollout", "start", LINE)
    made, _ = in_force(two)
    assert (made.first, made.acknowledge, made.heartbeat) == ([], False, 7200)  # only the heartbeat is no matter of one rollout


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (("--first", "Press 7"), "first.0", 3), (("--never", ",".join(f"d{i}" for i in range(201))), "at most 200 entries", 3),
        (("--not-before", "tomorrow"), "is no moment", 2), (("--until", "2030-13-01"), "is no moment", 2),
        (("--heartbeat", "30m"), "is not between 1h and 1d", 2), (("--spread", "8d"), "is not between", 2),
        (("--not-before", "3h", "--until", "2h"), "a rollout ends after it begins", 3), (("--unwatched", "x"), "are not shares", 3),
    ],
)  # fmt: skip
def test_terms_that_cannot_be_are_refused(two: Factory, words: tuple[str, ...], says: str, code: int):
    refused(two, says, "rollout", "start", LINE, *words, code=code)


def test_retry_counts_up_over_rollouts(two: Factory):
    two.ferry("rollout", "retry", LINE)
    assert in_force(two)[0].retry == 1
    two.ferry("rollout", "start", LINE)
    two.ferry("rollout", "retry", LINE)
    assert in_force(two)[0].retry == 2


def test_halted_rollout_is_not_widened(two: Factory):
    two.ferry("rollout", "start", LINE)
    two.ferry("rollout", "halt", LINE)
    refused(two, "release 2 is halted, so it is not opened further", "rollout", "widen", LINE)


def test_first_start_after_the_update_writes_policy_2_beside_policy_1(factory: Factory):
    factory.promote("first")
    factory.release("first")
    release = factory.workspace.repository.releases(LINE, CLASS)[0]
    factory.workspace.repository.set_policy(everyone(release))  # as the version before left it
    refused(factory, "was rolled out by an older ferry, so there is nothing to widen", "rollout", "widen", LINE)
    assert "release 1 is open to 100 % of the fleet" in factory.ferry("rollout", "status", LINE)
    factory.promote("second")
    factory.release("second")
    factory.ferry("rollout", "start", LINE)
    watched, waves = in_force(factory)
    assert (watched.seq, watched.policy, watched.fallback) == (2, 1, Fallback(seq=1, manifest=release.manifest))
    assert waves == everyone(release)


def test_answer_counts_who_waits_for_unwatched(two: Factory):
    for name, agent in (("dev-1", "0.2.0"), ("dev-2", "0.3.0"), ("dev-3", "")):
        key = Ed25519PrivateKey.generate()
        two.workspace.fleet.enroll(name, key.public_key().public_bytes_raw().hex())
        if agent:
            made = DeviceReport(
                schema_version=2, device=name, boot="b", number=1, time=0, line=LINE, device_class=CLASS, event="confirmed",
                manifest=None, active=None, agent=agent,
            )  # fmt: skip
            two.workspace.fleet.receive(seal(made, key))
    told = two.ferry("rollout", "start", LINE)
    assert (
        "2 devices are not watched and wait for `ferry rollout widen shapes/edge --unwatched 1,10,100`: dev-1 (0.2.0), dev-3 (never reported)"
        in told
    )
    two.ferry("rollout", "widen", LINE, "--to", "100")
    assert "not watched and wait" not in two.ferry("rollout", "widen", LINE, "--unwatched", "100")


def test_release_that_devices_fall_back_to_stays_installable(two: Factory, bundles: dict[str, Bundle]):
    two.ferry("rollout", "start", LINE, "--waves", "10")
    first = two.workspace.repository.releases(LINE, CLASS)[0]
    assert two.workspace.repository._in_use(LINE, CLASS) >= {first.manifest}

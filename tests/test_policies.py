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
from filelock import FileLock, Timeout
from typer.testing import CliRunner

from flows import policies
from flows.cli import app
from flows.errors import BusyError
from flows.setup import create
from flows.workspace import Workspace
from ota.errors import OperatorError
from ota.policy import Policy
from ota.release import fielded
from ota.release.bundle import Bundle
from ota.release.keys import KeyRing
from ota.release.repository import Repository
from registry.errors import LedgerError
from tests.fleet_kit import CLASS, LINE, Device

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
    policy = two.workspace.repository.policy(LINE, CLASS)
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
    assert step(1) == "release 1 is open to 100 % of the fleet"
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
        lambda w: policies.start(w, LINE, CLASS, [100], 0, 2), lambda w: policies.renew(w, LINE, CLASS),
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
    assert (outcome.changed, outcome.reason) == (False, "release 2 is halted")
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
    assert two.workspace.repository.policy(LINE, CLASS)


def test_rollout_that_changes_one_of_the_same_release_says_what_was(two: Factory):
    two.ferry("rollout", "halt", LINE)
    assert "before, release 2 is halted" in two.ferry("rollout", "start", LINE)
    assert "before, release 2 is open to 1 % of the fleet" in two.ferry("rollout", "start", LINE, "--waves", "50")


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
    given = {"start": ([100], 0, 2), "renew": (), "floor": (2,)}[change]
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
        policies.start(two.workspace, "nosuch", "nosuch", shares, 0)
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

"""The runbook's drills on keys, with the commands that it shows and real agents: loss, theft, root rotation, raised versions.

Each drill ends with what did not change (the running bundle), and with devices that follow: one that kept looking, one that
was away all the time, one that lost its cache. Afterwards the thief's copies are tried on all of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signature, Signer
from tuf.api.metadata import Metadata, MetaFile, Role, Root
from typer.testing import CliRunner, Result

from flows import cli
from ota.agent import rules
from ota.agent.disk import Disk
from ota.agent.state import HighWater
from ota.errors import TrustError
from ota.policy import Policy2
from ota.release import keys as keys_module
from ota.release import repository as repository_module
from ota.release import rotation, store
from ota.release.bundle import Bundle
from ota.release.ceremony import Waiting, taken_out
from ota.release.keys import KeyRing
from ota.release.repository import Release, Repository
from ota.release.rollout import Terms, watched
from tests.conftest import few
from tests.fleet_kit import (
    CLASS,
    LINE,
    Cut,
    Device,
    everyone,
    metadata_file,
    name_manifest,
    name_policy,
    sign_in_place,
    untouched,
)
from tests.test_agent_attacks import raise_in_snapshot

pytestmark = pytest.mark.slow  # takes minutes; `make test-slow` and `make attacks` run it

pytest_plugins = ("tests.fleet_kit",)


class Killed(Exception):  # noqa: N818 - stands for the end of a `ferry`, for a runner that reports exceptions only
    """A simulated kill: the process ends here."""


ONLINE = ("timestamp", "snapshot", "models", "deltas", "rollout")
FAR = 2**40  # a version that no factory reaches


def ferry(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["--quiet", *map(str, words)])


class Plant:
    """A workspace, and three devices that run its first release."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ws = folder, folder / "ws"
        self.near, self.away, self.torn = (Device(folder / name / "device") for name in ("near", "away", "torn"))

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.near, self.away, self.torn

    @property
    def repository(self) -> Repository:
        return Repository(self.ws / "repository", KeyRing(self.ws / "keys"))

    def copy(self, folder: Path) -> Plant:
        made = Plant(Path(shutil.copytree(self.folder, folder, symlinks=True)))
        for device in made.devices:
            device.configure(repository=str(made.ws / "published"), reports=str(device.root.parent / "reports"))
        return made

    def ferry(self, *words: str | Path, code: int = 0) -> str:
        result = ferry("-w", self.ws, *words)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.output

    def status(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.ferry("trust", "status", "--json"))
        return value

    def role(self, name: str) -> dict[str, Any]:
        return next(role for role in self.status()["roles"] if role["role"] == name)

    def ids(self, *roles: str) -> list[str]:
        found = {role["role"]: role["keys"] for role in self.status()["roles"]}
        return [key["keyid"] for role in roles for key in found[role]]

    def start(self, *words: str, code: int = 0) -> str:
        """Roll out the newest release, unless another is named; no champion was promoted here."""
        newest = str(self.repository.releases(LINE, CLASS)[-1].seq)
        return self.ferry("rollout", "start", LINE, *words, *(() if "--release" in words else ("--release", newest)), code=code)

    def release(self, bundle: Bundle) -> None:
        """Publish a bundle and open it to everyone."""
        self.repository.publish_release(bundle.manifest, bundle.folder, "0" * 64, [])
        self.start("--waves", "100", "--soak", "0")

    def thief(self) -> Repository:
        """Copy the repository for somebody who has a copy of all online keys, and nothing else."""
        loot = self.folder / "thief"
        shutil.copytree(self.ws / "repository", loot / "repository")
        shutil.copytree(self.ws / "keys", loot / "keys", ignore=shutil.ignore_patterns("offline"))
        return Repository(loot / "repository", KeyRing(loot / "keys"))

    def follow(self, bundle: Bundle) -> None:
        """Check that all devices run what they ran and see the next release, one without its cache; the one away installs it."""
        for device in self.devices:
            assert (device.state.seq, device.sound) == (1, True)
        forget(self.torn)
        self.release(bundle)
        for device in self.devices:
            device.configure(repository=str(self.ws / "published"))
            assert device.update(check_only=True).reason == "release 2 is open to this device"
        assert self.away.update().reason == "release 2 is installed"
        assert (self.away.active, self.away.sound) == (bundle.manifest.digest, True)

    def refuse(self, folder: Path, says: str = "") -> None:
        """Check that no device takes anything from another repository, with its cache or without."""
        for device in self.devices:
            for cache in ("kept", "lost"):
                if cache == "lost":
                    forget(device)
                device.configure(repository=str(folder))
                with untouched(device, TrustError, says):
                    device.update()


def forget(device: Device) -> None:
    """Delete python-tuf's files, as a power cut may do."""
    shutil.rmtree(device.root / "metadata", ignore_errors=True)


@pytest.fixture(scope="session")
def prepared(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Plant:
    """Create a plant; each test copies it."""
    plant = Plant(tmp_path_factory.mktemp("drills") / "plant")
    assert ferry("init", plant.ws, "--line", LINE).exit_code == 0
    plant.release(bundles["first"])
    (plant.folder / "near").mkdir()
    Device.init(plant.near.root, plant.repository, address=str(plant.ws / "published")).update()
    for name in ("away", "torn"):
        shutil.copytree(plant.folder / "near", plant.folder / name, symlinks=True)
    return plant


@pytest.fixture
def plant(prepared: Plant, tmp_path: Path) -> Plant:
    return prepared.copy(tmp_path / "plant")


# Drill: a key is lost


def test_drill_lost_online_key(plant, bundles):
    (lost,) = plant.ids("timestamp")
    (plant.ws / "keys/online/timestamp.pem").unlink()
    assert "role timestamp needs 1 signatures but 0 of its keys can be used here" in plant.ferry("trust", "refresh", code=3)
    assert f"{lost[:8]}  not here" in plant.ferry("trust", "status")
    plant.ferry("trust", "rotate", "timestamp", "--lost", lost[:8])
    assert lost not in plant.ids("timestamp")
    plant.ferry("trust", "refresh")
    assert plant.near.update().reason == "release 1 is installed"
    plant.follow(bundles["second"])


@pytest.mark.parametrize("role", few(["root", "targets"], 1))
def test_drill_lost_offline_key(plant, bundles, role):
    lost, *kept = plant.ids(role)
    (plant.ws / f"keys/offline/{role}-1.pem").unlink()
    output = plant.ferry("trust", "rotate", role, "--lost", lost[:8])
    assert f"{role} - {lost[:8]}" in output
    assert plant.ids(role)[:2] == kept
    assert (plant.role(role)["version"], plant.role(role)["threshold"], len(plant.ids(role))) == (2, 2, 3)
    assert plant.near.update().reason == "release 1 is installed"
    (plant.ws / f"keys/offline/{role}-2.pem").unlink()  # what is left of the three: one kept and the new one
    plant.ferry("trust", "renew", role)
    plant.follow(bundles["second"])


# Drill: keys are stolen


def test_drill_stolen_online_keys(plant, bundles):
    thief = plant.thief()
    plant.ferry("trust", "rotate", *ONLINE, *(word for keyid in plant.ids(*ONLINE) for word in ("--stolen", keyid[:8])))
    assert plant.near.update().reason == "release 1 is installed"
    held = {role: plant.role(role)["version"] for role in ("models", "deltas", "rollout")}
    assert held == {"models": 3, "deltas": 3, "rollout": 3}  # signed anew
    plant.follow(bundles["second"])

    # The thief releases what he likes, as the factory did before.
    bad = {"manifest": bundles["garbage"].manifest.digest, "seq": 9}
    name_policy(thief, everyone(thief.releases(LINE, CLASS)[0], **bad))
    name_policy(thief, to_all(thief, thief.releases(LINE, CLASS)[0]).model_copy(update=bad))
    name_manifest(thief, bundles["garbage"].manifest, seq=9)
    plant.refuse(thief.folder)
    # He adds the factory's new roots, so that none is missing.
    for root in (plant.ws / "published/metadata").glob("*.root.json"):
        shutil.copy(root, thief.metadata / root.name)
    plant.refuse(thief.folder, "metadata failed verification")
    # He takes the factory's newest metadata, and exchanges one role's file for one that he signs.
    for role in ("models", "rollout"):
        mirror = Path(shutil.copytree(plant.ws / "published", plant.folder / f"mirror-{role}"))
        sign_in_place(metadata_file(plant.repository, role), thief.keys, role, lambda _: None)
        shutil.copy(metadata_file(plant.repository, role), mirror / "metadata")
        for device in plant.devices:
            forget(device)
            device.configure(repository=str(mirror))
            with untouched(device, TrustError, "metadata failed verification", marks=False):
                device.update()


def test_stolen_root_keys_lead_no_device_along_another_chain(plant, bundles, tmp_path):
    # A thief has two of three root keys, but the factory is faster. From then on the first root is worth nothing.
    stolen = plant.ids("root")[:2]
    thief = plant.thief()
    shutil.copytree(plant.ws / "keys/offline", thief.keys.folder / "offline")
    plant.ferry("trust", "rotate", "root", *(word for keyid in stolen for word in ("--stolen", keyid)))
    assert not set(plant.ids("root")) & {key.keyid for key, _ in thief.keys.keys["root"]}  # all three are replaced
    plant.follow(bundles["second"])

    own = keys_module.create(tmp_path / "own")
    fresh = {role: list(own.keys[role]) for role in keys_module.ROLES}
    thief.keys.add(fresh)
    waiting = rotation.prepare(thief, fresh).signed(
        [s for role in keys_module.ROLES for s in (*thief.keys.usable(role), *own.usable(role))]
    )
    thief.keys.keep({})
    own_ring = KeyRing(own.folder)
    thief_repository = Repository(thief.folder, own_ring)
    own_ring.add(thief.keys.keys)
    for _ in range(3):  # his root 2, and then 3 and 4, which only he signs
        rotation.put_in_force(thief_repository, waiting)
        own_ring.keep(fresh)
        waiting = rotation.prepare(thief_repository, {}, ["root"]).signed(own_ring.usable("root"))
    assert thief_repository.newest_root().name == "4.root.json"
    for device in plant.devices:
        forget(device)
        device.configure(repository=str(thief.folder))
        with untouched(device, TrustError, "version 2 of the repository's root differs from the one that this device has seen"):
            device.update()
        device.configure(repository=str(plant.ws / "published"))
        device.update(check_only=True)  # his roots were not kept
    # A cut before the thief's roots were deleted: the next look finds them, and the look after that follows the factory.
    for root in thief.metadata.glob("*.root.json"):
        shutil.copy(root, plant.near.root / "metadata/root_history" / root.name)
    with untouched(plant.near, TrustError, "metadata failed verification"):
        plant.near.update()
    plant.near.update(check_only=True)
    # A device that is set up from now on starts at the newest root.
    root = plant.repository.newest_root()
    new = Device(tmp_path / "new" / "device")
    new.command(
        "init", "--device", "dev-9", "--line", LINE, "--class", CLASS, "--repository", str(thief.folder), "--root", str(root),
        "--root-sha256", hashlib.sha256(root.read_bytes()).hexdigest(), "--reports", str(tmp_path / "new"),
    )  # fmt: skip
    with pytest.raises(TrustError):
        new.update()
    new.configure(repository=str(plant.ws / "published"))
    assert new.update(check_only=True).reason == "release 2 is open to this device"


# Drill: root and targets are rotated, their keys on media that never meet


def test_drill_root_rotation_by_ceremony(plant, bundles, tmp_path):
    old = plant.ids("root", "targets")
    media = tmp_path / "media"
    (plant.ws / "keys/offline").rename(media)
    file, copy = tmp_path / "waiting.json", tmp_path / "copy.json"
    assert "add --out FILE and sign where they are" in plant.ferry("trust", "rotate", "root", "targets", code=3)
    assert not list((plant.ws / "keys").rglob("*offline*"))
    before = {path: path.read_bytes() for path in (plant.ws / "repository").rglob("*") if path.is_file()}
    output = plant.ferry("trust", "rotate", "root", "targets", "--offline", tmp_path / "new", "--out", file)
    assert "root version 2 has 0 of 2 signatures of its present keys" in output
    assert {path: path.read_bytes() for path in (plant.ws / "repository").rglob("*") if path.is_file()} == before

    def sign(*words: str | Path, code: int = 0) -> str:
        result = ferry("trust", "sign", file, *words)  # where there is no workspace
        assert result.exit_code == code, result.output
        return result.output

    shutil.copy(file, copy)
    for wrong in (f"file2:{plant.ws}/keys/online/models.pem", f"file2:{media}/nothing.pem", "nosuch:1"):
        assert "cannot sign this file" in sign("--key", wrong, code=3)
    assert file.read_bytes() == copy.read_bytes()
    assert "root version 2 has 0 of 2" in plant.ferry("trust", "sign", file, "--publish", code=3)
    assert "signed root version 2" in sign("--key", f"file2:{media}/root-1.pem")
    assert "root version 2 has 1 of 2 signatures of its present keys" in sign("--key", f"file2:{media}/root-1.pem")
    assert "1 of 2" in plant.ferry("trust", "sign", file, "--publish", code=3)
    assert {path: path.read_bytes() for path in (plant.ws / "repository").rglob("*") if path.is_file()} == before
    assert "has all its signatures" in sign("--key", f"file2:{media}/root-3.pem")
    plant.ferry("trust", "sign", file, "--publish")
    assert not set(old) & set(plant.ids("root", "targets"))
    assert plant.near.update().reason == "release 1 is installed"
    plant.follow(bundles["second"])
    assert "version 2 of root waits, but 3 is in force" in again(plant, file)
    # The old keys sign no further root.
    forged = Path(shutil.copytree(plant.ws / "published", tmp_path / "forged"))
    newest = plant.repository.newest_root()
    ring = KeyRing(plant.ws / "keys")
    ring.keep({"root": [(key, f"file2:{media}/root-{i}.pem") for i, (key, _) in enumerate(kept_keys(plant), start=1)]})
    shutil.copy(newest, forged / "metadata" / "4.root.json")

    def next_version(signed: Any) -> None:
        signed.version += 1

    sign_in_place(forged / "metadata" / "4.root.json", ring, "root", next_version)
    for device in plant.devices:
        device.update(check_only=True)
    plant.refuse(forged, "metadata failed verification")


def kept_keys(plant: Plant) -> list[tuple[Key, str]]:
    """Return the keys of the root role in the first root."""
    root: Metadata[Any] = Metadata.from_file(str(plant.ws / "repository/metadata/1.root.json"))
    return [(root.signed.keys[keyid], "") for keyid in root.signed.roles["root"].keyids]


def again(plant: Plant, file: Path) -> str:
    """Try to put a file in force that something newer has overtaken; check that nothing changes, and return the output."""
    plant.ferry("trust", "rotate", "timestamp")
    before = plant.status()
    output = plant.ferry("trust", "sign", file, "--publish", code=3)
    assert plant.status() == before
    return output


# Drill: a thief raised version numbers beyond all that the factory will ever reach


def raise_versions(thief: Repository, *roles: str) -> None:
    """Sign the metadata of these roles as a version far ahead, as the holder of the online keys can."""
    versions = {role: FAR if role in roles else version for role, version in thief._versions().items()}
    for role in versions.keys() & set(roles):
        far = thief.metadata / f"{FAR}.{role}.json"
        shutil.copy(metadata_file(thief, role), far)
        sign_in_place(far, thief.keys, role, set_far)
    if "snapshot" in roles:

        def snapshot(signed: Any) -> None:
            set_far(signed)
            signed.meta = {f"{role}.json": MetaFile(version) for role, version in versions.items()}

        shutil.copy(metadata_file(thief, "snapshot"), thief.metadata / f"{FAR}.snapshot.json")
        sign_in_place(thief.metadata / f"{FAR}.snapshot.json", thief.keys, "snapshot", snapshot)

    def timestamp(signed: Any) -> None:
        set_far(signed)
        if "snapshot" in roles:
            signed.snapshot_meta.version = FAR

    sign_in_place(thief.metadata / "timestamp.json", thief.keys, "timestamp", timestamp)


def set_far(signed: Any) -> None:
    signed.version = FAR


def visit(device: Device, folder: Path) -> Any:
    """Look at a repository, and return the device's marks."""
    device.configure(repository=str(folder))
    device.update(check_only=True)
    return device.home.high_water()


def test_drill_fast_forward_recovery(plant, bundles):
    thief = plant.thief()
    stolen = plant.ids(*ONLINE)
    raise_versions(thief, *ONLINE)
    for device in (plant.near, plant.torn):  # the other one is away
        assert {role: visit(device, thief.folder).versions[role] for role in ("timestamp", "snapshot", "models", "rollout")} == {
            "timestamp": FAR, "snapshot": FAR, "models": FAR, "rollout": FAR,
        }  # fmt: skip
    forget(plant.torn)
    for device, says in ((plant.near, "metadata failed verification"), (plant.torn, "this device has seen")):
        device.configure(repository=str(plant.ws / "published"))
        with untouched(device, TrustError, says):
            device.update()
    # A new key for the timestamp lets them forget the mark of the timestamp, and no other.
    output = plant.ferry("trust", "rotate", "timestamp", "--stolen", *plant.ids("timestamp"))
    assert "once snapshot and timestamp are rotated too" in output
    for device in (plant.near, plant.torn):
        with untouched(device, TrustError, "", marks=False):
            device.update()
        assert device.home.high_water().versions["snapshot"] == FAR
        assert device.home.high_water().versions["root"] == 2

    output = plant.ferry("trust", "rotate", *ONLINE, *(word for keyid in stolen[1:] for word in ("--stolen", keyid)))
    assert "are rotated too" not in output
    plant.near.update()
    for device in plant.devices:
        assert device.state.seq == 1
    plant.follow(bundles["second"])
    for device in plant.devices:
        assert max(device.home.high_water().versions.values()) < 20
    plant.refuse(thief.folder)
    for device in plant.devices:
        device.configure(repository=str(plant.ws / "published"))
        device.update(check_only=True)


def test_marks_hold_where_keys_did_not_change(plant):
    # Somebody with the new keys of timestamp and snapshot brings back a policy from before the rotation.
    before = plant.near.home.high_water().versions["rollout"]
    plant.ferry("rollout", "halt", LINE)
    visit(plant.near, plant.ws / "published")
    plant.ferry("trust", "rotate", "timestamp", "snapshot", "models")
    assert visit(plant.near, plant.ws / "published").versions["rollout"] == before + 1
    repository = plant.repository
    raise_in_snapshot(repository, rollout=before)
    forget(plant.near)
    plant.near.configure(repository=str(repository.folder))
    with untouched(plant.near, TrustError, f"offers version {before} of rollout, this device has seen", marks=False):
        plant.near.update()


def test_marks_of_an_older_agent_hold_and_learn_their_keys(plant):
    marks = plant.near.home.high_water()
    old = {"versions": marks.versions | {"timestamp": FAR}, "time": marks.time}
    (plant.near.root / "highwater.json").write_text(json.dumps(old))
    plant.ferry("trust", "rotate", "timestamp")
    with untouched(plant.near, TrustError, f"of timestamp, this device has seen {FAR}", marks=False):
        plant.near.update()
    (plant.near.root / "highwater.json").write_text(json.dumps({"versions": marks.versions, "time": marks.time}))
    visit(plant.near, plant.ws / "published")
    learnt = plant.near.home.high_water()
    assert learnt.keys["timestamp"] == plant.ids("timestamp")
    assert learnt.keys.keys() >= {"snapshot", "targets", "models", "rollout"}
    assert learnt.root == hashlib.sha256(metadata_of(plant.repository.newest_root()).signed_bytes).hexdigest()


def metadata_of(path: Path) -> Metadata[Any]:
    return Metadata[Any].from_file(str(path))


def test_cut_while_marks_are_reset_loses_none(plant, monkeypatch):
    thief, stolen = plant.thief(), plant.ids(*ONLINE)
    raise_versions(thief, *ONLINE)
    visit(plant.near, thief.folder)
    plant.ferry("trust", "rotate", *ONLINE, *(word for keyid in stolen for word in ("--stolen", keyid)))
    plant.near.configure(repository=str(plant.ws / "published"))
    replace = Disk.replace
    allowed = 0

    def dying(disk: Disk, name: str, data: bytes) -> None:
        nonlocal allowed
        if name == "highwater.json":
            if allowed == 0:
                raise Cut
            allowed -= 1
        replace(disk, name, data)

    cuts = 0
    for writes in (0, 1, 0, 1, 0):
        before, allowed = plant.near.home.high_water().versions, writes
        with monkeypatch.context() as patch:
            patch.setattr(Disk, "replace", dying)
            with pytest.raises(Cut):
                plant.near.update(check_only=True)
        after = plant.near.home.high_water().versions
        assert all(after[role] >= before[role] for role in before) or after["root"] == 2
        cuts += after != before
        forget(plant.near)
        plant.near.configure(repository=str(thief.folder))
        if after["root"] == 2:  # from here on, the thief's copies are outdated
            with untouched(plant.near, TrustError, "version 1 of root, this device has seen 2"):
                plant.near.update()
        plant.near.configure(repository=str(plant.ws / "published"))
    assert cuts
    plant.near.update()
    assert max(plant.near.home.high_water().versions.values()) < 20


KEYS = st.frozensets(st.sampled_from("abcd"), min_size=1)


@given(KEYS, KEYS, st.integers(1, 4))
def test_mark_is_forgotten_only_when_nothing_under_it_could_pass(old, new, threshold):
    marks = HighWater(versions={"root": 7, "models": 9, "rollout": 3}, keys={"models": sorted(old)})
    trusted = {"models": rules.Trusted(new, threshold), "rollout": rules.Trusted(new, threshold)}
    found = rules.binding(marks, trusted)
    assert found == {"root": 7, "rollout": 3} | ({"models": 9} if len(old & new) >= threshold else {})


# What rotation does and does not


@pytest.mark.parametrize(("roles", "kept"), [(("timestamp",), ("snapshot",)), (("models",), ("root",)), (("targets",), ())])
def test_rotation_signs_only_what_it_must(plant, roles, kept):
    before = {role["role"]: role for role in plant.status()["roles"]}
    files = {role: metadata_file(plant.repository, role).read_bytes() for role in ("deltas", "rollout")}
    plant.ferry("trust", "rotate", *roles)
    after = {role["role"]: role for role in plant.status()["roles"]}
    assert {role: metadata_file(plant.repository, role).read_bytes() for role in files} == files  # no policy is signed
    for role, state in after.items():
        assert (state["keys"] == before[role]["keys"]) == (role not in roles)
        assert role not in kept or state["version"] == before[role]["version"] + (role == "snapshot")
        if role in roles:
            assert not {key["keyid"] for key in state["keys"]} & {key["keyid"] for key in before[role]["keys"]}
    assert all(
        (plant.ws / "keys" / key["uri"].removeprefix("file2:")).is_file() for state in before.values() for key in state["keys"]
    )


def test_rotation_revives_no_expired_rollout(plant, monkeypatch):
    ended = (datetime.now(UTC) - timedelta(days=1)).replace(microsecond=0)
    repository = plant.repository
    repository.commit({"rollout": lambda signed: setattr(signed, "expires", ended)})
    plant.ferry("trust", "rotate", "rollout")
    assert plant.role("rollout")["expires"] == ended.isoformat()
    assert "the rollout policy has expired" in visit_reason(plant.near, plant.ws / "published")


def visit_reason(device: Device, folder: Path) -> str:
    device.configure(repository=str(folder))
    return device.update(check_only=True).reason


def test_no_device_ever_finds_half_a_rotation(plant, monkeypatch):
    roles = ("root", "targets", *ONLINE)
    seen: list[str] = []
    publish = store.publish

    def looking(files: Any, url: str, base: Path, endpoint: Any = None, on_file: Any = None) -> int:
        def look(name: str) -> None:
            forget(plant.torn)
            assert visit_reason(plant.torn, plant.ws / "published") == visit_reason(plant.near, plant.ws / "published")
            seen.append(name)

        return publish(files, url, base, endpoint, look)

    monkeypatch.setattr(store, "publish", looking)
    plant.ferry("trust", "rotate", *roles)
    assert seen.index("metadata/2.root.json") > seen.index("metadata/timestamp.json")
    assert {plant.role(role)["version"] for role in ("root", "targets")} == {2}


def test_killed_rotation_is_repeated(plant, tmp_path, monkeypatch):
    # The process dies at each of its writes in turn: private keys, what waits, the ring, metadata, the published copy.
    roles = ("root", "timestamp", "models")
    names: list[str] = []
    for last in range(100):
        made = plant.copy(tmp_path / f"cut-{last}")
        old = set(made.ids(*roles))
        with monkeypatch.context() as patch:
            die_at_write(patch, last, names)
            result = ferry("-w", made.ws, "trust", "rotate", *roles)
        if result.exit_code == 0:
            break
        assert isinstance(result.exception, Killed)
        assert made.near.update(check_only=True).reason == "release 1 is installed"
        made.ferry("trust", "refresh")
        assert made.near.update(check_only=True).reason == "release 1 is installed"
        made.ferry("trust", "rotate", *roles)
        assert not (made.ws / "keys/waiting.json").exists()
        now = made.ids(*roles)
        assert not old & set(now)
        assert len(now) == len(old)
        assert made.role("root")["version"] == 2
        assert {key.keyid for role in roles for key, _ in made.repository.keys.keys[role]} == set(now)
        assert made.near.update(check_only=True).reason == "release 1 is installed"
        shutil.rmtree(made.folder)
    assert last == len(names)
    assert {"keys.json", "2.root.json", "2.targets.json", "timestamp.json", "waiting.json"} <= set(names)


def die_at_write(patch: pytest.MonkeyPatch, last: int, names: list[str]) -> None:
    names.clear()

    def dying(write: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if len(names) == last:
                raise Killed
            names.append(name(*arguments))
            return write(*arguments)

        return wrapped

    for module in (repository_module, rotation):
        patch.setattr(module, "write", dying(module.write, lambda path, _: path.name))
    patch.setattr(keys_module, "_write_durably", dying(keys_module._write_durably, lambda path, *_: path.name))
    patch.setattr("ota.release.ceremony.Waiting.save", dying(Waiting.save, lambda _, path: path.name))
    patch.setattr(store.shutil, "copyfileobj", dying(shutil.copyfileobj, lambda source, _: f"published {Path(source.name).name}"))


def test_other_roles_wait_for_a_rotation_that_was_cut(plant, tmp_path, monkeypatch):
    signed = tmp_path / "targets.json"
    plant.ferry("trust", "sign", "targets", "--out", signed)
    with monkeypatch.context() as patch:
        patch.setattr(rotation, "put_in_force", lambda *_: (_ for _ in ()).throw(Killed))
        assert isinstance(ferry("-w", plant.ws, "trust", "rotate", "timestamp").exception, Killed)
    assert "finish it with `ferry trust rotate timestamp` first" in plant.ferry("trust", "renew", "targets", code=3)
    assert "finish it with `ferry trust rotate timestamp` first" in plant.ferry("trust", "sign", signed, "--publish", code=3)
    assert "a rotation was interrupted" in plant.ferry("trust", "status")
    plant.ferry("trust", "rotate", "models")  # finishes that rotation, then does its own
    assert (plant.role("root")["version"], plant.role("targets")["version"]) == (2, 2)
    plant.ferry("trust", "renew", "targets")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("timestam",), "timestam is not among the roles"),
        (("timestamp", "--signer", "snapshot=file2:x"), "file2:x does not tell its public key"),
        (("timestamp", "--signer", "hsm:2"), "--signer 'hsm:2' must be ROLE=VALUE"),
        (("timestamp", "--lost", "zz"), "'zz' is no key of timestamp; `ferry trust status` shows their ids"),
        (("root", "--lost", ""), "'' is no key of root"),
        (("timestamp", "--new", "0"), "timestamp must get at least 1 new keys; raise --new"),
        (("root", "--new", "1"), "root must get at least 2 new keys; raise --new"),
        (("models", "--public", "models=x"), "models has 0 --signer and 1 --public"),
        (("models", "--signer", "models=file2:{ws}/keys/online/models.pem"), "is or was a key of models; make a new one"),
        (("root", *("--signer", "root=file2:{ws}/keys/online/models.pem") * 2), "names a key of root twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_rotation_that_cannot_be_is_refused(plant, words, says):
    before = tree(plant.ws)
    assert says in plant.ferry("trust", "rotate", *(word.format(ws=plant.ws) for word in words), code=3)
    assert tree(plant.ws) == before


def tree(folder: Path) -> dict[Path, bytes]:
    kept = ("keys", "repository", "published", "root.json")
    return {path: path.read_bytes() for name in kept for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()}


def test_thief_at_the_threshold_takes_all_keys_along():
    roles = Root(roles={
        role: Role(ids, threshold)
        for role, ids, threshold in (
            ("root", ["a1", "a2", "a3"], 2), ("targets", ["b1", "b2", "b3"], 2), ("snapshot", ["c1", "c2"], 1), ("timestamp", ["d1"], 1),
        )
    }).roles  # fmt: skip
    assert taken_out(roles, ["a1"], ["b1"]) == {"root": ["a1"], "targets": ["b1"], "snapshot": ["c1", "c2"], "timestamp": ["d1"]}
    assert taken_out({"targets": roles["targets"]}, [], ["b1", "b3"]) == {"targets": ["b1", "b2", "b3"]}
    assert taken_out({"snapshot": roles["snapshot"]}, [], ["c1"]) == {"snapshot": ["c1", "c2"]}
    assert taken_out({"snapshot": roles["snapshot"]}, ["c1"], []) == {"snapshot": ["c1"]}


@pytest.mark.parametrize(
    "words", [("init",), ("status",), ("rotate", "root"), ("sign", "root", "--out", "f"), ("floor", LINE, "1")]
)
def test_outside_a_workspace_nothing_is_made(words, tmp_path):
    result = ferry("-w", tmp_path, "trust", *words)
    assert (result.exit_code, result.stdout, list(tmp_path.iterdir())) == (3, "", [])
    assert "is not a workspace" in result.stderr


# Keys that are somewhere else


class Vault(Signer):
    """A signer behind a URI of its own, like a cloud KMS: it shows no public key, and signs with what it has under a name."""

    keys: ClassVar[dict[str, CryptoSigner]] = {}

    def __init__(self, name: str, public_key: Key) -> None:
        self._name, self._key = name, public_key

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: Any = None) -> Vault:  # noqa: ARG003
        return cls(priv_key_uri.partition(":")[2], public_key)

    @property
    def public_key(self) -> Key:
        return self._key

    def sign(self, payload: bytes) -> Signature:
        made = self.keys[self._name].sign(payload)
        return Signature(self._key.keyid, made.signature)


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Provide a function that makes a key in the vault and returns the file of its public half."""
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "vault", Vault)

    def make(name: str) -> Path:
        Vault.keys[name] = CryptoSigner.generate_ed25519()
        public = load_pem_private_key(Vault.keys[name].private_bytes, None).public_key()
        path = tmp_path / f"{name}.pub"
        path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return path

    yield make
    Vault.keys.clear()


@pytest.fixture
def bare(plant: Plant) -> Plant:
    """Remove the keys of a workspace, so that it is like a clone of its Git repository."""
    for name in ("keys", "repository", "published"):
        shutil.rmtree(plant.ws / name)
    (plant.ws / "root.json").unlink()
    return plant


def test_init_places_keys_where_they_are_wanted(bare, vault, tmp_path):
    own = tmp_path / "own.pem"
    own.write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    words = (
        "--offline",
        tmp_path / "stick",
        "--signer",
        f"root=file2:{own}",
        "--signer",
        "models=vault:m",
        "--public",
        "models={}",
        "--signer",
        "ledger=vault:m",
        "--public",
        "ledger={}",
    )
    public = vault("m")
    output = bare.ferry("trust", "init", *(str(word).format(public) for word in words), "--json")
    made = json.loads(output)
    assert made["keys"]["ledger"] == ["vault:m"]
    assert not (bare.ws / "keys" / "online" / "ledger.pem").exists()
    assert made["keys"]["root"][0] == f"file2:{own}"
    assert made["keys"]["models"] == ["vault:m"]
    assert sorted(path.name for path in (tmp_path / "stick").iterdir()) == [
        "root-1.pem", "root-2.pem", "targets-1.pem", "targets-2.pem", "targets-3.pem",
    ]  # fmt: skip
    assert sorted(path.name for path in (bare.ws / "keys").iterdir()) == ["keys.json", "online"]
    assert made["sha256"] == hashlib.sha256((bare.ws / "root.json").read_bytes()).hexdigest()
    assert all(key["usable"] for role in bare.status()["roles"] for key in role["keys"])
    bare.ferry("trust", "renew", "root", "models")
    (tmp_path / "stick").rename(tmp_path / "away")
    bare.ferry("trust", "refresh")
    assert [key["usable"] for key in bare.role("targets")["keys"]] == [False] * 3
    assert [key["usable"] for key in bare.role("root")["keys"]] == [True, False, False]


def test_init_overwrites_no_key(bare, tmp_path):
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "root-1.pem").write_text("of another factory")
    bare.ferry("trust", "init", "--offline", stick)
    assert (stick / "root-1.pem").read_text() == "of another factory"
    assert len(list(stick.glob("root-*.pem"))) == 4
    before = tree(bare.ws)
    assert "is signed already; replace keys with `ferry trust rotate`" in bare.ferry("trust", "init", code=3)
    shutil.rmtree(bare.ws / "repository")
    own = tmp_path / "own.pem"
    own.write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    assert "holds other keys of root" in bare.ferry("trust", "init", "--signer", f"root=file2:{own}", code=3)
    bare.ferry("trust", "init")  # completes what a killed one left out
    keys = bare.ws / "keys"
    assert {path: data for path, data in tree(bare.ws).items() if path.is_relative_to(keys)} == {
        path: data for path, data in before.items() if path.is_relative_to(keys)
    }


def test_key_moves_to_a_vault(plant, vault, bundles):
    public = vault("models")
    assert "does not tell its public key" in plant.ferry("trust", "rotate", "models", "--signer", "models=vault:models", code=3)
    plant.ferry("trust", "rotate", "models", "--signer", "models=vault:models", "--public", f"models={public}")
    assert plant.role("models")["keys"][0]["uri"] == "vault:models"
    plant.release(bundles["second"])
    assert visit_reason(plant.near, plant.ws / "published") == "release 2 is open to this device"
    vault("models")  # somebody made another key under its name
    assert "makes no valid signature" in plant.ferry("trust", "renew", "models", code=3)
    assert plant.role("models")["version"] == 4


def test_ledger_key_moves_to_a_vault_and_signs_from_there_on(plant, vault):
    plant.start("--waves", "100", "--soak", "0")
    (old,) = plant.status()["ledger"]
    public = vault("ledger")
    for words in (("ledger", "models"), ("ledger", "--stolen", old["keyid"]), ("ledger", "--new", "2")):
        assert "rotate it alone with `ferry trust rotate ledger`" in plant.ferry("trust", "rotate", *words, code=3)
    known = ("--signer", f"ledger={old['uri'].replace(':', f':{plant.ws}/keys/')}")
    assert "is or was the ledger's; make a new one" in plant.ferry("trust", "rotate", "ledger", *known, code=3)
    plant.ferry("trust", "rotate", "ledger", "--signer", "ledger=vault:ledger", "--public", f"ledger={public}")
    entries = len(json.loads(plant.ferry("history", "--json"))["entries"])
    assert [(key["uri"], key["since"]) for key in plant.status()["ledger"]] == [(old["uri"], 1), ("vault:ledger", entries + 1)]
    (plant.ws / "keys" / "online" / "ledger.pem").unlink()  # it only signed the entries that are there
    plant.ferry("rollout", "halt", LINE, "--reason", "a drill")
    assert f"{entries + 1} of them are signed by the ledger's key" in plant.ferry("history", "--verify")
    vault("ledger")  # somebody made another key under its name
    told = plant.start("--waves", "100", "--soak", "0", code=3)
    assert "the ledger's key vault:ledger cannot sign" in told
    before = plant.repository.policy2(LINE, CLASS)
    assert before is not None
    assert before.halt  # nothing is rolled out that could not be recorded
    assert len(json.loads(plant.ferry("history", "--json"))["entries"]) == entries + 1


def test_halt_reaches_devices_also_where_it_cannot_be_recorded(plant, bundles):
    # Whoever can write the database must not be able to keep a bad release going.
    plant.release(bundles["second"])
    assert visit_reason(plant.near, plant.ws / "published") == "release 2 is open to this device"
    with closing(sqlite3.connect(plant.ws / "ferry.db")) as connection, connection:
        connection.execute("DELETE FROM ledger_signatures")
    told = plant.ferry("rollout", "halt", LINE, "--reason", "a bad one", code=6)
    assert "release 2 is halted, and that is published, but it could not be recorded:\nferry: " in told
    assert "is not signed by a key of this workspace" in told
    assert visit_reason(plant.near, plant.ws / "published") == "release 2 is halted"
    assert "is not signed" in plant.start(code=6)
    assert visit_reason(plant.near, plant.ws / "published") == "release 2 is halted"


def test_promotion_key_that_is_not_here(plant, tmp_path, bundles):
    # As if approval is required: the models key is on a USB stick, which also signs what its rotation needs.
    assert any("holds the key of the models role" in risk for risk in plant.status()["risks"])
    stick = tmp_path / "stick.pem"
    signer = CryptoSigner.generate_ed25519()
    public = tmp_path / "stick.pub"
    crypto = load_pem_private_key(signer.private_bytes, None).public_key()
    public.write_bytes(crypto.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    words = ("models", "--signer", f"models=file2:{stick}", "--public", f"models={public}")
    assert "models version 3 has 0 of 1 signatures of its new keys" in plant.ferry("trust", "rotate", *words, code=3)
    file = tmp_path / "waiting.json"
    plant.ferry("trust", "rotate", *words, "--out", file)
    stick.write_bytes(signer.private_bytes)
    assert "has all its signatures" in plant.ferry("trust", "sign", file, "--key", f"file2:{stick}")
    stick.rename(tmp_path / "pocket.pem")
    plant.ferry("trust", "sign", file, "--publish")
    assert plant.status()["risks"] == []
    assert plant.near.update().reason == "release 1 is installed"
    (tmp_path / "pocket.pem").rename(stick)
    plant.release(bundles["second"])
    assert visit_reason(plant.near, plant.ws / "published") == "release 2 is open to this device"


def test_drill_class_gets_roles_of_its_own(plant, bundles, tmp_path):
    media, file = tmp_path / "media", tmp_path / "waiting.json"
    (plant.ws / "keys/offline").rename(media)
    assert "add --out FILE and sign where they are" in plant.ferry("trust", "delegate", LINE, code=3)
    assert "has no device class" in plant.ferry("trust", "delegate", f"{LINE}/nosuch", code=3)
    plant.ferry("trust", "delegate", LINE, "--out", file)
    assert plant.near.update().reason == "release 1 is installed"
    for i in (1, 3):
        assert ferry("trust", "sign", file, "--key", f"file2:{media}/targets-{i}.pem").exit_code == 0
    plant.ferry("trust", "sign", file, "--publish")
    assert plant.role("models")["classes"] == plant.role("rollout")["classes"] == [f"{LINE}/{CLASS}"]
    assert "had roles of its own before" in plant.ferry("trust", "delegate", LINE)
    assert plant.near.update().reason == "release 1 is installed"
    plant.ferry("trust", "rotate", "models", "--lost", plant.ids("models")[0], code=3)  # the offline keys are away
    media.rename(plant.ws / "keys/offline")
    plant.ferry("trust", "rotate", "models", "deltas", "rollout")
    plant.ferry("trust", "renew")
    plant.ferry("rollout", "renew", LINE)
    assert f"1 with roles of its own, under the same keys: {LINE}/{CLASS}" in plant.ferry("trust", "status")
    plant.follow(bundles["second"])
    plant.ferry("rollout", "halt", LINE)
    assert plant.near.update().reason == "release 2 is halted"


# Signatures that are due, and those that wait


def test_renewal_waits_for_keys_elsewhere(plant, tmp_path, bundles):
    media = tmp_path / "media"
    (plant.ws / "keys/offline").rename(media)
    file, late = tmp_path / "root.json", tmp_path / "late.json"
    assert "say where root waits" in plant.ferry("trust", "sign", "root", code=3)
    assert "rollout cannot wait for signatures" in plant.ferry("trust", "sign", "rollout", "--out", file, code=3)
    plant.ferry("trust", "sign", "root", "--out", file)
    plant.ferry("trust", "sign", "root", "--out", late)
    assert "already exists" in plant.ferry("trust", "sign", "root", "--out", file, code=3)
    for path in (file, late):
        for i in (1, 2):
            plant.ferry("trust", "sign", path, "--key", f"file2:{media}/root-{i}.pem")
    plant.ferry("trust", "sign", file, "--publish")
    assert plant.role("root")["version"] == 2
    plant.ferry("trust", "sign", file, "--publish")  # repeated: nothing more happens
    assert plant.role("root")["version"] == 2
    # This file is signed properly too, but version 2 is already in force, and no device may ever see another version 2.
    value = json.loads(late.read_bytes())
    value["documents"]["root"]["signed"]["expires"] = "2040-01-01T00:00:00Z"
    late.write_text(json.dumps(value))
    assert "version 2 of root waits, but 2 is in force already; begin again" in plant.ferry(
        "trust", "sign", late, "--publish", code=3
    )
    assert visit_reason(plant.near, plant.ws / "published") == "release 1 is installed"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"documents": {"root": {}}, "needs": {"root": []}}'])
def test_other_file_is_not_signed(damage, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(damage)
    result = ferry("trust", "sign", path, "--key", "file2:x.pem")
    assert (result.exit_code, path.read_bytes()) == (3, damage)
    assert len(result.stderr.splitlines()) == 1


def test_altered_file_is_not_put_in_force(plant, tmp_path):
    file = tmp_path / "waiting.json"
    plant.ferry("trust", "rotate", "models", "--out", file)
    before = tree(plant.ws)
    value = json.loads(file.read_bytes())
    value["documents"]["targets"]["signed"]["delegations"]["roles"][0]["threshold"] = 2
    value["needs"]["targets"] = []  # signers believe this list, but the step that puts the file in force does not
    file.write_text(json.dumps(value))
    assert "the signatures of targets are not from the keys that are trusted now" in plant.ferry(
        "trust", "sign", file, "--publish", code=3
    )
    assert tree(plant.ws) == before


def test_half_of_a_life_gone_is_an_alarm(plant):
    assert plant.status()["alarms"] == []
    plant.ferry("trust", "status", "--check")
    soon = (datetime.now(UTC) + timedelta(days=6)).replace(microsecond=0)
    repository = plant.repository
    sign_in_place(
        repository.metadata / "timestamp.json", repository.keys, "timestamp", lambda signed: setattr(signed, "expires", soon)
    )
    shutil.copy(repository.metadata / "timestamp.json", plant.ws / "published/metadata")
    assert "ALARM: timestamp ends in 6.0 days of 14; sign it with `ferry trust refresh`" in plant.ferry("trust", "status")
    assert len(plant.status()["alarms"]) == 1
    assert "ALARM: timestamp" in plant.ferry("trust", "status", "--check", code=7)
    plant.ferry("trust", "refresh")
    plant.ferry("trust", "status", "--check")


def test_empty_rollout_is_no_alarm(bare):
    bare.ferry("trust", "init")
    ended = (datetime.now(UTC) - timedelta(days=1)).replace(microsecond=0)
    bare.repository.commit({"rollout": lambda signed: setattr(signed, "expires", ended)})
    bare.ferry("trust", "status", "--check")


# The floor below which nothing may be installed


def to_all(thief: Repository, release: Release, revert: bool = False) -> Policy2:
    """Return what the holder of the rollout key signs to open a release to all devices."""
    return watched(release, (100,), thief.policy2(LINE, CLASS), None, Terms(), revert)


def test_floor_holds_against_the_rollout_key(plant, bundles, tmp_path):
    for bundle in (bundles["garbage"], bundles["second"]):
        plant.repository.publish_release(bundle.manifest, bundle.folder, "0" * 64, [])
    thief = plant.thief()
    old, bad, _ = thief.releases(LINE, CLASS)
    # Without a floor, the thief of the rollout key can make devices install any release that is still listed.
    name_policy(thief, to_all(thief, bad))
    assert visit_reason(plant.near, thief.folder) == "release 2 is open to this device"
    shutil.rmtree(thief.folder.parent)

    assert "release 1 of shapes/edge is being rolled out" in plant.ferry("trust", "floor", LINE, "3", code=3)
    plant.start("--waves", "100", "--soak", "0")
    assert "has no release 9 to be the floor" in plant.ferry("trust", "floor", LINE, "9", code=3)
    plant.ferry("trust", "floor", LINE, "3")
    assert "is below the floor, 3" in plant.start("--release", "2", code=3)
    assert "is below the floor, 3" in plant.start("--release", "1", "--revert", code=3)
    thief = plant.thief()
    (tmp_path / "new").mkdir()
    new = Device.init(tmp_path / "new" / "device", thief)  # it runs nothing, so no release is older
    plant.near.configure(repository=str(thief.folder))
    for release, revert, devices in ((bad, False, (plant.near, new)), (bad, True, (plant.near, new)), (old, True, (new,))):
        name_policy(thief, to_all(thief, release, revert))
        for device in devices:
            with untouched(device, TrustError, f"release {release.seq} is below the floor, 3", marks=False):
                device.update()
    assert plant.near.update().reason == "release 1 is installed"  # it runs already
    plant.away.update()
    plant.away.configure(repository=str(thief.folder))
    with untouched(plant.away, TrustError, "release 1 is below the floor, 3", marks=False):
        plant.away.update()


def test_running_release_below_the_floor_can_be_repaired(plant, bundles):
    plant.repository.publish_release(bundles["second"].manifest, bundles["second"].folder, "0" * 64, [])
    plant.start("--waves", "100", "--soak", "86400")
    plant.ferry("rollout", "halt", LINE)
    plant.ferry("trust", "floor", LINE, "2")
    (plant.near.root / "slots" / str(plant.near.active) / "manifest.json").unlink()
    assert "release 1 was damaged and is repaired" in plant.near.update().reason
    assert plant.near.sound


def test_floor_stays_for_later_releases(plant, bundles):
    plant.release(bundles["second"])
    plant.ferry("trust", "floor", LINE, "2")
    plant.release(bundles["garbage"])
    assert [release.floor for release in plant.repository.releases(LINE, CLASS)] == [2, 2, 2]
    shutil.rmtree(plant.ws / "keys/offline")
    plant.ferry("trust", "floor", LINE, "3")
    assert [release.floor for release in plant.repository.releases(LINE, CLASS)] == [3, 3, 3]

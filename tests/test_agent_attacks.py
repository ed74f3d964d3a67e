"""Attacks on a device, by name: whatever an attacker serves, or signs with stolen keys, the device stays as it was."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Targets

from ota import delta
from ota.agent import transport
from ota.agent.state import HighWater
from ota.delta import format as container
from ota.errors import (
    AgentError,
    ExpiredError,
    InvalidError,
    ManifestError,
    OtaError,
    RepositoryError,
    StateError,
    TransferError,
    TrustError,
)
from ota.manifest import Manifest
from ota.release.bundle import make_delta
from ota.release.keys import create
from ota.release.repository import Repository
from ota.release.rollout import halt, start
from tests.fleet_kit import (
    CLASS,
    LINE,
    Device,
    Field,
    WebServer,
    change_role,
    everyone,
    expire,
    metadata_file,
    name_delta,
    name_manifest,
    name_policy,
    publish,
    sign_in_place,
    untouched,
)

pytest_plugins = ("tests.fleet_kit",)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between retries."""
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)


@pytest.fixture
def web(offered: Field) -> Iterator[WebServer]:
    """Serve the repository of `offered` from a web server, and point the device at it."""
    with WebServer(offered.repository.folder) as server:
        offered.device.configure(repository=server.address)
        yield server


def not_installed(device: Device) -> None:
    """Check that nothing of an attack is on the device: no other slot, no part of one, no download."""
    assert [path.name for path in (device.root / "slots").iterdir()] == [device.active]
    assert device.leftovers() == []


def forget_cache(device: Device) -> None:
    """Delete python-tuf's files, as a power cut or a full disk may do."""
    shutil.rmtree(device.root / "metadata")


# 1 Arbitrary install: metadata that the trusted keys did not sign


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "models", "rollout"])
@pytest.mark.parametrize("how", ["unsigned", "other key", "altered"])
def test_arbitrary_install_refused(offered, role, how):
    path = metadata_file(offered.repository, role)
    metadata: Metadata[Any] = Metadata.from_file(str(path))
    if how != "altered":
        metadata.signatures.clear()
    if how == "other key":
        metadata.sign(CryptoSigner.generate_ed25519(), append=True)
    if how == "altered":
        metadata.signed.unrecognized_fields["x"] = "y"
    path.write_bytes(metadata.to_bytes())
    with untouched(offered.device, TrustError, "metadata failed verification", marks=False):
        offered.device.update()
    not_installed(offered.device)


def test_targets_need_two_signatures(offered, keys):
    # One of the offline keys is stolen: the thief delegates to their own key, with a single signature.
    thief = CryptoSigner.generate_ed25519()
    path = metadata_file(offered.repository, "targets")

    def delegate(signed: Targets) -> None:
        signed.add_key(thief.public_key, "models")
        signed.version += 1

    metadata: Metadata[Targets] = Metadata.from_file(str(path))
    delegate(metadata.signed)
    metadata.signatures.clear()
    metadata.sign(keys.signers("targets")[0], append=True)
    path.with_name("2.targets.json").write_bytes(metadata.to_bytes())
    raise_in_snapshot(offered.repository, targets=2)
    with untouched(offered.device, TrustError, "metadata failed verification", marks=False):
        offered.device.update()


def test_whole_repository_of_stranger_refused(offered, bundles, tmp_path):
    stranger = Repository.create(tmp_path / "stranger", create(tmp_path / "keys"))
    publish(stranger, bundles["garbage"])
    publish(stranger, bundles["second"])
    publish(stranger, bundles["first"])
    offered.device.configure(repository=str(stranger.folder))
    with untouched(offered.device, TrustError, "metadata failed verification"):
        offered.device.update()
    not_installed(offered.device)


def raise_in_snapshot(repository: Repository, **versions: int) -> None:
    """Sign a snapshot with any versions, as the holder of the snapshot and timestamp keys can."""

    def snapshot(signed: Any) -> None:
        for role, version in versions.items():
            signed.meta[f"{role}.json"] = MetaFile(version)
        signed.version += 1

    number = repository._snapshot_version()
    shutil.copy(metadata_file(repository, "snapshot"), repository.metadata / f"{number + 1}.snapshot.json")
    sign_in_place(repository.metadata / f"{number + 1}.snapshot.json", repository.keys, "snapshot", snapshot)

    def timestamp(signed: Any) -> None:
        signed.snapshot_meta.version = number + 1
        signed.version += 1

    sign_in_place(repository.metadata / "timestamp.json", repository.keys, "timestamp", timestamp)


# 2 Endless data


ENDLESS = ["metadata/timestamp.json", ".snapshot.json", ".models.json", ".rollout.json", f".{CLASS}.json"]


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_metadata_cut_off(offered, web, name):
    web.faults.endless = {name}
    before = offered.device.facts(marks=False)
    with pytest.raises(OtaError):
        offered.device.update()
    assert offered.device.facts(marks=False) == before
    assert offered.device.sound
    assert web.bytes_sent(name) < WebServer.ENDLESS / 2
    not_installed(offered.device)


def test_metadata_one_byte_longer_than_allowed_are_not_read(offered):
    path = metadata_file(offered.repository, "timestamp")
    path.write_bytes(path.read_bytes().ljust(16_384))
    assert offered.device.update(check_only=True).reason == "release 2 is open to this device"
    path.write_bytes(path.read_bytes() + b" ")
    with untouched(offered.device, TransferError, "timestamp.json is longer than the 16384 bytes that are allowed"):
        offered.device.update()


def test_endless_manifest_cut_off(offered, web):
    web.faults.endless = {f".{offered.release.manifest}.json"}
    with untouched(offered.device, RepositoryError, "longer than the .* bytes that are signed", marks=False):
        offered.device.update()
    assert web.bytes_sent(f".{offered.release.manifest}.json") < WebServer.ENDLESS / 2


def test_endless_object_cut_off(offered, web, bundles):
    change_role(offered.repository, "deltas", lambda signed: signed.targets.clear())
    name = bundles["second"].path("weights", "full").name
    web.faults.endless = {name}
    with untouched(offered.device, RepositoryError, "longer than the .* bytes that are signed", marks=False):
        offered.device.update()
    assert web.bytes_sent(name) < WebServer.ENDLESS / 2
    assert not (offered.device.root / "incoming" / name).exists()


def test_endless_delta_cut_off(offered, web):
    name = f".{offered.release.manifest}"
    web.faults.endless = {name}
    assert "download the full bundle" in " ".join(offered.device.update_until(6))
    assert web.bytes_sent(name) < WebServer.ENDLESS / 2


# 3 Slow retrieval


@pytest.mark.parametrize("name", ["metadata/timestamp.json", ".models.json", f".{CLASS}.json"])
def test_dripping_document_given_up(offered, web, monkeypatch, name):
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", 0.2)
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    web.faults.dripping = {name}
    began = time.monotonic()
    with untouched(offered.device, TransferError, "arrives too slowly", marks=False):
        offered.device.update()
    assert time.monotonic() - began < 5


def test_dripping_server_that_starts_over_given_up(offered, web, bundles, monkeypatch):
    # The server ignores the requested range, so all that arrives is thrown away.
    change_role(offered.repository, "deltas", lambda signed: signed.targets.clear())
    monkeypatch.setattr(transport, "ATTEMPTS", 1)
    name = bundles["second"].path("weights", "full").name
    web.faults.cut_after = {name: 100_000}
    with pytest.raises(TransferError, match=r"ended after|broke off"):
        offered.device.update()
    monkeypatch.setattr(transport, "DEADLINE_FLOOR", 1)
    monkeypatch.setattr(transport, "MINIMUM_RATE", 10**9)
    web.faults.ignore_range, web.faults.dripping = True, {name}
    began = time.monotonic()
    with untouched(offered.device, TransferError, "arrives too slowly", marks=False):
        offered.device.update()
    assert time.monotonic() - began < 10
    assert (offered.device.root / "incoming" / name).stat().st_size == 100_000


def test_claimed_encoding_is_not_unpacked(offered, web):
    # The signature covers the bytes as they are sent, and a decoder would be one more thing to attack.
    web.faults.encoding = "gzip"
    assert offered.device.update(check_only=True).reason == "release 2 is open to this device"


# 8 Rollback


def snapshot_of(field: Field, tmp_path: Path) -> Path:
    """Copy all that is published now, for a mirror to serve later."""
    shutil.copytree(field.repository.folder, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("cache", ["kept", "lost"])
def test_rollback_to_old_repository_refused(fielded, updated, cache):
    updated.device.configure(repository=str(fielded.repository.folder))
    if cache == "lost":
        forget_cache(updated.device)
    with untouched(updated.device, TrustError, "metadata failed verification" if cache == "kept" else "this device has seen"):
        updated.device.update()


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_rollback_of_one_role_refused(updated, role):
    # The thief of the timestamp (and snapshot) keys signs an older number for the same content.
    shutil.copy(metadata_file(updated.repository, "snapshot"), updated.repository.metadata / "1.snapshot.json")

    def older(signed: Any) -> None:
        signed.version = 1 if role == "timestamp" else signed.version + 1
        signed.snapshot_meta.version = signed.snapshot_meta.version if role == "timestamp" else 1

    sign_in_place(updated.repository.metadata / "1.snapshot.json", updated.repository.keys, "snapshot", set_version_one)
    sign_in_place(updated.repository.metadata / "timestamp.json", updated.repository.keys, "timestamp", older)
    forget_cache(updated.device)
    with untouched(updated.device, TrustError, f"version 1 of {role}, this device has seen", marks=False):
        updated.device.update()


def set_version_one(signed: Any) -> None:
    signed.version = 1


@pytest.mark.parametrize("role", ["models", "rollout"])
def test_rollback_of_delegated_role_refused(updated, role):
    # The thief of the snapshot and timestamp keys names an older, properly signed version, after the cache was lost.
    raise_in_snapshot(updated.repository, **{role: 2})
    forget_cache(updated.device)
    with untouched(updated.device, TrustError, f"version 2 of {role}, this device has seen 3", marks=False):
        updated.device.update()


def test_replayed_policy_refused(offered, tmp_path):
    # Release 2 was open and was then halted. A mirror, and then the thief of the online keys, try to open it again.
    old = snapshot_of(offered, tmp_path)
    opened = offered.repository._versions()["rollout"]
    offered.repository.set_policy(halt(everyone(offered.release)))
    assert offered.device.update().reason == "release 2 is halted"
    offered.device.configure(repository=str(old))
    with untouched(offered.device, TrustError, "metadata failed verification"):
        offered.device.update()
    forget_cache(offered.device)
    with untouched(offered.device, TrustError, "this device has seen"):
        offered.device.update()
    offered.device.configure(repository=str(offered.repository.folder))
    raise_in_snapshot(offered.repository, rollout=opened)
    forget_cache(offered.device)
    with untouched(offered.device, TrustError, f"version {opened} of rollout", marks=False):
        offered.device.update()
    not_installed(offered.device)


@pytest.mark.parametrize("damage", [b"", b"{}x", b"[]", b'{"versions": 1}'])
def test_damaged_marks_stop_updates(offered, damage):
    (offered.device.root / "highwater.json").write_bytes(damage)
    with untouched(offered.device, StateError, "highwater.json is damaged"):
        offered.device.update()


# 5 Indefinite freeze


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "models", "targets"])
def test_frozen_repository_installs_nothing(offered, keys, role):
    sign_in_place(metadata_file(offered.repository, role), keys, role, expire)
    forget_cache(offered.device)
    with untouched(offered.device, ExpiredError, r"signatures have expired .* the running model is kept", marks=False):
        offered.device.update()
    not_installed(offered.device)


def test_expired_policy_installs_nothing(offered, keys):
    # Timestamp and snapshot are fresh, but the policy expired, as it does 14 days after the flow stops. No device is at fault.
    sign_in_place(metadata_file(offered.repository, "rollout"), keys, "rollout", expire)
    forget_cache(offered.device)
    before = offered.device.facts(marks=False)
    output = offered.device.command("--quiet", "update")
    assert "the rollout policy has expired, so nothing newer can be installed" in output
    assert offered.device.facts(marks=False) == before
    not_installed(offered.device)


def test_policy_that_expires_before_switch_stops_it(offered, keys):
    def freeze(number: int, _: str) -> None:
        if number == 9:
            offered.repository.refresh()
            sign_in_place(metadata_file(offered.repository, "rollout"), keys, "rollout", expire)
            forget_cache(offered.device)

    before = offered.device.facts(marks=False)
    assert "stopped before the switch: the rollout policy has expired" in offered.device.update(freeze).reason
    assert offered.device.facts(marks=False) == before


def test_expired_policy_stops_first_install(fielded, keys, tmp_path):
    field = fielded.copy(tmp_path / "field")
    device = Device.init(tmp_path / "new", field.repository)
    sign_in_place(metadata_file(field.repository, "rollout"), keys, "rollout", expire)
    with untouched(device, ExpiredError, "signatures have expired", marks=False):
        device.update()
    device.command("update", code=5)


def test_expired_policy_hides_no_damage(offered, keys):
    sign_in_place(metadata_file(offered.repository, "rollout"), keys, "rollout", expire)
    forget_cache(offered.device)
    path = offered.device.file("weights")
    path.write_bytes(b"")
    lost = offered.repository.objects / path.name
    lost.rename(lost.with_suffix(".away"))
    assert "has no objects/" in offered.device.command("--quiet", "update", code=4)
    lost.with_suffix(".away").rename(lost)
    assert "was damaged and is repaired; the rollout policy has expired" in offered.device.command("--quiet", "update")
    assert offered.device.sound


def test_clock_set_back_is_noticed(offered):
    # With its clock set back by three days, expired metadata would look fresh.
    marks = offered.device.home.high_water()
    offered.device.home.raise_high_water(HighWater(versions=marks.versions, signed=marks.signed + 3 * 86_400))
    with untouched(offered.device, TrustError, "hours behind the last time seen; set the clock"):
        offered.device.update()


def test_time_seen_is_remembered(scene):
    marks = scene.device.home.high_water()
    scene.device.home.raise_high_water(marks.model_copy(update={"signed": marks.signed - 7200}))
    scene.device.update()
    assert scene.device.home.high_water().signed == marks.signed > time.time() - 86_400


def set_clock_back(monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """Set the agent's clock back by this many hours."""
    behind = SimpleNamespace(time=lambda: time.time() - 3600 * hours, monotonic=time.monotonic)
    monkeypatch.setattr("ota.agent.trust.time", behind)


def test_clock_that_goes_back_bit_by_bit_is_noticed(scene, monkeypatch):
    # A poor clock may make each single step; together they go back so far that expired metadata look fresh.
    seen = scene.device.home.high_water().signed
    set_clock_back(monkeypatch, hours=20)
    assert scene.device.update().reason == "release 1 is installed"
    assert scene.device.home.high_water().signed == seen
    set_clock_back(monkeypatch, hours=40)
    with untouched(scene.device, TrustError, "hours behind the last time seen; set the clock"):
        scene.device.update()


def test_time_is_remembered_where_the_policy_has_expired(offered, keys, monkeypatch):
    # Otherwise a clock that is set back later would make the policy look fresh.
    marks = offered.device.home.high_water()
    offered.device.home.raise_high_water(marks.model_copy(update={"signed": marks.signed - 3 * 86_400}))
    sign_in_place(metadata_file(offered.repository, "rollout"), keys, "rollout", expire)
    forget_cache(offered.device)
    assert "the rollout policy has expired" in offered.device.update().reason
    set_clock_back(monkeypatch, hours=48)
    with untouched(offered.device, TrustError, "hours behind the last time seen; set the clock"):
        offered.device.update()


# 7 Mix-and-match


@pytest.mark.parametrize("role", ["snapshot", "models", "rollout"])
def test_mix_and_match_refused(offered, role):
    current = metadata_file(offered.repository, role)
    older = current.with_name(f"{int(current.name.split('.')[0]) - 1}.{role}.json")
    current.write_bytes(older.read_bytes())
    with untouched(offered.device, TrustError, "metadata failed verification", marks=False):
        offered.device.update()
    not_installed(offered.device)


# Trust anchor


@pytest.mark.parametrize("wrong", ["file", "hash", "missing"])
def test_wrong_root_at_init_refused(repository, tmp_path, wrong):
    root = tmp_path / "root.json"
    root.write_bytes(repository.root_bytes() + (b" " if wrong == "file" else b""))
    digest = "0" * 64 if wrong == "hash" else sha256(repository.root_bytes())
    if wrong == "missing":
        root.unlink()
    device = Device(tmp_path / "device")
    output = device.command(
        "init", "--device", "dev-1", "--line", LINE, "--class", CLASS, "--repository", str(repository.folder),
        "--root", str(root), "--root-sha256", digest, code=3,
    )  # fmt: skip
    assert ("cannot read" if wrong == "missing" else "does not have the sha256 that was given; do not trust it") in output
    assert not (tmp_path / "device").exists()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "option",
    [("--device", "../x"), ("--line", "A"), ("--class", ""), ("--window", "5-6"), ("--repository", "x" * 600)],
    ids=lambda option: option[0],
)
def test_wrong_word_at_init_refused(repository, tmp_path, option):
    (tmp_path / "root.json").write_bytes(repository.root_bytes())
    words = {
        "--device": "dev-1", "--line": LINE, "--class": CLASS, "--repository": str(repository.folder),
        "--root": str(tmp_path / "root.json"), "--root-sha256": sha256(repository.root_bytes()),
    } | dict([option])  # fmt: skip
    output = Device(tmp_path / "device").command("init", *[word for pair in words.items() for word in pair], code=3)
    assert "is not valid" in output
    assert not (tmp_path / "device").exists()


@pytest.mark.parametrize("address", ["http://gw.example.com/inbox", "s3://bucket/inbox", "file://host/inbox", "http://[::1"])
def test_reports_go_to_no_other_place_than_a_folder_or_https(repository, tmp_path, address):
    # If the address were taken for the path of a folder, the reports would end up there unnoticed.
    (tmp_path / "root.json").write_bytes(repository.root_bytes())
    output = Device(tmp_path / "device").command(
        "init", "--device", "dev-1", "--line", LINE, "--class", CLASS, "--repository", str(repository.folder), "--reports",
        address, "--root", str(tmp_path / "root.json"), "--root-sha256", sha256(repository.root_bytes()), code=3,
    )  # fmt: skip
    assert "--reports" in output
    assert not (tmp_path / "device").exists()


@pytest.mark.parametrize("what", ["root", "line", "class"])
def test_directory_is_made_no_other_device(updated, tmp_path, what):
    root = updated.repository.root_bytes()
    if what == "root":
        root = Repository.create(tmp_path / "stranger", create(tmp_path / "keys")).root_bytes()
    (tmp_path / "root.json").write_bytes(root)
    before = updated.device.facts()
    output = updated.device.command(
        "init", "--device", "dev-1", "--line", "other" if what == "line" else LINE,
        "--class", "other" if what == "class" else CLASS, "--repository", str(updated.repository.folder),
        "--root", str(tmp_path / "root.json"), "--root-sha256", sha256(root), code=3,
    )  # fmt: skip
    assert f"is set up for {what} " in output
    assert "use another folder, or remove this one first" in output
    assert updated.device.facts() == before


def test_init_again_changes_addresses(updated, tmp_path):
    (tmp_path / "root.json").write_bytes(updated.repository.root_bytes())
    updated.device.command(
        "init", "--device", "dev-1", "--line", LINE, "--class", CLASS, "--repository", str(tmp_path / "elsewhere"),
        "--root", str(tmp_path / "root.json"), "--root-sha256", sha256(updated.repository.root_bytes()),
    )  # fmt: skip
    assert updated.device.home.config().repository == str(tmp_path / "elsewhere")
    assert updated.device.state.seq == 2


def test_replaced_root_is_noticed(offered, tmp_path):
    stranger = Repository.create(tmp_path / "stranger", create(tmp_path / "keys"))
    (offered.device.root / "root.json").write_bytes(stranger.root_bytes())
    offered.device.configure(repository=str(stranger.folder))
    with untouched(offered.device, StateError, "is not the root given at init"):
        offered.device.update()


def test_cached_root_of_stranger_not_believed(offered, tmp_path):
    stranger = Repository.create(tmp_path / "stranger", create(tmp_path / "keys"))
    cache = offered.device.root / "metadata"
    shutil.rmtree(cache)
    cache.mkdir()
    (cache / "root.json").write_bytes(stranger.root_bytes())
    offered.device.configure(repository=str(stranger.folder))
    with untouched(offered.device, TrustError, "metadata failed verification"):
        offered.device.update()


def test_root_rotation_needs_old_keys(offered, keys, tmp_path):
    # A second root, signed only by the keys that it introduces.
    stranger = create(tmp_path / "keys")
    path = offered.repository.metadata / "2.root.json"
    shutil.copy(offered.repository.metadata / "1.root.json", path)

    def rotate(signed: Any) -> None:
        signed.version = 2
        for role in ("root", "targets", "snapshot", "timestamp"):
            signed.roles[role].keyids.clear()
            for key, _ in stranger.keys[role]:
                signed.add_key(key, role)

    sign_in_place(path, stranger, "root", rotate)
    with untouched(offered.device, TrustError, "metadata failed verification"):
        offered.device.update()


def test_root_rotation_by_old_keys_followed(offered, keys, tmp_path):
    fresh = create(tmp_path / "keys")
    path = offered.repository.metadata / "2.root.json"
    shutil.copy(offered.repository.metadata / "1.root.json", path)

    def rotate(signed: Any) -> None:
        signed.version = 2
        signed.roles["timestamp"].keyids.clear()
        signed.add_key(fresh.keys["timestamp"][0][0], "timestamp")

    sign_in_place(path, keys, "root", rotate)
    with untouched(offered.device, TrustError, "metadata failed verification", marks=False):
        offered.device.update()
    assert offered.device.home.high_water().versions["root"] == 2  # revoked keys are learnt before anything else verifies
    sign_in_place(metadata_file(offered.repository, "timestamp"), fresh, "timestamp", lambda _: None)
    assert offered.device.update(check_only=True).reason == "release 2 is open to this device"


def test_root_is_remembered(updated, keys, tmp_path):
    # A stolen timestamp key was removed from the root, and the cache of roots is torn. The thief serves the old root.
    device, repository = updated.device, updated.repository
    old = snapshot_of(updated, tmp_path)
    fresh = create(tmp_path / "keys")
    path = repository.metadata / "2.root.json"
    shutil.copy(repository.metadata / "1.root.json", path)

    def rotate(signed: Any) -> None:
        signed.version = 2
        signed.roles["timestamp"].keyids.clear()
        signed.add_key(fresh.keys["timestamp"][0][0], "timestamp")

    def far_ahead(signed: Any) -> None:
        signed.version = 50

    sign_in_place(path, keys, "root", rotate)
    sign_in_place(metadata_file(repository, "timestamp"), fresh, "timestamp", lambda _: None)
    device.update(check_only=True)
    assert device.home.high_water().versions["root"] == 2

    sign_in_place(old / "metadata" / "timestamp.json", keys, "timestamp", far_ahead)
    device.configure(repository=str(old))
    (device.root / "metadata" / "root_history" / "2.root.json").write_bytes(b"")
    with untouched(device, TrustError, "version 1 of root, this device has seen 2"):
        device.update()
    device.configure(repository=str(repository.folder))
    assert device.update().reason == "release 2 is installed"


def test_renewed_roles_are_followed(updated):
    updated.repository.renew()
    forget_cache(updated.device)
    assert updated.device.update().reason == "release 2 is installed"
    assert updated.device.home.high_water().versions["root"] == 2


# 10 One stolen online key


def test_rollout_key_names_no_unpublished_bytes(offered, bundles):
    digest = bundles["garbage"].manifest.digest
    name_policy(offered.repository, everyone(offered.release, manifest=digest, seq=3))
    with untouched(offered.device, ManifestError, "names release 3, which the models role does not sign", marks=False):
        offered.device.update()
    not_installed(offered.device)


def test_rollout_key_changes_no_release_number(offered):
    name_policy(offered.repository, everyone(offered.release, seq=9))
    with untouched(offered.device, ManifestError, "names release 9, which the models role does not sign", marks=False):
        offered.device.update()


def test_rollout_key_goes_not_back_silently(updated):
    first = updated.repository.releases(LINE, CLASS)[0]
    name_policy(updated.repository, everyone(first))
    with untouched(updated.device, TrustError, "older than 2, but does not mark it as a revert", marks=False):
        updated.device.update()


def test_rollout_key_reverts_only_to_marked(updated):
    first = updated.repository.releases(LINE, CLASS)[0]
    name_manifest(updated.repository, updated.repository.manifest(first), seq=1, revertible=False)
    name_policy(updated.repository, start(first, (100,), 0, now=0, revert=True))
    with untouched(updated.device, TrustError, "not marked as revertible", marks=False):
        updated.device.update()


@pytest.mark.parametrize("fields", [{"line": "other"}, {"device_class": "other"}])
def test_rollout_key_names_no_other_line(offered, fields):
    name_policy(offered.repository, everyone(offered.release, **fields))
    with untouched(offered.device, ManifestError, "not for this device", marks=False):
        offered.device.update()


def test_policy_of_other_class_not_taken(offered, bundles):
    other = bundles["second"].manifest.model_copy(update={"device_class": "other"})
    made = offered.repository.publish_release(other, bundles["second"].folder, "e" * 64, [])
    offered.repository.set_policy(everyone(made))
    offered.repository.set_policy(halt(everyone(offered.release)))
    assert offered.device.update().reason == "release 2 is halted"


@pytest.mark.parametrize(
    "policy",
    [
        {"manifest": "../../../etc/passwd"},
        {"line": "../x"},
        {"seq": -1},
        {"halt": "no"},
        {"extra": 1},
        {"schema_version": 2},
        {"salt": "x" * 20_000},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_malformed_policy_refused(offered, policy):
    value = everyone(offered.release).model_dump(mode="json") | policy
    sign_bytes_as_policy(offered.repository, json.dumps(value).encode())
    before = offered.device.facts(marks=False)
    with pytest.raises((ManifestError, RepositoryError)):
        offered.device.update()
    assert offered.device.facts(marks=False) == before
    not_installed(offered.device)


def sign_bytes_as_policy(repository: Repository, data: bytes) -> None:
    target = repository._add_target(f"rollout/{LINE}/{CLASS}.json", data, {})

    def change(signed: Targets) -> None:
        signed.targets[target.path] = target

    change_role(repository, "rollout", change)


def test_document_that_is_signed_as_too_long_is_not_fetched(offered, web):
    longest = everyone(offered.release).canonical().ljust(16_384)
    sign_bytes_as_policy(offered.repository, longest)
    assert offered.device.update(check_only=True).reason == "release 2 is open to this device"
    sign_bytes_as_policy(offered.repository, longest + b" ")
    web.requests.clear()
    with untouched(
        offered.device, RepositoryError, "has a signed size of 16385 bytes, more than 16384; it is not fetched", marks=False
    ):
        offered.device.update()
    assert web.asked(".rollout.json")
    assert not web.asked(f".{CLASS}.json")


@pytest.mark.parametrize(
    ("thief", "path"), [("rollout", "models"), ("deltas", "models"), ("deltas", "rollout"), ("models", "rollout")]
)
def test_key_of_one_role_signs_no_other(offered, bundles, thief, path):
    # The thief removes the real content from its role and signs their own content under the same name.
    role, name = (
        path,
        {"models": f"models/{LINE}/{CLASS}/{offered.release.manifest}.json", "rollout": f"rollout/{LINE}/{CLASS}.json"}[path],
    )
    real = offered.repository._targets(role).targets[name]
    change_role(offered.repository, role, lambda signed: signed.targets.pop(name))

    def claim(signed: Targets) -> None:
        signed.targets[name] = real

    change_role(offered.repository, thief, claim)
    before = offered.device.facts(marks=False)
    if path == "models":
        with pytest.raises(ManifestError, match="which the models role does not sign"):
            offered.device.update()
    else:
        assert offered.device.update().reason == "nothing is rolled out to shapes/edge yet"
    assert offered.device.facts(marks=False) == before


def test_deltas_key_names_no_new_result(scene, bundles, tmp_path):
    made = make_delta(bundles["first"], bundles["garbage"], tmp_path)
    name_delta(scene.repository, made.base, made.target, made.path.read_bytes())
    assert scene.device.update().reason == "release 1 is installed"
    not_installed(scene.device)


@pytest.mark.parametrize("how", ["honest delta to garbage", "garbage under the right name", "more files", "not a delta"])
def test_deltas_key_makes_no_other_result(offered, bundles, step, tmp_path, how):
    first, second = bundles["first"].manifest.digest, bundles["second"].manifest.digest
    data = make_delta(bundles["first"], bundles["garbage"], tmp_path).path.read_bytes()
    if how == "garbage under the right name":
        data = with_header(data, target=second)
    elif how == "more files":
        header = header_of(step.read_bytes())
        data = with_header(step.read_bytes(), files=[*header.files, header.files[0]])
    elif how == "not a delta":
        data = bytes(5000)
    name_delta(offered.repository, first, second, data)
    before = offered.device.facts(marks=False)
    names = offered.device.update_until(10)
    assert [name.split(",")[0] for name in names if name.startswith("download")] == [
        "download the delta",
        "download the full bundle",
    ]
    slot = offered.device.root / "slots" / second
    assert {path.name: path.read_bytes() for path in slot.iterdir()} == {
        path.name: path.read_bytes() for path in bundles["second"].folder.iterdir()
    }
    assert offered.device.facts(marks=False) == before
    assert offered.device.leftovers() == []


def header_of(patch: bytes) -> delta.Header:
    return delta.read_header(io.BytesIO(patch))


def with_header(patch: bytes, **fields: Any) -> bytes:
    """Change fields of the header of a delta, in its own version of the format."""
    stream = io.BytesIO(patch)
    header = delta.read_header(stream)
    return container.pack_header(replace(header, **fields), patch[len(container.MAGIC)]) + stream.read()


# 11, 14 Wrong software, and names that lead elsewhere


def offer(field: Field, manifest: Manifest) -> None:
    """Sign a manifest as release 3, and open it to everyone."""
    policy = everyone(field.release, manifest=manifest.digest, seq=3)
    name_manifest(field.repository, manifest, seq=3)
    name_policy(field.repository, policy)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"device_class": "other"}, "the bundle is for shapes/other, not for this device"),
        ({"line": "other"}, "the bundle is for other/edge, not for this device"),
        ({"minimum_agent": "9.0.0"}, "the bundle needs agent 9.0.0, but this is .*; update the agent first"),
    ],
)
def test_wrong_software_refused_before_download(scene, bundles, fields, sentence):
    offer(scene, bundles["second"].manifest.model_copy(update=fields))
    with untouched(scene.device, AgentError if "minimum_agent" in fields else ManifestError, sentence, marks=False):
        scene.device.update()
    not_installed(scene.device)


@pytest.mark.parametrize("sha256", ["../../../../etc/passwd", "/etc/passwd", "..", ""])
def test_traversal_in_manifest_refused(scene, bundles, sha256):
    files = [entry.model_copy(update={"sha256": sha256}) for entry in bundles["second"].manifest.files]
    offer(scene, bundles["second"].manifest.model_copy(update={"files": files}))
    with untouched(scene.device, ManifestError, r"files\.0\.sha256", marks=False):
        scene.device.update()
    not_installed(scene.device)


def test_traversal_in_role_name_stays_inside(scene):
    # Even with all keys of the factory, nobody can name a file outside the cache: no file of an unknown role is fetched.
    evil = "../../../evil"
    policy = scene.repository.in_force("rollout")
    quoted = "..%2F..%2F..%2Fevil.json"
    (scene.repository.metadata / f"{policy.signed.version}.{quoted}").write_bytes(policy.to_bytes())

    def rename(signed: Targets) -> None:
        role = signed.delegations.roles.pop("rollout")
        role.name = evil
        signed.delegations.roles[evil] = role

    change_role(scene.repository, "targets", rename)
    raise_in_snapshot(scene.repository, **{evil: policy.signed.version})
    with untouched(scene.device, TrustError, "to a role '../../../evil', which this agent does not know", marks=False):
        scene.device.update()
    assert [path for path in scene.folder.parent.rglob("*evil*") if scene.repository.folder not in path.parents] == []


def test_manifest_under_other_name_refused(scene, bundles):
    # The manifest's path and the policy name one bundle, but its bytes are those of another.
    honest, other = bundles["second"].manifest, bundles["garbage"].manifest
    policy = everyone(scene.release, manifest=honest.digest, seq=2)
    target = scene.repository._add_target(f"models/{LINE}/{CLASS}/{honest.digest}.json", other.canonical(), {"seq": 2})

    def change(signed: Targets) -> None:
        signed.targets[target.path] = target

    change_role(scene.repository, "models", change)
    name_policy(scene.repository, policy)
    with untouched(scene.device, ManifestError, "not the one that the policy names", marks=False):
        scene.device.update()
    not_installed(scene.device)


@pytest.mark.parametrize("custom", [None, "2", 2, [2], {}, {"seq": "2"}, {"seq": None}, {"seq": {"a": 1}}, {"seq": True}])
def test_models_without_number_refused(scene, bundles, custom):
    manifest = bundles["second"].manifest
    policy = everyone(scene.release, manifest=manifest.digest, seq=2)
    name_manifest(scene.repository, manifest, seq=0)

    def replace(signed: Targets) -> None:
        signed.targets[f"models/{LINE}/{CLASS}/{manifest.digest}.json"].unrecognized_fields["custom"] = custom

    change_role(scene.repository, "models", replace)
    name_policy(scene.repository, policy)
    wrong = isinstance(custom, dict) and custom.get("seq") is not None
    error, says = (
        (InvalidError, "are not valid and are not used: seq") if wrong else (ManifestError, "which the models role does not sign")
    )
    with untouched(scene.device, error, says, marks=False):
        scene.device.update()


# Bytes changed on a mirror


def published_targets(field: Field, kind: str) -> list[Path]:
    return sorted(path for path in (field.repository.target_files / kind).rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["models", "rollout"])
def test_tampered_document_refused(offered, kind):
    for path in published_targets(offered, kind):
        path.write_bytes(path.read_bytes().replace(b'"seq":2', b'"seq":3').replace(b'"tier":"test"', b'"tier":"best"'))
    with untouched(offered.device, TrustError, "metadata failed verification", marks=False):
        offered.device.update()
    not_installed(offered.device)


@pytest.mark.parametrize("role", ["graph", "weights", "sampler", "golden", "reference"])
def test_tampered_object_refused(scene, bundles, role, tmp_path):
    device = Device.init(tmp_path / "new", scene.repository)  # it has no file of the bundle
    publish(scene.repository, bundles["garbage"])
    publish(scene.repository, bundles["second"])
    wanted = bundles["second"].manifest.entry(role, None if role == "graph" else "full")
    path = scene.repository.objects / wanted.sha256
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with untouched(device, RepositoryError, f"{wanted.sha256} does not have its signed size and hash", marks=False):
        device.update()
    assert device.active is None
    assert not (device.root / "incoming" / wanted.sha256).exists()


@pytest.mark.parametrize(("step", "folder"), [(6, "incoming"), (8, "slots/.{}")])
def test_file_changed_after_download_noticed(scene, bundles, step, folder):
    release = publish(scene.repository, bundles["second"])
    path = scene.device.root / folder.format(release.manifest) / bundles["second"].path("weights", "full").name

    def flip(number: int, _: str) -> None:
        if number == step:
            path.write_bytes(b"\1" + path.read_bytes()[1:])

    before = scene.device.facts(marks=False)
    with pytest.raises(RepositoryError, match=r"does not have its signed (?:size and )?hash"):
        scene.device.update(flip)
    assert scene.device.facts(marks=False) == before
    assert scene.device.sound
    assert not (scene.device.root / "slots" / release.manifest).exists()


# Files in the folder where the agent is started


def test_working_directory_is_not_imported(scene, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('not the real one')")
    agent = Path(sys.executable).with_name("ferry-agent")
    words = [agent, "generate", "--dir", scene.device.root, "--output", tmp_path / "a.png"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# 24 Concurrent agents


@pytest.mark.parametrize("words", [("update",), ("rollback",), ("report",)])
def test_concurrent_agent_changes_nothing(updated, words):
    before = updated.device.facts()
    with updated.device.home.locked():
        output = updated.device.command(*words, code=3)
    assert "another agent is at work" in output
    assert updated.device.facts() == before


def test_concurrent_process_changes_nothing(offered):
    before = offered.device.facts()
    with offered.device.home.locked():
        done = offered.device.process("--quiet", "update")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("ferry-agent: another agent is at work")
    assert offered.device.facts() == before


def test_lock_of_dead_agent_does_not_hold(offered):
    (offered.device.root / "lock").write_text("4711")
    assert offered.device.update(check_only=True).reason == "release 2 is open to this device"


# What the commands say about it


def expire_timestamp(field: Field) -> None:
    sign_in_place(metadata_file(field.repository, "timestamp"), field.repository.keys, "timestamp", expire)
    forget_cache(field.device)


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (expire_timestamp, 5),
        (lambda field: shutil.rmtree(field.repository.folder), 4),
        (lambda field: (field.device.root / "root.json").unlink(), 3),
        (lambda field: name_policy(field.repository, everyone(field.release, seq=9)), 5),
        (str, 0),
    ],
    ids=["expired", "unreachable", "root lost", "unpublished", "none"],
)
def test_exit_code_tells_whose_fault(scene, attack, code):
    attack(scene)
    output = scene.device.command("--quiet", "update", code=code)
    assert output.count("\n") == 1
    assert scene.device.sound

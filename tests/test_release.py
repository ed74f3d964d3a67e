"""The factory's side: keys, bundles, deltas, the signed repository, and where it is published."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import onnx
import pytest
from moto.server import ThreadedMotoServer
from safetensors.numpy import save
from tuf.api.metadata import Metadata, Root

from model.export import Export
from ota.delta import encode, files, numbers
from ota.errors import DeltaError, ManifestError, OperatorError, TransferError
from ota.manifest import MAX_TABLE, Reference, parse
from ota.release import keys as keys_module
from ota.release import metadata, rollout, store
from ota.release import repository as repository_module
from ota.release.bundle import Bundle, assemble, make_delta, open_bundle
from ota.release.keys import KeyRing
from ota.release.repository import KEPT_DELTAS_TO, KEPT_RELEASES, Repository
from tests.conftest import origin
from tests.fleet_kit import CLASS, LEDGER, LINE, Device, closed_port, everyone, metadata_file, name_manifest, publish

pytest_plugins = ("tests.fleet_kit",)


def clone(bundle: Bundle, version: int) -> Bundle:
    """Put the same files under another manifest: a release that costs nothing to build."""
    manifest = bundle.manifest.model_copy(update={"origin": origin(version)})
    return replace(bundle, manifest=manifest)


def release(repository: Repository, bundle: Bundle, deltas: list[tuple[str, Path]] | None = None, **fields: Any):
    return repository.publish_release(bundle.manifest, bundle.folder, LEDGER, deltas or [], **fields)


def versions(repository: Repository) -> dict[str, int]:
    found = dict(repository._versions())
    return found | {"snapshot": repository._snapshot_version(), "timestamp": repository.in_force("timestamp").signed.version}


# Keys


@pytest.fixture
def own_keys(keys: KeyRing, tmp_path: Path) -> KeyRing:
    """Copy the key ring, to be damaged."""
    shutil.copytree(keys.folder, tmp_path / "keys")
    return KeyRing(tmp_path / "keys")


def test_private_keys_are_private(keys):
    files = sorted(keys.folder.rglob("*.pem"))
    assert len(files) == 3 + 3 + 5 + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert "PRIVATE" not in (keys.folder / "keys.json").read_text()


def test_second_create_keeps_keys(own_keys):
    before = {path: path.read_bytes() for path in own_keys.folder.rglob("*") if path.is_file()}
    again = keys_module.create(own_keys.folder)
    assert {path: path.read_bytes() for path in own_keys.folder.rglob("*") if path.is_file()} == before
    assert again.keys == own_keys.keys


def test_create_goes_on_after_kill(own_keys):
    (own_keys.folder / "keys.json").unlink()
    made = keys_module.create(own_keys.folder)
    assert all(len(made.signers(role)) == made.threshold(role) for role in made.keys)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"root": [{}]}'])
def test_damaged_key_ring_refused(own_keys, damage):
    (own_keys.folder / "keys.json").write_bytes(damage)
    with pytest.raises(OperatorError, match="restore it from a backup"):
        KeyRing(own_keys.folder)


def test_no_key_ring_refused(tmp_path):
    with pytest.raises(OperatorError, match="there is no key ring"):
        KeyRing(tmp_path)


def test_offline_keys_stay_offline(own_keys, tmp_path, bundles):
    repository = Repository.create(tmp_path / "repository", own_keys)
    shutil.rmtree(own_keys.folder / "offline")
    made = publish(repository, bundles["first"])
    repository.refresh()
    assert repository.releases(LINE, CLASS) == [made]
    assert repository.policy(LINE, CLASS).seq == made.seq
    with pytest.raises(OperatorError, match="role root needs 2 signatures but 0 of its keys"):
        Repository.create(tmp_path / "another", own_keys)


def test_two_of_three_offline_keys_suffice(own_keys, tmp_path):
    (own_keys.folder / "offline" / "root-1.pem").unlink()
    (own_keys.folder / "offline" / "targets-3.pem").write_text("damaged")
    repository = Repository.create(tmp_path / "repository", own_keys)
    assert versions(repository)["targets"] == 1


def test_one_of_two_offline_keys_does_not_suffice(own_keys, tmp_path):
    repository = Repository.create(tmp_path / "repository", own_keys)
    by_role = {state.role: state for state in repository.states()}
    assert all(state.signs_here for state in by_role.values())
    for name in ("root-1", "root-2", "targets-1"):
        (own_keys.folder / "offline" / f"{name}.pem").unlink()
    by_role = {state.role: state for state in repository.states()}
    assert (by_role["root"].signs_here, by_role["targets"].signs_here) == (False, True)
    with pytest.raises(OperatorError, match="role root needs 2 signatures but 1 of its keys"):
        own_keys.signers("root")
    with pytest.raises(OperatorError, match="role root needs 2 signatures but 1 of its keys"):
        Repository.create(tmp_path / "another", own_keys)


def test_nothing_is_renewed_where_one_of_the_roles_cannot_be(own_keys, tmp_path):
    repository = Repository.create(tmp_path / "repository", own_keys)
    (own_keys.folder / "online" / "models.pem").unlink()
    files = {path: path.read_bytes() for path in repository.folder.rglob("*") if path.is_file()}
    with pytest.raises(OperatorError, match="role models needs 1 signatures but 0"):
        repository.renew(["root", "models"])
    assert {path: path.read_bytes() for path in repository.folder.rglob("*") if path.is_file()} == files


def test_floor_does_not_rise_above_what_is_rolled_out(repository, bundles):
    first = publish(repository, bundles["first"])
    second = release(repository, bundles["second"])
    before = versions(repository)
    with pytest.raises(OperatorError, match="release 1 of shapes/edge is being rolled out; start a rollout of 2"):
        repository.set_floor(LINE, CLASS, second.seq)
    assert (versions(repository), repository.floor(LINE, CLASS)) == (before, 0)
    repository.set_floor(LINE, CLASS, first.seq)
    repository.set_policy(everyone(second))
    repository.set_floor(LINE, CLASS, second.seq)
    assert repository.floor(LINE, CLASS) == 2


@pytest.mark.parametrize("role", ["models", "deltas", "snapshot", "timestamp"])
def test_missing_online_key_named(own_keys, tmp_path, bundles, role):
    repository = Repository.create(tmp_path / "repository", own_keys)
    (own_keys.folder / "online" / f"{role}.pem").unlink()
    with pytest.raises(OperatorError, match=f"role {role} needs 1 signatures but 0 of its keys"):
        release(repository, bundles["first"])
    assert repository.releases(LINE, CLASS) == []


# The repository


def test_published_release_is_listed(repository, bundles, step):
    first = release(repository, bundles["first"])
    second = release(repository, bundles["second"], [(bundles["first"].manifest.digest, step)], revertible=False)
    repository.set_policy(everyone(second))
    assert repository.releases(LINE, CLASS) == [first, second]
    assert (second.seq, second.manifest, second.ledger) == (2, bundles["second"].manifest.digest, LEDGER)
    assert (second.version, second.full_bytes, second.revertible) == (2, bundles["second"].manifest.size, False)
    (way,) = repository.deltas(LINE, CLASS)
    assert (way.base, way.target, way.size) == (first.manifest, second.manifest, step.stat().st_size)
    assert repository.policy(LINE, CLASS) == everyone(second)
    assert repository.manifest(second) == bundles["second"].manifest
    assert repository.releases(LINE, "other") == []
    assert repository.policy(LINE, "other") is None


TOLD: dict[str, Any] = {"ledger": LEDGER, "version": 1, "full_bytes": 1, "revertible": True}


@pytest.mark.parametrize("number", [2**53, 2**53 + 1, 2**70, 0, -1, "1", None])
def test_release_number_that_no_ferry_gave_is_said(repository, bundles, number):
    """Report a number that a thief of the models key signed, or that came with a restored copy of the repository."""
    first = release(repository, bundles["first"])
    name_manifest(repository, bundles["first"].manifest, number, **TOLD)
    with pytest.raises(OperatorError, match="run `ferry trust rotate models`"):
        release(repository, bundles["second"])
    assert versions(repository)["models"] == 3
    assert repository.policy(LINE, CLASS) is None
    assert first.seq == 1


def test_floor_that_no_ferry_gave_is_not_signed_on(repository, bundles):
    release(repository, bundles["first"])
    name_manifest(repository, bundles["first"].manifest, 1, **{**TOLD, "floor": 2**53})
    with pytest.raises(OperatorError, match="run `ferry trust rotate models`"):
        release(repository, bundles["second"])


@pytest.mark.parametrize("custom", [{"ledger": "../x"}, {"version": "\x1b[2J"}, {"more": 1}, {"floor": []}, {"floor": 2**53 + 1}])
def test_release_that_no_ferry_wrote_is_said(repository, bundles, custom):
    release(repository, bundles["first"])
    name_manifest(repository, bundles["first"].manifest, 1, **{**TOLD, **custom})
    with pytest.raises(OperatorError, match="which ferry did not write") as caught:
        repository.releases(LINE, CLASS)
    assert str(caught.value).isprintable()


def test_versions_rise_by_one(repository, bundles):
    names = ("targets", "models", "deltas", "rollout", "snapshot", "timestamp")
    assert versions(repository) == dict.fromkeys(names, 1)
    made = release(repository, bundles["first"])
    assert versions(repository) == dict(zip(names, (1, 2, 2, 1, 2, 2), strict=True))
    repository.set_policy(everyone(made))
    assert versions(repository) == dict(zip(names, (1, 2, 2, 2, 3, 3), strict=True))
    repository.refresh()
    assert versions(repository) == dict(zip(names, (1, 2, 2, 2, 4, 4), strict=True))


def test_refresh_renews_no_rollout(repository, bundles):
    publish(repository, bundles["first"])
    kept = {role: metadata_file(repository, role).read_bytes() for role in ("rollout", "models", "targets")}
    repository.refresh()
    assert {role: metadata_file(repository, role).read_bytes() for role in kept} == kept
    left = repository.expiries()
    assert left["snapshot"] >= left["rollout"]
    assert set(left) == {*versions(repository), "root"}


def test_same_bundle_is_same_release(repository, bundles):
    first = release(repository, bundles["first"])
    before = versions(repository)
    assert release(repository, bundles["first"]) == first
    assert versions(repository) == before


def test_known_bundle_gets_new_deltas(repository, bundles, tmp_path):
    # Going back: the bundle is published already, but not the delta to it from what runs now.
    first = publish(repository, bundles["first"])
    release(repository, bundles["second"])
    back = make_delta(bundles["second"], bundles["first"], tmp_path)
    assert release(repository, bundles["first"], [(back.base, back.path)]) == first
    assert [(found.base, found.target) for found in repository.deltas(LINE, CLASS)] == [(back.base, back.target)]
    before = versions(repository)
    assert release(repository, bundles["first"], [(back.base, back.path)]) == first
    assert versions(repository) == before


def test_renew_signs_what_nothing_else_does(repository, bundles, monkeypatch):
    made = publish(repository, bundles["first"])
    before, ends = versions(repository), repository.expiries()
    later = {role: life + timedelta(days=30) for role, life in metadata.LIFETIMES.items()}
    monkeypatch.setattr(metadata, "LIFETIMES", later)
    found = repository.renew()
    renewed = {"root", "targets", "models", "deltas", "snapshot", "timestamp"}
    assert {role for role in found if found[role] > ends[role]} == renewed
    assert versions(repository) == {role: number + (role in renewed) for role, number in before.items()}
    assert repository.releases(LINE, CLASS) == [made]
    first, second = (Metadata.from_file(str(repository.metadata / f"{n}.root.json")) for n in (1, 2))
    first.verify_delegate(Root.type, second)
    second.verify_delegate(Root.type, second)
    assert second.signed.version == 2


def test_renew_without_offline_keys_changes_nothing(own_keys, tmp_path, bundles):
    repository = Repository.create(tmp_path / "repository", own_keys)
    shutil.rmtree(own_keys.folder / "offline")
    files = {path: path.read_bytes() for path in repository.folder.rglob("*") if path.is_file()}
    with pytest.raises(OperatorError, match="role root needs 2 signatures"):
        repository.renew()
    with pytest.raises(OperatorError, match="rollout cannot be renewed on its own"):
        repository.renew(["rollout"])
    assert {path: path.read_bytes() for path in repository.folder.rglob("*") if path.is_file()} == files
    repository.renew(["models", "deltas"])
    assert (versions(repository)["models"], versions(repository)["targets"]) == (2, 1)


def test_create_keeps_what_is_there(repository, keys, bundles):
    made = release(repository, bundles["first"])
    assert Repository.create(repository.folder, keys).releases(LINE, CLASS) == [made]
    with pytest.raises(OperatorError, match="there is no repository"):
        Repository(repository.folder / "elsewhere", keys)


def test_metadata_stay_small(repository, bundles, step):
    publish(repository, bundles["first"])
    publish(repository, bundles["second"], step, bundles["first"])
    assert len(repository.deltas(LINE, CLASS)) == 1
    files = [metadata_file(repository, role) for role in versions(repository) if role != "targets"]
    assert repository.metadata_bytes(LINE, CLASS) == sum(path.stat().st_size for path in files) <= 8 * 1024


def test_old_releases_are_pruned(repository, bundles):
    made = []
    for version in range(1, KEPT_RELEASES + 4):
        bundle = clone(bundles["first"], version)
        ways = [(old.manifest, bundles["first"].path("sampler", "full")) for old in made[-2:]]
        made.append(release(repository, bundle, ways))
    assert repository.releases(LINE, CLASS) == made[-KEPT_RELEASES:]
    assert [r.seq for r in made] == list(range(1, KEPT_RELEASES + 4))
    steps = [(before.manifest, after.manifest) for before, after in pairwise(made)][-KEPT_RELEASES:]
    others = [(made[-3].manifest, made[-1].manifest), (made[-4].manifest, made[-2].manifest)]
    assert len(others) == KEPT_DELTAS_TO
    gone = steps[0][0]
    shown = {(gone if way.base == gone[:16] else way.base, way.target) for way in repository.deltas(LINE, CLASS)}
    assert shown == {*steps, *others}


def test_release_in_rollout_is_not_pruned(repository, bundles):
    wanted = publish(repository, bundles["first"])
    for version in range(2, KEPT_RELEASES + 4):
        release(repository, clone(bundles["first"], version))
    assert wanted in repository.releases(LINE, CLASS)
    assert len(repository.releases(LINE, CLASS)) == KEPT_RELEASES + 1


def test_other_classes_are_not_pruned(repository, bundles):
    other = bundles["first"].manifest.model_copy(update={"device_class": "other"})
    kept = release(repository, replace(bundles["first"], manifest=other))
    for version in range(KEPT_RELEASES + 2):
        release(repository, clone(bundles["first"], version + 1))
    assert repository.releases(LINE, "other") == [kept]
    assert kept.seq == 1


@pytest.mark.parametrize("fields", [{"manifest": "f" * 64}, {"seq": 2}, {"line": "other"}, {"device_class": "other"}])
def test_policy_for_unpublished_release_refused(repository, bundles, fields):
    made = publish(repository, bundles["first"])
    before = versions(repository)
    with pytest.raises(OperatorError, match="is not published"):
        repository.set_policy(everyone(made, **fields))
    assert versions(repository) == before


def test_revert_to_unmarked_release_refused(repository, bundles):
    made = release(repository, bundles["first"], revertible=False)
    repository.set_policy(everyone(made))
    with pytest.raises(OperatorError, match="not marked as revertible"):
        repository.set_policy(rollout.start(made, (100,), 0, revert=True))
    assert repository.policy(LINE, CLASS).revert is False


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_object_with_wrong_hash_refused(repository, bundles, tmp_path, damage):
    shutil.copytree(bundles["first"].folder, tmp_path / "bundle")
    weights = tmp_path / "bundle" / bundles["first"].path("weights", "full").name
    weights.unlink()
    if damage == "altered":
        weights.write_bytes(b"altered")
    with pytest.raises(OperatorError, match=r"of the bundle .* build .* again"):
        release(repository, replace(bundles["first"], folder=tmp_path / "bundle"))
    assert repository.releases(LINE, CLASS) == []
    assert not (repository.objects / weights.name).exists()
    assert release(repository, bundles["first"]).seq == 1


def test_root_is_the_anchor(repository):
    root = Metadata[Root].from_bytes(repository.root_bytes())
    root.verify_delegate("root", root)
    assert root.signed.consistent_snapshot
    assert {role: root.signed.roles[role].threshold for role in ("root", "targets", "snapshot", "timestamp")} == {
        "root": 2, "targets": 2, "snapshot": 1, "timestamp": 1,
    }  # fmt: skip


# A publication that is cut


class Cut(Exception):  # noqa: N818
    """A simulated power cut."""


def cut_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the process die when it is about to write a file."""
    write = repository_module.write

    def dying(path: Path, data: bytes) -> None:
        if path.name.endswith(name):
            raise Cut
        write(path, data)

    monkeypatch.setattr(repository_module, "write", dying)


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "deltas.json", "models.json"])
def test_cut_publication_leaves_previous_state(repository, bundles, step, tmp_path, monkeypatch, name):
    first = publish(repository, bundles["first"])
    device = Device.init(tmp_path / "device", repository)
    before = versions(repository)
    with monkeypatch.context() as patch:
        cut_before(patch, name)
        with pytest.raises(Cut):
            release(repository, bundles["second"], [(first.manifest, step)])
    assert (versions(repository), repository.releases(LINE, CLASS)) == (before, [first])
    assert device.update(check_only=True).reason == "release 1 is open to this device"

    second = publish(repository, bundles["second"])
    assert repository.releases(LINE, CLASS) == [first, second]
    assert device.update(check_only=True).reason == "release 2 is open to this device"


def test_cut_publication_reuses_no_name(repository, bundles, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_before(patch, "timestamp.json")
        with pytest.raises(Cut):
            release(repository, bundles["first"])
    copied = tmp_path / "published"
    store.publish(repository.files(), str(copied), tmp_path)
    published = {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    made = publish(repository, bundles["second"])
    store.publish(repository.files(), str(copied), tmp_path)
    for name, data in published.items():
        assert (copied / name).read_bytes() == data or name.name == "timestamp.json"
    reader = Device.init(tmp_path / "device", repository, address=str(copied))
    assert reader.update(check_only=True).reason == f"release {made.seq} is open to this device"


# Bundles and deltas


def assembled(exports: dict[Any, Path], out: Path, **fields: Any) -> Bundle:
    given = {"line": LINE, "device_class": CLASS, "tier": "test", "configuration": "I", "precision": "bfloat16"} | fields
    return assemble(exports, **given, origin=origin(1), out=out)


@pytest.fixture
def export(exported, tmp_path) -> Path:
    """Copy the exported files, to be damaged."""
    shutil.copytree(exported.folder, tmp_path / "export")
    return tmp_path / "export"


def test_bundle_names_files_by_hash(export, tmp_path):
    made = assembled({"full": export}, tmp_path / "out")
    names = {path.name for path in made.folder.iterdir()} - {"manifest.json"}
    assert names == {hashlib.sha256((made.folder / name).read_bytes()).hexdigest() for name in names}
    assert names == {entry.sha256 for entry in made.manifest.files}
    assert made.folder.name == hashlib.sha256((made.folder / "manifest.json").read_bytes()).hexdigest()
    assert open_bundle(made.folder) == made == assembled({"full": export}, tmp_path / "out")


def test_variants_share_one_graph(export, tmp_path):
    made = assembled({"full": export, "dev": export}, tmp_path / "out")
    assert [(e.role, e.variant) for e in made.manifest.files if e.role in ("graph", "weights")] == [
        ("graph", None), ("weights", "full"), ("weights", "dev"),
    ]  # fmt: skip
    shutil.copytree(export, tmp_path / "other")
    (tmp_path / "other" / "graph.onnx").write_bytes((export / "graph.onnx").read_bytes() + b" ")
    with pytest.raises(OperatorError, match="dev was exported with another graph than full"):
        assembled({"full": export, "dev": tmp_path / "other"}, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin", "sampler.json", "golden.npz", "reference.json"])
def test_missing_file_makes_no_bundle(export, tmp_path, name):
    (export / name).unlink()
    with pytest.raises(OperatorError, match=f"{name} is missing"):
        assembled({"full": export}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sampler.json", "reference.json"])
def test_table_that_devices_refuse_makes_no_bundle(export, tmp_path, name):
    table = json.loads((export / name).read_bytes())
    (export / name).write_text(json.dumps(table | {"schema_version": 9}))
    with pytest.raises(ManifestError):
        assembled({"full": export}, tmp_path / "out")


def test_file_that_devices_refuse_makes_no_bundle(export, tmp_path):
    (export / "weights.bin").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"weights\.bin does not fit into a bundle"):
        assembled({"full": export}, tmp_path / "out")


@pytest.mark.parametrize("fields", [{"line": "../x"}, {"device_class": "Edge"}, {"configuration": "III"}])
def test_name_that_devices_refuse_makes_no_bundle(export, tmp_path, fields):
    with pytest.raises(ManifestError, match="do not make a bundle"):
        assembled({"full": export}, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_missing_bundle_cannot_be_opened(tmp_path):
    with pytest.raises(OperatorError, match="there is no bundle"):
        open_bundle(tmp_path)


def test_numbers_cover_the_weights(bundles):
    graph = bundles["first"].path("graph")
    weights = bundles["first"].path("weights", "full")
    found = [e for e in files.elements(weights, weights, graph) if e.kind != "bytes"]
    size = bundles["first"].path("weights", "full").stat().st_size
    assert sum(e.length for e in found) > 0.9 * size
    ordered = sorted(found, key=lambda e: e.offset)
    assert all(a.offset + a.length <= b.offset for a, b in pairwise(ordered))
    assert ordered[-1].offset + ordered[-1].length <= size
    assert {e.kind for e in found} == {"bfloat16"}
    assert all(e.old == e.offset for e in found)
    assert all(e.row for e in found if e.length > 1000)


def test_delta_is_smaller_and_says_how(bundles, step, tmp_path):
    made = make_delta(bundles["first"], bundles["second"], tmp_path)
    assert made.path.read_bytes() == step.read_bytes()
    assert made.size == made.path.stat().st_size < 0.5 * bundles["second"].manifest.size
    assert made.by_kind["numbers"] > made.by_kind["zstd"]
    assert sum(made.by_kind.values()) < made.size


def test_delta_no_smaller_is_dropped(export, tmp_path):
    # An almost empty graph, and weights that are nothing but noise.
    initializer = onnx.TensorProto(name="w", data_type=onnx.TensorProto.BFLOAT16, dims=[5000])
    initializer.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "10000")):
        initializer.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph([], "g", [], [], [initializer])
    (export / "graph.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    made = []
    for seed in (0, 1):
        for name in ("weights.bin", "golden.npz"):
            (export / name).write_bytes(np.random.default_rng(seed).bytes(10_000))
        made.append(assembled({"full": export}, tmp_path / "out", oldest_agent="0.2.0"))  # takes golden outputs as they are
    assert made[0] != made[1]
    assert make_delta(*made, tmp_path / "deltas") is None
    assert not list((tmp_path / "deltas").iterdir())


def test_delta_is_proved_before_use(bundles, tmp_path, monkeypatch):
    build = encode.build

    def faulty(*args: Any) -> encode.Built:
        built = build(*args)
        patch = args[3].read_bytes()
        middle = len(patch) // 2
        args[3].write_bytes(patch[:middle] + bytes([patch[middle] ^ 1]) + patch[middle + 1 :])
        return built

    monkeypatch.setattr(encode, "build", faulty)
    with pytest.raises(DeltaError):
        make_delta(bundles["first"], bundles["second"], tmp_path)
    assert list(tmp_path.iterdir()) == []  # no unproved delta is left where deltas are taken from


def test_delta_over_another_graph_still_follows_the_weights(bundles, export, tmp_path):
    graph = (export / "graph.onnx").read_bytes() + b"\x3a\x00"  # an empty, ignored field: other bytes, same graph
    (export / "graph.onnx").write_bytes(graph)
    other = assembled({"full": export}, tmp_path / "out")
    assert other.manifest.entry("graph").sha256 != bundles["first"].manifest.entry("graph").sha256
    made = make_delta(bundles["first"], other, tmp_path / "deltas")
    assert made.by_kind["numbers"] == 0  # the weights are the same
    assert made.size < 0.05 * other.manifest.size


def test_delta_takes_the_factors_of_a_training(bundles, export, tmp_path):
    """Take a variant's factors for its weights; those of another variant, or for agents of before, cost bytes and nothing else."""
    weights, rng = bytearray((export / "weights.bin").read_bytes()), np.random.default_rng(0)
    tensors, said = {}, {}
    for tensor in files.tensors(export / "weights.bin", export / "graph.onnx"):
        if len(tensor.shape) == 2 and min(tensor.shape) >= 8:
            place = slice(tensor.offset, tensor.offset + tensor.length)
            left, right = (rng.integers(-9, 10, shape, np.int32) for shape in ((tensor.shape[0], 2), (2, tensor.shape[1])))
            moved = numbers.predicted(np.frombuffer(weights[place], np.uint16), left, right, -13, numbers.KINDS["bfloat16"])
            weights[place] = moved.tobytes()
            tensors |= {f"{tensor.name}.left": left, f"{tensor.name}.right": right}
            said[tensor.name] = -13
    (export / "weights.bin").write_bytes(weights)
    (tmp_path / "f").write_bytes(save(tensors, {"deltaferry": json.dumps({"schema_version": 1, "products": said, "steps": {}})}))
    other = assembled({"full": export}, tmp_path / "out")
    made = make_delta(bundles["first"], other, tmp_path / "deltas", {"full": tmp_path / "f"}, 2)
    assert 0 < made.by_kind["update"] < 0.5 * sum(4 * values.size for values in tensors.values())
    assert made.by_kind["numbers"] == 0
    for factors, version in ((None, 2), ({"dev": tmp_path / "f"}, 2), ({"full": tmp_path / "f"}, 1)):
        assert make_delta(bundles["first"], other, tmp_path / "deltas", factors, version).by_kind["update"] == 0


def test_delta_to_more_variants(bundles, export, tmp_path):
    both = assembled({"full": export, "dev": export}, tmp_path / "out")
    made = make_delta(bundles["first"], both, tmp_path / "deltas")
    assert made.by_kind["same"] == 0
    assert made.size < both.manifest.size


# Published to a folder


def names_of(repository: Repository) -> list[str]:
    return [name for name, _ in repository.files()]


def test_folder_gets_everything_timestamp_last(repository, bundles, tmp_path):
    publish(repository, bundles["first"])
    seen: list[str] = []
    assert store.publish(repository.files(), "published", tmp_path, on_file=seen.append) == len(seen)
    assert seen == names_of(repository)
    assert seen[-1] == "metadata/timestamp.json"
    order = [name.split("/")[0] for name in seen]
    assert order == sorted(order, key=("objects", "targets", "metadata").index)
    for name, path in repository.files():
        assert (tmp_path / "published" / name).read_bytes() == path.read_bytes()


def test_folder_gets_only_what_is_new(repository, bundles, tmp_path):
    publish(repository, bundles["first"])
    store.publish(repository.files(), "published", tmp_path)
    before = set(names_of(repository))
    again: list[str] = []
    store.publish(repository.files(), f"file://{tmp_path / 'published'}", tmp_path, on_file=again.append)
    assert again == ["metadata/timestamp.json"]
    publish(repository, bundles["second"])
    fresh: list[str] = []
    store.publish(repository.files(), "published", tmp_path, on_file=fresh.append)
    assert set(fresh) == set(names_of(repository)) - before | {"metadata/timestamp.json"}


def test_reader_never_sees_half_a_release(repository, bundles, step, tmp_path):
    publish(repository, bundles["first"])
    store.publish(repository.files(), "published", tmp_path)
    reader = Device.init(tmp_path / "device", repository, address=str(tmp_path / "published"))
    seen: list[str] = []

    def look(name: str) -> None:
        fresh = Device.init(tmp_path / "fresh", repository, address=str(tmp_path / "published"))
        reasons = {fresh.update(check_only=True).reason, reader.update(check_only=True).reason}
        assert len(reasons) == 1
        seen.append(f"{Path(name).parts[0]}: {reasons.pop()}")
        shutil.rmtree(fresh.root)

    publish(repository, bundles["second"], step, bundles["first"])
    store.publish(repository.files(), "published", tmp_path, on_file=look)
    assert set(seen[:-1]) == {f"{part}: release 1 is open to this device" for part in ("objects", "targets", "metadata")}
    assert seen[-1] == "metadata: release 2 is open to this device"


def test_folder_that_cannot_be_written(repository, tmp_path):
    (tmp_path / "published").write_text("a file")
    with pytest.raises(TransferError, match="cannot write"):
        store.publish(repository.files(), "published", tmp_path)


@pytest.mark.parametrize("url", ["ftp://x/y", "gs://bucket", "https://x"])
def test_unknown_scheme_refused(repository, tmp_path, url):
    with pytest.raises(OperatorError, match="cannot publish to"):
        store.publish(repository.files(), url, tmp_path)
    assert not list(tmp_path.glob("*:*"))


# Published to S3


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Start an S3 server on a free port of the loopback."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


@pytest.fixture
def bucket(s3_server: str, credentials: None, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Create an empty bucket of the test's own."""
    name = "b-" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    made = boto3.resource("s3", endpoint_url=s3_server).Bucket(name)
    made.create()
    yield made
    made.meta.client.close()


def contents(bucket: Any, prefix: str = "") -> dict[str, bytes]:
    return {item.key: item.get()["Body"].read() for item in bucket.objects.filter(Prefix=prefix)}


def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the keys that are put from now on, in order, as the client sends them."""
    seen: list[str] = []
    boto3.setup_default_session()
    boto3.DEFAULT_SESSION.events.register("before-parameter-build.s3.PutObject", lambda params, **_: seen.append(params["Key"]))
    return seen


@pytest.mark.parametrize("prefix", ["", "fleet/shapes"])
def test_bucket_gets_everything_timestamp_last(repository, bundles, bucket, s3_server, tmp_path, monkeypatch, prefix):
    publish(repository, bundles["first"])
    seen = puts(monkeypatch)
    copied = store.publish(repository.files(), f"s3://{bucket.name}/{prefix}", tmp_path, s3_server)
    expected = [f"{prefix}/{name}".lstrip("/") for name in names_of(repository)]
    assert (seen, copied) == (expected, len(expected))
    assert seen[-1].endswith("metadata/timestamp.json")
    paths = [path for _, path in repository.files()]
    assert contents(bucket) == {key: path.read_bytes() for key, path in zip(expected, paths, strict=True)}


def test_bucket_caches_all_but_timestamp(repository, bucket, s3_server, tmp_path):
    store.publish(repository.files(), f"s3://{bucket.name}", tmp_path, s3_server)
    control = {item.key: item.get()["CacheControl"] for item in bucket.objects.all()}
    assert control.pop("metadata/timestamp.json") == "no-cache"
    assert set(control.values()) == {"public, max-age=31536000, immutable"}


def test_bucket_gets_only_what_is_new(repository, bundles, bucket, s3_server, tmp_path, monkeypatch):
    publish(repository, bundles["first"])
    store.publish(repository.files(), f"s3://{bucket.name}/x", tmp_path, s3_server)
    before = set(names_of(repository))
    seen = puts(monkeypatch)
    assert store.publish(repository.files(), f"s3://{bucket.name}/x", tmp_path, s3_server) == 1
    assert seen == ["x/metadata/timestamp.json"]
    publish(repository, bundles["second"])
    store.publish(repository.files(), f"s3://{bucket.name}/x", tmp_path, s3_server)
    fresh = {key.removeprefix("x/") for key in seen}
    assert fresh == set(names_of(repository)) - before | {"metadata/timestamp.json"}


def test_bucket_reader_never_sees_half(repository, bundles, step, bucket, s3_server, tmp_path):
    publish(repository, bundles["first"])
    place = f"s3://{bucket.name}/fleet"
    store.publish(repository.files(), place, tmp_path, s3_server)
    anyone = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket.name}/*"}
    bucket.Policy().put(Policy=json.dumps({"Version": "2012-10-17", "Statement": [anyone]}))
    address = f"{s3_server}/{bucket.name}/fleet"
    reader = Device.init(tmp_path / "device", repository, address=address)
    publish(repository, bundles["second"], step, bundles["first"])
    reasons: list[str] = []
    store.publish(
        repository.files(), place, tmp_path, s3_server, on_file=lambda _: reasons.append(reader.update(check_only=True).reason)
    )
    assert set(reasons[:-1]) == {"release 1 is open to this device"}
    assert reasons[-1] == "release 2 is open to this device"


def test_missing_bucket_is_operators_fault(repository, s3_server, credentials, tmp_path):
    with pytest.raises(OperatorError, match="there is no bucket 'nowhere'"):
        store.publish(repository.files(), "s3://nowhere/x", tmp_path, s3_server)


@pytest.mark.parametrize("endpoint", [closed_port(), "not an address"], ids=["closed port", "no address"])
def test_unreachable_server_is_transfer_error(repository, credentials, tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    with pytest.raises(TransferError, match="check the endpoint and the credentials"):
        store.publish(repository.files(), "s3://bucket/x", tmp_path, endpoint)


def test_no_credentials_is_transfer_error(repository, s3_server, credentials, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(TransferError, match="credentials"):
        store.publish(repository.files(), "s3://bucket/x", tmp_path, s3_server)


def test_captions_are_listed_once_and_only_for_agents_that_know_them(exported: Export, tmp_path: Path):
    dev = shutil.copytree(exported.folder, tmp_path / "dev")
    (dev / "sampler.json").write_bytes((dev / "sampler.json").read_bytes() + b"\n")
    captions = ["nut", "bolt", "", "x" * 65, "crack “a”", *(f"n{number:02d}" for number in range(80))]

    def listed(**more: Any) -> list[list[str]]:
        made = assemble(
            {"full": exported.folder, "dev": dev}, line="shapes", device_class="edge", tier="test", configuration="I", precision="bfloat16",
            origin=origin(1), out=tmp_path / "out", **more,
        )  # fmt: skip
        return [
            parse(Reference, made.path("reference", variant).read_bytes(), MAX_TABLE).captions
            for variant in made.manifest.variants
        ]

    found = listed(captions=captions)
    assert found == [sorted(["nut", "bolt", "crack “a”", *(f"n{number:02d}" for number in range(61))]), []]
    assert listed(captions=captions, oldest_agent="0.2.0") == [[], []]
    assert listed() == [[], []]

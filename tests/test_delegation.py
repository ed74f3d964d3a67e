"""Lines and classes with roles of their own: what their devices fetch, how a class gets there, and every attack that this must not help."""

from __future__ import annotations

import errno
import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Targets

from ota import packed
from ota.agent import rules
from ota.agent.network import LaterError
from ota.agent.state import HighWater
from ota.agent.transport import Folder
from ota.agent.trust import LIMITS, LONGEST
from ota.errors import LeftBehindError, ManifestError, OperatorError, TrustError
from ota.release import compatibility, delegation, roles, rotation, signatures, store, trust
from ota.release import keys as keys_module
from ota.release import repository as repository_module
from ota.release.bundle import Bundle
from ota.release.delegation import Move, delegate
from ota.release.keys import KeyRing
from ota.release.repository import Release, Repository
from ota.release.roles import of_class
from ota.release.rollout import halt
from ota.report import DeviceReport
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
    name_manifest,
    name_policy,
    publish,
    sign_in_place,
    untouched,
)
from tests.test_agent_attacks import forget_cache, raise_in_snapshot

pytest_plugins = ("tests.fleet_kit",)

OWN = {kind: of_class(kind, LINE, CLASS) for kind in ("models", "deltas", "rollout")}
OTHER = "bench"  # another class of the line
PLACE = f"{LINE}/{CLASS}"


class Killed(Exception):  # noqa: N818 - stands for the end of a `ferry`
    """A simulated kill: the process ends here."""


class Factory:
    """A folder with keys and a repository, as `ferry` has it, and the place where it is published."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def keys(self) -> KeyRing:
        return KeyRing(self.root / "keys")

    @property
    def repository(self) -> Repository:
        return Repository(self.root / "repository", self.keys)

    def locked(self, part: Any) -> nullcontext[None]:  # noqa: ARG002
        return nullcontext()

    def publish(self) -> None:
        store.publish(self.repository.files(), "published", self.root)

    def delegate(self, *places: str, last: Mapping[str, DeviceReport | None] | None = None, **given: Any) -> str:
        moves = [Move(*place.split("/"), given.pop("oldest_agent", None)) for place in places]
        return delegate(self, moves, self.publish, last or {}, **given)[1]

    def sign(self, file: Path, folder: Path, *names: str) -> None:
        for name in names:
            signatures.add(file, [f"file2:{folder / name}.pem"])

    def release(self, bundle: Bundle, device_class: str = CLASS) -> Release:
        made = publish_to(self.repository, bundle, device_class)
        self.publish()
        return made


def publish_to(repository: Repository, bundle: Bundle, device_class: str) -> Release:
    """Publish a bundle for a class, and open it to every device."""
    return publish(repository, Bundle(bundle.folder, bundle.manifest.model_copy(update={"device_class": device_class})))


def move(repository: Repository, *classes: str) -> None:
    """Give classes roles of their own, as `ferry trust delegate` does."""
    waiting = rotation.prepare(repository, {}, (), [(LINE, name) for name in classes])
    rotation.put_in_force(repository, waiting.signed(signatures.usable_here(repository, {})))


def fetched(device: Device, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let a device look at a repository; return the bytes of each metadata file that it fetched, without its version."""
    found: dict[str, int] = {}
    real = Folder.read

    def counted(self: Any, name: str, *given: Any, **more: Any) -> Iterator[bytes]:
        for piece in real(self, name, *given, **more):
            if name.startswith("metadata/"):
                role = name.removeprefix("metadata/").lstrip("0123456789.").removesuffix(packed.SUFFIX).removesuffix(".json")
                found[role] = found.get(role, 0) + len(piece)
            yield piece

    monkeypatch.setattr(Folder, "read", counted)
    device.update(check_only=True)
    monkeypatch.setattr(Folder, "read", real)
    return found


@pytest.fixture
def moved(scene: Field) -> Field:
    """Provide a device that runs release 1, and whose class was then moved to its own roles and seen by it there."""
    move(scene.repository, CLASS)
    assert scene.device.update().reason == "release 1 is installed"
    return scene


@pytest.fixture
def factory(bundles: dict[str, Bundle], tmp_path: Path) -> Factory:
    """Provide a factory that published `first` for two classes."""
    made = Factory(tmp_path / "factory")
    trust.init(made, None, {})
    made.release(bundles["first"])
    made.release(bundles["first"], OTHER)
    return made


# What devices fetch


def test_device_fetches_nothing_of_another_class(moved, bundles, monkeypatch):
    move(moved.repository, OTHER)
    publish_to(moved.repository, bundles["second"], OTHER)
    assert fetched(moved.device, moved.repository, monkeypatch).keys() == {"timestamp", "snapshot", "targets"}
    publish_to(moved.repository, bundles["garbage"], OTHER)
    assert fetched(moved.device, moved.repository, monkeypatch).keys() == {"timestamp", "snapshot"}
    assert fetched(moved.device, moved.repository, monkeypatch).keys() == {"timestamp"}


def test_another_class_costs_a_few_bytes_of_the_snapshot(moved, bundles, monkeypatch):
    publish(moved.repository, bundles["second"])
    twin = Device(shutil.copytree(moved.device.root, moved.folder / "twin", symlinks=True))
    alone = fetched(twin, moved.repository, monkeypatch)
    others = [f"class-{i}" for i in range(10)]
    move(moved.repository, *others)
    for name in others:
        publish_to(moved.repository, bundles["first"], name)
    fetched(moved.device, moved.repository, monkeypatch)
    moved.repository.set_policy(everyone(moved.release))
    beside = fetched(moved.device, moved.repository, monkeypatch)
    assert beside.keys() == {"timestamp", "snapshot", OWN["rollout"]}
    assert abs(beside[OWN["rollout"]] - alone[OWN["rollout"]]) < 4  # digits of the version
    assert beside["snapshot"] - alone["snapshot"] < len(others) * 30


def test_class_keeps_its_releases_policy_floor_and_deltas_when_it_is_moved(offered):
    def facts() -> Any:
        repository = offered.repository
        return (
            repository.releases(LINE, CLASS),
            repository.deltas(LINE, CLASS),
            repository.policy(LINE, CLASS),
            repository.floor(LINE, CLASS),
        )

    offered.repository.set_floor(LINE, CLASS, 1)
    before = facts()
    move(offered.repository, CLASS)
    assert facts() == before
    assert all(not offered.repository.in_force(kind).signed.targets for kind in OWN)
    assert offered.device.update().way == "delta"
    assert offered.device.state.seq == 2


def test_releases_reverts_floors_and_deltas_go_on_after_the_move(moved, bundles, step):
    publish(moved.repository, bundles["second"], step, bundles["first"])
    assert moved.device.update().way == "delta"
    first = moved.repository.releases(LINE, CLASS)[0]
    moved.repository.set_policy(everyone(first, revert=True))
    assert moved.device.update().reason == "release 1 is installed"
    moved.repository.set_policy(everyone(moved.release))
    assert moved.device.update().reason == "release 2 is installed"
    moved.repository.set_floor(LINE, CLASS, 2)
    name_policy_of_own(moved.repository, everyone(first, revert=True))
    with untouched(moved.device, TrustError, "below the floor", marks=False):
        moved.device.update()


def name_policy_of_own(repository: Repository, policy: Any) -> None:
    """Sign any policy, past the checks of `set_policy`, as the holder of the rollout keys can."""
    target = repository._add_target(repository_module.policy_path(LINE, CLASS), policy.canonical(), {})

    def change(signed: Targets) -> None:
        signed.targets[target.path] = target

    change_role(repository, OWN["rollout"], change)


def test_device_that_was_never_there_installs_from_own_roles(scene, bundles, tmp_path):
    move(scene.repository, CLASS)
    (tmp_path / "new").mkdir()
    device = Device.init(tmp_path / "new" / "device", scene.repository)
    device.update()
    assert device.active == bundles["first"].manifest.digest
    assert set(OWN.values()) & device.home.high_water().versions.keys() >= {OWN["models"], OWN["rollout"]}
    assert "models" not in device.home.high_water().versions


# Attacks


def test_replayed_targets_of_before_the_move_refused(scene, bundles, tmp_path):
    # The thief of snapshot and timestamp names the targets of before the move, which leave the class to the shared roles.
    old = scene.repository._versions()
    shutil.copytree(scene.repository.folder, tmp_path / "old")
    move(scene.repository, CLASS)
    publish(scene.repository, bundles["second"])
    scene.device.update()
    raise_in_snapshot(scene.repository, **old)
    forget_cache(scene.device)
    with untouched(scene.device, TrustError, f"version {old['targets']} of targets, this device has seen", marks=False):
        scene.device.update()
    scene.device.configure(repository=str(tmp_path / "old"))
    for lose in (False, True):
        if lose:
            forget_cache(scene.device)
        with untouched(scene.device, TrustError, "failed verification|this device has seen", marks=False):
            scene.device.update()


@pytest.mark.parametrize("kind", ["models", "rollout"])
def test_rollback_of_own_role_refused(moved, bundles, kind):
    before = moved.repository._versions()[OWN[kind]]
    publish(moved.repository, bundles["second"])
    moved.device.update()
    raise_in_snapshot(moved.repository, **{OWN[kind]: before})
    forget_cache(moved.device)
    with untouched(moved.device, TrustError, f"version {before} of {OWN[kind]}, this device has seen", marks=False):
        moved.device.update()


@pytest.mark.parametrize("kind", ["models", "rollout"])
def test_own_role_older_than_what_the_shared_role_had_refused(scene, bundles, kind):
    # The move makes no first time of it: a version below that of the shared role is older, although the device has no mark of the new role.
    publish(scene.repository, bundles["second"])
    scene.device.update()
    seen = scene.device.home.high_water().versions[kind]
    move(scene.repository, CLASS)
    role = OWN[kind]
    low = scene.repository.metadata / f"1.{role}.json"
    shutil.copy(metadata_file(scene.repository, role), low)

    def lower(signed: Any) -> None:
        signed.version = 1

    sign_in_place(low, scene.repository.keys, kind, lower)
    raise_in_snapshot(scene.repository, **{role: 1})
    with untouched(scene.device, TrustError, f"version 1 of {role}, this device has seen {seen}", marks=False):
        scene.device.update()


def test_list_of_another_class_passes_for_no_own_list(moved, bundles):
    # Both are signed with one key, and a snapshot holds only versions: a mirror without any key serves one in the other's place.
    move(moved.repository, OTHER)
    publish_to(moved.repository, bundles["first"], OTHER)
    publish(moved.repository, bundles["second"])
    publish_to(moved.repository, bundles["second"], OTHER)
    versions = moved.repository._versions()
    theirs = metadata_file(moved.repository, of_class("models", LINE, OTHER)).read_bytes()
    metadata_file(moved.repository, OWN["models"]).write_bytes(theirs)
    packed_of(metadata_file(moved.repository, OWN["models"])).write_bytes(packed.pack(theirs))
    assert versions[OWN["models"]] != versions[of_class("models", LINE, OTHER)]
    with untouched(moved.device, TrustError, "failed verification", marks=False):
        moved.device.update()


def test_no_two_files_of_a_kind_have_one_version(moved, bundles):
    move(moved.repository, OTHER, "third")
    for name in (OTHER, CLASS, "third", "shared", OTHER):
        publish_to(moved.repository, bundles["first"], name)
        publish_to(moved.repository, bundles["second"], name)
    moved.repository.renew(["models", "deltas"])
    for kind in OWN:
        numbers = [path.name.partition(".")[0] for path in moved.repository.metadata.glob(f"*.{kind}*.json")]
        assert len(numbers) == len(set(numbers)) > 4


def test_class_named_like_a_role_stops_no_signature(scene, keys):
    before = {role: scene.repository.keys_ever_trusted(role) for role in ("root", "models")}
    for name in ("root", "targets"):
        move(scene.repository, name)
    for _ in range(3):
        scene.repository.refresh()
    reopened = Repository(scene.repository.folder, keys)
    assert {role: reopened.keys_ever_trusted(role) for role in before} == before
    assert reopened.newest_root().name == "1.root.json"


def test_own_role_names_nothing_of_another_class(moved, bundles):
    # The holder of the models key writes a release of this class into another class's list, which also a mirror could exchange.
    move(moved.repository, OTHER)
    manifest = bundles["second"].manifest
    target = moved.repository._add_target(f"models/{PLACE}/{manifest.digest}.json", manifest.canonical(), {"seq": 2})

    def change(signed: Targets) -> None:
        signed.targets[target.path] = target

    change_role(moved.repository, of_class("models", LINE, OTHER), change)
    name_policy_of_own(moved.repository, everyone(moved.release, manifest=manifest.digest, seq=2))
    with untouched(moved.device, ManifestError, "which the models role does not sign", marks=False):
        moved.device.update()


def test_shared_roles_name_nothing_of_a_moved_class(moved, bundles):
    # Old and new roles are mixed: release and policy stand in the shared lists, which still may name every class.
    manifest = bundles["second"].manifest
    name_manifest(moved.repository, manifest, seq=2)
    name_policy(moved.repository, everyone(moved.release, manifest=manifest.digest, seq=2))
    assert moved.device.update().reason == "release 1 is installed"
    name_policy_of_own(moved.repository, everyone(moved.release, manifest=manifest.digest, seq=2))
    with untouched(moved.device, ManifestError, "which the models role does not sign", marks=False):
        moved.device.update()


@pytest.mark.parametrize("name", ["rollout", "models.shapes.bench", "models.shapes.edge.x", "models..edge", "x"])
def test_role_of_another_name_is_not_asked(moved, name):
    # Even with the offline keys: python-tuf refuses `snapshot`, and another role's marks are not this one's.
    def change(signed: Targets) -> None:
        found = signed.delegations.roles
        own = found[OWN["models"]]
        evil = DelegatedRole(name, own.keyids, own.threshold, True, own.paths)
        signed.delegations.roles = {name: evil} | {role: d for role, d in found.items() if role != name}

    change_role(moved.repository, "targets", change)
    with untouched(moved.device, TrustError, f"to a role '{name}', which this agent does not know", marks=False):
        moved.device.update()


def test_thief_of_the_models_key_is_shaken_off_after_the_move(factory, bundles, tmp_path):
    # A thief's bundle runs, its number is out of reach, and its version is far ahead. Then the key is replaced and the class is moved, before the device looks again.
    device, first = device_of(factory, tmp_path), factory.repository.releases(LINE, CLASS)[0]
    factory.release(bundles["second"])
    device.update()
    device.home.save(device.state.model_copy(update={"seq": 2**40}))
    marks = device.home.high_water()
    device.home.raise_high_water(marks.model_copy(update={"versions": marks.versions | {"models": 2**40}}))

    def drop(signed: Targets) -> None:
        del signed.targets[f"models/{PLACE}/{device.active}.json"]

    change_role(factory.repository, "models", drop)
    factory.repository.set_policy(everyone(first))
    rekeyed(factory.repository, "models")
    factory.delegate(PLACE)
    device.update()
    assert device.home.high_water().versions[OWN["models"]] < 2**40
    assert (device.state.seq, device.active) == (1, bundles["first"].manifest.digest)


def rekeyed(repository: Repository, kind: str) -> None:
    """Replace the key of a kind of role, and sign everything again that it had signed."""
    signer = CryptoSigner.generate_ed25519()
    entry, path = keys_module.place(repository.keys.folder, signer, kind)
    keys_module.store(path, signer)
    waiting = rotation.prepare(repository, {kind: [entry]}).signed(signatures.usable_here(repository, {kind: [entry]}))
    rotation.put_in_force(repository, waiting)


@pytest.mark.parametrize("kind", ["models", "deltas", "rollout"])
def test_replaced_key_is_that_of_every_class(factory, bundles, tmp_path, kind):
    factory.release(bundles["first"], "shared")
    factory.delegate(PLACE, f"{LINE}/{OTHER}")
    device, repository = device_of(factory, tmp_path), factory.repository
    old = set(repository.roles()[kind].keyids)
    rekeyed(repository, kind)
    top = repository.in_force("targets").signed
    for role in repository.delegated(kind):
        assert not old & set(top.delegations.roles[role].keyids)
        assert not old & repository.in_force(role).signatures.keys()
    factory.publish()
    assert look(device) == "release 1 is open to this device"
    factory.release(bundles["second"])
    assert look(device) == "release 2 is open to this device"


def test_move_revives_no_expired_rollout(scene, keys):
    sign_in_place(metadata_file(scene.repository, "rollout"), keys, "rollout", expire)
    ended = scene.repository.in_force("rollout").signed.expires
    move(scene.repository, CLASS)
    assert scene.repository.in_force(OWN["rollout"]).signed.expires == ended


def test_renewed_rollout_of_one_class_revives_no_other(moved, bundles):
    move(moved.repository, OTHER)
    release = publish_to(moved.repository, bundles["first"], OTHER)
    sign_in_place(metadata_file(moved.repository, OWN["rollout"]), moved.repository.keys, "rollout", expire)
    moved.repository.set_policy(everyone(release))
    forget_cache(moved.device)
    assert "policy has expired" in moved.device.update().reason


def test_halt_of_a_moved_class_reaches_its_devices(moved, bundles):
    publish(moved.repository, bundles["second"])
    moved.repository.set_policy(halt(everyone(moved.release)))
    assert moved.device.update().reason == "release 2 is halted"


# Packed files


def packed_of(path: Path) -> Path:
    """Return the packed file beside a file."""
    return path.with_name(path.name + packed.SUFFIX)


def test_device_fetches_packed_files_of_its_own_roles(moved, bundles, monkeypatch):
    publish(moved.repository, bundles["second"])
    found = fetched(moved.device, moved.repository, monkeypatch)
    for role in ("snapshot", OWN["models"], OWN["rollout"]):
        assert (
            found[role]
            == packed_of(metadata_file(moved.repository, role)).stat().st_size
            < 0.8 * metadata_file(moved.repository, role).stat().st_size
        )
    assert found["timestamp"] == metadata_file(moved.repository, "timestamp").stat().st_size


def test_nothing_is_packed_before_a_class_is_moved(offered):
    assert not list(offered.repository.folder.rglob(f"*{packed.SUFFIX}"))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:-3], "longer": lambda data: data + b"x", "no longer packed": lambda _: b"<html>please log in</html>",
    "a bomb": lambda _: packed.pack(bytes(64 * 1024 * 1024)), "endless": lambda _: bytes(2 * LONGEST), "empty": lambda _: b"",
    "of another dictionary": lambda data: data[:2] + bytes(4) + data[6:],
}  # fmt: skip


@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
def test_packed_file_that_is_damaged_is_fetched_as_it_is(moved, bundles, damage):
    publish(moved.repository, bundles["second"])
    found = [path for path in moved.repository.folder.rglob(f"*{packed.SUFFIX}") if path.is_file()]
    assert len(found) > 6
    for path in found:
        path.write_bytes(DAMAGE[damage](path.read_bytes())) if damage in DAMAGE else path.unlink()
    assert look(moved.device) == "release 2 is open to this device"


@pytest.fixture
def web(moved: Field, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serve the repository of `moved` from a web server, without pauses between retries, and point the device at it."""
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)
    with WebServer(moved.repository.folder) as server:
        moved.device.configure(repository=server.address)
        yield server


PACKED_ROLES = ["snapshot", *OWN.values()]
WRONG: dict[str, Callable[[bytes, Repository], bytes]] = {
    "of another role": lambda _, repository: metadata_file(repository, "targets").read_bytes(),
    "not signed": lambda data, _: data.replace(b'"sig": "', b'"sig": "00').replace(b'"sig":"', b'"sig":"00'),
    "no metadata": lambda _, __: b"{}",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("role", PACKED_ROLES)
def test_other_content_in_a_packed_file_does_not_end_the_look(moved, bundles, step, role, wrong):
    """Take the signed file itself where a cache or a thief without keys puts something else into the packed one."""
    publish(moved.repository, bundles["second"], step, bundles["first"])
    path = metadata_file(moved.repository, role)
    other = WRONG[wrong](path.read_bytes(), moved.repository)
    assert other != path.read_bytes()
    packed_of(path).write_bytes(packed.pack(other))
    assert moved.device.update().way == "delta"


@pytest.mark.parametrize("age", ["of before", "expired"])
@pytest.mark.parametrize("role", PACKED_ROLES)
def test_stale_packed_file_keeps_no_release_away(moved, bundles, step, role, age):
    before = metadata_file(moved.repository, role)
    if age == "expired":
        sign_in_place(before, moved.repository.keys, role.partition(".")[0], expire)
    stale = packed.pack(before.read_bytes())
    publish(moved.repository, bundles["second"], step, bundles["first"])
    packed_of(metadata_file(moved.repository, role)).write_bytes(stale)
    assert moved.device.update().way == "delta"


def test_other_content_in_a_packed_policy_or_manifest_does_not_end_the_look(moved, bundles):
    publish(moved.repository, bundles["second"])
    for place in moved.repository.target_files.rglob(f"*{packed.SUFFIX}"):
        place.write_bytes(packed.pack(b"{}"))
    assert look(moved.device) == "release 2 is open to this device"


@pytest.mark.parametrize("role", PACKED_ROLES)
def test_rollback_by_both_forms_of_a_file_is_refused(moved, bundles, step, role):
    """Refuse old metadata although the packed ones are given up first: the retry starts from the same versions."""
    old = metadata_file(moved.repository, role).read_bytes()
    publish(moved.repository, bundles["second"], step, bundles["first"])
    path = metadata_file(moved.repository, role)
    path.write_bytes(old)
    packed_of(path).write_bytes(packed.pack(old))
    with untouched(moved.device, TrustError, "failed verification", marks=False):
        moved.device.update()


def test_dictionary_of_packed_files_stays_as_agents_have_it():
    """Keep the copy that fielded agents have: with another one here, each of them would fetch every file twice."""
    assert hashlib.sha256(packed.DICTIONARY).hexdigest() == "bd9730d6cc8dd14a1d0af7c4aa9678682797eb516ba2c098c9636783cfe47aca"


def test_dictionary_pays(moved):
    for role in ("snapshot", *OWN.values()):
        data = metadata_file(moved.repository, role).read_bytes()
        assert len(packed.pack(data)) < 0.85 * len(zlib.compress(data, 9))


def test_rollback_of_a_device_without_cache_is_refused_behind_a_wrong_packed_file(moved, bundles, tmp_path):
    """Refuse the whole repository of before, which begins with a packed snapshot that is given up, by the marks alone."""
    before = shutil.copytree(moved.repository.folder, tmp_path / "before")
    publish(moved.repository, bundles["second"])
    moved.device.update()
    packed_of(metadata_file(Repository(before, moved.repository.keys), "snapshot")).write_bytes(packed.pack(b"{}"))
    forget_cache(moved.device)
    moved.device.configure(repository=str(before))
    with untouched(moved.device, TrustError, "this device has seen"):
        moved.device.update()


def test_packed_file_is_given_up_once(moved, bundles, web):
    """Fetch each file at most once in each form, whatever is in the packed ones: a mirror cannot make a device go round in circles."""
    publish(moved.repository, bundles["second"])
    for role in PACKED_ROLES:
        packed_of(metadata_file(moved.repository, role)).write_bytes(packed.pack(b"{}"))
    look(moved.device)
    names = [request.name for request in web.requests]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"metadata/timestamp.json", "metadata/2.root.json"}
    assert sum(name.endswith(packed.SUFFIX) for name in names if name.startswith("metadata/")) == 1


@pytest.mark.parametrize("status", [500, 503, 404, 403, 406])
def test_packed_file_that_a_server_refuses_is_fetched_as_it_is(moved, bundles, web, status):
    publish(moved.repository, bundles["second"])
    web.faults.failing, web.faults.status = {packed.SUFFIX: 1000}, status
    assert look(moved.device) == "release 2 is open to this device"


def test_packed_file_that_ends_early_at_a_proxy_is_fetched_as_it_is(moved, bundles, web):
    publish(moved.repository, bundles["second"])
    files = [path for path in moved.repository.folder.rglob(f"*{packed.SUFFIX}") if path.is_file()]
    web.faults.short = {path.name for path in files}
    assert look(moved.device) == "release 2 is open to this device"


def test_packed_file_that_the_disk_cannot_read_is_fetched_as_it_is(moved, bundles):
    """Leave packed files that are there but give no bytes, as on a stick with bad sectors."""
    publish(moved.repository, bundles["second"])
    for path in list(moved.repository.folder.rglob(f"*{packed.SUFFIX}")):
        path.unlink()
        path.mkdir()
    assert look(moved.device) == "release 2 is open to this device"


@pytest.mark.parametrize("role", ["targets", *PACKED_ROLES])
def test_packed_file_that_unpacks_to_more_than_is_allowed_does_not_end_the_look(moved, bundles, step, role):
    """Take the signed file where a packed one opens to one byte more than that file may have, although it is short itself."""
    publish(moved.repository, bundles["second"], step, bundles["first"])
    if role == "targets":
        move(moved.repository, OTHER)
    limit = LIMITS.snapshot_max_length if role == "snapshot" else LONGEST
    path = metadata_file(moved.repository, role)
    packed_of(path).write_bytes(packed.pack(path.read_bytes().ljust(limit + 1)))
    assert moved.device.update().way == "delta"


def packed_asked(server: WebServer) -> list[str]:
    """Name the packed files that were asked for, in order."""
    return [request.name for request in server.requests if request.name.endswith(packed.SUFFIX)]


def test_packed_files_that_drip_cost_one_deadline_in_an_update(moved, bundles, web, monkeypatch):
    """Give packed files up at the first one that drips: each further one would cost minutes, and the second look would begin anew."""
    monkeypatch.setattr("ota.agent.transport.DEADLINE_FLOOR", 1.0)
    publish(moved.repository, bundles["second"])
    web.faults.dripping = {packed.SUFFIX}
    assert moved.device.update().reason == "release 2 is installed"
    assert len(packed_asked(web)) == 1


@pytest.mark.parametrize("kind", ["rollout", "models"])
def test_packed_policy_or_manifest_that_a_server_fails_to_give_is_asked_once(moved, bundles, web, kind):
    publish(moved.repository, bundles["second"])
    (path,) = (p for p in moved.repository.target_files.rglob(f"*{packed.SUFFIX}") if f"{kind}/" in str(p))
    web.faults.failing, web.faults.status = {path.name: 1000}, 500

    def renew(number: int, _: str) -> None:
        if number == 9:  # so that the second look has something to fetch
            moved.repository.renew(["models"])

    assert moved.device.update(renew).reason == "release 2 is installed"
    names = packed_asked(web)
    assert [name for name in names if name.endswith(path.name)] == names[-1:]


def test_slow_packed_files_are_given_up_together(moved, bundles, web, monkeypatch):
    """Count the time of all packed files of an update: a server may give each one whole, just before its deadline."""
    monkeypatch.setattr("ota.agent.trust.PACKED_SECONDS", 0.0)
    publish(moved.repository, bundles["second"])
    assert moved.device.update().reason == "release 2 is installed"
    assert len(packed_asked(web)) == 1


def test_packed_file_that_was_never_made_keeps_no_other_from_use(moved, bundles, web):
    """Fetch packed files after a missing one, too: what was published before the class was moved is not packed."""
    publish(moved.repository, bundles["second"])
    packed_of(metadata_file(moved.repository, "snapshot")).unlink()
    look(moved.device)
    assert {name.partition("/")[0] for name in packed_asked(web)} == {"metadata", "targets"}
    assert len(packed_asked(web)) > 4


def test_pause_that_is_asked_for_a_packed_policy_is_kept_for_the_file(moved, bundles, monkeypatch):
    publish(moved.repository, bundles["second"])
    real = Folder.read

    def read(self: Folder, name: str, *given: Any, **more: Any) -> Iterator[bytes]:
        if name.startswith("targets/") and name.endswith(packed.SUFFIX):
            raise LaterError("try again in 1 s", 1)
        return real(self, name, *given, **more)

    monkeypatch.setattr(Folder, "read", read)
    assert look(moved.device) == "release 2 is open to this device"


@given(st.binary(max_size=400), st.integers(0, 400))
def test_unpacked_is_what_was_packed_and_never_longer_than_allowed(data, limit):
    assert packed.unpack(packed.pack(data), limit) == (data if len(data) <= limit else None)
    found = packed.unpack(data, limit)
    assert found is None or len(found) <= limit


# Files that wait for signatures


def test_waiting_role_that_targets_no_longer_names_is_refused(scene, tmp_path):
    """Refuse a file that was made after a class was moved, in a repository that was restored from before."""
    before = Repository(shutil.copytree(scene.repository.folder, tmp_path / "before"), scene.repository.keys)
    move(scene.repository, CLASS)
    waiting = rotation.prepare(scene.repository, {}, ["models"]).signed(signatures.usable_here(scene.repository, {}))
    files = {path: path.read_bytes() for path in before.metadata.iterdir()}
    with pytest.raises(OperatorError, match=f"role {OWN['models']} waits for signatures, but targets does not name it"):
        rotation.put_in_force(before, waiting)
    assert {path: path.read_bytes() for path in before.metadata.iterdir()} == files


def test_waiting_file_with_a_key_that_is_none_is_refused(scene):
    entry = keys_module.place(scene.folder, CryptoSigner.generate_ed25519(), "targets")[0]
    waiting = rotation.prepare(scene.repository, {"targets": [*scene.repository.keys.keys["targets"][:2], entry]})
    rows, needs = waiting.ring["targets"], waiting.needs["targets"]
    bad_row = [rows[0].model_copy(update={"key": {"keytype": []}}), *rows[1:]]
    bad_need = needs[0].model_copy(update={"keys": {keyid: {"scheme": "ed25519"} for keyid in needs[0].keys}})
    with pytest.raises(OperatorError, match="holds no public key"):
        waiting.model_copy(update={"ring": {"targets": bad_row}}).entries()
    with pytest.raises(OperatorError, match="names keys of 'other', which is no role"):
        waiting.model_copy(update={"ring": {"other": rows}}).entries()
    with pytest.raises(OperatorError, match="holds no public key"):
        waiting.model_copy(update={"needs": waiting.needs | {"targets": [bad_need]}}).missing()


def test_repository_or_ring_that_cannot_be_locked_says_so(scene, keys, tmp_path, monkeypatch):
    """Name the lock and change nothing where the system refuses it, as on a disk that became read-only."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    ring = KeyRing(shutil.copytree(keys.folder, tmp_path / "ring"))
    before = metadata_file(scene.repository, "timestamp").read_bytes()
    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(OperatorError, match=r"cannot lock .*\.signing\.lock: Read-only file system; nothing was signed"):
        scene.repository.refresh()
    assert metadata_file(scene.repository, "timestamp").read_bytes() == before
    with pytest.raises(OperatorError, match=r"cannot lock .*\.lock: Read-only file system; no key was changed"):
        ring.begin_ledger(5)


# The marks


def test_mark_of_a_new_role_begins_as_the_shared_one():
    marks = HighWater(versions={"models": 7, "targets": 2}, keys={"models": ["a" * 64]})
    found = rules.inherited(marks, ("targets", OWN["models"], OWN["deltas"]))
    assert found.versions == {"models": 7, "targets": 2, OWN["models"]: 7}
    assert found.keys[OWN["models"]] == ["a" * 64]
    own = marks.model_copy(update={"versions": marks.versions | {OWN["models"]: 9}})
    assert rules.inherited(own, (OWN["models"],)).versions[OWN["models"]] == 9


@pytest.mark.parametrize("name", ["models", "rollout.a.b", "deltas.line-1.edge"])
def test_names_of_roles(name):
    assert roles.is_role(name)
    assert not roles.is_role(f"{name}.x")
    assert not roles.is_role(name.replace("r", "R").replace("m", "../m").replace("d", "D"))


def test_patterns_of_roles_match_their_own_targets_only():
    for kind, path in {
        "models": repository_module.manifest_path(LINE, CLASS, "a" * 64),
        "deltas": repository_module.delta_path(LINE, CLASS, "a" * 64, "b" * 64),
        "rollout": repository_module.policy_path(LINE, CLASS),
    }.items():
        for role in (kind, OWN[kind], of_class(kind, LINE, OTHER), of_class(kind, "other", CLASS)):
            assert DelegatedRole(role, [], 1, True, roles.paths(role)).is_delegated_path(path) == (role in (kind, OWN[kind]))


# The ceremony


def test_class_is_moved_and_devices_follow(factory, bundles, tmp_path):
    device = device_of(factory, tmp_path)
    said = factory.delegate(PLACE)
    assert "shapes/edge has roles of its own; a device fetches" in said
    assert look(device) == "release 1 is open to this device"
    factory.release(bundles["second"])
    assert look(device) == "release 2 is open to this device"
    assert OWN["models"] in device.home.high_water().versions
    assert "had roles of its own before" in factory.delegate(PLACE)
    assert look(device_of(factory, tmp_path, OTHER)) == "release 1 is open to this device"  # it stays in the shared roles


def device_of(factory: Factory, tmp_path: Path, device_class: str = CLASS) -> Device:
    """Set up a device of a class, and let it look at what is rolled out."""
    folder = tmp_path / f"device-{device_class}"
    folder.mkdir()
    device = Device.init(folder / "it", factory.repository, address=str(factory.root / "published"))
    device.configure(device_class=device_class)
    device.update(check_only=True)
    return device


def look(device: Device) -> str:
    """Let a device look at what is rolled out, without installing it; return what it finds."""
    return device.update(check_only=True).reason


def test_move_waits_for_offline_keys_elsewhere(factory, bundles, tmp_path):
    media, file = tmp_path / "media", tmp_path / "waiting.json"
    (factory.root / "keys/offline").rename(media)
    with pytest.raises(OperatorError, match="add --out FILE and sign where they are"):
        factory.delegate(PLACE)
    factory.delegate(PLACE, out=file)
    assert factory.repository.role_of("models", LINE, CLASS) == "models"
    factory.release(bundles["second"])  # releases go on while it waits, and the move takes them along
    factory.sign(file, media, "targets-1")
    with pytest.raises(OperatorError, match="targets version 2 has 1 of 2 signatures"):
        signatures.publish_waiting(factory, file, factory.publish, [])
    factory.sign(file, media, "targets-3")
    signatures.publish_waiting(factory, file, factory.publish, [])
    assert factory.repository.role_of("models", LINE, CLASS) == OWN["models"]
    assert [release.seq for release in factory.repository.releases(LINE, CLASS)] == [1, 2]
    assert look(device_of(factory, tmp_path)) == "release 2 is open to this device"


def test_move_waits_for_a_models_key_elsewhere(factory, bundles, tmp_path):
    pocket, file = tmp_path / "pocket", tmp_path / "waiting.json"
    pocket.mkdir()
    (factory.root / "keys/online/models.pem").rename(pocket / "models.pem")
    with pytest.raises(OperatorError, match=r"models.shapes.edge version .* has 0 of 1"):
        factory.delegate(PLACE)
    factory.delegate(PLACE, out=file)
    factory.sign(file, pocket, "models")
    signatures.publish_waiting(factory, file, factory.publish, [])
    assert [release.seq for release in factory.repository.releases(LINE, CLASS)] == [1]
    assert [release.seq for release in factory.repository.releases(LINE, OTHER)] == [1]
    assert look(device_of(factory, tmp_path)) == "release 1 is open to this device"


def test_release_while_a_moved_list_waits_loses_nothing(factory, bundles, tmp_path):
    pocket, file = tmp_path / "pocket", tmp_path / "waiting.json"
    pocket.mkdir()
    (factory.root / "keys/online/models.pem").rename(pocket / "models.pem")
    factory.delegate(PLACE, out=file)
    factory.sign(file, pocket, "models")
    shutil.copy(pocket / "models.pem", factory.root / "keys/online/models.pem")
    factory.release(bundles["second"])
    with pytest.raises(OperatorError, match="begin again"):
        signatures.publish_waiting(factory, file, factory.publish, [])
    assert [release.seq for release in factory.repository.releases(LINE, CLASS)] == [1, 2]


@pytest.mark.slow
def test_killed_move_is_repeated_and_no_device_finds_half_of_it(factory, tmp_path, monkeypatch):
    device = device_of(factory, tmp_path)
    at = 0
    while True:
        copy = Factory(shutil.copytree(factory.root, tmp_path / f"copy-{at}"))
        with monkeypatch.context() as patch:
            written = die_at_write(patch, at)
            try:
                copy.delegate(PLACE)
                killed = False
            except Killed:
                killed = True
        twin = Device(shutil.copytree(device.root, tmp_path / f"twin-{at}"))
        twin.configure(repository=str(copy.root / "published"), reports=str(tmp_path))
        assert look(twin) == "release 1 is open to this device"
        copy.delegate(PLACE)
        assert copy.repository.role_of("models", LINE, CLASS) == OWN["models"]
        assert look(twin) == "release 1 is open to this device"
        assert OWN["models"] in twin.home.high_water().versions
        shutil.rmtree(copy.root)
        if not killed:
            break
        at += 1
    assert at >= len(OWN) * 2 + 3  # each list, the shared lists, targets, snapshot, timestamp
    assert written[-1] == "published timestamp.json"


def die_at_write(patch: pytest.MonkeyPatch, last: int) -> list[str]:
    """Let the writing of metadata, and of published files, end with `Killed` after so many."""
    names: list[str] = []

    def dying(write: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if len(names) == last:
                raise Killed
            names.append(name(*arguments))
            return write(*arguments)

        return wrapped

    patch.setattr(repository_module, "write", dying(repository_module.write, lambda path, _: path.name))
    patch.setattr(store.shutil, "copyfileobj", dying(shutil.copyfileobj, lambda source, _: f"published {Path(source.name).name}"))
    return names


def report(device: str, agent: str, device_class: str = CLASS) -> DeviceReport:
    return DeviceReport(
        device=device,
        boot="b" * 32,
        number=1,
        time=1,
        line=LINE,
        device_class=device_class,
        event="installed",
        manifest="a" * 64,
        active="a" * 64,
        agent=agent,
        schema_version=2,
    )


def test_agents_that_would_forget_the_versions_stop_the_move(factory):
    last = {"old": report("old", "0.2.0"), "new": report("new", "0.3.0"), "far": report("far", "0.1.0", OTHER), "never": None}
    before = factory.repository.in_force("timestamp").to_bytes()
    with pytest.raises(LeftBehindError, match=r"1 device has an older one: old \(0.2.0\).*--leave-behind`; nothing was signed"):
        factory.delegate(PLACE, last=last)
    with pytest.raises(LeftBehindError, match=r'oldest_agent = "0.2.0"'):
        factory.delegate(PLACE, oldest_agent="0.2.0")
    assert factory.repository.in_force("timestamp").to_bytes() == before
    assert "old (0.2.0) does not remember their versions" in factory.delegate(PLACE, last=last, leave_behind=True)
    factory.delegate(f"{LINE}/{OTHER}", last={"far": report("far", "0.3.0", OTHER)}, oldest_agent="0.3.0")


def test_status_of_many_classes_is_short(factory, bundles):
    places = [f"{LINE}/class-{i}" for i in range(20)]
    before = trust.status(factory, False)[1]
    assert "2 classes share models, deltas and rollout" in before
    assert "gives a class its own: shapes/bench, shapes/edge" in before
    factory.delegate(PLACE, *places)
    value, text = trust.status(factory, False)
    assert text.count("\n") == before.count("\n")
    assert "classes share" not in text
    assert "21 with roles of their own, under the same keys: shapes/class-0, shapes/class-1" in text
    assert [row["role"] for row in value["roles"]] == list(keys_module.ROLES)


def test_alarm_names_the_class_whose_rollout_ends(factory):
    factory.delegate(PLACE, f"{LINE}/{OTHER}")
    path = metadata_file(factory.repository, of_class("rollout", LINE, OTHER))
    sign_in_place(path, factory.keys, "rollout", expire)
    (alarm,) = trust.status(factory, False)[0]["alarms"]
    assert "rollout of shapes/bench ended" in alarm
    assert "`ferry rollout renew shapes/bench`" in alarm


def test_more_classes_than_a_snapshot_holds_are_refused(factory, monkeypatch):
    monkeypatch.setattr(delegation, "MOST_CLASSES", 1)
    with pytest.raises(OperatorError, match="more than 1 classes"):
        factory.delegate(PLACE, f"{LINE}/{OTHER}")


def test_longest_names_fit_into_what_devices_read(factory):
    from ota.agent.trust import LIMITS

    longest = "a" * 35
    moves = [f"{longest}-{i:04}/{longest}-{i:04}" for i in range(delegation.MOST_CLASSES)]
    repository = factory.repository
    waiting = rotation.prepare(repository, {}, (), [tuple(m.split("/")) for m in moves])
    rotation.put_in_force(repository, waiting.signed(signatures.usable_here(repository, {})))
    assert metadata_file(repository, "snapshot").stat().st_size * 1.05 < LIMITS.snapshot_max_length
    assert metadata_file(repository, "targets").stat().st_size < LIMITS.targets_max_length


def test_names_in_the_agents_and_the_factorys_code_agree():
    assert compatibility.OWN_ROLES_SINCE == "0.3.0"
    assert rules.kind(OWN["models"]) == roles.kind(OWN["models"]) == "models"
    assert roles.owner(OWN["models"]) == PLACE
    assert roles.owner("models") == ""

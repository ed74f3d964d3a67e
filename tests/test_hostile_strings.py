"""Hostile values in every string that a stranger could send: none reaches a path, URL, header, log or shell.

Whoever has the factory's online keys can sign any of these. A device may refuse an update because of one, but must continue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import quote

import pytest
from annotated_types import Predicate
from backports import zstd
from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, TargetFile, Targets

from ota.agent import poll, transport, trust, updater
from ota.agent.state import Config, opened
from ota.delta.format import _USUAL, MAGIC, PREFIX, _numbered, read_header
from ota.delta.header import BundleFile, DeltaFile, Header, PlainFile
from ota.errors import DeltaError, FaultError, GateError, InvalidError, ManifestError, OtaError, StateError, TrustError, printable
from ota.manifest import Document, Manifest, Origin, Reference, SamplerTable, parse
from ota.policy import Policy, Policy2
from ota.release import rotation
from ota.release.bundle import Bundle
from ota.release.keys import ROLES, KeyRing, create
from ota.release.repository import Repository
from ota.report import Answer, DeviceReport, Enrolment, SealedReport, SignedReport
from tests.conftest import few
from tests.fleet_kit import (
    CLASS,
    LINE,
    Device,
    Field,
    WebServer,
    change_role,
    everyone,
    metadata_file,
    name_manifest,
    name_policy,
    publish,
    sign_in_place,
)

pytestmark = pytest.mark.slow  # takes minutes; `make test-slow` and `make attacks` run it

pytest_plugins = ("tests.fleet_kit",)

HOSTILE = [
    "../config.json", "../device.key", "../../victim", "/etc/passwd", "..", ".", "/", "a/b", "a\\b", "a\0b", "a\nb", "a\r\nX-Evil: 1",
    "\x1b[2J", "\x9b2J", "\u202egpj", "\ud800", "x" * 300, "é" * 200, "x" * 100_000, " ", "~root", "-rf", "$(id)", "`id`", "a;id", "%2e%2e%2f",
    "http://evil.example/x", "file:///etc/passwd", "CON", "٣" * 64, "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "../" + "0" * 61,
]  # fmt: skip
SIGNED = ["../config.json", "../device.key", "/etc/passwd", "", "a\0b", "a\nb", "\x1b[2J", "x" * 300, "٣" * 64, "0" * 64 + "\n"]
"""Values that are signed and go through a whole update; the others are tested against the types alone.

Canonical JSON cannot hold half a character (a lone surrogate).
"""


def named(value: str) -> str:
    return ascii(value[:16])[1:-1]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between retries."""
    monkeypatch.setattr(transport, "BACKOFF", 0)


def everything(folder: Path) -> dict[str, bytes]:
    """Read all files where an attack would write: those around a device, except what a look at the metadata may change, and its history."""
    passing = ("device/metadata", "device/highwater.json", "device/history.json", "device/lock", "repository")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if not name.startswith(passing)}


def goes_on(field: Field) -> None:
    """Check that the device still says what runs, and draws."""
    assert field.device.sound
    assert "sound" in field.device.command("status")
    field.device.command("generate", "--output", str(field.folder / "drawn.png"))
    (field.folder / "drawn.png").unlink()


def refused(field: Field, update: Any = None) -> OtaError:
    """Check that an update fails with an error of ours in one printable line, and changes nothing but the marks."""
    (field.folder / "victim").write_bytes(b"precious")
    before = everything(field.folder)
    with pytest.raises(OtaError) as caught:
        (update or field.device.update)()
    assert not isinstance(caught.value, FaultError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2100
    assert everything(field.folder) == before
    return caught.value


# Metadata


def rename_hash(repository: Repository, role: str, value: str) -> None:
    """Give the file of each of a role's targets any hash, as the holder of the role's key can."""

    def change(signed: Targets) -> None:
        for name, target in list(signed.targets.items()):
            signed.targets[name] = TargetFile(target.length, {"sha256": value}, name, target.unrecognized_fields)

    change_role(repository, role, change)


@pytest.mark.parametrize("value", few(SIGNED, 2), ids=named)
def test_hash_of_a_delta_is_no_path(offered, bundles, value):
    # The critical one: the thief of the `deltas` key names a path in place of a hash, once a way to delete or overwrite files.
    rename_hash(offered.repository, "deltas", value)
    (offered.folder / "victim").write_bytes(b"precious")
    kept = {name: data for name, data in everything(offered.folder).items() if "state" not in name and "queue" not in name}
    assert offered.device.update_until(10)[-1] == "refresh again"
    now = everything(offered.folder)
    assert {name: now[name] for name in kept} == kept
    assert {name.split("/")[2] for name in now if name.startswith("device/slots/")} == {
        offered.device.active,
        bundles["second"].manifest.digest,
    }
    assert offered.device.leftovers() == []


def test_delta_with_a_path_for_a_hash_costs_a_full_bundle_and_no_more(offered, bundles):
    rename_hash(offered.repository, "deltas", "../config.json")
    assert offered.device.update().way == "full"
    assert offered.device.active == bundles["second"].manifest.digest
    goes_on(offered)


@pytest.mark.parametrize("role", ["models", "rollout"])
@pytest.mark.parametrize("value", SIGNED, ids=named)
def test_hash_of_a_document_is_no_path(offered, role, value):
    rename_hash(offered.repository, role, value)
    assert isinstance(refused(offered), InvalidError)


@pytest.mark.parametrize("role", ["models", "rollout"])
def test_refused_hash_leaves_a_device_that_goes_on(offered, role):
    rename_hash(offered.repository, role, "../config.json")
    refused(offered)
    goes_on(offered)


@pytest.mark.parametrize("field", ["seq", "floor", "revertible"])
@pytest.mark.parametrize("value", ["../x", "1", "", [], {}, 1.5, None, -1, 2**60, "\x1b[2J", "0" * 64])
def test_signed_number_is_a_number(offered, field, value):
    if field == "seq" and value is None:
        pytest.skip("a release without a number is refused by another rule, see test_models_without_number_refused")

    def change(signed: Targets) -> None:
        for target in signed.targets.values():
            custom = target.unrecognized_fields["custom"]
            custom[field] = int(value * 2) if isinstance(value, float) else value  # canonical JSON has no floats

    change_role(offered.repository, "models", change)
    if (field, value) in (("seq", 1.5), ("floor", 1.5)):  # 3, which is a number: of no release, or a floor above this one
        assert isinstance(refused(offered), ManifestError if field == "seq" else TrustError)
        return
    assert isinstance(refused(offered), InvalidError)


@pytest.mark.parametrize("name", few(["root", "timestamp", "snapshot", "targets", "models", "rollout", *SIGNED], 2), ids=named)
def test_role_named_by_a_thief_is_not_kept(offered, bundles, name):
    # The thief of the `deltas` key delegates to a role of any name. python-tuf caches a role's file under the role's name, and a
    # file under "root" or "models" there becomes a mark.
    honest = metadata_file(offered.repository, "deltas").read_bytes()
    thief = CryptoSigner.generate_ed25519()

    def delegate(signed: Targets) -> None:
        signed.targets.clear()
        role = DelegatedRole("other", [thief.public_key.keyid], 1, True, ["deltas/*/*/*"])
        signed.delegations = Delegations({thief.public_key.keyid: thief.public_key}, {"other": role})
        role.name = name  # python-tuf would not write all of these itself
        signed.delegations.roles = {name: role}

    change_role(offered.repository, "deltas", delegate)
    made = Metadata(Targets(version=1_000_000))
    made.sign(thief)
    place = offered.repository.metadata / f"1000000.{quote(name, '')}.json"
    served = len(place.name) < 250
    if served:
        place.write_bytes(made.to_bytes())
    if name not in ("models", "rollout", "targets"):
        sign_in_place(
            metadata_file(offered.repository, "snapshot"), offered.repository.keys, "snapshot",
            lambda signed: signed.meta.update({f"{name}.json": MetaFile(1_000_000)}),
        )  # fmt: skip
    before = everything(offered.folder)
    if name in ("", "root", "timestamp", "snapshot", "targets"):
        with pytest.raises(TrustError):
            offered.device.update()
    else:
        offered.device.update_until(10)
    assert everything(offered.folder).items() >= before.items()
    assert max(offered.device.home.high_water().versions.values()) < 1_000_000

    if served:
        place.unlink()
    path = metadata_file(offered.repository, "deltas")
    path.write_bytes(honest)  # so that it can be read, and changed back by the factory's own tool

    def restore(signed: Targets) -> None:
        signed.version += 1

    change_role(offered.repository, "deltas", restore)
    offered.device.update()
    assert offered.device.active == bundles["second"].manifest.digest


@pytest.mark.parametrize("value", few(SIGNED, 2), ids=named)
def test_name_in_the_snapshot_is_no_path(offered, bundles, value):
    def change(signed: Any) -> None:
        signed.meta[f"{value}.json"] = MetaFile(7, 10**12, {"sha256": value})
        signed.unrecognized_fields[value] = value

    change_role(offered.repository, "rollout", lambda _: None)
    sign_in_place(metadata_file(offered.repository, "snapshot"), offered.repository.keys, "snapshot", change)
    offered.device.update()
    assert offered.device.active == bundles["second"].manifest.digest


def test_key_id_that_is_none_is_not_remembered(offered):
    # The offline keys signed this, so it is a faulty tool rather than a thief. Without a limit, the marks would grow too large.
    def change(signed: Targets) -> None:
        assert signed.delegations
        role = signed.delegations.roles["rollout"]
        for i in range(3000):
            wrong = f"../{i:0100d}"
            signed.delegations.keys[wrong] = type(key := signed.delegations.keys[role.keyids[0]])(
                wrong, key.keytype, key.scheme, key.keyval
            )
            role.keyids.append(wrong)

    change_role(offered.repository, "targets", change)
    assert isinstance(refused(offered), TrustError)
    assert set(offered.device.home.high_water().keys) <= {"timestamp", "snapshot", "targets", "models", "deltas", "rollout"}
    assert all(re.fullmatch("[0-9a-f]{64}", k) for keys in offered.device.home.high_water().keys.values() for k in keys)


def test_length_signed_by_a_thief_fills_no_memory(offered):
    # A length in the snapshot would replace our own limit.
    def change(signed: Any) -> None:
        signed.meta["models.json"].length = 10**12

    change_role(offered.repository, "models", lambda _: None)
    sign_in_place(metadata_file(offered.repository, "snapshot"), offered.repository.keys, "snapshot", change)
    with WebServer(offered.repository.folder) as server:
        offered.device.configure(repository=server.address)
        server.faults.endless = {".models.json"}
        refused(offered)
        assert server.bytes_sent(".models.json") < WebServer.ENDLESS / 2


# Documents: no string without a type

DOCUMENTS: list[type[BaseModel]] = [
    trust.Target, trust.Custom, Manifest, Policy, Policy2, SamplerTable, Reference, SignedReport, SealedReport, Enrolment, Answer, Config,
]  # fmt: skip
HEADER = {
    "base": "1" * 64, "target": "1" * 64,
    "files": [
        {"target": {"role": "weights", "variant": "full", "size": 1, "sha256": "1" * 64}, "base": "1" * 64, "base_size": 1},
        {"target": {"size": 1, "sha256": "1" * 64}, "base": None, "base_size": 0},
    ],
}  # fmt: skip
"""A delta's header with every string that one can hold. It is no pydantic document, and checks its fields itself."""
STRINGS_OF_HEADER = {
    f"{kind.__name__}.{field.name}"
    for kind in (Header, DeltaFile, BundleFile, PlainFile)
    for field in dataclasses.fields(kind)
    if field.name not in ("files", "size", "base_size") and (kind, field.name) != (DeltaFile, "target")
}
OWN = {("Target", "name")}  # strings that the agent makes itself


def strings_of(kind: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[tuple[type[BaseModel], str, bool]]:
    """Yield every field of a document, and of those in it, that holds strings, and whether it takes any string."""
    if kind in seen:
        return
    seen.add(kind)
    for name, field in kind.model_fields.items():
        yield from leaves(kind, name, field.annotation, list(field.metadata), seen)


def leaves(
    kind: type[BaseModel], name: str, annotation: Any, limits: list[Any], seen: set[type[BaseModel]]
) -> Iterator[tuple[type[BaseModel], str, bool]]:
    if hasattr(annotation, "__metadata__"):
        limits = [*limits, *annotation.__metadata__]
        annotation = annotation.__origin__
    if annotation is str:
        kinds = (AfterValidator, Predicate)
        typed = any(isinstance(m, kinds) or (isinstance(m, StringConstraints) and m.pattern) for m in limits)
        typed = typed or any(getattr(m, "pattern", None) for m in limits)
        yield kind, name, not typed
    elif get_origin(annotation) in (Union, UnionType, list, dict, tuple):
        for part in get_args(annotation):
            yield from leaves(kind, name, part, limits, seen)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from strings_of(annotation, seen)
    elif get_origin(annotation) is Literal and any(isinstance(value, str) for value in get_args(annotation)):
        yield kind, name, False


def all_strings() -> dict[str, bool]:
    seen: set[type[BaseModel]] = set()
    found = [row for kind in DOCUMENTS for row in strings_of(kind, seen)]
    own = {f"{kind.__name__}.{name}": free for kind, name, free in found if (kind.__name__, name) not in OWN}
    return own | dict.fromkeys(STRINGS_OF_HEADER, False)


def test_no_string_comes_without_a_type():
    found = all_strings()
    assert len(found) > 30
    assert [name for name, free in found.items() if free] == []


def test_every_string_is_listed_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "threats.md").read_text()
    section = text.partition("## Strings that come from outside")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([A-Z]\w+\.\w+)`", section))
    assert all_strings().keys() - listed == set()
    assert {name for name in listed - all_strings().keys() if not name.startswith(("TUF.", "URL."))} == set()


EXAMPLES: dict[type[Document], dict[str, Any]] = {
    Manifest: {
        "line": "a", "device_class": "b", "tier": "nano", "configuration": "I", "precision": "int8", "variants": ["full"], "default_variant": "full",
        "files": [{"role": role, "variant": None if role == "graph" else "full", "size": 1, "sha256": "1" * 64}
                  for role in ("graph", "weights", "sampler", "golden", "reference")],
        "origin": {"data_rev": "1" * 40, "data_md5": "1" * 32 + ".dir", "code": "1" * 64, "lineage": "1" * 64, "scorecard": "1" * 64,
                   "decision": "1" * 64, "model": "a-I-full", "version": 1},
        "minimum_agent": "0.1.0", "schema_version": 1,
    },
    Policy: {"line": "a", "device_class": "b", "seq": 1, "manifest": "1" * 64, "salt": "1-1", "waves": []},
    Policy2: {
        "schema_version": 2, "line": "a", "device_class": "b", "seq": 2, "manifest": "1" * 64, "salt": "1-1", "policy": 1, "limit": 9,
        "first": ["dev-1", "site=berlin"], "only": ["site=a"], "never": ["dev-2"], "fallback": {"seq": 1, "manifest": "2" * 64}, "requires": ["x"],
    },
    SamplerTable: {
        "schema_version": 1, "variant": "full", "method": "ab2", "times": [1.0, 0.0], "guidance": 1.0, "image": {"channels": 1, "size": 8},
        "text_length": 8, "runtime": {"onnxruntime": [">=1.20", "<2"], "graph_optimization_level": "all",
                                      "config": {"session.qdq_matmulnbits_accuracy_level": "1"}},
    },
    Reference: {"schema_version": 3, "captions": ["gasket, torn"], "golden": {"tolerance": 0.1, "share": 0.9}, "load": [[1.0]], "statistics": {"mean": {"low": 0.0, "high": 1.0}},
                "latency_ms": 1.0},
    SignedReport: {
        "report": {"device": "d", "boot": "b-1", "number": 1, "time": 1, "line": "a", "device_class": "b", "event": "installed",
                   "manifest": "1" * 64, "active": None, "reason": "why"},
        "signature": "1" * 128,
    },
    SealedReport: {"signed": '{"a":1}', "signature": "1" * 128},
    DeviceReport: {
        "schema_version": 3, "device": "d", "boot": "b-1", "number": 1, "time": 1, "line": "a", "device_class": "b", "event": "alive", "manifest": None,
        "active": "1" * 64, "agent": "0.3.0",
        "health": {"since": 1, "share": "all", "tags": ["site=berlin"], "variant": "full", "joules_source": "INA219", "totals": {"refused": 1},
                   "outcomes": [{"event": "installed", "manifest": "1" * 64, "time": 1}], "statistics": {"mean": [1] * 8}},
    },
    Enrolment: {"device": "d", "line": "a", "device_class": "b", "public_key": "1" * 64, "token": "t" * 16, "signature": "1" * 128},
    Config: {"device": "d", "line": "a", "device_class": "b", "repository": "https://updates.example/f", "root_sha256": "1" * 64,
             "reports": "/mnt/inbox", "tags": ["site=berlin"], "window": "22:00-05:00", "prefer": "default", "safe": "full"},
}  # fmt: skip
PLACES = {("repository",), ("reports",)}  # folders and addresses from the device's owner: all but control characters
TEXTS = {("report", "reason")}  # for people: made printable


def spots(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where strings are in a document, including names of fields that are free."""
    if isinstance(value, str):
        yield at
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from spots(part, (*at, key))
            yield (*at, key, None)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from spots(part, (*at, i))


def placed(value: Any, at: tuple[Any, ...], hostile: str) -> Any:
    """Return a document with a hostile string in one spot; a spot that ends with None is the name of a field."""
    if not at:
        return hostile
    if isinstance(value, dict) and at[1:] == (None,):
        return {hostile if key == at[0] else key: part for key, part in value.items()}
    made = dict(value) if isinstance(value, dict) else list(value)
    made[at[0]] = placed(value[at[0]], at[1:], hostile)
    return made


SPOTS = [(kind, at) for kind, value in EXAMPLES.items() for at in spots(value)]


@pytest.mark.parametrize(("kind", "at"), SPOTS, ids=lambda v: v.__name__ if isinstance(v, type) else ".".join(map(str, v)))
def test_hostile_string_in_a_document_is_refused(kind, at):
    good = EXAMPLES[kind]
    assert parse(kind, json.dumps(good).encode(), 1 << 20)
    for hostile in HOSTILE:
        data = json.dumps(placed(good, at, hostile)).encode()
        refusal, made = "", None
        try:
            made = parse(kind, data, 1 << 20)
        except ManifestError as error:
            refusal = str(error)
        if made is None:
            assert refusal.isprintable()
            assert len(refusal) < 2100
        elif kind is Policy2 and at[1:] == (None,):  # a field that this agent does not know is ignored; what it says is not kept
            assert hostile not in json.loads(made.canonical())
        elif at[:1] == ("captions",):  # compared with what is asked for, and shown nowhere
            assert hostile.isprintable(), hostile
        elif at in TEXTS:
            assert made.report.reason.isprintable()
        elif at in PLACES:
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", hostile), hostile
        elif at[-1:] == ("joules_source",):
            assert re.fullmatch(r"[ -~]*", hostile), hostile
        elif at in (("salt",), ("token",)) or at[-1:] in (("data_rev",), ("data_md5",), ("model",), ("boot",)):
            assert re.fullmatch(r"[A-Za-z0-9._-]*", hostile), hostile  # letters of no path, URL or shell
        elif at[-1:] in (("line",), ("device_class",), ("device",), ("tier",)):
            assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", hostile), hostile
        else:
            pytest.fail(f"{kind.__name__} takes {hostile!r} in {at}")


@pytest.mark.parametrize("version", [1, 2])
def test_hostile_string_in_the_header_of_a_delta_is_refused(version):
    def read(value: Any) -> Header:
        data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        if version == 2:
            hashes, data = _numbered(data)
            packed = zstd.compress(data, zstd_dict=zstd.ZstdDict(_USUAL, is_raw=True).as_prefix)
            data = bytes([len(hashes)]) + b"".join(bytes.fromhex(digest.decode()) for digest in hashes) + packed
        return read_header(io.BytesIO(PREFIX.pack(MAGIC, version, len(data)) + data))

    assert json.loads(read(HEADER).canonical()) == HEADER
    for at in spots(HEADER):
        for hostile in HOSTILE:
            with pytest.raises(DeltaError) as caught:
                read(placed(HEADER, at, hostile))
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 2100


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("at", ["low", "high", "tolerance", "latency_ms"])
def test_reference_holds_numbers_only(value, at):
    # A device that runs a bundle whose range is NaN would refuse every later one.
    data = json.dumps(EXAMPLES[Reference])
    hostile = re.sub(rf'"{at}": [0-9.]+', f'"{at}": {value}', data)
    assert hostile != data
    with pytest.raises(ManifestError):
        parse(Reference, hostile.encode(), 1 << 20)


def test_configuration_damaged_by_a_stranger_is_named(scene):
    for field in ("device", "line", "device_class", "root_sha256", "window", "repository", "reports"):
        value = scene.device.home.config().model_dump(mode="json") | {field: "../\n\0x"}
        path = scene.device.root / "config.json"
        good = path.read_bytes()
        path.write_bytes(json.dumps(value).encode())
        with pytest.raises(StateError, match="is damaged; run `ferry-agent init` again"):
            scene.device.home.config()
        path.write_bytes(good)
    goes_on(scene)


@pytest.mark.parametrize("option", ["--device", "--line", "--class", "--repository", "--reports", "--window", "--safe"])
@pytest.mark.parametrize("value", ["a\nb", "a\x1b[2J", "a\x9bb", "\ud800"], ids=named)
def test_init_takes_no_control_characters(scene, tmp_path, option, value):
    given = {
        "--device": "d",
        "--line": "a",
        "--class": "b",
        "--repository": "/r",
        "--reports": "/r",
        "--window": "",
        "--safe": "full",
    }
    words = [word for pair in (given | {option: value}).items() for word in pair]
    sha256 = scene.device.home.config().root_sha256
    output = Device(tmp_path / "new").command(
        "init", *words, "--root", str(scene.device.root / "root.json"), "--root-sha256", sha256, code=3
    )
    assert output.startswith(f"ferry-agent: {option} is not valid; ")
    assert output.rstrip("\n").isprintable()
    assert not (tmp_path / "new").exists()


# Whatever is signed, an update raises only our own errors, and nothing ends `run`


def sign_raw(repository: Repository, role: str, path: str, data: bytes, **custom: Any) -> None:
    """Sign any bytes under one of a role's names, as the holder of the role's key can."""
    target = repository._add_target(path, data, custom)

    def change(signed: Targets) -> None:
        signed.targets[path] = target

    change_role(repository, role, change)


@pytest.mark.parametrize("value", [*SIGNED, "\ud800", "x" * 100_000], ids=named)
def test_signed_manifest_with_a_hostile_string_is_refused(offered, bundles, value):
    release, good = offered.release, bundles["second"].manifest.model_dump(mode="json")
    good["files"][0]["sha256"] = value
    data = json.dumps(good, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    sign_raw(offered.repository, "models", f"models/{LINE}/{CLASS}/{digest}.json", data, seq=3)
    name_policy(offered.repository, everyone(release, manifest=digest, seq=3))
    assert re.search("files.0.sha256|it is not JSON|more than 65536", str(refused(offered)))


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"a":' * 5000, b'{"seq":' + b"9" * 5000 + b"}", b'{"seq":1e999}', b'"\\ud800"'],
    ids=range(9),
)
@pytest.mark.parametrize("role", few(["models", "rollout"], 1))
def test_signed_nonsense_is_refused(offered, role, data):
    path = f"rollout/{LINE}/{CLASS}.json" if role == "rollout" else f"models/{LINE}/{CLASS}/{offered.release.manifest}.json"
    sign_raw(offered.repository, role, path, data, seq=2)
    refused(offered)
    goes_on(offered)


@pytest.mark.parametrize("version", [2**53 + 1, 10**30, 10**4000])
def test_version_beyond_all_numbers_is_no_mark(offered, version):
    def change(signed: Any) -> None:
        signed.version = version

    sign_in_place(metadata_file(offered.repository, "timestamp"), offered.repository.keys, "timestamp", change)
    assert isinstance(refused(offered), TrustError)
    assert offered.device.home.high_water().versions["timestamp"] < version


def test_error_that_nobody_foresaw_does_not_end_run(offered, monkeypatch):
    told: list[Any] = []
    stopped = threading.Event()

    def tell(how: Any) -> None:
        told.append(how)
        if len(told) == 3:
            stopped.set()

    faults = iter([KeyError("seq"), RecursionError("too deep"), OSError(5, "Input/output error")])

    def fail(*_: Any) -> Any:
        raise next(faults)

    monkeypatch.setattr(updater, "decide", fail)
    monkeypatch.setattr(poll, "pause", lambda *_: 0)
    poll.run(offered.device.home, 3600, stopped, tell, at_once=True)
    assert [type(how) for how in told] == [FaultError, FaultError, StateError]
    goes_on(offered)


# False claims in a thief's bundle


def test_floor_takes_away_what_a_thiefs_bundle_claims(keys, bundles: dict[str, Bundle], tmp_path):
    # With the models key, a thief makes devices run garbage, next to which every good bundle looks wrong. After the rotation,
    # the factory raises the floor above that release, and its claims no longer count.
    repository = Repository.create(tmp_path / "repository", keys)
    publish(repository, bundles["garbage"])
    devices = [
        Device.init(tmp_path / name / "device", repository, name=name) for name in ("one", "two") if not (tmp_path / name).mkdir()
    ]
    for device in devices:
        device.update()
    publish(repository, bundles["second"])
    with pytest.raises(OtaError, match="the running model's range is"):
        devices[0].update()
    repository.set_floor(LINE, CLASS, 2)
    devices[1].update()
    assert devices[1].active == bundles["second"].manifest.digest


@pytest.mark.parametrize("number", few([2, 2**53], 1))
def test_rotation_takes_away_what_a_thiefs_bundle_brought_about(bundles: dict[str, Bundle], tmp_path, number):
    # The thief's release number is beyond all that the factory will ever reach, so no floor could help. The device saw the
    # thief's copy of the repository; the factory's own continues from before the theft, with new keys.
    factory = Repository.create(tmp_path / "factory" / "repository", create(tmp_path / "keys"))
    first = publish(factory, bundles["first"])
    shutil.copytree(factory.folder, tmp_path / "thief")
    thief = Repository(tmp_path / "thief", factory.keys)

    def roll_out(name: str, seq: int) -> None:
        for entry in bundles[name].manifest.files:
            thief._add_object(bundles[name].folder / entry.sha256, entry.sha256)
        name_manifest(thief, bundles[name].manifest, seq)
        name_policy(thief, everyone(first, manifest=bundles[name].manifest.digest, seq=seq))

    roll_out("garbage", number)
    device = Device.init(tmp_path / "device", thief)
    device.update()
    roll_out("second", min(number + 1, 2**53))
    with pytest.raises(GateError, match="the running model's range is"):
        device.update()
    assert (device.active, device.state.seq) == (bundles["garbage"].manifest.digest, number)
    assert bundles["second"].manifest.digest in device.state.refused

    rotate_models(factory)
    publish(factory, bundles["second"])
    device.configure(repository=str(factory.folder))
    assert device.update().changed
    assert device.active == bundles["second"].manifest.digest
    assert device.state.refused == {}
    assert "runs release 2 of" in device.command("status")


def rotate_models(repository: Repository) -> None:
    """Rotate the online keys as `ferry trust rotate` does, signed by the offline keys."""
    repository.keys = KeyRing(shutil.copytree(repository.keys.folder, repository.folder.parent / "keys"))  # others use it too
    ring = create(repository.folder.parent / "fresh-keys")
    fresh = {role: list(ring.keys[role]) for role in ("models", "deltas", "rollout", "snapshot", "timestamp")}
    signers = [s for role in ROLES for s in (*repository.keys.usable(role), *ring.usable(role))]
    placed = {
        role: [(key, f"file2:{ring.folder / uri.removeprefix('file2:')}") for key, uri in entries]
        for role, entries in fresh.items()
    }
    waiting = rotation.prepare(repository, placed, []).signed(signers)
    rotation.resign_below_root(repository, waiting)
    rotation.put_in_force(repository, waiting)


def test_rotation_keeps_what_the_new_keys_name(offered, bundles):
    # Keys are also rotated without a theft: the running bundle is signed anew, and nothing that is known of it is lost.
    offered.device.update()
    state = offered.device.state.model_copy(update={"refused": {"7" * 64: "full: it was bad"}})
    offered.device.home.save(state)
    rotate_models(offered.repository)
    assert offered.device.update().reason == "release 2 is installed"
    assert offered.device.state == state


def test_state_that_was_filled_by_refusals_can_still_be_read(scene):
    # A thief signs many bundles whose refusals quote as much as possible: a graph's names, in letters of twelve bytes each.
    state = scene.device.state
    for i in range(100):
        state = state.model_copy(update={"refused": state.refusing(f"{i:064x}", "\U0001f600" * 10_000)})
        scene.device.home.save(state)
        assert scene.device.state == state
    assert len(state.refused) == 64
    assert opened((scene.device.root / "state.json").read_bytes()) == state
    goes_on(scene)


# Text for people


@pytest.mark.parametrize("value", HOSTILE, ids=named)
def test_printable_text_is_one_harmless_line(value):
    shown = printable(value, 200)
    assert shown.isprintable()
    assert len(shown) < 1300
    assert "\\x1b" in shown or "\x1b" not in value
    assert str(OtaError(value)).isprintable()
    if value.isprintable() and len(value) <= 200:
        assert shown == value


def test_origin_keeps_what_factories_write():
    Origin(
        data_rev="0" * 40, data_md5="0" * 32 + ".dir", code="1" * 64, lineage="2" * 64, scorecard="3" * 64, decision="4" * 64,
        model="surfaces-I-full", version=3,
    )  # fmt: skip
    with pytest.raises(ValidationError):
        Origin(
            data_rev="0" * 40, data_md5="0" * 32, code="1" * 64, lineage="2" * 64, scorecard="3" * 64, decision="4" * 64,
            model="../surfaces", version=3,
        )  # fmt: skip

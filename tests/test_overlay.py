"""Bundles in which variants share weights: what they hold, how devices get and draw them, and how faulty ones are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.export import Export, describe
from model.session import Session
from model.students import is_thin
from ota import overlay
from ota.agent import child, drawing, sampler
from ota.delta import files, read_header
from ota.errors import AgentError, BaseError, GateError, ManifestError, OperatorError, RoomError, StateError, TransferError
from ota.manifest import MAX_MANIFEST, Manifest, parse
from ota.release import fielded
from ota.release.bundle import Bundle, assemble, bytes_besides_weights, make_delta, make_overlay_delta, student_bytes
from registry.catalog import Subject
from tests.conftest import CAPTIONS, LATENCY_MS, SAMPLER, origin
from tests.fleet_kit import CLASS, LINE, WebServer, name_delta, publish, untouched
from tests.test_agent_attacks import not_installed, offer
from tests.test_agent_update import digest, files_of, slot_files, stand_still

pytest_plugins = ("tests.fleet_kit",)

GIVEN: dict[str, Any] = {"line": LINE, "device_class": CLASS, "tier": "test", "configuration": "I", "precision": "bfloat16"}


def moved(weights: bytes, tensors: list[files.Tensor], seed: int, amount: float) -> bytes:
    """Move the numbers of tensors, stored in bfloat16, by small random steps."""
    made, rng = bytearray(weights), np.random.default_rng(seed)
    for tensor in tensors:
        there = slice(tensor.offset, tensor.offset + tensor.length)
        values = (np.frombuffer(bytes(made[there]), np.uint16).astype(np.uint32) << 16).view(np.float32)
        by = np.rint(rng.normal(size=values.shape)) * amount * np.abs(values).mean()
        made[there] = ((values + by.astype(np.float32)).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return bytes(made)


def taught(source: Path, out: Path, variant: Any, seed: int, amount: float = 0.01, only: Callable[[str], bool] = is_thin) -> Path:
    """Export a student of an exported `full`: it differs in some tensors, and its other files are measured with its own weights."""
    shutil.copytree(source, out)
    graph = out / "graph.onnx"
    tensors = [t for t in files.tensors(source / "weights.bin", graph) if only(t.name)]
    (out / "weights.bin").write_bytes(moved((source / "weights.bin").read_bytes(), tensors, seed, amount))
    session = Session(graph.read_bytes(), (out / "weights.bin").read_bytes())
    describe(session, SAMPLER, "full", list(CAPTIONS), LATENCY_MS, out)  # a few seconds of training make no turbo that draws
    return named(out, variant)


def table(source: Path, out: Path, variant: str) -> Path:
    """Copy an exported `full` for a variant with the same weights and a table of its own."""
    return named(shutil.copytree(source, out), variant)


def named(export: Path, variant: str) -> Path:
    """Write a variant's name into its table."""
    read = json.loads((export / "sampler.json").read_bytes())
    (export / "sampler.json").write_text(json.dumps(read | {"variant": variant}))
    return export


@pytest.fixture(scope="module")
def exports(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Provide exports of all four variants: dev and fast are tables of `full`, turbo is a thin student."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        "full": exported.folder,
        "dev": table(exported.folder, folder / "dev", "dev"),
        "fast": table(exported.folder, folder / "fast", "fast"),
        "turbo": taught(exported.folder, folder / "turbo", "turbo", seed=1),
    }


def assembled(exports: dict[Any, Path], out: Path, version: int = 5, **more: Any) -> Bundle:
    return assemble(exports, **GIVEN, origin=origin(version), out=out, **more)


@pytest.fixture(scope="module")
def four(exports: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Provide a bundle of all four variants."""
    return assembled(exports, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two(exports: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Provide a bundle of full and turbo, which is tried in half the time."""
    return assembled({v: exports[v] for v in ("full", "turbo")}, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def later(exports: dict[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Provide the next bundle: `full` moved a little outside the thin tensors, and the student has its own thin tensors still."""
    folder = tmp_path_factory.mktemp("later")
    full = taught(exports["full"], folder / "full", "full", seed=2, only=lambda name: not is_thin(name))
    turbo = taught(full, folder / "turbo", "turbo", seed=1)
    made = {"full": full, "dev": table(full, folder / "dev", "dev"), "fast": table(full, folder / "fast", "fast"), "turbo": turbo}
    return assembled(made, folder / "out", version=6)


def weights(exports: dict[Any, Path], variant: str) -> bytes:
    return (exports[variant] / "weights.bin").read_bytes()


# What a bundle holds


def test_bundle_lists_four_variants_and_stores_one_set_of_weights(four, exports):
    manifest = four.manifest
    assert (manifest.schema_version, manifest.minimum_agent, manifest.variants) == (4, "0.3.0", ["full", "dev", "fast", "turbo"])
    assert len({manifest.entry("weights", v).sha256 for v in ("full", "dev", "fast")}) == 1
    thin = manifest.overlay("turbo")
    assert (thin.base, thin.weights) == ("full", manifest.weights_sha256("turbo"))
    whole = weights(exports, "full")
    share = sum(
        t.length for t in files.tensors(exports["full"] / "weights.bin", exports["full"] / "graph.onnx") if is_thin(t.name)
    )
    assert share < thin.size < share + 1024
    assert overlay.compose(whole, (four.folder / thin.sha256).read_bytes()) == weights(exports, "turbo")
    assert {path.name for path in four.folder.iterdir()} == {*manifest.objects, "manifest.json"}
    assert parse(Manifest, manifest.canonical(), MAX_MANIFEST) == manifest


def test_bundles_of_older_forms_are_as_before(exports, exported, tmp_path):
    alone = assembled({"full": exports["full"]}, tmp_path, oldest_agent="0.2.0")
    other = taught(exported.folder, tmp_path / "dev", "dev", seed=3, only=lambda _: True)
    both = assembled({"full": exports["full"], "dev": other}, tmp_path, oldest_agent="0.2.0")
    for made in (alone, both):
        assert (made.manifest.schema_version, made.manifest.minimum_agent) == (1, "0.1.0")
        assert b'"base"' not in made.manifest.canonical()
        assert {entry.role for entry in made.manifest.files} == {"graph", "weights", "sampler", "golden", "reference"}


def test_agents_that_are_not_updated_get_a_bundle_that_they_know(exports, exported, tmp_path):
    thin = taught(exported.folder, tmp_path / "dev", "dev", seed=3)
    given = {"full": exports["full"], "dev": thin, "fast": exports["fast"]}
    before = assembled(given, tmp_path, oldest_agent="0.2.0").manifest
    assert (before.schema_version, before.minimum_agent) == (3, "0.2.0")
    assert [entry.role for entry in before.files].count("weights") == 2
    old = assembled(given, tmp_path, oldest_agent="0.1.0").manifest
    assert (old.schema_version, old.minimum_agent) == (1, "0.1.0")
    assert [entry.role for entry in old.files].count("weights") == 3
    with pytest.raises(
        OperatorError, match=r"agents of version 0\.1\.0 do not know the variant turbo; leave it out of shapes/edge"
    ):
        assembled(exports, tmp_path / "none", oldest_agent="0.1.0")
    assert not (tmp_path / "none").exists()


def test_interval_of_guidance_asks_for_a_newer_agent(exports, exported, tmp_path):
    full = shutil.copytree(exported.folder, tmp_path / "full")
    read = json.loads((full / "sampler.json").read_bytes())
    (full / "sampler.json").write_text(json.dumps(read | {"schema_version": 2, "guidance_low": 0.25}))
    assert assembled({"full": full}, tmp_path, oldest_agent="0.2.0").manifest.minimum_agent == "0.2.0"
    with pytest.raises(OperatorError, match="do not know the interval of guidance of full"):
        assembled({"full": full}, tmp_path, oldest_agent="0.1.0")


def test_student_that_differs_everywhere_has_weights_of_its_own(exports, exported, tmp_path):
    other = taught(exported.folder, tmp_path / "turbo", "turbo", seed=3, only=lambda _: True)
    made = assembled({"full": exports["full"], "turbo": other}, tmp_path).manifest
    assert (made.schema_version, made.overlay("turbo")) == (4, None)
    assert made.weights_sha256("turbo") == made.entry("weights", "turbo").sha256


# On a device


def test_device_draws_with_every_variant(scene, four, exports, tmp_path):
    publish(scene.repository, four)
    assert scene.device.update().way == "full"
    assert slot_files(scene.device, four) == files_of(four)
    slot = scene.device.home.slot(digest(four))
    assert {v: slot.read("weights", v) for v in four.manifest.variants} == {
        v: weights(exports, v) for v in four.manifest.variants
    }
    pictures = {v: drawing.generate(scene.device.home, "bar", 1, v)[0] for v in four.manifest.variants}
    assert pictures["full"] == pictures["dev"] == pictures["fast"] != pictures["turbo"]
    stand_still(scene)


def test_equal_weights_are_loaded_once(four, monkeypatch):
    opened, real = [], sampler.open_model
    monkeypatch.setattr(sampler, "open_model", lambda *given: opened.append(given) or real(*given))
    bundle = child.Drawing(str(four.folder), digest(four))
    drawn = {variant: bundle.draw(variant, "bar", 1) for variant in four.manifest.variants}
    assert len(opened) == 2
    assert drawn["full"]["png"] == drawn["dev"]["png"] != drawn["turbo"]["png"]
    assert all(answer["load"] for answer in drawn.values())


def test_delta_makes_each_file_once(scene, bundles, four, later, tmp_path):
    first = make_delta(bundles["first"], four, tmp_path)
    second = make_delta(four, later, tmp_path)
    for made, target in ((first, four), (second, later)):
        with made.path.open("rb") as patch:
            named = [file.target.sha256 for file in read_header(patch).files]
        assert named == [*target.manifest.objects]
        publish(scene.repository, target, made.path, bundles["first"] if target is four else four)
        outcome = scene.device.update()
        assert (outcome.way, slot_files(scene.device, target)) == ("delta", files_of(target))
    thin = four.manifest.overlay("turbo")
    assert (
        first.size < bundles["first"].path("weights", "full").stat().st_size / 2
    )  # the student is made from the weights of full
    assert thin.sha256 == later.manifest.overlay("turbo").sha256  # it kept its tensors, so nothing of it is sent
    stand_still(scene)


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_delta_takes_besides_weights_is_known_before_there_are_new_ones(four, later, tmp_path, version):
    made = make_delta(four, later, tmp_path, version=version)
    old, new = (b.path("weights", "full") for b in (four, later))
    alone = files.build(old, new, tmp_path / "weights", later.path("graph"), four.path("graph"), version=version).size
    known = bytes_besides_weights(four, version)
    assert made.size - alone <= known < made.size - alone + 700 * len(later.manifest.variants)


def test_variants_that_have_no_champion_yet_are_counted_as_the_update_will_bring_them(exports, four, tmp_path):
    from flows.budget import _exports

    variants = four.manifest.variants
    workspace: Any = SimpleNamespace(
        class_subjects=lambda *_: [Subject(line=LINE, configuration="I", variant=variant) for variant in variants],
        line=lambda _: SimpleNamespace(sources=lambda variant: ("student" if variant == "turbo" else "table",)),
    )
    found: Any = {"full": (None, exports["full"])}
    alone, made = (
        assembled(given, tmp_path)
        for given in ({"full": exports["full"]}, _exports(workspace, LINE, CLASS, found, tmp_path / "x"))
    )
    rows = [sorted((entry.role, str(entry.variant)) for entry in of.manifest.files) for of in (made, four)]
    assert rows[0] == rows[1]
    besides = [bytes_besides_weights(of, 2) + len(of.manifest.canonical()) for of in (alone, made, four)]
    assert (
        besides[0] + 1000 < besides[2] <= besides[1] < besides[2] + 700
    )  # the references of dev and fast are those of full here


def test_bytes_of_a_student_that_was_taught_anew_are_known_without_a_bundle(exports, four, later, tmp_path):
    full = taught(exports["full"], tmp_path / "full", "full", seed=2, only=lambda name: not is_thin(name))
    turbo = taught(full, tmp_path / "turbo", "turbo", seed=4, amount=0.3)
    tables = {variant: table(full, tmp_path / variant, variant) for variant in ("dev", "fast")}
    anew = assembled({"full": full, **tables, "turbo": turbo}, tmp_path, version=7)
    old, new, graph = (
        folder / name for folder, name in ((exports["turbo"], "weights.bin"), (turbo, "weights.bin"), (full, "graph.onnx"))
    )
    known = student_bytes(old, full / "weights.bin", new, graph)
    carried, changed = (make_delta(four, target, tmp_path).size for target in (later, anew))
    assert known > 5000
    assert abs(changed - carried - known) < 1000  # golden outputs and a hash differ, too
    assert student_bytes(old, full / "weights.bin", exports["turbo"] / "weights.bin", graph) < known
    assert student_bytes(None, full / "weights.bin", full / "weights.bin", graph) == 0  # it shares the weights of full
    carried_over = tmp_path / "carried"
    carried_over.write_bytes(overlay.compose((full / "weights.bin").read_bytes(), four.path("overlay", "turbo").read_bytes()))
    assert student_bytes(old, full / "weights.bin", carried_over, graph) < 100


def test_device_with_variants_of_their_own_gets_shared_ones(scene, exports, four, exported, tmp_path):
    before = assembled(
        {"full": exports["full"], "dev": taught(exported.folder, tmp_path / "dev", "dev", 3, only=lambda _: True)}, tmp_path
    )
    publish(scene.repository, before)
    scene.device.update()
    made = make_delta(before, four, tmp_path)
    publish(scene.repository, four, made.path, before)
    assert scene.device.update().way == "delta"
    assert slot_files(scene.device, four) == files_of(four)
    back = make_delta(four, before, tmp_path)
    with back.path.open("rb") as patch:  # the older form, as older agents expect it
        assert [f.target.sha256 for f in read_header(patch).files] == [e.sha256 for e in before.manifest.files]


def test_device_without_a_base_fetches_less_than_the_overlay(scene, two, tmp_path):
    made = make_overlay_delta(two, tmp_path)
    thin = two.manifest.overlay("turbo")
    assert made.size < thin.size / 2
    publish(scene.repository, two, made.path, two)
    assert scene.repository.deltas(LINE, CLASS) == []  # it leads from no other bundle
    with WebServer(scene.repository.folder) as server:
        scene.device.configure(repository=server.address)
        outcome = scene.device.update()
        assert (outcome.way, server.asked(thin.sha256)) == ("full", [])
        assert slot_files(scene.device, two) == files_of(two)
        stand_still(scene)


def missing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def altered(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [missing, cut, altered])
def test_overlay_delta_that_cannot_be_had_gives_way_to_the_overlays(scene, two, tmp_path, damage):
    publish(scene.repository, two, make_overlay_delta(two, tmp_path).path, two)
    (path,) = (scene.repository.target_files / "deltas").rglob(f"*.{digest(two)}.{digest(two)}")
    damage(path)
    assert scene.device.update().way == "full"
    assert slot_files(scene.device, two) == files_of(two)
    stand_still(scene)


@pytest.mark.parametrize("lie", ["other files", "nonsense"])
def test_overlay_delta_of_a_thief_gives_way_to_the_overlays(scene, bundles, two, later, tmp_path, lie):
    publish(scene.repository, two)
    data = make_delta(bundles["first"], later, tmp_path).path.read_bytes() if lie == "other files" else b"DFDELTA\1" + bytes(40)
    name_delta(scene.repository, digest(two), digest(two), data)
    assert scene.device.update().way == "full"
    assert slot_files(scene.device, two) == files_of(two)
    assert scene.device.state.refused == {}
    stand_still(scene)


FAULTS = {
    "the link breaks": (TransferError, "it will be resumed"), "no memory": (RoomError, "too little memory"),
    "the disk cannot read": (StateError, "cannot be read back: Input/output error"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bundle_is_not_fetched_again_where_making_its_overlays_fails(scene, two, tmp_path, monkeypatch, fault):
    """Keep what was fetched, and fetch no delta again that did not serve, if the update ends after the files were moved."""
    made = make_overlay_delta(two, tmp_path).path.read_bytes()
    publish(scene.repository, two)
    name_delta(scene.repository, digest(two), digest(two), b"DFDELTA\1" + bytes(40) if fault == "the link breaks" else made)
    thin, real = two.manifest.overlay("turbo"), child.run

    def run(task: str, **request: Any) -> dict[str, Any]:
        if task == "apply":
            raise RoomError("there is too little memory to start a process; end other programs")
        return real(task, **request)

    def unreadable(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ota.agent.transport.ATTEMPTS", 1)
    with WebServer(scene.repository.folder) as server, monkeypatch.context() as patch:
        scene.device.configure(repository=server.address)
        if fault == "no memory":
            patch.setattr(child, "run", run)
        elif fault == "the disk cannot read":  # in step 8, when the overlays are made
            patch.setattr("ota.agent.slots.read_uncached", unreadable)
        else:
            server.faults.cut_after = {thin.sha256: 100}
        with untouched(scene.device, *FAULTS[fault], marks=False):
            scene.device.update()
        patch.undo()
        assert scene.device.update().way == "full"
        sent = {name: count for name, count in server.sent.items() if name.startswith(("objects/", "targets/deltas/"))}
    sizes = {f"objects/{entry.sha256}": entry.size for entry in two.manifest.objects.values()}
    assert all(count <= sizes.get(name, len(made)) for name, count in sent.items())
    assert slot_files(scene.device, two) == files_of(two)


@pytest.mark.parametrize("role", ["overlay", "weights"])
def test_overlay_or_base_that_the_disk_damaged_is_fetched_again(scene, two, tmp_path, role):
    publish(scene.repository, two)
    scene.device.update()
    path = scene.device.file(role, "turbo" if role == "overlay" else "full")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BaseError, match=f"the {role} file of bundle .* is damaged; run `ferry-agent update`"):
        scene.device.home.slot(digest(two)).read("weights", "turbo")
    assert scene.device.update().changed
    assert slot_files(scene.device, two) == files_of(two)
    assert scene.device.state.refused == {}


# Faulty overlays, whoever signed them


def table_of(data: bytes, *rows: tuple[int, int], tail: bytes = b"") -> bytes:
    """Build an overlay with another table."""
    return overlay.PREFIX.pack(overlay.MAGIC, 1, len(rows)) + b"".join(overlay.RANGE.pack(*row) for row in rows) + data + tail


LYING: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another size": (lambda _: table_of(b"1234", (1 << 40, 4)), "replaces bytes beyond the"),
    "range that goes past the end": (lambda _: table_of(b"1234", (0, 1), (1, 1 << 62)), "lists .* bytes, but has"),
    "another result": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "does not make the weights that are signed"),
    "more than its ranges": (lambda d: d + b"\0", "lists .* bytes, but has"),
    "less than its ranges": (lambda d: d[:-1], "lists .* bytes, but has"),
    "overlapping ranges": (lambda _: table_of(b"1234", (0, 2), (1, 2)), "overlap or are out of order"),
    "empty range": (lambda _: table_of(b"", (0, 0)), "ranges that are empty"),
    "no range": (lambda _: table_of(b"\0"), "lists 0 ranges"),
    "ranges without end": (lambda _: overlay.PREFIX.pack(overlay.MAGIC, 1, 2**32 - 1), "lists 4294967295 ranges"),
    "table that is cut short": (lambda d: d[:20], "ends inside its table"),
    "few bytes": (lambda d: d[:5], "ends inside its first bytes"),
    "a delta": (lambda d: b"DFDELTA" + d[7:], "does not begin as an overlay"),
    "another version": (lambda d: d[:7] + b"\2" + d[8:], "has format version 2"),
}  # fmt: skip


def exchanged(bundle: Bundle, out: Path, data: bytes, **fields: Any) -> Bundle:
    """Build a bundle with another overlay; all hashes of files are consistent."""
    place = shutil.copytree(bundle.folder, out / "exchanged")
    sha256 = hashlib.sha256(data).hexdigest()
    (place / sha256).write_bytes(data)
    entries = [
        entry.model_copy(update={"size": len(data), "sha256": sha256} | fields) if entry.role == "overlay" else entry
        for entry in bundle.manifest.files
    ]
    manifest = bundle.manifest.model_copy(update={"files": entries})
    (place / "manifest.json").write_bytes(manifest.canonical())
    return Bundle(place, parse(Manifest, manifest.canonical(), MAX_MANIFEST))


@pytest.mark.parametrize("name", LYING)
def test_overlay_that_lies_is_refused(four, name):
    lie, sentence = LYING[name]
    data = lie((four.folder / four.manifest.overlay("turbo").sha256).read_bytes())
    base = four.path("weights", "full").read_bytes()
    if "signed" in sentence:
        assert len(overlay.compose(base, data)) == len(base)
        return
    with pytest.raises(ManifestError, match=sentence):
        overlay.compose(base, data)


@pytest.mark.parametrize("name", ["another size", "another result", "more than its ranges", "another version"])
def test_bundle_whose_overlay_lies_is_refused_in_its_trial(scene, two, tmp_path, name):
    lie, sentence = LYING[name]
    bad = exchanged(two, tmp_path, lie((two.folder / two.manifest.overlay("turbo").sha256).read_bytes()))
    publish(scene.repository, bad)
    before = scene.device.state
    with pytest.raises(GateError, match=f"failed its trial and is refused: turbo: .*{sentence}"):
        scene.device.update()
    assert scene.device.state == before.model_copy(update={"refused": scene.device.state.refused})
    assert list(scene.device.state.refused) == [digest(bad)]
    stand_still(scene)


def test_overlay_for_another_base_is_refused_in_its_trial(scene, two, later, tmp_path):
    """Refuse an overlay that was made for other weights of `full`, whose size is the same."""
    stranger = later.manifest.overlay("turbo")
    bad = exchanged(two, tmp_path, (later.folder / stranger.sha256).read_bytes(), weights=stranger.weights)
    publish(scene.repository, bad)
    with pytest.raises(GateError, match="turbo: the overlay of turbo does not make the weights that are signed"):
        scene.device.update()
    assert list(scene.device.state.refused) == [digest(bad)]


def test_overlay_that_makes_other_images_than_signed_is_refused(scene, two, later, tmp_path):
    """Refuse a variant that is not the default one and whose weights are consistent, but not those that were measured."""
    data = bytearray((two.folder / two.manifest.overlay("turbo").sha256).read_bytes())
    rows = overlay.ranges(bytes(data))
    largest = max(rows, key=lambda row: row.length)
    data[largest.at : largest.at + largest.length] = bytes(largest.length)
    made = overlay.compose(two.path("weights", "full").read_bytes(), bytes(data))
    bad = exchanged(two, tmp_path, bytes(data), weights=hashlib.sha256(made).hexdigest())
    publish(scene.repository, bad)
    with pytest.raises(GateError, match=r"refused: turbo: only .* of its golden outputs are right on this device"):
        scene.device.update()
    assert scene.device.state.trial is None
    assert list(scene.device.state.refused) == [digest(bad)]
    stand_still(scene)


def changed(manifest: Manifest, change: Callable[[list[dict[str, Any]]], Any], **fields: Any) -> dict[str, Any]:
    said = json.loads(manifest.canonical()) | fields
    change(said["files"])
    return said


def of(entries: list[dict[str, Any]], role: str, variant: str) -> dict[str, Any]:
    return next(e for e in entries if (e["role"], e["variant"]) == (role, variant))


def thin_over(entries: list[dict[str, Any]], variant: str, base: str) -> None:
    """Put an overlay in the place of the weights of a variant."""
    of(entries, "weights", variant).update(role="overlay", base=base, weights="7" * 64, sha256="8" * 64)


CROOKED: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], dict[str, Any], str]] = {
    "chain of overlays": (lambda e: (thin_over(e, "dev", "full"), of(e, "overlay", "turbo").update(base="dev")), {}, "the base of an overlay"),
    "overlay over itself": (lambda e: of(e, "overlay", "turbo").update(base="turbo"), {}, "the base of an overlay"),
    "base that the bundle lacks": (
        lambda e: (of(e, "overlay", "turbo").update(base="fast"), [e.remove(x) for x in [*e] if x["variant"] == "fast"]),
        {"variants": ["full", "dev", "turbo"]}, "the base of an overlay",
    ),
    "overlay beside weights": (lambda e: e.append(of(e, "weights", "full") | {"variant": "turbo"}), {}, "at most 17|one graph and four files"),
    "overlay and weights, no golden outputs": (
        lambda e: (e.append(of(e, "weights", "full") | {"variant": "turbo"}), e.remove(of(e, "golden", "turbo"))), {}, "one graph and four files",
    ),
    "neither overlay nor weights": (lambda e: e.remove(of(e, "overlay", "turbo")), {}, "one graph and four files"),
    "overlay without a base": (lambda e: of(e, "overlay", "turbo").pop("base"), {}, "an overlay, and only an overlay"),
    "overlay without a result": (lambda e: of(e, "overlay", "turbo").pop("weights"), {}, "an overlay, and only an overlay"),
    "weights with a base": (lambda e: of(e, "weights", "dev").update(base="full", weights="7" * 64), {}, "an overlay, and only an overlay"),
    "result that is no hash": (lambda e: of(e, "overlay", "turbo").update(weights="../x"), {}, "weights"),
    "five variants": (lambda _: None, {"variants": ["full", "dev", "fast", "turbo", "full"]}, "variants"),
    "unknown role": (lambda e: of(e, "overlay", "turbo").update(role="patch"), {}, "role"),
    "overlay in form 2": (lambda _: None, {"schema_version": 2}, "only forms from 3 on hold overlays"),
    "one file with two sizes": (lambda e: of(e, "weights", "dev").update(size=1), {}, "a file is listed with two sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CROOKED)
def test_manifest_with_a_crooked_overlay_is_refused(four, name):
    change, fields, sentence = CROOKED[name]
    with pytest.raises(ManifestError, match=f"the manifest is not valid: .*({sentence})") as caught:
        parse(Manifest, json.dumps(changed(four.manifest, change, **fields)).encode(), MAX_MANIFEST)
    assert caught.type is ManifestError


def test_crooked_overlay_stops_before_anything_is_fetched(scene, four, tmp_path):
    entries = [e.model_copy(update={"base": "turbo"}) if e.role == "overlay" else e for e in four.manifest.files]
    offer(scene, four.manifest.model_copy(update={"files": entries}))
    with untouched(scene.device, ManifestError, "the base of an overlay", marks=False):
        scene.device.update()
    not_installed(scene.device)


def test_agent_that_is_too_old_says_so_and_keeps_what_runs(scene, four, tmp_path, monkeypatch):
    publish(scene.repository, four)
    monkeypatch.setattr("ota.__version__", "0.1.9")
    scene.device.home.disk.replace("agent", b"0.1.9")  # the factory knows it already
    with untouched(
        scene.device, AgentError, r"the bundle needs agent 0\.3\.0, but this is 0\.1\.9; update the agent first", marks=False
    ):
        scene.device.update()


def test_memory_of_composing_is_bounded(scene, two, tmp_path):
    """Measure the peak of the child that composes and tries a variant, as a trial does."""
    publish(scene.repository, two)
    scene.device.update()
    slot = scene.device.home.slot(digest(two))
    peaks = [child.run("try", slot=str(slot.folder), digest=slot.digest, variant=v)["peak_mib"] for v in ("full", "turbo")]
    assert peaks[1] < peaks[0] + 64


# In the factory


def test_weights_of_an_overlay_are_found_by_their_hash(repository, four, exports):
    release = publish(repository, four)
    held = {variant: four.manifest.weights_sha256(variant) for variant in four.manifest.variants}
    assert fielded.release_with(repository, LINE, CLASS, "I", held) == release
    assert fielded.release_with(repository, LINE, CLASS, "I", held | {"turbo": held["full"]}) is None
    beside = fielded.files_beside(repository, LINE, CLASS, "turbo", held["turbo"])
    assert [entry.role for _, entry in beside] == ["graph", "sampler", "golden", "reference"]
    assert fielded.files_beside(repository, LINE, CLASS, "turbo", held["full"]) == []


def test_header_of_an_overlay_is_as_documented(four):
    data = (four.folder / four.manifest.overlay("turbo").sha256).read_bytes()
    magic, version, count = struct.unpack("<7sBI", data[:12])
    rows = [struct.unpack("<QQ", data[12 + 16 * i : 28 + 16 * i]) for i in range(count)]
    assert (magic, version, len(data)) == (b"DFOVERL", 1, 12 + 16 * count + sum(length for _, length in rows))
    assert rows == sorted(rows)

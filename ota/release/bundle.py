"""Bundles with manifests, made from exported variants; and deltas between two bundles, each applied once as a proof."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ValidationError

import ota
from ota import delta, golden, overlay
from ota.chain import DIGITS, Link, form_of, name_of
from ota.delta import encode, files
from ota.delta.factors import Claim
from ota.delta.header import BundleFile
from ota.errors import DeltaError, ManifestError, OperatorError
from ota.limits import OF_NUMBERS
from ota.manifest import (
    MAX_CAPTION,
    MAX_MANIFEST,
    MAX_TABLE,
    MOST_CAPTIONS,
    WEIGHTS_LOCATION,
    Allowed,
    FileEntry,
    Manifest,
    Origin,
    Precision,
    Reference,
    Role,
    SamplerTable,
    VariantName,
    parse,
)
from ota.release import compatibility
from ota.wording import first_fault

FILE_NAMES: dict[Role, str] = {
    "graph": "graph.onnx", "weights": WEIGHTS_LOCATION, "sampler": "sampler.json", "golden": "golden.npz",
    "reference": "reference.json",
}  # fmt: skip
Claims = Mapping[VariantName, Mapping[str, Claim]]  # what the training of each variant says of its tensors
THIN = 0.5  # share of the weights; an overlay that is at least as large is not worth composing


@dataclass(frozen=True)
class Bundle:
    """A folder with the manifest and the files of a bundle, each file named by its hash."""

    folder: Path
    manifest: Manifest

    def path(self, role: Role, variant: VariantName | None = None) -> Path:
        """Return the path of the file of a role."""
        return self.folder / self.manifest.entry(role, variant).sha256


@dataclass(frozen=True)
class Delta:
    """A delta between two bundles, which was applied once as a proof."""

    path: Path
    base: str
    target: str
    size: int
    by_kind: dict[str, int]
    form: int = 1
    """Version of the format."""

    @property
    def link(self) -> Link:
        """The delta as a device sees it in the metadata."""
        return Link(name_of(self.form, self.base, self.target), self.size, self.form, self.base[:DIGITS], self.target[:DIGITS])


def update_bytes(old: Path, new: Path, factors: Path | None = None) -> int:
    """Estimate how many bytes a delta between the weights of two exports would have.

    Args:
        old: folder of the exported files that devices have.
        new: folder of the exported files to update to.
        factors: what the training says of the update; with it, the figure is exact where it is right.

    Raises:
        DeltaError, OperatorError: as `ota.delta.files.estimate`.
    """
    weights, graph = FILE_NAMES["weights"], FILE_NAMES["graph"]
    return files.estimate(old / weights, new / weights, new / graph, old / graph, factors)


def assemble(
    exports: Mapping[VariantName, Path], *, line: str, device_class: str, tier: str, configuration: Literal["I", "II"],
    precision: Precision, origin: Origin, out: Path, allowed: Mapping[VariantName, Allowed] | None = None,
    latency_ms: Mapping[VariantName, float] | None = None, oldest_agent: str = ota.__version__, captions: Sequence[str] = (),
) -> Bundle:  # fmt: skip
    """Build a bundle from exported variants as `out/<manifest's sha256>/`; the same input makes the same folder.

    The first variant has its own weights. The others share them where they are equal, or have an overlay over them where that is less
    than half as large. Of the golden outputs, the bundle holds a sample. It has form 4.

    `allowed` changes of the images, by variant, go into the references. Then the manifest has at least form 2, so that an older agent
    keeps what it runs, and fetches nothing. `latency_ms` limits the budget for an image, by variant; a smaller one in a reference stays.
    `oldest_agent` is the oldest version of ferry-agent that must be able to use the bundle. For one before 0.3.0, the bundle holds all
    golden outputs, and has form 3 if it holds something else that older agents do not know. For one before 0.2.0, each variant has its
    own weights, and the bundle has form 1 or 2. `captions`, by which devices count their images, go into the reference of the first
    variant, in form 4 alone; those that are too long, or too many, are left out.

    Raises:
        OperatorError: a file is missing, or the variants do not share one graph, or agents of `oldest_agent` do not know what it holds.
        ManifestError: a table or name does not have the form that devices accept.
    """
    entries: list[FileEntry] = []
    sources: dict[str, bytes | Path] = {}
    allowed = allowed or {}
    newest = compatibility.newest_form(oldest_agent)
    old = newest < 3
    newer = ["the variant turbo"] if "turbo" in exports else []  # what only form 3 holds
    for variant, folder in exports.items():
        for role, name in FILE_NAMES.items():
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                raise OperatorError(f"{folder / name} is missing; export {variant} again") from error
            if role == "sampler":
                if parse(SamplerTable, data, MAX_TABLE).schema_version > 1:
                    newer.append(f"the interval of guidance of {variant}")
            elif role == "reference":
                parse(Reference, data, MAX_TABLE)
            source: bytes | Path = folder / name
            changed = data
            if role == "reference":
                listed = captions if newest >= 4 and variant == next(iter(exports)) else ()
                changed = _adapted(data, allowed.get(variant), (latency_ms or {}).get(variant), listed)
            elif role == "golden" and newest >= 4:
                changed = _sampled(data, folder / name)
            data, source = changed, source if changed == data else changed
            digest = hashlib.sha256(data).hexdigest()
            try:
                entry = FileEntry(role=role, variant=None if role == "graph" else variant, size=len(data), sha256=digest)
            except ValidationError as error:
                raise ManifestError(f"{folder / name} does not fit into a bundle: {first_fault(error, FileEntry)}") from error
            if role == "graph" and entries and entries[0].sha256 != digest:
                raise OperatorError(f"{variant} was exported with another graph than {next(iter(exports))}; export both again")
            if role == "weights" and not old and (thin := _thin(entry, data, entries, exports)):
                entry, source = thin
            if entry not in entries:
                entries.append(entry)
                sources[entry.sha256] = source
    if old and newer:
        raise OperatorError(
            f"agents of version {oldest_agent} do not know {' and '.join(newer)}; leave it out of {line}/{device_class}, or bring its "
            f"devices to agent {compatibility.minimum_agent(3)} first"
        )
    weights = [entry.sha256 for entry in entries if entry.role == "weights"]
    shared = len(weights) < len(exports) or len(set(weights)) < len(weights)
    form: Literal[1, 2, 3, 4] = 4 if newest >= 4 else 3 if not old and (shared or newer) else 2 if allowed else 1
    try:
        manifest = Manifest(
            line=line, device_class=device_class, tier=tier, configuration=configuration, precision=precision,
            variants=list(exports), default_variant=next(iter(exports)), files=entries, origin=origin,
            minimum_agent=compatibility.minimum_agent(form), schema_version=form,
        )  # fmt: skip
    except ValidationError as error:
        raise ManifestError(f"these exports do not make a bundle: {first_fault(error, Manifest)}") from error
    place = out / manifest.digest
    if not place.is_dir():
        fresh = place.with_name(f".{manifest.digest}.{os.getpid()}.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for digest, content in sources.items():
            if isinstance(content, bytes):
                (fresh / digest).write_bytes(content)
            else:
                shutil.copyfile(content, fresh / digest)
        (fresh / "manifest.json").write_bytes(manifest.canonical())
        fresh.rename(place)
    return Bundle(place, manifest)


def _thin(
    entry: FileEntry, weights: bytes, before: Sequence[FileEntry], exports: Mapping[VariantName, Path]
) -> tuple[FileEntry, bytes] | None:
    """Make the overlay of a variant over the weights of the first one; None: it takes its own weights, or those of another variant."""
    plain = [known for known in before if known.role == "weights"]
    if not plain or entry.sha256 in {known.sha256 for known in plain} or plain[0].variant is None:
        return None
    folder = exports[plain[0].variant]
    placed = [(t.offset, t.length) for t in files.tensors(folder / FILE_NAMES["weights"], folder / FILE_NAMES["graph"])]
    made = overlay.make((folder / FILE_NAMES["weights"]).read_bytes(), weights, placed)
    if made is None or len(made) >= THIN * len(weights):
        return None
    digest = hashlib.sha256(made).hexdigest()
    return FileEntry(
        role="overlay", variant=entry.variant, size=len(made), sha256=digest, base=plain[0].variant, weights=entry.sha256
    ), made


def _sampled(outputs: bytes, path: Path) -> bytes:
    try:
        return golden.sampled(outputs)
    except ManifestError as error:
        raise ManifestError(f"{path} does not hold golden outputs; export the checkpoint again") from error


def _adapted(reference: bytes, change: Allowed | None, latency_ms: float | None, captions: Sequence[str]) -> bytes:
    """Add an allowed change and captions to a reference, and limit its budget; otherwise it stays as it was exported, byte for byte."""
    fields = json.loads(reference)
    more: dict[str, object] = {"schema_version": 2, "allowed": change.model_dump(mode="json")} if change else {}
    if latency_ms is not None and fields["latency_ms"] > latency_ms:
        more["latency_ms"] = latency_ms
    if fitting := [caption for caption in captions if 0 < len(caption) <= MAX_CAPTION and caption.isprintable()][:MOST_CAPTIONS]:
        more |= {"schema_version": 3, "captions": sorted(fitting)}  # in an order that a new scorecard does not change
    return f"{json.dumps(fields | more, indent=1, sort_keys=True)}\n".encode() if more else reference


def as_exported(reference: bytes) -> bytes:
    """Take the captions out of a reference again; without another change, that is what was exported, byte for byte."""
    fields = json.loads(reference)
    if not fields.pop("captions", None):
        return reference
    form = 2 if fields.get("allowed") else 1
    return f"{json.dumps(fields | {'schema_version': form}, indent=1, sort_keys=True)}\n".encode()


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle that `assemble` made.

    Raises:
        OperatorError: it is not there.
        ManifestError: its manifest is not valid.
    """
    try:
        return Bundle(folder, parse(Manifest, (folder / "manifest.json").read_bytes(), MAX_MANIFEST))
    except OSError as error:
        raise OperatorError(f"there is no bundle in {folder}; build it again with `ferry release`") from error


def make_delta(
    base: Bundle, target: Bundle, out: Path, factors: Mapping[VariantName, Path] | None = None, version: int = 1
) -> Delta | None:
    """Build the delta from one bundle to another and apply it once as a proof; None: it is not smaller than the full bundle.

    Args:
        base: bundle that devices run.
        target: bundle that they shall run.
        out: folder to write to.
        factors: what the training says of its update, for each variant that was trained; see `ota.delta.factors`.
        version: of the format; agents before 0.3.0 read version 1 alone, which codes factors in several times the bytes.

    Raises:
        DeltaError: the delta does not make the target (an error in the codec; nothing is published).
        OperatorError: a file of factors is not one, or its factors overflow.
    """
    claims = {variant: files.claims(path) for variant, path in (factors or {}).items()}
    return _built([_pair(entry, base, target, claims, version) for entry in target.manifest.made], base, target, out, version)


def make_overlay_delta(target: Bundle, out: Path, version: int = 1) -> Delta | None:
    """Build the delta from a bundle to itself: it makes the overlays from the weights that they lie over.

    A device that has no base fetches it in the place of the overlays, which are not compressed.

    Returns:
        The delta, applied once as a proof; None: the bundle has no overlays, or it is not smaller than these.

    Raises:
        DeltaError: the delta does not make the overlays (an error in the codec; nothing is published).
    """
    thin = [entry for entry in target.manifest.made if entry.role == "overlay"]
    pairs = [_from(entry, target.manifest.entry("weights", entry.base), target, target, {}) for entry in thin]
    return _built(pairs, target, target, out, version) if pairs else None


def bytes_besides_weights(made: Bundle, version: int) -> int:
    """Return how many bytes a delta to the next bundle of this kind takes besides its weights: the header and all other files.

    Graph, sampler tables and overlays stay as they are. Golden outputs and references are new, and counted as if the old ones told
    nothing of them; so it is a little more than a real delta takes.

    Args:
        made: the bundle that devices have.
        version: of the format.
    """
    kept, alone = [], []
    for entry in made.manifest.made:
        path, new = made.folder / entry.sha256, entry.role in ("golden", "reference")
        digest = hashlib.sha256(entry.sha256.encode()).hexdigest() if new or entry.role == "weights" else entry.sha256
        named = BundleFile(entry.role, entry.variant, entry.size, digest)
        kept.append(encode.Pair(named, path, path, [], entry.sha256))
        if entry.role != "weights":
            alone.append(encode.Pair(named, path, None if new else path, [], entry.sha256))
    return len(encode.header_of(kept, "0" * 64, "1" * 64, version)) + sum(_records(pair, version) for pair in alone)


def student_bytes(old: Path | None, full: Path, new: Path, graph: Path, factors: Path | None = None, version: int = 2) -> int:
    """Return how many bytes of a delta between bundles the weights of a student take.

    As in a bundle, they are an overlay over the weights of the new `full` where that is small, and are made from what devices have of
    the student, or from the new `full`, whichever is shorter.

    Args:
        old: weights of the student that devices have; None: they have none, or in another precision.
        full: weights of the new `full`.
        new: weights of the new student.
        graph: ONNX file that says where the tensors of all of them lie.
        factors: what the training says of its update.
        version: of the format.

    Raises:
        OperatorError: a file of factors is not one, or its factors overflow.
    """
    tensors, weights = files.tensors(full, graph), new.read_bytes()
    if weights == full.read_bytes():
        return 0  # it shares them
    whole = {(t.offset, t.length): t for t in tensors}
    made = overlay.make(full.read_bytes(), weights, whole)
    thin = made is not None and len(made) < THIN * len(weights)
    role: Role = "overlay" if thin else "weights"
    with tempfile.TemporaryDirectory() as folder:

        def laid(name: str, of: Path) -> tuple[Path, Sequence[files.Tensor]]:
            """Write those of the weights `of` that the overlay replaces, in its form; a bundle's own weights stay as they are."""
            if made is None or not thin:
                return of, tensors
            ranges, data = overlay.ranges(made), of.read_bytes()
            path = Path(folder) / name
            path.write_bytes(made[: ranges[0].at] + b"".join(data[r.offset : r.offset + r.length] for r in ranges))
            return path, [replace(whole[r.offset, r.length], offset=r.at) for r in ranges]

        path, after = laid("new", new)
        ways: list[tuple[Path, Sequence[files.Tensor]]] = [(full, tensors)]
        if old and old.stat().st_size == len(weights):
            ways.append(laid("old", old))
        size, claims = path.stat().st_size, files.claims(factors)
        named = BundleFile(role, "turbo", size, hashlib.sha256(path.read_bytes()).hexdigest())
        pairs = [encode.Pair(named, path, before, files.stretches(after, held, size, claims)) for before, held in ways]
        return min(_records(pair, version) for pair in pairs)


def _records(pair: encode.Pair, version: int) -> int:
    """Return how many bytes the records of one file take."""
    header = len(encode.header_of([pair], "0" * 64, "1" * 64, version))
    return encode.write([pair], "0" * 64, "1" * 64, BytesIO(), version).size - header


def _built(pairs: Sequence[encode.Pair], base: Bundle, target: Bundle, out: Path, version: int) -> Delta | None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / name_of(version, base.manifest.digest, target.manifest.digest)
    try:
        built = encode.build(pairs, base.manifest.digest, target.manifest.digest, path, version)
        _prove(path, base, pairs)
    except BaseException:
        path.unlink(missing_ok=True)  # an unproved delta must not stay where deltas for a release are read
        raise
    if built.size >= sum({pair.new: pair.entry.size for pair in pairs}.values()):
        path.unlink()
        return None
    with path.open("rb") as file:
        form = form_of(file.read(8))
    return Delta(path, base.manifest.digest, target.manifest.digest, built.size, built.by_kind, form)


def _pair(entry: FileEntry, base: Bundle, target: Bundle, claims: Claims, version: int) -> encode.Pair:
    """Choose the file that a file of the target is made from: of the possible ones, the one that makes the delta smallest."""
    ways = [_from(entry, old, where, target, claims) for old, where in _predecessors(entry, base, target)]
    if len(ways) < 2:
        return ways[0] if ways else _from(entry, None, base, target, claims)
    return min(ways, key=lambda pair: encode.write([pair], "0" * 64, "0" * 64, BytesIO(), version).size)


def _predecessors(entry: FileEntry, base: Bundle, target: Bundle) -> list[tuple[FileEntry, Bundle]]:
    """List the files that a file of the target may be made from, each with its bundle.

    Before form 3, it is the base's file of the same role and variant. From then on it may also be a file of the target that is made
    before: what an overlay lies over, or the first file of its role. If all weights are new, it is the first weights of the base.
    """
    same = [(e, base) for e in base.manifest.files if (e.role, e.variant) == (entry.role, entry.variant)]
    if target.manifest.schema_version < 3:
        return same
    if entry.role == "weights":
        return same or [(e, base) for e in base.manifest.files if e.role == "weights"][:1]
    made = target.manifest.made
    before = made[: made.index(entry)]
    role: Role = "weights" if entry.role == "overlay" else entry.role
    return same + [(e, target) for e in before if e.role == role and (entry.base is None or e.variant == entry.base)][:1]


def _from(entry: FileEntry, old: FileEntry | None, where: Bundle, target: Bundle, claims: Claims) -> encode.Pair:
    elements: list[encode.Elements] = []
    if entry.role in OF_NUMBERS:
        claimed = claims.get(entry.variant) if entry.variant else None
        elements = files.stretches(_tensors(entry, target), _tensors(old, where) if old else [], entry.size, claimed)
    named = BundleFile(entry.role, entry.variant, entry.size, entry.sha256)
    return encode.Pair(named, target.folder / entry.sha256, where.folder / old.sha256 if old else None, elements)


def _tensors(entry: FileEntry, of: Bundle) -> list[files.Tensor]:
    """Find the tensors in weights or in an overlay, which holds some tensors of the weights that it makes."""
    if entry.role == "weights":
        return files.tensors(of.folder / entry.sha256, of.path("graph"))
    whole = {(t.offset, t.length): t for t in files.tensors(of.path("weights", entry.base), of.path("graph"))}
    held = overlay.ranges((of.folder / entry.sha256).read_bytes())
    return [replace(whole[r.offset, r.length], offset=r.at) for r in held if (r.offset, r.length) in whole]


def _prove(path: Path, base: Bundle, pairs: Sequence[encode.Pair]) -> None:
    with tempfile.TemporaryDirectory() as folder, path.open("rb") as patch:

        def open_base(file: delta.DeltaFile) -> BinaryIO:
            return ((base.folder if file.base in base.manifest.objects else Path(folder)) / str(file.base)).open("rb")

        def open_output(entry: BundleFile) -> BinaryIO:
            return (Path(folder) / entry.sha256).open("wb")

        header = delta.read_header(patch)
        delta.apply(patch, header, open_base, open_output)
        for file, pair in zip(header.files, pairs, strict=True):
            if not filecmp.cmp(Path(folder) / pair.entry.sha256, pair.new, shallow=False):
                raise DeltaError(f"the delta {path.name} does not make the {file.name}; do not publish it")

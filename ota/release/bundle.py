"""Bundles with manifests, made from exported variants; and deltas between two bundles, each applied once as a proof."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ValidationError

from ota import delta
from ota.delta import encode, files
from ota.delta.header import BundleFile
from ota.errors import DeltaError, ManifestError, OperatorError
from ota.manifest import (
    MAX_MANIFEST,
    MAX_TABLE,
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
from ota.wording import first_fault

FILE_NAMES: dict[Role, str] = {
    "graph": "graph.onnx", "weights": WEIGHTS_LOCATION, "sampler": "sampler.json", "golden": "golden.npz",
    "reference": "reference.json",
}  # fmt: skip
MINIMUM_AGENT = "0.1.0"


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


def update_bytes(old: Path, new: Path) -> int:
    """Estimate how many bytes a delta between the weights of two exports would have.

    Args:
        old: folder of the exported files that devices have.
        new: folder of the exported files to update to.

    Raises:
        DeltaError: as `ota.delta.files.estimate`.
    """
    weights, graph = FILE_NAMES["weights"], FILE_NAMES["graph"]
    return files.estimate(old / weights, new / weights, new / graph, old / graph)


def assemble(
    exports: Mapping[VariantName, Path], *, line: str, device_class: str, tier: str, configuration: Literal["I", "II"],
    precision: Precision, origin: Origin, out: Path, allowed: Mapping[VariantName, Allowed] | None = None,
    latency_ms: Mapping[VariantName, float] | None = None,
) -> Bundle:  # fmt: skip
    """Build a bundle from exported variants as `out/<manifest's sha256>/`; the same input makes the same folder.

    `allowed` changes of the images, by variant, go into the references. Then the manifest has the form 2, so that an older agent keeps
    what it runs, and fetches nothing. `latency_ms` limits the budget for an image, by variant; a smaller one in a reference stays.

    Raises:
        OperatorError: a file is missing, or the variants do not share one graph.
        ManifestError: a table or name does not have the form that devices accept.
    """
    entries: list[FileEntry] = []
    sources: dict[str, bytes | Path] = {}
    allowed = allowed or {}
    for variant, folder in exports.items():
        for role, name in FILE_NAMES.items():
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                raise OperatorError(f"{folder / name} is missing; export {variant} again") from error
            if role == "sampler":
                parse(SamplerTable, data, MAX_TABLE)
            elif role == "reference":
                parse(Reference, data, MAX_TABLE)
            source: bytes | Path = folder / name
            if role == "reference":
                changed = _adapted(data, allowed.get(variant), (latency_ms or {}).get(variant))
                data, source = changed, source if changed == data else changed
            digest = hashlib.sha256(data).hexdigest()
            try:
                entry = FileEntry(role=role, variant=None if role == "graph" else variant, size=len(data), sha256=digest)
            except ValidationError as error:
                raise ManifestError(f"{folder / name} does not fit into a bundle: {first_fault(error, FileEntry)}") from error
            if role == "graph" and entries and entries[0].sha256 != digest:
                raise OperatorError(f"{variant} was exported with another graph than {next(iter(exports))}; export both again")
            if entry not in entries:
                entries.append(entry)
                sources[digest] = source
    try:
        manifest = Manifest(
            line=line, device_class=device_class, tier=tier, configuration=configuration, precision=precision,
            variants=list(exports), default_variant=next(iter(exports)), files=entries, origin=origin,
            minimum_agent=MINIMUM_AGENT, schema_version=2 if allowed else 1,
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


def _adapted(reference: bytes, change: Allowed | None, latency_ms: float | None) -> bytes:
    """Add an allowed change to a reference, and limit its budget; otherwise it stays as it was exported, byte for byte."""
    fields = json.loads(reference)
    more: dict[str, object] = {"schema_version": 2, "allowed": change.model_dump(mode="json")} if change else {}
    if latency_ms is not None and fields["latency_ms"] > latency_ms:
        more["latency_ms"] = latency_ms
    return f"{json.dumps(fields | more, indent=1, sort_keys=True)}\n".encode() if more else reference


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


def make_delta(base: Bundle, target: Bundle, out: Path) -> Delta | None:
    """Build the delta from one bundle to another and apply it once as a proof; None: it is not smaller than the full bundle.

    Raises:
        DeltaError: the delta does not make the target (an error in the codec; nothing is published).
    """
    pairs = []
    for entry in target.manifest.files:
        has_old = any((e.role, e.variant) == (entry.role, entry.variant) for e in base.manifest.files)
        old = base.path(entry.role, entry.variant) if has_old else None
        new = target.path(entry.role, entry.variant)
        elements = files.elements(old, new, target.path("graph"), base.path("graph")) if entry.role == "weights" else ()
        named = BundleFile(entry.role, entry.variant, entry.size, entry.sha256)
        pairs.append(encode.Pair(named, new, old, elements))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{base.manifest.digest}.{target.manifest.digest}"
    try:
        built = encode.build(pairs, base.manifest.digest, target.manifest.digest, path)
        _prove(path, base, target)
    except BaseException:
        path.unlink(missing_ok=True)  # an unproved delta must not stay where deltas for a release are read
        raise
    if built.size >= target.manifest.size:
        path.unlink()
        return None
    return Delta(path, base.manifest.digest, target.manifest.digest, built.size, built.by_kind)


def _prove(path: Path, base: Bundle, target: Bundle) -> None:
    with tempfile.TemporaryDirectory() as folder, path.open("rb") as patch:

        def open_base(role: Role, variant: VariantName | None) -> BinaryIO:
            return base.path(role, variant).open("rb")

        def open_output(entry: BundleFile) -> BinaryIO:
            return (Path(folder) / entry.sha256).open("wb")

        header = delta.read_header(patch)
        delta.apply(patch, header, open_base, open_output)
        for entry in target.manifest.files:
            made = Path(folder) / entry.sha256
            if not filecmp.cmp(made, target.path(entry.role, entry.variant), shallow=False):
                raise DeltaError(f"the delta {path.name} does not make the {entry.role} file; do not publish it")

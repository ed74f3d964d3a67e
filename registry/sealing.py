"""Seal versions of an older ferry, which kept no hashes of their files: hash the files that MLflow has now, and check them.

The files are compared with all hashes that are known: the ledger has those of scorecard and decision; the scorecard has those
of weights and lineage; the lineage of a later version has that of the checkpoint from which it was trained; signed releases have
those of everything that devices run. Nothing vouches for the other files, and the result says so.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from model.config import canonical_sha256
from model.scorecard import Frozen, Lineage, Scorecard
from registry.catalog import Subject
from registry.champions import Records
from registry.errors import CatalogError, SealError
from registry.ledger import Entry
from registry.promotion import subject_state
from registry.seal import KEPT, PARTS, SCORECARD, Seal, sealed

DECISION = "decision.json"
LEDGER = "the ledger"
NAMES = (SCORECARD, DECISION, *(f"{part}/{name}" for part, names in PARTS.items() for name in (*names, *KEPT.get(part, ()))))


class Released(NamedTuple):
    """A file of a version that a signed release contains."""

    release: str
    """Name of the release, for messages."""
    file: str
    """Name of the file in MLflow's run, such as bundle/graph.onnx."""
    digest: str
    """Its sha256 in the release."""


ReleasedFiles = Callable[[Subject, str], Iterable[Released]]
"""Returns the files, other than weights, of all signed releases that contain weights with this sha256 of a subject."""


class Sealed(Frozen):
    """Result for one version."""

    subject: str
    version: int
    problem: str = Field(default="", description="why it was not sealed; empty: it was")
    vouched: dict[str, str] = Field(default_factory=dict, description="file → what vouches for it")
    taken: list[str] = Field(default_factory=list, description="files for which nothing does")


@dataclass(frozen=True)
class _Found:
    """A version whose files agree with all that is known of it."""

    seal: Seal
    lineage: Lineage
    verdict: dict[str, Any] | None
    vouched: dict[str, str]


def seal(records: Records, subjects: Iterable[Subject], largest: int, released: ReleasedFiles) -> list[Sealed]:
    """Seal all versions that are not sealed yet; one whose files do not fit does not stop the others. May be repeated.

    Args:
        records: MLflow, the ledger and the lock over both.
        subjects: subjects whose versions are sealed.
        largest: most bytes that a file may have.
        released: what signed releases hold.

    Raises:
        LedgerError, StoreError, BusyError: it stopped at a version, so later ones are not sealed; call it again.
    """
    found: list[_Found] = []
    rows: list[Sealed] = []
    for subject in subjects:
        entries = records.ledger.entries(str(subject))
        now = subject_state(entries)
        for number in sorted(now.judged.keys() - now.seals.keys()):
            try:
                found.append(_examined(records, subject, number, entries, largest, released))
            except (SealError, CatalogError) as error:
                rows.append(Sealed(subject=str(subject), version=number, problem=str(error)))
    trained_from = {parent: f.seal.name for f in found for parent in (f.lineage.parent, f.lineage.teacher) if parent}
    with records.locked("records"):
        for f in found:
            vouched = dict(f.vouched)
            if f.seal.checkpoint in trained_from:
                vouched["checkpoint/weights.safetensors"] = f"{trained_from[f.seal.checkpoint]} (trained from it)"
            taken = sorted(f.seal.files.keys() - vouched.keys())
            facts = {"version": f.seal.version, "seal": f.seal.facts, "verdict": f.verdict, "vouched": vouched, "taken": taken}
            said = f"sealed as MLflow has the files now; nothing vouches for {len(taken)} of {len(f.seal.files)}"
            records.ledger.append("seal", f.seal.subject, said, facts)
            rows.append(Sealed(subject=f.seal.subject, version=f.seal.version, vouched=vouched, taken=taken))
    return sorted(rows, key=lambda row: (row.subject, row.version))


def text_of(rows: list[Sealed]) -> str:
    """Format the results as text."""
    lines = []
    for row in rows:
        name = f"{row.subject} {row.version}"
        if row.problem:
            lines.append(f"{name}: NOT sealed, {row.problem}")
            continue
        by: dict[str, list[str]] = {}
        for file, voucher in sorted(row.vouched.items()):
            by.setdefault(voucher, []).append(file)
        lines.append(f"{name}: sealed")
        lines += [f"  {voucher} vouches for {', '.join(files)}" for voucher, files in by.items()]
        lines += [f"  nothing vouches for {', '.join(row.taken)}: taken as MLflow has them now"] if row.taken else []
    return "\n".join(lines) or "every version that the gate saw is sealed"


def _examined(
    records: Records, subject: Subject, number: int, entries: list[Entry], largest: int, released: ReleasedFiles
) -> _Found:
    """Fetch a version's files, and check them against all that is known.

    Raises:
        CatalogError: MLflow does not have the version any more.
        SealError: a file is missing, or its hash is not the known one.
    """
    version, now = records.catalog.version(subject, number), subject_state(entries)
    gates = [e for e in entries if e.kind == "gate" and e.facts["version"] == number]
    with tempfile.TemporaryDirectory() as folder:
        files = records.catalog.as_they_are(version, NAMES, Path(folder), largest)
        needed = {f"{part}/{file}" for part in ("bundle", "checkpoint") for file in PARTS[part]} | {SCORECARD}
        if missing := needed - files.keys():
            raise SealError(f"MLflow lacks {min(missing)} of it; restore MLflow's files from a backup, or run `ferry retrain`")
        facts = {file: sealed(path) for file, path in files.items() if file != DECISION}
        known = {SCORECARD: LEDGER, "bundle/weights.bin": LEDGER, "checkpoint/lineage.json": LEDGER}
        _same(SCORECARD, _content(files[SCORECARD]), {str(e.facts["scorecard"]) for e in gates}, "the gate's ledger entry names")
        try:
            card = Scorecard.model_validate_json(files[SCORECARD].read_bytes())
            _same(
                "checkpoint/lineage.json",
                _content(files["checkpoint/lineage.json"]),
                {card.lineage_sha256},
                "its scorecard names",
            )
            lineage = Lineage.model_validate_json(files["checkpoint/lineage.json"].read_bytes())
        except ValidationError as error:
            raise SealError(
                "another version of ferry wrote its scorecard or lineage; seal it with that version, or run `ferry retrain`"
            ) from error
        weights = {card.weights_sha256} & ({now.passed[number]} if number in now.passed else {card.weights_sha256})
        _same("bundle/weights.bin", facts["bundle/weights.bin"].digest, weights, "its scorecard and promotion name")
        for voucher, file, digest in released(subject, card.weights_sha256):
            _same(file, facts[file].digest, {digest}, f"{voucher} was signed with")
            known.setdefault(file, voucher)
        verdict = None
        if DECISION in files and _content(files[DECISION]) == gates[-1].facts["decision"]:
            verdict = json.loads(files[DECISION].read_bytes())
    made = Seal.of(str(subject), number, lineage, card, facts)
    # These are hashes of the documents as they were written. This ferry might write them with more fields.
    exact = {"scorecard": str(gates[-1].facts["scorecard"]), "lineage": card.lineage_sha256}
    return _Found(made.model_copy(update=exact), lineage, verdict, known)


def _same(file: str, found: str, known: set[str], what: str) -> None:
    if found not in known:
        raise SealError(
            f"{file} in MLflow is not the one that {what}: somebody replaced it; restore MLflow's files from a backup, or "
            "run `ferry retrain`"
        )


def _content(path: Path) -> str:
    """Hash the content of a JSON file, as its value was hashed when it was written; return no hash if it is not JSON."""
    try:
        return canonical_sha256(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):
        return "nothing that can be read"

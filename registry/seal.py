"""Seals: hashes of what the gate saw of a version. The ledger keeps them; files from MLflow are checked before they are opened.

MLflow's users can replace files and edit tags. This must not change what is promoted, signed, or used to start a training. So
only the number of a version is taken from MLflow; its weights, its lineage and its files must be those of its seal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from model.scorecard import Adopted, Frozen, Lineage, Scorecard, Sha256
from registry.errors import SealError

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Part = Literal["bundle", "checkpoint", "pictures"]
SCORECARD = "scorecard.json"
PARTS: dict[Part, tuple[str, ...]] = {
    "bundle": ("graph.onnx", "weights.bin", "sampler.json", "golden.npz", "reference.json"),
    "checkpoint": ("weights.safetensors", "lineage.json", "curve.json"),
    "pictures": ("samples.png", "samples.json", "real.png"),
}
"""The files of a version that ferry reads back, by the folder of its run; others are for people who look into MLflow."""
FACTORS, MASTER = "update.safetensors", "master.safetensors"
KEPT: dict[Part, tuple[str, ...]] = {"bundle": (FACTORS,), "checkpoint": (MASTER,)}
"""Files that only some versions have: the factors of an update, and the weights that were trained and are not fielded."""


class FileSeal(Frozen):
    """Size and hash of one file."""

    size: int = Field(ge=0, description="bytes")
    digest: Hash = Field(description="sha256")


class Seal(Frozen):
    """A version as the gate saw it."""

    subject: str
    version: int
    weights: Hash = Field(description="of the exported weights; two versions may share them")
    lineage: Hash
    scorecard: Hash
    data_rev: str
    data_md5: str
    code: str
    parent: Hash | None = Field(description="checkpoint from which its training started")
    teacher: Hash | None
    adopted: Adopted | None = Field(
        default=None, exclude_if=lambda value: value is None, description="where weights come from that were trained elsewhere"
    )
    files: dict[str, FileSeal] = Field(description="by name in MLflow's run, such as bundle/graph.onnx")

    @property
    def checkpoint(self) -> Sha256:
        """Hash of the trained weights, which later versions name as their parent."""
        return self.files["checkpoint/weights.safetensors"].digest

    @property
    def master(self) -> FileSeal | None:
        """Size and hash of the master, from which the next training starts; None: none was kept."""
        return self.files.get(f"checkpoint/{MASTER}")

    @property
    def origin(self) -> Sha256 | None:
        """Checkpoint that a variant comes from: that of a student's teacher, otherwise the one with the same weights."""
        return self.teacher or self.parent

    @property
    def name(self) -> str:
        """Subject and number, for messages."""
        return f"{self.subject} {self.version}"

    def part(self, part: Part) -> dict[str, FileSeal]:
        """Return the seals of the files in one folder, by their names in it; not that of the master, which may get lost."""
        inside = {name.removeprefix(f"{part}/"): fact for name, fact in self.files.items() if name.startswith(f"{part}/")}
        return {name: fact for name, fact in inside.items() if name != MASTER}

    @property
    def facts(self) -> dict[str, Any]:
        """The seal as a ledger entry holds it, without subject and version, which the entry says itself."""
        return self.model_dump(mode="json", exclude={"subject", "version"})

    @classmethod
    def of(cls, subject: str, version: int, lineage: Lineage, card: Scorecard, files: Mapping[str, FileSeal]) -> Seal:
        """Make the seal of a version.

        Args:
            subject: LINE/CONFIG/VARIANT.
            version: its number.
            lineage: of the checkpoint.
            card: of the exported files.
            files: by name in MLflow's run.
        """
        return cls(
            subject=subject, version=version, weights=card.weights_sha256, lineage=lineage.sha256, scorecard=card.sha256,
            data_rev=lineage.data.rev, data_md5=lineage.data.md5, code=lineage.code, parent=lineage.parent, teacher=lineage.teacher,
            adopted=lineage.adopted, files=dict(files),
        )  # fmt: skip


def files_of(part: Part, folder: Path) -> dict[str, FileSeal]:
    """Hash the files of a folder, by the names that they get in a version's run.

    Raises:
        OSError: one cannot be read.
    """
    there = [name for name in KEPT.get(part, ()) if (folder / name).is_file()]
    return {f"{part}/{name}": sealed(folder / name) for name in (*PARTS[part], *there)}


def sealed(path: Path) -> FileSeal:
    """Return the size and hash of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return FileSeal(size=path.stat().st_size, digest=hashlib.file_digest(file, "sha256").hexdigest())


def sealed_bytes(data: bytes) -> FileSeal:
    """Return the size and hash that these bytes have as a file."""
    return FileSeal(size=len(data), digest=hashlib.sha256(data).hexdigest())


def is_whole(path: Path, fact: FileSeal) -> bool:
    """Check whether a file is the one that was sealed: a regular file of that size, which is compared first, and that hash."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == fact.size and sealed(path) == fact


def other_bytes(seal: Seal, name: str, found: str) -> SealError:
    """Make the error for a file that is not the one that was sealed."""
    return SealError(
        f"{name} of {seal.name} in MLflow is not what the gate saw ({found}): somebody replaced it, and ferry does not use "
        f"it; restore MLflow's files from a backup, or run `ferry retrain {seal.subject.split('/', maxsplit=1)[0]}`"
    )

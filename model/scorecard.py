"""The frozen values that `model` hands on: which data, how trained, how good. No torch, so that everyone may read them.

Every value can be written as JSON and names its parents by hash:
`DataVersion` → `Lineage` (inside a checkpoint) → `Scorecard`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from model.config import ConfigurationName, ModelConfig, TierName, VariantName, canonical_sha256

Sha256 = str


class Frozen(BaseModel):
    """A value: immutable, without unknown fields, hashed by its canonical JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def sha256(self) -> Sha256:
        """Hash of the canonical JSON."""
        return canonical_sha256(self.model_dump(mode="json"))


class DataVersion(Frozen):
    """One revision of one line's data, by content."""

    line: str
    path: str = Field(description="folder, relative to the workspace")
    rev: str = Field(description="full Git commit that holds the .dvc file")
    md5: str = Field(description="DVC's hash of the folder, ending in .dir")
    files: int
    bytes: int


class Lineage(Frozen):
    """Where a checkpoint comes from: everything needed to make it again."""

    schema_version: Literal[1] = 1
    data: DataVersion
    config: ModelConfig
    variant: VariantName
    training_sha256: Sha256 = Field(description="hash of the training options")
    code: str = Field(description="hash of the source files of model/, or of the installed version")
    seed: int
    parent: Sha256 | None = Field(description="weights from which training started; None: from noise")
    steps: int
    items: int = Field(description="training items seen as data, held-out ones excluded")
    torch: str


class Sampler(Frozen):
    """How images are drawn: the solver, its number of steps, and the guidance scale (1 is unguided)."""

    method: Literal["euler", "heun", "ab2"] = "ab2"
    steps: int = Field(default=14, ge=1, le=1000)
    guidance: float = Field(default=2.0, ge=1.0, le=20.0)

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image; guidance counts twice, Heun counts twice."""
        return self.steps * (2 if self.method == "heun" else 1) * (2 if self.guidance != 1 else 1)


class Quality(Frozen):
    """Distances of n generated images to the held-out images, in one feature space; smaller is better."""

    space: str
    space_sha256: Sha256
    split: str = Field(description="whose held-out items: the new data revision's, or the champion's own")
    n: int = Field(description="generated images, as many as captions drawn from the held-out items")
    reference: int = Field(description="held-out images")
    fd: float = Field(description="Fréchet distance; biased by n, compare only at equal n")
    kd: float = Field(description="squared kernel distance (unbiased MMD, Gaussian kernels)")
    noise_kd: float = Field(description="the same distance for images of pure noise: a yardstick of harm")
    coverage: float = Field(description="share of held-out images with a generated one among their 5 nearest")


class Comparison(Frozen):
    """Challenger minus another model, on the same noise seeds and captions: negative says the challenger is better."""

    against: Literal["champion"]
    against_sha256: Sha256
    space: str
    split: str
    n: int
    delta: float = Field(description="difference of the squared kernel distances")
    se: float = Field(description="its standard error, from the influence functions")
    champion_kd: float


class Usage(Frozen):
    """Which expert did what: gate mass by block and expert, and how evenly it is spread."""

    load: list[list[float]] = Field(description="[M][E] mean gate mass; 1/E where all are used alike")
    dead: int = Field(description="experts that carry less than a tenth of an even share in their block")


class Cost(Frozen):
    """What one image costs on the machine that evaluated."""

    milliseconds: float = Field(description="median time of one image, one thread, batch of one")
    evaluations: int
    machine: str


class Scorecard(Frozen):
    """How good one exported model is, and on what this was measured."""

    schema_version: Literal[1] = 1
    line: str
    tier: TierName
    configuration: ConfigurationName
    variant: VariantName
    weights_sha256: Sha256
    lineage_sha256: Sha256
    sampler: Sampler
    seed: int
    quality: list[Quality]
    comparisons: list[Comparison] = []
    bad_images: float = Field(description="share of generated images that are constant or not finite")
    usage: Usage
    cost: Cost

    def kd(self, space: str, split: str = "new") -> float:
        """The kernel distance in one space on one split.

        Raises:
            KeyError: it was not measured.
        """
        for quality in self.quality:
            if (quality.space, quality.split) == (space, split):
                return quality.kd
        raise KeyError((space, split))

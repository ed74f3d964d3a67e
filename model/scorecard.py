"""Frozen values that `model` passes on: which data, how trained, how good. They need no torch, so every package can read them.

Every value can be written as JSON and refers to its parents by hash:
`DataVersion` → `Lineage` (inside a checkpoint) → `Scorecard`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from model.config import ConfigurationName, ModelConfig, PrecisionName, TierName, VariantName, canonical_sha256

Sha256 = str
LineName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
GitCommit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]
DvcHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}(\.dir)?$")]


def _below(path: str) -> str:
    """Check that a path stays below its starting folder and is in its simplest form, and return it.

    Raises:
        PydanticCustomError: it does not, or it contains control characters.
    """
    if any(part in ("", ".", "..") for part in path.split("/")) or any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in path):
        raise PydanticCustomError("below", "a path must be relative, without '.', '..', '//' and control characters")
    return path


FOLLOW = 1 / 3  # least share of the real images' value that a model must reach, for matching captions and for drawing one
HASHES = 256  # number of hashes that are kept of a held-out set's groups
RelativePath = Annotated[str, AfterValidator(_below)]


def _absent(value: object) -> bool:
    """Check whether a field has its default and is left out, so that scorecards of older versions of ferry keep their hash."""
    return value is None or value in ([], "images")


class Frozen(BaseModel):
    """An immutable value without unknown fields, hashed by its canonical JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def sha256(self) -> Sha256:
        """Hash of the canonical JSON."""
        return canonical_sha256(self.model_dump(mode="json"))


class DataVersion(Frozen):
    """One revision of one line's data, identified by its content."""

    line: LineName = Field(description="line (product) of the data")
    path: RelativePath = Field(description="folder, relative to the workspace")
    rev: GitCommit = Field(description="full Git commit that holds the .dvc file")
    md5: DvcHash = Field(description="DVC's hash of the folder, ending in .dir")
    files: int = Field(description="number of files")
    bytes: int = Field(description="bytes of all files")


def _one_line(text: str) -> str:
    """Check that a text has no control characters, and return it.

    Raises:
        PydanticCustomError: it has some.
    """
    if not text.isprintable():
        raise PydanticCustomError("one_line", "a text of one line must not have control characters")
    return text


Source = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(_one_line)]


class Adopted(Frozen):
    """Where weights come from that were trained elsewhere."""

    source: Source = Field(description="in words, as whoever adopted them said it")
    file_sha256: Sha256 = Field(description="hash of the file that was adopted")


class Lineage(Frozen):
    """Origin of a checkpoint: everything that is needed to reproduce it."""

    schema_version: Literal[1] = Field(default=1, description="version of this form")
    data: DataVersion = Field(description="data revision that it was trained on")
    config: ModelConfig = Field(description="shape of the network")
    variant: VariantName = Field(description="variant that it was trained as")
    training_sha256: Sha256 = Field(description="hash of the training options")
    code: str = Field(description="hash of the source files of model/, or of the installed version")
    seed: int = Field(description="seed of the training")
    parent: Sha256 | None = Field(description="hash of the weights from which training started; null: from noise")
    teacher: Sha256 | None = Field(default=None, description="hash of the teacher's weights; null: it has no teacher")
    guidance: float | None = Field(
        default=None,
        description="guidance scale that the teacher was run with; null: it has no teacher, or the teacher is a student, as in older versions",
    )
    trajectories: int | None = Field(
        default=None, exclude_if=_absent, description="trajectories of `full` that a student learnt from"
    )
    thin: bool | None = Field(
        default=None, exclude_if=_absent, description="whether a student has most weights of `full`, bit by bit"
    )
    steps: int = Field(description="optimizer steps; 0: nothing was trained, the weights are the parent's")
    items: int = Field(description="items of the training data, without the held-out ones")
    torch: str = Field(description="version of torch")
    hardware: str = Field(default="cpu", description="hardware that it was trained on")
    start_master: Sha256 | None = Field(
        default=None,
        exclude_if=_absent,
        description="hash of the master from which training started; null: it started from the parent's own weights, or from noise",
    )
    master: Sha256 | None = Field(
        default=None,
        exclude_if=_absent,
        description="hash of the master, the fp32 weights that were trained and are never fielded; null: none was kept",
    )
    method: str | None = Field(
        default=None, exclude_if=_absent, description="how the update was made from the master: a row of model.update.METHODS"
    )
    level: float | None = Field(
        default=None, exclude_if=_absent, description="level of the method: a higher one takes fewer bytes"
    )
    polished: int | None = Field(
        default=None, exclude_if=_absent, description="training steps that followed on the rounded update"
    )
    adopted: Adopted | None = Field(
        default=None,
        exclude_if=_absent,
        description="where the weights come from, if they were not trained here: then `data` is the revision on which they were first "
        "judged, `training_sha256` the hash of this field, and `steps` and `items` are 0; a training from them has `parent` instead",
    )

    @property
    def start(self) -> Literal["noise", "fielded", "master"]:
        """What training started from: noise, the parent's fielded weights, or the parent's master."""
        return "noise" if self.parent is None else "master" if self.start_master else "fielded"


SamplerName = Literal["euler", "heun", "ab2", "mean"]
"""Solvers. What each does is in `model.diffusion` and, on devices, in `ota.agent.sampler`."""


def _is(usual: float) -> Callable[[object], bool]:
    """Check whether a field has its usual value and is left out, so that older samplers and scorecards keep their hash."""
    return lambda value: value == usual


class Sampler(Frozen):
    """How images are drawn: the solver, its steps and their times, and the guidance scale (1 is unguided)."""

    method: SamplerName = Field(
        default="ab2",
        description="solver: euler (first order), heun (second order, two evaluations a step), ab2 (second order, one evaluation a step); "
        "mean is the sampler of students",
    )
    steps: int = Field(default=28, ge=1, le=1000, description="number of sampling steps")
    guidance: float = Field(
        default=2.0, ge=1.0, le=20.0, description="scale of classifier-free guidance; 1 is unguided and halves the evaluations"
    )
    shift: float = Field(
        default=1.0,
        ge=0.1,
        le=10.0,
        exclude_if=_is(1.0),
        description="grid of the times: 1 is even, below 1 the steps at little noise are shorter, above 1 those at much noise",
    )
    guidance_low: float = Field(
        default=0.0, ge=0.0, lt=1.0, exclude_if=_is(0.0), description="time (0 the image, 1 noise) below which nothing is guided"
    )
    guidance_high: float = Field(
        default=1.0, gt=0.0, le=1.0, exclude_if=_is(1.0), description="time above which nothing is guided"
    )

    @model_validator(mode="after")
    def _has_an_interval(self) -> Sampler:
        if self.guidance_low >= self.guidance_high:
            raise PydanticCustomError("interval", "guidance_low must lie below guidance_high; leave both out to guide every step")
        return self

    @property
    def times(self) -> list[float]:
        """The steps + 1 times of the sampler, from 1 (noise) to 0 (the image).

        With the shift s, an even time u becomes s u / (1 + (s - 1) u) (Esser et al. 2024, equation 23).
        """
        even = (1 - i / self.steps for i in range(1, self.steps))
        return [1.0, *(self.shift * u / (1 + (self.shift - 1) * u) for u in even), 0.0]

    def guides(self, t: float) -> bool:
        """Check whether an evaluation at time t is guided; it then takes two evaluations of the network."""
        return self.guidance != 1 and self.guidance_low <= t <= self.guidance_high

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image; a guided evaluation counts twice."""
        times = self.times
        at = times[:-1] if self.method != "heun" else [*times[:-1], *times[1:]]
        return sum(2 if self.guides(t) else 1 for t in at)


class Quality(Frozen):
    """Distances of n generated images to the held-out images, in one feature space; smaller is better."""

    space: str = Field(description="name of the feature space")
    space_sha256: Sha256 = Field(description="hash of the feature space")
    split: str = Field(description="whose held-out items: the new data revision's, or the champion's own")
    n: int = Field(description="generated images, as many as captions drawn from the held-out items")
    reference: int = Field(description="held-out images")
    groups: int = Field(description="independent groups among the held-out images")
    fd: float = Field(description="Fréchet distance; biased by n, compare only at equal n")
    fd_se: float | None = Field(description="standard error of fd at this n, by jackknife; it says nothing of the bias")
    kd: float = Field(description="squared kernel distance (unbiased MMD, Gaussian kernels)")
    kd_se: float = Field(description="standard error of kd; Student's t with groups - 1 degrees of freedom makes it an interval")
    noise_kd: float = Field(description="squared kernel distance of images of pure noise: a yardstick of harm")
    precision: float = Field(description="share of generated images among the 5 nearest of some held-out one")
    recall: float = Field(description="share of held-out images among the 5 nearest of some generated one")
    density: float = Field(description="held-out neighbourhoods around a generated image, over 5; about 1 is right")
    coverage: float = Field(description="share of held-out images with a generated one among their 5 nearest")
    band: float | None = Field(
        default=None,
        exclude_if=_absent,
        description="distance between two sets of 25 groups of real images (model.distances.band)",
    )
    captions_kd: float | None = Field(
        default=None, exclude_if=_absent, description="squared kernel distance between pairs of image and caption"
    )
    captions_se: float | None = Field(default=None, exclude_if=_absent, description="standard error of captions_kd")
    captions_band: float | None = Field(default=None, exclude_if=_absent, description="band of pairs of image and caption")


class PublishedFid(Frozen):
    """Fréchet distance in the feature space of a network that the user provides; with Inception's weights it is the usual FID."""

    fid: float = Field(description="biased by n: papers use 50,000 images, or say so")
    n: int = Field(description="generated images")
    reference: int = Field(description="images of the folder")
    dimensions: int = Field(description="dimensions of the feature space")
    features_sha256: Sha256 = Field(description="hash of the network's file")


class Comparison(Frozen):
    """Challenger minus another model, on the same noise seeds and captions; below 0 the challenger is better."""

    against: Literal["champion", "anchor", "full", "solver"] = Field(
        description="anchor: the best model ever; full: the one whose variant this is; solver: full, drawn with as many evaluations as the "
        "student, in scorecards of ferry 0.1"
    )
    against_sha256: Sha256 = Field(description="hash of the other model's weights")
    space: str = Field(description="name of the feature space")
    split: str = Field(description="whose held-out items: the new data revision's, or the champion's own")
    n: int = Field(description="generated images of each model")
    groups: int = Field(description="independent groups among the held-out images")
    delta: float = Field(description="difference of the squared kernel distances")
    se: float = Field(description="standard error of delta, from the influence functions")
    champion_kd: float = Field(description="the other model's distance")
    aspect: Literal["images", "captions"] = Field(
        default="images", exclude_if=_absent, description="what was compared: images, or (captions) pairs of image and caption"
    )
    drawn_se: float | None = Field(default=None, exclude_if=_absent, description="part of se that more drawn images would remove")


class Converged(Frozen):
    """How far a variant's images lie from those that `full` draws from the same noise in very many steps.

    A distance is the root mean square over the pixels of an image, which span 2, averaged over the images.
    """

    n: int = Field(description="images")
    evaluations: int = Field(description="network evaluations with which `full` draws the converged images")
    distance: float = Field(description="distance of the variant's images")
    distance_se: float = Field(description="standard error of distance")
    solver: float | None = Field(
        default=None,
        description="distance of the images of `full` with as many evaluations as the variant takes; null: it is no student",
    )
    delta: float | None = Field(default=None, description="mean over the images of distance minus solver")
    se: float | None = Field(default=None, description="standard error of delta")


class Kept(Frozen):
    """Share of an unlimited retraining's gain that an update keeps, in the flow-matching loss of held-out images.

    Gain is the fall of the loss from the fielded weights, on the same noises and times.
    """

    share: float | None = Field(description="gain of the update over that of the unlimited retraining; null: that shows no gain")
    low: float | None = Field(description="lower bound of share, which holds with probability 1 - alpha; null as share")
    high: float | None = Field(description="upper bound of share, in the same way; null as share")
    gain: float = Field(description="gain of the unlimited retraining: mean fall of the loss")
    items: int = Field(description="held-out images")
    groups: int = Field(description="independent groups among them")
    alpha: float = Field(description="chance that the true share lies below low")


class Following(Frozen):
    """How well images match their captions, in one feature space: the covariance of image and caption similarity over pairs."""

    space: str = Field(description="name of the feature space")
    split: str = Field(description="whose held-out items: the new data revision's, or the champion's own")
    groups: int = Field(description="independent groups among the held-out images")
    real: float = Field(description="covariance of real images with real ones, which a perfect model reaches")
    real_se: float = Field(description="standard error of real")
    share: float = Field(description="share of real that the model reaches; 0 for a model that ignores its captions")
    excess: float = Field(description="covariance beyond the share that is asked for")
    excess_se: float = Field(description="standard error of excess")


class CaptionCheck(Frozen):
    """Whether a model draws what a caption, or a word of captions, asks for.

    The measure is how far the model's images move from other real images towards those of the caption.
    """

    caption: str = Field(description="the caption or word")
    word: bool = Field(description="whether it is a word, for all captions that have it")
    n: int = Field(description="generated images")
    reference: int = Field(description="held-out images")
    groups: int = Field(description="independent groups among the held-out images")
    apart: float = Field(description="squared kernel distance of its real images from real images without it, over all spaces")
    apart_se: float = Field(description="standard error of apart")
    share: float | None = Field(
        description="share of apart by which the caption changes what the model draws: 1 as in real images, 0 nothing; null: not told apart"
    )
    drawn: float = Field(description="share times apart: the change as a distance")
    drawn_se: float = Field(description="standard error of drawn")
    champion_share: float | None = Field(default=None, description="share of the champion")


class Plausibility(Frozen):
    """How many generated images are unlike all real ones, or like each other."""

    n: int = Field(description="generated images")
    training: int = Field(description="real images that were looked at")
    implausible: int = Field(
        description="further from any real image than 199 of 200 real ones are from those of other groups, in some space"
    )
    held_out: float = Field(description="share of held-out images that are implausible in this sense")
    duplicates: int = Field(description="nearer to another generated image than 99 of 100 real ones are to those of other groups")
    champion: float | None = Field(default=None, exclude_if=_absent, description="the champion's share of implausible images")
    more: float | None = Field(
        default=None,
        exclude_if=_absent,
        description="share minus the champion's, over `pairs` images of the same captions and seeds",
    )
    more_se: float | None = Field(default=None, exclude_if=_absent, description="standard error of more")
    pairs: int | None = Field(
        default=None, exclude_if=_absent, description="pairs of images that were compared with the champion's"
    )


class Memorisation(Frozen):
    """Whether generated images lie nearer to training images than held-out images do, in one feature space."""

    space: str = Field(description="name of the feature space")
    n: int = Field(description="generated images")
    reference: int = Field(description="held-out images")
    training: int = Field(description="training images that were searched; copies of others go unseen")
    probability: float = Field(description="chance that a generated image is nearer than a held-out one; 1/2 without copying")
    se: float = Field(default=0.0, description="standard error of probability; 0: it was not measured")
    z: float = Field(description="probability above 1/2, in standard errors")
    p: float = Field(description="chance of such a z without copying")
    nearer_than_any: float = Field(description="share of generated images that are nearer than every held-out one")


class CaptionRow(Frozen):
    """How far the images of one caption lie from held-out images of that caption, in the trained feature space."""

    caption: str = Field(description="the caption")
    n: int = Field(description="generated images")
    reference: int = Field(description="held-out images")
    generated: float | None = Field(description="mean distance of a generated image to the nearest held-out one")
    held_out: float | None = Field(
        description="mean distance of a held-out image to the nearest one of another group; null for a single group"
    )
    ratio: float | None = Field(
        description="generated divided by held_out; above 1, generated images lie further from the data than the data"
    )


class Usage(Frozen):
    """How much each expert contributes: gate mass by block, expert and sampling step, and how evenly it is spread."""

    load: list[list[float]] = Field(description="[M][E] mean gate mass; 1/E where all are used alike")
    by_step: list[list[list[float]]] = Field(description="[S][M][E] mean gate mass at each sampling step, the noisiest first")
    entropy: list[float] = Field(description="[M] entropy of the shares over log E: 1 where all are used alike, 0 for one")
    dead: int = Field(description="experts that carry less than a tenth of an even share in their block")


class Cost(Frozen):
    """Cost of one image on the machine that evaluated the model."""

    milliseconds: float = Field(description="median time of one image, one thread, batch of one")
    evaluations: int = Field(description="network evaluations for one image")
    peak_mib: float = Field(description="peak memory of a fresh process that evaluates the network, without torch")
    bare_mib: float = Field(description="part of peak_mib that the interpreter with ONNX Runtime takes before a model is loaded")
    machine: str = Field(description="machine that it was measured on")


class Scorecard(Frozen):
    """Quality of one exported model, and what it was measured on."""

    schema_version: Literal[1] = Field(default=1, description="version of this form")
    line: str = Field(description="line (product) of the model")
    tier: TierName = Field(description="size of the network")
    configuration: ConfigurationName = Field(description="stride of the first convolution: I is 2, II is 1")
    variant: VariantName = Field(description="variant of the model")
    weights_sha256: Sha256 = Field(description="hash of the exported weights")
    lineage_sha256: Sha256 = Field(description="hash of the lineage: how the model was made")
    sampler: Sampler = Field(description="how its images were drawn")
    precision: PrecisionName = Field(description="how its weights are stored")
    seed: int = Field(description="seed of the drawn images")
    quality: list[Quality] = Field(description="distances to held-out images, by feature space and split")
    comparisons: list[Comparison] = Field(default=[], description="differences from champion, anchor and solver")
    solver: Sampler | None = Field(
        default=None, description="sampler of `full` in the comparison with a student, with as many evaluations as the student"
    )
    beats_solver: bool | None = Field(
        default=None,
        description="whether a student's images are nearer to the converged ones than those of that solver, by the estimate (in ferry 0.1: "
        "nearer to the data, in every space)",
    )
    converged: Converged | None = Field(
        default=None, exclude_if=_absent, description="distance from the converged images of `full`; null: it is `full`"
    )
    memorisation: list[Memorisation] = Field(description="whether it copies training images, by feature space")
    captions: list[CaptionRow] = Field(description="the most frequent captions of the held-out images")
    following: list[Following] = Field(
        default=[], exclude_if=_absent, description="how well images match their captions, by feature space and split"
    )
    asked: list[CaptionCheck] = Field(default=[], exclude_if=_absent, description="captions and words, one by one")
    plausibility: Plausibility | None = Field(
        default=None, exclude_if=_absent, description="images that are unlike all real ones, or like each other"
    )
    held_out: list[str] = Field(
        default=[],
        exclude_if=_absent,
        description="hashes of the new data's held-out groups, the 256 smallest: tells whether sets overlap",
    )
    bad_images: float = Field(description="share of generated images that are constant or not finite")
    usage: Usage = Field(description="how much each expert contributes")
    cost: Cost = Field(description="time and memory of one image")

    def kd(self, space: str, split: str = "new") -> float:
        """Return the kernel distance in one space on one split.

        Raises:
            KeyError: it was not measured.
        """
        for quality in self.quality:
            if (quality.space, quality.split) == (space, split):
                return quality.kd
        raise KeyError((space, split))

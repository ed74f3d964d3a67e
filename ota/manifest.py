"""The signed documents: what a bundle is, and how images are drawn with it. Who may install it is in `ota.policy`.

All are frozen values with a closed list of fields, and with a limit on every number and length that may come from outside. Their
canonical JSON is hashed and signed, so its keys are sorted.

A bundle is a closed set of files. File names never come from a document: on the device a file is named by its hash, and
its purpose is one of six roles.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

import ota
from ota import limits
from ota.errors import AgentError, ManifestError, printable
from ota.wording import first_fault

KiB, MiB = limits.KiB, limits.MiB
MAX_TABLE, MAX_GOLDEN, MAX_GRAPH, MAX_WEIGHTS = limits.MAX_TABLE, limits.MAX_GOLDEN, limits.MAX_GRAPH, limits.MAX_WEIGHTS
MAX_MANIFEST = 64 * KiB
MAX_TRACE = 4 * MiB
MAX_COUNT = 2**53
MOST_TAGS = 8  # of a device
MAX_TOLD = 500  # characters of a reason
FORM = 1  # `schema_version` of every document that this agent knows, but for these
FORMS = {"manifest": 4, "reference": 3, "samplertable": 2, "policy2": 2}  # newest forms, which older agents do not know
# Form 2 of manifest and reference allows a change of the images, that of the sampler table an interval of guidance. Form 3 of a
# manifest lets variants share weights, and form 4 holds a sample of the golden outputs (`ota.golden`).
MAX_ALLOWED = 0.1  # width of the range of an allowed statistic; pixel values span 2
MAX_BASES = 16  # bundles from which a change is allowed

# The types of all strings that may come from outside. Apart from `Told`, none can hold a separator of paths, URLs, headers or
# lines. Pydantic matches the patterns with Rust's regular expressions, in which `$` matches only the end of the text.
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]*$")]
"""Letters, digits, dots, dashes and underscores, or nothing: a hash of Git or DVC, a salt, the id of a boot."""
Tag = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,19}=[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
"""A name and a value by which an operator groups devices, such as site=berlin."""
Told = Annotated[str, Field(max_length=MAX_TOLD), AfterValidator(lambda text: printable(text)[:MAX_TOLD])]
"""Text for people. Parsing makes it printable, so only documents whose signature covers the received bytes may hold it."""
Bound = Annotated[str, StringConstraints(pattern=r"^(>=|<)[0-9]{1,6}(\.[0-9]{1,6}){0,3}$")]
"""One bound of a range of versions, such as >=1.20."""
SessionKey = Literal["session.qdq_matmulnbits_accuracy_level"]
"""The only setting of ONNX Runtime that a bundle may make. Others name files, or formats to parse."""
Setting = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}$")]
StatisticName = Literal["mean", "deviation", "edges"]
Role = limits.Role
VariantName = limits.VariantName
Precision = Literal["float32", "float16", "bfloat16", "int8"]
ROLES_OF_VARIANT: tuple[Role, ...] = ("weights", "sampler", "golden", "reference")
"""Roles of a variant's files; in form 3, an overlay may be in the place of the weights."""
SIZE_LIMITS = limits.SIZE_LIMITS
WEIGHTS_LOCATION = "weights.bin"  # name of the file of external weights in the graph

AGENT_VERSION = r"^[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}$"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


class Document(BaseModel):
    """A frozen value with a closed list of fields, hashed by its canonical JSON."""

    # No NaN and no infinity: neither is JSON, and a limit that is NaN would limit nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, allow_inf_nan=False)

    def canonical(self) -> bytes:
        """Return the canonical JSON: the bytes that are hashed and signed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def digest(self) -> str:
        """sha256 of the canonical bytes; for a manifest, the bundle's name."""
        return hashlib.sha256(self.canonical()).hexdigest()


AnyDocument = TypeVar("AnyDocument", bound=Document)


def as_numbers(version: str) -> tuple[int, ...]:
    """Convert a version to numbers that can be compared, up to the first part that is not a number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not (part.isascii() and part.isdigit()):
            break
        numbers.append(int(part))
    return tuple(numbers)


def parse(kind: type[AnyDocument], data: bytes, limit: int) -> AnyDocument:
    """Parse a document that comes from outside.

    Raises:
        AgentError: it needs a newer agent.
        ManifestError: it is too long, not JSON, or not of this form.
    """
    what = re.sub(r"(?<=[a-z])(?=\d)", " ", kind.__name__.lower())
    if len(data) > limit:
        raise ManifestError(f"the {what} has {len(data)} bytes, more than {limit}; publish a smaller one")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        if newer := _asks_for_newer(kind, data):
            raise AgentError(f"the {what} {newer}, but this is {ota.__version__}; update the agent first") from error
        raise ManifestError(f"the {what} is not valid: {first_fault(error, kind)}; it is not used") from error
    except RecursionError as error:
        raise ManifestError(f"the {what} is nested too deeply; do not use this repository") from error


def _asks_for_newer(kind: type[Document], data: bytes) -> str:
    """Say why a document needs a newer agent; empty: it does not.

    Reads only the two fields that say so, which every later form of a document keeps.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(said, dict):
        return ""
    form, minimum = said.get("schema_version"), str(said.get("minimum_agent") if "minimum_agent" in kind.model_fields else "")
    if re.fullmatch(AGENT_VERSION, minimum) and as_numbers(minimum) > as_numbers(ota.__version__):
        return f"needs agent {minimum}"
    if "schema_version" in kind.model_fields and isinstance(form, int) and form > FORMS.get(kind.__name__.lower(), FORM):
        return f"has form {form} and needs an agent that knows it"
    return ""


class FileEntry(Document):
    """One file of a bundle."""

    role: Role = Field(description="purpose of the file")
    variant: VariantName | None = Field(
        description="variant that the file belongs to; null for the graph, which all variants share"
    )
    size: int = Field(ge=1, le=MAX_WEIGHTS, description="bytes of the file")
    sha256: Sha256 = Field(description="hash of the file, which is also its name under objects/")
    base: VariantName | None = Field(
        default=None, description="of an overlay, the variant over whose weights it is put; other files do not have this field"
    )
    weights: Sha256 | None = Field(
        default=None, description="of an overlay, the hash of the weights that this makes; other files do not have this field"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        limits.check_file(self.role, self.variant, self.size)
        if (self.role == "overlay") != (self.base is not None) or (self.base is None) != (self.weights is None):
            raise ValueError("an overlay, and only an overlay, names its base and the weights that it makes")
        return self

    @model_serializer(mode="wrap")
    def _as_in_older_forms(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what only an overlay has, so that manifests of older forms keep their hashes."""
        said: dict[str, Any] = handler(self)
        return (
            said if self.role == "overlay" else {name: value for name, value in said.items() if name not in ("base", "weights")}
        )


class Origin(Document):
    """Where a bundle comes from: hashes that lead back to the data revision and the decision."""

    data_rev: Token = Field(max_length=64, description="Git commit of the data revision")
    data_md5: Token = Field(max_length=64, description="DVC's hash of the data folder")
    code: Sha256 = Field(description="hash of the program's code that trained the model")
    lineage: Sha256 = Field(description="hash of the model's lineage: data, settings, seed, parent")
    scorecard: Sha256 = Field(description="hash of the model's figures")
    decision: Sha256 = Field(description="ledger entry of the promotion; it names the entry before it")
    model: Token = Field(max_length=120, description="name of the model in MLflow")
    version: int = Field(ge=1, le=MAX_COUNT, description="version of the model in MLflow")


class Manifest(Document):
    """The manifest of a bundle: one line for one device class, in one to four variants. Its hash is the bundle's name."""

    schema_version: Literal[1, 2, 3, 4] = Field(
        default=1,
        description="version of this form; 2 where a reference allows a change of the images, 3 where variants share weights or one is turbo, "
        "4 where the golden outputs are a sample",
    )
    line: Name = Field(description="line (product) of the model")
    device_class: Name = Field(description="device class that the bundle is for")
    tier: Name = Field(max_length=20, description="size of the network")
    configuration: Literal["I", "II"] = Field(description="stride of the first convolution: I is 2, II is 1")
    precision: Precision = Field(description="how the weights are stored")
    variants: list[VariantName] = Field(min_length=1, max_length=4, description="variants in the bundle")
    default_variant: VariantName = Field(description="variant that a device uses unless it is told otherwise")
    files: list[FileEntry] = Field(min_length=5, max_length=17, description="all files of the bundle")
    origin: Origin = Field(description="where the bundle comes from")
    minimum_agent: str = Field(pattern=AGENT_VERSION, description="oldest version of ferry-agent that can use the bundle")

    @model_validator(mode="after")
    def _closed(self) -> Self:
        expected = {("graph", None)} | {(role, v) for v in self.variants for role in ROLES_OF_VARIANT}
        found = [("weights" if entry.role == "overlay" else entry.role, entry.variant) for entry in self.files]
        if len(set(self.variants)) != len(self.variants) or self.default_variant not in self.variants:
            raise ValueError("the default variant must be one of the variants, and each is listed once")
        if len(found) != len(set(found)) or set(found) != expected:
            raise ValueError("the files are not one graph and four files for each variant")
        overlays = [entry for entry in self.files if entry.role == "overlay"]
        if self.schema_version < 3 and (overlays or "turbo" in self.variants or len(self.variants) > 3):
            raise ValueError("only forms from 3 on hold overlays, four variants or the variant turbo")
        plain = {entry.variant for entry in self.files if entry.role == "weights"}
        if any(entry.base not in plain for entry in overlays):
            raise ValueError("the base of an overlay is not a variant of this bundle that has weights of its own")
        if self.schema_version >= 3 and any(entry.size != self.objects[entry.sha256].size for entry in self.files):
            raise ValueError("a file is listed with two sizes")
        return self

    def entry(self, role: Role, variant: VariantName | None = None) -> FileEntry:
        """Return the file of a role; all roles but the graph need a `variant`, which has either weights or an overlay."""
        return next(e for e in self.files if (e.role, e.variant) == (role, variant))

    def overlay(self, variant: VariantName) -> FileEntry | None:
        """Return the overlay that makes the weights of a variant; None: it has a file of weights."""
        return next((e for e in self.files if (e.role, e.variant) == ("overlay", variant)), None)

    def weights_sha256(self, variant: VariantName) -> str:
        """Return the hash of the weights that a variant computes with, whichever file they come from."""
        made = self.overlay(variant)
        return made.weights if made and made.weights else self.entry("weights", variant).sha256

    @property
    def objects(self) -> dict[str, FileEntry]:
        """The files by hash, each as it is listed first; variants may share files."""
        found: dict[str, FileEntry] = {}
        for entry in self.files:
            found.setdefault(entry.sha256, entry)
        return found

    @property
    def made(self) -> list[FileEntry]:
        """The files that a delta to this bundle makes, in order; before form 3, it makes a shared file once for each variant."""
        return self.files if self.schema_version < 3 else [*self.objects.values()]

    @property
    def size(self) -> int:
        """Bytes of all files: what a device without a base downloads, in addition to the manifest."""
        return sum(entry.size for entry in self.objects.values())


class Image(Document):
    """Shape of a line's images."""

    channels: Literal[1, 3] = Field(description="1 is grey, 3 is colour")
    size: int = Field(ge=8, le=128, description="side in pixels")


class Runtime(Document):
    """Versions of ONNX Runtime that compute what was scored, and the settings of the session."""

    onnxruntime: list[Bound] = Field(
        min_length=2, max_length=2, description="versions of ONNX Runtime: lower bound (>=), upper bound (<)"
    )
    graph_optimization_level: Literal["all", "extended", "basic", "disabled"] = Field(
        description="how far the runtime optimizes the graph"
    )
    config: dict[SessionKey, Setting] = Field(max_length=16, description="settings of the session")


class SamplerTable(Document):
    """`sampler.json`: everything needed to draw an image with a graph and its weights."""

    schema_version: Literal[1, 2] = Field(description="version of this form; 2 where guidance has an interval")
    variant: VariantName = Field(description="variant that the table is for")
    method: Literal["euler", "heun", "ab2", "mean"] = Field(description="solver")
    times: list[float] = Field(min_length=2, max_length=1001, description="times of the sampling steps, falling from 1 to 0")
    guidance: float = Field(ge=1, le=20, description="guidance scale; 1 is unguided")
    guidance_low: float = Field(default=0, ge=0, lt=1, description="time below which nothing is guided")
    guidance_high: float = Field(default=1, gt=0, le=1, description="time above which nothing is guided")
    image: Image = Field(description="shape of the images")
    text_length: int = Field(ge=4, le=256, description="bytes of a caption that the network reads")
    runtime: Runtime = Field(description="ONNX Runtime that computes what was scored")

    @model_validator(mode="after")
    def _falling(self) -> Self:
        if not all(1 >= a > b >= 0 for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("the times must fall from 1 to 0")
        if self.times[0] != 1 or self.times[-1] != 0:
            raise ValueError("the first time must be 1, which is noise, and the last one 0, which is the image")
        return self

    @model_validator(mode="after")
    def _has_an_interval(self) -> Self:
        if self.guidance_low >= self.guidance_high:
            raise ValueError("guidance_low must lie below guidance_high")
        if self.schema_version < 2 and (self.guidance_low, self.guidance_high) != (0, 1):
            raise ValueError("only form 2 limits the guidance to an interval")
        return self


class Trace(Document):
    """Load of the experts while one image was drawn, as `ferry-agent generate --trace` stores it. No report ever contains it."""

    schema_version: Literal[1] = Field(default=1, description="version of this form")
    line: Name = Field(description="line of the bundle")
    bundle: Sha256 = Field(description="hash of the manifest of the bundle that drew the image")
    variant: VariantName = Field(description="variant that drew it")
    caption: str = Field(max_length=1024, description="caption of the image")
    seed: int = Field(ge=0, lt=2**128, description="seed of the image")
    method: Literal["euler", "heun", "ab2", "mean"] = Field(description="solver")
    guidance: float = Field(ge=1, le=20, description="guidance scale; 1 is unguided")
    times: list[float] = Field(min_length=2, max_length=1001, description="times of the sampling steps")
    load: list[list[list[Annotated[float, Field(ge=0)]]]] = Field(description="load of each expert, by step and block")

    @model_validator(mode="after")
    def _regular(self) -> Self:
        steps, shapes = len(self.times) - 1, {tuple(map(len, step)) for step in self.load}
        if len(self.load) != steps or len(shapes) != 1 or len({*next(iter(shapes))}) != 1:
            raise ValueError("the load must have a row for each step, with as many blocks and experts at every step")
        return self


class Golden(Document):
    """How close a device must come to the golden outputs."""

    tolerance: float = Field(gt=0, le=0.1, description="largest difference of a value that counts as equal")
    share: float = Field(gt=0.5, le=1, description="smallest share of values that must be equal")


class Range(Document):
    """Lowest and highest value among the golden images."""

    low: float = Field(description="lowest value")
    high: float = Field(description="highest value")


class Allowed(Document):
    """A change of the images that the factory wants: devices that run one of these bundles accept it.

    It is as narrow as it can be, so that it does not switch the trial off: named statistics, each in a narrow range, from named
    bundles. `models` signs it with the bundle, so the online keys of other roles cannot make one.
    """

    bases: list[Sha256] = Field(
        min_length=1, max_length=MAX_BASES, description="hashes of the manifests of the bundles from which the change is allowed"
    )
    statistics: dict[StatisticName, Range] = Field(
        min_length=1, description="range of each statistic that may differ from the running model's, at most 0.1 wide"
    )
    reason: Told = Field(description="why the change is wanted, as a person gave it")

    @model_validator(mode="after")
    def _narrow(self) -> Self:
        if any(not 0 <= found.high - found.low <= MAX_ALLOWED + 1e-9 for found in self.statistics.values()):
            raise ValueError(f"an allowed range is at most {MAX_ALLOWED} wide, and does not end before it begins")
        return self


MOST_CAPTIONS = 64  # that a release lists
MAX_CAPTION = 64  # characters of each


def _shown(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds a character that cannot be printed")
    return text


ListedCaption = Annotated[str, Field(min_length=1, max_length=MAX_CAPTION), AfterValidator(_shown)]
"""A caption of the data. A device compares it with what it is asked to draw, and shows it nowhere."""


class Reference(Document):
    """`reference.json`: measurements of a bundle in the factory, with which devices compare their own."""

    schema_version: Literal[1, 2, 3] = Field(
        description="version of this form; 2 where it allows a change, 3 where it lists captions"
    )
    golden: Golden = Field(description="how close a device must come to the golden outputs")
    load: list[list[float]] = Field(min_length=1, max_length=256, description="mean load of each expert of each block")
    statistics: dict[StatisticName, Range] = Field(
        description="range of brightness, contrast and edge strength of the golden images"
    )
    latency_ms: float = Field(gt=0, description="budget for one image")
    allowed: Allowed | None = Field(default=None, description="change of the images that the factory wants; null: none")
    captions: list[ListedCaption] = Field(
        default=[],
        max_length=MOST_CAPTIONS,
        description="most frequent captions of the held-out images, by which devices count what they draw; of a bundle, the first variant has them",
    )

    @model_validator(mode="after")
    def _form_says_so(self) -> Self:
        if self.allowed and self.schema_version < 2:
            raise ValueError("only form 2 allows a change of the images")
        if self.captions and self.schema_version < 3:
            raise ValueError("only form 3 lists captions")
        return self

"""The documents of a PoC: the kit that the factory packs, and the result that a board gives back.

A kit is a folder with `kit.json` and the files that it lists. It holds networks with untrained weights, which cost a board what
trained ones cost. A network is a bank of equal blocks, so a kit holds one block of a network and says how often it is repeated:
a tenth of the bytes, and the board loads as many weights as it would later.

A kit is not signed: it brings the program that reads it. What a kit says is checked all the same, because a stick may be damaged.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from ota import limits
from ota.errors import printable
from ota.manifest import AGENT_VERSION, MAX_COUNT, Document, Image, Name, Precision, Sha256, Told, VariantName

KIT, OBJECTS = "kit.json", "objects"
MAX_KIT = 1024 * 1024
MAX_RESULT = 4 * 1024 * 1024
FIRST_AGENT = "0.2.0"
NOT_MEASURED = "not measured"

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,99}$")]
MAX_REASON = 4000  # characters
Reason = Annotated[str, Field(max_length=MAX_REASON), AfterValidator(lambda text: printable(text)[:MAX_REASON])]
"""Sentences for people: a sensor's path, or what ONNX Runtime said."""
Amount = Annotated[float, Field(ge=0, le=1e9)]


class KitFile(Document):
    """A file of a kit beside `kit.json`: in `objects/` by its hash, or by a name."""

    name: FileName | None = Field(
        default=None, description="name of the file; null: it lies in objects/ and its hash is its name"
    )
    size: int = Field(ge=1, le=limits.MAX_WEIGHTS, description="bytes of the file")
    sha256: Sha256 = Field(description="hash of the file")


class Part(Document):
    """A piece of the weights: a file, so many times in a row."""

    sha256: Sha256 = Field(description="hash of the file")
    times: int = Field(ge=1, le=256, description="how often it is repeated")


class Network(Document):
    """What a candidate is: the choices that the factory can make, and the sizes that follow from them."""

    tier: Name = Field(max_length=20, description="size of the network")
    configuration: Literal["I", "II"] = Field(description="stride of the first convolution: I is 2, II is 1")
    variant: VariantName = Field(description="variant whose sampler is used")
    precision: Precision = Field(description="how the weights are stored")
    blocks: int = Field(ge=1, le=256, description="equal blocks of the network")
    tokens: int = Field(ge=1, le=2**20, description="positions of an image that the blocks see")
    evaluations: int = Field(ge=1, le=10_000, description="network evaluations for one image")
    weights_bytes: int = Field(ge=1, le=limits.MAX_WEIGHTS, description="bytes of the weights, as devices store them")

    @property
    def key(self) -> str:
        """Name of the candidate: TIER/CONFIGURATION/VARIANT/PRECISION."""
        return f"{self.tier}/{self.configuration}/{self.variant}/{self.precision}"


class Entry(Network):
    """A candidate of a kit, and its files."""

    graph: Sha256 = Field(description="hash of the graph")
    sampler: Sha256 = Field(description="hash of the sampler's table")
    weights: list[Part] = Field(min_length=1, max_length=8, description="pieces of the weights, in order")
    weights_sha256: Sha256 = Field(description="hash of the whole weights")

    @property
    def objects(self) -> set[str]:
        """Hashes of all its files."""
        return {self.graph, self.sampler, *(part.sha256 for part in self.weights)}


class Kit(Document):
    """`kit.json`: what a kit holds."""

    schema_version: Literal[1] = Field(default=1, description="version of this form")
    minimum_agent: str = Field(pattern=AGENT_VERSION, description="oldest version of ferry-agent that can measure it")
    made_by: str = Field(pattern=AGENT_VERSION, description="version of ferry that made it, and of the agent in it")
    line: Name = Field(description="line (product) whose images it draws")
    image: Image = Field(description="shape of the images")
    text_length: int = Field(ge=4, le=256, description="bytes of a caption that the networks read")
    entries: list[Entry] = Field(min_length=1, max_length=256, description="the candidates")
    files: list[KitFile] = Field(min_length=1, max_length=1024, description="every file of the kit but kit.json")

    @model_validator(mode="after")
    def _closed(self) -> Self:
        sizes = {file.sha256: file.size for file in self.files if file.name is None}
        if len({entry.key for entry in self.entries}) < len(self.entries):
            raise ValueError("a candidate is listed twice")
        for entry in self.entries:
            if not entry.objects <= sizes.keys():
                raise ValueError(f"a file of {entry.key} is not listed")
            if sizes[entry.graph] > limits.MAX_GRAPH or sizes[entry.sampler] > limits.MAX_TABLE:
                raise ValueError(f"a file of {entry.key} is over its limit")
            if sum(sizes[part.sha256] * part.times for part in entry.weights) != entry.weights_bytes:
                raise ValueError(f"the pieces of {entry.key} do not add up to its weights")
        return self

    def size(self, sha256: str) -> int:
        """Return the bytes of a file in `objects/`."""
        return next(file.size for file in self.files if file.sha256 == sha256 and file.name is None)


class Board(Document):
    """What a board is. It has no name, number or address of the board: it says which kind of board it is, not which board."""

    model: Told = Field(description="model of the board, as its maker wrote it; empty: not known")
    cpu: Told = Field(description="model of the processor")
    architecture: Told = Field(description="machine type, such as aarch64")
    cores: int = Field(ge=1, le=65_536, description="cores that a process may use")
    memory_mib: float = Field(ge=0, le=1e9, description="memory of the board")
    kernel: Told = Field(description="release of the kernel")
    system: Told = Field(description="name of the operating system")
    virtual: bool = Field(description="whether it is a virtual machine, whose host may give time to others")
    governor: Told = Field(description="how the processor's frequency is governed; empty: not readable")
    megahertz: float | None = Field(
        default=None, ge=0, le=1e6, description="highest frequency of the processor; null: not readable"
    )
    celsius: list[float] = Field(
        max_length=2, description="highest temperature before and after the measurement; empty: not readable"
    )
    power: Told = Field(description="what feeds the board; empty: not readable")
    busy: float = Field(ge=0, le=1e6, description="average number of running processes in the minute before")
    python: Told = Field(description="version of Python")
    numpy: Told = Field(description="version of NumPy")
    onnxruntime: Told = Field(description="version of ONNX Runtime")


class Joules(Document):
    """Energy of one image beyond idle, with its source, or why there is none."""

    joules: Amount | None = Field(description="joules of one image; null: not measured")
    low: float | None = Field(default=None, description="lower end of the 95 % interval")
    high: float | None = Field(default=None, description="upper end of the 95 % interval")
    source: Told = Field(description="sensor; 'not measured' if there is no figure")
    quality: Literal["measured", "partial", "model", "none"] = Field(description="what the sensor sees; none: there is no figure")
    reason: Reason = Field(description="which sensors were skipped, and what the figure leaves out")


class Measured(Network):
    """A candidate on a board: its figures, or why it has none."""

    images: int = Field(default=0, ge=0, le=MAX_COUNT, description="images that the times are taken from")
    first_seconds: Amount | None = Field(default=None, description="seconds from the start of the process to the first image")
    p50_seconds: Amount | None = Field(default=None, description="median of the images after the first")
    p95_seconds: Amount | None = Field(default=None, description="95th percentile of the images after the first")
    cpu_seconds: Amount | None = Field(
        default=None, description="processor seconds of an image: what other programs cannot stretch"
    )
    peak_mib: Amount | None = Field(default=None, description="peak memory of the process")
    bare_mib: Amount | None = Field(default=None, description="part of it before the network is loaded")
    energy: Joules | None = Field(default=None, description="energy of one image; null: nobody asked for it")
    failed: Reason = Field(default="", description="why it was not measured; empty: it was")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        figures = (self.first_seconds, self.p50_seconds, self.p95_seconds, self.cpu_seconds, self.peak_mib, self.bare_mib)
        if any(figure is None for figure in figures) != bool(self.failed):
            raise ValueError("a candidate has figures, or a reason why it has none")
        return self


class PocResult(Document):
    """What a board gives back: `ferry-agent bench --kit DIR --json`."""

    schema_version: Literal[1] = Field(default=1, description="version of this form")
    kit: Sha256 = Field(description="hash of the kit.json")
    agent: str = Field(pattern=AGENT_VERSION, description="version of ferry-agent that measured")
    line: Name = Field(description="line (product) of the kit")
    image: Image = Field(description="shape of the images")
    made: int = Field(ge=0, le=MAX_COUNT, description="seconds since 1970 by the board's clock")
    board: Board = Field(description="the board")
    rows: list[Measured] = Field(min_length=1, max_length=256, description="the candidates, in the kit's order")

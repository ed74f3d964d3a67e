"""Choices for a model, as rows of three tables: tier, configuration, variant.

A *tier* is the size of the network, a *configuration* the stride of its initial convolution, a *variant* what a device can
choose between, by quality, time or energy: weights with a table of sampling steps. A fourth choice, the line (the product that the data show), is not made here.

    >>> config = ModelConfig(tier="nano", configuration="I", image_size=16, channels=1)
    >>> config.tokens, config.blocks
    (64, 6)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from model.errors import ConfigError

TierName = Literal["test", "nano", "small", "base"]
ConfigurationName = Literal["I", "II"]
VariantName = Literal["full", "dev", "fast", "turbo"]
PrecisionName = Literal["float32", "float16", "bfloat16", "int8"]
RouterName = Literal["expert-choice", "token-choice"]
AblationName = Literal["none", "no-conv", "positions", "dense", "single-stream"]

HELD_OUT_PERMILLE = 150  # share of a data set's groups, in thousandths, that is never trained on
MEMORY_IMAGES = 2000  # training images that are searched for copies; copies of others are not found
MAX_TEXT = 256  # caption bytes that a network can read
BYTE_VOCABULARY = 257  # id 0 pads, id 1 + b is the byte b of a UTF-8 caption


@dataclass(frozen=True)
class Tier:
    """Sizes of the block, which all block instances share, and the numbers of layers."""

    width: int  # D, the embedding dimension
    heads: int
    experts: int  # E routed experts in each block
    active: int  # k: every token meets k routed experts on average
    expert_width: int  # H, hidden width of a routed expert
    shared_width: int  # S, hidden width of the shared expert
    dual: int  # layers in which image and text have a block instance each
    single: int  # layers in which one instance serves both


TIERS: dict[str, Tier] = {
    "test": Tier(width=32, heads=2, experts=4, active=1, expert_width=32, shared_width=32, dual=1, single=1),
    "nano": Tier(width=128, heads=4, experts=4, active=1, expert_width=192, shared_width=192, dual=1, single=4),
    "small": Tier(width=192, heads=6, experts=8, active=2, expert_width=256, shared_width=256, dual=2, single=6),
    "base": Tier(width=384, heads=6, experts=8, active=2, expert_width=512, shared_width=512, dual=3, single=9),
}

CONFIGURATIONS: dict[str, int] = {"I": 2, "II": 1}  # stride of the initial convolution


SourceName = Literal["training", "table", "student"]
"""Where a variant's weights come from: its own training; `full`'s weights with another sampler table; a student of `full`."""


@dataclass(frozen=True)
class Variant:
    """How a variant draws, and where its weights may come from."""

    divisor: int  # with `full`'s weights it takes this part of the steps of `full`
    shift: float  # grid of these steps: that of `full` times this (docs/decisions/0117)
    student_steps: int  # steps of a student, each of which is one evaluation
    sources: tuple[SourceName, ...]  # in the order in which they are tried: the cheapest comes first


VARIANTS: dict[VariantName, Variant] = {  # from the highest to the lowest quality and cost
    "full": Variant(divisor=1, shift=1.0, student_steps=8, sources=("training",)),
    "dev": Variant(divisor=2, shift=0.7, student_steps=8, sources=("table", "student")),
    "fast": Variant(divisor=4, shift=0.5, student_steps=8, sources=("table", "student")),
    "turbo": Variant(divisor=7, shift=1.0, student_steps=4, sources=("student",)),
}


@dataclass(frozen=True)
class Ablation:
    """One component of the network switched off or replaced, to measure its benefit; such a network is never exported."""

    convolved: bool = True  # positions come from the depthwise convolution
    positions: bool = False  # ... or from sinusoids added to every token
    routed: bool = True  # False: one dense feed-forward layer, as wide as all experts that a token uses
    dual: bool = True  # False: all layers are single-stream; their number stays the same


ABLATIONS: dict[str, Ablation] = {
    "none": Ablation(),
    "no-conv": Ablation(convolved=False),
    "positions": Ablation(convolved=False, positions=True),
    "dense": Ablation(routed=False),
    "single-stream": Ablation(dual=False),
}


class ModelConfig(BaseModel):
    """All settings that determine the tensor shapes of one network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tier: TierName = Field(default="nano", description="size of the network")
    configuration: ConfigurationName = Field(default="I", description="stride of the first convolution: I is 2, II is 1")
    image_size: int = Field(default=16, ge=8, le=128, description="side of the square image, in pixels")
    channels: Literal[1, 3] = Field(default=1, description="colour channels: 1 is grey, 3 is colour")
    text_length: int = Field(default=24, ge=4, le=MAX_TEXT, description="bytes of a caption that the network reads")
    router: RouterName = Field(default="expert-choice", description="who chooses: experts their tokens, or tokens their experts")
    ablation: AblationName = Field(default="none", description="part of the network that is switched off, for measurements only")

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.image_size % self.stride:
            raise PydanticCustomError(  # pydantic prefixes the message of a ValueError with "Value error, "
                "image_size",
                "image size {size} is not divisible by the stride {stride} of configuration {name}; choose a multiple of {stride}",
                {"size": self.image_size, "stride": self.stride, "name": self.configuration},
            )
        return self

    @property
    def shape(self) -> Tier:
        """Sizes of the tier, as the ablation changes them."""
        tier = TIERS[self.tier]
        if not self.switched.routed:
            tier = replace(tier, experts=0, active=0, shared_width=tier.shared_width + tier.active * tier.expert_width)
        if not self.switched.dual:
            tier = replace(tier, dual=0, single=tier.dual + tier.single)
        return tier

    @property
    def switched(self) -> Ablation:
        """Switches of the ablation."""
        return ABLATIONS[self.ablation]

    @property
    def stride(self) -> int:
        """Stride of the initial convolution."""
        return CONFIGURATIONS[self.configuration]

    @property
    def side(self) -> int:
        """Side of the feature map, in positions."""
        return self.image_size // self.stride

    @property
    def tokens(self) -> int:
        """Image positions that the blocks see, N."""
        return self.side**2

    @property
    def blocks(self) -> int:
        """Block instances, M: two for each dual layer, one for each single layer."""
        return 2 * self.shape.dual + self.shape.single

    def capacity(self, tokens: int) -> int:
        """Return how many of `tokens` each routed expert takes under expert choice: ceil(tokens * k / E); 0 without experts."""
        return -(-tokens * self.shape.active // max(1, self.shape.experts))

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON of this configuration."""
        return canonical_sha256(self.model_dump())


def check_same_pictures(who: str, drawn: tuple[int, int], wanted: ModelConfig) -> None:
    """Refuse to compare pictures of different formats.

    Args:
        who: name of the model, for the message.
        drawn: size and channels of the pictures that it draws.
        wanted: configuration whose pictures are to be compared with them.

    Raises:
        ConfigError: the model draws another size or other channels than the configuration.
    """
    if drawn != (wanted.image_size, wanted.channels):
        raise ConfigError(
            f"{who} draws {drawn[0]} pixels in {drawn[1]} channel{'s' * (drawn[1] != 1)}, but ferry.toml asks for {wanted.image_size} in "
            f"{wanted.channels}; add a line of its own for images of another format"
        )


def canonical_json(value: object) -> bytes:
    """Serialise a value as JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def canonical_sha256(value: object) -> str:
    """Hash the `canonical_json` of a value with SHA-256; return hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()

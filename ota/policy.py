"""Who may install which release, and when: the two policies of a line and class, both signed by the rollout role.

`rollout/LINE/CLASS.json` (`Policy`) opens a release in timed waves. Agents before 0.3, and devices without reports, are let in by it alone.
`rollout/LINE/CLASS.2.json` (`Policy2`) stands beside it. It opens a release only as far as somebody, who saw how the devices before
fared, has signed. Agents before 0.3 do not read it. All others obey it where it is there.

Neither can bring in bytes: what a policy names must be in `models`, under the same number. Both hold no floats.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ota.limits import KiB
from ota.manifest import MAX_COUNT, Document, Name, Sha256, Tag, Token

MAX_POLICY = 16 * KiB
MAX_POLICY_2 = 48 * KiB  # three lists of `MAX_NAMED` names, and 8 KiB for everything else
MAX_WAVES = 16  # of a rollout
MAX_NAMED = 200  # names in one list
BUCKETS = 2**32
"""Number of buckets under policy 2; a limit of this many lets every device in."""
HEARTBEAT = 6 * 3600  # seconds between two heartbeats where no policy says otherwise
LONGEST_SPREAD = 7 * 86_400
FEATURES: frozenset[str] = frozenset()
"""Names in `requires` that this version knows. What form 2 itself holds needs no name."""

Named = Annotated[list[Name | Tag], Field(max_length=MAX_NAMED)]
"""Devices: ids, or tags such as site=berlin."""


class Wave(Document):
    """A step of a rollout: from `not_before` on, devices whose bucket lies below `bps` may install the release."""

    bps: int = Field(ge=0, le=10_000, description="share of the fleet in basis points")
    not_before: int = Field(ge=0, le=MAX_COUNT, description="seconds since 1970, UTC")


class Policy(Document):
    """Which release the devices of one line and class may install, and when: in timed waves, without a look at how it fares."""

    schema_version: Literal[1] = Field(default=1, description="version of this form")
    line: Name = Field(description="line (product) of the devices that the policy is for")
    device_class: Name = Field(description="device class of the devices that the policy is for")
    seq: int = Field(ge=1, le=MAX_COUNT, description="release number of the named bundle")
    manifest: Sha256 = Field(description="hash of the manifest of the bundle to install")
    salt: Token = Field(max_length=64, description="new for each release, so that the first devices are not always the same")
    waves: list[Wave] = Field(max_length=MAX_WAVES, description="steps of the rollout")
    halt: bool = Field(default=False, description="whether no further device may install the release")
    revert: bool = Field(default=False, description="whether the named release is older than what runs, on purpose")

    @model_validator(mode="after")
    def _widening(self) -> Self:
        if any(a.bps >= b.bps or a.not_before > b.not_before for a, b in pairwise(self.waves)):
            raise ValueError("each wave must be wider than the one before it, and not earlier")
        return self


class Fallback(Document):
    """The last release that was open to all devices: what a device installs that has nothing and is not let in yet."""

    model_config = ConfigDict(extra="ignore")

    seq: int = Field(ge=1, le=MAX_COUNT, description="its release number")
    manifest: Sha256 = Field(description="hash of the manifest of its bundle")


class Policy2(Document):
    """Which release devices of one line and class may install that can be heard: as far as somebody has opened it.

    Fields that a later version adds are ignored, unlike those of all other documents. What an agent must not ignore is named in `requires`.
    """

    model_config = ConfigDict(extra="ignore")

    schema_version: Literal[2] = Field(default=2, description="version of this form")
    line: Name = Field(description="line (product) of the devices that the policy is for")
    device_class: Name = Field(description="device class of the devices that the policy is for")
    seq: int = Field(ge=1, le=MAX_COUNT, description="release number of the named bundle")
    manifest: Sha256 = Field(description="hash of the manifest of the bundle to install")
    salt: Token = Field(max_length=64, description="new for each release, so that the first devices are not always the same")
    policy: int = Field(ge=1, le=MAX_COUNT, description="number of the policy, which rises; devices refuse a lower one")
    limit: int = Field(ge=0, le=BUCKETS, description="devices whose bucket of 32 bits lies below it may install the release")
    steps: list[Annotated[int, Field(ge=1, le=BUCKETS)]] = Field(
        default=[],
        max_length=MAX_WAVES,
        description="limits that are meant to be opened one after the other; devices do not read them",
    )
    not_before: int = Field(default=0, ge=0, le=MAX_COUNT, description="seconds since 1970 from which devices may install it")
    until: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="seconds since 1970 from which no further device may; 0: no end"
    )
    first: Named = Field(default=[], description="devices that the limit does not keep out: ids, or tags such as site=berlin")
    only: Named = Field(default=[], description="devices that alone may install the release; empty: all")
    never: Named = Field(default=[], description="devices that may not install the release")
    acknowledge: bool = Field(
        default=False, description="whether a device switches only after the factory has kept its report that it starts"
    )
    spread: int = Field(
        default=0, ge=0, le=LONGEST_SPREAD, description="seconds over which devices begin that are let in at the same moment"
    )
    heartbeat: int = Field(default=HEARTBEAT, ge=3600, le=86_400, description="seconds between two heartbeats of a device")
    halt: bool = Field(default=False, description="whether no further device may install the release")
    revert: bool = Field(default=False, description="whether the named release is older than what runs, on purpose")
    retry: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="rises to let devices that refused the release try it once more"
    )
    fallback: Fallback | None = Field(default=None, description="last release that was open to all devices; null: none")
    requires: list[Name] = Field(default=[], max_length=16, description="what an agent must know to obey this policy")

    def canonical(self) -> bytes:
        """Return the bytes that are signed: what has its default is left out, which saves each device 70 packed bytes an update."""
        said = self.model_dump(mode="json", exclude_defaults=True) | {"schema_version": self.schema_version}
        return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError("the steps must rise")
        if self.until and self.until <= self.not_before:
            raise ValueError("a rollout ends after it begins")
        return self

"""What devices tell the factory: signed reports, the heartbeat among them, how they are enrolled, and what the factory answers.

A report is a JSON document of one line. Reports of forms 1 and 2 hold the report as an object, and the signature covers its canonical bytes.
From form 3 on they hold it as a text, and the signature covers a context and exactly the bytes of that text. So nobody has to write the
document again to verify it, and a signature made for something else can never pass for a report.

A batch is up to `MOST_REPORTS` such lines. The answer to it names every report that it is about by number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from ota.errors import ManifestError
from ota.limits import KiB, VariantName
from ota.manifest import AGENT_VERSION, MAX_COUNT, MOST_TAGS, Document, Name, Sha256, StatisticName, Tag, Token, Told, parse

Event = Literal["installed", "starting", "confirmed", "rolled_back", "refused", "base_corrupt", "strayed", "new_agent", "alive"]
REPORT_FORM: Literal[3] = 3  # newest form of a report, which agents write and the factory reads
MAX_NUMBER = 2**31 - 1  # largest number of a report; fits into the integer column of every database
MAX_JUMP = 2**20  # how far above its own numbers a device follows the highest number that the factory has of it
MAX_REPORT = 16 * KiB  # bytes of one line
MOST_REPORTS = 20  # of a batch that a device sends
MAX_BATCH = 256 * KiB  # bytes of a batch, as it is sent and unpacked
MAX_ANSWER = 64 * KiB  # bytes of an answer that a device reads
BINS = 8  # of a histogram of an output statistic
CONTEXT = b"deltaferry report 3\n"
"""What the signature of a report of form 3 covers before the report's bytes."""
ENROLMENT = b"deltaferry enrolment 1\n"
"""What the signature of an enrolment covers before the token's sha256, the id, the line and the class."""

Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Source = Annotated[str, StringConstraints(pattern=r"^[ -~]{0,80}$")]
"""Where a figure comes from, in printable ASCII."""


class Outcome(Document):
    """How an update ended on a device."""

    event: Event = Field(description="what happened")
    manifest: Sha256 | None = Field(description="hash of the bundle that it happened to")
    time: Count = Field(description="seconds since 1970 by the device's clock")


class Health(Document):
    """How a device fares, in counters and histograms: no image, no caption's text, no seed.

    Counters only rise while `since` and `active` of the report stay the same, so a report that gets lost takes no count with it.
    """

    since: Count = Field(description="seconds since 1970 by the device's clock when this bundle began to be counted")
    share: Literal["all", "minimal"] = Field(description="minimal: nothing is told of what the images look like or are of")
    tags: list[Tag] = Field(default=[], max_length=MOST_TAGS, description="names and values that the device's owner gave it")
    variant: VariantName | None = Field(default=None, description="variant that drew last")
    images: Count = Field(default=0, description="images that were drawn")
    refused: Count = Field(default=0, description="requests that got no image, because they were wrong or too many")
    failed: Count = Field(default=0, description="requests that got no image, because no bundle drew it")
    not_finite: Count = Field(default=0, description="images that were constant or not finite, and were not given out")
    out_of_range: Count = Field(default=0, description="images with a statistic outside the range at the factory")
    late: Count = Field(default=0, description="images that took longer than the bundle's budget")
    p50_ms: float | None = Field(default=None, ge=0, le=1e9, description="median time of the latest images")
    p95_ms: float | None = Field(default=None, ge=0, le=1e9, description="95th percentile of the time of the latest images")
    joules: float | None = Field(default=None, ge=0, le=1e9, description="energy of an image, from the last `ferry-agent bench`")
    joules_source: Source = Field(default="", description="where that figure comes from")
    outcomes: list[Outcome] = Field(default=[], max_length=8, description="how the last updates ended, the newest last")
    totals: dict[Event, Count] = Field(
        default={}, description="how often each of them happened, of the newest 100 entries of the device's history"
    )
    dropped: Count = Field(default=0, description="reports that the full queue dropped before they were delivered")
    free: Count = Field(default=0, description="free bytes on the disk of the agent's directory")
    load: list[list[Count]] = Field(
        default=[],
        max_length=256,
        description="thousandths of a block's load that went to each expert, by block and expert, summed over the images; at most 256 numbers",
    )
    captions: list[Count] = Field(default=[], max_length=64, description="images of each caption of the release's list")
    other_captions: Count = Field(default=0, description="images of all other captions together")
    statistics: dict[StatisticName, Annotated[list[Count], Field(min_length=BINS, max_length=BINS)]] = Field(
        default={}, description="histogram of each output statistic: below the factory's range, six parts of it, above it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sum(map(len, self.load)) > 256 or len({*map(len, self.load)}) > 1:
            raise ValueError("the load has at most 256 numbers, as many for each block")
        if self.share == "minimal" and (self.load or self.captions or self.other_captions or self.statistics):
            raise ValueError("a minimal report tells nothing of the images")
        return self


class DeviceReport(Document):
    """What a device tells the factory: what happened and how it ran, never an image."""

    schema_version: Literal[1, 2, 3] = Field(
        default=1, description="version of this form; 2 names the agent, 3 knows the heartbeat and is signed with a context"
    )
    device: Name = Field(description="id of the device, which its owner chose")
    boot: Token = Field(max_length=64, description="id of the machine's present start; the kernel makes a new one at every start")
    number: int = Field(ge=1, le=MAX_NUMBER, description="rises by one with every report of this device")
    time: int = Field(ge=0, le=MAX_COUNT, description="seconds since 1970 by the device's clock")
    line: Name = Field(description="line (product) whose model the device runs")
    device_class: Name = Field(description="device class of the device")
    event: Event = Field(description="what happened")
    manifest: Sha256 | None = Field(description="hash of the bundle that the event is about")
    active: Sha256 | None = Field(description="hash of the bundle that runs now")
    reason: Told = Field(default="", description="why it happened, as a sentence of the agent; it quotes measurements and errors")
    received: int = Field(default=0, ge=0, le=MAX_COUNT, description="bytes fetched for this update, metadata included")
    milliseconds: int = Field(default=0, ge=0, le=MAX_COUNT, description="median time of one image, where it was measured")
    agent: str | None = Field(
        default=None,
        pattern=AGENT_VERSION,
        description="version of ferry-agent that wrote the report; agents before 0.2.0 leave it out",
    )
    health: Health | None = Field(default=None, description="of a heartbeat, how the device fares; no other report has it")

    @model_validator(mode="after")
    def _form_says_so(self) -> Self:
        if (self.agent is not None) != (self.schema_version >= 2):
            raise ValueError("form 2 names the agent, and form 1 does not")
        if (self.event == "alive") != (self.health is not None) or (self.health and self.schema_version < 3):
            raise ValueError("a heartbeat, and only a heartbeat, says how the device fares, from form 3 on")
        return self

    @model_serializer(mode="wrap")
    def _as_signed(self, rest: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what the report does not say, so that the bytes stay those that an older agent signed."""
        made: dict[str, Any] = rest(self)
        return {name: value for name, value in made.items() if value is not None or name not in ("agent", "health")}


class SignedReport(Document):
    """A report of form 1 or 2 with its signature: Ed25519 over the report's canonical bytes."""

    report: DeviceReport = Field(description="the report")
    signature: Signature = Field(description="signature of the report by the device's private key, which stays on the device")


class SealedReport(Document):
    """A report from form 3 on with its signature: Ed25519 over `CONTEXT` and the UTF-8 bytes of the text."""

    signed: Annotated[str, StringConstraints(pattern=r"^\{[ -~]*\}$")] = Field(
        max_length=MAX_REPORT, description="the report, as a JSON text in printable ASCII"
    )
    signature: Signature = Field(description="signature by the device's private key, which stays on the device")


@dataclass(frozen=True)
class Opened:
    """A report as it was received; nothing says yet who signed it."""

    report: DeviceReport
    message: bytes
    """What the signature covers."""
    signature: bytes
    line: bytes
    """The bytes that were received, without the end of the line."""

    def is_signed_by(self, public_key: str) -> bool:
        """Check the signature against a key of 64 hex digits."""
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(self.signature, self.message)
        except (InvalidSignature, ValueError):
            return False
        return True


def seal(report: DeviceReport, key: Ed25519PrivateKey) -> bytes:
    """Sign a report, and return the line that is sent."""
    text = report.canonical()
    signature = key.sign((CONTEXT if report.schema_version >= 3 else b"") + text).hex()
    if report.schema_version < 3:
        return json.dumps({"report": json.loads(text), "signature": signature}).encode()
    return json.dumps({"signed": text.decode(), "signature": signature}, separators=(",", ":")).encode()


def open_line(line: bytes) -> Opened:
    """Parse a report as it was received.

    Raises:
        ManifestError: it is too long, or is no report of a form that this version reads.
    """
    if len(line) > MAX_REPORT:
        raise ManifestError(f"the report has {len(line)} bytes, more than {MAX_REPORT}; look at the device that left it")
    try:
        found = json.loads(line.decode())  # UTF-8 alone, which a database can keep as text
        again = json.dumps(found).encode()  # drops duplicate fields, so that both parsers see the same value
        inner = json.loads(found["signed"]) if "signed" in found else found["report"]
        form = inner.get("schema_version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(
            "the report is not valid: it is not a JSON object with a report; look at the device that left it"
        ) from error
    if isinstance(form, int) and form > REPORT_FORM:
        raise ManifestError(
            f"the report has form {form}, which a newer ferry-agent writes, and this ferry reads up to form {REPORT_FORM}; install the newer "
            "ferry, and move the file back from rejected/"
        )
    if "signed" in found:
        sealed = parse(SealedReport, again, 8 * MAX_REPORT)
        text = sealed.signed.encode()
        report = parse(DeviceReport, json.dumps(inner).encode(), 8 * MAX_REPORT)
        if report.schema_version < 3:
            raise ManifestError(
                "the report is not valid: forms 1 and 2 are signed without a context; look at the device that left it"
            )
        return Opened(report, CONTEXT + text, bytes.fromhex(sealed.signature), line)
    signed = parse(SignedReport, again, 8 * MAX_REPORT)
    if signed.report.schema_version >= 3:
        raise ManifestError(
            "the report is not valid: from form 3 on, a context is signed with it; look at the device that left it"
        )
    # Made from what was received, not from what was parsed, because parsing makes text printable.
    message = json.dumps(inner, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return Opened(signed.report, message, bytes.fromhex(signed.signature), line)


class Refusal(BaseModel):
    """A report that the factory refuses for good, and why."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: int = Field(ge=1, le=MAX_NUMBER)
    code: str = Field(
        pattern=r"^[a-z_]{1,20}$", description="malformed, signature, line, conflict, retired, or one that later versions know"
    )
    reason: Told = Field(description="why, as a sentence")


class Answer(BaseModel):
    """What the factory answers to a batch; a report that it does not name is sent again."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    accepted: list[Annotated[int, Field(ge=1, le=MAX_NUMBER)]] = Field(
        max_length=1000, description="numbers that are kept, durably"
    )
    refused: list[Refusal] = Field(max_length=1000, description="numbers that will never be kept")
    highest: int = Field(ge=0, le=MAX_NUMBER, description="highest number that is kept of this device; 0: none")
    time: int = Field(ge=0, le=MAX_COUNT, description="seconds since 1970 by the factory's clock")


class Enrolment(Document):
    """What a device sends to be enrolled with a token that an operator gave it."""

    device: Name = Field(description="id of the device")
    line: Name = Field(description="line of the device")
    device_class: Name = Field(description="device class of the device")
    public_key: PublicKey = Field(description="the device's public key")
    token: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{16,128}$")] = Field(
        description="the token, which counts once"
    )
    signature: Signature = Field(description="of `message` by the device's key")

    @staticmethod
    def message(token: str, device: str, line: str, device_class: str) -> bytes:
        """Return what the signature covers: the context, the token's hash, the id, the line and the class."""
        return ENROLMENT + "\n".join([hashlib.sha256(token.encode()).hexdigest(), device, line, device_class]).encode()

    @property
    def is_signed(self) -> bool:
        """Whether the sender holds the key that it wants to be enrolled with."""
        message = self.message(self.token, self.device, self.line, self.device_class)
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public_key)).verify(bytes.fromhex(self.signature), message)
        except (InvalidSignature, ValueError):
            return False
        return True

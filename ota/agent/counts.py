"""What a device counts of the images that it draws: numbers by bundle, in one small file. No image, caption or seed is in it.

`serve` and `generate` count. They share the file under a lock of its own, so that neither waits for an update. A file that is lost only
loses counts, and a count that cannot be written is no reason to give no image.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ota import fitness
from ota.agent.state import MAX_STATE, Home
from ota.errors import BusyError, DeviceError, StateError
from ota.manifest import MAX_COUNT, MOST_CAPTIONS, Range, Reference, Sha256, StatisticName, VariantName
from ota.report import BINS

FILE = "counts.json"
LOCK = "counting"
KEPT = 200  # image times of a bundle, the newest
MOST_BUNDLES = 4  # of which counts are kept, the last that were counted
MOST_LOAD = 256  # numbers of an expert load that leave a device
PARTS = BINS - 2  # of the factory's range, in a histogram
LOCK_WAIT = 0.5  # seconds

Missed = Literal["refused", "failed", "not_finite"]
Number = Annotated[int, Field(ge=0, le=MAX_COUNT)]

log = logging.getLogger(__name__)


class Counts(BaseModel):
    """Counts of one bundle on this device."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, defer_build=True)

    since: Number
    """Seconds since 1970 by the device's clock."""
    variant: VariantName | None = None
    """The one that drew last."""
    images: Number = 0
    refused: Number = 0
    failed: Number = 0
    not_finite: Number = 0
    out_of_range: Number = 0
    late: Number = 0
    took: list[Annotated[float, Field(ge=0)]] = Field(default=[], max_length=KEPT)
    """Milliseconds of the newest images."""
    load: list[list[Annotated[float, Field(ge=0)]]] = Field(default=[], max_length=MOST_LOAD)
    """Share of each block's load on each expert [M][E], summed over the images."""
    captions: list[Number] = Field(default=[], max_length=MOST_CAPTIONS)
    """Images of each caption of the release's list, in its order."""
    other_captions: Number = 0
    statistics: dict[StatisticName, list[Number]] = {}

    def drew(
        self, variant: VariantName, caption: str, answer: Mapping[str, Any], reference: Reference, listed: Sequence[str] = ()
    ) -> None:
        """Count an image.

        Args:
            variant: the variant that drew it.
            caption: what was asked for; only its place in the release's list is kept.
            answer: what the child process said of it, see `child.Drawing.draw`.
            reference: the variant's measurements at the factory.
            listed: captions of the release's list.
        """
        self.variant, self.images = variant, self.images + 1
        self.took = [*self.took, round(answer["milliseconds"], 1)][-KEPT:]
        self.late += answer["milliseconds"] > reference.latency_ms
        self.out_of_range += bool(fitness.outside(answer["statistics"], reference))
        for name, value in answer["statistics"]:
            if expected := reference.statistics.get(name):
                self.statistics.setdefault(name, [0] * BINS)[bin_of(value, expected)] += 1
        if listed:
            places = [0] * len(listed)
            if caption in listed:
                places[listed.index(caption)] = 1
            else:
                self.other_captions += 1
            (self.captions,) = added([self.captions], [places])
        shares = [[mass / (sum(row) or 1.0) for mass in row] for row in answer["load"]]
        self.load = added(self.load, shares) if sum(map(len, shares)) <= MOST_LOAD else []

    def add(self, more: Counts) -> None:
        """Add what was counted later."""
        self.variant = more.variant or self.variant
        for name in ("images", "refused", "failed", "not_finite", "out_of_range", "late", "other_captions"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.took = [*self.took, *more.took][-KEPT:]
        self.load = added(self.load, more.load)
        (self.captions,) = added([self.captions], [more.captions])
        for name, bins in more.statistics.items():
            (self.statistics[name],) = added([self.statistics.get(name, [])], [bins])


def added(one: list[list[Any]], more: list[list[Any]]) -> list[list[Any]]:
    """Add two tables of numbers; where their shapes differ, the second one counts alone."""
    if [*map(len, one)] != [*map(len, more)]:
        return more if any(more) else one
    return [[a + b for a, b in zip(row, other, strict=True)] for row, other in zip(one, more, strict=True)]


def bin_of(value: float, expected: Range) -> int:
    """Return the bin of a statistic: 0 below the factory's range, 1 to 6 in equal parts of it, 7 above; the range has a least width."""
    middle, width = (expected.low + expected.high) / 2, max(expected.high - expected.low, fitness.STATISTIC_FLOOR)
    part = (value - (middle - width / 2)) / width
    if part < 0:
        return 0
    return BINS - 1 if part > 1 else 1 + min(PARTS - 1, int(PARTS * part))


def read(home: Home) -> dict[Sha256, Counts]:
    """Return the counts by bundle; a file that is lost, damaged or unreadable has none."""
    try:
        data = home.disk.read(FILE) or b"{}"
        found = json.loads(data[:MAX_STATE])
        return {digest: Counts.model_validate_json(json.dumps(rows)) for digest, rows in found.items()}
    except (ValueError, AttributeError, RecursionError, StateError, ValidationError):
        return {}


def store(home: Home, fresh: Mapping[Sha256, Counts]) -> None:
    """Add counts to the file.

    Raises:
        BusyError: another process is writing to it.
        DeviceError: it cannot be written.
    """
    if not fresh:
        return
    home.check_owner()  # root may draw, too, and must leave nothing here that the owner could not change
    with _locked(home):
        found = read(home)
        for digest, more in fresh.items():
            known = found.pop(digest, None)  # it becomes the last one
            if known is None:
                found[digest] = more
            else:
                known.add(more)
                found[digest] = known
        kept = dict([*found.items()][-MOST_BUNDLES:])
        rows = {digest: counts.model_dump(mode="json", exclude_defaults=True) for digest, counts in kept.items()}
        home.disk.replace(FILE, json.dumps(rows, separators=(",", ":")).encode(), durable=False)


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    try:
        descriptor = os.open(home.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StateError(f"cannot open {home.root / LOCK}: {error.strerror}; run the agent as its owner") from error
    until = time.monotonic() + LOCK_WAIT
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    raise BusyError(f"another process counts in {home.root}; the counts are kept until later") from error
                time.sleep(LOCK_WAIT / 10)
        yield
    finally:
        os.close(descriptor)


class Counting:
    """Counts in memory, from any thread, until `store` writes them. Nothing here raises: an image goes before its count."""

    def __init__(self, home: Home) -> None:
        self._home, self._lock = home, threading.Lock()
        self._fresh: dict[Sha256, Counts] = {}

    def drew(
        self,
        digest: Sha256,
        variant: VariantName,
        caption: str,
        answer: Mapping[str, Any],
        references: Mapping[VariantName, Reference],
    ) -> None:
        """Count an image; see `Counts.drew`. Of the references of a bundle, that of the first variant lists captions."""
        try:
            with self._lock:
                listed = next((known.captions for known in references.values() if known.captions), [])
                self._of(digest).drew(variant, caption, answer, references[variant], listed)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a count, the image is good
            log.debug("an image was not counted: %s", error)

    def missed(self, digest: Sha256 | None, how: Missed) -> None:
        """Count a request that got no image of a bundle."""
        if digest is None:
            return
        with self._lock:
            counts = self._of(digest)
            setattr(counts, how, getattr(counts, how) + 1)

    def _of(self, digest: Sha256) -> Counts:
        return self._fresh.setdefault(digest, Counts(since=min(max(0, int(time.time())), MAX_COUNT)))

    def store(self) -> None:
        """Write what was counted; what cannot be written is kept for the next time."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        try:
            store(self._home, fresh)
        except DeviceError as error:
            log.debug("the counts are not written yet: %s", error)
            with self._lock:
                for digest, later in self._fresh.items():
                    fresh.setdefault(digest, Counts(since=later.since)).add(later)
                self._fresh = fresh


def total(rows: Sequence[Sequence[float]]) -> list[list[int]]:
    """Return a load as whole thousandths, as a report has it."""
    return [[round(1000 * share) for share in row] for row in rows]

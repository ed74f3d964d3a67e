"""Yearly cost of a fleet that draws its own images, compared with the same images from a cloud. Pure arithmetic, all units named.

Both sides count the same retraining and the same people, because a model must be kept up to date in either place. The difference:
devices need hardware that can draw, electricity and updates; a cloud needs accelerators, and every image must be transmitted.
A cost that was not measured is not counted, and the result says so; it is never replaced by a guess.

    >>> rows = yearly(Work(joules=2.0, update_bytes=900_000, training_seconds=60.0), Prices())
    >>> total(rows, "devices"), total(rows, "cloud")
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from pydantic import Field

from model.scorecard import Frozen

DAYS = 365
JOULES_PER_KILOWATT_HOUR = 3.6e6
Side = Literal["devices", "cloud"]


class Prices(Frozen):
    """Prices, and how much is drawn. A price that is not in ferry.toml is an assumption, and the report marks it as one."""

    currency: str = Field(default="EUR", max_length=8, description="name of the currency of all prices")
    megabyte: float = Field(default=0.5, ge=0, description="price of 10^6 bytes of traffic to or from a device")
    training_hour: float = Field(default=0.1, ge=0, description="price of an hour of the machine that trains")
    fleet: int = Field(default=1000, ge=1, description="number of devices that receive an update")
    device: float = Field(
        default=40.0, ge=0, description="extra price of a device whose hardware can draw images; 0 if it is there anyway"
    )
    device_years: float = Field(default=5.0, gt=0, description="years that a device is used")
    images_per_day: float = Field(default=100.0, ge=0, description="images that a device draws in a day")
    kilowatt_hour: float = Field(default=0.3, ge=0, description="price of a kilowatt hour of electricity at a device")
    operator_hour: float = Field(default=60.0, ge=0, description="price of an hour of the person who retrains and rolls out")
    operator_hours: float = Field(default=2.0, ge=0, description="hours that this person needs for an update")
    updates_per_year: float = Field(default=12.0, ge=0, description="updates in a year")
    cloud_thousand_images: float | None = Field(
        default=None, ge=0,
        description="price of a thousand images from a cloud service that sells images; not given: accelerators are rented by the hour",
    )  # fmt: skip
    cloud_gpu_hour: float = Field(default=1.0, ge=0, description="price of an hour of a rented accelerator")
    cloud_gpu_seconds: float = Field(
        default=0.1, ge=0, description="seconds that an image occupies the rented accelerator, idle time included"
    )
    cloud_gpu_teraflops: float = Field(
        default=17.0, gt=0,
        description="10^12 floating-point operations that the rented accelerator does in a second, to estimate the time of what nobody "
        "measured on it; the default is what an NVIDIA H200 did with tier nano in bfloat16, in batches of 1024",
    )  # fmt: skip
    cloud_image_kilobytes: float = Field(
        default=5.0, ge=0, description="traffic of an image from a cloud in 10^3 bytes: request, answer and connection"
    )

    def assumed(self, *names: str) -> bool:
        """Check whether the user did not give one of these prices, so that it is an assumption."""
        return any(name not in self.model_fields_set for name in names)


@dataclass(frozen=True)
class Work:
    """Measurements of one line on one device class."""

    joules: float | None
    """Energy of one image on a device; None: not measured."""
    update_bytes: int
    """Bytes that a device fetches for an update, metadata included."""
    training_seconds: float
    """Time to train all variants of the class for one update."""


@dataclass(frozen=True)
class Row:
    """One kind of cost of the whole fleet, in currency a year."""

    name: str
    devices: float | None
    """Cost on the devices; None: not known."""
    cloud: float | None
    how: str
    assumed: bool


@dataclass(frozen=True)
class GpuTime:
    """Seconds that an accelerator computes for 1,000 images of one variant, without idle time."""

    seconds: float
    source: str
    """How it was measured; empty: it is estimated from the number of operations."""

    def price(self, prices: Prices) -> float:
        """Compute what these seconds cost."""
        return self.seconds / 3600 * prices.cloud_gpu_hour


def estimated(operations: float, prices: Prices) -> GpuTime:
    """Estimate the time of 1,000 images from the floating-point operations of one."""
    return GpuTime(1000 * operations / (prices.cloud_gpu_teraflops * 1e12), "")


def images(prices: Prices) -> float:
    """Compute how many images the fleet draws in a year."""
    return prices.images_per_day * DAYS * prices.fleet


def energy(joules: float, prices: Prices) -> float:
    """Compute what an energy in joules costs at a device."""
    return joules / JOULES_PER_KILOWATT_HOUR * prices.kilowatt_hour


def traffic(size: int, prices: Prices) -> float:
    """Compute what it costs to send `size` bytes to every device of the fleet."""
    return size / 1e6 * prices.megabyte * prices.fleet


def yearly(work: Work, prices: Prices) -> list[Row]:
    """Compute each kind of cost of a year, on the devices and in the cloud."""
    p, n = prices, images(prices)
    bought: tuple[str, ...]
    hardware = p.device * p.fleet / p.device_years
    if p.cloud_thousand_images is not None:
        compute, bought = n / 1000 * p.cloud_thousand_images, ("cloud_thousand_images",)
        how = f"a service at {p.cloud_thousand_images:g} {p.currency} for 1,000 images"
    else:
        compute, bought = n * p.cloud_gpu_seconds / 3600 * p.cloud_gpu_hour, ("cloud_gpu_hour", "cloud_gpu_seconds")
        how = f"{p.cloud_gpu_seconds:g} s of an accelerator for an image, at {p.cloud_gpu_hour:g} {p.currency} an hour"
    training = work.training_seconds / 3600 * p.training_hour * p.updates_per_year
    people = p.operator_hours * p.operator_hour * p.updates_per_year
    drawn = ("fleet", "images_per_day")
    return [
        Row(
            "Hardware", hardware, compute,
            f"devices: {p.device:g} {p.currency} each for hardware that can draw, over {p.device_years:g} years; cloud: {how}",
            p.assumed("fleet", "device", "device_years", "images_per_day", *bought),
        ),
        Row(
            "Electricity", None if work.joules is None else energy(work.joules, p) * n, 0.0,
            f"{p.kilowatt_hour:g} {p.currency} a kWh; the cloud's is in its price", p.assumed(*drawn, "kilowatt_hour"),
        ),
        Row(
            "Mobile data", traffic(work.update_bytes, p) * p.updates_per_year, n * p.cloud_image_kilobytes / 1000 * p.megabyte,
            f"{p.megabyte:g} {p.currency} a MB; devices: {p.updates_per_year:g} updates; cloud: {p.cloud_image_kilobytes:g} kB an image",
            p.assumed(*drawn, "megabyte", "updates_per_year", "cloud_image_kilobytes"),
        ),
        Row(
            "Retraining", training, training,
            f"{timedelta(seconds=round(work.training_seconds))} h, {p.updates_per_year:g} times, at {p.training_hour:g} {p.currency} an hour",
            p.assumed("training_hour", "updates_per_year"),
        ),
        Row(
            "People", people, people,
            f"{p.operator_hours:g} hours an update at {p.operator_hour:g} {p.currency}",
            p.assumed("operator_hours", "operator_hour", "updates_per_year"),
        ),
    ]  # fmt: skip


def total(rows: list[Row], side: Side) -> float:
    """Sum the known costs of one side, in currency a year."""
    return sum(getattr(row, side) or 0.0 for row in rows)

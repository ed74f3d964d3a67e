"""Golden outputs: what a model made of fixed inputs in the factory, with which a device checks that it computes the same.

An export holds every output as float32. A bundle of form 4 holds a sample of them, as whole steps of `STEP`: a fault in the weights,
the graph or the runtime moves most outputs, so a few show it. The sample comes from all inputs, because those differ in time and
caption. Its high bytes stand before its low bytes: from one release to the next, high bytes seldom change, so a delta is small.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ota.errors import ManifestError

Floats = npt.NDArray[np.float32]

STEP = 2.0**-11  # of a sampled output: half of it is a quarter of the tolerance (0.001) within which outputs count as equal
LARGEST = STEP * (2**15 - 1)  # of an output that a sample can hold
SAMPLED = 256  # outputs in a sample, at most
INPUTS = ("ids", "seeds", "t", "r")


@dataclass(frozen=True)
class Outputs:
    """Fixed inputs, and outputs of the network for them."""

    ids: npt.NDArray[np.int64]  # captions [B, L]
    seeds: npt.NDArray[np.int64]  # of the noise [B]
    t: Floats  # times [B]
    r: Floats  # ends of the steps [B]
    every: int  # the outputs are the first one of the velocity [B, C, R, R], and every so many from there
    expected: Floats  # outputs [n]

    def share(self, velocity: Floats, tolerance: float) -> float:
        """Return the share of the outputs that a device has computed right; 0 if anything that it has computed is not finite.

        Args:
            velocity: what the device computed for the inputs, [B, C, R, R].
            tolerance: largest difference that counts as right.

        Raises:
            ManifestError: the outputs are those of a model with images of another shape.
        """
        found = velocity.reshape(-1)[:: self.every]
        if found.shape != self.expected.shape:
            raise ManifestError("the bundle's golden outputs cannot be read: they are for images of another shape")
        close = np.abs(found - self.expected) <= tolerance
        return float(close.mean()) if np.isfinite(velocity).all() else 0.0


def read(data: bytes) -> Outputs:
    """Read golden outputs, of an export or of a bundle of any form.

    Raises:
        ManifestError: they cannot be read.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            inputs = {name: file[name] for name in INPUTS}
            if "sample" not in file:
                return Outputs(**inputs, every=1, expected=file["velocity"].reshape(-1))
            sample, every = file["sample"], int(file["every"])
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ManifestError(f"the bundle's golden outputs cannot be read: {error}") from error
    if every < 1 or sample.dtype != np.uint8 or sample.ndim != 2 or len(sample) != 2 or not sample.size:
        raise ManifestError("the bundle's golden outputs cannot be read: their sample is not two rows of bytes")
    steps = (sample[0].astype(np.uint16) << 8 | sample[1]).view(np.int16)
    return Outputs(**inputs, every=every, expected=steps.astype(np.float32) * np.float32(STEP))


def sampled(data: bytes) -> bytes:
    """Return golden outputs as a bundle of form 4 holds them; those that no sample can hold stay as they are.

    Raises:
        ManifestError: they cannot be read.
    """
    whole = read(data)
    if whole.every > 1 or not np.isfinite(whole.expected).all() or np.abs(whole.expected).max(initial=0) > LARGEST:
        return data
    every = whole.expected.size // SAMPLED | 1  # odd, so that the sample comes from all columns of an image
    steps = np.rint(whole.expected[::every] / np.float32(STEP)).astype(np.int16).view(np.uint16)
    made = io.BytesIO()
    sample = np.stack((steps >> 8, steps & 255)).astype(np.uint8)
    np.savez(made, ids=whole.ids, seeds=whole.seeds, t=whole.t, r=whole.r, every=np.array(every), sample=sample)
    return made.getvalue()

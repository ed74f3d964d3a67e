"""Choose which numbers share a stream, by how large they are expected to be; the factory decides, and a device reads the result.

All choices compare integers, or floats that are rounded so coarsely that all machines agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ota.delta import streams
from ota.delta.numbers import CONTEXTS

STREAM_COST = 80  # bytes that one more stream costs, even if it is empty
TOKEN_COST = 0.7  # bytes that a token adds to a Huffman table
MAX_STREAM_CONTEXTS = 24  # neighbouring contexts that may share a stream; bounds the search


def half_octaves(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Return 2 · log2 of values, rounded to the nearest integer in the same way on every machine."""
    part, exponent = np.frexp(np.maximum(values, 1e-60))  # parts in [1/2, 1)
    found: npt.NDArray[np.int32] = 2 * exponent - (part < 2**-0.25) - (part < 2**-0.75)
    return found


def joint(classes: npt.NDArray[np.uint8], symbols: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count how often each token occurs in each context, [64, tokens]."""
    both = classes.astype(np.intp)
    both *= streams.TOKENS
    both += symbols
    return np.bincount(both, minlength=CONTEXTS * streams.TOKENS).reshape(CONTEXTS, streams.TOKENS)


def entropy(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the bits for the tokens of each row of a histogram, each row with its own code; rounded so that machines agree."""
    total = counts.sum(axis=-1, dtype=np.float64)
    found: npt.NDArray[np.float64] = total * np.log2(np.maximum(total, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(
        axis=-1
    )
    return found.round(3)


def share(counts: npt.NDArray[Any], each: float, stream_cost: float = STREAM_COST) -> npt.NDArray[np.uint8]:
    """Assign each context to a stream; neighbouring contexts share one where that costs least.

    Dynamic programming finds where to cut the sequence of used contexts.

    Args:
        counts: of tokens in a sample, [64, tokens].
        each: how many numbers one sampled number stands for.
        stream_cost: bytes that one more stream costs.
    """
    used = np.flatnonzero(counts.sum(axis=1))
    counts = counts[used][:, np.flatnonzero(counts.sum(axis=0))]
    sums = np.concatenate((np.zeros((1, counts.shape[1])), np.cumsum(counts, axis=0, dtype=np.float64)))
    cost, cut = [0.0], [0]
    for stop in range(1, len(used) + 1):
        first = max(0, stop - MAX_STREAM_CONTEXTS)
        joined = sums[stop] - sums[first:stop]  # [starts, tokens]
        spent = (
            each * entropy(joined) / 8 + stream_cost + TOKEN_COST * np.count_nonzero(joined, axis=1) + np.array(cost[first:stop])
        )
        best = int(spent.argmin())
        cost.append(float(spent[best]))
        cut.append(first + best)
    stream_of, stop, starts = np.zeros(CONTEXTS, np.uint8), len(used), []
    while stop:
        starts.append((cut[stop], stop))
        stop = cut[stop]
    # Contexts that the sample missed join their neighbours.
    for number, (start, _) in enumerate(reversed(starts)):
        stream_of[used[start] if start else 0 :] = number
    return stream_of

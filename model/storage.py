"""Name the tensors of a network as the weight file does, and compute what a device has of them in each precision."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from model.config import PrecisionName
from model.graph import scaled_axis
from model.network import Network

KINDS: dict[PrecisionName, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WHOLE_LOW, WHOLE_HIGH = -128, 127  # whole numbers that int8 holds
_WIDER = 8  # how often a scale may be doubled because all numbers of its row or column are even


def parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the weight file that a parameter consists of, by their names there; they share its memory.

    A block's experts are one parameter, and one tensor each in the weight file.
    """
    own = re.sub(r"^blocks\.(\d+)\.(experts\.)?", r"block\1.", name)
    if ".experts.w" not in name:
        yield own, tensor
        return
    block, weight = own.split(".")
    for expert, part in enumerate(tensor):
        yield f"{block}.expert{expert}.{weight}", part


def named(network: Network) -> dict[str, Tensor]:
    """Return a network's weights by their names in the weight file; they share its memory."""
    return {own: part for name, weight in network.named_parameters() for own, part in parts(name, weight.data)}


def quantise(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Quantise a matrix: return whole numbers that int8 holds, as float, and the scale of each index of `axis`.

    A weight is its whole number times its scale. Scales are powers of two. So stored weights are exact in float32, storing
    them again changes nothing, and a retraining seldom changes a scale; a changed scale would change all its numbers in a
    delta. The cost is up to one bit of precision.

    Weights that are multiples of a power of two already keep the largest such scale, also if their largest number has shrunk or
    grown to -128: an update moves whole numbers and keeps their scales (`model.update`).
    """
    mantissa, exponent = torch.frexp(values.abs().amax(dim=1 - axis) / WHOLE_HIGH)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-100)  # rounded up to a power of two
    kept = exponent
    for more in range(-1, _WIDER):
        whole = torch.ldexp(values, -(exponent + more).unsqueeze(1 - axis))
        exact = ((whole == whole.round()) & (whole >= WHOLE_LOW) & (whole <= WHOLE_HIGH)).all(dim=1 - axis)
        kept = torch.where(exact & (mantissa > 0), exponent + more, kept)
    scale = torch.ldexp(torch.ones_like(mantissa), kept)
    return torch.round(values / scale.unsqueeze(1 - axis)).clamp(WHOLE_LOW, WHOLE_HIGH), scale


def dequantised(whole: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return the weights that whole numbers and the scale of each index of `axis` stand for."""
    return whole * scale.unsqueeze(1 - axis)


def fielded(name: str, values: Tensor, stored: PrecisionName) -> Tensor:
    """Return what a device computes with, as float32, if a tensor of the weight file is stored in a precision."""
    if stored != "int8":
        return values.to(KINDS[stored]).float()
    axis = scaled_axis(name)
    return values if axis is None else dequantised(*quantise(values, axis), axis)

"""Networks that nobody trained, in the form that devices run: they cost time, memory and energy as trained ones do.

No checkpoint, no lineage and no quality: what is made here must never be registered or released, and nothing here can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig, PrecisionName
from model.export import pack
from model.graph import build, layout
from model.network import Network

SPREAD = 0.02  # deviation of the tensors that training starts from zero: the routing then has no ties, and the output is not 0


@dataclass(frozen=True)
class Untrained:
    """An untrained network: its graph, and its weights as a shell record and one block record that is repeated."""

    graph: bytes
    shell: bytes
    block: bytes
    blocks: int

    @property
    def weights(self) -> bytes:
        """The whole weight file."""
        return self.shell + self.block * self.blocks


def untrained(config: ModelConfig, precision: PrecisionName, seed: int = 0) -> Untrained:
    """Build a network with random weights whose blocks are all equal; the same input gives the same bytes.

    A block is a record of fixed size in the weight file, so a file of this network is a shell and one record, whatever its depth.

    Raises:
        ExportError: the weights do not fit the precision.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(config)
        torch.manual_seed(seed)  # so that networks that differ outside of their blocks have the same block
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=SPREAD)
    weights = pack(network, precision)
    placed, size = layout(config, precision)
    start = next(tensor.offset for tensor in placed if tensor.name.startswith("block"))
    record = (size - start) // config.blocks
    graph = build(config, precision).SerializeToString(deterministic=True)
    return Untrained(graph, weights[:start], weights[start : start + record], config.blocks)


def operations(config: ModelConfig) -> float:
    """Estimate the floating-point operations of one evaluation for one image: the matrix products alone, two for each weight."""
    s, T = config.shape, config.tokens + config.text_length
    D, layers = s.width, s.dual + s.single
    weights = 4 * D * D + 3 * D * (s.active * s.expert_width + s.shared_width)  # that a token meets in a layer
    return layers * (2.0 * T * weights + 4.0 * T * T * D)

"""The count of operations agrees with torch's own, for every kind of network that is trained."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import flop
from model.config import ModelConfig
from model.network import Network


@pytest.mark.parametrize("tier", ["test", "nano"])
@pytest.mark.parametrize("configuration", ["I", "II"])
@pytest.mark.parametrize(
    ("router", "channels", "ablation"),
    [("expert-choice", 1, "none"), ("token-choice", 3, "none"), ("expert-choice", 1, "dense"), ("expert-choice", 1, "no-conv")],
)
def test_count_of_operations_is_torchs(tier: str, configuration: str, router: str, channels: int, ablation: str) -> None:
    config = ModelConfig.model_validate({
        "tier": tier, "configuration": configuration, "image_size": 16, "channels": channels, "text_length": 10, "router": router,
        "ablation": ablation,
    })  # fmt: skip
    network, x, t = Network(config).eval(), torch.randn(1, channels, 16, 16), torch.rand(1)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused attention of a processor is not counted
        network(x, t, t, torch.ones(1, 10, dtype=torch.int64))
    assert flop.evaluation(config) == counter.get_total_flops()

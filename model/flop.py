"""How much arithmetic an image takes, counted from the model's configuration alone. Needs no torch.

A multiplication and an addition are two operations, as data sheets of accelerators count them. Only matrix products, convolutions
and attention are counted; what remains (normalisation, softmax, gathering) is little. `tests/test_flop.py` compares the count with
torch's own counter.
"""

from __future__ import annotations

from model.config import ModelConfig

TIME_FEATURES = 256  # inputs of the layer that reads both times; model/network.py has the frequencies


def evaluation(config: ModelConfig) -> int:
    """Count the floating-point operations of one network evaluation for one image."""
    s, D, N, L = config.shape, config.shape.width, config.tokens, config.text_length
    pixels = config.channels * config.stride**2
    stem = N * 9 * config.channels * D
    conditioning = D * D + TIME_FEATURES * D + D * D + D * 6 * D  # pooled caption, both layers of the times, modulation
    dual = s.dual * (_block(config, N) + _block(config, L) + _attention(config, N + L))
    single = s.single * (_block(config, N + L) + _attention(config, N + L))
    head = N * 9 * D * pixels
    return 2 * (stem + conditioning + dual + single + head)


def _attention(config: ModelConfig, tokens: int) -> int:
    """Count the multiplications of queries with keys, and of weights with values."""
    return 2 * tokens**2 * config.shape.width


def _block(config: ModelConfig, tokens: int) -> int:
    """Count the multiplications of one block instance for its own tokens, without attention."""
    s, D = config.shape, config.shape.width
    projections = tokens * (D * 3 * D + D * D)
    convolution = tokens * 9 * D if config.switched.convolved else 0
    met = config.capacity(tokens) * s.experts if config.router == "expert-choice" else tokens * s.active
    return projections + convolution + tokens * D * s.experts + 3 * D * (tokens * s.shared_width + met * s.expert_width)

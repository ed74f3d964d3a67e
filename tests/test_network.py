"""What the network promises for all weights: shapes, independence of batch mates, order without positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ABLATIONS, AblationName, ModelConfig, Tier, TierName
from model.data import caption_ids
from model.experts import Experts
from model.network import Network

TEXT = 8
SMALL = Tier(width=8, heads=1, experts=4, active=1, expert_width=8, shared_width=8, dual=1, single=1)


def network_of(tier: str = "test", configuration: str = "I", channels: int = 1, size: int = 16) -> Network:
    """Make a network in which every weight counts; a fresh one draws nothing, because its head is zero."""
    torch.manual_seed(7)
    network = Network(
        ModelConfig.model_validate(
            {"tier": tier, "configuration": configuration, "image_size": size, "channels": channels, "text_length": TEXT}
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def inputs(network: Network, captions: list[str], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = network.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(captions), c.channels, c.image_size, c.image_size), generator=generator)
    t = torch.rand(len(captions), generator=generator)
    return x, t, t, torch.tensor([caption_ids(caption, TEXT) for caption in captions])


@torch.inference_mode()
def same_noise(network: Network, captions: list[str]) -> Tensor:
    """Compute velocities for several captions on one noise at one time."""
    x, t, _, _ = inputs(network, captions[:1])
    ids = torch.tensor([caption_ids(caption, TEXT) for caption in captions])
    n = len(captions)
    return network(x.expand(n, -1, -1, -1), t.expand(n), t.expand(n), ids)[0]


def block_shapes(network: Network) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(p.shape) for name, p in block.named_parameters()} for block in network.blocks]


@pytest.mark.parametrize("tier", ["test", "nano"])
@pytest.mark.parametrize("configuration", ["I", "II"])
@pytest.mark.parametrize("channels", [1, 3])
def test_velocity_has_image_shape(tier: TierName, configuration: str, channels: int) -> None:
    network = network_of(tier, configuration, channels)
    x, t, r, ids = inputs(network, ["bar", "disc"])
    with torch.inference_mode():
        v, load = network(x, t, r, ids)
    assert v.shape == x.shape
    assert v.isfinite().all()
    assert load.shape == (2, network.config.blocks, network.config.shape.experts)


def test_image_size_needs_no_new_weights() -> None:
    small, large = network_of(size=16), network_of(size=24)
    large.load_state_dict(small.state_dict())
    with torch.inference_mode():
        assert large(*inputs(large, ["bar"]))[0].shape == (1, 1, 24, 24)


@pytest.mark.parametrize("configuration", ["I", "II"])
def test_result_ignores_batch_mates(configuration: str) -> None:
    network = network_of(configuration=configuration)
    x, t, r, ids = inputs(network, ["bar", "disc", "", "naïve"])
    with torch.inference_mode():
        together, loads = network(x, t, r, ids)
        for i in range(len(x)):
            alone, load = network(x[i : i + 1], t[i : i + 1], r[i : i + 1], ids[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(loads[i : i + 1], load, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tier", ["test", "nano", "small"])
def test_all_blocks_share_one_shape(tier: str) -> None:
    shapes = block_shapes(network_of(tier))
    assert len(shapes) > 2
    assert all(other == shapes[0] for other in shapes)


def test_configurations_share_block_parameters() -> None:
    one, two = network_of(configuration="I"), network_of(configuration="II")
    assert block_shapes(one) == block_shapes(two)
    own = {name for name, p in one.named_parameters() if p.shape != two.get_parameter(name).shape}
    assert own == {"head.weight", "head.bias"}  # two by two pixels a position, or one


def test_order_of_bytes_matters() -> None:
    ab, ba = same_noise(network_of(), ["ab", "ba"])
    assert float((ab - ba).abs().max()) > 1e-3


def test_order_comes_from_depthwise_convolution() -> None:
    network = network_of()
    with torch.no_grad():
        for block in network.blocks:
            block.dw.zero_()
    ab, ba, ac = same_noise(network, ["ab", "ba", "ac"])
    torch.testing.assert_close(ab, ba, rtol=1e-4, atol=1e-5)
    assert float((ab - ac).abs().max()) > 1e-3  # which bytes there are still matters


@pytest.mark.parametrize("convolved", [True, False])
def test_places_come_from_depthwise_padding(convolved: bool) -> None:
    """Tell a place from the middle of a constant picture, only by the zeros around the blocks' convolutions."""
    network = network_of()
    with torch.no_grad():
        for block in network.blocks:
            block.experts.w2.zero_()  # otherwise the choice among equal tokens would tell places apart
            if not convolved:
                block.dw.zero_()
    x, t, _, ids = inputs(network, ["bar"])
    with torch.inference_mode():
        v = network(torch.zeros_like(x), t, t, ids)[0][0, 0]
    place, middle = v[2, 2], v[8, 8]  # the head's own padding reaches only the outermost two pixels
    assert (float((place - middle).abs()) > 1e-3) == convolved


@pytest.mark.parametrize("text", ["", "bar", "12345678", "äöü"])
def test_every_caption_changes_velocity(text: str) -> None:
    other, own = same_noise(network_of(), ["disc", text])
    assert own.isfinite().all()
    assert float((other - own).abs().max()) > 1e-3


def test_both_times_are_read() -> None:
    network = network_of()
    x, t, _, ids = inputs(network, ["bar"])
    with torch.inference_mode():
        same, earlier, other = (network(x, a, b, ids)[0] for a, b in ((t, t), (t, t / 2), (t / 2, t)))
    assert not torch.allclose(same, earlier, atol=1e-3)
    assert not torch.allclose(earlier, other, atol=1e-3)


@pytest.mark.parametrize("tier", ["test", "small"])
def test_expert_load_is_gate_mass(tier: str) -> None:
    """Check the masses of experts that take the best C of T tokens: at most C/T each, between C/T and 1 together."""
    network = network_of(tier)
    c = network.config
    with torch.inference_mode():
        load = network(*inputs(network, ["bar", "disc"]))[1]
    # Dual blocks have image tokens and text tokens apart; single blocks have both together.
    tokens = [c.tokens, c.text_length] * c.shape.dual + [c.tokens + c.text_length] * c.shape.single
    for block, T in enumerate(tokens):
        share = c.capacity(T) / T
        assert (load[:, block] > 0).all()
        assert (load[:, block] <= share).all()
        total = load[:, block].sum(dim=1)
        assert (total > share - 1e-6).all()
        assert (total < 1).all()


def test_experts_take_best_tokens() -> None:
    torch.manual_seed(0)
    experts = Experts(SMALL)
    x = torch.randn(2, 12, 8)
    _, load, chosen = experts(x, 3)
    scores = torch.softmax(x @ experts.gate, dim=-1).transpose(1, 2)
    for image in range(2):
        for expert in range(4):
            row, mine = scores[image, expert], chosen[image, expert]
            assert len(set(mine.tolist())) == 3
            assert row[mine].min() >= row[[i for i in range(12) if i not in mine]].max()
            torch.testing.assert_close(load[image, expert], row[mine].sum() / 12)


def test_unchosen_tokens_meet_shared_expert_only() -> None:
    torch.manual_seed(0)
    experts = Experts(replace(SMALL, experts=2))
    x = torch.randn(1, 6, 8)
    chosen = torch.tensor([[[0, 1], [1, 2]]])
    mixed = experts(x, 2, chosen)[0]
    with torch.no_grad():
        experts.w2.zero_()
    shared = experts(x, 2, chosen)[0]
    touched = (mixed - shared).abs().amax(dim=(0, 2)) > 1e-4
    assert touched.tolist() == [True, True, True, False, False, False]


def test_tokens_take_best_experts_after_the_bias() -> None:
    torch.manual_seed(0)
    experts = Experts(replace(SMALL, active=2), "token-choice")
    x = torch.randn(2, 12, 8)
    scores = torch.softmax(x @ experts.gate, dim=-1)
    _, load, chosen = experts(x, 0)
    assert torch.equal(chosen.sort().values, scores.topk(2).indices.sort().values)
    kept = torch.zeros_like(scores).scatter(2, chosen, scores.gather(2, chosen))
    torch.testing.assert_close(load, kept.mean(dim=1))
    with torch.no_grad():
        experts.gate_bias[3] = 10.0  # every token now takes expert 3, weighted by its score
    _, load, chosen = experts(x, 0)
    assert bool((chosen == 3).any(dim=2).all())
    torch.testing.assert_close(load[:, 3], scores[:, :, 3].mean(dim=1))


def test_token_meets_only_the_experts_it_chose() -> None:
    torch.manual_seed(0)
    experts = Experts(SMALL, "token-choice")
    x = torch.randn(1, 6, 8)
    chosen = torch.tensor([[[0], [1], [0], [2], [0], [3]]])
    mixed = experts(x, 0, chosen)[0]
    with torch.no_grad():
        experts.w2[0].zero_()
    touched = (mixed - experts(x, 0, chosen)[0]).abs().amax(dim=(0, 2)) > 1e-4
    assert touched.tolist() == [True, False, True, False, True, False]


def test_bias_moves_towards_even_load() -> None:
    experts = Experts(SMALL, "token-choice")
    experts.balance(torch.tensor([[[0], [0], [0], [1], [2], [2]]]), lambda _: None)
    assert torch.sign(experts.gate_bias).tolist() == [-1, 1, -1, 1]
    assert not experts.gate_bias.requires_grad


@pytest.mark.parametrize("ablation", [name for name in ABLATIONS if name != "none"])
def test_ablation_switches_off_what_it_says(ablation: AblationName) -> None:
    torch.manual_seed(3)
    config = ModelConfig(tier="test", image_size=16, text_length=TEXT, ablation=ablation)
    network = Network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, t, r, ids = inputs(network_of(), ["bar", "disc"])
    v, load = network(x, t, r, ids)
    torch.autograd.backward(v.square().mean())
    used = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert v.shape == x.shape
    assert ("blocks.0.dw" in used) == (ablation not in ("no-conv", "positions"))
    assert (load.shape[2] == 0) == (ablation == "dense")
    assert config.blocks == (2 if ablation == "single-stream" else 3)
    mirrored = network(x.transpose(2, 3), t, r, ids)[0].transpose(2, 3)
    assert not torch.allclose(v, mirrored, atol=1e-3)  # every ablation still knows places


def test_dense_row_computes_as_much_as_a_token_meets() -> None:
    sparse, dense = (ModelConfig(tier="small", ablation=a).shape for a in ("none", "dense"))
    met = sparse.shared_width + sparse.active * sparse.expert_width
    assert (dense.shared_width, dense.experts) == (met, 0)


def test_forced_routes_reproduce_free_run() -> None:
    network = network_of()
    x, t, r, ids = inputs(network, ["bar", "disc"])
    with torch.inference_mode():
        v, load, routes = network.traced(x, t, r, ids)
        again, load_again, used = network.traced(x, t, r, ids, routes)
        elsewhere = [(route + 1) % (int(route.max()) + 1) for route in routes]
        other, other_load, _ = network.traced(x, t, r, ids, elsewhere)
    assert torch.equal(v, again)
    assert torch.equal(load, load_again)
    assert all(torch.equal(a, b) for a, b in zip(routes, used, strict=True))
    assert not torch.allclose(v, other, atol=1e-3)
    assert (other_load.sum(dim=2) < load.sum(dim=2)).all()  # no other choice carries more mass than the router's own

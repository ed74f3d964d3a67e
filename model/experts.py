"""Router and experts of one block: a shared expert for all tokens, and routed experts for some of them.

Expert choice (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing"): the router gives every token a
probability over the experts, and each expert takes the C tokens that score highest for it. By construction all experts
are then equally busy. Nothing depends on the other images of a batch, and no balancing loss is needed.

Token choice: each token takes the k experts that score highest for it after a bias is added. The bias is updated by load and
not by gradient (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing"). It decides which experts are chosen, but does not
change their weights in the mixture. Both routers have the same parameters and shapes.

The layer also returns how much each expert contributed, its gate mass: the mean over all tokens of the probability with
which the expert was mixed in. (Under expert choice an expert's number of tokens is constant, so it would tell nothing.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import RouterName, Tier

BIAS_STEP = 1e-3  # change of an expert's bias after each training step: up if it is chosen too seldom, down if too often


def swiglu(x: Tensor) -> Tensor:
    """Apply the SiLU-gated linear unit over the last axis, [..., 2H] -> [..., H] (Shazeer 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class Experts(nn.Module):
    """One shared and E routed SwiGLU experts, [B, T, D] -> ([B, T, D], load [B, E], chosen indices)."""

    def __init__(self, shape: Tier, router: RouterName = "expert-choice") -> None:
        super().__init__()
        D, E, H, S = shape.width, shape.experts, shape.expert_width, shape.shared_width
        self.router, self.active = router, shape.active
        self.gate = nn.Parameter(torch.empty(D, E))
        # Only token choice moves the bias; it is stored either way, so that both routers have the same record.
        self.gate_bias = nn.Parameter(torch.zeros(E), requires_grad=False)
        # Expert-major: expert e is one contiguous range of each tensor, so that a delta can address it.
        self.w13 = nn.Parameter(torch.empty(E, D, 2 * H))
        self.w2 = nn.Parameter(torch.empty(E, H, D))
        self.s13 = nn.Parameter(torch.empty(D, 2 * S))
        self.s2 = nn.Parameter(torch.empty(S, D))
        for weight in (self.gate, self.w13, self.w2, self.s13, self.s2):
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)

    def forward(self, x: Tensor, capacity: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the mixture of the experts for tokens `x`.

        Args:
            x: [B, T, D].
            capacity: tokens that each expert takes under expert choice, C.
            chosen: replaces the router's own choice (for parity tests, where a tie broken the other way would hide a real
                difference or show a false one). Expert choice: token indices [B, E, C]; token choice: expert indices
                [B, T, k]. None: the router chooses.

        Returns:
            the mixture [B, T, D], the load (gate mass) [B, E] and the indices that were used.
        """
        shared = (swiglu(x @ self.s13) @ self.s2).to(x.dtype)  # [B, T, D], to which the routed experts are added
        if self.gate.shape[1] == 0:
            return shared, x.new_zeros(len(x), 0), x.new_zeros((len(x), 0, 0), dtype=torch.int64)
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in float32, whatever the rest uses
            scores = torch.softmax(x @ self.gate, dim=-1)  # [B, T, E]
        if self.router == "expert-choice":
            return self._by_expert(x, shared, scores.transpose(1, 2), capacity, chosen)
        return self._by_token(x, shared, scores, chosen)

    def _by_expert(
        self, x: Tensor, shared: Tensor, scores: Tensor, capacity: int, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, D = x.shape
        E = scores.shape[1]
        if chosen is None:
            chosen = scores.topk(capacity, dim=-1, sorted=False).indices  # [B, E, C]
        weight = scores.gather(2, chosen)  # [B, E, C]
        # Rows of the flattened batch, expert by expert: [E, B*C]
        rows = (chosen + torch.arange(B, device=x.device).view(B, 1, 1) * T).transpose(0, 1).reshape(E, -1)
        # index_select, not indexing: the gradient of indexing adds in an order that varies with the threads; runs would differ.
        picked = x.reshape(B * T, D).index_select(0, rows.reshape(-1)).view(E, -1, D)  # [E, B*C, D]
        hidden = swiglu(torch.bmm(picked, self.w13))  # [E, B*C, H]
        routed = torch.bmm(hidden, self.w2) * weight.transpose(0, 1).reshape(E, -1, 1)  # [E, B*C, D]
        mixed = shared.reshape(B * T, D).index_add(0, rows.reshape(-1), routed.reshape(-1, D))
        return mixed.view(B, T, D), weight.sum(dim=-1) / T, chosen

    def _by_token(self, x: Tensor, shared: Tensor, scores: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        B, T, D = x.shape
        if chosen is None:
            chosen = (scores + self.gate_bias).topk(self.active, dim=-1).indices  # [B, T, k]
        weight = torch.zeros_like(scores).scatter(2, chosen, scores.gather(2, chosen))  # [B, T, E], 0 where not chosen
        flat, mixed, share = x.reshape(B * T, D), shared.reshape(B * T, D), weight.reshape(B * T, -1)
        for e in range(scores.shape[2]):
            rows = (chosen == e).any(dim=2).reshape(-1).nonzero().squeeze(1)
            made = swiglu(flat.index_select(0, rows) @ self.w13[e]) @ self.w2[e]
            mixed = mixed.index_add(0, rows, made * share[:, e].index_select(0, rows).unsqueeze(1))
        return mixed.view(B, T, D), weight.mean(dim=1), chosen

    @torch.no_grad()
    def balance(self, chosen: Tensor, average: Callable[[list[Tensor]], None]) -> None:
        """Move the bias towards an even load, given the experts that tokens chose, [B, T, k]; see `Network.balance`."""
        counts = torch.bincount(chosen.reshape(-1), minlength=len(self.gate_bias)).float()
        average([counts])
        self.gate_bias.add_(torch.sign(counts.mean() - counts), alpha=BIAS_STEP)

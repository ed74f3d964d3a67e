"""Router and experts of one block: a shared expert for every token, and routed experts that choose their tokens.

Expert choice (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing"): the router gives every token a
probability over the experts, and each expert takes the C tokens that score highest for it. All experts are then
equally busy by construction, nothing depends on the other images of a batch, and no balancing loss is needed.

What each expert contributed leaves the layer with the result: its gate mass, the mean over all tokens of the
probabilities with which it was mixed in. Token counts are constant and would say nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(x: Tensor) -> Tensor:
    """SiLU-gated linear unit over the last axis, [..., 2H] -> [..., H] (Shazeer 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class Experts(nn.Module):
    """One shared and E routed SwiGLU experts, [B, T, D] -> ([B, T, D], load [B, E])."""

    def __init__(self, width: int, experts: int, expert_width: int, shared_width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(width, experts))
        # Only token-choice routing would move the bias (by load, not by gradient); it is stored so that both routers
        # have the same record.
        self.gate_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)
        # Expert-major: expert e is one contiguous range of each tensor, so that a delta can name it.
        self.w13 = nn.Parameter(torch.empty(experts, width, 2 * expert_width))
        self.w2 = nn.Parameter(torch.empty(experts, expert_width, width))
        self.s13 = nn.Parameter(torch.empty(width, 2 * shared_width))
        self.s2 = nn.Parameter(torch.empty(shared_width, width))
        for weight in (self.gate, self.w13, self.w2, self.s13, self.s2):
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)

    def forward(self, x: Tensor, capacity: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the experts into `x`.

        Args:
            x: [B, T, D].
            capacity: tokens that each expert takes, C.
            chosen: [B, E, C] token indices; given, the router's own choice is overruled (for parity tests, where a
                tie broken the other way would hide a real difference or show a false one).

        Returns:
            the mixture [B, T, D], the load [B, E] and the indices [B, E, C] that were used.
        """
        B, T, D = x.shape
        E = self.gate.shape[1]
        scores = torch.softmax(x @ self.gate, dim=-1).transpose(1, 2)  # [B, E, T]
        if chosen is None:
            chosen = scores.topk(capacity, dim=-1, sorted=False).indices  # [B, E, C]
        weight = scores.gather(2, chosen)  # [B, E, C]
        # Rows of the flattened batch, expert by expert: [E, B*C]
        rows = (chosen + torch.arange(B, device=x.device).view(B, 1, 1) * T).transpose(0, 1).reshape(E, -1)
        picked = x.reshape(B * T, D)[rows]  # [E, B*C, D]
        hidden = swiglu(torch.bmm(picked, self.w13))  # [E, B*C, H]
        routed = torch.bmm(hidden, self.w2) * weight.transpose(0, 1).reshape(E, -1, 1)  # [E, B*C, D]
        shared = swiglu(x @ self.s13) @ self.s2  # [B, T, D]
        mixed = shared.reshape(B * T, D).index_add(0, rows.reshape(-1), routed.reshape(-1, D))
        load = weight.sum(dim=-1) / T  # [B, E]
        return mixed.view(B, T, D), load, chosen

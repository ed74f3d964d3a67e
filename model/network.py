"""The sparse diffusion network: one fixed-size block, repeated; no tokenizer, no position embedding.

What is unusual here, compared with a diffusion transformer as published (DiT, HiDream-I1):

- pixels enter through a 3x3 convolution (stride 2 in configuration I, 1 in II) and never become "patches";
- nothing is added for position: order comes from the zero padding of a depthwise 3x3 convolution inside each block;
- captions enter as UTF-8 bytes through a lookup table, so every language works and there is no tokenizer to ship;
- all block instances have the same parameter shapes, so the weights are a bank of M equal records;
- a dual layer is two instances (image, text) that share one attention; a single layer is one instance for both;
- there are two time inputs, t and r: students learn the mean velocity from t to r; `full` passes r = t;
- every forward pass also returns how much each expert contributed, [B, M, E].

Under autocast the matrix products are bfloat16; the residual stream, normalisation, routing and both times stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BYTE_VOCABULARY, ModelConfig
from model.experts import Experts

NORM_EPS = 1e-6
TIME_FREQUENCIES = 64  # cosines and sines each, for t and for r
# Angular rates; the factor 1000 spreads t in [0, 1] over the range for which the geometric series of periods was designed.
RATES = [1000.0 * math.exp(-math.log(10_000.0) * i / TIME_FREQUENCIES) for i in range(TIME_FREQUENCIES)]


class Block(nn.Module):
    """One instance of the fixed-size block; its parameters are one record of the weight file."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        s = config.shape
        D, d = s.width, s.width // s.heads
        self.heads = s.heads
        self.mod = nn.Parameter(torch.zeros(6, D))  # added to the shared adaLN vector
        self.qkv = nn.Parameter(torch.empty(D, 3 * D))
        self.out = nn.Parameter(torch.empty(D, D))
        self.q_gain = nn.Parameter(torch.ones(d))
        self.k_gain = nn.Parameter(torch.ones(d))
        self.dw = nn.Parameter(torch.empty(D, 1, 3, 3))
        self.convolved = config.switched.convolved
        self.experts = Experts(s, config.router)
        nn.init.normal_(self.qkv, std=D**-0.5)
        nn.init.normal_(self.out, std=D**-0.5)
        nn.init.normal_(self.dw, std=1 / 3)

    def project(self, x: Tensor, ada: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of `x`, [B, T, D] -> 3 x [B, h, T, d]."""
        mod = ada + self.mod  # [B, 6, D]
        h = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + mod[:, 1:2]) + mod[:, 0:1]  # [B, T, D]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (h @ self.qkv).chunk(3, dim=-1))
        return (rms_norm(q.float()) * self.q_gain).to(v.dtype), (rms_norm(k.float()) * self.k_gain).to(v.dtype), v

    def mix(
        self,
        x: Tensor,
        attended: Tensor,
        ada: Tensor,
        segments: list[tuple[int, int]],
        capacity: int,
        chosen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply what follows attention: residual, depthwise convolution over each segment's map, experts.

        Args:
            x: input of the block [B, T, D].
            attended: output of attention [B, h, T, d].
            ada: shared adaLN vector [B, 6, D].
            segments: rows and columns of each segment's map; their products add up to T.
            capacity: see `Experts.forward`.
            chosen: see `Experts.forward`.

        Returns:
            output of the block [B, T, D], load [B, E] and the routing that was used.
        """
        mod = ada + self.mod  # [B, 6, D]
        x = x + mod[:, 2:3] * (attended.transpose(1, 2).flatten(2) @ self.out)  # [B, T, D]
        h = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + mod[:, 4:5]) + mod[:, 3:4]
        if self.convolved:
            parts = h.split([rows * columns for rows, columns in segments], dim=1)
            h = h + torch.cat([self.convolve(p, m) for p, m in zip(parts, segments, strict=True)], dim=1)
        mixed, load, chosen = self.experts(h, capacity, chosen)
        return x + mod[:, 5:6] * mixed, load, chosen

    def convolve(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Apply the depthwise 3x3 convolution with zero padding to a [rows, columns] map of positions, [B, T, D] -> [B, T, D]."""
        grid = x.transpose(1, 2).unflatten(2, size)  # [B, D, rows, columns]
        return F.conv2d(grid, self.dw, padding=1, groups=x.shape[-1]).flatten(2).transpose(1, 2)


def rms_norm(x: Tensor) -> Tensor:
    """Normalise by the root mean square over the last axis, without a gain."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)


class Network(nn.Module):
    """Network that predicts the velocity of the flow at (x, t) for a caption: `forward(x, t, r, ids) -> (v, load)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, s, C = config.shape.width, config.stride, config.channels
        self.stem = nn.Conv2d(C, D, 3, stride=s, padding=1)
        self.text = nn.Parameter(torch.randn(BYTE_VOCABULARY, D))
        self.pool = nn.Linear(D, D)
        self.time_in = nn.Linear(4 * TIME_FREQUENCIES, D)
        self.time_out = nn.Linear(D, D)
        self.ada = nn.Linear(D, 6 * D)
        blocks = [Block(config) for _ in range(config.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.head_mod = nn.Parameter(torch.zeros(2, D))
        self.head = nn.Conv2d(D, C * s * s, 3, padding=1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        nn.init.normal_(self.ada.weight, std=0.1 * D**-0.5)
        nn.init.zeros_(self.ada.bias)
        with torch.no_grad():
            for block in blocks:  # gates of residual branches start above 0, so short trainings use the branches
                block.mod[2] = block.mod[5] = 0.5 / math.sqrt(config.blocks)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the velocity.

        Args:
            x: noisy image [B, C, R, R].
            t: [B], time of x; 0 is the image, 1 is noise.
            r: [B], end of the interval over which the velocity is averaged; r = t gives the velocity at t itself.
            ids: caption bytes [B, L], int64; 0 pads, all 0 is "no caption".

        Returns:
            v [B, C, R, R] and the expert load [B, M, E].
        """
        v, load, _ = self.traced(x, t, r, ids)
        return v, load

    def balance(self, chosen: list[Tensor], average: Callable[[list[Tensor]], None]) -> None:
        """Move every router's bias towards an even load after a training step (token choice only).

        Args:
            chosen: indices of the experts that the tokens chose, [B, T, k] for each block.
            average: averages tensors, in place, over all processes that train together.
        """
        for block, indices in zip(cast("list[Block]", list(self.blocks)), chosen, strict=True):
            block.experts.balance(indices, average)

    def traced(
        self, x: Tensor, t: Tensor, r: Tensor, ids: Tensor, routes: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute what `forward` does; also take and return the routing of each block, see `chosen` of `Experts.forward`."""
        c = self.config
        D, N, L, side = c.shape.width, c.tokens, c.text_length, c.side
        stem = self.stem(x).to(x.dtype)  # [B, D, side, side]
        image = stem.flatten(2).transpose(1, 2)  # [B, N, D]
        text = F.embedding(ids, self.text)  # [B, L, D]
        if c.switched.positions:
            image = image + grid_positions(side, side, D, image)
            text = text + grid_positions(1, L, D, text)
        given = (ids > 0).unsqueeze(-1).to(text.dtype)  # [B, L, 1]
        pooled = self.pool((text * given).sum(1) / given.sum(1).clamp(min=1))  # [B, D]
        when = self.time_out(F.silu(self.time_in(torch.cat((frequencies(t), frequencies(r)), dim=-1))))  # [B, D]
        ada = self.ada(F.silu(when + pooled)).unflatten(-1, (6, D))  # [B, 6, D]
        blocks = cast("list[Block]", list(self.blocks))
        loads: list[Tensor] = []
        used: list[Tensor] = []

        def run(b: int, y: Tensor, attended: Tensor, segments: list[tuple[int, int]]) -> Tensor:
            capacity = c.capacity(y.shape[1])
            y, load, chosen = blocks[b].mix(y, attended, ada, segments, capacity, routes[b] if routes else None)
            loads.append(load)
            used.append(chosen)
            return y

        for layer in range(c.shape.dual):
            i, j = 2 * layer, 2 * layer + 1
            of_image, of_text = blocks[i].project(image, ada), blocks[j].project(text, ada)
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_image, of_text, strict=True))
            attended = F.scaled_dot_product_attention(q, k, v)  # [B, h, N + L, d]
            image = run(i, image, attended[:, :, :N], [(side, side)])
            text = run(j, text, attended[:, :, N:], [(1, L)])
        both = torch.cat((image, text), dim=1)  # [B, N + L, D]
        for b in range(2 * c.shape.dual, c.blocks):
            attended = F.scaled_dot_product_attention(*blocks[b].project(both, ada))
            both = run(b, both, attended, [(side, side), (1, L)])
        image = both[:, :N]  # text positions are no longer needed

        mod = ada[:, :2] + self.head_mod  # [B, 2, D]
        image = F.layer_norm(image, (D,), eps=NORM_EPS) * (1 + mod[:, 1:2]) + mod[:, 0:1]
        grid = image.transpose(1, 2).unflatten(2, (side, side)) + stem  # [B, D, side, side], long skip
        v = F.pixel_shuffle(self.head(grid), c.stride)  # [B, C, R, R]
        return v.to(x.dtype), torch.stack(loads, dim=1), used


def grid_positions(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Compute sinusoids of row and column, [rows * columns, width], which other transformers add as positions (ablation only)."""
    quarter = width // 4
    rates = torch.exp(torch.arange(quarter) * (-math.log(10_000.0) / quarter))
    along = [torch.arange(n)[:, None] * rates for n in (rows, columns)]  # [rows, quarter], [columns, quarter]
    row, column = (torch.cat((a.sin(), a.cos()), dim=1) for a in along)
    both = torch.cat((row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)), dim=2)
    return both.reshape(rows * columns, -1).to(like)


def frequencies(t: Tensor) -> Tensor:
    """Compute sinusoidal features of times in [0, 1], [B] -> [B, 2 * TIME_FREQUENCIES]."""
    angle = t[:, None] * torch.tensor(RATES, dtype=t.dtype, device=t.device)
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)

"""Short versions of the two designs that the network is compared with; both are called by `(x, t, r, labels) -> (v, load)`.

Both get the caption as a class label (0: no caption), as in their own design. That is an advantage: they need not read text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn


class DiT(nn.Module):
    """A dense transformer on patches, after Peebles and Xie 2023: fixed sinusoidal positions, adaLN-Zero, GELU, MLP ratio 4.

    Times and labels are embedded as in that paper. The width is that of the network it is compared with; the depth is chosen for
    the same active compute.
    """

    def __init__(self, size: int, labels: int, width: int, depth: int, heads: int, patch: int = 2) -> None:
        super().__init__()
        self.patch, self.side, self.width = patch, size // patch, width
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.register_buffer("places", places(self.side, width))
        self.when = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(labels, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.ada = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch * patch)
        nn.init.normal_(self.label.weight, std=0.02)
        for layer in (self.ada, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """Predict v [B, 1, R, R] from x [B, 1, R, R], t [B] and labels [B]."""
        del r
        rates = torch.exp(-math.log(10_000.0) * torch.arange(128, device=x.device) / 128)
        angle = 1000 * t[:, None] * rates
        c = F.silu(self.when(torch.cat((angle.cos(), angle.sin()), dim=1)) + self.label(labels))  # [B, D]
        h = self.embed(x).flatten(2).transpose(1, 2) + self.places  # [B, N, D]
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.ada(c).unsqueeze(1).chunk(2, dim=2)
        v = self.head(F.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale) + shift)  # [B, N, patch * patch]
        v = v.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(v, self.patch), None


class DiTBlock(nn.Module):
    """Attention and a GELU layer, each with shift, scale and gate from the condition; gates start at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ada = nn.Linear(width, 6 * width)
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Transform tokens h [B, N, D] by the condition c [B, D] to [B, N, D]."""
        width = h.shape[2:]
        s1, m1, g1, s2, m2, g2 = self.ada(c).unsqueeze(1).chunk(6, dim=2)
        y = F.layer_norm(h, width, eps=1e-6) * (1 + m1) + s1
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1))
        h = h + g1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(h, width, eps=1e-6) * (1 + m2) + s2
        return h + g2 * self.down(F.gelu(self.up(y), approximate="tanh"))


def places(side: int, width: int) -> Tensor:
    """Compute sinusoids of row and column, [side * side, width]."""
    quarter = width // 4
    rates = torch.exp(-math.log(10_000.0) * torch.arange(quarter) / quarter)
    along = torch.arange(side)[:, None] * rates  # [side, quarter]
    one = torch.cat((along.sin(), along.cos()), dim=1)  # [side, width / 2]
    return torch.cat((one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)), dim=2).reshape(side * side, width)


class UNet(nn.Module):
    """diffusers' `UNet2DModel` with attention at its two lower resolutions."""

    def __init__(self, size: int, labels: int, channels: tuple[int, int, int], heads: int = 32) -> None:
        super().__init__()
        self.inner = UNet2DModel(
            sample_size=size, in_channels=1, out_channels=1, block_out_channels=channels, layers_per_block=1, norm_num_groups=8,
            attention_head_dim=heads, num_class_embeds=labels, down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """Predict v [B, 1, R, R] from x [B, 1, R, R], t [B] and labels [B]."""
        del r
        return self.inner(x, 1000 * t, class_labels=labels, return_dict=False)[0], None

"""mPLUG's image encoder: CLIP's ViT (arXiv 2103.00020). Returns all tokens after the last norm,
without CLIP's projection.

Reference: `models/multi_modal/mplug/clip` of modelscope at 2905da1, called with `skip_last_layer`.
Module names are those of the published checkpoint.

Shapes: B images, R image side, p patch side, N = (R / p)^2 + 1 tokens (class token first), W width,
H heads of 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64


class SelfAttention(nn.Module):
    """Attention with one packed projection, as CLIP stores it."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        packed = F.linear(x_BNW, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHNd = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed_BHNd.transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    """A pre-norm transformer block with CLIP's sigmoid approximation of GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x_BNW: Tensor) -> Tensor:
        x_BNW = x_BNW + self.attn(self.ln_1(x_BNW))
        hidden = self.mlp["c_fc"](self.ln_2(x_BNW))
        return x_BNW + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class VisionTransformer(nn.Module):
    """Normalized pixels [B, 3, R, R] to token features [B, N, W]."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int):
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*(VisionBlock(width) for _ in range(layers)))}
        )
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pixels_B3RR: Tensor) -> Tensor:
        patches = self.conv1(pixels_B3RR).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x_BNW = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer["resblocks"](x_BNW))

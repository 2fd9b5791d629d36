"""What LlamaGen and Open-MAGVIT2 share, above all the transformer block (LlamaGen `autoregressive/models/gpt.py`).

It is a pre-norm Llama block with fused QKV and SwiGLU. Two things differ from the Llama that everyone knows and matter for parity:

- RoPE is two-dimensional on interleaved pairs: the first half of the pairs turns with the row, the second with the column.
- The prefix (class or caption) is not turned by the identity but by zero, so its queries and keys vanish: every attention logit
  to or from a prefix entry is 0.

Shapes: B batch, L inputs, P prefix, D width, H heads, K head width, T image tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.backbones.attention import KVCache
from t2i.backbones.base import Backbone


@dataclass(frozen=True)
class LlamaConfig:
    """What the shapes of both families have in common."""

    dim: int
    n_layer: int
    n_head: int
    grid: tuple[int, int] = (16, 16)
    n_kv_head: int | None = None
    ffn_dim: int | None = None
    """Hidden width of the SwiGLU; None means 8/3 of dim rounded up to a multiple of 256."""
    num_classes: int = 1000
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    token_dropout: float = 0.1
    """Element dropout on all input embeddings of the trunk (training only)."""
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or -(-int(2 * 4 * self.dim / 3) // 256) * 256

    @property
    def prefix_tokens(self) -> int:
        return 1


class RMSNorm(nn.Module):
    """Normalise in fp32, cast back, then scale: the order matters in bf16."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        unit = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return unit.type_as(x) * self.weight


def rope_table(config: LlamaConfig) -> Tensor:
    """cos and sin for every position, [P + T, K/2, 2] fp32; zero for the prefix."""
    half = config.dim // config.n_head // 2
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    rows, columns = config.grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([torch.outer(axis.flatten(), frequencies) for axis in (row, column)], dim=-1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([image.new_zeros(config.prefix_tokens, *image.shape[1:]), image])


def rotate(x_BLHK: Tensor, rope_LK2: Tensor) -> Tensor:
    """Turn interleaved pairs by the table's angles, in fp32."""
    pairs = x_BLHK.float().unflatten(-1, (-1, 2))
    cos, sin = rope_LK2[None, :, None].unbind(-1)
    even, odd = pairs.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(x_BLHK)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.dim // config.n_head
        self.wqkv = nn.Linear(
            config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            k, v = k.type_as(q), v.type_as(q)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.heads
        )
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.null_id = config.num_classes
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, prepared: dict[str, Tensor], drop: Tensor | None) -> Tensor:
        labels = prepared["labels"]
        if drop is not None:
            labels = torch.where(drop, self.null_id, labels)
        return self.embedding_table(labels)[:, None]


def normal_weights(module: nn.Module, generator: torch.Generator) -> None:
    """N(0, 0.02) for all matrices, as the reference starts its pre-training."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02, generator=generator)


class LlamaBackbone(Backbone):
    """What both families have around their blocks."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.token_dropout = nn.Dropout(config.token_dropout)
        # Not a buffer: it must stay fp32 when the model is cast to bf16.
        self._rope: Tensor | None = None

    def rope_on(self, device: torch.device) -> Tensor:
        """`rope_table` on a device."""
        if self._rope is None or self._rope.device != device:
            self._rope = rope_table(self.config).to(device)
        return self._rope

    def new_cache(self, batch: int, length: int) -> KVCache:
        c, first = self.config, next(self.parameters())
        shape = (c.n_layer, batch, c.n_kv_head or c.n_head, length, c.dim // c.n_head)
        return KVCache(*shape, dtype=first.dtype, device=first.device)

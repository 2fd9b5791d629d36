"""Code shared by causal transformers (attention, its mask, the trunk) and by Llama-like ones (norm,
rotation, and the block of LlamaGen and Open-MAGVIT2).

That block (LlamaGen `autoregressive/models/gpt.py`) is a pre-norm Llama block with fused QKV and
SwiGLU. Two differences from the usual Llama block (as in Janus-Pro, `janus_modules.py`) matter for
parity:

- RoPE is two-dimensional on interleaved pairs: the first half of the pairs is rotated by the row,
  the second half by the column.
- The rows of the rotary table that belong to the prefix (class or caption) are zero, so the
  prefix's queries and keys vanish: every attention logit to or from a prefix entry is 0.

Shapes: B batch, L inputs, P prefix length, D model width, H heads, K width of a head, T image
tokens.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i.models import lean
from t2i.models.base import Backbone
from t2i.models.conditions import Condition
from t2i.models.kv_cache import KVCache
from t2i.models.lean import Dropout, rms_norm, swiglu
from t2i.products import prefers_products


def product_type(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer would multiply `x` in, given autocast."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def causal_mask(
    x_BLD: Tensor, prefix_mask_BP: Tensor | None, cache: KVCache | None
) -> Tensor | None:
    """What to add to attention logits, [B or 1, 1, L, extent] in the queries' dtype: 0 for entries
    that the inputs may attend to, otherwise -inf. None for plain causal attention.

    Every entry sees itself, even a masked-out prefix entry: a row without any key would give NaN.
    Numbers, not bools: attention would make numbers of those again in every layer, and keep them
    for the backward pass.
    """
    if prefix_mask_BP is None and cache is None:
        return None
    length = x_BLD.shape[1]
    index_L = torch.arange(length, device=x_BLD.device) if cache is None else cache.index
    extent = length if cache is None else cache.extent
    columns = torch.arange(extent, device=index_L.device)
    hidden = columns > index_L[..., None]
    if hidden.dim() == 2:  # all rows feed the same entries
        hidden = hidden[None]
    if prefix_mask_BP is not None:
        padding = torch.zeros(
            prefix_mask_BP.shape[0], extent, dtype=torch.bool, device=index_L.device
        )
        padding[:, : prefix_mask_BP.shape[1]] = ~prefix_mask_BP[:, :extent]
        hidden = (hidden | padding[:, None]) & (columns != index_L[..., None])
    shown = torch.zeros(hidden.shape, dtype=product_type(x_BLD), device=hidden.device)
    return shown.masked_fill(hidden, -torch.inf)[:, None]


def attend(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLK: Tensor,
    mask: Tensor | None,
    cache: KVCache | None,
    layer: int,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of a layer's queries to its keys and values, and to earlier ones in the cache:
    [B, L, H*K].

    Keys and values may have fewer heads than queries. Without a mask, attention is causal (see
    `causal_mask`).
    """
    if cache is not None:
        k, v = cache.update(layer, k_BHLK, v_BHLK)
        k_BHLK, v_BHLK = k.type_as(q_BHLK), v.type_as(q_BHLK)
        if q_BHLK.shape[2] == 1:
            assert mask is not None
            return _attend_by_products(q_BHLK, k_BHLK, v_BHLK, mask)
    if torch.compiler.is_compiling() and prefers_products(q_BHLK.device) and not dropout:
        if mask is None:
            length = q_BHLK.shape[2]
            mask = q_BHLK.new_full((1, 1, length, length), -torch.inf).triu(1)
        return _attend_by_products(q_BHLK, k_BHLK, v_BHLK, mask)
    # A branch, as with dynamic sizes the comparison alone is not a bool to a compiler.
    grouped = {"enable_gqa": True} if k_BHLK.shape[1] != q_BHLK.shape[1] else {}
    out = F.scaled_dot_product_attention(
        q_BHLK,
        k_BHLK,
        v_BHLK,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        **grouped,
    )
    return out.transpose(1, 2).flatten(2)


def _attend_by_products(q_BHnK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask: Tensor) -> Tensor:
    """Attention [B, n, H*K] of n queries by plain matrix products: fused kernels are made for many
    queries, and some have a setup cost for every new cache length.
    """
    batch, shared, _, width = k_BHLK.shape
    # Queries that share keys become the rows of one matrix product.
    q = (q_BHnK * width**-0.5).reshape(batch, shared, -1, width)
    scores = (q @ k_BHLK.transpose(-1, -2)).unflatten(2, (-1, q_BHnK.shape[2]))
    weights = (scores + mask[:, :, None]).softmax(-1)  # computes in fp32 whatever its dtype
    out = weights.flatten(2, 3) @ v_BHLK
    return out.view(q_BHnK.shape).transpose(1, 2).flatten(2)


def run_blocks(
    blocks: Iterable[Callable[..., Tensor]],
    x_BLD: Tensor,
    *shared,
    recompute: bool,
    compiled: bool = False,
) -> Tensor:
    """Apply blocks in turn, each to (x, *shared); `recompute` recomputes their activations in the
    backward pass.
    """
    run = _compiled_block() if compiled else _run_block
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            # The reentrant kind would train nothing when its input needs no gradient (frozen
            # embeddings).
            x_BLD = checkpoint(run, block, x_BLD, *shared, use_reentrant=False)
        else:
            x_BLD = run(block, x_BLD, *shared)
    return x_BLD


def _run_block(block: Callable[..., Tensor], *inputs) -> Tensor:
    return block(*inputs)


@lru_cache
def _compiled_block() -> Callable[..., Tensor]:
    """One compiled function for all blocks of a trunk, as they differ only in their weights."""
    return torch.compile(_run_block)


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a model's shape that all Llama-like trunks share."""

    dim: int
    n_layer: int
    n_head: int
    grid: tuple[int, int] = (16, 16)
    n_kv_head: int | None = None
    ffn_dim: int | None = None
    """Hidden width of the SwiGLU; None: 8/3 of `dim`, rounded up to a multiple of 256."""
    num_classes: int = 1000
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    token_dropout: float = 0.1
    """Element dropout on the trunk's input embeddings (training only)."""
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or -(-int(2 * 4 * self.dim / 3) // 256) * 256

    @property
    def prefix_tokens(self) -> int:
        return 1


class RMSNorm(nn.Module):
    """Normalize in fp32, cast back, then scale: the order matters in bf16."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not torch.compiler.is_compiling():  # a single fused kernel each way
            shape = x.shape[-1:]
            if x.dtype == self.weight.dtype == torch.float32:
                return F.rms_norm(x, shape, self.weight, self.eps)
            return F.rms_norm(x, shape, None, self.eps) * self.weight
        return rms_norm(x, self.weight, self.eps)


def rope_table(config: LlamaConfig) -> Tensor:
    """cos and sin for every position, [P + T, K/2, 2] fp32; zero for the prefix."""
    half = config.head_dim // 2
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    rows, columns = config.grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([torch.outer(axis.flatten(), frequencies) for axis in (row, column)], dim=-1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([image.new_zeros(config.prefix_tokens, *image.shape[1:]), image])


def rotate(x_BLHK: Tensor, rope_LK2: Tensor, *, halves: bool = False) -> Tensor:
    """Rotate pairs of entries in fp32, by the angles of a table that all rows share ([B, ...]: one
    per row). Pairs are neighbors, or with `halves` entries i of both halves.
    """
    axis, shape = (-2, (2, -1)) if halves else (-1, (-1, 2))
    x = x_BLHK.float().unflatten(-1, shape)
    if torch.compiler.is_compiling():  # generates no code for complex numbers
        cos, sin = rope_LK2.unsqueeze(-3).unbind(-1)
        first, second = x.unbind(axis)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis)
    else:  # one operation, bit-identical
        pairs = torch.complex(*x.unbind(axis)) if halves else torch.view_as_complex(x)
        turned = torch.view_as_real(pairs * torch.view_as_complex(rope_LK2).unsqueeze(-2))
        turned = turned.transpose(-1, -2) if halves else turned
    return turned.flatten(-2).type_as(x_BLHK)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.n_head, config.kv_heads
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(
            config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = Dropout(config.resid_dropout)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        both, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if lean.keep_less():  # a view would keep all of qkv alive for the backward pass
            v = v.clone()
        q, k = rotate(both, rope).split([self.heads, self.kv_heads], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.dropout(self.wo(attend(q, k, v, mask, cache, self.layer)))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.dropout = Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(swiglu(self.w1(x), self.w3(x))))


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
    """N(0, 0.02) for all matrices, as the reference initializes pre-training."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02, generator=generator)


class TransformerBackbone(Backbone):
    """A backbone whose trunk is a stack of blocks, each called with (x, *shared, mask, cache)."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The trunk's blocks, in order."""

    @abstractmethod
    def enter(self, x_BLD: Tensor, positions_L: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """The first block's input, then what all blocks share, such as rotary angles."""

    def finish(self, x: Tensor, *shared: Tensor) -> Tensor:
        """Applied between the last block and the head."""
        return x

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; those of queries may be more."""
        return self.spec.num_heads

    def trunk(
        self, x_BLD: Tensor, positions_L: Tensor, condition: Condition, cache: KVCache | None = None
    ) -> Tensor:
        mask = causal_mask(x_BLD, condition.mask, cache)
        x, *shared = self.enter(self.token_dropout(x_BLD), positions_L, condition)
        x = run_blocks(
            self.blocks,
            x,
            *(*shared, mask, cache),
            recompute=self.gradient_checkpointing,
            compiled=self.compile_blocks and cache is None,
        )
        return self.finish(x, *shared)

    def new_cache(self, batch: int, length: int) -> KVCache:
        first, head_dim = next(self.parameters()), self.spec.dim // self.spec.num_heads
        shape = (len(self.blocks), batch, self.kv_heads, length, head_dim)
        return KVCache(*shape, dtype=first.dtype, device=first.device)


class LlamaBackbone(TransformerBackbone):
    """The trunk of a Llama-like family: its blocks share rotary angles."""

    def __init__(self, trunk: LlamaConfig):
        super().__init__()
        self.trunk_shape = trunk
        self.token_dropout = Dropout(trunk.token_dropout)
        # Not a buffer: it must stay fp32 when the model is cast to bf16.
        self._rope: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.trunk_shape.kv_heads

    def rope_table(self) -> Tensor:
        """cos and sin for every position, [positions, K/2, 2] fp32."""
        return rope_table(self.trunk_shape)

    def rope_on(self, device: torch.device) -> Tensor:
        """`rope_table` on a device."""
        if self._rope is None or self._rope.device != device:
            self._rope = self.rope_table().to(device)
        return self._rope

    def enter(self, x_BLD: Tensor, positions_L: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        return x_BLD, self.rope_on(x_BLD.device)[positions_L]

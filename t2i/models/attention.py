"""What causal transformers of all families need: the key-value cache, the attention mask, and a
pass through blocks.

Shapes: B batch, L inputs, P prefix length, D model width, H heads, K width of a head.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class KVCache:
    """Preallocated keys and values, [B, H, length, K] per layer.

    `at(start, count)` says which entries the next trunk call writes. `extent` is how many leading
    entries attention reads: the loop may fix it to a bucket so that every step has one shape; a
    mask made from `index` hides what is not filled yet.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, length: int, head_dim: int, *, dtype, device
    ):
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = length
        self.index = torch.empty(0, dtype=torch.long, device=device)
        self.extent = 0

    def at(self, start: int, count: int) -> "KVCache":
        assert start >= 0 and start + count <= self.length, (start, count, self.length)
        self.index = torch.arange(start, start + count, device=self.keys.device)
        self.extent = start + count
        return self

    def update(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries and return the filled part."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.index, k_BHLK.to(keys.dtype))
        values.index_copy_(2, self.index, v_BHLK.to(values.dtype))
        return keys[:, :, : self.extent], values[:, :, : self.extent]


def causal_mask(
    x_BLD: Tensor, prefix_mask_BP: Tensor | None, cache: KVCache | None
) -> Tensor | None:
    """Which entries the inputs may attend to, bool [B or 1, 1, L, extent]; None where they are all
    and in order.

    Every entry sees itself, also a masked-out prefix entry: a row without any key would give NaN.
    """
    if prefix_mask_BP is None and cache is None:
        return None
    length = x_BLD.shape[1]
    index_L = torch.arange(length, device=x_BLD.device) if cache is None else cache.index
    extent = length if cache is None else cache.extent
    columns = torch.arange(extent, device=index_L.device)
    allowed = (columns <= index_L[:, None])[None]
    if prefix_mask_BP is not None:
        visible = torch.ones(
            prefix_mask_BP.shape[0], extent, dtype=torch.bool, device=index_L.device
        )
        visible[:, : prefix_mask_BP.shape[1]] = prefix_mask_BP[:, :extent]
        allowed = (allowed & visible[:, None]) | (columns == index_L[:, None])
    return allowed[:, None]


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
    """Attention of one layer's queries to its keys and values, after what the cache holds of them:
    [B, L, H*K].

    Keys and values may have fewer heads than queries. Without a mask attention is causal (see
    `causal_mask`).
    """
    if cache is not None:
        k, v = cache.update(layer, k_BHLK, v_BHLK)
        k_BHLK, v_BHLK = k.type_as(q_BHLK), v.type_as(q_BHLK)
    out = F.scaled_dot_product_attention(
        q_BHLK,
        k_BHLK,
        v_BHLK,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        enable_gqa=k_BHLK.shape[1] != q_BHLK.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def run_blocks(
    blocks: Iterable[Callable[..., Tensor]], x_BLD: Tensor, *shared, recompute: bool
) -> Tensor:
    """Apply blocks in turn, each to (x, *shared); `recompute` computes their activations again in
    the backward pass.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            # Not the reentrant kind, which trains nothing when its input needs no gradient, as with
            # frozen embeddings.
            x_BLD = checkpoint(block, x_BLD, *shared, use_reentrant=False)
        else:
            x_BLD = block(x_BLD, *shared)
    return x_BLD

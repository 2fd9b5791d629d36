"""The keys and values that a trunk has computed so far, in buffers whose shapes stay."""

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, [B, H, length, K] each.

    `at` says which entries the next trunk call writes, and how many leading ones attention reads:
    a bucket, so that few shapes occur; a mask made from `index` hides what is not filled yet.
    Buffers are a layer's own: a compiler copies one buffer whole to write into a view of it. They
    are one entry longer than what is read: a compiler makes other code for a whole buffer.
    """

    BUCKET = 64
    """Entries read are a multiple of this: on a GPU a step is recorded for each."""
    BUCKET_ON_A_CPU = 16
    """There one step serves all lengths, and entries that are read for nothing cost time."""

    def __init__(
        self, layers: int, batch: int, heads: int, length: int, head_dim: int, *, dtype, device
    ):
        shape = (batch, heads, length + 1, head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            for _ in range(2)
        )
        self.length = length
        self.multiple = self.BUCKET_ON_A_CPU if torch.device(device).type == "cpu" else self.BUCKET
        self.index = torch.empty(0, dtype=torch.long, device=device)
        self.extent = 0

    def at(self, index_L: Tensor, extent: int) -> "KVCache":
        """Write entries `index_L`, all below `extent`, and read the first `extent`. [B, L] gives
        each row entries of its own.
        """
        self.index, self.extent = index_L, extent
        return self

    def bucket(self, filled: int) -> int:
        """How many leading entries are read when so many are filled."""
        assert 0 < filled <= self.length, (filled, self.length)
        return min(-(-filled // self.multiple) * self.multiple, self.length)

    def update(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries and return those that are read."""
        keys, values = self.keys[layer], self.values[layer]
        for held, new in ((keys, k_BHLK), (values, v_BHLK)):
            if self.index.dim() == 1:
                held.index_copy_(2, self.index, new.to(held.dtype))
            else:
                rows_B1 = torch.arange(len(new), device=new.device)[:, None]
                held[rows_B1, :, self.index] = new.transpose(1, 2).to(held.dtype)
        return keys[:, :, : self.extent], values[:, :, : self.extent]

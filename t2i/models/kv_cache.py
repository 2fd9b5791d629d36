"""The keys and values that a trunk has computed so far, in buffers of fixed shape."""

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, [B, H, length, K] each.

    `at` sets which entries the next trunk call writes, and how many leading entries attention
    reads. That number is rounded up to a bucket, so that few shapes occur; a mask made from `index`
    hides entries that are not filled yet.
    Two details are for `torch.compile`: every layer has its own buffer, because a compiler copies a
    whole buffer to write into a view of it; and buffers are one entry longer than what is read,
    because a compiler generates different code for reading a whole buffer.
    """

    BUCKET = 64
    """The number of entries read is a multiple of this: on a GPU each is recorded separately."""
    BUCKET_ON_A_CPU = 16
    """Smaller, as one compiled step serves all lengths, and reading unused entries takes time."""

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
        """Let the next call write entries `index_L` ([B, L]: by row), all below `extent`, and read
        the first `extent` entries.
        """
        self.index, self.extent = index_L, extent
        return self

    def bucket(self, filled: int) -> int:
        """How many leading entries to read when `filled` of them are filled."""
        assert 0 < filled <= self.length, (filled, self.length)
        return min(-(-filled // self.multiple) * self.multiple, self.length)

    def update(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new entries and return the entries to read."""
        keys, values = self.keys[layer], self.values[layer]
        for held, new in ((keys, k_BHLK), (values, v_BHLK)):
            if self.index.dim() == 1:
                held.index_copy_(2, self.index, new.to(held.dtype))
            else:
                rows_B1 = torch.arange(len(new), device=new.device)[:, None]
                held[rows_B1, :, self.index] = new.transpose(1, 2).to(held.dtype)
        return keys[:, :, : self.extent], values[:, :, : self.extent]

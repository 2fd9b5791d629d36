"""Which part of a backbone is trained. Does not import torch, so that --help is fast."""

from dataclasses import dataclass
from typing import Literal

from t2i.errors import UserError
from t2i.fields import check_types

Tuning = Literal["full", "codec", "lora"]

_MOST_RANK = 4096
"""The width of the widest trunk (Janus-Pro 7B): no update has a higher rank."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the backbone's attention and feed-forward layers."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""

    def __post_init__(self):
        check_types(self, "lora.")
        if not 1 <= self.rank <= _MOST_RANK:
            raise UserError(f"lora.rank={self.rank} must be at least 1 and at most {_MOST_RANK}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} must be at least 0 and below 1")
        if not 1e-6 <= self.alpha <= 1e6:  # with 0 the adapters would do nothing
            raise UserError(f"lora.alpha={self.alpha} must be a number above 0 (from 1e-6 to 1e6)")

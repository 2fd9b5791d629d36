"""What of a backbone is trained. Without torch, so that programs can name their options at once."""

import math
from dataclasses import dataclass
from typing import Literal

from t2i.errors import UserError

Tuning = Literal["full", "codec", "lora"]


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
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora.rank={self.rank} must be at least 1 and lora.dropout={self.dropout} in [0, 1)"
            )
        if not 0 < self.alpha < math.inf:  # with 0 the adapters would do nothing
            raise UserError(f"lora.alpha={self.alpha} must be a number above 0")

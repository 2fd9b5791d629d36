"""One micro-batch of training data."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """What one forward pass reads."""

    codes: Tensor
    """int64 [B, T, S]"""
    prepared: dict[str, Tensor]
    """Conditions, as `Backbone.prepare` gives them."""
    keys: Tensor
    """int64 [B], of the noise."""
    drop: Tensor | None
    """bool [B], samples that lose their condition."""
    progress: float
    """Share of the run that is done."""
    indices: Tensor
    """int64 [B], of the samples in their set."""

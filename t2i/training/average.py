"""A moving average of the trained weights: the model that is validated, drawn with and saved.

Training itself goes on with the weights of the last step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2i.training.state import trained


class Average:
    """The average of a model's trained weights, in fp32, the same in every process.

    Args:
        decay: share of the average that stays at each step; less during the first steps.

    Attributes:
        weights: by parameter name; an earlier average is put there to go on with it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._parameters, self._decay = trained(model), decay
        self.weights: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (1 is the first)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, p in self._parameters.items():
            self.weights[name].lerp_(p.float(), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """For the duration the model has the average as its weights."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(weights[name])

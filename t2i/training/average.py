"""A moving average of the trained weights: validation, drawing and checkpoints use it.

Training itself continues from the weights of the last step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2i.training.state import trained


class Average:
    """The average of a model's trained weights, in fp32, the same in every process.

    Args:
        decay: share of the average kept at each step; lower during the first steps. 0: no average;
            the methods then do nothing.

    Attributes:
        weights: by parameter name; a resumed run sets the stored average here.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._parameters, self._decay = trained(model) if decay else {}, decay
        self.weights: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after a step (1 is the first)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, p in self._parameters.items():
            self.weights[name].lerp_(p.float(), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averaged weights, if there are any."""
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

"""The method's settings. Without torch, so that programs can name their options at once."""

from dataclasses import dataclass
from typing import Literal, get_args

from t2i.errors import UserError

Residual = Literal["first", "all", "none"]
Schedule = Literal["linear", "sine", "sqrt", "exponential"]
NoiseKind = Literal["categorical", "codebook", "gaussian"]

_MOST_DEPTH = 100
"""Deeper than the trunks that it stands beside."""
_SLOT_WEIGHTS = (1e6, 1e-12)
"""The heaviest, and the lightest of slot 0: beyond, sums or divisions overflow."""


@dataclass(frozen=True)
class TensorARConfig:
    """The method's own settings; `t2i.presets` has the published ones."""

    k: int = 4
    """Window size: how many codes a step predicts. 1 is the base model."""
    depth: int = 1
    """Blocks in each of the two query transformers."""
    mlp: bool = False
    """Give each block a SwiGLU of 8 D^2 parameters."""
    residual: Residual = "first"
    """Which output slots get the trunk's hidden state added: slot 0 only, all, or none (then
    neither does the input encoder).
    """
    noise: NoiseKind = "categorical"
    """How drafts in the input windows are corrupted in training."""
    schedule: Schedule = "exponential"
    """How the corruption grows from slot to slot."""
    noise_floor: float = 0.0
    """Smallest corruption of a draft: the schedule is squeezed into [floor, 1]."""
    own_drafts: float = 0.0
    """Share of training samples whose drafts are the model's own samples, as in sampling, instead
    of noised truth.
    """
    anneal: bool = False
    """Let that share grow linearly from 0 at the first step to `own_drafts` at the last."""
    detach: bool = False
    """The output decoder reads the trunk's state without a gradient: drafts cannot pull on the
    trunk, only on the head.
    """
    slot_weights: tuple[float, ...] = (1.0,)
    """Loss weight of slot 0, 1, ...; the last entry holds for all further slots."""

    def __post_init__(self):
        for name, given, kind in (
            ("noise", self.noise, NoiseKind),
            ("schedule", self.schedule, Schedule),
            ("residual", self.residual, Residual),
        ):
            if given not in get_args(kind):
                raise UserError(
                    f"unknown {name} {given!r}; choose one of {', '.join(get_args(kind))}"
                )
        weights = self.slot_weights
        heaviest, lightest = _SLOT_WEIGHTS
        fit = bool(weights) and all(0 <= weight <= heaviest for weight in weights)
        if not fit or weights[0] < lightest:
            raise UserError(
                f"slot_weights={weights}: give weights >= 0 and at most {heaviest:g}, that of slot 0 "
                f"at least {lightest:g}"
            )
        for name in ("own_drafts", "noise_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be a number from 0 to 1")
        if self.own_drafts > 0 and self.noise == "gaussian":
            raise UserError(
                "own_drafts and noise='gaussian' exclude each other: that noise is on embeddings, not on codes"
            )
        if not 1 <= self.depth <= _MOST_DEPTH:
            raise UserError(f"depth={self.depth} must be from 1 to {_MOST_DEPTH}")

    def weights(self) -> list[float]:
        """Loss weight of every slot."""
        return [self.slot_weights[min(j, len(self.slot_weights) - 1)] for j in range(self.k)]

"""The method's settings. Does not import torch, so that `--help` is fast."""

from dataclasses import dataclass
from typing import Literal, get_args

from t2i.errors import UserError, choose_one
from t2i.fields import check_types

Residual = Literal["first", "all", "none"]
Schedule = Literal["linear", "sine", "sqrt", "exponential"]
NoiseKind = Literal["categorical", "codebook", "gaussian"]

_MOST_DEPTH = 100
"""Deeper than any trunk."""
_SLOT_WEIGHTS = (1e6, 1e-12)
"""Largest weight of any slot, smallest weight of slot 0: beyond, sums or divisions overflow."""


@dataclass(frozen=True)
class TensorARConfig:
    """Settings of the method; `t2i.presets` has the published ones."""

    k: int = 4
    """Window size: the number of codes that each step predicts. 1 is the base model."""
    depth: int = 1
    """Number of blocks in each of the codec's two query transformers."""
    mlp: bool = False
    """Give each block an MLP (SwiGLU, 8 D^2 parameters for width D)."""
    residual: Residual = "first"
    """Which output slots add the trunk's hidden state: slot 0 only, all, or none (then the input
    encoder has no residual either).
    """
    noise: NoiseKind = "categorical"
    """The kind of noise that corrupts drafts in the input windows during training."""
    schedule: Schedule = "exponential"
    """How the strength of the noise grows from slot to slot."""
    noise_floor: float = 0.0
    """Smallest noise strength of a draft: the schedule is rescaled to [floor, 1]."""
    own_drafts: float = 0.0
    """Share of training samples whose drafts are sampled from the model, as when drawing images,
    instead of true codes with noise. A number from 0 to 1.
    """
    anneal: bool = False
    """Grow `own_drafts` linearly over the run, from 0 at the first step to its full value at the
    last."""
    detach: bool = False
    """Pass no gradient from the output decoder to the trunk: drafts then train the head, but not
    the trunk.
    """
    slot_weights: tuple[float, ...] = (1.0,)
    """Loss weights of slots 0, 1, ...; the last one also applies to all further slots."""

    def __post_init__(self):
        for name, given, kind in (
            ("noise", self.noise, NoiseKind),
            ("schedule", self.schedule, Schedule),
            ("residual", self.residual, Residual),
        ):
            if given not in get_args(kind):
                raise UserError(f"unknown {name} {given!r}; {choose_one(given, get_args(kind))}")
        check_types(self)
        weights = self.slot_weights
        heaviest, lightest = _SLOT_WEIGHTS
        fit = bool(weights) and all(0 <= weight <= heaviest for weight in weights)
        if not fit or weights[0] < lightest:
            raise UserError(
                f"slot_weights={weights}: give one or more weights from 0 to {heaviest:g}, slot 0's "
                f"at least {lightest:g}"
            )
        for name in ("own_drafts", "noise_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be a number from 0 to 1")
        if self.own_drafts > 0 and self.noise == "gaussian":
            raise UserError(
                f"own_drafts={self.own_drafts} cannot be combined with noise='gaussian', which is "
                "added to embeddings, not to codes: set own_drafts to 0, or another noise"
            )
        if not 1 <= self.depth <= _MOST_DEPTH:
            raise UserError(f"depth={self.depth} must be from 1 to {_MOST_DEPTH}")

    def weights(self) -> list[float]:
        """Loss weight of every slot."""
        return [self.slot_weights[min(j, len(self.slot_weights) - 1)] for j in range(self.k)]

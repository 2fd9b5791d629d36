"""Sampling settings on a command line: what is given replaces the model's own; cheap to import."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i.backbones.base import SamplingConfig


@dataclass(frozen=True)
class SamplingOverrides:
    """Each field as in `SamplingConfig` (several numbers: one per sub-token of a code); None keeps
    the model's own setting.
    """

    cfg_scale: float | tuple[float, ...] | None = None
    """Classifier-free guidance; 1 is off."""
    cfg_interval: int | None = None
    """Guide the first image token and the next so many + 1 only; -1 guides all."""
    cfg_power: float | None = None
    """Let guidance grow along a power-cosine; 0 is constant."""
    temperature: float | tuple[float, ...] | None = None
    """0 takes the most likely code."""
    top_k: int | tuple[int, ...] | None = None
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float | tuple[float, ...] | None = None
    """Keep the smallest set of codes whose probability exceeds p; 1 keeps all."""
    window: int | None = None
    """Slots per step of a TensorAR model; 0 is all."""
    renoise: float | None = None
    """Corrupt drafts before they are fed back, with this share of the training noise."""
    draft_temperature: float | None = None
    """Factor on the temperature of the drafts."""

    def apply(self, own: "SamplingConfig") -> "SamplingConfig":
        """The model's own settings with these in their place."""
        return replace(own, **{k: v for k, v in asdict(self).items() if v is not None})

    def check(self) -> None:
        """UserError for a value that no model takes, before one is loaded."""
        from t2i.backbones.base import SamplingConfig

        self.apply(SamplingConfig())

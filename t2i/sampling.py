"""How codes are drawn: the settings, and how a command line overrides them. Without torch."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from t2i.errors import UserError

Speed = Literal["auto", "eager", "compiled", "graphs"]
"""How the steps are run (`t2i.tensorar.speed`); no image depends on it but for rounding."""


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn. A tuple has one number per sub-token of a code; a number holds for all
    of them.
    """

    cfg_scale: float | tuple[float, ...] = 1.0
    """Classifier-free guidance: null + scale * (cond - null); 1 turns it off and halves the work.
    """
    cfg_interval: int = -1
    """Guide the first image token and the next `cfg_interval` + 1 only (LlamaGen's option); -1
    guides all.
    """
    cfg_power: float = 0.0
    """Let guidance grow from 1 to `cfg_scale` along a power-cosine (RAR's option); the higher, the
    later. 0 is constant.
    """
    temperature: float | tuple[float, ...] = 1.0
    """0 takes the most likely code."""
    top_k: int | tuple[int, ...] = 0
    """Keep the k most likely codes (and ties); 0 keeps all."""
    top_p: float | tuple[float, ...] = 1.0
    """Keep the smallest set of codes whose probability exceeds p; 1 keeps all."""
    window: int = 0
    """Slots that a TensorAR model predicts and feeds back per step; 0 is all k, fewer are fewer
    drafts.
    """
    draft_temperature: float = 1.0
    """Factor on the temperature of the drafts; 0 takes the most likely."""
    renoise: float = 0.0
    """Corrupt drafts before they are fed back, with this share of the training noise's strength."""

    def __post_init__(self):
        for name in _PER_SUB_TOKEN:
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(_numbers(self.cfg_scale)) < 1:
            raise UserError(
                f"cfg_scale={self.cfg_scale} must be at least 1 (1 is without guidance)"
            )
        if self.cfg_interval < -1:
            raise UserError(f"cfg_interval={self.cfg_interval} must be at least -1 (guide all)")
        if self.cfg_power < 0:
            raise UserError(
                f"cfg_power={self.cfg_power} must not be negative (0 is constant guidance)"
            )
        if min(_numbers(self.temperature)) < 0:
            raise UserError(f"temperature={self.temperature} must not be negative (0 is greedy)")
        top_p = _numbers(self.top_p)
        if min(_numbers(self.top_k)) < 0 or not 0 < min(top_p) <= max(top_p) <= 1:
            raise UserError(f"top_k={self.top_k} must be >= 0 and top_p={self.top_p} in (0, 1]")
        if self.window < 0 or self.draft_temperature < 0:
            raise UserError(
                f"window={self.window} and draft_temperature={self.draft_temperature} must not be negative"
            )
        if not 0 <= self.renoise <= 1:
            raise UserError(f"renoise={self.renoise} must be from 0 to 1")

    def by_sub_token(self, count: int) -> tuple["SamplingConfig", ...]:
        """The settings of each of `count` sub-tokens, in plain numbers; UserError if a tuple has
        another length.
        """
        given = {n: getattr(self, n) for n in _PER_SUB_TOKEN if isinstance(getattr(self, n), tuple)}
        for name, values in given.items():
            if len(values) != count:
                raise UserError(
                    f"{name}={values} must be one number, or one for each of the {count} sub-token(s) of a code"
                )
        return tuple(replace(self, **{n: v[s] for n, v in given.items()}) for s in range(count))


_PER_SUB_TOKEN = ("cfg_scale", "temperature", "top_k", "top_p")


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """One number or several, as a tuple; an empty one as a value that no setting allows."""
    return (value if isinstance(value, tuple) else (value,)) or (-1.0,)


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

    def apply(self, own: SamplingConfig) -> SamplingConfig:
        """The model's own settings with these in their place."""
        return replace(own, **{k: v for k, v in asdict(self).items() if v is not None})

    def check(self) -> None:
        """UserError for a value that no model takes, before one is loaded."""
        self.apply(SamplingConfig())

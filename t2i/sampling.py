"""How codes and images are drawn: the settings, and what overrides them. Without torch."""

import logging
import math
import operator
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from t2i.errors import UserError
from t2i.fields import all_optional

log = logging.getLogger(__name__)

Speed = Literal["auto", "eager", "compiled", "graphs"]
"""How the steps are run (`t2i.tensorar.speed`); no image depends on it but for rounding."""

_MOST_ROWS = 65_536
"""Of a batch that is drawn: it is filled up to its size."""
_MOST_COUNT = 1_000_000_000
"""Of anything else: more steps, samples or pixels than anybody has a use for."""

Speculate = int | Literal["auto", "off"]
"""Windows of each image that a call of the model draws, all but one from guesses; off (or 0): one;
auto: what `docs/fewer_steps.md` found to pay. No image depends on it but for rounding.
"""


_MOST_GUIDANCE = 1000
"""Far more than draws anything, and far from where numbers overflow and images are noise."""


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn. Of several numbers, each is for one sub-token of a code."""

    cfg_scale: float | tuple[float, ...] = 1.0
    """Classifier-free guidance: null + scale * (cond - null); 1 is off and halves the work."""
    cfg_interval: int = -1
    """Guide only the first cfg_interval + 2 image tokens (LlamaGen's option); -1: all."""
    cfg_power: float = 0.0
    """Let guidance grow along a power-cosine (RAR's option), the later the higher; 0: constant."""
    temperature: float | tuple[float, ...] = 1.0
    """0 takes the most likely code."""
    top_k: int | tuple[int, ...] = 0
    """Keep the k most likely codes (and ties); 0 keeps all."""
    top_p: float | tuple[float, ...] = 1.0
    """Keep the smallest set of codes whose probability exceeds p; 1 keeps all."""
    window: int = 0
    """Slots that a TensorAR model predicts and feeds back per step; 0 is all k."""
    stride: int = 1
    """Codes that a step of a TensorAR model makes final: an image takes so many times fewer steps,
    and all but the first of them are drawn without knowing each other.
    """
    draft_temperature: float = 1.0
    """Factor on the temperature of the drafts; 0 takes the most likely."""
    renoise: float = 0.0
    """Corrupt drafts before they are fed back, with this share of the training noise's strength."""

    def __post_init__(self):
        for own in fields(self):
            object.__setattr__(self, own.name, _plain(own.name, getattr(self, own.name)))
        scales = _numbers(self.cfg_scale)
        if min(scales) < 1 or max(scales) > _MOST_GUIDANCE:
            raise UserError(
                f"cfg_scale={self.cfg_scale} must be at least 1 (1 is without guidance), and at most "
                f"{_MOST_GUIDANCE}"
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
                f"window={self.window} and draft_temperature={self.draft_temperature} must not be "
                "negative"
            )
        if self.stride < 1:
            raise UserError(f"stride={self.stride} must be at least 1")
        if not 0 <= self.renoise <= 1:
            raise UserError(f"renoise={self.renoise} must be from 0 to 1")

    def of_base(self) -> "SamplingConfig":
        """Without what only windows have: how the base draws by itself."""
        usual = SamplingConfig()
        return replace(self, **{name: getattr(usual, name) for name in _OF_WINDOWS})

    @property
    def is_greedy(self) -> bool:
        """Whether every code is the most likely one."""
        return max(_numbers(self.temperature)) == 0

    def by_sub_token(self, count: int) -> "tuple[SubTokenSampling, ...]":
        """The settings of each of `count` sub-tokens; UserError if numbers are missing for some."""
        settings = vars(self)
        given = {n: v for n in _PER_SUB_TOKEN if isinstance(v := settings[n], tuple)}
        for name, values in given.items():
            if len(values) != count:
                raise UserError(
                    f"{name}={values} must be one number, or one for each of the {count} "
                    "sub-token(s) of a code"
                )
        own = ({n: v[s] for n, v in given.items()} for s in range(count))
        return tuple(SubTokenSampling(**settings | numbers) for numbers in own)


@dataclass(frozen=True)
class SubTokenSampling(SamplingConfig):
    """The settings of one sub-token: plain numbers."""

    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


_PER_SUB_TOKEN = ("cfg_scale", "temperature", "top_k", "top_p")
_WHOLE = ("cfg_interval", "top_k", "window", "stride")
_OF_WINDOWS = ("window", "stride", "draft_temperature", "renoise")


def _plain(name: str, value: Any) -> Any:
    """A setting in numbers of Python (JSON knows no others), several of them as a tuple."""
    if name in _PER_SUB_TOKEN and isinstance(value, list | tuple):
        return tuple(_plain(name, number) for number in value)
    wanted = "whole" if name in _WHOLE else "finite"
    kind = Integral if name in _WHOLE else Real
    if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name}={value!r:.80} must be a {wanted} number")
    return operator.index(value) if isinstance(value, Integral) else float(value)


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """One number or several, as a tuple; an empty one as a value that no setting allows."""
    return (value if isinstance(value, tuple) else (value,)) or (-1.0,)


@all_optional(SamplingConfig)
class SamplingOverrides:
    """Each setting as in `SamplingConfig`; None keeps the model's own."""

    def apply(self, own: SamplingConfig) -> SamplingConfig:
        """The model's own settings with these in their place."""
        return replace(own, **{k: v for k, v in vars(self).items() if v is not None})

    def check(self) -> None:
        """UserError for a value that no model takes, before one is loaded."""
        self.apply(SamplingConfig())

    def look_for_unread(self, settings: SamplingConfig, drafts: bool) -> None:
        """Warns of options that change nothing beside the settings that they became part of.

        drafts: whether the model draws drafts with them.
        """
        usual = vars(SamplingConfig())
        given = {n: v for n, v in vars(self).items() if v is not None and v != usual[n]}

        def told(*names: str) -> str:
            return ", ".join(f"{name}={given[name]}" for name in names if name in given)

        if not drafts and (of_drafts := told("draft_temperature", "renoise")):
            log.warning("%s has no effect with k=1 (or --window 1): nothing is drafted", of_drafts)
        if max(_numbers(settings.cfg_scale)) == 1 and (guided := told("cfg_interval", "cfg_power")):
            log.warning("%s has no effect with cfg_scale=1, which is without guidance", guided)
        if settings.is_greedy and (filters := told("top_k", "top_p")):
            log.warning("%s has no effect with temperature=0: the likeliest code is taken", filters)


@dataclass(frozen=True)
class DrawOptions:
    """How images are drawn."""

    seed: int = 0
    sampling: SamplingConfig | None = None
    """How codes are drawn; the model's own settings if None."""
    batch_size: int = 16
    """Images of a batch; another size changes rounding, and nothing else."""
    stages: bool = False
    """Also keep every refinement stage."""
    speed: Speed | None = None
    """How steps are run; the model's own (`model.speed`) if None."""
    speculate: Speculate | None = None
    """Windows of each image that a call draws; the model's own (`model.speculate`) if None."""
    size: tuple[int, int] | None = None
    """Height and width that images are resized to; the model's own if None."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts about the model that are recorded beside the images, but not compared."""

    def __post_init__(self):
        if self.sampling is not None and not isinstance(self.sampling, SamplingConfig):
            raise UserError(
                f"sampling is {self.sampling!r:.80}: give a t2i.SamplingConfig, "
                "or change the model's own with dataclasses.replace(model.sampling, ...)"
            )
        for name in ("seed", "batch_size"):
            check_whole(**{name: getattr(self, name)})
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        check_counts(_MOST_ROWS, batch_size=self.batch_size)
        check_seed(self.seed)
        check_speculate(self.speculate or 0)


def check_seed(seed: int) -> None:
    """UserError if random numbers cannot be made from it."""
    check_whole(seed=seed)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be between 0 and 2**63 - 1")


def check_speculate(speculate: Speculate) -> None:
    """UserError if so many windows cannot be drawn at once."""
    if speculate == "auto" or speculate == "off":
        return
    whole = isinstance(speculate, int) and not isinstance(speculate, bool)
    if not whole or speculate < 0 or speculate == 1:
        raise UserError(
            f"speculate={speculate!r:.80} must be auto, off, or at least 2 windows a call"
        )


def check_counts(most: int = _MOST_COUNT, **values: int | None) -> None:
    """UserError for one of these that is given and no whole number from 1 to `most`."""
    for name, value in values.items():
        if value is not None:
            check_whole(**{name: value})
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
            if value > most:
                raise UserError(f"{name}={value} must be at most {most:,}")


def check_whole(**values: int) -> None:
    """UserError for one of these that is not a whole number."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name}={value!r:.80} must be a whole number")

"""Settings for drawing codes and images, and overrides for them. Does not import torch."""

import logging
import math
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from t2i.errors import UserError
from t2i.fields import all_optional, check_types, python_number

log = logging.getLogger(__name__)

Speed = Literal["auto", "eager", "compiled", "graphs"]
"""How drawing steps are run (`t2i.tensorar.speed`); images are the same up to rounding."""
Speculate = int | Literal["auto", "off"]
"""Windows of each image to draw per call of the model, all but one from guesses; off (or 0): one;
auto: the number that `docs/fewer_steps.md` found to pay. Images are the same up to rounding.
"""

_MOST_ROWS = 65_536
"""Largest batch size for drawing: batches are padded to their full size."""
_MOST_COUNT = 1_000_000_000
"""Largest number of anything else: more steps, samples or pixels than anyone can use."""
_LEAST_POSITIVE = 1e-6
"""Smallest of times, sizes and rates: others would overflow, or print hundreds of digits."""
_LIMITS: dict[str, tuple[float, float, str]] = {
    # Far more than any useful guidance, and far less than where numbers overflow into noise.
    "cfg_scale": (1, 1000, "at least 1 (no guidance) and at most 1000"),
    "cfg_interval": (-1, math.inf, "at least -1 (guide all)"),
    "cfg_power": (0, math.inf, "at least 0 (constant guidance)"),
    "temperature": (0, math.inf, "at least 0 (greedy)"),
    "top_k": (0, math.inf, "at least 0 (keep all)"),
    "top_p": (math.ulp(0), 1, "above 0 and at most 1 (keep all)"),
    "window": (0, math.inf, "at least 0 (all slots)"),
    "stride": (1, math.inf, "at least 1"),
    "draft_temperature": (0, math.inf, "at least 0 (greedy)"),
    "renoise": (0, 1, "from 0 to 1"),
}
"""Smallest and largest value of each setting of `SamplingConfig`, and both in words."""


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn. A setting with several numbers has one for each sub-token of a code."""

    cfg_scale: float | tuple[float, ...] = 1.0
    """Classifier-free guidance: null + scale * (cond - null); 1 is off and halves the work."""
    cfg_interval: int = -1
    """Guide only the first cfg_interval + 2 image tokens (LlamaGen's option); -1: all."""
    cfg_power: float = 0.0
    """Exponent of a power-cosine along which guidance grows (RAR's option); 0: constant."""
    temperature: float | tuple[float, ...] = 1.0
    """Sampling temperature; 0 takes the most likely code."""
    top_k: int | tuple[int, ...] = 0
    """Keep the k most likely codes (and ties); 0 keeps all."""
    top_p: float | tuple[float, ...] = 1.0
    """Keep the smallest set of codes whose probability exceeds p; 1 keeps all."""
    window: int = 0
    """Slots that a TensorAR model predicts and feeds back per step; 0: all k."""
    stride: int = 1
    """Codes that a TensorAR model makes final per step: an image takes this many times fewer steps,
    but the codes of a step are drawn independently of each other.
    """
    draft_temperature: float = 1.0
    """Temperature of drafts, as a factor on `temperature`; 0 takes the most likely code."""
    renoise: float = 0.0
    """Corrupt drafts that are fed back, at this fraction of the training noise's strength."""

    def __post_init__(self):
        for own in fields(self):
            object.__setattr__(self, own.name, _plain(own.name, getattr(self, own.name)))
        for name, (least, most, words) in _LIMITS.items():
            value = getattr(self, name)
            if not least <= min(_numbers(value)) <= max(_numbers(value)) <= most:
                raise UserError(f"{name}={value} must be {words}")

    def of_base(self) -> "SamplingConfig":
        """The settings for drawing with the base alone: those about windows become defaults."""
        usual = SamplingConfig()
        return replace(self, **{name: getattr(usual, name) for name in _OF_WINDOWS})

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely code is always taken."""
        return max(_numbers(self.temperature)) == 0

    def by_sub_token(self, count: int) -> "tuple[SubTokenSampling, ...]":
        """The settings of each of `count` sub-tokens; UserError if a tuple has another length."""
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
    return python_number(value)


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """One or several numbers, as a tuple; for an empty tuple, a number that no setting allows."""
    return (value if isinstance(value, tuple) else (value,)) or (-1.0,)


@all_optional(SamplingConfig)
class SamplingOverrides:
    """Overrides for the settings of `SamplingConfig`; None keeps the model's own value."""

    def apply(self, own: SamplingConfig) -> SamplingConfig:
        """The model's own settings with these overrides."""
        return replace(own, **{k: v for k, v in vars(self).items() if v is not None})

    def check(self) -> None:
        """UserError for a value that no model accepts, before a model is loaded."""
        self.apply(SamplingConfig())

    def look_for_unread(self, settings: SamplingConfig, drafts: bool) -> None:
        """Warn about overrides that have no effect.

        Args:
            settings: the model's settings with these overrides.
            drafts: whether the model draws drafts with them.
        """
        usual = vars(SamplingConfig())
        given = {n: v for n, v in vars(self).items() if v is not None and v != usual[n]}

        def told(*names: str) -> str:
            return ", ".join(f"{name}={given[name]}" for name in names if name in given)

        if not drafts and (of_drafts := told("draft_temperature", "renoise")):
            log.warning("%s has no effect with k=1 (or --window 1): there are no drafts", of_drafts)
        if max(_numbers(settings.cfg_scale)) == 1 and (guided := told("cfg_interval", "cfg_power")):
            log.warning("%s has no effect with cfg_scale=1 (no guidance)", guided)
        if settings.is_greedy and (filters := told("top_k", "top_p")):
            log.warning("%s has no effect with temperature=0 (takes the likeliest code)", filters)


@dataclass(frozen=True)
class DrawOptions:
    """How images are drawn."""

    seed: int = 0
    sampling: SamplingConfig | None = None
    """How codes are drawn; the model's own settings if None."""
    batch_size: int | None = None
    """Images per batch, which affects only rounding; None: 16 (64 of classes), or fewer if the GPU
    has too little memory.
    """
    stages: bool = False
    """Also keep every refinement stage."""
    speed: Speed | None = None
    """How steps are run; the model's own setting (`model.speed`) if None."""
    speculate: Speculate | None = None
    """Windows of each image to draw per call; the model's own (`model.speculate`) if None."""
    size: tuple[int, int] | None = None
    """Height and width to resize images to; the model's own size if None."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts about the model to record with the images; not compared when drawing is resumed."""

    def __post_init__(self):
        if self.sampling is not None and not isinstance(self.sampling, SamplingConfig):
            raise UserError(
                f"sampling is {self.sampling!r:.80}: give a t2i.SamplingConfig, "
                "or change the model's own with dataclasses.replace(model.sampling, ...)"
            )
        check_counts(_MOST_ROWS, batch_size=self.batch_size)
        check_seed(self.seed)
        check_speculate(0 if self.speculate is None else self.speculate)
        check_types(self)


def check_seed(seed: int) -> None:
    """UserError if the random number generator does not accept this seed."""
    check_whole(seed=seed)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be between 0 and 2**63 - 1")


def check_speculate(speculate: Speculate) -> None:
    """UserError if this is not a possible `speculate` setting."""
    if speculate == "auto" or speculate == "off":
        return
    whole = isinstance(speculate, int) and not isinstance(speculate, bool)
    if not whole or speculate < 0 or speculate == 1:
        raise UserError(
            f"speculate={speculate!r:.80} must be auto, off, or at least 2 windows per call"
        )


def check_counts(most: int = _MOST_COUNT, **values: int | None) -> None:
    """UserError if one of the values is neither None nor a whole number from 1 to `most`."""
    for name, value in values.items():
        if value is not None:
            check_whole(**{name: value})
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
            if value > most:
                raise UserError(f"{name}={value} must be at most {most:,}")


def check_positive(most: float = 1e15, **values: float | None) -> None:
    """UserError if one of the values is neither None nor a number above 0 and at most `most`."""
    for name, value in values.items():
        if value is not None and not _LEAST_POSITIVE <= value <= most:  # nor NaN
            raise UserError(
                f"{name}={value} must be a number above 0 (from {_LEAST_POSITIVE:g} to {most:g})"
            )


def check_whole(**values: int) -> None:
    """UserError if one of the values is not a whole number."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name}={value!r:.80} must be a whole number")

"""The declared grids of `launch/experiment.py`."""

from dataclasses import dataclass, field

from t2i import presets
from t2i.tensorar.model import TensorARConfig

CONTROL = "control"


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning, and the ways of sampling from its result."""

    name: str
    method: TensorARConfig
    optim: dict = field(default_factory=dict)
    """Overrides of `OptimOptions`."""
    sampling: dict[str, dict] = field(default_factory=dict)
    """Further ways of sampling, as overrides of the base's `SamplingConfig`; the base's own is always scored."""
    curve: bool = False
    """Score the checkpoints at each quarter of the run as well."""


_COLDER = {
    "temperature 0.8": {"temperature": 0.8},
    "temperature 0.6": {"temperature": 0.6},
}
_SAMPLING = {
    **_COLDER,
    "renoise 1": {"renoise": 1.0},
    "renoise 0.5": {"renoise": 0.5},
    "drafts without guidance": {"draft_guidance": False},
    "draft temperature 0": {"draft_temperature": 0.0},
    "draft temperature 0.5": {"draft_temperature": 0.5},
    "window 1": {"window": 1},
    "window 2": {"window": 2},
    "keep 0.5": {"keep": 0.5},
    "keep 0.2": {"keep": 0.2},
    "contrast 0.2": {"contrast": 0.2},
    "contrast -0.2": {"contrast": -0.2},
}
_LIGHT = {"slot_weights": (1.0, 0.03)}


def _control(**optim) -> Arm:
    return Arm(CONTROL, presets.base(), optim, _COLDER, curve=True)


GRIDS: dict[str, tuple[Arm, ...]] = {
    "rates": tuple(
        Arm(f"{CONTROL} {rate:g}", presets.base(), {"backbone_lr": rate})
        for rate in (2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
    ),
}

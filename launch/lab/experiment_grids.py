"""The declared grids of `launch/lab/experiment.py`."""

from dataclasses import dataclass, field

from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig

CONTROL = "control"


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning, and the ways of sampling from its result."""

    name: str
    method: TensorARConfig
    optim: dict = field(default_factory=dict)
    """Overrides of `OptimOptions`."""
    sampling: dict[str, dict] = field(default_factory=dict)
    """Further ways of sampling: changes to the base's own, which is always scored."""
    curve: bool = False
    """Score the checkpoint at half of the run as well."""


_COLDER = {f"temperature {t}": {"temperature": t} for t in (0.8, 0.6)}
_TRUST: dict[str, dict] = {
    "renoise 1": {"renoise": 1.0},
    "draft temperature 0": {"draft_temperature": 0.0},
    "window 1": {"window": 1},
}
_SAMPLING: dict[str, dict] = {
    "temperature 0.6": {"temperature": 0.6},
    **_TRUST,
    "window 2": {"window": 2},
}


def _control(*, sampling=None, curve=False) -> Arm:
    return Arm(CONTROL, presets.base(), sampling=sampling or {}, curve=curve)


def _tuned(name: str, *, sampling=None, curve=False, optim=None, **method) -> Arm:
    """The tuned preset with a faster codec; the levers of the grid are changes to it."""
    optim = {"codec_lr": 3e-3, **(optim or {})}
    return Arm(name, presets.tuned(**method), optim, sampling or {}, curve)


GRIDS: dict[str, tuple[Arm, ...]] = {
    "presets": (
        _control(sampling=_COLDER, curve=True),
        _tuned("tuned", curve=True),
        _tuned("own drafts only", own_drafts=1.0, curve=True),
        Arm("iclr2026", presets.iclr2026(), sampling=_TRUST, curve=True),
        Arm("arxiv2505", presets.arxiv2505(), curve=True),
    ),
    "levers": (
        _control(sampling={"temperature 0.6": {"temperature": 0.6}}),
        _tuned("tuned", sampling=_SAMPLING),
        _tuned("residual all", residual="all"),
        _tuned("residual none", residual="none"),
        _tuned("draft weights 0.3", slot_weights=(1.0, 0.3)),
        _tuned("draft weights 0.1", slot_weights=(1.0, 0.1)),
        _tuned("draft weights 0.1, detached", slot_weights=(1.0, 0.1), detach=True),
        _tuned("codec rate 1e-3", optim={"codec_lr": 1e-3}),
        _tuned("codec warm-up", optim={"backbone_delay_steps": 30}),
        _tuned("noised truth only", own_drafts=0.0, sampling=_TRUST),
        _tuned("noised truth only, floor 0.7", own_drafts=0.0, noise_floor=0.7, sampling=_TRUST),
        _tuned("own drafts only", own_drafts=1.0),
        _tuned("own drafts, annealed", own_drafts=1.0, anneal=True),
        _tuned("deep codec", depth=2, mlp=True, sampling=_SAMPLING),
    ),
    "longer": (
        _control(curve=True),
        _tuned("tuned", curve=True),
        _tuned("own drafts only", own_drafts=1.0, curve=True),
        _tuned(
            "deep codec, full weights, detached",
            depth=2,
            mlp=True,
            slot_weights=(1.0, 1.0),
            detach=True,
            sampling={"window 1": {"window": 1}},
            curve=True,
        ),
    ),
}

"""The arms of `long_grid.py`: what each one trains, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from t2i.tensorar import presets
from t2i.tensorar.method import TensorARConfig

if TYPE_CHECKING:
    from launch.lab.long_steps import Objective
    from t2i.tensorar.model import TensorAR

BASE, CONTROL, FALLING = "base", "control", "control, falling rate"
_MOST = 0.4
"""Largest share of a sample's codes that noise replaces: about the noise of the nearest draft."""
_OWN = 0.5
"""Largest share of a sample's codes that the model's own samples replace."""


@dataclass(frozen=True)
class LongArm:
    """One way of fine-tuning."""

    name: str
    method: TensorARConfig
    trained: bool = True
    """False: examine the base without training it."""
    falls: bool = True
    """Let the backbone's learning rate fall to zero, as the codec's always does."""
    optim: dict = field(default_factory=dict)
    """Further overrides of `OptimOptions`."""
    objective: str = "method"
    """A name in `_objectives`."""
    control: str = FALLING
    """The arm to compare with, which differs only in the idea that is tried."""
    ways: dict[str, dict] = field(default_factory=dict)
    """Further ways of drawing from the trained model, by name: changes to the base's own sampling
    settings, and options of `long_ways.draw`.
    """
    away: tuple[float, ...] = ()
    """If given: start from the trained control, train it briefly on its own samples, and step away
    from the result, with each of these step sizes (Neon, arXiv 2510.03597).
    """


def _objectives() -> dict[str, Callable[["TensorAR"], "Objective"]]:
    """Functions that make an objective, by name."""
    from launch.lab import long_objectives as o

    return {
        "method": lambda model: o.Method(),
        "growing": lambda model: o.Method(grow=True),
        "noisy context": lambda model: o.NoisyContext(_MOST),
        "own context": lambda model: o.OwnContext(_OWN),
        "regressions": lambda model: o.Regressions(model, _MOST),
        "clean targets": lambda model: o.CleanTargets(_OWN),
        "shared noise": lambda model: o.SharedNoise(),
        "correction": lambda model: o.Correction(_OWN),
    }


def objective(name: str, model: "TensorAR") -> "Objective":
    """A new objective of this name."""
    return _objectives()[name](model)


# -- long runs -------------------------------------------------------------------------------------
_FAST = {"codec_lr": 3e-3}
_OWN_DRAFTS = presets.tuned(own_drafts=1.0)
_BASE = presets.base()
_CORE = (
    LongArm(CONTROL, _BASE, falls=False, control=CONTROL),
    LongArm(FALLING, _BASE),
    LongArm(BASE, _BASE, trained=False, control=BASE),
    LongArm("own drafts", _OWN_DRAFTS, optim=_FAST),
    LongArm("iclr2026", presets.iclr2026()),
    LongArm("noisy context", _BASE, objective="noisy context"),
    LongArm("reAR: noisy context, regressions", _BASE, objective="regressions"),
    LongArm("tuned", presets.tuned(), optim=_FAST),
    LongArm("arxiv2505", presets.arxiv2505()),
    LongArm("SAR: own context, clean targets", _BASE, objective="clean targets"),
    LongArm("own context", _BASE, objective="own context"),
)
_MORE = (
    LongArm("away from own samples", _BASE, away=(0.5, 1.0)),
    LongArm("control, falling from 3e-4", _BASE, optim={"backbone_lr": 3e-4}),
    LongArm(
        "own drafts, growing to full weight",
        replace(_OWN_DRAFTS, slot_weights=(1.0, 1.0)),
        optim=_FAST,
        objective="growing",
    ),
    LongArm(
        "own drafts, shared noise",
        _OWN_DRAFTS,
        optim=_FAST,
        objective="shared noise",
        ways={f"{which} shared": {"noise": which} for which in ("drafts", "all")},
    ),
    LongArm(
        "own drafts, correction",
        _OWN_DRAFTS,
        optim=_FAST,
        objective="correction",
        ways={"5 % again": {"again": 0.05}},
    ),
    LongArm(
        "own drafts, weights falling with distance",
        replace(_OWN_DRAFTS, slot_weights=(1.0, 0.3, 0.1, 0.03)),
        optim=_FAST,
    ),
)
_CONSTANT = tuple(
    replace(arm, name=f"{arm.name}, constant rate", falls=False, control=CONTROL)
    for arm in _CORE
    if arm.name in ("own drafts", "iclr2026", "tuned", "arxiv2505")
)


def _ablated(name: str, **changes) -> LongArm:
    return LongArm(name, presets.iclr2026(**changes))


_ABLATION = (
    LongArm(FALLING, _BASE),
    _ablated("iclr2026"),
    *(_ablated(schedule, schedule=schedule) for schedule in ("linear", "sine", "sqrt")),
    *(_ablated(f"k = {k}", k=k) for k in (2, 8)),
    *(_ablated(f"depth {depth}", depth=depth) for depth in (2, 4)),
    *(_ablated(f"residual {kind}", residual=kind) for kind in ("all", "none")),
    *(_ablated(noise, noise=noise) for noise in ("codebook", "gaussian")),
    *(_ablated(f"draft weights {w}", slot_weights=(1.0, w)) for w in (0.3, 0.03)),
    _ablated("own drafts", own_drafts=1.0),
)


# -- short runs: only the codec's learning rate falls ----------------------------------------------
def _short(name: str, method: TensorARConfig, **changes) -> LongArm:
    return LongArm(name, method, falls=False, control=CONTROL, **changes)


def _tuned(name: str, *, ways: dict | None = None, optim: dict | None = None, **method) -> LongArm:
    """The tuned preset with a higher codec rate and these changes to it."""
    return _short(name, presets.tuned(**method), optim=_FAST | (optim or {}), ways=ways or {})


_COLDER: dict[str, dict] = {f"temperature {t}": {"temperature": t} for t in (0.8, 0.6)}
_TRUST: dict[str, dict] = {
    "renoise 1": {"renoise": 1.0},
    "draft temperature 0": {"draft_temperature": 0.0},
    "window 1": {"window": 1},
}
_WAYS = {"temperature 0.6": _COLDER["temperature 0.6"], **_TRUST, "window 2": {"window": 2}}
_PRESETS = (
    _short(CONTROL, _BASE, ways=_COLDER),
    _tuned("tuned"),
    _tuned("own drafts only", own_drafts=1.0),
    _short("iclr2026", presets.iclr2026(), ways=_TRUST),
    _short("arxiv2505", presets.arxiv2505()),
)
_LEVERS = (
    _short(CONTROL, _BASE, ways={"temperature 0.6": _COLDER["temperature 0.6"]}),
    _tuned("tuned", ways=_WAYS),
    _tuned("residual all", residual="all"),
    _tuned("residual none", residual="none"),
    _tuned("draft weights 0.3", slot_weights=(1.0, 0.3)),
    _tuned("draft weights 0.1", slot_weights=(1.0, 0.1)),
    _tuned("draft weights 0.1, detached", slot_weights=(1.0, 0.1), detach=True),
    _tuned("codec rate 1e-3", optim={"codec_lr": 1e-3}),
    _tuned("codec warm-up", optim={"backbone_delay_steps": 30}),
    _tuned("noised truth only", own_drafts=0.0, ways=_TRUST),
    _tuned("noised truth only, floor 0.7", own_drafts=0.0, noise_floor=0.7, ways=_TRUST),
    _tuned("own drafts only", own_drafts=1.0),
    _tuned("own drafts, annealed", own_drafts=1.0, anneal=True),
    _tuned("deep codec", depth=2, mlp=True, ways=_WAYS),
)
_DEEP: dict[str, Any] = {"depth": 2, "mlp": True, "slot_weights": (1.0, 1.0), "detach": True}
_LONGER = (
    _short(CONTROL, _BASE),
    _tuned("tuned"),
    _tuned("own drafts only", own_drafts=1.0),
    _tuned("deep codec, full weights, detached", ways={"window 1": {"window": 1}}, **_DEEP),
)

LONG_GRIDS: dict[str, tuple[tuple[LongArm, ...], ...]] = {
    "presets": (_PRESETS,),
    "levers": (_LEVERS,),
    "longer": (_LONGER,),
    "long": (_CORE, (*_CONSTANT[:2], *_MORE, *_CONSTANT[2:])),
    "ablation": (_ABLATION,),
    "check": ((_CORE[1], _CORE[3]),),
}
"""The arms of each grid, by stage: all seeds of a stage come before the next stage."""

"""Named settings of the method."""

from dataclasses import fields, replace

from t2i.errors import UserError, choose_one
from t2i.tensorar.method import TensorARConfig


def iclr2026(**overrides) -> TensorARConfig:
    """ICLR 2026: one attention block on each side, exponential schedule, categorical noise."""
    return _changed(
        TensorARConfig(k=4, depth=1, mlp=False, schedule="exponential", noise="categorical"),
        overrides,
    )


def arxiv2505(**overrides) -> TensorARConfig:
    """arXiv 2505.16324 v1: two transformer blocks on each side, sine schedule, codebook noise."""
    return _changed(
        TensorARConfig(k=4, depth=2, mlp=True, schedule="sine", noise="codebook"), overrides
    )


def tuned(**overrides) -> TensorARConfig:
    """Not from the papers: a low loss weight on drafts, half of which are the model's own samples
    (evidence: docs/recipe.md).
    """
    return iclr2026(**{"slot_weights": (1.0, 0.03), "own_drafts": 0.5, **overrides})


def base(**overrides) -> TensorARConfig:
    """No TensorAR: the unchanged backbone (k = 1), for controls that run the same code."""
    return _changed(TensorARConfig(k=1), overrides)


METHODS = {"iclr2026": iclr2026, "arxiv2505": arxiv2505, "tuned": tuned, "base": base}


def method(name: str, **overrides) -> TensorARConfig:
    """A preset by name; UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown preset {name!r}; {choose_one(name, METHODS)}")
    return METHODS[name](**overrides)


def _changed(config: TensorARConfig, overrides: dict) -> TensorARConfig:
    names = [f.name for f in fields(config)]
    for name in overrides:
        if name not in names:
            raise UserError(f"the method has no setting {name!r}; {choose_one(name, names)}")
    return replace(config, **overrides)

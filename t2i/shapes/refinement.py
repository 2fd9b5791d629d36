"""How often refinement changes codes between stages, and whether changes repair or spoil.

Shapes: B images, T positions, N windows, k slots, S sub-tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i.evaluation import evidence
from t2i.rng import fold
from t2i.tensorar.model import TensorAR
from t2i.tensorar.windows import Windows
from t2i.training.batches import Batch


@dataclass(frozen=True)
class StageChanges:
    """Over sampled images, by refinement stage; fractions of codes."""

    flipped: list[float]
    """Between stage r and r + 1, for r = 1 .. stages - 1."""
    agreeing: list[float]
    """Stage r equals the final code, for r = 1 .. stages - 1."""


def stage_changes(windows: Tensor, geometry: Windows) -> StageChanges:
    """Of sampled windows int64 [B, N, k, S]; only positions that went through all stages count."""
    flipped, agreeing = evidence.stage_changes(windows, geometry)
    return StageChanges(flipped.mean(0).tolist(), agreeing.mean(0).tolist())


@dataclass(frozen=True)
class Repairs:
    """Over held-out images: a position's last draft, and the code drawn next, against the truth."""

    draft_right: float
    """Drafts that are the true code."""
    corrected: float
    """Of the wrong drafts, those whose final code is right."""
    spoilt: float
    """Of the right drafts, those whose final code is wrong."""
    control_corrected: float
    """Where the draft was wrong: how often the control, which sees no draft, is right."""
    control_spoilt: float
    """Where the draft was right: how often the control is wrong."""


@torch.no_grad()
def repairs(model: TensorAR, control: TensorAR, batches: Iterable[Batch]) -> Repairs:
    """Both models predict every position once, from the true codes before it, with equal luck."""
    assert model.config.k > 1, "needs drafts"
    counts = torch.zeros(2, 2, 2)  # draft right, model right, control right
    for batch in batches:
        own = model.own_draft_windows(
            batch.codes, model.backbone.encode_condition(batch.prepared), batch.keys
        )
        truth = batch.codes[:, 1:]
        draft = own[:, :-1, 1]
        outcomes = [(draft == truth).all(-1)]
        for m, windows in ((model, own), (control, control.windows.gather(batch.codes))):
            outcomes.append((_first_slot(m, batch, windows)[:, 1:] == truth).all(-1))
        index = 4 * outcomes[0].long() + 2 * outcomes[1].long() + outcomes[2].long()
        counts += torch.bincount(index.flatten(), minlength=8).view(2, 2, 2).cpu()
    wrong, right = counts[0], counts[1]
    return Repairs(
        draft_right=float(right.sum() / counts.sum()),
        corrected=float(wrong[1].sum() / wrong.sum()),
        spoilt=float(right[0].sum() / right.sum()),
        control_corrected=float(wrong[:, 1].sum() / wrong.sum()),
        control_spoilt=float(right[:, 0].sum() / right.sum()),
    )


def _first_slot(model: TensorAR, batch: Batch, windows: Tensor) -> Tensor:
    """Codes int64 [B, T, S] drawn for slot 0 of every window, given input windows."""
    condition = model.backbone.encode_condition(batch.prepared)
    d_BND = model.decode_slots(model.hidden(condition, windows))[:, :, 0]
    position_N = torch.arange(d_BND.shape[1], device=batch.keys.device)
    return model.draw(d_BND, fold(batch.keys[:, None], 5000, position_N))

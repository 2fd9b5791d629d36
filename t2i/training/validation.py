"""The held-out loss by slot, with two kinds of input: noised truth (what training sees) and the
model's own drafts.

In training a draft is the truth with probability 1 - b; in sampling it is the model's guess. The
loss on own drafts is therefore the one that predicts how well the model draws.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from t2i.models.conditions import to_device
from t2i.tensorar.model import TensorAR
from t2i.training.batches import Batch, TrainingData


@dataclass(frozen=True)
class Validation:
    """Mean cross entropy in nats per code, by slot."""

    noised_truth: list[float]
    own_drafts: list[float]

    def metrics(self) -> dict[str, float]:
        """Flat names for the log."""
        rows = {"noised_truth": self.noised_truth, "own_drafts": self.own_drafts}
        return {
            f"validation/{kind}/slot{j}": v
            for kind, values in rows.items()
            for j, v in enumerate(values)
        }


def batch_losses(model: TensorAR, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums and counts by slot for both kinds of input [2, 2, k]; the windows of own drafts."""
    condition = model.backbone.encode_condition(batch.prepared)
    keys = to_device(batch.keys, batch.codes.device)
    noised = model.noised_windows(batch.codes, keys)
    own = model.own_draft_windows(batch.codes, condition, keys)
    gaussian = keys if model.uses_gaussian_noise else None
    found = [
        model(batch.codes, condition, noised, gaussian),
        model(batch.codes, condition, own, None),
    ]
    return torch.stack([torch.stack([f.sums, f.counts]) for f in found]).cpu(), own


@torch.no_grad()
def validate(model: TensorAR, data: TrainingData) -> Validation:
    """Both held-out losses, equal for any number of processes; restores the model's mode."""
    was_training = model.training
    model.eval()
    total = torch.zeros(2, 2, model.config.k)
    for batch, counted in data.validation_batches():
        losses, _ = batch_losses(model, batch)
        if counted:
            total += losses
    model.train(was_training)
    total = data.processes.total(total)
    return Validation(*(total[:, 0] / total[:, 1]).tolist())

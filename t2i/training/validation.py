"""The held-out loss by slot, with two kinds of input: noised truth (what training sees) and the
model's own drafts.

In training a draft is the truth with probability 1 - b; in sampling it is a guess. The loss on own
drafts is therefore the honest one: it is what the model can do with what it will really be fed.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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


@torch.no_grad()
def validate(model: TensorAR, data: TrainingData) -> Validation:
    """Both held-out losses, the same on any number of processes; keeps the model's mode."""
    was_training = model.training
    model.eval()
    totals = {kind: torch.zeros(2, model.config.k) for kind in ("noised_truth", "own_drafts")}
    for batch, counted in data.validation_batches():
        for kind, losses_2k in losses_by_slot(model, batch).items():
            if counted:
                totals[kind] += losses_2k.cpu()
    model.train(was_training)
    for kind, total in totals.items():
        if data.processes.world_size > 1:
            total = total.to(data.processes.device)
            dist.all_reduce(total)
            totals[kind] = total.cpu()
    return means(totals)


def losses_by_slot(model: TensorAR, batch: Batch) -> dict[str, Tensor]:
    """Sums and counts [2, k] by kind of input."""
    condition = model.backbone.encode_condition(batch.prepared)
    noised = model.noised_windows(batch.codes, batch.keys)
    drafts = model.own_draft_windows(batch.codes, condition, batch.keys)
    gaussian = batch.keys if model.uses_gaussian_noise else None
    found = {
        "noised_truth": model(batch.codes, condition, noised, gaussian),
        "own_drafts": model(batch.codes, condition, drafts),
    }
    return {kind: torch.stack([loss.sums, loss.counts]) for kind, loss in found.items()}


def means(totals: dict[str, Tensor]) -> Validation:
    """Of such sums and counts over all batches."""
    return Validation(**{kind: (total[0] / total[1]).tolist() for kind, total in totals.items()})

"""The held-out loss by slot, with two kinds of input: noised truth (what training sees) and the
model's own drafts.

In training a draft is the truth with probability 1 - b; in sampling it is a guess. The loss on own
drafts is therefore the honest one: it is what the model can do with what it will really be fed.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from t2i.tensorar.model import TensorAR
from t2i.training.batches import TrainingData


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
        condition = model.backbone.encode_condition(batch.prepared)
        inputs = {
            "noised_truth": model.noised_windows(batch.codes, batch.keys),
            "own_drafts": model.own_draft_windows(batch.codes, condition, batch.keys),
        }
        for kind, windows in inputs.items():
            gaussian = batch.keys if kind == "noised_truth" and model.uses_gaussian_noise else None
            losses = model(batch.codes, condition, windows, gaussian)
            if counted:
                totals[kind] += torch.stack([losses.sums, losses.counts]).cpu()
    model.train(was_training)
    for kind, total in totals.items():
        if data.processes.world_size > 1:
            total = total.to(data.processes.device)
            dist.all_reduce(total)
            totals[kind] = total.cpu()
    return Validation(**{kind: (total[0] / total[1]).tolist() for kind, total in totals.items()})

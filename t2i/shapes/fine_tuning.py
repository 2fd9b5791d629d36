"""Fine-tunes, validates, draws and judges on the shapes world (quickstart, experiments, bases)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import geneval
from t2i.checkpoint import from_pretrained
from t2i.checkpoint_folders import run_checkpoints
from t2i.generation import draw_images
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.tensorar.model import TensorAR
from t2i.training.batches import TrainingData
from t2i.training.config import TrainConfig
from t2i.training.engine import start_processes
from t2i.training.loop import train
from t2i.training.validation import validate


def fine_tuned(run: TrainConfig) -> TensorAR:
    """The model at the end of a run; the run is started or resumed unless it is complete."""
    done = run_checkpoints(run.run_dir)
    if done and done[-1].name == f"step_{run.steps:06d}":
        return loaded(done[-1])
    # Also true of a run that was stopped before its first checkpoint, and starts again.
    begun = (run.run_dir / "config.json").is_file()
    return loaded(train(replace(run, resume=begun)))


def loaded(folder: Path) -> TensorAR:
    """Load a checkpoint as in training: on the process's device, in fp32."""
    return from_pretrained(folder, device=start_processes().device, dtype=torch.float32)


def held_out_losses(run: TrainConfig, model: TensorAR) -> dict[str, float]:
    """Held-out losses by slot, with the noised truth and with the model's own drafts as input.

    What a run holds out depends only on data and seed, so all methods share it.
    """
    return validate(model, TrainingData(run, model.backbone, start_processes())).metrics()


@dataclass(frozen=True)
class Examined:
    """One model's results on the benchmark prompts."""

    report: geneval.Judgement
    windows: Tensor
    """Final codes and drafts of all images, int64 [B, N, k, S]."""


def examine(
    model: TensorAR,
    metadata: Sequence[dict],
    *,
    seed: int,
    samples: int,
    sampling: SamplingConfig | None = None,
    batch_size: int = 48,
) -> Examined:
    """Draw images for these prompts and judge them by GenEval's rules with the exact detector."""
    prompts = [entry["prompt"] for entry in metadata]
    options = DrawOptions(seed, sampling, batch_size=batch_size)
    drawn = list(draw_images(model, prompts, options, samples_per_prompt=samples))
    report = geneval.score([one.image for one in drawn], metadata, ShapesDetector())
    return Examined(report, torch.stack([one.windows for one in drawn]))

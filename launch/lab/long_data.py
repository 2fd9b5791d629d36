"""The shapes world as codes on the device, for `long_steps.py`.

Scenes are drawn and encoded once. A run's batches and noise keys are computed in advance for all
steps; for the same seed they equal those of `t2i.training.batches`.

Shapes: n samples, T codes of an image, R steps, B samples of a step.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from t2i.data.order import sample_index
from t2i.models.base import Backbone
from t2i.rng import make_keys
from t2i.shapes.caption_bases import every_caption, scene_codes
from t2i.shapes.shapes_source import FINE_TUNING_SEED
from t2i.shapes.tiny_recipes import CaptionBase
from t2i.training.batches import Batch, noise_and_drop
from t2i.training.config import TrainConfig

HELD_OUT_ROWS = 256
"""Held-out samples per batch."""


@dataclass(frozen=True)
class EncodedScenes:
    """Codes and captions on the device."""

    codes_nT: Tensor
    """int64"""
    captions_n: Tensor
    """Each sample's row of `prepared`, int64."""
    prepared: dict[str, Tensor]
    """The prepared conditions of every caption of the world."""

    def rows(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes [B, T, 1] and conditions of the samples with these indices."""
        captions = self.captions_n[indices]
        return self.codes_nT[indices][..., None], {k: v[captions] for k, v in self.prepared.items()}


def every_caption_prepared(backbone: Backbone) -> dict[str, Tensor]:
    """The conditions of every caption of the world, in the order of `every_caption`, on the
    backbone's device.
    """
    captions = every_caption()
    parts = [backbone.prepare(captions[i : i + 512]) for i in range(0, len(captions), 512)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def drawn_scenes(
    backbone: Backbone, tokenizer: Path, count: int, folder: Path, workers: int
) -> EncodedScenes:
    """Scenes 0..count-1 of the fine-tuning world; their codes are kept in the folder."""
    device = backbone.device
    recipe = CaptionBase(
        out=folder, seed=FINE_TUNING_SEED, scenes=count, workers=workers, device=device.type
    )
    folder.mkdir(parents=True, exist_ok=True)
    found = scene_codes(recipe, tokenizer)
    codes = found.codes.to(device).long()
    return EncodedScenes(codes, found.prompts.to(device), every_caption_prepared(backbone))


@dataclass(frozen=True)
class Order:
    """All batches of a run, on the device."""

    scenes: EncodedScenes
    samples_RB: Tensor
    """Indices of scenes, int64."""
    keys_RB: Tensor
    """Keys of the noise, int64."""
    drop_RB: Tensor
    """Whether the caption is dropped, bool."""

    def batch(self, step: Tensor) -> Batch:
        """The batch of a step (int64 [1] on the device)."""
        samples, keys, drop = (
            table.index_select(0, step)[0]
            for table in (self.samples_RB, self.keys_RB, self.drop_RB)
        )
        codes, prepared = self.scenes.rows(samples)
        # A tensor used like a number, so that nothing is read back from the device.
        progress = cast("float", step[0] / len(self.samples_RB))
        return Batch(codes, prepared, keys, drop, progress, samples)


def order(scenes: EncodedScenes, config: TrainConfig, train: Tensor) -> Order:
    """The batches of `config.steps` steps over the samples `train`, equal to `TrainingData`'s."""
    device, steps, size = scenes.codes_nT.device, config.steps, config.batch_size
    assert steps is not None
    position_RB = torch.arange(steps * size).view(steps, size)
    keys, drop = noise_and_drop(make_keys(config.seed, position_RB), config.condition_dropout)
    samples = train[_positions(steps, size, len(train), config.seed)]
    return Order(scenes, samples.to(device), keys.to(device), drop.to(device))


@lru_cache(maxsize=8)
def _positions(steps: int, size: int, count: int, seed: int) -> Tensor:
    found = [sample_index(position, count, seed) for position in range(steps * size)]
    return torch.tensor(found).view(steps, size)


def held_out_batches(scenes: EncodedScenes, held_out: Tensor) -> list[Batch]:
    """The held-out samples in batches, with fixed noise keys and no dropped captions."""
    device, batches = scenes.codes_nT.device, []
    for indices in held_out.split(HELD_OUT_ROWS):
        codes, prepared = scenes.rows(indices.to(device))
        keys = make_keys(0, indices).to(device)
        batches.append(Batch(codes, prepared, keys, None, 1.0, indices))
    return batches

"""Training batches: the order of a run's examples, and the fixed held-out set."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from t2i.checkpoint_folders import read_config, run_checkpoints
from t2i.data.order import sample_index, split_indices
from t2i.data.samples import Source
from t2i.data.store import CodeStore
from t2i.errors import UserError, shorten
from t2i.models.base import Backbone
from t2i.models.conditions import to_device
from t2i.processes import Processes
from t2i.rng import fold, make_keys, uniforms
from t2i.training.config import TrainConfig
from t2i.training.examples import encode_examples
from t2i.training.run_plan import least_held_out, plan_run

_NOISE, _DROP, _CHOICE = 1, 2, 3  # streams derived from a sample's key

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One micro-batch of training data: what one forward pass reads."""

    codes: Tensor
    """int64 [B, T, S]"""
    prepared: dict[str, Tensor]
    """Conditions, as `Backbone.prepare` gives them."""
    keys: Tensor
    """int64 [B], random keys of the noise, on the CPU."""
    drop: Tensor | None
    """bool [B], samples that lose their condition."""
    progress: float
    """Share of the run that is done."""
    indices: Tensor
    """int64 [B], positions of the samples in the data set."""


def noise_and_drop(keys: Tensor, condition_dropout: float) -> tuple[Tensor, Tensor]:
    """For samples with keys int64 [...]: keys of their noise, and whether to drop the condition."""
    return fold(keys, _NOISE), uniforms(fold(keys, _DROP), 1)[..., 0] < condition_dropout


def stored_data_key(config: TrainConfig) -> str | None:
    """The key of the data a resumed run was trained on, from its newest checkpoint."""
    for folder in reversed(run_checkpoints(config.run_dir) if config.resume else []):
        with suppress(UserError):
            return read_config(folder)["training"]["data_key"]
    return None


class TrainingData:
    """The examples of a run, encoded by all ranks together and split into batches."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        processes: Processes,
        source: Source | None = None,
    ):
        """source: captioned images that are already open; None: open them now."""
        self.config, self.backbone, self.processes = config, backbone, processes
        expected = stored_data_key(config)
        self.store = store = encode_examples(config, backbone, processes, source, expected)
        held_out, same = least_held_out(config, len(store)), store.same_images()
        self.train, self.validation = split_indices(len(store), held_out, config.seed, same)
        self.plan = plan_run(config, len(store), len(self.validation))
        if len(self.validation) > held_out and processes.is_main:
            log.warning(
                f"{len(self.validation)} samples are held out instead of {held_out}, so that no "
                "held-out image is trained on: some images have several samples"
            )

    @property
    def key(self) -> str:
        """Identifies the data's content, for resume."""
        return self.store.key

    def held_out_conditions(self, count: int) -> list[str | int]:
        """The first distinct captions or classes of held-out samples, as prompts for sheets."""
        found = (self.store.condition(index) for index in self.validation.tolist())
        return list(islice(dict.fromkeys(found), count))

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's part of an optimizer step.

        A sample's noise and condition dropout depend only on its place in the run.
        """
        config, processes = self.config, self.processes
        share = config.batch_size // processes.world_size
        position = step * config.batch_size + processes.rank * share + torch.arange(share)
        where = [sample_index(p, len(self.train), config.seed) for p in position.tolist()]
        size, progress = config.engine.micro_batch, step / self.plan.steps
        parts = (self.train[where], make_keys(config.seed, position))
        for indices, keys in zip(*(part.split(size) for part in parts), strict=True):
            choice = fold(keys, _CHOICE) & 0xFFFF  # which of several captions or views
            noise, drop = noise_and_drop(keys, config.condition_dropout)
            yield self._on_device(indices, noise, drop, choice, progress)

    def validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of the held-out set: fixed samples with fixed noise, nothing dropped.

        Every rank gets the same number of batches, since each forward pass is collective under
        ZeRO-3. Batches marked False are padding and must not be counted.
        """
        size, world_size = self.config.engine.micro_batch, self.processes.world_size
        of_ranks = [self.validation[rank::world_size] for rank in range(world_size)]
        mine = of_ranks[self.processes.rank]
        for start in range(0, len(of_ranks[0]), size):  # rank 0 has the most samples
            counted = start < len(mine)
            indices = mine[start : start + size] if counted else self.validation[:1]
            yield self._on_device(indices, make_keys(0, indices), None, None), counted

    def names(self, indices: Tensor) -> str:
        """Names and numbers of samples, for a message."""
        return shorten([f"{self.store.name(i)} (number {i})" for i in indices.tolist()], most=8)

    def load(self, indices: Tensor, choice: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes int64 [B, T, S] and conditions as `Backbone.prepare` gives them, on any device.

        `choice` int64 [B]: random numbers that choose among several captions or views of an image;
        None: the first one.
        """
        store, backbone = self.store, self.backbone
        codes = store.codes(indices, choice)
        backbone.spec.check_codes(codes)
        if isinstance(store, CodeStore) and store.with_text:
            features = store.features(indices, backbone.spec.prefix_tokens, choice)
            return codes, backbone.collate_features(features)
        picked = torch.zeros_like(indices) if choice is None else choice
        pairs = zip(indices.tolist(), picked.tolist(), strict=True)
        return codes, backbone.prepare([store.condition(i, c) for i, c in pairs])

    def _on_device(
        self,
        indices: Tensor,
        keys: Tensor,
        drop: Tensor | None,
        choice: Tensor | None,
        progress: float = 1.0,
    ) -> Batch:
        device = self.processes.device
        try:
            codes, prepared = self.load(indices, choice)
        except UserError as error:
            if isinstance(self.store, CodeStore):  # its names may be in the damaged file
                raise
            raise UserError(f"{error} (in one of {self.names(indices)})") from error
        return Batch(
            to_device(codes, device),
            {name: to_device(value, device) for name, value in prepared.items()},
            keys,
            None if drop is None else to_device(drop, device),
            progress,
            indices,
        )

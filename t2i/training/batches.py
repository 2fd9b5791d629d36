"""Training batches: the order of a run's examples, and the fixed held-out set."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import torch
from torch import Tensor

from t2i.checkpoint import read_config, run_checkpoints
from t2i.data.order import batch_indices, split_indices
from t2i.data.samples import Source
from t2i.errors import UserError
from t2i.models.base import Backbone
from t2i.processes import Processes
from t2i.rng import fold, make_keys, uniforms
from t2i.training.config import TrainConfig
from t2i.training.engine import Batch
from t2i.training.examples import Examples
from t2i.training.plan import plan_run

_NOISE, _DROP, _CHOICE = 1, 2, 3  # streams derived from a sample's key


log = logging.getLogger(__name__)


def stored_data_key(config: TrainConfig) -> str | None:
    """The key of the data that a run to be resumed was trained on, by its newest checkpoint."""
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
        """source: captioned images that are open already; opened now if None."""
        self.examples = Examples(config, backbone, processes, source, stored_data_key(config))
        self.config, self.processes = config, processes
        self.plan = plan_run(config, len(self.examples), processes.world_size)
        held_out, same = self.plan.held_out, self.examples.store.same_images()
        self.train, self.validation = split_indices(len(self.examples), held_out, config.seed, same)
        if len(self.validation) > held_out and processes.is_main:
            log.warning(
                f"{len(self.validation)} samples are held out instead of {held_out}, so that no "
                "held-out image is trained on: some images have several samples"
            )

    @property
    def key(self) -> str:
        """Identifies the data's content, for resume."""
        return self.examples.key

    def held_out_conditions(self, count: int) -> list[str | int]:
        """Captions or classes of the first held-out samples, each once: prompts for sheets."""
        found = (self.examples.store.condition(index) for index in self.validation.tolist())
        return list(islice(dict.fromkeys(found), count))

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's part of an optimizer step.

        A sample's noise and dropout depend on its place in the run alone.
        """
        config, processes = self.config, self.processes
        share = config.batch_size // processes.world_size
        where = batch_indices(
            step,
            config.batch_size,
            len(self.train),
            config.seed,
            processes.rank,
            processes.world_size,
        )
        position = step * config.batch_size + processes.rank * share + torch.arange(share)
        keys = make_keys(config.seed, position)
        size = config.engine.micro_batch
        for indices, batch_keys in zip(
            self.train[where].split(size), keys.split(size), strict=True
        ):
            yield self._batch(indices, batch_keys, step / self.plan.steps)

    def _batch(self, indices: Tensor, keys: Tensor, progress: float) -> Batch:
        choice = fold(keys, _CHOICE) & 0xFFFF  # which of several captions or views
        drop = uniforms(fold(keys, _DROP), 1)[:, 0] < self.config.condition_dropout
        return self._load(indices, fold(keys, _NOISE), drop, choice, progress)

    def validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of the held-out set: fixed samples with fixed noise, nothing dropped.

        Every rank gets the same number of batches, since under ZeRO-3 each forward pass is
        collective; those with False only fill up and are not to be counted.
        """
        size, world_size = self.config.engine.micro_batch, self.processes.world_size
        mine = self.validation[self.processes.rank :: world_size].split(size)
        most = -(-len(self.validation) // world_size)
        for i in range(-(-most // size)):
            indices = mine[min(i, len(mine) - 1)]
            yield self._load(indices, make_keys(0, indices), None, None), i < len(mine)

    def names(self, indices: Tensor) -> str:
        """Samples by their names and numbers in the set, for a message."""
        shown = ", ".join(
            f"{self.examples.store.name(i)} (number {i})" for i in indices[:8].tolist()
        )
        return shown + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")

    def _load(
        self,
        indices: Tensor,
        keys: Tensor,
        drop: Tensor | None,
        choice: Tensor | None,
        progress: float = 1.0,
    ) -> Batch:
        device = self.processes.device
        codes, prepared = self.examples.load(indices, choice)
        return Batch(
            codes.to(device),
            {name: value.to(device) for name, value in prepared.items()},
            keys.to(device),
            None if drop is None else drop.to(device),
            progress,
            indices,
        )

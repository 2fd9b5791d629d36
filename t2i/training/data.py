"""Training batches: the order of a run's examples, and the fixed held-out set."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from t2i.backbones.base import Backbone
from t2i.data.order import batch_indices, split_indices
from t2i.processes import Processes
from t2i.rng import fold, make_keys, uniforms
from t2i.training.batch import Batch
from t2i.training.config import TrainConfig
from t2i.training.examples import open_examples
from t2i.training.plan import plan_run

_NOISE, _DROP, _CHOICE = 1, 2, 3  # streams derived from a sample's key


class TrainingData:
    """The examples of a run, encoded by all ranks together and split into batches."""

    def __init__(self, config: TrainConfig, backbone: Backbone, processes: Processes):
        self.examples = open_examples(config, backbone, processes)
        self.config, self.processes = config, processes
        self.plan = plan_run(config, len(self.examples), processes.world_size)
        self.train, self.validation = split_indices(
            self.plan.samples, self.plan.held_out, config.seed
        )

    @property
    def key(self) -> str:
        """Identifies the data's content, for resume."""
        return self.examples.key

    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.plan.steps

    def held_out_conditions(self, count: int) -> list[str | int]:
        """Captions (as the model reads them) or classes of the first held-out samples, each once: prompts for sample sheets."""
        found = (self.examples.condition(index) for index in self.validation.tolist())
        return list(islice(dict.fromkeys(found), count))

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's part of an optimizer step. A sample's noise and dropout depend on its place in the run alone."""
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
            yield self._batch(indices, batch_keys, step / self.steps())

    def _batch(self, indices: Tensor, keys: Tensor, progress: float) -> Batch:
        choice = fold(keys, _CHOICE) & 0xFFFF  # which of several captions or views
        drop = uniforms(fold(keys, _DROP), 1)[:, 0] < self.config.condition_dropout
        return self._load(indices, fold(keys, _NOISE), drop, choice, progress)

    def validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's part of the held-out set: fixed samples with fixed noise, nothing dropped.

        Every rank gets the same number of batches, since under ZeRO-3 each forward pass is collective; those with False only
        fill up and are not to be counted.
        """
        size, world_size = self.config.engine.micro_batch, self.processes.world_size
        mine = self.validation[self.processes.rank :: world_size].split(size)
        most = -(-len(self.validation) // world_size)
        for i in range(-(-most // size)):
            indices = mine[min(i, len(mine) - 1)]
            yield self._load(indices, make_keys(0, indices), None, None), i < len(mine)

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
        )

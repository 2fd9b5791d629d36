"""Training batches: the code cache of a data set, the data order, and the fixed held-out set.

Shapes: B samples, T image tokens, S sub-tokens.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from t2i.backbones.base import Backbone
from t2i.data.cache import CodeCache, build_cache
from t2i.data.order import batch_indices, split_indices
from t2i.data.samples import Source
from t2i.data.shapes_source import parse_shapes
from t2i.data.sources import open_source
from t2i.loading import tokenizer_hash
from t2i.rng import fold, make_keys, uniforms
from t2i.training.batch import Batch
from t2i.training.config import DataOptions, TrainConfig
from t2i.training.engine import Processes

_NOISE, _DROP, _CAPTION = 1, 2, 3  # streams derived from a sample's key


def open_data(options: DataOptions) -> Source:
    """The data set of a run; ValueError says what is wrong with it."""
    if not options.source:
        raise ValueError(
            "no data: give --data.source (a folder, parquet, webdataset tars or a hub id)"
        )
    return parse_shapes(options.source) or open_source(
        options.source,
        image_column=options.image_column,
        caption_column=options.caption_column,
        split=options.split,
        streaming=options.streaming,
        config_name=options.config_name,
        revision=options.revision,
    )


def image_size(backbone: Backbone) -> int:
    """Side in pixels of the (square) images that the backbone draws."""
    height, width = backbone.spec.grid
    if height != width:
        raise ValueError(f"training needs a square grid, this backbone has {height} x {width}")
    return height * backbone.tokenizer.downsample


def check_backbone(backbone: Backbone) -> None:
    """ValueError if this backbone cannot be trained on captioned images."""
    backbone.tokenizer  # noqa: B018 (raises where there is none)
    backbone.caption_features()


log = logging.getLogger(__name__)


class TrainingData:
    """The cached data set of a run. Every rank builds its share of a missing cache."""

    def __init__(self, config: TrainConfig, backbone: Backbone, processes: Processes):
        options = config.data
        device = backbone.device

        def encode_images(pixels: Tensor) -> Tensor:
            return backbone.encode_images(pixels.to(device)).cpu()

        def encode_captions(captions: list[str]) -> list[Tensor]:
            return [features.cpu() for features in self.features.encode(captions)]

        check_backbone(backbone)
        self.features = backbone.caption_features()
        folder = build_cache(
            open_data(options),
            options.cache_dir,
            encode_images=encode_images,
            encode_captions=None if self.features is None else encode_captions,
            key_parts={
                "tokenizer": tokenizer_hash(backbone),
                **({} if self.features is None else self.features.key),
            },
            resolution=image_size(backbone),
            max_samples=options.max_samples,
            small_images=options.small_images,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        self.cache = CodeCache(folder)
        if processes.is_main:
            self._say_what_is_lost([] if self.features is None else self.features.report())
        self.config, self.processes, self.backbone = config, processes, backbone
        n_validation = options.validation_samples
        if not processes.world_size <= n_validation < len(self.cache):
            raise ValueError(
                f"data.validation_samples={n_validation} must be at least one per process ({processes.world_size}) and "
                f"fewer than the {len(self.cache)} usable samples"
            )
        self.train, self.validation = split_indices(len(self.cache), n_validation, config.seed)

    def _say_what_is_lost(self, caption_lines: list[str]) -> None:
        report = self.cache.manifest["report"]
        if report["skipped"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report["skipped"].items())
            where = self.cache.folder / "skipped.jsonl"
            log.warning(
                f"{report['usable']} of {report['seen']} samples are used; skipped: {reasons} ({where})"
            )
        for line in caption_lines:
            log.warning(line)

    @property
    def key(self) -> str:
        """Identifies the data's content, for resume."""
        return self.cache.folder.name

    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.config.steps is not None:
            return self.config.steps
        return max(1, round(self.config.epochs * len(self.train) / self.config.batch_size))

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
        choice = fold(keys, _CAPTION) & 0xFFFF  # which of several captions
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
        if self.features is None:
            picked = [0] * len(indices) if choice is None else choice.tolist()
            pairs = zip(indices.tolist(), picked, strict=True)
            prepared = self.backbone.prepare([self.cache.caption(i, c) for i, c in pairs])
        else:
            tokens = self.backbone.spec.prefix_tokens
            features, mask = self.cache.text(indices, tokens, choice)
            prepared = {"features": features, "mask": mask}
        return Batch(
            self.cache.codes(indices).to(device),
            {name: value.to(device) for name, value in prepared.items()},
            keys.to(device),
            None if drop is None else drop.to(device),
            progress,
        )

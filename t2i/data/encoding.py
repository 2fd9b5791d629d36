"""The work behind the code cache: cut a source into shards, encode the ones that are wanted.

Shape legend: B = batch, T = positions, S = sub-tokens, C = text feature width.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from t2i.data.images import SkipSample
from t2i.data.samples import CaptionNotes, Sample, Source, drop_unreadable
from t2i.data.shards import ShardWriter

DECODE_THREADS = 4  # Pillow decodes outside Python's lock

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoders:
    """What turns samples into the content of a cache.

    Attributes:
        load: a sample -> pixels float32 [3, H, W], or the reason to skip it.
        caption_notes: what the text encoder makes of captions; None if it reads all of them whole.
        images: pixels [B, 3, H, W] -> codes int64 [B, T, S].
        captions: captions -> one float [n_i, C] each; None for a cache without text features.
        batch_size: images, and captions, per call.
    """

    load: Callable[[Sample], Tensor | SkipSample]
    caption_notes: CaptionNotes | None
    images: Callable[[Tensor], Tensor]
    captions: Callable[[list[str]], Sequence[Tensor]] | None
    batch_size: int


class ShardPlan:
    """Shard i covers the samples i * size ... of the source, whoever builds it.

    Attributes:
        count: number of shards; of a stream, of those met so far.
    """

    def __init__(self, source: Source, size: int, max_samples: int | None):
        self._source = source
        self._size = size
        self._max_samples = max_samples
        self._length = source.length
        if self._length is not None and max_samples is not None:
            self._length = min(self._length, max_samples)
        self.count = 0 if self._length is None else -(-self._length // size)

    def samples(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Iterator[Sample]]]:
        """(shard, its samples) of the wanted shards. A stream is read through in any case."""
        if self._length is not None:
            for shard in filter(wanted, range(self.count)):
                yield shard, map(self._source.__getitem__, self._indices(shard))
            return
        stream = islice(self._source, self._max_samples)
        for shard, samples in groupby(stream, lambda sample: sample.index // self._size):
            self.count = shard + 1
            if wanted(shard):
                yield shard, samples

    def total(self, wanted: Callable[[int], bool]) -> int | None:
        """Samples in the wanted shards; None for a stream."""
        if self._length is None:
            return None
        return sum(len(self._indices(shard)) for shard in filter(wanted, range(self.count)))

    def _indices(self, shard: int) -> range:
        return range(shard * self._size, min((shard + 1) * self._size, self._length))


def encode_shards(
    plan: ShardPlan,
    wanted: Callable[[int], bool],
    folder: Path,
    encoders: Encoders,
    advance: Callable[[int], object],
) -> None:
    """Build the wanted shards one after the other; `advance(n)` is told of every n samples."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for shard, samples in plan.samples(wanted):
            writer = ShardWriter(folder, shard)
            readable = (
                drop_unreadable(batch, encoders.caption_notes)
                for batch in batches(samples, encoders.batch_size)
            )
            loading = ((batch, pool.map(_Image(encoders.load), batch)) for batch in readable)
            for batch, loaded in one_ahead(loading):
                _encode_batch(batch, list(loaded), writer, encoders)
                advance(len(batch))
            writer.close()


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each fetched while its predecessor is in use: threads decode meanwhile."""
    current = next(items, None)
    while current is not None:
        following = next(items, None)
        yield current
        current = following


@dataclass(frozen=True)
class _Image:
    """Loads a sample's pixels with their hash, which tells that two samples show one image."""

    load: Callable[[Sample], Tensor | SkipSample]

    def __call__(self, sample: Sample) -> tuple[Tensor, str] | SkipSample:
        pixels = self.load(sample)
        if isinstance(pixels, SkipSample):
            return pixels
        return pixels, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


def _encode_batch(
    batch: list[Sample],
    loaded: list[tuple[Tensor, str] | SkipSample],
    writer: ShardWriter,
    encoders: Encoders,
) -> None:
    usable, pixels, images = [], [], []
    for sample, result in zip(batch, loaded, strict=True):
        if isinstance(result, SkipSample):
            writer.skip(sample, result)
        else:
            usable.append(sample)
            pixels.append(result[0])
            images.append(result[1])
    if not usable:
        return
    features = None
    if encoders.captions is not None:
        captions = [caption for sample in usable for caption in sample.captions]
        features = []
        for start in range(0, len(captions), encoders.batch_size):
            features += encoders.captions(captions[start : start + encoders.batch_size])
    writer.add(usable, images, encoders.images(torch.stack(pixels)), features)

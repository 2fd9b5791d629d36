"""A store of codes: images tokenized once, each with its class, or its captions and their features.

    <folder>/source.json                 what the folder's name is a hash of, and the source's files
             shard_00003.safetensors     codes and features of some samples, see `shards.py`
             shard_00003.jsonl           a line for each of these samples, used or skipped
             report.json, skipped.jsonl  what was left out, and why
             manifest.json               written last: the store is complete

Stores are filled by `encoding.py`. Opening one reads only the manifest.

Shape legend: n = samples, B = batch, A = views of an image, T = positions, S = sub-tokens, C = text
feature width.
"""

import bisect
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from t2i.data.shards import ShardReader, whole_file
from t2i.errors import UserError

_OPEN_SHARDS = 512
"""Shards that a store keeps open, with the captions of their samples: a process can map about
65,000 files, and a hundred million captions do not fit into memory."""
FORMAT = 4
"""Part of the manifest and of the folder's name: change it whenever the files change."""
MANIFEST = "manifest.json"
_MANIFEST_KEYS = ("views", "text_dim", "labelled", "shards", "surroundings", "report")
Numbers = Sequence[int] | Tensor


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished store; UserError if it is damaged, or of another version."""
    path = folder / MANIFEST
    with whole_file(path):
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("key"), dict):
            raise ValueError("it is not a manifest of a store")
        if (found := manifest["key"].get("format")) == FORMAT:
            if missing := [name for name in _MANIFEST_KEYS if name not in manifest]:
                raise ValueError(f"it has no {missing[0]!r}")
            return manifest
    raise UserError(f"{folder} has the format {found}, this version reads only {FORMAT}")


class CodeStore:
    """Random access to a finished store.

    A method's `choice` is a number for each sample that picks one of all pairs of a view and a
    caption, modulo their number; by default the first.

    Attributes:
        key: identifies the content.
        views: A, the number of views per image.
        with_text: whether it holds features of the captions.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise UserError(
                f"{folder} is not a finished store of codes (it has no {MANIFEST}). "
                "Start the run again: it continues where it stopped"
            )
        self.manifest = read_manifest(self.folder)
        self.key, self.views = self.folder.name, self.manifest["views"]
        self.with_text = self.manifest["text_dim"] is not None
        shards = self.manifest.pop("shards")  # not kept: too many objects in a large store
        self._names = [shard["name"] for shard in shards]
        self._starts = [0, *accumulate(shard["samples"] for shard in shards)]
        self._open = lru_cache(_OPEN_SHARDS)(lambda name: ShardReader(self.folder / name))

    def __len__(self) -> int:
        return self._starts[-1]

    def codes(self, indices: Numbers, choice: Numbers | None = None) -> Tensor:
        """Codes int64 [B, T, S] of one view of each image."""
        chosen = self._chosen(indices, choice)
        return torch.stack([shard.codes(row, pick % self.views) for shard, row, pick in chosen])

    def features(
        self, indices: Numbers, max_tokens: int, choice: Numbers | None = None
    ) -> list[Tensor]:
        """Text features float32 [n_i, C] of one caption of each sample, cut to max_tokens."""
        if not self.with_text:
            raise ValueError(f"{self.folder} was built without text features")
        chosen = self._chosen(indices, choice)
        return [shard.features(row, pick // self.views, max_tokens) for shard, row, pick in chosen]

    def condition(self, index: int, choice: int = 0) -> str | int:
        """A sample's class, or the caption that `features` encodes for the same choice."""
        shard, row = self._locate(index)
        if shard.labels is not None:
            return shard.labels[row]
        captions = shard.sample(row)["captions"]
        return captions[choice // self.views % len(captions)]

    def name(self, index: int) -> str:
        """The sample's name in its source."""
        shard, row = self._locate(index)
        return shard.sample(row)["key"]

    def same_images(self) -> Tensor | None:
        """int64 [n]: equal numbers for samples with the same pixels; None for images with classes:
        each counts as different.
        """
        if self.manifest["labelled"]:
            return None
        # Separate readers: unlike those of `_open`, each is closed again at once.
        return torch.cat([ShardReader(self.folder / name).pixels for name in self._names])

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._open(self._names[shard]), index - self._starts[shard]

    def _chosen(
        self, indices: Numbers, choice: Numbers | None
    ) -> Iterator[tuple[ShardReader, int, int]]:
        for index, pick in with_choices(indices, choice):
            yield *self._locate(index), pick


def with_choices(indices: Numbers, choice: Numbers | None) -> Iterator[tuple[int, int]]:
    """Each index with its choice, 0 by default."""
    where = torch.as_tensor(indices).tolist()
    chosen = [0] * len(where) if choice is None else torch.as_tensor(choice).tolist()
    return zip(where, chosen, strict=True)

"""The code cache: every image tokenized and every caption encoded once, before training.

    <cache_dir>/<key>/source.json                                       what the key was made of
                      shard_00000.safetensors, shard_00000.jsonl, ...   see shards.py
                      report.json, skipped.jsonl                        what was left out, and why
                      manifest.json                                     written last: complete

The key is a hash of everything that the content depends on (encoder weights, resolution, crop,
content of the source files, caption cleaning, ...) and of no place or time. So a cache is never
stale (other input, other folder), and data that were moved or touched are not encoded again.

Shard i covers the samples i * shard_size ... of the source, whoever builds it. So any number of
processes can share the work without talking to each other, a killed run goes on at the first
shard that is missing, and the result does not depend on either.

Shape legend: B = batch, T = positions, S = sub-tokens, P = caption tokens, C = text feature width.
"""

import bisect
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from t2i.data.content import Contents, contents_key, describe_changes, hash_files
from t2i.data.data_report import Report
from t2i.data.encoding import Encoders, ShardPlan, encode_shards
from t2i.data.images import PIXELS_VERSION, check_small_policy
from t2i.data.samples import CaptionNotes, Source, load_sample
from t2i.data.shards import ShardReader, shard_path
from t2i.errors import UserError
from t2i.files import wait_for, writable_folder, write_text
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar

_FORMAT = 2  # part of the key: change it whenever the files change
_POLL_SECONDS = 0.5


def build_cache(
    source: Source,
    cache_dir: str | Path,
    *,
    encode_images: Callable[[Tensor], Tensor],
    encode_captions: Callable[[list[str]], Sequence[Tensor]] | None,
    key_parts: dict,
    resolution: int,
    caption_notes: CaptionNotes | None = None,
    expected_key: str | None = None,
    batch_size: int = 32,
    shard_size: int = 1024,
    max_samples: int | None = None,
    small_images: str = "skip",
    max_megapixels: float = 100.0,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Path:
    """Build the cache of a source, or find it complete; returns its folder.

    Args:
        encode_images: pixels float32 [B, 3, resolution, resolution] in [-1, 1] -> int64 [B, T, S].
        encode_captions: captions -> one float [n_i, C] each, valid tokens only; bfloat16 is kept,
            other types are stored as float16. None for a cache without text features.
        key_parts: JSON-able, whatever else the content depends on: hashes of the tokenizer's and
            the text encoder's weights, the version of the caption cleaning.
        caption_notes: what the text encoder makes of captions (see `CaptionNotes`); a sample of
            which it reads nothing is skipped.
        expected_key: refuse data of another content, before anything is encoded.
        batch_size: images, and captions, per call of an encoder. Does not change the content.
        shard_size: samples of the source per shard.
        max_samples: use only the first samples of the source (counted before any is skipped).
        small_images: "skip" or "upscale" images with a short side below the resolution.
        max_megapixels: skip larger images.
        processes: one builds the shards i with i % world_size == rank and waits for the others.
            The main one writes the report and the manifest.

    Raises:
        UserError: no usable sample (the message counts the reasons), other data than expected, bad
            arguments, or a cache_dir that cannot be written to.
        TimeoutError: another process stopped building.
    """
    check_small_policy(small_images)
    if min(batch_size, shard_size) < 1 or (max_samples is not None and max_samples < 1):
        raise UserError("batch_size, shard_size and max_samples must be at least 1")
    cache_dir = Path(cache_dir)
    contents = hash_files(source.files(), cache_dir, processes, progress)
    key = {
        "format": _FORMAT,
        "source": source.identity | ({"files": contents_key(contents)} if contents else {}),
        "resolution": resolution,
        "pixels": PIXELS_VERSION,
        "small_images": small_images,
        "max_megapixels": max_megapixels,
        "max_samples": max_samples,
        "shard_size": shard_size,
        "with_text": encode_captions is not None,
        "encoders": key_parts,
    }
    folder = cache_dir / cache_key(key)
    if expected_key not in (None, folder.name):
        changes = _changes(cache_dir / expected_key, key, contents)
        raise UserError(
            f"cannot resume: the data set has changed since the run was started ({source.name}: {changes}); put it back, or "
            "start a new run_dir"
        )
    if (folder / "manifest.json").exists():
        if processes.is_main:
            _refresh(folder, source)
        return folder
    writable_folder(folder)
    if processes.is_main:
        write_text(folder / "source.json", json.dumps({"key": key, "files": contents}))

    load = partial(load_sample, size=resolution, small=small_images, max_megapixels=max_megapixels)
    encoders = Encoders(load, caption_notes, encode_images, encode_captions, batch_size)
    wanted = partial(_is_mine_to_do, folder=folder, processes=processes)
    plan = ShardPlan(source, shard_size, max_samples)
    quiet = not (progress and processes.is_main)
    with progress_bar(total=plan.total(wanted), desc="cache", unit=" images", disable=quiet) as bar:
        encode_shards(plan, wanted, folder, encoders, bar.update)
    paths = [shard_path(folder, shard) for shard in range(plan.count)]
    wait_for(paths, processes.patience)
    readers = [ShardReader(path) for path in paths]
    if not any(reader.codes_shape[0] for reader in readers):
        report = _report(source, readers)
        if processes.is_main:
            report.write(folder)
        raise UserError(
            f"no usable sample among the {report.seen} of {source.name}: {report.describe()}. "
            f"All of them are listed in {folder / 'skipped.jsonl'}"
        )
    if processes.is_main:
        write_text(
            folder / "manifest.json", json.dumps(_manifest(folder, key, source, readers), indent=1)
        )
    wait_for([folder / "manifest.json"], processes.patience)
    return folder


def check_cache_dir(cache_dir: Path) -> None:
    """UserError if nothing can be written there, and no finished cache is there either. Makes no
    folder.
    """
    if any(cache_dir.glob("*/manifest.json")):
        return
    place = cache_dir.absolute()
    while not place.exists():
        place = place.parent
    writable_folder(place)


def _changes(before: Path, key: dict, contents: Contents) -> str:
    """How the data differ from those of another cache folder, in words."""
    try:
        stored = json.loads((before / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"their cache {before} is gone, so that the changes cannot be named"
    if changes := describe_changes(stored["files"], contents):
        return changes
    old, new = _leaves(stored["key"]), _leaves(key)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)


def _leaves(value: dict, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, inner in value.items():
        nested = isinstance(inner, dict)
        leaves |= _leaves(inner, f"{prefix}{name}.") if nested else {prefix + name: inner}
    return leaves


def cache_key(parts: dict) -> str:
    """Folder name for a key: 20 hexadecimal digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class CodeCache:
    """Random access to a finished cache. Shards are memory-mapped, so opening it costs nothing.

    Raises:
        UserError: the folder holds no finished cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            raise UserError(
                f"{folder} is no finished code cache (it has no manifest.json). "
                "Run the cache step again: it goes on where it stopped"
            )
        self.manifest = json.loads(path.read_text())
        shards = self.manifest["shards"]
        self._shards = [ShardReader(self.folder / shard["name"]) for shard in shards]
        self._starts = [0, *accumulate(shard["samples"] for shard in shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def codes(self, indices: Sequence[int] | Tensor) -> Tensor:
        """int64 [B, T, S]."""
        located = map(self._locate, _as_list(indices))
        return torch.stack([shard.codes(row) for shard, row in located])

    def text(
        self,
        indices: Sequence[int] | Tensor,
        max_tokens: int,
        choice: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text features, padded on the left: float32 [B, P, C] and bool [B, P], P = max_tokens.

        A caption keeps its first max_tokens tokens; padding is zero, and False in the mask.

        Args:
            choice: one integer per sample that picks among its captions (modulo their number);
                the first caption by default.
        """
        if self.manifest["text_dim"] is None:
            raise ValueError(f"{self.folder} was built without text features")
        indices = _as_list(indices)
        choices = [0] * len(indices) if choice is None else _as_list(choice)
        features_BPC = torch.zeros(len(indices), max_tokens, self.manifest["text_dim"])
        mask_BP = torch.zeros(len(indices), max_tokens, dtype=torch.bool)
        for b, (index, chosen) in enumerate(zip(indices, choices, strict=True)):
            shard, row = self._locate(index)
            feature = shard.text(row, chosen, max_tokens)
            features_BPC[b, max_tokens - len(feature) :] = feature
            mask_BP[b, max_tokens - len(feature) :] = True
        return features_BPC, mask_BP

    def caption(self, index: int, choice: int = 0) -> str:
        """The caption that `text` gives for the same choice."""
        shard, row = self._locate(index)
        captions = shard.samples[row]["captions"]
        return captions[choice % len(captions)]

    def key(self, index: int) -> str:
        """The sample's name in its source."""
        shard, row = self._locate(index)
        return shard.samples[row]["key"]

    def same_images(self) -> Tensor:
        """int64 [n]: for each sample the number of the first one with the same pixels."""
        first: dict[str, int] = {}
        lines = (line for shard in self._shards for line in shard.lines() if "captions" in line)
        return torch.tensor([first.setdefault(line["image"], i) for i, line in enumerate(lines)])

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a cache of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._shards[shard], index - self._starts[shard]


def _is_mine_to_do(shard: int, folder: Path, processes: Processes) -> bool:
    return shard % processes.world_size == processes.rank and not shard_path(folder, shard).exists()


def _report(source: Source, readers: Sequence[ShardReader]) -> Report:
    return Report.collect((line for reader in readers for line in reader.lines()), source)


def _manifest(folder: Path, key: dict, source: Source, readers: Sequence[ShardReader]) -> dict:
    """The manifest of a complete cache; writes its report."""
    report = _report(source, readers)
    report.write(folder)
    filled = [reader for reader in readers if reader.codes_shape[0]]
    shapes = {(*reader.codes_shape[1:], reader.text_dim) for reader in filled}
    assert len(shapes) == 1, f"shards of different shapes: {shapes}"
    positions, subtokens, text_dim = shapes.pop()
    return {
        "key": key,
        "source": source.name,
        "samples": sum(reader.codes_shape[0] for reader in filled),
        "code_shape": [positions, subtokens],
        "text_dim": text_dim,
        "shards": [{"name": r.path.name, "samples": r.codes_shape[0]} for r in filled],
        "surroundings": _surroundings(source),
        "report": report.summary(),
    }


def _surroundings(source: Source) -> str:
    """What the report says of a source besides its samples, as a hash."""
    return cache_key({"left_out": source.left_out, "remarks": source.remarks})


def _refresh(folder: Path, source: Source) -> None:
    """Bring the report up to date with files around the samples, which the key does not cover."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["surroundings"] == _surroundings(source):
        return
    paths = sorted(folder.glob("shard_*.safetensors"))
    with suppress(UserError):  # someone else's cache, which can only be read
        manifest = _manifest(folder, manifest["key"], source, list(map(ShardReader, paths)))
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


def _as_list(indices: Sequence[int] | Tensor) -> list[int]:
    return indices.tolist() if hasattr(indices, "tolist") else list(indices)

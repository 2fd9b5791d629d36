"""Fill a store: tokenize every image and encode every caption once, before training.

The name of a store's folder is a hash of everything that its content depends on (encoder weights,
resolution, crop, content of the source files, caption cleaning, ...), but of no path or time. So a
store is never stale (other input, other folder), and data that were moved or touched are not
encoded again.

Shard i covers shard_size samples of the source from i * shard_size on, no matter which process
builds it. So any number of processes can share the work without communicating, a killed run resumes
with the shards that are missing, and the result does not depend on either.

Shape legend: B = images, A = views of an image, T = positions, S = sub-tokens, C = text feature
width.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from t2i.data.content import (
    ABSENT,
    Contents,
    changes_since,
    content_key,
    contents_key,
    describe_changes,
    hash_files,
    worth_an_index,
)
from t2i.data.data_report import (
    CaptionNotes,
    DataReport,
    drop_unreadable,
    load_sample,
    picture_hash,
)
from t2i.data.images import FileSlice, ImageRules, SkipSample
from t2i.data.samples import Sample, Source
from t2i.data.shards import ShardReader, ShardWriter, shard_path, shard_paths
from t2i.data.store import FORMAT, MANIFEST, read_manifest
from t2i.errors import UserError
from t2i.fields import leaves
from t2i.files import read_json, writable_folder, write_text
from t2i.manifest import refuse_in_checkpoint
from t2i.ownership import remove_leftovers
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar

_DECODE_THREADS = max(4, min(16, os.cpu_count() or 1))
"""Pillow releases Python's lock while it decodes."""

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Encoding:
    """How samples become the content of a store.

    Attributes:
        images: pixels float32 [N, 3, size, size] in [-1, 1] -> codes int64 [N, T, S]. For a
            source of codes, returns them unchanged.
        rules: how images become pixels; None for a source of codes.
        captions: captions -> one float [n_i, C] each, valid tokens only; bfloat16 is kept, other
            types are stored as float16. None for a store without text features.
        caption_notes: what the text encoder loses of captions; a sample that it cannot read at all
            is skipped. None if it reads all captions completely.
        key: everything else that the content depends on, JSON-able: hashes of the tokenizer's and
            the text encoder's weights, the version of the caption cleaning.
        batch_size: views or captions per call. Does not affect the content.
        shard_size: samples of the source per shard.
        max_samples: use only the first samples of the source (counted before any is skipped).
    """

    images: Callable[[Tensor], Tensor]
    rules: ImageRules | None
    captions: Callable[[list[str]], Sequence[Tensor]] | None = None
    caption_notes: CaptionNotes | None = None
    key: dict = field(default_factory=dict)
    batch_size: int = 32
    shard_size: int = 1024
    max_samples: int | None = None

    @property
    def identity(self) -> dict:
        """JSON-able, for the keys of stores."""
        return {
            "images": None if self.rules is None else self.rules.identity,
            "max_samples": self.max_samples,
            "shard_size": self.shard_size,
            "with_text": self.captions is not None,
            "encoders": self.key,
        }


def build_store(
    source: Source,
    cache_dir: str | Path,
    encoding: Encoding,
    *,
    expected_key: str | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Build the store of a source unless it is complete; returns its folder, for `CodeStore`.

    Args:
        expected_key: key that the store must have; other data are refused before encoding.
        processes: each builds the shards i with i % world_size == rank and waits for the others.
            The main process writes the report and the manifest.

    Raises:
        UserError: no usable sample (the message counts the reasons), data with another key than
            expected, or a cache_dir that cannot be written to.
        TimeoutError: another process stopped building.
    """
    cache_dir = Path(cache_dir)
    files = source.files()
    contents = hash_files(files, cache_dir, processes)
    content = {"files": contents_key(contents)} if contents else {}
    key = {"format": FORMAT, "source": source.identity | content, **encoding.identity}
    folder = cache_dir / content_key(key)
    if expected_key not in (None, folder.name):
        raise _has_changed(source, _changes(cache_dir / expected_key, key, contents))
    if (folder / MANIFEST).exists():
        if processes.is_main:
            _refresh(folder, source)
        return folder
    started = time.time()
    writable_folder(folder)
    if processes.is_main:
        write_text(folder / "source.json", json.dumps({"key": key, "files": contents}))

    hashed = {
        path for (_, path), (_, digest) in zip(files, contents, strict=True) if digest != ABSENT
    }
    count = _encode_missing(source, folder, encoding, hashed, processes)
    paths = [shard_path(folder, shard) for shard in range(count)]
    processes.wait_for(paths)
    if processes.is_main and (changes := changes_since(files, contents, cache_dir)):
        # Otherwise they would be found under the name of what the data were. The manifest, which
        # another run may have written, must not outlive them.
        for path in (folder / MANIFEST, *paths):
            path.unlink(missing_ok=True)
        raise UserError(
            f"{source.name} changed while it was encoded ({changes}), so the codes were discarded; "
            "start again when its files no longer change"
        )
    readers = list(map(ShardReader, paths))
    if processes.is_main or not any(reader.codes_shape[0] for reader in readers):
        _finish(folder, key, source, readers)  # without a usable sample, all raise
    processes.wait_for([folder / MANIFEST])
    if processes.is_main:
        remove_leftovers(folder, before=started)  # newer ones may belong to another run
    return folder


def check_cache_dir(cache_dir: Path) -> None:
    """UserError if a store can be neither written nor found there. Creates no folder."""
    refuse_in_checkpoint(cache_dir, "data.cache_dir")
    if not any(cache_dir.glob(f"*/{MANIFEST}")):
        writable_folder(cache_dir, make=False)


def _changes(before: Path, key: dict, contents: Contents) -> str:
    """How the data differ from those of another store, in words."""
    try:
        stored = read_json(before / "source.json")
    except UserError:
        stored = {"key": {}}
    if stored["key"].get("format") != FORMAT:
        return f"{before} is gone or of another version, so the changes cannot be listed"
    if changes := describe_changes(stored["files"], contents):
        return changes
    old, new = leaves(stored["key"]), leaves(key)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)


def refuse_changed_files(source: Source, cache_dir: Path, key: str) -> None:
    """UserError if the files of a source are not those of the store with this key, as far as a
    quick check that writes nothing can tell: of large sets only the names are compared.
    """
    try:
        before = read_json(cache_dir / key / "source.json")["files"]
    except (UserError, KeyError):  # gone or unreadable
        return
    files = source.files()
    if worth_an_index(files):
        stored = dict(before)
        now = [(name, stored.get(name, "")) for name, _ in files]
    else:
        now = hash_files(files, cache_dir)
    if changes := describe_changes(before, now):
        raise _has_changed(source, changes)


def _has_changed(source: Source, changes: str) -> UserError:
    return UserError(
        f"cannot resume: the data set has changed since the run was started ({source.name}: "
        f"{changes}). Restore the data, or start a new run_dir, with "
        "--backbone.weights and this run's folder from its weights"
    )


# -- shards ----------------------------------------------------------------------------------------
def _encode_missing(
    source: Source, folder: Path, encoding: Encoding, hashed: set[Path], processes: Processes
) -> int:
    """Encode this process's share of the missing shards; returns how many shards there are.

    Args:
        hashed: the files that could be read before.
    """
    load = partial(_load, rules=encoding.rules, hashed=hashed)

    def mine_to_do(shard: int) -> bool:
        mine = shard % processes.world_size == processes.rank
        return mine and not shard_path(folder, shard).exists()

    size, length, count, total = encoding.shard_size, source.length, 0, None
    if length is None:  # a stream must be read from its start
        samples: Iterator[Sample] = islice(source, encoding.max_samples)
    else:
        length = min(length, encoding.max_samples or length)
        count = -(-length // size)
        starts = [shard * size for shard in range(count) if mine_to_do(shard)]
        wanted = [range(start, min(start + size, length)) for start in starts]
        samples = (source[index] for indices in wanted for index in indices)
        total = sum(map(len, wanted))
    quiet = not processes.is_main
    with progress_bar(total=total, desc="codes", unit=" images", disable=quiet) as bar:
        for shard, part in groupby(samples, lambda sample: sample.index // size):
            count = max(count, shard + 1)
            if mine_to_do(shard):
                _encode_shard(ShardWriter(folder, shard), part, encoding, load, bar.update)
    return count


def _encode_shard(
    writer: ShardWriter,
    samples: Iterator[Sample],
    encoding: Encoding,
    load: Callable[[Sample], "tuple[Tensor, int | None] | SkipSample"],
    advance: Callable[[int], object],
) -> None:
    """Encode and write one shard; `advance(n)` is called after every n samples."""
    views = 1 if encoding.rules is None else encoding.rules.views.count
    checked = (drop_unreadable(sample, encoding.caption_notes) for sample in samples)
    for batch, loaded in load_ahead(checked, load, max(1, encoding.batch_size // views)):
        usable = []
        for sample, result in zip(batch, loaded, strict=True):
            if isinstance(result, SkipSample):
                writer.skip(sample, result)
            else:
                usable.append((sample, *result))
        if usable:
            _encode_batch(writer, encoding, *zip(*usable, strict=True))
        advance(len(batch))
    writer.close()


def _load(
    sample: Sample, rules: ImageRules | None, hashed: set[Path]
) -> tuple[Tensor, int | None] | SkipSample:
    """Views of an image (or their codes), and, if it has captions, its `picture_hash`.

    Raises:
        UserError: a file in `hashed` cannot be read. Skipped, its image would be missing from the
            store for good, because the store's name says that the file could be read.
    """
    views = load_sample(sample, rules)
    if isinstance(views, SkipSample):
        path = sample.image.path if isinstance(sample.image, FileSlice) else sample.image
        if views.reason == "unreadable" and path in hashed:
            raise UserError(
                f"{sample.key} was read when encoding began, and now cannot be: {views.detail}. "
                "Start again when the storage is sound; codes written so far are kept"
            )
        return views
    return views, picture_hash(views) if sample.label is None else None


def _encode_batch(
    writer: ShardWriter,
    encoding: Encoding,
    samples: tuple[Sample, ...],
    views: tuple[Tensor, ...],
    hashes: tuple[int | None, ...],
) -> None:
    codes = encoding.images(torch.cat(views)).cpu()
    features: list[Tensor] = []
    if encoding.captions is not None:
        captions = [caption for sample in samples for caption in sample.captions]
        for start in range(0, len(captions), encoding.batch_size):
            features += encoding.captions(captions[start : start + encoding.batch_size])
    pixels = [number for number in hashes if number is not None]
    writer.add(samples, codes.unflatten(0, (len(samples), -1)), pixels, features)


def load_ahead(
    items: Iterator[Item], load: Callable[[Item], Loaded], size: int
) -> Iterator[tuple[list[Item], list[Loaded]]]:
    """Batches of items with the results of `load`. Threads load the next batch ahead of its use."""
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        batches = iter(lambda: list(islice(items, size)), [])
        loading = ((batch, pool.map(load, batch)) for batch in batches)
        current = next(loading, None)
        while current is not None:
            following = next(loading, None)
            yield current[0], list(current[1])
            current = following


# -- the manifest ----------------------------------------------------------------------------------
def _finish(folder: Path, key: dict, source: Source, readers: Sequence[ShardReader]) -> None:
    """Write the report and the manifest of a store whose shards are complete."""
    report = DataReport.collect((line for reader in readers for line in reader.lines()), source)
    report.write(folder)
    filled = [reader for reader in readers if reader.codes_shape[0]]
    if not filled:
        raise UserError(
            f"no usable sample among the {report.seen} of {source.name}: {report.no_usable()}. "
            f"All of them are listed in {folder / 'skipped.jsonl'}"
        )
    shapes = {(*r.codes_shape[1:], r.text_dim, r.labels is not None) for r in filled}
    assert len(shapes) == 1, f"shards of different shapes: {shapes}"
    views, positions, subtokens, text_dim, labelled = shapes.pop()
    manifest = {
        "key": key,
        "source": source.name,
        "samples": sum(reader.codes_shape[0] for reader in filled),
        "views": views,
        "code_shape": [positions, subtokens],
        "text_dim": text_dim,
        "labelled": labelled,
        "shards": [{"name": r.path.name, "samples": r.codes_shape[0]} for r in filled],
        "surroundings": _surroundings(source),
        "report": report.summary(),
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _surroundings(source: Source) -> str:
    """A hash of what the report says about a source besides its samples."""
    return content_key({"left_out": source.left_out, "remarks": source.remarks})


def _refresh(folder: Path, source: Source) -> None:
    """Update the report if files around the samples, which the key does not cover, changed."""
    manifest = read_manifest(folder)
    if manifest["surroundings"] != _surroundings(source):
        shards = map(ShardReader, shard_paths(folder))
        with suppress(UserError):  # the store of someone else may be read-only
            _finish(folder, manifest["key"], source, list(shards))

"""An ImageNet folder, one sub-folder per class, as codes: every view of every image encoded once,
before training.

    ImageNet/train/n01440764/n01440764_10026.JPEG ...

Class ids are the positions of the sorted folder names, as for every published class-conditional
model. What is left of the images is one memory-mapped array (`code_array.py`), not a file per
image.

Shape legend: B = images, A = views, T = positions, S = sub-tokens.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2i.data.cache import cache_key
from t2i.data.code_array import SKIPPED, CodeChunk, build_code_array
from t2i.data.content import contents_key, hash_files
from t2i.data.encoding import DECODE_THREADS, batches, one_ahead
from t2i.data.images import PIXELS_VERSION, SkipSample, open_image
from t2i.data.sources.folders import is_image, walk
from t2i.data.views import Views
from t2i.errors import UserError
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar

log = logging.getLogger(__name__)

_FORMAT = 2  # part of the key: change it whenever the files change
_ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class LabelledFolder:
    """Images in sub-folders that are their classes.

    Attributes:
        classes: names, sorted; an image's label is the position of its class.
        files: of all images, by class and name.
        labels: one for each file.
    """

    root: Path
    classes: list[str]
    files: list[Path]
    labels: list[int]

    def contents(self) -> list[tuple[str, Path]]:
        """The files by their names below the root."""
        return [(str(path.relative_to(self.root)), path) for path in self.files]


def open_imagenet(folder: str | Path, split: str = "train") -> LabelledFolder:
    """A folder with train/ (and val/), or such a split itself, with one sub-folder per class.

    Raises:
        UserError: no such folder, no sub-folders, images beside them, or no images.
    """
    root, classes = find_classes(folder, split)
    files, labels, empty, left_out = [], [], [], []
    for label, name in enumerate(classes):
        inside, passed_over = walk(root / name)
        found = [path for path in inside if is_image(path)]
        files += found
        labels += [label] * len(found)
        empty += [] if found else [name]
        left_out += [f"{name}/{key}: {reason}" for key, reason in passed_over]
    if not files:
        raise UserError(f"{root} has {len(classes)} sub-folders, and no images in them")
    if empty:
        log.warning(f"{len(empty)} of {len(classes)} classes have no images ({empty[0]}, ...)")
    if left_out:
        more = ", ..." if len(left_out) > 3 else ""
        log.warning(f"{root}: {len(left_out)} left out ({', '.join(left_out[:3])}{more})")
    return LabelledFolder(root, classes, files, labels)


def find_classes(folder: str | Path, split: str) -> tuple[Path, list[str]]:
    """The folder of the split and its sub-folders, whose images are not looked for yet.

    Raises:
        UserError: no such folder, no sub-folders, or images beside them.
    """
    root = Path(folder)
    part = root / split
    if part.is_dir() and any(path.is_dir() for path in part.iterdir()):  # or it is a class
        root = part
    if not root.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds {split}/<class>/")
    children = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    classes = [path.name for path in children if path.is_dir()]
    loose = [path.name for path in children if is_image(path) and not path.is_dir()]
    if loose or not classes:
        raise UserError(
            f"{root} must hold one sub-folder per class and nothing else, as ImageNet's train/n01440764/; "
            + (
                f"it holds {len(loose)} images ({loose[0]}, ...)"
                if loose
                else "it has no sub-folders"
            )
        )
    return root, classes


def extract_codes(
    images: LabelledFolder,
    cache_dir: str | Path,
    *,
    encode_images: Callable[[Tensor], Tensor],
    key_parts: dict,
    resolution: int,
    code_shape: tuple[int, int],
    vocab: int,
    views: Views,
    batch_size: int = 64,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Path:
    """Encode every view of every image, or find that done; returns the folder for `CodeArray`.

    A killed run goes on at the chunks of 256 images that are missing. The result depends on no
    number of processes; an image that cannot be read is skipped and listed.

    Args:
        encode_images: pixels float32 [B * A, 3, resolution, resolution] in [-1, 1] -> int64 [B * A,
            T, S].
        key_parts: JSON-able, whatever else the content depends on: the hash of the tokenizer's
            weights.
        code_shape: (T, S).
        vocab: number of codes (of the largest sub-vocabulary).
        batch_size: views at once.

    Raises:
        UserError: codes that do not fit; no usable image; bad arguments.
        TimeoutError: another process stopped.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    contents = hash_files(images.contents(), Path(cache_dir), processes, progress)
    key = {
        "format": _FORMAT,
        "source": {"kind": "labelled folder", "files": contents_key(contents)},
        "classes": len(images.classes),
        "resolution": resolution,
        "pixels": PIXELS_VERSION,
        "views": views.identity,
        "encoders": key_parts,
    }
    work = _Extraction(images, encode_images, resolution, views, max(1, batch_size // views.count))
    return build_code_array(
        Path(cache_dir) / cache_key(key),
        key,
        (len(images.files), views.count, *code_shape),
        vocab,
        lambda missing: work.chunks(missing, quiet=not (progress and processes.is_main)),
        rows_per_chunk=_ROWS_PER_CHUNK,
        processes=processes,
    )


@dataclass(frozen=True)
class _Extraction:
    images: LabelledFolder
    encode: Callable[[Tensor], Tensor]
    resolution: int
    views: Views
    images_at_once: int

    def chunks(self, missing: list[range], quiet: bool) -> Iterator[CodeChunk]:
        """The chunks of these rows; batches never cross from one into the next."""
        total = sum(map(len, missing))
        with (
            ThreadPoolExecutor(DECODE_THREADS) as pool,
            progress_bar(total=total, desc="codes", unit=" images", disable=quiet) as bar,
        ):
            parts = (
                (rows, part)
                for rows in missing
                for part in batches(iter(rows), self.images_at_once)
            )
            loading = ((rows, part, pool.map(self._load, part)) for rows, part in parts)
            encoded: list[np.ndarray] = []
            skipped: list[dict] = []
            for rows, part, loaded in one_ahead(loading):
                codes, broken = self._encode(part, list(loaded))
                encoded.append(codes)
                skipped += broken
                bar.update(len(part))
                if part[-1] + 1 == rows.stop:
                    yield self._chunk(rows, encoded, skipped)
                    encoded, skipped = [], []

    def _load(self, index: int) -> Tensor | SkipSample:
        try:
            return self.views.cut(open_image(self.images.files[index]), self.resolution)
        except SkipSample as reason:
            return reason

    def _encode(
        self, part: list[int], loaded: list[Tensor | SkipSample]
    ) -> tuple[np.ndarray, list[dict]]:
        """Codes [B, A, T, S], of black views where an image is skipped, so that batches keep their
        shape.
        """
        size = self.resolution
        black = torch.full((self.views.count, 3, size, size), -1.0)
        usable = [black if isinstance(views, SkipSample) else views for views in loaded]
        codes = self.encode(torch.cat(usable)).cpu()
        if len(codes) != len(part) * self.views.count:
            raise ValueError(f"encode_images gave codes of the shape {tuple(codes.shape)}")
        skipped = [
            {
                "index": index,
                "key": str(self.images.files[index].relative_to(self.images.root)),
                "reason": reason.reason,
                "detail": reason.detail,
            }
            for index, reason in zip(part, loaded, strict=True)
            if isinstance(reason, SkipSample)
        ]
        return codes.unflatten(0, (len(part), self.views.count)).numpy(), skipped

    def _chunk(self, rows: range, encoded: list[np.ndarray], skipped: list[dict]) -> CodeChunk:
        unusable = {line["index"] for line in skipped}
        labels = [SKIPPED if i in unusable else self.images.labels[i] for i in rows]
        return CodeChunk(rows, np.concatenate(encoded), labels, skipped)

"""The codes of a labelled data set in one memory-mapped array: built once, then read by row.

    <folder>/codes.npy       [images, views, T, S] uint16 or int32
             labels.npy      [images] int32, -1 for an image that could not be used
             skipped.jsonl   {index, key, reason, detail} of each of those
             manifest.json   written last: complete

Shape legend: N = images, A = views of an image, B = batch, T = positions, S = sub-tokens.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2i.data.array_file import ArrayFile, remove_markers
from t2i.errors import UserError
from t2i.files import replacing
from t2i.processes import Processes

MANIFEST = "manifest.json"
SKIPPED = -1


class CodeChunk(NamedTuple):
    """Consecutive rows of a data set.

    Attributes:
        rows: which ones.
        codes: int64 [n, A, T, S]; anything where an image was skipped.
        labels: n class ids, `SKIPPED` where an image was skipped.
        skipped: {index, key, reason, detail} of each of those.
    """

    rows: range
    codes: np.ndarray
    labels: list[int]
    skipped: list[dict]


def build_code_array(
    folder: Path,
    key: dict,
    shape: tuple[int, int, int, int],
    vocab: int,
    produce: Callable[[list[range]], Iterable[CodeChunk]],
    *,
    rows_per_chunk: int,
    processes: Processes,
) -> Path:
    """Build the array in this folder, or find it complete; returns the folder.

    Args:
        key: everything that the content depends on, for the manifest; the folder must be its own.
        shape: [N, A, T, S].
        vocab: codes are below it.
        produce: computes the chunks that it is given, in any order.

    Raises:
        UserError: codes beyond the vocabulary or of another shape; no usable image.
        TimeoutError: another process stopped.
    """
    manifest, path = folder / MANIFEST, folder / "codes.npy"
    dtype = np.uint16 if vocab <= 2**16 else np.int32
    array = ArrayFile(path, shape, dtype, rows_per_chunk, manifest, processes)
    for chunk in produce(array.missing()):
        codes = _checked(chunk, shape, vocab).astype(dtype)
        array.write(chunk.rows, codes, {"labels": chunk.labels, "skipped": chunk.skipped})
    if processes.is_main:
        if not manifest.exists():
            _finish(folder, key, shape, array.wait_for_chunks())
        remove_markers(path)
    array.wait_for_sign()
    return folder


def _checked(chunk: CodeChunk, shape: tuple[int, ...], vocab: int) -> np.ndarray:
    """The codes, with zeros in the rows of skipped images."""
    if chunk.codes.shape != (len(chunk.rows), *shape[1:]):
        raise ValueError(
            f"codes of {len(chunk.rows)} images have the shape {list(chunk.codes.shape)}, expected "
            f"{[len(chunk.rows), *shape[1:]]} (images, views, positions, sub-tokens)"
        )
    usable = np.asarray(chunk.labels)[:, None, None, None] != SKIPPED
    codes = np.where(usable, chunk.codes, 0)
    if codes.size and not 0 <= codes.min() <= codes.max() < vocab:
        raise UserError(
            f"codes from {codes.min()} to {codes.max()} do not fit a vocabulary of {vocab}; are they of this tokenizer?"
        )
    return codes


def _finish(folder: Path, key: dict, shape: tuple[int, ...], notes: list[dict]) -> None:
    labels = np.array([label for note in notes for label in note["labels"]], dtype=np.int32)
    skipped = [line for note in notes for line in note["skipped"]]
    with replacing(folder / "skipped.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in skipped))
    if not (labels != SKIPPED).any():
        raise UserError(
            f"none of the {len(labels)} images can be used; see {folder / 'skipped.jsonl'}"
        )
    with replacing(folder / "labels.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, labels)
    manifest = {
        "key": key,
        "shape": list(shape),
        "usable": int((labels != SKIPPED).sum()),
        "skipped": len(skipped),
    }
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


class CodeArray:
    """Random access to a finished array; opening it reads the labels only.

    Attributes:
        views: A.

    Raises:
        UserError: the folder holds no finished array.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise UserError(
                f"{folder} holds no finished array of codes (it has no {MANIFEST}). Run the extraction again: it goes on "
                "where it stopped"
            )
        self.manifest = json.loads((self.folder / MANIFEST).read_text())
        self._codes = np.load(self.folder / "codes.npy", mmap_mode="r")
        labels = np.load(self.folder / "labels.npy")
        self._rows = np.flatnonzero(labels != SKIPPED)
        self.views = self._codes.shape[1]
        self._labels = torch.from_numpy(labels[self._rows].astype(np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def codes(self, indices: Sequence[int] | Tensor, view: Sequence[int] | Tensor) -> Tensor:
        """int64 [B, T, S]: of each image the view with this number, modulo their count."""
        rows = self._rows[np.asarray(indices)]
        chosen = np.asarray(view) % self.views
        return torch.from_numpy(self._codes[rows, chosen].astype(np.int64))

    def labels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Class ids int64 [B]."""
        return self._labels[torch.as_tensor(indices)]

"""Codes of ImageNet that others computed, in the two formats in which they are passed around.

- LlamaGen's `extract_codes_c2i.py`: `imagenet256_codes/17.npy` int64 [1, A, T] and
  `imagenet256_labels/17.npy` [1] for image 17. They are read as they are. Where ten-crop codes of a
  second crop range lie in a folder of their own, both are given, and their views are counted
  together.
- RAR's `maskgitvq.jsonl`: a line {"class_id": 3, "tokens": [...]} for every view of every image.
  12.8 million lines are no format for random access, so they are converted once.

Shape legend: N = images, A = views of an image, B = batch, T = positions, S = 1 sub-token.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2i.data.cache import cache_key
from t2i.data.code_array import MANIFEST, CodeChunk, build_code_array
from t2i.data.content import hash_files
from t2i.errors import UserError
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar

_FORMAT = 1  # part of the key: change it whenever the files change
_ROWS_PER_CHUNK = 8192
_BLOCK = 1 << 24
_SAMPLED = 64


class LlamaGenCodes:
    """Random access to LlamaGen's folders of .npy files, with the interface of `CodeArray`.

    Args:
        roots: the `--code-path` folders of one or more extractions of the same images.

    Attributes:
        views: A, of all roots together.

    Raises:
        UserError: folders without codes, codes without labels, or roots with different images.
    """

    def __init__(self, *roots: str | Path):
        if not roots:
            raise UserError("no folder of codes is given")
        self._folders = [_find_pair(Path(root)) for root in roots]
        self._numbers = _numbers(self._folders[0][0])
        for codes, labels in self._folders:
            for folder in (codes, labels):
                _check_same(self._numbers, self._folders[0][0], _numbers(folder), folder)
        ends = self._numbers[0], self._numbers[-1]
        classes = [[_label(labels, n) for n in ends] for _, labels in self._folders]
        if any(labels != classes[0] for labels in classes):
            raise UserError(
                f"{', '.join(map(str, roots))} hold different images: images {ends} have the classes {classes}"
            )
        first = [self._read(codes, self._numbers[0]) for codes, _ in self._folders]
        self._counts = [array.shape[0] for array in first]
        self.views = sum(self._counts)

    @property
    def identity(self) -> dict:
        """JSON-able, the same for a copy elsewhere: the content of every n-th image, since a
        million small files take too long.
        """
        digest, step = hashlib.sha256(), max(1, len(self) // _SAMPLED)
        for codes, labels in self._folders:
            for number in self._numbers[::step]:
                digest.update(_load(codes / f"{number}.npy").tobytes())
                digest.update(_load(labels / f"{number}.npy").tobytes())
        return {"count": len(self), "views": self.views, "sample": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._numbers)

    def codes(self, indices: Sequence[int] | Tensor, view: Sequence[int] | Tensor) -> Tensor:
        """int64 [B, T, 1]: of each image the view with this number, modulo their count."""
        rows = []
        for index, chosen in zip(np.asarray(indices), np.asarray(view) % self.views, strict=True):
            part = 0
            while chosen >= self._counts[part]:
                chosen -= self._counts[part]
                part += 1
            array = self._read(self._folders[part][0], self._numbers[index])
            rows.append(torch.from_numpy(array[chosen].astype(np.int64)))
        return torch.stack(rows)[..., None]

    def labels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Class ids int64 [B]."""
        folder = self._folders[0][1]
        numbers = [self._numbers[index] for index in np.asarray(indices)]
        return torch.tensor([_label(folder, number) for number in numbers])

    def _read(self, folder: Path, number: int) -> np.ndarray:
        """Codes [A, T] of an image."""
        path = folder / f"{number}.npy"
        array = _load(path)
        if array.ndim != 3 or len(array) != 1 or array.dtype.kind not in "iu":
            raise UserError(
                f"{path} holds {array.dtype} {list(array.shape)}, expected integers [1, views, positions]"
            )
        return array[0]


def is_llamagen_folder(root: Path) -> bool:
    """Whether a folder was the `--code-path` of LlamaGen's extraction."""
    return any(root.glob("imagenet*_codes"))


def _find_pair(root: Path) -> tuple[Path, Path]:
    """The folders of codes and labels below a root."""
    found = sorted(root.glob("imagenet*_codes"))
    if len(found) != 1:
        raise UserError(
            f"{root} must hold one folder named as imagenet256_codes, it has {len(found)}; give the folder that was "
            "extract_codes_c2i.py's --code-path"
        )
    labels = root / found[0].name.replace("_codes", "_labels")
    if not labels.is_dir():
        raise UserError(f"{root} has {found[0].name} and no {labels.name}")
    return found[0], labels


def _numbers(folder: Path) -> list[int]:
    numbers = sorted(int(path.stem) for path in folder.glob("*.npy") if path.stem.isdigit())
    if not numbers:
        raise UserError(f"{folder} holds no files named as 0.npy")
    return numbers


def _check_same(expected: list[int], reference: Path, found: list[int], folder: Path) -> None:
    if expected != found:
        odd = sorted(set(expected) ^ set(found))
        raise UserError(
            f"{folder} ({len(found)} files) does not belong to {reference} ({len(expected)}): {odd[0]}.npy is in one "
            "of them only; was the extraction or a copy interrupted?"
        )


def _label(folder: Path, number: int) -> int:
    array = _load(folder / f"{number}.npy")
    if array.size != 1:
        raise UserError(f"{folder / f'{number}.npy'} holds {array.size} numbers instead of a label")
    return int(array.item())


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def convert_jsonl(
    path: str | Path,
    cache_dir: str | Path,
    *,
    vocab: int = 1024,
    num_classes: int = 1000,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Path:
    """Convert RAR's file, or find that done; returns the folder for `CodeArray` (one view per row,
    [lines, 1, T, 1]).

    Raises:
        UserError: no such file, or a line (which is named) that is not {"class_id": int, "tokens":
            [T ints]} within the vocabulary and the classes.
        TimeoutError: another process stopped.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give RAR's maskgitvq.jsonl")
    contents = hash_files([(path.name, path)], Path(cache_dir), processes, progress)
    key = {
        "format": _FORMAT,
        "source": {"kind": "jsonl", "file": contents[0][1]},
        "vocab": vocab,
        "num_classes": num_classes,
    }
    folder = Path(cache_dir) / cache_key(key)
    if (folder / MANIFEST).exists():
        return folder
    count = _count_lines(path)
    with open(path, "rb") as file:
        positions = len(_parse(file.readline(), path, 0, None, vocab, num_classes)[1])

    def produce(missing: list[range]) -> Iterator[CodeChunk]:
        quiet = not (progress and processes.is_main)
        with (
            open(path, "rb") as file,
            progress_bar(
                total=sum(map(len, missing)), desc="codes", unit=" lines", disable=quiet
            ) as bar,
        ):
            place = 0
            for rows in missing:
                lines = islice(file, rows.start - place, rows.stop - place)
                place = rows.stop
                parsed = [
                    _parse(line, path, i, positions, vocab, num_classes)
                    for i, line in zip(rows, lines, strict=True)
                ]
                codes = np.array([tokens for _, tokens in parsed], dtype=np.int64)
                yield CodeChunk(rows, codes[:, None, :, None], [label for label, _ in parsed], [])
                bar.update(len(rows))

    return build_code_array(
        folder,
        key,
        (count, 1, positions, 1),
        vocab,
        produce,
        rows_per_chunk=_ROWS_PER_CHUNK,
        processes=processes,
    )


def _count_lines(path: Path) -> int:
    count, last = 0, b""
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    if not last:
        raise UserError(f"{path} is empty")
    return count + (last != b"\n")


def _parse(
    line: bytes, path: Path, index: int, positions: int | None, vocab: int, num_classes: int
) -> tuple[int, list[int]]:
    """The label and the tokens of a line."""
    try:
        content = json.loads(line)
        label, tokens = content["class_id"], content["tokens"]
        fits = all(isinstance(t, int) and 0 <= t < vocab for t in tokens)
        fits = fits and isinstance(label, int) and 0 <= label < num_classes
    except (ValueError, KeyError, TypeError) as error:  # not JSON, no object, other fields
        raise UserError(f"{path} line {index + 1} is not a line of codes: {error!r}") from error
    if not fits or len(tokens) != (len(tokens) if positions is None else positions) or not tokens:
        raise UserError(
            f"{path} line {index + 1}: class {label!r} and {len(tokens)} tokens; expected a class below {num_classes} and "
            f"{positions or 'some'} tokens below {vocab}"
        )
    return label, tokens

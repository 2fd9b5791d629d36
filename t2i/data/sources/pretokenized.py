"""Codes of ImageNet that others computed, in the two formats in which they are shared.

- LlamaGen's `extract_codes_c2i.py`: `imagenet256_codes/17.npy` int64 [1, A, T] and
  `imagenet256_labels/17.npy` [1] for image 17. They are read in place. If ten-crop codes of a
  second crop range are in a separate folder, both folders are given, and their views are combined.
- RAR's `maskgitvq.jsonl`: a line {"class_id": 3, "tokens": [...]} for every view of every image.
  12.8 million lines do not suit random access, so they are turned into a store once.

Shape legend: N = images, A = views of an image, B = batch, T = positions, S = 1 sub-token.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2i.data.content import content_key
from t2i.data.samples import Sample, Source
from t2i.data.store import Numbers, with_choices
from t2i.errors import UserError
from t2i.files import reading
from t2i.lfs import refuse_pointers

_BLOCK = 1 << 24
_SAMPLED = 64
_MANY = 64  # codes, of which some are in the upper seven eighths of their range
_THREADS, _AT_ONCE = 8, 4096


class LlamaGenCodes:
    """Random access to LlamaGen's folders of .npy files, with the interface of `CodeStore`.

    Args:
        roots: the `--code-path` folders of one or more extractions of the same images.

    Attributes:
        views: A, the number of views per image in all roots together.
    """

    def __init__(self, *roots: str | Path):
        if not roots:
            raise UserError("no folder of codes was given")
        self._folders = [_find_pair(Path(root)) for root in roots]
        first = self._folders[0][0]
        self._numbers = _numbers(first)
        for folder in (folder for pair in self._folders for folder in pair):
            if odd := sorted({*self._numbers} ^ {*(found := _numbers(folder))}):
                raise UserError(
                    f"{folder} ({len(found)} files) does not belong to {first} "
                    f"({len(self._numbers)}): {odd[0]}.npy is in only one of them; was the "
                    "extraction or a copy interrupted?"
                )
        ends = self._numbers[0], self._numbers[-1]
        classes = [[_label(labels, n) for n in ends] for _, labels in self._folders]
        if any(labels != classes[0] for labels in classes):
            raise UserError(
                f"{', '.join(map(str, roots))} hold different images: "
                f"images {ends} have the classes {classes}"
            )
        self._shapes = {folder: _codes(folder, ends[0]).shape for folder, _ in self._folders}
        lengths = {folder: positions for folder, (_, positions) in self._shapes.items()}
        if len({*lengths.values()}) > 1:
            listing = ", ".join(f"{folder}: {length}" for folder, length in lengths.items())
            raise UserError(f"the images have codes of different sizes ({listing} positions)")
        self._views = [
            (folder, view) for folder, (views, _) in self._shapes.items() for view in range(views)
        ]
        self.views = len(self._views)

    @cached_property
    def key(self) -> str:
        """Identifies the content, by all labels and the codes of every n-th image: reading those of
        a million images would take too long.
        """
        digest, step = hashlib.sha256(), max(1, len(self) // _SAMPLED)
        with ThreadPoolExecutor(_THREADS) as pool:
            for codes, labels in self._folders:
                for start in range(0, len(self), _AT_ONCE):
                    numbers = self._numbers[start : start + _AT_ONCE]
                    for content in pool.map(_bytes, [labels / f"{n}.npy" for n in numbers]):
                        digest.update(content)
                for number in self._numbers[::step]:
                    digest.update(_load(codes / f"{number}.npy").tobytes())
        return content_key({"count": len(self), "views": self.views, "hash": digest.hexdigest()})

    def __len__(self) -> int:
        return len(self._numbers)

    def codes(self, indices: Numbers, choice: Numbers | None = None) -> Tensor:
        """Codes int64 [B, T, 1] of one view of each image: the chosen one, modulo their number."""
        rows = []
        for index, pick in with_choices(indices, choice):
            folder, view = self._views[pick % self.views]
            rows.append(self._read(folder, self._numbers[index])[view].astype(np.int64))
        return torch.from_numpy(np.stack(rows))[..., None]

    def condition(self, index: int, choice: int = 0) -> int:
        """The class id."""
        return _label(self._folders[0][1], self._numbers[index])

    def name(self, index: int) -> str:
        return f"{self._numbers[index]}.npy"

    def same_images(self) -> None:
        """None: every image counts as different."""

    def check_some(self, check_codes: Callable[[Tensor], None], num_classes: int) -> None:
        """Check a sample of images, spread evenly from the first to the last. UserError names one
        whose class is not below `num_classes`, or whose codes are refused.
        """
        for index in _some(len(self)):
            label = self.condition(index)
            if not 0 <= label < num_classes:
                raise UserError(
                    f"{self._folders[0][1] / self.name(index)} holds class {label}; expected one "
                    f"below {num_classes}"
                )
            try:
                check_codes(self.codes([index] * self.views, range(self.views)))
            except UserError as error:
                raise UserError(f"{self._folders[0][0] / self.name(index)}: {error}") from error

    def _read(self, folder: Path, number: int) -> np.ndarray:
        """Codes [A, T] of an image; UserError if their shape is not that of the first image."""
        codes, expected = _codes(folder, number), self._shapes[folder]
        if codes.shape != expected:
            raise UserError(
                f"{folder / f'{number}.npy'} holds {list(codes.shape)} views and positions, "
                f"{self._numbers[0]}.npy {list(expected)}: was the extraction or a copy interrupted, "
                "or done twice with other settings?"
            )
        return codes


def is_llamagen_folder(root: Path) -> bool:
    """Whether a folder is the `--code-path` of a LlamaGen extraction."""
    return any(root.glob("imagenet*_codes"))


def _find_pair(root: Path) -> tuple[Path, Path]:
    """The folders of codes and labels below a root."""
    found = sorted(root.glob("imagenet*_codes"))
    if len(found) != 1:
        raise UserError(
            f"{root} must hold one folder named like imagenet256_codes, but has {len(found)}; "
            "give the folder that was extract_codes_c2i.py's --code-path"
        )
    labels = root / found[0].name.replace("_codes", "_labels")
    if not labels.is_dir():
        raise UserError(f"{root} has {found[0].name}, but no {labels.name}")
    return found[0], labels


def _numbers(folder: Path) -> list[int]:
    names = [path.stem for path in folder.glob("*.npy")]
    numbers = sorted(int(name) for name in names if name.isascii() and name.isdigit())
    if not numbers:
        raise UserError(f"{folder} holds no files named like 0.npy")
    return numbers


def _codes(folder: Path, number: int) -> np.ndarray:
    """Codes [A, T] of an image."""
    path = folder / f"{number}.npy"
    array = _load(path)
    if array.ndim != 3 or len(array) != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds {array.dtype} {list(array.shape)}, "
            "expected integers [1, views, positions]"
        )
    return array[0]


def _label(folder: Path, number: int) -> int:
    path = folder / f"{number}.npy"
    array = _load(path)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds {array.dtype} {list(array.shape)}, expected a label: one integer"
        )
    return int(array.item())


def _some(count: int) -> list[int]:
    """A few numbers below `count`, spread evenly, the first and the last among them."""
    return [*range(0, count - 1, -(-count // _SAMPLED)), count - 1]


def _bytes(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        refuse_pointers(path)
        raise UserError(f"{path} cannot be read: {error}") from error


class JsonlCodes(Source):
    """RAR's file as a source of codes, with one view per line. Opening it finds all lines.

    Args:
        vocab: all tokens must be below it.
        num_classes: all classes must be below it.

    Raises:
        UserError: no such file, or it is empty; when a line is read, it is not {"class_id": int,
            "tokens": [T ints]} within the vocabulary and the classes (the message names the line).
    """

    def __init__(self, path: str | Path, *, vocab: int = 1024, num_classes: int = 1000):
        self._path, self._vocab, self._num_classes = Path(path), vocab, num_classes
        if not self._path.is_file():
            raise UserError(f"{path} is not a file; give RAR's maskgitvq.jsonl")
        if not self._path.stat().st_size:
            raise UserError(f"{path} is empty")
        self._bytes = np.memmap(self._path, np.uint8, "r")
        breaks = [
            start + 1 + np.flatnonzero(self._bytes[start : start + _BLOCK] == ord("\n"))
            for start in range(0, len(self._bytes), _BLOCK)
        ]
        ends = np.concatenate([[0], *breaks])
        self._ends = ends if ends[-1] == len(self._bytes) else np.append(ends, len(self._bytes))
        self._positions: int | None = None
        first = self._parse(0)[1]
        self._positions, highest = first.shape[1], int(first.max())
        identity = {"kind": "jsonl", "vocab": vocab, "num_classes": num_classes}
        super().__init__(str(path), identity, len(self._ends) - 1)
        if self._positions >= _MANY and highest < vocab // 8:
            self.remarks.append(
                f"no code of the first line is above {highest}, though this model has {vocab} codes: "
                "are they of its own image tokenizer? (RAR's file is for RAR)"
            )

    def files(self) -> list[tuple[str, Path]]:
        return [("codes.jsonl", self._path)]

    def __getitem__(self, index: int) -> Sample:
        label, codes = self._parse(index)
        return Sample(index, f"line {index + 1}", codes, [], label=label)

    def check_some(self, check_codes: Callable[[Tensor], None]) -> None:
        """Check a sample of lines, spread evenly from the first to the last. UserError for one that
        is damaged or whose codes are refused.
        """
        for index in _some(len(self._ends) - 1):
            check_codes(self._parse(index)[1])

    def _parse(self, index: int) -> tuple[int, Tensor]:
        """The label and the codes int64 [1, T, 1] of a line."""
        where = f"{self._path} line {index + 1}"
        try:
            content = json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())
            label, tokens = content["class_id"], content["tokens"]
            fits = all(type(t) is int and 0 <= t < self._vocab for t in tokens)  # no bool either
            fits = fits and type(label) is int and 0 <= label < self._num_classes
        except (ValueError, KeyError, TypeError) as error:  # not JSON, not an object, other fields
            refuse_pointers(self._path)
            raise UserError(f"{where} is not a line of codes: {error!r}") from error
        if not fits or not tokens or len(tokens) != (self._positions or len(tokens)):
            raise UserError(
                f"{where}: class {label!r} and {len(tokens)} tokens; expected a class below "
                f"{self._num_classes} and {self._positions or 'some'} tokens below {self._vocab}"
            )
        return label, torch.tensor(tokens)[None, :, None]

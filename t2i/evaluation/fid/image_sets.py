"""Sets of images to score, read one batch at a time: an .npz with `arr_0`, as ADM's evaluator
takes it, or a folder.

50,000 images of 256 x 256 pixels are 9.8 GB, so an .npz is streamed from its zip member, in file
order. For a folder, all images below it are read, sorted by path; if this kit generated it
(`00000/samples/00000.png`), only the samples, not the sheets and refinement stages next to them.
"""

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from t2i.data.encoding import load_ahead
from t2i.data.images import SkipSample, open_image
from t2i.data.sources.folders import is_image, walk
from t2i.errors import UserError
from t2i.lfs import refuse_pointers

_SAMPLE = re.compile(r"(^|/)\d{5}/samples/[^/]+$")
_RECORDS = ("generation.json", "settings.json")  # written by drawing into a folder of images
_LARGEST_ARRAY = 1 << 30
"""Limit in bytes for arrays that are read at once, such as statistics; images are streamed."""
_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError)
_BAD_HEADER = (tokenize.TokenError, TypeError, MemoryError)
"""What NumPy raises for damaged headers, besides ValueError."""


class NpzImages:
    """The images `arr_0` uint8 [N, H, W, 3] of an .npz file.

    Raises:
        UserError: the file does not exist, is not an .npz, or has no whole `arr_0` of this kind.
    """

    kind = "npz"

    def __init__(self, path: Path):
        self.path = path
        with _open_images(path) as file:
            shape, order, dtype = _read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or order or not all(shape):
            layout = "Fortran order " if order else ""
            raise UserError(
                f"{path}: arr_0 is {layout}{dtype} {list(shape)}; images must be uint8 "
                "[N, H, W, 3] in C order"
            )
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("arr_0.npy").file_size
        if size < math.prod(shape):
            raise UserError(
                f"{path}: the header of arr_0 says {list(shape)}, but only {size:,} bytes follow: it is "
                "truncated, or the header is damaged"
            )
        self.shape = tuple(shape[1:])
        self.count = shape[0]
        self.left_out = 0
        self.not_read: list[tuple[str, str]] = []

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """uint8 images [H, W, 3], at most `size` at a time, in file order."""
        bytes_per_image = int(np.prod(self.shape))
        with _open_images(self.path) as file:
            _read_header(file)
            for start in range(0, self.count, size):
                count = min(size, self.count - start)
                data = file.read(count * bytes_per_image)
                yield list(np.frombuffer(data, np.uint8).reshape(count, *self.shape))


class FolderImages:
    """Every image below a folder, sorted by path.

    Raises:
        UserError: the folder holds no image, or images of several generations (models, seeds,
            settings).
    """

    kind = "folder"

    def __init__(self, path: Path):
        self.path = path
        files, self.not_read = walk(path)
        found = [file for file in files if is_image(file)]
        if not found:
            raise UserError(f"{path} holds no images")
        records = sorted({file.parent for file in files if file.name in _RECORDS})
        if len(records) > 1:
            names = ", ".join(str(record.relative_to(path)) for record in records[:4])
            raise UserError(
                f"{path} holds {len(records)} sets of generated images ({names} ...): they must "
                "not be scored as one; give one of them"
            )
        samples = [f for f in found if _SAMPLE.search(f.relative_to(path).as_posix())]
        self.files = samples or found
        self.left_out = len(found) - len(self.files)
        self.count = len(self.files)

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """uint8 images [H, W, 3], at most `size` at a time; the next batch is decoded meanwhile.

        Raises:
            UserError: an image cannot be read.
        """
        for _, images in load_ahead(iter(self.files), _read_image, size):
            yield images


ImageSet = NpzImages | FolderImages


def open_images(path: str | Path) -> ImageSet:
    """The images of an .npz file or of a folder.

    Raises:
        UserError: it is neither, or holds no usable images.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; give an .npz file or a folder of images")
    return NpzImages(path)


def npz_arrays(path: Path) -> set[str]:
    """The names of the arrays in an .npz file; UserError if it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _BROKEN as error:
        refuse_pointers(path)
        raise UserError(
            f"{path} is not a readable .npz file: {error}; give an .npz file or a folder of images"
        ) from error


def read_npz_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz file; refuses pickled objects and arrays that unpack to gigabytes."""
    if name not in (names := npz_arrays(path)):
        raise UserError(f"{path} has no {name}; it holds {', '.join(sorted(names))}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := archive.getinfo(f"{name}.npy").file_size) > _LARGEST_ARRAY:
                raise UserError(f"{path}: {name} unpacks to {size} bytes, limit {_LARGEST_ARRAY}")
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except UserError:
        raise
    except (*_BROKEN, *_BAD_HEADER, KeyError) as error:
        raise UserError(f"{path}: {name} cannot be read: {error}") from error


def _read_image(path: Path) -> np.ndarray:
    try:
        return np.asarray(open_image(path))
    except SkipSample as error:
        raise UserError(f"{path} cannot be judged: {error}; replace or remove it") from error


@contextmanager
def _open_images(path: Path) -> Iterator[IO[bytes]]:
    if "arr_0" not in (names := npz_arrays(path)):
        raise UserError(
            f"{path} has no arr_0 (images; a reference may have mu and sigma instead); it holds "
            f"{', '.join(sorted(names))}"
        )
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            yield file
    except UserError:
        raise
    except (*_BROKEN, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read a .npy header: shape, whether in Fortran order, and dtype."""
    version = np.lib.format.read_magic(file)
    try:
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except _BAD_HEADER as error:
        raise ValueError(f"no array's header: {error}") from error

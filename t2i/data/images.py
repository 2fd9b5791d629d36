"""One image of a data set: open, normalize and crop it, and turn it into pixels; or skip it.

Real data sets hold odd files. Each kind has one defined outcome: the image is read correctly, or
`SkipSample` carries the reason into the report. A run never stops because of an image.

The crop is the one that LlamaGen's tokenizers and models were trained on (from OpenAI's ADM):
halve with a box filter while the short side is at least twice the target, resize the short side to
the target with a bicubic filter, cut out the center.

Shape legend: A = views of an image, H, W = pixels.
"""

import io
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from t2i.errors import UserError
from t2i.files import refuse_passing, unreadable_now
from t2i.lfs import LFS_POINTER

# Part of every cache key: change it whenever the pixels of an image change.
PIXELS_VERSION = "adm-crop-3"
_MOST_MEGAPIXELS = 100.0
"""Larger images are skipped. Pillow has its own limit near 179, which also leads to a skip."""
# Decoded by Pillow alone; EPS, for example, would start Ghostscript on a downloaded file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_LARGEST_FILE = 1 << 30
"""Limit for an encoded image in bytes, more than 100 megapixels ever need."""
_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLE_FORMAT_TAG = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_PNG_BITS = 24  # offset of the byte in a PNG that gives the bits per channel
_UPRIGHT = {  # the transpose that undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


UNFETCHED = "Git LFS pointer"
"""Reason to skip a file that Git LFS has not fetched."""


class SkipSample(Exception):
    """A sample cannot be used: `reason` is a fixed phrase for counting, `detail` says more.

    Reasons for images: `missing` (no such file), `unreadable` (refused by the file system), `empty`
    (zero bytes), `corrupt` (no known format, truncated or damaged), `too large`, `too small`, and
    `Git LFS pointer`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class FileSlice:
    """Bytes `offset .. offset + size - 1` of a file: an image or a caption inside a tar."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class RemoteFile:
    """A file that a streaming data set gives by its address (hf://..., zip://...::hf://...)."""

    url: str


ImageRef = bytes | Path | FileSlice | RemoteFile | Image.Image | None


def read_bytes(where: Path | FileSlice | RemoteFile, limit: int | None = None) -> bytes:
    """Read a file or a part of one.

    Args:
        limit: most bytes that may be read.

    Raises:
        SkipSample: the file is missing, unreadable, corrupt, or too large.
        UserError: the hub or a network disk cannot be reached, or the machine has run out of memory
            or open files.
    """
    try:
        if isinstance(where, RemoteFile):
            import fsspec  # installed with the datasets library, which gave the address

            with fsspec.open(where.url, "rb") as file:
                data = file.read(-1 if limit is None else limit + 1)
            if limit is not None and len(data) > limit:
                raise SkipSample("too large", f"more than {limit} bytes")
            return data
        path = where.path if isinstance(where, FileSlice) else where
        if isinstance(where, FileSlice):
            offset, size = where.offset, where.size
        else:
            status = path.stat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise SkipSample("unreadable", "not a regular file")  # a pipe would block forever
            offset, size = 0, status.st_size
        if limit is not None and size > limit:
            raise SkipSample("too large", f"{size} bytes, limit {limit}")
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size if isinstance(where, FileSlice) else -1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SkipSample("missing", str(error)) from error
    except (OSError, ValueError) as error:  # permissions, name too long, a NUL byte in the name
        if not isinstance(where, RemoteFile):
            refuse_passing(path, error)
        elif "hf://" in where.url:  # other addresses may be dead links
            raise unreadable_now(where.url, error) from error
        raise SkipSample("unreadable", str(error)) from error
    if len(data) < size:
        raise SkipSample("corrupt", f"{path} ends inside this file")
    return data


def open_image(image: ImageRef) -> Image.Image:
    """Open one image and normalize it to upright 8-bit RGB.

    CMYK is converted, transparency (RGBA, LA, palettes) composited over white, 16-bit and float
    grayscale scaled to 8 bits, EXIF orientation applied, and the first frame of an animation used.

    Args:
        image: encoded bytes, a path, a slice of a file, a remote file, a PIL image, or None (none).
    """
    if image is None:
        raise SkipSample("missing", "the row holds no image")
    if isinstance(image, Path | FileSlice | RemoteFile):
        image = read_bytes(image, limit=_LARGEST_FILE)
    if isinstance(image, bytes) and not image:
        raise SkipSample("empty", "zero bytes")
    if isinstance(image, bytes) and image.startswith(LFS_POINTER):
        raise SkipSample(UNFETCHED, "run `git lfs pull` to fetch the image")
    try:
        if isinstance(image, Image.Image):
            return _normalize(image)
        with Image.open(io.BytesIO(image), formats=_formats()) as opened:
            _scale_transparent_gray(opened, image)
            return _normalize(opened)
    except (SkipSample, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipSample("too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise SkipSample("corrupt", f"none of the formats {', '.join(_formats())}") from error
    except Exception as error:  # damaged files make Pillow's parsers raise nearly anything
        raise SkipSample("corrupt", f"{type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's center crop to `size` x `size` pixels; a short side below `size` is scaled up."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    # In numpy: torch would start more threads for each of those that decode images.
    pixels_HWC = (np.array(image, dtype=np.float32) / 255 - 0.5) / 0.5
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Views:
    """Which views of an image are encoded.

    Attributes:
        kind: "centre" (the center crop), "flip" (the center crop and its mirror image, as in
            LlamaGen's and RandAR's plain sets) or "ten-crop" (of a square a little larger than the
            target, the four corners and the center, then the same five of its mirror image).
        crop_ranges: for ten-crop, how much larger; each factor gives ten views. LlamaGen's set has
            both, picked with equal probability; RAR's has the first.
    """

    kind: Literal["centre", "flip", "ten-crop"] = "ten-crop"
    crop_ranges: tuple[float, ...] = (1.1, 1.05)

    def __post_init__(self):
        if self.kind == "ten-crop" and not (self.crop_ranges and min(self.crop_ranges) >= 1):
            raise UserError(f"crop_ranges={self.crop_ranges} must be factors of at least 1")

    @property
    def count(self) -> int:
        """A, the number of views."""
        return {"centre": 1, "flip": 2, "ten-crop": 10 * len(self.crop_ranges)}[self.kind]

    @property
    def identity(self) -> dict:
        """JSON-able, for the keys of stores."""
        ranges = {"crop_ranges": list(self.crop_ranges)} if self.kind == "ten-crop" else {}
        return {"kind": self.kind, **ranges}

    def cut(self, image: Image.Image, size: int) -> Tensor:
        """All views of an RGB image, float32 [A, 3, size, size] in [-1, 1]; enlarges small ones."""
        if self.kind == "ten-crop":
            from torchvision.transforms.functional import ten_crop

            squares = [center_crop(image, int(size * factor)) for factor in self.crop_ranges]
            views = [view for square in squares for view in ten_crop(square, [size])]
        else:
            square = center_crop(image, size)
            views = [square, ImageOps.mirror(square)][: self.count]
        return torch.from_numpy(np.stack([to_pixels(view).numpy() for view in views]))


@dataclass(frozen=True)
class ImageRules:
    """How the images of a data set become pixels, and which of them are skipped.

    Attributes:
        size: side of a view in pixels.
        small: what to do with an image whose short side is below `size`.
    """

    size: int
    views: Views = Views("centre")
    small: Literal["skip", "upscale"] = "skip"

    @property
    def identity(self) -> dict:
        """JSON-able, for the keys of stores."""
        return {
            "resolution": self.size,
            "views": self.views.identity,
            "small_images": self.small,
            "max_megapixels": _MOST_MEGAPIXELS,
            "pixels": PIXELS_VERSION,
        }

    def load(self, image: ImageRef) -> Tensor:
        """Open, normalize and cut one image -> float32 [A, 3, size, size] in [-1, 1].

        Raises:
            SkipSample: the image cannot be used, or is too small under the policy "skip".
        """
        opened = open_image(image)
        short, long = sorted(opened.size)
        if short < self.size:
            if self.small == "skip":
                detail = f"{opened.width} x {opened.height} px, needs {self.size}"
                raise SkipSample("too small", detail)
            # The area grows with the square of the factor: 1 x 10000 would become 256 x 2560000.
            _check_megapixels(self.size, round(long * self.size / short))
        return self.views.cut(opened, self.size)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF only in newer Pillows


def _check_megapixels(width: int, height: int) -> None:
    if width * height > _MOST_MEGAPIXELS * 1e6:
        detail = f"{width} x {height} px, limit {_MOST_MEGAPIXELS:g} megapixels"
        raise SkipSample("too large", detail)


def _normalize(image: Image.Image) -> Image.Image:
    _check_megapixels(*image.size)
    image.load()
    # Not ImageOps.exif_transpose: it rewrites the whole EXIF block and raises on a damaged tag.
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    image = image if turn is None else image.transpose(turn)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow cannot convert this to RGBA directly
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scale_transparent_gray(opened: Image.Image, data: bytes) -> None:
    """Scale a PNG's transparent gray value to 8 bits: of 2 or 4 bits, Pillow scales only pixels."""
    value = opened.info.get("transparency")
    if opened.format == "PNG" and opened.mode == "L" and isinstance(value, int):
        largest = 2 ** data[_PNG_BITS] - 1
        if value <= largest:
            opened.info["transparency"] = value * 255 // largest


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grayscale with more than 8 bits -> mode L, over white; Pillow's own convert would clip it.

    Mode I;16 has 16 bits, or as many as a TIFF's tags say. Modes I and F do not define white: it is
    taken to be the smallest usual full scale (float 1; 8, 16, 31 or unsigned 32 bits) that is not
    below the largest value.
    """
    tags = getattr(image, "tag_v2", {})  # TIFF only: Pillow ignores these and gives raw numbers
    stored = np.asarray(image)
    sample_format = _first(tags.get(_SAMPLE_FORMAT_TAG, _UNSIGNED))
    unsigned = bool(tags) and image.mode == "I" and sample_format == _UNSIGNED
    values = (stored.view(np.uint32) if unsigned else stored).astype(np.float64)
    if not np.isfinite(values).all():
        raise SkipSample("corrupt", "holds values that are not finite")
    if image.mode.startswith("I;16"):
        white = 2.0 ** _first(tags.get(_BITS_TAG, 16)) - 1
    else:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = 2.0**32 - 1 if unsigned else 2.0**31 - 1
        white = next((scale for scale in scales if values.max() <= scale), full)
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        values = white - values
    elif "transparency" in image.info:  # a PNG's transparent value
        values = np.where(values == image.info["transparency"], white, values)
    scaled = np.clip(values / white, 0, 1) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _first(value: Any) -> Any:
    """The first value of a TIFF tag, which holds one number or one per channel."""
    return value[0] if isinstance(value, tuple) else value

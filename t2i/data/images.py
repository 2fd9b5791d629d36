"""One image from a data set: opened, normalised, cropped, turned into pixels; or skipped.

Data sets from the wild hold odd files, and each kind has one defined answer here: it is used
rightly, or `SkipSample` carries the reason into the report. A run never stops because of an image.

The crop is the one that LlamaGen's tokenizers and models were trained on (from OpenAI's ADM):
halve with a box filter while the short side is at least twice the target, resize the short side to
the target with a bicubic filter, cut the centre.

Shape legend: H, W = pixels.
"""

import io
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from t2i.errors import UserError

# Part of every cache key: change it whenever the pixels of an image change.
PIXELS_VERSION = "adm-crop-1"
SMALL_IMAGE_POLICIES = ("skip", "upscale")
# Formats that decode by themselves; EPS, for example, would start Ghostscript on a downloaded file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # what undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SkipSample(Exception):
    """A sample that cannot be used: `reason` is a fixed phrase to count by, `detail` says more.

    Reasons of images: `missing` (no such file), `unreadable` (the file system refuses), `empty`
    (zero bytes), `corrupt` (no known format, truncated or damaged), `too large`, `too small`.
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
    """A file that a streaming data set names by its address (hf://..., zip://...::hf://...)."""

    url: str


ImageRef = bytes | Path | FileSlice | RemoteFile | Image.Image | None


def read_bytes(where: Path | FileSlice | RemoteFile, limit: int | None = None) -> bytes:
    """Read a file or a part of one; SkipSample missing, unreadable, corrupt, or too large if that
    fails.

    Args:
        limit: bytes from which on a local file is too large.
    """
    try:
        if isinstance(where, RemoteFile):
            import fsspec  # comes with the datasets library, which gave the address

            with fsspec.open(where.url, "rb") as file:
                return file.read()
        if isinstance(where, FileSlice):
            path, offset, size = where.path, where.offset, where.size
        else:
            status = where.stat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise SkipSample("unreadable", "not a regular file")  # a pipe would block for ever
            path, offset, size = where, 0, status.st_size
        if limit is not None and size > limit:
            raise SkipSample("too large", f"{size} bytes, limit {limit}")
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size if isinstance(where, FileSlice) else -1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SkipSample("missing", str(error)) from error
    except (OSError, ValueError) as error:  # permissions, name too long, a NUL byte in the name
        raise SkipSample("unreadable", str(error)) from error
    if len(data) < size:
        raise SkipSample("corrupt", f"{path} ends inside this file")
    return data


def open_image(image: ImageRef, max_megapixels: float = 100.0) -> Image.Image:
    """Open and normalise one image to an upright 8-bit RGB image.

    CMYK is converted, transparency (RGBA, LA, palettes) composited over white, 16-bit and float
    greyscale scaled to 8 bit, EXIF orientation applied, the first frame of an animation taken.

    Args:
        image: encoded bytes, a path, another place of a file, a PIL image, or None (no image).
        max_megapixels: larger images are skipped before they are decoded. Pillow has a limit of
            its own near 179 megapixels, which also ends in a skip.

    Raises:
        SkipSample: the image cannot be used; see the class for the reasons.
    """
    if image is None:
        raise SkipSample("missing", "the row holds no image")
    if isinstance(image, Path | FileSlice | RemoteFile):
        image = read_bytes(image)
    if isinstance(image, bytes) and not image:
        raise SkipSample("empty", "zero bytes")
    try:
        if isinstance(image, Image.Image):
            return _normalise(image, max_megapixels)
        with Image.open(io.BytesIO(image), formats=_formats()) as opened:
            return _normalise(opened, max_megapixels)
    except (SkipSample, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipSample("too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise SkipSample("corrupt", f"none of the formats {', '.join(_formats())}") from error
    except Exception as error:  # damaged files make Pillow's parsers raise nearly anything
        raise SkipSample("corrupt", f"{type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to `size` x `size` pixels; a short side below `size` is scaled up."""
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
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.float32))
    return ((pixels_HWC / 255 - 0.5) / 0.5).permute(2, 0, 1).contiguous()


def load_pixels(
    image: ImageRef, size: int, *, small: str = "skip", max_megapixels: float = 100.0
) -> Tensor:
    """Open, normalise and crop one image -> float32 [3, size, size] in [-1, 1].

    Args:
        small: what happens to an image with a short side below `size`: "skip" or "upscale".

    Raises:
        SkipSample: the image cannot be used, or is too small under the policy "skip".
        UserError: an unknown policy.
    """
    check_small_policy(small)
    opened = open_image(image, max_megapixels)
    short, long = sorted(opened.size)
    if short < size:
        if small == "skip":
            raise SkipSample("too small", f"{opened.width} x {opened.height} px, needs {size}")
        # A thin strip grows with the square of the factor: 1 x 10000 would become 256 x 2560000.
        _check_megapixels(size, round(long * size / short), max_megapixels)
    return to_pixels(center_crop(opened, size))


def check_small_policy(small: str) -> None:
    """UserError unless `small` is one of the policies for small images."""
    if small not in SMALL_IMAGE_POLICIES:
        raise UserError(f"unknown policy {small!r} for small images: use 'skip' or 'upscale'")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF only in newer Pillows


def _check_megapixels(width: int, height: int, limit: float) -> None:
    if width * height > limit * 1e6:
        raise SkipSample("too large", f"{width} x {height} px, limit {limit:g} megapixels")


def _normalise(image: Image.Image, max_megapixels: float) -> Image.Image:
    _check_megapixels(*image.size, max_megapixels)
    image.load()
    # Not ImageOps.exif_transpose: it rewrites the whole EXIF block and raises on a damaged tag.
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG))
    image = image if turn is None else image.transpose(turn)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow has no direct way from here to RGBA
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greyscale with more than 8 bits -> mode L; Pillow's own convert would clip to white.

    Mode I;16 is 16-bit by definition. Modes I and F do not say what white is: it is taken to be
    the smallest of the usual full scales (float 1, 8, 16, 31 bits) that holds the largest value.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise SkipSample("corrupt", "holds values that are not finite")
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((scale for scale in scales if values.max() <= scale), 2.0**31 - 1)
    scaled = np.clip(values / white, 0, 1) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))

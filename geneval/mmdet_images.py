"""Images as the official detector gets them: mmdet 2.28's test pipeline for Mask2Former, in numpy.

Upright RGB, alpha dropped; scaled so that the long side is at most 1333 and the short side at most
800 pixels, with OpenCV's bilinear resize (no antialiasing, integer arithmetic); padded right and
below with grey to a multiple of 32; then normalised. The resize is bit-exact, because one grey
level on a tenth of the pixels is enough to flip attention masks of the network.

Shapes: H x W input, h x w output pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from t2i.errors import UserError

_UNSUPPORTED_MODES = ("I", "F")  # 16- and 32-bit greyscale: Pillow's conversion clips to white
_FIXED_BITS = 11  # OpenCV's bilinear weights are multiples of 1 / 2048


@dataclass(frozen=True)
class ImageRules:
    """Constants of the test pipeline; the defaults are the released model's.

    long_side, short_side: limits in pixels. mean, std: of RGB, 0..255.
    """

    long_side: int = 1333
    short_side: int = 800
    pad_divisor: int = 32
    pad_value: int = 128
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF orientation applied, alpha dropped without blending, mode RGB.

    Raises:
        UserError: more than 8 bits a channel, which the official judge has no rule for.
    """
    if image.mode.startswith(_UNSUPPORTED_MODES):
        raise UserError(f"an image of mode {image.mode} cannot be judged: convert it to 8-bit RGB")
    return ImageOps.exif_transpose(image).convert("RGB")


def scaled_size(width: int, height: int, rules: ImageRules) -> tuple[int, int]:
    """Width and height after the resize, aspect kept, rounded half up."""
    scale = min(
        rules.long_side / max(width, height),
        rules.short_side / min(width, height),
    )
    return int(width * scale + 0.5), int(height * scale + 0.5)


def prepare(image: Image.Image, rules: ImageRules) -> tuple[np.ndarray, tuple[int, int]]:
    """Resized and padded pixels, uint8 [h, w, 3], and the (height, width) without the padding.

    image: mode RGB, from `upright_rgb`.
    """
    width, height = scaled_size(*image.size, rules)
    resized = resize_bilinear(np.asarray(image), width, height)
    below, right = -height % rules.pad_divisor, -width % rules.pad_divisor
    padding = ((0, below), (0, right), (0, 0))
    return np.pad(resized, padding, constant_values=rules.pad_value), (height, width)


def normalise(pixels: np.ndarray, rules: ImageRules) -> torch.Tensor:
    """uint8 [h, w, 3] -> float32 [1, 3, h, w]."""
    scaled = (pixels.astype(np.float32) - np.float32(rules.mean)) / np.float32(rules.std)
    return torch.from_numpy(scaled).permute(2, 0, 1)[None].contiguous()


def resize_bilinear(pixels_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    """OpenCV's `resize(..., INTER_LINEAR)` of a uint8 image, bit for bit; uint8 [h, w, C].

    Columns first, with 11-bit weights and exact sums; then rows, where OpenCV drops 4 bits before
    and 16 bits after the product. Beyond the border the outermost pixel counts.
    """
    in_height, in_width = pixels_HWC.shape[:2]
    if (width, height) == (in_width, in_height):
        return pixels_HWC.copy()
    left, right, to_left, to_right = _taps(in_width, width, clamp_weights=True)
    top, bottom, to_top, to_bottom = _taps(in_height, height, clamp_weights=False)
    source = pixels_HWC.astype(np.int32)
    rows_HwC = (
        source[:, left] * to_left[None, :, None] + source[:, right] * to_right[None, :, None]
    ) >> 4
    upper = (rows_HwC[top] * to_top[:, None, None]) >> 16
    lower = (rows_HwC[bottom] * to_bottom[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _taps(
    size_in: int, size_out: int, *, clamp_weights: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two source indices and integer weights of every output pixel along one axis."""
    centers = (np.arange(size_out, dtype=np.float64) + 0.5) * (size_in / size_out) - 0.5
    centers = centers.astype(np.float32)
    first = np.floor(centers).astype(np.int64)
    share = centers - first.astype(np.float32)
    if clamp_weights:
        share[(first < 0) | (first >= size_in - 1)] = 0
    one = np.float32(1 << _FIXED_BITS)
    weights = [np.rint(one * part).astype(np.int32) for part in (1 - share, share)]
    limits = (0, size_in - 1)
    return np.clip(first, *limits), np.clip(first + 1, *limits), *weights

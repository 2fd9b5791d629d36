"""The views of an ImageNet image whose codes class-conditional models are trained on, as their
authors cut them.

- `flip`: the centre crop and its mirror image (LlamaGen's and RandAR's plain set).
- `ten-crop`: the image is cropped to a square a little larger than the target (by the factor of the
  crop range), of which the four corners and the centre are taken, then the same five of its mirror
  image. LlamaGen has two such sets, 1.1 and 1.05, and picks among them with equal chance; RAR has
  the first.

Shape legend: A = views, H, W = pixels.
"""

from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from t2i.data.images import center_crop, to_pixels
from t2i.errors import UserError

VIEW_KINDS = ("flip", "ten-crop")
LLAMAGEN_RANGES = (1.1, 1.05)


@dataclass(frozen=True)
class Views:
    """Which views of an image are encoded.

    Attributes:
        kind: "flip" or "ten-crop".
        crop_ranges: factors of ten-crop, each of which gives ten views.

    Raises:
        UserError: an unknown kind, or a range below 1.
    """

    kind: str = "ten-crop"
    crop_ranges: tuple[float, ...] = LLAMAGEN_RANGES

    def __post_init__(self):
        if self.kind not in VIEW_KINDS:
            raise UserError(f"unknown views {self.kind!r}; choose one of {', '.join(VIEW_KINDS)}")
        if self.kind == "ten-crop" and not (self.crop_ranges and min(self.crop_ranges) >= 1):
            raise UserError(f"crop_ranges={self.crop_ranges} must be factors of at least 1")

    @property
    def count(self) -> int:
        """A."""
        return 2 if self.kind == "flip" else 10 * len(self.crop_ranges)

    @property
    def identity(self) -> dict:
        """JSON-able, for cache keys."""
        ranges = {"crop_ranges": list(self.crop_ranges)} if self.kind == "ten-crop" else {}
        return {"kind": self.kind, **ranges}

    def cut(self, image: Image.Image, size: int) -> Tensor:
        """All views of an RGB image, float32 [A, 3, size, size] in [-1, 1]; small images are
        enlarged.
        """
        if self.kind == "flip":
            square = center_crop(image, size)
            views = [square, ImageOps.mirror(square)]
        else:
            views = []
            for crop_range in self.crop_ranges:
                views += ten_crop(center_crop(image, int(size * crop_range)), size)
        return torch.stack([to_pixels(view) for view in views])


def ten_crop(image: Image.Image, size: int) -> list[Image.Image]:
    """Top left, top right, bottom left, bottom right and centre, then those of the mirror image:
    torchvision's order.
    """
    views = []
    for side in (image, ImageOps.mirror(image)):
        right, bottom = side.width - size, side.height - size
        centre = (round(right / 2), round(bottom / 2))  # halves to even, as torchvision rounds
        for left, top in ((0, 0), (right, 0), (0, bottom), (right, bottom), centre):
            views.append(side.crop((left, top, left + size, top + size)))
    return views

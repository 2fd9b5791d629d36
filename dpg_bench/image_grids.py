"""DPG-Bench's image files: one PNG a prompt, its images in a 2 x 2 grid, row by row."""

from __future__ import annotations

from PIL import Image

from t2i.errors import UserError

IMAGES_PER_PROMPT = 4
_SIDES = 2  # of the grid, in images


def crop_grid(
    grid: Image.Image, resolution: int, count: int = IMAGES_PER_PROMPT
) -> list[Image.Image]:
    """The first `count` images of a grid (top left, top right, bottom left, bottom right).

    resolution: side of one image in pixels. As in the official script nothing is checked: what lies
    outside the grid is black. `split_grid` is the safe way.
    """
    corners = [(x * resolution, y * resolution) for y in range(_SIDES) for x in range(_SIDES)]
    return [grid.crop((x, y, x + resolution, y + resolution)) for x, y in corners[:count]]


def split_grid(grid: Image.Image, resolution: int | None = None) -> list[Image.Image]:
    """The four images of a grid.

    resolution: the side of one image as the user believes it to be; checked where it is given.

    Raises:
        UserError: the grid is not a square of an even side, or of images of another side.
    """
    width, height = grid.size
    if width != height or width % _SIDES:
        raise UserError(f"{width} x {height} px is not a square grid of 2 x 2 equal images")
    if resolution is not None and width != _SIDES * resolution:
        raise UserError(
            f"the grid of {width} x {height} px holds images of {width // _SIDES} px, not of "
            f"{resolution} px: the official script would crop wrongly without a word"
        )
    return crop_grid(grid, width // _SIDES)

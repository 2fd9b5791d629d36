"""Images as judges see them; writing images and contact sheets."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from t2i.errors import UserError
from t2i.files import replacing, saving
from t2i.sampling import check_counts

_DEEP_MODES = ("I", "F")  # 16- and 32-bit greyscale: Pillow's conversion clips to white
_GAP = 6
_LABEL_HEIGHT = 16


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF orientation applied, alpha dropped without blending, mode RGB.

    Raises:
        UserError: more than 8 bits per channel, which the official judges do not define.
    """
    if image.mode.startswith(_DEEP_MODES):
        raise UserError(f"an image of mode {image.mode} cannot be judged: convert it to 8-bit RGB")
    return ImageOps.exif_transpose(image).convert("RGB")


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG through a temporary name, creating its folder if needed."""
    return save_image(image, path, format="PNG")


def save_image(image: Image.Image, path: str | Path, **options) -> Path:
    """Like `save_png`, in any format; options as in `Image.save`."""
    path = Path(path)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, **options)
    return path


def grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    cell: int | None = None,
) -> Image.Image:
    """One RGB image that shows images row by row on white, each with its label, if any, below it.

    Args:
        columns: images per row; if None, the sheet is about square.
        labels: one for each image; "" for no label.
        cell: side of a cell in pixels, to which images are scaled (small ones without smoothing);
            if None, the longest side of any image, but at least 128.

    Raises:
        UserError: there are no images, something else is among them, or labels are missing.
    """
    single = isinstance(images, Image.Image) or not isinstance(images, Iterable)
    images = images if single else list(images)
    if single or not all(isinstance(i, Image.Image) for i in images):
        raise UserError(f"grid needs a list of PIL images, but got {images!r:.80}")
    if not images:
        raise UserError("a grid needs at least one image")
    check_counts(columns=columns, cell=cell)
    if not isinstance(labels, Sequence | None):
        raise UserError(f"labels is {labels!r:.80}: give a list, one for each image")
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(labels)} labels for {len(images)} images: give one for each")
    columns = columns or math.ceil(math.sqrt(len(images)))
    cell = cell or max(128, *(max(i.size) for i in images))
    text = _LABEL_HEIGHT if labels else 0
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell + _GAP) + _GAP, rows * (cell + text + _GAP) + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, image in enumerate(images):
        x = _GAP + (i % columns) * (cell + _GAP)
        y = _GAP + (i // columns) * (cell + text + _GAP)
        small = max(image.size) <= cell
        method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        sheet.paste(ImageOps.contain(image, (cell, cell), method), (x, y))
        if labels and labels[i]:
            draw.text((x, y + cell + 2), _fit(labels[i], cell, font), fill="black", font=font)
    return sheet


def _fit(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, cut so that it does not run into the next cell."""
    text = text if len(text) <= width else text[:width] + "…"  # no letter is narrower than a pixel
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text

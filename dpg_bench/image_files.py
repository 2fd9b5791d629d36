"""Copies DPG-Bench's image files into the layout of `t2i.evaluation.generation_folder`.

    ITEM.png                   the official form, a 2 x 2 grid of a prompt's images, row by row; or
                               a prompt's only image
    ITEM_0.png, ITEM_1.png     single images

The copies are in OUT/images/00000/samples/..., and OUT/source.json records the source folder and a
hash of each prompt's files: a prompt is copied again only if its files have changed.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dpg_bench.score import IMAGES_PER_PROMPT
from t2i.errors import UserError, shorten
from t2i.evaluation.evaluation_options import Scope
from t2i.evaluation.generation_folder import (
    Inventory,
    load_image,
    read_generation,
    sample_file,
    write_prompt,
)
from t2i.evaluation.runner import check_images, claim_output
from t2i.fields import read_object
from t2i.files import file_sha256, write_json
from t2i.imaging import save_png
from t2i.processes import Processes
from t2i.progress import progress_bar

log = logging.getLogger(__name__)

SOURCE_FILE = "source.json"
_SIDES = 2  # images along each side of a grid
_WHOLE = -1
"""The number used for a file without one: ITEM.png."""
Files = dict[int, dict[int, Path]]
"""Prompt index -> image number -> file."""


@dataclass(frozen=True)
class Form:
    """How images are stored in files.

    samples: images per prompt. resolution: side of one image of a grid in pixels, None without
    grids.
    """

    samples: int
    resolution: int | None

    def __post_init__(self):
        if self.resolution is not None and self.samples > IMAGES_PER_PROMPT:
            raise UserError(f"a grid has {IMAGES_PER_PROMPT} images, not --samples {self.samples}")

    def read(self, number: int, path: Path) -> dict[int, Image.Image]:
        """The images of one file: sample -> image. UserError names an unusable file."""
        image = load_image(path)
        if number != _WHOLE:
            return {number: image}
        if self.resolution is None:
            return {0: image}
        try:
            return dict(enumerate(split_grid(image, self.resolution)[: self.samples]))
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from error


def arrange(
    folder: Path,
    entries: Sequence[dict],
    out: Path,
    *,
    scope: Scope,
    resolution: int | None,
    processes: Processes,
) -> Callable[[], Path]:
    """Check a folder's file names; returns a function that copies its images to OUT/images.

    The function returns the folder to judge: OUT/images, or `folder` itself if it is already in the
    common layout, when nothing is copied. Every process must call both functions.

    Args:
        entries: all prompts, each with "item_id" and "prompt".
        resolution: side of one image of a grid in pixels; None if ITEM.png is one image.

    Raises:
        UserError: files are missing or ambiguous; when copying, also if files are unreadable or
            have the wrong size.
    """
    if not _is_flat(folder, entries):
        processes.on_main(lambda: check_images(folder, entries, scope, out))
        return lambda: folder
    form, selected = Form(scope.samples, resolution), scope.select(len(entries))
    files: Files = {}

    def look() -> None:
        claim_output(out, out / "images")
        files.update(_find(folder, entries))
        _check(folder, files, entries, selected, scope)
        _check_form(form, [files[index] for index in selected if index in files])

    def copy() -> None:
        source = _claim_source(out, folder)
        problems = _copy(source, files, entries, selected, out, form)
        if problems and not scope.allow_incomplete:
            raise UserError(
                f"{folder}: {len(problems)} files cannot be judged: {shorten(problems, '; ')}; "
                "replace them, or judge the rest as INCOMPLETE with --allow-incomplete"
            )
        for problem in problems:
            log.error("%s; left out", problem)

    def copied() -> Path:
        processes.on_main(copy)
        return out / "images"

    processes.on_main(look)
    return copied


def _is_flat(folder: Path, entries: Sequence[dict]) -> bool:
    """Whether images lie in the folder itself. An item's image in another format counts, too: the
    checks that follow say what is read.
    """
    items = {entry["item_id"] for entry in entries}
    images = any(p.suffix == ".png" or (p.stem in items and p.is_file()) for p in folder.glob("*"))
    return images and not any(folder.glob("[0-9]*/samples"))


def _find(folder: Path, entries: Sequence[dict]) -> Files:
    """The folder's image files by prompt; other names are logged."""
    index_of = {entry["item_id"]: index for index, entry in enumerate(entries)}
    files: Files = {}
    unread = []
    for path in sorted(folder.iterdir()):
        numbered = re.fullmatch(r"(.+)_(0|[1-9]\d*)", path.stem)
        image = path.suffix == ".png" and path.is_file()
        if image and path.stem in index_of:
            files.setdefault(index_of[path.stem], {})[_WHOLE] = path
        elif image and numbered and numbered[1] in index_of:
            files.setdefault(index_of[numbered[1]], {})[int(numbered[2])] = path
        elif not path.name.startswith("."):
            unread.append(path.name)
    if unread:
        log.warning("%s: names that are not read: %s", folder, shorten(unread))
    return files


def _check(
    folder: Path, files: Files, entries: Sequence[dict], selected: Sequence[int], scope: Scope
) -> None:
    """UserError if files of a prompt are missing, duplicate or more than wanted."""
    inventory = Inventory(folder, 0)
    by_number = any(set(of_prompt) - {_WHOLE} for of_prompt in files.values())
    for index in selected:
        item, found = entries[index]["item_id"], files.get(index, {})
        inventory.found[index] = found
        wanted = set(range(scope.samples)) if by_number and _WHOLE not in found else {_WHOLE}
        names = [f"{item}.png" if n == _WHOLE else f"{item}_{n}.png" for n in sorted(wanted)]
        inventory.expected += len(wanted)
        inventory.missing += [name for name in names if folder / name not in found.values()]
        for number in sorted(set(found) - wanted):
            why = f"more than the {scope.samples} samples of a prompt"
            if _WHOLE in found:
                why = f"next to {item}.png, which already holds all images of the prompt"
            inventory.problems.append(f"{found[number].name} is {why}")
    inventory.check(allow_missing=scope.allow_incomplete)


def _check_form(form: Form, files: Sequence[dict[int, Path]]) -> None:
    """UserError if ITEM.png could be a grid or one image, and the options do not say which."""
    whole = [of_prompt[_WHOLE] for of_prompt in files if _WHOLE in of_prompt]
    if whole and form.resolution is None and form.samples > 1:
        width, height = load_image(whole[0]).size
        raise UserError(
            f"{whole[0].name} ({width} x {height} px) may be one image (then use --samples 1) "
            f"or a 2 x 2 grid (then give the side of its images: --resolution {width // 2})"
        )


def _claim_source(out: Path, folder: Path) -> dict:
    """Read OUT/source.json, or write a new one; UserError if OUT/images has another source."""
    images, record, wanted = out / "images", out / SOURCE_FILE, str(folder.resolve())
    if record.is_file():
        source = read_object(record)
        if source.get("folder") != wanted or not isinstance(source.get("copied"), dict):
            known = source.get("folder", "unknown origin")
            raise UserError(f"{images} holds the images of {known}; give another --out")
        return source
    if images.is_dir():
        unknown = read_generation(images) is None
        what = "images of unknown origin" if unknown else "drawn images"
        raise UserError(f"{images} holds {what}; give another --out")
    source = {"folder": wanted, "copied": {}}
    write_json(record, source)
    return source


def _copy(
    source: dict,
    files: Files,
    entries: Sequence[dict],
    selected: Sequence[int],
    out: Path,
    form: Form,
) -> list[str]:
    """Copy the images of prompts whose files have changed, and remove copies of deleted files.

    Returns:
        The problems of unusable files.
    """
    problems = []
    for index in progress_bar(selected, unit="prompt", desc="copying"):
        found, wrong = files.get(index, {}), []
        digest = hashlib.sha256(repr(form).encode())
        for number, path in sorted(found.items()):
            digest.update(f"{number} {file_sha256(path)}".encode())
        copies = [sample_file(index, sample) for sample in range(form.samples)]
        there = all((out / "images" / name).is_file() for name in copies)
        if there and source["copied"].get(str(index)) == digest.hexdigest():
            continue
        images: dict[int, Image.Image] = {}
        for number, path in found.items():
            try:
                images |= form.read(number, path)
            except UserError as error:
                wrong.append(str(error))
        _write(images, index, entries[index], out / "images")
        source["copied"][str(index)] = None if wrong else digest.hexdigest()
        problems += wrong
    write_json(out / SOURCE_FILE, source)
    return problems


def _write(images: dict[int, Image.Image], index: int, entry: dict, folder: Path) -> None:
    """Write these images of a prompt, and delete its others."""
    write_prompt(folder, index, entry)
    written = {
        save_png(image, folder / sample_file(index, sample)) for sample, image in images.items()
    }
    for path in (folder / sample_file(index, 0)).parent.glob("*.png"):
        if path not in written:
            path.unlink()


# -- grids -----------------------------------------------------------------------------------------
def crop_grid(grid: Image.Image, resolution: int) -> list[Image.Image]:
    """The images of a grid (top left, top right, bottom left, bottom right).

    resolution: side of one image in pixels. As in the official script, it is not checked: pixels
    outside the grid are black. `split_grid` checks.
    """
    corners = [(x * resolution, y * resolution) for y in range(_SIDES) for x in range(_SIDES)]
    return [grid.crop((x, y, x + resolution, y + resolution)) for x, y in corners]


def split_grid(grid: Image.Image, resolution: int | None = None) -> list[Image.Image]:
    """The four images of a grid.

    resolution: expected side of one image in pixels; not checked if None.

    Raises:
        UserError: the grid is not a square with an even side, or its images have another side.
    """
    width, height = grid.size
    if width != height or width % _SIDES:
        raise UserError(f"{width} x {height} px is not a square grid of 2 x 2 equal images")
    if resolution is not None and width != _SIDES * resolution:
        raise UserError(
            f"the grid of {width} x {height} px holds images of {width // _SIDES} px, not of "
            f"{resolution} px: the official script would crop it wrongly without an error"
        )
    return crop_grid(grid, width // _SIDES)

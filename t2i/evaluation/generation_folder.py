"""GenEval's folder layout, which every evaluator here reads and writes.

    OUT/00000/metadata.jsonl         the prompt's metadata, one line
    OUT/00000/samples/00000.png      sample 0 of prompt 0
    OUT/00000/stages/00000_1.png     its refinement stages, if asked for
    OUT/00000/stages/00000.json      their codes
    OUT/grid.png                     all samples, one row per prompt (launch/generate.py)
    OUT/generation.json              how the images were drawn (t2i.evaluation.places)

`Inventory` checks a folder for everything that an evaluator would read.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from t2i.errors import UserError, no_folder, shorten
from t2i.files import read_json, saving, write_text
from t2i.imaging import grid, save_png, upright_rgb
from t2i.lfs import refuse_pointers

GENERATION_FILE = "generation.json"
_MAX_GRID_IMAGES = 64
SHEETS = {"grid.png", "stages.png"}
_OWN_PROMPTS = (
    ". A benchmark judges images of its own prompts: let it draw them (--ckpt), or give the file "
    "that these were drawn from (GenEval --prompts, with GenEval's metadata; DPG-Bench --questions)"
)
_KNOWN = SHEETS | {"stages", "samples", "metadata.jsonl", GENERATION_FILE}


def prompt_folder(index: int) -> str:
    """Folder name of a prompt."""
    return f"{index:05d}"


def sample_file(prompt_index: int, sample_index: int) -> str:
    """An image's file within a generation folder, as this kit names it."""
    return f"{prompt_folder(prompt_index)}/samples/{sample_index:05d}.png"


def stage_file(prompt_index: int, sample_index: int, stage: int) -> str:
    """The file of an image's refinement stage; stages count from 1."""
    return f"{prompt_folder(prompt_index)}/stages/{sample_index:05d}_{stage}.png"


def codes_file(prompt_index: int, sample_index: int) -> str:
    """The file with the codes of an image's stages: a JSON list [stages][T][S]."""
    return f"{prompt_folder(prompt_index)}/stages/{sample_index:05d}.json"


def write_codes(path: Path, codes: list) -> Path:
    """Write the codes of an image's stages, [stages][T][S]."""
    return write_text(path, json.dumps(codes, separators=(",", ":")) + "\n")


def write_prompt(out: Path, index: int, entry: dict) -> None:
    """Write a prompt's metadata line."""
    folder = out / prompt_folder(index)
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metadata.jsonl", json.dumps(entry, ensure_ascii=False) + "\n")


def load_image(path: Path) -> Image.Image:
    """An image as judges see it: upright, RGB.

    Raises:
        UserError: the file is not a whole image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # for damaged files, Pillow's parsers raise nearly anything
        refuse_pointers(path)
        raise UserError(f"{path} is not a readable image ({error})") from error


def read_generation(folder: Path) -> dict | None:
    """How a folder's images were drawn; None if the file is missing or was written by something
    else.
    """
    path = folder / GENERATION_FILE
    known = read_json(path) if path.is_file() else None
    if not isinstance(known, dict) or not isinstance(known.get("seed"), int):
        return None
    parts = [known.get("sampling"), known.get("about", {})]
    parts += [part.get("backbone", {}) for part in parts if isinstance(part, dict)]
    return known if all(isinstance(part, dict) for part in parts) else None


def refuse_other_images(out: Path, entries: Sequence[dict]) -> None:
    """UserError if the folder holds images of other prompts, which a judge would count as these."""
    for folder in sorted(out.glob("[0-9]" * 5)):
        index, path = int(folder.name), folder / "metadata.jsonl"
        if not path.is_file():
            continue
        known, wanted = read_json(path), entries[index] if index < len(entries) else None
        if known != wanted:
            was, now = _differing(known, wanted)
            raise UserError(
                f"{out} holds images of other prompts ({folder.name}: {was} there, {now} now); "
                "give another --out, or delete it"
            )


def _differing(known: object, wanted: dict | None) -> tuple[str, str]:
    """The first difference between two entries, for a message: the prompts, or another value."""
    entries = [entry if isinstance(entry, dict) else {"prompt": entry} for entry in (known, wanted)]
    keys = [k for k in entries[0] | entries[1] if entries[0].get(k) != entries[1].get(k)]
    key = "prompt" if "prompt" in keys or not keys else keys[0]
    mark = "" if key == "prompt" else f"{key} "
    was, now = (f"{mark}{entry.get(key)!r:.200}" for entry in entries)
    return was, now


def write_sheets(
    out: Path, entries: Sequence[dict], *, samples_per_prompt: int, stages: int = 0
) -> list[Path]:
    """Write sheets of a folder's images: grid.png with a row per prompt, and stages.png with a row
    per first sample.

    Args:
        stages: refinement stages of an image; 0 writes no stages.png.
    """
    jobs = [(p, s) for p in range(len(entries)) for s in range(samples_per_prompt)]
    jobs = jobs[:_MAX_GRID_IMAGES]
    prompts = [str(entry["prompt"]) for entry in entries]
    images = [load_image(out / sample_file(*job)) for job in jobs]
    labels = [prompts[p] if s == 0 else "" for p, s in jobs]
    sheet = grid(images, columns=samples_per_prompt, labels=labels)
    written = [save_png(sheet, out / "grid.png")]
    if stages:
        rows, numbers = prompts[:_MAX_GRID_IMAGES], range(1, stages + 1)
        images = [load_image(out / stage_file(p, 0, r)) for p in range(len(rows)) for r in numbers]
        labels = [f"{text} (draft 1)" if r == 1 else f"{r}" for text in rows for r in numbers]
        written.append(save_png(grid(images, columns=stages, labels=labels), out / "stages.png"))
    return written


# -- found and expected images ---------------------------------------------------------------------
@dataclass
class Inventory:
    """The images of a generation folder, and what is wrong with it.

    A missing image is never counted as a wrong one.
    """

    folder: Path
    expected: int
    """The number of images that the folder should hold."""
    found: dict[int, dict[int, Path]] = field(default_factory=dict)
    """Prompt index -> sample index -> file."""
    missing: list[str] = field(default_factory=list)
    """Expected images without a file."""
    problems: list[str] = field(default_factory=list)
    """What would be judged wrongly (extra samples, other prompts); always refused."""
    other_prompts: bool = False
    """Whether some images are of prompts that the benchmark does not have."""
    unread: list[str] = field(default_factory=list)
    """Names that no evaluator of this layout reads; they are ignored."""

    def name(self, prompt_index: int, sample: int) -> str:
        """An image's name in results: its path within the folder."""
        return self.found[prompt_index][sample].relative_to(self.folder).as_posix()

    def check(self, *, allow_missing: bool) -> None:
        """UserError if the folder cannot be judged; the message names the reasons."""
        if self.problems:
            advice = _OWN_PROMPTS if self.other_prompts else ""
            raise UserError(
                f"{self.folder} cannot be judged: {shorten(self.problems, '; ')}{advice}"
            )
        if not any(self.found.values()):
            within = self.folder / "images"
            meant = f"; is {within} meant?" if within.is_dir() else self._unread_note()
            raise UserError(
                f"{self.folder} holds none of the {self.expected} expected images "
                f"({self.missing[0]} ...){meant}"
            )
        if self.missing and not allow_missing:
            counts = {len(images) for images in self.found.values()}
            fewer = f"if you meant {min(counts)} per prompt, give --samples {min(counts)}; else "
            raise UserError(
                f"{self.folder}: {len(self.missing)} of {self.expected} images are missing: "
                f"{shorten(self.missing)}{self._unread_note()}; {fewer if len(counts) == 1 else ''}"
                "add them, or judge the rest as INCOMPLETE with --allow-incomplete"
            )

    def numbered(
        self, folder: Path, pattern: str, is_kind: Callable[[Path], bool]
    ) -> dict[int, Path]:
        """A folder's children by number; other names go to `unread`, repetitions to `problems`."""
        children: dict[int, Path] = {}
        for child in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = re.fullmatch(pattern, child.name)
            if match and is_kind(child):
                first = children.setdefault(int(match[1]), child)
                if first is not child:
                    self.problems.append(
                        f"{first.relative_to(self.folder)} and {child.name} are the same number"
                    )
            elif (
                child.name not in _KNOWN
                and not child.name.startswith(".")
                and child.suffix != ".tmp"
            ):
                self.unread.append(str(child.relative_to(self.folder)))
        return children

    def _unread_note(self) -> str:
        return f"; names that are not read: {shorten(self.unread)}" if self.unread else ""


def take_inventory(
    folder: Path, entries: Sequence[dict], selected: Sequence[int], samples: int
) -> Inventory:
    """Check names and metadata; the images themselves are opened when they are judged.

    Args:
        entries: all prompts of the benchmark. Folders of prompts that are not `selected` are
            allowed.
        samples: images per prompt.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {folder} {no_folder(folder)}")
    inventory = Inventory(folder, len(selected) * samples)
    folders = inventory.numbered(folder, r"(\d+)", Path.is_dir)
    for index in sorted(folders):
        if index >= len(entries):
            inventory.other_prompts = True
            name = folders[index].name
            inventory.problems.append(f"folder {name} belongs to none of {len(entries)} prompts")
        elif found := _metadata_problem(folders[index], entries[index]):
            problem, other = found
            inventory.other_prompts |= other
            inventory.problems.append(problem)
    more: list[Path] = []
    for index in selected:
        images = {}
        if index in folders:
            inventory.numbered(folders[index], r"(?!)", Path.is_file)  # collects unread names
            images = inventory.numbered(folders[index] / "samples", r"(\d+)\.png", Path.is_file)
        more += [images.pop(sample) for sample in sorted(set(images) - set(range(samples)))]
        inventory.missing += [sample_file(index, s) for s in range(samples) if s not in images]
        inventory.found[index] = dict(sorted(images.items()))
    if more:
        first = shorten([str(path.relative_to(folder)) for path in more], most=3)
        inventory.problems.append(
            f"{first} are more than the {samples} samples of a prompt; give --samples, or a folder "
            "without them"
        )
    return inventory


def _metadata_problem(folder: Path, entry: dict) -> tuple[str, bool] | None:
    """What is wrong with a folder's metadata, and whether they are another prompt's."""
    path = folder / "metadata.jsonl"
    if not path.exists():
        return f"{folder.name} has no metadata.jsonl, which would say its prompt", False
    try:
        known = read_json(path)
    except UserError as error:
        return f"{folder.name}/metadata.jsonl cannot be read ({error})", False
    if known != entry:
        was, wanted = _differing(known, entry)
        return f"{folder.name} holds images of {was} instead of {wanted}", True
    return None

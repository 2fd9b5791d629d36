"""The judging stage: one verdict per image, kept in small files that are complete or absent.

    OUT/verdicts/<key>/judge.json                 judge and prompts; the key is a hash of both
    OUT/verdicts/<key>/00000.jsonl                one line per image of prompt 0
    OUT/verdicts/<key>/overlays/00000_00000.png   what the judge saw, for the gallery (optional)

A verdict records the SHA-256 of its image file; an image is judged again if and only if it has
changed, or if its verdict has no checksum.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from t2i.errors import UserError
from t2i.evaluation.generation_folder import Inventory, load_image, prompt_folder
from t2i.files import (
    file_sha256,
    json_sha256,
    read_json_lines,
    reading,
    writable_folder,
    write_json,
    write_text,
)
from t2i.imaging import save_png
from t2i.processes import Processes
from t2i.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """A judge's answer about one image."""

    row: dict
    """JSON values; they become the image's line in results.jsonl."""
    overlay: Image.Image | None = None
    """What the judge saw: a transparent picture of the image's size."""


class Judge(Protocol):
    """Gives verdicts on images."""

    def identity(self) -> dict:
        """What a verdict depends on besides image and prompt: weights by hash, and "versions"."""
        ...

    def judge(self, prompt_index: int, image: Image.Image, filename: str) -> Judged:
        """The verdict on an RGB image; `filename` is its name in the results."""
        ...


class Verdicts:
    """One judge's verdicts on one list of prompts, in an output folder."""

    def __init__(self, out: Path, judge: dict, prompts: dict):
        self.about = {"judge": judge, "prompts": prompts}
        self.folder = out / "verdicts" / json_sha256(self.about)[:12]
        self._told = False

    def overlay(self, prompt_index: int, sample: int) -> Path:
        """The file of an image's overlay; it exists only if the judge gave one."""
        return self.folder / "overlays" / f"{prompt_index:05d}_{sample:05d}.png"

    def read(self, prompt_index: int) -> dict[int, dict]:
        """A prompt's lines by sample: {sample, sha256, row} or {sample, sha256, unreadable}."""
        path = self._file(prompt_index)
        if not path.is_file():
            return {}
        try:
            lines = read_json_lines(path)
        except UserError as error:
            raise UserError(f"{path} is damaged ({error}); delete it to judge again") from error
        found: dict[int, dict] = {}
        for line in lines:
            check = line.pop("check", None)
            if not {"sample", "sha256"} <= line.keys() or {"row", "unreadable"}.isdisjoint(line):
                raise UserError(f"{path} is damaged ({line!r:.80}); delete it to judge again")
            if check is None:  # an older version's, or another tool's
                if not self._told:
                    log.warning("%s: verdicts without a checksum are judged again", path)
                self._told = True
            elif check != json_sha256(line):
                raise UserError(f"{path} has changed ({line!r:.80}); delete it to judge again")
            else:
                found[line["sample"]] = line
        return found

    def write(self, prompt_index: int, lines: dict[int, dict]) -> None:
        """Replace a prompt's lines."""
        checked = (lines[i] | {"check": json_sha256(lines[i])} for i in sorted(lines))
        text = "".join(json.dumps(line) + "\n" for line in checked)
        write_text(self._file(prompt_index), text)

    def _file(self, prompt_index: int) -> Path:
        return self.folder / f"{prompt_folder(prompt_index)}.jsonl"


def judge_images(
    judge: Judge, inventory: Inventory, verdicts: Verdicts, processes: Processes
) -> None:
    """Judge the images without a verdict. Every process calls this and takes every n-th prompt."""
    if processes.is_main:
        writable_folder(verdicts.folder)
        write_json(verdicts.folder / "judge.json", verdicts.about)
    processes.barrier()
    prompts = sorted(inventory.found)[processes.rank :: processes.world_size]
    count = sum(len(inventory.found[index]) for index in prompts)
    bar = progress_bar(
        total=count, unit="image", desc="judging" + processes.share, disable=not processes.is_main
    )
    with bar:
        for index in prompts:
            images = inventory.found[index]
            recorded = verdicts.read(index)
            lines = {sample: recorded[sample] for sample in images if sample in recorded}
            for sample, path in images.items():
                with reading(path):
                    digest = file_sha256(path)
                if lines.get(sample, {}).get("sha256") != digest:
                    overlay, name = verdicts.overlay(index, sample), inventory.name(index, sample)
                    answer = _answer(judge, index, path, overlay, name)
                    lines[sample] = {"sample": sample, "sha256": digest, **answer}
                    verdicts.write(index, lines)
                bar.update()
    processes.barrier()


def _answer(judge: Judge, index: int, path: Path, overlay: Path, name: str) -> dict:
    """Judge an image; returns what to record. The overlay is written first, so that a recorded
    verdict always has its overlay.
    """
    try:
        image = load_image(path)
    except UserError as error:
        return {"unreadable": str(error)}
    judged = judge.judge(index, image, name)
    overlay.unlink(missing_ok=True)
    if judged.overlay is not None:
        save_png(judged.overlay, overlay)
    return {"row": judged.row}


@dataclass(frozen=True)
class JudgedImage:
    """A recorded verdict, and which image it is about."""

    prompt_index: int
    sample: int
    sha256: str
    row: dict


def collect(inventory: Inventory, verdicts: Verdicts) -> tuple[list[JudgedImage], list[str]]:
    """All verdicts in the order of prompts and samples, and the errors of unreadable images.

    Call it after every image has been judged.
    """
    judged, unreadable = [], []
    for index, images in sorted(inventory.found.items()):
        lines = verdicts.read(index)
        for sample in images:
            name = inventory.name(index, sample)
            assert sample in lines, f"{name} was not judged"
            if "unreadable" in lines[sample]:
                unreadable.append(lines[sample]["unreadable"])
            else:
                line = lines[sample]
                row = line["row"] | {"filename": name}  # the file may have been renamed since
                judged.append(JudgedImage(index, sample, line["sha256"], row))
    return judged, unreadable

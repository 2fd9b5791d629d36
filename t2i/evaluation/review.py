"""A page on which people compare models by looking: prompts as rows, models as columns.

    REVIEW/index.html        the page: no server, no network; pictures are loaded when they are seen
    REVIEW/columns/<name>/   a generation folder for each column (linked or copied if it lay
                             elsewhere), so that the folder can be moved as a whole

What the page knows is JSON in it, and is only ever shown as text: a prompt may hold anything.
"""

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from t2i.errors import UserError
from t2i.evaluation.generation_folder import (
    GENERATION_FILE,
    codes_file,
    load_image,
    read_generation,
    sample_file,
)
from t2i.evaluation.results import RESULTS_FILE, image_source, read_results
from t2i.files import json_sha256, read_json, saving, writable_folder, write_text
from t2i.pages import embedded_json, html_page

COLUMNS = "columns"
Verdicts = dict[str, dict]
"""Image file (00000/samples/00000.png) -> {"share": passed, 0..1, "why": sentences}."""


@dataclass(frozen=True)
class Column:
    """Images of one model."""

    name: str
    folder: Path
    """A generation folder."""
    verdicts: Verdicts
    judge: str = ""
    """Who gave the verdicts."""

    def prompts(self) -> dict[str, dict]:
        """Prompt folder -> its metadata, in order."""
        found = sorted(path for path in self.folder.glob("[0-9]*") if (path / "samples").is_dir())
        return {path.name: read_json(path / "metadata.jsonl") for path in found}


def open_column(name: str, folder: Path) -> Column:
    """Images that are there: a generation folder, or the output of a benchmark, whose verdicts come
    with them (also where the folder is its images).

    Raises:
        UserError: it is neither.
    """
    if (folder / RESULTS_FILE).is_file():
        results, rows = read_results(folder)
        images = folder / results["images"]
    else:
        images, results, rows = folder, {}, []
        if (folder.parent / RESULTS_FILE).is_file():
            found, of_them = read_results(folder.parent)
            if found["images"] == image_source(folder.parent, folder):
                results, rows = found, of_them
    if not any(images.glob("[0-9]*/samples/*.png")):
        raise UserError(f"{folder} holds no images in GenEval's layout (00000/samples/00000.png)")
    verdicts = {row["filename"]: _verdict(row) for row in rows}
    judge = f"{results['benchmark']}: {results['label']}" if results else ""
    return Column(name, images, verdicts, judge)


def _verdict(row: dict) -> dict:
    """Of a row of GenEval's results (correct or not), or of DPG-Bench's (answers to questions)."""
    if "correct" in row:
        return {"share": float(row["correct"]), "why": row["reason"].splitlines()}
    passed = [q["passed"] for q in row["questions"]]
    failed = [f"{q['question']} {q['answer']}" for q in row["questions"] if not q["passed"]]
    return {"share": sum(passed) / max(len(passed), 1), "why": failed}


def write_review(out: Path, columns: Sequence[Column], *, title: str) -> Path:
    """Write OUT/index.html, and bring the columns' images there if they lie elsewhere.

    Prompts are those of the first column's folder; the others must have the same.

    Raises:
        UserError: columns of different prompts, or two of the same name.
    """
    names = [column.name for column in columns]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two columns are called {min(twice)}: give --names, one for each column")
    prompts = [column.prompts() for column in columns]
    for column, entries in zip(columns, prompts, strict=True):
        if entries != prompts[0]:
            raise UserError(
                f"{column.folder} and {columns[0].folder} hold images of other prompts: a row of "
                "the page is one prompt"
            )
    shown = [_column(out, column, list(prompts[0])) for column in columns]
    rows = [
        {"folder": name, "text": str(entry["prompt"]), "tag": str(entry.get("tag", ""))}
        for name, entry in prompts[0].items()
    ]
    content = {"title": title, "prompts": rows, "columns": shown}
    content["id"] = json_sha256(content)[:12]
    body = "<noscript>This page needs JavaScript.</noscript>\n" + embedded_json("review", content)
    return write_text(out / "index.html", html_page(title, body, name="review"))


def _column(out: Path, column: Column, folders: Sequence[str]) -> dict:
    """What the page knows of a column; its images are in OUT afterwards."""
    place = column.folder
    if not place.resolve().is_relative_to(out.resolve()):
        place = out / COLUMNS / re.sub(r"[^\w.-]+", "-", column.name)
        _bring(column.folder, place, folders)
    images, grid = {}, None
    for folder in folders:
        for path in sorted((place / folder / "samples").glob("*.png")):
            job = int(folder), int(path.stem)
            codes = _stage_codes(place / codes_file(*job))
            if codes and grid is None:
                width, height = load_image(path).size
                columns = round(math.sqrt(len(codes[0]) * width / height))
                grid = [len(codes[0]) // columns, columns]
            images[sample_file(*job)] = {
                "changed": [_changed(*pair) for pair in pairwise(codes)],
                "verdict": column.verdicts.get(sample_file(*job)),
            }
    generation = read_generation(place) or {}
    settings = {"seed": generation.get("seed"), **generation.get("sampling", {})}
    return {
        "name": column.name,
        "place": place.resolve().relative_to(out.resolve()).as_posix(),
        "about": ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if v),
        "judge": column.judge,
        "grid": grid,
        "images": images,
    }


def _bring(source: Path, place: Path, folders: Sequence[str]) -> None:
    """Link (or copy) a generation folder's images, stages and metadata into another."""
    writable_folder(place)
    files = [path for name in folders for path in sorted((source / name).rglob("*"))]
    for path in [*files, source / GENERATION_FILE]:
        target = place / path.relative_to(source)
        if not path.is_file() or _same(path, target):
            continue
        with saving(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:  # another disk, or one without links
                shutil.copy2(path, target)


def _same(path: Path, copy: Path) -> bool:
    """Whether the copy was made of this file as it is."""
    if not copy.exists():
        return False
    one, other = path.stat(), copy.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _stage_codes(path: Path) -> list:
    """Codes [stages][T][S]; empty for an image without stages."""
    return read_json(path) if path.is_file() else []


def _changed(before: list, after: list) -> str:
    """Which codes differ: a bit for each, in hex digits, the first code highest."""
    bits = "".join("01"[a != b] for a, b in zip(before, after, strict=True))
    padded = bits + "0" * (-len(bits) % 4)
    return "".join(f"{int(padded[i : i + 4], 2):x}" for i in range(0, len(padded), 4))

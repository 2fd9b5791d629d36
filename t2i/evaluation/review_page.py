"""A page for comparing models by eye: prompts as rows, models as columns.

    REVIEW/index.html        the page: no server, no network; images load as they scroll into view
    REVIEW/columns/<name>/   a generation folder for each column that was drawn for the page
    REVIEW/brought/<n>-<name>/   and for each column from elsewhere, linked or copied, so that
                             REVIEW can be moved or shared as a whole

The page's data is embedded JSON and only ever shown as text, because a prompt may contain anything.
"""

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from t2i.errors import UserError, nearest_path, no_folder
from t2i.evaluation.generation_folder import (
    GENERATION_FILE,
    codes_file,
    load_image,
    prompt_folder,
    read_generation,
    sample_file,
)
from t2i.evaluation.results import RESULTS_FILE, ROWS_FILE, image_source, read_results, read_rows
from t2i.files import json_sha256, read_json, saving, writable_folder, write_text
from t2i.generation import Job
from t2i.pages import embedded_json, html_page
from t2i.sampling import SamplingConfig

COLUMNS, BROUGHT = "columns", "brought"
DATA = '<script id="review"'
"""How the data begins in such a page."""
_SAMPLE = re.compile(r"samples/(\d+)\.png")
_OTHERS = re.compile(r"metadata\.jsonl|stages/\d{5,}(_\d+\.png|\.json)")
"""Names within a prompt's folder: samples as judges read them, the rest as this kit names them."""
_PNG = b"\x89PNG\r\n\x1a\n"
ByImage = dict[Job, dict]
"""(prompt's number, sample) -> {"share": of checks passed, 0..1, "why": sentences}."""


@dataclass(frozen=True)
class Column:
    """Images of one model."""

    name: str
    folder: Path
    """A generation folder."""
    verdicts: ByImage
    judge: str = ""
    """The judge that gave the verdicts."""

    def folders(self) -> dict[int, Path]:
        """Prompt's number -> its folder, in order.

        Raises:
            UserError: two have the same number (0 and 00000).
        """
        found: dict[int, Path] = {}
        for path in self.folder.iterdir():
            if path.name.isdecimal() and (path / "samples").is_dir():
                _add(found, int(path.name), path)
        return dict(sorted(found.items()))

    def prompts(self) -> list[dict]:
        """The prompts' metadata, in order.

        Raises:
            UserError: metadata is damaged or missing.
        """
        found = []
        for folder in self.folders().values():
            metadata = folder / "metadata.jsonl"
            entry = read_json(metadata)
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise UserError(f'{metadata} has no text under "prompt"')
            found.append(entry)
        return found

    def files(self, rows: Sequence[int]) -> dict[str, Path]:
        """Name in the layout -> file, for everything the page shows.

        rows: the number that the page gives to each prompt.
        """
        found: dict[str, Path] = {}
        for row, folder in zip(rows, self.folders().values(), strict=True):
            found |= {f"{prompt_folder(row)}/{k}": v for k, v in _files_of(folder).items()}
        generation = self.folder / GENERATION_FILE
        return found | ({GENERATION_FILE: generation} if generation.is_file() else {})


def open_column(name: str, folder: Path) -> Column:
    """A column of existing images: a generation folder, or a benchmark's output folder or its
    images, with their verdicts.

    Raises:
        UserError: the folder is neither.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {folder} {no_folder(folder)}{nearest_path(folder)}")
    try:
        images, verdicts, judge = _with_verdicts(folder)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the results of {folder} are not in the form that a benchmark writes ({error!r}); "
            "judge it again, or delete them to see the images alone"
        ) from error
    if not images.is_dir():
        raise UserError(f"{folder} holds the results of {images}, which {no_folder(images)}")
    column = Column(name, images, verdicts, judge)
    there = column.folders().values()
    if not any(_SAMPLE.fullmatch(name) for own in there for name in _files_of(own)):
        raise UserError(f"{images} holds no images in GenEval's layout (00000/samples/00000.png)")
    return column


def _with_verdicts(folder: Path) -> tuple[Path, ByImage, str]:
    """The folder of images, their verdicts, and the judge."""
    both = RESULTS_FILE, ROWS_FILE  # other programs write a results.json, too
    places = (folder, folder.parent)
    out = next((f for f in places if all((f / name).is_file() for name in both)), None)
    if out is None:
        return folder, {}, ""
    results = read_results(out)
    rows = read_rows(out, results)
    if out == folder:
        folder = out / results["images"]
    elif results["images"] != image_source(out, folder):
        return folder, {}, ""  # results of other images
    verdicts = {_job_of(row["filename"]): _verdict(row) for row in rows}
    return folder, verdicts, f"{results['benchmark']}: {results['label']}"


def _job_of(name: str) -> Job:
    """The prompt's and the sample's number, from an image's name in results."""
    prompt, _, sample = name.removesuffix(".png").split("/")
    return int(prompt), int(sample)


def _verdict(row: dict) -> dict:
    """The verdict in a row of GenEval's results (correct or not) or DPG-Bench's (answers)."""
    if "correct" in row:
        return {"share": float(row["correct"]), "why": row["reason"].splitlines()}
    passed = [q["passed"] for q in row["questions"]]
    failed = [f"{q['question']} {q['answer']}" for q in row["questions"] if not q["passed"]]
    return {"share": sum(passed) / max(len(passed), 1), "why": failed}


def check_columns(columns: Sequence[tuple[str, Path]], prompts: Sequence[list[dict]]) -> None:
    """UserError if two columns (name, folder) have the same name or different prompts."""
    names = [name for name, _ in columns]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two columns are called {min(twice)}: give --names, one for each column")
    for (_, folder), entries in zip(columns, prompts, strict=True):
        if entries != prompts[0]:
            raise UserError(
                f"{folder} and {columns[0][1]} hold images of other prompts; all columns of a page "
                "must have the same prompts"
            )


def write_review(out: Path, columns: Sequence[Column], *, title: str) -> Path:
    """Write OUT/index.html, and link or copy the columns' images there if they are elsewhere.

    Prompts and their numbers come from the first column's folder. The others must have the same
    prompts in the same order; their numbers may differ.

    Raises:
        UserError: columns have different prompts, or two have the same name.
    """
    prompts = [column.prompts() for column in columns]
    check_columns([(column.name, column.folder) for column in columns], prompts)
    shown, rows = [], list(columns[0].folders())
    for number, column in enumerate(columns, start=1):
        place, files = column.folder, column.files(rows)
        as_named = all(place / name == path for name, path in files.items())
        if not (as_named and place.resolve().is_relative_to(out.resolve())):
            name = re.sub(r"[^\w-]+", "-", column.name)
            place = out / BROUGHT / f"{number}-{name}"
            _bring(column.folder, files, place)
        shown.append(_column(out, column, place, rows))
    asked = [
        {"folder": prompt_folder(row), "text": e["prompt"], "tag": str(e.get("tag", ""))}
        for row, e in zip(rows, prompts[0], strict=True)
    ]
    content = {"title": title, "prompts": asked, "columns": shown}
    content["id"] = json_sha256(content)[:12]
    body = "<noscript>This page needs JavaScript.</noscript>\n" + embedded_json("review", content)
    return write_text(out / "index.html", html_page(title, body, name="review"))


def _column(out: Path, column: Column, place: Path, rows: Sequence[int]) -> dict:
    """The page's data on a column, whose images are in `place` under the rows' numbers."""
    images, grid = {}, None
    for row, own in zip(rows, column.folders(), strict=True):
        for name, path in _files_of(place / prompt_folder(row)).items():
            if not _SAMPLE.fullmatch(name):
                continue
            job = row, int(path.stem)
            codes = _stage_codes(place / codes_file(*job))
            if codes and grid is None:
                width, height = load_image(path).size
                columns = round(math.sqrt(len(codes[0]) * width / height))
                grid = [len(codes[0]) // columns, columns]
            images[sample_file(*job)] = {
                "changed": [_changed(*pair) for pair in pairwise(codes)],
                "verdict": column.verdicts.get((own, job[1])),
            }
    generation, usual = read_generation(place), asdict(SamplingConfig())
    settings: dict = {}
    if generation is not None:
        unusual = {k: v for k, v in generation["sampling"].items() if v != usual.get(k)}
        settings = {"seed": generation["seed"], **unusual}
    return {
        "name": column.name,
        "place": place.resolve().relative_to(out.resolve()).as_posix(),
        "about": ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items()),
        "judge": column.judge,
        "grid": grid,
        "images": images,
    }


def _bring(source: Path, files: dict[str, Path], place: Path) -> None:
    """Link (or copy) a generation folder's images, stages and metadata into another folder, which
    holds nothing else afterwards.

    Args:
        files: name in `place` -> file of `source`.

    Raises:
        UserError: a file is a link to something outside `source` that is not a PNG.
    """
    if place.resolve() == source.resolve():
        raise UserError(f"{source} is this page's copy of other images: give the original folder")
    writable_folder(place)
    for path in [path for path in place.rglob("*") if path.is_symlink() or path.is_file()]:
        if path.relative_to(place).as_posix() not in files:
            path.unlink()  # left by an earlier page
    for name, path in files.items():
        target, real = place / name, path.resolve()
        if not real.is_relative_to(source.resolve()) and not _is_png(real):
            raise UserError(
                f"{path} is a link to {real}, which is no PNG and would be copied into a folder "
                "that is meant to be shared: delete the link, or replace it by a copy"
            )
        if _same(real, target) and not target.is_symlink():
            continue
        with saving(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(real, target)
            except OSError:  # another disk, or one without links
                shutil.copy2(real, target)


def _files_of(folder: Path) -> dict[str, Path]:
    """Name in the layout -> file, for a prompt's folder.

    Raises:
        UserError: two samples have the same number (0000.png and 00000.png).
    """
    found: dict[str, Path] = {}
    for path in sorted(p for part in ("*", "samples/*", "stages/*") for p in folder.glob(part)):
        name = path.relative_to(folder).as_posix()
        sample = _SAMPLE.fullmatch(name)
        if (sample or _OTHERS.fullmatch(name)) and path.is_file():
            _add(found, f"samples/{int(sample[1]):05d}.png" if sample else name, path)
    return found


def _add(found: dict, key: object, path: Path) -> None:
    first = found.setdefault(key, path)
    if first is not path:
        raise UserError(f"{first} and {path.name} are the same number: remove one of them")


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


def _same(path: Path, copy: Path) -> bool:
    """Whether the copy has this file's size and modification time."""
    if not copy.exists():
        return False
    one, other = path.stat(), copy.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _stage_codes(path: Path) -> list:
    """The codes [stages][T][S] in a file; empty if there is no file."""
    codes = read_json(path) if path.is_file() else []
    lists = isinstance(codes, list) and all(isinstance(stage, list) for stage in codes)
    if not lists or len({len(stage) for stage in codes}) > 1 or [] in codes:
        raise UserError(f"{path} holds no codes of stages, [stages][positions][sub-tokens]")
    return codes


def _changed(before: list, after: list) -> str:
    """Which codes differ: one bit per code, as hex digits, the first code in the highest bit."""
    bits = "".join("01"[a != b] for a, b in zip(before, after, strict=True))
    digits = -(-len(bits) // 4)
    return f"{int(bits.ljust(4 * digits, '0'), 2):0{digits}x}"

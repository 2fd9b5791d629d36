"""Prompts in, images out: GenEval's folder layout, which every evaluator here reads and writes.

OUT/00000/metadata.jsonl         the prompt's line
OUT/00000/samples/00000.png      sample 0 of prompt 0
OUT/00000/stages/00000_1.png     its refinement stages, if asked for
OUT/grid.png                     all samples, one row per prompt (launch/generate.py)
OUT/generation.json              how the images were drawn (t2i.evaluation.sampling)
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from t2i.errors import UserError
from t2i.files import read_json, reading, saving, write_text
from t2i.imaging import grid, save_png
from t2i.models.captions import check_captions

if TYPE_CHECKING:
    from t2i.generation import Generated

_MAX_GRID_IMAGES = 64


def read_prompts(prompts: Sequence[str], path: Path | None) -> list[dict]:
    """Entries with at least a "prompt", from the command line and from a text or .jsonl file.

    Raises:
        UserError: no prompt at all, an unreadable file, or a bad line or prompt, which is named.
    """
    check_captions(prompts, "--prompt")
    entries = [{"prompt": p} for p in prompts]
    if path is not None:
        with reading(f"prompt file {path}"):
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        parse = _parse_json_line if path.suffix == ".jsonl" else _parse_text_line
        entries += [
            parse(line, f"{path} line {i + 1}") for i, line in enumerate(lines) if line.strip()
        ]
    if not entries or any(not e["prompt"].strip() for e in entries):
        raise UserError("no prompt: give --prompt TEXT or --prompt-file FILE, none of them empty")
    return entries


def _parse_text_line(line: bytes, where: str) -> dict:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error}") from error
    if any(ord(c) < 32 and c != "\t" for c in text):
        raise UserError(f"{where} is not text: it has control characters ({text[:80]!r})")
    return {"prompt": text}


def _parse_json_line(line: bytes, where: str) -> dict:
    try:
        entry = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where} has no text under "prompt"')
    check_captions([prompt], where)
    return entry


def prompt_folder(index: int) -> str:
    """Folder name of a prompt."""
    return f"{index:05d}"


def sample_file(prompt_index: int, sample_index: int) -> str:
    """An image's file within a generation folder, which is also its name in results."""
    return f"{prompt_folder(prompt_index)}/samples/{sample_index:05d}.png"


def stage_file(prompt_index: int, sample_index: int, stage: int) -> str:
    """The file of an image's refinement stage, from 1."""
    return f"{prompt_folder(prompt_index)}/stages/{sample_index:05d}_{stage}.png"


def write_prompt(out: Path, index: int, entry: dict) -> None:
    """Write a prompt's metadata line."""
    folder = out / prompt_folder(index)
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metadata.jsonl", json.dumps(entry, ensure_ascii=False) + "\n")


def write_sample(out: Path, generated: "Generated") -> Path:
    """Write an image, and its refinement stages where it has any."""
    job = (generated.prompt_index, generated.sample_index)
    for r, stage in enumerate(generated.stages):
        save_png(stage, out / stage_file(*job, r + 1))
    return save_png(generated.image, out / sample_file(*job))


def load_image(path: Path) -> Image.Image:
    """An image as judges see it: upright, RGB.

    Raises:
        UserError: the file is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's words for damage
        raise UserError(f"{path} is not a readable image ({error})") from error


def refuse_other_images(out: Path, entries: Sequence[dict]) -> None:
    """UserError if the folder holds images of other prompts, which a judge would count."""
    for folder in sorted(out.glob("[0-9]" * 5)):
        index, path = int(folder.name), folder / "metadata.jsonl"
        if not path.is_file():
            continue
        known, wanted = read_json(path), entries[index] if index < len(entries) else None
        if known != wanted:
            was, now = (e.get("prompt") if isinstance(e, dict) else e for e in (known, wanted))
            raise UserError(
                f"{out} holds images of other prompts ({folder.name}: {was!r} there, {now!r} now); "
                "give another --out, or delete it"
            )


def write_generated(
    images: "Iterable[Generated]", entries: Sequence[dict], out: Path, *, samples_per_prompt: int
) -> list[Path]:
    """Write images as they come into a new folder; returns the sheets (see `write_sheets`)."""
    for generated in images:
        if generated.sample_index == 0:
            write_prompt(out, generated.prompt_index, entries[generated.prompt_index])
        write_sample(out, generated)
    return write_sheets(out, entries, samples_per_prompt=samples_per_prompt)


def write_sheets(
    out: Path, entries: Sequence[dict], *, samples_per_prompt: int, stages: int = 0
) -> list[Path]:
    """Sheets of the images in a folder: grid.png, a row for each prompt, and stages.png, a row for
    each first sample.

    Args:
        stages: refinement stages of an image; 0 draws no second sheet.
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

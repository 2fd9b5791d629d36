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

from PIL import Image, ImageOps

from t2i.errors import UserError
from t2i.files import write_text
from t2i.generation import Generated
from t2i.imaging import grid, save_png

_MAX_GRID_IMAGES = 64


def read_prompts(prompts: Sequence[str], path: Path | None) -> list[dict]:
    """Entries with at least a "prompt", from the command line and from a text or .jsonl file.

    Raises:
        UserError: no prompt at all, an unreadable file, or a bad line, which is named.
    """
    entries = [{"prompt": p} for p in prompts]
    if path is not None:
        try:
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise UserError(f"prompt file {path} cannot be read: {error}") from error
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
    return entry


def prompt_folder(index: int) -> str:
    """Folder name of a prompt."""
    return f"{index:05d}"


def sample_file(prompt_index: int, sample_index: int) -> str:
    """An image's file within a generation folder, which is also its name in results."""
    return f"{prompt_folder(prompt_index)}/samples/{sample_index:05d}.png"


def write_prompt(out: Path, index: int, entry: dict) -> None:
    """Write a prompt's metadata line."""
    folder = out / prompt_folder(index)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metadata.jsonl", json.dumps(entry, ensure_ascii=False) + "\n")


def write_sample(out: Path, generated: Generated) -> Path:
    """Write an image, and its refinement stages where it has any."""
    path = out / sample_file(generated.prompt_index, generated.sample_index)
    for r, stage in enumerate(generated.stages):
        save_png(stage, path.parent.with_name("stages") / f"{path.stem}_{r + 1}.png")
    return save_png(generated.image, path)


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
        index = int(folder.name)
        path = folder / "metadata.jsonl"
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it") from error
        if index >= len(entries) or known not in (None, entries[index]):
            raise UserError(
                f"{out} holds images of other prompts ({folder.name}); give another --out or delete it"
            )


def write_generated(
    images: Iterable[Generated], entries: Sequence[dict], out: Path, *, samples_per_prompt: int
) -> list[Path]:
    """Write images as they come; returns the sheets (a grid, and one of the stages where there are any).

    Raises:
        UserError: the folder holds images of other prompts, which a judge would count.
    """
    refuse_other_images(out, entries)
    shown, staged = [], []
    for generated in images:
        if generated.sample_index == 0:
            write_prompt(out, generated.prompt_index, entries[generated.prompt_index])
        write_sample(out, generated)
        if len(shown) < _MAX_GRID_IMAGES:
            shown.append(generated)
        if generated.stages and generated.sample_index == 0 and len(staged) < _MAX_GRID_IMAGES:
            staged.append(generated)
    labels = [str(g.prompt) if g.sample_index == 0 else "" for g in shown]
    sheet = grid([g.image for g in shown], columns=samples_per_prompt, labels=labels)
    written = [save_png(sheet, out / "grid.png")]
    if staged:
        count = len(staged[0].stages)
        names = [
            f"{g.prompt} (draft 1)" if r == 0 else f"{r + 1}" for g in staged for r in range(count)
        ]
        sheet = grid([s for g in staged for s in g.stages], columns=count, labels=names)
        written.append(save_png(sheet, out / "stages.png"))
    return written

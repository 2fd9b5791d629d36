"""Prompts to draw: from the command line, and from text and .jsonl files."""

import codecs
import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from t2i.data.samples import GENERATOR_SETTINGS
from t2i.errors import UserError, not_json, refuse_utf16
from t2i.files import once_each, parse_json, reading
from t2i.models.conditions import check_captions, given_as_files

log = logging.getLogger(__name__)

_MARK = re.compile(r"""#|//|[-*\u2022]\s|\d+[.):]\s|.*\t|\[.*\]$|(["']).*\1,?$""")
"""What a line of prompts may begin with or hold that is no part of a prompt."""
_SETTINGS = frozenset(
    ("seed", "negative_prompt", "cfg_scale", "guidance_scale", "steps", "width", "height")
)
"""Fields of prompts for other programs, which one might expect to be read."""


def read_prompts(prompts: Sequence[str], path: Path | None) -> list[dict]:
    """Entries with at least a "prompt", from the command line and from a text or .jsonl file.

    Raises:
        UserError: no prompt at all, an unreadable file, or a bad line or prompt (the message says
            which).
    """
    check_captions(prompts, "--prompt")
    for name in given_as_files(prompts):
        log.warning("--prompt %s draws these words; --prompt-file %s reads the file", name, name)
    entries = [{"prompt": p} for p in prompts]
    if path is not None:
        entries += _read_file(path)
        if not entries:
            raise UserError(f"prompt file {path} holds no prompt; give one per line")
    if not entries or any(not e["prompt"].strip() for e in entries):
        raise UserError("no prompt: give --prompt TEXT or --prompt-file FILE, none of them empty")
    return entries


def _read_file(path: Path) -> list[dict]:
    with reading(f"prompt file {path}"):
        content = path.read_bytes()
    refuse_utf16(content, f"prompt file {path}")
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    suffix = path.suffix.lower()
    if suffix in (".json", ".csv", ".tsv"):
        raise UserError(
            f"prompt file {path}: {suffix} files cannot be read; give a .txt file with one "
            'prompt per line, or a .jsonl file with one {"prompt": "..."} per line'
        )
    parse = _parse_json_line if suffix == ".jsonl" else _parse_text_line
    found = [parse(line, f"{path} line {i + 1}") for i, line in enumerate(lines) if line.strip()]
    if suffix != ".jsonl":
        _warn_of_marks(path, [entry["prompt"] for entry in found])
    elif unread := sorted({key for entry in found for key in entry} & _SETTINGS):
        log.warning(f"{path}: {', '.join(unread)}: not read; settings of drawing are options")
    return found


def _warn_of_marks(path: Path, prompts: Sequence[str]) -> None:
    """Warn about lines of a text file that seem to hold something other than a prompt."""
    signs = {
        "look like comments, or items of a list or table": _MARK.match,
        "hold settings of another program": GENERATOR_SETTINGS.search,
    }
    for seem, sign in signs.items():
        if marked := [text for text in prompts if sign(text)]:
            log.warning(
                f"{path}: {len(marked)} of {len(prompts)} lines {seem}, and are drawn as they are "
                f"({marked[0]!r:.80})"
            )


def _parse_text_line(line: bytes, where: str) -> dict:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {error}; save the file as UTF-8") from error
    if any(ord(c) < 32 and c != "\t" for c in text):
        raise UserError(f"{where} is not text: it has control characters ({text[:80]!r})")
    entry = None
    with suppress(ValueError, RecursionError):
        entry = json.loads(text)
    if isinstance(entry, dict):
        raise UserError(f"{where} is JSON: give the file a name that ends in .jsonl")
    return {"prompt": text}


def _parse_json_line(line: bytes, where: str) -> dict:
    try:
        entry = parse_json(line, parse_constant=_refuse, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise not_json(where, error) from error
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where} has no text under "prompt"')
    check_captions([prompt], where)
    return entry


def _refuse(constant: str) -> None:
    """NaN is not even equal to itself, so images of such an entry would be another prompt's."""
    raise ValueError(f"it holds {constant}; write null")

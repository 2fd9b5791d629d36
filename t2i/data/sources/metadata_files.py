"""The tables of image folders, each row of which names an image and its caption: `metadata.jsonl`
or, without one, `metadata.csv`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from t2i.csv_files import read_csv, too_many_cells
from t2i.data.content import name_in
from t2i.errors import UserError, shorten
from t2i.files import read_json_lines, reading
from t2i.lfs import refuse_pointers

METADATA, METADATA_CSV = "metadata.jsonl", "metadata.csv"
METADATA_PARQUET = "metadata.parquet"
"""Read as any other parquet file."""
METADATA_ADVICE = (
    'Captions come from a file "metadata.jsonl" with one {"file_name": "a.png", "text": "..."} per '
    'line (or "metadata.csv" with these columns), or from "a.txt" (or "a.caption") next to "a.png"'
)
_TABLES = (".jsonl", ".json", ".json1", ".ndjson", ".csv", ".tsv")
_NAMED = re.compile("meta|caption|prompt|annot", re.IGNORECASE)
"""In the name of a file that may hold the captions of many images."""


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of images; UserError if it is none."""
    if path.name == METADATA:
        return read_json_lines(path, json.loads)  # `read_captions` mends texts
    refuse_pointers(path)
    with reading(path):
        content = path.read_bytes()
    names, rows = read_csv(content, str(path), strict=True, skipinitialspace=True)
    if len(names) == 1 and (sign := re.search("[;\t|]", names[0])):
        raise UserError(f"{path}: {sign[0]!r} separates its columns; save it with commas")
    if len({*names}) < len(names):
        twice = max(names, key=names.count)
        raise UserError(f"{path} has two columns {twice!r}; delete one")
    if more := next((line for line, row in rows if None in row), None):
        raise UserError(f"{path} {too_many_cells(more)}")
    return [row for _, row in rows]


def looks_like_metadata(path: Path) -> bool:
    """Whether this may be a table of images and captions that has another name or format."""
    return path.suffix.lower() in _TABLES


def other_tables(folder: Path, files: Sequence[Path], read: str, where: str) -> Iterable[str]:
    """A remark on files, besides those named `read`, that may hold captions of many images.

    where: where the captions are.
    """
    others = [path for path in files if path.name != read and looks_like_metadata(path)]
    if names := [name_in(folder, path) for path in others if _NAMED.search(path.stem)]:
        verb = "is" if len(names) == 1 else "are"
        yield f"{shorten(names, most=3)} {verb} not read: captions are in {where}"

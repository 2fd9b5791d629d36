"""Image folders on disk: with a metadata.jsonl, or with a .txt file of captions beside each image.

Both are read with pathlib rather than the `datasets` library, which drops images that the
metadata does not list, knows no sidecar captions, and copies nothing that lazy paths do not give.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from t2i.data.images import SkipSample, read_bytes
from t2i.data.samples import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Sample,
    Source,
    choose_column,
    fingerprint_files,
    usable_captions,
)
from t2i.errors import UserError

METADATA = "metadata.jsonl"
_MISNAMED_SUFFIXES = (".jsonl", ".json", ".json1", ".ndjson", ".csv", ".tsv")
_ADVICE = (
    'Captions come from a file "metadata.jsonl" with one {"file_name": "a.png", "text": "..."} per '
    'line, or from "a.txt" beside "a.png"'
)


def list_files(folder: Path) -> list[Path]:
    """Every file below the folder, sorted, without hidden files and folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def open_folder(
    folder: Path, files: Sequence[Path], image_column: str | None, caption_column: str | None
) -> Source:
    """The image folder as a source: MetadataFolder if it has a metadata.jsonl, else SidecarFolder.

    Raises:
        UserError: no images, no captions, a bad line, a column that is unknown or ambiguous.
    """
    images = [path for path in files if is_image(path)]
    metadata = [path for path in files if path.name == METADATA]
    if metadata:
        return MetadataFolder(folder, metadata, images, image_column, caption_column)
    if not images:
        raise UserError(f"{folder} holds no images, no parquet files and no tars")
    if image_column or caption_column:
        raise UserError(f"{folder} has no {METADATA}, so there are no columns to choose. {_ADVICE}")
    return SidecarFolder(folder, images, set(files))


class MetadataFolder(Source):
    """Rows of one or more metadata.jsonl; file names are relative to the file that lists them."""

    def __init__(
        self,
        folder: Path,
        metadata: Sequence[Path],
        images: Sequence[Path],
        image_column: str | None,
        caption_column: str | None,
    ):
        self._folder = folder
        self._rows = [(path.parent, row) for path in metadata for row in _read_rows(path)]
        if not self._rows:
            raise UserError(f"{metadata[0]} holds no rows. {_ADVICE}")
        columns = dict.fromkeys(name for _, row in self._rows for name in row)
        where = str(metadata[0])
        self._image = choose_column(columns, image_column, ("file_name",), "image", where)
        self._caption = choose_column(columns, caption_column, CAPTION_COLUMNS, "caption", where)
        identity = {
            "kind": "metadata folder",
            "path": str(folder.resolve()),
            "files": fingerprint_files(folder, [*metadata, *images]),
            "columns": [self._image, self._caption],
        }
        super().__init__(str(folder), identity, len(self._rows))
        listed = {self._path(index) for index in range(len(self._rows))}
        self.left_out = [
            (str(path.relative_to(folder)), "not in metadata")
            for path in images
            if path not in listed
        ]

    def _path(self, index: int) -> Path | None:
        parent, row = self._rows[index]
        name = row.get(self._image)
        # normpath: "./a.png" and "b/../a.png" list a.png too.
        return Path(os.path.normpath(parent / name)) if isinstance(name, str) and name else None

    def __getitem__(self, index: int) -> Sample:
        path = self._path(index)
        key = f"row {index}" if path is None else os.path.relpath(path, self._folder)
        captions = usable_captions(self._rows[index][1].get(self._caption))
        return Sample(index, key, path, captions)


class SidecarFolder(Source):
    """Images with captions in a .txt file of the same name, one alternative caption per line."""

    def __init__(self, folder: Path, images: Sequence[Path], files: set[Path]):
        self._folder = folder
        self._images = images
        texts = {path for path in files if path.suffix == ".txt"}
        expected = {path.with_suffix(".txt") for path in images}
        if not texts & expected:
            lookalikes = [path.name for path in sorted(files) if _looks_like_metadata(path)][:5]
            hint = f". Is one of these the metadata: {', '.join(lookalikes)}?" if lookalikes else ""
            raise UserError(f"{folder} holds {len(images)} images but no captions. {_ADVICE}{hint}")
        identity = {
            "kind": "sidecar folder",
            "path": str(folder.resolve()),
            "files": fingerprint_files(folder, [*images, *(texts & expected)]),
        }
        super().__init__(str(folder), identity, len(images))
        self.left_out = [
            (str(path.relative_to(folder)), "caption without image")
            for path in sorted(texts - expected)
        ]

    def __getitem__(self, index: int) -> Sample:
        path = self._images[index]
        try:
            text = read_bytes(path.with_suffix(".txt")).decode("utf-8-sig")
        except (SkipSample, UnicodeDecodeError):  # no captions: the sample is skipped as such
            text = ""
        key = str(path.relative_to(self._folder))
        return Sample(index, key, path, usable_captions(text.splitlines()))


def _looks_like_metadata(path: Path) -> bool:
    return path.suffix.lower() in _MISNAMED_SUFFIXES


def _read_rows(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path} line {number} is not a JSON object: {line[:80]!r}")
    return rows

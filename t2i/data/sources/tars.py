"""WebDataset tars on local disk: consecutive members with one base name are one sample.

    000.tar:  00017.jpg  00017.txt  00017.json  00018.jpg ...

The member headers are read once into an index; images and captions are then read by offset, so a
tar has random access and costs no second copy on disk. (The `datasets` builder copies the data
unless it streams, refuses a tar whose first samples lack a caption, and silently stops at the end
of a truncated tar.) Tars of a hub data set go through `datasets` all the same, see tables.py.
"""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t2i.data.captioned import CaptionedImages
from t2i.data.content import printable
from t2i.data.images import FileSlice, SkipSample, read_bytes
from t2i.data.samples import (
    IMAGE_SUFFIXES,
    Sample,
    Source,
    choose_caption,
    choose_column,
    make_sample,
)
from t2i.errors import UserError


@dataclass
class _Entry:
    """One sample: the extension of each member and where its bytes are."""

    key: str
    repeats: bool = False
    parts: dict[str, FileSlice] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        return [extension for extension in self.parts if f".{extension}" in IMAGE_SUFFIXES]


class TarSource(Source):
    """Samples of one or more tars, in the order of the files and of their members.

    A member whose extension the sample has already begins another sample of the same name, so that
    nothing is overwritten.

    The caption is a text member (`txt`, `text`, `caption`, `prompt`) or, named "json.caption", a
    field of the json member; the image is the only member with an image extension.
    """

    def __init__(self, root: Path, tars: Sequence[Path], wanted: CaptionedImages):
        self._entries: list[_Entry] = []
        self._tars = tars
        left_out = [line for path in tars for line in _index(path, self._entries)]
        name = str(root)
        found = {extension for entry in self._entries for extension in entry.parts}
        self._image = self._choose_image(name, found, wanted.image_column)
        self._caption = self._choose_caption(name, found, wanted.caption_column)
        identity = {"kind": "webdataset", "columns": [self._image, self._caption]}
        super().__init__(name, identity, len(self._entries))
        self.left_out = left_out

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._tars]

    def _choose_image(self, name: str, columns: set[str], given: str | None) -> str | None:
        if given is not None:
            return choose_column(sorted(columns), given, (), "image", name)
        counts = [len(entry.images) for entry in self._entries]
        if not any(counts):
            listing = ", ".join(sorted(columns)) or "none"
            raise UserError(
                f"{name} holds no images; the members have the extensions: {listing}. "
                "(A sample's name ends at the first dot: rename a.b.png to a_b.png)"
            )
        if max(counts) > 1:
            entry = self._entries[counts.index(max(counts))]
            raise UserError(
                f"{name}: sample {entry.key} holds several images ({', '.join(entry.images)}). "
                "Name one with --data.image-column"
            )
        return None  # one a sample, whatever its extension

    def _choose_caption(self, name: str, columns: set[str], given: str | None) -> str:
        fields: list[str] = []
        with_json = next((entry for entry in self._entries if "json" in entry.parts), None)
        if with_json is not None:
            document = _read_json(with_json.parts["json"])
            fields = sorted(f"json.{key}" for key in document if isinstance(key, str))
        return choose_caption(sorted(columns), fields, given, name)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        image = self._image or next(iter(entry.images), "")
        sample = make_sample(index, entry.key, entry.parts.get(image), self._captions(entry))
        if entry.repeats:
            sample = replace(sample, notes=(*sample.notes, "name repeats in the tar"))
        return sample

    def _captions(self, entry: _Entry) -> Any:
        extension, _, name = self._caption.partition(".")
        if extension not in entry.parts:
            return None
        return _read_json(entry.parts[extension]).get(name) if name else entry.parts[extension]


def _index(path: Path, entries: list[_Entry]) -> list[tuple[str, str]]:
    """Append the samples of one tar; (name, reason) of what was left out."""
    left_out: list[tuple[str, str]] = []
    previous = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")
                if not member.isreg() or member.issparse() or not base:
                    reason = "hidden file" if member.isreg() and not base else "not a regular file"
                    if not member.isdir() and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                        left_out.append((printable(f"{path.name}:{member.name}"), reason))
                    continue
                extension = extension.lower()
                repeats = (folder, base) == previous and extension in entries[-1].parts
                if repeats or (folder, base) != previous:
                    previous = (folder, base)
                    key = f"{folder}/{base}" if folder else base
                    entries.append(_Entry(f"{path.name}:{key}", repeats))
                where = FileSlice(path, member.offset_data, member.size)
                entries[-1].parts[extension] = where
            # A complete archive ends with blocks of zeros, which tarfile stops at.
            with open(path, "rb") as file:
                file.seek(tar.offset)
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except tarfile.TarError as error:
        if previous is None:
            raise UserError(
                f"{path} is not an uncompressed tar ({error}). Unpack .tar.gz with gunzip first"
            ) from error
        complete = False
    return left_out if complete else [*left_out, (printable(path.name), "truncated archive")]


def _read_json(where: FileSlice) -> dict[str, Any]:
    try:
        document = json.loads(read_bytes(where))
    except (SkipSample, ValueError, RecursionError):  # no captions: the sample is skipped as such
        return {}
    return document if isinstance(document, dict) else {}

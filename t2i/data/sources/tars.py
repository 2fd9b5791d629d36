"""WebDataset tars on local disk: consecutive members with one base name are one sample.

    000.tar:  00017.jpg  00017.txt  00017.json  00018.jpg ...

The member headers are read into an index; images and captions are then read by offset, so a tar has
random access without a second copy on disk. Only a few tars' indexes are held at a time: an index
takes 1 kB per sample, too much memory for a hundred million samples. (The `datasets` builder copies
the data unless it streams, refuses a tar whose first samples lack a caption, and silently stops at
the end of a truncated tar.) Tars of a hub data set go through `datasets` nevertheless, see
tables.py.
"""

import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from t2i.data.captioned import CaptionedImages
from t2i.data.content import printable
from t2i.data.images import FileSlice, SkipSample, read_bytes
from t2i.data.samples import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Sample,
    Source,
    choose_caption,
    choose_column,
    make_sample,
    read_captions,
)
from t2i.data.sources.folders import is_image
from t2i.errors import UserError, shorten
from t2i.lfs import refuse_pointers

_HELD = 4
"""Tars whose indexes are held. Samples are read in order, so each tar is indexed only twice."""
_ASKED = 100
"""JSON members whose fields are collected, to choose the caption."""
_PADDING = 1 << 20
"""Bytes checked after the end of an archive: by default, tar pads with zeros up to 10 kB."""
_SECOND = (
    "second archive after the end of the first, as `cat` joins them: pack it as a separate tar"
)


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

    A member with an extension that the sample already has begins another sample of the same name,
    so that nothing is overwritten.

    The caption is a text member (`txt`, `text`, `caption`, `prompt`) or a field of the json member
    ("json.caption"); the image is the only member with an image extension.
    """

    def __init__(self, root: Path, tars: Sequence[Path], wanted: CaptionedImages):
        self._tars = tars
        self._indexed = lru_cache(_HELD)(_index)
        self._ends, left_out, seen = [0], [], _Seen()
        for path in tars:
            entries, notes = self._indexed(path)
            self._ends.append(self._ends[-1] + len(entries))
            seen.add(entries)
            left_out += notes
        name = str(root)
        self._image = _choose_image(seen, name, wanted.image_column)
        self._caption = _choose_caption(seen, name, wanted.caption_column)
        identity = {"kind": "webdataset", "columns": [self._image, self._caption]}
        super().__init__(name, identity, self._ends[-1])
        self.left_out = left_out
        self.remarks += self._unread(seen, wanted)
        if seen.apart:
            self.remarks.append(
                f"image and text of the same name are apart ({seen.apart[0]}): the members of a "
                "sample must be neighbors in its tar, as `tar --sort=name` packs them"
            )

    def _unread(self, seen: "_Seen", wanted: CaptionedImages) -> Iterator[str]:
        """Remarks on members that are not read although the user may expect it."""
        dotted = [c for c in sorted(seen.columns) if "." in c and is_image(Path(f"a.{c}"))]
        if wanted.image_column is None and dotted:
            yield (
                f"images that end in {shorten(dotted, most=3)} are not read, since a sample's name "
                "ends at the first dot: rename a.b.png to a_b.png, or name one with "
                "--data.image-column"
            )
        if wanted.caption_column is not None:
            return
        both = [entry for entry in seen.with_json if self._caption in entry.parts]
        read = [(self._captions(entry), _read_json(entry.parts["json"])) for entry in both]
        for name in CAPTION_COLUMNS:
            others = ((text, row[name]) for text, row in read if row.get(name) is not None)
            if any(read_captions(one)[0] != read_captions(other)[0] for one, other in others):
                yield f"captions are read from {self._caption}, not from json.{name}, which differs"

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._tars]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(index)
        tar = bisect_right(self._ends, index) - 1
        entry = self._indexed(self._tars[tar])[0][index - self._ends[tar]]
        image = self._image or next(iter(entry.images), "")
        sample = make_sample(index, entry.key, entry.parts.get(image), self._captions(entry))
        if entry.repeats:
            sample = replace(sample, notes=(*sample.notes, "name repeats in the tar"))
        return sample

    def _captions(self, entry: _Entry) -> Any:
        if self._caption in entry.parts:
            return entry.parts[self._caption]
        member, _, name = self._caption.partition(".")
        return _read_json(entry.parts[member]).get(name) if name and member in entry.parts else None


@dataclass
class _Seen:
    """What was seen in the samples of all tars."""

    columns: set[str] = field(default_factory=set)
    crowded: _Entry | None = None
    """The first sample with the most images."""
    with_json: list[_Entry] = field(default_factory=list)
    """The first samples with a json member."""
    apart: list[str] = field(default_factory=list)
    """Of each tar, the first name whose image and text are not neighbors."""

    def add(self, entries: Sequence[_Entry]) -> None:
        pictures = {entry.key for entry in entries if len(entry.images) == len(entry.parts)}
        self.apart += [e.key for e in entries if not e.images and e.key in pictures][:1]
        for entry in entries:
            self.columns |= entry.parts.keys()
            if self.crowded is None or len(entry.images) > len(self.crowded.images):
                self.crowded = entry
            if "json" in entry.parts and len(self.with_json) < _ASKED:
                self.with_json.append(entry)


def _choose_image(seen: _Seen, name: str, given: str | None) -> str | None:
    if given is not None:
        return choose_column(sorted(seen.columns), given, (), "image", name)
    entry = seen.crowded
    if entry is None or not entry.images:
        listing = shorten(sorted(seen.columns), most=20) or "none"
        raise UserError(
            f"{name} holds no images; the members have the extensions: {listing}. Name that of the "
            "images with --data.image-column. (A sample's name ends at the first dot: rename a.b.png "
            "to a_b.png)"
        )
    if len(entry.images) > 1:
        raise UserError(
            f"{name}: sample {entry.key} holds several images ({', '.join(entry.images)}). "
            "Name one with --data.image-column"
        )
    return None  # each sample's only image, with any extension


def _choose_caption(seen: _Seen, name: str, given: str | None) -> str:
    documents = [_read_json(entry.parts["json"]) for entry in seen.with_json]
    fields = {f"json.{key}" for document in documents for key in document}
    if given is not None and given.startswith("json.") and len(documents) == _ASKED:
        fields.add(given)  # a later member may have it
    return choose_caption(sorted(seen.columns), sorted(fields), given, name)


def _index(path: Path) -> tuple[list[_Entry], list[tuple[str, str]]]:
    """The samples of one tar, and (name, reason) of what was left out."""
    entries: list[_Entry] = []
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
            # A complete archive ends with blocks of zeros, where tarfile stops.
            with open(path, "rb") as file:
                file.seek(tar.offset)
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
                if complete and any(file.read(_PADDING)):
                    left_out.append((printable(path.name), _SECOND))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except tarfile.TarError as error:
        if previous is None:
            refuse_pointers(path)
            raise UserError(
                f"{path} is not an uncompressed tar ({error}). Unpack .tar.gz with gunzip first"
            ) from error
        complete = False
    if not complete:
        left_out.append((printable(path.name), "truncated archive"))
    return entries, left_out


def _read_json(where: FileSlice) -> dict[str, Any]:
    try:
        document = json.loads(read_bytes(where))
    except (SkipSample, ValueError, RecursionError):  # skipped later, for its lack of a caption
        return {}
    return document if isinstance(document, dict) else {}

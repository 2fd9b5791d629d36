"""What every caption-image source shares: samples, captions, columns, fingerprints."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i.data.images import ImageRef, SkipSample, load_pixels
from t2i.errors import UserError

CAPTION_COLUMNS = ("text", "caption", "prompt")
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
)


@dataclass(frozen=True)
class Sample:
    """One image with its captions, nothing opened yet.

    Attributes:
        index: position in the source, the same in every run.
        key: a name for reports: relative path, tar member, or row number.
        image: what `open_image` takes; None if the row names no image.
        captions: stripped and not empty; the list is empty if there is no usable caption.
    """

    index: int
    key: str
    image: ImageRef
    captions: list[str]


class Source:
    """Samples in a fixed order. Subclasses give random access, or iteration alone (streams).

    Attributes:
        name: what the user gave, for messages.
        identity: JSON-able description that changes when the content may have changed.
        length: number of samples, None for a stream.
        left_out: (key, reason) of files that look like data but belong to no sample.
    """

    def __init__(self, name: str, identity: dict, length: int | None):
        self.name = name
        self.identity = identity
        self.length = length
        self.left_out: list[tuple[str, str]] = []

    def __getitem__(self, index: int) -> Sample:
        raise ValueError(f"{self.name} is a stream and has no random access")

    def __iter__(self) -> Iterator[Sample]:
        assert self.length is not None, "a stream defines its own iteration"
        return (self[index] for index in range(self.length))


def load_sample(sample: Sample, **rules: Any) -> Tensor | SkipSample:
    """Pixels of a sample as by `load_pixels`, or why it is skipped (returned, not raised).

    One reason more than images have: `no caption`.
    """
    if not sample.captions:
        return SkipSample("no caption")
    try:
        return load_pixels(sample.image, **rules)
    except SkipSample as reason:
        return reason


def usable_captions(value: Any) -> list[str]:
    """The non-empty strings in a caption value (a string or a list of alternatives), stripped."""
    values = value if isinstance(value, list | tuple) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def choose_column(
    columns: Iterable[str], given: str | None, candidates: Sequence[str], kind: str, where: str
) -> str:
    """The column that the user named, or the only candidate among the columns.

    Raises:
        UserError: the named column does not exist; no candidate or more than one exists.
    """
    columns = list(columns)
    listing = f"the columns are: {', '.join(columns) or 'none'}"
    if given is not None:
        if given not in columns:
            raise UserError(f"{where} has no column {given!r}; {listing}")
        return given
    found = [name for name in candidates if name in columns]
    if len(found) == 1:
        return found[0]
    problem = (
        f"the {kind} could be any of {', '.join(found)}"
        if found
        else f"no {kind} column found (looked for {', '.join(candidates)})"
    )
    raise UserError(f"{where}: {problem}; {listing}. Name one with {kind}_column")


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """Hash of names (relative to root), sizes and modification times: cheap, reads no content."""
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        name = path.relative_to(root) if path.is_relative_to(root) else path
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()

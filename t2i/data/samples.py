"""What all sources of images share: samples, their captions, the choice of columns."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i.data.content import printable
from t2i.data.images import UNFETCHED, FileSlice, ImageRef, SkipSample, read_bytes
from t2i.errors import UserError, is_utf16, shorten
from t2i.lfs import LFS_POINTER

CAPTION_COLUMNS = ("text", "caption", "prompt")
_TEXT_COLUMNS = ("txt", *CAPTION_COLUMNS)  # of tables and tars
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"),
        *(".tif", ".tiff", ".avif", ".jp2"),
    )
)
UNREAD_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".tga", ".exr", ".hdr", ".ico"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    )
)
"""Image formats that are not read: such files are reported, so that none is silently dropped."""
CAPTION_SUFFIXES = frozenset((".txt", ".caption"))
"""Of caption files next to images."""
OTHER_SPLIT = "not of the split"
"""Begins the reason why files of splits that were not asked for are left out."""
PACKED_SUFFIXES = frozenset((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
_CAPTION_NAME = re.compile("caption|prompt|(?:^|_)text(?:$|_)", re.IGNORECASE)
"""In the name of a column that may hold captions."""
_LONGEST_CAPTION = 5000  # characters; no text encoder here reads more
_MOST_CAPTIONS = 100
_LARGEST_FILE = 1 << 20
_LINE = re.compile(r"\r\n|\r|\n")
# Control characters other than white space, lone surrogates, and code points that are not
# characters.
_NO_TEXT = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Soft hyphens, zero-width spaces, byte order marks and direction marks, which web pages and chats
# leave in texts. The joiners of emoji and of Persian or Indic words are not among them.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
GENERATOR_SETTINGS = re.compile(
    r"(?:^| )--(?:ar|v|s|q|niji|stylize|chaos|seed|no|n|w|h|d|l) |<(?:lora|lyco|hypernet):|"
    r"^(?:Negative prompt|Steps): ",
    re.IGNORECASE,
)
_DOUBTS = {
    "caption holds HTML": re.compile(
        r"&(?:[a-z]+|#\d+);|</?(?:a|b|br|div|em|i|img|li|p|span)\b[^>]*>"
    ),
    "caption holds an unfilled {field}": re.compile(
        r"\{\w*\}|\[\[\w+\]\]|\[(?:trigger|name|filewords)\]"
    ),
    "caption holds settings of an image generator": GENERATOR_SETTINGS,
    "caption holds what a language model added": re.compile(
        r"<\|\w+\|>|</?(?:s|think|image)>|^(?:i'm sorry|i am sorry|i can't|i cannot)\b|^```|^\*\*",
        re.IGNORECASE,
    ),
}
"""Notes on what captions of web pages, scripts and generators hold besides a description."""
_PLACEHOLDERS = frozenset(("nan", "none", "null", "n/a", "undefined"))
"""What programs write as text where there is no caption."""


@dataclass(frozen=True)
class Sample:
    """One image with its captions or its class; nothing is opened yet.

    Attributes:
        index: position in the source, the same in every run.
        key: a printable name for reports: relative path, tar member, or row number.
        image: what `open_image` takes, None if the row names no image; or int64 [A, T, S], codes
            of its views that were computed elsewhere.
        captions: stripped and not empty; the list is empty if there is no usable caption.
        problem: why there is no usable caption.
        notes: what is unusual about a sample that is used anyway.
        label: the image's class; None if it has captions.
        before: the captions before they were rewritten; empty if they were not.
    """

    index: int
    key: str
    image: ImageRef | Tensor
    captions: list[str]
    problem: str = "no caption"
    notes: tuple[str, ...] = ()
    label: int | None = None
    before: tuple[str, ...] = ()


class Source:
    """Samples in a fixed order. Subclasses provide random access, or only iteration (streams).

    Attributes:
        name: what the user gave, for messages.
        identity: JSON-able: what the samples depend on besides the content of `files()`, without
            any path on this machine.
        length: number of samples, None for a stream.
        left_out: (key, reason) of files that look like data but belong to no sample.
        remarks: sentences on how the source was read, where a user may have meant something else.
    """

    def __init__(self, name: str, identity: dict, length: int | None):
        self.name = name
        self.identity = identity
        self.length = length
        self.left_out: list[tuple[str, str]] = []
        self.remarks: list[str] = []

    def __getitem__(self, index: int) -> Sample:
        raise ValueError(f"{self.name} is a stream and has no random access")

    def __iter__(self) -> Iterator[Sample]:
        assert self.length is not None, "a stream defines its own iteration"
        return (self[index] for index in range(self.length))

    def files(self) -> list[tuple[str, Path]]:
        """Every file that the samples are read from, with its name within the data set."""
        return []


class RewrittenSource(Source):
    """A source whose captions are rewritten, such as by adding trigger words.

    Args:
        rewrite: a caption -> its replacement.
        identity: JSON-able, what the rewriting depends on.
    """

    def __init__(self, source: Source, rewrite: Callable[[str], str], identity: dict):
        super().__init__(source.name, source.identity | identity, source.length)
        self.left_out, self.remarks = source.left_out, source.remarks
        self._source, self._rewrite = source, rewrite

    def files(self) -> list[tuple[str, Path]]:
        return self._source.files()

    def __getitem__(self, index: int) -> Sample:
        return self._rewritten(self._source[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._rewritten, self._source)

    def _rewritten(self, sample: Sample) -> Sample:
        rewritten = list(map(self._rewrite, sample.captions))
        return replace(sample, captions=rewritten, before=tuple(sample.captions))


def make_sample(index: int, key: str, image: ImageRef, captions: Any) -> Sample:
    """A sample whose captions are in a value of any kind that `read_captions` takes."""
    texts, notes = read_captions(captions)
    if texts:
        return Sample(index, printable(key), image, texts, notes=notes)
    return Sample(index, printable(key), image, [], notes[0] if notes else "no caption")


def read_captions(value: Any) -> tuple[list[str], tuple[str, ...]]:
    """The captions in a text, a list, or a text file, and notes on what was wrong with them.

    The same rule holds for every source (.txt files, tar members, JSON, tables): each line of a
    text is a caption, and a list holds captions or texts; training picks one of several captions
    each time. Captions are stripped and empty ones dropped. Bytes must be UTF-8. Characters that
    are not text (control characters, lone surrogates) are removed, as are invisible ones; the first
    5,000 characters of a caption and the first 100 captions of a sample are used. A caption that is
    probably none (JSON, "nan", only numbers), or not only a description, is used, with a note.
    """
    texts: list[str] = []
    notes: dict[str, None] = {}
    for item in value if isinstance(value, list | tuple) else [value]:
        try:
            whole = _INVISIBLE.sub("", _as_text(item))
        except SkipSample as problem:
            notes[problem.reason] = None
            continue
        if _looks_like_json(whole):
            notes["caption is JSON, used as text"] = None
        for line in _LINE.split(whole):
            text = _NO_TEXT.sub("", line).strip()
            if text != line.strip():
                notes["caption holds characters that are not text"] = None
            if len(text) > _LONGEST_CAPTION:
                notes[f"caption of more than {_LONGEST_CAPTION} characters cut"] = None
            if any(unicodedata.category(c)[0] in "LNPS" for c in text):
                texts.append(text[:_LONGEST_CAPTION].strip())
                notes |= dict.fromkeys(note for note, sign in _DOUBTS.items() if sign.search(text))
                if text.lower() in _PLACEHOLDERS:
                    notes[f"caption is only {text.lower()!r}"] = None
                elif not any(map(str.isalpha, text)):
                    notes["caption without letters"] = None
    if len(texts) > _MOST_CAPTIONS:
        notes[f"captions after the first {_MOST_CAPTIONS} left out"] = None
    return texts[:_MOST_CAPTIONS], tuple(notes)


def _looks_like_json(text: str) -> bool:
    """Whether a program wrote an object or a list where a caption belongs."""
    text = text.strip()
    return text[:1] in ("{", "[") and text[-1:] in ("}", "]") and ('"' in text or "'" in text)


def _as_text(value: Any) -> str:
    """The value as a string; SkipSample says why it is not text."""
    if isinstance(value, Path | FileSlice):
        try:
            value = read_bytes(value, limit=_LARGEST_FILE)
        except SkipSample as error:
            reason = "no caption" if error.reason == "missing" else f"caption {error.reason}"
            raise SkipSample(reason) from error
    if value is None:
        return ""
    if isinstance(value, bytes):
        if value.startswith(LFS_POINTER):
            raise SkipSample(f"caption is a {UNFETCHED}")
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            kind = "UTF-16 (save it as UTF-8)" if is_utf16(value) else "not UTF-8"
            raise SkipSample(f"caption is {kind}") from error
    if not isinstance(value, str):
        raise SkipSample("caption is not text")
    return value


def choose_column(
    columns: Iterable[str], given: str | None, candidates: Sequence[str], kind: str, where: str
) -> str:
    """The column that the user named, else the only candidate among the columns; else UserError."""
    columns = list(columns)
    listing = f"the columns are: {shorten(columns, most=20) or 'none'}"
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
    raise UserError(f"{where}: {problem}; {listing}. Name one with --data.{kind}-column")


def choose_caption(
    columns: Iterable[str], fields: Sequence[str], given: str | None, where: str
) -> str:
    """The column of captions, or the field ("json.caption") of a column; UserError if unclear.

    Args:
        fields: all fields of columns that hold objects. These columns themselves are no captions.
    """
    columns = list(columns)
    nested = {field.partition(".")[0] for field in fields}
    candidates: Sequence[str] = [name for name in _TEXT_COLUMNS if name not in nested]
    if given is None and not set(candidates) & set(columns):
        candidates = [field for field in fields if field.rpartition(".")[2] in CAPTION_COLUMNS]
    candidates = candidates or [name for name in CAPTION_COLUMNS if name not in nested]
    return choose_column([*columns, *fields], given, candidates, "caption", where)


def about_columns(
    texts: Iterable[str], splits: Iterable[Any], given: str | None, chosen: str
) -> Iterator[str]:
    """Remarks on columns of a table that are not read although the user may expect it.

    Args:
        texts: columns that hold text.
        splits: values of a column "split".
        given: the column of captions that the user named.
    """
    others = [
        name for name in texts if _CAPTION_NAME.search(name) and "negative" not in name.lower()
    ]
    others = [name for name in others if name != chosen]
    if others and given is None:
        yield (
            f"captions are read from {chosen}, not from {shorten(others, most=3)}; name the one to use "
            "with --data.caption-column"
        )
    parts = dict.fromkeys(str(value) for value in splits if value is not None)
    if len(parts) > 1:
        yield f'the column "split" is not read: the rows of {shorten([*parts])} are all used'


def read_field(row: dict[str, Any], column: str) -> Any:
    """The value of a column, or of a field ("json.caption") of one; None if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value

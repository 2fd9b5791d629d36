"""Image folders on disk: with a table of captions, or with a .txt file of captions next to each
image.

Both are read with pathlib and not with the `datasets` library, which drops images that the metadata
does not list, does not know captions in .txt files, and makes a copy that nothing here needs.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from t2i.data.captioned import CaptionedImages
from t2i.data.content import name_in, printable
from t2i.data.samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    PACKED_SUFFIXES,
    UNREAD_SUFFIXES,
    Sample,
    Source,
    about_columns,
    choose_caption,
    choose_column,
    make_sample,
    read_field,
)
from t2i.data.sources.metadata_files import (
    METADATA,
    METADATA_ADVICE,
    METADATA_CSV,
    looks_like_metadata,
    other_tables,
    read_metadata,
)
from t2i.errors import UserError, shorten

_TEXTS = frozenset((".txt", ".text", ".cap", ".tags", ".md", ".json"))
"""Of files next to images (a.json, a.png.txt) that may hold captions but are not read."""
OUTSIDE = "outside the folder (--data.outside-images uses it)"
"""Reason to skip an image that a table names outside its folder."""
_STRANGE = "link to a file that is not a caption file"
_OF_SYSTEMS = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
"""Folders that operating systems add, for example for thumbnails or deleted files."""
_REPEATS = re.compile(r"[1-9]\d{0,2}_\S.*")
"""Folders as kohya's trainers read them: 10_dog for ten passes over its images."""
_SAVED = ("dataset_info.json", "state.json")  # written by Dataset.save_to_disk
_HASH = re.compile("[0-9a-f]{30,}")


def walk(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Every file below the folder, sorted, and (name, reason) of what is left out.

    Links to files and folders are followed, but every folder is read only once, and none that
    contains this one: loops end. Hidden files and folders (and `_OF_SYSTEMS`) are left out, with a
    reason if they are or hold images, as do images in formats that are not read.
    """
    root = os.path.realpath(folder)
    files: list[Path] = []
    left_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    pending, links = [folder], list[Path]()
    while pending or links:  # links last, so that names without links are preferred
        parent = pending.pop() if pending else links.pop(0)
        real, name = os.path.realpath(parent), printable(os.path.relpath(parent, folder))
        if real in seen or (parent != folder and os.path.commonpath([root, real]) == real):
            left_out.append((f"{name}/", "link to a folder that was already read"))
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            if parent == folder:
                raise UserError(f"cannot read {folder}: {error.strerror}") from error
            left_out.append((f"{name}/", "unreadable folder"))
            continue
        for entry in entries:
            path, kind, reason = Path(entry.path), _kind(entry), ""
            if is_hidden(entry.name):
                if kind == "folder" and not entry.is_symlink() and holds_images(path):
                    reason = "hidden folder"
                elif kind != "folder" and is_image(path):
                    reason = "hidden file"
            elif kind == "folder":
                (links if entry.is_symlink() else pending).append(path)
            elif kind == "file":
                files.append(path)
                if path.suffix.lower() in UNREAD_SUFFIXES:
                    reason = "format that is not read"
            else:
                reason = kind
            if reason:
                name = printable(os.path.relpath(path, folder))
                left_out.append((f"{name}/" if reason == "hidden folder" else name, reason))
    return sorted(files), sorted(left_out)


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself, or into a folder that we may not read
        pass
    return "broken link" if entry.is_symlink() else "not a regular file"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is never data, wherever it is."""
    return name.startswith(".") or name in _OF_SYSTEMS


def holds_images(folder: Path) -> bool:
    return any(is_image(Path(name)) for _, _, names in os.walk(folder) for name in names)


def leads_out(name: str) -> bool:
    """Whether a file name in a table leads out of the table's folder, or is an address (URL)."""
    name = name if "://" in name else os.path.normpath(name)
    return "://" in name or os.path.isabs(name) or name.split(os.sep)[0] == os.pardir


def name_below(folder: Path, name: str) -> str:
    """A file name from a table, made relative if it is an absolute path inside the folder."""
    if "://" in name or not os.path.isabs(name):
        return name
    place = Path(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
    return str(place.relative_to(folder)) if place.is_relative_to(folder) else name


def composed(name: str) -> str:
    """A name with accents in one encoding: disks and zips of Macs encode é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def open_folder(folder: Path, files: Sequence[Path], wanted: CaptionedImages) -> Source:
    """The folder as a source; captions are in its metadata.jsonl, without one in .txt files, and
    without these in its metadata.csv.
    """
    opened = _open_folder(folder, files, wanted)
    if packed := [path for path in files if path.suffix.lower() in PACKED_SUFFIXES]:
        names = shorten([name_in(folder, path) for path in packed], most=3)
        verb = "is" if len(packed) == 1 else "are"
        opened.remarks.append(f"{names} {verb} not unpacked, and not read")
    return opened


def read_tables(files: Sequence[Path]) -> tuple[str, ...]:
    """The names of tables that are read: captions next to images come before a metadata.csv."""
    if not any(path.name == METADATA_CSV for path in files):
        return (METADATA,)
    images, texts = filter(is_image, files), filter(is_caption_file, files)
    beside = any(_match_captions([*images], [*texts]).values())
    return (METADATA,) if beside else (METADATA, METADATA_CSV)


def _open_folder(folder: Path, files: Sequence[Path], wanted: CaptionedImages) -> Source:
    images = [path for path in files if is_image(path)]
    texts = [path for path in files if is_caption_file(path)]
    metadata = [path for path in files if path.name == METADATA]
    if metadata := metadata or [path for path in files if path.name in read_tables(files)]:
        source = MetadataFolder(folder, metadata, images, wanted)
        table = metadata[0].name
        if texts:
            source.remarks.append(
                f"{len(texts)} text files such as {name_in(folder, texts[0])} are not read: "
                f"captions are in {table}"
            )
        source.remarks += other_tables(folder, files, table, table)
        return source
    if not images:
        convertible = UNREAD_SUFFIXES | PACKED_SUFFIXES | {".arrow"}
        others = [path for path in files if path.suffix.lower() in convertible]
        hint = ""
        if others:
            hint = f"; unpack or convert files such as {name_in(folder, others[0])}"
        elif tables := list(filter(looks_like_metadata, files)):
            hint = f"; {name_in(folder, tables[0])} is not read. {METADATA_ADVICE}"
        names = Counter(path.parent for path in files if path.name in _SAVED)
        if parts := [parent for parent, count in names.items() if count == len(_SAVED)]:
            saved = next((path for path in parts if path.name == "train"), parts[0])
            hint = (
                f"; {saved} was saved by the datasets library: convert it to parquet with "
                f"datasets.load_from_disk({str(saved)!r}).to_parquet({saved.name + '.parquet'!r})"
            )
        raise UserError(f"{folder} holds no images, no parquet files and no tars{hint}")
    if wanted.image_column or wanted.caption_column:
        raise UserError(
            f"{folder} has no {METADATA}, so there are no columns to choose. {METADATA_ADVICE}"
        )
    return SidecarFolder(folder, images, files)


class MetadataFolder(Source):
    """Rows of one or more tables; image paths are relative to the file that lists them."""

    def __init__(
        self,
        folder: Path,
        metadata: Sequence[Path],
        images: Sequence[Path],
        wanted: CaptionedImages,
    ):
        self._folder, self._outside_images = folder, wanted.outside_images
        self._metadata = metadata
        self._rows = [
            (parent, row)
            for path in metadata
            for parent in [str(path.parent.relative_to(folder))]  # once, not for each row
            for row in read_metadata(path)
        ]
        if not self._rows:
            raise UserError(f"{metadata[0]} holds no rows. {METADATA_ADVICE}")
        names = dict.fromkeys(name for _, row in self._rows for name in row)
        where = str(metadata[0])
        self._image = choose_column(names, wanted.image_column, ("file_name",), "image", where)
        fields = [f"{name}.{key}" for name in names for key in self._keys(name)]
        self._caption = choose_caption(names, fields, wanted.caption_column, where)
        inside = [str(path.relative_to(folder)) for path in images]
        self._accented = {composed(name): name for name in inside if not name.isascii()}
        identity = {"kind": "metadata folder", "columns": [self._image, self._caption]}
        super().__init__(str(folder), identity, len(self._rows))
        splits = (row.get("split") for _, row in self._rows)
        first = {name: next(row[name] for _, row in self._rows if name in row) for name in names}
        texts = [name for name, value in first.items() if isinstance(value, str | list)]
        self.remarks += about_columns(texts, splits, wanted.caption_column, self._caption)
        listed = {self._folder / name for name in self._listed()}
        unlisted = [path for path in images if path not in listed]
        self.left_out = [(name_in(folder, path), "not in metadata") for path in unlisted]
        self.remarks += self._misnamed(unlisted)

    def _misnamed(self, unlisted: Sequence[Path]) -> Iterator[str]:
        """A remark if rows name images by paths that these have elsewhere, or on Windows."""
        stems = {path.stem.lower(): path for path in unlisted}
        for name in self._listed() if stems else ():
            last = Path(re.split(r"[/\\]", name)[-1].lower())
            path = stems.get(last.stem if is_image(last) else last.name)
            if path is not None and not os.path.lexists(self._folder / name):
                yield (
                    f"{printable(name)} is not there, but {name_in(self._folder, path)} is: names in "
                    f"{self._metadata[0].name} are relative to its folder, have / between folders, "
                    "and end as the file does (.JPG is not .jpg)"
                )
                return

    def _keys(self, column: str) -> dict[str, None]:
        """The fields of a column that holds objects and nothing that can be a caption."""
        found: dict[str, None] = {}
        for _, row in self._rows:
            value = row.get(column)
            if isinstance(value, dict):
                found |= dict.fromkeys(value)
            elif value is not None:  # usually found in the first row
                return {}
        return found

    def files(self) -> list[tuple[str, Path]]:
        """The metadata files and every image that they name."""
        listed = [(name, Path(os.path.normpath(self._folder / name))) for name in self._listed()]
        return [(str(path.relative_to(self._folder)), path) for path in self._metadata] + listed

    def _listed(self) -> Iterable[str]:
        names = map(self._name, range(len(self._rows)))
        return dict.fromkeys(name for name in names if name is not None and self._may_read(name))

    def _may_read(self, name: str) -> bool:
        """Whether an image at this path, relative to the folder and normalized, may be read."""
        return self._outside_images or not leads_out(name)

    def _name(self, index: int) -> str | None:
        """An image's path relative to the folder; None if the row gives no path."""
        parent, row = self._rows[index]
        name = row.get(self._image)
        if not isinstance(name, str) or not name:
            return None
        # normpath: "./a.png" and "b/../a.png" are a.png, too.
        name = os.path.normpath(os.path.join(parent, name))
        name = name if self._outside_images else name_below(self._folder, name)
        if name.isascii() or os.path.lexists(self._folder / name):
            return name
        return self._accented.get(composed(name), name)

    def __getitem__(self, index: int) -> Sample:
        name = self._name(index)
        if name is not None and not self._may_read(name):
            return Sample(index, printable(name), None, [], OUTSIDE)
        path = None if name is None else Path(os.path.normpath(self._folder / name))
        caption = read_field(self._rows[index][1], self._caption)
        return make_sample(index, name or f"row {index}", path, caption)


class SidecarFolder(Source):
    """Images with captions in a .txt (or .caption) file of the same name; .TXT counts as well."""

    def __init__(self, folder: Path, images: Sequence[Path], files: Sequence[Path]):
        self._folder = folder
        self._images = images
        captions = [path for path in files if is_caption_file(path)]
        links = [path for path in captions if path.is_symlink()]
        strange = {path for path in links if not _may_be_caption(path.resolve())}
        self._texts = _match_captions(images, [path for path in captions if path not in strange])
        bare = [image for image, text in self._texts.items() if text is None]
        stems = {*bare, *(image.with_suffix("") for image in bare)}  # of a.png.txt and a.json
        texts = [path for path in files if path.suffix.lower() in _TEXTS and path not in strange]
        beside = [path for path in texts if path.with_suffix("") in stems]
        if not any(self._texts.values()):
            lookalikes = [path.name for path in files if looks_like_metadata(path)][:5]
            names = ", ".join(lookalikes)
            hint = f". Is one of these the metadata: {names}? See docs/data.md" if names else ""
            if beside:
                hint = f". {_not_read(folder, beside[0])}"
            elif captions:
                why = _STRANGE if captions[0] in strange else "no image of its name is next to it"
                hint += f" ({name_in(folder, captions[0])}: {why})"
            raise UserError(
                f"{folder} holds {len(images)} images but no captions. {METADATA_ADVICE}{hint}"
            )
        super().__init__(str(folder), {"kind": "sidecar folder"}, len(images))
        used = set(self._texts.values())
        pictured = {path.with_suffix("") for path in images}

        def reason(path: Path) -> str:
            if path in strange:
                return _STRANGE
            if path.with_suffix("") in pictured:  # a.txt and a.TXT
                return "second caption file of an image"
            return "caption without image"

        self.left_out = [(name_in(folder, p), reason(p)) for p in captions if p not in used]
        others = [path for path in files if path.with_suffix("") not in pictured]
        beside_images = "the .txt files next to the images"
        self.remarks += other_tables(folder, others, METADATA, beside_images)
        self.remarks += self._unread(beside)

    def _unread(self, beside: Sequence[Path]) -> Iterator[str]:
        """Remarks on what is not read, or read twice, although the user may expect otherwise.

        beside: text files next to images that have no caption.
        """
        parents = {path.parent for path in self._images}
        if repeats := sorted(path.name for path in parents if _REPEATS.fullmatch(path.name)):
            yield (
                f"the number in {printable(repeats[0])}/ is not read: an epoch has every image once, "
                "not as often as the names of kohya's folders say"
            )
        named = Counter(path.with_suffix("") for path in self._images)
        twice = [p for p, text in self._texts.items() if text and named[p.with_suffix("")] > 1]
        if twice:
            yield (
                f"{len(twice)} images share captions with another one of the same name, such as "
                f"{name_in(self._folder, twice[0])} and {twice[1].name}: of copies in two formats "
                "keep one, or one may be held out and the other trained on"
            )
        if beside:
            yield (
                f"{len(beside)} text files are next to images that have no caption: "
                f"{_not_read(self._folder, beside[0])}"
            )

    def files(self) -> list[tuple[str, Path]]:
        """The images, each followed by its captions."""
        used = [path for pair in self._texts.items() for path in pair if path is not None]
        return [(str(path.relative_to(self._folder)), path) for path in dict.fromkeys(used)]

    def __getitem__(self, index: int) -> Sample:
        path = self._images[index]
        return make_sample(index, str(path.relative_to(self._folder)), path, self._texts[path])


def _match_captions(images: Sequence[Path], captions: Sequence[Path]) -> dict[Path, Path | None]:
    """image -> its caption file; None if it has none."""
    usual = {path.with_suffix(""): path for path in captions}
    accented = {
        composed(str(stem)): path for stem, path in usual.items() if not str(stem).isascii()
    }
    found = {}
    for image in images:
        stem = image.with_suffix("")
        found[image] = usual.get(stem) or accented.get(composed(str(stem)))
    return found


def _may_be_caption(target: Path) -> bool:
    """Whether a caption file, or the file that it links to, may be read. Through a link, a secret
    (such as a key file) would get onto pages and into model cards. The caches of the hub and of DVC
    name files by hashes, which an attacker who wants to have a certain file shown cannot guess.
    """
    return is_caption_file(target) or _HASH.fullmatch(target.name) is not None


def _not_read(folder: Path, path: Path) -> str:
    base = path.with_suffix("")
    base = base.with_suffix("") if is_image(base) else base
    return f"{name_in(folder, path)} is not read; its caption belongs in {base.name}.txt"


def is_caption_file(path: Path) -> bool:
    return path.suffix.lower() in CAPTION_SUFFIXES

"""Parquet files and hub data sets, streaming or not, through the `datasets` library.

Image columns are cast with `decode=False`: the library then returns bytes, and a bad image becomes
one skipped sample instead of an exception in the middle of an iteration. Without streaming, the
library keeps an Arrow copy of the data in its own cache folder.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from t2i.data.captioned import CaptionedImages
from t2i.data.content import content_key, printable
from t2i.data.images import RemoteFile
from t2i.data.samples import (
    Sample,
    Source,
    about_columns,
    choose_caption,
    choose_column,
    make_sample,
    read_field,
)
from t2i.data.sources.folders import OUTSIDE, leads_out, name_below
from t2i.errors import UserError, shorten
from t2i.lfs import refuse_pointers
from t2i.published import file_status, hub_is_away

NOT_UTF8 = b"\xff"
_LONGEST_PATH = 4096  # of Linux; no image fits into so few letters
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


def open_parquet(root: Path, files: Sequence[Path], wanted: CaptionedImages) -> Source:
    """Local parquet files, all of one split; image paths in them are relative to the folder. Files
    without rows, which tools that write many parts leave behind, are dropped: the library fails on
    them.
    """
    if strange := [path for path in files if "::" in str(path)]:
        raise UserError(
            f"{strange[0]}: the datasets library reads '::' as a chain of addresses; rename the file "
            "or folder"
        )
    columns = {path: found for path in files if (found := _columns(path)) is not None}
    if not columns:
        raise UserError(f"{root} holds no rows")
    files = list(columns)
    _refuse_different(root, columns)
    # The library finds its Arrow copy by path and modification time, which do not change when
    # `cp -p` or rsync replaces a file. A name made of all times gives each state its own copy.
    name = content_key({"files": list(map(file_status, files))})
    patterns = [glob.escape(str(path)) for path in files]
    where = {"path": "parquet", "name": name, "data_files": {wanted.split: patterns}}
    folder = root if root.is_dir() else root.parent
    return _kind(wanted)(str(root), where, wanted, folder, files)


def _columns(path: Path) -> set[str] | None:
    """The columns of a parquet file; None if it has no rows."""
    try:
        found = pq.read_metadata(path)
        return set(found.schema.to_arrow_schema().names) if found.num_rows else None
    except (OSError, pa.ArrowException) as error:  # the library would not name the file
        refuse_pointers(path)
        raise UserError(
            f"{path} is not a readable parquet file ({error}); copy it again"
        ) from error


def _refuse_different(root: Path, columns: dict[Path, set[str]]) -> None:
    """UserError if the files do not all have the same columns. The library would stop at the first
    file that differs (when streaming, in the middle of a run) and not name it.
    """
    for (before, expected), (path, found) in pairwise(columns.items()):
        if other := found ^ expected:
            where = root if root.is_dir() else root.parent
            raise UserError(
                f"{where}: {path.name} and {before.name} do not have the same columns "
                f"({shorten(sorted(other), most=5)} in one only); give files of one kind by name, such "
                f"as '{where}/a*.parquet', or write them with the same columns"
            )


def open_hub(wanted: CaptionedImages) -> Source:
    """A data set of the Hugging Face hub (or its local cache, when offline)."""
    where = {"path": wanted.source, "name": wanted.config_name, "revision": wanted.revision}
    if hub_is_away():  # use what was fetched before; the library has no option for this
        datasets.config.HF_HUB_OFFLINE = True
    return _kind(wanted)(wanted.source, where, wanted)


def _load(name: str, where: dict[str, Any], wanted: CaptionedImages) -> tuple[Any, dict, str]:
    """A split of a data set (images not decoded), its first row, and a hash of the data set, which
    for a hub data set depends on the commit.
    """
    try:
        builder = datasets.load_dataset_builder(**where)
        if wanted.streaming:
            data = builder.as_streaming_dataset(wanted.split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(wanted.split)
        data = _undecoded(data)
        # Arrow accepts any bytes as a string, and one that is not UTF-8 would end an iteration over
        # Python objects. A stream of any other builder has Python objects already.
        if not wanted.streaming or isinstance(builder, datasets.ArrowBasedBuilder):
            data = data.with_format("arrow")
        first = next(map(_python_row, islice(data, 1)), None)
    except Exception as error:  # the library's loaders raise nearly anything
        cause = error.__cause__ or error
        here = "" if Path(name).exists() else "there is no folder of this name, and "
        raise UserError(
            f"{name}: {here}the datasets library could not open split {wanted.split!r} "
            f"({type(cause).__name__}: {cause})"
        ) from error
    if first is None:
        raise UserError(f"{name} holds no rows")
    return data, first, builder.hash


class _Rows(Source):
    """What `TableSource` and `StreamSource` share.

    Args:
        where: arguments for the library's `load_dataset_builder`.
        folder: image paths in the rows are relative to it.
        paths: the parquet files; empty for a hub data set.
    """

    def __init__(
        self,
        name: str,
        where: dict[str, Any],
        wanted: CaptionedImages,
        folder: Path = Path(),
        paths: Sequence[Path] = (),
    ):
        data, first, content = _load(name, where, wanted)
        kinds = (data.features or {}).items()
        candidates = [column for column, kind in kinds if isinstance(kind, datasets.Image)]
        if len(candidates) != 1:
            candidates = [*_IMAGE_COLUMNS]
            if paths and not first.keys() & {*candidates}:
                candidates.append("file_name")  # of a metadata.parquet
        image = choose_column(first, wanted.image_column, candidates, "image", name)
        caption = _choose_caption(name, first, wanted.caption_column, image)
        _refuse_other_than_images(first[image], f"{name}: column {image!r}")
        needed = {image, caption, caption.partition(".")[0], "__key__", "__url__"}
        self._data = data.select_columns([column for column in first if column in needed])
        self._image, self._caption, self._folder, self._paths = image, caption, folder, paths
        # Files that the library fetched from the hub have absolute paths, in its cache.
        self._inside = bool(paths) and not wanted.outside_images
        identity: dict = {"kind": "parquet"}
        if not paths:  # the content of a branch can change
            identity = {"kind": "hub", "id": name, "config": wanted.config_name}
            identity |= {"split": wanted.split, "revision": wanted.revision, "content": content}
        identity |= {"streaming": wanted.streaming, "columns": [image, caption]}
        super().__init__(name, identity, None if wanted.streaming else len(self._data))
        texts = [column for column, value in first.items() if isinstance(value, str | list)]
        # A stream would have to be read to its end for this.
        countable = isinstance(first.get("split"), str) and not wanted.streaming
        splits = data.unique("split") if countable else ()
        self.remarks += about_columns(texts, splits, wanted.caption_column, caption)

    def _below(self, name: str) -> str:
        """An image's name, made relative if it is inside the folder and others are not read."""
        return name_below(self._folder, name) if self._inside else name

    def files(self) -> list[tuple[str, Path]]:
        """The parquet files, and the images that their rows name by path."""
        names = (name for path in self._paths for name in _named_images(path, self._image))
        below = (self._below(name) for name in names)
        images = [name for name in below if not (self._inside and leads_out(name))]
        return [
            *((path.name, path) for path in self._paths),
            *((name, self._folder / name) for name in dict.fromkeys(images)),
        ]

    def _sample(self, index: int, row: dict[str, Any]) -> Sample:
        value = row[self._image]
        key = f"row {index}"
        if row.get("__key__"):  # a webdataset on the hub
            key = f"{Path(str(row.get('__url__') or '')).name}:{row['__key__']}"
        elif isinstance(value, dict) and isinstance(value.get("path"), str):
            key = f"row {index} ({Path(value['path']).name})"
        if isinstance(value, dict):  # the {bytes, path} struct of the datasets library
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            value = self._below(value)
            if self._inside and leads_out(value):
                return Sample(index, printable(key), None, [], OUTSIDE)
            value = RemoteFile(value) if "://" in value else self._folder / value
        return make_sample(index, key, value, read_field(row, self._caption))


class TableSource(_Rows):
    """Rows of a loaded (map-style) data set."""

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index, _python_row(self._data[index]))


class StreamSource(_Rows):
    """Rows of a streaming data set: iteration only, unknown length."""

    def __iter__(self) -> Iterator[Sample]:
        rows = iter(self._data)
        for index in count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network, damaged file: readers raise nearly anything
                raise UserError(
                    f"{self.name}: the stream broke after {index} samples "
                    f"({type(error).__name__}: {error}). Start again to continue from there"
                ) from error
            yield self._sample(index, _python_row(row))


def _kind(wanted: CaptionedImages) -> type[_Rows]:
    return StreamSource if wanted.streaming else TableSource


def _refuse_other_than_images(first: object, where: str) -> None:
    """UserError if a column whose first value this is does not hold images or names of images."""
    if not isinstance(first, bytes | str | dict | None):
        raise UserError(
            f"{where} holds values such as {first!r:.60}: give each image as the bytes of its file "
            "(of the datasets library: datasets.Image()), or as its path"
        )
    if not isinstance(first, str):
        return
    if first.startswith(("http://", "https://")):
        raise UserError(
            f"{where} holds web addresses. Download the images first; img2dataset writes tars that "
            "can be read here"
        )
    if len(first) > _LONGEST_PATH:
        raise UserError(
            f"{where} holds texts such as {first!r:.60}, too long for a path. If they are images in "
            "base64, store their bytes instead (base64.b64decode)"
        )


def _choose_caption(name: str, first: dict[str, Any], given: str | None, image: str) -> str:
    fields = [
        f"{column}.{key}"
        for column, value in first.items()
        if isinstance(value, dict) and column != image
        for key in value
    ]
    return choose_caption(first, fields, given, name)


def _undecoded(
    data: datasets.Dataset | datasets.IterableDataset,
) -> datasets.Dataset | datasets.IterableDataset:
    for column, kind in (data.features or {}).items():
        if getattr(kind, "decode", False):  # images, and audio or video in columns we do not want
            data = data.cast_column(column, replace(kind, decode=False))
    return data


def _python_row(row: pa.Table | dict[str, Any]) -> dict[str, Any]:
    """A row as Python objects, with `NOT_UTF8` for every string that is not valid text."""
    if isinstance(row, dict):
        return row
    return {name: _python_value(row[name][0]) for name in row.column_names}


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StructScalar):
            return {name: _python_value(part) for name, part in value.items()}
        if isinstance(value, pa.ListScalar | pa.LargeListScalar):
            return list(map(_python_value, value.values))
        return NOT_UTF8


def _named_images(path: Path, column: str) -> list[str]:
    """Paths of local images that a parquet file names instead of holding their bytes."""
    file = pq.ParquetFile(path)
    kind = file.schema_arrow.field(column).type
    if pa.types.is_struct(kind):
        if "path" not in kind.names or _holds_every(file, f"{column}.bytes"):
            return []
        names = pc.struct_field(file.read(columns=[f"{column}.path"])[column], "path")
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names = file.read(columns=[column])[column]
    else:
        return []
    texts = [name for name in map(_python_value, names) if isinstance(name, str)]
    return [name for name in texts if name and "://" not in name]


def _holds_every(file: pq.ParquetFile, column: str) -> bool:
    """Whether a column's statistics say that it has no nulls."""
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    parts = [part.statistics for part in parts if part.path_in_schema == column]
    return bool(parts) and all(p is not None and p.null_count == 0 for p in parts)

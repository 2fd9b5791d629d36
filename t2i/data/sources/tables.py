"""Parquet files and hub data sets, streaming or not, through the `datasets` library.

Image columns are cast with `decode=False`: the library then hands out bytes, and a bad image is
one skipped sample of ours rather than an exception in the middle of its iteration. Without
streaming, the library keeps an Arrow copy of the data in its own cache folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from t2i.data.images import ImageRef, RemoteFile
from t2i.data.samples import (
    Columns,
    Sample,
    Source,
    choose_caption,
    choose_column,
    make_sample,
)
from t2i.errors import UserError

NOT_UTF8 = b"\xff"
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


def open_parquet(
    root: Path, files: Sequence[Path], columns: Columns, *, split: str, streaming: bool
) -> Source:
    """Local parquet files, all of one split; image paths in them are relative to the folder."""
    data_files = {split: [str(path) for path in files]}
    loaded = _Loaded(str(root), "parquet", {"data_files": data_files}, split, streaming)
    folder = root if root.is_dir() else root.parent
    return _rows(loaded, {"kind": "parquet"}, folder, columns, files)


def open_hub(
    repository: str,
    columns: Columns,
    *,
    split: str,
    streaming: bool,
    config_name: str | None,
    revision: str | None,
) -> Source:
    """A data set of the Hugging Face hub (or its local cache, when offline)."""
    where = {"name": config_name, "revision": revision}
    loaded = _Loaded(repository, repository, where, split, streaming)
    identity = {
        "kind": "hub",
        "id": repository,
        "config": config_name,
        "split": split,
        "revision": revision,
        "content": loaded.hash,  # a moving branch gives a new identity
    }
    return _rows(loaded, identity, Path(), columns)


class _Loaded:
    """One split of a data set, its images not decoded, with its first row.

    Raises:
        UserError: whatever goes wrong in opening it, with the cause.
    """

    def __init__(self, name: str, path: str, where: dict[str, Any], split: str, streaming: bool):
        self.name = name
        self.streaming = streaming
        try:
            builder = datasets.load_dataset_builder(path, **where)
            if streaming:
                data = builder.as_streaming_dataset(split)
            else:
                builder.download_and_prepare()
                data = builder.as_dataset(split)
            self.hash = builder.hash  # of a hub data set: follows the commit
            self.image_columns = [
                column
                for column, kind in (data.features or {}).items()
                if isinstance(kind, datasets.Image)
            ]
            self.data = _undecoded(data)
            first = next(iter(islice(self.data, 1)), None)
        except Exception as error:  # the library's loaders raise nearly anything
            cause = error.__cause__ or error
            raise UserError(
                f"{name}: the datasets library could not open split {split!r} "
                f"({type(cause).__name__}: {cause})"
            ) from error
        if first is None:
            raise UserError(f"{name} holds no rows")
        self.first: dict[str, Any] = first


class _Rows(Source):
    """What both kinds share.

    Args:
        folder: what image paths in the rows are relative to.
        columns: those that were asked for. A caption column may be a field of a struct
            ("json.caption").
        paths: the parquet files; on the hub there are none.

    Raises:
        UserError: a column is not there or not clear, or images are given by web addresses.
    """

    def __init__(
        self,
        loaded: _Loaded,
        identity: dict,
        folder: Path,
        columns: Columns,
        paths: Sequence[Path] = (),
    ):
        name, first = loaded.name, loaded.first
        candidates = loaded.image_columns if len(loaded.image_columns) == 1 else _IMAGE_COLUMNS
        image = choose_column(first, columns.image, candidates, "image", name)
        caption = _choose_caption(name, first, columns.caption, image)
        if isinstance(first[image], str) and first[image].startswith(("http://", "https://")):
            raise UserError(
                f"{name}: column {image!r} holds web addresses. Download the images first; "
                "img2dataset writes tars that this kit reads"
            )
        wanted = {image, caption, caption.partition(".")[0], "__key__", "__url__"}
        self._data = loaded.data.select_columns([column for column in first if column in wanted])
        self._image, self._caption, self._folder, self._paths = image, caption, folder, paths
        identity = {**identity, "streaming": loaded.streaming, "columns": [image, caption]}
        super().__init__(name, identity, None if loaded.streaming else len(self._data))

    def files(self) -> list[tuple[str, Path]]:
        """The parquet files, and images that their rows name by path."""
        images = [name for path in self._paths for name in _named_images(path, self._image)]
        return [
            *((path.name, path) for path in self._paths),
            *((name, self._folder / name) for name in dict.fromkeys(images)),
        ]

    def _sample(self, index: int, row: dict[str, Any]) -> Sample:
        value = row[self._image]
        key = f"row {index}"
        if row.get("__key__"):  # a webdataset on the hub
            key = f"{Path(row.get('__url__') or '').name}:{row['__key__']}"
        elif isinstance(value, dict) and value.get("path"):
            key = f"row {index} ({Path(value['path']).name})"
        captions = _field(row, self._caption)
        return make_sample(index, key, _image_ref(value, self._folder), captions)


class TableSource(_Rows):
    """Rows of a loaded (map-style) data set."""

    def __getitem__(self, index: int) -> Sample:
        try:
            row = self._data[index]
        except UnicodeDecodeError:  # Arrow takes any bytes for a string
            column = self._caption.partition(".")[0]
            row = self._data.remove_columns(column)[index] | {column: NOT_UTF8}
        return self._sample(index, row)


class StreamSource(_Rows):
    """Rows of a streaming data set: iteration only, the length is unknown."""

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
                    f"({type(error).__name__}: {error}). Start again to go on from there"
                ) from error
            yield self._sample(index, row)


def _rows(loaded: _Loaded, *where: Any) -> Source:
    return (StreamSource if loaded.streaming else TableSource)(loaded, *where)


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


def _field(row: dict[str, Any], column: str) -> Any:
    value: Any = row
    if column in row:
        return row[column]
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else value if value == NOT_UTF8 else None
    return value


def _image_ref(value: Any, folder: Path) -> ImageRef:
    if isinstance(value, dict):  # the {bytes, path} struct of the datasets library
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return RemoteFile(value) if "://" in value else folder / value
    return value


def _named_images(path: Path, column: str) -> list[str]:
    """Local images that a parquet file names instead of holding their bytes."""
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
    return [name for name in names.to_pylist() if name and "://" not in name]


def _holds_every(file: pq.ParquetFile, column: str) -> bool:
    """Whether a column's statistics say that it has no nulls."""
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    parts = [part.statistics for part in parts if part.path_in_schema == column]
    return bool(parts) and all(p is not None and p.null_count == 0 for p in parts)

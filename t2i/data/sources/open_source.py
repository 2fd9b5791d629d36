"""Open any data set of captioned images: `open_source` detects what it was given.

| given                                    | read by                                        |
|------------------------------------------|------------------------------------------------|
| folder with metadata.jsonl (.csv)        | folders.MetadataFolder                         |
| folder with a.png + a.txt                | folders.SidecarFolder                          |
| *.tar (file, glob, folder)               | tars.TarSource                                 |
| *.parquet (file, glob, folder)           | tables.TableSource, streaming: StreamSource    |
| hub id "owner/name"                      | the same                                       |

A source opens only its index; images are opened one by one, by images.open_image.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2i.data.captioned import CaptionedImages
from t2i.data.content import name_in, printable
from t2i.data.samples import OTHER_SPLIT, PACKED_SUFFIXES, Source
from t2i.data.sources.folders import (
    SidecarFolder,
    is_image,
    open_folder,
    read_tables,
    walk,
)
from t2i.data.sources.metadata_files import (
    METADATA,
    METADATA_ADVICE,
    METADATA_PARQUET,
    looks_like_metadata,
)
from t2i.data.sources.splits import (
    folders_of,
    mentions_split,
    same_split,
    split_of_folder,
    splits_in,
)
from t2i.data.sources.tars import TarSource
from t2i.errors import UserError, nearest_path
from t2i.fields import told_options

TABLE_SUFFIXES = (".parquet", ".tar")
_PART = re.compile(r"(.*?)\d+-of-(\d+)\b.*")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_source(wanted: CaptionedImages) -> Source:
    """Open a data set of captioned images, given as a folder, a file, a glob pattern, or a hub id.

    Raises:
        UserError: nothing there, no images, no captions, an unknown or ambiguous column or split.
    """
    if _is_hub_id(wanted.source):
        # The datasets library takes a second to import.
        from t2i.data.sources.tables import open_hub

        return open_hub(wanted)
    found = _find_files(wanted.source, wanted.split)
    _refuse_unread(wanted)
    opened = _open_files(found, wanted)
    opened.left_out += found.left_out
    opened.remarks += found.remarks
    without = f"has no effect on {wanted.source}"
    if wanted.streaming and opened.length is not None:
        opened.remarks.append(
            f"data.streaming {without}: only parquet and hub data have a copy to do without"
        )
    if wanted.outside_images and isinstance(opened, SidecarFolder | TarSource):
        opened.remarks.append(f"data.outside_images {without}: its images are named by no list")
    return opened


def _refuse_unread(wanted: CaptionedImages) -> None:
    """UserError if local files are given with options that are only for hub data sets."""
    if told := told_options(wanted, ("config_name", "revision"), "data."):
        raise UserError(f"{told}: only for data on the hub, not for {wanted.source}; leave it out")


@dataclass
class _Found:
    """Files that may belong to a data set; `root` is the folder, or the first file."""

    root: Path
    files: list[Path]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def _open_files(found: _Found, wanted: CaptionedImages) -> Source:
    root = found.root
    for suffix in TABLE_SUFFIXES:
        chosen = [path for path in found.files if _is_table(path, suffix)]
        if not chosen:
            continue
        others = [path for path in found.files if not _is_table(path, suffix) and _is_data(path)]
        if others and chosen != [root / METADATA_PARQUET]:  # it names the others
            where = root if root.is_dir() else root.parent
            raise UserError(
                f"{where} holds {suffix} files and also {others[0].name}, so it is not clear which "
                f"to use. Give the files by name, such as '{chosen[0].parent}/*{suffix}', or a folder of "
                "one kind"
            )
        empty = [path for path in chosen if path.stat().st_size == 0]
        if len(empty) < len(chosen):  # if all are, the reader reports it
            chosen = [path for path in chosen if path not in empty]
            found.left_out += [(printable(path.name), "empty") for path in empty]
        found.remarks += _missing_parts(chosen) if root.is_dir() else []
        if suffix == ".tar":
            return TarSource(root, chosen, wanted)
        from t2i.data.sources.tables import open_parquet

        return open_parquet(root, chosen, wanted)
    if not root.is_dir():
        suffix = root.suffix.lower()
        packed = ". Unpack it first" if suffix in PACKED_SUFFIXES else ""
        packed += f". {METADATA_ADVICE}" if looks_like_metadata(root) else ""
        raise UserError(
            f"{wanted.source}: neither .parquet nor .tar{packed}. Give the folder that holds the images"
        )
    return open_folder(root, found.files, wanted)


def _missing_parts(files: Sequence[Path]) -> list[str]:
    """A remark if files count themselves, as in train-00000-of-00003, and some are missing."""
    sets: dict[tuple[Path, str, str], list[Path]] = {}
    for path in files:
        if part := _PART.fullmatch(path.name):
            sets.setdefault((path.parent, part[1], part[2]), []).append(path)
    return [
        f"{len(found)} of the {int(count)} files such as {printable(found[0].name)} are there: was a "
        "download or a copy interrupted?"
        for (*_, count), found in sets.items()
        if len(found) < int(count)
    ]


def _is_hub_id(text: str) -> bool:
    """owner/name that is not a path; with a local folder `owner`, it is a mistyped path."""
    if Path(text).exists() or not _HUB_ID.fullmatch(text):
        return False
    return not Path(text).parent.is_dir() and not _is_table(Path(text))


def _find_files(source: str, split: str) -> _Found:
    """Every file that may belong to the data set."""
    given = Path(os.path.expanduser(source))
    if given.is_dir():
        return _find_in_folder(given.resolve(), split)
    path = given.parent.resolve() / given.name  # a link's own name shows the format
    names = [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path)))
    names = [name for name in names if name == path or not _is_list(name)]
    files = [name for name in names if name.is_file()]
    left_out = [
        (printable(name.name), "broken link" if name.is_symlink() else "not a regular file")
        for name in names
        if name not in files
    ]
    if not files:
        problem = "is not a file" if names else "does not exist"
        near = "" if names else _meant(os.path.expanduser(source))
        raise UserError(
            f"{source} {problem}. Give a folder, .parquet or .tar files, or a hub id such as "
            f"owner/name{near}"
        )
    if split != "train":
        raise UserError(f"split {split!r}: files given by name have no splits")
    return _Found(files[0], files, left_out)


def _meant(source: str) -> str:
    """The end of a message about data that are not there: what may be meant."""
    if re.search(r"\{.*(?:,|\.\.).*\}", source):  # as the webdataset library writes many tars
        pattern = re.sub(r"\{.*\}", "*", source)
        return f". Braces are not expanded: give the folder, or a pattern such as '{pattern}'"
    several = re.split(r"[\s,;:]+", source)
    if len(several) > 1 and all(map(os.path.exists, several)):
        return ". Several folders are given as one that holds them, or links to them"
    return nearest_path(source)


def _find_in_folder(folder: Path, split: str) -> _Found:
    """The files of a split.

    A folder is divided into splits if it holds no data itself and each of its sub-folders that
    holds data is named like a split: `train` is a split next to `val`, but a class next to `bus`.
    If all data are in a single sub-folder of another name, this rule is applied to that one.
    Parquet and tar files are assigned to splits by their own paths.
    """
    files, left_out = walk(folder)
    files = [path for path in files if not _is_list(path)]
    if any(map(_is_table, files)):
        chosen, others = _tables_of_split(folder, files, split)
        return _Found(folder, chosen, left_out + others)
    tables = read_tables(files)
    data = [path for path in files if path.name in tables or _is_data(path)]
    where, parts = _sub_folders(folder, data)
    own = next((path for path in data if path.parent == where), None)
    of_split = folders_of(split, parts)
    divided = own is None and all(map(split_of_folder, parts))
    if of_split and (divided or (split != "train" and own is None)):
        left_out += [
            (f"{printable(name)}/ ({count} files)", f"{OTHER_SPLIT} {split}")
            for name, count in sorted(parts.items())
            if name not in of_split
        ]
        folders = [where / name for name in of_split]
        inside = [path for path in files if any(map(path.is_relative_to, folders))]
        return _Found(folders[0] if len(folders) == 1 else where, inside, left_out)
    if own is not None:
        why = f"{printable(own.name)} is next to them"
    else:
        why = "none is named train" if divided else "not all of them are named like splits"
    if split != "train" and of_split:
        raise UserError(
            f"the sub-folders of {where} are not used as splits, since {why}; give "
            f"{where / of_split[0]} without a split to use it alone"
        )
    if split != "train":
        meant = next(iter(_mentioned_splits(where, data, split)), "")
        fits = meant and same_split(mentions_split(Path(meant).name) or "", split)
        near = f"; give {where / meant} without a split to use it alone" if fits else ""
        raise UserError(f"{where} has no sub-folder for the split {split!r}{near}")
    found = _Found(folder, files, left_out)
    named = [name for name in sorted(parts) if split_of_folder(name)]
    if not named and (named := _mentioned_splits(where, data, split)) and own is None:
        why = "splits are sub-folders of it with plain names, such as train and val"
    if named:
        alone = f"give {where / (of_split or named)[0]} to use it alone"
        if table := next((name for name in tables if where / name in data), None):
            # Without it, there would be no captions.
            alone = f"leave the others out of {table} to use one alone"
        found.remarks.append(
            f"all sub-folders of {where} are used ({', '.join(map(printable, sorted(parts)))}), "
            f"since {why}; {alone}"
        )
    return found


def _mentioned_splits(folder: Path, data: Sequence[Path], split: str) -> list[str]:
    """Folders that may be meant as splits (train_images and test_images, dog/train and dog/test),
    those of the given split first; empty unless there are two different splits.
    """
    found: dict[str, str] = {}
    for names in {path.relative_to(folder).parts[:-1] for path in data}:
        for depth, name in enumerate(names, start=1):
            if mentioned := mentions_split(name):
                found.setdefault("/".join(names[:depth]), mentioned)
                break
    meant = sorted(found, key=lambda name: (not same_split(found[name], split), name))
    return meant if len({*found.values()}) > 1 else []


def _tables_of_split(
    folder: Path, files: Sequence[Path], split: str
) -> tuple[list[Path], list[tuple[str, str]]]:
    """The files of the split, and (name, reason) of the parquet and tar files of other splits."""
    chosen = [path for path in files if _in_split(path.relative_to(folder), split)]
    taken = set(chosen)
    others = [path for path in files if _is_table(path) and path not in taken]
    if not any(map(_is_table, chosen)):
        raise UserError(
            f"{folder} holds no files named after the split {split!r}, but {others[0].name}; "
            "give another split, or the files by name"
        )
    return chosen, [(name_in(folder, path), f"{OTHER_SPLIT} {split}") for path in others]


def _sub_folders(folder: Path, data: Sequence[Path]) -> tuple[Path, Counter[str]]:
    """The folder that may be divided into splits (this one, or the only one below it with data),
    and the number of data files in each of its sub-folders.
    """
    inside = [path.relative_to(folder).parts for path in data]
    parts = Counter(names[0] for names in inside if len(names) > 1)
    only = next(iter(parts), "")
    if len(parts) == 1 and all(len(names) > 2 for names in inside) and not split_of_folder(only):
        return _sub_folders(folder / only, data)
    return folder, parts


def _is_table(path: Path, *suffixes: str) -> bool:
    return path.suffix.lower() in (suffixes or TABLE_SUFFIXES)


def _is_list(path: Path) -> bool:
    """Whether this is a parquet file that img2dataset writes beside a shard (a tar or a folder): it
    lists addresses and captions, and holds no images.
    """
    if not _is_table(path, ".parquet") or not path.with_name(f"{path.stem}_stats.json").is_file():
        return False
    return path.with_suffix(".tar").is_file() or path.with_suffix("").is_dir()


def _in_split(name: Path, split: str) -> bool:
    """Whether a path names the split, as train-00000.parquet or train/00000.parquet. Paths that
    name no split belong to `train`.
    """
    found = splits_in(str(name))
    if "train" in found or not found:
        return same_split("train", split)
    return any(same_split(other, split) for other in found)


def _is_data(path: Path) -> bool:
    return path.name == METADATA or _is_table(path) or is_image(path)

"""Open any caption-image data set: `open_source` finds out what it was given.

| given                                    | read by                                        |
|------------------------------------------|------------------------------------------------|
| folder with metadata.jsonl               | folders.MetadataFolder                         |
| folder with a.png + a.txt                | folders.SidecarFolder                          |
| *.tar (file, files, glob, folder)        | tars.TarSource                                 |
| *.parquet (file, files, glob, folder)    | tables.TableSource, streaming: StreamSource    |
| hub id "owner/name"                      | the same                                       |

A source opens nothing but its index; images are opened one by one by images.open_image.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from t2i.data.folders import METADATA, is_image, list_files, open_folder
from t2i.data.samples import Sample, Source
from t2i.data.tars import TarSource
from t2i.errors import UserError

__all__ = ["Sample", "Source", "open_source"]

TABLE_SUFFIXES = (".parquet", ".tar")
_OTHER_SPLITS = {"validation", "valid", "val", "dev", "test", "eval"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_source(
    source: str | Path | Sequence[str | Path],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    streaming: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
) -> Source:
    """Open a data set of captioned images.

    Args:
        source: a folder, a file, several files, a glob pattern, or a hub id "owner/name".
        image_column: names the image; found by itself when there is only one candidate.
        caption_column: holds the caption, or a list of alternative captions; "json.prompt" reads
            the field of a struct or of a json member. Found by itself when there is only one
            candidate (text, caption, prompt, txt).
        split: of a hub data set or a folder: its sub-folder, or the files named after it.
        streaming: read parquet and hub data row by row, without a copy on disk and without random
            access. Folders and tars are never copied and keep random access either way.
        config_name: of a hub data set with several.
        revision: branch, tag or commit of a hub data set.

    Raises:
        UserError: nothing there, no images, no captions, an unknown or ambiguous column or split.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    text = str(source)
    if isinstance(source, str) and _is_hub_id(text):
        from t2i.data.tables import open_hub  # imports the datasets library, which takes a second

        return open_hub(text, split, streaming, config_name, revision, **columns)
    root, files = _find_files(source, split)
    for suffix in TABLE_SUFFIXES:
        chosen = [path for path in files if path.suffix == suffix]
        if not chosen:
            continue
        _check_one_kind(root, files, suffix)
        if suffix == ".tar":
            return TarSource(root, chosen, **columns)
        from t2i.data.tables import open_parquet

        return open_parquet(root, chosen, split, streaming, **columns)
    if not root.is_dir():
        raise UserError(f"{text}: neither .parquet nor .tar. Give the folder that holds the images")
    return open_folder(root, files, **columns)


def _is_hub_id(text: str) -> bool:
    """owner/name that is no path; with a local folder `owner`, a mistyped path is likelier."""
    if Path(text).exists() or not _HUB_ID.fullmatch(text):
        return False
    return not Path(text).parent.is_dir() and Path(text).suffix not in TABLE_SUFFIXES


def _find_files(source: str | Path | Sequence[str | Path], split: str) -> tuple[Path, list[Path]]:
    """The folder (or the first file) and every file that may belong to the data set."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser().resolve()
        if path.is_dir():
            return _find_in_folder(path, split)
        files = [path] if path.exists() else sorted(Path(name) for name in glob.glob(str(path)))
        if not files:
            raise UserError(
                f"{source} does not exist. Give a folder, .parquet or .tar files, "
                "or a hub id such as owner/name"
            )
    else:
        files = [Path(name).expanduser().resolve() for name in source]
        missing = [str(path) for path in files if not path.is_file()]
        if missing or not files:
            raise UserError(f"no such file: {', '.join(missing) or 'the list is empty'}")
    if split != "train":
        raise UserError(f"split {split!r}: files that are given by name have no splits")
    return files[0], files


def _find_in_folder(folder: Path, split: str) -> tuple[Path, list[Path]]:
    files = list_files(folder)
    if any(path.suffix in TABLE_SUFFIXES for path in files):
        chosen = [path for path in files if _in_split(path.relative_to(folder), split)]
        if not any(path.suffix in TABLE_SUFFIXES for path in chosen):
            raise UserError(f"{folder} holds no files named after the split {split!r}")
        return folder, chosen
    # A folder of splits has sub-folders and no data of its own.
    own = any(path.parent == folder and _is_data(path) for path in files)
    part = folder / split
    if not own and part.is_dir():
        return part, list_files(part)
    if split != "train":
        raise UserError(f"{folder} has no sub-folder for the split {split!r}")
    return folder, files


def _in_split(name: Path, split: str) -> bool:
    """train-00000.parquet and train/00000.parquet are of `train`, and so are names of no split."""
    words = set(re.findall("[a-z]+", str(name).lower()))
    if "train" in words or not words & _OTHER_SPLITS:
        return split == "train"
    return split in words


def _is_data(path: Path) -> bool:
    return path.name == METADATA or path.suffix in TABLE_SUFFIXES or is_image(path)


def _check_one_kind(root: Path, files: Sequence[Path], suffix: str) -> None:
    others = [path for path in files if path.suffix != suffix and _is_data(path)]
    if others:
        raise UserError(
            f"{root} holds {suffix} files and also {others[0].name}, so the data set is not "
            f"clear. Give the files by name, such as '{root}/*{suffix}', or a folder of one kind"
        )

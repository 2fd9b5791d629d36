"""Options that describe captioned images. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionedImages:
    """A data set of captioned images, and how it is read."""

    source: str = ""
    """Folder of images with a metadata.jsonl (or .csv), or with a .txt (.caption) file next to each
    image (sub-folders and links to folders are read, too); parquet files; webdataset tars; a hub
    id; or "shapes", the built-in offline world (write ./shapes for a folder of that name).
    """
    split: str = "train"
    """Split of a hub data set or of a folder (the sub-folder or the files of this name)."""
    image_column: str | None = None
    """Column of the images. Default: found automatically if only one column is possible."""
    caption_column: str | None = None
    """Column of the captions, or of lists of alternative captions; "json.prompt" is the field
    "prompt" of the column "json". Default: text, caption, prompt or txt, if there is only one.
    """
    config_name: str | None = None
    """Configuration to use of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. Default: its main branch."""
    streaming: bool = False
    """Read hub and parquet data row by row, without a copy on disk."""
    outside_images: bool = False
    """Also use images that a metadata.jsonl or parquet file names outside its folder (by ../ or an
    absolute path, in parquet also by an address). Only for data that you trust.
    """

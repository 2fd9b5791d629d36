"""What a user says of captioned images. Without torch, so that programs show it in their --help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionedImages:
    """A data set of captioned images, and how it is read."""

    source: str = ""
    """Folder with metadata.jsonl or sidecar .txt (.caption) captions (sub-folders and links to
    folders are read, too), parquet, webdataset tars, a hub id, or "shapes" (offline; a folder of
    that name is ./shapes).
    """
    split: str = "train"
    """Split of a hub data set, or of a folder: its sub-folder, or the files named after it."""
    image_column: str | None = None
    """Column of the images; found by itself where it is clear."""
    caption_column: str | None = None
    """Column of the captions, or of lists of alternative ones; "json.prompt" is a field of one.
    Found by itself where it is clear: text, caption, prompt, txt.
    """
    config_name: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    streaming: bool = False
    """Read hub and parquet data row by row without a copy on disk."""
    outside_images: bool = False
    """Use images that a metadata.jsonl or a parquet file names outside its folder, by ../, an
    absolute path or an address: only for data that you trust.
    """

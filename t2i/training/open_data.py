"""Open a run's data, as `--data.source` names them; nothing is encoded yet."""

import os
from dataclasses import fields
from pathlib import Path

from t2i.data.captioned import CaptionedImages
from t2i.data.samples import RewrittenSource, Source
from t2i.data.sources.classes import LabelledFolder, find_classes
from t2i.data.sources.open_source import open_source
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes, is_llamagen_folder
from t2i.errors import UserError, nearest_path
from t2i.fields import told_options
from t2i.models.base import BackboneSpec
from t2i.training.config import DataOptions, LabelledOptions
from t2i.worlds import WORLDS, open_world


def refuse_inside(folder: Path, options: DataOptions | LabelledOptions) -> None:
    """UserError if a run folder lies inside the data's folder: its sheets would become part of the
    data, so that the run could not be resumed.
    """
    for source in [options.source] if isinstance(options, DataOptions) else options.source:
        if not source or source.partition(":")[0] in WORLDS:
            continue
        place = Path(os.path.expanduser(source))
        if isinstance(options, LabelledOptions) and (place / options.split).is_dir():
            place /= options.split
        images = place.is_dir() and not is_llamagen_folder(place)
        if images and folder.resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"run_dir={folder} lies in data.source={source}, so its sheets would be read as "
                "data: give a --run-dir elsewhere"
            )


# -- captions --------------------------------------------------------------------------------------
def open_data(options: DataOptions) -> Source:
    """Open captioned images; UserError says what is wrong with them."""
    if not options.source:
        raise UserError(
            "no data: give --data.source (a folder, parquet, webdataset tars or a hub id)"
        )
    name = options.source.partition(":")[0]
    source: Source
    if name in WORLDS:
        _refuse_without_effect(options, name)
        source = open_world(name).open_source(options.source)
    else:
        source = open_source(options)
    if options.trigger is None:
        return source
    # The second entry: earlier stores hold captions of which only the trigger words were read.
    identity = {"trigger": options.trigger, "only_trigger": "skipped"}
    return RewrittenSource(source, options.with_trigger, identity)


def _refuse_without_effect(options: DataOptions, world: str) -> None:
    """UserError for options on reading files if the source is a world, which has none."""
    of_files = {f.name for f in fields(CaptionedImages)} - {"source"}
    if told := told_options(options, of_files, "data."):
        raise UserError(
            f"{told} has no effect on {world}, which is drawn, not read from files: leave it out"
        )


# -- classes ---------------------------------------------------------------------------------------
def holds_codes(source: str | Path) -> bool:
    """Whether a source of classes holds pretokenized codes instead of images."""
    return is_llamagen_folder(Path(source)) or Path(source).suffix == ".jsonl"


def labelled_sources(options: LabelledOptions) -> list[Path]:
    """The paths in data.source: one of any kind, or several folders of LlamaGen's codes."""
    sources = [Path(source) for source in options.source]
    if not sources:
        raise UserError(
            "no data: give --data.source (a folder with train/<class>/, folders of LlamaGen's "
            "codes, or RAR's .jsonl)"
        )
    if len(sources) > 1 and not all(is_llamagen_folder(source) for source in sources):
        raise UserError(
            "data.source may name several places only if all are folders of LlamaGen's codes, not "
            + ", ".join(map(str, sources))
        )
    if not sources[0].exists():
        raise UserError(
            f"data.source: {sources[0]} is neither a folder nor a file{nearest_path(sources[0])}"
        )
    if sources[0].is_dir() and not is_llamagen_folder(sources[0]):
        find_classes(sources[0], options.split)  # raises if something is wrong with it
    return sources


def open_labelled(
    options: LabelledOptions, spec: BackboneSpec
) -> LabelledFolder | LlamaGenCodes | JsonlCodes:
    """Open images of classes, or their codes, as named by data.source."""
    sources = labelled_sources(options)
    if is_llamagen_folder(sources[0]):
        return LlamaGenCodes(*sources)
    if sources[0].suffix == ".jsonl":
        if len(spec.subvocabs) > 1:
            raise UserError(
                f"{sources[0]} has one number per code, but {spec.family} has "
                f"{len(spec.subvocabs)}: give the images instead"
            )
        return JsonlCodes(sources[0], vocab=spec.subvocabs[0], num_classes=spec.num_classes)
    images = LabelledFolder(sources[0], options.split)
    if len(images.classes) != spec.num_classes:
        raise UserError(
            f"{images.name} has {len(images.classes)} classes, but this {spec.family} backbone has "
            f"{spec.num_classes}: a label is a position in the sorted folder names, so every class "
            "needs a folder (an empty one will do)"
        )
    return images

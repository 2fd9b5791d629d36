"""Where a run's data come from: what `--data.source` names, opened; nothing is encoded yet."""

import os
from dataclasses import fields
from pathlib import Path

from t2i.data.captioned import CaptionedImages
from t2i.data.samples import RewrittenSource, Source
from t2i.data.sources.classes import LabelledFolder, find_classes
from t2i.data.sources.open_source import open_source
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes, is_llamagen_folder
from t2i.errors import UserError
from t2i.fields import given_options
from t2i.models.base import BackboneSpec
from t2i.training.config import DataOptions, LabelledOptions
from t2i.worlds import WORLDS, open_world


def refuse_inside(folder: Path, options: DataOptions | LabelledOptions) -> None:
    """UserError if a run folder lies where images are read: its sheets would become part of the
    data, which are others then when the run is resumed.
    """
    for source in [options.source] if isinstance(options, DataOptions) else options.source:
        place = Path(os.path.expanduser(source))
        if isinstance(options, LabelledOptions) and (place / options.split).is_dir():
            place /= options.split
        images = place.is_dir() and not is_llamagen_folder(place)
        if (
            source
            and images
            and source.partition(":")[0] not in WORLDS
            and folder.resolve().is_relative_to(place.resolve())
        ):
            raise UserError(
                f"run_dir={folder} lies in data.source={source}, so that its sheets would be read "
                "as data: give a --run-dir elsewhere"
            )


# -- captions --------------------------------------------------------------------------------------
def open_data(options: DataOptions) -> Source:
    """Captioned images, not yet encoded; UserError says what is wrong with them."""
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
    return RewrittenSource(source, options.with_trigger, {"trigger": options.trigger})


def _refuse_without_effect(options: DataOptions, world: str) -> None:
    """UserError for an option of how files are read, where there are none."""
    of_files = {f.name for f in fields(CaptionedImages)} - {"source"}
    if given := [name for name in given_options(options) if name in of_files]:
        told = ", ".join(f"data.{name}={getattr(options, name)}" for name in given)
        raise UserError(
            f"{told} has no effect on {world}, which is drawn and not read: leave it out"
        )


# -- classes ---------------------------------------------------------------------------------------
def holds_codes(source: str | Path) -> bool:
    """Whether a source of classes is codes that others computed, and no images."""
    return is_llamagen_folder(Path(source)) or Path(source).suffix == ".jsonl"


def labelled_sources(options: LabelledOptions) -> list[Path]:
    """What data.source names: one place, or several folders of LlamaGen's codes."""
    sources = [Path(source) for source in options.source]
    if not sources:
        raise UserError(
            "no data: give --data.source (a folder with train/<class>/, folders of LlamaGen's "
            "codes, or RAR's .jsonl)"
        )
    if len(sources) > 1 and not all(is_llamagen_folder(source) for source in sources):
        raise UserError(
            "data.source: only folders of LlamaGen's codes may be several, not "
            + ", ".join(map(str, sources))
        )
    if not sources[0].exists():
        raise UserError(f"data.source: {sources[0]} is no folder and no file")
    if sources[0].is_dir() and not is_llamagen_folder(sources[0]):
        find_classes(sources[0], options.split)  # says what is wrong with it
    return sources


def open_labelled(
    options: LabelledOptions, spec: BackboneSpec
) -> LabelledFolder | LlamaGenCodes | JsonlCodes:
    """Images of classes or their codes, whatever data.source names. Encodes nothing."""
    sources = labelled_sources(options)
    if is_llamagen_folder(sources[0]):
        return LlamaGenCodes(*sources)
    if sources[0].suffix == ".jsonl":
        if len(spec.subvocabs) > 1:
            raise UserError(
                f"{sources[0]} has one number per code, {spec.family} has {len(spec.subvocabs)}: "
                "give the images"
            )
        return JsonlCodes(sources[0], vocab=spec.subvocabs[0], num_classes=spec.num_classes)
    images = LabelledFolder(sources[0], options.split)
    if len(images.classes) != spec.num_classes:
        raise UserError(
            f"{images.name} has {len(images.classes)} classes and this {spec.family} backbone "
            f"{spec.num_classes}: labels are positions of the sorted folder names, so all classes "
            "must be there (an empty folder will do)"
        )
    return images

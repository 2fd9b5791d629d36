"""What a run is trained on: images that were encoded once, each with its condition.

A `TrainingData` orders, splits and batches examples and knows nothing else of them. There are two
kinds: captioned images, and images with a class. Both are built by all processes together, and by a
run that was killed go on where it stopped.

Shapes: B samples, T image tokens, S sub-tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from t2i.data.cache import CodeCache, build_cache, cache_key
from t2i.data.code_array import CodeArray
from t2i.data.samples import Sample, Source
from t2i.data.sources.classes import LabelledFolder, extract_codes, find_classes, open_imagenet
from t2i.data.sources.open_source import open_source
from t2i.data.sources.pretokenized import LlamaGenCodes, convert_jsonl, is_llamagen_folder
from t2i.data.views import Views
from t2i.errors import UserError
from t2i.loading import tokenizer_hash
from t2i.models.base import Backbone
from t2i.processes import Processes
from t2i.shapes.shapes_source import parse_shapes
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig

log = logging.getLogger(__name__)


class Examples(Protocol):
    """Encoded images with their conditions.

    Attributes:
        key: identifies the content, for resume.
    """

    key: str

    def __len__(self) -> int: ...

    def same_images(self) -> Tensor | None:
        """int64 [n], equal for examples that show the same image; None if all images are different,
        as far as known.
        """

    def name(self, index: int) -> str:
        """What a sample is called in its source."""

    def load(self, indices: Tensor, choice: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes int64 [B, T, S] and conditions as `Backbone.prepare` gives them, on any device.

        `choice` int64 [B] are random numbers that choose among several captions or views of an
        image; the first if None.
        """

    def condition(self, index: int) -> str | int:
        """The (first) caption or the class of one sample."""


def open_examples(
    config: TrainConfig,
    backbone: Backbone,
    processes: Processes,
    expected_key: str | None = None,
) -> Examples:
    """Encode a run's data, or find that done. Every process calls it and does its share.

    Args:
        expected_key: of the data that a resumed run was trained on.

    Raises:
        UserError: something is wrong with the data, it is not of the backbone's kind, or not what
            was expected.
    """
    if isinstance(config.data, LabelledOptions):
        return Labelled(config.data, backbone, processes)
    return Captioned(config.data, backbone, processes, expected_key)


def check_backbone(backbone: Backbone, options: DataOptions | LabelledOptions) -> None:
    """UserError if this backbone cannot be trained on such data."""
    backbone.tokenizer  # noqa: B018 (raises where there is none)
    if isinstance(options, DataOptions):
        backbone.caption_features()
    elif backbone.spec.cond_kind != "class":
        raise UserError(
            f"this {backbone.spec.family} backbone draws captions: it cannot be trained on classes"
        )


def image_size(backbone: Backbone) -> int:
    """Side in pixels of the (square) images that the backbone draws."""
    height, width = backbone.image_size
    if height != width:
        raise UserError(f"training needs square images, this backbone has {height} x {width}")
    return height


def say_what_is_odd(usable: int, seen: int, lines: Sequence[str], folder: Path) -> None:
    """Warn about images that are not trained on, and captions that are not what their authors
    wrote.
    """
    if lines:
        where = f"more in {folder / 'report.json'} and skipped.jsonl"
        log.warning(f"{usable} of {seen} samples are used; {'; '.join(lines)} ({where})")


# -- captions --------------------------------------------------------------------------------------
def open_data(options: DataOptions) -> Source:
    """Captioned images, not yet encoded; UserError says what is wrong with them."""
    if not options.source:
        raise UserError(
            "no data: give --data.source (a folder, parquet, webdataset tars or a hub id)"
        )
    source = parse_shapes(options.source) or open_source(
        options.source,
        image_column=options.image_column,
        caption_column=options.caption_column,
        split=options.split,
        streaming=options.streaming,
        config_name=options.config_name,
        revision=options.revision,
    )
    return source if options.trigger is None else TriggeredSource(source, options)


class TriggeredSource(Source):
    """A source whose captions all have the trigger words of `DataOptions.trigger`."""

    def __init__(self, source: Source, options: DataOptions):
        identity = {**source.identity, "trigger": options.trigger}
        super().__init__(source.name, identity, source.length)
        self.left_out, self.remarks = source.left_out, source.remarks
        self._source, self._options = source, options

    def files(self) -> list[tuple[str, Path]]:
        return self._source.files()

    def __getitem__(self, index: int) -> Sample:
        return self._triggered(self._source[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._triggered, self._source)

    def _triggered(self, sample: Sample) -> Sample:
        return replace(sample, captions=[self._options.with_trigger(c) for c in sample.captions])


class Captioned:
    """Images with captions, in a code cache."""

    def __init__(
        self,
        options: DataOptions,
        backbone: Backbone,
        processes: Processes,
        expected_key: str | None = None,
    ):
        check_backbone(backbone, options)
        features = backbone.caption_features()
        device = backbone.device

        def encode_images(pixels: Tensor) -> Tensor:
            return backbone.encode_images(pixels.to(device)).cpu()

        def encode_captions(captions: list[str]) -> list[Tensor]:
            return [encoded.cpu() for encoded in features.encode(captions)]

        self.backbone, self.features = backbone, features
        folder = build_cache(
            open_data(options),
            options.cache_dir,
            encode_images=encode_images,
            encode_captions=None if features is None else encode_captions,
            key_parts={
                "tokenizer": tokenizer_hash(backbone),
                **({} if features is None else features.key),
            },
            resolution=image_size(backbone),
            caption_notes=backbone.caption_notes,
            expected_key=expected_key,
            max_samples=options.max_samples,
            small_images=options.small_images,
            processes=processes,
        )
        self.cache = CodeCache(folder)
        self.key = folder.name
        if processes.is_main:
            report = self.cache.manifest["report"]
            say_what_is_odd(report["usable"], report["seen"], report["lines"], folder)

    def __len__(self) -> int:
        return len(self.cache)

    def same_images(self) -> Tensor:
        return self.cache.same_images()

    def name(self, index: int) -> str:
        return self.cache.key(index)

    def load(self, indices: Tensor, choice: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        codes = self.cache.codes(indices)
        if self.features is None:
            picked = [0] * len(indices) if choice is None else choice.tolist()
            pairs = zip(indices.tolist(), picked, strict=True)
            return codes, self.backbone.prepare([self.cache.caption(i, c) for i, c in pairs])
        padded, mask = self.cache.text(indices, self.backbone.spec.prefix_tokens, choice)
        features = [row[own] for row, own in zip(padded, mask, strict=True)]
        return codes, self.backbone.collate_features(features)

    def condition(self, index: int) -> str:
        return self.cache.caption(index)


# -- classes ---------------------------------------------------------------------------------------
class Labelled:
    """Images with a class: an ImageNet folder that is encoded once, or codes that others
    computed.
    """

    def __init__(self, options: LabelledOptions, backbone: Backbone, processes: Processes):
        check_backbone(backbone, options)
        self.backbone = backbone
        opened = open_labelled(options, backbone)
        if isinstance(opened, LlamaGenCodes):
            self.codes = opened
            self.key = cache_key(opened.identity)
        else:
            folder = _encode(opened, options, backbone, processes)
            self.codes, self.key = CodeArray(folder), folder.name
            if processes.is_main:
                facts = self.codes.manifest
                if facts["skipped"]:
                    log.warning(
                        f"{facts['usable']} of {facts['shape'][0]} images are used; the others are listed in "
                        f"{folder / 'skipped.jsonl'}"
                    )
        self._check()

    def _check(self) -> None:
        """UserError if these are no codes of this backbone."""
        spec = self.backbone.spec
        shape = tuple(self.codes.codes([0], [0]).shape[1:])
        if shape != (spec.num_tokens, len(spec.subvocabs)):
            raise UserError(
                f"an image has {shape[0]} x {shape[1]} codes (positions, sub-tokens), this {spec.family} backbone "
                f"{spec.num_tokens} x {len(spec.subvocabs)}: they are of another tokenizer or resolution"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def same_images(self) -> None:
        """Every image is an example of its own; its views are not."""

    def name(self, index: int) -> str:
        return f"class {int(self.codes.labels([index])[0])}"  # an array of codes keeps no names

    def load(self, indices: Tensor, choice: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        view = torch.zeros_like(indices) if choice is None else choice
        codes = self.codes.codes(indices, view)
        if (
            codes >= torch.tensor(self.backbone.spec.subvocabs)
        ).any():  # a GPU would only say "assert"
            raise UserError(
                f"the data has the code {int(codes.max())}, this backbone {self.backbone.spec.subvocabs}: they are of "
                "another tokenizer"
            )
        return codes, self.backbone.prepare(self.codes.labels(indices))

    def condition(self, index: int) -> int:
        return int(self.codes.labels(torch.tensor([index]))[0])


def labelled_sources(options: LabelledOptions) -> list[Path]:
    """What data.source names: one place, or several folders of LlamaGen's codes; UserError if it is
    neither, or not there.
    """
    sources = [Path(source) for source in options.source]
    if not sources:
        raise UserError(
            "no data: give --data.source (a folder with train/<class>/, folders of LlamaGen's codes, or RAR's .jsonl)"
        )
    if len(sources) > 1 and not all(is_llamagen_folder(source) for source in sources):
        raise UserError(
            f"data.source: only folders of LlamaGen's codes may be several, not {', '.join(map(str, sources))}"
        )
    if not sources[0].exists():
        raise UserError(f"data.source: {sources[0]} is no folder and no file")
    if sources[0].is_dir() and not is_llamagen_folder(sources[0]):
        find_classes(sources[0], options.split)  # says what is wrong with it
    return sources


def open_labelled(
    options: LabelledOptions, backbone: Backbone
) -> LabelledFolder | LlamaGenCodes | Path:
    """Images of classes or their codes, whatever data.source names; a path is RAR's .jsonl. Encodes
    nothing.

    Raises:
        UserError: nothing there, or not what this backbone is trained on.
    """
    spec, sources = backbone.spec, labelled_sources(options)
    if is_llamagen_folder(sources[0]):
        return LlamaGenCodes(*sources)
    if sources[0].suffix == ".jsonl":
        if len(spec.subvocabs) > 1:
            raise UserError(
                f"{sources[0]} has one number per code, {spec.family} has {len(spec.subvocabs)}: give the images"
            )
        return sources[0]
    images = open_imagenet(sources[0], options.split)
    if len(images.classes) != spec.num_classes:
        raise UserError(
            f"{images.root} has {len(images.classes)} classes and this {spec.family} backbone {spec.num_classes}: labels are "
            "positions of the sorted folder names, so all classes must be there (an empty folder will do)"
        )
    return images


def _encode(
    opened: LabelledFolder | Path,
    options: LabelledOptions,
    backbone: Backbone,
    processes: Processes,
) -> Path:
    """The folder of the array of codes, complete."""
    spec = backbone.spec
    if isinstance(opened, Path):
        return convert_jsonl(
            opened,
            options.cache_dir,
            vocab=spec.subvocabs[0],
            num_classes=spec.num_classes,
            processes=processes,
        )

    def encode_images(pixels: Tensor) -> Tensor:
        return backbone.encode_images(pixels.to(backbone.device)).cpu()

    return extract_codes(
        opened,
        options.cache_dir,
        encode_images=encode_images,
        key_parts={"tokenizer": tokenizer_hash(backbone)},
        resolution=image_size(backbone),
        code_shape=(spec.num_tokens, len(spec.subvocabs)),
        vocab=max(spec.subvocabs),
        views=Views(options.views, options.crop_ranges),
        processes=processes,
    )

"""What a run is trained on: images that were encoded once, each with its captions or its class.

A `TrainingData` orders, splits and batches examples and knows nothing else of them. All processes
encode them together, and a run that was killed goes on where it stopped.

Shapes: B samples, T image tokens, S sub-tokens.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from t2i.data.encoding import Encoding, build_store
from t2i.data.images import ImageRules, Views
from t2i.data.samples import RewrittenSource, Source
from t2i.data.sources.classes import LabelledFolder, find_classes, open_imagenet
from t2i.data.sources.open_source import open_source
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes, is_llamagen_folder
from t2i.data.store import CodeStore
from t2i.errors import UserError
from t2i.loading import tokenizer_hash
from t2i.models.base import Backbone, BackboneSpec
from t2i.processes import Processes
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.worlds import WORLDS, open_world

log = logging.getLogger(__name__)

IMAGES_PER_SHARD = 1024
_AT_ONCE = {DataOptions: 32, LabelledOptions: 64}  # views per call of the image tokenizer
_LINES_PER_SHARD = 8192  # of codes that others computed, one view each


class Examples:
    """A run's data, encoded; every process makes it and does its share.

    Args:
        source: captioned images that are open already; opened now if None.
        expected_key: of the data that a resumed run was trained on.

    Attributes:
        store: the images' codes, with the captions or the class of each.

    Raises:
        UserError: something is wrong with the data, it is not of the backbone's kind, or not what
            was expected.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        processes: Processes,
        source: Source | None = None,
        expected_key: str | None = None,
    ):
        options = config.data
        check_backbone(backbone, options)
        self.backbone, self._features = backbone, None
        opened: Source | LlamaGenCodes
        if isinstance(options, DataOptions):
            self._features, opened = backbone.caption_features(), source or open_data(options)
        else:
            opened = open_labelled(options, backbone)
        self.store: CodeStore | LlamaGenCodes
        if isinstance(opened, LlamaGenCodes):
            self.store = opened
        else:
            encoding = self._encoding(opened, options)
            folder = build_store(
                opened, options.cache_dir, encoding, expected_key=expected_key, processes=processes
            )
            self.store = CodeStore(folder)
            if processes.is_main:
                _say_what_is_odd(self.store)
        _check_codes(self.store.codes([0]), backbone.spec)

    @property
    def key(self) -> str:
        """Identifies the content, for resume."""
        return self.store.key

    def __len__(self) -> int:
        return len(self.store)

    def load(self, indices: Tensor, choice: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes int64 [B, T, S] and conditions as `Backbone.prepare` gives them, on any device.

        `choice` int64 [B] are random numbers that choose among several captions or views of an
        image; the first if None.
        """
        codes = self.store.codes(indices, choice)
        _check_codes(codes, self.backbone.spec)
        if self._features is not None:
            assert isinstance(self.store, CodeStore), "others store no features"
            length = self.backbone.spec.prefix_tokens
            features = self.store.features(indices, length, choice)
            return codes, self.backbone.collate_features(features)
        picked = torch.zeros_like(indices) if choice is None else choice
        pairs = zip(indices.tolist(), picked.tolist(), strict=True)
        return codes, self.backbone.prepare([self.store.condition(i, c) for i, c in pairs])

    def _encoding(self, source: Source, options: DataOptions | LabelledOptions) -> Encoding:
        """How a source of images, or of codes, becomes a store."""
        if isinstance(source, JsonlCodes):
            return Encoding(lambda codes: codes, None, shard_size=_LINES_PER_SHARD)
        backbone, features = self.backbone, self._features

        def encode_images(pixels: Tensor) -> Tensor:
            codes = backbone.encode_images(pixels.to(backbone.device)).cpu()
            _check_codes(codes, backbone.spec)
            return codes

        def encode_captions(captions: list[str]) -> list[Tensor]:
            assert features is not None
            return [encoded.cpu() for encoded in features.encode(captions)]

        key, size = {"tokenizer": tokenizer_hash(backbone)}, image_size(backbone)
        if isinstance(options, LabelledOptions):
            views = Views(options.views, options.crop_ranges)
            rules = ImageRules(size, views, small="upscale")
            return Encoding(
                encode_images,
                rules,
                key=key,
                batch_size=_AT_ONCE[LabelledOptions],
                shard_size=IMAGES_PER_SHARD,
            )
        return Encoding(
            encode_images,
            ImageRules(size, small=options.small_images),
            captions=None if features is None else encode_captions,
            caption_notes=backbone.caption_notes,
            key=key if features is None else key | features.key,
            max_samples=options.max_samples,
            batch_size=_AT_ONCE[DataOptions],
            shard_size=IMAGES_PER_SHARD,
        )


def views_of(options: DataOptions | LabelledOptions) -> int:
    """How many views of an image are encoded."""
    if isinstance(options, DataOptions):
        return 1
    return Views(options.views, options.crop_ranges).count


def encoded_at_once(options: DataOptions | LabelledOptions, samples: int | None) -> int:
    """Views per call of the image tokenizer; None samples are more than that."""
    views, most = views_of(options), _AT_ONCE[type(options)]
    whole = max(1, most // views) * views
    return whole if samples is None else min(whole, views * samples)


def _check_codes(codes: Tensor, spec: BackboneSpec) -> None:
    """UserError if codes [B, T, S] are not of this backbone; a GPU would only say "assert"."""
    positions, subtokens = codes.shape[1:]
    if (positions, subtokens) != (spec.num_tokens, len(spec.subvocabs)):
        raise UserError(
            f"an image has {positions} x {subtokens} codes (positions, sub-tokens), this "
            f"{spec.family} backbone {spec.num_tokens} x {len(spec.subvocabs)}: they are of "
            "another tokenizer or resolution"
        )
    if (codes < 0).any() or (codes >= torch.tensor(spec.subvocabs)).any():
        raise UserError(
            f"the data has codes from {int(codes.min())} to {int(codes.max())}, this "
            f"{spec.family} backbone {spec.subvocabs}: they are of another tokenizer"
        )


def _say_what_is_odd(store: CodeStore) -> None:
    """Warn about images that are not used, and captions that are not what their authors wrote."""
    report = store.manifest["report"]
    if report["lines"]:
        where = f"more in {store.folder / 'report.json'} and skipped.jsonl"
        said = "; ".join(report["lines"])
        log.warning(f"{report['usable']} of {report['seen']} samples are used; {said} ({where})")


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


# -- captions --------------------------------------------------------------------------------------
def open_data(options: DataOptions) -> Source:
    """Captioned images, not yet encoded; UserError says what is wrong with them."""
    if not options.source:
        raise UserError(
            "no data: give --data.source (a folder, parquet, webdataset tars or a hub id)"
        )
    source: Source
    if (name := options.source.partition(":")[0]) in WORLDS:
        source = open_world(name).open_source(options.source)
    else:
        source = open_source(
            options.source,
            image_column=options.image_column,
            caption_column=options.caption_column,
            split=options.split,
            streaming=options.streaming,
            config_name=options.config_name,
            revision=options.revision,
        )
    if options.trigger is None:
        return source
    return RewrittenSource(source, options.with_trigger, {"trigger": options.trigger})


# -- classes ---------------------------------------------------------------------------------------
def labelled_sources(options: LabelledOptions) -> list[Path]:
    """What data.source names: one place, or several folders of LlamaGen's codes.

    Raises:
        UserError: it is neither, or not there.
    """
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
    options: LabelledOptions, backbone: Backbone
) -> LabelledFolder | LlamaGenCodes | JsonlCodes:
    """Images of classes or their codes, whatever data.source names. Encodes nothing.

    Raises:
        UserError: nothing there, or not what this backbone is trained on.
    """
    spec, sources = backbone.spec, labelled_sources(options)
    if is_llamagen_folder(sources[0]):
        return LlamaGenCodes(*sources)
    if sources[0].suffix == ".jsonl":
        if len(spec.subvocabs) > 1:
            raise UserError(
                f"{sources[0]} has one number per code, {spec.family} has {len(spec.subvocabs)}: "
                "give the images"
            )
        return JsonlCodes(sources[0], vocab=spec.subvocabs[0], num_classes=spec.num_classes)
    images = open_imagenet(sources[0], options.split)
    if len(images.classes) != spec.num_classes:
        raise UserError(
            f"{images.name} has {len(images.classes)} classes and this {spec.family} backbone "
            f"{spec.num_classes}: labels are positions of the sorted folder names, so all classes "
            "must be there (an empty folder will do)"
        )
    return images

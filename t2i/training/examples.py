"""The examples that a run is trained on: images encoded once, each with its captions or class.

All processes share the encoding; after a kill it continues where it stopped.

Shapes: B samples, T image tokens, S sub-tokens.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from t2i.data.encoding import Encoding, build_store
from t2i.data.images import ImageRules, Views
from t2i.data.samples import Source
from t2i.data.sources.pretokenized import JsonlCodes, LlamaGenCodes
from t2i.data.store import CodeStore
from t2i.errors import UserError
from t2i.loading import tokenizer_hash
from t2i.models.base import Backbone, in_parts
from t2i.processes import Processes
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.training.open_data import open_data, open_labelled

log = logging.getLogger(__name__)

IMAGES_PER_SHARD = 1024
_AT_ONCE = {DataOptions: 32, LabelledOptions: 64}  # views that are loaded together
_LINES_PER_SHARD = 8192  # for pretokenized codes, one view each


def encode_examples(
    config: TrainConfig,
    backbone: Backbone,
    processes: Processes,
    source: Source | None = None,
    expected_key: str | None = None,
) -> CodeStore | LlamaGenCodes:
    """Encode a run's data, or open them if encoded already; every process calls it and does its
    share.

    Args:
        source: captioned images that are already open; None: open them now.
        expected_key: the key of the data that a resumed run was trained on.
    """
    options = config.data
    check_backbone(backbone, options)
    opened: Source | LlamaGenCodes
    if isinstance(options, DataOptions):
        opened = source or open_data(options)
    else:
        opened = open_labelled(options, backbone.spec)
    store: CodeStore | LlamaGenCodes
    if isinstance(opened, LlamaGenCodes):
        store = opened
    else:
        encoding = _encoding(backbone, opened, options)
        folder = build_store(
            opened, options.cache_dir, encoding, expected_key=expected_key, processes=processes
        )
        store = CodeStore(folder)
        if processes.is_main:
            _warn_of_skipped(store)
    backbone.spec.check_codes(store.codes([0]))
    return store


def _encoding(
    backbone: Backbone, source: Source, options: DataOptions | LabelledOptions
) -> Encoding:
    """How a source of images or codes is turned into a store."""
    if isinstance(source, JsonlCodes):
        return Encoding(lambda codes: codes, None, shard_size=_LINES_PER_SHARD)

    def encode_images(pixels: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 changes codes
            codes = in_parts(
                backbone.encode_images, pixels.to(backbone.device), backbone.images_at_once
            ).cpu()
        backbone.spec.check_codes(codes)
        return codes

    size, views = image_size(backbone), views_of(options)
    rules = ImageRules(
        size, views, options.small_images if isinstance(options, DataOptions) else "upscale"
    )
    encoding = Encoding(
        encode_images,
        rules,
        key={"tokenizer": tokenizer_hash(backbone)},
        batch_size=_AT_ONCE[type(options)],
        shard_size=IMAGES_PER_SHARD,
    )
    if isinstance(options, LabelledOptions):
        return encoding
    features = backbone.caption_features()
    return replace(
        encoding,
        captions=None if features is None else features.encode,
        caption_notes=backbone.caption_notes,
        key=encoding.key if features is None else encoding.key | features.key,
        max_samples=options.max_samples,
    )


def views_of(options: DataOptions | LabelledOptions) -> Views:
    """Which views of an image are encoded."""
    if isinstance(options, DataOptions):
        return Views(options.views)
    return Views(options.views, options.crop_ranges)


def encoded_at_once(
    backbone: Backbone, options: DataOptions | LabelledOptions, samples: int | None
) -> int:
    """Views per call of the image tokenizer; samples: of the whole data set, None if unknown."""
    views, most = views_of(options).count, _AT_ONCE[type(options)]
    whole = max(1, most // views) * views
    loaded = whole if samples is None else min(whole, views * samples)
    return min(loaded, backbone.images_at_once)


def _warn_of_skipped(store: CodeStore) -> None:
    """Warn about images that are not used, and captions that were changed by cleaning."""
    report = store.manifest["report"]
    if report["lines"]:
        where = f"more in {store.folder / 'report.json'} and skipped.jsonl"
        said = "; ".join(report["lines"])
        log.warning(f"{report['usable']} of {report['seen']} samples are used; {said} ({where})")


def check_backbone(backbone: Backbone, options: DataOptions | LabelledOptions) -> None:
    """UserError if this backbone cannot be trained on such data."""
    backbone.tokenizer  # noqa: B018 (raises if there is none)
    if isinstance(options, DataOptions):
        backbone.caption_features()
    elif backbone.spec.cond_kind != "class":
        raise UserError(
            f"this {backbone.spec.family} backbone draws captions: it cannot be trained on classes"
        )


def image_size(backbone: Backbone) -> int:
    """Side in pixels of the backbone's images, which must be square."""
    height, width = backbone.image_size
    if height != width:
        raise UserError(f"training needs square images, this backbone has {height} x {width}")
    return height

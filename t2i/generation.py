"""Prompts to images: batching, per-image random numbers, decoding to pixels."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.base import Backbone
from t2i.models.conditions import check_captions, class_ids
from t2i.products import generates_products
from t2i.progress import progress_bar
from t2i.rng import make_keys
from t2i.sampling import (
    DrawOptions,
    SamplingConfig,
    Speculate,
    Speed,
    check_counts,
    check_speculate,
    check_whole,
)
from t2i.tensorar.model import TensorAR
from t2i.tensorar.room import gpu_bytes, images_that_fit
from t2i.tensorar.sampler import drawn_windows, sample_windows
from t2i.tensorar.speed import choose
from t2i.tensorar.windows import Windows

log = logging.getLogger(__name__)

SPECULATION_PAYS = {"eager": 12, "compiled": 8}
"""Windows of an image drawn per call with `speculate="auto"`, by speed. Used on a CPU for single
images of models that predict one code a step (docs/fewer_steps.md); no gain was seen elsewhere,
nor in compiled steps whose products torch generates. It is a fixed rule, not a timing at run time,
so that a command draws the same bits every time.
"""

USUAL_BATCH = 16
"""Images of prompts that are usually drawn at once."""
_MOST_WARNINGS = 20
"""Most warnings about prompts read only in part: more would hide everything else in the log."""
_MOST_IMAGES = 10_000_000
"""Most images per request: their list of jobs takes about a gigabyte."""

Job = tuple[int, int]
"""Prompt index and sample index. An image's random numbers depend only on these and the seed."""

OnWindow = Callable[[Sequence[Job], Tensor, int], None]
"""Called each time a window is settled, with the jobs of the batch, the current state of all their
windows [B, N, k, S] (read only: do not modify) and the number of windows settled.
"""


@dataclass(frozen=True)
class Drawn:
    """One drawn image."""

    prompt_index: int
    sample_index: int
    prompt: str | int
    image: Image.Image
    windows: Tensor
    """All windows, int64 [N, k, S]."""
    stages: tuple[Image.Image, ...] = ()
    """The image at refinement stage 1 .. last, if requested."""
    stage_codes: Tensor | None = None
    """The codes of `stages`, int64 [stages, T, S]."""

    @property
    def job(self) -> Job:
        return self.prompt_index, self.sample_index


def all_jobs(prompts: Iterable[int], samples: int) -> list[Job]:
    """List the jobs for `samples` images of each prompt index, prompt by prompt.

    Raises:
        UserError: too many images for one request.
    """
    prompts = list(prompts)
    if len(prompts) * samples > _MOST_IMAGES:
        raise UserError(
            f"{len(prompts)} prompts with {samples} samples each are more than the "
            f"{_MOST_IMAGES:,} images that can be drawn in one go"
        )
    return [(p, s) for p in prompts for s in range(samples)]


def draw_images(
    model: TensorAR,
    prompts: Sequence[str | int],
    options: DrawOptions | None = None,
    *,
    samples_per_prompt: int = 1,
    jobs: Sequence[Job] | None = None,
    progress: bool = True,
    watch: OnWindow | None = None,
) -> Iterator[Drawn]:
    """Draw images one batch at a time, in the order of `jobs`.

    An image's random numbers depend on (seed, prompt index, sample index) only. Every batch has the
    same number of rows (the last one is padded), so that all images of a request larger than a
    batch are computed with the same matrix shapes, and sharding the request changes no bit.
    Different batch sizes round differently.

    Args:
        prompts: captions, or class ids for a class-conditional backbone.
        jobs: `samples_per_prompt` of every prompt if None.
        watch: called while images are drawn (see `OnWindow`); may raise to stop drawing.
    """
    options = options or DrawOptions()
    prompts = check_request(model, prompts, samples_per_prompt)
    sampling = options.sampling or model.sampling
    geometry = drawn_windows(model, sampling)
    jobs = all_jobs(range(len(prompts)), samples_per_prompt) if jobs is None else list(jobs)
    _warn_of_prompts(model.backbone, [prompts[p] for p in sorted({p for p, _ in jobs})])
    batch_size = max(1, min(images_per_batch(model, options), len(jobs)))
    # The length for all prompts, not only this batch's or process's: padding is masked, but its
    # length affects rounding.
    length = model.backbone.prefix_length(prompts)
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    steps = len(batches) * geometry.count
    speed, speculate = choose_run(model, options, len(batches), batch_size)
    bar = progress_bar(total=steps, unit="step", desc="drawing", disable=not progress)
    with bar:
        for batch in batches:
            rows = batch + [batch[-1]] * (batch_size - len(batch))
            prepared = model.backbone.prepare([prompts[p] for p, _ in rows], length)
            keys = make_keys(options.seed, *torch.tensor(rows).T)
            on_step = _on_step(batch, bar, watch)
            windows = sample_windows(model, prepared, keys, sampling, on_step, speed, speculate)
            windows = windows[: len(batch)]
            images = to_images(model, geometry.final_codes(windows), options.size)
            staged = (
                _staged(model, geometry, windows, options.size)
                if options.stages
                else [((), None)] * len(batch)
            )
            for i, (p, s) in enumerate(batch):
                yield Drawn(p, s, prompts[p], images[i], windows[i].cpu(), *staged[i])


def _on_step(batch: Sequence[Job], bar: Any, watch: OnWindow | None) -> Callable[[Tensor], None]:
    """A callback for `sample_windows` that advances the progress bar and calls `watch`."""
    settled = 0

    def advance(windows: Tensor) -> None:
        nonlocal settled
        settled += 1
        bar.update()
        if watch is not None:
            watch(batch, windows[: len(batch)], settled)

    return advance


def asked_ahead(model: TensorAR, options: DrawOptions) -> Speculate:
    """The `speculate` setting of the options or, if they have none, of the model."""
    asked = model.speculate if options.speculate is None else options.speculate
    check_speculate(asked)
    return asked


def choose_run(
    model: TensorAR, options: DrawOptions, batches: int, images: int
) -> tuple[Speed, int]:
    """Choose how to draw `batches` batches of `images` images: the speed, and the number of windows
    of each image drawn per call (0 means one, without speculation).
    """
    device = model.backbone.device
    sampling = options.sampling or model.sampling
    windows = drawn_windows(model, sampling).count
    steps = batches * windows
    speed = choose(options.speed or model.speed, device, steps)
    asked = asked_ahead(model, options)
    if asked != "auto":
        most = 0 if asked == "off" else min(asked, windows)  # room is made for all of them
        return speed, most if most > 1 else 0
    pays = device.type == "cpu" and model.windows.size == 1 and images == 1
    if pays and speed == "compiled":
        pays = not generates_products(next(model.parameters()).dtype)
    return speed, SPECULATION_PAYS[speed] if pays else 0


def images_per_batch(model: TensorAR, options: DrawOptions, usual: int = USUAL_BATCH) -> int:
    """How many images are drawn at once: as the options say, or else `usual`, or as many as fit.

    The size of the GPU decides, not what is free on it, so a command draws the same batches every
    time.
    """
    if options.batch_size is not None:
        return options.batch_size
    if (memory := gpu_bytes(model.backbone.device)) is None:
        return usual
    fitting = images_that_fit(model, options.sampling or model.sampling, memory)
    if fitting < usual:
        log.info(f"drawing {fitting} images at once: the GPU has too little memory for {usual}")
    return min(fitting, usual)


def unpadded(model: TensorAR, options: DrawOptions, images: int) -> DrawOptions:
    """The options for a request of this many images in all: batches are no larger."""
    return replace(options, batch_size=min(images_per_batch(model, options), images))


def check_request(
    model: TensorAR, prompts: Iterable[str | int], samples_per_prompt: int
) -> list[str | int]:
    """The prompts as a list; UserError if an argument of `generate` has the wrong type."""
    if isinstance(model, Backbone):
        raise UserError(
            "generate needs a TensorAR model, but got a plain backbone: "
            "wrap it in t2i.attach(backbone, t2i.presets.base())"
        )
    if isinstance(model, nn.Module) and any(
        isinstance(m, TensorAR) for m in [*model.modules()][1:]
    ):
        raise UserError(
            f"generate needs the model itself, which is inside of this {type(model).__name__}: "
            "keep it under a name of its own, and give that"
        )
    if not isinstance(model, TensorAR):
        raise UserError(
            f"generate needs a model, but got {model!r:.80}: "
            "load one with t2i.from_pretrained(folder)"
        )
    if model.training:
        raise UserError("the model is in training mode, with dropout: call model.eval() first")
    if not isinstance(model.sampling, SamplingConfig):
        raise UserError(f"model.sampling is {model.sampling!r:.80}: set a t2i.SamplingConfig")
    # A set and a dict have no order or numbers that images could be keyed by, and a table of pandas
    # would give the names of its columns.
    unordered = isinstance(prompts, str | bytes | Set | Mapping)
    if unordered or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) != 1:
        classes = model.backbone.spec.cond_kind == "class"
        kind = "[207]" if classes else '["a photo of a red circle"]'
        raise UserError(f"prompts must be a list, but are {prompts!r:.80}: generate(model, {kind})")
    prompts = list(prompts)  # by place: a pandas column is keyed by its own labels
    if model.backbone.spec.cond_kind == "text":
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UserError(f"prompts[{place}] is {prompt!r:.80}: this model draws captions")
    check_whole(samples_per_prompt=samples_per_prompt)
    check_counts(samples_per_prompt=samples_per_prompt)
    return prompts


def _warn_of_prompts(backbone: Backbone, prompts: Sequence[str | int]) -> None:
    """Warn, once for each prompt, about the parts of it that the backbone does not read."""
    if backbone.spec.cond_kind != "text":
        return
    captions = [str(prompt) for prompt in prompts]
    for prompt, lost in zip(captions, backbone.caption_notes(captions), strict=True):
        said = "has no text the encoder can read" if lost is None else "; ".join(lost)
        if not said or prompt in backbone.frozen.warned:
            continue
        backbone.frozen.warned.add(prompt)
        if lost is not None:
            backbone.frozen.read_in_part += 1
            if backbone.frozen.read_in_part == _MOST_WARNINGS + 1:
                log.warning("further prompts that are only read in part are not listed")
            if backbone.frozen.read_in_part > _MOST_WARNINGS:
                continue
        log.warning(f"prompt {prompt!r:.200}: {said}")


def parse_conditions(backbone: Backbone, texts: Sequence[str]) -> list[str | int]:
    """Convert typed prompts to captions or class ids, for `prepare`; UserError if invalid."""
    if backbone.spec.cond_kind == "text":
        check_captions(texts, "prompts")
        return list(texts)
    ids = [int(text) if text.isdecimal() else text for text in texts]
    return class_ids(ids, backbone.spec.num_classes).tolist()


def generate(
    model: TensorAR,
    prompts: Sequence[str | int],
    *,
    seed: int = 0,
    samples_per_prompt: int = 1,
    sampling: SamplingConfig | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Draw images of prompts: PIL images, RGB, prompt by prompt.

    Args:
        model: from `t2i.from_pretrained`, or a base: `t2i.attach(backbone, t2i.presets.base())`.
        prompts: captions, or class ids for a class-conditional backbone.
        seed: an image depends only on (seed, prompt index, sample index).
        samples_per_prompt: images of each prompt.
        sampling: how codes are drawn; the model's own settings (`model.sampling`) if None.
        batch_size: images drawn at once; None: 16, or fewer if the GPU has too little memory.
        progress: show a bar.

    Raises:
        UserError: an argument has the wrong type or is out of range.
    """
    options = DrawOptions(seed, sampling, batch_size)
    drawn = draw_images(
        model, prompts, options, samples_per_prompt=samples_per_prompt, progress=progress
    )
    return [one.image for one in drawn]


def to_images(
    model: TensorAR, codes: Tensor, size: tuple[int, int] | None = None
) -> list[Image.Image]:
    """Codes [B, T, S] -> PIL images, of size (height, width); None: the model's own size."""
    pixels = model.backbone.decode_images(codes, size).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def _staged(
    model: TensorAR, geometry: Windows, windows: Tensor, size: tuple[int, int] | None
) -> list[tuple[tuple[Image.Image, ...], Tensor]]:
    """For each image: its pictures at every refinement stage, and their codes [stages, T, S]."""
    stages = [geometry.stage_codes(windows, r + 1) for r in range(geometry.stages)]
    pictures = [to_images(model, codes, size) for codes in stages]
    return list(zip(zip(*pictures, strict=True), torch.stack(stages, 1).cpu(), strict=True))

"""Resumable drawing: prompts into a generation folder, classes into a set of numbered images.

The request alone decides which images form a batch and in which order, so an image comes out of the
same matrix products after any interruption and with any number of processes. A `Place` knows where
images go and which exist already.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from t2i import __version__
from t2i.errors import UserError
from t2i.evaluation.evaluation_options import ClassImages
from t2i.evaluation.places import GenerationFolder, ImageArray, NumberedImages, Place
from t2i.files import json_sha256, saving
from t2i.generation import (
    USUAL_BATCH,
    Drawn,
    Job,
    asked_ahead,
    choose_run,
    draw_images,
    images_per_batch,
    parse_conditions,
)
from t2i.models.base import Backbone
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar
from t2i.rng import integers, make_keys
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar.drawing import NOISE
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows
from t2i.weights import state_dict_sha256

log = logging.getLogger(__name__)

_NAMED = {"prompts", "seed", "sampling", "noise", "dtype", "weights", "method"}
"""The settings that name a folder by default."""
_MUST_MATCH = _NAMED | {"model"}
_USUAL_CLASS_BATCH = 64
"""Images of classes that are usually drawn at once."""
_WRITERS = 4
"""Threads that write the images of a batch."""
_CODES = 1
"""Used as the sample index: an image's class is drawn from the key without it, its codes from the
key with it.
"""


def fill(
    place: Place,
    batches: Sequence[Sequence[Job]],
    draw: Callable[[Sequence[Job]], Iterable[Drawn]],
    *,
    overlap: bool = False,
    progress: bool = True,
) -> None:
    """Draw the images that a claimed place lacks. Every process calls this and draws every n-th
    batch.

    Args:
        batches: jobs by batch. A batch may be padded with repeats of a job, which is written once.
        draw: draws all images of a batch.
        overlap: draw the next batch while one is written, as a GPU should: compressing 64 images of
            384 px takes a core 2 s or more. (On a CPU it would slow down drawing.)
    """
    processes = place.processes
    share = batches[processes.rank :: processes.world_size]
    mine = [(batch, place.missing(batch)) for batch in share]
    total = sum(len(missing) for _, missing in mine)
    shown = progress and processes.is_main and total
    desc = "drawing" + processes.share
    bar = progress_bar(total=total, unit=" images", desc=desc, disable=not shown)
    writing: list[Future[None]] = []

    def wait_until_written() -> None:
        with saving(place.out):
            for part in writing:
                part.result()

    with bar, ThreadPoolExecutor(_WRITERS) as writers:
        for batch, missing in mine:
            if missing:
                images = {drawn.job: drawn for drawn in draw(batch) if drawn.job in missing}
                wait_until_written()  # so at most two batches are in memory
                parts = place.parts(list(images.values()))
                writing = [writers.submit(place.write, part) for part in parts]
                if not overlap:
                    wait_until_written()
                bar.update(len(images))
        wait_until_written()
    place.finish()


def _claim(
    place: Place,
    settings: dict,
    model: TensorAR,
    options: DrawOptions,
    batches: int,
    *,
    compared: set[str],
) -> DrawOptions:
    """Claim a place for this number of batches; returns the options to draw all of them with.

    If the kit chooses the speculation ("auto"), a resumed run and the other processes use the
    recorded choice, so that they draw with the same matrix products.
    """
    speed, ahead = choose_run(model, options, batches, settings["batch_size"])
    auto = asked_ahead(model, options) == "auto"
    compared = compared if auto else compared | {"speculate"}
    recorded = place.claim(settings | {"speculate": ahead}, options.about, compared=compared)
    if auto:
        ahead = recorded.get("speculate", 0)
    return replace(options, speed=speed, speculate=ahead)


def batch_of_all(
    model: TensorAR,
    options: DrawOptions,
    processes: Processes,
    usual: int = USUAL_BATCH,
) -> int:
    """How many images are drawn at once (see `images_per_batch`), by all processes alike, though
    their GPUs may differ.
    """
    if options.batch_size is not None:
        return options.batch_size
    return min(processes.gather(images_per_batch(model, options, usual)))


def _on_gpu(model: TensorAR) -> bool:
    return model.backbone.device.type == "cuda"


def _batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    return [list(jobs[i : i + size]) for i in range(0, len(jobs), size)]


# -- prompts ---------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class PromptRequest:
    """Prompts, and the model and the options to draw them with."""

    model: TensorAR
    entries: Sequence[dict]
    """All prompts, not only those to draw now; a prompt's number is its index here."""
    options: DrawOptions

    @cached_property
    def settings(self) -> dict:
        """Everything that determines the images, as JSON values; hashing weights takes seconds."""
        settings = image_settings(self.model, self.options) | {"kit_version": __version__}
        return {"prompts": prompts_digest(self.entries), **settings}

    @property
    def short_hash(self) -> str:
        """A short hash of the settings that name a folder of images."""
        # Empty settings are left out, so that folders keep the names they had before a setting
        # existed.
        present = {key: self.settings[key] for key in _NAMED if self.settings[key] != {}}
        return json_sha256(present)[:8]


def draw_prompts(
    request: PromptRequest,
    jobs: Sequence[Job],
    folder: Path,
    processes: Processes = ALONE,
    *,
    show_steps: bool = False,
) -> None:
    """Draw those of these images that a generation folder lacks; every process calls this.

    Args:
        show_steps: let the progress bar count the steps of each batch instead of all images.

    Raises:
        UserError: the folder holds images of other prompts, settings or weights.
    """
    model, entries, options = request.model, request.entries, request.options
    prompts = parse_conditions(model.backbone, [entry["prompt"] for entry in entries])
    place = GenerationFolder(folder, entries, processes, stages=count_stages(model, options))
    rows = batch_of_all(model, options, processes)
    batches = _batches(jobs, rows)
    for batch in batches:  # the last one is padded, so that all have the same matrix shapes
        batch += [batch[-1]] * (rows - len(batch))
    settings, options = request.settings | {"batch_size": rows}, replace(options, batch_size=rows)
    options = _claim(place, settings, model, options, len(batches), compared=_MUST_MATCH)
    place.write_prompts(sorted({prompt for prompt, _ in jobs}))
    _warn_if_alike(model, options, any(sample for _, sample in jobs))

    def draw(batch: Sequence[Job]) -> Iterable[Drawn]:
        return draw_images(model, prompts, options, jobs=batch, progress=show_steps)

    fill(place, batches, draw, overlap=_on_gpu(model), progress=not show_steps)


def _warn_if_alike(model: TensorAR, options: DrawOptions, repeats: bool) -> None:
    """Warn if all images of a condition will be the same.

    repeats: whether a condition has several images.
    """
    sampling = options.sampling or model.sampling
    if repeats and sampling.is_greedy and not sampling.renoise:
        log.warning("temperature=0: all samples of a prompt, or class, are the same image")


def check_prompts(folder: Path, entries: Sequence[dict], seed: int) -> None:
    """Raise what `draw_prompts` would raise, as far as that is known without a model."""
    known = {"prompts": prompts_digest(entries), "seed": seed}
    GenerationFolder(folder, entries).check(known)


def count_stages(model: TensorAR, options: DrawOptions) -> int:
    """How many refinement stages of an image are kept; 0 if none are asked for."""
    geometry = drawn_windows(model, options.sampling or model.sampling)
    return geometry.stages if options.stages else 0


def prompts_digest(entries: Sequence[dict]) -> dict:
    """The number of prompts, and the SHA-256 of all their metadata."""
    return {"count": len(entries), "sha256": json_sha256(list(entries))}


def image_settings(model: TensorAR, options: DrawOptions) -> dict:
    """The settings that any image depends on, besides its condition and its key."""
    return {
        "seed": options.seed,
        "sampling": asdict(options.sampling or model.sampling),
        "noise": NOISE,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": weights_hashes(model),
        "method": _unusual_method(model, options.sampling or model.sampling),
        "model": _unseen_in_weights(model.backbone),
        "batch_size": options.batch_size,
    }


def _unusual_method(model: TensorAR, sampling: SamplingConfig) -> dict:
    """Settings of the method that change images and do not show in the weights; usually none."""
    method, names = model.config, ["residual"] if model.config.residual == "all" else []
    if sampling.renoise:
        names += ["noise", "schedule", "noise_floor"]
    return {name: getattr(method, name) for name in names if method.k > 1}


def _unseen_in_weights(backbone: Backbone) -> dict:
    """How the backbone's weights are used: the same ones draw other images on another grid."""
    facts: dict = {"grid": list(backbone.spec.grid), "heads": backbone.spec.num_heads}
    if backbone.frozen.text_encoder is not None and backbone.source is not None:
        facts["text_encoder_dtype"] = backbone.source.text_encoder_dtype
    return facts


def weights_hashes(model: TensorAR) -> dict[str, str]:
    """SHA-256 of the weights in memory: the model's, and those of the frozen parts that images
    depend on.
    """
    frozen = model.backbone.frozen
    hashes = {"model": state_dict_sha256(model.state_dict())}
    if isinstance(frozen.tokenizer, nn.Module):
        hashes["tokenizer"] = state_dict_sha256(frozen.tokenizer.state_dict())
    if frozen.text_encoder is not None:
        hashes["text_encoder"] = frozen.text_encoder.weights_hash()
    return hashes


# -- classes ---------------------------------------------------------------------------------------
def draw_classes(
    model: TensorAR,
    out: Path,
    images: ClassImages,
    options: DrawOptions,
    processes: Processes = ALONE,
    *,
    progress: bool = True,
) -> Path:
    """Draw the images that `out` (.npz or a folder) lacks; every process calls this.

    An image depends on its number, the seed and the settings; its class and its codes come from
    different random streams. Returns `out` when it is complete.

    Raises:
        UserError: the model is not class-conditional, or `out` holds images of other settings.
        TimeoutError: another process stopped.
    """
    spec, side = model.backbone.spec, images.image_size
    if spec.cond_kind != "class":
        raise UserError(
            f"this {spec.family} model draws from captions, not classes: use launch/generate.py"
        )
    size = model.backbone.image_size if side is None else (side, side)
    rows = batch_of_all(model, options, processes, _USUAL_CLASS_BATCH)
    options = replace(options, size=size, batch_size=rows)
    settings = {
        "family": spec.family,
        "classes": spec.num_classes,
        "labels": images.labels,
        "count": images.count,
        "size": list(size),
        **image_settings(model, options),
    }
    place = numbered_place(out, images.count, processes)
    balanced = images.labels == "balanced"
    labels = sample_labels(images.count, spec.num_classes, balanced=balanced, seed=options.seed)
    classes = labels.tolist()
    batches = numbered_batches(images.count, rows)
    options = _claim(place, settings, model, options, len(batches), compared=set(settings))
    _warn_if_alike(model, options, len({*classes}) < images.count)

    def draw(batch: Sequence[Job]) -> Iterable[Drawn]:
        return draw_images(model, classes, options, jobs=batch, progress=False)

    fill(place, batches, draw, overlap=_on_gpu(model), progress=progress)
    return out


def numbered_place(out: Path, count: int, processes: Processes = ALONE) -> Place:
    """The place for a path: an array if it ends in .npz, else a folder of PNGs."""
    return (ImageArray if out.suffix == ".npz" else NumberedImages)(out, count, processes)


def numbered_batches(count: int, size: int) -> list[list[Job]]:
    """The batches of numbered images; the last one may be shorter."""
    return _batches([(number, _CODES) for number in range(count)], size)


def sample_labels(count: int, num_classes: int, *, balanced: bool, seed: int) -> Tensor:
    """The class of every image, int64 [count]; depends on its number and these arguments alone.

    The counts of balanced classes differ by at most one. Classes come in random order, because the
    Inception Score of sorted images is wrong.
    """
    keys = make_keys(seed, torch.arange(count))
    if not balanced:
        return integers(keys, num_classes, 1)[:, 0]
    order = integers(keys, 1 << 62, 1)[:, 0].argsort(stable=True)
    return (torch.arange(count) % num_classes)[order]

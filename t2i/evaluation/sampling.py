"""Drawing into a folder: a benchmark's images, or anybody's prompts; resumable at any moment and
split over processes.

Images are drawn in batches that are fixed by the request, always with the same rows in the same
places: whatever was interrupted before, and however many processes share the work, an image comes
out of the same matrix products. What a folder's images depend on is written beside them before the
first of them, and a folder is never completed with other settings.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from t2i import __version__
from t2i.errors import UserError
from t2i.evaluation.records import claim, refuse_others
from t2i.evaluation.store import (
    load_image,
    refuse_other_images,
    sample_file,
    stage_file,
    write_prompt,
    write_sample,
)
from t2i.files import read_json
from t2i.generation import conditions, iterate_images
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar
from t2i.sampling import SamplingConfig
from t2i.tensorar.model import TensorAR
from t2i.weights import state_dict_sha256

log = logging.getLogger(__name__)

GENERATION_FILE = "generation.json"
_MUST_MATCH = {"prompts", "seed", "sampling", "dtype", "weights"}
Batch = list[tuple[int, int]]


@dataclass(frozen=True)
class DrawOptions:
    """How images are drawn."""

    seed: int = 0
    sampling: SamplingConfig | None = None
    """The model's own settings if None."""
    batch_size: int = 16
    """Rows of every batch; another size changes rounding, and nothing else."""
    stages: bool = False
    """Also keep every refinement stage."""
    show_steps: bool = False
    """Let the progress bar count the steps of each batch, instead of all images."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be between 0 and 2**63 - 1")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")


def draw_images(
    model: TensorAR,
    entries: Sequence[dict],
    selected: Sequence[int],
    folder: Path,
    *,
    samples: int,
    options: DrawOptions,
    about: dict,
    processes: Processes = ALONE,
) -> None:
    """Draw what is not there yet of `samples` images for each selected prompt; every process calls
    it.

    Args:
        entries: all prompts, whatever is selected; the index in it is the prompt's number.
        about: facts about the model that are recorded, but not compared.

    Raises:
        UserError: the folder holds images of other prompts, settings or weights.
    """
    prompts = conditions(model.backbone, [entry["prompt"] for entry in entries])
    stages = count_stages(model, options)  # what is impossible is named before anything is written
    if processes.is_main:
        claim_folder(folder, entries, generation_settings(model, entries, options), about)
        for index in selected:
            write_prompt(folder, index, entries[index])
    processes.barrier()
    jobs = [(p, s) for p in selected for s in range(samples)]
    size = options.batch_size
    batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    mine = [
        (batch, _undrawn(batch, folder, stages))
        for batch in batches[processes.rank :: processes.world_size]
    ]
    total = sum(len(undrawn) for _, undrawn in mine)
    bar = progress_bar(
        total=total,
        unit="image",
        desc="drawing" + processes.share,
        disable=not (processes.is_main and total) or options.show_steps,
    )
    with bar:
        for batch, undrawn in mine:
            if undrawn:
                _draw_batch(model, prompts, batch, undrawn, folder, options)
                bar.update(len(undrawn))
    processes.barrier()


def count_stages(model: TensorAR, options: DrawOptions) -> int:
    """Refinement stages that are kept of an image; 0 if none are asked for."""
    geometry = model.windows.shrunk((options.sampling or model.sampling).window)
    return geometry.stages if options.stages else 0


def _draw_batch(
    model: TensorAR,
    prompts: Sequence[str | int],
    batch: Batch,
    undrawn: Batch,
    folder: Path,
    options: DrawOptions,
) -> None:
    """Compute all rows of a batch, filled up to the full size, and write those that are not
    there.
    """
    rows = batch + [batch[-1]] * (options.batch_size - len(batch))
    drawn = iterate_images(
        model,
        prompts,
        seed=options.seed,
        sampling=options.sampling,
        batch_size=options.batch_size,
        stages=options.stages,
        progress=options.show_steps,
        jobs=rows,
    )
    for job, generated in zip(batch, drawn, strict=False):  # the rows that fill it up are dropped
        if job in undrawn:
            write_sample(folder, generated)


def _undrawn(batch: Batch, folder: Path, stages: int) -> Batch:
    """The images of a batch that have no readable file, or not so many refinement stages."""
    undrawn = []
    for job in batch:
        path = folder / sample_file(*job)
        if path.is_file() and (not stages or (folder / stage_file(*job, stages)).is_file()):
            try:
                load_image(path)
                continue
            except UserError as error:
                log.error("%s; drawing it again", error)
        undrawn.append(job)
    return undrawn


# -- what images depend on -------------------------------------------------------------------------
def generation_settings(model: TensorAR, entries: Sequence[dict], options: DrawOptions) -> dict:
    """Everything that decides what the images are, as JSON would give it back."""
    return {
        "prompts": prompts_digest(entries),
        "seed": options.seed,
        "sampling": asdict(options.sampling or model.sampling),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": weights_hashes(model),
        "batch_size": options.batch_size,
        "kit_version": __version__,
    }


def request_hash(model: TensorAR, entries: Sequence[dict], options: DrawOptions) -> str:
    """A short name for all that must match in a folder of images."""
    settings = generation_settings(model, entries, options)
    text = json.dumps({key: settings[key] for key in sorted(_MUST_MATCH)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def prompts_digest(entries: Sequence[dict]) -> dict:
    """Number of the prompts, and SHA-256 of all their metadata."""
    text = json.dumps(list(entries), sort_keys=True)
    return {"count": len(entries), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def weights_hashes(model: TensorAR) -> dict[str, str]:
    """SHA-256 of the weights in memory: of the model, and of the frozen helpers that have a part in
    its images.
    """
    frozen = model.backbone.frozen
    hashes = {"model": state_dict_sha256(model.state_dict())}
    if isinstance(frozen.tokenizer, nn.Module):
        hashes["tokenizer"] = state_dict_sha256(frozen.tokenizer.state_dict())
    if frozen.text_encoder is not None:
        hashes["text_encoder"] = frozen.text_encoder.weights_hash()
    return hashes


def read_generation(folder: Path) -> dict | None:
    """What `draw_images` recorded about a folder's images; None for a folder that something else
    has written.
    """
    path = folder / GENERATION_FILE
    return read_json(path) if path.is_file() else None


def claim_folder(folder: Path, entries: Sequence[dict], settings: dict, about: dict) -> None:
    """Record the settings in a new folder; refuse one whose images were drawn with others."""
    refuse_other_images(folder, entries)
    claim(
        folder / GENERATION_FILE,
        settings | {"about": about},
        images=folder,
        compared=_MUST_MATCH,
        occupied=any(folder.glob("[0-9]*/samples/*")),
    )


def check_folder(folder: Path, entries: Sequence[dict], seed: int) -> None:
    """What `claim_folder` would refuse and can be told before the model is loaded."""
    refuse_other_images(folder, entries)
    if (before := read_generation(folder)) is not None:
        now = {"prompts": prompts_digest(entries), "seed": seed}
        refuse_others(before, now, images=folder, compared=set(now))

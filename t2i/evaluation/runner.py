"""A benchmark from end to end: draw, judge, report.

Each stage repeats nothing that is finished, so a run that was stopped at any moment is completed by
the same call; one process and many give the same result. A benchmark brings its prompts, its judge
and its arithmetic (`Benchmark`); all else is here.

OUT/images/                      the model's images, in GenEval's layout (or any folder given as
`images`) OUT/verdicts/                    see t2i.evaluation.judging
OUT/results.json, results.jsonl, report.md
OUT/gallery/index.html           the failures
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from t2i.errors import UserError
from t2i.evaluation.gallery import Card, Exhibit, write_gallery
from t2i.evaluation.inventory import Inventory, shorten, take_inventory
from t2i.evaluation.judging import Judge, Verdicts, collect, judge_images
from t2i.evaluation.options import Scope
from t2i.evaluation.results import (
    RESULTS_FILE,
    Coverage,
    Score,
    image_source,
    make_results,
    read_results,
    write_report,
)
from t2i.evaluation.sampling import DrawOptions, draw_images, prompts_digest, read_generation
from t2i.evaluation.store import sample_file
from t2i.files import writable_folder
from t2i.processes import ALONE, Processes
from t2i.tensorar.model import TensorAR

log = logging.getLogger(__name__)


class Benchmark(Judge, Protocol):
    """What makes a benchmark, besides being a `Judge` of images."""

    name: str
    label: str
    """Which prompts and which judge: what must stand beside the numbers."""
    legend: str
    """What the numbers mean, in a sentence or two below them."""
    best: float
    """The best possible score."""
    decimals: int
    """Digits to print of a score."""
    entries: Sequence[dict]
    """Metadata with a "prompt", in the order of the folder numbers."""

    def scores(self, rows: Sequence[dict]) -> list[Score]:
        """From all rows (see `Judged.row`) to the numbers, the headlines first."""
        ...

    def card(self, row: dict) -> Card | None:
        """What the gallery shows of an image; None to leave it out."""
        ...


def evaluate(
    benchmark: Benchmark,
    out: Path,
    *,
    model: TensorAR | None = None,
    images: Path | None = None,
    scope: Scope | None = None,
    draw: DrawOptions | None = None,
    processes: Processes | None = None,
    about: dict | None = None,
) -> dict:
    """Judge a model, or a folder of images that anything has drawn; every process calls it.

    Args:
        model: draws the images into OUT/images; or
        images: a folder in GenEval's layout.
        draw: seed and sampling settings, for a model.
        about: facts about the model, to be recorded.

    Returns:
        The content of results.json.

    Raises:
        UserError: what is missing, unreadable, unexpected or contradictory in images or folders.
    """
    assert (model is None) != (images is None), "a model, or a folder of images"
    scope, processes = scope or Scope(), processes or ALONE
    selected = scope.select(len(benchmark.entries))
    folder = out / "images" if images is None else images
    if model is not None:
        if processes.is_main:
            claim_output(out, folder)
        draw_images(
            model,
            benchmark.entries,
            selected,
            folder,
            samples=scope.samples,
            options=draw or DrawOptions(),
            processes=processes,
            about=about or {},
        )
    if processes.is_main:
        inventory = take_inventory(folder, benchmark.entries, selected, scope.samples)
        inventory.check(allow_missing=scope.allow_incomplete)
        if inventory.unread:
            log.warning("%s: names that are not read: %s", folder, shorten(inventory.unread))
        claim_output(out, folder)
    processes.barrier()
    inventory = take_inventory(folder, benchmark.entries, selected, scope.samples)
    prompts = prompts_digest(benchmark.entries)
    verdicts = Verdicts(out, benchmark.identity(), prompts)
    judge_images(benchmark, inventory, verdicts, processes)
    if processes.is_main:
        _report(benchmark, out, inventory, verdicts, scope)
    processes.barrier()
    return read_results(out)[0]


def claim_output(out: Path, images: Path) -> None:
    """Make the output folder before any work is done for it.

    Raises:
        UserError: it cannot be written, or holds the results of other images.
    """
    writable_folder(out)
    if (out / RESULTS_FILE).is_file():
        before = read_results(out)[0]["images"]
        if before != image_source(out, images):
            raise UserError(f"{out} holds the results of {before}; give another --out")


def _report(
    benchmark: Benchmark, out: Path, inventory: Inventory, verdicts: Verdicts, scope: Scope
) -> None:
    judged, unreadable = collect(inventory, verdicts)
    rows = [image.row for image in judged]
    coverage = Coverage(
        prompts=len(inventory.found),
        prompts_of_benchmark=len(benchmark.entries),
        expected=inventory.expected,
        judged=len(judged),
        missing=inventory.missing,
        unreadable=unreadable,
    )
    coverage.check(allow_incomplete=scope.allow_incomplete)
    results = make_results(
        benchmark.name,
        benchmark.label,
        benchmark.scores(rows),
        coverage,
        **verdicts.about,
        legend=benchmark.legend,
        best=benchmark.best,
        decimals=benchmark.decimals,
        images=image_source(out, inventory.folder),
        samples=scope.samples,
        generation=read_generation(inventory.folder),
    )
    exhibits = [
        Exhibit(
            card=card,
            name=sample_file(image.prompt_index, image.sample),
            image=inventory.found[image.prompt_index][image.sample],
            sha256=image.sha256,
            overlay=verdicts.overlay(image.prompt_index, image.sample),
        )
        for image in judged
        if (card := benchmark.card(image.row)) is not None
    ]
    write_gallery(out / "gallery", results, exhibits)
    write_report(out, results, rows)

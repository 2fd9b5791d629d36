"""A benchmark from end to end: draw, judge, report.

No stage repeats finished work, so the same call completes a run that was stopped at any moment. The
result does not depend on the number of processes. A benchmark provides its prompts, its judge and
its scores (`Benchmark`); everything else is here.

    OUT/images/                  a model's images, in GenEval's layout
    OUT/verdicts/                see t2i.evaluation.judging
    OUT/results.json, results.jsonl, report.md
    OUT/gallery/index.html       the failures
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch

from t2i.checkpoint_folders import from_shipped_base, names_shipped_base
from t2i.errors import UserError, shorten
from t2i.evaluation.draw import PromptRequest, check_prompts, draw_prompts, prompts_digest
from t2i.evaluation.evaluation_options import BenchmarkOptions, Scope
from t2i.evaluation.gallery import Card, Exhibit, write_gallery
from t2i.evaluation.generation_folder import Inventory, read_generation, take_inventory
from t2i.evaluation.judging import Judge, Verdicts, collect, judge_images
from t2i.evaluation.results import (
    RESULTS_FILE,
    Coverage,
    Score,
    image_source,
    read_results,
    table,
    versions,
    write_results,
)
from t2i.files import writable_folder
from t2i.generation import all_jobs
from t2i.ownership import owning, remove_leftovers
from t2i.processes import ALONE, Processes, join_processes
from t2i.sampling import DrawOptions
from t2i.sources import check_place
from t2i.tensorar.model import TensorAR

log = logging.getLogger(__name__)


class Benchmark(Judge, Protocol):
    """A `Judge` of images with prompts and scores."""

    name: str
    label: str
    """Which prompts and which judge; always shown with the numbers."""
    legend: str
    """What the numbers mean, in a sentence or two shown below them."""
    best: float
    """The best possible score."""
    decimals: int
    """How many decimals of a score to print."""

    @property
    def entries(self) -> Sequence[dict]:
        """Metadata with a "prompt", in the order of the folder numbers."""
        ...

    def scores(self, rows: Sequence[dict]) -> list[Score]:
        """The scores from all rows (see `Judged.row`), headline scores first."""
        ...

    def card(self, row: dict) -> Card | None:
        """What the gallery shows about an image; None to leave it out."""
        ...


def evaluate(
    benchmark: Benchmark,
    out: str | Path,
    *,
    model: TensorAR | None = None,
    images: str | Path | None = None,
    scope: Scope | None = None,
    draw: DrawOptions | None = None,
    processes: Processes = ALONE,
) -> dict:
    """Judge a model, or a folder of images from any source; every process calls this.

    Args:
        model: draws the images into OUT/images. Give this or `images`.
        images: a folder in GenEval's layout.
        scope: prompts and images per prompt; all prompts, 4 images each, if None.
        draw: how the model draws.
        processes: those that share the work.

    Returns:
        The content of results.json.

    Raises:
        UserError: something in the images or folders is missing, unreadable, unexpected or
            contradictory.
    """
    if not hasattr(benchmark, "entries"):
        raise UserError(
            f"benchmark is {benchmark!r:.80}: give a GenEval or DPGBench (see docs/geneval.md)"
        )
    if (model is None) == (images is None):
        raise UserError("evaluate judges either model=... or images=FOLDER: give one of them")
    _check_kind("model", model, TensorAR)
    _check_kind("scope", scope, Scope)
    _check_kind("draw", draw, DrawOptions)
    check_place(out, "out")
    check_place(out if images is None else images, "images")
    out, images = Path(out), None if images is None else Path(images)
    scope, entries = scope or Scope(), benchmark.entries
    folder = out / "images" if images is None else images
    if model is not None:
        draw_missing(model, entries, out, scope, draw or DrawOptions(), processes)
        model.held.clear()  # the judge needs the memory

    def check() -> None:
        found = check_images(folder, entries, scope, out)
        if found.unread:
            log.warning("%s: names that are not read: %s", folder, shorten(found.unread))
        read_generation(folder)  # raises for a damaged file before any image is judged

    processes.on_main(check)
    inventory = take_inventory(folder, entries, scope.select(len(entries)), scope.samples)
    verdicts = Verdicts(out, benchmark.identity(), prompts_digest(entries))
    judge_images(benchmark, inventory, verdicts, processes)
    if processes.is_main:
        _report(benchmark, out, inventory, verdicts, scope)
    processes.barrier()
    return read_results(out)


def draw_missing(
    model: TensorAR,
    entries: Sequence[dict],
    out: Path,
    scope: Scope,
    draw: DrawOptions,
    processes: Processes,
) -> None:
    """Draw those images of a benchmark that OUT/images lacks; every process calls this."""
    folder = out / "images"
    processes.on_main(lambda: claim_output(out, folder))
    jobs = all_jobs(scope.select(len(entries)), scope.samples)
    draw_prompts(PromptRequest(model, entries, draw), jobs, folder, processes)


def _check_kind(name: str, given: object, kind: type) -> None:
    if not (given is None or isinstance(given, kind)):
        raise UserError(f"{name} is {given!r:.80}: evaluate takes a {kind.__name__} there")


def check_images(folder: Path, entries: Sequence[dict], scope: Scope, out: Path) -> Inventory:
    """The images of a folder, by name: none of them is opened.

    Raises:
        UserError: they cannot be judged, or the output folder holds the results of other images.
    """
    inventory = take_inventory(folder, entries, scope.select(len(entries)), scope.samples)
    inventory.check(allow_missing=scope.allow_incomplete)
    claim_output(out, folder)
    return inventory


def claim_output(out: Path, images: Path) -> None:
    """Make the output folder, before any work is done.

    Raises:
        UserError: it cannot be written, or holds the results of other images.
    """
    writable_folder(out)
    if (out / RESULTS_FILE).is_file():
        before = read_results(out)["images"]
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
        copies=len(judged) - len({image.sha256 for image in judged}),
    )
    coverage.check(allow_incomplete=scope.allow_incomplete)
    results = {
        "benchmark": benchmark.name,
        "label": benchmark.label,
        "status": coverage.status,
        "scores": {score.key: asdict(score) for score in benchmark.scores(rows)},
        "legend": benchmark.legend,
        "best_possible": benchmark.best,
        "decimals": benchmark.decimals,
        "coverage": asdict(coverage),
        "samples_per_prompt": scope.samples,
        **verdicts.about,
        "images": image_source(out, inventory.folder),
        "generation": read_generation(inventory.folder),
        "versions": versions(),
    }
    exhibits = [
        Exhibit(
            card=card,
            name=inventory.name(image.prompt_index, image.sample),
            image=inventory.found[image.prompt_index][image.sample],
            sha256=image.sha256,
            overlay=verdicts.overlay(image.prompt_index, image.sample),
        )
        for image in judged
        if (card := benchmark.card(image.row)) is not None
    ]
    write_gallery(out / "gallery", results, exhibits)
    write_results(out, results, rows)


# -- a benchmark's program -------------------------------------------------------------------------
def run(
    options: BenchmarkOptions,
    where: tuple[torch.device, torch.dtype],
    name: str,
    entries: Sequence[dict],
    build: Callable[[Processes], Benchmark],
    arrange: Callable[[Path, Processes], Callable[[], Path]] | None = None,
) -> None:
    """Draw, judge and report; the main process prints the table and where the results are.

    Args:
        where: device and dtype that the model draws with, from `options.check`.
        name: the benchmark's name in its default output folder.
        entries: the benchmark's prompts.
        build: makes the benchmark, with its judge on the processes' device. Also called before
            anything is drawn, for the CPU, so that wrong weights are found early.
        arrange: given OUT and the processes, checks the images of `options.images` and returns a
            function that copies them into the common layout and returns their folder; every
            process calls both. None if the images are in that layout already.
    """
    device, dtype = where
    out, images = options.out or default_out(options, name), options.images
    processes = join_processes(device)
    with ExitStack() as held:

        def claim() -> None:  # the main process holds the folder for all processes of this launch
            held.enter_context(owning(out, "output folder"))
            if images is None:
                claim_output(out, out / "images")
                check_prompts(out / "images", entries, options.seed)
            elif arrange is None:
                check_images(images, entries, options.scope, out)
            remove_leftovers(out)

        processes.on_main(claim)
        copy = arrange(out, processes) if images is not None and arrange is not None else None
        if images is None:  # refuse an unsuitable model before a judge is downloaded
            model = options.load(processes.device, dtype)
            if model.backbone.spec.cond_kind != "text":
                raise UserError(f"{options.source} draws classes, but {name} needs captions")
            draw = options.drawing(model)
            # Wrong weights of the judge are found now; on a GPU it would take memory from drawing.
            benchmark = build(replace(processes, device=torch.device("cpu")))
            draw_missing(model, entries, out, options.scope, draw, processes)
            images = out / "images"
            del model  # nor does the judge need to share the memory
            if processes.device.type != "cpu":
                benchmark = build(processes)
        else:
            benchmark = build(processes)
            images = images if copy is None else copy()
        results = evaluate(benchmark, out, images=images, scope=options.scope, processes=processes)
    if processes.is_main:
        print(f"{table(results)}\n")
        print(f"± is the bootstrap standard error over prompts\nwrote {out / 'results.json'}")
        print(f"look at {out / 'gallery' / 'index.html'}")


def default_out(options: BenchmarkOptions, name: str) -> Path:
    """outputs/<benchmark>/<name of the model, or of the folder that holds the images>."""
    if options.images is None:
        return Path("outputs") / name / options.name()
    folder = options.images.resolve()
    return Path("outputs") / name / (folder.parent if folder.name == "images" else folder).name


def is_shapes_world(options: BenchmarkOptions) -> bool:
    """Whether the model, or the one that drew the given images, is made from a shipped base of the
    shapes world.
    """
    if options.images is None:
        return from_shipped_base(options.checkpoint or str(options.source))
    about = (read_generation(options.images) or {}).get("about", {})
    return names_shipped_base(about.get("backbone", {}))

"""What the benchmarks' programs share: the way from their options to a finished report."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from t2i.checkpoint import find_checkpoint, read_config
from t2i.errors import UserError
from t2i.evaluation.options import BenchmarkOptions
from t2i.evaluation.results import table
from t2i.evaluation.runner import Benchmark, claim_output, evaluate
from t2i.evaluation.sampling import DrawOptions, check_folder, read_generation
from t2i.files import owning, remove_leftovers
from t2i.processes import Processes, join_processes
from t2i.sources import shipped_bases


def run(
    options: BenchmarkOptions,
    name: str,
    entries: Sequence[dict],
    build: Callable[[Processes], Benchmark],
    arrange: Callable[[Benchmark, Path, Processes], Path] | None = None,
) -> None:
    """Draw, judge and report; the main process prints the table and where to look.

    Args:
        name: of the benchmark, as in its default output folder.
        entries: the benchmark's prompts.
        build: the benchmark with its judge on the process's device; called before anything is
            drawn, so that wrong weights are found early.
        arrange: given the benchmark, OUT and the processes, brings the images of `options.images`
            into the common layout and returns their folder; every process calls it. They are in
            that layout already if None.
    """
    out, images = options.out or default_out(options, name), options.images
    device, dtype = options.check()
    processes = join_processes(device)
    # One launch holds the folder: its main process for all of them.
    with owning(out, "output folder") if processes.is_main else nullcontext():
        if processes.is_main:
            remove_leftovers(out)
        if processes.is_main and images is None:
            claim_output(out, out / "images")
            check_folder(out / "images", entries, options.seed)
        benchmark = build(processes)
        model, about, draw = None, None, None
        if images is None:
            model = options.load(processes.device, dtype)
            if model.backbone.spec.cond_kind != "text":
                raise UserError(
                    f"{options.source} draws classes, but {benchmark.name} asks with captions"
                )
            sampling = options.sampling.apply(model.sampling)
            draw = DrawOptions(options.seed, sampling, options.batch_size)
            about = options.about(model)
        elif arrange is not None:
            images = arrange(benchmark, out, processes)
        results = evaluate(
            benchmark,
            out,
            model=model,
            images=images,
            scope=options.scope(),
            draw=draw,
            processes=processes,
            about=about,
        )
    if processes.is_main:
        print(f"{table(results)}\n")
        print(f"± is the bootstrap standard error over prompts\nwrote {out / 'results.json'}")
        print(f"look at {out / 'gallery' / 'index.html'}")


def default_out(options: BenchmarkOptions, name: str) -> Path:
    """outputs/<benchmark>/ and the model's name, or that of the image folder (of its parent if it
    is called images).
    """
    if options.images is None:
        return Path("outputs") / name / options.name()
    folder = options.images.resolve()
    return Path("outputs") / name / (folder.parent if folder.name == "images" else folder).name


def is_shapes_world(options: BenchmarkOptions) -> bool:
    """Whether the model (also the one that drew a folder of images) was made from a shipped base;
    all of them draw shapes.
    """
    if options.images is not None:
        generation = read_generation(options.images) or {}
        base = generation.get("about", {}).get("backbone", {})
    elif options.is_trained:
        base = read_config(find_checkpoint(options.source))["backbone"]
    else:
        base = {"weights": options.source}
    return not {base.get("weights"), base.get("shipped_base")}.isdisjoint(shipped_bases())

"""What the benchmarks' programs share: the way from their options to a finished report."""

from collections.abc import Callable
from pathlib import Path

from t2i.checkpoint import find_checkpoint, from_pretrained, read_config
from t2i.errors import UserError
from t2i.evaluation.options import BenchmarkOptions
from t2i.evaluation.report import table
from t2i.evaluation.runner import Benchmark, claim_output, evaluate
from t2i.evaluation.sampling import DrawOptions, read_generation
from t2i.generation import pick_device
from t2i.loading import shipped_bases
from t2i.processes import Processes, join_processes


def run(
    options: BenchmarkOptions,
    name: str,
    build: Callable[[Processes], Benchmark],
    arrange: Callable[[Benchmark, Path, Processes], Path] | None = None,
) -> None:
    """Draw, judge and report; the main process prints the table and where to look.

    Args:
        name: of the benchmark, as in its default output folder.
        build: the benchmark with its judge on the process's device; called before anything is drawn, so that wrong
            weights are found early.
        arrange: given the benchmark, OUT and the processes, brings the images of `options.images` into the common layout
            and returns their folder; every process calls it. They are in that layout already if None.
    """
    if options.images is not None and not options.images.exists():
        raise UserError(f"{options.images} does not exist; --images is a folder that holds images")
    device, dtype = pick_device(options.device, options.dtype)
    processes = join_processes(device)
    out = options.out or default_out(options, name)
    if processes.is_main and options.ckpt is not None:
        claim_output(out, out / "images")
    benchmark = build(processes)
    model, about, draw, images = None, None, None, options.images
    if options.ckpt is not None:
        model = from_pretrained(
            options.ckpt, base=options.base, device=processes.device, dtype=dtype
        )
        if model.backbone.spec.cond_kind != "text":
            raise UserError(
                f"{options.ckpt} draws classes, but {benchmark.name} asks with captions"
            )
        draw = DrawOptions(options.seed, options.sampling.apply(model.sampling), options.batch_size)
        about = about_checkpoint(options.ckpt)
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
    """outputs/<benchmark>/ and the name of the run and step, or of the image folder (of its parent if it is called images)."""
    folder = (options.images or find_checkpoint(options.ckpt)).resolve()
    model = folder.name
    if folder.parent.name == "checkpoints":
        model = f"{folder.parents[1].name}-{folder.name}"
    elif folder.name == "images":
        model = folder.parent.name
    return Path("outputs") / name / model


def about_checkpoint(ckpt: Path) -> dict:
    """What a results file says about the model."""
    folder = find_checkpoint(ckpt)
    config = read_config(folder)
    facts = {key: config[key] for key in ("kit_version", "tuning", "method", "backbone")}
    return {"checkpoint": str(folder.resolve()), "step": config["training"].get("step"), **facts}


def is_shapes_world(options: BenchmarkOptions) -> bool:
    """Whether the model (also the one that drew a folder of images) was made from a shipped base; all of them draw shapes."""
    if options.ckpt is not None:
        return read_config(find_checkpoint(options.ckpt))["backbone"]["weights"] in shipped_bases()
    generation = read_generation(options.images) or {}
    return generation.get("about", {}).get("backbone", {}).get("weights") in shipped_bases()

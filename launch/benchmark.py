"""Measure drawing and training on this machine: time and memory of presets, of ways to run the
steps and of peers, taking turns within one run, compared with what the hardware allows.

    python launch/benchmark.py                                # the shapes base, in two minutes
    # a published shape with random weights, against peers
    python launch/benchmark.py sampling --shapes llamagen-B --images 4 --dtypes fp32 bf16 \\
        --speeds eager compiled --peers all --steps 64 --out benchmarks/mine
    python launch/benchmark.py training --shapes llamagen-B --batch 4 --naive
    python launch/benchmark.py scaling

Shapes: shapes, shapes-janus (the shipped bases); llamagen-B, -L, -XL, -XXL, -3B, each also with
-384; llamagen-text-XL; janus-1B, -7B; open-magvit2-B, -L, -XL; rar-B, -L, -XL, -XXL. Peers:
no-cache, cat-cache, transformers, transformers-static, llamagen, llamagen-compiled, or all.
"""

import logging
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError, choose_one
from t2i.fields import given_options, plain
from t2i.sampling import SamplingConfig, Speed, check_counts, check_positive

if TYPE_CHECKING:
    import torch

    from launch.measure.roofline import Machine

log = logging.getLogger(__name__)

What = Literal["sampling", "training", "scaling"]
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class SpeedBenchmark:
    """What to measure."""

    what: tyro.conf.Positional[tuple[What, ...]] = ("sampling", "training")
    """Drawing codes, training steps, or how the cost grows with the amount of work."""
    shapes: tuple[str, ...] = ("shapes",)
    """Models, from the list above."""
    methods: tuple[str, ...] = ("base", "iclr2026")
    """Presets to compare; ratios are relative to the first."""
    dtypes: tuple[Dtype, ...] = ("fp32",)
    """For drawing, the dtype of weights and cache; in training weights are always fp32, and bf16
    means autocast.
    """
    images: tuple[int, ...] = (16,)
    """Images drawn at once."""
    speeds: tuple[Speed, ...] = ()
    """Ways to run the steps; if none are given, eager, and also graphs on a GPU."""
    peers: tuple[str, ...] = ()
    """Other implementations to compare with, from the list above."""
    llamagen: Path | None = None
    """Checkout of LlamaGen's repository, which its peers need."""
    guidance: float = 2.0
    """Scale of classifier-free guidance; 1: none."""
    top_k: int = 2000
    """Number of likeliest codes to draw from; 0: all."""
    steps: int = 32
    """Steps to time per image, around its middle; 0: all."""
    decode: bool = False
    """Also time the decoding of codes to pixels."""
    batch: int = 32
    """Samples per training step."""
    naive: bool = False
    """Also train with a loss that holds all logits at once, and with blocks of plain operations."""
    recompute: bool = False
    """Train with gradient checkpointing."""
    compiled: bool = False
    """Also train with the trunk's blocks compiled."""
    rounds: int = 4
    """Number of turns that each contender takes."""
    memory: bool = True
    """Also measure peak memory, each contender in its own process."""
    bandwidth: float | None = None
    """Memory bandwidth of this machine in GB/s; measured by a copy if not given."""
    tflops: float | None = None
    """TFLOP/s of this machine; measured by matrix products if not given."""
    minutes: float = 0
    """Start no further group of contenders after this many minutes; 0: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None
    """Also write STEM.json, STEM.md and (where matplotlib is installed) STEM.svg."""

    def __post_init__(self):
        check_counts(batch=self.batch, rounds=self.rounds)
        check_positive(bandwidth=self.bandwidth, tflops=self.tflops)
        if not self.minutes >= 0:
            raise UserError(f"minutes={self.minutes} must be a number above 0, or 0: no limit")
        if self.steps < 0:
            raise UserError(f"steps={self.steps} must be a number of steps, or 0 for all")
        for name in ("what", "shapes", "methods", "dtypes", "images"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty, so nothing would be measured: leave it out")
        for images in self.images:
            check_counts(images=images)
        SamplingConfig(cfg_scale=self.guidance, top_k=self.top_k)  # raises for impossible ones
        for kind, names in _READ_BY.items():
            if kind not in self.what and (unread := [k for k in given_options(self) if k in names]):
                raise UserError(
                    f"{', '.join(unread)} would have no effect, as only {kind} reads it, and what "
                    f"is measured is {', '.join(self.what)}: leave it out, or add {kind}"
                )


_READ_BY = {
    "sampling": ("images", "speeds", "peers", "llamagen", "guidance", "top_k", "steps", "decode"),
    "training": ("batch", "naive", "recompute", "compiled"),
}
"""Options that only one kind of measurement reads."""


def groups(config: SpeedBenchmark, device: "torch.device", machine: "Machine") -> Iterator[tuple]:
    """Yield (kind of rows, description, function that measures them) for each group."""
    from launch.measure import scaling, timed_sampling, timed_training

    if "sampling" in config.what:
        usual: tuple[Speed, ...] = ("graphs", "eager") if device.type == "cuda" else ("eager",)
        speeds = config.speeds or usual
        for shape, dtype, images in product(config.shapes, config.dtypes, config.images):
            group = timed_sampling.Group(
                shape=shape,
                dtype=dtype,
                images=images,
                methods=config.methods,
                speeds=speeds,
                peers=_peers(config),
                steps=config.steps,
                rounds=config.rounds,
                guidance=config.guidance,
                top_k=config.top_k,
                llamagen=config.llamagen,
            )
            work = partial(timed_sampling.measure, group, device, machine, memory=config.memory)
            yield "sampling", f"{shape}, {dtype}, {images} images", work
        for shape, images in product(config.shapes, config.images if config.decode else ()):
            work = partial(timed_sampling.measure_decoding, shape, images, device, config.rounds)
            yield "decoding", f"{shape}, {images} images", work
    if "training" in config.what:
        for shape, dtype in product(config.shapes, config.dtypes):
            steps = timed_training.TrainingGroup(
                shape=shape,
                dtype=dtype,
                batch=config.batch,
                methods=config.methods,
                naive=config.naive,
                recompute=config.recompute,
                rounds=config.rounds,
                compiled=config.compiled,
            )
            work = partial(timed_training.measure, steps, device, machine, memory=config.memory)
            yield "training", f"{shape}, {dtype}, batch {config.batch}", work
    if "scaling" in config.what:
        for name, points in scaling.points(scaling.Point()).items():
            rounds, memory = min(config.rounds, 3), config.memory
            work = partial(scaling.measure, name, points, device, rounds=rounds, memory=memory)
            yield "scaling", f"cost as {name} grows", work


def _peers(config: SpeedBenchmark) -> tuple[str, ...]:
    from launch.measure.peers import PEERS, check_llamagen

    if config.llamagen is not None:
        check_llamagen(config.llamagen)
    if config.peers == ("all",):
        return tuple(n for n in PEERS if config.llamagen is not None or "llamagen" not in n)
    for name in config.peers:
        if name not in PEERS:
            raise UserError(f"unknown peer {name!r}; {choose_one(name, (*PEERS, 'all'))}")
        if name.startswith("llamagen") and config.llamagen is None:
            raise UserError(
                f"peer {name} needs --llamagen DIR, a checkout of LlamaGen's repository"
            )
    return config.peers


def main() -> None:
    config = cli.parse(SpeedBenchmark, __doc__)
    from launch.measure import benchmark_report, roofline, scaling, timed_sampling
    from launch.measure.shapes import check_shapes
    from t2i.files import writable_file
    from t2i.loading import pick_device
    from t2i.tensorar import presets

    check_shapes(config.shapes)
    for name in config.methods:
        presets.method(name)
    _peers(config)
    device, _ = pick_device(config.device)
    stem = config.out
    if stem is not None:
        stem = stem.with_suffix("") if stem.suffix in (".json", ".md", ".svg") else stem
        writable_file(f"{stem}.json")
        benchmark_report.refuse_other_files(stem)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    command = shlex.join(["python", "launch/benchmark.py", *sys.argv[1:]])
    dtypes: dict[str, torch.dtype] = {
        k: v for k, v in timed_sampling.DTYPES.items() if k in config.dtypes
    }
    machine = roofline.known(device, dtypes, config.bandwidth, config.tflops)
    results: dict = {
        "about": benchmark_report.about(device, command),
        "settings": plain(config),
        "machine": asdict(machine),
        "notes": benchmark_report.NOTES,
        "rows": {},
    }
    begun = time.time()
    for kind, what, work in groups(config, device, machine):
        if config.minutes and time.time() - begun > 60 * config.minutes:
            log.info("%s: not started, %g minutes are over", what, config.minutes)
            continue
        log.info("%s: %s", kind, what)
        try:
            found = work()
        except torch.OutOfMemoryError as error:
            found = [{"contender": what, "error": f"out of memory: {str(error)[:100]}"}]
        rows = results["rows"].setdefault(kind, [])
        rows += found
        if kind == "scaling":
            results["rows"]["fits"] = scaling.fits(rows)
        if stem is not None:
            benchmark_report.write(results, stem)
    print(benchmark_report.markdown(results))
    if stem is not None and not benchmark_report.plot(results, Path(f"{stem}.svg")):
        log.info("no plot: matplotlib is not installed")


if __name__ == "__main__":
    cli.run(main)

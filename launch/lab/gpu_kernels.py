"""A part of `gpu_check.py`: what the GPU does during a drawing step, and how long it is idle.

At its fastest, a step would only read its weights. The rest of its time goes into many small
kernels and the gaps between them; torch's profiler shows which kernels.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from launch.lab.gpu_speed import SMALL, Rows
from launch.measure.shapes import attached, made_up, open_backbone
from launch.measure.turns import seconds
from t2i.sampling import SamplingConfig, Speed
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import Drawing, begin, encode_rows, guidance_table, whole_run
from t2i.tensorar.speed import Run

SHAPES = ("llamagen-B", "llamagen-XL")
WAYS: tuple[tuple[str, Speed, bool], ...] = (
    ("graphs", "graphs", False),
    ("compiled", "compiled", False),
    ("compiled, frozen weights", "compiled", True),
)
"""Name, how steps are run, and whether the compiler may merge products that have one input."""
SHOWN = 15
"""How many kernels get a row, the longest first."""


def kernel_rows(device: torch.device, tiny: bool) -> Rows:
    """For every shape and way of running steps, a row for the step and rows for its kernels."""
    for shape in ("tiny-class",) if tiny else SHAPES:
        for name, speed, freeze in (("eager", "eager", False),) if tiny else WAYS:
            about = {"shape": shape, "images": SMALL, "steps are": name}
            yield about, partial(_kernels, shape, speed, freeze, device, 4 if tiny else 32)


def _kernels(
    shape: str, speed: Speed, freeze: bool, device: torch.device, count: int
) -> list[dict]:
    """A row for the step, then rows for its kernels. The first `count` steps of an image warm up;
    the next `count` are timed, then drawn again and profiled.
    """
    from torch._inductor import config

    torch.compiler.reset()
    model = attached(open_backbone(shape, torch.bfloat16, device), "base")
    with torch.no_grad(), config.patch({"freezing": True}) if freeze else nullcontext():
        drawing, run = _new_drawing(model, speed)
        restart = partial(_steps_from_start, model, drawing, run)
        _do(restart(), 2 * count)  # compiles and records
        _do(steps := restart(), count)
        taken = seconds(partial(_do, steps, count), device) / count
        _do(steps := restart(), count)
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiled:
            seconds(partial(_do, steps, count), device)
    return _profile_rows(profiled, device, count, taken)


def _new_drawing(model: TensorAR, speed: Speed) -> tuple[Drawing, Run]:
    settings = SamplingConfig(cfg_scale=2.0, top_k=2000)
    condition = encode_rows(model.backbone, made_up(model.backbone, SMALL), guided=True)
    scales = guidance_table(model, settings)
    keys = torch.arange(SMALL, device=model.backbone.device)
    return begin(model, condition, scales, keys, settings, speed, 0)


def _steps_from_start(model: TensorAR, drawing: Drawing, run: Run) -> Iterator[int]:
    """The steps of the images from the start; the first one runs the prefix."""
    drawing.index.zero_()
    return whole_run(model, drawing, run)


def _do(steps: Iterator[int], count: int) -> None:
    for _ in islice(steps, count):
        pass


def _profile_rows(profiled: profile, device: torch.device, count: int, taken: float) -> list[dict]:
    """The rows of `_kernels`, for steps of `taken` seconds; a CPU has operations as kernels."""
    on_gpu = device.type == "cuda"
    kind, time = ("CUDA", "self_device_time_total") if on_gpu else ("CPU", "self_cpu_time_total")
    found = [
        (event.key, event.count, getattr(event, time))
        for event in profiled.key_averages()
        if event.device_type.name == kind
    ]
    found.sort(key=lambda kernel: -kernel[2])
    busy_us = sum(us for _, _, us in found) / count
    step = {
        "kernels": sum(times for _, times, _ in found) / count,
        "busy_ms": busy_us / 1e3,
        "ms_per_step": 1e3 * taken,
        "idle": 1 - busy_us / 1e6 / taken,
    }
    return [step] + [
        {"kernel": key[:80], "kernels": times / count, "busy_ms": us / count / 1e3}
        for key, times, us in found[:SHOWN]
    ]

"""A part of `gpu_check.py`: what does a step of drawing do on the GPU, and for how long is it idle?

Near the floor a step would read its weights and do nothing else. What it takes longer is many small
kernels, and the gaps between them; which ones, is shown by torch's profiler.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from launch.lab.gpu_speed import ALONE, Rows
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
"""Name, how steps are run, and whether the compiler may lay weights of one input side by side."""
SHOWN = 15
"""Kernels of a step that have a row, the longest first."""


def kernel_rows(device: torch.device, tiny: bool) -> Rows:
    for shape in ("tiny-class",) if tiny else SHAPES:
        for name, speed, freeze in (("eager", "eager", False),) if tiny else WAYS:
            about = {"shape": shape, "images": ALONE, "steps are": name}
            yield about, partial(_kernels, shape, speed, freeze, device, 4 if tiny else 32)


def _kernels(
    shape: str, speed: Speed, freeze: bool, device: torch.device, count: int
) -> list[dict]:
    """A row for the step, then one for each kernel, of `count` steps behind as many."""
    torch.compiler.reset()
    model = attached(open_backbone(shape, torch.bfloat16, device), "base")
    with torch.no_grad(), _freezing(freeze):
        drawing, run = _begun(model, speed)
        again = partial(_steps, model, drawing, run)
        _do(again(), 2 * count)  # compiles and records
        _do(steps := again(), count)
        taken = seconds(partial(_do, steps, count), device) / count
        _do(steps := again(), count)
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiled:
            seconds(partial(_do, steps, count), device)
    return _told(profiled, device, count, taken)


def _freezing(freeze: bool) -> AbstractContextManager:
    from torch._inductor import config

    return config.patch({"freezing": True}) if freeze else nullcontext()


def _begun(model: TensorAR, speed: Speed) -> tuple[Drawing, Run]:
    settings = SamplingConfig(cfg_scale=2.0, top_k=2000)
    condition = encode_rows(model.backbone, made_up(model.backbone, ALONE), guided=True)
    scales, keys = guidance_table(model, settings), torch.arange(ALONE)
    keys = keys.to(model.backbone.device)
    return begin(model, condition, scales, keys, settings, speed, 0)


def _steps(model: TensorAR, drawing: Drawing, run: Run) -> Iterator[int]:
    """Of an image from its beginning; the first is the prefix's."""
    drawing.index.zero_()
    return whole_run(model, drawing, run)


def _do(steps: Iterator[int], count: int) -> None:
    for _ in islice(steps, count):
        pass


def _told(profiled: profile, device: torch.device, count: int, taken: float) -> list[dict]:
    """On a CPU operations stand for kernels."""
    on_gpu = device.type == "cuda"
    kind, us = ("CUDA", "self_device_time_total") if on_gpu else ("CPU", "self_cpu_time_total")
    found = [
        (event.key, event.count, getattr(event, us))
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

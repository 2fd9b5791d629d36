"""Parts of `gpu_check.py` that measure how fast drawing and training are, and how close to what the
machine can do.

This file says which shapes are measured, and in which order; launch/measure does the measuring.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from launch.lab.fewer_steps import Study
from launch.lab.fewer_steps_seconds import study_seconds
from launch.measure import roofline, timed_sampling, timed_training
from launch.measure.roofline import Machine
from launch.measure.shapes import TINY, attached, made_up, open_backbone
from launch.measure.timed_sampling import DTYPES, Group
from launch.measure.timed_training import TrainingGroup
from t2i.sampling import Speed
from t2i.tensorar.room import drawing_bytes
from t2i.tensorar.sampler import sample_windows

Rows = Iterator[tuple[dict, Callable[[], dict | list[dict]]]]
"""For one row or several: columns that describe them, and a function that measures the rest."""
METHODS = ("base", "iclr2026")
LARGE, SMALL = 64, 8
"""Numbers of images drawn at once."""
Cases = tuple[tuple[str, int, tuple[Speed, ...], tuple[str, ...]], ...]
"""For drawing, each: shape, images at once, ways of running the steps, peers."""
SAMPLED: Cases = (
    ("llamagen-B", SMALL, ("graphs", "eager"), ("cat-cache", "transformers")),
    ("llamagen-XL", LARGE, ("graphs",), ()),
    ("janus-1B", SMALL, ("graphs",), ()),
    ("llamagen-B", LARGE, ("graphs",), ()),
    ("llamagen-XL", SMALL, ("graphs", "eager"), ()),
    ("janus-1B", LARGE, ("graphs",), ()),
    ("janus-7B", SMALL, ("graphs",), ()),
    ("llamagen-B", 1, ("graphs",), ()),
    ("llamagen-B", 128, ("graphs",), ("transformers-static",)),
    ("janus-1B", SMALL, ("graphs", "eager"), ("transformers",)),
    ("llamagen-text-XL", SMALL, ("graphs",), ()),
    ("rar-XL", SMALL, ("graphs",), ()),
    ("open-magvit2-B", SMALL, ("graphs",), ()),
    ("janus-7B", LARGE, ("graphs",), ()),
)
"""The most informative first."""
COMPILED: Cases = (
    ("llamagen-B", SMALL, ("graphs", "compiled"), ()),
    ("llamagen-XL", SMALL, ("graphs", "compiled"), ()),
    ("llamagen-B", LARGE, ("graphs", "compiled"), ()),
)
TRAINED = {"llamagen-B": 32, "llamagen-XL": 32, "janus-1B": 8}
"""Shapes, each with its number of samples per step."""
DRAWN_FOR_MEMORY = ("janus-1B", "llamagen-text-XL", "janus-7B")
SPECULATED = {
    **{("shapes", images): 0 for images in (1, 4, 16, 64)},
    **{("llamagen-XL", images): 48 for images in (1, 8)},
    **{("janus-1B", images): 48 for images in (1, 8)},
    **{("shapes-janus", images): 0 for images in (1, 4)},
}
"""Base or shape, and images at once -> most calls of a batch; 0: whole images. Shapes have random
weights: they show how long a call takes, not how many an image needs.
"""
TRAINED_COMPILED = ("llamagen-XL", "llamagen-B")


def known_machine(device: torch.device, tiny: bool) -> tuple[Machine, dict]:
    """The machine with its measured rates, and a row that reports them."""
    machine = roofline.measured(device, DTYPES, tiny=tiny)
    rates = {f"{name}_TFLOP/s": rate / 1e12 for name, rate in machine.rates.items()}
    return machine, {"bandwidth_GB/s": machine.bandwidth / 1e9, **rates}


def sampling_rows(device: torch.device, tiny: bool) -> Rows:
    machine, row = known_machine(device, tiny)
    yield {"shape": "copy, matrix products"}, lambda: row
    rehearsed: Cases = tuple((s, 2, ("eager",), ("cat-cache", "transformers")) for s in TINY)
    yield from _sampled(rehearsed if tiny else SAMPLED, device, machine, 8 if tiny else 64)


def compiled_rows(device: torch.device, tiny: bool) -> Rows:
    machine, _ = known_machine(device, tiny)
    rehearsed: Cases = (("tiny-class", 2, ("eager",), ()),)
    yield from _sampled(rehearsed if tiny else COMPILED, device, machine, 8 if tiny else 64)


def _sampled(cases: Cases, device: torch.device, machine: Machine, timed: int) -> Rows:
    """The rows of these cases, from `timed` steps each."""
    for shape, images, speeds, peers in cases:
        group = Group(shape, "bf16", images, METHODS, speeds, peers, steps=timed, rounds=4)
        yield {"shape": shape, "images": images}, partial(_draw, group, device, machine)


def _draw(group: Group, device: torch.device, machine: Machine) -> list[dict]:
    return [_short(row) for row in timed_sampling.measure(group, device, machine)]


def training_rows(device: torch.device, tiny: bool) -> Rows:
    machine, row = known_machine(device, tiny)
    yield {"shape": "copy, matrix products"}, lambda: row
    for shape, batch in (dict.fromkeys(TINY, 2) if tiny else TRAINED).items():
        group = TrainingGroup(shape, "bf16", batch, METHODS, naive=True)
        yield {"shape": shape, "batch": batch}, partial(_train, group, device, machine)


def compiled_training_rows(device: torch.device, tiny: bool) -> Rows:
    machine, _ = known_machine(device, tiny)
    on_gpu = device.type == "cuda"  # compiling takes minutes on a CPU
    for shape in list(TINY)[:1] if tiny else TRAINED_COMPILED:
        batch = 2 if tiny else TRAINED[shape]
        group = TrainingGroup(shape, "bf16", batch, METHODS, compiled=on_gpu)
        yield {"shape": shape, "batch": batch}, partial(_train, group, device, machine)


def _train(group: TrainingGroup, device: torch.device, machine: Machine) -> list[dict]:
    """The group's rows, with the peak memory that `--check` estimates."""
    rows = timed_training.measure(group, device, machine, memory=device.type == "cuda")
    for row in rows:
        if row["contender"] == row["method"]:
            row["estimate_gb"] = timed_training.estimated_gb(group, row["method"])
    return [_short(row) for row in rows]


def memory_rows(device: torch.device, tiny: bool) -> Rows:
    for shape in list(TINY)[:1] if tiny else DRAWN_FOR_MEMORY:
        for images in (2,) if tiny else (1, 16):
            about = {"shape": shape, "images": images}
            yield about, partial(_memory, shape, images, device)


@torch.no_grad()
def _memory(shape: str, images: int, device: torch.device) -> dict:
    """The peak of drawing whole images and decoding them, and what it was expected to be."""
    on_gpu, before = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = attached(open_backbone(shape, torch.bfloat16, device, tokenizer=True), "iclr2026")
    sampling = model.sampling
    estimate = drawing_bytes(model, sampling, images)
    prepared, keys = made_up(model.backbone, images), torch.arange(images)
    speed: Speed = "graphs" if on_gpu else "eager"
    windows = sample_windows(model, prepared, keys, sampling, speed=speed)
    model.backbone.decode_images(model.windows.final_codes(windows))
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return {"peak_gb": peak / 1e9, "estimate_gb": estimate / 1e9}


def speculation_rows(device: torch.device, tiny: bool) -> Rows:
    cases = {("tiny-class", 2): 4} if tiny else SPECULATED
    for (base, images), most_calls in cases.items():
        study = Study(
            "seconds",
            bases=(base,),
            ahead=(3,) if tiny else (8, 16),
            batches=(images,),
            speed="graphs" if device.type == "cuda" else "eager",
            device=device.type,
            dtype="bfloat16",
            rounds=1 if tiny else 2,
            most_calls=most_calls,
        )
        yield {"base": base, "batch": images}, partial(_speculation, study)


def _speculation(study: Study) -> list[dict]:
    """Drawing code by code, then with speculation; `faster` compares whole images."""
    rows = list(study_seconds(study))
    first = rows[0].get("s_per_image")
    for row in rows:
        if first is not None:
            row["faster"] = first / row["s_per_image"]
    processor = {"processor_ms_per_call", "processor_s_per_image"}
    return [{k: v for k, v in _short(row).items() if k not in processor} for row in rows]


def _short(row: dict) -> dict:
    """The row without lists and without values that other columns imply."""
    left_out = {"dtype", "method", "speed", "speculate", "floor_bytes", "floor_flops", "flops"}
    return {k: v for k, v in row.items() if k not in left_out and not isinstance(v, list)}

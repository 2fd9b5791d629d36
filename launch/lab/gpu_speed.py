"""Parts of `gpu_check.py`: how fast is drawing and training, and how near to what is possible?

What is measured, of which shapes and in which order; how is `launch/measure`.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from launch.measure import roofline, timed_sampling
from launch.measure import timed_training as steps
from launch.measure.roofline import Machine
from launch.measure.shapes import TINY
from launch.measure.timed_sampling import DTYPES, Group
from launch.measure.timed_training import TrainingGroup
from t2i.sampling import Speed

Rows = Iterator[tuple[dict, Callable[[], dict | list[dict]]]]
"""What the rows of a part are about, and the work that fills one or several."""
METHODS = ("base", "iclr2026")
LARGE, ALONE = 64, 8
"""Images drawn at once."""
SAMPLED: tuple[tuple[str, int, tuple[Speed, ...], tuple[str, ...]], ...] = (
    ("llamagen-B", ALONE, ("graphs", "eager"), ("cat-cache", "transformers")),
    ("llamagen-XL", LARGE, ("graphs",), ()),
    ("janus-1B", ALONE, ("graphs",), ()),
    ("llamagen-B", LARGE, ("graphs",), ()),
    ("llamagen-XL", ALONE, ("graphs", "eager"), ()),
    ("janus-1B", LARGE, ("graphs",), ()),
    ("janus-7B", ALONE, ("graphs",), ()),
    ("llamagen-B", 1, ("graphs",), ()),
    ("llamagen-B", 128, ("graphs",), ("transformers-static",)),
    ("janus-1B", ALONE, ("graphs", "eager"), ("transformers",)),
    ("llamagen-text-XL", ALONE, ("graphs",), ()),
    ("rar-XL", ALONE, ("graphs",), ()),
    ("open-magvit2-B", ALONE, ("graphs",), ()),
    ("janus-7B", LARGE, ("graphs",), ()),
)
"""Shape, images at once, ways of running the steps, peers; the most telling first."""
COMPILED = (("llamagen-B", ALONE), ("llamagen-XL", ALONE), ("llamagen-B", LARGE))
TRAINED = {"llamagen-B": 32, "llamagen-XL": 32, "janus-1B": 8}
"""Samples per step."""
TRAINED_COMPILED = ("llamagen-XL", "llamagen-B")


def known_machine(device: torch.device, tiny: bool) -> tuple[Machine, dict]:
    """What it can do, and a row that says so."""
    machine = roofline.measured(device, DTYPES, tiny=tiny)
    rates = {f"{name}_TFLOP/s": rate / 1e12 for name, rate in machine.rates.items()}
    return machine, {"bandwidth_GB/s": machine.bandwidth / 1e9, **rates}


def sampling_rows(device: torch.device, tiny: bool) -> Rows:
    machine, row = known_machine(device, tiny)
    yield {"shape": "copy, matrix products"}, lambda: row
    if tiny:
        for shape in TINY:
            yield _drawn(shape, 2, ("eager",), ("cat-cache", "transformers"), device, machine, 8)
        return
    for shape, images, speeds, peers in SAMPLED:
        yield _drawn(shape, images, speeds, peers, device, machine, 64)


def compiled_rows(device: torch.device, tiny: bool) -> Rows:
    machine, _ = known_machine(device, tiny)
    if tiny:
        yield _drawn("tiny-class", 2, ("eager", "eager"), (), device, machine, 8)
        return
    for shape, images in COMPILED:
        yield _drawn(shape, images, ("graphs", "compiled"), (), device, machine, 64)


def _drawn(
    shape: str,
    images: int,
    speeds: tuple[Speed, ...],
    peers: tuple[str, ...],
    device: torch.device,
    machine: Machine,
    timed: int,
) -> tuple[dict, Callable[[], list[dict]]]:
    group = Group(shape, "bf16", images, METHODS, speeds, peers, steps=timed, rounds=4)
    about = {"shape": shape, "images": images}
    return about, lambda: [_short(row) for row in timed_sampling.measure(group, device, machine)]


def training_rows(device: torch.device, tiny: bool) -> Rows:
    machine, row = known_machine(device, tiny)
    yield {"shape": "copy, matrix products"}, lambda: row
    for shape, batch in (dict.fromkeys(TINY, 2) if tiny else TRAINED).items():
        group = TrainingGroup(shape, "bf16", batch, METHODS, naive=True)
        yield {"shape": shape, "batch": batch}, partial(_trained, group, device, machine)


def compiled_training_rows(device: torch.device, tiny: bool) -> Rows:
    machine, _ = known_machine(device, tiny)
    on_gpu = device.type == "cuda"  # on a CPU it takes minutes
    for shape in list(TINY)[:1] if tiny else TRAINED_COMPILED:
        batch = 2 if tiny else TRAINED[shape]
        group = TrainingGroup(shape, "bf16", batch, METHODS, compiled=on_gpu)
        yield {"shape": shape, "batch": batch}, partial(_trained, group, device, machine)


def _trained(group: TrainingGroup, device: torch.device, machine: Machine) -> list[dict]:
    """With what `--check` expects of the memory."""
    on_gpu = device.type == "cuda"
    rows = steps.measure(group, device, machine, memory=on_gpu)
    for row in rows:
        if row["contender"] == row["method"]:
            row["estimate_gb"] = steps.estimated_gb(group, row["method"])
    return [_short(row) for row in rows]


def _short(row: dict) -> dict:
    """Without what is in another column, and without lists."""
    left_out = {"dtype", "method", "speed", "speculate", "floor_bytes", "floor_flops", "flops"}
    return {k: v for k, v in row.items() if k not in left_out and not isinstance(v, list)}

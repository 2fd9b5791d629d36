"""How many windows of each image a call should draw, where that is left to the kit: measured.

A call of n windows costs more than one of a single window: hardly more while reading the weights or
starting the operations is what takes the time (few rows on a GPU), many times as much where
arithmetic is. What it saves depends on how many guesses come true. The first is measured on the
model, device, batch and speed at hand; the second is assumed to be as on the shipped bases.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from t2i.sampling import SamplingConfig, Speed
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import timed_call
from t2i.tensorar.speed import say

CALLS = {4: 0.62, 8: 0.47, 16: 0.4}
"""Calls per code with so many windows a call: the worst of the shipped bases and guidance scales
(docs/fewer_steps.md).
"""
PAYS_FROM = 64
"""Windows of a request for each image of a batch: measuring costs as much as some twenty calls, and
the more images, the less can be won.
"""
CPU_IMAGES = 8
"""At more images at once it has never paid on a CPU, whose arithmetic is what takes the time."""
HOPELESS = 1.5
"""Times as long as a call of one window: twice as many windows cannot be better then."""
MARGIN = 0.9
"""Of the time without; what is nearer is not told apart by a few calls."""
ROUNDS = 2


def choose_ahead(
    model: TensorAR,
    batch: int,
    prepare: Callable[[], dict[str, Tensor]],
    config: SamplingConfig,
    speed: Speed,
    steps: int,
) -> int:
    """Windows of each image that a call should draw, and says it; 0: one by one.

    Args:
        batch: images at once.
        prepare: makes their conditions.
        steps: windows of the whole request.
    """
    device = model.backbone.device.type
    if steps < PAYS_FROM * batch or (device == "cpu" and batch > CPU_IMAGES):
        return 0
    if speed == "compiled":  # what is measured would be compiled first, a minute for each
        say("speculate: off, for compiled steps; give a number to have it")
        return 0
    prepared, ratios = prepare(), {}
    for ahead in CALLS:
        cost = measure(model, prepared, config, speed, (0, ahead))
        ratios[ahead] = cost[ahead] / cost[0]
        if ratios[ahead] > HOPELESS:
            break
    expected = {ahead: CALLS[ahead] * ratio for ahead, ratio in ratios.items()}
    best = min(expected, key=lambda ahead: expected[ahead])
    chosen = best if expected[best] <= MARGIN else 0
    times = ", ".join(f"{ahead}: {ratio:.2f}" for ahead, ratio in ratios.items())
    say(
        f"speculate: {chosen or 'off'}, for batches of {batch} on {device} "
        f"(a call of so many windows takes so many times as long: {times})"
    )
    return chosen


def measure(
    model: TensorAR,
    prepared: dict[str, Tensor],
    config: SamplingConfig,
    speed: Speed,
    tried: tuple[int, ...],
) -> dict[int, float]:
    """Seconds of a call that draws so many windows of each image."""
    device = model.backbone.device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    works = {ahead: timed_call(model, prepared, config, speed, ahead) for ahead in tried}
    times: dict[int, list[float]] = {ahead: [] for ahead in tried}
    for _ in range(1 + ROUNDS):  # the first one loads, compiles or records
        for ahead, work in works.items():  # in turns: something else may run beside them
            wait()
            start = time.perf_counter()
            work()
            wait()
            times[ahead].append(time.perf_counter() - start)
    return {ahead: min(taken[1:]) for ahead, taken in times.items()}

"""How time and memory grow with codes, slots, images and parameters, varied one at a time.

The model is a small class-conditional LlamaGen with random weights, in fp32; its grid sets the
number of codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from launch.measure.peak_memory import peak_gb
from launch.measure.roofline import multiplied
from launch.measure.shapes import filled, llamagen, made_up
from launch.measure.timed_training import TrainingStep
from launch.measure.turns import alike_in_turns, quartiles
from t2i.generation import choose_run
from t2i.sampling import DrawOptions, SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows


@dataclass(frozen=True)
class Point:
    """What to draw or train."""

    side: int = 16
    """Codes per row and rows per image."""
    k: int = 4
    images: int = 4
    """Images drawn at once, with guidance, or samples per training step."""
    dim: int = 256
    layers: int = 6

    def model(self, device: torch.device) -> TensorAR:
        shape = {"dim": self.dim, "n_layer": self.layers, "n_head": self.dim // 64}
        backbone = filled(
            llamagen(**shape, grid=(self.side, self.side), vocab_size=4096), torch.float32, device
        )
        method = presets.iclr2026(k=self.k) if self.k > 1 else presets.base()
        return TensorAR(backbone, method).eval()

    def work(self, variable: str, model: TensorAR) -> int:
        """The amount of the varied quantity."""
        return {
            "T": self.side**2,
            "k": self.k,
            "images": self.images,
            "parameters": multiplied(model),
        }[variable]


def points(base: Point, *, tiny: bool = False) -> dict[str, list[Point]]:
    """Points to measure, by the varied quantity."""
    shapes = [(128, 4), (256, 6), (384, 8), (512, 12)]
    return {
        "T": [replace(base, side=n) for n in ((4, 6, 8) if tiny else (8, 12, 16, 24))],
        "k": [replace(base, k=n) for n in (1, 2, 4, 8)],
        "images": [replace(base, images=n) for n in ((1, 2, 4) if tiny else (1, 2, 4, 8, 16))],
        "parameters": [replace(base, dim=d, layers=n) for d, n in (shapes[:2] if tiny else shapes)],
    }


def drawing(model: TensorAR, images: int):
    """A function that draws images as a user's program would."""
    speed, speculate = choose_run(model, DrawOptions(), 1, images)
    prepared = made_up(model.backbone, images)
    keys, settings = torch.arange(images), SamplingConfig(cfg_scale=2.0)
    return partial(
        sample_windows, model.eval(), prepared, keys, settings, speed=speed, speculate=speculate
    )


def training(model: TensorAR, images: int) -> TrainingStep:
    prepared = made_up(model.backbone, images)
    return TrainingStep(model, prepared, torch.optim.AdamW(model.parameters(), lr=1e-6))


WORKS = {"drawing": drawing, "training": training}


def measure(
    variable: str, series: Sequence[Point], device: torch.device, *, rounds: int, memory: bool
) -> list[dict]:
    """Rows of the points, which take turns in every round."""
    rows = []
    for work, prepare in WORKS.items():
        runs = {}
        for point in series:
            model = point.model(device)
            runs[str(point.work(variable, model))] = prepare(model, point.images)
        times = alike_in_turns(runs, device, rounds)
        for point, (size, found) in zip(series, times.items(), strict=True):
            row: dict = {"variable": variable, "work": work, "x": int(size)}
            if found.error is not None:
                rows.append(row | {"error": found.error})
                continue
            low, middle, high = quartiles(found.per_step)
            row |= {"seconds": middle, "seconds_quartiles": [low, high]}
            if memory:
                row["peak_gb"] = peak_gb(_once, work, point, device.type)
            rows.append(row)
    return rows


def _once(work: str, point: Point, device: str) -> None:
    run = WORKS[work](point.model(torch.device(device)), point.images)
    for _ in range(2):
        run()


def fits(rows: Sequence[dict]) -> list[dict]:
    """A row for every quantity, work and cost that all their points have."""
    series: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "variable" in row:  # else a whole group ran out of memory
            series.setdefault((row["variable"], row["work"]), []).append(row)
    found = []
    for (variable, work), own in series.items():
        for cost in ("seconds", "peak_gb"):
            if all(row.get(cost, 0) > 0 for row in own):
                exponent, factor, residual = power_law(
                    [row["x"] for row in own], [row[cost] for row in own]
                )
                about = {"variable": variable, "work": work, "cost": cost}
                fit = {"exponent": exponent, "factor": factor, "residual": residual}
                found.append(about | fit)
    return found


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Exponent b and factor a of the fit y = a x^b, and the residuals' root mean square (of
    logarithms).
    """
    lx, ly = ([math.log(v) for v in values] for values in (x, y))
    mean_x, mean_y = sum(lx) / len(lx), sum(ly) / len(ly)
    spread = sum((v - mean_x) ** 2 for v in lx)
    b = sum((u - mean_x) * (v - mean_y) for u, v in zip(lx, ly, strict=True)) / spread
    rest = [v - mean_y - b * (u - mean_x) for u, v in zip(lx, ly, strict=True)]
    return b, math.exp(mean_y - b * mean_x), math.sqrt(sum(r * r for r in rest) / len(rest))

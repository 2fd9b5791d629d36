"""What speculation gains on the shipped bases: calls per code, where guesses are right, how often
rounding changes a code, and seconds per image. docs/fewer_steps.md shows the results.

python launch/lab/fewer_steps.py calls                  # OUT/calls.json and acceptance.svg
python launch/lab/fewer_steps.py calls --dtype bfloat16 # OUT/calls_bfloat16.json
python launch/lab/fewer_steps.py seconds --bases shapes --batches 1 4   # best on one thread
python launch/lab/fewer_steps.py seconds --strides 1 2 4                # also with a codec
python launch/lab/fewer_steps.py seconds --device cuda --speed graphs   # OUT/seconds_graphs.json
"""

import platform
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.sampling import Speed

if TYPE_CHECKING:
    from torch import Tensor

    from t2i.sampling import SamplingConfig
    from t2i.tensorar.model import TensorAR

PROMPTS = (
    "a photo of a red circle",
    "a photo of two blue squares",
    "a photo of a green star",
    "a photo of a circle left of a square",
    "a photo of three yellow triangles",
    "a photo of a purple ring and a red star",
    "a photo of an orange square",
    "a photo of a blue circle above a green triangle",
    "a photo of four red squares",
    "a photo of a pink star",
    "a photo of two circles",
    "a photo of a yellow square",
)


@dataclass(frozen=True)
class Study:
    """What to measure."""

    part: tyro.conf.Positional[Literal["calls", "seconds"]]
    """calls: calls and codes, which depend on no machine; seconds: time per call and per image."""
    bases: tuple[str, ...] = ("shapes", "shapes-janus")
    """Shipped bases or checkpoint folders. `seconds` also takes published shapes such as
    llamagen-XL, with random weights: they show how long a call takes, not how many are needed.
    """
    ahead: tuple[int, ...] = (4, 8, 16)
    """Numbers of windows per call to try."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of images drawn at once (`seconds` only)."""
    strides: tuple[int, ...] = ()
    """Strides to try as well, with an untrained codec whose k is the largest of them (`seconds`
    only).
    """
    speed: Speed = "eager"
    """How steps are run (`seconds` only); recording or compiling is not timed."""
    device: str = "cpu"
    """auto, cpu or cuda."""
    dtype: str = "float32"
    """Type of the weights."""
    rounds: int = 3
    """How often each contender draws each batch; the fastest time counts (`seconds` only)."""
    most_calls: int = 0
    """Stop each batch after this many calls; 0: draw whole images (`seconds` only)."""
    out: Path = Path("docs/fewer_steps")
    """Folder for the results."""


# -- calls and codes -------------------------------------------------------------------------------


def conditions(model: "TensorAR", rows: int) -> "tuple[dict[str, Tensor], Tensor]":
    """Prepared conditions and keys of this many images; the prompts repeat."""
    import torch

    from t2i.rng import make_keys

    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    prepared = model.backbone.prepare(prompts, model.backbone.prefix_length(PROMPTS))
    return prepared, make_keys(0, torch.arange(rows), 0)


def courses(
    model: "TensorAR", config: "SamplingConfig", ahead: int
) -> "tuple[Tensor, list[list[int]]]":
    """The windows of one image per prompt, and for each image the last settled window after each
    call that it needed.
    """
    import torch

    from t2i.tensorar.sampler import begin, encode_rows, guidance_table, whole_run

    prepared, keys = conditions(model, len(PROMPTS))
    keys = keys.to(model.backbone.device)
    with torch.no_grad():
        scales = guidance_table(model, config)
        condition = encode_rows(model.backbone, prepared, guided=scales is not None)
        drawing, run = begin(model, condition, scales, keys, config, "eager", ahead)
        ends: list[list[int]] = [[] for _ in PROMPTS]
        for _ in whole_run(model, drawing, run):
            settled = drawing.index.expand(len(ends), -1)[:, 0].tolist()
            for own, end in zip(ends, settled, strict=True):
                if not own or own[-1] < drawing.state.windows.count - 1:
                    own.append(end)
    return drawing.windows_BNkS[:, : drawing.state.windows.count], ends


def first_difference(
    model: "TensorAR", config: "SamplingConfig", plain: "Tensor", other: "Tensor"
) -> dict | None:
    """Where windows [B, N, k, S] first differ from those drawn one by one (`plain`), and by how
    much the plain code's score exceeds the other's: near 0 it is a tie that rounding decided. None
    if they are equal.
    """
    different = (plain != other).nonzero()
    if not len(different):
        return None
    row, window, slot, sub = at = tuple(different[0].tolist())
    scores = scores_at(model, config, plain, at)
    return {
        "row": row,
        "window": window,
        "slot": slot,
        "sub_token": sub,
        "gap": float(scores[plain[at]] - scores[other[at]]),
    }


def scores_at(
    model: "TensorAR", config: "SamplingConfig", windows: "Tensor", at: tuple[int, int, int, int]
) -> "Tensor":
    """log p + G of every code at (row, window, slot, sub-token), given the codes before it: [V]."""
    import torch

    from t2i.rng import gumbels
    from t2i.tensorar.drawing import candidates, noise_keys, rules
    from t2i.tensorar.sampler import (
        drawn_windows,
        encode_rows,
        guidance_table,
        new_state,
        window_logits,
    )

    assert config.renoise == 0, "drafts must be fed back as they were drawn"
    row, window, slot, sub = at
    prepared, keys = conditions(model, len(windows))
    scales, geometry = guidance_table(model, config), drawn_windows(model, config)
    with torch.no_grad():
        condition = encode_rows(model.backbone, prepared, guided=scales is not None)
        state = new_state(model, condition, scales, geometry)
        both = torch.cat([windows, windows]) if state.guided else windows
        decoded = model.decode_slots(model.hidden(condition, both, stride=config.stride)[:, window])
        index = torch.tensor([window], device=windows.device)
        earlier = windows[:, window, :, :sub]
        logits = window_logits(model, decoded[:, : windows.shape[2]], earlier, index, state)
        logits = logits[row, slot]
    subs = windows.shape[-1]
    rule = rules(config, subs)[sub][slot >= config.stride]
    scores, codes = candidates(logits, rule)
    noise = noise_keys(keys.to(windows.device), geometry, subs)
    noisy = scores + gumbels(noise[window, row, slot, sub], codes)
    return torch.full_like(logits, -torch.inf).scatter(-1, codes.expand_as(noisy), noisy)


def calls_of(model: "TensorAR", config: "SamplingConfig", ahead: int, plain: "Tensor") -> dict:
    """A row of the table, with standard errors over prompts."""
    from t2i.tensorar.sampler import drawn_windows

    windows, ends = courses(model, config, ahead)
    geometry = drawn_windows(model, config)
    per_code = [len(own) / geometry.tokens for own in ends]
    # All windows that a call settles were guessed right, except its last.
    missed = [sum(place in own for own in ends) for place in range(geometry.count)]
    different = geometry.final_codes(windows) != geometry.final_codes(plain)
    return {
        "ahead": ahead,
        "calls_per_code": statistics.mean(per_code),
        "stderr": statistics.stdev(per_code) / len(per_code) ** 0.5,
        "guessed_right_by_position": [round(1 - images / len(ends), 4) for images in missed],
        "codes_that_differ": int(different.any(-1).sum()),
        "images_that_differ": int(different.flatten(1).any(1).sum()),
        "first_difference": first_difference(model, config, plain, windows),
    }


def study_calls(study: Study) -> Iterator[dict]:
    """The rows of the table of calls."""
    from t2i.checkpoint import load_model

    for base in study.bases:
        model = load_model(base, device=study.device, dtype=study.dtype)
        for scale in (1.0, model.sampling.cfg_scale):
            config = replace(model.sampling, cfg_scale=scale)
            plain, _ = courses(model, config, 0)
            for ahead in study.ahead:
                about = {"base": base, "cfg_scale": scale, "images": len(PROMPTS)}
                yield about | calls_of(model, config, ahead, plain)


# -- the picture -----------------------------------------------------------------------------------


def plot(rows: list[dict], path: Path) -> None:
    """Plot calls per code against windows per call, and where guesses are right."""
    from matplotlib.figure import Figure

    from t2i.charts import save_figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    curve, places = figure.subplots(1, 2)
    for base, scale in dict.fromkeys((row["base"], row["cfg_scale"]) for row in rows):
        own = [row for row in rows if (row["base"], row["cfg_scale"]) == (base, scale)]
        label = f"{base}, guidance {scale:g}"
        calls = [row["calls_per_code"] for row in own]
        errors = [row["stderr"] for row in own]
        curve.errorbar([row["ahead"] for row in own], calls, errors, marker="o", label=label)
        if scale > 1:
            places.plot(own[-1]["guessed_right_by_position"], label=label)
    curve.set(xlabel="codes a call (W)", ylabel="calls per code", ylim=(0, 1))
    curve.set_xscale("log", base=2)
    places.set(xlabel="place in the raster", title="guessed right, largest W", ylim=(0, 1))
    for axes in (curve, places):
        axes.legend(fontsize=7)
    save_figure(figure, path)


def main() -> None:
    study = cli.parse(Study, __doc__)
    import torch

    from launch.lab.fewer_steps_seconds import study_seconds
    from t2i.files import writable_folder, write_json

    writable_folder(study.out)
    rows = []
    for row in {"calls": study_calls, "seconds": study_seconds}[study.part](study):
        rows.append(row)
        print({k: v for k, v in row.items() if "position" not in k}, flush=True)
    on_gpu = study.device != "cpu" and torch.cuda.is_available()
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "dtype": study.dtype,
    }
    kind = "" if study.dtype == "float32" else f"_{study.dtype}"
    ways = "" if study.speed == "eager" else f"_{study.speed}"
    write_json(study.out / f"{study.part}{ways}{kind}.json", {**machine, "rows": rows})
    if study.part == "calls" and study.dtype == "float32":
        plot(rows, study.out / "acceptance.svg")


if __name__ == "__main__":
    cli.run(main)

"""What speculation brings on the shipped bases: calls per code, where guesses come true, how often
rounding changes a code, and seconds per image. docs/fewer_steps.md shows the results.

python launch/lab/fewer_steps.py calls                  # OUT/calls.json and acceptance.svg
python launch/lab/fewer_steps.py calls --dtype bfloat16 # OUT/calls_bfloat16.json
python launch/lab/fewer_steps.py seconds --bases shapes --batches 1 4   # best on one thread
python launch/lab/fewer_steps.py seconds --strides 1 2 4                # with a codec as well
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
    """Calls and codes, which depend on no machine, or seconds."""
    bases: tuple[str, ...] = ("shapes", "shapes-janus")
    """Shipped bases, or checkpoint folders; of `seconds` also published shapes, such as
    llamagen-XL, with random weights: what a call takes, not how many there are.
    """
    ahead: tuple[int, ...] = (4, 8, 16)
    """Windows that a call draws."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Images at once, of `seconds`."""
    strides: tuple[int, ...] = ()
    """Of `seconds`: draw so, too, with an untrained codec of windows as large as the largest."""
    speed: Speed = "eager"
    """How steps are run, of `seconds`; compiled compiles each contender first."""
    device: str = "cpu"
    """auto, cpu or cuda."""
    dtype: str = "float32"
    rounds: int = 3
    """Of `seconds`: contenders take turns, and the fastest of each counts."""
    most_calls: int = 0
    """Of `seconds`: stop an image after so many calls; 0: never."""
    out: Path = Path("docs/fewer_steps")
    """Folder of the results."""


# -- calls and codes -------------------------------------------------------------------------------


def conditions(model: "TensorAR", rows: int) -> "tuple[dict[str, Tensor], Tensor]":
    """Of so many images, prompts in turn: what is prepared, and keys."""
    import torch

    from t2i.rng import make_keys

    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    prepared = model.backbone.prepare(prompts, model.backbone.prefix_length(PROMPTS))
    return prepared, make_keys(0, torch.arange(rows), 0)


def courses(
    model: "TensorAR", config: "SamplingConfig", ahead: int
) -> "tuple[Tensor, list[list[int]]]":
    """Windows of an image of every prompt, and of each the window that was settled last after
    every call that it needed.
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
    """Where windows [B, N, k, S] first differ from those drawn one by one for the same conditions,
    and by how much the code that was drawn there beats the other: a tie within rounding is no
    fault. None if they are equal.
    """
    different = (plain != other).flatten(1).nonzero()
    if not len(different):
        return None
    row, place = different[0].tolist()
    _, slots, subs = plain.shape[1:]
    window, slot, sub = place // (slots * subs), place // subs % slots, place % subs
    at = (row, window, slot, sub)
    said = scores_at(model, config, plain, at)
    return {
        "row": row,
        "window": window,
        "slot": slot,
        "sub_token": sub,
        "gap": float(said[plain[at]] - said[other[at]]),
    }


def scores_at(
    model: "TensorAR", config: "SamplingConfig", windows: "Tensor", at: tuple[int, int, int, int]
) -> "Tensor":
    """log p + G of every code at (row, window, slot, sub-token), given what came before: [V]."""
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

    assert config.renoise == 0, "drafts are taken to be fed back as they are"
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
    """A row of the table: with standard errors over prompts."""
    from t2i.tensorar.sampler import drawn_windows

    windows, ends = courses(model, config, ahead)
    geometry = drawn_windows(model, config)
    count, codes = geometry.count, geometry.final_codes
    per_code = [len(own) / geometry.tokens for own in ends]
    # In every call the last window that it settles was not guessed, or guessed wrong.
    guessed = [1 - sum(place in own for own in ends) / len(ends) for place in range(count)]
    return {
        "ahead": ahead,
        "calls_per_code": statistics.mean(per_code),
        "stderr": statistics.stdev(per_code) / len(per_code) ** 0.5,
        "guessed_right_by_position": [round(share, 4) for share in guessed],
        "codes_that_differ": int((codes(windows) != codes(plain)).any(-1).sum()),
        "images_that_differ": int((codes(windows) != codes(plain)).flatten(1).any(1).sum()),
        "first_difference": first_difference(model, config, plain, windows),
    }


def study_calls(study: Study) -> Iterator[dict]:
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
    """Calls per code against windows a call, and where guesses come true."""
    from matplotlib.figure import Figure

    from t2i.charts import save_figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    curve, places = figure.subplots(1, 2)
    kinds = list(dict.fromkeys((row["base"], row["cfg_scale"]) for row in rows))
    for kind in kinds:
        own = [row for row in rows if (row["base"], row["cfg_scale"]) == kind]
        label = f"{kind[0]}, guidance {kind[1]:g}"
        calls = [row["calls_per_code"] for row in own]
        errors = [row["stderr"] for row in own]
        curve.errorbar([row["ahead"] for row in own], calls, errors, marker="o", label=label)
        if kind[1] > 1:
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

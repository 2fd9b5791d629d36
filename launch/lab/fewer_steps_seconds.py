"""Time per call and per image: one code per call, with speculation, and with strides (the part
`seconds` of `fewer_steps.py`).
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from launch.lab.fewer_steps import PROMPTS, Study, conditions

if TYPE_CHECKING:
    from torch import Tensor

    from t2i.tensorar.model import TensorAR


class Way(NamedTuple):
    """How an image is drawn."""

    k: int
    """Codes per window; 1: no codec is attached."""
    stride: int = 1
    ahead: int = 0
    """Windows per call by speculation; 0: no speculation."""


class Redrawing:
    """Images (codes only) that are drawn again and again, batch by batch, with steps that are
    recorded or compiled once: as many full batches as the prompts fill, and at least one.
    """

    def __init__(self, model: "TensorAR", batch: int, study: Study, way: Way):
        import torch

        from t2i.tensorar.drawing import noise_keys
        from t2i.tensorar.sampler import begin, drawn_windows, encode_rows, guidance_table

        self.model, config = model, replace(model.sampling, stride=way.stride)
        windows = drawn_windows(model, config)
        self.images = batch * max(1, len(PROMPTS) // batch)
        prepared, keys = requests(model, self.images)
        scales, subs = guidance_table(model, config), len(model.backbone.spec.subvocabs)
        self.batches = []
        with torch.no_grad():
            for rows in torch.arange(self.images).split(batch):
                own = {name: value[rows] for name, value in prepared.items()}
                condition = encode_rows(model.backbone, own, guided=scales is not None)
                key = keys[rows].to(model.backbone.device)
                self.batches.append((condition, key, noise_keys(key, windows, subs)))
            condition, key, _ = self.batches[0]
            self.drawing, self.run = begin(
                model, condition, scales, key, config, study.speed, way.ahead
            )

    def draw(self, number: int, most: int) -> tuple[int, float, float]:
        """Draw batch `number`, with `most` calls at most (0: all). Returns the number of calls,
        processor seconds and wall-clock seconds.
        """
        from t2i.tensorar.sampler import whole_run

        start, calls = (time.process_time(), time.perf_counter()), 0
        self.drawing.refill(*self.batches[number])
        # The prefix's call comes first and is number 0, so it is not counted.
        for calls, _ in enumerate(whole_run(self.model, self.drawing, self.run)):
            if calls == most > 0:
                break
        self.drawing.windows_BNkS.sum().item()  # waits for a GPU
        return calls, time.process_time() - start[0], time.perf_counter() - start[1]


def requests(model: "TensorAR", images: int) -> "tuple[dict[str, Tensor], Tensor]":
    """The `conditions` of this many images, or made-up ones if the model has no text encoder."""
    import torch

    from launch.measure.shapes import made_up
    from t2i.rng import make_keys

    if model.backbone.frozen.text_encoder is not None:
        return conditions(model, images)
    return made_up(model.backbone, images), make_keys(0, torch.arange(images), 0)


def opened(name: str, study: Study) -> "TensorAR":
    """A shipped base or checkpoint, or a published shape with random weights."""
    from launch.measure.shapes import PUBLISHED, TINY, attached, open_backbone
    from t2i.checkpoint import load_model
    from t2i.loading import pick_device
    from t2i.sampling import SamplingConfig

    if name not in (*PUBLISHED, *TINY):
        return load_model(name, device=study.device, dtype=study.dtype)
    device, dtype = pick_device(study.device, study.dtype)
    model = attached(open_backbone(name, dtype, device), "base")
    model.sampling = SamplingConfig(cfg_scale=2.0, top_k=1000)
    return model


def study_seconds(study: Study) -> Iterator[dict]:
    """The rows of the table of seconds."""
    from t2i.generation import choose_run
    from t2i.sampling import DrawOptions
    from t2i.tensorar import presets
    from t2i.tensorar.model import TensorAR

    for base in study.bases:
        model = opened(base, study)
        for batch in study.batches:
            options = DrawOptions(speed=study.speed, speculate="auto")
            auto = choose_run(model, options, 1, batch)[1]
            ways = [Way(model.windows.size, 1, n) for n in dict.fromkeys((0, *study.ahead, auto))]
            works = {way: Redrawing(model, batch, study, way) for way in ways}
            if study.strides:
                k = max(study.strides)
                drafting = TensorAR(model.backbone, presets.tuned(k=k)).eval()
                drafting.sampling = model.sampling
                works |= {
                    way: Redrawing(drafting, batch, study, way)
                    for way in (Way(k, stride) for stride in study.strides)
                }
            if study.speed != "eager":
                for work in works.values():
                    work.draw(0, study.most_calls)
            about = {"base": base, "batch": batch, "speed": study.speed, "auto": auto}
            for way, (calls, processor, wall) in least_of_rounds(works, study).items():
                images = works[way].images
                row: dict = way._asdict() | {"images": images, "calls": calls}
                row["ms_per_call"] = 1e3 * wall / calls
                row["processor_ms_per_call"] = 1e3 * processor / calls
                if not study.most_calls:
                    row["s_per_image"] = wall / images
                    row["processor_s_per_image"] = processor / images
                yield about | row


def least_of_rounds(
    works: dict[Way, Redrawing], study: Study
) -> dict[Way, tuple[int, float, float]]:
    """For each way, the calls, processor seconds and wall-clock seconds of all its batches, using
    the fastest of several rounds for each batch. All ways draw a batch before the next one begins.

    They do not take turns step by step as in `launch.measure.turns`, because how many calls a batch
    needs depends on how many guesses are right.
    """
    least: dict[Way, list[tuple[int, float, float]]] = {way: [] for way in works}
    for i in range(len(next(iter(works.values())).batches)):
        taken = [
            {way: work.draw(i, study.most_calls) for way, work in works.items()}
            for _ in range(study.rounds)
        ]
        for way, own in least.items():
            calls, processor, wall = zip(*(turn[way] for turn in taken), strict=True)
            own.append((calls[0], min(processor), min(wall)))
    sums = {way: [sum(each) for each in zip(*own, strict=True)] for way, own in least.items()}
    return {way: (int(calls), cpu, wall) for way, (calls, cpu, wall) in sums.items()}

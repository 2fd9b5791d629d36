"""Metrics that are not rewarded: other benchmarks, diversity, and how a model that also writes
continues fixed texts. Images are drawn as in the run, with fixed prompts and random numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dpg_bench.dpg_benchmark import load_questions
from geneval.geneval_benchmark import load_prompts
from geneval.prompts import TAGS
from t2i.generation import all_jobs, draw_images
from t2i.processes import Processes
from t2i.reward.panel import Panel, RewardError
from t2i.reward.policy import Start
from t2i.reward.reward_options import RewardConfig
from t2i.reward.rewards import judging
from t2i.sampling import DrawOptions
from t2i.tensorar.model import TensorAR


def benchmark_of(name: str, world: str, per_task: int) -> list[dict]:
    """The benchmark entries on which a built-in reward is watched: `per_task` per task (0: all)."""
    if name == "dpg":
        graph = load_questions(world)
        items = [{"prompt": graph.prompts[i], "questions": q} for i, q in graph.items.items()]
        step = max(1, len(items) // (len(TAGS) * per_task)) if per_task else 1
        return items[::step]
    every = load_prompts(world)
    by_task = [[entry for entry in every if entry["tag"] == tag] for tag in TAGS]
    return [entry for entries in by_task for entry in entries[: per_task or None]]


class WatchedBenchmarks:
    """Draws and judges the benchmarks of `reward.watch`; every process does its share.

    Raises:
        UserError: a judge cannot judge a benchmark's prompts.
    """

    def __init__(self, config: RewardConfig, panel: Panel, processes: Processes):
        self._config, self._panel, self._processes = config, panel, processes
        options = judging(config)
        # All but dpg share one set of images.
        self._benchmarks = {n: "dpg" if n == "dpg" else "geneval" for n in options.watch}
        self._entries: dict[str, list[dict]] = {}
        for name, kind in self._benchmarks.items():
            if kind not in self._entries:
                self._entries[kind] = benchmark_of(name, options.world, options.watch_prompts)
            panel.check(self._entries[kind], [name])

    def __call__(self, model: TensorAR) -> dict[str, float]:
        """Mean rewards, and the diversity of images of the first benchmark."""
        found: dict[str, float] = {}
        drawn = {kind: self._draw(model, entries) for kind, entries in self._entries.items()}
        for name, kind in self._benchmarks.items():
            asked = [self._entries[kind][one.prompt_index] for one in drawn[kind]]
            pictures = [one.image for one in drawn[kind]]
            values = together(self._processes, partial(self._panel.judge, name, pictures, asked))
            every = [value for share in values for value in share]
            found[f"watch/{name}"] = sum(every) / len(every)
        if drawn:
            found |= self._diversity(next(iter(drawn.values())), model)
        return found

    def _draw(self, model: TensorAR, entries: list[dict]) -> list:
        options, processes = self._config.reward, self._processes
        jobs = all_jobs(range(len(entries)), options.watch_images)
        mine = jobs[processes.rank :: processes.world_size]
        drawing = DrawOptions(self._config.seed, options.sampling, options.draw_batch)
        prompts = [entry["prompt"] for entry in entries]
        return list(draw_images(model, prompts, drawing, jobs=mine, progress=False))

    def _diversity(self, images: list, model: TensorAR) -> dict[str, float]:
        """`diversity` of images drawn by all processes."""
        mine = [
            (one.prompt_index, model.windows.final_codes(one.windows[None])[0]) for one in images
        ]
        by_prompt: dict[int, list[Tensor]] = {}
        for share in self._processes.gather(mine):
            for prompt, codes in share:
                by_prompt.setdefault(prompt, []).append(codes)
        return diversity(by_prompt)


def diversity(by_prompt: Mapping[int, list[Tensor]]) -> dict[str, float]:
    """Given the codes [T, S] of each prompt's images: the mean share of codes that differ between
    two of them, and the mean share of distinct images.
    """
    pairs = [
        float((a != b).any(-1).float().mean())
        for images in by_prompt.values()
        for a, b in combinations(images, 2)
    ]
    distinct = [
        len({tuple(codes.flatten().tolist()) for codes in images}) / len(images)
        for images in by_prompt.values()
    ]
    found = {"watch/distinct": sum(distinct) / len(distinct)}
    return found | ({"watch/diversity": sum(pairs) / len(pairs)} if pairs else {})


@dataclass(frozen=True)
class Drift:
    """How the next-word distributions of a model that also writes changed on a text."""

    words: int
    """Number of positions."""
    kl: float
    """Divergence of the distributions before from those after, mean over positions, nats."""
    entropy: float
    """Entropy of the distributions before, mean over positions, nats."""
    changed: float
    """Share of positions at which another word is now the likeliest."""
    largest: float
    """Largest absolute change of a logit."""


def drift(before: Tensor, after: Tensor) -> Drift:
    """The drift between two sets of logits [L, vocabulary] on the same text."""
    before, after = before.float(), after.float()
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    p = log_p.exp()
    return Drift(
        words=len(before),
        kl=float((p * (log_p - log_q)).sum(-1).mean()),
        entropy=float(-(p * log_p).sum(-1).mean()),
        changed=float((before.argmax(-1) != after.argmax(-1)).float().mean()),
        largest=float((after - before).abs().max()),
    )


@torch.no_grad()
def text_kl(model: TensorAR, start: Start) -> dict[str, float]:
    """The drift from the start on the backbone's fixed texts; {} if it does not write."""
    now = model.backbone.fixed_text_logits()
    if now is None:
        return {}
    with start.applied():
        before = model.backbone.fixed_text_logits()
    assert before is not None, "the same model"
    return {"watch/text_kl": drift(before, now).kl}


def together(processes: Processes, work: Callable[[], Any]) -> list:
    """Every process's result of `work`, by rank; if one raises RewardError, all do."""
    made, wrong = None, None
    try:
        made = work()
    except RewardError as error:
        if processes.world_size == 1:
            raise
        wrong = error
    everywhere = processes.gather((made, None if wrong is None else str(wrong)))
    if said := next((text for _, text in everywhere if text is not None), None):
        raise RewardError(said) from wrong
    return [made for made, _ in everywhere]

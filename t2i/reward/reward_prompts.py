"""The prompts of reward fine-tuning: from GenEval's grammar or a file, without benchmark prompts.

The prompts of a step depend only on the step and the seed: tasks take turns, and each goes through
all its prompts in its own random order before repeating any.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from geneval.prompts import TAGS, draw_prompts, official_prompts
from t2i.data.order import sample_index
from t2i.errors import UserError, choose_one
from t2i.evaluation.prompt_files import read_prompts
from t2i.files import text_sha256
from t2i.reward.reward_options import RewardOptions
from t2i.shapes.shapes_prompts import all_prompts, benchmark_prompts, every_prompt, is_held_out
from t2i.shapes.shapes_questions import shapes_questions

log = logging.getLogger(__name__)

_OFFICIAL_SEED, _PER_TASK = 1_000_003, 3000
"""Seed of GenEval's generator (not that of its 553 prompts), and prompts drawn per task."""


@dataclass(frozen=True)
class PromptPool:
    """Prompt entries by task, in the order in which tasks take turns."""

    tasks: dict[str, list[dict]]
    seed: int
    left_out: int
    """Number of prompts removed because a benchmark has them."""

    def at(self, step: int, count: int) -> list[dict]:
        """The entries of a step that draws `count` prompts."""
        turns = list(self.tasks.values())
        found = []
        for place in range(step * count, (step + 1) * count):
            number = place % len(turns)
            entries = turns[number]
            at = sample_index(place // len(turns), len(entries), self.seed + number)
            found.append(entries[at])
        return found

    def every(self) -> list[dict]:
        """All entries."""
        return [entry for entries in self.tasks.values() for entry in entries]


def prompt_hash(prompt: str) -> str:
    """A hash of a prompt's words, ignoring case and spacing."""
    return text_sha256(" ".join(prompt.lower().split()))


@lru_cache
def benchmark_hashes() -> frozenset[str]:
    """Hashes of GenEval's 553 prompts, and of all prompts of the shapes world's benchmarks."""
    held_out = [entry for entry in every_prompt() if is_held_out(entry)]
    entries = [*official_prompts(), *benchmark_prompts(), *held_out]
    prompts = [*(entry["prompt"] for entry in entries), *shapes_questions().prompts.values()]
    return frozenset(map(prompt_hash, prompts))


def training_prompts(options: RewardOptions, seed: int) -> PromptPool:
    """The prompts that a run may draw.

    Raises:
        UserError: unknown task or file, or no prompts are left without those of benchmarks.
    """
    if options.prompts in ("shapes", "official"):
        found = {task: _of_task(task, options.prompts) for task in options.tasks}
    else:
        path = Path(options.prompts)
        if not path.is_file():
            raise UserError(
                f"reward.prompts={options.prompts} is not a file; give shapes, official, or a .txt "
                "or .jsonl file"
            )
        found = {path.name: read_prompts((), path)}
    hashes = benchmark_hashes()
    kept = {
        task: [entry for entry in entries if prompt_hash(entry["prompt"]) not in hashes]
        for task, entries in found.items()
    }
    if empty := [task for task, entries in kept.items() if not entries]:
        raise UserError(
            f"reward.prompts: all {len(found[empty[0]])} prompts of {empty[0]} belong to a "
            "benchmark, so none is left to learn from; leave it out"
        )
    left_out = sum(len(found[task]) - len(kept[task]) for task in found)
    return PromptPool(kept, seed, left_out)


def _of_task(task: str, words: str) -> list[dict]:
    if task not in TAGS:
        raise UserError(f"reward.tasks: unknown {task!r}; {choose_one(task, TAGS)}")
    return all_prompts(task) if words == "shapes" else _official()[task]


@lru_cache
def _official() -> dict[str, list[dict]]:
    drawn = draw_prompts(_OFFICIAL_SEED, _PER_TASK)
    return {task: [entry for entry in drawn if entry["tag"] == task] for task in TAGS}

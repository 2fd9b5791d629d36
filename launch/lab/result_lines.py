"""The results of studies with many runs: OUT/results.jsonl, one line per result (a study that is
started again skips those), and their means with standard errors.

Shapes: R seeds, P prompts.
"""

import fcntl
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2i.files import read_json_lines

TASKS = 6
"""Tasks of the benchmark; its prompts are sorted by task, the same number for each."""


def results(out: Path) -> list[dict]:
    """All result lines in the folder; none if it has no results.jsonl."""
    path = out / "results.jsonl"
    return read_json_lines(path) if path.exists() else []


def append(out: Path, lines: Sequence[dict], shown: Sequence[str]) -> None:
    """Append the lines, and print their `shown` fields. A lock keeps the lines together if other
    processes append to the file as well.
    """
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(line, default=str) + "\n" for line in lines))
    for line in lines:
        print(json.dumps({name: line[name] for name in shown if name in line}), flush=True)


def scores(verdicts: Sequence[bool], metadata: Sequence[dict], each: int) -> dict:
    """The score, its value for each task, and how many of the `each` images per prompt are correct.

    `verdicts` lists a prompt's images one after another, in the order of `metadata`.
    """
    correct = [int(sum(verdicts[i : i + each])) for i in range(0, len(verdicts), each)]
    tags: dict[str, list[float]] = {}
    for entry, count in zip(metadata, correct, strict=True):
        tags.setdefault(entry["tag"], []).append(count / each)
    means = {tag: float(np.mean(shares)) for tag, shares in tags.items()}
    return {"score": float(np.mean(list(means.values()))), "tags": means, "correct": correct}


def rates(lines: Sequence[dict]) -> np.ndarray:
    """Shares of correct images [R, P], from one line per seed."""
    return np.array([x["correct"] for x in lines]) / lines[0]["settings"]["samples"]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (NaN: unknown, as there is only one seed)."""

    mean: float
    error: float

    def told(self, digits: int = 3, *, signed: bool = False) -> str:
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if np.isnan(self.error) else f"{mean} ± {self.error:.{digits}f}"


def over_seeds(values: Sequence[float]) -> Estimate:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), float(error))


def estimate(rates_RP: np.ndarray, tasks: int = TASKS) -> Estimate:
    """Mean of the prompts' rates, or of differences between rates, with the larger of two standard
    errors: over training seeds, and over prompts (of the mean over seeds, stratified by task).
    """
    by_task = rates_RP.mean(0).reshape(tasks, -1)
    over_prompts = np.sqrt((by_task.var(1, ddof=1) / by_task.shape[1]).sum()) / tasks
    of_seeds = over_seeds(rates_RP.mean(1))
    return Estimate(of_seeds.mean, float(np.fmax(over_prompts, of_seeds.error)))

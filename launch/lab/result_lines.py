"""What a study of many runs leaves in OUT/results.jsonl, a line for each result, by whose key it is
not done again; and what is said of it: means with standard errors.

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
"""Of the benchmark; their prompts stand one after the other, as many of each."""


def results(out: Path) -> list[dict]:
    """All lines."""
    path = out / "results.jsonl"
    return read_json_lines(path) if path.exists() else []


def append(out: Path, lines: Sequence[dict], shown: Sequence[str]) -> None:
    """Add lines together, and print what is shown of them; other processes may do so, too."""
    with open(out / "results.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(line, default=str) + "\n" for line in lines))
    for line in lines:
        print(json.dumps({name: line[name] for name in shown if name in line}), flush=True)


def scores(verdicts: Sequence[bool], metadata: Sequence[dict], each: int) -> dict:
    """Score, by task, and how many of `each` images of a prompt are right."""
    correct = [int(sum(verdicts[i : i + each])) for i in range(0, len(verdicts), each)]
    tags: dict[str, list[float]] = {}
    for entry, count in zip(metadata, correct, strict=True):
        tags.setdefault(entry["tag"], []).append(count / each)
    means = {tag: float(np.mean(rates)) for tag, rates in tags.items()}
    return {"score": float(np.mean(list(means.values()))), "tags": means, "correct": correct}


def rates(lines: Sequence[dict]) -> np.ndarray:
    """Shares of images that are right, of a line for each seed: [R, P]."""
    return np.array([x["correct"] for x in lines]) / lines[0]["settings"]["samples"]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (NaN where one seed tells none)."""

    mean: float
    error: float

    def told(self, digits: int = 3, *, signed: bool = False) -> str:
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if np.isnan(self.error) else f"{mean} ± {self.error:.{digits}f}"


def over_seeds(values: Sequence[float]) -> Estimate:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), float(error))


def estimate(rates_RP: np.ndarray, tasks: int = TASKS) -> Estimate:
    """Of prompts' rates, or differences of them, with the larger of two standard errors: over
    training seeds, and over prompts (stratified by task, of the mean over seeds).
    """
    by_task = rates_RP.mean(0).reshape(tasks, -1)
    over_prompts = np.sqrt((by_task.var(1, ddof=1) / by_task.shape[1]).sum()) / tasks
    of_seeds = over_seeds(rates_RP.mean(1))
    return Estimate(of_seeds.mean, float(np.fmax(over_prompts, of_seeds.error)))

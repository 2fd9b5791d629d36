"""The paper's ablation table on the offline shapes world; the same command resumes it.

Each row changes one aspect of the ICLR 2026 method. All runs, including the control (the base
without TensorAR), start from the same base and use the same data, steps and learning rates. The
table is laid out as in the paper, with two measures: a distance between drawn and true scenes
instead of FID (lower is better), and GenEval's score by the exact detector instead of IS. Each
number is a mean over seeds ± its standard error (for scores the larger of the errors over seeds
and over prompts).

    python launch/ablate.py --base runs/bases/1m --out runs/ablation
    python launch/ablate.py --tiny            # checks in a few minutes on a CPU that it runs
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.lab.long_grid import LongGrid, do_what_is_left, planned
from launch.lab.result_lines import estimate, over_seeds, rates, results
from t2i import cli
from t2i.evaluation.results import markdown_table
from t2i.fields import given_options
from t2i.files import write_text


@dataclass(frozen=True)
class Ablation:
    """What to run."""

    out: Path = Path("runs/ablation")
    """Folder for the codes, results.jsonl and table.md."""
    base: str = "shapes"
    """Folder of the base that all runs start from; "shapes" is the shipped one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, also used for sampling."""
    steps: int = 1500
    """Optimizer steps of each run."""
    batch_size: int = 32
    """Samples per step."""
    images: int = 48_000
    """Scenes to train on."""
    samples: int = 8
    """Images for each of 120 prompts."""
    minutes: float = math.inf
    """Start no further run after this many minutes."""
    at_once: int = 4
    """Runs that share the GPU at the same time."""
    workers: int = 2
    """Processes that draw scenes and judge images."""
    device: str = "auto"
    """auto, cpu or cuda."""
    tiny: bool = False
    """A few steps, scenes and images, unless they are given: the numbers mean nothing."""

    def grid(self) -> LongGrid:
        shared = {k: v for k, v in vars(self).items() if k not in ("base", "tiny")}
        if self.tiny:
            given = given_options(self)
            shared |= {name: few for name, few in _TINY.items() if name not in given}
        return LongGrid("ablation", bases=(f"base={self.base}",), **shared)


_TINY = {
    "steps": 2,
    "batch_size": 2,
    "images": 16,
    "held_out": 4,
    "workers": 0,
    "samples": 1,
    "prompts_per_task": 2,
    "draw_batch": 6,
}


ROWS = {
    "noise schedule": {
        "linear": "linear",
        "sine": "sine",
        "sqrt": "sqrt",
        "exponential": "iclr2026",
    },
    "window size k": {"2": "k = 2", "4": "iclr2026", "8": "k = 8"},
    "depth of the codec": {"1": "iclr2026", "2": "depth 2", "4": "depth 4"},
    "residual": {"first": "iclr2026", "all": "residual all", "none": "residual none"},
    "noise": {"categorical": "iclr2026", "codebook": "codebook", "continuous": "gaussian"},
    "weight of drafts": {
        "1": "iclr2026",
        "0.3": "draft weights 0.3",
        "0.03": "draft weights 0.03",
    },
    "drafts in training": {"noised truth": "iclr2026", "own": "own drafts"},
    "without TensorAR": {"": "control, falling rate"},
}
"""Rows of the table; each maps the names of its cells to arms of launch/lab/long_arms.py."""


def table(lines: list[dict]) -> str:
    """The ablation as a markdown table; the paper's default is marked with *."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        found.setdefault(line["arm"], []).append(line)

    def cell(name: str, arm: str) -> str:
        seeds = found.get(arm, [])
        if not seeds:
            return f"{name}: not run"
        distance = over_seeds([line["distance"] for line in seeds])
        told = f"{distance.told(2)}, {estimate(rates(seeds)).told(3)}"
        mark = "*" if arm == "iclr2026" else ""
        return f"{name}{mark}: {told}" if name else told

    rows = [
        [title, " / ".join(cell(*pair) for pair in cells.items())] for title, cells in ROWS.items()
    ]
    seeds = sorted({line["seed"] for line in lines})
    ran = sorted({(line["steps"], line["settings"]["batch_size"]) for line in lines})
    told = " and ".join(f"{steps} steps of batch {batch}" for steps, batch in ran)
    about = f"Seeds {', '.join(map(str, seeds))}; {told}; * the paper's default."
    return f"{markdown_table(('changed', 'distance, score'), rows)}\n\n{about}\n"


def main() -> None:
    config = cli.parse(Ablation, __doc__)
    grid = config.grid()
    do_what_is_left(grid)
    keys = {run.key(grid) for run in planned(grid)}
    lines = [line for line in results(config.out) if line.get("key") in keys]
    print(write_text(config.out / "table.md", table(lines)).read_text())


if __name__ == "__main__":
    cli.run(main)

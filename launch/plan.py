"""Plan a run on a cluster before you have it: steps, hours, shards, checkpoints, memory and disk,
computed from settings and shapes alone. A run that is impossible is refused.

python launch/plan.py t2i-xl-256-tuned --gpus 64 --images 100e6 --batch-size 512
python launch/plan.py janus-pro-7b-full-zero3 --gpus 32 --images 100e6 --epochs 1 --disk 20000

The recipe's own options are those of its training program.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.training.cluster import Cluster
from t2i.training.config import DataOptions, LabelledOptions, TrainConfig
from t2i.training.recipes import recipes_for, settle_options

_MAIN = (
    *(f"cluster.{name}" for name in ("gpus", "gpus_per_node", "gpu_memory", "disk", "images")),
    *("cluster.images_per_second", "cluster.encoded_per_second", "cluster.hours"),
    *("run.batch_size", "run.epochs", "run.steps", "run.engine.micro_batch"),
    *("run.engine.zero_stage", "run.method.k"),
)


@dataclass(frozen=True)
class PlannedRun:
    """A cluster and the run to train on it."""

    # name="" leaves these two names out of the option names.
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = field(default_factory=Cluster)
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def settle(planned: PlannedRun, own: PlannedRun) -> PlannedRun:
    """The settings that the training program would make of the run's options; own: the recipe."""
    return replace(planned, run=settle_options(planned.run, own.run))


def main() -> None:
    recipes = recipes_for(DataOptions) | recipes_for(LabelledOptions)
    planned = {name: (about, PlannedRun(run=run)) for name, (about, run) in recipes.items()}
    config = cli.parse_recipe(planned, __doc__, main=_MAIN, settle=settle)
    from t2i.training.scale import plan_cluster

    print(plan_cluster(config.run, config.cluster))


if __name__ == "__main__":
    cli.run(main)

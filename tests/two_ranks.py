"""Run by test_ranks.py: trainings of two processes, one after another, because importing PyTorch
and DeepSpeed is what takes long. By itself it forks the two behind its imports.

    python tests/two_ranks.py FOLDER
    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER rare

FOLDER is a `tiny_world` with the run "plain". It trains under the ZeRO stages that users share a
model with, draws, and stops a run by a signal that only one rank gets; "rare" is the other stages.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import deepspeed  # noqa: F401
import torch
import transformers.modeling_utils  # noqa: F401
from forks import exit_codes, start_ranks
from runs import before_step, draw, tiny_janus_run, tiny_run

from t2i.training.loop import Run, train

JANUS = {"tuning": "lora", "train_image_layers": True}
DRAWN = ("plain", "ranks-zero2", "ranks-zero3-lora")
"""Runs of whose checkpoints the first rank draws into drawn/."""


def zero3(root: Path) -> dict:
    """DeepSpeed keeps small parameters whole by default, which would hide errors with sharded ones
    in a tiny model.
    """
    settings = root / "zero3.json"
    content = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings.write_text(json.dumps(content))
    return {"engine__zero_stage": 3, "engine__deepspeed_config": settings}


def main(root: Path) -> None:
    train(tiny_run(root, "ranks-zero2", engine__zero_stage=2))
    train(tiny_run(root, "ranks-zero3", log__sample_every=1, **zero3(root)))
    train(tiny_run(root, "ranks-zero3-lora", tuning="lora", **zero3(root)))
    train(tiny_janus_run(root, "ranks-janus-zero2", engine__zero_stage=2, **JANUS))
    if os.environ["RANK"] == "0":
        for name in DRAWN:
            draw(root / "runs" / name, root / "drawn" / name)

    def stop(run: Run) -> None:
        if run.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(KeyboardInterrupt), before_step(1, stop):
        train(tiny_run(root, "ranks-stopped", steps=1000))


def rare(root: Path) -> None:
    train(tiny_run(root, "ranks-zero0"))
    train(tiny_run(root, "ranks-zero1", engine__zero_stage=1))
    train(tiny_janus_run(root, "ranks-janus-zero3", **zero3(root), **JANUS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["rare"]:
        rare(Path(sys.argv[1]))
    else:
        assert exit_codes(start_ranks(lambda: main(Path(sys.argv[1])), 2)) == [0, 0]

"""Run by test_ranks.py on two processes of one torchrun launch (importing PyTorch and DeepSpeed is
what takes long).

    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER [rare]

FOLDER is a `tiny_world` with the run "plain". It trains under the ZeRO stages that users share a
model with, draws, and stops a run by a signal that only one rank gets; "rare" is the other stages.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from helpers import Killed
from runs import before_step, draw, kill, tiny_janus_run, tiny_run

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

    with suppress(Killed), before_step(2, kill):
        train(tiny_run(root, "two-then-one", engine__zero_stage=2, log__save_every=1))
    train(tiny_run(root, "one-then-two", log__save_every=1, resume=True, **zero3(root)))


def rare(root: Path) -> None:
    train(tiny_run(root, "ranks-zero0"))
    train(tiny_run(root, "ranks-zero1", engine__zero_stage=1))
    train(tiny_janus_run(root, "ranks-janus-zero3", **zero3(root), **JANUS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    (rare if sys.argv[2:] == ["rare"] else main)(Path(sys.argv[1]))

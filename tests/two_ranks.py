"""Run by test_training.py on two processes of one torchrun launch (importing PyTorch and DeepSpeed
is what takes long).

    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER

FOLDER is a `tiny_world`. It trains under the ZeRO stages that the `deepspeed` launch of the tests
leaves out, and stops a run by a signal that only one rank gets.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from runs import tiny_janus_run, tiny_run

from t2i.training.loop import Run, train


def main(root: Path) -> None:
    # DeepSpeed keeps small parameters whole by default, which would hide errors with sharded ones
    # in a tiny model.
    settings = root / "zero3.json"
    content = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings.write_text(json.dumps(content))
    zero3 = {"engine__zero_stage": 3, "engine__deepspeed_config": settings}
    train(tiny_run(root, "ranks-zero0"))
    train(tiny_run(root, "ranks-zero1", engine__zero_stage=1))
    train(tiny_run(root, "ranks-zero3", log__sample_every=1, **zero3))
    train(tiny_run(root, "ranks-zero3-lora", tuning="lora", **zero3))
    janus = {"tuning": "lora", "train_image_layers": True}
    train(tiny_janus_run(root, "ranks-janus-zero2", engine__zero_stage=2, **janus))
    train(tiny_janus_run(root, "ranks-janus-zero3", **zero3, **janus))
    plain_step = Run.train_step

    def step_and_signal(run: Run) -> dict[str, float]:
        if run.processes.rank == 1 and run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(run)

    Run.train_step = step_and_signal
    with suppress(KeyboardInterrupt):
        train(tiny_run(root, "ranks-stopped", steps=1000))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

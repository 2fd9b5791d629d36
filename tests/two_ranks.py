"""Run by test_ranks.py: training runs by two processes, one after another, because importing
PyTorch and DeepSpeed takes longest. Without torchrun it imports them once and forks both processes.

    python tests/two_ranks.py FOLDER
    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER rare

FOLDER is a `tiny_world` with the run "plain". It trains under the ZeRO stages that shard a
model, draws, and stops a run by a signal to one rank only; "rare" adds the other stages and Janus.
"""

import errno
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import transformers.modeling_utils  # noqa: F401
from forks import exit_codes, start_ranks
from runs import before_step, draw, tiny_janus_run, tiny_run
from torch import nn

from t2i.errors import UserError
from t2i.training.engine import start_processes
from t2i.training.loop import train
from t2i.training.state import StoredState, write_state
from t2i.training.training_run import Run
from t2i.weights import save_weights

JANUS = {"tuning": "lora", "train_image_layers": True}
DRAWN = ("plain", "ranks-zero2", "ranks-zero3-lora")
"""Runs of whose checkpoints the first rank draws into drawn/."""


def zero3(root: Path) -> dict:
    """By default DeepSpeed keeps small parameters whole, which in a tiny model would hide errors
    with sharded ones.
    """
    settings = root / "zero3.json"
    content = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings.write_text(json.dumps(content))
    return {"engine__zero_stage": 3, "engine__deepspeed_config": settings}


def main(root: Path) -> None:
    train(tiny_run(root, "ranks-zero2", engine__zero_stage=2, log__save_every=1))
    train(tiny_run(root, "ranks-zero3-lora", steps=1, tuning="lora", **zero3(root)))
    for stage in (1, 2, 3):
        odd_sizes(root, stage)
    if os.environ["RANK"] == "0":
        for name in DRAWN:
            draw(root / "runs" / name, root / "drawn" / name)

    def stop(run: Run) -> None:
        if run.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    full_disk(root)
    missing_data(root)
    other_options(root)
    with suppress(KeyboardInterrupt), before_step(1, stop):
        train(tiny_run(root, "ranks-stopped", steps=1000))

    train(tiny_run(root, "one-then-two", resume=True, log__sample_every=3, **zero3(root)))


def full_disk(root: Path) -> None:
    """The second process has no room for its share of a checkpoint."""

    def save(path: Path, tensors: dict) -> None:
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_weights(path, tensors)

    with patch("t2i.training.state.save_weights", save):
        try:
            train(tiny_run(root, "ranks-full", steps=1))
        except UserError as error:
            (root / f"full-{os.environ['RANK']}.txt").write_text(str(error))


def missing_data(root: Path) -> None:
    """The second process, as if on another machine, does not find the data."""
    rank = os.environ["RANK"]
    own = {"data__source": str(root / "nowhere")} if rank == "1" else {}
    try:
        train(tiny_run(root, "ranks-missing", steps=1, **own))
    except UserError as error:
        (root / f"missing-{rank}.txt").write_text(str(error))


def other_options(root: Path) -> None:
    """The second process, as if its machine's command had been edited, has another seed. A prompt
    is longer than any path.
    """
    rank, prompts = os.environ["RANK"], ("a red circle " * 30,)
    try:
        train(tiny_run(root, "ranks-other", steps=1, seed=int(rank), log__prompts=prompts))
    except UserError as error:
        (root / f"other-{rank}.txt").write_text(str(error))


def odd_sizes(root: Path, stage: int) -> None:
    """A training state with parameters that two processes cannot halve, and a fresh engine that
    continues from it.
    """

    def started():
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
        state = root / f"odd-{stage}" / "first"
        stored = StoredState(state, model) if state.exists() else None
        if stored is not None:
            stored.load_weights()
        groups = [{"params": [p for p in model.parameters() if p.dim() == d]} for d in (1, 2)]
        config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}
        config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config |= {"zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0}
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if stored is not None:
            stored.load_optimizer(engine)
        return engine, model

    def step_and_save(engine, model, name: str) -> None:
        engine.backward(engine(torch.tensor([[0.1, -0.2, 0.3]])).sum())
        engine.step()
        folder = root / f"odd-{stage}" / name
        processes.on_main(lambda: folder.mkdir(parents=True))
        write_state(engine, model, {}, folder, processes)
        processes.barrier()

    processes = start_processes()
    torch.manual_seed(stage)
    engine, model = started()
    step_and_save(engine, model, "first")
    torch.manual_seed(100)
    other = started()
    step_and_save(engine, model, "second")
    step_and_save(*other, "other")


def rare(root: Path) -> None:
    train(tiny_run(root, "ranks-zero0"))
    train(tiny_run(root, "ranks-zero1", engine__zero_stage=1))
    train(tiny_run(root, "ranks-zero3", **zero3(root)))
    train(tiny_janus_run(root, "ranks-janus-zero2", engine__zero_stage=2, **JANUS))
    train(tiny_janus_run(root, "ranks-janus-zero3", **zero3(root), **JANUS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["rare"]:
        rare(Path(sys.argv[1]))
    else:
        assert exit_codes(start_ranks(lambda: main(Path(sys.argv[1])), 2)) == [0, 0]

"""Run by test_class_shapes.py: programs for class-conditional models, as one process and as two,
killed in the middle of their work.

    python tests/killed_classes.py BASE OUT

BASE is a base of launch/lab/pretrain_class_shapes.py, with its images in the same folder. Processes
are forked from this one, so that imports, which would take most of the time, happen once; each has
the environment that torchrun would give it, and is killed by SIGKILL. In OUT, `<program>-whole`
holds the output of one undisturbed process, `<program>-<processes>` that of the killed ones and a
last run, and kills.json how many died.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401
import torch
import transformers.modeling_utils  # noqa: F401
from forks import exit_codes, start_ranks

import t2i.evaluation.draw
import t2i.training.loop  # noqa: F401
from launch import sample_imagenet, train_imagenet
from t2i import cli
from t2i.training import examples

MOMENTS = (2, 7)
"""Of the ten pieces of work, how many are done when a kill comes."""


def arguments(program, base: Path, out: Path) -> list[str]:
    """The options of a run whose work takes some tenths of a second."""
    if program is sample_imagenet:
        options = f"--base.family rar --base.weights {base} --count 40 --batch-size 4 --out {out}/images.npz"
    else:
        options = (
            f"rar-shapes --backbone.weights {base} --data.source {base.parent}/images "
            f"--data.cache-dir {out}/cache --run-dir {out}-run --data.validation-samples 16 --batch-size 16 "
            "--engine.micro-batch 8 --steps 1 --log.sample-every 0 --log.tracker none"
        )
    return [program.__file__, *options.split()]


def start(program, words: list[str], count: int) -> list[int]:
    """Start this many processes of one program; returns their ids."""

    def run() -> None:
        sys.argv = words
        cli.run(program.main)

    return start_ranks(run, count)


def main(base: Path, out: Path) -> None:
    torch.set_num_threads(1)
    examples.IMAGES_PER_SHARD = 8  # otherwise the few images would be one shard
    kills = {}
    for program in (sample_imagenet, train_imagenet):
        name = Path(program.__file__).stem
        assert exit_codes(start(program, arguments(program, base, out / f"{name}-whole"), 1)) == [0]
        for count in (1, 2):
            folder = out / f"{name}-{count}"
            words = arguments(program, base, folder)
            kills[folder.name] = sum(kill(start(program, words, count), folder, m) for m in MOMENTS)
            assert exit_codes(start(program, words, count)) == [0] * count
    (out / "kills.json").write_text(json.dumps(kills))


def kill(ids: list[int], folder: Path, pieces: int) -> bool:
    """Kill the processes once this many pieces of work are done; returns whether they were still
    alive.
    """
    alive = os.WEXITED | os.WNOHANG | os.WNOWAIT
    marks = ("*.parts/*.npy", "shard_*.safetensors")
    while sum(len(list(folder.glob(f"**/{mark}"))) for mark in marks) < pieces:
        if any(os.waitid(os.P_PID, i, alive) for i in ids):
            break
        time.sleep(0.001)
    for i in reversed(ids):
        os.kill(i, signal.SIGKILL)
    return -signal.SIGKILL in exit_codes(ids)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Run by test_reward_runs.py: reward fine-tuning by two processes under ZeRO-2, forked behind the
imports.

    python tests/reward_ranks.py FOLDER        FOLDER is a `tiny_world`
"""

import sys
from pathlib import Path

import deepspeed  # noqa: F401
import transformers.modeling_utils  # noqa: F401
from forks import exit_codes, start_ranks
from runs import tiny_reward_run

from t2i.reward.reward_run import RewardRun
from t2i.training.loop import train


def main(root: Path) -> None:
    train(tiny_reward_run(root, "reward-ranks", engine__zero_stage=2), RewardRun)


if __name__ == "__main__":
    sys.exit(max(map(abs, exit_codes(start_ranks(lambda: main(Path(sys.argv[1])), 2)))))

"""Reward fine-tuning (GRPO): the model draws images; GenEval, DPG-Bench, CLIP or your own function
judges them; the model learns from the images that scored better than others of their prompt.

python launch/train_reward.py shapes-reward                            # offline, CPU or one GPU
python launch/train_reward.py shapes-reward --backbone.weights runs/mine --data.source my_images
python launch/train_reward.py janus-pro-1b-reward --data.source my_images --check
torchrun --nproc_per_node 8 launch/train_reward.py janus-pro-1b-reward --data.source my_images
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.reward import reward_recipes
from t2i.reward.reward_options import RewardConfig
from t2i.training.recipes import run_recipe

_MAIN_OPTIONS = (
    *("reward.functions", "reward.weights", "reward.prompts", "reward.tasks", "reward.group"),
    *("reward.kl", "reward.detector_weights", "log.validate_every"),
)


def main() -> None:
    run_recipe(reward_recipes.recipes(), __doc__, run=train, look=check, main=_MAIN_OPTIONS)


def train(config: RewardConfig) -> Path:
    """Run or resume a reward run; returns the last checkpoint folder."""
    from t2i.reward.reward_run import RewardRun
    from t2i.training import loop

    return loop.train(config, RewardRun)


def check(config: RewardConfig, world_size: int) -> str:
    """The text that --check prints."""
    from t2i.reward.reward_check import check as look

    return look(config, world_size)


if __name__ == "__main__":
    cli.run(main)

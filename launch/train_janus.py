"""Fine-tune Janus-Pro with TensorAR.

python launch/train_janus.py shapes-janus-lora --steps 100               # offline, CPU or one GPU
python launch/train_janus.py janus-pro-1b-lora --data.source my_images --check
deepspeed launch/train_janus.py janus-pro-7b-full-zero3 --data.source my_images --run-dir runs/mine
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.models.janus import janus_recipes
from t2i.training.recipes import run_recipe


def main() -> None:
    run_recipe(janus_recipes.recipes(), __doc__)


if __name__ == "__main__":
    cli.run(main)

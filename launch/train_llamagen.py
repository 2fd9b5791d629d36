"""Fine-tune LlamaGen text-to-image with TensorAR.

python launch/train_llamagen.py shapes-tuned --steps 100            # offline, CPU or one GPU
deepspeed launch/train_llamagen.py t2i-xl-256-tuned --data.source my_images --run-dir runs/mine
python launch/train_llamagen.py t2i-xl-256-lora --data.source my_images --check
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.models.llamagen import llamagen_recipes
from t2i.training.recipes import run_recipe


def main() -> None:
    run_recipe(llamagen_recipes.text_recipes(), __doc__)


if __name__ == "__main__":
    cli.run(main)

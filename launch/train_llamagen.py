"""Fine-tune LlamaGen text-to-image with TensorAR.

python launch/train_llamagen.py shapes-iclr2026 --steps 100            # offline, CPU or one GPU
deepspeed launch/train_llamagen.py t2i-xl-256-iclr2026 --data.source my_images --run-dir runs/mine
python launch/train_llamagen.py t2i-xl-256-lora --data.source my_images --check
"""

import os
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a clone, without installation

from t2i import cli
from t2i.training.config import RECIPES


def main() -> None:
    config = cli.parse_recipe(RECIPES, __doc__)
    if config.check:
        from t2i.training.check import check

        report = check(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        if cli.is_main_process():
            print(report)
        return
    from t2i.training.loop import train

    folder = train(config)
    if cli.is_main_process():
        print(f"checkpoint: {folder}\nrun page:   {config.run_dir / 'index.html'}")


if __name__ == "__main__":
    cli.run(main)

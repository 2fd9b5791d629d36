"""Fine-tune a class-conditional model with TensorAR: LlamaGen, Open-MAGVIT2 or RAR on ImageNet, or
offline on classes of shapes.

deepspeed launch/train_imagenet.py llamagen-l-384 --data.source /data/imagenet
deepspeed launch/train_imagenet.py rar-b --data.source maskgitvq.jsonl --epochs 2
python launch/train_imagenet.py open-magvit2-b --data.source /data/imagenet --check
# after launch/lab/pretrain_class_shapes.py
python launch/train_imagenet.py rar-shapes
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.training.config import LabelledOptions
from t2i.training.recipes import recipes_for, run_recipe


def main() -> None:
    run_recipe(recipes_for(LabelledOptions), __doc__)


if __name__ == "__main__":
    cli.run(main)

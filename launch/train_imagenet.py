"""Fine-tune a class-conditional model with TensorAR: LlamaGen, Open-MAGVIT2 or RAR on ImageNet, or
offline on classes of shapes.

deepspeed launch/train_imagenet.py --backbone llamagen --size L --resolution 384 \\
    --data.source /data/imagenet
deepspeed launch/train_imagenet.py --backbone rar --size B --data.source maskgitvq.jsonl --epochs 2
python launch/train_imagenet.py --backbone open_magvit2 --size B \\
    --data.source /data/imagenet --check
# after launch/lab/pretrain_class_shapes.py
python launch/train_imagenet.py --backbone rar --size shapes
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError
from t2i.training.recipes_imagenet import SHAPES_ROOT, ImageNetModel, imagenet_recipe
from t2i.training.training_program import MAIN_OPTIONS, run_config


def main() -> None:
    config = cli.parse_selected(ImageNetModel, imagenet_recipe, __doc__, main=MAIN_OPTIONS)
    weights = Path(config.backbone.weights)
    if weights == SHAPES_ROOT / config.backbone.family and not weights.exists():
        raise UserError(
            f"{weights} is not there yet: python launch/lab/pretrain_class_shapes.py --backbone {weights.name}"
        )
    run_config(config)


if __name__ == "__main__":
    cli.run(main)

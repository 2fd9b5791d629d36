"""Make the offline world of `launch/train_imagenet.py rar-shapes`: images by class, and a base.

    python launch/lab/pretrain_class_shapes.py --backbone rar --out runs/class-shapes

    runs/class-shapes/images/train/<class>/000000.png ...    one shape in one color: its class
    runs/class-shapes/rar/                                   the base, in official layouts

Each class is one shape in one color, named as in ImageNet (n00000000 ...). The tokenizer is trained
first, then the generator, with k = 1 from random weights, by the kit's own training loop. Nothing
of this is shipped, because making it takes only a few minutes on one core. After an interruption
the same command keeps what is finished and resumes the generator from its newest checkpoint;
another recipe in the same folder is refused.
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.shapes.tiny_recipes import ClassBase


def main() -> None:
    recipe = cli.parse(ClassBase, __doc__)
    from t2i.shapes.class_bases import make_class_base

    print(f"wrote {make_class_base(recipe)}")


if __name__ == "__main__":
    cli.run(main)

"""Make the offline world of `launch/train_imagenet.py rar-shapes`: images by class, and a base.

    python launch/lab/pretrain_class_shapes.py --backbone rar --out runs/class-shapes

    runs/class-shapes/images/train/<class>/000000.png ...    one shape in one colour: its class
    runs/class-shapes/rar/                                   the base, in official layouts

A class of the folder is shape x colour, named as in ImageNet (n00000000 ...). The tokenizer is
trained first, then the generator from random weights by the kit's own training loop, with k = 1.
Nothing of it is shipped: a few minutes on one core make it again. What was killed goes on, the
generator at its newest checkpoint; what is finished is kept, and only with the same recipe.
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

"""Pre-train a tiny offline base that draws captions: image tokenizer, then generator.

This program made the LlamaGen base with its T5-style text encoder in `t2i/assets/shapes` and, with
--family janus, the Janus in `t2i/assets/shapes-janus`. Running the command again keeps what is
finished. Bases may share an image tokenizer:

    python launch/lab/pretrain_shapes.py --out runs/shapes-base
    python launch/lab/pretrain_shapes.py --out runs/shapes-1m --dim 128 --layers 4 \\
        --tokenizer t2i/assets/shapes/vq.pt
    python launch/lab/pretrain_shapes.py --family janus --out runs/shapes-janus-base \\
        --tokenizer t2i/assets/shapes/vq.pt

With a GPU and several CPU cores, a larger base takes minutes; if the command is interrupted,
OUT/partial holds the base as last saved:

    python launch/lab/pretrain_shapes.py --out runs/shapes-7m --tokenizer t2i/assets/shapes/vq.pt \\
        --dim 256 --layers 8 --workers 16 --scenes 2000000 --minutes 6 \\
        --gpt-steps 1000000 --gpt-batch 512 --gpt-lr 1.5e-3 --compile

OUT/constant_rate holds the base as it was before its learning rate fell (published bases are like
that); OUT/scores.json holds the scores of both on the quickstart's prompts.
"""

import sys
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from t2i import cli
from t2i.shapes.tiny_recipes import CaptionBase


def main() -> None:
    recipe = cli.parse(CaptionBase, __doc__)
    from t2i.shapes.caption_bases import make_caption_base

    print(f"wrote {make_caption_base(recipe)}")


if __name__ == "__main__":
    cli.run(main)

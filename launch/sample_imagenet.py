"""Draw the 50,000 images of an ImageNet evaluation with a class-conditional model, for
`launch/fid.py`.

python launch/sample_imagenet.py --ckpt runs/rar-b --out outputs/rar-b.npz
torchrun --nproc_per_node 8 launch/sample_imagenet.py --ckpt runs/llamagen-l-384 \\
    --image-size 256 --labels random --out outputs/l384.npz
python launch/sample_imagenet.py --base.family rar --base.weights yucornetto/RAR:rar_b.bin \\
    --base.tokenizer fun-research/TiTok:maskgit-vqgan-imagenet-f16-256.bin \\
    --out outputs/rar-b-base.npz

By default each family and size uses the sampling settings that its authors used for their FID. The
same command resumes a killed run where it stopped.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.evaluation.evaluation_options import ClassImages
from t2i.model_options import DrawingModelOptions

_MAIN = (
    *("out", "ckpt", "base.family", "base.weights", "base.tokenizer", "seed"),
    *("images.count", "images.labels", "images.image_size"),
)


@dataclass(frozen=True, kw_only=True)
class ClassConfig(DrawingModelOptions):
    """What to draw, and with which model."""

    ckpt: str | None = None
    """Checkpoint, run (its newest checkpoint) or export folder."""
    out: Path
    """File to write (a name ending in .npz), or a folder for PNGs."""
    images: tyro.conf.OmitArgPrefixes[ClassImages] = field(default_factory=ClassImages)
    seed: int = 0
    """Seed of drawing; each image depends on the seed and on its own number only."""
    batch_size: int | None = None
    """Images drawn at once, per process; None: 64, or fewer if the GPU has too little memory."""


def main() -> None:
    config = cli.parse(ClassConfig, __doc__, main=_MAIN)
    from t2i.evaluation.draw import draw_classes, numbered_place
    from t2i.ownership import owning, remove_leftovers
    from t2i.processes import join_processes

    device, dtype = config.check()
    out, processes = config.out, join_processes(device)
    place = (out.parent, out.name) if out.suffix == ".npz" else (out, "")
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(owning(place[0], "image set", place[1]))
            images = config.images
            known = {"count": images.count, "labels": images.labels, "seed": config.seed}
            if config.batch_size is not None:
                known["batch_size"] = config.batch_size
            numbered_place(out, images.count).check(known)
            remove_leftovers(out)

        processes.on_main(claim)
        model = config.load(processes.device, dtype)
        draw_classes(model, out, config.images, config.drawing(model), processes)
    if processes.is_main:
        print(f"wrote {out}\nscore it: python launch/fid.py --samples {out} --reference REFERENCE")


if __name__ == "__main__":
    cli.run(main)

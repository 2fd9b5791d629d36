"""Draw the 50,000 images of an ImageNet evaluation from a class-conditional model, for
`launch/fid.py`.

python launch/sample_imagenet.py --ckpt runs/rar-b-256 --out outputs/rar-b.npz
torchrun --nproc_per_node 8 launch/sample_imagenet.py --ckpt runs/llamagen-l-384 \\
    --image-size 256 --labels random --out outputs/l384.npz
python launch/sample_imagenet.py --base.family rar --base.weights yucornetto/RAR:rar_b.bin \\
    --base.tokenizer fun-research/TiTok:maskgit-vqgan-imagenet-f16-256.bin --out
    outputs/rar-b-base.npz

Each family and size is sampled as its authors did for their FID, unless options say otherwise. A
run that was killed goes on where it stopped.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.model_options import ModelOptions
from t2i.sampling import SamplingOverrides

_MAIN = (
    "out",
    "ckpt",
    "base.family",
    "base.weights",
    "base.tokenizer",
    "count",
    "labels",
    "image_size",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelOptions):
    """What to draw, and with which model."""

    out: Path
    """A name ending in .npz, or a folder for PNGs."""
    count: int = 50_000
    """Number of images; the protocol has 50,000."""
    labels: Literal["balanced", "random"] = "balanced"
    """As many images of every class, or each image's class at random (LlamaGen's protocol)."""
    image_size: int | None = None
    """Side in pixels that images are resized to (256 for the published FID of 384 px models); the
    model's own if not given.
    """
    seed: int = 0
    """An image depends on the seed and its number."""
    batch_size: int = 64
    """Images sampled at once, per process."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = field(
        default_factory=SamplingOverrides
    )


def main() -> None:
    config = cli.parse(SampleConfig, __doc__, main=_MAIN)
    from t2i.evaluation.class_samples import ClassSamples, draw_class_samples
    from t2i.evaluation.sample_writer import check_place
    from t2i.files import owning
    from t2i.processes import join_processes

    chosen = ("count", "labels", "seed", "batch_size")
    given = {name: getattr(config, name) for name in chosen}
    options = ClassSamples(image_size=config.image_size, **given)
    device, dtype = config.check()
    config.sampling.check()
    out, processes = config.out, join_processes(device)
    place = (out.parent, out.name) if out.suffix == ".npz" else (out, "")
    with owning(place[0], "image set", place[1]) if processes.is_main else nullcontext():
        if processes.is_main:
            check_place(out, given)
        model = config.load(processes.device, dtype)
        draw_class_samples(
            model,
            out,
            options,
            sampling=config.sampling.apply(model.sampling),
            processes=processes,
            about=config.about(model),
        )
    if processes.is_main:
        print(f"wrote {out}\nscore it: python launch/fid.py --samples {out} --reference REFERENCE")


if __name__ == "__main__":
    cli.run(main)
